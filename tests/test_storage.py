"""Storage: what is stored comes back bit for bit,
codes are as short as promised, and damage is noticed"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save
from torch import nn

from foundation.compression.codebooks import (
    SharedWeight,
    codebook,
    settle_weights,
    share_weights,
)
from foundation.compression.codes import (
    code_lengths,
    code_words,
    huffman_decode,
    huffman_encode,
    pack,
    unpack,
)
from foundation.compression.distillation import distil
from foundation.compression.folding import fold_batch_norm
from foundation.compression.formats import decode, encode
from foundation.compression.pruning import apply_masks, magnitude_masks
from foundation.compression.quantization import quantize_weights
from foundation.compression.storage import load_model, save_model
from foundation.compression.weights import layer_weights
from foundation.core.checks import complaint
from foundation.data.batches import endless
from foundation.data.images import ImageSet
from foundation.models.convnets import VGG, ConvNet
from foundation.models.card import BadWeights, WEIGHTS, read_card
from foundation.models.pretrained import load_weights, read_tensors
from foundation.recipes import vgg_compressed
from foundation.recipes.vgg_compressed import compress
from foundation.training.state import BadCheckpoint
from foundation.training.parameter_groups import adamw
from foundation.training.schedules import one_cycle

FORMATS = [
    ("fp32", "fp16"),
    ("fp16", "fp16"),
    *((f"int{b}", "fp16") for b in range(2, 9)),
    ("code2", "fp16"),
    ("code5", "fp16"),
    *(("sparse", v) for v in ("fp32", "fp16", "int8", "int4", "code4")),
]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 10),
    )


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_pack_round_trips_in_the_fewest_bytes(bits, count, seed):
    torch.manual_seed(seed)
    values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.numel() == -(-count * bits // 8) and torch.equal(
        unpack(packed, bits, count), values
    )


@pytest.mark.parametrize("compress", [False, "zlib", "huffman"])
@pytest.mark.parametrize("format,values", FORMATS)
def test_files_round_trip_exactly(tmp_path, format, values, compress):
    net = apply_masks(make_net(), magnitude_masks(make_net(), 0.8))
    path = save_model(net, tmp_path / "a", format, values, compress=compress)
    state = load_model(path)
    assert list(state) and set(state) == set(net.state_dict())
    net.load_state_dict(state)
    again = load_model(save_model(net, tmp_path / "b", format, values, compress=compress))
    numbers = values if format == "sparse" else format
    for (
        name,
        x,
    ) in state.items():  # what was stored comes back, and storing it once more changes nothing
        exact = numbers in ("fp32", "fp16") or x.ndim < 2
        torch.testing.assert_close(again[name], x, rtol=0 if exact else 1e-2, atol=0)


def test_integers_of_a_file_are_those_of_quantize_weights(tmp_path):
    net = make_net()
    copy, _ = quantize_weights(net, 8)
    state = load_model(save_model(net, tmp_path / "a", "int8"))
    assert all(torch.equal(state[name], weight) for name, weight in layer_weights(copy).items())


def test_sizes_are_in_the_order_that_the_formats_promise(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(500, 400)
    apply_masks(net, magnitude_masks(net, 0.9))
    size = {
        f: save_model(net, tmp_path / f, f).stat().st_size
        for f in ("fp32", "fp16", "int8", "int4", "int2", "sparse")
    }
    assert (
        size["fp32"] > size["fp16"] > size["int8"] > size["int4"] > size["sparse"]
        and size["int4"] > size["int2"]
    )
    zipped = save_model(net, tmp_path / "z", "sparse", compress=True).stat().st_size
    assert zipped < size["sparse"] and size["int4"] < 200_000 * 0.5 * 1.2 + 2000


def test_a_mask_that_does_not_pay_is_left_out(tmp_path):
    net = make_net()
    assert (
        save_model(net, tmp_path / "a", "sparse").stat().st_size
        <= save_model(net, tmp_path / "b", "fp16").stat().st_size + 9
    )


def test_plain_safetensors_files_are_read_too(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.randn(3, 3).half(), "steps": torch.tensor(7)}, tmp_path / "a")
    state = load_model(tmp_path / "a")
    assert state["a.weight"].dtype == torch.float32 and state["steps"] == 7


def test_every_damage_is_noticed(tmp_path):
    path = save_model(make_net(), tmp_path / "a", "int8")
    good = path.read_bytes()
    header = struct.unpack("<Q", good[:8])[0]
    for cut in (0, 4, 20, header, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match="whole"):
            load_model(path)
    for place in (8 + header, len(good) - 1, (len(good) + header) // 2):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match="changed"):
            load_model(path)
    notes = json.loads(good[8 : 8 + header])
    assert notes["__metadata__"]["layout"]
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_passes_in_silence(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flip")
    net = nn.Linear(6, 5)
    path = save_model(net, folder / "a", "int4")
    right, data = load_model(path), bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        wrong = load_model(path)
    except ValueError:
        return
    assert all(torch.equal(wrong[name], x) for name, x in right.items()), (
        "damage changed the weights without a word"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda net, p: save_model(net, p, "int1"),
        lambda net, p: save_model(net, p, "int9"),
        lambda net, p: save_model(net, p, "zip"),
        lambda net, p: save_model({"a": torch.tensor([[float("nan")]])}, p),
        lambda net, p: save_model({"a": torch.tensor([[1e9]])}, p, "fp16"),
        lambda net, p: save_model({"a": torch.tensor([float("inf")])}, p, "int8"),
        lambda net, p: pack(torch.tensor([4]), 2),
    ],
)
def test_storage_refuses_and_leaves_no_file(tmp_path, call):
    with pytest.raises(ValueError):
        call(make_net(), tmp_path / "a")
    assert not os.listdir(tmp_path)


# Codes --------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(symbols=st.lists(st.integers(0, 255), max_size=300))
def test_huffman_round_trips(symbols):
    symbols = torch.tensor(symbols, dtype=torch.uint8)
    assert torch.equal(huffman_decode(huffman_encode(symbols)), symbols)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=60).filter(
        lambda c: sum(n > 0 for n in c) > 1
    )
)
def test_huffman_is_within_a_bit_of_the_entropy_and_no_word_begins_another(counts):
    counts = torch.tensor(counts)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    lengths = code_lengths(counts)
    spent = (lengths * counts).sum().item() / counts.sum().item()
    assert entropy - 1e-5 <= spent < entropy + 1 and (lengths[counts == 0] == 0).all()
    words = sorted(code_words(lengths).values())
    assert not any(after.startswith(before) for before, after in zip(words, words[1:]))
    assert sum(2.0 ** -len(word) for word in words) == 1  # Kraft: no digit is wasted


def test_no_code_is_shorter_in_total():
    counts = torch.tensor([40, 30, 20, 6, 4])
    best = min(
        (a, b, c, d, e)
        for a in range(1, 5)
        for b in range(1, 5)
        for c in range(1, 5)
        for d in range(1, 5)
        for e in range(1, 5)
        if 2.0**-a + 2.0**-b + 2.0**-c + 2.0**-d + 2.0**-e <= 1
        and 40 * a + 30 * b + 20 * c + 6 * d + 4 * e == int((code_lengths(counts) * counts).sum())
    )

    def total(lengths):
        return sum(x * y for x, y in zip(lengths, counts.tolist()))

    every = (
        lengths
        for lengths in __import__("itertools").product(range(1, 5), repeat=5)
        if sum(2.0**-x for x in lengths) <= 1
    )
    assert min(map(total, every)) == total(best)


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]),
    numbers=st.sampled_from(["fp16", "int4", "int8", "code3", "code4"]),
    compress=st.sampled_from([False, "zlib", "huffman"]),
    seed=st.integers(0, 20),
)
def test_sparse_weights_come_back_and_zeros_stay_zero(share, numbers, compress, seed):
    torch.manual_seed(seed)
    weight = torch.randn(30, 41) * (torch.rand(30, 41) >= share)
    again = decode(encode(weight, numbers, True, None, compress), weight.shape, numbers)
    plain = decode(encode(weight, numbers, True), weight.shape, numbers)
    assert torch.equal(again, plain), "compression changes no bit"
    if share in (0.9, 0.999, 1.0):
        assert not again[weight == 0].any()
    if numbers == "fp16":
        assert torch.equal(again, weight.half().float())


def test_a_codebook_gives_the_nearest_centre_and_beats_even_marks():
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    centres, index = codebook(x, 8)
    nearest = (x.flatten()[:, None] - centres).abs().argmin(1).view_as(x)
    assert torch.equal(index.long(), nearest) and (centres.diff() >= 0).all()
    even = torch.linspace(float(x.min()), float(x.max()), 8)
    assert (centres[index.long()] - x).square().mean() < (even[:, None, None] - x).square().amin(
        0
    ).mean() * 0.7


def test_few_different_values_are_kept_exactly():
    x = torch.tensor([[-1.0, 0.25, 0.25, 2.0], [2.0, -1.0, 0.25, 2.0]])
    assert torch.equal(decode(encode(x, "code4"), x.shape, "code4"), x)


def test_huffman_gains_on_integers_and_gaps(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(400, 300)
    nn.init.normal_(net.weight)
    apply_masks(net, magnitude_masks(net, 0.9))
    size = {
        c: save_model(net, tmp_path / "a", "sparse", "code4", compress=c).stat().st_size
        for c in (False, "zlib", "huffman")
    }
    assert size["huffman"] < size["zlib"] < size[False]
    bits = (
        -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) * 120_000 / 8
    )  # the least for the places alone
    assert size["huffman"] > bits and size["huffman"] < bits + 12_000 * 0.5 + 2500


def test_swapped_nibbles_are_caught():
    values = torch.randint(0, 16, (51,), generator=torch.manual_seed(0))
    packed = pack(values, 4)
    swapped = (packed >> 4) | (packed << 4)
    assert torch.equal(unpack(packed, 4, 51), values.byte()) and not torch.equal(
        unpack(swapped, 4, 51), values.byte()
    )


@pytest.mark.parametrize("cut", [0, 3, 6, 12, -1])
def test_a_code_cut_short_is_refused(cut):
    payload = huffman_encode(torch.randint(0, 9, (100,)))
    with (
        pytest.raises(ValueError, match="damaged")
        if cut
        else pytest.raises((ValueError, AssertionError))
    ):
        assert len(huffman_decode(payload[:cut])) == 100


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: huffman_encode(torch.tensor([256])), "0 to 255"),
        (lambda: huffman_encode(torch.tensor([-1])), "0 to 255"),
        (lambda: codebook(torch.empty(0)), "values is empty"),
        (lambda: codebook(torch.tensor([math.nan])), "finite"),
        (lambda: codebook(torch.randn(9), 1), "from 2 to 256"),
        (lambda: encode(torch.randn(3, 3), "code9"), "2 to 8"),
        (lambda: encode(torch.randn(3, 3), "code"), "'code'"),
        (lambda: encode(torch.randn(3, 3), "int4", compress="rar"), "'rar'"),
    ],
)
def test_codes_refuse_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# Trained codebooks --------------------------------------------------------------------------------


def test_sharing_rounds_to_the_nearest_centre_and_settling_undoes_only_the_form():
    net = apply_masks(make_net(), magnitude_masks(make_net(), 0.6))
    before = {name: w.clone() for name, w in net.state_dict().items()}
    settled = settle_weights(share_weights(net, 8))
    assert all(torch.equal(before[name], w) for name, w in net.state_dict().items()), (
        "the original is left alone"
    )
    assert set(settled.state_dict()) == set(before)
    for name, w in layer_weights(settled).items():
        used = before[name] != 0
        centres, index = codebook(before[name][used], 8)
        assert (
            torch.equal(w[used], centres[index.long()])
            and not w[~used].any()
            and len(w[used].unique()) <= 8
        )


def test_a_centres_gradient_is_the_sum_over_its_weights():
    net, x = make_net(), torch.randn(4, 1, 8, 8)
    shared, plain = share_weights(net, 4), settle_weights(share_weights(net, 4))
    shared(x).square().sum().backward(), plain(x).square().sum().backward()
    for layer in (0, 3, 5):
        places = shared[layer].parametrizations.weight[0].index
        by_hand = torch.stack([plain[layer].weight.grad[places == k].sum() for k in range(1, 5)])
        torch.testing.assert_close(
            shared[layer].parametrizations.weight.original.grad, by_hand, rtol=1e-3, atol=1e-3
        )


def test_zeros_and_sharing_outlive_momentum_and_decay_and_the_file(tmp_path):
    net = apply_masks(make_net(), magnitude_masks(make_net(), 0.8))
    shared = share_weights(net, 4)
    opt = adamw(shared, 0.1, weight_decay=0.5)
    for _ in range(5):
        opt.zero_grad()
        shared(torch.randn(8, 1, 8, 8)).square().mean().backward()
        opt.step()
    settled = settle_weights(shared)
    state = load_model(save_model(settled, tmp_path / "a", "sparse", "code2", compress="huffman"))
    for name, w in layer_weights(settled).items():
        assert not w[net.get_parameter(name) == 0].any() and not torch.equal(
            w, net.get_parameter(name)
        )
        assert torch.equal(state[name], w.half().float()), "what was trained is what is stored"


def tiny_set():
    torch.manual_seed(0)
    labels = torch.arange(320) % 10
    pictures = (torch.rand(320, 1, 28, 28) * 60 + labels.view(-1, 1, 1, 1) * 19).byte()
    return ImageSet(
        name="tiny",
        train_images=pictures,
        train_labels=labels,
        test_images=pictures[:50],
        test_labels=labels[:50],
        classes=tuple("0123456789"),
        mean=0.5,
        std=0.3,
        source="noise",
    )


def test_the_chain_gives_few_values_and_goes_on_where_it_was_stopped(tmp_path):
    data, dense, answers = tiny_set(), ConvNet(), torch.randn(320, 10)
    options = dict(zeros=0.7, size=4, steps=10, tune=3, checkpoint=str(tmp_path / "run"))
    once = compress(dense, data, answers, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run-pruned.safetensors",
        "run-shared.safetensors",
    ]
    again, fresh = (
        compress(dense, data, answers, **options),
        compress(dense, data, answers, **options | dict(checkpoint="")),
    )
    for name, w in layer_weights(once).items():
        assert (
            torch.equal(again.get_parameter(name), w)
            and torch.equal(fresh.get_parameter(name), w)
            and len(w.unique()) <= 5
        )
    weights = torch.cat([w.flatten() for w in layer_weights(once).values()])
    assert (weights == 0).float().mean() == pytest.approx(0.7, abs=0.01)
    others = [dict(zeros=0.6), dict(seed=1), dict(size=8), dict(steps=11)]
    for other in others:  # what came of another plan is not this plan's result
        with pytest.raises(BadCheckpoint, match="of another"):
            compress(dense, data, answers, **options | other)
    wrong = [
        (ConvNet(), data, answers),
        (dense, dataclasses.replace(data, train_images=255 - data.train_images), answers),
        (dense, data, answers + 1),
    ]  # another network, other pictures, another teacher
    for model, images, teacher in wrong:
        with pytest.raises(BadCheckpoint, match="of another"):
            compress(model, images, teacher, **options)


def test_the_recipe_writes_file_and_card_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    torch.manual_seed(0)
    data, dense, calls = tiny_set(), VGG(widths=(4, 6), depths=(1, 1)).eval(), []
    count, score = torch.arange(5320) % 320, vgg_compressed._score
    many = dataclasses.replace(
        data, train_images=data.train_images[count], train_labels=data.train_labels[count]
    )

    def stopping(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args)

    for name, value in dict(
        cache_folder=lambda: tmp_path,
        load_images=lambda: many,
        load_weights=lambda name: dense,
        _score=stopping,
    ).items():
        monkeypatch.setattr(vgg_compressed, name, value)
    plan = dict(folder=tmp_path / "out", seeds=range(2), zeros=0.5, steps=4, tune=2)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        vgg_compressed.make("tiny", **plan)
    kept = sorted(path.name for path in (tmp_path / "runs" / "tiny").glob("*.safetensors"))
    assert kept == [f"1-{stage}.safetensors" for stage in ("control", "pruned", "shared")]
    path = vgg_compressed.make("tiny", **plan)
    card = read_card("tiny", tmp_path / "out")
    shipped = read_card("vgg_compressed")
    assert card.keys() == shipped.keys() and card["metrics"].keys() == shipped["metrics"].keys()
    scores = card["metrics"]["accuracy"]
    assert list(scores) == list(shipped["metrics"]["accuracy"])
    assert all(len(runs) == 2 for arm, runs in scores.items() if arm != "fp32")
    assert path.stat().st_size == card["metrics"]["bytes"]["compressed"][0]
    assert not (tmp_path / "runs" / "tiny").exists()


# The shipped file ---------------------------------------------------------------------------------


def test_the_card_keeps_what_the_lessons_promise():
    card = read_card("vgg_compressed")["metrics"]
    seeds = {
        arm: scores for arm, scores in card["accuracy"].items() if arm != "fp32"
    }  # the shipped net has no seeds
    mean = {arm: 100 * sum(scores) / len(scores) for arm, scores in seeds.items()}
    assert card["test_images"] == 10_000 and all(len(scores) == 3 for scores in seeds.values())
    assert (
        mean["fp32, trained on"] - mean["static int8"] <= 0.3
        and mean["fp32, trained on"] - mean["4-bit weights"] <= 1
    )
    assert (
        30 * max(card["bytes"]["compressed"]) <= card["bytes"]["fp32"]
        and 100 * card["accuracy"]["fp32"] - mean["compressed"] < 0.5
    )


def test_the_compressed_vgg_is_thirty_times_smaller_and_loads(tmp_path):
    card, path = read_card("vgg_compressed"), WEIGHTS / "vgg_compressed.bin"
    full = save_model(load_weights("vgg_supervised"), tmp_path / "a").stat().st_size
    assert (
        path.stat().st_size == card["metrics"]["bytes"]["compressed"][0]
        and full >= 30 * path.stat().st_size
    )
    net = fold_batch_norm(VGG(**card["config"])).eval()
    net.load_state_dict(load_model(path))
    weights = torch.cat([w.flatten() for w in layer_weights(net).values()])
    assert (weights == 0).float().mean() > 0.85 and len(
        next(iter(layer_weights(net).values())).unique()
    ) <= 17


# The edges of numbers and files -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-35, 1e-9, 1e-6, 1e6, 1e30, 3e38])
@pytest.mark.parametrize(
    "format, share", [("code4", 0.1), ("int8", 0.501 / 127), ("int4", 0.51 / 7), ("code2", 0.4)]
)
def test_weights_of_any_size_come_back(tmp_path, size, format, share):
    w = (torch.rand(4, 64, generator=torch.manual_seed(0)) * 2 - 1) * size
    found = load_model(save_model({"w": w, "b": w[0]}, tmp_path / "a", format))
    assert ((found["w"].double() - w.double()).abs() <= share * size).all()
    assert ((found["b"] - w[0]).abs() <= 0.004 * size).all(), (
        "what is stored in half precision elsewhere fits too"
    )


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_a_format_that_cannot_hold_a_weight_says_so_by_name(tmp_path, size):
    for options in (dict(format="fp16"), dict(format="sparse")):
        text = complaint(
            save_model, {"layer.weight": size * torch.randn(4, 4)}, tmp_path / "a", **options
        )
        assert "layer.weight" in text and "fp32" in text and "\n" not in text
    assert "layer.weight" in complaint(
        save_model, {"layer.weight": torch.full((2, 2), math.nan)}, tmp_path / "a", "int8"
    )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("values", [[3e38, -3e38, 1e38, 0.0], [1e300, 0.0], [1e-44, 2e-44, 3e-44]])
def test_a_codebook_stays_within_its_values(values):
    x = torch.tensor(values, dtype=torch.float64)
    if x.float().isinf().any():
        assert "float32" in complaint(codebook, x, 2)
        return
    centres, index = codebook(x, 2)
    assert (
        centres.isfinite().all()
        and x.min() <= centres.min()
        and centres.max() <= x.max() * (1 + 1e-6)
    )
    nearest = (x[:, None].float() / x.abs().max() - centres / x.abs().max()).abs().argmin(1)
    assert torch.equal(index.long(), nearest)


def test_codebooks_of_all_scales_are_one():
    x = torch.randn(300, generator=torch.manual_seed(0))
    centres, index = codebook(x, 8)
    for unit in (2.0**100, 2.0**-100, 2.0**-3):
        scaled, places = codebook(x * unit, 8)
        assert torch.equal(scaled, centres * unit) and torch.equal(places, index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["fp32", "int8", "code4", "sparse"])
def test_models_of_every_float_type_are_saved(tmp_path, dtype, format):
    net = make_net().to(dtype)
    state = load_model(save_model(net, tmp_path / "a", format))
    other = make_net().to(dtype)
    other.load_state_dict(state)
    x = torch.randn(2, 1, 8, 8).to(dtype)
    assert (other.eval()(x) - net.eval()(x)).abs().max() < (
        0.5 if format == "code4" else 0.1
    ) * net(x).abs().max()


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.text("ab:%.maskscl3A25", min_size=1, max_size=12), min_size=1, max_size=6, unique=True
    ),
    format=st.sampled_from(["fp32", "int4", "code2", "sparse"]),
)
def test_any_names_come_back(tmp_path_factory, names, format):
    torch.manual_seed(0)
    model = {name: torch.randn(6, 8) * (torch.rand(6, 8) > 0.8) for name in names}
    path = save_model(model, tmp_path_factory.mktemp("names") / "a", format, compress="huffman")
    state = load_model(path)
    assert set(state) == set(names)
    for name, w in model.items():
        alone = load_model(save_model({"w": w}, path.with_name("b"), format, compress="huffman"))[
            "w"
        ]
        assert torch.equal(state[name], alone)


def test_colons_and_files_of_others_do_not_mix(tmp_path):
    from safetensors.torch import save_file

    net = nn.ModuleDict({"a:b": nn.Linear(3, 3), "a": nn.Linear(3, 3)})
    net.load_state_dict(load_model(save_model(net, tmp_path / "a", "int8")))
    both = {"w": torch.randn(3, 3), "w:mask": torch.randn(3, 3), "w%3A": torch.randn(2)}
    assert set(load_model(save_model(both, tmp_path / "a", "sparse"))) == set(both)
    save_file(both, tmp_path / "b")
    assert all(torch.equal(load_model(tmp_path / "b")[name], x) for name, x in both.items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.words(x))


@pytest.mark.parametrize("format", ["fp32", "int4", "code4"])
def test_tied_weights_are_written_once_and_stand_under_both_names(tmp_path, format):
    tied = Tied()
    path = save_model(tied, tmp_path / "a", format)
    alone = save_model({"words.weight": tied.words.weight}, tmp_path / "b", format)
    assert path.stat().st_size < alone.stat().st_size + 100
    state = load_model(path)
    assert set(state) == {"words.weight", "out.weight"} and torch.equal(
        state["out.weight"], state["words.weight"]
    )
    other = Tied()
    other.load_state_dict(state)
    assert other.out.weight is other.words.weight and torch.equal(
        other.out.weight, state["out.weight"]
    )
    views = {"whole": torch.randn(4, 4), "half": None, "turned": None}
    views |= dict(half=views["whole"][:2], turned=views["whole"].T)
    state = load_model(save_model(views, tmp_path / "c"))
    assert all(torch.equal(state[name], x) for name, x in views.items()), (
        "neighbours in memory are not ties"
    )


def test_odd_tensors_come_back(tmp_path):
    odd = {
        "empty": torch.zeros(0, 4),
        "none": torch.zeros(3, 0),
        "flags": torch.tensor([[True, False]]),
        "n": torch.tensor(3),
        "zeros": torch.zeros(4, 4),
        "one": torch.full((1, 1), -2.5),
        "same": torch.full((3, 3), 0.25),
        "sparse": torch.eye(3).to_sparse(),
    }
    for format in ("fp32", "fp16", "int8", "int2", "code4", "sparse"):
        for compress_by in (False, "zlib", "huffman"):
            state = load_model(
                save_model(odd, tmp_path / "a", format, "code4", compress=compress_by)
            )
            assert set(state) == set(odd)
            for name, x in odd.items():
                x = x.to_dense() if x.is_sparse else x
                assert state[name].shape == x.shape
                torch.testing.assert_close(
                    state[name], x, check_dtype=not x.is_floating_point(), rtol=0.01, atol=1e-6
                )


def damages(raw, rng):
    "Flip, cut, blank, add, exchange"
    at, raw = rng.randrange(len(raw)), bytearray(raw)
    way = rng.choice(["flip", "cut", "blank", "add", "byte", "head"])
    if way == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del raw[at:]
    elif way == "blank":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif way == "add":
        raw += rng.randbytes(rng.randrange(1, 30))
    elif way == "byte":
        raw[at] = rng.randrange(256)
    else:
        raw[rng.randrange(min(len(raw), 400))] = rng.choice(b'0123456789[]{},:"FUIB')
    return bytes(raw)


@pytest.mark.parametrize(
    "options",
    [
        dict(format="int4"),
        dict(format="sparse", values="code4", compress="huffman"),
        dict(format="sparse", values="int8", compress="zlib"),
    ],
)
def test_damaged_files_are_refused_as_bad_weights(tmp_path, options):
    net = apply_masks(make_net(), magnitude_masks(make_net(), 0.8))
    path = save_model(net, tmp_path / "a", **options)
    raw, right, rng, seen = path.read_bytes(), load_model(path), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(damages(raw, rng))
        try:
            found = load_model(path)
        except BadWeights as error:
            seen += 1
            assert "\n" not in str(error) and path.name in str(error)
            continue
        assert found.keys() == right.keys() and all(
            torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in right.items()
        )
    assert seen > 120


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n["tensors"]["b"].update(dtype="I32"),
        lambda n: n["tensors"]["b"].update(shape=[2, 3]),
    ],
)
def test_another_type_or_shape_over_the_same_bytes_is_noticed(tmp_path, change):
    path = save_model({"b": torch.arange(6.0)}, tmp_path / "a")
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    change(dict(tensors=head))
    text = json.dumps(head, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    with pytest.raises(BadWeights, match="changed"):
        load_model(path)


def test_files_of_earlier_versions_are_read():
    "The shipped file has the checksum of names and bytes alone"
    assert len(load_model(WEIGHTS / "vgg_compressed.bin")) == 14


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_make_the_decoder_stumble(data):
    payload = torch.tensor([*data], dtype=torch.uint8)
    try:
        symbols = huffman_decode(payload)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(huffman_encode(symbols)[:4], payload[:4])


def test_what_stands_behind_the_last_word_is_damage():
    payload = huffman_encode(torch.tensor([0, 0, 0, 1, 1, 2]))
    assert huffman_decode(payload).tolist() == [0, 0, 0, 1, 1, 2]
    for wrong in (
        torch.cat([payload, torch.zeros(1, dtype=torch.uint8)]),
        torch.cat([payload[:-1], payload[-1:] | 1]),
    ):
        with pytest.raises(ValueError, match="damaged"):
            huffman_decode(wrong)


def test_a_damaged_code_ends_soon():
    head = (10**9).to_bytes(4, "little") + bytes([0, 0])  # a billion symbols and no word
    with pytest.raises(ValueError, match="damaged"):
        huffman_decode(torch.tensor([*head, *[0] * 200_000], dtype=torch.uint8))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pack([1, 2], 4), "torch.tensor"),
        (lambda: pack(torch.tensor([0.7]), 4), "whole numbers"),
        (lambda: pack(None, 4), "None"),
        (lambda: pack(torch.tensor([1]), 9), "from 1 to 8"),
        (lambda: unpack(pack(torch.tensor([1, 2]), 2), 2, 9), "expected 3 for 9 numbers"),
        (lambda: unpack(torch.tensor([1, 2]), 2, 2), "bytes"),
        (lambda: unpack(pack(torch.tensor([1, 2]), 2), 2, -1), "from 0 on"),
        (lambda: huffman_encode(torch.tensor([0.7])), "whole numbers"),
        (lambda: huffman_encode([0.7]), "torch.tensor"),
        (lambda: huffman_decode([1, 2]), "torch.tensor"),
        (lambda: huffman_decode(torch.zeros(9)), "bytes"),
        (lambda: code_lengths(torch.tensor([-1, 2])), "run from -1"),
        (lambda: code_lengths(torch.tensor([0.5, 0.5])), "whole numbers"),
        (lambda: code_words(torch.tensor([1, 1, 1])), "no code"),
        (lambda: codebook([1.0, 2.0]), "torch.tensor"),
        (lambda: codebook(torch.arange(4)), "floats"),
        (lambda: encode(torch.randn(3, 3), 8), "numbers is 8"),
        (lambda: encode(torch.randn(3, 3), compress=1), "compress is 1"),
        (lambda: decode({}, (3, 3), "int8"), "no weight of shape"),
        (lambda: decode(encode(torch.randn(3, 3)), (4, 4), "int8"), "no weight"),
        (lambda: save_model({"a": None}, "x"), "None under 'a'"),
        (lambda: save_model({1: torch.zeros(2)}, "x"), "under 1"),
        (lambda: save_model([1], "x"), "model is a list"),
        (lambda: save_model({"a": torch.zeros(2, 2)}, "x", "int8", group=0), "from 1 on"),
        (lambda: share_weights(make_net(), 1), "from 2 to 256"),
        (lambda: SharedWeight(None, 4), "weight is None"),
        (lambda: compress(ConvNet(), tiny_set(), torch.randn(400, 10), steps=1, tune=1), "to 320"),
        (
            lambda: compress(ConvNet(), tiny_set(), torch.full((4, 10), math.nan), steps=1, tune=1),
            "NaN",
        ),
    ],
)
def test_what_is_no_number_is_said_in_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_every_kind_are_packed_alike():
    want = pack(torch.tensor([3, 0, 2]), 2)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(pack(torch.tensor([3, 0, 2]).to(kind), np.int64(2)), want)
    assert torch.equal(pack(np.array([3, 0, 2]), np.int8(2)), want) and torch.equal(
        unpack(want, torch.tensor(2), np.int16(3)), torch.tensor([3, 0, 2])
    )
    assert pack(torch.tensor([True, False]), 1).tolist() == [128]
    assert code_lengths(torch.tensor([200, 100, 50], dtype=torch.uint8)).tolist() == [
        1,
        2,
        2,
    ], "sums beyond the type"


# Shared, tied and computed weights ----------------------------------------------------------------


def test_tied_layers_share_one_codebook_and_are_tied_again():
    torch.manual_seed(0)
    tied, x = Tied(), torch.randint(0, 50, (4, 6))
    shared = share_weights(tied, 16)
    assert (
        shared.out.parametrizations.weight.original is shared.words.parametrizations.weight.original
    )
    assert (
        torch.equal(shared.out.weight, shared.words.weight)
        and len(shared.out.weight.unique()) <= 17
    )
    shared(x).square().sum().backward()
    adamw(shared, 0.1).step()
    settled = settle_weights(copy.deepcopy(shared))
    assert settled.out.weight is settled.words.weight and torch.equal(
        settled.out.weight, shared.out.weight
    )
    torch.testing.assert_close(settled(x), shared(x))
    strange = Tied()
    strange.extra = strange.out.weight
    assert "under a name other" in complaint(share_weights, strange)


def test_settling_a_copy_leaves_the_other_alone():
    net, x = make_net().eval(), torch.randn(2, 1, 8, 8)
    shared = share_weights(net, 4)
    twin = copy.deepcopy(shared)
    torch.testing.assert_close(settle_weights(twin)(x), shared(x))
    assert isinstance(twin[0].weight, nn.Parameter) and len(shared[0].weight.unique()) <= 5
    strange = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert settle_weights(strange) is strange and hasattr(strange, "parametrizations"), (
        "somebody else's stays"
    )


def test_a_shared_weight_lies_in_plain_order_whatever_the_network_does():
    net = make_net().to(memory_format=torch.channels_last)
    shared = share_weights(net, 4)
    assert all(shared[i].weight.is_contiguous() for i in (0, 3))  # the digits depend on it


def test_shared_weights_take_what_is_assigned():
    layer = share_weights(nn.Linear(8, 8), 4)
    before = layer.weight.detach().clone()
    layer.weight = before * 3
    torch.testing.assert_close(layer.weight, before * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_of_zeros_and_half_precision_are_shared(dtype):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(net[0].weight)
    shared, x = share_weights(net.to(dtype), 16), torch.randn(3, 4).to(dtype)
    torch.testing.assert_close(shared(x), net(x), rtol=0.02, atol=0.02)
    assert not shared[0].weight.any() and shared[1].weight.dtype == dtype
    shared(x).sum().backward()


def test_the_chain_learns_half_from_labels_and_half_from_the_teacher():
    data, logits = tiny_set(), torch.randn(320, 10)
    torch.manual_seed(0)
    one = ConvNet(widths=(4,))
    two = copy.deepcopy(one)
    vgg_compressed._train(one, data, logits, 3, lr=1e-3, seed=0)
    images, how = data.floats(data.train_images), dict(labels=data.train_labels, hard=0.5)
    how |= dict(temperature=2.0, batch_size=32, schedule=one_cycle(3, 0.1), steps=3, lr=1e-3)
    distil(two, images, logits, precision="fp32", clip=None, **how)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_run_is_kept_and_its_data_belong_to_it(tmp_path):
    data, answers = tiny_set(), torch.randn(320, 10)

    def run(data=data, answers=answers, **options):
        torch.manual_seed(0)
        plan = dict(lr=1e-3, seed=0, checkpoint=tmp_path / "c.safetensors") | options
        return vgg_compressed._train(ConvNet(widths=(4,)), data, answers, 3, **plan)

    first = run()
    assert torch.equal(first.head.weight, run().head.weight) and not first.training
    with pytest.raises(BadCheckpoint, match="of another"):
        run(answers=answers.flip(1))
    with pytest.raises(BadCheckpoint, match="of another"):
        run(dataclasses.replace(data, train_labels=9 - data.train_labels))
    late = data.train_images.clone()
    first_batch = next(endless(torch.arange(320), batch_size=32, seed=0))[0].tolist()
    late[max(set(range(320)) - set(first_batch))] = 0  # one picture, and not in the first batch
    with pytest.raises(BadCheckpoint, match="of another"):
        run(dataclasses.replace(data, train_images=late))
    with pytest.raises(BadCheckpoint, match="of another"):
        run(lr=1e-4)


@pytest.mark.parametrize("kinds", [True, False], ids=["with types", "names and bytes"])
def test_files_with_the_earlier_mark_are_read_and_keep_their_sentence(tmp_path, kinds):
    state = {"w": torch.randn(4, 6), "b": torch.arange(3.0)}
    right = load_model(save_model(state, tmp_path / "new", "int8"))
    tensors, notes = read_tensors(tmp_path / "new")
    crc = zlib.crc32(notes["layout"].encode())
    for name, x in sorted(tensors.items()):
        kind = f"{x.dtype}{tuple(x.shape)}" if kinds else ""
        crc = zlib.crc32(x.numpy().tobytes(), zlib.crc32((name + kind).encode(), crc))
    old = save(tensors, {"layout": notes["layout"], "crc32": f"{crc:08x}"})
    (tmp_path / "old").write_bytes(old)
    found = load_model(tmp_path / "old")
    assert found.keys() == right.keys() and all(torch.equal(found[k], right[k]) for k in right)
    for mark in (f"{crc ^ 1:08x}", "", "sha256"):
        (tmp_path / "old").write_bytes(save(tensors, {"layout": notes["layout"], "crc32": mark}))
        with pytest.raises(BadWeights, match=r"old was changed .* \(its checksum differs\); fetch"):
            load_model(tmp_path / "old")
    (tmp_path / "old").write_bytes(save(tensors, {"layout": notes["layout"], "other": "mark"}))
    with pytest.raises(BadWeights, match="changed"):
        load_model(tmp_path / "old")


def test_a_new_file_has_the_mark_of_the_whole_library(tmp_path):
    path = save_model({"w": torch.randn(4, 6)}, tmp_path / "a", "int4")
    tensors, notes = read_tensors(path)
    assert [*notes] == ["layout"] and tensors.keys() == {"w", "w:scale"}


def test_the_shipped_file_is_read_bit_for_bit():
    state, told = load_model(WEIGHTS / "vgg_compressed.bin"), hashlib.sha256()
    for name in sorted(state):
        told.update(f"{name}{state[name].dtype}".encode() + state[name].numpy().tobytes())
    assert told.hexdigest().startswith("9e5ea0794636f401")
