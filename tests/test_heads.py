"Heads: what a new one changes, and what padding must not"

from copy import deepcopy

import pytest
import torch
from torch import nn

from foundation.models.bert import BERT
from foundation.models.heads import TextClassifier, replace_head, without_head
from foundation.models.vit import ViT


def bert():
    torch.manual_seed(0)
    return BERT(50, context=16, dim=16, depth=2, heads=2)


def test_padding_of_any_value_and_amount_does_not_change_what_is_said():
    tokens = torch.randint(1, 49, (6, 7))
    tokens[2, 3:] = 49
    model = TextClassifier(bert(), 3, padding=49).eval()
    want = torch.cat([model(row[row != 49][None]) for row in tokens])
    for more in (0, 1, 9):
        torch.testing.assert_close(
            model(nn.functional.pad(tokens, (0, more), value=49)), want, rtol=1e-4, atol=1e-5
        )
    assert (model.encode(torch.full((2, 5), 49)) == 0).all()


def test_the_classifier_trains_the_encoder_it_was_given():
    encoder = bert()
    model = TextClassifier(encoder, 3)
    assert model.encoder is encoder
    model(torch.randint(1, 50, (4, 6))).logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in encoder.blocks.parameters())


def test_a_head_of_zeros_says_nothing_at_first_and_draws_as_many_random_numbers():
    torch.manual_seed(3)
    model = TextClassifier(bert(), 4, zero=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    TextClassifier(bert(), 4)
    assert torch.equal(torch.rand(1), after)
    assert not model(torch.randint(1, 50, (3, 5))).any()


def test_without_its_head_an_encoder_says_the_same_and_the_source_is_as_it_was():
    source, tokens = bert(), torch.randint(1, 50, (3, 6))
    before = deepcopy(source.state_dict())
    bare = without_head(source)
    assert torch.equal(bare.encode(tokens), source.encode(tokens))
    assert source.state_dict().keys() == before.keys()
    assert not any(name.startswith(("head", "bias")) for name in bare.state_dict())
    with torch.no_grad():
        bare.embedding.token.weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())


def test_a_new_head_is_of_the_bodys_type_and_stands_under_each_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 10)
            self.fc = self.head

    model = replace_head(Two().bfloat16(), 3)
    assert model.fc is model.head and model.head.weight.dtype == torch.bfloat16
    assert model.head.out_features == 3
    vit = replace_head(ViT(dim=16, depth=1, heads=2), 5)
    assert vit.config["classes"] == 5 and vit(torch.randn(1, 1, 28, 28)).shape == (1, 5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: replace_head(nn.Linear(2, 2), 3), "no linear `head`"),
        (lambda: replace_head(ViT(dim=16, depth=1, heads=2), 1), "classes is 1"),
        (lambda: TextClassifier(nn.Linear(2, 2), 3), "a Linear without `encode`"),
        (lambda: TextClassifier(bert(), 0), "classes is 0"),
        (lambda: TextClassifier(bert(), 2)(torch.rand(2, 3)), "tokens"),
        (lambda: without_head(nn.Linear(2, 2)), "expected a BERT"),
        (lambda: without_head(ViT(dim=16, depth=1, heads=2)), "expected a BERT"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
