"""Half of the channels cut out of the shipped VGG, by us and by torch-pruning: one picture through
what is left."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from foundation.compression.channels import channel_masks, remove_channels
from foundation.models.convnets import VGG

from .duel import Duel, peer


def prune(
    precision: str = "fp32",
    widths: tuple[int, ...] = (32, 64, 128),
    sparsity: float = 0.5,
    calls: int = 40,
) -> Duel:
    "The same channels cut; the forward pass at batch size 1."
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    net, x = (
        VGG(widths=widths).eval(),
        torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    )
    masks = channel_masks(net, sparsity)
    ours, theirs = remove_channels(net, masks).eval(), their_cut(net, masks, x).eval()
    proof = equal_outputs(ours, theirs, x) | dict(parameters=(count(ours), count(theirs)))
    x = x.to(dtype)

    def run(model):
        return _many(model.to(dtype), x, calls)

    return Duel(
        unit="images/s",
        items=calls,
        ours=run(ours),
        peers={"torch-pruning": run(theirs), "uncut": run(net)},
        proof=proof,
        limit=None,
        note=(
            "both cut the same channels, and what they leave is the same network: against"
            " torch-pruning a ratio of 1 is right. The network before the cut runs beside them; its"
            " rate shows what cutting has won"
        ),
    )


def equal_outputs(ours: nn.Module, theirs: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    "The length of the outputs, and one of them."
    with torch.no_grad():
        mine, other = ours(x), theirs(x)
    return dict(
        outputs=(mine.norm().item(), other.norm().item()),
        first=(mine[0, 0].item(), other[0, 0].item()),
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def their_cut(model: nn.Module, masks: dict[str, Tensor], example: Tensor) -> nn.Module:
    "torch-pruning's dependency graph cuts a copy where our masks are False."
    library, theirs = peer("torch_pruning"), deepcopy(model)
    graph, modules = (
        library.DependencyGraph().build_dependency(theirs, example_inputs=example),
        dict(theirs.named_modules()),
    )
    for name, kept in masks.items():
        if dropped := (~kept).nonzero().flatten().tolist():
            graph.get_pruning_group(
                modules[name], library.prune_conv_out_channels, idxs=dropped
            ).prune()
    return theirs


def _many(model, x, calls):
    "The picture, so many times"

    def run():
        with torch.inference_mode():
            for _ in range(calls):
                model(x)

    return run
