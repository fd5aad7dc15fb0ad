"A step of the masked autoencoder against `ViTMAEForPreTraining`, which has a class token."

from contextlib import contextmanager

import torch

from foundation.data.augment import Augment
from foundation.data.batches import augmented
from foundation.models.vit import ViT
from foundation.pretraining.masked_image import MaskedAutoencoder, masked_patches

from .duel import Duel, carry, our_steps, outcome, paired, peer, plain_steps, several

NAMES = {  # ours -> theirs
    "encoder.patches.project": "vit.embeddings.patch_embeddings.projection",
    "encoder.position": "vit.embeddings.position_embeddings",
    "encoder.blocks": "vit.layers",
    "encoder.norm": "vit.layernorm",
    "decoder.bridge": "decoder.decoder_embed",
    "decoder.hidden": "decoder.mask_token",
    "decoder.position": "decoder.decoder_pos_embed",
    "decoder.blocks": "decoder.decoder_layers",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.head": "decoder.decoder_pred",
    ".query": ".q_proj",
    ".key": ".k_proj",
    ".value": ".v_proj",
    ".out": ".o_proj",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    ".mlp.0": ".mlp.fc1",
    ".mlp.3": ".mlp.fc2",
}


def mae(
    precision: str = "fp32", dim: int = 128, depth: int = 6, batch_size: int = 256, steps: int = 4
) -> Duel:
    "Patches of 7 out of 28, three quarters hidden, standardised targets; a decoder of 64 × 2."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * batch_size, 1, 28, 28), dtype=torch.uint8, generator=generator)
    augment = Augment(area=(0.5, 1.0), contrast=0, brightness=0, mean=0.3, std=0.35)

    def batches():
        return (x for (x,) in augmented(images, augment=augment, batch_size=batch_size))

    ours, objective = (
        MaskedAutoencoder(ViT(dim=dim, depth=depth), dim=64, depth=2, heads=4),
        masked_patches(0.75),
    )
    theirs = their_mae(ours)
    return Duel(
        unit="images/s",
        items=steps * batch_size,
        limit=1.5 if precision == "fp32" else None,
        ours=several(our_steps(ours, batches(), objective, precision), steps),
        peers={
            "transformers": several(plain_steps(theirs, batches(), their_loss, precision), steps)
        },
        proof=equal_losses(ours, objective, theirs, next(batches())),
        note=(
            "equal are weights, pictures and hidden patches; for this proof alone an attention mask"
            " keeps the peer's patches from looking at its class token, which ours does not have."
            " It is timed as it comes, with token"
        ),
    )


def equal_losses(ours, objective, theirs, images):
    "Both draw hidden patches as the order of random numbers: the same seed hides the same."
    torch.manual_seed(0)
    mine = outcome(objective(ours, images)[0], ours.encoder.patches.project.weight)
    with without_class_token(theirs):
        torch.manual_seed(0)
        other = outcome(
            their_loss(theirs, images), theirs.vit.embeddings.patch_embeddings.projection.weight
        )
    return paired(mine, other)


def their_mae(ours: MaskedAutoencoder):
    "The same model of `transformers`, with our weights; class token and its position are its own."
    library, vit, painter = peer("transformers"), ours.encoder.config, ours.decoder.config
    config = library.ViTMAEConfig(
        image_size=vit["image_size"],
        patch_size=vit["patch_size"],
        num_channels=vit["channels"],
        hidden_size=vit["dim"],
        intermediate_size=int(vit["dim"] * vit["mlp_ratio"]),
        num_hidden_layers=vit["depth"],
        num_attention_heads=vit["heads"],
        decoder_hidden_size=painter["dim"],
        decoder_intermediate_size=4 * painter["dim"],
        decoder_num_hidden_layers=painter["depth"],
        decoder_num_attention_heads=painter["heads"],
        mask_ratio=0.75,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    theirs = library.ViTMAEForPreTraining(config).train()
    carry(
        ours,
        theirs,
        {
            name: their_name(name)
            for name in ours.state_dict()
            if not name.startswith("encoder.head")
        },
    )
    return theirs


def their_name(name: str) -> str:
    "What `transformers` calls a weight of ours."
    for mine, other in NAMES.items():
        name = name.replace(mine, other)
    return name


def their_loss(model, images):
    return model(pixel_values=images).loss


@contextmanager
def without_class_token(model):
    "Inside the block no token looks at the first: what is left is a model of patches alone."

    def hide(module, args):
        return (
            args[0],
            torch.arange(args[0].shape[1], device=args[0].device)[None, None, None] > 0,
        )

    layers = [layer.attention for layer in (*model.vit.layers, *model.decoder.decoder_layers)]
    hooks = [layer.register_forward_pre_hook(hide) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
