"From a trained VGG to one in 8-bit integers, against `torch.ao` and torchao."

import copy
import warnings

import torch

from foundation.compression.integer_layers import IntegerLayer, quantize_static
from foundation.models.convnets import VGG

from .duel import Duel, peer


def quantize(images: int = 256, widths: tuple[int, ...] = (32, 64, 128)) -> Duel:
    "Post-training static quantisation: ranges from smallest to largest value, weights per channel."
    torch.manual_seed(0)
    x, net = torch.rand(images, 1, 28, 28), VGG(widths=widths, depths=(2,) * len(widths))
    with torch.no_grad():
        net(x)  # so that batch norm has statistics
    net.eval()
    return Duel(
        unit="images/s",
        items=images,
        limit=1.0,
        ours=lambda: quantize_static(net, [x]),
        peers={"torch.ao": lambda: by_torch_ao(net, x), "torchao": lambda: by_torchao(net, x)},
        proof=same_scales(quantize_static(net, [x]), by_torch_ao(net, x)),
        note=(
            "images calibrated, from the float network to the converted one. torch.ao has the same"
            " observers, so the scales of inputs and weights are equal; torchao exports a graph"
            " first and brings its x86 recipe. What comes out is not the same: theirs runs on int8"
            " kernels, ours shows the arithmetic in floats and is slower than fp32 at inference"
        ),
    )


@torch.no_grad()
def by_torch_ao(net, x):
    "Prepare, calibrate, convert, with our choice of ranges"
    ao = peer("torch.ao.quantization")
    fx = peer("torch.ao.quantization.quantize_fx")
    config = ao.QConfig(
        activation=ao.MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255),
        weight=ao.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = fx.prepare_fx(_sequence(net), ao.QConfigMapping().set_global(config), (x[:1],))
        prepared(x)
        return fx.convert_fx(prepared)


@torch.no_grad()
def by_torchao(net, x):
    "The same by the quantiser that followed: export, prepare, calibrate, convert"
    tools = peer("torchao.quantization.pt2e.quantize_pt2e")
    recipe = peer("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(_sequence(net), (x,)).module()
        prepared = tools.prepare_pt2e(
            graph,
            recipe.X86InductorQuantizer().set_global(
                recipe.get_default_x86_inductor_quantization_config()
            ),
        )
        prepared(x)
        return tools.convert_pt2e(prepared)


def _sequence(net):
    "The VGG without the checks of its input, which a tracer cannot follow"
    return torch.nn.Sequential(
        copy.deepcopy(net.body),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        copy.deepcopy(net.head),
    ).eval()


def same_scales(ours, theirs) -> dict[str, tuple[float, float]]:
    "Sums of the weights' scales and of their integers' sizes, over all layers; first input scale."
    mine = [m for m in ours.modules() if isinstance(m, IntegerLayer)]
    other = [m.weight() for m in theirs.modules() if hasattr(m, "weight") and callable(m.weight)]
    return dict(
        scales=(
            sum(m.scale.sum().item() for m in mine),
            sum(w.q_per_channel_scales().sum().item() for w in other),
        ),
        weights=(
            sum(m.values.abs().sum(dtype=torch.long).item() for m in mine),
            sum(w.int_repr().abs().sum(dtype=torch.long).item() for w in other),
        ),
        inputs=(mine[0].input_scale.item(), _first_scale(theirs)),
    )


def _first_scale(graph) -> float:
    "The scale on which a converted graph writes its input"
    return next(float(value) for name, value in graph.named_buffers() if "input_scale" in name)
