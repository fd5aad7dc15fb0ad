"What a notebook cannot say about foundation.core.basics: clocks and devices that are not there."

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from foundation.core import basics, precision
from foundation.core.basics import (
    EMA,
    Timing,
    copy_model,
    count_macs,
    count_nonzero,
    count_parameters,
    evaluating,
    freeze,
    measure,
    pick_device,
    seed_everything,
    unfreeze,
)
from foundation.core.precision import pick_precision, supports_bf16

POSIX = pytest.mark.skipif(os.name == "nt", reason="no such files there")


# Timing -------------------------------------------------------------------------------------------


class Clock:
    "A clock that only the timed function moves, and a device that must be waited for"

    def __init__(self, monkeypatch, durations, device=None):
        self.now, self.pending, self.calls, self.durations = 100.0, 0.0, 0, durations
        monkeypatch.setattr(basics.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def fn(self):
        took = self.durations[self.calls % len(self.durations)]
        self.calls += 1
        self.pending += took[1] if isinstance(took, tuple) else 0
        self.now += took[0] if isinstance(took, tuple) else took

    def synchronize(self):
        self.now, self.pending = self.now + self.pending, 0


def test_warmup_is_not_timed_and_every_repeat_is(monkeypatch):
    clock = Clock(monkeypatch, [50, 50, 1, 2, 3, 4, 5, 6, 7])
    took = measure(clock.fn, repeats=7, warmup=2)
    assert clock.calls == 9 and (took.low, took.median, took.high, took.repeats) == pytest.approx(
        (2, 4, 6, 7)
    )


def test_quartiles_are_those_of_the_calls_and_stay_within_them(monkeypatch):
    for durations, want in [
        ([3.0], (3, 3, 3)),
        ([0.001, 1.0], (0.001, 0.5005, 1.0)),
        ([1, 2, 9], (1, 2, 9)),
        ([4, 1, 3, 2], (1.25, 2.5, 3.75)),
    ]:
        took = measure(Clock(monkeypatch, durations).fn, repeats=len(durations), warmup=0)
        assert (took.low, took.median, took.high) == pytest.approx(want)


def test_a_device_is_waited_for_on_both_sides_of_the_clock(monkeypatch):
    monkeypatch.setattr(basics, "pick_device", lambda name: torch.device("cuda"))
    clock = Clock(
        monkeypatch, [(1.0, 4.0)]
    )  # a second to hand the work over, four until it is done
    took = measure(clock.fn, repeats=3, warmup=2, device="cuda")
    assert (took.low, took.median, took.high) == pytest.approx((5, 5, 5))


def test_a_timing_is_read_in_milliseconds():
    assert str(Timing(0.0123456, 0.01, 0.02, 5)) == "12.3 ms [10, 20]"


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(repeats=0), "repeats is 0; expected a whole number from 1"),
        (dict(warmup=-1), "warmup is -1"),
        (dict(repeats=2.5), "repeats is 2.5"),
        (dict(device="abacus"), "device 'abacus' is not known"),
        (dict(fn=3), "fn is 3; expected a function"),
    ],
)
def test_measure_refuses_in_a_sentence(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        measure(**dict(fn=lambda: None) | options)


# Models -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.words.weight
        self.norm, self.again = nn.BatchNorm1d(4), None

    def forward(self, x):
        return self.out(self.norm(self.words(x)))


@torch.no_grad()
def moved(model, by):
    for p in model.parameters():
        p.add_(by)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_average_of_half_floats_takes_small_steps(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.999)
    nn.init.constant_(model.weight, 1.1)
    for _ in range(5000):
        ema.update(model)
    want = model.weight.item() + 0.999**5000 * (1 - model.weight.item())
    assert ema.model.weight.dtype == torch.float32 and ema.model.weight.item() == pytest.approx(
        want, abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_average_is_the_formula_with_buffers_copied_and_ties_kept(dtype):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    ema, start = EMA(model, 0.75), model.words.weight.detach().clone()
    moved(model, 1)
    model.norm.running_mean.fill_(3)
    model.norm.num_batches_tracked.fill_(7)
    ema.update(model)
    want = 0.75 * start.double() + 0.25 * model.words.weight.double()
    assert torch.allclose(
        ema.model.words.weight.double(), want, rtol=1e-6, atol=1e-6
    )  # once, though it has two names
    assert ema.model.out.weight is ema.model.words.weight and not any(
        p.requires_grad for p in ema.model.parameters()
    )
    assert (
        ema.model.norm.running_mean.tolist() == [3] * 4 and ema.model.norm.num_batches_tracked == 7
    )
    assert all(
        t.dtype == torch.promote_types(dtype, torch.float32)
        for t in ema.model.state_dict().values()
        if t.is_floating_point()
    )
    assert (
        model.words.weight.dtype == dtype and ema.model(torch.tensor([[1, 2]])[0]).isfinite().all()
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
        lambda: torch.nn.utils.weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_models_whose_weights_are_computed_are_copied_and_averaged(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    model(x).sum().backward()
    twin, ema = copy_model(model), EMA(model, 0.5)
    torch.testing.assert_close(twin(x), model(x))
    torch.testing.assert_close(ema.model(x), model(x))
    before = model(x).detach()
    moved(model, 0.1)
    torch.testing.assert_close(twin(x), before)  # nothing is shared
    ema.update(model)
    half = moved(copy_model(model), -0.05)
    torch.testing.assert_close(ema.model(x), half(x))


def test_a_copy_keeps_one_layer_under_two_names_one():
    layer = nn.Linear(3, 3)
    twin = copy_model(nn.Sequential(layer, nn.ReLU(), layer))
    assert twin[0] is twin[2] and twin[0] is not layer


def test_an_average_follows_names_and_moves_nothing_for_another_model():
    class Two(nn.Module):
        def __init__(self, names):
            super().__init__()
            for i, name in enumerate(names):
                self.add_module(name, nn.Linear(2, 2, bias=False))
                nn.init.constant_(getattr(self, name).weight, ord(name))
            self.register_buffer("seen", torch.zeros(2))

    ema = EMA(Two("ab"), 0.5)
    ema.update(Two("ba"))
    assert ema.model.a.weight[0, 0] == ord("a") and ema.model.b.weight[0, 0] == ord("b")
    other, wide, lone = Two("ab"), Two("ab"), EMA(Tied(), 0.5)
    other.seen = torch.zeros(())
    wide.b = nn.Linear(3, 2, bias=False)
    loose = Tied()
    loose.out.weight = nn.Parameter(loose.out.weight.detach().clone())
    before = [{k: v.clone() for k, v in e.model.state_dict().items()} for e in (ema, lone)]
    for average, model, words in [
        (ema, Two("ac"), "the first is 'b.weight'"),
        (ema, Two("a"), "'b"),
        (ema, wide, "b.weight has shape"),
        (ema, moved(other, 1), r"seen has shape \(\); expected \(2,\)"),
        (lone, loose, "tied"),
    ]:
        with pytest.raises(ValueError, match=words):
            average.update(model)
    for state, average in zip(before, (ema, lone)):
        assert all(torch.equal(state[k], v) for k, v in average.model.state_dict().items())


@pytest.mark.parametrize("decay", [1, -0.1, float("nan"), "a", None])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises((TypeError, ValueError), match="decay is"):
        EMA(nn.Linear(1, 1), decay)
    assert EMA(nn.Linear(1, 1), np.float32(0.5)).decay == 0.5


class Stops(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("last", [nn.Identity(), Stops()])
def test_counting_leaves_each_mode_as_it_was(last):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.Dropout(), last).train()
    model[1].eval()
    modes, mean, x = (
        [m.training for m in model.modules()],
        model[1].running_mean.clone(),
        torch.ones(1, 1, 5, 5),
    )
    with suppress(KeyboardInterrupt):
        count_macs(model, x)
    with suppress(KeyboardInterrupt), evaluating(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        model(x)
    assert [m.training for m in model.modules()] == modes and torch.equal(
        mean, model[1].running_mean
    )
    assert torch.is_grad_enabled()
    with pytest.raises(TypeError, match="got no input; expected"):
        count_macs(model)


def test_counts_are_those_made_by_hand():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    assert count_macs(attention, x, x, x) == 2 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8)
    block, mixing = (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        2 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8),
    )
    assert (
        count_macs(block, x) == mixing + 2 * 2 * 5 * 8 * 16
        and torch.backends.mha.get_fastpath_enabled()
    )
    with pytest.raises(ValueError, match="LSTM, whose products PyTorch does not count"):
        count_macs(nn.Sequential(nn.LSTM(8, 8)), x)
    model = nn.Linear(4, 3)
    freeze(model).bias.requires_grad_()
    assert count_parameters(model) == 15 and count_parameters(model, trainable=True) == 3
    assert count_parameters(unfreeze(model), True) == 15
    torch.manual_seed(0)
    pruned = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    assert count_nonzero(pruned) == 6 + 3 and count_parameters(pruned) == 15
    prune.remove(pruned, "weight")
    assert count_nonzero(pruned) == 6 + 3


def test_unfreeze_leaves_whole_numbers_alone():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.w = (
                nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
                nn.Parameter(torch.ones(2)),
            )

    model = unfreeze(freeze(Whole()))
    assert model.w.requires_grad and not model.n.requires_grad


# Seeds, devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint8(3), torch.tensor(3), 2**32 - 1])
def test_one_seed_seeds_all_three(seed):
    import random

    draws = []
    for _ in range(2):
        given = seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1] and type(given) is int and given == int(seed)
    seed_everything(4)
    others = random.random(), np.random.rand(), torch.rand(()).item()
    assert all(a != b for a, b in zip(draws[0], others))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None, "1"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed is"):
        seed_everything(seed)


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setenv("FOUNDATION_DEVICE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1").index == 1
    assert pick_device(torch.device("cpu")) == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("FOUNDATION_DEVICE", "cpu")
    assert pick_device() == torch.device("cpu")
    for name, words in [
        ("cuda:2", "not available"),
        ("xpu", "not available"),
        ("abacus", "not known"),
        ("meta", "not available"),
    ]:
        for call in (pick_device, supports_bf16):
            with pytest.raises(ValueError, match=words):
                call(name)


def test_bf16_is_a_matter_of_the_processors_flags(monkeypatch):
    for flags, want in [
        ({"avx2"}, False),
        ({"avx512_bf16"}, True),
        ({"amx_bf16"}, True),
        ({"bf16"}, True),
        (set(), False),
    ]:
        monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
        assert supports_bf16("cpu") is want
        assert pick_precision("cpu") == ("bf16" if want else "fp32")


def test_flags_are_those_that_pytorch_found_and_none_where_it_does_not_tell(monkeypatch):
    told = {"avx2": True, "avx512_bf16": False, "l2_cache_size": 1, "architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert precision.cpu_flags() == {"avx2"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision.cpu_flags() == set() and pick_precision("cpu") == "fp32"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells it there")
def test_flags_are_those_of_the_operating_system():
    known = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    for flag in ("avx512_bf16", "amx_bf16", "avx512_vnni"):
        assert (flag in precision.cpu_flags()) <= (flag in known)


def test_inputs_that_the_model_does_not_take_are_named():
    model = nn.Linear(3, 2)
    assert count_macs(model, np.ones((2, 3), np.float32)) == 12
    for bad, words in [
        (None, "got None"),
        ([1], "got a list"),
        (torch.ones(2, 4), r"does not take a tensor of float32, shape \(2, 4\)"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            count_macs(model, bad)
        assert "\n" not in str(caught.value)
