"""One sound call for each public name of foundation.finetuning;
the laws and the fuzz start from them"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from foundation.data.augment import Augment
from foundation.data import own
from foundation.data.images import ImageDataset, ImageSet
from foundation.data.tasks import Task
from foundation.finetuning import adapters, epochs, loop, lora, multi_lora, rate_search, search
from foundation.finetuning import targets
from foundation.layers.attention import Attention
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.gpt import GPT
from foundation.models.heads import TextClassifier
from foundation.recipes import resnet_fashion
from foundation.training.loop import classify


def luck():
    return torch.Generator().manual_seed(0)


def pixels(n=6, side=8):
    return torch.randint(256, (n, 1, side, side), dtype=torch.uint8, generator=luck())


def floats(n=6):
    return torch.randn(n, 1, 8, 8, generator=luck())


def labels(n=6):
    return torch.arange(n) % 3


def net():
    torch.manual_seed(0)
    return ConvNet(classes=3, widths=(4,)).eval()


def bert():
    torch.manual_seed(0)
    return BERT(20, 8, 8, 1, 2).eval()


def adapted():
    model = lora.add_lora(bert(), 2)
    for layer in model.modules():
        if isinstance(layer, lora.LoRA):
            nn.init.normal_(layer.B, std=0.1, generator=luck())
    return model


def tokens(n=6):
    return torch.randint(1, 20, (n, 5), generator=luck())


def picture():
    from PIL import Image

    path = Path(tempfile.mkdtemp()) / "x.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def images(k=3):
    rows = torch.arange(30) % k
    return ImageSet(
        pixels(30, 16),
        rows,
        pixels(6, 16),
        rows[:6],
        tuple("abcdefghij"[:k]),
        "toy",
        "here",
        0.5,
        0.3,
    )


def task():
    return Task(floats(9), labels(9), tuple("abc"), *torch.arange(9).split(3))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def dataset():
    return ImageDataset(floats(), labels())


def entered(context, **options):
    "A context manager as a call: its value, after the block has begun and ended"
    with context(**options) as value:
        return value


def restored():
    model = net()
    return partial(entered, rate_search.restored), dict(model=model, opt=sgd(model))


def epoch(batch_size):
    model = net()
    return epochs.train_epoch, dict(
        model=model, dataset=dataset(), batch_size=batch_size, optimizer=sgd(model)
    )


def scores_on_the_way():
    model = net()
    return rate_search.dev_scores, dict(
        model=model,
        task=task(),
        opt=sgd(model),
        steps=2,
        every=1,
        batch_size=3,
        seed=0,
        precision="fp32",
    )


def ranging():
    model = net()
    return rate_search.range_test, dict(
        model=model,
        batches=[(floats(), labels())] * 25,
        objective=classify,
        opt=sgd(model),
        lo=1e-5,
        hi=0.1,
        steps=20,
    )


def falling(n=20):
    return torch.linspace(2, 1, n)


def swept():
    return rate_search.sweep(lambda lr, seed: 1 - lr + seed / 100, [0.1, 0.2, 0.3], range(2))


def lora_then(do, *before):
    model = adapted()
    for first in before:
        first(model)
    return do, dict(model=model)


def class_folder():
    "Two classes, each of one picture"
    home = picture().parent
    for name in ("a", "b"):
        (home / name).mkdir(exist_ok=True)
        (home / name / "x.png").write_bytes(picture().read_bytes())
    return home


EXAMPLES = {
    "data.own.read_image": lambda: (own.read_image, dict(path=picture(), channels=3)),
    "data.own.list_images": lambda: (own.list_images, dict(folder=class_folder())),
    "data.own.damaged_images": lambda: (own.damaged_images, dict(folder=class_folder())),
    "data.own.ImageFiles": lambda: (
        own.ImageFiles,
        dict(folder=class_folder(), size=8, channels=3, classes=["a", "b"]),
    ),
    "data.own.split_by_class": lambda: (
        own.split_by_class,
        dict(
            labels=torch.arange(12) % 2,
            groups=torch.arange(12),
            share=0.3,
            seed=1,
            classes=["a", "b"],
        ),
    ),
    "data.own.fit_image": lambda: (
        own.fit_image,
        dict(image=torch.zeros(3, 5, 4, dtype=torch.uint8), size=(2, 3)),
    ),
    "data.own.image_set": lambda: (
        own.image_set,
        dict(source=pixels(), labels=labels(), size=8, channels=1, test=0.3, seed=1),
    ),
    "data.own.number_labels": lambda: (
        own.number_labels,
        dict(names=["b", "a", "b"], classes=["a", "b"]),
    ),
    "data.own.check_classes": lambda: (own.check_classes, dict(labels=labels(), classes=3)),
    "data.own.check_disjoint": lambda: (
        own.check_disjoint,
        dict(train=pixels()[:3], dev=pixels()[3:]),
    ),
    "finetuning.epochs.train_epoch": lambda: epoch(2),
    "finetuning.epochs.evaluate": lambda: (
        epochs.evaluate,
        dict(model=net(), dataset=dataset(), batch_size=4),
    ),
    "finetuning.loop.thaw": lambda: (loop.thaw, dict(model=net(), count=1)),
    "finetuning.loop.thawed": lambda: (loop.thawed, dict(n=3, steps=10, count=4)),
    "finetuning.loop.frozen_norms": lambda: (
        partial(entered, loop.frozen_norms),
        dict(model=net(), every=True),
    ),
    "finetuning.loop.finetune": lambda: (
        loop.finetune,
        dict(
            model=net(),
            images=pixels(),
            labels=labels(),
            augment=Augment(),
            steps=1,
            lr=2**-10,
            head_lr=2**-7,
            decay=0.9,
            gradual=False,
            batch_size=4,
            weight_decay=0.05,
            smoothing=0.1,
            seed=0,
        ),
    ),
    "recipes.resnet_fashion.run_arm": lambda: (
        resnet_fashion.run_arm,
        dict(
            arm="from scratch",
            data=images(),
            index=torch.arange(6),
            rate=2**-20,
            steps=1,
            batch_size=4,
            seed=0,
        ),
    ),
    "recipes.resnet_fashion.tune_all": lambda: (
        lambda **options: resnet_fashion.tune_all(**options)[:2],
        dict(data=images(10), pretrained=False, steps=1, lr=2**-20, seed=0),
    ),
    "finetuning.rate_search.dev_scores": scores_on_the_way,
    "finetuning.rate_search.restored": restored,
    "finetuning.rate_search.RangeTest": lambda: (
        rate_search.RangeTest,
        dict(rates=torch.logspace(-5, -1, 20), losses=falling()),
    ),
    "finetuning.rate_search.RangeTest.suggest": lambda: (
        rate_search.RangeTest(torch.logspace(-5, -1, 20), falling()).suggest,
        dict(rule="steepest"),
    ),
    "finetuning.rate_search.range_test": ranging,
    "finetuning.rate_search.Sweep": lambda: (
        rate_search.Sweep,
        dict(rates=torch.tensor([0.1, 0.2]), comparison=swept().comparison),
    ),
    "finetuning.rate_search.sweep": lambda: (
        rate_search.sweep,
        dict(
            run=lambda lr, seed: 1 - lr + seed / 100, rates=[0.1, 0.2], seeds=[0, 1], diverged=0.0
        ),
    ),
    "finetuning.search.Trial": lambda: (
        search.Trial,
        dict(params=dict(lr=0.1), scores=(0.5,), pruned=False),
    ),
    "finetuning.search.best_trial": lambda: (
        search.best_trial,
        dict(trials=[search.Trial(dict(lr=0.1), (0.5,), False)]),
    ),
    "finetuning.search.search": lambda: (
        search.search,
        dict(
            run=lambda lr: [lr / 2, lr],
            space=dict(lr=(0.01, 0.1)),
            path=Path(tempfile.mkdtemp()) / "journal",
            trials=2,
            startup=1,
            seed=0,
            recipe=dict(data="x"),
        ),
    ),
    "finetuning.lora.LoRA": lambda: (
        lora.LoRA,
        dict(base=nn.Linear(4, 3), rank=2, alpha=4.0),
    ),
    "finetuning.lora.LoRA.merge": lambda: (
        lora_then(lora.LoRA.merge)[1]["model"].blocks[0].mlp[0].merge,
        {},
    ),
    "finetuning.targets.find_layers": lambda: (
        targets.find_layers,
        dict(model=bert(), targets=["attention.query"]),
    ),
    "finetuning.lora.add_lora": lambda: (
        lora.add_lora,
        dict(model=bert(), rank=2, alpha=4.0, targets=["mlp.0"]),
    ),
    "finetuning.lora.merge": lambda: lora_then(lora.merge),
    "finetuning.lora.unload": lambda: lora_then(lora.unload),
    "finetuning.lora.unmerge": lambda: lora_then(lora.unmerge, lora.merge),
    "finetuning.adapters.Adapter": lambda: (adapters.Adapter, dict(base=nn.Linear(4, 3), width=2)),
    "finetuning.adapters.add_adapters": lambda: (
        adapters.add_adapters,
        dict(model=bert(), width=2, targets=["mlp.3"]),
    ),
    "finetuning.adapters.Prefix": lambda: (
        adapters.Prefix,
        dict(base=Attention(4, 2), keys=torch.ones(3, 4), values=torch.zeros(3, 4)),
    ),
    "finetuning.adapters.add_prefix": lambda: (
        adapters.add_prefix,
        dict(model=bert(), length=3, words=torch.tensor([1, 2, 3])),
    ),
    "finetuning.adapters.train_biases": lambda: (
        adapters.train_biases,
        dict(model=GPT(20, 8, 8, 1, 2)),
    ),
    "finetuning.lora.kind_beside": lambda: (lora.kind_beside, dict(base=nn.Linear(4, 3))),
    "finetuning.targets.swap_layers": lambda: (
        targets.swap_layers,
        dict(model=bert(), targets=["mlp.0"], make=lambda name, layer: lora.LoRA(layer)),
    ),
    "finetuning.targets.by_layer": lambda: (
        targets.by_layer,
        dict(names=["a.b", "a.c"], value={"b": 2, ".*": 4}, what="rank"),
    ),
    "finetuning.targets.kind_of": lambda: (targets.kind_of, dict(layer=nn.Linear(4, 3))),
    "finetuning.targets.sides": lambda: (targets.sides, dict(layer=nn.Conv2d(4, 3, 2))),
    "finetuning.targets.as_weight": lambda: (
        targets.as_weight,
        dict(layer=nn.Embedding(4, 3), matrix=torch.ones(3, 4)),
    ),
    "finetuning.multi_lora.MultiLoRA": lambda: (multi_lora.MultiLoRA, dict(model=bert())),
    "finetuning.multi_lora.MultiLoRA.add": lambda: (
        multi_lora.MultiLoRA(bert()).add,
        dict(name="one", rank=2, targets=["mlp.0"]),
    ),
    "finetuning.lora.adapt": lambda: (
        lora.adapt,
        dict(
            model=TextClassifier(adapted(), 3),
            tokens=tokens(),
            labels=labels(),
            steps=1,
            lr=2**-10,
            head_lr=2**-7,
            batch_size=3,
            seed=0,
            precision="fp32",
        ),
    ),
}
SKIP = {
    "recipes.resnet_fashion.ARMS": "a constant",
    "recipes.resnet_fashion.RATES": "a constant",
    "recipes.resnet_fashion.PHOTO_ARMS": "a constant",
    "recipes.resnet_fashion.compare_arms": "trains many networks, minutes",
    "recipes.resnet_fashion.FILES": "a constant",
    "recipes.resnet_fashion.make": "a recipe, half an hour",
    "recipes.resnet_fashion.tune_photos": "needs EfficientNet's weights from the network",
    "models.outside.load_vgg": "needs 500 MB of torchvision's weights",
    "finetuning.lora.LINEAR": "a constant",
}
