"Storage: what is stored comes back bit for bit, codes are as short as promised, and damage is noticed"
import json
import math
import os
import struct

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from foundation.compression.pruning import apply_masks, layer_weights, magnitude_masks
from foundation.compression.quantization import fold_batch_norm, quantize_weights
from foundation.compression.storage import (
    code_lengths, code_words, codebook, compress, decode, encode, huffman_decode, huffman_encode, load_model, pack, save_model,
    settle_weights, share_weights, train_on, unpack)
from foundation.data.images import ImageSet
from foundation.models.convnets import VGG, ConvNet
from foundation.models.pretrained import WEIGHTS, load_weights, read_card
from foundation.training.loop import adamw

FORMATS = [("fp32", "fp16"), ("fp16", "fp16"), *((f"int{b}", "fp16") for b in range(2, 9)), ("code2", "fp16"), ("code5", "fp16"),
           *(("sparse", v) for v in ("fp32", "fp16", "int8", "int4", "code4"))]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3), nn.Flatten(),
                         nn.Linear(12 * 4 * 4, 10))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_pack_round_trips_in_the_fewest_bytes(bits, count, seed):
    torch.manual_seed(seed)
    values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.numel() == -(-count * bits // 8) and torch.equal(unpack(packed, bits, count), values)


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
    for name, x in state.items():  # what was stored comes back, and storing it once more changes nothing
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
    size = {f: save_model(net, tmp_path / f, f).stat().st_size for f in ("fp32", "fp16", "int8", "int4", "int2", "sparse")}
    assert size["fp32"] > size["fp16"] > size["int8"] > size["int4"] > size["sparse"] and size["int4"] > size["int2"]
    zipped = save_model(net, tmp_path / "z", "sparse", compress=True).stat().st_size
    assert zipped < size["sparse"] and size["int4"] < 200_000 * 0.5 * 1.2 + 2000


def test_a_mask_that_does_not_pay_is_left_out(tmp_path):
    net = make_net()
    assert save_model(net, tmp_path / "a", "sparse").stat().st_size <= save_model(net, tmp_path / "b", "fp16").stat().st_size + 9


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
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        with pytest.raises(ValueError, match="changed"):
            load_model(path)
    notes = json.loads(good[8:8 + header])
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
    assert all(torch.equal(wrong[name], x) for name, x in right.items()), "damage changed the weights without a word"


@pytest.mark.parametrize("call", [
    lambda net, p: save_model(net, p, "int1"), lambda net, p: save_model(net, p, "int9"), lambda net, p: save_model(net, p, "zip"),
    lambda net, p: save_model({"a": torch.tensor([[float("nan")]])}, p), lambda net, p: save_model({"a": torch.tensor([[1e9]])}, p, "fp16"),
    lambda net, p: save_model({"a": torch.tensor([float("inf")])}, p, "int8"), lambda net, p: pack(torch.tensor([4]), 2)])
def test_storage_refuses_and_leaves_no_file(tmp_path, call):
    with pytest.raises(ValueError):
        call(make_net(), tmp_path / "a")
    assert not os.listdir(tmp_path)


# Codes ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(symbols=st.lists(st.integers(0, 255), max_size=300))
def test_huffman_round_trips(symbols):
    symbols = torch.tensor(symbols, dtype=torch.uint8)
    assert torch.equal(huffman_decode(huffman_encode(symbols)), symbols)


@settings(max_examples=80, deadline=None)
@given(counts=st.lists(st.integers(0, 10_000), min_size=2, max_size=60).filter(lambda c: sum(n > 0 for n in c) > 1))
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
    best = min((a, b, c, d, e) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) for d in range(1, 5) for e in range(1, 5)
               if 2.0**-a + 2.0**-b + 2.0**-c + 2.0**-d + 2.0**-e <= 1
               and 40 * a + 30 * b + 20 * c + 6 * d + 4 * e == int((code_lengths(counts) * counts).sum()))
    total = lambda lengths: sum(x * y for x, y in zip(lengths, counts.tolist()))
    every = (l for l in __import__("itertools").product(range(1, 5), repeat=5) if sum(2.0**-x for x in l) <= 1)
    assert min(map(total, every)) == total(best)


@settings(max_examples=60, deadline=None)
@given(share=st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]), numbers=st.sampled_from(["fp16", "int4", "int8", "code3", "code4"]),
       compress=st.sampled_from([False, "zlib", "huffman"]), seed=st.integers(0, 20))
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
    assert (centres[index.long()] - x).square().mean() < (even[:, None, None] - x).square().amin(0).mean() * 0.7


def test_few_different_values_are_kept_exactly():
    x = torch.tensor([[-1.0, 0.25, 0.25, 2.0], [2.0, -1.0, 0.25, 2.0]])
    assert torch.equal(decode(encode(x, "code4"), x.shape, "code4"), x)


def test_huffman_gains_on_integers_and_gaps(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(400, 300)
    nn.init.normal_(net.weight)
    apply_masks(net, magnitude_masks(net, 0.9))
    size = {c: save_model(net, tmp_path / "a", "sparse", "code4", compress=c).stat().st_size for c in (False, "zlib", "huffman")}
    assert size["huffman"] < size["zlib"] < size[False]
    bits = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)) * 120_000 / 8  # the least for the places alone
    assert size["huffman"] > bits and size["huffman"] < bits + 12_000 * 0.5 + 2500


def test_swapped_nibbles_are_caught():
    values = torch.randint(0, 16, (51,), generator=torch.manual_seed(0))
    packed = pack(values, 4)
    swapped = (packed >> 4) | (packed << 4)
    assert torch.equal(unpack(packed, 4, 51), values.byte()) and not torch.equal(unpack(swapped, 4, 51), values.byte())


@pytest.mark.parametrize("cut", [0, 3, 6, 12, -1])
def test_a_code_cut_short_is_refused(cut):
    payload = huffman_encode(torch.randint(0, 9, (100,)))
    with pytest.raises(ValueError, match="damaged") if cut else pytest.raises((ValueError, AssertionError)):
        assert len(huffman_decode(payload[:cut])) == 100


@pytest.mark.parametrize("call, words", [
    (lambda: huffman_encode(torch.tensor([256])), "0 to 255"), (lambda: huffman_encode(torch.tensor([-1])), "0 to 255"),
    (lambda: codebook(torch.empty(0)), "0 values"), (lambda: codebook(torch.tensor([math.nan])), "finite"),
    (lambda: codebook(torch.randn(9), 1), "2 to 256"), (lambda: encode(torch.randn(3, 3), "code9"), "2 to 8"),
    (lambda: encode(torch.randn(3, 3), "code"), "'code'"), (lambda: encode(torch.randn(3, 3), "int4", compress="rar"), "'rar'")])
def test_codes_refuse_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# Trained codebooks ----------------------------------------------------------------------------------------------------


def test_sharing_rounds_to_the_nearest_centre_and_settling_undoes_only_the_form():
    net = apply_masks(make_net(), magnitude_masks(make_net(), 0.6))
    before = {name: w.clone() for name, w in net.state_dict().items()}
    settled = settle_weights(share_weights(net, 8))
    assert all(torch.equal(before[name], w) for name, w in net.state_dict().items()), "the original is left alone"
    assert set(settled.state_dict()) == set(before)
    for name, w in layer_weights(settled).items():
        used = before[name] != 0
        centres, index = codebook(before[name][used], 8)
        assert torch.equal(w[used], centres[index.long()]) and not w[~used].any() and len(w[used].unique()) <= 8


def test_a_centres_gradient_is_the_sum_over_its_weights():
    net, x = make_net(), torch.randn(4, 1, 8, 8)
    shared, plain = share_weights(net, 4), settle_weights(share_weights(net, 4))
    shared(x).square().sum().backward(), plain(x).square().sum().backward()
    for layer in (0, 3, 5):
        places = shared[layer].parametrizations.weight[0].places
        by_hand = torch.stack([plain[layer].weight.grad[places == k].sum() for k in range(1, 5)])
        torch.testing.assert_close(shared[layer].parametrizations.weight.original.grad, by_hand, rtol=1e-3, atol=1e-3)


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
        assert not w[net.get_parameter(name) == 0].any() and not torch.equal(w, net.get_parameter(name))
        assert torch.equal(state[name], w.half().float()), "what was trained is what is stored"


def tiny_set():
    torch.manual_seed(0)
    labels = torch.arange(320) % 10
    pictures = (torch.rand(320, 1, 28, 28) * 60 + labels.view(-1, 1, 1, 1) * 19).byte()
    return ImageSet(name="tiny", train_images=pictures, train_labels=labels, test_images=pictures[:50], test_labels=labels[:50],
                    classes=tuple("0123456789"), mean=0.5, std=0.3, source="noise")


def test_the_chain_gives_few_values_and_goes_on_where_it_was_stopped(tmp_path):
    data, dense, answers = tiny_set(), ConvNet(), torch.randn(320, 10)
    options = dict(zeros=0.7, size=4, steps=10, tune=3, checkpoint=str(tmp_path / "run"))
    once = compress(dense, data, answers, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-pruned.safetensors", "run-shared.safetensors"]
    again, fresh = compress(dense, data, answers, **options), compress(dense, data, answers, **options | dict(checkpoint=""))
    for name, w in layer_weights(once).items():
        assert torch.equal(again.get_parameter(name), w) and torch.equal(fresh.get_parameter(name), w) and len(w.unique()) <= 5
    weights = torch.cat([w.flatten() for w in layer_weights(once).values()])
    assert (weights == 0).float().mean() == pytest.approx(0.7, abs=0.01)
    with pytest.raises(ValueError, match="recipe"):
        train_on(ConvNet(), data, answers, 10, seed=1, checkpoint=tmp_path / "run-pruned.safetensors")


# The shipped file -----------------------------------------------------------------------------------------------------


def test_the_card_keeps_what_the_lessons_promise():
    card = read_card("vgg_compressed")["metrics"]
    seeds = {arm: scores for arm, scores in card["accuracy"].items() if arm != "fp32"}  # the shipped net has no seeds
    mean = {arm: 100 * sum(scores) / len(scores) for arm, scores in seeds.items()}
    assert card["test_images"] == 10_000 and all(len(scores) == 3 for scores in seeds.values())
    assert mean["fp32, trained on"] - mean["static int8"] <= 0.3 and mean["fp32, trained on"] - mean["4-bit weights"] <= 1
    assert 30 * max(card["bytes"]["compressed"]) <= card["bytes"]["fp32"] and 100 * card["accuracy"]["fp32"] - mean["compressed"] < 0.5


def test_the_compressed_vgg_is_thirty_times_smaller_and_loads(tmp_path):
    card, path = read_card("vgg_compressed"), WEIGHTS / "vgg_compressed.bin"
    full = save_model(load_weights("vgg_supervised"), tmp_path / "a").stat().st_size
    assert path.stat().st_size == card["metrics"]["bytes"]["compressed"][0] and full >= 30 * path.stat().st_size
    net = fold_batch_norm(VGG(**card["config"])).eval()
    net.load_state_dict(load_model(path))
    weights = torch.cat([w.flatten() for w in layer_weights(net).values()])
    assert (weights == 0).float().mean() > 0.85 and len(next(iter(layer_weights(net).values())).unique()) <= 17
