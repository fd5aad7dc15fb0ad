"One sound call for each public name of folding, quantisation, integer networks and storage"

import tempfile
from pathlib import Path

import torch
from torch import nn

from foundation.compression import folding, integers, quantization, storage
from foundation.data.images import ImageSet
from foundation.models.convnets import ConvNet
from foundation.training.loop import load_optimizers

load_optimizers()  # PyTorch's late imports take seconds: no call's clock should count them


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


def pictures(n=4):
    return numbers(n, 1, 8, 8)


def tiny_set():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(40) % 3
    return ImageSet(
        images, labels, images[:9], labels[:9], ("a", "b", "c"), "noise", "here", 0.5, 0.3
    )


def small():
    torch.manual_seed(0)
    return ConvNet(classes=3, widths=(4,))


def file():
    return storage.save_model(network(), place("model"), "int4")


F, N = "compression.folding.", "compression.integers."
Q, S = "compression.quantization.", "compression.storage."
EXAMPLES = {
    Q + "integer_range": lambda: (quantization.integer_range, dict(bits=4, symmetric=True)),
    Q + "QParams": lambda: (
        quantization.QParams,
        dict(scale=torch.ones(1), zero_point=torch.zeros(1, dtype=torch.int32)),
    ),
    Q + "choose_qparams": lambda: (
        quantization.choose_qparams,
        dict(low=-numbers(3).abs(), high=numbers(3).abs(), bits=8, symmetric=False),
    ),
    Q + "Quantized": lambda: (
        quantization.Quantized,
        dict(
            values=torch.tensor([[1, -2]], dtype=torch.int8),
            scale=torch.ones(1),
            zero_point=torch.zeros(1, dtype=torch.int32),
            bits=4,
            axis=0,
            group=None,
        ),
    ),
    Q + "Quantized.dequantize": lambda: (
        quantization.quantize_tensor(numbers(3, 8), 4, 0, group=4).dequantize,
        {},
    ),
    Q + "quantize_tensor": lambda: (
        quantization.quantize_tensor,
        dict(x=numbers(3, 8), bits=4, axis=0, symmetric=True, group=4, scale_dtype=torch.float32),
    ),
    N + "value_range": lambda: (integers.value_range, dict(x=numbers(50), percentile=99.0)),
    N + "calibrate": lambda: (
        integers.calibrate,
        dict(
            batches=[numbers(30), numbers(20)],
            bits=4,
            symmetric=False,
            percentile=100.0,
            method="range",
        ),
    ),
    Q + "fake_quantize": lambda: (
        quantization.fake_quantize,
        dict(
            x=numbers(3, 8),
            bits=4,
            axis=0,
            symmetric=False,
            group=None,
            scale=torch.tensor([0.5, 0.25, 0.5]),
            zero_point=torch.tensor([7, 8, 7]),
        ),
    ),
    Q + "quantize_weights": lambda: (
        quantization.quantize_weights,
        dict(model=network(), bits=4, group=8, skip=("4",)),
    ),
    Q + "classify_rounded": lambda: (
        quantization.classify_rounded,
        dict(bits=4, group=8, skip=("4",)),
    ),
    F + "plain_copy": lambda: (folding.plain_copy, dict(model=network(), skip=("4",))),
    F + "run_batch": lambda: (
        folding.run_batch,
        dict(model=nn.Embedding(5, 3), batch=torch.arange(4), what="the words"),
    ),
    F + "replace_modules": lambda: (folding.replace_modules, dict(model=network(), new={})),
    F + "fold_batch_norm": lambda: (
        folding.fold_batch_norm,
        dict(model=network(), example=pictures()),
    ),
    N + "integer_matmul": lambda: (
        integers.integer_matmul,
        dict(a=(10 * numbers(3, 5)).to(torch.int8), b=(10 * numbers(5, 2)).to(torch.int8)),
    ),
    N + "IntegerLayer": lambda: (
        integers.IntegerLayer,
        dict(layer=nn.Linear(4, 3), qparams=(torch.tensor(0.1), torch.tensor(9)), bits=8),
    ),
    N + "linear_in_bytes": lambda: (
        integers.linear_in_bytes,
        dict(layer=integers.IntegerLayer(nn.Linear(4, 3)), x=numbers(5, 4)),
    ),
    N + "quantize_dynamic": lambda: (
        integers.quantize_dynamic,
        dict(model=network(), bits=8, skip=("4",), example=pictures()),
    ),
    N + "quantize_static": lambda: (
        integers.quantize_static,
        dict(model=network(), batches=[pictures()], bits=8, skip=(), percentile=99.9),
    ),
    S + "pack": lambda: (storage.pack, dict(values=symbols(8), bits=3)),
    S + "unpack": lambda: (
        storage.unpack,
        dict(packed=storage.pack(symbols(8), 3), bits=3, count=20),
    ),
    S + "code_lengths": lambda: (storage.code_lengths, dict(counts=torch.tensor([5, 0, 2, 9]))),
    S + "code_words": lambda: (storage.code_words, dict(lengths=torch.tensor([2, 0, 2, 1]))),
    S + "huffman_encode": lambda: (storage.huffman_encode, dict(symbols=symbols(9))),
    S + "huffman_decode": lambda: (
        storage.huffman_decode,
        dict(payload=storage.huffman_encode(symbols(9))),
    ),
    S + "codebook": lambda: (storage.codebook, dict(values=numbers(40), size=4, rounds=5)),
    S + "encode": lambda: (
        storage.encode,
        dict(
            weight=numbers(6, 8) * (numbers(6, 8) > 0),
            numbers="int4",
            sparse=True,
            group=4,
            compress="huffman",
        ),
    ),
    S + "decode": lambda: (
        storage.decode,
        dict(
            parts=storage.encode(numbers(6, 8), "int4", group=4),
            shape=(6, 8),
            numbers="int4",
            group=4,
        ),
    ),
    S + "save_model": lambda: (
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
    S + "load_model": lambda: (storage.load_model, dict(path=file())),
    S + "fair_masks": lambda: (storage.fair_masks, dict(model=network(), zeros=0.5)),
    S + "prune_gradually": lambda: (
        storage.prune_gradually,
        dict(model=network(), zeros=0.5, end=10, every=2),
    ),
    S + "train_on": lambda: (
        storage.train_on,
        dict(
            model=small(),
            data=tiny_set(),
            answers=numbers(40, 3),
            steps=1,
            lr=1e-3,
            seed=0,
            title="",
        ),
    ),
    S + "SharedWeight": lambda: (storage.SharedWeight, dict(weight=numbers(4, 5), size=4)),
    S + "share_weights": lambda: (storage.share_weights, dict(model=network(), size=4)),
    S + "settle_weights": lambda: (
        storage.settle_weights,
        dict(model=storage.share_weights(network(), 4)),
    ),
    S + "compress": lambda: (
        storage.compress,
        dict(
            dense=small(),
            data=tiny_set(),
            answers=numbers(40, 3),
            zeros=0.5,
            size=4,
            steps=2,
            tune=1,
            seed=0,
            checkpoint="",
        ),
    ),
}
SKIP = {
    S + "DTYPES": "a constant",
    S + "GROUP": "a constant",
    S + "make_weights": "trains for an hour on the real data",
}
