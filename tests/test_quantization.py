"Quantisation: laws, parity with PyTorch, torch.ao and ONNX Runtime, broken variants, and bad input"
import math
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

from foundation.compression.pruning import layer_weights
from foundation.compression.quantization import (
    IntegerLayer, affine_map, calibrate, classify_rounded, fake_quantize, fold_batch_norm, integer_matmul, integer_range,
    quantize_dynamic, quantize_static, quantize_tensor, quantize_weights, value_range)
from foundation.training.loop import adamw, train

DEPRECATED = pytest.mark.filterwarnings("ignore:torch.quantize_per")  # still the reference, while it is there


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3), nn.Flatten(),
                         nn.Linear(12 * 4 * 4, 10))


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits, group", [(8, 24), (4, 24), (4, 8), (2, 8)])
def test_groups_equal_torchao(bits, group):
    ao = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed (pip install -e '.[bench]')")
    x, (low, high) = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits)), integer_range(bits)
    ours, block = quantize_tensor(x, bits, axis=0, group=group), (1, group)
    scale, zero = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, block, torch.int8, low, high)
    theirs = ao.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    assert_close(ours.scale, scale.flatten()), assert_close(ours.zero_point, zero.flatten(), check_dtype=False)
    assert torch.equal(ours.values, theirs)
    assert_close(ours.dequantize(), ao.dequantize_affine(theirs, block, scale, zero, torch.int8, low, high))


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


# Whole networks -------------------------------------------------------------------------------------------------------


def lived_in():
    "A net whose batch norm has seen data, so that folding it means something"
    net = make_net()
    for _ in range(5):
        net(torch.randn(64, 1, 8, 8) * 2 + 1)
    nn.init.normal_(net[1].weight, 1, 0.3), nn.init.normal_(net[1].bias)
    return net.eval()


def images(n=32, seed=1):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 300), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_integer_products_are_exact(n, d, k, seed):
    torch.manual_seed(seed)
    a, b = torch.randint(-128, 128, (n, d), dtype=torch.int8), torch.randint(-128, 128, (d, k), dtype=torch.int8)
    assert torch.equal(integer_matmul(a, b), a.int() @ b.int())


def test_the_largest_sums_do_not_saturate():
    a, b = torch.full((24, 4096), -128, dtype=torch.int8), torch.full((4096, 8), 127, dtype=torch.int8)
    assert (integer_matmul(a, b) == -128 * 127 * 4096).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (17, 33, 9), (64, 128, 40)])
def test_integer_products_are_exact_on_a_gpu(n, d, k):
    a, b = torch.randint(-128, 128, (n, d), dtype=torch.int8), torch.randint(-128, 128, (d, k), dtype=torch.int8)
    assert torch.equal(integer_matmul(a.cuda(), b.cuda()).cpu(), a.int() @ b.int())


@pytest.mark.parametrize("ruler", [None, (torch.tensor(0.03), torch.tensor(97, dtype=torch.int32))])
def test_bytes_give_what_the_layer_gives(ruler):
    layer, x = nn.Linear(50, 7), torch.randn(9, 50)
    ours = IntegerLayer(layer, ruler)
    assert_close(ours.exact(x), ours(x), rtol=1e-5, atol=1e-5)
    q, scale, zero = ours.marks(x)
    by_hand = ((q.int() - zero) @ ours.weight.int().T) * (scale * ours.scale) + layer.bias
    assert_close(ours.exact(x), by_hand)
    off = ((q.int() - zero - 1) @ ours.weight.int().T) * (scale * ours.scale) + layer.bias
    assert (off - ours(x)).abs().max() > 1e-2, "a zero point off by one must show"


def test_an_integer_layer_is_fake_quantisation_on_both_sides():
    layer, x = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), torch.randn(4, 3, 9, 9)
    ruler = calibrate([x])
    expected = nn.functional.conv2d(fake_quantize(x, 8, symmetric=False, scale=ruler[0], zero_point=ruler[1]),
                                    fake_quantize(layer.weight, 8, axis=0), layer.bias, 2, 1, 1, 3)
    assert_close(IntegerLayer(layer, ruler)(x), expected, rtol=1e-4, atol=1e-5)


def test_folding_equals_eval_and_pytorchs_own():
    net, x = lived_in(), images()
    folded = fold_batch_norm(net)
    assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    theirs = fuse_conv_bn_eval(net[0], net[1])
    assert_close(folded[0].weight, theirs.weight), assert_close(folded[0].bias, theirs.bias)
    assert isinstance(folded[1], nn.Identity) and isinstance(net[1], nn.BatchNorm2d)
    wrong = deepcopy(folded)
    wrong[0].weight.data = net[0].weight * net[1].weight.view(1, -1, 1, 1)[:, :1]  # the scale on the wrong axis
    assert (wrong(x) - net(x)).abs().max() > 1e-2


def test_rulers_travel_with_the_weights():
    net, x = lived_in(), images()
    small, other = quantize_static(net, [x]), quantize_static(net, [2 * x])
    assert not torch.equal(small(x), other(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(small(x), other(x))


def test_int8_is_near_and_the_number_of_bits_counts():
    net, x = lived_in(), images(256)
    gap = lambda model: (model(x) - net(x)).square().mean().sqrt().item()
    eight, six, four = (gap(quantize_static(net, x.split(64), bits)) for bits in (8, 6, 4))
    assert eight < six / 2 < four / 4 and eight < net(x).std() / 20
    assert gap(quantize_dynamic(net)) < net(x).std() / 20


def test_rulers_equal_those_of_torch_ao():
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
    net, x = lived_in(), images(64)
    ours, folded = quantize_static(net, [x]), fold_batch_norm(net)
    seen = MinMaxObserver(torch.quint8, quant_min=0, quant_max=255)
    seen(folded[:3](x))
    scale, zero = seen.calculate_qparams()
    assert_close(ours[3].input_scale, scale.squeeze()), assert_close(ours[3].input_zero, zero.squeeze(), check_dtype=False)
    weights = PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_symmetric, quant_min=-127, quant_max=127)
    weights(folded[3].weight)
    assert_close(ours[3].scale, weights.calculate_qparams()[0])


@pytest.mark.filterwarnings("ignore")
def test_torch_ao_gives_the_same_answers():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    net, x = lived_in(), images(256)
    prepared = prepare_fx(deepcopy(net), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    theirs = convert_fx(prepared)(x)
    ours, right = quantize_static(net, [x])(x), net(x)
    assert (ours - right).square().mean() <= 1.5 * (theirs - right).square().mean()
    assert (ours - theirs).abs().max() < 0.3 * right.std() and (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.9


def test_onnx_int8_runs_and_equals_ours_within_steps(tmp_path):
    from foundation.deployment.export import OnnxModel, export_onnx, quantize_onnx
    net, x = lived_in(), images(128)
    graph = export_onnx(net, x[:1], tmp_path / "fp32.onnx")
    theirs = OnnxModel(quantize_onnx(graph, tmp_path / "int8.onnx", x))(x)
    ours, right = quantize_static(net, [x])(x), net(x)
    step = (right.max() - right.min()) / 255  # of the ruler that their last layer writes on
    assert (theirs - ours).abs().mean() < step and (theirs - right).abs().mean() < 2 * step


def test_training_through_rounding_reaches_only_what_rounds_well():
    torch.manual_seed(0)
    x, y = images(64), torch.randint(0, 10, (64,))
    net = make_net()
    losses = [s.loss.item() for s in train(net, iter(lambda: (x, y), None), classify_rounded(3), adamw(net, 1e-2), steps=60)]
    assert losses[-1] < losses[0] / 2
    before = {n: w.clone() for n, w in layer_weights(net).items()}
    with torch.no_grad():
        rounded, plain = quantize_weights(net, 3)[0].train()(x), net.train()(x)
    assert nn.functional.cross_entropy(rounded, y).item() == pytest.approx(losses[-1], rel=0.5)
    assert all(torch.equal(before[n], w) for n, w in layer_weights(net).items()) and not torch.equal(rounded, plain)


def test_groups_in_training_are_those_of_the_file():
    x = torch.randn(6, 50)
    assert_close(fake_quantize(x, 4, axis=0, group=16), quantize_tensor(x, 4, axis=0, group=16).dequantize())


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), wild=st.floats(1, 100), seed=st.integers(0, 9))
def test_least_squares_is_never_worse_than_the_whole_range(bits, symmetric, wild, seed):
    torch.manual_seed(seed)
    x = torch.cat([torch.randn(500), torch.tensor([wild])])
    loss = {}
    for method in ("range", "mse"):
        scale, zero = calibrate([x], bits, symmetric, method=method)
        loss[method] = (fake_quantize(x, bits, symmetric=symmetric, scale=scale, zero_point=zero) - x).square().sum()
    assert loss["mse"] <= loss["range"] * (1 + 1e-5)


def test_the_mean_square_error_is_a_twelfth_of_the_squared_step():
    x = torch.rand(100_000)
    q = quantize_tensor(x, 6, symmetric=False)
    assert (q.dequantize() - x).square().mean().item() == pytest.approx(q.scale.item() ** 2 / 12, rel=0.03)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0][:, -1])


@pytest.mark.parametrize("way", [lambda m, x: quantize_static(m, [x]), lambda m, x: quantize_dynamic(m)])
def test_unsupported_layers_are_named_and_left(way):
    net, x = Mixed().eval(), torch.randint(0, 20, (5, 7))
    with pytest.warns(UserWarning, match=r"embed \(Embedding\), gru \(GRU\)"):
        small = way(net, x)
    assert isinstance(small.head, IntegerLayer) and isinstance(small.gru, nn.GRU)
    assert (small(x) - net(x)).abs().max() < 0.05


def test_skip_and_a_lone_layer():
    net = lived_in()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(quantize_dynamic(net, skip=("5",))[5], nn.Linear)
    assert isinstance(quantize_dynamic(nn.Linear(3, 2)), IntegerLayer)


def nan_net():
    net = make_net()
    net[3].weight.data[0] = math.nan
    return net


@pytest.mark.parametrize("call, words", [
    (lambda: quantize_static(make_net(), []), "calibration set is empty"), (lambda: quantize_static(make_net(), [images()], 9), "2 to 8"),
    (lambda: quantize_static(nan_net(), [images()]), "3.weight holds NaN"), (lambda: quantize_dynamic(nan_net()), "3.weight holds NaN"),
    (lambda: quantize_dynamic(make_net(), 1), "2 to 8"), (lambda: quantize_dynamic(make_net(), skip=("body",)), "body"),
    (lambda: quantize_dynamic(nn.ReLU()), "no convolution"), (lambda: classify_rounded(12), "2 to 8"),
    (lambda: calibrate([images()], method="entropy"), "'entropy'"), (lambda: quantize_static(make_net(), [images()], method="x"), "'x'"),
    (lambda: integer_matmul(torch.ones(2, 2), torch.ones(2, 2)), "expected int8"),
    (lambda: integer_matmul(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8)), r"\(2, 3\)"),
    (lambda: fold_batch_norm(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))), "running statistics")])
def test_whole_networks_refuse_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
