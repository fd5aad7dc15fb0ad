"One sound call for each public name of folding, quantisation and integer networks"

import torch
from torch import nn

from foundation.compression import folding, integer_layers, quantization
from foundation.training.loop import load_optimizers

load_optimizers()  # PyTorch's late imports take seconds: no call's clock should count them


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).eval()


def pictures(n=4):
    return numbers(n, 1, 8, 8)


F, N = "compression.folding.", "compression.integer_layers."
Q = "compression.quantization."
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
    N + "value_range": lambda: (integer_layers.value_range, dict(x=numbers(50), percentile=99.0)),
    N + "calibrate": lambda: (
        integer_layers.calibrate,
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
    F + "Logits": lambda: (folding.Logits, dict(model=network())),
    F + "as_linear": lambda: (folding.as_linear, dict(model=network())),
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
        integer_layers.integer_matmul,
        dict(a=(10 * numbers(3, 5)).to(torch.int8), b=(10 * numbers(5, 2)).to(torch.int8)),
    ),
    N + "IntegerLayer": lambda: (
        integer_layers.IntegerLayer,
        dict(layer=nn.Linear(4, 3), qparams=(torch.tensor(0.1), torch.tensor(9)), bits=8),
    ),
    N + "linear_in_bytes": lambda: (
        integer_layers.linear_in_bytes,
        dict(layer=integer_layers.IntegerLayer(nn.Linear(4, 3)), x=numbers(5, 4)),
    ),
    N + "quantize_dynamic": lambda: (
        integer_layers.quantize_dynamic,
        dict(model=network(), bits=8, skip=("4",), example=pictures()),
    ),
    N + "quantize_static": lambda: (
        integer_layers.quantize_static,
        dict(model=network(), batches=[pictures()], bits=8, skip=(), percentile=99.9),
    ),
}
SKIP = {}
