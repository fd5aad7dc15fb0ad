"One sound call for each public name of foundation.core; the laws and the fuzz start from them"

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from foundation.core import basics, checks, exercises, files, modules, plots, precision, widgets
from foundation.core.fingerprint import fingerprint


def scratch(name="", content=None):
    "A place in a new folder, with a file there if it has content"
    path = Path(tempfile.mkdtemp()) / name
    if content is not None:
        path.write_bytes(content)
    return path


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))


def named_head():
    net = nn.Sequential(nn.Linear(4, 5))
    net.add_module("head", nn.Linear(5, 3))
    return net


def near_enough(double):
    exercises.require_close(double(torch.ones(2)), torch.tensor([2.0, 2.0]), "ones become twos")


def exercise():
    return exercises.Exercise(
        "demo", "Double", near_enough, ["one", "two"], returns=object, seconds=2.0
    )


def static(call):
    "Nobody's progress is read or written"

    @functools.wraps(call)
    def inner(*args, **options):
        before = os.environ.get("FOUNDATION_STATIC")
        os.environ["FOUNDATION_STATIC"] = "1"
        try:
            return call(*args, **options)
        finally:
            (
                os.environ.pop("FOUNDATION_STATIC")
                if before is None
                else os.environ.update(FOUNDATION_STATIC=before)
            )

    return inner


def dials():
    return [widgets.make_dial("n", [1, 2]), widgets.make_dial("up", False)]


PIXELS = np.full((4, 5, 3), 200, np.uint8)
ALT = "What the picture shows."
FLOATS = torch.tensor([[0.5, 1.5], [2.5, 3.5]])

EXAMPLES = {
    # basics
    "core.basics.seed_everything": lambda: (basics.seed_everything, dict(seed=3)),
    "core.basics.pick_device": lambda: (basics.pick_device, dict(name="cpu")),
    "core.precision.supports_bf16": lambda: (precision.supports_bf16, dict(device="cpu")),
    "core.precision.pick_precision": lambda: (precision.pick_precision, dict(device="cpu")),
    "core.precision.cpu_flags": lambda: (precision.cpu_flags, {}),
    "core.basics.count_parameters": lambda: (
        basics.count_parameters,
        dict(model=network(), trainable=False),
    ),
    "core.basics.count_nonzero": lambda: (basics.count_nonzero, dict(model=network())),
    "core.basics.count_macs": lambda: (basics.count_macs, (network(), torch.ones(1, 1, 8, 8)), {}),
    "core.basics.evaluating": lambda: (basics.evaluating, dict(model=network())),
    "core.basics.freeze": lambda: (basics.freeze, dict(module=network())),
    "core.basics.unfreeze": lambda: (basics.unfreeze, dict(module=network())),
    "core.basics.EMA": lambda: (basics.EMA, dict(model=network(), decay=0.9)),
    "core.basics.EMA.update": lambda: (basics.EMA(network()).update, dict(model=network())),
    "core.basics.copy_model": lambda: (basics.copy_model, dict(model=network())),
    "core.basics.Timing": lambda: (basics.Timing, dict(median=0.2, low=0.1, high=0.3, repeats=3)),
    "core.basics.measure": lambda: (
        basics.measure,
        dict(fn=list, repeats=2, warmup=1, device="cpu"),
    ),
    "core.files.atomic_write": lambda: (files.atomic_write, dict(path=scratch("a"), mode="wb")),
    "core.files.size_mb": lambda: (files.size_mb, dict(path=scratch("a", b"123"))),
    "core.files.sync_folder": lambda: (files.sync_folder, dict(folder=scratch())),
    "core.files.locked": lambda: (
        files.locked,
        dict(path=scratch("lock"), patience=1.0, notice="wait", shared=True),
    ),
    "core.fingerprint.fingerprint": lambda: (
        fingerprint,
        ({"images": torch.ones(2, 3), "seed": 3}, ["a", None, (1.5, b"x")], network()),
        {},
    ),
    "core.basics.memory_order": lambda: (basics.memory_order, dict(model=network())),
    "core.basics.in_order": lambda: (
        basics.in_order,
        dict(images=torch.ones(1, 1, 2, 2), order=torch.contiguous_format),
    ),
    # checks
    "core.checks.got": lambda: (checks.got, dict(value=FLOATS)),
    "core.checks.check_whole": lambda: (checks.check_whole, dict(value=3, name="n")),
    "core.checks.check_number": lambda: (checks.check_number, dict(value=0.5, name="x")),
    "core.checks.check_sizes": lambda: (checks.check_sizes, dict(width=3)),
    "core.checks.check_shares": lambda: (checks.check_shares, dict(dropout=0.5)),
    "core.checks.check_choice": lambda: (
        checks.check_choice,
        dict(value="a", name="kind", choices=["a", "b"]),
    ),
    "core.checks.may_look": lambda: (checks.may_look, (FLOATS.clone(),), {}),
    "core.checks.precise": lambda: (checks.precise, (FLOATS.half(),), {}),
    "core.checks.check_temperature": lambda: (
        checks.check_temperature,
        dict(temperature=0.5, most=2.0),
    ),
    "core.checks.check_type": lambda: (
        checks.check_type,
        dict(x=FLOATS.clone(), name="x", module=torch.nn.Linear(2, 2)),
    ),
    "core.checks.check_floats": lambda: (
        checks.check_floats,
        dict(x=FLOATS.clone(), name="x", shape="(b, d)", finite=True),
    ),
    "core.checks.check_labels": lambda: (
        checks.check_labels,
        dict(labels=torch.tensor([0, 1]), name="labels", classes=2),
    ),
    "core.checks.check_tokens": lambda: (
        checks.check_tokens,
        dict(tokens=torch.tensor([[0, 1]]), name="tokens", vocab_size=2),
    ),
    "core.checks.check_mask": lambda: (
        checks.check_mask,
        dict(mask=torch.tensor([True]), name="mask"),
    ),
    "core.checks.check_images": lambda: (
        checks.check_images,
        dict(images=torch.ones(1, 1, 2, 2), name="images"),
    ),
    "core.checks.check_model": lambda: (
        checks.check_model,
        dict(model=network(), name="model", needs="forward"),
    ),
    "core.checks.check_callable": lambda: (
        checks.check_callable,
        dict(value=len, name="fn", takes="(x)"),
    ),
    # plots
    "core.plots.encode_png": lambda: (plots.encode_png, dict(pixels=PIXELS, keep=None, colours=8)),
    "core.plots.Picture": lambda: (
        plots.Picture,
        dict(pixels=PIXELS, alt=ALT, scale=1.5, colours=8),
    ),
    "core.plots.draw": lambda: (
        plots.draw,
        dict(
            paint=lambda ax: None,
            alt=ALT,
            title="title",
            size=(2.0, 1.5),
            panels=1,
            colours=8,
            xlabel="step",
        ),
    ),
    "core.plots.band": lambda: (
        plots.band,
        dict(values=np.array([[1.0, 2], [3, 4]]), interval="sd"),
    ),
    "core.plots.plot_curves": lambda: (
        plots.plot_curves,
        dict(
            curves={"a": [1.0, 2.0], "b": [2.0, 1.0]},
            alt=ALT,
            x=[0, 1],
            interval="sd",
            title="title",
            size=(2.0, 1.5),
        ),
    ),
    "core.plots.plot_bars": lambda: (
        plots.plot_bars,
        dict(
            values={"a": 1.0, "b": 2.0},
            alt=ALT,
            intervals=[(0.5, 1.5), (1, 3)],
            interval="sd",
            form="{:.2f}",
            size=(2.0, 1.5),
        ),
    ),
    "core.plots.plot_matrix": lambda: (
        plots.plot_matrix,
        dict(
            matrix=FLOATS.clone(),
            alt=ALT,
            rows=["a", "b"],
            columns=["c", "d"],
            form="{:.1f}",
            limits=(0, 4),
            size=(2.0, 1.5),
        ),
    ),
    "core.plots.plot_points": lambda: (
        plots.plot_points,
        dict(
            points=FLOATS.clone(),
            labels=[0, 1],
            alt=ALT,
            names=["a", "b"],
            limit=5,
            size=(2.0, 1.5),
        ),
    ),
    "core.plots.show_images": lambda: (
        plots.show_images,
        dict(images=torch.rand(2, 1, 4, 4), alt=ALT, titles=["a", "b"], columns=2, title="title"),
    ),
    # widgets
    "core.widgets.Dial": lambda: (
        widgets.Dial,
        dict(name="n", values=(1, 2), labels=("1", "2"), start=0),
    ),
    "core.widgets.make_dial": lambda: (widgets.make_dial, dict(name="n", spec=(1, 3), start=2)),
    "core.widgets.as_frame": lambda: (widgets.as_frame, dict(result="text", alt=ALT, at="n = 1")),
    "core.widgets.overlay": lambda: (widgets.overlay, dict(base=PIXELS, other=PIXELS // 2)),
    "core.widgets.same_size": lambda: (
        widgets.same_size,
        dict(pictures=[plots.Picture(PIXELS, ALT)]),
    ),
    "core.widgets.debounced": lambda: (widgets.debounced, dict(fn=list, seconds=0.1)),
    "core.widgets.Explorer": lambda: (
        widgets.Explorer,
        dict(fn=lambda n, up: f"{n}{up}", dials=dials(), title="title", alt=ALT, max_kb=60),
    ),
    "core.widgets.live": lambda: (widgets.live, {}),
    "core.widgets.explore": lambda: (
        widgets.explore,
        dict(
            fn=lambda n: str(n),
            title="title",
            alt=ALT,
            start={"n": 1},
            limit=8,
            max_kb=60,
            n=[1, 2],
        ),
    ),
    # exercises
    "core.exercises.Refused": lambda: (exercises.Refused, dict(claim="one is two", found="one")),
    "core.exercises.require": lambda: (
        exercises.require,
        dict(condition=True, claim="it holds", got=1),
    ),
    "core.exercises.require_close": lambda: (
        exercises.require_close,
        dict(got=FLOATS.clone(), expected=FLOATS.clone(), claim="they agree", rtol=1e-4, atol=1e-5),
    ),
    "core.exercises.progress_file": lambda: (exercises.progress_file, {}),
    "core.exercises.Verdict": lambda: (
        exercises.Verdict,
        dict(state="solved", reason="", held=["it holds"], notes=[], hints=()),
    ),
    "core.exercises.Exercise": lambda: (
        exercises.Exercise,
        dict(
            lesson="demo",
            title="Double",
            check=near_enough,
            hints=["one", "two"],
            returns=object,
            seconds=2.0,
        ),
    ),
    "core.exercises.Exercise.check": lambda: (
        static(exercise().check),
        dict(answer=lambda x: 2 * x),
    ),
    "core.exercises.Exercise.prove": lambda: (
        static(exercise().prove),
        dict(stub=None, solution=lambda x: 2 * x, wrong=[lambda x: x, lambda x: x * x]),
    ),
    "core.exercises.list_exercises": lambda: (exercises.list_exercises, dict(folder=scratch())),
    "core.exercises.Progress": lambda: (exercises.Progress, dict(rows=[], note="")),
    "core.exercises.exercise_progress": lambda: (
        static(exercises.exercise_progress),
        dict(lesson="00_core/05"),
    ),
    "core.modules.head_of": lambda: (modules.head_of, dict(model=named_head())),
    "core.modules.unwrapped": lambda: (modules.unwrapped, dict(model=network())),
}
SKIP = {
    "core.plots.PALETTE": "a constant",
    "core.plots.render": "needs a figure of matplotlib, which `draw` makes",
    "core.files.PATH": "a constant",
    "core.modules.logits_of": "calls the network it is handed, and hands its answer on",
    "core.files.check_kind": "a check inside others",
    "core.exercises.CALLOUT": "a pattern",
    "core.checks.check_like": "a check inside others, of tensors that are tensors",
    "core.checks.check_rows": "a check inside others",
    "core.checks.refuse_nan": "a check inside others, of tensors that are tensors",
    "core.checks.checked": "a decorator",
    "core.checks.complaint": "calls what it is handed, which must fail",
}
