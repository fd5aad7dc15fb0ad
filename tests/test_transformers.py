"""Transformers with fewer layers: the identity, the order, what is shared and what is frozen"""

from copy import deepcopy

import pytest
import torch
from torch import nn

from foundation.compression.transformers import keep_layers
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.gpt import GPT
from foundation.models.heads import TextClassifier
from foundation.models.vit import ViT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder(depth=4, **sizes):
    return BERT(**dict(vocab_size=4096, context=64, dim=16, depth=depth, heads=2) | sizes).eval()


# Dropped layers -----------------------------------------------------------------------------------

STACKS = {
    "bert": (lambda: encoder(), lambda: torch.randint(1, 4096, (2, 7))),
    "gpt": (
        lambda: GPT(50, context=16, dim=16, depth=4, heads=2),
        lambda: torch.randint(50, (2, 7)),
    ),
    "vit": (lambda: ViT(dim=16, depth=4, heads=2), lambda: torch.randn(2, 1, 28, 28)),
}


@pytest.mark.parametrize("name", STACKS)
def test_dropping_none_is_the_identity_and_the_original_stays(name):
    model, x = STACKS[name][0]().eval(), STACKS[name][1]()
    before, want = deepcopy(model.state_dict()), model(x)
    assert torch.equal(keep_layers(model, range(4))(x), want)
    small = keep_layers(model, (0, 2))
    assert (
        not torch.equal(small(x), want)
        and len(small.blocks) == 2
        and len(model.blocks) == 4
        and model.config["depth"] == 4
    )
    small.blocks[1].requires_grad_(True)
    for p in small.parameters():
        p.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), (
        "the copy shares nothing"
    )


def test_what_is_kept_is_kept():
    model = encoder()
    small = keep_layers(model, (1, 3))
    for mine, theirs in zip(small.blocks, (model.blocks[1], model.blocks[3])):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
    rebuilt = BERT(**small.config)
    rebuilt.load_state_dict(small.state_dict())
    x = torch.randint(1, 4096, (2, 7))
    assert torch.equal(rebuilt.eval()(x), small(x))
    around = keep_layers(TextClassifier(model, 2), (1, 3))
    assert len(around.encoder.blocks) == 2 and torch.equal(
        around.encoder.blocks[0].mlp[0].weight, model.blocks[1].mlp[0].weight
    )


@pytest.mark.parametrize("layers", [(), (4,), (-1, 0), (1, 0), (0, 0), (0, 1, 2, 3, 4)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="0 to 3"):
        keep_layers(encoder(), layers)


@pytest.mark.parametrize("model", [ConvNet(), nn.ModuleList([encoder(), encoder()])])
def test_models_without_one_stack_are_refused(model):
    with pytest.raises(TypeError, match="lists of blocks"):
        keep_layers(model, (0,))


def test_blocks_that_share_stay_shared():
    model = encoder()
    model.blocks[2].mlp[0].weight = model.blocks[1].mlp[0].weight
    model.blocks[3] = model.blocks[0]
    small = keep_layers(model, (0, 1, 2, 3))
    x = torch.randint(1, 4096, (2, 7))
    assert (
        small.blocks[3] is small.blocks[0]
        and small.blocks[2].mlp[0].weight is small.blocks[1].mlp[0].weight
    )
    assert torch.equal(small(x), model(x))
    around = nn.Module()
    around.model, around.blocks = model, model.blocks  # the same list under two names
    fewer = keep_layers(around, (0, 2))
    assert (
        fewer.blocks is fewer.model.blocks
        and len(fewer.blocks) == 2
        and fewer.model.config["depth"] == 2
    )


def test_a_copy_keeps_modes_and_what_is_frozen():
    model = encoder().eval()
    model.blocks[1].requires_grad_(False)
    model.blocks[2].train()
    small = keep_layers(model, (1, 2))
    assert not any(p.requires_grad for p in small.blocks[0].parameters()) and all(
        p.requires_grad for p in small.blocks[1].parameters()
    )
    assert [small.training, small.blocks[0].training, small.blocks[1].training] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "call", [lambda: keep_layers(encoder(), [0.5]), lambda: keep_layers(None, [0])]
)
def test_arguments_of_the_wrong_kind_get_a_sentence(call):
    with pytest.raises((TypeError, ValueError), match="; expected|found 0 lists"):
        call()
