"One sound call for each public name of foundation.pretraining, for the laws and the fuzz"

import functools
import tempfile
from pathlib import Path

import torch
from torchvision.models import VisionTransformer

from foundation.data.augment import Augment
from foundation.data.tokenizer import Tokenizer
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.vit import ViT
from foundation.pretraining import contrastive, masked_image, masked_text, patches

TEXTS = ["a cat sat", "the dog ran", "an owl", "the cat ran"] * 4


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=luck(seed))


@functools.cache
def tokenizer():
    return Tokenizer([])


@functools.cache
def documents():
    return masked_text.encode_documents(TEXTS, tokenizer())


def bert():
    torch.manual_seed(0)
    return BERT(tokenizer().vocab_size, context=16, dim=8, depth=1, heads=2, segments=0)


def tokens(b=3, n=6):
    return torch.randint(5, tokenizer().vocab_size, (b, n), generator=luck())


def batch():
    return next(masked_text.masked_stream(documents(), tokenizer(), context=16, batch_size=2))


def pictures(n=16):
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=luck())


def points():
    torch.manual_seed(0)
    return contrastive.ContrastiveModel(ConvNet(widths=(4,)), dim=6, hidden=8)


def queued():
    return contrastive.MomentumContrast(points(), 8, 0.9)


def painter():
    torch.manual_seed(0)
    encoder = ViT(image_size=8, patch_size=4, dim=8, depth=1, heads=2)
    return masked_image.MaskedAutoencoder(encoder, dim=8, depth=1, heads=2)


def foreign():
    torch.manual_seed(0)
    return VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)


def keep(b=2, n=4, m=2):
    return torch.rand(b, n, generator=luck()).argsort(1)[:, :m]


def run(name):
    return Path(tempfile.mkdtemp()) / name


def plan(**more):
    return dict(steps=1, seed=0, save_every=1, title="", each=None, checkpoint=None) | more


EXAMPLES = {
    "pretraining.masked_text.mask_tokens": lambda: (
        masked_text.mask_tokens,
        dict(
            tokens=tokens(),
            can_hide=tokens() > 9,
            mask_id=3,
            vocab_size=tokenizer().vocab_size,
            first_word=5,
            words=torch.arange(5, tokenizer().vocab_size),
            ratio=0.4,
            generator=luck(),
        ),
    ),
    "pretraining.masked_text.encode_documents": lambda: (
        masked_text.encode_documents,
        dict(texts=TEXTS, tokenizer=tokenizer(), longest=5),
    ),
    "pretraining.masked_text.masked_stream": lambda: (
        masked_text.masked_stream,
        dict(
            documents=documents(),
            tokenizer=tokenizer(),
            context=8,
            batch_size=2,
            ratio=0.2,
            seed=0,
            start=0,
        ),
    ),
    "pretraining.masked_text.masked_tokens": lambda: (
        masked_text.masked_tokens,
        dict(model=bert(), batch=batch()),
    ),
    "pretraining.masked_text.pretrain": lambda: (
        masked_text.pretrain,
        dict(
            model=bert(),
            documents=documents(),
            tokenizer=tokenizer(),
            batch_size=2,
            lr=1e-3,
            ratio=0.2,
            weight_decay=0.01,
            precision="fp32",
            **plan(checkpoint=run("text")),
        ),
    ),
    "pretraining.masked_text.masked_accuracy": lambda: (
        masked_text.masked_accuracy,
        dict(
            model=bert(), documents=documents(), tokenizer=tokenizer(), ratio=0.2, steps=1, seed=0
        ),
    ),
    "pretraining.masked_text.unigram_accuracy": lambda: (
        masked_text.unigram_accuracy,
        dict(documents=documents(), unseen=documents(), tokenizer=tokenizer()),
    ),
    "pretraining.masked_text.fill_mask": lambda: (
        masked_text.fill_mask,
        dict(model=bert(), tokenizer=tokenizer(), text="the [MASK]", count=3),
    ),
    "pretraining.contrastive.ContrastiveModel": lambda: (
        contrastive.ContrastiveModel,
        dict(encoder=ConvNet(widths=(4,)), dim=6, hidden=8),
    ),
    "pretraining.contrastive.match_views": lambda: (
        contrastive.match_views,
        dict(temperature=0.2),
    ),
    "pretraining.contrastive.match_queue": lambda: (
        contrastive.match_queue,
        dict(temperature=0.2),
    ),
    "pretraining.contrastive.pretrain": lambda: (
        contrastive.pretrain,
        dict(
            encoder=ConvNet(widths=(4,)),
            images=pictures(),
            augment=Augment(),
            batch_size=4,
            lr=1e-3,
            temperature=0.2,
            weight_decay=0.05,
            objective=None,
            workers=0,
            **plan(checkpoint=run("contrast")),
        ),
    ),
    "pretraining.contrastive.effective_rank": lambda: (
        contrastive.effective_rank,
        dict(z=randn(6, 4)),
    ),
    "pretraining.contrastive.feature_spread": lambda: (
        contrastive.feature_spread,
        dict(z=randn(6, 4)),
    ),
    "pretraining.contrastive.MomentumContrast": lambda: (
        contrastive.MomentumContrast,
        dict(model=points(), size=8, momentum=0.9),
    ),
    "pretraining.contrastive.MomentumContrast.scores": lambda: (
        queued().scores,
        dict(queries=randn(3, 6), keys=randn(3, 6, seed=1)),
    ),
    "pretraining.contrastive.MomentumContrast.enqueue": lambda: (
        queued().enqueue,
        dict(keys=randn(3, 6)),
    ),
    "pretraining.patches.PatchEncoder": lambda: (patches.PatchEncoder, dict(model=foreign())),
    "pretraining.patches.PatchEncoder.encode": lambda: (
        patches.PatchEncoder(foreign()).encode,
        dict(images=randn(2, 3, 8, 8)),
    ),
    "pretraining.patches.open_vit": lambda: (patches.open_vit, dict(model=foreign())),
    "pretraining.masked_image.take": lambda: (
        masked_image.take,
        dict(x=randn(2, 4, 3), positions=keep()),
    ),
    "pretraining.masked_image.visible": lambda: (masked_image.visible, dict(keep=keep(), n=4)),
    "pretraining.masked_image.hidden_error": lambda: (
        masked_image.hidden_error,
        dict(guess=randn(2, 4, 3), target=randn(2, 4, 3, seed=1), keep=keep()),
    ),
    "pretraining.masked_image.random_masking": lambda: (
        masked_image.random_masking,
        dict(b=2, n=8, ratio=0.75, device="cpu", generator=luck()),
    ),
    "pretraining.masked_image.PatchDecoder": lambda: (
        masked_image.PatchDecoder,
        dict(patches=4, width=8, pixels=16, dim=8, depth=1, heads=2),
    ),
    "pretraining.masked_image.MaskedAutoencoder": lambda: (
        masked_image.MaskedAutoencoder,
        dict(encoder=painter().encoder, dim=8, depth=1, heads=2),
    ),
    "pretraining.masked_image.MaskedAutoencoder.forward": lambda: (
        painter(),
        dict(images=randn(2, 1, 8, 8), keep=keep()),
    ),
    "pretraining.masked_image.patch_moments": lambda: (
        masked_image.patch_moments,
        dict(patches=randn(2, 4, 9)),
    ),
    "pretraining.masked_image.patch_targets": lambda: (
        masked_image.patch_targets,
        dict(images=randn(2, 1, 8, 8), patch_size=4),
    ),
    "pretraining.masked_image.masked_patches": lambda: (
        masked_image.masked_patches,
        dict(ratio=0.5, normalise=True),
    ),
    "pretraining.masked_image.pretrain": lambda: (
        masked_image.pretrain,
        dict(
            model=painter(),
            images=pictures(),
            augment=Augment(),
            batch_size=4,
            lr=1e-3,
            ratio=0.5,
            normalise=True,
            weight_decay=0.05,
            workers=0,
            **plan(checkpoint=run("images")),
        ),
    ),
}
SKIP = {}
