"""A student taught by the shipped kind of VGG, three times through the same pictures: logits
computed once, against a teacher in every step."""

from copy import deepcopy

import torch
import torch.nn.functional as F

from foundation.compression.distillation import match_logits
from foundation.evaluation.scores import predict
from foundation.models.convnets import VGG, ConvNet
from foundation.training.loop import train
from foundation.training.parameter_groups import adamw

from .duel import Duel, outcome, paired
from .quantize import by_torch_ao

HEAT = 2.0


def student(
    images: int = 512,
    widths: tuple[int, ...] = (32, 64, 128),
    batch_size: int = 128,
    passes: int = 3,
) -> Duel:
    "The same student, batches, optimizer and steps; the loss is the same function of logits."
    torch.manual_seed(0)
    x, teacher = torch.rand(images, 1, 28, 28), VGG(widths=widths, depths=(2,) * len(widths))
    learner = ConvNet()
    with torch.no_grad():
        teacher(x)  # so that batch norm has statistics
    teacher.eval()
    small, plan = by_torch_ao(teacher, x), (x, batch_size, passes)
    return Duel(
        unit="images/s",
        items=images * passes,
        limit=1.0,
        proof=same_step(teacher, learner, x[:batch_size]),
        ours=_logits_once(teacher, deepcopy(learner), *plan),
        peers={
            "PyTorch": _in_every_step(teacher, deepcopy(learner), *plan),
            "torch.ao int8 teacher": _in_every_step(small, deepcopy(learner), *plan),
        },
        note=(
            "three passes over the same pictures, without augmentation; ours counts the teacher's"
            " one look at each. Equal: student, AdamW, batches, number of steps, loss and gradient"
            " against the plain loop in PyTorch. With its teacher quantised by torch.ao the answers"
            " differ a little; it shows what a faster teacher in the loop buys. With an"
            " augmentation that gives each pass new views, answers computed once are those of the"
            " plain picture: then this saving is not to be had"
        ),
    )


def same_step(teacher, learner, x) -> dict[str, tuple[float, float]]:
    "Loss and gradient of a first step."
    ours, _ = match_logits(HEAT)(learner, (x, predict(teacher, x)))
    first = next(learner.parameters())
    return paired(outcome(ours, first), outcome(_their_loss(teacher, learner, x), first))


def _their_loss(teacher, learner, x):
    "Hinton's loss as one writes it in PyTorch"
    with torch.no_grad():
        said = teacher(x)
    return HEAT**2 * F.kl_div(
        F.log_softmax(learner(x) / HEAT, 1), F.softmax(said / HEAT, 1), reduction="batchmean"
    )


def _logits_once(teacher, learner, x, batch_size, passes):
    opt = adamw(learner, 1e-3)

    def call():
        logits = predict(teacher, x, batch_size)
        batches = list(zip(x.split(batch_size), logits.split(batch_size))) * passes
        return [
            step.loss
            for step in train(learner, batches, match_logits(HEAT), opt, steps=len(batches))
        ]

    return call


def _in_every_step(teacher, learner, x, batch_size, passes):
    opt = adamw(learner, 1e-3)

    def call():
        learner.train()
        losses = []
        for part in x.split(batch_size) * passes:
            loss = _their_loss(teacher, learner, part)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            losses.append(loss.detach())
        return losses

    return call
