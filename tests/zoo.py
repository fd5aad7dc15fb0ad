"""Small networks of the kinds on which transformations of models go wrong: name -> (model in eval
mode, example input).

Tied and twice-used layers, shared parameters, weights that are computed (weight_norm,
parametrizations, masks of torch.nn.utils.prune), norms that several share, graphs with constants
and broadcasts, half precision, hidden buffers.
"""

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune


def pictures(b=3, c=3, side=8):
    return torch.randn(b, c, side, side, generator=torch.Generator().manual_seed(1))


def rows(b=5, d=4):
    return torch.randn(b, d, generator=torch.Generator().manual_seed(2))


def tokens(b=2, n=6, v=11):
    return torch.randint(1, v, (b, n), generator=torch.Generator().manual_seed(3))


class Tied(nn.Module):
    "A language model whose output layer is its embedding"

    def __init__(self):
        super().__init__()
        self.words, self.mid, self.out = (
            nn.Embedding(11, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 11, bias=False),
        )
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.mid(self.words(x)).relu())


class TwoNames(nn.Module):
    "One layer under two names"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).relu())


class CalledTwice(nn.Module):
    "One layer called twice"

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.a(self.a(x).relu()))


class OneParameter(nn.Module):
    "Two convolutions with one weight between them"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.body[2].weight = self.body[0].weight
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Levels(nn.Module):
    "A shared convolution with a norm for each level, as in heads of detectors"

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 3, 1)
        self.p, self.q = (
            nn.Sequential(conv, nn.BatchNorm2d(3)),
            nn.Sequential(conv, nn.BatchNorm2d(3)),
        )

    def forward(self, x):
        return self.p(x) + self.q(x)


class AlsoBare(nn.Module):
    "A convolution used with its norm and without"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.pair = nn.Sequential(self.conv, nn.BatchNorm2d(3))

    def forward(self, x):
        return self.pair(x) + self.conv(x)


class Hidden(nn.Module):
    "A buffer that the state dict does not hold"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.layer(x) + self.shift


class Net(nn.Module):
    "A body and a linear head behind it"

    def __init__(self, body, width, flat=False):
        super().__init__()
        self.body, self.head, self.flat = body, nn.Linear(width, 5), flat

    def forward(self, x):
        x = self.body(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class Joined(nn.Module):
    "Two convolutions joined by a function, with something added between them"

    def __init__(self, join, width=8):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(width, 8, 3, padding=1),
            nn.Conv2d(3, 8, 1),
        )
        self.free = nn.Parameter(torch.ones(8, 1, 1))
        self.join = join

    def forward(self, x):
        return self.b(self.join(self, self.a(x).relu(), x))


def lively(model):
    "Eval mode, and statistics of batch norms that are not 0 and 1"
    generator = torch.Generator().manual_seed(4)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator))
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.3)
                for part in [p for p in (m.weight, m.bias) if p is not None]:
                    part.copy_(torch.randn(m.num_features, generator=generator))
    return model.eval()


def pruned():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))


def conv_weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))


def old_weight_normed():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))


ZOO = {
    "plain": lambda: (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), rows()),
    "one layer": lambda: (nn.Linear(4, 3), rows()),
    "no layer": lambda: (nn.Sequential(nn.Flatten()), rows()),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        ),
        pictures(),
    ),
    "tied": lambda: (Tied(), tokens()),
    "two names": lambda: (TwoNames(), rows()),
    "called twice": lambda: (CalledTwice(), rows()),
    "one parameter": lambda: (OneParameter(), pictures()),
    "norm for each level": lambda: (Levels(), pictures()),
    "also bare": lambda: (AlsoBare(), pictures()),
    "norm over another axis": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)),
    ),
    "weight norm": lambda: (weight_normed(), rows()),
    "weight norm in a convolution": lambda: (conv_weight_normed(), pictures()),
    "weight norm of old": lambda: (old_weight_normed(), pictures()),
    "spectral norm": lambda: (
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)),
        rows(),
    ),
    "orthogonal": lambda: (
        nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3)),
        rows(),
    ),
    "pruned": lambda: (pruned(), rows()),
    "hidden buffer": lambda: (Hidden(), rows()),
    "attention of PyTorch": lambda: (
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(6)),
    ),
    "bfloat16": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16(),
        rows().bfloat16(),
    ),
    "float64": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(),
        rows().double(),
    ),
    "dropout": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)), rows()),
    "frozen": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False),
        rows(),
    ),
}
BODIES = {
    "plain": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)), 6
    ),
    "head behind a flatten": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 8 * 36, True
    ),
    "plus a number": lambda: Net(Joined(lambda m, a, x: m.b(a + 1.0) * 0 + a + 1.0), 8),
    "torch.add": lambda: Net(Joined(lambda m, a, x: torch.add(a, 0.5)), 8),
    "minus": lambda: Net(Joined(lambda m, a, x: 1 - a), 8),
    "plus a parameter": lambda: Net(Joined(lambda m, a, x: a + m.free), 8),
    "times a parameter": lambda: Net(Joined(lambda m, a, x: a * m.free), 8),
    "plus another layer": lambda: Net(Joined(lambda m, a, x: a + m.c(x)), 8),
    "broadcast": lambda: Net(Joined(lambda m, a, x: a + m.c(x).mean((2, 3), keepdim=True)), 8),
    "joined end to end": lambda: Net(Joined(lambda m, a, x: torch.cat([a, m.c(x)], 1), 16), 8),
    "mean over channels": lambda: Net(Joined(lambda m, a, x: a - a.mean(1, keepdim=True)), 8),
    "softmax over channels": lambda: Net(Joined(lambda m, a, x: a.softmax(1)), 8),
    "flipped": lambda: Net(Joined(lambda m, a, x: a.flip(1)), 8),
    "sigmoid": lambda: Net(Joined(lambda m, a, x: a.sigmoid()), 8),
    "chunked": lambda: Net(Joined(lambda m, a, x: sum(a.chunk(2, 1)), 4), 8),
    "one weight": OneParameter,
    "depthwise": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)), 6
    ),
    "groups": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1)), 6
    ),
    "group norm": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3)), 6
    ),
    "layer under two names": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), *[nn.Conv2d(8, 8, 3, padding=1)] * 2), 8
    ),
    "weight norm": lambda: Net(
        nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 6, 3)
        ),
        6,
    ),
    "transposed": lambda: Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3)), 6),
    "norm without scale": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 6, 3)), 6
    ),
    "pooled": lambda: Net(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Hardswish(), nn.Conv2d(8, 6, 1)), 6
    ),
    "prelu": lambda: Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1)), 6),
}


def animal(name, zoo=ZOO):
    "The model and its input, made the same at each call"
    torch.manual_seed(0)
    model, x = zoo[name]()
    return lively(model), x
