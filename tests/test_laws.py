"""Laws that hold for every public function: NumPy and small whole numbers give what plain ones
give, half precision is near float32, edges give a value or a sentence, gradients are finite
where values are, and nobody changes what was handed in."""

import copy
import importlib
import pkgutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foundation
from examples import EXAMPLES, SKIP, make
from laws import outcome, same, tensors_in

NAMES = sorted(EXAMPLES)
COARSE = {}  # name -> why half precision may differ by more than rounding
RANDOM = {  # name -> why another kind gives another result
    "core.checks.got": "it says what it was handed",
    "recipes.minilm_sentiment.text_costs": "it measures time",
    "recipes.vgg_pruned.recover": "it tells its seconds",
}
NO_GRADIENT = {  # name -> why its gradient is not asked for
    f"objectives.descent.{rule}_step": "a step of an optimizer, whose root has no slope at zero"
    for rule in ("adam", "adamw", "adafactor")
}
KEEPS_NAN = (
    {  # name -> why NaN or infinity may come out
        "objectives.likelihood.log_sum_exp": "says so: NaN stays NaN",
        "objectives.likelihood.log_softmax": "says so: NaN stays NaN",
        "evaluation.scores.reliability": "says so: empty bins hold NaN",
    }
    | {
        f"compression.distillation.{name}": (
            "part of a training step: the loop stops on NaN and knows the rate"
        )
        for name in ("match_logits", "match_hints", "match_teacher", "tap")
    }
    | {
        name: "what the network gives, which scores and probes refuse"
        for name in (
            "evaluation.scores.in_batches",
            "evaluation.scores.predict",
            "evaluation.probes.encode_all",
            "evaluation.probes.encode_stages",
        )
    }
)


def public():
    "All names that the modules of the package offer"
    for found in pkgutil.walk_packages(foundation.__path__, "foundation."):
        if not found.ispkg and not found.name.endswith("_modidx"):
            module = importlib.import_module(found.name)
            for name in getattr(module, "__all__", []):
                if getattr(getattr(module, name), "__module__", found.name) == found.name:
                    yield f"{found.name.removeprefix('foundation.')}.{name}"


def changed(options, test, change):
    "(place, arguments with that one changed) for each argument that passes the test"
    for key, value in options.items():
        if test(value):
            yield key, {**options, key: change(value)}


def run(name, change=None, pick=None):
    function, args, options = make(name)
    options = dict(enumerate(args)) | options
    if change:
        options = {k: change(v) if pick(v) else v for k, v in options.items()}
    return call(function, options)


def call(function, options):
    args = [v for k, v in options.items() if isinstance(k, int)]
    return outcome(function, args, {k: v for k, v in options.items() if isinstance(k, str)})


def tensor(v):
    return isinstance(v, Tensor)


def floats(v):
    return isinstance(v, Tensor) and v.is_floating_point()


def wholes(v):
    return isinstance(v, Tensor) and v.dtype == torch.int64


def number(v):
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def agrees(name, changes, pick, close=(1e-5, 1e-6)):
    """Every argument that is picked is changed alone, in each way:
    the result stays, or a sentence refuses it"""
    kind, whole = run(name)
    assert kind == "right", f"the example of {name} fails: {type(whole).__name__}: {whole}"
    places = [k for k, v in (dict(enumerate(make(name)[1])) | make(name)[2]).items() if pick(v)]
    for place in places:
        for change in changes:
            function, args, options = make(name)
            options = dict(enumerate(args)) | options
            try:
                options[place] = change(options[place])
            except (TypeError, OverflowError, ValueError):
                continue
            kind, result = call(function, options)
            what = (
                f"{name} with {place} as {type(options[place]).__name__}"
                f" {getattr(options[place], 'dtype', '')}"
            )
            assert kind in ("right", "refused"), f"{what}: {type(result).__name__}: {result}"
            if kind == "right" and name not in RANDOM:
                assert same(result, whole, *close), (
                    f"{what} gives another result without a word:\n{result}\n{whole}"
                )


def test_every_public_name_has_an_example_or_a_reason():
    missing = sorted(set(public()) - set(EXAMPLES) - set(SKIP))
    assert not missing, f"{len(missing)} names without an example: " + ", ".join(missing)


@pytest.mark.parametrize("name", NAMES)
def test_plain_numbers(name):
    agrees(name, [lambda v: np.array(v)[()], np.array, torch.tensor], number)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_numpy(name):
    agrees(name, [lambda t: t.detach().numpy()], tensor)


@pytest.mark.parametrize("name", NAMES)
def test_small_whole_numbers(name):
    small = [
        lambda t, d=d: t.to(d) if same(t, t.to(d)) else t
        for d in (torch.uint8, torch.int8, torch.int16, torch.int32)
    ]
    agrees(name, small, wholes)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    """All floats rounded to half precision:
    near what float32 makes of the same rounded numbers, or a sentence"""
    for half in (torch.bfloat16, torch.float16):
        kind, result = run(name, lambda v: v.detach().to(half), floats)
        exact, wanted = run(name, lambda v: v.detach().to(half).float(), floats)
        assert kind in ("right", "refused"), f"{name} in {half}: {type(result).__name__}: {result}"
        if kind == "right" and exact == "right" and name not in COARSE and name not in RANDOM:
            assert same(result, wanted, 3e-2, 3e-2), (
                f"{name} in {half} is far from float32:\n{result}\n{wanted}"
            )


# A forward pass hands NaN on, as every network does: a look would stall a GPU; `predict` and
# `train` say it
EDGES = {"0": 0.0, "-0": -0.0, "1e4": 1e4, "1e-8": 1e-8, "inf": torch.inf, "-inf": -torch.inf}


@pytest.mark.parametrize("name", NAMES)
def test_edges(name):
    "One entry, one row, or everything at an edge: no NaN out of what holds none, and no accident"

    def first(v, x):
        v = v.detach().clone()
        v.reshape(-1)[:1].fill_(x) if v.is_contiguous() else None
        return v

    def row(v, x):
        v = v.detach().clone()
        v[:1] = x
        return v

    ways = {
        f"{edge} in {where}": lambda v, f=f, x=x: f(v, x)
        for edge, x in EDGES.items()
        for where, f in {
            "one entry": first,
            "one row": row,
            "all": lambda v, x: torch.full_like(v, x),
        }.items()
    }
    places = [
        k
        for k, v in (dict(enumerate(make(name)[1])) | make(name)[2]).items()
        if floats(v) and v.numel() and v.ndim
    ]
    for place in places:
        for way, change in ways.items():
            function, args, options = make(name)
            options = dict(enumerate(args)) | options
            options[place] = change(options[place])
            kind, result = call(function, options)
            assert kind in (
                "right",
                "refused",
            ), f"{name}, {place} with {way}: {type(result).__name__}: {result}"
            if (
                kind == "right"
                and name not in KEEPS_NAN
                and not name.endswith((".forward", ".encode"))
            ):
                bad = any(t.is_floating_point() and t.isnan().any() for t in tensors_in(result))
                assert not bad, f"{name}, {place} with {way}: NaN without a word"


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Where a value is finite, so is each gradient: zeros,
    excluded entries, equal rows, a huge number"""
    if name in NO_GRADIENT:
        return

    def excluded(v):
        v = v.clone()
        v[..., -1] = -torch.inf
        return v

    def certain(v):
        return torch.zeros_like(v).index_fill(-1, torch.tensor([0]), 1)

    def huge(v):
        v = v.clone()
        v[..., 0] = 1e4
        return v

    ways = dict(
        as_it_is=lambda v: v,
        zeros=torch.zeros_like,
        excluded=excluded,
        certain=certain,
        huge=huge,
        equal_rows=lambda v: v[:1].expand_as(v).clone(),
        zero_row=lambda v: torch.cat([v[:1] * 0, v[1:]]),
        half=lambda v: v.bfloat16(),
    )
    places = [
        k
        for k, v in (dict(enumerate(make(name)[1])) | make(name)[2]).items()
        if floats(v) and v.numel() and v.ndim
    ]
    for place in places:
        for way, change in ways.items():
            function, args, options = make(name)
            options = dict(enumerate(args)) | options
            leaf = options[place] = change(options[place].detach()).requires_grad_()
            kind, result = call(function, options)
            assert kind in (
                "right",
                "refused",
            ), f"{name}, {place} {way}: {type(result).__name__}: {result}"
            out = [t for t in tensors_in(result) if t.requires_grad] if kind == "right" else []
            if not out or not all(t.isfinite().all() for t in out):
                continue
            (grad,) = torch.autograd.grad(
                sum(t.float().sum() for t in out), leaf, allow_unused=True
            )
            assert grad is None or grad.isfinite().all(), (
                f"{name}, {place} {way}: finite value, gradient {grad}"
            )
            assert grad is None or grad.abs().max() < 1e6, (
                f"{name}, {place} {way}: gradient of {grad.abs().max():.1e}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_in_stays_as_it_was(name):
    """Tensors, lists and dictionaries; and the global random generators
    of NumPy and Python stay where they are"""
    function, args, options = make(name)
    options = dict(enumerate(args)) | options
    before = {
        k: copy.deepcopy(v)
        for k, v in options.items()
        if isinstance(v, (Tensor, np.ndarray, list, dict))
        and not any(
            isinstance(x, nn.Module)
            for x in ([*v.values()] if isinstance(v, dict) else v if isinstance(v, list) else [])
        )
    }
    call(function, options)
    for k, v in before.items():
        assert same(options[k], v, 0, 0), f"{name} changed its argument {k}"
