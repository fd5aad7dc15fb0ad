"One sound call for each public name of foundation.deployment, for the laws and the fuzz"

import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from foundation.deployment import export


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()


def pictures(n=4):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def place(name="graph.onnx"):
    return Path(tempfile.mkdtemp()) / name


@cache
def content():
    return export.export_onnx(network(), pictures(2), place()).read_bytes()


def file():
    path = place()
    path.write_bytes(content())
    return path


def double(x):
    return 2 * x


def answer(images):
    return export.OnnxModel(content())(images)


def exported(**options):
    "Exports, and asks the graph what it says"
    return export.OnnxModel(export.export_onnx(**options))(pictures(3))


def compared(**options):
    "Who was timed, and how: the times themselves differ from call to call"
    return {name: sorted(row) for name, row in export.compare_latency(**options).items()}


def measured(**options):
    return sorted(export.measure_latency(**options))


CLOCK = dict(batch_sizes=(1, 4), rounds=1, calls=(1, 1), threads=1)
EXAMPLES = {
    "deployment.export.OnnxModel": lambda: (export.OnnxModel, dict(path=file(), threads=1)),
    "deployment.export.OnnxModel.__call__": lambda: (answer, dict(images=pictures())),
    "deployment.export.export_onnx": lambda: (
        exported,
        dict(
            model=network(),
            example=pictures(2),
            path=place(),
            dynamic_batch=True,
            tolerance=1e-4,
            opset=17,
        ),
    ),
    "deployment.export.quantize_onnx_weights": lambda: (
        export.quantize_onnx_weights,
        dict(source=file(), target=place(), bits=4),
    ),
    "deployment.export.quantize_onnx": lambda: (
        export.quantize_onnx,
        dict(
            source=file(),
            target=place(),
            calibration=pictures(),
            per_channel=True,
            method="minmax",
            batch_size=2,
        ),
    ),
    "deployment.export.compare_latency": lambda: (
        compared,
        dict(predicts={"a": double, "b": network()}, example=pictures(1), **CLOCK),
    ),
    "deployment.export.measure_latency": lambda: (
        measured,
        dict(predict=double, example=pictures(1), **CLOCK),
    ),
}
SKIP = {}
if not (find_spec("onnx") and find_spec("onnxruntime")):
    clock = ("compare_latency", "measure_latency")
    SKIP = {
        name: "needs the extra `deploy`"
        for name in EXAMPLES
        if name.rpartition(".")[2] not in clock
    }
    EXAMPLES = {name: call for name, call in EXAMPLES.items() if name not in SKIP}
