"""One sound call for each public name of convnets, vit, bert and gpt;
the laws and the fuzz start from them"""

import torch

from foundation.models.bert import BERT, mean_tokens
from foundation.models.convnets import (
    VGG,
    Backbone,
    ConvNet,
    EfficientNetLite,
    InvertedBlock,
    ResNet,
)
from foundation.models.gpt import GPT
from foundation.models.heads import Classifier
from foundation.models.vit import ViT


def made(kind, **sizes):
    torch.manual_seed(0)
    return kind(**sizes).eval()


def images(side=8):
    return torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))


def ids():
    return torch.tensor([[0, 4, 2], [1, 1, 3]])


TINY = dict(dim=8, depth=1, heads=2)
VISION = dict(image_size=8, patch_size=4, channels=1, classes=3)
TEXT = dict(vocab_size=5, context=8)
STAGES = ((1, 3, 1, 1, 8), (1, 3, 2, 2, 8))

EXAMPLES = {
    "models.bert.mean_tokens": lambda: (
        mean_tokens,
        dict(x=torch.randn(3, 4, 5), mask=torch.arange(4) < torch.tensor([[4], [2], [0]])),
    ),
    "models.convnets.Backbone": lambda: (
        Backbone,
        dict(body=torch.nn.Conv2d(1, 4, 3), dim=4, config=dict(classes=3, channels=1)),
    ),
    "models.convnets.ResNet": lambda: (
        ResNet,
        dict(classes=3, channels=1, widths=(4, 8), depths=(1, 1)),
    ),
    "models.convnets.ConvNet": lambda: (ConvNet, dict(classes=3, channels=1, widths=(4, 8))),
    "models.convnets.ConvNet.forward": lambda: (
        made(ConvNet, widths=(4,)).forward,
        dict(x=images()),
    ),
    "models.convnets.VGG": lambda: (VGG, dict(classes=3, channels=1, widths=(4, 8), depths=(1, 1))),
    "models.convnets.VGG.encode": lambda: (
        made(VGG, widths=(4,), depths=(1,)).encode,
        dict(x=images()),
    ),
    "models.convnets.InvertedBlock": lambda: (
        InvertedBlock,
        dict(c_in=4, c_out=4, kernel=3, stride=1, ratio=2),
    ),
    "models.convnets.EfficientNetLite": lambda: (
        EfficientNetLite,
        dict(classes=3, channels=1, stages=STAGES),
    ),
    "models.vit.ViT": lambda: (ViT, VISION | TINY | dict(mlp_ratio=2.0, dropout=0.1, pool="mean")),
    "models.vit.ViT.forward": lambda: (made(ViT, **VISION, **TINY).forward, dict(images=images())),
    "models.bert.BERT": lambda: (
        BERT,
        TEXT | TINY | dict(mlp_ratio=2.0, segments=2, dropout=0.1, eps=1e-12),
    ),
    "models.bert.BERT.forward": lambda: (
        made(BERT, **TEXT, **TINY).forward,
        dict(tokens=ids(), mask=ids() < 4, segments=ids().clamp(max=1), positions=ids() > 1),
    ),
    "models.gpt.GPT": lambda: (GPT, TEXT | TINY | dict(mlp_ratio=2.0, dropout=0.1, eps=1e-5)),
    "models.gpt.GPT.forward": lambda: (made(GPT, **TEXT, **TINY).forward, dict(tokens=ids())),
    "models.gpt.GPT.resize_vocab": lambda: (
        made(GPT, **TEXT, **TINY).resize_vocab,
        dict(vocab_size=20),
    ),
    "models.heads.Classifier": lambda: (
        Classifier,
        dict(encoder=made(ConvNet, widths=(4,)), classes=3, zero=True),
    ),
    "models.gpt.GPT.generate": lambda: (
        made(GPT, **TEXT, **TINY).generate,
        dict(tokens=ids(), count=3, temperature=0.5, seed=1),
    ),
}
SKIP = {
    "layers.convolution.SameConv": "its constructor is that of PyTorch's convolution",
    "models.outside.without_last": "takes any network that ends in a linear layer",
    "models.outside.as_encoder": "runs the network that it is handed on what it is handed",
}
