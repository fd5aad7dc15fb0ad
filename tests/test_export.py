"ONNX: the graph says what the model says, small files stay close, and mistakes are named"

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from foundation.deployment.export import (  # noqa: E402
    OnnxModel,
    compare_latency,
    export_onnx,
    measure_latency,
    quantize_onnx,
    quantize_onnx_weights,
)
from foundation.models.bert import BERT  # noqa: E402
from foundation.models.convnets import VGG, ConvNet, ResNet  # noqa: E402
from foundation.models.gpt import GPT  # noqa: E402
from foundation.models.vit import ViT  # noqa: E402


class Residual(nn.Module):
    "Convolution, batch norm with its own statistics, a residual sum, dropout, a head"

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.inner = nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 10))

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.inner(x).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Residual()
    for _ in range(20):
        net(torch.randn(64, 1, 28, 28) * 3 + 1)
    return net


@pytest.fixture(scope="module")
def images():
    return torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 3 + 1


@pytest.fixture(scope="module")
def graph(model, images, tmp_path_factory):
    return export_onnx(model, images[:2], tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def expected(model, images):
    model.eval()
    with torch.no_grad():
        outputs = model(images)
    model.train()
    return outputs


@pytest.mark.parametrize("size", [1, 3, 128])
def test_graph_equals_model_at_any_batch_size(graph, images, expected, size):
    torch.testing.assert_close(OnnxModel(graph)(images[:size]), expected[:size], rtol=0, atol=1e-4)


def test_export_leaves_modes_and_gradients_as_they_were(model, images, tmp_path):
    model.train()
    model.head.eval()
    export_onnx(model, images[:1], tmp_path / "a.onnx")
    assert model.training and model.stem.training and not model.head.training
    model.head.train()
    assert model(images[:2]).requires_grad


@pytest.mark.parametrize("bits,gap,smaller", [(8, 0.02, 1.2), (4, 0.3, 1.2)])
def test_integer_weights_stay_close_and_unfold(
    graph, images, expected, tmp_path, bits, gap, smaller
):
    path = quantize_onnx_weights(graph, tmp_path / "w.onnx", bits)
    torch.testing.assert_close(
        OnnxModel(path)(images), expected, rtol=0, atol=gap * expected.abs().max().item()
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OnnxModel(path)(images), expected, rtol=0, atol=1e-6)


def test_integer_weights_equal_our_own_quantiser(images, tmp_path):
    from foundation.compression.quantization import quantize_weights

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 24 * 24, 9)
    ).eval()
    path = export_onnx(net, images[:1], tmp_path / "a.onnx")
    for bits in (8, 4):
        ours = quantize_weights(net, bits)[0]
        theirs = OnnxModel(quantize_onnx_weights(path, tmp_path / "b.onnx", bits))
        with torch.no_grad():
            torch.testing.assert_close(theirs(images[:4]), ours(images[:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_static_int8_is_close(graph, images, expected, tmp_path, method, capfd):
    path = quantize_onnx(graph, tmp_path / "q.onnx", images, method=method)
    gap = (OnnxModel(path)(images) - expected).abs().mean() / expected.abs().mean()
    assert gap < 0.1
    out = capfd.readouterr()
    assert "preprocess" not in (out.out + out.err).lower(), "the quantiser should not talk"


def test_int8_products_are_in_the_graph(graph, images, tmp_path):
    import onnx

    nodes = {
        node.op_type
        for node in onnx.load(quantize_onnx(graph, tmp_path / "q.onnx", images)).graph.node
    }
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes


@pytest.mark.parametrize(
    "size", [lambda x: 2, lambda x: int(x.shape[0])]
)  # frozen in the model; frozen by the trace
def test_a_frozen_batch_is_caught(images, tmp_path, size):
    class Frozen(nn.Module):
        def forward(self, x):
            return x.reshape(size(x), 784)

    with pytest.raises(ValueError, match="batch of 4"):
        export_onnx(Frozen(), images[:2], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_disagrees_is_refused_with_its_gap(images, tmp_path):
    class Loud(
        nn.Module
    ):  # adds a constant that the trace cannot see: it differs from call to call
        calls = 0

        def forward(self, x):
            Loud.calls += 1
            return x.mean((2, 3)) + Loud.calls

    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export_onnx(Loud(), images[:2], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_latency_is_positive_and_threads_come_back(model, graph, images):
    threads = torch.get_num_threads()
    both = compare_latency(
        {"torch": model, "onnx": OnnxModel(graph)},
        images[:1],
        (1, 8),
        rounds=2,
        calls=(3, 2),
        threads=1,
    )
    assert all(v > 0 for row in both.values() for v in row.values()) and set(both) == {
        "torch",
        "onnx",
    }
    assert set(measure_latency(model, images[:1], batch_sizes=(1, 4), rounds=1)) == {
        "latency_ms",
        "images_per_second",
    }
    assert torch.get_num_threads() == threads and model.training


@pytest.mark.parametrize(
    "call,error",
    [
        (lambda g, x, t: OnnxModel(t / "none.onnx"), FileNotFoundError),
        (lambda g, x, t: OnnxModel(b"no graph"), ValueError),
        (lambda g, x, t: OnnxModel(g)(x[0]), ValueError),
        (lambda g, x, t: OnnxModel(g)(torch.randn(1, 3, 28, 28)), ValueError),
        (lambda g, x, t: quantize_onnx_weights(g, t / "a", 3), ValueError),
        (lambda g, x, t: quantize_onnx_weights(t / "none", t / "a"), FileNotFoundError),
        (lambda g, x, t: quantize_onnx(g, t / "a", x[:0]), ValueError),
        (lambda g, x, t: quantize_onnx(g, t / "a", x * float("nan")), ValueError),
        (lambda g, x, t: quantize_onnx(g, t / "a", x, method="guess"), ValueError),
    ],
)
def test_export_refuses(graph, images, tmp_path, call, error):
    with pytest.raises(error):
        call(graph, images, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_truncated_graph_is_named(graph, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(graph.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut.onnx"):
        OnnxModel(path)


def test_missing_runtime_says_how_to_get_it(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"foundation\[deploy\]"):
        OnnxModel(graph)


# What a graph would repeat ------------------------------------------------------------------------


class Does(nn.Module):
    "A forward pass as a function"

    def __init__(self, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, x):
        return self.way(self, x)


READS = {
    "a branch": lambda m, x: x * 2 if x.sum() > 0 else x,
    "a branch on what a layer gives": lambda m, x: m.layer(x) if m.layer(x).mean() > 100 else x,
    "a count": lambda m, x: sum(x for _ in range(int(x.abs().max()) + 1)),
    "a factor": lambda m, x: x / (x.abs().max().item() + 1),
    "a float": lambda m, x: x * float(x[0, 0]),
    "an index": lambda m, x: x[:, : int(x.argmax()) + 1],
    "a list": lambda m, x: x * max(x.flatten().tolist()),
    "an array": lambda m, x: x + torch.from_numpy(np.sign(x.detach().numpy())),
    "a while": lambda m, x: next(y for y in (x * 2**i for i in range(40)) if y.abs().max() > 3),
    "any": lambda m, x: x if (x > 0).any() else -x,
    "written into a buffer": lambda m, x: x * 2 if torch.zeros_like(x).copy_(x).sum() > 0 else x,
}
SIZES = {
    "a check of the shape": lambda m, x: (
        m.layer(x) if x.shape[1] == 4 and x.ndim == 2 and len(x) > 0 else None
    ),
    "a number of columns": lambda m, x: sum(x[:, i] for i in range(x.shape[1])),
    "a type": lambda m, x: x.to(torch.float32) if x.dtype != torch.float32 else m.layer(x),
    "where": lambda m, x: torch.where(x.sum(1, keepdim=True) > 0, 2 * x, x),
    "a parameter": lambda m, x: x * 2 if m.layer.weight.abs().sum() > 0 else x,
    "a flatten": lambda m, x: m.layer(x.reshape(x.shape[0], -1)),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_is_read_from_data_is_not_baked_in(tmp_path, name, dynamic):
    torch.manual_seed(0)
    model = Does(READS[name])
    with pytest.raises(
        ValueError, match=r"reads values of its input \(test_export.py, line \d+\)"
    ) as caught:
        export_onnx(model, torch.ones(2, 4), tmp_path / "a.onnx", dynamic)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert (
        not model._forward_hooks
        and not model._forward_pre_hooks
        and model.training
        and model.layer.weight.requires_grad
    )


@pytest.mark.parametrize("name", SIZES)
def test_what_is_asked_of_sizes_and_parameters_is_no_reading(tmp_path, name):
    model = Does(SIZES[name]).eval()
    run = OnnxModel(export_onnx(model, torch.ones(2, 4), tmp_path / "a.onnx"))
    for x in (torch.ones(2, 4), -torch.ones(1, 4), torch.randn(5, 4)):
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: x.clamp(max=1.0) if Hidden.first() else x,
        lambda m, x: x.abs() if Hidden.first() else x,
        lambda m, x: x.sum(1) if Hidden.first() else x.relu().sum(1),
    ],
)
def test_other_values_than_the_examples_are_tried(tmp_path, way):
    "Differences that the example, all ones, does not show"
    Hidden.calls = 0
    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export_onnx(Does(way), torch.ones(2, 4), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Hidden:
    "Says yes to the trace and no to everybody later"

    calls = 0

    @classmethod
    def first(cls):
        cls.calls += 1
        return cls.calls == 1


def test_large_outputs_may_differ_by_their_rounding(tmp_path):
    torch.manual_seed(0)
    model = Does(lambda m, x: 1e5 * m.layer(x)).eval()
    run = OnnxModel(export_onnx(model, torch.ones(2, 4), tmp_path / "a.onnx"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-5, atol=1)
    Hidden.calls = 0
    with pytest.raises(ValueError, match="differs"):
        export_onnx(
            Does(lambda m, x: x + float(Hidden.first())), torch.ones(2, 4), tmp_path / "b.onnx"
        )


def test_values_that_a_model_does_not_take_are_left_out(tmp_path):
    class Picky(nn.Module):
        def forward(self, x):
            if not torch.jit.is_tracing() and (x < 0).any():
                raise ValueError("counts are never negative")
            return x.sqrt()

    run = OnnxModel(export_onnx(Picky(), torch.ones(2, 4), tmp_path / "a.onnx"))
    assert run(torch.full((3, 4), 4.0)).eq(2).all()


def test_outputs_that_are_not_finite_agree_with_themselves(tmp_path):
    model = Does(lambda m, x: torch.log(x))  # NaN below 0 and -inf at 0
    assert (
        OnnxModel(export_onnx(model, torch.ones(2, 4), tmp_path / "a.onnx"))(torch.zeros(1, 4))
        .isinf()
        .all()
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Does(lambda m, x: (x, x)), "gives a tuple"),
        (lambda: Does(lambda m, x: {"y": x}), "graph|gives a dict"),
        (lambda: Does(lambda m, x: x @ torch.ones(5, 5)), "cannot be written as a graph"),
        (lambda: Does(lambda m, x: torch.linalg.svd(x)[1]), "cannot be written as a graph"),
    ],
)
def test_models_without_a_graph_are_told_in_one_sentence(tmp_path, make, words):
    with pytest.raises(ValueError, match=words) as caught:
        export_onnx(make(), torch.ones(2, 4), tmp_path / "a.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# Kinds of input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: BERT(50, 16, 16, 1, 2),
        lambda: GPT(50, 16, 16, 1, 2),
        lambda: nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_text_models_are_exported_and_take_tokens(tmp_path, make, dtype):
    torch.manual_seed(0)
    model, tokens = make().eval(), torch.randint(1, 50, (3, 6))
    run = OnnxModel(export_onnx(model, tokens[:2].to(dtype), tmp_path / "a.onnx"))
    want = model(tokens).detach()
    for kind in (torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(run(tokens.to(kind)), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run(tokens.numpy()), want, rtol=1e-3, atol=1e-4)
    with pytest.raises(TypeError, match="expects int"):
        run(tokens.float())
    with pytest.raises(ValueError, match=r"\('batch', 6\)"):
        run(tokens[:, :4])
    with pytest.raises(ValueError):
        run(tokens * 1000)  # words that are not there


def test_several_inputs_are_handed_over_together(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

        def forward(self, tokens, mask):
            return self.head(
                (self.words(tokens) * mask[..., None]).sum(1)
                / mask.sum(1, keepdim=True).clamp(min=1)
            )

    model, tokens, mask = Masked().eval(), torch.randint(0, 20, (4, 5)), torch.rand(4, 5) > 0.3
    run = OnnxModel(export_onnx(model, (tokens[:2], mask[:2]), tmp_path / "a.onnx"))
    torch.testing.assert_close(
        run(tokens, mask), model(tokens, mask).detach(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="input_1"):
        run(tokens)
    with pytest.raises(TypeError, match="expects bool"):
        run(tokens, mask.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_graphs_in_other_float_types_take_what_they_were_made_for(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()
    x = torch.randn(4, 6)
    run = OnnxModel(export_onnx(model, x[:2].to(dtype), tmp_path / "a.onnx"))
    assert run(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(run(x), model(x.to(dtype)).detach(), rtol=1e-2, atol=1e-2)
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="do not fit"):
            run(x * 1e6)
        small = OnnxModel(quantize_onnx_weights(tmp_path / "a.onnx", tmp_path / "b.onnx"))
        torch.testing.assert_close(small(x), model(x.to(dtype)).detach(), rtol=0.05, atol=0.05)


def test_small_weights_in_half_precision_keep_their_scale(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).half()
    model[0].weight.data = torch.randn(4, 8, generator=torch.manual_seed(0)).half() * 1e-3
    path = quantize_onnx_weights(
        export_onnx(model, torch.ones(2, 8).half(), tmp_path / "a.onnx"), tmp_path / "b.onnx"
    )
    x = 100 * torch.randn(3, 8, generator=torch.manual_seed(1)).half()
    torch.testing.assert_close(OnnxModel(path)(x), model(x).detach(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNet(widths=(4,)),
        lambda: ResNet(widths=(8, 8), depths=(1, 1)),
        lambda: VGG(widths=(4, 4), depths=(1, 1)),
        lambda: ViT(image_size=16, patch_size=4, channels=1, dim=8, depth=1, heads=2),
    ],
)
def test_our_own_models_are_exported(tmp_path, make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, 1, 16, 16)
    run = OnnxModel(export_onnx(model, x[:2], tmp_path / "a.onnx"))
    torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda g, x, t: OnnxModel(g)([1.0]), "a list"),
        (lambda g, x, t: OnnxModel(g)(x.to(torch.uint8)), "expects float32"),
        (lambda g, x, t: OnnxModel(g, threads=0), "from 1 on"),
        (lambda g, x, t: OnnxModel(None), "path is None"),
        (lambda g, x, t: OnnxModel(g)(), "0 inputs"),
        (lambda g, x, t: OnnxModel(t), "no file"),
        (lambda g, x, t: export_onnx(ConvNet(), [1], t / "a"), "example is a list"),
        (lambda g, x, t: export_onnx(ConvNet(), x[:0], t / "a"), "expected a batch"),
        (lambda g, x, t: export_onnx(ConvNet().bfloat16(), x.bfloat16(), t / "a"), "model.float()"),
        (lambda g, x, t: export_onnx("net", x, t / "a"), "network"),
        (lambda g, x, t: export_onnx(ConvNet(), x, t / "a", tolerance=-1.0), "from 0"),
        (lambda g, x, t: quantize_onnx_weights(g, t / "a", 8.5), "bits is 8.5"),
        (lambda g, x, t: quantize_onnx_weights(damaged(g, t), t / "a"), "cut.onnx"),
        (lambda g, x, t: quantize_onnx(damaged(g, t), t / "a", x), "cut.onnx"),
        (lambda g, x, t: quantize_onnx(g, t / "a", x, batch_size=0), "from 1 on"),
        (lambda g, x, t: quantize_onnx(g, t / "a", x[:, :, :5]), "expects"),
        (lambda g, x, t: quantize_onnx(g, t / "a", None), "calibration is None"),
        (lambda g, x, t: compare_latency({}, x), "0 candidates"),
        (lambda g, x, t: compare_latency({"a": 3}, x), "predicts"),
        (lambda g, x, t: compare_latency({"a": OnnxModel(g)}, x, (1,)), "1 entries"),
        (lambda g, x, t: compare_latency({"a": OnnxModel(g)}, x, (0, 4)), "from 1 on"),
        (lambda g, x, t: measure_latency(OnnxModel(g), x[:0]), "at least one"),
        (lambda g, x, t: measure_latency(OnnxModel(g), x, rounds=0), "from 1 on"),
    ],
)
def test_wrong_arguments_get_a_sentence(graph, images, tmp_path, call, words):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=words) as caught:
        call(graph, images, tmp_path)
    assert "\n" not in str(caught.value)


def damaged(graph, folder):
    (folder / "cut.onnx").write_bytes(graph.read_bytes()[:-200])
    return folder / "cut.onnx"


# Integers, and the clock --------------------------------------------------------------------------


def test_integers_in_the_graph_are_ours_and_four_bits_fill_half_the_bytes(graph, tmp_path):
    import onnx
    from foundation.compression.quantization import quantize_tensor

    def constants(path):
        return {t.name: t for t in onnx.load(path).graph.initializer}

    floats = constants(graph)
    for bits in (8, 4):
        found = constants(quantize_onnx_weights(graph, tmp_path / "b.onnx", bits))
        names = [name[:-2] for name in found if name.endswith(":q")]
        assert len(names) == 3, "every convolution and linear layer"
        for name in names:
            want = quantize_tensor(
                torch.tensor(onnx.numpy_helper.to_array(floats[name])), bits, axis=0
            )
            raw = np.frombuffer(found[name + ":q"].raw_data, np.uint8)
            marks = (
                raw.view(np.int8)
                if bits == 8
                else np.stack([raw & 15, raw >> 4], 1)
                .reshape(-1)[: want.values.numel()]
                .astype(np.int16)
            )
            marks = marks if bits == 8 else np.where(marks > 7, marks - 16, marks)
            assert (marks == want.values.numpy().reshape(-1)).all()
            assert np.array_equal(
                onnx.numpy_helper.to_array(found[name + ":s"]).reshape(-1), want.scale.numpy()
            )


def ends_of_the_input(path):
    "What the first ruler of a quantised graph can write"
    import onnx

    graph = onnx.load(path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    node = next(
        n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == graph.input[0].name
    )
    scale, zero = constants[node.input[1]], constants[node.input[2]].astype(float)
    return float(scale * (0 - zero)), float(scale * (255 - zero))


def test_rulers_come_from_all_of_the_calibration_and_from_nothing_else(graph, images, tmp_path):
    low, high = ends_of_the_input(quantize_onnx(graph, tmp_path / "q.onnx", images, batch_size=50))
    step = (high - low) / 255
    assert abs(low - images.min()) <= step and abs(high - images.max()) <= step
    late = images.clone()
    late[-1, 0, 0, 0] = 60.0  # in the last and smallest batch
    assert ends_of_the_input(quantize_onnx(graph, tmp_path / "q.onnx", late, batch_size=50))[
        1
    ] == pytest.approx(60, abs=0.4)
    assert (
        ends_of_the_input(quantize_onnx(graph, tmp_path / "q.onnx", late, method="percentile"))[1]
        < 59.9
    ), "the outlier is cut off"


def test_each_output_channel_has_a_ruler_or_all_have_one(graph, images, tmp_path):
    import onnx

    def scales(path):
        return {
            t.name: onnx.numpy_helper.to_array(t).size
            for t in onnx.load(path).graph.initializer
            if t.name.endswith("_scale")
        }

    many, one = (
        scales(quantize_onnx(graph, tmp_path / "q.onnx", images, per_channel=kind))
        for kind in (True, False)
    )
    assert {8, 10} <= set(many.values()) and set(one.values()) == {1}


def test_a_graph_for_one_batch_size_is_calibrated_in_such_batches(model, images, tmp_path):
    path = export_onnx(model, images[:4], tmp_path / "a.onnx", dynamic_batch=False)
    small = OnnxModel(quantize_onnx(path, tmp_path / "q.onnx", images[:11]))
    assert small(images[:4]).shape == (4, 10)
    with pytest.raises(ValueError, match="expects"):
        small(images[:3])


def test_tied_tables_are_written_once_and_still_read_by_both(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, 8)

        def forward(self, x):
            return F.linear(self.words(x), self.words.weight)

    model, x = Tied(), torch.randint(0, 30, (2, 5))
    small = quantize_onnx_weights(export_onnx(model, x, tmp_path / "a.onnx"), tmp_path / "b.onnx")
    want = model(x).detach()
    assert (OnnxModel(small)(x) - want).abs().max() < 0.05 * want.abs().max()


def test_the_clock_sees_sleep_takes_turns_and_divides_by_the_batch():
    import time

    order = []

    def sleeper(name, seconds):
        def predict(x):
            order.append((name, len(x)))
            time.sleep(seconds * len(x))
            return x

        return predict

    times = compare_latency(
        {"a": sleeper("a", 0.001), "b": sleeper("b", 0.003)},
        torch.zeros(1, 2),
        (2, 7),
        rounds=2,
        calls=(2, 1),
    )
    assert 2 <= times["a"]["latency_ms"] < 5 < times["b"]["latency_ms"] < 20
    assert 400 < times["a"]["images_per_second"] <= 1000 and times["b"]["images_per_second"] <= 334
    turns = [name for i, (name, _) in enumerate(order) if i == 0 or order[i - 1][0] != name]
    assert turns == ["a", "b", "a", "b"] and {size for _, size in order} == {2, 7}
    assert order.count(("a", 2)) == 2 * (5 + 2) and order.count(("a", 7)) == 1 + 2, (
        "warm-ups, then timed calls"
    )


def test_a_failing_candidate_leaves_threads_and_modes_as_they_were(images):
    threads, net = torch.get_num_threads(), Residual().train()

    def fails(x):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="fails fails on a tensor of float32"):
        compare_latency(
            {"net": net, "fails": fails},
            images[:1],
            (1, 2),
            rounds=1,
            calls=(1, 1),
            threads=3 - threads,
        )
    assert torch.get_num_threads() == threads and net.training and net.stem.training


def test_nobody_talks_and_warnings_are_as_before(model, images, tmp_path, capfd):
    before = list(warnings.filters)
    export_onnx(model, images[:2], tmp_path / "a.onnx")
    assert warnings.filters == before and capfd.readouterr() == ("", "")
