"Two processes under torchrun against one: weights, files, luck, and what stops them"

import os
import subprocess
import sys
from pathlib import Path

import parallel_cases as cases
import pytest
import torch

from foundation.core.files import size_mb
from foundation.training.track import read_log

ROOT = Path(__file__).resolve().parents[1]
EXACT, SEEN = 1e-6, 1e-3  # the largest difference of a weight: rounding, and a fault


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "What one process finds, and each of two; one launch for all tests"
    folder = tmp_path_factory.mktemp("parallel")
    with cases.exactly():
        one = {case.__name__: case() for case in cases.EQUAL}
        one["resumed"] = cases.resumed(folder / "whole", 9)
        cases.resumed(folder / "resumed", 2)  # one process does two steps
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", "2", "--monitor-interval", "3"]
        launch += [str(ROOT / "tests/parallel_cases.py"), str(folder)]
        env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)
        files = [folder / "0.pt", folder / "1.pt"]
        assert all(file.exists() for file in files), done.stderr[-3000:]
        two = [torch.load(file) for file in files]  # two go on to step four
        last = cases.resumed(folder / "resumed", 9)  # and one ends it
    return dict(one=one, two=two, last=last, folder=folder, done=done)


def apart(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", [case.__name__ for case in cases.EQUAL])
def test_two_processes_give_the_weights_of_one(found, name):
    mine, (first, second) = found["one"][name], found["two"]
    assert first["ranks"] == 2
    assert apart(mine, first[name]) <= EXACT
    assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("name", [case.__name__ for case in cases.BROKEN])
def test_a_part_that_is_left_out_is_seen(found, name):
    assert apart(found["one"]["resnet"], found["two"][0][name]) > SEEN


def test_a_run_goes_on_with_another_number_of_processes(found):
    assert apart(found["last"], found["one"]["resumed"]) <= EXACT
    rows = read_log(found["folder"] / "resumed.jsonl")
    assert [row["n"] for row in rows] == [*range(6)]  # one process wrote, each step once
    plain, shared = (size_mb(found["folder"] / name) for name in ("whole", "resumed"))
    assert abs(plain - shared) < 0.001  # the same names


def test_different_batches_are_refused(found):
    for one in found["two"]:
        assert "expected the same batches in each" in one["different_batches"]


def test_ctrl_c_in_one_process_stops_all_at_the_same_step(found):
    assert [one["interrupted"] for one in found["two"]] == [2, 2]
    assert found["done"].stdout.count("stopped after 2 of 9 steps") == 1  # one process says so


def test_dropout_differs_from_row_to_row_and_the_common_luck_does_not(found):
    (zeros, luck, weights), other = (one["dropout"] for one in found["two"])
    assert 0.3 < zeros.mean() < 0.7
    assert (zeros[0, 0] != zeros[0, 1]).any()  # in two processes
    assert (zeros[0] != zeros[1]).any()  # in two steps
    assert torch.equal(luck, other[1]) and torch.equal(weights, other[2])


def test_a_process_that_is_gone_stops_the_other_with_a_sentence(found):
    assert found["done"].returncode != 0
    said = (found["folder"] / "lost.txt").read_text()
    assert said.startswith("another process of this run has ended")
