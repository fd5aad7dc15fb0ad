"What the lesson on the learning rate cannot say: laws, restoring, leaks, and bad input"

import math
import random
from copy import deepcopy
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.core.basics import seed_everything
from foundation.data.batches import endless
from foundation.data.tasks import Task
from foundation.finetuning.rate_search import RangeTest, dev_scores, range_test, sweep
from foundation.training.loop import TrainingDiverged, classify
from foundation.training.parameter_groups import head_groups, make_optimizer

few = settings(max_examples=8, deadline=None)


class Net(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(12, k)

    def forward(self, x):
        return self.head(self.body(x))


class Bowl(nn.Module):
    def __init__(self, curvature):
        super().__init__()
        self.curvature, self.w = curvature, nn.Parameter(torch.ones((), dtype=torch.double))


def bowl(model, batch):
    return model.curvature * model.w.square() / 2, {}


@pytest.fixture
def task():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 4, 4, generator=rng) + y[:, None, None, None]
    x, y = torch.cat([x, torch.full((3, 1, 4, 4), math.nan)]), torch.cat([y, torch.arange(3)])
    return Task(x, y, ("a", "b", "c"), *torch.arange(63).split([30, 30, 3]))


def stream(task, seed=0):
    return endless(*task.read(task.pool), batch_size=10, seed=seed)


def optimizer(name, model, lr, head_lr=None):
    return make_optimizer(name, head_groups(model, lr, head_lr))


# the range test -----------------------------------------------------------------------------------


def turn(model, steps=200):
    "The rate at which the loss turns upwards"
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    found = range_test(model, range(steps), bowl, opt, lo=1e-4, hi=1e3, steps=steps)
    return found.rates[found.losses.argmin()].item(), (1e7) ** (1 / (steps - 1))


@few
@given(st.floats(0.05, 500))
def test_on_a_parabola_the_loss_turns_at_two_over_the_curvature(curvature):
    rate, step = turn(Bowl(curvature))
    assert 1 - 1e-9 <= rate * curvature / 2 <= step * (1 + 1e-9)


def test_a_schedule_that_is_one_step_late_is_seen_by_the_law():
    from foundation.training import loop

    right = loop._set_rates

    def late(opt, schedule, n):
        return right(opt, schedule, max(0, n - 2))

    with patch.object(loop, "_set_rates", late):
        rate, step = turn(Bowl(4.0))
    assert not 1 - 1e-9 <= rate * 4.0 / 2 <= step * (1 + 1e-9)


@few
@given(st.floats(-4, -1.5), st.floats(0.2, 0.6), st.integers(0, 10**6))
def test_the_suggestion_is_the_middle_of_a_clean_fall_and_noise_moves_it_little(
    middle, width, seed
):
    rates = torch.logspace(-6, 0, 60, dtype=torch.double)
    fall = 2.3 - 2 * torch.sigmoid((rates.log10() - middle) / width * 4)
    assert abs(math.log10(RangeTest(rates, fall).suggest()) - middle) < 0.12
    noisy = fall + 0.05 * torch.randn(
        60, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )
    assert abs(math.log10(RangeTest(rates, noisy).suggest()) - middle) < math.log10(3)


def test_the_bell_does_not_lag_and_a_running_mean_does():
    rates = torch.logspace(-6, 0, 60, dtype=torch.double)
    fall = 2.3 - 2 * torch.sigmoid((rates.log10() + 3) * 8)
    mean, lagged = fall[0], []
    for value in fall:
        mean = 0.9 * mean + 0.1 * value
        lagged.append(mean)
    behind = rates[torch.gradient(torch.stack(lagged))[0].argmin()].item()
    assert (
        abs(math.log10(RangeTest(rates, fall).suggest()) + 3) < 0.1 < 0.2 < math.log10(behind) + 3
    )


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_model_optimizer_modes_gradients_and_luck_come_back(task, name):
    seed_everything(3)
    model = Net()
    opt = optimizer(name, model, 1e-2)
    list(
        dev_scores(model, task, opt, steps=3, precision="fp32")
    )  # an optimizer with a memory, and gradients
    model.body[2].eval()

    def look():
        return (
            deepcopy(model.state_dict()),
            deepcopy(opt.state_dict()),
            [m.training for m in model.modules()],
            [p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1],
        )

    before = look()
    range_test(model, stream(task), classify, opt, lo=1e-5, hi=1e2, steps=40)
    torch.testing.assert_close(look()[1]["state"], before[1]["state"], rtol=0, atol=0)
    after = look()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert [g | {"params": 0} for g in before[1]["param_groups"]] == [
        g | {"params": 0} for g in after[1]["param_groups"]
    ]
    assert before[2] == after[2] and all(map(torch.equal, before[3], after[3]))
    assert (
        torch.equal(before[4], after[4]) and before[5] == after[5] and (before[6] == after[6]).all()
    )


def test_it_comes_back_after_an_error_too_and_a_test_that_keeps_its_weights_is_seen(task):
    model = Net()
    opt, start = optimizer("adamw", model, 1e-2), deepcopy(model.state_dict())

    def breaks(model, batch, seen=[]):
        seen.append(1)
        if len(seen) > 5:
            raise RuntimeError("in the midst")
        return classify(model, batch)

    def same():
        return all(torch.equal(v, model.state_dict()[k]) for k, v in start.items())

    with pytest.raises(RuntimeError, match="midst"):
        range_test(model, stream(task), breaks, opt)
    assert same() and not opt.state
    with patch("foundation.finetuning.rate_search.restore"):
        range_test(model, stream(task), classify, opt)
    assert not same()


def test_groups_keep_their_ratio(task):
    model, seen = Net(), []
    opt = optimizer("sgd", model, 1e-3, head_lr=7e-3)
    original = opt.step
    opt.step = lambda *a, **k: (
        seen.append([g["lr"] for g in opt.param_groups]),
        original(*a, **k),
    )[1]
    found = range_test(model, stream(task), classify, opt, lo=1e-6, hi=1e-2, steps=20)
    torch.testing.assert_close(
        torch.tensor(seen).double(),
        torch.stack([found.rates, 7 * found.rates], 1),
        rtol=1e-6,
        atol=0,
    )


# sweeps and leaks ---------------------------------------------------------------------------------


def test_a_sweep_scores_a_diverged_run_as_the_worst():
    def run(lr, seed):
        if lr > 0.5:
            raise TrainingDiverged("boom")
        return math.nan if lr > 0.05 else 1 - abs(math.log10(lr) + 3) / 10 + seed / 100

    found = sweep(run, [1e-4, 1e-3, 1e-2, 1e-1, 1.0], seeds=range(3))
    assert found.best == 1e-3 and found.scores[3:].sum() == 0 and found.peak == pytest.approx(1e-3)


@few
@given(st.floats(-3.4, -1.6))
def test_the_peak_of_a_parabola_is_found_between_the_rates(top):
    found = sweep(
        lambda lr, seed: 0.8 - 0.1 * (math.log10(lr) - top) ** 2,
        torch.logspace(-4, -1, 7).tolist(),
        seeds=range(2),
    )
    assert math.log10(found.peak) == pytest.approx(top, abs=1e-6)


def test_a_choice_by_training_loss_is_another_one_than_by_dev():
    "Memorising: the training loss keeps falling with the rate, while the dev score has a top"
    dev = sweep(
        lambda lr, seed: 0.8 - 0.1 * (math.log10(lr) + 3) ** 2 + seed / 100, [1e-4, 1e-3, 1e-2]
    )
    train = sweep(lambda lr, seed: -0.1 / lr**0.1 + seed / 100, [1e-4, 1e-3, 1e-2], diverged=-9)
    assert dev.best == 1e-3 != train.best


def test_the_score_is_that_of_the_dev_set_not_of_the_training_set(task):
    seed_everything(0)
    model, labels = Net(), task.labels.clone()
    labels[task.dev] = (labels[task.dev] + 1) % 3
    blind = replace(task, labels=labels)
    *_, score = dev_scores(
        model, blind, optimizer("adamw", model, 1e-2), steps=60, precision="fp32"
    )
    assert score < 0.34  # it learns the training labels well, and these are shifted by one


def test_nothing_of_the_test_set_reaches_the_scores(task):
    "Its images are NaN and the scores are the same; whoever read one would see it"
    found = []
    for fill in (math.nan, 0.0):
        seed_everything(0)
        inputs = task.inputs.clone()
        inputs[task.test] = fill
        model, other = Net(), replace(task, inputs=inputs)
        opt = optimizer("adamw", model, 1e-2)
        found.append(list(dev_scores(model, other, opt, steps=6, every=2, precision="fp32")))
    assert found[0] == found[1] and len(found[0]) == 3


def test_all_of_the_pool_is_learnt_from_and_nothing_else(task):
    "Learnt by heart: high on the pool, and chance on dev examples with labels of their own"
    seed_everything(0)
    labels = task.labels.clone()
    labels[task.dev] = torch.randint(3, (30,))
    model, other, seen = Net(), replace(task, labels=labels), set()
    model.register_forward_pre_hook(
        lambda m, args: seen.update(x.sum().item() for x in args[0]) if m.training else None
    )
    list(dev_scores(model, other, optimizer("sgd", model, 1e-2), steps=6, precision="fp32"))
    assert seen == {x.sum().item() for x in task.inputs[task.pool]}


# bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(lo=0.0), "lo is 0.0"),
        (dict(lo=-1.0), "lo is -1.0"),
        (dict(lo="a"), "lo is 'a'"),
        (dict(lo=1.0, hi=0.1), "hi is 0.1; .* above 1.0"),
        (dict(lo=1.0, hi=1.0), "hi is 1.0; .* above 1.0"),
        (dict(lo=math.nan), "lo is nan"),
        (dict(hi=math.inf), "hi is inf"),
        (dict(steps=5), "steps is 5; expected a whole number from 20 on"),
    ],
)
def test_range_tests_that_cannot_be(task, options, words):
    model = Net()
    with pytest.raises((ValueError, TypeError), match=words):
        range_test(model, stream(task), classify, optimizer("sgd", model, 1.0), **options)


def test_a_loss_that_is_nan_at_once_and_one_that_never_falls(task):
    model = Net()
    opt = optimizer("sgd", model, 1.0)
    with pytest.raises(ValueError, match="not finite at the first step"):
        broken = [(torch.full((9, 1, 4, 4), math.nan), torch.arange(9) % 3)] * 30
        range_test(model, broken, classify, opt, steps=20)
    flat = RangeTest(torch.logspace(-5, -4, 30), torch.full((30,), 2.3))
    with pytest.raises(ValueError, match="never fell"):
        flat.suggest()
    with pytest.raises(ValueError, match="'steepest'"):
        flat.suggest("best")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dev=torch.empty(0, dtype=torch.int64)), "dev is empty"),
        (dict(pool=torch.arange(10) * 3), "no training example has the labels"),
        (dict(labels=torch.arange(63) % 4, classes=tuple("abcd")), "labels run from 0 to 3"),
    ],
)
def test_tasks_that_cannot_be_learnt(task, change, words):
    model = Net()
    with pytest.raises(ValueError, match=words):
        next(dev_scores(model, replace(task, **change), optimizer("sgd", model, 1.0), steps=2))


@pytest.mark.parametrize("rates", [[1e-3], [1e-2, 1e-3], [0.0, 1.0], [-1.0, 1.0]])
def test_rates_of_a_sweep_rise_from_above_zero(rates):
    with pytest.raises(ValueError, match="rising|above 0"):
        sweep(lambda lr, seed: 1.0, rates)


@pytest.mark.parametrize("score", [None, "much", [1.0, 2.0], torch.ones(2)])
def test_a_run_of_a_sweep_gives_a_number(score):
    with pytest.raises((TypeError, ValueError), match="the score of arm '0.001' for seed 0"):
        sweep(lambda lr, seed: score, [1e-3, 1e-2])


# order, buffers, kinds of numbers ----------------------------------------------------------------


class Deep(nn.Module):
    "A head of several layers, so that it has an order"

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Sequential(
            *(nn.Linear(4, 4 + i) if i == 0 else nn.Linear(3 + i, 4 + i) for i in range(6))
        )

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_parameters_go_into_an_optimizer_in_the_order_of_the_model(name):
    "A checkpoint goes by place: in an order by memory address moments meet the wrong weights"
    kept = []
    for _ in range(20):
        kept.append(model := Deep())  # all alive, so that each lies elsewhere
        body, head = (group["params"] for group in optimizer(name, model, 1e-3).param_groups)
        assert all(a is b for a, b in zip(body, model.body.parameters(), strict=True))
        assert all(a is b for a, b in zip(head, model.head.parameters(), strict=True))


def test_a_head_tied_to_the_body_is_in_one_group():
    model = Deep()
    model.head[0].weight = model.body.weight
    groups = optimizer("adamw", model, 1e-3).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len([*model.parameters()])
    with pytest.raises(TypeError, match="no linear `head`"):
        optimizer("sgd", nn.ModuleDict(dict(head=nn.Identity(), body=nn.Linear(2, 2))), 1.0)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.rest = (
            nn.Parameter(torch.ones(3)),
            nn.Parameter(torch.ones(2), requires_grad=False),
        )
        self.register_buffer("n", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.n += 1
        return x * self.w + self.n


def test_buffers_outside_the_state_dict_and_what_is_frozen_come_back_too():
    model = Counts()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)

    def objective(model, batch):
        model.rest.requires_grad_(True)
        return model(torch.ones(3)).square().mean(), {}

    range_test(model, range(40), objective, opt, steps=25)
    assert model.n == 0 and not model.rest.requires_grad and torch.equal(model.w, torch.ones(3))


def test_labels_of_another_whole_number_type_train_alike(task):
    scores = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        seed_everything(0)
        model, other = Net(), replace(task, labels=task.labels.to(kind))
        plan = dict(steps=np.int64(6), every=2, precision="fp32")
        scores.append(list(dev_scores(model, other, optimizer("adamw", model, 1e-2), **plan)))
    assert scores[0] == scores[1] == scores[2] and len(scores[0]) == 3


def test_rates_of_numpy_are_plain_numbers():
    found = sweep(lambda lr, seed: 1 - lr, np.array([1e-3, 1e-2], np.float32), np.arange(2))
    assert found.best == pytest.approx(1e-3)


def test_a_flat_curve_is_drawn_without_a_suggestion():
    flat = RangeTest(torch.logspace(-5, -4, 30), torch.full((30,), 2.3))
    assert flat.plot(alt="flat") is not None
