"One sound call for each public name of foundation.training; the laws and the fuzz start from them"

import tempfile
from pathlib import Path

import torch
from torch import nn

from foundation.data.batches import endless
from foundation.training import (
    checkpoint,
    early_stopping,
    loop,
    parallel,
    parameter_groups,
    run,
    schedules,
    speed,
    state,
    track,
)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def inputs(n=12):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0))


def labels(n=12):
    return torch.arange(n) % 3


def pair():
    model = net()
    return dict(model=model, opt=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def batches(start=0):
    return endless(inputs(), labels(), batch_size=4, start=start)


def place(name="run"):
    return Path(tempfile.mkdtemp()) / name


def saved():
    path, both = place(), pair()
    checkpoint.save_checkpoint(path, **both, step=3)
    return dict(path=path, **both)


def taken():
    both = pair()
    return dict(state=state.snapshot(**both), **both)


def headed():
    model = nn.Sequential()
    model.body, model.head = nn.Linear(4, 5), nn.Linear(5, 3)
    return model


def scored():
    stopping = early_stopping.EarlyStopping(net())
    stopping.update(0.5)
    return stopping


def logged():
    path = place("log.jsonl")
    with track.Log(path) as log:
        for n in range(4):
            log(step(n))
    return path


def step(n=0):
    return loop.Step(n, torch.tensor(1.5), 0.1, None, {})


def losses(*args, **options):
    "All losses of a run of `train`"
    return [float(step.loss) for step in loop.train(*args, **options)]


def block(manager):
    "What a context gives, entered and left, as a function of its arguments"

    def call(*args, **options):
        with manager(*args, **options) as given:
            return given

    call.__name__ = manager.__name__
    return call


EXAMPLES = {
    "training.loop.Step": lambda: (
        loop.Step,
        dict(n=3, loss=torch.tensor(0.5), lr=0.1, grad_norm=None, extra={}),
    ),
    "training.loop.train": lambda: (
        losses,
        dict(
            **pair(),
            batches=batches(),
            objective=loop.classify,
            steps=3,
            schedule=[1.0, 0.5, 0.25],
            accum=2,
            clip=1.0,
            precision="fp32",
            start=1,
            check_every=2,
            scaler=None,
        ),
    ),
    "training.loop.modes_back": lambda: (block(loop.modes_back), dict(model=net())),
    "training.loop.uninterrupted": lambda: (block(loop.uninterrupted), {}),
    "training.loop.load_optimizers": lambda: (loop.load_optimizers, {}),
    "training.loop.classify": lambda: (
        lambda logits, labels: loop.classify(nn.Identity(), (logits, labels))[0],
        dict(logits=inputs(), labels=labels()),
    ),
    "training.run.fit": lambda: (
        run.fit,
        dict(
            model=net(),
            batches=batches(),
            objective=loop.classify,
            steps=3,
            lr=1e-2,
            weight_decay=0.1,
            schedule=[1.0, 0.5, 0.25],
            clip=1.0,
            precision="fp32",
            title="",
            each=None,
        ),
    ),
    "training.parameter_groups.adamw": lambda: (
        parameter_groups.adamw,
        dict(model=net(), lr=0.1, weight_decay=0.01),
    ),
    "training.schedules.warmup_cosine": lambda: (
        schedules.warmup_cosine,
        dict(steps=9, warmup=2, end=0.1),
    ),
    "training.schedules.one_cycle": lambda: (schedules.one_cycle, dict(steps=9, warmup=0.3)),
    "training.state.random_states": lambda: (state.random_states, {}),
    "training.state.restore_random": lambda: (
        lambda: state.restore_random(*state.random_states()),
        {},
    ),
    "training.state.check_savable": lambda: (state.check_savable, pair() | dict(step=3)),
    "training.state.check_fit": lambda: (state.check_fit, taken() | dict(name="run")),
    "training.checkpoint.sole_writer": lambda: (
        block(checkpoint.sole_writer),
        dict(path=place(), patience=0.1, nested=False),
    ),
    "training.checkpoint.as_json": lambda: (
        checkpoint.as_json,
        dict(value={"a": [1, 2.5]}, what="the recipe"),
    ),
    "training.state.snapshot": lambda: (state.snapshot, pair()),
    "training.state.restore": lambda: (state.restore, taken()),
    "training.checkpoint.save_checkpoint": lambda: (
        checkpoint.save_checkpoint,
        dict(path=place(), **pair(), step=3, notes={"a": 1}),
    ),
    "training.checkpoint.load_checkpoint": lambda: (checkpoint.load_checkpoint, saved()),
    "training.checkpoint.read_checkpoint": lambda: (
        checkpoint.read_checkpoint,
        dict(path=saved()["path"]),
    ),
    "training.run.resumable": lambda: (
        lambda **options: run.resumable(**options).losses,
        dict(
            **pair(),
            stream=batches,
            objective=loop.classify,
            steps=3,
            checkpoint=place(),
            recipe={"seed": 0},
            save_every=2,
            longer=False,
            title="",
            each=None,
        ),
    ),
    "training.early_stopping.EarlyStopping": lambda: (
        early_stopping.EarlyStopping,
        dict(model=net(), patience=2),
    ),
    "training.early_stopping.EarlyStopping.update": lambda: (
        early_stopping.EarlyStopping(net()).update,
        dict(score=0.5),
    ),
    "training.early_stopping.EarlyStopping.restore": lambda: (scored().restore, {}),
    "training.parameter_groups.head_groups": lambda: (
        parameter_groups.head_groups,
        dict(model=headed(), lr=1e-3, head_lr=1e-2),
    ),
    "training.parameter_groups.layers": lambda: (parameter_groups.layers, dict(model=headed())),
    "training.parameter_groups.layer_groups": lambda: (
        parameter_groups.layer_groups,
        dict(model=headed(), lr=1e-3, decay=0.5, head_lr=1e-2),
    ),
    "training.parameter_groups.make_optimizer": lambda: (
        parameter_groups.make_optimizer,
        dict(name="adamw", groups=parameter_groups.head_groups(headed(), 1e-3), weight_decay=0.1),
    ),
    "training.speed.Throughput": lambda: (
        speed.Throughput,
        dict(items=4, seconds={"a": [2.0, 4.0], "b": [1.0, 1.0]}),
    ),
    "training.speed.throughput": lambda: (
        lambda **options: list(speed.throughput(**options).seconds),
        dict(ways={"a": list, "b": dict}, items=4, rounds=2, warmup=1, device="cpu"),
    ),
    "training.speed.kept_for_backward": lambda: (
        lambda model: block(speed.kept_for_backward)(model).peak,
        dict(model=net()),
    ),
    "training.speed.Peak": lambda: (speed.Peak, dict(mb=1.5)),
    "training.speed.peak_memory": lambda: (
        lambda **options: block(speed.peak_memory)(**options).mb >= 0,
        dict(device="cpu", every=0.01),
    ),
    "training.track.Log": lambda: (
        lambda **options: track.Log(**options).__exit__(),
        dict(path=place("log.jsonl"), every=2, start=0),
    ),
    "training.track.Log.__call__": lambda: (
        track.Log(place("log.jsonl"), every=1),
        dict(step=step(), accuracy=0.5),
    ),
    "training.track.read_log": lambda: (track.read_log, dict(path=logged())),
    "training.parallel.processes": lambda: (parallel.processes, {}),
    "training.parallel.first_one_first": lambda: (parallel.first_one_first, {}),
    "training.parallel.share_random_states": lambda: (parallel.share_random_states, {}),
    "training.parallel.gather_rows": lambda: (parallel.gather_rows, dict(own=inputs())),
    "training.parallel.in_parallel": lambda: (parallel.in_parallel, dict(model=net())),
    "training.track.curve": lambda: (
        track.curve,
        dict(rows=track.read_log(logged()), name="loss"),
    ),
    "training.track.plot_log": lambda: (
        track.plot_log,
        dict(runs={"a": logged(), "b": logged()}, name="loss", smooth=2, alt="two runs"),
    ),
}

SKIP = {
    "training.loop.Objective": "a type",
    "training.loop.TrainingDiverged": "an error",
    "training.loop.progress": "a bar on the screen; `fit` shows it",
    "training.state.Snapshot": "a tuple that `snapshot` makes",
    "training.state.BadCheckpoint": "an error",
    "training.parallel.Processes": "a tuple that `processes` makes",
    "training.parallel.ProcessLost": "an error",
    "training.parallel.SplitBatch": "made by `in_parallel` where there are several processes",
    "training.run.Run": "a tuple that `resumable` makes",
    "training.speed.Kept": "made by `kept_for_backward`",
    "training.track.TensorBoard": "needs tensorboard, which not everybody has",
}
