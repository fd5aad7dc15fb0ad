"One sound call for each public name of distillation, pruning, channels and transformers"

import torch
from torch import nn

from foundation.compression import channel_groups as g
from foundation.compression import channels as c
from foundation.compression import distillation as d
from foundation.compression import pruning as p
from foundation.compression import tracing
from foundation.compression import transformers as t
from foundation.compression import weights as w
from foundation.data.augment import Augment
from foundation.data.images import ImageSet
from foundation.models.bert import BERT
from foundation.models.convnets import VGG, ConvNet
from foundation.models.vit import ViT


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *args, **sizes):
    torch.manual_seed(0)
    return kind(*args, **sizes)


def encoder():
    return made(BERT, vocab_size=20, context=8, dim=8, depth=2, heads=2)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def tiny():
    return made(ConvNet, widths=(4,))


def vgg():
    return made(VGG, widths=(4, 6), depths=(1, 1)).eval()


def vit():
    return made(ViT, image_size=8, patch_size=4, dim=8, depth=1, heads=2).eval()


def pictures():
    images, labels = whole(256, 32, 1, 8, 8).to(torch.uint8), torch.arange(32) % 10
    return ImageSet(images, labels, images, labels, tuple("abcdefghij"), "noise", "here", 0.5, 0.3)


def judge(objective, model, batch):
    return objective(model, batch)[0]


PLAIN = Augment((1, 1), aspect=1, contrast=0, brightness=0)
EXAMPLES = {
    "compression.distillation.match_teacher": lambda: (
        lambda teacher, temperature, hard, inputs: judge(
            d.match_teacher(teacher, temperature, hard), tiny(), (inputs, whole(10, 3))
        ),
        dict(teacher=tiny(), temperature=2.0, hard=0.3, inputs=draw(3, 1, 8, 8)),
    ),
    "compression.distillation.match_logits": lambda: (
        lambda temperature, hard, logits, labels: judge(
            d.match_logits(temperature, hard), linear(), (draw(3, 8), logits, labels)
        ),
        dict(temperature=2.0, hard=0.3, logits=draw(3, 4), labels=whole(4, 3)),
    ),
    "compression.distillation.distil": lambda: (
        lambda **given: d.distil(**given).losses,
        dict(
            student=tiny(),
            images=pictures().train_images,
            logits=draw(32, 10),
            augment=PLAIN,
            steps=1,
            lr=1e-3,
            temperature=2.0,
            labels=pictures().train_labels,
            hard=0.3,
            batch_size=8,
            seed=0,
            title="",
            each=None,
        ),
    ),
    "compression.distillation.tap": lambda: (
        d.tap,
        dict(model=linear(), layer="0", inputs=draw(3, 8)),
    ),
    "compression.distillation.Hinted": lambda: (
        d.Hinted,
        dict(student=linear(), layer="0", regressor=nn.Identity()),
    ),
    "compression.distillation.match_hints": lambda: (
        lambda teacher, layer, inputs: judge(
            d.match_hints(teacher, layer), d.Hinted(tiny(), "body.0", nn.Identity()), inputs
        ),
        dict(teacher=tiny(), layer="body.0", inputs=draw(3, 1, 8, 8)),
    ),
    "compression.weights.layer_weights": lambda: (
        w.layer_weights,
        dict(model=linear(), skip=("2",)),
    ),
    "compression.pruning.keep_largest": lambda: (
        p.keep_largest,
        dict(scores=draw(3, 4).abs(), sparsity=0.5),
    ),
    "compression.pruning.magnitude_masks": lambda: (
        p.magnitude_masks,
        dict(model=linear(), sparsity=0.5, scope="layer", skip=("2",)),
    ),
    "compression.pruning.apply_masks": lambda: (
        p.apply_masks,
        dict(model=linear(), masks={"0.weight": draw(8, 8) > 0}),
    ),
    "compression.pruning.sparsity": lambda: (p.sparsity, dict(model=linear(), skip=("2",))),
    "compression.pruning.cubic_sparsity": lambda: (
        p.cubic_sparsity,
        dict(step=3, begin=0, end=10, final=0.9, initial=0.1),
    ),
    "compression.pruning.Pruner": lambda: (
        p.Pruner,
        dict(
            model=linear(),
            final=0.9,
            begin=0,
            end=10,
            every=2,
            initial=0.1,
            scope="global",
            skip=(),
        ),
    ),
    "compression.pruning.Pruner.update": lambda: (
        p.Pruner(linear(), 0.5, 0, 10).update,
        dict(step=20),
    ),
    "compression.pruning.two_four_masks": lambda: (
        p.two_four_masks,
        dict(model=linear(), skip=("2",)),
    ),
    "compression.channel_groups.ChannelGroup": lambda: (
        g.ChannelGroup,
        dict(size=4, writers=["a"], norms=[], readers=["b"], fixed=False),
    ),
    "compression.tracing.traced_steps": lambda: (
        lambda model: [step.name for step in tracing.traced_steps(model)],
        dict(model=vgg()),
    ),
    "compression.channel_groups.channel_groups": lambda: (g.channel_groups, dict(model=vgg())),
    "compression.channels.channel_masks": lambda: (
        c.channel_masks,
        dict(model=vgg(), sparsity=0.5, multiple=2),
    ),
    "compression.channels.mask_channels": lambda: (
        c.mask_channels,
        dict(model=vgg(), masks={"body.0.0": torch.tensor([True, False] * 2)}),
    ),
    "compression.channels.remove_channels": lambda: (
        c.remove_channels,
        dict(model=vgg(), masks={"body.0.0": torch.tensor([True, False] * 2)}),
    ),
    "compression.channels.cut_like": lambda: (
        c.cut_like,
        dict(model=vgg(), state=vgg().state_dict()),
    ),
    "compression.transformers.head_masks": lambda: (t.head_masks, dict(model=vit(), sparsity=0.5)),
    "compression.transformers.remove_heads": lambda: (
        t.remove_heads,
        dict(model=vit(), masks={"blocks.0.attention": torch.tensor([True, False])}),
    ),
    "compression.transformers.unit_masks": lambda: (
        t.unit_masks,
        dict(model=vit(), sparsity=0.5, multiple=2),
    ),
    "compression.transformers.remove_units": lambda: (
        t.remove_units,
        dict(model=vit(), masks={"blocks.0.mlp.0": torch.arange(32) % 2 == 0}),
    ),
    "compression.transformers.keep_layers": lambda: (
        t.keep_layers,
        dict(model=encoder(), layers=[0]),
    ),
    "compression.weights.find_weights": lambda: (
        lambda model, skip: list(w.find_weights(model, skip)[0].values()),
        dict(model=linear(), skip=("2",)),
    ),
    "compression.weights.check_weights": lambda: (
        w.check_weights,
        dict(weights={"a": draw(3, 4)}),
    ),
    "compression.weights.power_below": lambda: (w.power_below, dict(x=draw(3, 4))),
    "compression.pruning.lamp_masks": lambda: (
        p.lamp_masks,
        dict(model=linear(), sparsity=0.5, skip=("2",)),
    ),
    "compression.channel_groups.follow_channels": lambda: (
        lambda model: list(g.follow_channels(model)[0]),
        dict(model=vgg()),
    ),
    "compression.channel_groups.memory_owners": lambda: (
        lambda model: sorted(g.memory_owners(model).values()),
        dict(model=linear()),
    ),
    "compression.channel_groups.is_shared": lambda: (
        g.is_shared,
        dict(layer=linear()[0], owners=g.memory_owners(linear())),
    ),
    "compression.channels.rounded_share": lambda: (
        c.rounded_share,
        dict(share=0.5, size=12, multiple=4),
    ),
    "compression.channels.cut_layer": lambda: (
        c.cut_layer,
        dict(layer=nn.Linear(4, 3), kept=torch.tensor([True, False, True, True]), dim=1),
    ),
}
SKIP = {
    "compression.pruning.to_two_four": "needs an NVIDIA GPU",
}
