"Quantisation: laws, parity with PyTorch, torch.ao and ONNX Runtime, broken variants, and bad input"

import math
import warnings
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close

from foundation.compression.folding import fold_batch_norm, plain_copy
from foundation.compression.integer_layers import (
    IntegerLayer,
    calibrate,
    integer_matmul,
    linear_in_bytes,
    quantize_dynamic,
    quantize_static,
    value_range,
)
from foundation.compression.weights import layer_weights
from foundation.compression.quantization import (
    choose_qparams,
    classify_rounded,
    fake_quantize,
    integer_range,
    quantize_tensor,
    quantize_weights,
)
from foundation.core.checks import complaint
from foundation.training.loop import train
from foundation.training.parameter_groups import adamw

DEPRECATED = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per"
)  # still the reference, while it is there


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
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    shift=st.floats(-3, 3),
    size=st.floats(1e-6, 1e6),
    group=st.sampled_from([None, 1, 4, 7, 99]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step(bits, symmetric, axis, shift, size, group, seed):
    torch.manual_seed(seed)
    x = (torch.randn(5, 3, 6) + shift) * size
    group = None if axis is None else group
    quantized = quantize_tensor(x, bits, axis, symmetric, group)
    start, stop = integer_range(bits, symmetric)
    assert (
        start <= quantized.values.min()
        and quantized.values.max() <= stop
        and quantized.values.shape == x.shape
    )
    steps = (
        quantized.scale.max()
        if group or axis is None
        else quantized.scale.view([-1 if d == axis % 3 else 1 for d in range(3)])
    )
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
    ao = pytest.importorskip(
        "torchao.quantization.quant_primitives",
        reason="torchao is not installed (pip install -e '.[bench]')",
    )
    x, (low, high) = (
        torch.randn(6, 24, generator=torch.Generator().manual_seed(bits)),
        integer_range(bits),
    )
    ours, block = quantize_tensor(x, bits, axis=0, group=group), (1, group)
    scale, zero = ao.choose_qparams_affine(
        x, ao.MappingType.SYMMETRIC, block, torch.int8, low, high
    )
    theirs = ao.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    (
        assert_close(ours.scale, scale.flatten()),
        assert_close(ours.zero_point, zero.flatten(), check_dtype=False),
    )
    assert torch.equal(ours.values, theirs)
    assert_close(
        ours.dequantize(), ao.dequantize_affine(theirs, block, scale, zero, torch.int8, low, high)
    )


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
    assert 0 < (a.grad == 0).float().mean() < 1, "some lie outside the range, some within"


def test_fake_quantize_equals_quantize_then_dequantize():
    x = torch.randn(5, 4, 3, requires_grad=True)
    out = fake_quantize(x, 4, axis=1)
    torch.testing.assert_close(out, quantize_tensor(x, 4, 1).dequantize())
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_groups_are_finer_than_channels_are_finer_than_one():
    x = torch.randn(16, 96) * torch.logspace(-2, 1, 16)[:, None] * torch.logspace(0, 1, 96)
    errors = [
        (quantize_tensor(x, 4, **how).dequantize() - x).square().mean()
        for how in (dict(), dict(axis=0), dict(axis=0, group=16))
    ]
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


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantize_tensor(torch.randn(4), 1),
        lambda: quantize_tensor(torch.randn(4), 9),
        lambda: quantize_tensor(torch.randn(4), 4.0),
        lambda: quantize_tensor(torch.arange(4)),
        lambda: quantize_tensor(torch.empty(0)),
        lambda: quantize_tensor(torch.tensor([1, float("inf")])),
        lambda: quantize_tensor(torch.randn(4), axis=1),
        lambda: quantize_tensor(torch.randn(4), group=2),
        lambda: calibrate([]),
        lambda: calibrate([torch.tensor([float("nan")])]),
        lambda: value_range(torch.randn(4), 101),
        lambda: fake_quantize(torch.randn(3), 16),
    ],
)
def test_quantisation_refuses(call):
    with pytest.raises((TypeError, ValueError)):
        call()
    assert "\n" not in complaint(call)


# Whole networks -----------------------------------------------------------------------------------


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
    a, b = (
        torch.randint(-128, 128, (n, d), dtype=torch.int8),
        torch.randint(-128, 128, (d, k), dtype=torch.int8),
    )
    assert torch.equal(integer_matmul(a, b), a.int() @ b.int())


def test_the_largest_sums_do_not_saturate():
    a, b = (
        torch.full((24, 4096), -128, dtype=torch.int8),
        torch.full((4096, 8), 127, dtype=torch.int8),
    )
    assert (integer_matmul(a, b) == -128 * 127 * 4096).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (17, 33, 9), (64, 128, 40)])
def test_integer_products_are_exact_on_a_gpu(n, d, k):
    a, b = (
        torch.randint(-128, 128, (n, d), dtype=torch.int8),
        torch.randint(-128, 128, (d, k), dtype=torch.int8),
    )
    assert torch.equal(integer_matmul(a.cuda(), b.cuda()).cpu(), a.int() @ b.int())


@pytest.mark.parametrize(
    "qparams", [None, (torch.tensor(0.03), torch.tensor(97, dtype=torch.int32))]
)
def test_bytes_give_what_the_layer_gives(qparams):
    torch.manual_seed(0)
    layer, x = nn.Linear(50, 7), torch.randn(9, 50)
    ours = IntegerLayer(layer, qparams)
    assert_close(linear_in_bytes(ours, x), ours(x), rtol=1e-5, atol=1e-5)
    q, scale, zero = ours.quantize_input(x)
    by_hand = ((q.int() - zero) @ ours.values.int().T) * (scale * ours.scale) + layer.bias
    assert_close(linear_in_bytes(ours, x), by_hand)
    off = ((q.int() - zero - 1) @ ours.values.int().T) * (scale * ours.scale) + layer.bias
    assert (off - ours(x)).abs().max() > 1e-2, "a zero point off by one must show"


def test_an_integer_layer_is_fake_quantisation_on_both_sides():
    layer, x = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), torch.randn(4, 3, 9, 9)
    qparams = calibrate([x])
    expected = nn.functional.conv2d(
        fake_quantize(x, 8, symmetric=False, **qparams._asdict()),
        fake_quantize(layer.weight, 8, axis=0),
        layer.bias,
        2,
        1,
        1,
        3,
    )
    assert_close(IntegerLayer(layer, qparams)(x), expected, rtol=1e-4, atol=1e-5)


def test_folding_equals_eval_and_pytorchs_own():
    net, x = lived_in(), images()
    folded = fold_batch_norm(net)
    assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    theirs = fuse_conv_bn_eval(net[0], net[1])
    assert_close(folded[0].weight, theirs.weight), assert_close(folded[0].bias, theirs.bias)
    assert isinstance(folded[1], nn.Identity) and isinstance(net[1], nn.BatchNorm2d)
    wrong = deepcopy(folded)
    wrong[0].weight.data = (
        net[0].weight * net[1].weight.view(1, -1, 1, 1)[:, :1]
    )  # the scale on the wrong axis
    assert (wrong(x) - net(x)).abs().max() > 1e-2


def test_scales_travel_with_the_weights():
    net, x = lived_in(), images()
    small, other = quantize_static(net, [x]), quantize_static(net, [2 * x])
    assert not torch.equal(small(x), other(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(small(x), other(x))


def test_int8_is_near_and_the_number_of_bits_counts():
    net, x = lived_in(), images(256)

    def gap(model):
        return (model(x) - net(x)).square().mean().sqrt().item()

    eight, six, four = (gap(quantize_static(net, x.split(64), bits)) for bits in (8, 6, 4))
    assert eight < six / 2 < four / 4 and eight < net(x).std() / 20
    assert gap(quantize_dynamic(net)) < net(x).std() / 20


def test_scales_equal_those_of_torch_ao():
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    net, x = lived_in(), images(64)
    ours, folded = quantize_static(net, [x]), fold_batch_norm(net)
    seen = MinMaxObserver(torch.quint8, quant_min=0, quant_max=255)
    seen(folded[:3](x))
    scale, zero = seen.calculate_qparams()
    (
        assert_close(ours[3].input_scale, scale.squeeze()),
        assert_close(ours[3].input_zero_point, zero.squeeze(), check_dtype=False),
    )
    weights = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
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
    assert (ours - theirs).abs().max() < 0.3 * right.std() and (
        ours.argmax(1) == theirs.argmax(1)
    ).float().mean() > 0.9


def test_onnx_int8_runs_and_equals_ours_within_steps(tmp_path):
    from foundation.deployment.export import OnnxModel, export_onnx, quantize_onnx

    net, x = lived_in(), images(128)
    graph = export_onnx(net, x[:1], tmp_path / "fp32.onnx")
    theirs = OnnxModel(quantize_onnx(graph, tmp_path / "int8.onnx", x))(x)
    ours, right = quantize_static(net, [x])(x), net(x)
    step = (right.max() - right.min()) / 255  # of the scale that their last layer writes on
    assert (theirs - ours).abs().mean() < step and (theirs - right).abs().mean() < 2 * step


def test_training_through_rounding_reaches_only_what_rounds_well():
    torch.manual_seed(0)
    x, y = images(64), torch.randint(0, 10, (64,))
    net = make_net()
    losses = [
        s.loss.item()
        for s in train(
            net, iter(lambda: (x, y), None), classify_rounded(3), adamw(net, 1e-2), steps=60
        )
    ]
    assert losses[-1] < losses[0] / 2
    before = {n: w.clone() for n, w in layer_weights(net).items()}
    with torch.no_grad():
        rounded, plain = quantize_weights(net, 3)[0].train()(x), net.train()(x)
    assert nn.functional.cross_entropy(rounded, y).item() == pytest.approx(losses[-1], rel=0.5)
    assert all(
        torch.equal(before[n], w) for n, w in layer_weights(net).items()
    ) and not torch.equal(rounded, plain)


def test_groups_in_training_are_those_of_the_file():
    x = torch.randn(6, 50)
    assert_close(
        fake_quantize(x, 4, axis=0, group=16), quantize_tensor(x, 4, axis=0, group=16).dequantize()
    )


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), wild=st.floats(1, 100), seed=st.integers(0, 9)
)
def test_least_squares_is_never_worse_than_the_whole_range(bits, symmetric, wild, seed):
    torch.manual_seed(seed)
    x = torch.cat([torch.randn(500), torch.tensor([wild])])
    loss = {}
    for method in ("range", "mse"):
        scale, zero = calibrate([x], bits, symmetric, method=method)
        loss[method] = (
            (fake_quantize(x, bits, symmetric=symmetric, scale=scale, zero_point=zero) - x)
            .square()
            .sum()
        )
    assert loss["mse"] <= loss["range"] * (1 + 1e-5)


def test_the_mean_square_error_is_a_twelfth_of_the_squared_step():
    x = torch.rand(100_000)
    q = quantize_tensor(x, 6, symmetric=False)
    assert (q.dequantize() - x).square().mean().item() == pytest.approx(
        q.scale.item() ** 2 / 12, rel=0.03
    )


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.head = (
            nn.Embedding(20, 8),
            nn.GRU(8, 8, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0][:, -1])


@pytest.mark.parametrize(
    "way", [lambda m, x: quantize_static(m, [x]), lambda m, x: quantize_dynamic(m)]
)
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


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: quantize_static(make_net(), []), "calibration set is empty"),
        (lambda: quantize_static(make_net(), [images()], 9), "2 to 8"),
        (lambda: quantize_static(nan_net(), [images()]), "3.weight holds NaN"),
        (lambda: quantize_dynamic(nan_net()), "3.weight holds NaN"),
        (lambda: quantize_dynamic(make_net(), 1), "2 to 8"),
        (lambda: quantize_dynamic(make_net(), skip=("body",)), "body"),
        (lambda: quantize_dynamic(nn.ReLU()), "no convolution"),
        (lambda: classify_rounded(12), "2 to 8"),
        (lambda: calibrate([images()], method="entropy"), "'entropy'"),
        (lambda: quantize_static(make_net(), [images()], method="x"), "'x'"),
        (lambda: integer_matmul(torch.ones(2, 2), torch.ones(2, 2)), "expected int8"),
        (
            lambda: integer_matmul(
                torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8)
            ),
            r"\(2, 3\)",
        ),
        (
            lambda: fold_batch_norm(
                nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
            ),
            "running statistics",
        ),
    ],
)
def test_whole_networks_refuse_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# The edges of numbers -----------------------------------------------------------------------------


def worst_in_steps(x, q):
    "The largest error, in steps of its scale"
    shape = (
        [-1 if d == (q.axis or 0) else 1 for d in range(x.ndim)]
        if q.axis is not None
        else [1] * x.ndim
    )
    return (
        ((q.dequantize().double() - x.double()).abs() / q.scale.double().view(shape)).max().item()
    )


@settings(max_examples=120, deadline=None)
@given(
    power=st.floats(-38, 38.5),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    axis=st.sampled_from([None, 0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
    seed=st.integers(0, 99),
)
def test_any_size_and_any_type_of_scale_is_within_half_a_step_or_refused(
    power, bits, symmetric, axis, dtype, seed
):
    x = (torch.rand(4, 50, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 10**power
    try:
        q = quantize_tensor(x, bits, axis, symmetric, scale_dtype=dtype)
    except ValueError as error:
        assert "do not fit" in str(error) and dtype in (torch.float16, torch.float8_e4m3fn), error
        return
    assert (
        q.scale.dtype == dtype and q.dequantize().isfinite().all() and worst_in_steps(x, q) <= 0.501
    )
    reach = torch.maximum(x.amax(), x.amin().neg()) if axis is None else x.abs().amax(1)
    marks = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    span = reach if symmetric else (x.amax() - x.amin() if axis is None else x.amax(1) - x.amin(1))
    assert (
        q.scale.double() <= span.double() / marks * (1 + 2 * torch.finfo(dtype).eps) + 2e-38
    ).all()


@pytest.mark.parametrize(
    "x",
    [
        [3e38, -3e38],
        [3.4028235e38, 0.0],
        [-3.4028235e38, 1e38],
        [1e-45, 0.0],
        [0.0, -0.0],
        [5.0, 5.0],
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_range_of_float32_has_a_scale(x, symmetric):
    x = torch.tensor(x)
    for bits in (2, 4, 8):
        q = quantize_tensor(x, bits, symmetric=symmetric)
        assert worst_in_steps(x, q) <= 0.501 and q.dequantize().isfinite().all()
        assert_close(fake_quantize(x, bits, symmetric=symmetric), q.dequantize())


def test_scales_that_do_not_fit_are_refused_and_rows_of_zeros_are_not():
    for size in (1e-6, 1e7):
        with pytest.raises(ValueError, match="float16; expected scale_dtype=torch.float32"):
            quantize_tensor(size * torch.tensor([[1.0, -0.5]]), axis=0, scale_dtype=torch.float16)
    zeros = quantize_tensor(
        torch.tensor([[0.0, 0.0], [1.0, -0.5]]), axis=0, scale_dtype=torch.float16
    ).dequantize()
    assert not zeros[0].any() and zeros[1].isfinite().all()
    with pytest.raises(TypeError, match="scale_dtype"):
        quantize_tensor(torch.randn(3), scale_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"x holds 1 NaN or infinite values \(in float32\)"):
        quantize_tensor(torch.tensor([1e300, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_least_squares_does_not_depend_on_the_unit(size):
    x = torch.cat([torch.rand(1000, generator=torch.manual_seed(0)), torch.tensor([5.0])])
    scale, zero = calibrate([size * x], 4, method="mse")
    assert (
        scale.item() / size == pytest.approx(calibrate([x], 4, method="mse")[0].item(), rel=1e-4)
        and zero == 0
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_the_rims_the_gradient_ends_where_rounding_does(symmetric, dtype):
    start, stop = integer_range(4, symmetric)
    marks = torch.tensor(
        [
            start - 0.5625,
            start - 0.4375,
            start,
            0.0,
            stop,
            stop + 0.4375,
            stop + 0.5625,
            stop + 9,
            start - 9,
        ]
    )
    x = (marks * 0.25).to(dtype).requires_grad_()  # all exact in every type
    out = fake_quantize(x, 4, symmetric=symmetric, scale=0.25)
    assert out.dtype == dtype and torch.equal(out.float(), marks.round().clamp(start, stop) * 0.25)
    out.float().sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0]
    theirs = (marks * 0.25).requires_grad_()
    torch.fake_quantize_per_tensor_affine(theirs, 0.25, 0, start, stop).sum().backward()
    assert torch.equal(theirs.grad, x.grad.float())


def test_half_precision_that_ends_at_its_largest_number_stays_finite():
    x = torch.tensor([65504.0, -3.0, 100.0]).half()
    for symmetric in (True, False):
        assert fake_quantize(x, 2, symmetric=symmetric).isfinite().all()


def test_numbers_of_numpy_and_tensors_are_plain_numbers():
    x = torch.randn(6, 8)
    want = quantize_tensor(x, 4, axis=0, group=4)
    for kind in (np.int64, np.int8, np.array, torch.tensor):
        got = quantize_tensor(x.numpy(), kind(4), axis=kind(0), group=kind(4))
        assert torch.equal(got.values, want.values) and type(got.bits) is int
    assert integer_range(np.int8(8)) == (-127, 127), "not in eight bits"
    assert torch.equal(value_range(x, np.float32(99))[0], value_range(x, 99)[0])
    assert isinstance(quantize_dynamic(make_net(), np.int32(8))[3], IntegerLayer)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fake_quantize([0.7], 8), "torch.tensor"),
        (lambda: fake_quantize(None, 8), "x is None"),
        (lambda: fake_quantize(torch.randn(3), scale=torch.tensor(0.0)), "above 0"),
        (
            lambda: fake_quantize(torch.randn(3, 4), axis=0, scale=torch.ones(2)),
            "2 entries; expected one, or one for each of 3",
        ),
        (
            lambda: fake_quantize(torch.randn(3), scale=1.0, zero_point=300),
            "zero_point runs from 300",
        ),
        (lambda: fake_quantize(torch.randn(3), zero_point=3), "without a scale"),
        (lambda: choose_qparams(torch.tensor(1.0), torch.tensor(math.inf)), "run from 1.0 to inf"),
        (lambda: choose_qparams(torch.tensor(1.0), torch.tensor(-1.0)), "at or below"),
        (lambda: choose_qparams(torch.zeros(3), torch.ones(2)), "to fit low"),
        (lambda: calibrate(3), "batches is 3"),
        (lambda: calibrate([[1.0, 2.0]]), "batch 0 is a list"),
        (lambda: calibrate([torch.zeros(0)]), "batch 0 is empty"),
        (lambda: integer_matmul([[1]], [[1]]), "torch.tensor"),
        (lambda: quantize_weights(make_net(), 4, group=0), "from 1 on"),
        (
            lambda: integer_matmul(
                torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(2**17, 1, dtype=torch.int8)
            ),
            "32 bits",
        ),
        (lambda: quantize_weights("model"), "network"),
        (lambda: quantize_static(make_net(), [torch.zeros(2, 3)]), "calibration batch|the example"),
        (lambda: IntegerLayer(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "'reflect'"),
        (lambda: IntegerLayer(nn.Linear(2, 2), (torch.tensor(-1.0), torch.tensor(0))), "above 0"),
        (lambda: IntegerLayer(nn.Linear(2, 2), (1.0,)), "expected scale and zero point"),
        (lambda: IntegerLayer(nn.Conv1d(2, 2, 1)), "Conv2d"),
        (
            lambda: linear_in_bytes(IntegerLayer(nn.Conv2d(1, 1, 1)), torch.ones(1, 1)),
            "convolution",
        ),
        (
            lambda: quantize_weights(nn.Sequential(nn.Linear(4, 4), nn.Linear(0, 2))),
            "1.weight is empty",
        ),
        (
            lambda: quantize_static(lived_in(), [images() * math.nan]),
            "0 cannot be written in integers: .* NaN",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# Layers that share, and weights that are computed -------------------------------------------------


def statistics(model):
    "Batch norms that have lived"
    torch.manual_seed(5)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.running_var, 0.3, 2)
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return model.eval()


class Pair(nn.Module):
    "A convolution and its norm, and a way to use them"

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.seq, self.way = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), way

    def forward(self, x):
        return self.way(self.seq, x)


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 3, 1)
        self.p, self.q = (
            nn.Sequential(conv, nn.BatchNorm2d(3)),
            nn.Sequential(conv, nn.BatchNorm2d(3)),
        )

    def forward(self, x):
        return self.p(x) + self.q(x)


class OneNorm(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(3)
        self.p, self.q = (
            nn.Sequential(nn.Conv2d(3, 3, 1), norm),
            nn.Sequential(nn.Conv2d(3, 3, 1), norm),
        )

    def forward(self, x):
        return self.q(self.p(x))


class Standardised(nn.Conv2d):
    "A weight that takes no scale"

    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Doubled(nn.BatchNorm2d):
    "A norm that does more"

    def forward(self, x):
        return 2 * super().forward(x)


class Unbiased(nn.Conv2d):
    "A layer that would not read a new bias"

    def forward(self, x):
        return F.conv2d(x, self.weight)


def watched():
    "A hook that only looks"
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda m, args, out: None)
    return model


def between(seq, x):
    u = seq[0](x)
    return seq[1](u) + u


def unreadable(way):
    "The same, behind a question that no trace can answer"
    return lambda seq, x: way(seq, x) if x.sum() < 1e9 else x


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda m, args, out: 2 * out)
    return model


USES = {
    "bare too": lambda seq, x: seq(x) + seq[0](x),
    "between": between,
    "its weight too": lambda seq, x: seq(x) + F.conv2d(x, seq[0].weight),
    "the norm elsewhere": lambda seq, x: seq(seq[1](x)),
    "the output of both": lambda seq, x: torch.cat([seq[0](x), seq(x)]),
}
UNFOLDABLE = {
    **{name: lambda way=way: Pair(way) for name, way in USES.items()},
    **{
        f"{name}, not traceable": lambda way=way: Pair(unreadable(way))
        for name, way in USES.items()
    },
    "levels": Levels,
    "one norm": OneNorm,
    "hooked": hooked,
    "watched": watched,
    "a norm of its own": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(3)),
    "no bias": lambda: nn.Sequential(Unbiased(3, 3, 1, bias=False), nn.BatchNorm2d(3)),
    "a class of its own": lambda: nn.Sequential(Standardised(3, 4, 1), nn.BatchNorm2d(4)),
    "Linear and four axes": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
@pytest.mark.parametrize("shown", [False, True])
def test_what_cannot_be_folded_exactly_is_left_with_a_warning(name, shown):
    torch.manual_seed(0)
    model, x = statistics(UNFOLDABLE[name]()), torch.randn(4, 3, 8, 8)
    with pytest.warns(UserWarning, match="batch norm is left as it is after"):
        folded = fold_batch_norm(model, x if shown else None)
    assert_close(folded(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pair(lambda seq, x: seq(seq(x))),
        lambda: Pair(unreadable(lambda seq, x: seq(x))),
        lambda: nn.ModuleList([hooked()[:1]])[0],
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        ),
    ],
)
def test_what_can_be_folded_is_folded_without_a_word(make):
    model, x = statistics(make()), torch.randn(4, 3, 8, 8)
    for example in (None, x):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folded = fold_batch_norm(model, example)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert_close(folded(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape, flat", [((5, 4), True), ((5, 4, 4), False)])
def test_a_norm_behind_a_linear_layer_is_folded_only_where_it_works_on_the_last_axis(shape, flat):
    model, x = (
        statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))),
        torch.randn(shape),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        blind, seeing = fold_batch_norm(model), fold_batch_norm(model, x)
    assert len(said) == 1 + (not flat), "without an example nobody can know"
    assert isinstance(seeing[1], nn.Identity) == flat and isinstance(blind[1], nn.BatchNorm1d)
    for folded in (blind, seeing):
        assert_close(folded(x), model(x), rtol=0, atol=1e-5)
    behind = statistics(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)))
    assert isinstance(fold_batch_norm(behind)[2], nn.Identity), "behind a flatten it is known"


def test_a_tied_weight_stays_tied_with_a_warning_and_what_is_frozen_stays_frozen():
    model = statistics(Pair(lambda seq, x: seq[2](seq[1](seq[0](x)))))
    model.seq.append(nn.Conv2d(3, 3, 1, bias=False))
    model.requires_grad_(False)
    x = torch.randn(2, 3, 4, 4)
    for tied in (False, True):
        if tied:
            model.seq[2].weight = model.seq[0].weight
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            folded = fold_batch_norm(model)
        assert len(said) == tied and isinstance(folded.seq[1], nn.Identity) != tied
        assert_close(folded(x), model(x), rtol=0, atol=1e-5)
        assert (folded.seq[2].weight is folded.seq[0].weight) == tied
        assert not any(p.requires_grad for p in folded.parameters())


def test_a_look_at_an_example_leaves_no_trace():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            return self.seq(x) * self.n

    model, x = Counts().train(), torch.randn(2, 3, 4, 4)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for copy in (fold_batch_norm(model), fold_batch_norm(model, x), quantize_static(model, [x, x])):
        assert copy.n == 0 and not copy.seq[0]._forward_pre_hooks and not copy.seq[0]._forward_hooks
    assert (
        torch.equal(torch.rand(3), expected)
        and model.n == 0
        and model.training
        and fold_batch_norm(model, x).training
    )


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "masks": pruned,
    "weight norm of old": lambda m: nn.utils.weight_norm(m),
    "spectral norm of old": lambda m: nn.utils.spectral_norm(m),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_worked_in(name):
    torch.manual_seed(0)
    model = statistics(
        nn.Sequential(
            COMPUTED[name](nn.Conv2d(3, 4, 1)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            COMPUTED[name](nn.Linear(64, 5)),
        )
    )
    x = torch.randn(3, 3, 4, 4)
    with (
        torch.no_grad()
    ):  # somebody moves what the weight is made of, and nobody has called the layer since
        for p in model.parameters():
            p.mul_(1.3)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ways = [
        plain_copy(model),
        fold_batch_norm(model),
        quantize_weights(model)[0],
        quantize_static(model, [x]),
        quantize_dynamic(model),
    ]
    right = model(x)
    for way, tolerance in zip(ways, (1e-5, 1e-5, 0.03, 0.03, 0.03)):
        assert_close(way(x), right, rtol=0, atol=tolerance * right.abs().max().item())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items()) and torch.equal(
        model(x), right
    )
    assert (
        isinstance(plain_copy(model)[4].weight, nn.Parameter)
        and "weight" not in plain_copy(model, skip="4")[4]._parameters
    )
    assert isinstance(fold_batch_norm(model)[1], nn.Identity) and isinstance(
        quantize_static(model, [x])[4], IntegerLayer
    )
    with pytest.raises(ValueError, match="computed at each pass"):
        classify_rounded(4)(model, (x, torch.zeros(3, dtype=torch.long)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b, self.more = self.a, nn.ModuleList([self.a, nn.Linear(4, 4)])

    def forward(self, x):
        return self.more[1](self.more[0](self.b(self.a(x).relu()).relu()))


def test_one_layer_under_several_names_is_one_afterwards():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(50, 4)
    for small in (quantize_dynamic(model), quantize_static(model, x.split(10))):
        assert isinstance(small.a, IntegerLayer) and small.b is small.a and small.more[0] is small.a
        assert isinstance(small.more[1], IntegerLayer) and small.more[1] is not small.a
        assert (small(x) - model(x)).abs().max() < 0.05
    assert small.a.input_scale * 255 >= model.a(x).relu().max() - 1e-4, (
        "its range holds all that passes at any name"
    )
    assert isinstance(quantize_dynamic(model, skip=("a",)).b, nn.Linear), (
        "skipped under one name is skipped"
    )


class Reads(nn.Module):
    "Reads the weight and never calls the layer"

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(F.linear(x, self.inner.weight, self.inner.bias))


@pytest.mark.parametrize(
    "make, x",
    [
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
            torch.randn(2, 5, 8),
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")),
            torch.randn(2, 3, 6, 6),
        ),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 3)), torch.randn(2, 3, 6)),
    ],
)
def test_what_must_stay_in_float_stays_and_is_named(make, x):
    torch.manual_seed(0)
    model = make()
    for way in (lambda: quantize_dynamic(model), lambda: quantize_static(model, [x])):
        with pytest.warns(UserWarning, match="left in float"):
            small = way()
        with torch.no_grad():
            assert (small(x) - model(x)).abs().max() < 0.05
    with pytest.raises(ValueError, match="calibration set is empty"):
        quantize_static(model, [])


def test_who_reads_the_weight_of_an_integer_layer_gets_floats():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        model, x = Reads().to(dtype), torch.randn(5, 4).to(dtype)
        small = quantize_dynamic(model)
        assert isinstance(small.inner, IntegerLayer) and small.inner.weight.dtype == dtype
        exact = quantize_tensor(model.inner.weight, axis=0).dequantize().to(dtype)
        assert torch.equal(small.inner.weight, exact)
        assert (small(x) - model(x)).abs().max() < 0.05
    model, x = Reads(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="inner is left in float, since no batch passes it"):
        small = quantize_static(model, [x])
    assert (small(x) - model(x)).abs().max() < 0.05 and isinstance(small.inner, nn.Linear)


@pytest.mark.filterwarnings("ignore")
def test_layers_whose_block_reads_their_weights_stay_in_float():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    small = quantize_dynamic(nn.Sequential(block, nn.Linear(8, 2)))
    assert type(small[0].linear1) is nn.Linear and isinstance(small[1], IntegerLayer)


def test_a_layer_that_no_batch_passes_stays_and_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x) if x.sum() > 1e6 else self.a(x)

    with pytest.warns(UserWarning, match="b is left in float, since no batch passes it"):
        small = quantize_static(Two(), [torch.randn(3, 4)])
    assert isinstance(small.a, IntegerLayer) and isinstance(small.b, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_numbers_are_whole_in_every_float_type(dtype):
    net, x = lived_in().to(dtype), images().to(dtype)
    right = lived_in()(images())
    for small in (quantize_static(net, [x]), quantize_dynamic(net), quantize_weights(net)[0]):
        out = small(x)
        assert out.dtype == dtype and (out.float() - right).abs().max() < 0.05 * right.abs().max()
    layer = IntegerLayer(nn.Linear(600, 3).to(dtype))
    q, scale, zero = layer.quantize_input(x := torch.randn(4, 600).to(dtype))
    assert torch.equal(q, q.round()) and q.max() == 255 and q.min() == 0
    assert_close(layer(x), linear_in_bytes(layer, x), rtol=1e-2, atol=1e-3)


def test_whole_numbers_stay_whole_under_autocast():
    layer, x = IntegerLayer(nn.Linear(300, 5)), torch.randn(4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, layer(x))
    assert_close(inside, linear_in_bytes(layer, x), rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, 5), "an empty batch has an empty answer"


def test_tied_weights_stay_tied_in_weights_only():
    torch.manual_seed(0)
    words, out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    out.weight = words.weight
    copy, integers = quantize_weights(nn.Sequential(words, out))
    assert copy[1].weight is copy[0].weight and len(integers) == 1
    assert torch.equal(copy[0].weight.data, next(iter(integers.values())).dequantize())


def test_all_zero_and_one_value_layers_survive():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight), nn.init.constant_(model[1].weight, 0.7)
    x = torch.randn(4, 3)
    for small in (
        quantize_dynamic(model),
        quantize_static(model, [x]),
        quantize_weights(model, 2)[0],
    ):
        assert_close(small(x), model(x), rtol=0, atol=0.01)


OUTSIDE = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=3),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=3),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_all_norms_of_networks_from_outside_are_folded(name):
    torch.manual_seed(0)
    model, x = OUTSIDE[name]().eval(), torch.randn(2, 3, 64, 64)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold_batch_norm(model)
    assert len(norms) >= 20 and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    right = model(x)
    assert (folded(x) - right).abs().max() < 1e-5 * right.abs().max()


def test_norms_that_no_layer_feeds_are_named():
    "DenseNet's norms come before the convolutions: some read what several layers gave"
    sizes = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
    model, x = torchvision.models.DenseNet(**sizes).eval(), torch.randn(1, 3, 64, 64)
    with pytest.warns(UserWarning) as said:
        folded = fold_batch_norm(model, x)
    left = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left and all(n in str(said[0].message) for n in left)
    torch.testing.assert_close(folded(x), model(x))
