"Optimizers and their groups: what learns has exactly one rate, whatever is tied or frozen"

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.models.convnets import ConvNet, ResNet
from foundation.models.vit import ViT
from foundation.training import parameter_groups
from foundation.training.parameter_groups import (
    adamw,
    head_groups,
    layer_groups,
    layers,
    make_optimizer,
)


class Tied(nn.Module):
    "A head that shares its weight with the embedding, and a norm between"

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.norm(self.words(x)))


class Loose(nn.Module):
    "Parameters of its own, beside a row of layers that has some too"

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3))
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.body.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(3, 2)


def models():
    small = dict(channels=1, widths=(8, 8), classes=3)
    vit = dict(image_size=8, patch_size=4, channels=1, dim=8, depth=2, heads=2, classes=3)
    return [ResNet(**small, depths=(1, 1)), ConvNet(**small), ViT(**vit), Tied(), Loose()]


def ids(groups):
    return [id(p) for group in groups for p in group["params"]]


every_model = pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)


@every_model
@pytest.mark.parametrize("make", [head_groups, layer_groups])
def test_every_parameter_has_exactly_one_rate(model, make):
    groups = make(model, 1e-3)
    assert sorted(ids(groups)) == sorted(id(p) for p in model.parameters())
    torch.optim.AdamW(groups)  # refuses a parameter that stands twice


@every_model
def test_body_then_head_in_the_order_of_the_model(model):
    groups = head_groups(model, 1e-3, 0.5)
    order = {id(p): i for i, p in enumerate(model.parameters())}
    assert [group["lr"] for group in groups] == [1e-3, 0.5]
    for group in groups:
        places = [order[id(p)] for p in group["params"]]
        assert places == sorted(places)
    assert {*map(id, groups[1]["params"])} == {*map(id, model.head.parameters())}


@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_what_is_frozen_is_in_no_group(seed, share):
    rng = torch.Generator().manual_seed(seed)
    for model in models():
        for p in model.parameters():
            p.requires_grad_(torch.rand((), generator=rng).item() < share)
        learns = sorted(id(p) for p in model.parameters() if p.requires_grad)
        if not learns:
            continue
        groups = head_groups(model, 1e-3)
        assert sorted(ids(groups)) == learns and all(group["params"] for group in groups)
        assert sorted(ids(adamw(model, 1e-3).param_groups)) == learns


def test_a_frozen_body_leaves_the_head_and_the_other_way_round():
    model = Loose()
    for part, rate in ((model.body, 1e-3), (model.head, 1e-2)):
        other = copy.deepcopy(model).requires_grad_(False)
        getattr(other, "body" if part is model.body else "head").requires_grad_(True)
        assert [group["lr"] for group in head_groups(other, 1e-3)] == [rate]
    with pytest.raises(ValueError, match="every parameter is frozen"):
        head_groups(model.requires_grad_(False), 1e-3)


def test_the_head_is_fast_and_the_stem_slow():
    model = Loose()
    groups = {group["name"]: group for group in layer_groups(model, 1.0, 0.1, 7.0)}
    rates = {name: round(group["lr"], 9) for name, group in groups.items()}
    assert rates == {"head": 7.0, "body": 1.0, "body.1": 0.1, "body.0": 0.01}
    assert any(p is model.position for p in groups["body.0"]["params"])  # enters with the input
    assert groups["body"]["params"] == [model.body.scale]  # what the row has of its own


def test_rates_in_the_wrong_order_are_caught(monkeypatch):
    model, right = (
        ResNet(channels=1, widths=(8, 8), classes=3, depths=(1, 1)),
        parameter_groups.layers,
    )
    *body, head = right(model).items()
    monkeypatch.setattr(parameter_groups, "layers", lambda model: dict([*reversed(body), head]))
    rates = {group["name"]: group["lr"] for group in layer_groups(model, 1.0, 0.1)}
    assert rates["body.0"] == 1.0  # and the sound one gives it the slowest
    monkeypatch.undo()
    rates = {group["name"]: group["lr"] for group in layer_groups(model, 1.0, 0.1)}
    assert rates["body.0"] == min(rates.values())


def test_no_head_rate_is_the_rate_that_decay_would_give():
    rates = [group["lr"] for group in layer_groups(Loose(), 1e-2, 0.5)]
    assert rates == [1e-2 / 0.5, 1e-2, 1e-2 * 0.5, 1e-2 * 0.25]
    assert [group["lr"] for group in head_groups(Loose(), 3e-4)] == [3e-4, 10 * 3e-4]


def test_matrices_decay_and_biases_and_norms_do_not():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decays, free = adamw(model, 1e-3, 0.3).param_groups
    assert decays["weight_decay"] == 0.3 and free["weight_decay"] == 0.0
    assert ids([decays]) == [id(model[0].weight), id(model[3].weight)] and len(free["params"]) == 4


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_each_optimizer_moves_body_and_head_and_not_what_is_frozen(name):
    torch.manual_seed(0)
    model = Loose()
    model.body[0].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = make_optimizer(name, head_groups(model, 1e-3), weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    opt.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if not n.startswith("body.0")}
    assert all(group["weight_decay"] == 0.1 for group in opt.param_groups)


def test_the_fast_versions_are_used_and_momentum_is_on():
    sgd, adam = (make_optimizer(name, head_groups(Loose(), 1e-3)) for name in ("sgd", "adamw"))
    assert sgd.defaults["momentum"] == 0.9 and sgd.defaults["fused"] and adam.defaults["fused"]
    assert make_optimizer("sgd", Loose().parameters(), lr=0.1, momentum=0).defaults["momentum"] == 0


REFUSALS = {
    "lr is 0.0; expected a finite number above 0": lambda: head_groups(Loose(), 0),
    "lr is nan": lambda: head_groups(Loose(), float("nan")),
    "head_lr is -1.0; expected": lambda: head_groups(Loose(), 1e-3, -1),
    "Linear has no linear `head`": lambda: head_groups(nn.Linear(2, 2), 1e-3),
    "lr is inf": lambda: layer_groups(Loose(), float("inf")),
    "decay is 1.5": lambda: layer_groups(Loose(), 1e-3, 1.5),
    "head_lr is 0": lambda: layer_groups(Loose(), 1e-3, 0.5, 0),
    "expected a body and a head": lambda: layers(nn.Sequential(nn.Linear(2, 2))),
    "the optimizer's name is 'adam'; expected one of 'sgd'": lambda: make_optimizer("adam", []),
    "model is 3; expected a network": lambda: layers(3),
    "lr is -1.0; expected": lambda: adamw(Loose(), -1),
    "weight_decay is -0.1": lambda: adamw(Loose(), 1e-3, -0.1),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_bad_input_gets_one_sentence(words):
    with pytest.raises((ValueError, TypeError)) as error:
        REFUSALS[words]()
    assert words in str(error.value) and "\n" not in str(error.value)
