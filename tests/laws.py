"""What must hold for every public function, whatever it does, and the tools to try it: `outcome`
calls and judges, `same` compares two results, `hostile` makes values that somebody could mistake
for the right one."""

import contextlib
import dataclasses
import io
import linecache
import os
import random
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import foundation
from foundation.training.loop import load_optimizers

load_optimizers()  # no deadline may strike inside the late imports of PyTorch

HOME = str(Path(foundation.__file__).parent)


class Hang(BaseException):
    "A call that did not come back in time"


@contextlib.contextmanager
def deadline(seconds):
    "Raise `Hang` in the main thread after some seconds; elsewhere, and on Windows, do nothing"
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(*_):
        raise Hang(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_sentence(error):
    "Was it raised by a `raise` of the package, or of a class that the package defines?"
    if type(error).__module__.startswith("foundation."):
        return True
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        lines = range(line, max(line - 6, 0), -1) if file.startswith(HOME) else ()
        if any(re.search(r"\braise\b", linecache.getline(file, n)) for n in lines):
            return True
    return False


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def outcome(function, args, options, seconds=10):
    """("right", result), or what happened instead: "refused" (our sentence), "bare" (a TypeError or
    ValueError of Python or torch), "raw" (any other error), "hang"; the second entry is then the
    error."""
    seed()
    quiet = io.StringIO()
    try:
        with (
            deadline(seconds),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            warnings.simplefilter("ignore")
            result = function(*args, **options)
            if hasattr(result, "__next__"):  # a generator has done nothing yet
                result = next(result, None)
        return "right", result
    except Hang as error:
        return "hang", error
    except (Exception, SystemExit) as error:
        if is_sentence(error):
            return "refused", error
        return ("bare" if isinstance(error, (TypeError, ValueError)) else "raw"), error


def same(a, b, rtol=1e-5, atol=1e-6):
    """Do two results agree, whatever they are made of? Numbers agree across dtypes;
    objects that cannot be looked into by type"""
    if isinstance(a, (Tensor, np.ndarray, np.generic)) or isinstance(
        b, (Tensor, np.ndarray, np.generic)
    ):
        try:
            a, b = (
                torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x.detach())
                for x in (a, b)
            )
        except (TypeError, ValueError):
            return type(a) is type(b)
        if a.shape != b.shape:
            return False
        if a.is_floating_point() or b.is_floating_point():
            return torch.allclose(a.double(), b.double(), rtol, atol, equal_nan=True)
        return bool((a == b).all())
    if isinstance(a, bool) or isinstance(b, bool) or a is None or isinstance(a, (str, bytes)):
        return a == b or isinstance(a, (str, Path)) and isinstance(b, type(a)) and ("/" in str(a))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or a != a and b != b or abs(a - b) <= atol + rtol * abs(b)
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        return type(a) is type(b) and same(a.state_dict(), b.state_dict(), rtol, atol)
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping)
            and a.keys() == b.keys()
            and all(same(a[k], b[k], rtol, atol) for k in a)
        )
    if hasattr(a, "_fields") and "seconds" in a._fields:  # the clock never agrees
        return type(a) is type(b) and same(
            {k: v for k, v in a._asdict().items() if k != "seconds"},
            {k: v for k, v in b._asdict().items() if k != "seconds"},
            rtol,
            atol,
        )
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(same(x, y, rtol, atol) for x, y in zip(a, b))
        )
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name), rtol, atol) for f in dataclasses.fields(a)
        )
    return type(a) is type(b)


def tensors_in(x):
    "All tensors of a result, whatever it is made of"
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for v in x.values():
            yield from tensors_in(v)
    elif isinstance(x, (list, tuple)):
        for v in x:
            yield from tensors_in(v)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for f in dataclasses.fields(x):
            yield from tensors_in(getattr(x, f.name))
    elif isinstance(x, nn.Module):
        yield from x.state_dict().values()
    elif isinstance(x, float):
        yield torch.tensor(x)


# Values that somebody could mistake for the right one ---------------------------------------------


def hostile(value, rng):
    "A value of the kind of `value`, or near it, that may be wrong"
    if isinstance(value, Tensor):
        return rng.choice(_TENSORS)(value)
    if isinstance(value, nn.Module):
        return rng.choice(
            [
                None,
                type(value),
                nn.Identity(),
                nn.Sequential(),
                nn.Linear(3, 2),
                "model",
                [value],
                {},
                nn.Flatten(),
                value.state_dict(),
                nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            ]
        )
    if isinstance(value, bool):
        return rng.choice([None, 0, 1, 2, "yes", np.bool_(True), torch.tensor(True), [], not value])
    if isinstance(value, int):
        return rng.choice(
            [
                0,
                1,
                -1,
                2,
                3,
                5,
                7,
                2.5,
                float("nan"),
                float("inf"),
                True,
                None,
                str(value),
                "a",
                np.int64(value),
                np.int32(3),
                np.float32(2),
                torch.tensor(value),
                torch.tensor([1]),
                [value],
                (value, value),
                value + 1,
                value * 2,
                np.array([1, 2]),
                -(2**40),
            ]
        )
    if isinstance(value, float):
        return rng.choice(
            [
                0.0,
                -0.0,
                1.0,
                -1.0,
                0.5,
                2.0,
                float("nan"),
                float("inf"),
                -float("inf"),
                1e-30,
                1e30,
                True,
                None,
                "0.1",
                np.float32(value),
                np.float64(value),
                torch.tensor(value),
                torch.tensor([value]),
                [value],
                1,
                0,
                np.array([value]),
                (value, value),
                1j,
            ]
        )
    if isinstance(value, Path) or isinstance(value, str) and os.sep in value:
        path = Path(value)
        return rng.choice(
            [
                None,
                "",
                3,
                "missing/file",
                path.parent,
                str(path),
                path,
                "a\0b",
                b"bytes",
                ["x"],
                Path("."),
                path.with_suffix(".other"),
                "x" * 300,
            ]
        )
    if isinstance(value, str):
        return rng.choice(
            [
                "",
                "x",
                None,
                3,
                value.upper(),
                value + "x",
                b"bytes",
                [value],
                "$$",
                "é" * 5,
                ("a", "b"),
                2.5,
            ]
        )
    if isinstance(value, dict):
        return rng.choice(
            [
                {},
                None,
                [],
                3,
                "x",
                list(value.items()),
                {1: 2},
                {"x": None},
                dict(list(value.items())[:1]),
                {k: None for k in value},
            ]
        )
    if isinstance(value, (list, tuple)):
        first = value[0] if len(value) else 0
        return rng.choice(
            [
                [],
                (),
                None,
                3,
                "ab",
                [first],
                [*value, first],
                [None] * len(value),
                list(value)[:-1],
                [[first]],
                np.arange(3),
                torch.arange(3),
                {"a": 1},
                [first, "x"],
                [float("nan")] * len(value),
                iter(value),
            ]
        )
    if callable(value):
        return rng.choice(
            [
                None,
                3,
                "print",
                [],
                nn.Identity(),
                len,
                lambda *a, **k: None,
                lambda *a, **k: 1.0,
                lambda *a, **k: torch.zeros(2),
                lambda: 0,
            ]
        )
    return rng.choice([None, 3, "x", [], {}, torch.zeros(2), 2.5, object()])


def _with(x, place, value):
    x = x.detach().clone()
    if x.numel():
        x.view(-1)[place % x.numel()] = value
    return x


_TENSORS = [
    lambda x: x[:1] if x.ndim else x[None],
    lambda x: x[:0] if x.ndim else x[None][:0],
    lambda x: x[:-1] if x.ndim else x,
    lambda x: torch.cat([x, x]) if x.ndim else x,
    lambda x: x[None],
    lambda x: x[..., None],
    lambda x: x[0] if x.ndim and len(x) else x,
    lambda x: x.flatten(),
    lambda x: x.mT if x.ndim > 1 else x,
    lambda x: x[..., :-1] if x.ndim else x,
    lambda x: x.sum(),
    lambda x: x.float(),
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.bfloat16(),
    lambda x: x.long() if not x.is_complex() else x,
    lambda x: x.to(torch.int32),
    lambda x: x.to(torch.uint8),
    lambda x: x.to(torch.int8),
    lambda x: x.bool(),
    lambda x: x.to(torch.complex64),
    lambda x: x.detach().numpy() if x.dtype != torch.bfloat16 else x,
    lambda x: x.tolist(),
    lambda x: None,
    lambda x: "x",
    lambda x: 3,
    lambda x: 2.5,
    lambda x: {},
    lambda x: [x],
    lambda x: torch.zeros_like(x),
    lambda x: torch.ones_like(x),
    lambda x: -x if x.dtype != torch.bool else ~x,
    lambda x: x * 1000 if x.dtype != torch.bool else x,
    lambda x: x * 1e30 if x.is_floating_point() else x,
    lambda x: x * 1e-30 if x.is_floating_point() else x,
    lambda x: _with(x, 0, float("nan")) if x.is_floating_point() else _with(x, 0, 1),
    lambda x: _with(x, 1, float("inf")) if x.is_floating_point() else x,
    lambda x: _with(x, 2, -float("inf")) if x.is_floating_point() else x,
    lambda x: _with(x, 0, -1) if x.dtype not in (torch.bool, torch.uint8) else x,
    lambda x: _with(x, 0, 100) if x.dtype != torch.bool else x,
    lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else torch.full_like(x, 1),
    lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x,
    lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    lambda x: x.detach().numpy().astype(object) if x.dtype != torch.bfloat16 else x,
    lambda x: torch.zeros(0),
    lambda x: torch.zeros(3, 4),
    lambda x: torch.arange(3),
    lambda x: torch.tensor(1.0),
    lambda x: x.expand(2, *x.shape),
    lambda x: torch.stack([x, x], -1),
]


def spoiled(function, args, options, rng):
    """The same call with one argument, or now and then two,
    made hostile; which ones, for the message"""
    args, options = list(args), dict(options)
    places = [("", i) for i in range(len(args))] + [("k", k) for k in options]
    chosen = (
        rng.sample(places, k=min(len(places), 2 if rng.random() < 0.2 else 1)) if places else []
    )
    for kind, at in chosen:
        box = options if kind else args
        box[at] = hostile(box[at], rng)
    return args, options, [at for _, at in chosen]
