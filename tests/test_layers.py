"""Layers against loops, PyTorch and transformers, on inputs that hypothesis draws;
laws; and bad input, one sentence each"""

import io
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.core.basics import count_macs
from foundation.layers.attention import (
    Attention,
    KeyValueCache,
    _fused,
    attend,
    causal_mask,
    padding_mask,
)
from foundation.layers.block import MLP, Block
from foundation.layers.convolution import ResidualBlock
from foundation.layers.embedding import (
    PatchEmbedding,
    TokenEmbedding,
    patchify,
    sinusoidal,
    unpatchify,
)

few = settings(max_examples=25, deadline=None)
sizes, seeds, scales = st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1e-2, 1.0, 30.0])
near = dict(rtol=1e-4, atol=1e-4)


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Embedding ----------------------------------------------------------------------------------------


@few
@given(seeds, sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patches_are_unfolds_and_go_back(seed, b, c, y, x, p):
    images = draw(seed, b, c, y * p, x * p)
    assert_close(patchify(images, p), F.unfold(images, p, stride=p).transpose(1, 2))
    square = draw(seed, b, c, y * p, y * p)
    assert torch.equal(unpatchify(patchify(square, p), p, c), square)
    assert patchify((images * 50).byte(), p).dtype == torch.uint8


@few
@given(seeds, sizes, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), sizes)
def test_patch_embedding_is_a_convolution(seed, b, c, side, p, d):
    embed, images = PatchEmbedding(side * p, p, c, d), draw(seed, b, c, side * p, side * p)
    kernel = embed.project.weight.view(d, c, p, p)
    assert_close(
        embed(images),
        F.conv2d(images, kernel, embed.project.bias, p).flatten(2).transpose(1, 2),
        **near,
    )
    assert embed.count == side**2


@few
@given(seeds, sizes, st.integers(1, 8), sizes, sizes, st.integers(0, 3))
def test_token_embedding_adds_rows_of_its_tables(seed, b, n, v, d, segments):
    embed = TokenEmbedding(v, d, context=n + 2, segments=segments)
    ids = torch.randint(v, (b, n), generator=torch.manual_seed(seed))
    kinds = torch.randint(max(segments, 1), (b, n), generator=torch.manual_seed(seed))
    for start in (0, 2):
        plain = embed.token.weight[ids] + embed.position.weight[torch.arange(n) + start]
        assert_close(embed(ids, start=start), plain + (embed.segment.weight[0] if segments else 0))
        if segments:
            assert_close(embed(ids, kinds, start), plain + embed.segment.weight[kinds])


@few
@given(st.integers(1, 40), st.integers(1, 9))
def test_sinusoidal_is_the_papers_formula(n, half):
    waves, d = sinusoidal(n, 2 * half), 2 * half
    for t in {0, n // 2, n - 1}:
        for f in range(half):
            angle = t / 10000 ** (2 * f / d)
            assert_close(
                waves[t, 2 * f : 2 * f + 2], torch.tensor([math.sin(angle), math.cos(angle)])
            )
    gram = waves @ waves.T
    for shift in range(n):
        assert gram.diagonal(shift).std(correction=0) < 1e-4 * d


# Attention ----------------------------------------------------------------------------------------


@few
@given(
    seeds,
    sizes,
    sizes,
    sizes,
    st.integers(0, 5),
    sizes,
    scales,
    st.sampled_from(["none", "any", "causal", "both"]),
)
def test_attend_is_pytorchs(seed, b, h, n, extra, e, scale, kind):
    m = n + extra
    q, k, v = (
        draw(seed, b, h, n, e, scale=scale),
        draw(seed + 1, b, h, m, e),
        draw(seed + 2, b, h, m, e),
    )
    mask = draw(seed + 3, b, 1, n, m) > 0 if kind in ("any", "both") else None
    causal = kind in ("causal", "both")
    full = torch.ones(b, 1, n, m).bool() if mask is None else mask
    full = full & causal_mask(n, m) if causal else full
    out, weights = attend(q, k, v, mask, causal, return_weights=True)
    seen = full.any(-1, keepdim=True)
    theirs = F.scaled_dot_product_attention(q, k, v, full | ~seen)
    assert_close(out, theirs * seen, **near)  # a query that sees nothing gets zeros
    assert_close(weights.sum(-1), seen[..., 0].float().expand(b, h, n), **near)
    assert (weights.masked_select(~full.expand_as(weights)) == 0).all()


def test_bf16_attention_on_a_cpu_is_mixed_in_float32():
    layer, x = Attention(64, 2), draw(0, 8, 17, 64)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = layer.project(x)
        mixed, native = (
            _fused(q, k, v, None, True, 0.0),
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, exact.bfloat16())
    assert not torch.equal(native, mixed)  # the check would see the other kernel


@few
@given(seeds, sizes, st.sampled_from([(4, 1), (6, 3), (12, 2)]), sizes, st.booleans())
def test_attention_is_multihead_attention(seed, b, size, n, bias):
    (d, heads), x, context = size, draw(seed, b, n, size[0]), draw(seed + 1, b, n + 2, size[0])
    theirs, ours = (
        nn.MultiheadAttention(d, heads, bias=bias, batch_first=True),
        Attention(d, heads, bias=bias),
    )
    with torch.no_grad():
        for i, part in enumerate((ours.query, ours.key, ours.value)):
            part.weight.copy_(theirs.in_proj_weight.chunk(3)[i])
            if bias:
                part.bias.copy_(theirs.in_proj_bias.chunk(3)[i].normal_())
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    assert_close(ours(x, context), theirs(x, context, context)[0], **near)
    hidden = ~causal_mask(n)
    want, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    assert_close(ours(x, causal=True), want, **near)
    assert_close(ours(x, mask=~hidden), want, **near)
    assert_close(ours.weights(x, causal=True), weights, **near)
    visible = padding_mask(torch.full((b,), max(1, n - 1)), n)
    assert_close(
        ours(x, mask=visible), theirs(x, x, x, key_padding_mask=~visible[:, 0, 0])[0], **near
    )


@few
@given(seeds, sizes, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_a_cache_changes_nothing(seed, b, chunks, norm_first):
    x = draw(seed, b, sum(chunks), 8)
    blocks = [Block(8, 2, norm_first=norm_first) for _ in range(2)]
    caches, parts = [KeyValueCache() for _ in blocks], []
    for part in x.split(chunks, 1):
        for block, cache in zip(blocks, caches):
            part = block(part, causal=True, cache=cache)
        parts.append(part)
    for block in blocks:
        x = block(x, causal=True)
    assert_close(torch.cat(parts, 1), x, **near)
    assert [len(cache) for cache in caches] == [sum(chunks)] * 2


def test_padding_and_cache_go_together():
    layer, x, cache = Attention(8, 2), draw(0, 2, 5, 8), KeyValueCache()
    visible = padding_mask(torch.tensor([3, 5]), 5)
    first = layer(x[:, :2], causal=True, mask=visible[..., :2], cache=cache)
    rest = layer(x[:, 2:], causal=True, mask=visible, cache=cache)
    assert_close(torch.cat([first, rest], 1), layer(x, causal=True, mask=visible))


def test_gradients_flow_through_a_cache_and_a_hidden_row():
    layer, cache = Attention(8, 2), KeyValueCache()
    prefix = draw(0, 1, 2, 3, 4).requires_grad_()  # learnt keys and values, as in prefix tuning
    cache.extend(prefix, prefix)
    layer(draw(1, 1, 2, 8), causal=True, cache=cache).sum().backward()
    assert prefix.grad.abs().sum() > 0
    q = draw(2, 1, 1, 3, 4).requires_grad_()
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    attend(q, draw(3, 1, 1, 3, 4), draw(4, 1, 1, 3, 4), mask).sum().backward()
    assert q.grad.isfinite().all() and (q.grad[0, 0, 1] == 0).all()


def test_attend_passes_gradcheck():
    q, k, v = (draw(i, 1, 2, 3, 2).double().requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda *t: attend(*t, causal=True), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = (draw(i, 2, 2, 9, 8) for i in range(3))
    assert_close(
        attend(*(t.to(dtype) for t in (q, k, v)), causal=True).float(),
        attend(q, k, v, causal=True),
        rtol=0.05,
        atol=0.05,
    )
    layer, x = Attention(16, 2), draw(4, 2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, causal=True)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), layer(x, causal=True), rtol=0.05, atol=0.05)


def test_dropout_is_on_while_training_only():
    layer, x = Attention(8, 2, dropout=0.5), draw(0, 2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    block = Block(8, 2, dropout=0.5)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_attention_is_counted_whatever_kernel_runs_it():
    n, d = 5, 8
    assert (
        count_macs(Attention(d, 2), torch.randn(1, n, d)) == 4 * n * d * d + 2 * n * n * d
    )  # four projections, scores, mixing


# Block --------------------------------------------------------------------------------------------


@few
@given(seeds, sizes, st.integers(1, 7), st.booleans(), st.sampled_from([1.0, 2.5, 4.0]))
def test_block_is_pytorchs_encoder_layer(seed, b, n, norm_first, ratio):
    theirs = nn.TransformerEncoderLayer(
        12, 3, int(12 * ratio), 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    block, x = Block(12, 3, ratio, norm_first=norm_first), draw(seed, b, n, 12)
    state = theirs.state_dict()
    for kind in ("weight", "bias"):
        parts = state.pop(f"self_attn.in_proj_{kind}").chunk(3)
        state |= {
            f"attention.{name}.{kind}": part for name, part in zip(("query", "key", "value"), parts)
        }
        for old, new in (
            ("self_attn.out_proj", "attention.out"),
            ("linear1", "mlp.0"),
            ("linear2", "mlp.3"),
        ):
            state[f"{new}.{kind}"] = state.pop(f"{old}.{kind}")
    block.load_state_dict(state)
    assert_close(block(x), theirs(x), **near)
    assert_close(block(x, causal=True), theirs(x, src_mask=~causal_mask(n)), **near)


def test_block_is_berts_layer():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install -e '.[bench]')"
    )
    from transformers.models.bert.modeling_bert import BertLayer

    config = transformers.BertConfig(
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    theirs, block = BertLayer(config), Block(16, 4, norm_first=False, eps=1e-12)
    names = {
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.0",
        "output.dense": "mlp.3",
        "output.LayerNorm": "norm2",
    }
    state = theirs.state_dict()
    block.load_state_dict(
        {
            f"{new}.{kind}": state[f"{old}.{kind}"]
            for old, new in names.items()
            for kind in ("weight", "bias")
        }
    )
    x = draw(0, 2, 5, 16)
    out = theirs(x)
    assert_close(block(x), out[0] if isinstance(out, tuple) else out, rtol=1e-5, atol=1e-5)


@few
@given(seeds, st.integers(2, 7), st.booleans())
def test_order_and_future(seed, n, norm_first):
    block, x = Block(8, 2, norm_first=norm_first), draw(seed, 2, n, 8)
    mix = torch.randperm(n, generator=torch.manual_seed(seed))
    assert_close(block(x[:, mix]), block(x)[:, mix], **near)
    later = torch.cat(
        [x[:, :-1], -x[:, -1:]], 1
    )  # adding a constant would not do: layer norm takes it out again
    assert_close(block(later, causal=True)[:, :-1], block(x, causal=True)[:, :-1], **near)
    assert (block(later)[:, :-1] - block(x)[:, :-1]).abs().max() > 1e-5


def test_traced_and_exported_blocks_take_other_sizes():
    block = nn.Sequential(Block(8, 2), Block(8, 2, norm_first=False)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block, draw(0, 2, 5, 8))
        assert_close(traced(draw(1, 3, 7, 8)), block(draw(1, 3, 7, 8)), **near)
        onnxruntime = pytest.importorskip(
            "onnxruntime", reason="onnxruntime is not installed (pip install -e '.[deploy]')"
        )
        file = io.BytesIO()
        axes = {"x": {0: "b", 1: "n"}}
        torch.onnx.export(
            block, (draw(0, 2, 5, 8),), file, dynamo=False, input_names=["x"], dynamic_axes=axes
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = draw(2, 4, 3, 8)
    assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), block(x), **near)


# Bad input ----------------------------------------------------------------------------------------

x, q, ids = torch.zeros(2, 3, 8), torch.zeros(1, 2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
held = KeyValueCache()
held.extend(q, q)
BAD = {
    "patches that do not tile": (
        lambda: patchify(torch.zeros(1, 1, 28, 28), 5),
        ValueError,
        "a divisor of 28 and 28",
    ),
    "an image without a batch": (
        lambda: patchify(torch.zeros(1, 28, 28), 7),
        ValueError,
        r"\(1, 28, 28\)",
    ),
    "images as a list": (lambda: patchify([[1.0]], 7), TypeError, "list"),
    "no images": (lambda: patchify(torch.zeros(0, 1, 28, 28), 7), ValueError, "images is empty"),
    "a patch of no size": (
        lambda: patchify(torch.zeros(1, 1, 4, 4), 0),
        ValueError,
        "patch_size is 0",
    ),
    "a patch of half a pixel": (
        lambda: patchify(torch.zeros(1, 1, 4, 4), 0.5),
        TypeError,
        "whole number",
    ),
    "patches of another width": (
        lambda: unpatchify(torch.zeros(1, 4, 5), 2, 1),
        ValueError,
        r"\(b, n, 4\)",
    ),
    "patches of no square": (
        lambda: unpatchify(torch.zeros(1, 6, 4), 2, 1),
        ValueError,
        "square number",
    ),
    "an embedding that does not tile": (
        lambda: PatchEmbedding(28, 5, 1, 8),
        ValueError,
        "a divisor of 28",
    ),
    "bytes to embed": (
        lambda: PatchEmbedding(4, 2, 1, 8)(torch.zeros(1, 1, 4, 4).byte()),
        TypeError,
        "uint8",
    ),
    "images of another size": (
        lambda: PatchEmbedding(4, 2, 1, 8)(torch.zeros(1, 1, 6, 6)),
        ValueError,
        r"6, 6",
    ),
    "an image path": (lambda: PatchEmbedding(4, 2, 1, 8)("boot.png"), TypeError, "boot.png"),
    "no vocabulary": (lambda: TokenEmbedding(0, 8, 4), ValueError, "vocab_size is 0"),
    "a word beyond the vocabulary": (
        lambda: TokenEmbedding(5, 8, 4)(ids + 5),
        ValueError,
        "0 to 4",
    ),
    "a negative word": (lambda: TokenEmbedding(5, 8, 4)(ids - 1), ValueError, "from -1"),
    "words as floats": (lambda: TokenEmbedding(5, 8, 4)(ids.float()), TypeError, "float32"),
    "words as text": (lambda: TokenEmbedding(5, 8, 4)([["a", "b"]]), TypeError, "list"),
    "one sentence without a batch": (
        lambda: TokenEmbedding(5, 8, 4)(ids[0]),
        ValueError,
        r"\(b, n\)",
    ),
    "a text beyond the context": (
        lambda: TokenEmbedding(5, 8, 4)(ids, start=2),
        ValueError,
        "context of 4",
    ),
    "segments where there are none": (
        lambda: TokenEmbedding(5, 8, 4)(ids, ids),
        ValueError,
        "segments=0",
    ),
    "a third segment": (
        lambda: TokenEmbedding(5, 8, 4, 2)(ids, ids + 2),
        ValueError,
        "segments run",
    ),
    "segments of another shape": (
        lambda: TokenEmbedding(5, 8, 4, 2)(ids, ids[:, :2]),
        ValueError,
        "to fit ids",
    ),
    "an odd width of waves": (lambda: sinusoidal(4, 7), ValueError, "even"),
    "no places": (lambda: sinusoidal(0, 8), ValueError, "n is 0"),
    "more queries than keys": (lambda: causal_mask(3, 2), ValueError, "n <= m"),
    "a length beyond m": (
        lambda: padding_mask(torch.tensor([3, 6]), 5),
        ValueError,
        "a length is 6",
    ),
    "an empty row": (lambda: padding_mask(torch.tensor([0, 5]), 5), ValueError, "a length is 0"),
    "lengths as floats": (lambda: padding_mask(torch.tensor([1.0]), 5), TypeError, "whole numbers"),
    "queries without heads": (lambda: attend(q[0], q, q), ValueError, r"\(b, h, tokens, e\)"),
    "queries as integers": (lambda: attend(q.long(), q, q), TypeError, "int64"),
    "keys of another width": (lambda: attend(q, q[..., :2], q), ValueError, "do not fit"),
    "fewer values than keys": (lambda: attend(q, q, q[:, :, :2]), ValueError, "do not fit"),
    "no keys": (lambda: attend(q, q[:, :, :0], q[:, :, :0]), ValueError, "k is empty"),
    "NaN": (lambda: attend(q, q, q * math.nan), ValueError, "v holds 24 NaN"),
    "a mask of floats": (lambda: attend(q, q, q, torch.ones(3, 3)), TypeError, "expected bool"),
    "a mask of another shape": (
        lambda: attend(q, q, q, torch.ones(3, 4).bool()),
        ValueError,
        r"\(3, 4\)",
    ),
    "a mask with three dimensions": (
        lambda: attend(q, q, q, torch.ones(1, 3, 3).bool()),
        ValueError,
        "padding_mask",
    ),
    "causal with more queries than keys": (
        lambda: attend(q, q[:, :, :2], q[:, :, :2], causal=True),
        ValueError,
        "n <= m",
    ),
    "a cache of another batch": (
        lambda: held.extend(q.expand(2, 2, 3, 4), q.expand(2, 2, 3, 4)),
        ValueError,
        "one cache",
    ),
    "a cache without heads": (lambda: held.extend(q[0], q[0]), ValueError, r"\(b, h, tokens, e\)"),
    "heads that do not divide": (lambda: Attention(8, 3), ValueError, "divide"),
    "all dropped": (lambda: Attention(8, 2, dropout=1.0), ValueError, "dropout"),
    "tokens of another width": (lambda: Attention(6, 2)(x), ValueError, r"\(b, n, 6\)"),
    "tokens without a batch": (lambda: Attention(8, 2)(x[0]), ValueError, r"\(3, 8\)"),
    "tokens as ids": (lambda: Attention(8, 2)(x.long()), TypeError, "int64"),
    "a context of another width": (
        lambda: Attention(8, 2)(x, x[..., :4]),
        ValueError,
        "context has shape",
    ),
    "a context and a cache": (
        lambda: Attention(4, 1)(q[0], q[0], cache=held),
        ValueError,
        "one of them",
    ),
    "a mask of another batch": (
        lambda: Attention(8, 2)(x, mask=padding_mask(torch.tensor([1, 2, 3]), 3)),
        ValueError,
        "mask has shape",
    ),
    "no hidden width": (lambda: MLP(8, 0), ValueError, "hidden is 0"),
    "a ratio of nothing": (lambda: Block(8, 2, mlp_ratio=0.0), ValueError, "mlp_ratio is 0"),
    "a block that cannot be divided": (lambda: Block(8, 3), ValueError, "divide"),
}


@pytest.mark.parametrize("call, kind, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words) as caught:
        call()
    assert len(str(caught.value)) < 260 and "\n" not in str(caught.value)


def test_nan_passes_while_a_gradient_is_recorded():
    bad = (q * math.nan).requires_grad_()
    assert attend(bad, q, q).isnan().any()
    assert Attention(8, 2)(x * math.nan).isnan().any()


def test_a_cache_that_refuses_is_left_as_it_was():
    cache = KeyValueCache()
    cache.extend(q, q)
    with pytest.raises(ValueError):
        cache.extend(q[:, :1], q[:, :1])
    assert len(cache) == 3


# Edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_that_see_nothing_get_zeros_and_finite_gradients(dtype, causal):
    layer, mask = Attention(16, 2).to(dtype), torch.tensor([[True] * 5] * 3 + [[False] * 5] * 2)
    values = draw(0, 2, 5, 16).to(dtype).requires_grad_()
    out = layer(values, mask=mask, causal=causal)
    assert torch.equal(out[:, 3:], layer.out.bias.expand(2, 2, -1)) and out.isfinite().all()
    out.float().square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (values, *layer.parameters()))
    heads = draw(1, 1, 2, 5, 8).to(dtype).requires_grad_()
    by_hand = attend(heads, heads, heads, mask, causal)
    by_hand.float().square().sum().backward()
    assert (by_hand[:, :, 3:] == 0).all() and heads.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attend_in_half_precision_is_rounded_once(dtype):
    q, k, v = (
        t.to(dtype)
        for t in (100 * draw(0, 1, 1, 6, 8), 100 * draw(1, 1, 1, 6, 8), draw(2, 1, 1, 6, 8))
    )
    assert (q @ k.transpose(-2, -1)).abs().max() > 30_000  # near or above the largest half
    out, weights = attend(q, k, v, return_weights=True)
    assert out.dtype == weights.dtype == dtype
    assert torch.equal(out, attend(q.float(), k.float(), v.float()).to(dtype))


def test_kernels_that_know_no_blind_query_are_helped(monkeypatch):
    "Away from the CPU a kernel may answer NaN where a query sees nothing; it is never asked"
    from foundation.layers import attention

    class Elsewhere(torch.Tensor):
        is_cpu = False

    asked = []

    def kernel(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        asked.append(attn_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    q, k, v = (draw(i, 2, 2, 4, 8) for i in range(3))
    mask = torch.tensor([[True, False, True, True]] * 2 + [[False] * 4] * 2)
    out = _fused(q.as_subclass(Elsewhere), k, v, mask, False, 0.0)
    assert asked[0].any(-1).all() and (out[:, :, 2:] == 0).all()
    assert_close(out.as_subclass(torch.Tensor), attend(q, k, v, mask))


def test_a_residual_block_adds_its_shortcut_and_has_no_idle_bias():
    block, x = ResidualBlock(4, 4).eval(), draw(0, 2, 4, 6, 6)
    assert_close(block(x), torch.relu(block.body(x) + x))
    wide = ResidualBlock(4, 8, 2).eval()
    assert_close(wide(x), torch.relu(wide.body(x) + wide.shortcut(x)))
    assert all(m.bias is None for m in wide.modules() if isinstance(m, nn.Conv2d))


def test_a_learnt_prefix_takes_no_place_of_the_text():
    cache, prefix, words = KeyValueCache(), draw(0, 1, 2, 3, 4), draw(1, 1, 2, 5, 4)
    cache.extend(prefix, prefix, places=0)
    assert len(cache) == 3 and cache.places == 0
    cache.extend(words, words)
    assert len(cache) == 8 and cache.places == 5


def test_a_context_may_stand_behind_a_prefix():
    layer, x, context, cache = Attention(8, 2), draw(0, 1, 2, 8), draw(1, 1, 4, 8), KeyValueCache()
    keys = draw(2, 2, 1, 2, 3, 4)
    cache.extend(*keys, places=0)
    q, k, v = layer.project(x, context)
    want = attend(q, torch.cat([keys[0], k], 2), torch.cat([keys[1], v], 2))
    assert_close(layer(x, context, cache=cache), layer.out(want.transpose(1, 2).flatten(2)))


def test_a_refused_mask_leaves_the_cache_as_it_was():
    layer, cache = Attention(8, 2), KeyValueCache()
    layer(draw(0, 1, 3, 8), causal=True, cache=cache)
    with pytest.raises(ValueError, match="mask has shape"):
        layer(draw(0, 1, 1, 8), mask=torch.ones(1, 3).bool(), cache=cache)  # four keys by now
    assert len(cache) == cache.places == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_whole_number_type(dtype):
    embed, ids = TokenEmbedding(9, 4, 5, segments=2), torch.tensor([[0, 8, 3]])
    assert torch.equal(embed(ids.to(dtype), (ids > 3).to(dtype)), embed(ids, (ids > 3).long()))
    assert torch.equal(embed(ids.numpy()), embed(ids)) and torch.equal(
        embed(ids.tolist()), embed(ids)
    )


def test_a_table_is_read_through_its_layer():
    """Pruning and weight_norm make the weight anew at each call of the layer;
    who reads it directly gets an old one"""
    from torch.nn.utils import parametrizations, prune

    ids = torch.tensor([[1, 2, 3]])
    for make in (
        lambda table: prune.l1_unstructured(table, "weight", 0.5),
        parametrizations.weight_norm,
    ):
        embed = TokenEmbedding(5, 4, 6, segments=2)
        for table in embed.children():
            make(table)
        opt = torch.optim.SGD(embed.parameters(), lr=0.5)
        for _ in range(2):  # a stale weight has no second backward pass
            opt.zero_grad()
            embed(ids).square().sum().backward()
            opt.step()
        tables = [table(torch.arange(table.num_embeddings)) for table in embed.children()]
        assert_close(embed(ids), tables[0][ids] + tables[1][:3] + tables[2][0])


def test_sizes_may_be_numbers_of_numpy():
    n = np.int64
    assert Attention(n(8), np.int32(2)).dim == 8 and type(Attention(n(8), n(2)).heads) is int
    assert (
        Block(n(8), n(2), mlp_ratio=np.float32(2.5), dropout=np.float32(0.1)).mlp[0].out_features
        == 20
    )
    assert causal_mask(n(2), n(3)).shape == (2, 3) and padding_mask(
        np.array([1, 3], np.uint8), n(3)
    ).shape == (2, 1, 1, 3)
    assert patchify(np.zeros((1, 1, 4, 4), np.uint8), n(2)).shape == (1, 4, 4)
    assert sinusoidal(n(3), n(4)).shape == (3, 4) and MLP(n(4), n(8))[0].out_features == 8
    assert PatchEmbedding(n(4), n(2), n(1), n(8))(torch.zeros(1, 1, 4, 4)).shape == (1, 4, 8)
    assert ResidualBlock(n(2), n(3), n(2))(torch.zeros(1, 2, 4, 4)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    "ratio, hidden", [(2.9, 290), (np.float32(0.29), 29), (0.57, 57), (4.0, 400), (2.555, 255)]
)
def test_the_hidden_width_is_the_ratio_and_not_its_rounding(ratio, hidden):
    assert Block(100, 2, mlp_ratio=ratio).mlp[0].out_features == hidden


def test_padding_is_hidden_from_every_query_and_the_last_real_token_is_not():
    layer, x = Attention(8, 2), draw(0, 2, 4, 8)
    mask = padding_mask([2, 4], 4)
    assert mask[:, 0, 0].tolist() == [[True, True, False, False], [True] * 4]
    noisy = x.clone()
    noisy[0, 2:] = 9.0
    assert_close(layer(noisy, mask=mask)[0, :2], layer(x, mask=mask)[0, :2])
    noisy[0, 1] = 9.0
    assert (layer(noisy, mask=mask)[0, 0] - layer(x, mask=mask)[0, 0]).abs().max() > 1e-3


def test_images_of_another_type_than_the_weights_get_a_sentence():
    embed, images = PatchEmbedding(4, 2, 1, 8), torch.zeros(1, 1, 4, 4)
    for other in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match="the type of the weights"):
            embed(images.to(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(images.bfloat16()).dtype == torch.bfloat16
    assert embed.double()(images.double()).dtype == torch.float64
