"Study: what is asked of the arms, what is kept, what is refused"

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foundation.evaluation.study import Study
from foundation.training.loop import TrainingDiverged


def arm_of(table):
    "An arm that reads its scores from (setting, part, seed)"

    def arm(seed, setting, part):
        return table[setting, part, seed]

    return arm


@given(st.data())
def test_it_picks_as_the_slow_way_does(data):
    settings, seeds, draws = [0.1, 0.3, 1.0], [0, 1, 2], [100, 101]
    scores = st.floats(0, 1).map(lambda x: round(x, 3))
    runs = [(s, "dev", d) for s in settings for d in draws]
    runs += [(s, "test", n) for s in settings for n in seeds]
    table = {run: data.draw(scores) for run in runs}
    lower = data.draw(st.booleans())
    study = Study(
        dict(a=arm_of(table), b=lambda *_: 0.5),
        seeds,
        dict(a=settings),
        draws=draws,
        lower_is_better=lower,
    )
    comparison = study.run(title="")
    best = None
    for setting in settings:
        mean = (table[setting, "dev", 100] + table[setting, "dev", 101]) / 2
        if best is None or (mean < best[1] if lower else mean > best[1]):
            best = setting, mean
    assert study.picked == dict(a=best[0], b=None)
    assert comparison["a"].tolist() == pytest.approx([table[best[0], "test", n] for n in seeds])
    assert comparison.lower_is_better == lower


def test_one_setting_is_not_tuned_and_the_test_is_asked_once_a_seed():
    asked = []
    study = Study(dict(a=lambda *run: asked.append(run) or 0.5), (3, 4), dict(a=[0.2]))
    study.run(title="")
    study.run(title="")
    assert asked == [(3, 0.2, "test"), (4, 0.2, "test")]


@pytest.mark.parametrize("at", range(6))
def test_killed_at_any_run_it_goes_on_and_gives_the_same(tmp_path, at):
    def score(seed, setting, part):
        return (seed * 7 + setting * 3 + len(part)) % 11 / 11

    want = Study(dict(a=score), (0, 1), dict(a=(1, 2)), draws=(8, 9)).run(title="")["a"]
    code = f"""
import os
from foundation.evaluation.study import Study
calls = []
def score(seed, setting, part):
    calls.append(1)
    if len(calls) == {at + 1}:
        os._exit(9)
    return (seed * 7 + setting * 3 + len(part)) % 11 / 11
Study(dict(a=score), (0, 1), dict(a=(1, 2)), draws=(8, 9), path="s.json").run(title="")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    asked = []

    def counted(*run):
        asked.append(run)
        return score(*run)

    again = Study(dict(a=counted), (0, 1), dict(a=(1, 2)), draws=(8, 9), path=tmp_path / "s.json")
    assert torch.equal(again.run(title="")["a"], want) and len(asked) == 6 - at


def test_interrupted_it_gives_the_seeds_that_all_arms_have_finished():
    def stops(seed, setting, part):
        if seed == 2:
            raise KeyboardInterrupt
        return 0.5 + seed / 10

    study = Study(dict(a=lambda *_: 0.1, b=stops), (0, 1, 2))
    with pytest.warns(UserWarning, match="holds 2 of 3 seeds"):
        comparison = study.run(title="")
    assert tuple(comparison.seeds) == (0, 1)
    with pytest.raises(KeyboardInterrupt):
        Study(dict(b=stops), (2, 3)).run(title="")


def test_a_diverged_setting_loses_and_a_diverged_test_run_is_an_error():
    def run(seed, setting, part):
        if setting == 1.0:
            raise TrainingDiverged("nan")
        return float("nan") if setting == 0.5 and part == "dev" else 0.3

    study = Study(dict(a=run), settings=dict(a=(1.0, 0.5, 0.1)))
    study.run(title="")
    assert study.picked["a"] == 0.1
    for setting, error in ((1.0, TrainingDiverged), (0.5, ValueError)):

        def bad(seed, _, part, setting=setting):
            if setting == 0.5:
                return float("nan")
            return run(seed, setting, part)

        with pytest.raises(error):
            Study(dict(a=bad)).run(title="")


def test_a_file_of_another_recipe_or_a_damaged_one_is_refused_and_stays(tmp_path):
    path = tmp_path / "new" / "study.json"
    Study(dict(a=lambda *_: 0.5), path=path, recipe=dict(steps=60, data="f3")).run(title="")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="steps was 60 and is 80 here"):
        Study(dict(a=lambda *_: 0.5), path=path, recipe=dict(steps=80, data="f3"))
    with pytest.raises(ValueError, match="data was f3 and is None"):
        Study(dict(a=lambda *_: 0.5), path=path, recipe=dict(steps=60))
    assert path.read_bytes() == before
    for text in ("", "{}", "[1]", before.decode()[:40]):
        path.write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            Study(dict(a=lambda *_: 0.5), path=path)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(arms={}), "arms are"),
        (dict(arms=dict(a=0.5)), "arms are"),
        (dict(settings=dict(b=(1,))), "settings name 'b'"),
        (dict(settings=dict(a=())), "a may pick from"),
        (dict(settings=dict(a=(1, 1))), "a may pick from"),
        (dict(seeds=(0, 1000)), "seed 1000 is also a draw"),
        (dict(seeds=()), "expected one row"),
        (dict(seeds=(0, 0)), "seed"),
        (dict(level=2.0), "level"),
    ],
)
def test_what_is_no_study_is_refused_before_the_first_run(change, words):
    def never(*_):
        raise AssertionError("it ran")

    with pytest.raises((TypeError, ValueError), match=words):
        Study(**(dict(arms=dict(a=never)) | change))


def test_its_card_is_json_and_tells_all():
    study = Study(dict(a=lambda seed, s, part: s * seed), (1, 2), dict(a=(0.5, 1.0)), draws=(3,))
    study.run(title="")
    assert json.loads(json.dumps(study.card())) == dict(
        seeds=[1, 2],
        picked=dict(a=1.0),
        tuning=dict(a={"0.5": 1.5, "1.0": 3.0}),
        scores=dict(a=[1.0, 2.0]),
    )
