"One sound call for each public name of codes, codebooks, formats and storage"

import tempfile
from pathlib import Path

import torch
from torch import nn

from foundation.compression import codebooks, codes, formats, storage


def place(name):
    return Path(tempfile.mkdtemp()) / name


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def symbols(most, n=20):
    return torch.randint(0, most, (n,), generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).eval()


def file():
    return storage.save_model(network(), place("model"), "int4")


EXAMPLES = {
    "compression.codes.pack": lambda: (codes.pack, dict(values=symbols(8), bits=3)),
    "compression.codes.unpack": lambda: (
        codes.unpack,
        dict(packed=codes.pack(symbols(8), 3), bits=3, count=20),
    ),
    "compression.codes.code_lengths": lambda: (
        codes.code_lengths,
        dict(counts=torch.tensor([5, 0, 2, 9])),
    ),
    "compression.codes.code_words": lambda: (
        codes.code_words,
        dict(lengths=torch.tensor([2, 0, 2, 1])),
    ),
    "compression.codes.huffman_encode": lambda: (codes.huffman_encode, dict(symbols=symbols(9))),
    "compression.codes.huffman_decode": lambda: (
        codes.huffman_decode,
        dict(payload=codes.huffman_encode(symbols(9))),
    ),
    "compression.codebooks.codebook": lambda: (
        codebooks.codebook,
        dict(values=numbers(40), size=4, rounds=5),
    ),
    "compression.formats.encode": lambda: (
        formats.encode,
        dict(
            weight=numbers(6, 8) * (numbers(6, 8) > 0),
            numbers="int4",
            sparse=True,
            group=4,
            compress="huffman",
        ),
    ),
    "compression.formats.decode": lambda: (
        formats.decode,
        dict(
            parts=formats.encode(numbers(6, 8), "int4", group=4),
            shape=(6, 8),
            numbers="int4",
            group=4,
        ),
    ),
    "compression.storage.save_model": lambda: (
        storage.save_model,
        dict(
            model=network(),
            path=place("model"),
            format="sparse",
            values="code4",
            group=None,
            compress="huffman",
        ),
    ),
    "compression.storage.load_model": lambda: (storage.load_model, dict(path=file())),
    "compression.codebooks.SharedWeight": lambda: (
        codebooks.SharedWeight,
        dict(weight=numbers(4, 5), size=4),
    ),
    "compression.codebooks.share_weights": lambda: (
        codebooks.share_weights,
        dict(model=network(), size=4),
    ),
    "compression.codebooks.settle_weights": lambda: (
        codebooks.settle_weights,
        dict(model=codebooks.share_weights(network(), 4)),
    ),
    "compression.codes.check_bytes": lambda: (
        lambda x: codes.check_bytes(x, "packed").tolist(),
        dict(x=codes.pack(symbols(8), 3)),
    ),
    "compression.codebooks.check_finite": lambda: (
        codebooks.check_finite,
        dict(x=numbers(3), name="weight"),
    ),
    "compression.formats.bits_of": lambda: (formats.bits_of, dict(numbers="int4")),
    "compression.formats.fits": lambda: (formats.fits, dict(x=numbers(3), dtype=torch.float16)),
    "compression.formats.narrow": lambda: (
        formats.narrow,
        dict(x=numbers(3), dtype=torch.float16, name="weight"),
    ),
}
SKIP = {
    "compression.formats.DTYPES": "a constant",
    "compression.formats.GROUP": "a constant",
}
