"""A run that is killed at any moment and resumed ends in the same bytes,
and whatever lies there in the end can be told."""

import json
import os
import random
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from foundation.core.basics import seed_everything
from foundation.data.batches import endless
from foundation.training import checkpoint
from foundation.training.checkpoint import (
    _encode,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    sole_writer,
)
from foundation.training.state import BadCheckpoint, restore, snapshot
from foundation.training.loop import classify, train
from foundation.training.parameter_groups import adamw
from foundation.training.run import resumable

# Killed -------------------------------------------------------------------------------------------

RUNS = """
import os, random, signal, sys
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import torch
from torch import nn
from foundation.core.basics import seed_everything
from foundation.data.batches import endless
from foundation.training import checkpoint
from foundation.training.loop import classify, train
from foundation.training.parameter_groups import adamw

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def learn(path, each=lambda n: None):
    seed_everything(0)
    x = torch.randn(96, 8)
    y = x[:, :3].argmax(1)
    layers = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)
    net = nn.Sequential(*layers)
    opt = adamw(net, 1e-2)

    def noisy(model, batch):
        "An objective that draws from every generator there is"
        shift = torch.tensor(random.random() + np.random.randn())
        return classify(model, (batch[0] + 0.01 * shift.float(), batch[1]))

    start, notes = checkpoint.load_checkpoint(path, net, opt)
    losses = notes.get("losses", [])
    batches = endless(x, y, batch_size=16, start=start)
    for step in train(net, batches, noisy, opt, steps=9, start=start):
        losses.append(float(step.loss))
        each(step.n)
        checkpoint.save_checkpoint(path, net, opt, step.n + 1, dict(losses=losses))


def child(*args, before=lambda: None):
    "Learn in a process of its own; how it ended"
    pid = os.fork()
    if pid == 0:
        try:
            before()
            learn(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def count_operations(limit=None):
    "Count what touches files of the folder; die before number `limit`"
    seen = [0]

    def hook(event, args):
        events = "open", "os.rename", "os.chmod", "os.remove", "os.truncate"
        if event in events and str(folder) in str(args[0]):
            if seen[0] == limit:
                die()
            seen[0] += 1

    sys.addaudithook(hook)
    return seen


def half_written(number):
    "Die when half of the bytes of save number `number` are written"
    whole, calls = checkpoint.atomic_write, iter(range(1000))

    @contextmanager
    def write(path):
        with whole(path) as file:
            class Half:
                def write(self, data):
                    if next(calls) == number:
                        file.write(data[: len(data) // 2])
                        file.flush()
                        die()
                    file.write(data)
            yield Half()

    checkpoint.atomic_write = write


def killed_and_resumed(name, *args, before=lambda: None):
    path = folder / name
    assert child(path, *args, before=before) == signal.SIGKILL, f"{name}: not killed"
    assert child(path) == 0, f"{name}: not resumed"
    return path.read_bytes()


learn(folder / "warm")  # so that no child has to import what PyTorch imports late
assert child(folder / "straight") == 0
want = (folder / "straight").read_bytes()
for step in range(9):
    got = killed_and_resumed(f"step-{step}", lambda n: die() if n == step else None)
    assert got == want, f"killed at step {step}"
for number in (0, 1, 4, 8):
    got = killed_and_resumed(f"half-{number}", before=lambda: half_written(number))
    assert got == want, f"killed in the midst of write {number}"
reader, writer = os.pipe()
if os.fork() == 0:
    seen = count_operations()
    learn(folder / "count")
    os.write(writer, str(seen[0]).encode())
    os._exit(0)
total = int(os.read(reader, 100))
assert total > 9 * 4, total
for number in [*range(8), *range(8, total, 5)]:
    got = killed_and_resumed(f"operation-{number}", before=lambda: count_operations(number))
    assert got == want, f"killed before operation {number}"
rest = [p for p in folder.iterdir() if p.name.startswith(".half-0.")]
assert not rest, "the rest of a killed write is still there"
print("all", 9 + 4 + total // 5 + 8)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
def test_killed_at_any_step_and_in_any_write_it_ends_in_the_same_bytes(tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    job = subprocess.run(
        [sys.executable, "-c", RUNS, tmp_path], capture_output=True, text=True, env=env, timeout=300
    )
    assert job.returncode == 0, job.stderr[-2000:]
    assert job.stdout.startswith("all")


# Parts of the state -------------------------------------------------------------------------------


def fresh(seed=0, kind=adamw, **options):
    seed_everything(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return net, kind(net, 1e-2) if kind is adamw else kind(net.parameters(), lr=1e-2, **options)


def go(net, opt, start, steps=12, stop=None):
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    for step in train(
        net,
        endless(x, x[:, :3].argmax(1), batch_size=10, start=start),
        classify,
        opt,
        steps=steps,
        start=start,
    ):
        if step.n + 1 == stop:
            break
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    "kind, options",
    [
        (adamw, {}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
        (torch.optim.Adam, dict(amsgrad=True)),
        (torch.optim.RMSprop, dict(centered=True, momentum=0.5)),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Rprop, {}),
    ],
)
@pytest.mark.parametrize("at", [1, 5])
def test_every_optimizer_goes_on_to_the_last_bit(tmp_path, kind, options, at):
    straight = go(*fresh(0, kind, **options), 0)
    net, opt = fresh(0, kind, **options)
    go(net, opt, 0, stop=at)
    save_checkpoint(tmp_path / "run", net, opt, at, dict(seconds=1.5))
    net, opt = fresh(1, kind, **options)
    assert load_checkpoint(tmp_path / "run", net, opt) == (at, dict(seconds=1.5))
    assert torch.equal(go(net, opt, at), straight)


@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(0, 7))
@settings(max_examples=20, deadline=None)
def test_all_random_states_come_back(tmp_path_factory, seed, draws):
    path, (net, opt) = tmp_path_factory.mktemp("c") / "run", fresh()
    seed_everything(seed)

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.randn(3).tolist(),
        )

    for _ in range(draws):  # an odd number leaves a Gaussian in store
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    save_checkpoint(path, net, opt, 1)
    want = draw()
    seed_everything(0)
    load_checkpoint(path, net, opt)
    assert draw() == want


def test_gpu_states_are_kept_where_there_are_gpus(tmp_path, monkeypatch):
    "No GPU is needed: the calls are watched"
    states, put = [torch.arange(16, dtype=torch.uint8), torch.full((16,), 7, dtype=torch.uint8)], {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    net, opt = fresh(kind=torch.optim.SGD)
    save_checkpoint(tmp_path / "run", net, opt, 1)
    assert (
        load_checkpoint(tmp_path / "run", net, opt)[0] == 1
    )  # on a machine without any it is passed over
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one fewer than there was
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: put.update({device: state})
    )
    load_checkpoint(tmp_path / "run", net, opt)
    assert list(put) == [0] and torch.equal(put[0], states[0])


def test_numbers_of_every_kind_come_back(tmp_path):
    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2).t())  # not in order in memory
            for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool):
                self.register_buffer(
                    f"as_{kind}"[-6:].replace(".", "_"), torch.tensor([0, 1, 1]).to(kind)
                )
            self.register_buffer("empty", torch.empty(0, 4))
            self.register_buffer("single", torch.tensor(-float("inf")))

    a, b = Kinds(), Kinds()
    save_checkpoint(tmp_path / "run", a, torch.optim.SGD(a.parameters(), lr=1), 3)
    load_checkpoint(tmp_path / "run", b, torch.optim.SGD(b.parameters(), lr=1))
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("fused", [True, False])
def test_moments_come_back_in_the_layout_of_the_weights(tmp_path, fused):
    "In another layout a fused optimizer silently gives each weight the moments of another one"

    def make():
        torch.manual_seed(0)
        net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)

    def steps(net, opt):
        for i in range(3):
            opt.zero_grad()
            net(torch.ones(2, 3, 5, 5) * (1 + torch.arange(5))).square().mean().backward()
            opt.step()
        return net.weight.detach().clone()

    net, opt = make()
    steps(net, opt)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    want = steps(net, opt)
    net, opt = make()
    load_checkpoint(tmp_path / "run", net, opt)
    assert opt.state[net.weight]["exp_avg"].stride() == net.weight.stride()
    assert torch.equal(steps(net, opt), want)


DATA = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))

# By name ------------------------------------------------------------------------------------------


class Two(nn.Module):
    "Two layers of one shape, or of two; which is made first is the only difference"

    def __init__(self, turned=False, k=8, h=None):
        super().__init__()
        makers = dict(first=lambda: nn.Linear(6, k), second=lambda: nn.Linear(k, h or k))
        for name in sorted(makers, reverse=turned):
            setattr(self, name, makers[name]())

    def forward(self, x):
        return self.second(self.first(x).relu())


def same_weights(net):
    "Weights that depend on the names alone"
    for name, p in net.named_parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name) + p.numel()), std=0.3)
    return net


def moments(net, opt):
    return {
        name: {k: v.clone() for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
        for name, p in net.named_parameters()
    }


KINDS = [
    ("AdamW", dict(fused=True)),
    ("AdamW", dict(foreach=True)),
    ("SGD", dict(momentum=0.9)),
    ("Adam", dict(amsgrad=True)),
    ("RMSprop", dict(centered=True, momentum=0.5)),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Rprop", {}),
    ("ASGD", {}),
    ("Adafactor", {}),
]


@pytest.mark.parametrize("kind, options", KINDS)
@pytest.mark.parametrize("h", [8, 32])
@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
def test_each_moment_goes_to_the_weight_of_its_name_whatever_the_order(
    tmp_path, kind, options, h, kept_in
):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(kept_in)
    y = torch.arange(40) % 8

    def make(turned):
        return same_weights(Two(turned, h=h).to(kept_in))

    def build(net, back=False):
        return getattr(torch.optim, kind)(
            [*net.parameters()][:: -1 if back else 1], lr=0.01, **options
        )

    def run(net, opt, start, stop):
        batches = endless(x, y, batch_size=10, start=start)
        return [
            float(step.loss) for step in train(net, batches, classify, opt, steps=stop, start=start)
        ]

    net = make(False)
    opt = build(net)
    straight = run(net, opt, 0, 6)
    net = make(False)
    opt = build(net)
    run(net, opt, 0, 3)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    want = moments(net, opt)
    for turned, back in ((True, False), (False, True), (True, True)):
        net = make(turned)
        opt = build(net, back)
        assert load_checkpoint(tmp_path / "run", net, opt)[0] == 3
        for name, values in moments(net, opt).items():
            assert values.keys() == want[name].keys()
            assert all(
                torch.equal(v, want[name][k]) and v.dtype == want[name][k].dtype
                for k, v in values.items()
            ), name
        assert run(net, opt, 3, 6) == straight[3:]


class Careful(torch.optim.Optimizer):
    "One of somebody else: float32 for weights in bfloat16, a number, sums of another shape"

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(slow=p.float(), rows=torch.zeros(p.shape[0]), count=0, first=True)
                state["slow"] -= group["lr"] * p.grad.float()
                state["rows"] += p.grad.float().reshape(p.shape[0], -1).sum(1)
                state["count"] += 1
                p.copy_(state["slow"])


def test_an_optimizer_of_somebody_else_goes_on_with_moments_of_any_kind(tmp_path):
    def make():
        net = same_weights(Two().bfloat16())
        return net, Careful(net.parameters(), lr=0.01)

    def run(net, opt, start, stop):
        for step in train(
            net,
            [(DATA.bfloat16(), DATA[:, :3].argmax(1))] * 9,
            classify,
            opt,
            steps=stop,
            start=start,
        ):
            pass
        return [
            v
            for values in opt.state.values()
            for v in (values["slow"], values["rows"], torch.tensor(values["count"]))
        ]

    whole = run(*make(), 0, 6)
    net, opt = make()
    run(net, opt, 0, 3)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    net, opt = make()
    load_checkpoint(tmp_path / "run", net, opt)
    assert {v.dtype for values in opt.state.values() for v in (values["slow"], values["rows"])} == {
        torch.float32
    }
    assert all(map(torch.equal, run(net, opt, 3, 6), whole))


def two_groups(net, order=(0, 1), move=()):
    "Weights and biases with settings of their own"
    groups = [
        dict(
            params=[p for n, p in net.named_parameters() if ("bias" in n) == bool(g) ^ (n in move)],
            lr=0.1 * (g + 1),
            weight_decay=g,
        )
        for g in (0, 1)
    ]
    return torch.optim.AdamW([groups[i] for i in order])


def test_settings_follow_their_group_and_a_weight_in_another_group_is_refused(tmp_path):
    net = Two()
    save_checkpoint(tmp_path / "run", net, two_groups(net), 1)
    opt = two_groups(net, order=(1, 0))
    load_checkpoint(tmp_path / "run", net, opt)
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(0.2, 1), (0.1, 0)]
    with pytest.raises(BadCheckpoint, match="run is of another optimizer: AdamW of .*"):
        load_checkpoint(tmp_path / "run", net, two_groups(net, move=("first.bias",)))
    with pytest.raises(
        BadCheckpoint,
        match="(first.bias|second.weight) is in another group|of another optimizer",
    ):
        load_checkpoint(
            tmp_path / "run", net, two_groups(net, move=("first.bias", "second.weight"))
        )


@pytest.mark.parametrize(
    "spoil", [lambda v: v[:1], lambda v: v.flatten(), lambda v: v.double(), lambda v: v.half()]
)
def test_a_moment_that_is_not_as_its_weight_is_refused(tmp_path, spoil):
    "However it came into the file: a fused optimizer would write beyond the end"
    net = Two()
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    go_on(net, opt)
    tensors, about = snapshot(net, opt)
    tensors["opt.first.weight.exp_avg"] = spoil(tensors["opt.first.weight.exp_avg"]).contiguous()
    (tmp_path / "run").write_bytes(_encode(tensors, about | dict(step=1, notes={})))
    before = everything(net, opt)
    with pytest.raises(
        BadCheckpoint,
        match="run cannot be used: exp_avg of first.weight is .*, and the weight is a tensor of",
    ):
        load_checkpoint(tmp_path / "run", net, opt)
    after = everything(net, opt)
    assert all(map(torch.equal, before[0], after[0])) and before[1:2] == after[1:2]


def go_on(net, opt, n=3):
    for _ in range(n):
        opt.zero_grad()
        net(torch.ones(4, 6)).square().mean().backward()
        opt.step()


@pytest.mark.parametrize(
    "change",
    [
        dict(rng=torch.zeros(3, dtype=torch.uint8)),
        dict(python=[3, [1, 2], None]),
        dict(python=None),
        dict(numpy=["MT19937", [1], 0, 0, 0.0]),
    ],
)
def test_random_states_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path, change):
    net, opt = fresh()
    tensors, about = snapshot(net, opt)
    if "rng" in change:
        tensors["rng.cpu"] = change["rng"]
    about["random"] |= {k: v for k, v in change.items() if k != "rng"}
    (tmp_path / "run").write_bytes(_encode(tensors, about | dict(step=1, notes={})))
    net, opt = fresh(1)
    before = everything(net, opt)
    with pytest.raises(BadCheckpoint, match="run cannot be used: its random states do not fit"):
        load_checkpoint(tmp_path / "run", net, opt)
    after = everything(net, opt)
    assert all(map(torch.equal, before[0], after[0])) and torch.equal(before[2], after[2])


def test_a_parameter_outside_the_model_is_refused_by_files_and_kept_by_snapshots(tmp_path):
    net, outside = Two(), nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([*net.parameters(), outside], lr=0.1, momentum=0.9)
    with pytest.raises(
        ValueError,
        match=r"trains parameter 4 of group 0, outside the model, shape \(4,\); a checkpoint finds",
    ):
        save_checkpoint(tmp_path / "run", net, opt, 1)
    with pytest.raises(
        ValueError, match="no parameter of this model; expected the optimizer that was made for it"
    ):
        save_checkpoint(tmp_path / "run", Two(), opt, 1)
    assert not list(tmp_path.iterdir())
    state = snapshot(net, opt)
    outside.grad = torch.ones(4)
    opt.step()
    restore(state, net, opt)
    assert (
        torch.equal(outside, torch.ones(4))
        and not opt.state[outside].get("momentum_buffer", torch.zeros(1)).any()
    )


def test_a_checkpoint_by_place_is_refused(tmp_path):
    "As an earlier version wrote it"
    import hashlib

    from safetensors.torch import save

    net, opt = fresh()
    go(net, opt, 0, stop=2)
    tensors = {f"model.{k}": v for k, v in net.state_dict().items()} | {
        "rng.cpu": torch.get_rng_state()
    }
    tensors |= {
        f"opt.{i}.{k}": v
        for i, values in opt.state_dict()["state"].items()
        for k, v in values.items()
    }
    text = json.dumps(
        dict(
            optimizer="AdamW",
            groups=opt.state_dict()["param_groups"],
            scalars={},
            random={},
            step=2,
            notes={},
        )
    )
    h = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.flatten().view(torch.uint8).numpy())
    (tmp_path / "run").write_bytes(save(tensors, dict(checkpoint=f"{h.hexdigest()} {text}")))
    with pytest.raises(
        BadCheckpoint,
        match="run: written by an earlier version, which kept .* by place.*delete it to start anew",
    ):
        load_checkpoint(tmp_path / "run", *fresh())


# What the state dict does not show ----------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("n", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.n += 1
        return x * self.w + self.n


def count_on(net, opt, start, stop):
    one = torch.ones(1)
    for step in train(
        net, [one] * 9, lambda m, x: ((m(x) - 2).square().sum(), {}), opt, steps=stop, start=start
    ):
        pass
    return net.w.item(), net.n.item()


def test_buffers_outside_the_state_dict_go_on(tmp_path):
    def make():
        return (net := Counts(), torch.optim.SGD(net.parameters(), lr=0.05))

    whole = count_on(*make(), 0, 6)
    net, opt = make()
    count_on(net, opt, 0, 3)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    net, opt = make()
    load_checkpoint(tmp_path / "run", net, opt)
    assert count_on(net, opt, 3, 6) == whole
    state, before = snapshot(net, opt), (net.w.item(), net.n.item())
    count_on(net, opt, 0, 3)
    restore(state, net, opt)
    assert (net.w.item(), net.n.item()) == before


class Tied(nn.Module):
    def __init__(self, tied=True, late=False):
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.again = self.middle = nn.Linear(5, 5)  # used twice
        if tied:
            self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.again(self.middle(self.words(x)).relu()))


def read_on(net, opt, start, stop):
    tokens = torch.arange(56).view(8, 7) % 7
    for step in train(
        net,
        [tokens] * 9,
        lambda m, t: (nn.functional.cross_entropy(m(t).flatten(0, 1), t.roll(1, 1).flatten()), {}),
        opt,
        steps=stop,
        start=start,
    ):
        pass
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_tied_and_twice_used_weights_are_held_once_and_stay_tied(tmp_path):
    def make(seed=0, **options):
        torch.manual_seed(seed)
        net = Tied(**options)
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    whole = read_on(*make(), 0, 6)
    net, opt = make()
    read_on(net, opt, 0, 3)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    held = read_checkpoint(tmp_path / "run")
    assert {k for k in held.tensors if k.startswith("model.")} == {
        f"model.{k}" for k, _ in net.named_parameters()
    }
    assert held.about["shared"] == {
        "out.weight": "words.weight",
        "middle.weight": "again.weight",
        "middle.bias": "again.bias",
    }
    net, opt = make(seed=1)
    load_checkpoint(tmp_path / "run", net, opt)
    assert net.out.weight is net.words.weight and torch.equal(read_on(net, opt, 3, 6), whole)
    with pytest.raises(
        BadCheckpoint, match="another model: out.weight is the same as words.weight there and"
    ):
        load_checkpoint(tmp_path / "run", *make(tied=False))
    save_checkpoint(tmp_path / "free", *make(tied=False), 1)
    with pytest.raises(BadCheckpoint, match="and the same as words.weight here"):
        load_checkpoint(tmp_path / "free", *make())


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))


def pruned():
    net = nn.Linear(6, 3)
    prune.l1_unstructured(net, "weight", 0.5)
    return net


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))


@pytest.mark.parametrize(
    "layer", [weight_normed, pruned, spectral, lambda: nn.utils.weight_norm(nn.Linear(6, 3))]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_parametrized_layers_go_on_to_the_last_bit(tmp_path, layer):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(layer())
        return net, torch.optim.AdamW(net.parameters(), lr=0.05)

    def run(net, opt, start, stop):
        x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
        for step in train(
            net, [(x, torch.arange(30) % 3)] * 9, classify, opt, steps=stop, start=start
        ):
            pass
        return [v.clone() for v in net.state_dict().values()]

    whole = run(*make(), 0, 6)
    net, opt = make()
    run(net, opt, 0, 3)
    save_checkpoint(tmp_path / "run", net, opt, 3)
    net, opt = make()
    load_checkpoint(tmp_path / "run", net, opt)
    assert all(map(torch.equal, run(net, opt, 3, 6), whole))


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))]
)
@pytest.mark.parametrize("part", [False, True])
def test_a_wrapped_model_and_a_plain_one_read_each_others_files(tmp_path, wrap, part):
    def make(wrapped, seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        if wrapped and part:
            net[2] = torch.compile(net[2])
        net = wrap(net) if wrapped else net
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    for there, here in ((True, False), (False, True)):
        net, opt = make(there, 0)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        save_checkpoint(tmp_path / f"run{there}", net, opt, 1)
        other, its = make(here, 1)
        load_checkpoint(tmp_path / f"run{there}", other, its)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(
                opt.state[p]["momentum_buffer"], its.state[q]["momentum_buffer"]
            )


def test_what_is_no_plain_tensor_is_refused(tmp_path):
    net = nn.Linear(2, 2)
    net.register_buffer("few", torch.eye(3).to_sparse())
    with pytest.raises(
        TypeError,
        match="few is a tensor without contents, or of another kind; expected a plain tensor",
    ):
        save_checkpoint(tmp_path / "run", net, torch.optim.SGD(net.parameters(), lr=1), 1)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            pass

    net = Extra(2, 2)
    with pytest.raises(TypeError, match="_extra_state is a dict; expected a plain tensor"):
        save_checkpoint(tmp_path / "run", net, torch.optim.SGD(net.parameters(), lr=1), 1)
    assert not list(tmp_path.iterdir())


def test_snapshots_are_copies_and_say_what_does_not_fit():
    net, opt = fresh()
    go(net, opt, 0, stop=2)
    state, draw = snapshot(net, opt), torch.rand(3)
    kept = {k: v.clone() for k, v in state.tensors.items()}
    before = everything(net, opt)
    torch.rand(5)
    go(net, opt, 0, stop=5)
    assert all(torch.equal(v, kept[k]) for k, v in state.tensors.items())
    restore(state, net, opt)
    assert torch.equal(torch.rand(3), draw)
    restore(state, net, opt)
    after = everything(net, opt)
    assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1]
    with pytest.raises(BadCheckpoint, match="the snapshot is of another model"):
        restore(state, Two(), opt)


# Damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Steps 10 and 20 of a run"
    path, (net, opt) = tmp_path_factory.mktemp("two") / "run", fresh()
    go(net, opt, 0)
    for step in (10, 20):
        save_checkpoint(path, net, opt, step)
    return path, path.read_bytes()


def everything(net, opt):
    return (
        [v.clone() for v in net.state_dict().values()],
        json.dumps(opt.state_dict(), default=str),
        torch.get_rng_state(),
    )


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:.*Going on from")
def test_one_wrong_bit_or_a_cut_anywhere_is_noticed(two, place, bit, cut):
    path, data = two
    hurt = bytearray(data)
    if cut:
        hurt = hurt[: int(place * len(data))]
    else:
        hurt[int(place * len(data))] ^= 1 << bit
    path.write_bytes(hurt)
    assert load_checkpoint(path, *fresh())[0] == 10


def test_the_older_one_is_announced(two):
    path, data = two
    path.write_bytes(data[:-1])
    with pytest.warns(UserWarning, match=r"run: .*Going on from run.old, step 10"):
        load_checkpoint(path, *fresh())
    path.unlink()
    assert (
        load_checkpoint(path, *fresh())[0] == 10
    )  # nothing was damaged: killed between two renames by an earlier version


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04", json.dumps({"a": 1}).encode()]
)
def test_no_file_at_all_is_usable_and_nothing_is_changed(tmp_path, data):
    for name in ("run", "run.old", "run.new"):
        (tmp_path / name).write_bytes(data)
    net, opt = fresh()
    before = everything(net, opt)
    with pytest.raises(
        BadCheckpoint,
        match="no checkpoint at run can be used .*run.new: .*run: .*run.old: .*delete",
    ):
        load_checkpoint(tmp_path / "run", net, opt)
    after = everything(net, opt)
    assert (
        all(map(torch.equal, before[0], after[0]))
        and before[1] == after[1]
        and torch.equal(before[2], after[2])
    )


def test_weights_alone_are_no_checkpoint(tmp_path):
    net, opt = fresh()
    save_file(net.state_dict(), tmp_path / "run")
    with pytest.raises(BadCheckpoint, match="a safetensors file, but not a checkpoint"):
        load_checkpoint(tmp_path / "run", net, opt)


@pytest.mark.parametrize(
    "other, words",
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3)),
            r"0.bias is \(8,\) torch.float32 there and \(9,\)",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), "3.bias is .* there and missing here"),
        (lambda: fresh()[0].double(), "torch.float32 there and .*torch.float64 here"),
    ],
)
def test_another_model_is_refused_and_left_alone(two, tmp_path, other, words):
    (tmp_path / "run").write_bytes(two[1])
    net = other()
    before = [v.clone() for v in net.state_dict().values()]
    with pytest.raises(BadCheckpoint, match=words):
        load_checkpoint(tmp_path / "run", net, adamw(net, 1e-2))
    assert all(map(torch.equal, before, net.state_dict().values()))


@pytest.mark.parametrize(
    "make",
    [
        lambda net: torch.optim.SGD(net.parameters(), lr=1),
        lambda net: torch.optim.AdamW(net.parameters()),
    ],
)
def test_another_optimizer_is_refused(two, tmp_path, make):
    (tmp_path / "run").write_bytes(two[1])
    net = fresh()[0]
    before = [v.clone() for v in net.state_dict().values()]
    with pytest.raises(BadCheckpoint, match="run is of another optimizer: AdamW of .* there"):
        load_checkpoint(tmp_path / "run", net, make(net))
    assert all(map(torch.equal, before, net.state_dict().values()))


class Unplugged(BaseException):
    pass


@pytest.mark.parametrize("number", range(4))
@pytest.mark.filterwarnings("ignore:.*Going on from")
def test_a_damaged_file_never_pushes_the_good_one_out(tmp_path, number):
    "Damage, then a save that is cut short, twice"
    path, (net, opt) = tmp_path / "run", fresh()
    for step in (1, 2):
        save_checkpoint(path, net, opt, step)
    path.write_bytes(b"damaged")
    for step in (3, 4):
        left, rename = iter(range(number)), os.replace

        def replace(a, b):
            if next(left, None) is None:
                raise Unplugged
            rename(a, b)

        with patch("os.replace", replace), suppress(Unplugged):
            save_checkpoint(path, net, opt, step)
        assert load_checkpoint(path, net, opt)[0] == (1 if number == 0 else step)


# Which run it is ----------------------------------------------------------------------------------


def stop_at(n):
    def each(step):
        if step.n + 1 == n:
            raise Unplugged

    return each


def long_run(
    path=None,
    stop=None,
    seed=0,
    data=DATA,
    kind=torch.optim.AdamW,
    settings=None,
    objective=classify,
    dropout=0.3,
    **options,
):
    seed_everything(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    opt = kind(net.parameters(), **dict(lr=0.01) | (settings or {}))
    options = (
        dict(
            steps=12,
            save_every=2,
            schedule=torch.linspace(1, 0.1, max(options.get("steps", 12), 0)),
            clip=1.0,
        )
        | options
    )

    def stream(start):
        return endless(
            data,
            data[:, :3].argmax(1),
            batch_size=10,
            seed=0,
            start=start * options.get("accum", 1),
        )

    run = None
    with suppress(Unplugged):
        run = resumable(
            net, stream, objective, opt, checkpoint=path, each=stop and stop_at(stop), **options
        )
    return torch.cat([p.detach().flatten() for p in net.parameters()]), run


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(accum=2),
        dict(precision="bf16"),
        dict(precision="fp16"),
        dict(clip=None),
        dict(schedule=None),
        dict(kind=torch.optim.SGD, settings=dict(momentum=0.9)),
        dict(recipe=dict(a=(1, 2), b={1: 2}, c=float("nan"), d=np.int64(3))),
    ],
)
@pytest.mark.parametrize("stops", [[3], [1, 5, 9]])
def test_with_and_without_a_checkpoint_and_stopped_anywhere_the_bits_are_the_same(
    tmp_path, options, stops
):
    weights, run = long_run(**options)
    for stop in stops:
        long_run(tmp_path / "run", stop, **options)
    again, other = long_run(tmp_path / "run", **options)
    assert torch.equal(weights, again) and torch.equal(run.losses, other.losses)
    once_more, other = long_run(tmp_path / "run", **options)  # finished: given back at once
    assert torch.equal(weights, once_more) and torch.equal(run.losses, other.losses)
    assert {p.name for p in tmp_path.iterdir()} <= {"run", "run.old"}


def soft(model, batch):
    return classify(model, batch)


def scaled(by):
    return lambda model, batch: (classify(model, batch)[0] * by, {})


def weighted(model, batch, by):
    return classify(model, batch)[0] * by, {}


OTHERS = dict(
    data=(dict(data=DATA + 1e-6), "first batch was"),
    schedule=(dict(schedule=torch.linspace(1, 0.2, 12)), "schedule was"),
    no_schedule=(dict(schedule=None), "schedule was .* and is null here"),
    clip=(dict(clip=2.0), "clip was 1.0 and is 2.0 here"),
    accum=(dict(accum=2), "accum was 1 and is 2"),
    precision=(dict(precision="bf16"), 'precision was "fp32" and is "bf16"'),
    objective=(dict(objective=soft), "objective was"),
    settings=(dict(settings=dict(weight_decay=0.5)), r"weight_decay was \[0.01\] and is \[0.5\]"),
    lr=(dict(settings=dict(lr=0.02)), r"lr was \[0.01\] and is \[0.02\]"),
    betas=(dict(settings=dict(betas=(0.8, 0.999))), "betas was"),
    recipe=(dict(recipe=dict(seed=1)), "seed was null and is 1 here"),
    layers=(dict(dropout=0.4), "layers was"),
    steps=(dict(steps=20), "steps was 12 and is 20 here.*pass longer=True"),
    fewer=(dict(steps=8), "steps was 12 and is 8 here"),
    fewer_longer=(dict(steps=8, longer=True), "steps was 12"),
    longer_and_other_data=(dict(steps=20, longer=True, data=DATA + 1), "first batch was"),
)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_and_nothing_is_changed(tmp_path, name, finished):
    options, words = OTHERS[name]
    long_run(tmp_path / "run", None if finished else 5)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fresh_weights, _ = long_run(steps=0, schedule=None, dropout=options.get("dropout", 0.3))
    seen = {}
    load = checkpoint.load_checkpoint

    def watch(path, model, opt, accept):
        seen.update(model=model, opt=opt, luck=torch.get_rng_state())
        return load(path, model, opt, accept)

    with (
        pytest.raises(BadCheckpoint, match="run is of another run: .*" + words),
        patch("foundation.training.run.load_checkpoint", watch),
    ):
        long_run(tmp_path / "run", **options)
    assert (
        torch.equal(
            fresh_weights, torch.cat([p.detach().flatten() for p in seen["model"].parameters()])
        )
        and not seen["opt"].state
    )
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert torch.equal(
        seen["luck"], torch.get_rng_state()
    )  # `endless` draws from a generator of its own


def test_another_kind_of_optimizer_is_refused(tmp_path):
    long_run(tmp_path / "run", 5)
    with pytest.raises(
        BadCheckpoint, match='run is of another run: optimizer was "AdamW" and is "Adam" here'
    ):
        long_run(tmp_path / "run", kind=torch.optim.Adam)


@pytest.mark.parametrize(
    "there, here",
    [
        (scaled(1.0), scaled(2.0)),
        (lambda m, b: classify(m, b), lambda m, b: (2 * classify(m, b)[0], {})),
        (partial(soft), partial(classify)),
        (partial(weighted, by=1), partial(weighted, by=2)),
    ],
)
def test_another_objective_is_refused_and_the_same_one_is_known_again(tmp_path, there, here):
    long_run(tmp_path / "run", 5, objective=there)
    with pytest.raises(BadCheckpoint, match="objective was"):
        long_run(tmp_path / "run", objective=here)
    weights, _ = long_run(tmp_path / "run", objective=there)
    assert torch.equal(weights, long_run(objective=there)[0])


def test_an_objective_that_holds_the_model_is_known_again_when_it_has_learnt(tmp_path):
    def run(stop=None):
        seed_everything(0)
        net = nn.Linear(6, 3)
        done = resumable(
            net,
            lambda start: endless(DATA, DATA[:, :3].argmax(1), batch_size=10, start=start),
            lambda model, batch: (classify(net, batch)[0] + 0 * net.bias.sum(), {}),
            torch.optim.SGD(net.parameters(), lr=0.1),
            steps=6,
            save_every=1,
            checkpoint=tmp_path / "run",
            each=stop and stop_at(stop),
        )
        return net, done

    with pytest.raises(Unplugged):
        run(3)
    assert len(run()[1].losses) == 6


def test_going_on_longer_is_the_longer_run(tmp_path):
    flat = dict(schedule=None)
    long_run(tmp_path / "run", **flat)
    weights, run = long_run(tmp_path / "run", steps=20, longer=True, **flat)
    want, whole = long_run(steps=20, **flat)
    assert torch.equal(weights, want) and torch.equal(run.losses, whole.losses)
    with pytest.raises(BadCheckpoint, match="steps was 20 and is 12"):  # now it is a run of 20
        long_run(tmp_path / "run", **flat)


def test_the_same_network_and_optimizer_may_be_handed_in_again(tmp_path):
    "As a cell that was interrupted and is run once more; the rate has moved along meanwhile"
    net, opt = fresh()

    def stream(start):
        return endless(DATA, DATA[:, :3].argmax(1), batch_size=10, start=start)

    def run(stop=None):
        return resumable(
            net,
            stream,
            classify,
            opt,
            steps=12,
            save_every=2,
            checkpoint=tmp_path / "run",
            schedule=torch.linspace(1, 0.1, 12),
            each=stop and stop_at(stop),
        )

    for stop in (3, 8):
        with pytest.raises(Unplugged):
            run(stop)
    losses = run().losses
    net, opt = fresh()
    straight = [
        step.loss
        for step in train(
            net, stream(0), classify, opt, steps=12, schedule=torch.linspace(1, 0.1, 12)
        )
    ]
    assert torch.equal(losses, torch.stack(straight))


def test_a_stream_that_is_used_up_cannot_go_on(tmp_path):
    def run(stop=None):
        seed_everything(0)
        net, batches = nn.Linear(6, 3), endless(DATA, DATA[:, :3].argmax(1), batch_size=10)
        resumable(
            net,
            lambda start: batches,
            classify,
            torch.optim.SGD(net.parameters(), lr=0.1),
            steps=6,
            save_every=1,
            checkpoint=tmp_path / "run",
            each=stop and stop_at(stop),
        )

    with pytest.raises(Unplugged):
        run(3)
    with pytest.raises(
        ValueError, match="stream gave the same iterator twice; expected new batches from the step"
    ):
        run()


def test_a_stream_that_draws_from_the_global_generators_goes_on_exactly(tmp_path):
    "The first batch is looked at, not lost and not drawn twice"

    def run(path, stop=None):
        seed_everything(0)
        net = nn.Linear(6, 3)

        def stream(start):
            while True:
                pick = torch.randint(60, (10,))
                yield DATA[pick], DATA[pick, :3].argmax(1)

        with suppress(Unplugged):
            return resumable(
                net,
                stream,
                classify,
                torch.optim.SGD(net.parameters(), lr=0.1),
                steps=6,
                save_every=1,
                checkpoint=path,
                each=stop and stop_at(stop),
            ).losses

    straight = run(None)
    run(tmp_path / "run", 3)
    assert torch.equal(run(tmp_path / "run"), straight) and torch.equal(
        run(tmp_path / "whole"), straight
    )


def test_a_stream_of_nothing_is_refused(tmp_path):
    net, opt = fresh()
    for path in (None, tmp_path / "run"):
        with pytest.raises(TypeError, match="stream gave 3; expected batches to go through"):
            resumable(net, lambda start: 3, classify, opt, steps=5, checkpoint=path)


def test_a_refusal_gives_the_luck_back(tmp_path):
    "The first batch was drawn from the global generators to look at it"

    def run(data, stop=None):
        net = nn.Linear(6, 3)

        def stream(start):
            while True:
                pick = torch.randint(60, (10,))
                yield data[pick] + random.random() + np.random.rand(), data[pick, :3].argmax(1)

        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        resumable(
            net,
            stream,
            classify,
            opt,
            steps=6,
            save_every=1,
            checkpoint=tmp_path / "run",
            each=stop and stop_at(stop),
        )

    seed_everything(0)
    with pytest.raises(Unplugged):
        run(DATA, 3)
    seed_everything(0)
    nn.Linear(6, 3)
    want = torch.rand(3).tolist(), random.random(), np.random.rand()
    seed_everything(0)
    with pytest.raises(BadCheckpoint, match="first batch was"):
        run(DATA + 1)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == want


def test_the_scale_of_fp16_goes_on(tmp_path):
    "It begins so high that the first steps are left out; begun anew, more would be"

    def run(path, stop=None):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return long_run(path, stop, precision="fp16", scaler=scaler, steps=40, dropout=0.0)[0]

    straight = run(None)
    run(tmp_path / "run", 20)
    run(tmp_path / "run", 31)
    assert torch.equal(run(tmp_path / "run"), straight)


def test_a_checkpoint_without_a_recipe_is_no_run_of_this_kind(tmp_path):
    net, opt = fresh()
    save_checkpoint(tmp_path / "run", net, opt, 3)
    with pytest.raises(
        BadCheckpoint, match="run was saved without a recipe; go on from it with `load_checkpoint`"
    ):
        resumable(
            net,
            lambda start: endless(DATA, DATA[:, 0].long(), batch_size=10),
            classify,
            opt,
            steps=5,
            checkpoint=tmp_path / "run",
        )


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(save_every=0), "save_every is 0; expected a whole number from 1 on"),
        (dict(save_every=2.5), "save_every is 2.5"),
        (dict(steps=-1, schedule=None), "steps is -1"),
        (dict(recipe=[1]), "recipe is a list; expected a dict"),
        (dict(recipe=dict(data=DATA)), "the recipe must be what JSON can hold"),
        (dict(longer=1), "longer is 1"),
    ],
)
def test_resumable_refuses_in_one_sentence(tmp_path, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        long_run(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_modes_come_back_and_the_file_is_free_after_a_stop(tmp_path, error):
    net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).eval()

    def stop(step):
        raise error

    def run(each):
        return resumable(
            net,
            lambda start: endless(DATA, DATA[:, :3].argmax(1), batch_size=10, start=start),
            classify,
            torch.optim.SGD(net.parameters(), lr=0.1),
            steps=3,
            checkpoint=tmp_path / "run",
            each=each,
        )

    with pytest.raises(error):
        run(stop)
    assert not net.training and not net[1].training and not list(tmp_path.iterdir())


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "sub", "sub/", ".", "run.old", "run.new"])
def test_a_folder_is_refused_and_stays(tmp_path, name):
    for folder in ("sub", "run.old", "run.new"):
        (tmp_path / folder).mkdir()
    path = os.path.join(tmp_path, name.replace("run.old", "run").replace("run.new", "run"))
    net, opt = fresh()
    for call in (
        lambda: save_checkpoint(path, net, opt, 1),
        lambda: load_checkpoint(path, net, opt),
        lambda: long_run(path),
    ):
        with pytest.raises(BadCheckpoint, match="is a folder; expected a file for the checkpoint"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.new", "run.old", "sub"]


@pytest.mark.parametrize("name", ["x" * 400, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    net, opt = fresh()
    for call in (
        lambda: save_checkpoint(tmp_path / name, net, opt, 1),
        lambda: load_checkpoint(tmp_path / name, net, opt),
        lambda: long_run(tmp_path / name),
    ):
        with pytest.raises(BadCheckpoint, match="is no place for a checkpoint: "):
            call()


def test_a_long_name_works_as_long_as_there_is_room_for_its_endings(tmp_path):
    net, opt = fresh()
    for step in (1, 2):
        save_checkpoint(tmp_path / ("x" * 240), net, opt, step)
    assert (
        load_checkpoint(tmp_path / ("x" * 240), net, opt)[0] == 2
        and len(list(tmp_path.iterdir())) == 2
    )


def test_a_link_is_followed_and_the_mode_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "real")
    net, opt = fresh()
    save_checkpoint(tmp_path / "run", net, opt, 1)
    os.chmod(tmp_path / "disk" / "real", 0o640)
    save_checkpoint(tmp_path / "run", net, opt, 2)
    assert (tmp_path / "run").is_symlink() and load_checkpoint(tmp_path / "run", net, opt)[0] == 2
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["real", "real.old"]
    if os.name != "nt":
        assert (tmp_path / "disk" / "real").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("where", ["write", "os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("code", [28, 5])
def test_a_full_disk_is_told_and_the_checkpoint_before_is_safe(tmp_path, where, number, code):
    net, opt = fresh()
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", net, opt, step)
    calls, real = iter(range(100)), {"os.fsync": os.fsync, "os.replace": os.replace}.get(where)

    def full(*args):
        if next(calls) >= number:
            raise OSError(code, os.strerror(code))
        return real(*args)

    if where == "write":
        from contextlib import contextmanager

        @contextmanager
        def writer(path):
            raise OSError(code, os.strerror(code))
            yield

        broken = patch.object(checkpoint, "atomic_write", writer)
    else:
        broken = patch(where, full)
    with (
        broken,
        pytest.raises(
            OSError,
            match="^step 3 cannot be saved as run .* MB\\): .*The checkpoint before is safe; make",
        ) as told,
    ):
        save_checkpoint(tmp_path / "run", net, opt, 3)
    assert told.value.errno == code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_checkpoint(tmp_path / "run", net, opt)[0] in (
            (2,) if (where, number) == ("write", 0) else (2, 3)
        )


def test_a_power_cut_finds_file_and_names_on_the_disk(tmp_path):
    "Bytes before the name, names before the next thing; the calls are watched"
    net, opt = fresh()
    save_checkpoint(tmp_path / "run", net, opt, 1)
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(handle):
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def rename(a, b):
        calls.append(f"name {os.path.basename(b)}")
        replace(a, b)

    with patch("os.fsync", sync), patch("os.replace", rename):
        save_checkpoint(tmp_path / "run", net, opt, 2)
    folder = [] if os.name == "nt" else ["sync folder"]
    assert calls == ["sync file", "name run.new", *folder, "name run.old", "name run", *folder]


OTHER = """
import sys, time, torch
from torch import nn
from foundation.data.batches import endless
from foundation.training.run import resumable
from foundation.training.loop import classify
from foundation.training.parameter_groups import adamw
torch.manual_seed(0)
x = torch.randn(60, 6); y = x[:, :3].argmax(1)
net = nn.Linear(6, 3); opt = adamw(net, 1e-2)
def each(step):
    if step.n == 2: print("ready", flush=True); time.sleep(60)
stream = lambda start: endless(x, y, batch_size=10, start=start)
resumable(net, stream, classify, opt, steps=6, save_every=1, checkpoint=sys.argv[1], each=each)
"""


def other(path):
    env = dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def mine(path):
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    net = nn.Linear(6, 3)
    return resumable(
        net,
        lambda start: endless(x, x[:, :3].argmax(1), batch_size=10, start=start),
        classify,
        adamw(net, 1e-2),
        steps=6,
        save_every=1,
        checkpoint=path,
    )


def test_two_processes_and_one_checkpoint_one_sentence_and_a_killed_one_holds_nothing(tmp_path):
    job = other(tmp_path / "run")
    try:
        assert job.stdout.readline() == "ready\n"
        with pytest.raises(
            BadCheckpoint,
            match="^another process trains into run; wait for it or end it, or name another file$",
        ):
            mine(tmp_path / "run")
        with (
            pytest.raises(BadCheckpoint, match="another process trains into run"),
            patch.object(checkpoint, "_PATIENCE", 0.2),
        ):
            save_checkpoint(tmp_path / "run", *fresh(), 1)
        mine(tmp_path / "elsewhere")
    finally:
        job.kill()
        job.wait()
    assert len(mine(tmp_path / "run").losses) == 6
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".lock", ".tmp"))]


HOLDER = """
import os, sys, time
from foundation.training.checkpoint import sole_writer
with sole_writer(sys.argv[1]):
    if os.fork() == 0:  # a worker that reads data, and outlives its parent by some seconds
        time.sleep(20); os._exit(0)
    print("held", flush=True); time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
def test_a_killed_process_holds_nothing_though_its_workers_live_on(tmp_path):
    job = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout.readline() == "held\n"
        with pytest.raises(BadCheckpoint, match="another process trains into run"):
            with sole_writer(tmp_path / "run"):
                pass
    finally:
        job.kill()
        job.wait()
    with sole_writer(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_thread_is_alone_and_may_go_on_inside():
    found = []

    def enter(**options):
        try:
            with sole_writer(path, **options):
                found.append("in")
        except BadCheckpoint as error:
            found.append(str(error))

    path = Path(tempfile.mkdtemp()) / "run"
    with sole_writer(path):
        enter(nested=True)
        enter()
        thread = Thread(target=enter, kwargs=dict(nested=True))
        thread.start()
        thread.join()
    enter()
    assert found[0] == found[3] == "in" and not list(path.parent.iterdir())
    assert found[1].startswith("another run of this process trains into run")
    assert found[2].startswith("another process trains into run")


TURNS = """
import os, sys, torch
from torch import nn
from foundation.training.checkpoint import load_checkpoint, save_checkpoint
net = nn.Linear(6, 3); opt = torch.optim.SGD(net.parameters(), lr=0.1)
children = []
for _ in range(3):
    if (pid := os.fork()) == 0:
        try:
            for n in range(1, 9): save_checkpoint(sys.argv[1], net, opt, n)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
print(load_checkpoint(sys.argv[1], net, opt)[0])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
def test_processes_that_save_into_one_file_take_turns(tmp_path):
    job = subprocess.run(
        [sys.executable, "-c", TURNS, tmp_path / "run"],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=120,
    )
    assert job.returncode == 0 and job.stdout == "8\n", job.stdout + job.stderr[-800:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old"]


def test_one_process_does_not_train_twice_into_one_file(tmp_path):
    def again(step):
        with pytest.raises(BadCheckpoint, match="another run of this process trains into run"):
            long_run(tmp_path / "run")
        raise Unplugged

    seed_everything(0)
    net, opt = fresh()
    with pytest.raises(Unplugged):
        resumable(
            net,
            lambda start: endless(DATA, DATA[:, :3].argmax(1), batch_size=10, start=start),
            classify,
            opt,
            steps=3,
            checkpoint=tmp_path / "run",
            each=again,
        )


@pytest.mark.parametrize("error", [37, 38, 95])
def test_where_files_take_no_locks_one_trains_without(tmp_path, error):
    "Network folders may know none"
    with patch("fcntl.flock", side_effect=OSError(error, "no locks")):
        weights, _ = long_run(tmp_path / "run")
    assert torch.equal(weights, long_run()[0])


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(model={}), TypeError, "model is a dict; expected a network"),
        (dict(opt=None), TypeError, "opt is None; expected a.* Optimizer"),
        (dict(step=-1), ValueError, "step is -1; expected"),
        (dict(step=1.5), TypeError, "step is 1.5; expected a whole number"),
        (dict(step=True), TypeError, "step is True"),
        (dict(notes=[1]), TypeError, "notes is a list; expected a dict"),
        (dict(notes=dict(loss=torch.zeros(1))), TypeError, "what JSON can hold"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, change, error, words):
    net, opt = fresh()
    save_checkpoint(tmp_path / "run", net, opt, 5)
    with pytest.raises(error, match=words):
        save_checkpoint(
            **dict(path=tmp_path / "run", model=net, opt=opt, step=6, notes=None) | change
        )
    assert (
        load_checkpoint(tmp_path / "run", net, opt)[0] == 5 and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_do_not_push_a_good_checkpoint_out(tmp_path, bad):
    net, opt = fresh()
    save_checkpoint(tmp_path / "run", net, opt, 5)
    with torch.no_grad():
        net[0].weight[1, 2] = bad
    with pytest.raises(ValueError, match="0.weight holds NaN or infinite numbers after step 6"):
        save_checkpoint(tmp_path / "run", net, opt, 6)
    assert load_checkpoint(tmp_path / "run", *fresh())[0] == 5


def test_there_need_not_be_one_yet(tmp_path):
    assert load_checkpoint(tmp_path / "no" / "such" / "run", *fresh()) == (0, {})
    save_checkpoint(tmp_path / "a" / "folder" / "run", *fresh(), 1)  # folders are made
    assert load_checkpoint(str(tmp_path / "a/folder/run"), *fresh())[0] == 1


def test_what_killed_saves_left_is_swept_up(tmp_path):
    (tmp_path / ".run.new.abc.tmp").write_bytes(b"half")
    (tmp_path / ".other.new.abc.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path / "run", *fresh(), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.new.abc.tmp", "run"]
