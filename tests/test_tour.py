"The tour as a whole: what it writes, what it claims, and how it ends when something is in the way."

import copy
import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

import foundation.tour as tour
from foundation.data.images import load_images

CHOOSE = tour.choose_plan  # the real one; a tour of this module runs by a tiny plan
TINY = replace(
    tour.SHORT,
    pretrain=2,
    looks=1,
    finetune=2,
    distil=2,
    teacher=2,
    student=2,
    recover=6,
    pictures=600,
    tests=200,
)
SCRIPT = """import sys
from dataclasses import replace
import foundation.tour as tour
from foundation.command import main
steps = dict(pretrain=2, looks=1, finetune=2, distil={distil}, teacher=2, student=2, recover=6)
tour.choose_plan = lambda short: replace(tour.SHORT, **steps, pictures=600, tests=200)
{first}
sys.exit(main(["tour", "--out", sys.argv[1]]))"""


def start(out, distil=2, first=""):
    "The command in a process of its own, on a plan of few steps"
    return subprocess.Popen(
        [sys.executable, "-uc", SCRIPT.format(distil=distil, first=first), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def last_line(text):
    assert "Traceback" not in text
    return re.split(r"[\r\n]+", text.strip())[-1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    "A tour on the digits, as where no Fashion-MNIST can be had, and the folder it wrote"
    out, patch = tmp_path_factory.mktemp("tour"), pytest.MonkeyPatch()
    patch.setattr(tour, "load_images", lambda fallback: load_images("digits"))
    patch.setattr(tour, "choose_plan", lambda short: TINY)
    yield tour.run(out, say=lambda line: None), out
    patch.undo()


def test_metrics_are_as_promised(digits):
    metrics, out = digits
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    keys = dict(
        data="name source",
        pretrain="steps seconds loss_first loss_last knn_before knn_after knn_shipped",
        finetune="labels seeds pretrained scratch pixels",
        distill="teacher student control",
    )
    for part, names in keys.items():
        assert set(names.split()) <= set(metrics[part]), part
    columns = (
        "name accuracy parameters nonzero bytes macs latency_ms images_per_second runtime".split()
    )
    assert len(metrics["stages"]) == 12 and all(
        set(columns) <= set(row) for row in metrics["stages"]
    )
    assert metrics["data"]["name"] == "digits" and metrics["seconds"] > 0


def test_the_account_is_of_real_files(digits):
    metrics, out = digits
    rows = {(row["name"], row["runtime"]): row for row in metrics["stages"]}
    files = {path.stat().st_size for path in out.iterdir()}
    assert {row["bytes"] for row in rows.values()} <= files
    for name in ("teacher", "student"):
        assert rows[name, "PyTorch"]["bytes"] > rows[name, "PyTorch"]["parameters"] * 4
    assert (
        rows["teacher, int8", "ONNX Runtime"]["bytes"]
        < rows["teacher", "ONNX Runtime"]["bytes"] / 3
    )
    assert (
        rows["teacher, 90 % pruned", "PyTorch"]["nonzero"]
        < 0.15 * rows["teacher", "PyTorch"]["nonzero"]
    )
    assert (
        rows["teacher, 90 % pruned", "PyTorch"]["bytes"] < 0.3 * rows["teacher", "PyTorch"]["bytes"]
    )
    assert all(
        abs(rows[n, "PyTorch"]["accuracy"] - rows[n, "ONNX Runtime"]["accuracy"]) < 0.01
        for n in ("teacher", "student")
    )


def test_the_page_needs_nothing_else(digits):
    page = (digits[1] / "tour.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<table>") >= 3
    images = re.findall("<img[^>]*>", page)
    assert len(images) >= 4 and all(
        re.search('alt="[^"]{20,}"', image) and "data:image" in image for image in images
    )
    assert not re.search(r'(?:src|href)="(?!data:)', page)


GOOD = {
    "pretrain": dict(knn_before=0.6, knn_after=0.7, knn_shipped=0.8),
    "finetune": dict(pretrained=[0.79, 0.80], scratch=[0.70, 0.72]),
    "distill": dict(student=[0.76, 0.77], control=[0.70, 0.71]),
    "stages": [
        dict(name="teacher", runtime="PyTorch", accuracy=0.91, bytes=5000, latency_ms=3.0),
        dict(name="student", runtime="PyTorch", accuracy=0.89, bytes=100, latency_ms=0.5),
        dict(name="student, int8", runtime="PyTorch", accuracy=0.89, bytes=50, latency_ms=0.49),
    ],
}


def test_good_metrics_pass_and_each_broken_claim_is_named():
    tour.check_claims(GOOD)
    broken = {
        "pretraining": ("pretrain", dict(knn_before=0.7, knn_after=0.7, knn_shipped=0.8)),
        "below .78": ("finetune", dict(pretrained=[0.76, 0.79], scratch=[0.60, 0.62])),
        "6 points": ("finetune", dict(pretrained=[0.79, 0.80], scratch=[0.74, 0.75])),
        "distillation": ("distill", dict(student=[0.7, 0.71], control=[0.70, 0.71])),
        "no stage": ("stages", [GOOD["stages"][0], GOOD["stages"][1] | dict(bytes=300)]),
    }
    for words, (key, value) in broken.items():
        with pytest.raises(AssertionError, match=words):
            tour.check_claims(copy.deepcopy(GOOD) | {key: value})


def test_the_promises_do_not_rest_on_assert():
    code = (
        "import json, sys, foundation.tour as tour\nmetrics = json.loads(sys.argv[1])\n"
        "try: tour.check_claims(metrics)\nexcept AssertionError as error: print(error)"
    )
    bad = GOOD | {"distill": dict(student=[0.7, 0.71], control=[0.70, 0.71])}
    done = subprocess.run(
        [sys.executable, "-O", "-c", code, json.dumps(bad)], capture_output=True, text=True
    )
    assert done.stdout == "distillation did not help\n", done.stderr


@pytest.mark.parametrize(
    "key, value",
    [
        ("pretrain", {}),
        ("finetune", dict(pretrained=[], scratch=[])),
        ("distill", None),
        ("stages", []),
        ("stages", [dict(name="teacher")]),
        ("stages", [GOOD["stages"][1]]),
        ("stages", [GOOD["stages"][0] | dict(latency_ms=0)]),
    ],
)
def test_metrics_that_are_none_are_one_sentence(key, value):
    with pytest.raises(ValueError, match="expected|not those of"):
        tour.check_claims(GOOD | {key: value})


@pytest.mark.parametrize("number", [float("nan"), -1.0])
def test_no_claim_holds_with_nan(number):
    with pytest.raises(AssertionError):
        tour.check_claims(GOOD | {"finetune": dict(pretrained=[number], scratch=[0.1])})


@pytest.mark.parametrize(
    "changes",
    [
        dict(pretrain=0),
        dict(looks=7),
        dict(seeds=()),
        dict(rates=(float("nan"),)),
        dict(trials=(1.5,)),
        dict(tests=True),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(changes):
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        replace(tour.SHORT, **changes)


def test_the_last_step_is_always_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(tour, "neighbours", lambda *_: seen.append(1) or 0.5)
    monkeypatch.setattr(tour, "fresh_encoder", lambda data: None)

    def pretrain(encoder, images, augment, steps, each, **_):
        for n in range(steps):
            each(namedtuple("Step", "n")(n))
        return namedtuple("Run", "losses seconds")(None, 0)

    monkeypatch.setattr(tour, "pretrain", pretrain)
    data = load_images("digits")
    for steps, looks, want in (
        (7, 2, [0, 3, 6, 7]),
        (6, 2, [0, 3, 6]),
        (1, 1, [0, 1]),
        (5, 5, [0, 1, 2, 3, 4, 5]),
    ):
        live = tour.pretrain_live(data, replace(tour.SHORT, pretrain=steps, looks=looks))
        assert list(live.knn) == want


def test_the_variable_makes_every_way_short(monkeypatch):
    from foundation import command

    plans = []
    monkeypatch.setattr(tour, "choose_plan", CHOOSE)
    monkeypatch.setattr(
        tour,
        "load_data",
        lambda plan: plans.append(plan) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    for variable, arguments, want in [
        ("1", [], tour.SHORT),
        ("", [], tour.Plan()),
        ("", ["--short"], tour.SHORT),
        ("0", [], tour.Plan()),
        ("1", ["--short"], tour.SHORT),
    ]:
        monkeypatch.setenv("FOUNDATION_SHORT", variable)
        assert command.main(["tour", *arguments]) == 130
        assert plans.pop() == want


def test_gains_and_what_was_not_faster():
    gain = tour.gains(GOOD["stages"])["student (PyTorch)"]
    assert gain == pytest.approx(dict(points_lost=2.0, times_smaller=50.0, times_faster=6.0))
    assert tour.not_faster(GOOD["stages"]) == [
        "student, int8 in PyTorch: 1.02× the speed of the student"
    ]


def test_an_interrupt_ends_it_and_the_next_call_goes_on_cleanly(tmp_path):
    job = start(tmp_path / "out", distil=1_000_000)
    for line in job.stdout:
        if line.startswith("3/5"):
            break
    with pytest.raises(subprocess.TimeoutExpired):
        job.wait(2)  # it is distilling now
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130 and last_line(errors).startswith("Stopped.")
    assert not list((tmp_path / "out").glob("*.json")) and not list(
        (tmp_path / "out").glob("*.html")
    )
    again = start(tmp_path / "out")
    again.communicate(timeout=300)
    assert again.returncode == 0 and (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_disk_that_fills_up_is_one_sentence(tmp_path):
    job = start(
        tmp_path / "out",
        first="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))",
    )
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 1 and "too large" in last_line(errors)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_too_little_space_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tour.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(3e6))
    with pytest.raises(ValueError, match="3 MB are free"):
        tour.run(tmp_path)


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("")
    job = start(tmp_path / "out")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1 and "out" in last_line(errors)
