"Whole runs: `fit` adds a frame and nothing else, and early stopping gives the best weights back"

import copy

import numpy as np
import pytest
import torch
from torch import nn

from foundation.core.basics import seed_everything
from foundation.data.batches import endless
from foundation.training.loop import classify, train
from foundation.training.parameter_groups import adamw
from foundation.training.early_stopping import EarlyStopping
from foundation.training.run import fit, resumable
from foundation.training.schedules import warmup_cosine

DATA = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def fresh():
    seed_everything(0)
    parts = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*parts)


def stream(start=0):
    return endless(DATA, DATA[:, :3].argmax(1), batch_size=10, start=start)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("schedule", [None, warmup_cosine(20, 3)])
def test_fit_is_the_loop_with_adamw_to_the_last_bit(precision, schedule):
    plan = dict(steps=20, schedule=schedule, precision=precision)
    ours = fresh()
    losses = fit(ours, stream(), lr=1e-2, weight_decay=0.1, clip=0.5, title="", **plan)
    plain = fresh()
    steps = train(plain, stream(), classify, adamw(plain, 1e-2, 0.1), clip=0.5, **plan)
    assert torch.equal(torch.stack([step.loss for step in steps]), losses)
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


def test_fit_tells_each_step_once_and_keeps_what_ctrl_c_leaves(capsys):
    told = []

    def each(step):
        told.append(step.n)
        if step.n == 4:
            raise KeyboardInterrupt

    losses = fit(fresh(), stream(), steps=9, title="", each=each)
    assert told == [0, 1, 2, 3, 4] and len(losses) == 5
    assert "stopped after 5 of 9 steps" in capsys.readouterr().out
    assert len(fit(fresh(), stream(), steps=0, title="")) == 0


def test_a_run_without_a_checkpoint_opens_the_stream_once_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened, net = [], fresh()

    def watched(start):
        opened.append(start)
        return stream(start)

    run = resumable(net, watched, classify, adamw(net, 1e-2), steps=3, save_every=1)
    assert opened == [0] and len(run.losses) == 3 and run.seconds > 0
    assert not list(tmp_path.iterdir())


def test_an_objective_that_holds_the_model_is_the_same_one_after_the_model_has_learnt(tmp_path):
    net = fresh()
    opt = adamw(net, 1e-2)

    def run(stop=None):
        def each(step):
            if step.n == stop:
                raise ZeroDivisionError

        return resumable(
            net,
            stream,
            lambda model, batch: (classify(net, batch)[0] * 2, {}),
            opt,
            steps=6,
            save_every=1,
            checkpoint=tmp_path / "run",
            each=each,
        )

    with pytest.raises(ZeroDivisionError):
        run(3)
    assert len(run().losses) == 6  # the very network that was stopped


# Early stopping -----------------------------------------------------------------------------------


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_best_weights_come_back_and_not_the_last():
    model = fresh()
    best, kept = EarlyStopping(model, patience=2), None
    for score, stop in ((0.3, False), (0.8, False), (0.8, False), (0.7, True)):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 1
        if score == 0.8 and kept is None:
            kept = copy.deepcopy(model.state_dict())
        assert best.update(score) is stop
    last = state(model)
    assert best.restore() is model and best.epoch == 2 and best.score == 0.8
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, last[name])
    }
    assert any("running" in name for name in moved) and any("weight" in name for name in moved)


def test_keeping_the_last_weights_is_caught():
    class Last(EarlyStopping):
        def update(self, score):
            self.score = -1.0  # every score looks like the best
            return super().update(score)

    kept = {}
    for kind in (EarlyStopping, Last):
        model = nn.Linear(1, 1)
        best = kind(model, patience=2)
        for score in (0.3, 0.8, 0.7):
            nn.init.constant_(model.weight, score)
            best.update(score)
        kept[kind] = round(best.restore().weight.item(), 2)
    assert kept == {EarlyStopping: 0.8, Last: 0.7}


def test_the_best_state_holds_buffers_outside_the_state_dict_and_no_other_model():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
            self.register_buffer("n", torch.zeros(()), persistent=False)

    model = Counts()
    best = EarlyStopping(model)
    best.update(0.5)
    model.n += 3
    best.update(np.float32(0.25))
    assert best.restore().n == 0
    model.w = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="w is not what it was"):
        best.restore()
    model.w, model.more = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="more is not what it was"):
        best.restore()


@pytest.mark.parametrize(
    "words, call",
    [
        ("patience is 0", lambda: EarlyStopping(nn.Linear(1, 1), 0)),
        ("model is 3; expected a network", lambda: EarlyStopping(3)),
        ("the dev score is nan", lambda: EarlyStopping(nn.Linear(1, 1)).update(float("nan"))),
        ("no score yet", lambda: EarlyStopping(nn.Linear(1, 1)).restore()),
    ],
)
def test_bad_input_gets_one_sentence(words, call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
