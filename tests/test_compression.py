"Pruning, quantisation and storage: laws, parity with PyTorch, and bad input"
import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune

from foundation.compression.pruning import (
    Pruner, apply_masks, cubic_sparsity, keep_largest, layer_weights, magnitude_masks, sparsity)
from foundation.compression.quantization import (
    calibrate, fake_quantize, integer_range, quantize_tensor, quantize_weights, value_range)
from foundation.compression.storage import load_model, pack, save_model, unpack

FORMATS = [("fp32", "fp16"), ("fp16", "fp16"), *((f"int{b}", "fp16") for b in range(2, 9)),
           *(("sparse", v) for v in ("fp32", "fp16", "int8", "int4"))]

DEPRECATED = pytest.mark.filterwarnings("ignore:torch.quantize_per")  # still the reference, while it is there


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3), nn.Flatten(),
                         nn.Linear(12 * 4 * 4, 10))


# Pruning --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.9])
def test_layer_masks_equal_torch(share):
    net, theirs = make_net(), make_net()
    masks = magnitude_masks(net, share, "layer")
    for name, module in theirs.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.l1_unstructured(module, "weight", share)
            assert torch.equal(masks[f"{name}.weight"], module.weight_mask.bool())


@pytest.mark.parametrize("share", [0.25, 0.8, 0.95])
def test_global_masks_equal_torch(share):
    net, theirs = make_net(), make_net()
    modules = {n: m for n, m in theirs.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=share)
    masks = magnitude_masks(net, share)
    assert all(torch.equal(masks[f"{n}.weight"], m.weight_mask.bool()) for n, m in modules.items())
    assert sparsity(apply_masks(net, masks)) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1)])
def test_zeros_stay_and_sparsity_only_grows(make):
    net = make_net()
    opt, pruner = make(net.parameters()), Pruner(net, 0.9, begin=3, end=20, every=4)
    x, y, before = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,)), {}
    for step in range(30):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        target = pruner.update(step)
        assert target <= cubic_sparsity(step, 3, 20, 0.9)
        assert all(not (w[~pruner.masks[n]]).any() for n, w in layer_weights(net).items() if pruner.masks)
        assert all(not (mask & ~before.get(n, mask)).any() for n, mask in pruner.masks.items()), "a pruned weight came back"
        before = pruner.masks
    assert target == 0.9 and sparsity(net) == pytest.approx(0.9, abs=1e-3)


def test_without_the_pruner_momentum_revives_weights():
    net = make_net()
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    apply_masks(net, magnitude_masks(net, 0.9))
    nn.functional.cross_entropy(net(torch.randn(16, 1, 8, 8)), torch.randint(0, 10, (16,))).backward()
    opt.step()
    assert sparsity(net) < 0.5


def test_pruner_resumes_late_and_before_begin_does_nothing():
    net = make_net()
    pruner = Pruner(net, 0.8, begin=10, end=20)
    assert pruner.update(0) == 0 and sparsity(net) == 0
    assert pruner.update(500) == 0.8 and sparsity(net) == pytest.approx(0.8, abs=1e-3)


def test_skip_leaves_a_layer_alone_and_shared_weights_count_once():
    net = make_net()
    apply_masks(net, magnitude_masks(net, 0.9, skip=("5",)))
    assert net[5].weight.count_nonzero() == net[5].weight.numel()
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert list(layer_weights(tied)) == ["0.weight"]


@pytest.mark.parametrize("call", [
    lambda net: magnitude_masks(net, 1.0), lambda net: magnitude_masks(net, -0.1), lambda net: magnitude_masks(net, float("nan")),
    lambda net: magnitude_masks(net, 0.5, "row"), lambda net: magnitude_masks(net, 0.5, skip=("head",)),
    lambda net: Pruner(net, 0.9, 10, 10), lambda net: Pruner(net, 0.9, 0, 10, every=0), lambda net: Pruner(net, 1.0, 0, 10),
    lambda net: apply_masks(net, {"0.weight": torch.ones(3, dtype=torch.bool)}),
    lambda net: apply_masks(net, {"nobody.weight": torch.ones(3, dtype=torch.bool)}),
    lambda net: layer_weights(nn.Sequential(nn.ReLU())), lambda net: cubic_sparsity(0, 0, 1, 0.2, initial=0.5)])
def test_pruning_refuses(call):
    with pytest.raises(ValueError):
        call(make_net())


def test_nan_weights_are_named():
    net = make_net()
    net[3].weight.data[0] = float("nan")
    for call in (lambda: magnitude_masks(net, 0.5), lambda: quantize_weights(net)):
        with pytest.raises(ValueError, match="3.weight"):
            call()


# Quantisation ---------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), axis=st.sampled_from([None, 0, 1, -1]), shift=st.floats(-3, 3),
       size=st.floats(1e-6, 1e6), group=st.sampled_from([None, 1, 4, 7, 99]), seed=st.integers(0, 99))
def test_error_is_at_most_half_a_step(bits, symmetric, axis, shift, size, group, seed):
    torch.manual_seed(seed)
    x = (torch.randn(5, 3, 6) + shift) * size
    group = None if axis is None else group
    quantized = quantize_tensor(x, bits, axis, symmetric, group)
    start, stop = integer_range(bits, symmetric)
    assert start <= quantized.values.min() and quantized.values.max() <= stop and quantized.values.shape == x.shape
    steps = quantized.scale.max() if group or axis is None else quantized.scale.view([-1 if d == axis % 3 else 1 for d in range(3)])
    assert ((quantized.dequantize() - x).abs() <= steps * 0.5001).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_exact_and_quantising_twice_changes_nothing(symmetric):
    x = torch.randn(8, 9) + 2
    x[2], x[:, 3] = 0, 0
    once = quantize_tensor(x, 4, 0, symmetric).dequantize()
    assert not once[x == 0].any()
    torch.testing.assert_close(quantize_tensor(once, 4, 0, symmetric).dequantize(), once)


@DEPRECATED
@pytest.mark.parametrize("axis", [0, 1])
def test_values_equal_torch_per_channel(axis):
    x = torch.randn(6, 7, 3, 3)
    ours = quantize_tensor(x, 8, axis)
    theirs = torch.quantize_per_channel(x, ours.scale, ours.zero_point, axis, torch.qint8)
    assert torch.equal(ours.values, theirs.int_repr())
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize())


@DEPRECATED
def test_affine_values_equal_torch_per_tensor():
    x = torch.rand(100) * 5 - 1
    ours = quantize_tensor(x, 8, symmetric=False)
    theirs = torch.quantize_per_tensor(x, ours.scale.item(), int(ours.zero_point), torch.quint8)
    assert torch.equal(ours.values, theirs.int_repr())


def test_fake_quantize_and_its_gradient_equal_torch():
    x = torch.randn(200, dtype=torch.float32) * 2
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    scale, zero = torch.tensor(0.01), torch.tensor(20, dtype=torch.int32)
    ours = fake_quantize(a, 8, symmetric=False, scale=scale, zero_point=zero)
    theirs = torch.fake_quantize_per_tensor_affine(b, 0.01, 20, 0, 255)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(200)
    (ours * weight).sum().backward(), (theirs * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert 0 < (a.grad == 0).float().mean() < 1, "some lie beyond the ruler, some within"


def test_fake_quantize_equals_quantize_then_dequantize():
    x = torch.randn(5, 4, 3, requires_grad=True)
    out = fake_quantize(x, 4, axis=1)
    torch.testing.assert_close(out, quantize_tensor(x, 4, 1).dequantize())
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_groups_are_finer_than_channels_are_finer_than_one():
    x = torch.randn(16, 96) * torch.logspace(-2, 1, 16)[:, None] * torch.logspace(0, 1, 96)
    errors = [(quantize_tensor(x, 4, **how).dequantize() - x).square().mean() for how in
              (dict(), dict(axis=0), dict(axis=0, group=16))]
    assert errors[0] > errors[1] > errors[2]


def test_percentile_ignores_an_outlier():
    x = torch.cat([torch.randn(9999), torch.tensor([1000.0])])
    assert value_range(x)[1] == 1000 and value_range(x, 99.9)[1] < 5
    assert calibrate([x], percentile=99.9)[0] < calibrate([x])[0] / 50


def test_quantize_weights_leaves_the_original_alone():
    net = make_net()
    before = {n: w.clone() for n, w in net.state_dict().items()}
    copy, integers = quantize_weights(net, 4, group=8, skip=("5",))
    assert set(integers) == {"0.weight", "3.weight"} and torch.equal(copy[5].weight, net[5].weight)
    assert all(torch.equal(before[n], w) for n, w in net.state_dict().items())
    torch.testing.assert_close(copy[3].weight.data, integers["3.weight"].dequantize())


@pytest.mark.parametrize("call", [
    lambda: quantize_tensor(torch.randn(4), 1), lambda: quantize_tensor(torch.randn(4), 9), lambda: quantize_tensor(torch.randn(4), 4.0),
    lambda: quantize_tensor(torch.arange(4)), lambda: quantize_tensor(torch.empty(0)), lambda: quantize_tensor(torch.tensor([1, float("inf")])),
    lambda: quantize_tensor(torch.randn(4), axis=1), lambda: quantize_tensor(torch.randn(4), group=2), lambda: calibrate([]),
    lambda: calibrate([torch.tensor([float("nan")])]), lambda: value_range(torch.randn(4), 101), lambda: fake_quantize(torch.randn(3), 16)])
def test_quantisation_refuses(call):
    with pytest.raises(ValueError):
        call()


# Storage --------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_pack_round_trips_in_the_fewest_bytes(bits, count, seed):
    torch.manual_seed(seed)
    values = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.numel() == -(-count * bits // 8) and torch.equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("compress", [False, True])
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
