"Contrastive pretraining, from pictures to updated weights, against `lightly`: views, loader, loss."

from copy import deepcopy

import torch
from torch.utils.data import DataLoader, Dataset

from foundation.core.basics import in_order, memory_order
from foundation.data.augment import Augment
from foundation.data.views import two_views
from foundation.models.convnets import ResNet
from foundation.pretraining.contrastive import ContrastiveModel, match_views

from .duel import Duel, our_steps, outcome, paired, peer, plain_steps, several

TEMPERATURE = 0.2


class Pictures(Dataset):
    "Pictures one by one, as torchvision hands them out: two views from a transform."

    def __init__(self, images, transform):
        self.images, self.transform = images.numpy(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i, 0]))


def simclr(
    precision: str = "fp32",
    widths: tuple[int, ...] = (32, 64, 128, 256),
    batch_size: int = 256,
    steps: int = 8,  # of one round: the DataLoader's queue has been filled and used up when it ends
    workers: int = 2,
) -> Duel:
    "Each side makes its own views of the same pictures, then learns from them with the same net."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        256, (steps * batch_size, 1, 28, 28), dtype=torch.uint8, generator=generator
    )
    augment = Augment(mean=0.3, std=0.35)
    model = ContrastiveModel(ResNet(widths=widths, depths=(1,) * len(widths)))
    model = model.to(memory_format=memory_order(model))

    def batches():
        return two_views(images, augment, batch_size)

    objective, their_loss = match_views(TEMPERATURE), contrast()

    def theirs(transform):
        loader = endlessly(
            DataLoader(
                Pictures(images, transform),
                batch_size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        )
        return several(plain_steps(deepcopy(model), loader, their_loss, precision), steps)

    return Duel(
        unit="images/s",
        items=steps * batch_size,
        limit=3.0 if precision == "fp32" else None,
        proof=equal_losses(model, objective, deepcopy(model), their_loss, next(batches())),
        ours=several(our_steps(deepcopy(model), batches(), objective, precision), steps),
        peers={
            f"lightly, {name}": theirs(transform) for name, transform in transforms(augment).items()
        },
        note=(
            "equal are backbone, projector and weights, and the loss of the same views; when timed"
            " each side draws its own, so that those losses differ. 'our views': lightly asked for"
            " the same kinds and ranges; 'its views': as its example has them, with blur and more"
            " jitter. The DataLoader rests while others run; made-up pictures"
        ),
    )


def equal_losses(ours, objective, theirs, their_loss, views):
    "The same views through both."

    def first(model):
        return next(model.parameters())

    mine = outcome(objective(ours, views)[0], first(ours))
    other = outcome(their_loss(theirs, views.chunk(2)), first(theirs))
    return paired(mine, other)


def contrast():
    "`lightly`'s loss of a pair of views, which go through the model together."
    criterion = peer("lightly.loss").NTXentLoss(temperature=TEMPERATURE)

    def loss(model, views):
        x = in_order(torch.cat(list(views)), memory_order(model))
        return criterion(*model(x).chunk(2))

    return loss


def transforms(augment: Augment) -> dict:
    "`lightly`'s transform for small grey pictures: as ours does it, and as its example has it."
    make, grey = (
        peer("lightly.transforms").SimCLRTransform,
        dict(mean=[augment.mean], std=[augment.std]),
    )
    same = dict(
        cj_prob=1.0,
        cj_bright=augment.brightness,
        cj_contrast=augment.contrast,
        cj_sat=0.0,
        cj_hue=0.0,
        min_scale=augment.area[0],
        random_gray_scale=0.0,
        gaussian_blur=0.0,
        hf_prob=augment.flip,
    )
    return {
        "our views": make(input_size=28, normalize=grey, **same),
        "its views": make(input_size=28, normalize=grey),
    }


def endlessly(loader):
    "Pass by pass: when a round ends with its pass, the workers have nothing left to do."
    while True:
        yield from loader
