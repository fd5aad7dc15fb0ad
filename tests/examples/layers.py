"One sound call for each public name of foundation.layers; the laws and the fuzz start from them"

import torch

from foundation.layers.attention import Attention, KeyValueCache, attend, causal_mask, padding_mask
from foundation.layers.block import MLP, Block
from foundation.layers.convolution import ConvBlock, ResidualBlock
from foundation.layers.embedding import (
    PatchEmbedding,
    TokenEmbedding,
    patchify,
    sinusoidal,
    unpatchify,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *args):
    torch.manual_seed(0)
    return kind(*args).eval()


def heads(m=5):
    return dict(q=draw(2, 2, 3, 4), k=draw(2, 2, m, 4, seed=1), v=draw(2, 2, m, 4, seed=2))


def ids():
    return torch.tensor([[0, 4, 2], [1, 1, 3]])


EXAMPLES = {
    "layers.embedding.patchify": lambda: (patchify, dict(images=draw(2, 1, 8, 8), patch_size=4)),
    "layers.embedding.unpatchify": lambda: (
        unpatchify,
        dict(patches=draw(2, 4, 16), patch_size=4, channels=1),
    ),
    "layers.embedding.PatchEmbedding": lambda: (
        PatchEmbedding,
        dict(image_size=8, patch_size=4, channels=1, dim=6),
    ),
    "layers.embedding.PatchEmbedding.forward": lambda: (
        made(PatchEmbedding, 8, 4, 1, 6).forward,
        dict(images=draw(2, 1, 8, 8)),
    ),
    "layers.embedding.TokenEmbedding": lambda: (
        TokenEmbedding,
        dict(vocab_size=5, dim=4, context=6, segments=2),
    ),
    "layers.embedding.TokenEmbedding.forward": lambda: (
        made(TokenEmbedding, 5, 4, 6, 2).forward,
        dict(ids=ids(), segments=ids().clamp(max=1), start=1),
    ),
    "layers.embedding.sinusoidal": lambda: (sinusoidal, dict(n=5, dim=4)),
    "layers.attention.causal_mask": lambda: (causal_mask, dict(n=2, m=5)),
    "layers.attention.padding_mask": lambda: (
        padding_mask,
        dict(lengths=torch.tensor([3, 5]), m=5),
    ),
    "layers.attention.attend": lambda: (
        attend,
        heads() | dict(mask=torch.ones(3, 5).bool(), causal=True, return_weights=False),
    ),
    "layers.attention.KeyValueCache": lambda: (KeyValueCache, {}),
    "layers.attention.KeyValueCache.extend": lambda: (
        KeyValueCache().extend,
        dict(k=draw(2, 2, 3, 4), v=draw(2, 2, 3, 4, seed=1), places=3),
    ),
    "layers.attention.Attention": lambda: (Attention, dict(dim=8, heads=2, dropout=0.1, bias=True)),
    "layers.attention.Attention.forward": lambda: (
        made(Attention, 8, 2).forward,
        dict(x=draw(2, 3, 8), context=draw(2, 5, 8), mask=torch.ones(3, 5).bool(), causal=True),
    ),
    "layers.block.MLP": lambda: (MLP, dict(dim=4, hidden=8, dropout=0.1)),
    "layers.block.Block": lambda: (
        Block,
        dict(dim=8, heads=2, mlp_ratio=2.0, dropout=0.1, norm_first=True, eps=1e-5),
    ),
    "layers.convolution.ConvBlock": lambda: (ConvBlock, dict(c_in=2, c_out=3, stride=2, relu=True)),
    "layers.convolution.ResidualBlock": lambda: (ResidualBlock, dict(c_in=2, c_out=3, stride=2)),
}
SKIP = {}
