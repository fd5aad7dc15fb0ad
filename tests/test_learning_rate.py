"""What the lesson on the learning rate cannot say: laws, restoring,
leaks, resumed searches, and bad input."""

import builtins
import math
import random
import signal
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.core.basics import seed_everything
from foundation.data.batches import endless
from foundation.data.images import ImageSet
from foundation.finetuning.learning_rate import (
    RangeTest,
    Task,
    Trial,
    best_trial,
    dev_scores,
    few_label_task,
    make_optimizer,
    range_test,
    search,
    sweep,
)
from foundation.training.loop import TrainingDiverged, classify

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
    return Task(x[:30], y[:30], x[30:], y[30:])


def stream(task, seed=0):
    return endless(task.images, task.labels, batch_size=10, seed=seed)


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
    opt = make_optimizer(name, model, 1e-2)
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
    opt, start = make_optimizer("adamw", model, 1e-2), deepcopy(model.state_dict())

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
    with patch("foundation.finetuning.learning_rate.restore"):
        range_test(model, stream(task), classify, opt)
    assert not same()


def test_groups_keep_their_ratio(task):
    model, seen = Net(), []
    opt = make_optimizer("sgd", model, 1e-3, head_factor=7.0)
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
    model, blind = Net(), task._replace(dev_labels=(task.dev_labels + 1) % 3)
    *_, score = dev_scores(
        model, blind, make_optimizer("adamw", model, 1e-2), steps=60, precision="fp32"
    )
    assert score < 0.34  # it learns the training labels well, and these are shifted by one


def image_set(test_images):
    rng = torch.Generator().manual_seed(1)
    images, labels = (
        torch.randint(256, (90, 1, 4, 4), generator=rng, dtype=torch.uint8),
        torch.arange(90) % 3,
    )
    return ImageSet(
        images,
        labels,
        test_images,
        torch.zeros(len(test_images), dtype=torch.int64),
        ("a", "b", "c"),
        "toy",
        "here",
        0.5,
        0.3,
    )


def test_nothing_of_the_test_set_reaches_a_search(tmp_path):
    runs = []
    for name, fill in (("dark", 0), ("bright", 255)):
        task = few_label_task(
            image_set(torch.full((5, 1, 4, 4), fill, dtype=torch.uint8)), labels=30, dev=30
        )

        def run(lr):
            seed_everything(0)
            model = Net()
            return dev_scores(
                model, task, make_optimizer("adamw", model, lr), steps=6, every=2, precision="fp32"
            )

        runs.append(search(run, dict(lr=(1e-4, 1e-1)), tmp_path / name, trials=5))
    assert runs[0] == runs[1]


def test_learned_and_dev_images_are_disjoint_and_seeded():
    data = image_set(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    one, two, other = (few_label_task(data, 30, 40, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, one, two)) and not torch.equal(one.images, other.images)

    def rows(images):
        return {tuple(i.flatten().tolist()) for i in images}

    assert not rows(one.images) & rows(one.dev_images) and one.labels.bincount().tolist() == [
        10,
        10,
        10,
    ]


# searches -----------------------------------------------------------------------------------------

SPACE = dict(lr=(1e-4, 1e-1), decay=(1e-3, 1.0))


def hill(lr, decay):
    top = 0.9 - 0.1 * (math.log10(lr) + 2) ** 2 - 0.02 * (math.log10(decay) + 1) ** 2
    yield from (top * part for part in (0.5, 0.8, 1.0))


@pytest.mark.parametrize("cuts", [[1], [3, 7], [2, 3, 5, 9]])
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path, cuts):
    whole, calls = search(hill, SPACE, tmp_path / "whole", trials=12), []

    def cut(**params):
        calls.append(params)
        for n, score in enumerate(hill(**params)):
            if len(calls) in cuts and n == (len(calls) == 1):  # the first in its midst
                raise KeyboardInterrupt
            yield score

    for _ in cuts:
        with pytest.raises(KeyboardInterrupt):
            search(cut, SPACE, tmp_path / "cut", trials=12)
    assert search(cut, SPACE, tmp_path / "cut", trials=12) == whole
    assert search(hill, SPACE, tmp_path / "cut", trials=12) == whole  # nothing is left to do
    assert search(hill, SPACE, tmp_path / "whole", trials=14)[:12] == whole


def test_a_search_that_was_killed_goes_on_to_the_same_trials(tmp_path):
    "No exception that could tidy up: the process is gone in the midst of its sixth trial"
    code = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_learning_rate import SPACE, hill
from foundation.finetuning.learning_rate import search
calls = []
def run(**params):
    calls.append(params)
    for score in hill(**params):
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        yield score
search(run, SPACE, sys.argv[1], trials=12)
"""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    gone = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cut"), *folders],
        capture_output=True,
        text=True,
    )
    assert gone.returncode == -signal.SIGKILL, gone.stderr
    asked = []
    rest = search(
        lambda **params: asked.append(params) or hill(**params), SPACE, tmp_path / "cut", trials=12
    )
    assert len(asked) == 7 and rest == search(
        hill, SPACE, tmp_path / "whole", trials=12
    )  # five were done


def test_a_sampler_seeded_by_the_process_would_not_go_on_to_the_same(tmp_path):
    from foundation.finetuning import learning_rate as module

    right, halves = module._sampler, []
    whole = search(hill, SPACE, tmp_path / "right", trials=8)
    with patch.object(module, "_sampler", lambda startup, seed: right(startup, 0)):
        halves = search(hill, SPACE, tmp_path / "wrong", trials=8)
    assert halves != whole and halves[1].params == halves[0].params  # the same luck again and again


def test_pruned_and_diverged_trials_never_win(tmp_path):
    calls = []

    def run(lr):
        calls.append(lr)
        if len(calls) == 8:
            raise TrainingDiverged("boom")
        yield from (
            (0.5, 0.4) if len(calls) < 7 else (0.1, 0.99)
        )  # the later ones begin badly, and would end well

    trials = search(run, dict(lr=(1e-4, 1e-1)), tmp_path / "j", trials=12, startup=5)
    assert any(trial.pruned and len(trial.scores) == 1 for trial in trials)
    assert any(trial.pruned and not trial.scores for trial in trials)
    best = best_trial(
        [Trial({}, (0.99,), True), Trial({}, (0.2,), False), Trial({}, (0.3,), False)]
    )
    assert best.scores == (0.3,) and not best_trial(trials).pruned


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
        range_test(model, stream(task), classify, make_optimizer("sgd", model, 1.0), **options)


def test_a_loss_that_is_nan_at_once_and_one_that_never_falls(task):
    model = Net()
    opt = make_optimizer("sgd", model, 1.0)
    with pytest.raises(ValueError, match="not finite at the first step"):
        range_test(
            model, [(task.images[:10] * math.nan, task.labels[:10])] * 30, classify, opt, steps=20
        )
    flat = RangeTest(torch.logspace(-5, -4, 30), torch.full((30,), 2.3))
    with pytest.raises(ValueError, match="never fell"):
        flat.suggest()
    with pytest.raises(ValueError, match="'steepest'"):
        flat.suggest("best")


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_rates_that_are_none(lr):
    with pytest.raises(ValueError, match="lr is .*; expected a finite number"):
        make_optimizer("sgd", Net(), lr)


def test_other_bad_input(task, tmp_path):
    model = Net()
    with pytest.raises(ValueError, match="'lion'; expected one of 'sgd', 'adamw', 'adafactor'"):
        make_optimizer("lion", model, 1.0)
    with pytest.raises(TypeError, match="no `head`"):
        make_optimizer("sgd", nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match="dev set is empty"):
        next(
            dev_scores(
                model,
                task._replace(dev_images=task.images[:0], dev_labels=task.labels[:0]),
                make_optimizer("sgd", model, 1.0),
                steps=2,
            )
        )
    for labels, words in (
        (task.labels + 1, "expected 0 to"),
        (torch.zeros_like(task.labels), "no training example"),
    ):
        with pytest.raises(ValueError, match=words):
            next(
                dev_scores(
                    model, task._replace(labels=labels), make_optimizer("sgd", model, 1.0), steps=2
                )
            )
    with pytest.raises(ValueError, match="dev is 0"):
        few_label_task(image_set(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), 30, 0)
    for rates in ([1e-3], [1e-2, 1e-3], [0.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(ValueError, match="rising|above 0"):
            sweep(lambda lr, seed: 1.0, rates)
    for space in (
        {},
        dict(lr=(0.0, 1.0)),
        dict(lr=(1.0, 0.1)),
        dict(lr=(1.0,)),
        dict(lr=3),
        {1: (0.1, 1)},
    ):
        with pytest.raises((ValueError, TypeError), match="0 < lo < hi|bound of lr"):
            search(hill, space, tmp_path / "j")
    with pytest.raises(ValueError, match="trials is 0"):
        search(hill, SPACE, tmp_path / "j", trials=0)
    with pytest.raises(ValueError, match="none of 1"):
        best_trial([Trial({}, (), True)])


def test_a_journal_of_another_search_is_refused(tmp_path):
    search(hill, SPACE, tmp_path / "j", trials=2)
    with pytest.raises(ValueError, match="another search"):
        search(hill, SPACE | dict(lr=(1e-5, 1e-1)), tmp_path / "j", trials=3)


def test_without_optuna_there_is_one_clear_sentence(tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with (
        patch.object(builtins, "__import__", without),
        pytest.raises(ImportError, match="pip install optuna"),
    ):
        search(hill, SPACE, tmp_path / "j")


# order, buffers, journals -------------------------------------------------------------------------


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
        body, head = (group["params"] for group in make_optimizer(name, model, 1e-3).param_groups)
        assert all(a is b for a, b in zip(body, model.body.parameters(), strict=True))
        assert all(a is b for a, b in zip(head, model.head.parameters(), strict=True))


def test_a_head_tied_to_the_body_is_in_one_group():
    model = Deep()
    model.head[0].weight = model.body.weight
    groups = make_optimizer("adamw", model, 1e-3).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len([*model.parameters()])
    with pytest.raises(TypeError, match="no `head` with parameters"):
        make_optimizer("sgd", nn.ModuleDict(dict(head=nn.Identity(), body=nn.Linear(2, 2))), 1.0)


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
        model, other = (
            Net(),
            task._replace(labels=task.labels.to(kind), dev_labels=task.dev_labels.to(kind)),
        )
        scores.append(
            list(
                dev_scores(
                    model,
                    other,
                    make_optimizer("adamw", model, 1e-2),
                    steps=np.int64(6),
                    every=2,
                    precision="fp32",
                )
            )
        )
    assert scores[0] == scores[1] == scores[2] and len(scores[0]) == 3


def test_numbers_of_numpy_are_plain_ones(tmp_path):
    space = dict(lr=(np.float32(1e-4), np.float64(1e-1)), decay=[np.float32(1e-3), 1])
    found = search(hill, space, tmp_path / "j", trials=np.int64(3), seed=np.int32(0))
    assert found == search(hill, space, tmp_path / "j", trials=3) and len(found) == 3
    assert sweep(
        lambda lr, seed: 1 - lr, np.array([1e-3, 1e-2], np.float32), np.arange(2)
    ).best == pytest.approx(1e-3)


def test_runs_that_give_no_scores(tmp_path):
    for run, words in (
        (lambda **p: 0.5, "run gave 0.5; expected dev scores"),
        (lambda **p: [None], "run gave None; expected a score"),
        (lambda **p: "abc", "run gave 'abc'"),
    ):
        with pytest.raises(TypeError, match=words):
            search(run, SPACE, tmp_path / words[9:11], trials=1)
    with pytest.raises(TypeError, match="run gave None"):
        sweep(lambda lr, seed: None, [1e-3, 1e-2])


def test_a_torn_last_line_of_a_journal_is_left_out_and_the_trials_are_the_same(tmp_path):
    "What a full disk leaves: cut anywhere, the search goes on to the same trials"
    whole = search(hill, SPACE, tmp_path / "whole", trials=6)
    data = (tmp_path / "whole").read_bytes()
    lines = len(data.splitlines())
    for at in [1, 5, 60, len(data) - 1, *range(97, len(data), len(data) // 8)]:
        (tmp_path / "torn").write_bytes(data[:at])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert search(hill, SPACE, tmp_path / "torn", trials=6) == whole, at
        assert lines <= len((tmp_path / "torn").read_bytes().splitlines())
    (tmp_path / "torn").write_bytes(data + b"\0" * 300)  # what a power cut leaves
    with pytest.warns(UserWarning, match="last line of torn was cut short"):
        assert search(hill, SPACE, tmp_path / "torn", trials=6) == whole


def test_a_damaged_journal_is_named_and_stays_as_it_is(tmp_path):
    search(hill, SPACE, tmp_path / "whole", trials=3)
    data, rng = (tmp_path / "whole").read_bytes(), random.Random(0)
    path = tmp_path / "spoilt"
    for _ in range(25):
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(data) - 1)] = rng.randrange(256)
        path.write_bytes(spoilt)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                search(hill, SPACE, path, trials=3)
        except ValueError as error:
            assert "spoilt" in str(error)
    for text in (b"a shopping list", b"one\ntwo\n", b"[]\n", b"{}\n", b'{"op_code": 99}\n'):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="spoilt"):
            search(hill, SPACE, path, trials=3)
        assert path.read_bytes() == text
    with pytest.raises(ValueError, match="no journal that can be used"):
        search(hill, SPACE, tmp_path, trials=3)


def test_a_search_runs_where_links_are_not_allowed(tmp_path, monkeypatch):
    import os

    whole = search(hill, SPACE, tmp_path / "whole", trials=3)

    def no_links(*args, **options):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", no_links)
    assert search(hill, SPACE, tmp_path / "other", trials=3) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "whole"]  # no locks, no litter


def test_a_journal_of_other_data_is_refused_where_the_recipe_says_so(tmp_path):
    search(hill, SPACE, tmp_path / "j", trials=2, recipe=dict(data="a", size=(1, 2)))
    search(hill, SPACE, tmp_path / "j", trials=2, recipe=dict(data="a", size=(1, 2)))
    for other in (dict(data="b", size=(1, 2)), None):
        with pytest.raises(ValueError, match="another search"):
            search(hill, SPACE, tmp_path / "j", trials=3, recipe=other)
    with pytest.raises(TypeError, match="recipe cannot be kept"):
        search(hill, SPACE, tmp_path / "k", recipe=dict(data=torch.ones(2)))


def test_a_flat_curve_is_drawn_without_a_suggestion():
    flat = RangeTest(torch.logspace(-5, -4, 30), torch.full((30,), 2.3))
    assert flat.plot(alt="flat") is not None
