"Fingerprints: equal things have equal ones in every process, and one bit makes another"

import os
import random
import subprocess
import sys
from functools import partial
from threading import Lock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from foundation.core.checks import checked
from foundation.core.fingerprint import fingerprint


def tied_net(tied=True):
    "An embedding and an output layer that may share their weights"
    net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
    if tied:
        net[1].weight = net[0].weight
    return net


THINGS = """
import numpy as np, torch
from functools import partial
from pathlib import Path
from torch import nn
from foundation.data.augment import Augment
from foundation.data.batches import join
from foundation.core.fingerprint import fingerprint
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.BatchNorm1d(4), nn.LSTM(4, 3))
def local(a, b=2): return a + b * FACTOR
FACTOR = 3
class Own(nn.Module):
    def forward(self, x): return x + 1
things = dict(
    tensor=torch.arange(6.).view(2, 3), half=torch.ones(3).bfloat16(), array=np.arange(4),
    text=np.array(["a", "bc"]), dates=np.array(["2020-01-01"], "datetime64[D]"),
    record=np.zeros(2, [("a", "i4"), ("b", "f8")]), objects=np.array([1, "a"], object), net=net,
    own=Own(), function=local, lam=lambda x: x + 1, part=partial(local, 1),
    augment=Augment(), documents=join([[1, 2], [3]]), path=Path("a"),
    numbers=[1, 1.0, True, None, -0.0, float("nan"), 2 + 3j],
    words={"a": {1, "b", (2, 3)}, "c": b"x"},
    kind=torch.float32, rng=np.random.default_rng(0), luck=torch.Generator().manual_seed(1),
    method=Augment().__call__, builtin=torch.relu, cls=nn.Linear)
print({name: fingerprint(thing) for name, thing in things.items()})
"""


def test_fingerprints_are_the_same_in_another_process_and_differ_from_each_other():
    env = dict(os.environ, PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    job = subprocess.run([sys.executable, "-c", THINGS], capture_output=True, text=True, env=env)
    assert job.returncode == 0, job.stderr[-1000:]
    seen, here = eval(job.stdout), {"__name__": "__main__"}
    exec(THINGS.replace("\nprint(", "\nseen = ("), here)
    assert (
        seen == here["seen"]
        and len(set(seen.values())) == len(seen)
        and all(len(v) == 20 for v in seen.values())
    )


@given(
    st.data(),
    st.sampled_from(
        ["float32", "float64", "float16", "int64", "int8", "uint8", "bool", "complex64"]
    ),
    st.lists(st.integers(1, 4), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_one_bit_one_place_one_kind_or_one_axis_more_is_another_fingerprint(data, kind, shape):
    x = torch.from_numpy(np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(kind))
    same = [
        x.clone(),
        x.numpy(),
        x.numpy().astype(x.numpy().dtype.newbyteorder()),
        nn.Parameter(x) if x.is_floating_point() else x,
        x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x,
    ]
    assert {fingerprint(s) for s in same} == {fingerprint(x)}
    flipped = x.flatten().clone()
    place = data.draw(st.integers(0, max(flipped.view(torch.uint8).numel() - 1, 0)))
    flipped.view(torch.uint8)[place] ^= 1
    other = [
        flipped.view(x.shape),
        x[None],
        x.to(torch.float64 if kind != "float64" else torch.float32),
        torch.cat([x.reshape(-1), x.reshape(-1)]),
        [x],
        {0: x},
        (x, x),
    ]
    assert fingerprint(x) not in {fingerprint(o) for o in other}


def test_settings_of_networks_functions_and_objects_count():
    def changed(
        change, make=lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.BatchNorm1d(4))
    ):
        torch.manual_seed(0)
        net = make()
        change(net)
        return fingerprint(net)

    changes = [
        lambda n: None,
        lambda n: setattr(n[1], "p", 0.2),
        lambda n: n[2].running_mean.add_(1),
        lambda n: n[0].weight.data.mul_(-1),
        lambda n: setattr(n[2], "eps", 1e-3),
        lambda n: n[0].register_buffer("more", torch.ones(1), persistent=False),
        lambda n: n.append(nn.ReLU()),
        lambda n: n.append(nn.Tanh()),
    ]
    assert len({changed(c) for c in changes}) == len(changes)
    assert (
        changed(lambda n: n.eval())
        == changed(lambda n: n.requires_grad_(False))
        == changed(lambda n: None)
    )
    tied, free = tied_net(), tied_net(tied=False)
    free.load_state_dict(tied.state_dict())
    assert fingerprint(tied) != fingerprint(free)

    def plus(a):
        return lambda x: x + a

    marks = [
        plus(1),
        plus(2),
        lambda x: x + 1,
        lambda x: x - 1,
        lambda x, y=1: x,
        lambda x, y=2: x,
        len,
        max,
        nn.Linear,
        nn.Conv2d,
        torch.relu,
        torch.tanh,
    ]
    assert len({fingerprint(m) for m in marks}) == len(marks) and fingerprint(
        plus(1)
    ) == fingerprint(plus(1))
    assert fingerprint(random.Random(0)) != fingerprint(random.Random(1)) and fingerprint(
        1, 2
    ) != fingerprint(2, 1) != fingerprint([2, 1])
    assert (
        fingerprint({"a": 1, "b": 2})
        == fingerprint({"b": 2, "a": 1})
        != fingerprint({"a": 2, "b": 1})
    )
    assert (
        fingerprint(0.0) != fingerprint(-0.0)
        and fingerprint(1) != fingerprint(1.0) != fingerprint(True)
        and fingerprint(np.float32(0.5)) == fingerprint(0.5)
    )
    assert fingerprint("a", "b") != fingerprint("ab", "") != fingerprint(["ab", ""])
    loop = []
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


@pytest.mark.parametrize(
    "make",
    [
        object,
        lambda: iter([1]),
        lambda: (i for i in [1]),
        lambda: open(os.devnull),
        Lock,
        lambda: zip([1]),
        lambda: torch.zeros(2, device="meta"),
        lambda: [1, {"a": object()}],
    ],
)
def test_what_cannot_be_told_apart_is_refused(make):
    with pytest.raises(TypeError, match="cannot be told from another one"):
        fingerprint(make())


def test_fingerprints_of_deep_nests_end_in_a_sentence():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TypeError, match="nested too deeply"):
        fingerprint(deep)
    while deep:
        deep = deep[0]  # taken apart slowly: Python's own clean-up is recursive as well


def test_what_checking_adds_and_what_is_kept_to_save_time_do_not_count():
    def plain(x: int, more: int = 2):
        return x + more

    assert fingerprint(checked(plain)) == fingerprint(checked(plain)) == fingerprint(plain)
    net, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(net.state_dict())
    for each in (net, other):
        prune.l1_unstructured(each, "weight", 0.5)
        with torch.no_grad():
            each.weight_orig.mul_(2)
    net(torch.ones(1, 4))  # computes its weight anew, the other one has an old one
    assert not torch.equal(net.weight, other.weight)
    assert fingerprint(net) == fingerprint(other)
    net.lock = Lock()
    assert fingerprint(net) == fingerprint(other)
    net.lock = 3
    assert fingerprint(net) != fingerprint(other)


def test_methods_partials_and_builtins_are_told_by_owner_and_arguments():
    import cmath
    import math

    marks = [
        *(partial(max, 1), partial(max, 2), partial(min, 1), partial(max, key=len)),
        *(math.sqrt, cmath.sqrt, [1].append, [2].append, "a".join, "b".join),
        *(random.Random(0).random, random.Random(1).random, nn.Linear.forward, nn.Conv2d.forward),
    ]
    assert len({fingerprint(mark) for mark in marks}) == len(marks)
    assert fingerprint(partial(max, 1)) == fingerprint(partial(max, 1))


def holds(net, scale=1):
    return lambda x: scale * net(x).sum()


@pytest.mark.parametrize(
    "put", [lambda f, net: f, lambda f, net: partial(f), lambda f, net: [f, net]]
)
def test_without_a_network_its_state_does_not_count_and_all_else_does(put):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def mark(scale=1, inner=net, **options):
        return fingerprint(put(holds(inner, scale), net), **options)

    whole, rest = mark(), mark(without=net)
    net(torch.randn(5, 2))  # moves the running mean
    assert mark() != whole and mark(without=net) == rest
    nn.init.ones_(net[0].weight)
    assert mark(without=net) == rest != mark(scale=2, without=net)
    assert mark(inner=other, without=net) != rest and mark(without=other) != mark(without=net)
    with pytest.raises(TypeError, match="without is 3; expected a network"):
        fingerprint(1, without=3)
