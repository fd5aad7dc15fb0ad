"""One sound call for each public name of the recipes of few labels, bert_glosses, resnet_simclr,
vit_mae and vit_short, for the laws and the fuzz"""

import torch

from foundation.data.batches import endless
from foundation.data.images import ImageSet
from foundation.data.tasks import Task
from foundation.evaluation.comparison import Comparison
from foundation.evaluation.probes import encode_all
from foundation.models.convnets import ConvNet
from foundation.models.vit import ViT
from foundation.pretraining.masked_image import MaskedAutoencoder
from foundation.recipes import bert_glosses, few_labels, vit_mae

TEXTS = ["a cat sat", "the dog ran", "an owl", "the cat ran"] * 4


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=luck(seed))


def net():
    torch.manual_seed(0)
    return ConvNet(widths=(4,), classes=2)


def pictures(n=64):
    x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=luck())
    y = torch.arange(n) % 2
    return ImageSet(x, y, x, y, ("a", "b"), "noise", "here", 0.5, 0.25)


def task():
    parts = torch.arange(16).split([8, 4, 4])
    return Task(randn(16, 1, 8, 8), torch.arange(16) % 2, ("a", "b"), *parts, tuple(TEXTS))


def read(index):
    return randn(16, 4)[index]


def batches(x, y, seed):
    return endless(x, y, batch_size=4, seed=seed)


def setting(labels, seed, setting, part):
    return setting


def painter():
    torch.manual_seed(0)
    encoder = ViT(image_size=8, patch_size=4, dim=8, depth=1, heads=2)
    return MaskedAutoencoder(encoder, dim=8, depth=1, heads=2)


def keep(b=2, n=4, m=2):
    return torch.rand(b, n, generator=luck()).argsort(1)[:, :m]


EXAMPLES = {
    "recipes.few_labels.train_all": lambda: (
        few_labels.train_all,
        dict(
            model=net(),
            batches=[(randn(4, 1, 8, 8), torch.arange(4) % 2)] * 2,
            steps=2,
            lr=1e-3,
        ),
    ),
    "recipes.few_labels.probe_arm": lambda: (
        few_labels.probe_arm,
        dict(task=task(), read=read),
    ),
    "recipes.few_labels.training_arm": lambda: (
        few_labels.training_arm,
        dict(
            task=task(),
            make=lambda x, y: net(),
            batches=batches,
            steps=lambda labels: 1,
            batch_size=4,
        ),
    ),
    "recipes.few_labels.label_studies": lambda: (
        few_labels.label_studies,
        dict(arms={"a": setting}, choices={"a": (0.1, 0.3)}, counts=[5], seeds=[0, 1]),
    ),
    "recipes.few_labels.label_efficiency": lambda: (
        few_labels.label_efficiency,
        dict(
            encoder=net(),
            fresh=net,
            data=pictures(),
            counts=[6],
            seeds=[0],
            steps=1,
            choices={"pixels, probe": (1.0,)},
        ),
    ),
    "recipes.few_labels.probe_features": lambda: (
        few_labels.probe_features,
        dict(encoder=net(), data=pictures(), labels=6, seeds=1, bank=30, encode=encode_all),
    ),
    "recipes.few_labels.curve_scores": lambda: (
        few_labels.curve_scores,
        dict(curve={5: Comparison.from_scores({"a": [0.5, 0.6]})}),
    ),
    "recipes.bert_glosses.count_words": lambda: (bert_glosses.count_words, dict(task=task())),
    "recipes.bert_glosses.counting_arm": lambda: (
        bert_glosses.counting_arm,
        dict(counts=bert_glosses.count_words(task()), task=task()),
    ),
    "recipes.vit_mae.crops": lambda: (vit_mae.crops, dict(data=pictures())),
    "recipes.vit_mae.naive_fill": lambda: (
        vit_mae.naive_fill,
        dict(patches=randn(2, 4, 3), keep=keep(), nearest=True),
    ),
    "recipes.vit_mae.paint": lambda: (
        vit_mae.paint,
        dict(model=painter(), images=randn(2, 1, 8, 8), keep=keep(), normalise=True),
    ),
    "recipes.vit_mae.reconstruction": lambda: (
        vit_mae.reconstruction,
        dict(model=painter(), images=randn(2, 1, 8, 8), ratio=0.5, seed=0),
    ),
}
SKIP = {
    "recipes.few_labels.Arm": "a type",
    "recipes.few_labels.CHOICES": "a constant",
    "recipes.few_labels.card_metrics": "trains five arms twice, which takes seconds",
    "recipes.bert_glosses.FILES": "a constant",
    "recipes.bert_glosses.CHOICES": "a constant",
    "recipes.bert_glosses.PICKED_ON": "a constant",
    "recipes.bert_glosses.gloss_corpus": "needs WordNet, from the network",
    "recipes.bert_glosses.definition_task": "needs WordNet, from the network",
    "recipes.bert_glosses.compare_features": "needs MiniLM, from the network, trains for minutes",
    "recipes.bert_glosses.make": "trains for an hour",
    "recipes.resnet_simclr.FILES": "a constant",
    "recipes.resnet_simclr.STAGES": "a constant",
    "recipes.resnet_simclr.make": "trains for hours",
    "recipes.vit_mae.FILES": "a constant",
    "recipes.vit_mae.image_card": "takes a finished run",
    "recipes.vit_mae.compare_ratios": "trains a net for each ratio and seed",
    "recipes.vit_mae.make": "trains for an hour",
    "recipes.vit_short.FILES": "a constant",
    "recipes.vit_short.make": "trains for minutes",
}
