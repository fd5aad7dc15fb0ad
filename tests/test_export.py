"ONNX: the graph says what the model says, small files stay close, and mistakes are named"
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from foundation.deployment.export import (  # noqa: E402
    OnnxModel, compare_latency, export_onnx, measure_latency, quantize_onnx, quantize_onnx_weights)


class Residual(nn.Module):
    "Convolution, batch norm with its own statistics, a residual sum, dropout, a head"

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
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
def test_integer_weights_stay_close_and_unfold(graph, images, expected, tmp_path, bits, gap, smaller):
    path = quantize_onnx_weights(graph, tmp_path / "w.onnx", bits)
    torch.testing.assert_close(OnnxModel(path)(images), expected, rtol=0, atol=gap * expected.abs().max().item())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OnnxModel(path)(images), expected, rtol=0, atol=1e-6)


def test_integer_weights_equal_our_own_quantiser(images, tmp_path):
    from foundation.compression.quantization import quantize_weights
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 24 * 24, 9)).eval()
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
    nodes = {node.op_type for node in onnx.load(quantize_onnx(graph, tmp_path / "q.onnx", images)).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes


@pytest.mark.parametrize("size", [lambda x: 2, lambda x: int(x.shape[0])])  # frozen in the model; frozen by the trace
def test_a_frozen_batch_is_caught(images, tmp_path, size):
    class Frozen(nn.Module):
        def forward(self, x):
            return x.reshape(size(x), 784)

    with pytest.raises(ValueError, match="batch of 4"):
        export_onnx(Frozen(), images[:2], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_disagrees_is_refused_with_its_gap(images, tmp_path):
    class Loud(nn.Module):  # adds a constant that the trace cannot see: it differs from call to call
        calls = 0

        def forward(self, x):
            Loud.calls += 1
            return x.mean((2, 3)) + Loud.calls

    with pytest.raises(ValueError, match="differs from PyTorch by"):
        export_onnx(Loud(), images[:2], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_latency_is_positive_and_threads_come_back(model, graph, images):
    threads = torch.get_num_threads()
    both = compare_latency({"torch": model, "onnx": OnnxModel(graph)}, images[:1], (1, 8), rounds=2, calls=(3, 2), threads=1)
    assert all(v > 0 for row in both.values() for v in row.values()) and set(both) == {"torch", "onnx"}
    assert set(measure_latency(model, images[:1], batch_sizes=(1, 4), rounds=1)) == {"latency_ms", "images_per_second"}
    assert torch.get_num_threads() == threads and model.training


@pytest.mark.parametrize("call,error", [
    (lambda g, x, t: OnnxModel(t / "none.onnx"), FileNotFoundError),
    (lambda g, x, t: OnnxModel(b"no graph"), ValueError),
    (lambda g, x, t: OnnxModel(g)(x[0]), ValueError),
    (lambda g, x, t: OnnxModel(g)(torch.randn(1, 3, 28, 28)), ValueError),
    (lambda g, x, t: quantize_onnx_weights(g, t / "a", 3), ValueError),
    (lambda g, x, t: quantize_onnx_weights(t / "none", t / "a"), FileNotFoundError),
    (lambda g, x, t: quantize_onnx(g, t / "a", x[:0]), ValueError),
    (lambda g, x, t: quantize_onnx(g, t / "a", x * float("nan")), ValueError),
    (lambda g, x, t: quantize_onnx(g, t / "a", x, method="guess"), ValueError)])
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
