"What the lesson on search cannot say: resumed and killed searches, journals, and bad input"

import builtins
import math
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from foundation.finetuning.search import Trial, best_trial, search
from foundation.training.loop import TrainingDiverged

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
from test_search import SPACE, hill
from foundation.finetuning.search import search
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
    from foundation.finetuning import search as module

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
    "space",
    [{}, dict(lr=(0.0, 1.0)), dict(lr=(1.0, 0.1)), dict(lr=(1.0,)), dict(lr=3), {1: (0.1, 1)}],
)
def test_spaces_that_are_none(space, tmp_path):
    with pytest.raises((ValueError, TypeError), match="0 < lo < hi|bound of lr"):
        search(hill, space, tmp_path / "j")


def test_numbers_of_trials(tmp_path):
    with pytest.raises(ValueError, match="trials is 0"):
        search(hill, SPACE, tmp_path / "j", trials=0)
    with pytest.raises(ValueError, match="none of 1"):
        best_trial([Trial({}, (), True)])


def test_numbers_of_numpy_are_plain_ones(tmp_path):
    space = dict(lr=(np.float32(1e-4), np.float64(1e-1)), decay=[np.float32(1e-3), 1])
    found = search(hill, space, tmp_path / "j", trials=np.int64(3), seed=np.int32(0))
    assert found == search(hill, space, tmp_path / "j", trials=3) and len(found) == 3


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


def test_runs_that_give_no_scores(tmp_path):
    for run, words in (
        (lambda **p: 0.5, "run gave 0.5; expected dev scores"),
        (lambda **p: [None], "run gave None; expected a score"),
        (lambda **p: "abc", "run gave 'abc'"),
    ):
        with pytest.raises(TypeError, match=words):
            search(run, SPACE, tmp_path / words[9:11], trials=1)


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
    seen = [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert sorted(seen) == ["other", "whole"]  # no litter


def test_a_journal_in_use_is_refused_and_free_again_afterwards(tmp_path):
    "A second search would close the trial that the first one is at"

    def nested(**params):
        with pytest.raises(ValueError, match="another search is using j; name another file"):
            search(hill, SPACE, tmp_path / "j", trials=2)
        return hill(**params)

    found = search(nested, SPACE, tmp_path / "j", trials=2)
    assert search(hill, SPACE, tmp_path / "j", trials=2) == found


def test_a_journal_of_other_data_is_refused_where_the_recipe_says_so(tmp_path):
    search(hill, SPACE, tmp_path / "j", trials=2, recipe=dict(data="a", size=(1, 2)))
    search(hill, SPACE, tmp_path / "j", trials=2, recipe=dict(data="a", size=(1, 2)))
    for other in (dict(data="b", size=(1, 2)), None):
        with pytest.raises(ValueError, match="another search"):
            search(hill, SPACE, tmp_path / "j", trials=3, recipe=other)
    with pytest.raises(TypeError, match="the recipe must be what JSON can hold"):
        search(hill, SPACE, tmp_path / "k", recipe=dict(data=torch.ones(2)))
