"One sound call for each public name of distillation and pruning, for the laws and the fuzz"

import tempfile
from pathlib import Path

import torch
from torch import nn

from foundation.compression import distillation as d
from foundation.compression import pruning as p
from foundation.data.augment import Augment
from foundation.data.images import ImageSet
from foundation.models.bert import BERT
from foundation.models.convnets import VGG, ConvNet
from foundation.models.pretrained import save_weights
from foundation.models.vit import ViT
from foundation.training.loop import classify


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *args, **sizes):
    torch.manual_seed(0)
    return kind(*args, **sizes)


def encoder():
    return made(BERT, vocab_size=20, context=8, dim=8, depth=2, heads=2)


def texts(count=6):
    tokens = 1 + whole(19, count, 5)
    return tokens.where(torch.arange(5) < 2 + torch.arange(count)[:, None] % 4, 0)


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


def student_folder():
    folder = Path(tempfile.mkdtemp())
    student = d.TextClassifier(d.keep_layers(encoder(), [0]))
    save_weights(d.Stored(student), "small", dict(layers=[0]), folder)
    return folder


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
    "compression.distillation.match_answers": lambda: (
        lambda temperature, hard, answers, labels: judge(
            d.match_answers(temperature, hard), linear(), (draw(3, 8), answers, labels)
        ),
        dict(temperature=2.0, hard=0.3, answers=draw(3, 4), labels=whole(4, 3)),
    ),
    "compression.distillation.distil": lambda: (
        d.distil,
        dict(
            student=tiny(),
            images=pictures().train_images,
            answers=draw(32, 10),
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
    "compression.distillation.keep_layers": lambda: (
        d.keep_layers,
        dict(model=encoder(), layers=[0]),
    ),
    "compression.distillation.TextClassifier": lambda: (
        d.TextClassifier,
        dict(encoder=encoder(), classes=3),
    ),
    "compression.distillation.train_text": lambda: (
        d.train_text,
        (made(d.TextClassifier, encoder()), texts(), whole(2, 6)),
        dict(objective=classify, steps=1, lr=1e-3, batch_size=2, seed=0),
    ),
    "compression.distillation.answer_texts": lambda: (
        d.answer_texts,
        dict(model=made(d.TextClassifier, encoder()), tokens=texts()),
    ),
    "compression.distillation.usual_texts": lambda: (d.usual_texts, dict(tokens=texts(), count=2)),
    "compression.distillation.text_costs": lambda: (
        d.text_costs,
        dict(models=dict(one=made(d.TextClassifier, encoder())), tokens=texts(2), rounds=1),
    ),
    "compression.distillation.Stored": lambda: (
        lambda model, **config: d.Stored(model, **config).state_dict(),
        dict(model=linear()),
    ),
    "compression.distillation.load_student": lambda: (
        d.load_student,
        dict(encoder=encoder(), name="small", folder=student_folder()),
    ),
    "compression.pruning.layer_weights": lambda: (
        p.layer_weights,
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
    "compression.pruning.ChannelGroup": lambda: (
        p.ChannelGroup,
        dict(size=4, writers=["a"], norms=[], readers=["b"], fixed=False),
    ),
    "compression.pruning.channel_groups": lambda: (p.channel_groups, dict(model=vgg())),
    "compression.pruning.channel_masks": lambda: (
        p.channel_masks,
        dict(model=vgg(), sparsity=0.5, multiple=2),
    ),
    "compression.pruning.mask_channels": lambda: (
        p.mask_channels,
        dict(model=vgg(), masks={"body.0.0": torch.tensor([True, False] * 2)}),
    ),
    "compression.pruning.remove_channels": lambda: (
        p.remove_channels,
        dict(model=vgg(), masks={"body.0.0": torch.tensor([True, False] * 2)}),
    ),
    "compression.pruning.slim_vgg": lambda: (p.slim_vgg, dict(teacher=vgg(), widths=(2, 3))),
    "compression.pruning.head_masks": lambda: (p.head_masks, dict(model=vit(), sparsity=0.5)),
    "compression.pruning.remove_heads": lambda: (
        p.remove_heads,
        dict(model=vit(), masks={"blocks.0.attention": torch.tensor([True, False])}),
    ),
    "compression.pruning.recover": lambda: (
        p.recover,
        dict(
            model=tiny(),
            data=pictures(),
            answers=draw(32, 10),
            steps=1,
            lr=1e-3,
            seed=0,
            each=None,
            checkpoint=None,
            title="",
            recipe=None,
        ),
    ),
    "compression.pruning.pruning_arms": lambda: (
        p.pruning_arms,
        dict(teacher=vgg(), steps=4, slim_steps=1),
    ),
}
SKIP = {
    "compression.distillation.LAYERS": "a constant",
    "compression.distillation.RATES": "a constant",
    "compression.distillation.SentimentTask": "a tuple that sentiment_task makes",
    "compression.distillation.sentiment_task": "needs the reviews",
    "compression.distillation.make_weights": "minutes, and MiniLM",
    "compression.pruning.SLIM": "a constant",
    "compression.pruning.to_two_four": "needs an NVIDIA GPU",
    "compression.pruning.compare_pruning": "trains ten networks",
    "compression.pruning.make_pruned": "hours",
    "compression.pruning.make_weights": "minutes, and Fashion-MNIST",
}
