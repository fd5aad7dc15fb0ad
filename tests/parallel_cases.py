"""Small runs of every kind, and what comes out of each.

tests/test_parallel.py runs them in one process, and this file in two under torchrun."""

import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import foundation.training.loop as loop
import foundation.training.parallel as parallel
import foundation.training.run as run
from foundation.compression.distillation import distil, match_teacher
from foundation.core.basics import seed_everything
from foundation.data.augment import Augment
from foundation.data.batches import endless
from foundation.data.tokenizer import train_bpe
from foundation.finetuning.loop import finetune
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet, ResNet
from foundation.models.vit import ViT
from foundation.pretraining import contrastive, masked_image, masked_text
from foundation.training.loop import classify, train
from foundation.training.parallel import processes
from foundation.training.run import fit, resumable
from foundation.training.track import Log

PICTURES = torch.randint(256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(0))
PICTURES = PICTURES.to(torch.uint8)
LABELS = torch.arange(60) % 10
FLOATS = PICTURES.float() / 128 - 1
TEXTS = ["a large group of animals", "the state of being happy", "cause to become hard"] * 10
SMALL = dict(steps=3, title="")


_init = torch.optim.AdamW.__init__


def damped(self, *args, **options):
    """AdamW divides by the size of a gradient: where that is rounding alone (biases before a norm,
    keys of attention) it makes steps of it, and no two orders of addition agree. Not with this eps
    """
    _init(self, *args, **options | dict(eps=1e-3))


def small(kind=ResNet):
    seed_everything(0)
    return kind(widths=(4, 6), **(dict(depths=(1, 1)) if kind is ResNet else {}))


def weights(model):
    "All that training changes, also statistics of batch norms and queues"
    tensors = [*model.parameters(), *model.buffers()]
    return torch.cat([t.detach().double().flatten() for t in tensors])


def trained(model, objective=classify, batch=13, steps=4, data=(FLOATS, LABELS), **options):
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stream = endless(*data, batch_size=batch)
    list(train(model, stream, objective, opt, steps=steps, **options))
    return weights(model)


# What must be equal -------------------------------------------------------------------------------


def convnet():
    "13 rows: one process has 7 of them, the other 6"
    return trained(small(ConvNet))


def resnet():
    return trained(small())


def resnet_accumulated_and_clipped():
    return trained(small(), accum=2, clip=0.5)


def fewer_rows_than_processes():
    seed_everything(0)
    return trained(ViT(28, 14, dim=8, depth=1, heads=2), batch=1)


def norms_of_other_momentum():
    "The average of all batches so far, and statistics that stay"
    model = small()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].momentum, norms[1].momentum = None, 0.0
    return trained(model)


def labels_that_do_not_count():
    "Means over unequal numbers of labels"
    return trained(small(), data=(FLOATS, LABELS.masked_fill(torch.arange(60) % 3 == 0, -100)))


def double():
    return trained(small().double(), data=(FLOATS.double(), LABELS))


def simclr():
    encoder = small()
    contrastive.pretrain(encoder, PICTURES, Augment(), batch_size=9, **SMALL)
    return weights(encoder)


def moco():
    model = contrastive.MomentumContrast(contrastive.ContrastiveModel(small(), 8, 16), 32, 0.9)
    objective = contrastive.match_queue()
    contrastive.pretrain(model, PICTURES, Augment(), batch_size=9, objective=objective, **SMALL)
    return weights(model)


def mae():
    seed_everything(0)
    vit = ViT(dim=16, depth=1, heads=2)
    model = masked_image.MaskedAutoencoder(vit, dim=16, depth=1, heads=2)
    masked_image.pretrain(model, PICTURES, Augment(), batch_size=9, **SMALL)
    return weights(model)


def bert():
    tokenizer = train_bpe(TEXTS, 280)
    documents = masked_text.encode_documents(TEXTS, tokenizer)
    seed_everything(0)
    model = BERT(tokenizer.vocab_size, context=16, dim=16, depth=1, heads=2, segments=0)
    masked_text.pretrain(model, documents, tokenizer, batch_size=5, **SMALL)
    return weights(model)


def distilled():
    teacher, student = small(), small(ConvNet)
    with torch.no_grad():
        logits = teacher.eval()(FLOATS)
    distil(student, FLOATS, logits, labels=LABELS, hard=0.3, batch_size=16, **SMALL)
    return weights(student)


def taught():
    teacher = small()
    return trained(small(ConvNet), match_teacher(teacher, hard=0.5))


def finetuned():
    "Layer after layer begins to learn, and statistics of frozen norms stay"
    model = small()
    finetune(model, PICTURES, LABELS, Augment(), lr=1e-2, gradual=True, steps=6, batch_size=16)
    return weights(model)


def fitted():
    model = small()
    fit(model, endless(FLOATS, LABELS, batch_size=16), steps=3, title="")
    return weights(model)


def random_states():
    "Masks drawn by an objective: all processes draw what one would"
    seed_everything(3)
    trained(small(), lambda model, b: classify(model, (b[0] * torch.rand_like(b[0]), b[1])))
    return torch.rand(3).double()


EQUAL = [convnet, resnet, resnet_accumulated_and_clipped, fewer_rows_than_processes]
EQUAL += [
    norms_of_other_momentum,
    labels_that_do_not_count,
    double,
    simclr,
    moco,
    mae,
    bert,
    distilled,
    taught,
    finetuned,
]
EQUAL += [fitted, random_states]


# What breaks it -----------------------------------------------------------------------------------


def no_average():
    with patch.object(parallel.SplitBatch, "_averaged", lambda self, *_: self._orig_mod):
        return trained(small())


def gather_without_gradient():
    "As `all_gather` alone: the rows of others are constants, so the gradient is half as long"

    def gather(own):
        rows = parallel._Gather.apply(own.detach(), [7, 6], processes().rank)
        begin = 7 * processes().rank
        return torch.cat([rows[:begin], own, rows[begin + len(own) :]])

    with patch.object(parallel, "gather_rows", gather):
        return trained(small())


def wrong_shard():
    "Both processes take the first rows"
    real = parallel.gather_rows
    with patch.object(parallel, "gather_rows", lambda x: real(x)[:7].repeat(2, 1)[:13]):
        return trained(small())


def norms_apart():
    with patch.object(parallel, "_norms_together", lambda net: nullcontext()):
        return trained(small())


BROKEN = [no_average, gather_without_gradient, wrong_shard, norms_apart]  # of `resnet`


# What goes on, and what stops ---------------------------------------------------------------------


def resumed(path, steps_now):
    "A run with a checkpoint and a log, up to a step"
    model = small()
    opt = torch.optim.AdamW(model.parameters(), 1e-2)

    def stop(step):
        log(step)
        if step.n == steps_now:  # what has been saved is `steps_now` steps
            raise InterruptedError

    def stream(start):
        return endless(FLOATS, LABELS, batch_size=13, start=start)

    with Log(f"{path}.jsonl", start=steps_now - 2 if steps_now < 6 else 4) as log:
        try:
            plan = dict(steps=6, checkpoint=path, save_every=2)
            resumable(model, stream, classify, opt, each=stop, **plan)
        except InterruptedError:
            pass
    return weights(model)


def different_batches():
    "A sentence for processes that are given different rows"
    own = FLOATS + processes().rank
    try:
        trained(small(), data=(own, (LABELS + processes().rank) % 10))
    except ValueError as error:
        return str(error)


def interrupted():
    "Ctrl-C in one process: how many steps each has done"
    done = []

    def each(step):
        done.append(step.n)
        if step.n == 1 and processes().rank == processes().count - 1:
            os.kill(os.getpid(), signal.SIGINT)

    fit(small(), endless(FLOATS, LABELS, batch_size=8), steps=9, title="", each=each)
    return len(done)


def dropout():
    "What a network with dropout alone gives for the same row, in each process"
    seed_everything(0)
    net, seen = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)), []

    def objective(model, x):
        out = model(x)
        seen.append((out == 0).double())
        return out.square().mean(), {}

    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    list(train(net, [torch.ones(2, 4)] * 2, objective, opt, steps=2))
    return torch.stack(seen), torch.rand(3), weights(net)


def main(folder):
    folder, (rank, count) = Path(folder), processes()
    found = dict(ranks=count)
    for case in [*EQUAL, *BROKEN, different_batches, interrupted, dropout]:
        found[case.__name__] = case()
    found["resumed"] = resumed(folder / "resumed", 4)  # from step 2, where one process stopped
    torch.save(found, folder / f"{rank}.pt")
    if rank == 1:
        os._exit(3)  # without a word
    try:
        trained(small())
    except parallel.ProcessLost as error:
        (folder / "lost.txt").write_text(str(error))
        raise


@contextmanager
def exactly():
    "Inside, what is only rounding stays small, in each training of this file"
    fp32 = [patch.object(place, "pick_precision", lambda device: "fp32") for place in (loop, run)]
    with patch.object(torch.optim.AdamW, "__init__", damped), fp32[0], fp32[1]:
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    with exactly():
        main(sys.argv[1])
