"""The loop, its speed and its log:
against plain loops and PyTorch, killed and interrupted for real, and bad input, a sentence each"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from itertools import islice
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.data.batches import endless
from foundation.training.loop import (
    Step,
    TrainingDiverged,
    classify,
    progress,
    train,
    uninterrupted,
)
from foundation.training.parameter_groups import adamw
from foundation.training.run import fit
from foundation.training.schedules import one_cycle, warmup_cosine
from foundation.training.speed import Throughput, kept_for_backward, peak_memory, throughput
from foundation.training.track import Log, TensorBoard, curve, plot_log, read_log

few = settings(max_examples=20, deadline=None)
needs_signals = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no SIGINT or SIGKILL to send"
)
X = torch.randn(256, 12, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1))).argmax(1)


def net(seed=0, norm=True):
    torch.manual_seed(seed)
    layers = [
        nn.Linear(12, 16),
        nn.BatchNorm1d(16) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(16, 4),
    ]
    return nn.Sequential(*layers)


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


def batches(size=16, start=0):
    return endless(X, Y, batch_size=size, start=start)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def steps_of(model, n=3, objective=classify, opt=None, data=None, **options):
    return list(
        train(
            model,
            batches() if data is None else data,
            objective,
            opt or sgd(model),
            steps=n,
            **options,
        )
    )


# The loop -----------------------------------------------------------------------------------------


@few
@given(
    st.integers(1, 20),
    st.sampled_from([None, 0.3, 5.0]),
    st.integers(1, 3),
    st.sampled_from(["fp32", "bf16"]),
    st.booleans(),
)
def test_train_is_the_plain_loop_to_the_last_bit(n, clip, accum, precision, scheduled):
    factors = torch.linspace(1, 0, n) if scheduled else None
    plain, stream = net(), batches()
    opt = adamw(plain, 0.01)
    for i in range(n):
        plain.train()
        opt.zero_grad()
        for group in opt.param_groups:
            group["lr"] = 0.01 * (float(factors[i]) if scheduled else 1.0)
        for _ in range(accum):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                x, y = next(stream)
                loss = F.cross_entropy(plain(x).float(), y)
            (loss / accum).backward()
        if clip:  # in the order of the optimizer's groups: a sum of floats has an order
            nn.utils.clip_grad_norm_(
                [p for group in opt.param_groups for p in group["params"]], clip
            )
        opt.step()
    ours = net()
    steps_of(
        ours,
        n,
        opt=adamw(ours, 0.01),
        schedule=factors,
        clip=clip,
        accum=accum,
        precision=precision,
    )
    assert torch.equal(weights(plain), weights(ours))


@few
@given(st.integers(0, 30))
def test_stopping_and_going_on_changes_nothing(stop):
    whole = net()
    steps_of(whole, 30, schedule=torch.linspace(1, 0, 30))
    parts = net()
    opt = sgd(parts)

    def go(start):
        return train(
            parts,
            batches(start=start),
            classify,
            opt,
            steps=30,
            schedule=torch.linspace(1, 0, 30),
            start=start,
        )

    for step in islice(go(0), stop):
        random_state = torch.get_rng_state()  # dropout's numbers: a checkpoint saves them too
    if stop:
        torch.set_rng_state(random_state)
    for step in go(stop):
        pass
    assert torch.equal(weights(whole), weights(parts))


@few
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_accumulation_is_the_large_batch(parts, n):
    def run(size, accum):
        model = nn.Linear(12, 4).double()
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        data = list(zip(X[:64].double().split(size), Y[:64].split(size))) * n
        seen = steps_of(model, n, data=data, accum=accum, clip=0.5)
        return weights(model), torch.stack([s.loss for s in seen]), seen[-1].grad_norm

    for got, expected in zip(run(64 // parts, parts), run(64, 1)):
        assert_close(got, expected)


def test_the_mode_is_set_at_every_step():
    model = net()
    for step in train(model, batches(), classify, sgd(model), steps=3):
        assert model.training
        model.eval()  # somebody measures
    assert model[1].num_batches_tracked == 3


def test_groups_added_on_the_way_follow_the_schedule():
    model = net()
    opt = torch.optim.SGD(model[4].parameters(), lr=0.1)
    for step in train(model, batches(), classify, opt, steps=3, schedule=[1.0, 0.5, 0.25]):
        if step.n == 0:
            opt.add_param_group(dict(params=list(model[0].parameters()), lr=0.4))
    assert [group["lr"] for group in opt.param_groups] == [0.025, 0.1]


@pytest.mark.parametrize(
    "form", [list, tuple, namedtuple("Pair", "x y")._make, lambda b: dict(zip("xy", b))]
)
def test_batches_keep_their_form(form):
    seen = []

    def objective(model, batch):
        seen.append(type(batch))
        x, y = batch.values() if isinstance(batch, dict) else batch
        return classify(model, (x, y))

    steps_of(net(), 1, objective, data=[form(next(batches()))])
    assert seen == [type(form([X, Y]))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_stops_before_the_weights_are_spoilt(bad):
    model, before = net(), []

    def objective(model, batch):
        before.append(batch)
        loss, extra = classify(model, batch)
        return (loss * bad if len(before) == 8 else loss), extra

    with pytest.raises(
        TrainingDiverged,
        match=r"the loss became (nan|-?inf) at step 7 \(lr 0.1\). Try a lower lr, a warmup, clip",
    ):
        steps_of(model, 20, objective)
    assert len(before) == 8 and all(p.isfinite().all() for p in model.parameters())


def test_an_infinite_gradient_behind_a_finite_loss_is_seen_when_it_is_clipped():
    model = net()
    start = weights(nn.ModuleList([model[0], model[4]]))

    def flat(m, batch):
        return (classify(m, batch)[0] + (0 * m[0].bias.sum()).sqrt(), {})

    with pytest.raises(TrainingDiverged, match="the gradient norm became nan at step 0"):
        steps_of(model, 5, flat, clip=1.0)
    assert torch.equal(start, weights(nn.ModuleList([model[0], model[4]])))


def test_on_a_gpu_the_loss_is_looked_at_seldom_and_still_found(monkeypatch):
    from foundation.training.loop import _Guard

    opt, idle = sgd(nn.Linear(1, 1)), torch.amp.GradScaler("cpu", enabled=False)
    guard = _Guard(50, 1000, idle)
    for n in range(60):
        guard(n, torch.tensor(1.0), None, opt)
    with pytest.raises(TrainingDiverged, match="between steps 50 and 99"):
        for n in range(60, 100):
            guard(n, torch.tensor(math.nan if n == 70 else 1.0), None, opt)
    last = _Guard(50, 30, idle)
    with pytest.raises(TrainingDiverged):
        for n in range(30):
            last(n, torch.tensor(math.inf if n == 29 else 1.0), None, opt)


def test_fp16_scales_leaves_out_and_learns():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model = net(norm=False)
    start, moved = model[0].weight.clone(), []
    for step in train(
        model,
        batches(),
        classify,
        adamw(model, 0.01),
        steps=120,
        precision="fp16",
        clip=1.0,
        scaler=scaler,
    ):
        moved.append(not torch.equal(model[0].weight, start))
    assert not moved[0] and moved[-1] and scaler.get_scale() < 2.0**40
    plain = net(norm=False)
    steps_of(plain, 120, opt=adamw(plain, 0.01), clip=1.0)

    def loss(m):
        return F.cross_entropy(m.eval()(X), Y).item()

    assert loss(model) < 0.7 * math.log(4) and abs(loss(model) - loss(plain)) < 0.25


def test_fp16_goes_on_exactly_with_a_saved_scaler():
    def run(stops):
        model, scaler, state, done = (
            net(norm=False).eval(),
            torch.amp.GradScaler("cpu", init_scale=2.0**30),
            None,
            0,
        )
        model[3].p = 0.0
        opt = adamw(model, 0.01)
        for stop in stops:
            for step in train(
                model,
                batches(start=done),
                classify,
                opt,
                steps=30,
                precision="fp16",
                start=done,
                scaler=scaler,
            ):
                if step.n + 1 == stop:
                    break
            state, done = (
                json.loads(json.dumps(scaler.state_dict())),
                stop,
            )  # as a checkpoint's notes keep it
            scaler = torch.amp.GradScaler("cpu")
            scaler.load_state_dict(state)
        return weights(model)

    assert torch.equal(run([30]), run([9, 30])) and torch.equal(run([30]), run([4, 21, 30]))


def test_fp16_that_no_scale_can_save_is_told():
    def flat(m, batch):
        return (classify(m, batch)[0] + (0 * m[0].bias.sum()).sqrt(), {})

    with pytest.raises(TrainingDiverged, match="no loss scale gives finite fp16 gradients"):
        steps_of(net(), 60, flat, precision="fp16")


@pytest.mark.parametrize(
    "kind", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, "numpy", "list"]
)
@pytest.mark.parametrize(
    "weights_in", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_labels_of_any_whole_number_type_and_logits_in_any_precision_give_the_float32_loss(
    kind, weights_in
):
    model = nn.Linear(12, 4).to(weights_in)
    inputs = X[:16].to(weights_in)
    labels = (
        {"numpy": Y[:16].numpy().astype("uint16"), "list": Y[:16].tolist()}.get(kind)
        if isinstance(kind, str)
        else Y[:16].to(kind)
    )
    loss, extra = classify(model, (inputs, labels))
    want = F.cross_entropy(model(inputs).float(), Y[:16])
    assert loss.dtype == torch.float32 and torch.equal(loss, want) and extra == {}
    loss.backward()
    assert model.weight.grad.isfinite().all()


def test_classify_takes_probabilities_and_refuses_other_labels():
    model = nn.Linear(12, 4)
    soft = F.one_hot(Y[:16], 4).double()
    assert_close(classify(model, (X[:16], soft))[0], classify(model, (X[:16], Y[:16]))[0])
    for labels, words in (
        (Y[:16] > 1, "expected class numbers"),
        (["cat"] * 16, "expected class numbers"),
        (None, "labels is None"),
    ):
        with pytest.raises(TypeError, match=words):
            classify(model, (X[:16], labels))
    with pytest.raises(TypeError, match="the batch is a tensor .*; expected a pair"):
        classify(model, X[:16])


def test_labels_that_stand_for_nothing_still_count_for_nothing():
    model, labels = nn.Linear(12, 4), Y[:16].clone().int()
    labels[:3] = -100
    assert torch.equal(
        classify(model, (X[:16], labels))[0], F.cross_entropy(model(X[3:16]), Y[3:16])
    )


@pytest.mark.parametrize("kind", ["float32", "float64", ">f4"])
def test_batches_of_numpy_arrays_are_batches_of_tensors(kind):
    ours, theirs = nn.Linear(12, 4), nn.Linear(12, 4)
    theirs.load_state_dict(ours.state_dict())
    if kind == "float64":
        ours, theirs = ours.double(), theirs.double()
    steps_of(ours, 2, data=[(X[:16].numpy().astype(kind), Y[:16].numpy().astype("int32"))] * 2)
    steps_of(theirs, 2, data=[(X[:16].to(theirs.weight.dtype), Y[:16])] * 2)
    assert torch.equal(weights(ours), weights(theirs))


def test_packed_sequences_reach_the_model_whole():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    model = nn.LSTM(2, 3)
    seen = []
    steps_of(model, 1, lambda m, b: (seen.append(type(b)) or m(b)[0].data.sum(), {}), data=[packed])
    assert seen == [type(packed)]


@pytest.mark.parametrize("make", [lambda m: torch.optim.LBFGS(m.parameters())])
def test_an_optimizer_that_needs_a_closure_is_refused_before_the_first_batch(make):
    model, drawn = net(), []
    before = weights(model)
    with pytest.raises(
        ValueError,
        match="LBFGS.step needs a closure, .*; `train` computes it once: write the loop yourself",
    ):
        steps_of(model, opt=make(model), data=(drawn.append(1) or b for b in batches()))
    assert not drawn and torch.equal(before, weights(model))


@pytest.mark.parametrize(
    "kind",
    [
        "SGD",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "Adagrad",
        "Adadelta",
        "ASGD",
        "Adafactor",
    ],
)
@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
def test_every_other_optimizer_trains_also_bf16_weights(kind, kept_in):
    model = nn.Linear(12, 4).to(kept_in)
    start = weights(model)
    data = [(X[:32].to(kept_in), Y[:32])] * 5
    seen = steps_of(
        model, 5, opt=getattr(torch.optim, kind)(model.parameters(), lr=0.05), data=data
    )
    assert not torch.equal(start, weights(model)) and all(
        s.loss.dtype == torch.float32 and s.loss.isfinite() for s in seen
    )


def test_fp16_needs_float32_weights_and_says_so():
    model = nn.Linear(12, 4).half()
    with pytest.raises(ValueError, match="precision 'fp16' needs weights in float32"):
        steps_of(model, precision="fp16", data=[(X[:16].half(), Y[:16])] * 3)


@pytest.mark.parametrize(
    "precision, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("accum", [1, 2])
def test_the_model_computes_in_the_precision_that_is_asked_for_and_its_weights_stay_float32(
    precision, kind, accum
):
    model, seen = net(norm=False), []
    model[4].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    for step in steps_of(model, 2, precision=precision, accum=accum):
        assert step.loss.dtype == torch.float32
    assert seen == [kind] * 2 * accum and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(X[:2]).dtype == torch.float32  # the precision ends with the run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_batches_are_made_outside_of_the_precision(precision):
    "A crop computed in half precision would be a pixel off"
    made = []

    def stream():
        while True:
            x = X[:16] @ torch.eye(12)
            made.append(x.dtype)
            yield x, Y[:16]

    steps_of(net(norm=False), 2, precision=precision, data=stream())
    assert made == [torch.float32] * 2


def test_a_narrow_strided_convolution_is_trained_in_the_plain_order():
    "PyTorch writes beyond its workspace in the other one; moments follow their weights"

    def run(order, turn=False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 1, 2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Flatten(),
            nn.Linear(8 * 16, 4),
        ).to(memory_format=order)
        x = torch.randn(16, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        seen, opt = [], adamw(model, 0.01)
        model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].is_contiguous()))
        steps_of(model, 2, opt=opt, data=[(x, Y[:16])] * 2)
        if turn:  # as after a checkpoint of a model in the other order
            model.to(memory_format=torch.channels_last)
            for p, values in opt.state.items():
                values |= {
                    k: v.contiguous(memory_format=torch.channels_last)
                    for k, v in values.items()
                    if v.ndim == 4
                }
        steps_of(model, 2, opt=opt, data=[(x, Y[:16])] * 2)
        assert seen == [True] * 4 and model[2].weight.is_contiguous()
        assert all(
            v.stride() == p.stride()
            for p, values in opt.state.items()
            for v in values.values()
            if v.shape == p.shape
        )
        return weights(model)

    assert torch.equal(run(torch.contiguous_format), run(torch.channels_last))
    assert torch.equal(run(torch.contiguous_format), run(torch.channels_last, turn=True))


def test_other_models_keep_the_order_they_are_given():
    model, seen = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(4)), []
    x = torch.randn(16, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    model(x)
    model.register_forward_pre_hook(
        lambda m, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    steps_of(model, 1, data=[(x, Y[:16])])
    assert seen == [True]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_step_of_float32(precision):
    half, full = net(norm=False).eval(), net(norm=False).eval()
    for model in (half, full):
        model[3].p = 0.0
    a = steps_of(half, 1, precision=precision, clip=1e9, opt=sgd(half))[0]
    b = steps_of(full, 1, clip=1e9, opt=sgd(full))[0]
    assert (
        abs(a.loss - b.loss) < 0.02 and abs(a.grad_norm / b.grad_norm - 1) < 0.05
    )  # the norm is that of gradients without the scale
    moved = weights(full) - weights(net(norm=False))
    assert (weights(half) - weights(full)).norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("value", [torch.tensor(0.5), 0.5, 1, float("inf")])
def test_a_clip_is_any_number(value):
    value = value if not isinstance(value, torch.Tensor) else value.item()
    model = net()
    assert steps_of(model, 1, clip=value)[0].grad_norm > 0


@pytest.mark.parametrize("accum", [1, 3])
def test_a_step_holds_no_graph(accum):
    "Else a list of losses would keep the activations of all steps"
    for step in steps_of(net(), 2, accum=accum, clip=1.0):
        assert (
            not step.loss.requires_grad
            and not step.grad_norm.requires_grad
            and step.loss.shape == ()
        )


def test_an_infinite_clip_only_measures():
    steps_of(free := net(), 3)
    steps_of(measured := net(), 3, clip=math.inf)
    assert torch.equal(weights(free), weights(measured))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["objective", "each"])
def test_modes_come_back_when_a_run_is_stopped(error, where):
    def stop(*_):
        raise error

    model = net().eval()
    model[1].train()
    before = [layer.training for layer in model.modules()]
    with contextlib.suppress(ZeroDivisionError):
        fit(
            model,
            batches(),
            stop if where == "objective" else classify,
            steps=3,
            title="",
            each=stop if where == "each" else None,
        )
    assert [layer.training for layer in model.modules()] == before

    def diverge(m, b):
        return (classify(m, b)[0] * math.nan, {})

    with pytest.raises(TrainingDiverged):
        steps_of(model, 3, diverge)
    assert [layer.training for layer in model.modules()] == before


def test_a_loop_that_is_left_leaves_the_mode_of_training():
    model = net().eval()
    for step in train(model, batches(), classify, sgd(model), steps=3):
        break
    assert model.training
    run = train(model, batches(), classify, sgd(model), steps=3)
    next(run)
    model.eval()
    run.close()  # long after: whoever measures now is not disturbed
    assert not model.training


LATE = """
import signal, sys, time, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from foundation.training.loop import load_optimizers, uninterrupted
from foundation.training.parameter_groups import adamw
from foundation.training.run import fit
import torch
from torch import nn
assert "torch._dynamo" not in sys.modules
model = nn.Linear(3, 2)
pressed = []
class Watch:  # presses Ctrl-C in the middle of the imports
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch._dynamo.") and len(pressed) < 3:
            pressed.append(name); signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Watch())
try:
    MAKE
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", len(pressed))
sys.meta_path.pop(0)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
batch = torch.randn(8, 3), torch.tensor([0, 1] * 4)
losses = fit(model, [batch] * 5, steps=5, lr=1e-3, title="")
print(len(losses), losses.isfinite().all().item())
"""


@needs_signals
@pytest.mark.parametrize(
    "make", ["adamw(model, 1e-3)", "fit(model, [], steps=5, lr=1e-3, title='')"]
)
def test_ctrl_c_while_pytorch_imports_waits_and_the_next_training_works(make):
    code = LATE.replace("MAKE", make)
    job = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert job.returncode == 0, job.stderr[-1500:]
    assert job.stdout.splitlines() == ["interrupted 3", "5 True"]


@needs_signals
def test_ctrl_c_waits_for_the_block_and_comes_then():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    with uninterrupted():
        done.append(2)
    assert done == [1, 2]
    thread = threading.Thread(
        target=lambda: [done.append(3) for _ in [0] if not uninterrupted().__enter__()]
    )
    thread.start(), thread.join()
    assert done == [1, 2, 3]  # elsewhere nothing is to wait


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(precision):
    model = net().cuda()
    losses = fit(model, batches(), steps=100, lr=0.01, precision=precision, title="")
    assert losses.device.type == "cpu" and losses[-10:].mean() < 0.8 * losses[:10].mean()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(n=300, data=[(X[:8], Y[:8])] * 3), "the batches ran out at step 3 of 300"),
        (dict(schedule=[1.0]), "1 factors for 3 steps"),
        (dict(schedule=[1.0, math.nan, 0.0]), "negative or not finite"),
        (dict(schedule=[1.0, -0.5, 0.0]), "negative or not finite"),
        (dict(start=4), "start is 4; expected a whole number from 0 to 3"),
        (dict(n=-1), "steps is -1; expected a whole number from 0 on"),
        (dict(accum=0), "accum is 0; expected a whole number from 1 on"),
        (dict(check_every=0), "check_every is 0; expected"),
        (dict(clip=0.0), "clip is 0.0; expected a number above 0: a norm"),
        (dict(clip=math.nan), "clip is nan; expected a number above 0"),
        (dict(precision="fp8"), "'fp32', 'bf16', 'fp16' or 'auto'"),
        (dict(scaler=torch.amp.GradScaler("cpu")), "only 'fp16' scales"),
        (dict(objective=lambda m, b: classify(m, b)[0].detach()), "a pair"),
        (
            dict(objective=lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="none"), {})),
            r"shape \(16,\)",
        ),
        (dict(objective=lambda m, b: (torch.tensor(1.0), {})), "not frozen"),
        (dict(objective=len), "expected a function of \\(model, batch\\)"),
        (dict(objective=lambda m: m), "too many positional arguments"),
        (dict(objective="loss"), "objective is 'loss'; expected a function"),
        (dict(opt="SGD"), "opt is 'SGD'; expected"),
        (dict(data=7), "batches is 7; expected something to go through"),
        (dict(data=[(X[:8], Y[:8] + 9)]), "labels run from"),
        (dict(data=[(X[:8], Y[:7])]), r"labels has shape \(7,\)"),
        (
            dict(data=[(X[:8], Y[:8].float())]),
            r"labels has shape \(8,\); expected \(8, 4\) to fit the logits",
        ),
        (dict(schedule=[[1.0]] * 3), "negative or not finite"),
    ],
)
def test_train_refuses_in_one_sentence(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as told:
        steps_of(net(), **options)
    assert len(str(told.value)) < 200 and "\n" not in str(told.value)


def test_a_model_without_parameters_and_a_frozen_one():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        steps_of(nn.ReLU(), opt=sgd(net()))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        fit(net().requires_grad_(False), batches(), steps=3)


@pytest.mark.parametrize("lr", [0, -1.0, math.nan, math.inf])
def test_fit_refuses_a_rate(lr):
    with pytest.raises(ValueError, match="lr is"):
        fit(net(), batches(), steps=3, lr=lr)


INTERRUPTED = """
import signal, torch
from torch import nn
from foundation.data.batches import endless
from foundation.training.run import fit
# a shell may have started us with Ctrl-C switched off
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.manual_seed(0)
x = torch.randn(400, 10); y = (x @ torch.randn(10, 3)).argmax(1)
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
def each(step):
    if step.n == 300: print("ready", flush=True)
losses = fit(model, endless(x, y, batch_size=32), steps=10**7, lr=.01, each=each)
right = (model(x).argmax(1) == y).float().mean().item()
sound = all(p.isfinite().all() for p in model.parameters())
print(len(losses), losses.isfinite().all().item(), right, sound, flush=True)
"""


@needs_signals
def test_ctrl_c_returns_what_has_been_learnt():
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    said, result = out.splitlines()
    steps = int(
        re.fullmatch(
            r"stopped after (\d+) of 10000000 steps; the model keeps what it has learnt", said
        )[1]
    )
    count, finite, right, sound = result.split()
    assert child.returncode == 0 and "Traceback" not in err
    assert int(count) == steps > 300 and finite == sound == "True" and float(right) > 0.9


def test_the_bar_reads_the_loss_seldom(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    reads = []
    with progress(1000, "garments") as bar:
        for n in range(1000):
            bar(
                SimpleNamespace(
                    n=n, loss=SimpleNamespace(__float__=None) if n % 20 else Counted(reads)
                )
            )
    assert len(reads) == 50


class Counted:
    "A loss that notes that it was read"

    def __init__(self, reads):
        self.reads = reads

    def __float__(self):
        self.reads.append(1)
        return 0.5


# Schedules ----------------------------------------------------------------------------------------


@few
@given(st.integers(1, 60), st.data(), st.floats(0, 1))
def test_warmup_rises_in_even_steps_to_one_and_the_cosine_falls_to_its_end(steps, data, end):
    warmup = data.draw(st.integers(0, steps))
    f = warmup_cosine(steps, warmup, end).double()
    slowly = [
        (
            (t + 1) / warmup
            if t < warmup
            else end
            + (1 - end) * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1))) / 2
        )
        for t in range(steps)
    ]
    assert_close(f, torch.tensor(slowly, dtype=torch.double), rtol=1e-6, atol=1e-7)


@few
@given(st.integers(2, 60), st.floats(0.01, 0.99))
def test_one_cycle_rises_for_its_share_and_falls_to_zero(steps, warmup):
    f = one_cycle(steps, warmup).double()
    slowly = [min(t / steps / warmup, (1 - t / steps) / (1 - warmup)) for t in range(1, steps + 1)]
    assert_close(f, torch.tensor(slowly, dtype=torch.double), rtol=1e-6, atol=1e-7)
    assert warmup_cosine(steps).dtype == one_cycle(steps).dtype == torch.float32


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: warmup_cosine(100, 0.1),
            "warmup is 0.1; expected a whole number from 0 to 100: steps of the rise, not a share",
        ),
        (lambda: warmup_cosine(2.5), "steps is 2.5; expected a whole number"),
        (lambda: warmup_cosine(0), "steps is 0"),
        (lambda: warmup_cosine(10, 11), "warmup is 11; expected a whole number from 0 to 10"),
        (lambda: warmup_cosine(10, -1), "warmup is -1"),
        (lambda: warmup_cosine(True), "steps is True"),
        (lambda: warmup_cosine(10, 1, math.nan), "end is nan"),
        (lambda: warmup_cosine(10, 1, 2), "end is 2"),
        (lambda: warmup_cosine("10"), "steps is '10'"),
        (lambda: one_cycle(2.5), "steps is 2.5"),
        (lambda: one_cycle(10, 3), "warmup is 3; expected a finite number above 0"),
        (lambda: one_cycle(10, math.nan), "warmup is nan"),
        (lambda: one_cycle(10, 0), "warmup is 0"),
        (lambda: one_cycle(None), "steps is None"),
    ],
)
def test_schedules_refuse_in_one_sentence(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_numpy_numbers_are_numbers():
    assert torch.equal(
        warmup_cosine(np.int64(10), np.uint8(2), np.float32(0.5)), warmup_cosine(10, 2, 0.5)
    )
    assert torch.equal(one_cycle(torch.tensor(10), np.float64(0.3)), one_cycle(10))
    steps_of(
        ours := net(),
        np.int64(4),
        schedule=np.linspace(1, 0, 4),
        accum=np.int32(2),
        clip=np.float32(1),
        start=np.int64(1),
    )
    steps_of(
        theirs := net(),
        4,
        schedule=torch.linspace(1, 0, 4, dtype=torch.double),
        accum=2,
        clip=1.0,
        start=1,
    )
    assert torch.equal(weights(ours), weights(theirs))


# Speed --------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
def test_what_a_layer_keeps_is_known(b, d, k):
    model = nn.Sequential(nn.Linear(d, k), nn.Sigmoid())
    with kept_for_backward(model) as kept:
        model(torch.randn(b, d)).sum().backward()
    assert (kept.peak, kept.now) == (4 * b * (d + k), 0)
    with kept_for_backward() as all_of_it:
        model(torch.randn(b, d, requires_grad=True)).sum()
    assert all_of_it.peak > kept.peak  # the weight counts when no model is given


def test_accumulation_keeps_a_share():
    def peak(accum):
        model = nn.Linear(12, 4)
        data = zip(X.chunk(accum), Y.chunk(accum))
        with kept_for_backward(model) as kept:
            steps_of(model, 1, data=data, accum=accum)
        return kept.peak

    assert peak(4) < 0.3 * peak(1)


def test_what_is_still_held_counts_at_its_fullest():
    layer = nn.Linear(10, 10)
    with kept_for_backward(layer) as kept:
        first, second = layer(torch.randn(100, 10)), layer(torch.randn(100, 10))
        first.sum().backward(), second.sum().backward()
        layer(torch.randn(100, 10)).sum().backward()
    assert kept.peak == 2 * 4000 and kept.mb == 0.008


def test_throughput_takes_turns():
    order = []
    result = throughput(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        items=3,
        rounds=2,
        warmup=1,
    )
    assert "".join(order) == "ababab" and len(result.seconds["a"]) == 2 and result.ratio("a") == 1
    told = Throughput(10, {"slow": [2.0, 4.0, 8.0], "fast": [1.0, 1.0, 2.0]})
    assert told.rate("fast") == 10 and told.ratios("fast") == [2, 4, 4] and told.ratio("fast") == 4
    assert "× 4.00" in repr(told)


@few
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(1, 100),
)
def test_throughput_on_a_clock_of_our_own(lasts, rounds, warmup, items):
    "Each way lasts as long as it says; only timed turns count, and the first way is the control"
    now, waits = [0.0], []

    def way(seconds):
        def run():
            now[0] += seconds

        return run

    with (
        patch("foundation.training.speed.time.perf_counter", lambda: now[0]),
        patch("foundation.training.speed._waiter", lambda device: lambda: waits.append(now[0])),
    ):
        told = throughput({str(i): way(s) for i, s in enumerate(lasts)}, items, rounds, warmup)
    for i, seconds in enumerate(lasts):
        assert told.seconds[str(i)] == [seconds] * rounds
        assert told.rate(str(i)) == items / seconds and told.ratio(str(i)) == lasts[0] / seconds
    assert len(waits) == 2 * len(lasts) * (
        rounds + warmup
    )  # before and after each call: a GPU works on meanwhile


def test_the_clock_waits_for_the_device_that_is_named():
    asked = []
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.synchronize", lambda device: asked.append(str(device))),
    ):
        throughput({"a": lambda: asked.append("a")}, items=1, rounds=1, warmup=0, device="cuda:1")
    assert asked == ["cuda:1", "a", "cuda:1"]


def test_a_median_is_told_not_a_mean():
    told = Throughput(6, {"a": [1.0, 1.0, 100.0], "b": [2.0, 2.0, 1.0]})
    assert told.rate("a") == 6 and told.ratio("b") == 0.5 and told.ratios("b") == [0.5, 0.5, 100]


@pytest.mark.parametrize(
    "kind, size", [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)]
)
def test_half_precision_keeps_half_the_bytes(kind, size):
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid()).to(kind)
    with kept_for_backward(model) as kept:
        model(torch.randn(7, 6, dtype=kind)).sum().backward()
    assert (kept.peak, kept.now) == (size * 7 * (6 + 5), 0)
    model = nn.Linear(6, 5)
    with kept_for_backward(model) as kept, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(7, 6)).sum()
    assert (
        kept.peak == 2 * (7 * 6 + 6 * 5) or kept.peak == 2 * 7 * 6
    )  # the rounded weight is a copy, and may count


def test_a_tied_and_a_twice_used_layer_keep_what_they_see():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(6, 6)

        def forward(self, x):
            return self.b(self.a(x).sigmoid())

    model = Twice()
    with kept_for_backward(model) as kept:
        model(torch.randn(7, 6)).sum().backward()
    assert (kept.peak, kept.now) == (4 * 7 * 12, 0)


def test_sparse_tensors_count_by_their_parts():
    w = torch.randn(5, 3, requires_grad=True)
    for s in (torch.eye(5).to_sparse_coo(), torch.eye(5).to_sparse_csr()):
        with kept_for_backward() as kept:
            (s @ w).sum()
        assert kept.peak >= 5 * 4


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(ways={}), "got no ways; expected at least one"),
        (dict(items=0), "items is 0; expected a whole number from 1 on"),
        (dict(rounds=0), "rounds is 0"),
        (dict(warmup=-1), "warmup is -1"),
        (dict(device="gpu"), "device is 'gpu'; expected 'cpu'"),
        (dict(ways={"a": 1}), "the way 'a' is 1; expected a function"),
        (dict(items=2.5), "items is 2.5; expected a whole number"),
    ],
)
def test_throughput_refuses(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        throughput(**{"ways": {"a": int}, "items": 1} | options)


def test_peak_memory_sees_a_large_tensor_and_survives_an_error():
    with peak_memory() as peak:
        assert math.isnan(peak.mb)
        large = torch.ones(30_000_000)
        time.sleep(0.3)
        del large
    assert 100 < peak.mb < 400
    with pytest.raises(ZeroDivisionError), peak_memory():
        1 / 0
    with pytest.raises(ValueError, match="expected 'cpu' or 'cuda'"), peak_memory("meta"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_peak_memory_on_a_gpu():
    with peak_memory("cuda") as peak:
        torch.ones(30_000_000, device="cuda")
    assert 119 < peak.mb < 125


# Keeping track ------------------------------------------------------------------------------------


def step(number, value=1.0, **extra):
    return Step(number, torch.tensor(value), 0.1, None, extra)


@few
@example([math.nan, 1.0, math.inf, -math.inf], 2)
@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50), st.integers(1, 60))
def test_what_was_logged_is_read_back(tmp_path_factory, losses, every):
    path = tmp_path_factory.mktemp("log") / "deep" / "run.jsonl"
    with Log(path, every=every) as log:
        for n, loss in enumerate(losses):
            log(step(n, loss, noise=torch.tensor([0.5]), image=torch.zeros(3)), accuracy=n)
    n, values = curve(read_log(path))
    expected = [loss if math.isfinite(loss) else math.nan for loss in losses]
    assert_close(values, torch.tensor(expected, dtype=torch.double), rtol=0, atol=0, equal_nan=True)
    row = read_log(path)[-1]
    assert (
        n.tolist() == list(range(len(losses)))
        and row["accuracy"] == len(losses) - 1
        and row["noise"] == 0.5
    )
    assert not {"image", "grad_norm"} & set(row)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@few
@given(st.data())
def test_a_log_cut_anywhere_can_be_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    with Log(path) as log:
        for n in range(30):
            log(step(n))
    whole = path.read_bytes()
    cut = int(data.draw(st.floats(0, 1)) * len(whole))
    path.write_bytes(whole[:cut])
    rows = read_log(path)
    assert [row["n"] for row in rows] == list(range(whole[:cut].count(b"\n")))
    start = data.draw(st.integers(0, 30))
    with Log(path, start=start) as log:
        for n in range(start, 32):
            log(step(n))
    assert [row["n"] for row in read_log(path)] == [n for n in range(min(start, len(rows)))] + list(
        range(start, 32)
    )


KILLED = """
import sys, torch
from foundation.training.loop import Step
from foundation.training.track import Log
log = Log(sys.argv[1], every=7)
for n in range(10**6):
    log(Step(n, torch.tensor(1.), .1, None, {}))
    if n == 500: print("ready", flush=True)
"""


@needs_signals
def test_a_killed_run_leaves_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    rows = read_log(path)
    assert len(rows) >= 497 and [row["n"] for row in rows] == list(range(len(rows)))


def test_nothing_is_thrown_away(tmp_path):
    path = tmp_path / "run.jsonl"
    for value in (1.0, 2.0):
        with Log(path) as log:
            log(step(0, value))
    old = read_log(tmp_path / "run.jsonl.old")
    assert old[0]["loss"] == 1.0 and read_log(path)[0]["loss"] == 2.0


def test_a_log_holds_no_graph_and_waits_to_read(tmp_path):
    with Log(tmp_path / "run.jsonl", every=10) as log:
        log(step(0, seen=torch.ones(1, requires_grad=True) * 2))
        assert not log.rows[0]["seen"].requires_grad and read_log(tmp_path / "run.jsonl") == []
    assert read_log(tmp_path / "run.jsonl")[0]["seen"] == 2


def test_extras_cannot_pass_for_the_step(tmp_path):
    with Log(tmp_path / "run.jsonl") as log:
        log(step(3, 0.5, loss=9.0, n=7, lr=8.0))
    row = read_log(tmp_path / "run.jsonl")[0]
    assert (row["n"], row["loss"], row["lr"]) == (3, 0.5, 0.1)


def test_tracking_refuses_in_one_sentence(tmp_path):
    path = tmp_path / "run.jsonl"
    for name, value in dict(every=0, start=-1).items():
        with pytest.raises(ValueError, match=f"{name} is {value}; expected a whole number from"):
            Log(path, **{name: value})
    with Log(path) as log:
        with pytest.raises(TypeError, match="name is 'run 7'; expected a number"):
            log(step(0), name="run 7")
        with pytest.raises(TypeError, match=r"image is a tensor of float32, shape \(3,\)"):
            log(step(0), image=torch.zeros(3))
        log(step(0))
    with pytest.raises(ValueError, match="no step has 'acuracy'; there are: loss, lr, n, seconds"):
        curve(read_log(path), "acuracy")
    with pytest.raises(ValueError, match="smooth is 0"):
        plot_log(path, smooth=0)
    with pytest.raises(FileNotFoundError, match="no log at nowhere.jsonl"):
        read_log(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="a folder; expected a file of JSON lines"):
        read_log(tmp_path)
    path.write_text("PK\x03\x04 nonsense\n[1, 2]\n")
    with pytest.raises(ValueError, match="run.jsonl is no log: its first line is"):
        read_log(path)


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "7",
        "[]",
        '{"loss": 1}',
        '"n"',
        '{"n": "a"}',
        '{"n": null}',
        '{"n": 1, "lo{"n": 1, "loss": 2}',
        "[" * 9999,
    ],
)
def test_torn_lines_before_whole_ones_are_left_out_and_told(tmp_path, bad):
    path = tmp_path / "run.jsonl"
    path.write_text('{"n": 0}\n' + bad + '\n{"n": 2}\n')
    with pytest.warns(UserWarning, match="line 2 of run.jsonl cannot be read: .*; left out"):
        assert [row["n"] for row in read_log(path)] == [0, 2]
    with (
        pytest.warns(UserWarning, match="line 2"),
        Log(path, start=3) as log,
    ):  # a resumed run goes on, and the file is whole again
        log(step(3))
    assert [row["n"] for row in read_log(path)] == [0, 2, 3]


@few
@given(st.integers(0, 400), st.integers(1, 9))
def test_a_disk_that_is_full_for_a_moment_costs_no_line(tmp_path_factory, room, every):
    "The file takes `room` bytes, then nothing for three writes, then all"
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    log = Log(path, every=every)
    real, left, refused = log.file, [room], [0]

    class Full:
        name, fileno = real.name, real.fileno
        close = real.close

        def write(self, data):
            if refused[0] == 3:
                return real.write(data)
            done = real.write(bytes(data[: left[0]])) if left[0] else 0
            left[0] -= done
            if not done:
                refused[0] += 1
                raise OSError(28, "No space left on device")
            return done

    log.file = Full()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with log:
            for n in range(60):
                log(step(n))
                assert path.read_bytes()[-1:] in (b"", b"\n")  # no half line stays
    assert [row["n"] for row in read_log(path)] == list(range(60))
    assert len(told) == 3 and "run.jsonl cannot be written now (No space left on device)" in str(
        told[0].message
    )


def test_what_a_full_disk_never_took_is_told(tmp_path):
    log = Log(tmp_path / "run.jsonl", every=100)
    log(step(0))
    own = log.file
    log.file = SimpleNamespace(
        name="run.jsonl",
        fileno=own.fileno,
        close=own.close,
        write=lambda data: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.warns(UserWarning, match="1 steps are missing at the end of run.jsonl"):
        log.__exit__()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda path: read_log("x" * 400), "x{40} cannot be read as a log: File name too long"),
        (lambda path: read_log("a\0b"), "cannot be read as a log"),
        (lambda path: Log("x" * 400), "x{40} cannot be written as a log"),
        (lambda path: Log("a\0b"), "expected a name that a file can have"),
        (lambda path: Log(path), "a folder"),
        (lambda path: curve([None]), "rows hold None; expected dictionaries"),
        (lambda path: curve([{"loss": 1}]), "rows hold a dict"),
        (lambda path: plot_log({}), "got no runs"),
    ],
)
def test_places_and_rows_that_are_none_end_in_a_sentence(tmp_path, call, words):
    with pytest.raises((OSError, ValueError, TypeError), match=words):
        call(tmp_path)


@few
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_smoothing_is_a_mean_of_the_last(values, count):
    from foundation.training.track import _smoothed

    values = torch.tensor(values, dtype=torch.double)
    slowly = torch.stack([values[max(0, i + 1 - count) : i + 1].mean() for i in range(len(values))])
    assert_close(_smoothed(values, count), slowly, rtol=1e-6, atol=1e-9)


def test_runs_share_a_picture(tmp_path):
    for name, length in (("a", 5), ("b", 9)):
        with Log(tmp_path / f"{name}.jsonl") as log:
            for n in range(length):
                log(step(n, 1 / (n + 1)))
    picture = plot_log({name: tmp_path / f"{name}.jsonl" for name in "ab"}, smooth=2)
    assert "a ends at 0.225" in picture.alt and "b ends at 0.118" in picture.alt


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path / "board", every=4) as board:
        for n in range(10):
            board(step(n, 1 / (n + 1)), accuracy=n / 10)
    events = EventAccumulator(str(tmp_path / "board")).Reload()

    def read(name):
        return [(e.step, e.value) for e in events.Scalars(name)]

    assert_close(torch.tensor(read("loss")), torch.tensor([(n, 1 / (n + 1)) for n in range(10)]))
    assert_close(torch.tensor(read("accuracy")), torch.tensor([(n, n / 10) for n in range(10)]))


def test_a_missing_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or use Log"):
        TensorBoard(tmp_path)


def test_an_optimizer_of_another_network_is_refused():
    "It would step, and nothing would be learnt; one that holds a part of the network is fine"
    mine, other = nn.Linear(3, 2), nn.Linear(3, 2)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        next(train(mine, batches, classify, torch.optim.SGD(other.parameters(), 0.1), steps=1))
    for _ in train(mine, batches, classify, torch.optim.SGD([mine.bias], 0.1), steps=2):
        pass
