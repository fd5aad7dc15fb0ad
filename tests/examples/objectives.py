"""One sound call for each public function of foundation.objectives;
the laws and the fuzz start from them"""

import torch

from foundation.objectives.contrast import alignment, info_nce, nt_xent, uniformity
from foundation.objectives.descent import (
    Descent,
    adafactor_step,
    adam_step,
    adamw_step,
    descend,
    sgd_step,
)
from foundation.objectives.divergence import (
    distillation_loss,
    entropy,
    js,
    kl,
    softmax,
)
from foundation.objectives.likelihood import (
    binary_cross_entropy,
    cross_entropy,
    log_softmax,
    log_sum_exp,
    masked_likelihood,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chances(seed=0):
    return draw(4, 3, seed=seed).softmax(-1)


def labels():
    return torch.tensor([0, 1, 2, 1])


def words():
    return torch.tensor([[0, 4, 2], [1, 1, 3]])


def visible():
    return torch.tensor([[True, False, True], [False, True, True]])


def update():
    return dict(weight=draw(3, 2), grad=draw(3, 2, seed=1), state={})


def bowl(weight):
    return weight.square().sum()


EXAMPLES = {
    "objectives.likelihood.log_sum_exp": lambda: (log_sum_exp, dict(x=draw(4, 3), dim=-1)),
    "objectives.likelihood.log_softmax": lambda: (log_softmax, dict(logits=draw(4, 3), dim=-1)),
    "objectives.likelihood.cross_entropy": lambda: (
        cross_entropy,
        dict(logits=draw(4, 3), labels=labels(), label_smoothing=0.1, ignore_index=-100),
    ),
    "objectives.likelihood.binary_cross_entropy": lambda: (
        binary_cross_entropy,
        dict(logits=draw(4, 3), targets=(draw(4, 3, seed=1) > 0).float()),
    ),
    "objectives.likelihood.masked_likelihood": lambda: (
        masked_likelihood,
        dict(logits=draw(2, 3, 5), targets=words(), visible=visible()),
    ),
    "objectives.divergence.softmax": lambda: (softmax, dict(logits=draw(4, 3), temperature=2.0)),
    "objectives.divergence.entropy": lambda: (entropy, dict(p=chances())),
    "objectives.divergence.kl": lambda: (kl, dict(p=chances(), q=chances(1))),
    "objectives.divergence.js": lambda: (js, dict(p=chances(), q=chances(1))),
    "objectives.divergence.distillation_loss": lambda: (
        distillation_loss,
        dict(student_logits=draw(4, 3), teacher_logits=draw(4, 3, seed=1), temperature=2.0),
    ),
    "objectives.contrast.info_nce": lambda: (info_nce, dict(scores=draw(4, 6))),
    "objectives.contrast.nt_xent": lambda: (
        nt_xent,
        dict(a=draw(4, 3), b=draw(4, 3, seed=1), temperature=0.5),
    ),
    "objectives.contrast.alignment": lambda: (alignment, dict(a=draw(4, 3), b=draw(4, 3, seed=1))),
    "objectives.contrast.uniformity": lambda: (uniformity, dict(z=draw(4, 3), t=2.0)),
    "objectives.descent.sgd_step": lambda: (
        sgd_step,
        update() | dict(lr=0.1, momentum=0.9, l2=0.1, decay=0.1),
    ),
    "objectives.descent.descend": lambda: (
        descend,
        dict(rule=sgd_step, loss=bowl, start=draw(3), steps=3, lr=0.1),
    ),
    "objectives.descent.adam_step": lambda: (
        adam_step,
        update() | dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, l2=0.1, decay=0.1),
    ),
    "objectives.descent.adamw_step": lambda: (
        adamw_step,
        update() | dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, decay=0.1),
    ),
    "objectives.descent.adafactor_step": lambda: (
        adafactor_step,
        update() | dict(lr=0.1, forget=0.8, eps=1e-3, clip=1.0, decay=0.1),
    ),
    "objectives.descent.Descent": lambda: (
        Descent,
        dict(params=[draw(3, 2).requires_grad_()], rule=adam_step, lr=0.1),
    ),
}
SKIP = {}
