"""Every exercise of the course is whole,
and the check behind it copes with whatever a learner hands in."""

import ast
import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from platformdirs import windows
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from torch import Tensor

from foundation.core import exercises
from foundation.core.exercises import (
    CALLOUT,
    Exercise,
    list_exercises,
    exercise_progress,
    progress_file,
    require,
    require_close,
)

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
LESSONS = [
    p
    for p in sorted(NBS.rglob("*.ipynb"))
    if not any(part[0] in "._" for part in p.relative_to(NBS).parts)
]


# Each exercise in each notebook has all its parts -------------------------------------------------


class Cell:
    "A cell's text, and what an author can say about it"

    def __init__(self, cell):
        self.text = "".join(cell["source"])
        self.is_code = cell["cell_type"] == "code"
        self.folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        self.hidden = self.folded and bool(re.search(r"^#\| *hide\s*$", self.text, re.M))
        self.solution = self.folded and all(
            re.search(p, self.text, re.M)
            for p in (r"^#\| *code-fold: *true\s*$", r'^#\| *code-summary: *"?Solution"?\s*$')
        )
        self.shown = json.dumps(cell.get("outputs", []))
        self.body = parsed(self.text) if self.is_code else []


def parsed(text):
    try:
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", text, flags=re.M)).body
    except SyntaxError:
        return []


def is_stub(node):
    "Something to fill in: `...`, `None`, or NotImplementedError somewhere in it"
    if isinstance(node, ast.Assign):
        return isinstance(node.value, ast.Constant) and node.value.value in (None, ...)
    return any(
        isinstance(n, ast.Constant)
        and n.value is ...
        or isinstance(n, ast.Name)
        and n.id == "NotImplementedError"
        for n in ast.walk(node)
    )


def defined(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return (
        [t.id for t in node.targets if isinstance(t, ast.Name)]
        if isinstance(node, ast.Assign)
        else []
    )


def calls(cells, owner, method):
    "(index, call) of each `owner.method(...)` that is a statement"
    for i, cell in enumerate(cells):
        for node in cell.body:
            call = getattr(node, "value", None)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{owner}.{method}":
                yield i, call


def made(cells):
    "(index, name, arguments) of each `name = Exercise(...)`"
    words = ["lesson", "title", "check", "hints"]
    values = {}  # of names that were given beforehand
    for i, cell in enumerate(cells):
        for node in cell.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.List)):
                values |= dict.fromkeys(defined(node), node.value)
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func) == "Exercise"
            ):
                given = dict(zip(words, node.value.args)) | {
                    k.arg: k.value for k in node.value.keywords
                }
                told = {k: values.get(getattr(v, "id", None), v) for k, v in given.items()}
                yield i, defined(node)[0], told


def faults(nb, lesson):
    "What the exercises of a notebook lack, a sentence each"
    cells = [Cell(c) for c in nb["cells"]]
    found, callouts = [], {}
    for i, cell in enumerate(cells):
        if not cell.is_code:
            callouts |= {m["title"]: i for m in CALLOUT.finditer(cell.text)}
            if len(re.findall(r"^> \*\*Exercise:\*\*", cell.text, re.M)) != len(
                CALLOUT.findall(cell.text)
            ):
                found.append(
                    f"cell {i}: a call-out is not '> **Exercise:** Title · easy|medium|hard · N"
                    " minutes'"
                )
    titles = set()
    for i, name, given in made(cells):
        title = given["title"].value
        if given["lesson"].value == "demo":  # shows what goes wrong, sets no task
            continue
        titles.add(title)
        missing = list(parts_missing(cells, i, name, given, lesson, callouts))
        found += [f"{title}: {what}" for what in missing]
    return found + [
        f"{title}: no Exercise behind the call-out" for title in callouts.keys() - titles
    ]


def parts_missing(cells, i, name, given, lesson, callouts):
    if given["lesson"].value != lesson:
        yield f"lesson is {given['lesson'].value!r}, expected {lesson!r}"
    if not callouts.get(given["title"].value, i) < i:
        yield "the call-out stands below its Exercise"
    if given["title"].value not in callouts:
        yield "no call-out with this title"
    if not cells[i].hidden:
        yield "the cell with the check is not hidden"
    if not isinstance(given.get("hints"), ast.List) or len(given["hints"].elts) < 2:
        yield "fewer than two hints"
    checks = [(j, call) for j, call in calls(cells, name, "check") if len(cells[j].body) == 1]
    if len(checks) != 1:
        yield f"{len(checks)} cells that hold `{name}.check(...)` and nothing else, expected 1"
        return
    ((at, check),) = checks
    answer = ast.unparse(check.args[0])
    if not any(is_stub(node) for node in cells[at - 1].body if answer in defined(node)):
        yield f"no stub of `{answer}` right above its check"
    if "Not solved yet" not in cells[at].shown:
        yield "the saved output of the check is not that of the untouched stub"
    yield from proof_missing(cells, name, answer)


def proof_missing(cells, name, answer):
    proofs = list(calls(cells, name, "prove"))
    if len(proofs) != 1:
        yield f"{len(proofs)} proofs, expected 1"
        return
    ((at, proof),) = proofs
    given = {k.arg: k.value for k in proof.keywords}
    if not cells[at].hidden:
        yield "the proof is not hidden"
    if "stub" not in given or ast.unparse(given["stub"]) != answer:
        yield f"the proof's stub is not `{answer}`"
    if len(getattr(given.get("wrong"), "elts", [])) < 2:
        yield "fewer than two wrong answers, written out as a list in the proof"
    solution = ast.unparse(given["solution"]) if "solution" in given else ""
    if not any(cell.solution and solution in defined(node) for cell in cells for node in cell.body):
        yield f"the solution `{solution}` has no folded cell"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_exercises_are_whole(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert not faults(nb, path.relative_to(NBS).with_suffix("").as_posix())


def own():
    return json.loads((NBS / "00_core/05_exercises.ipynb").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("· easy · 10 minutes", "· simple", "a call-out is not"),
        (
            "**Exercise:** Mean of what is kept",
            "**Note:** Mean of what is kept",
            "no call-out with this title",
        ),
        (
            'exercise = Exercise(\n    "00_core/05_exercises"',
            'exercise = Exercise(\n    "00_core/04_files"',
            "lesson is",
        ),
        ("exercise = Exercise(", "Exercise(", "no Exercise behind the call-out"),
        ("...  # your code", "return x.mean(-1)  # your code", "no stub"),
        ("exercise.check(my_mean)", "x = 1\nexercise.check(my_mean)", "0 cells that hold"),
        ("exercise.prove(", "exercise.prove_(", "0 proofs"),
        ("stub=my_mean", "stub=None", "the proof's stub"),
        ("#| code-fold: true", "", "has no folded cell"),
        ("#| hide\nexercise.prove", "exercise.prove", "the proof is not hidden"),
        ("#| hide\ndef check_mean", "def check_mean", "the check is not hidden"),
        ("hints=[", 'hints=["one"] or [', "fewer than two hints"),
        ("wrong=[", "wrong=[None] or [", "fewer than two wrong"),
    ],
)
def test_missing_parts_are_seen(old, new, complaint):
    nb = copy.deepcopy(own())
    assert any(old in "".join(c["source"]) for c in nb["cells"])
    for cell in nb["cells"]:
        if "For authors" not in "".join(cell["source"]):
            cell["source"] = "".join(cell["source"]).replace(old, new)
    assert complaint in "\n".join(faults(nb, "00_core/05_exercises"))


def test_every_exercise_is_listed():
    listed = list_exercises(NBS)
    names = [(e["lesson"], e["title"]) for e in listed]
    assert ("00_core/05_exercises", "Mean of what is kept") in names and len(set(names)) == len(
        names
    )
    for path in LESSONS:
        cells = [Cell(c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        lesson = path.relative_to(NBS).with_suffix("").as_posix()
        assert all(
            (lesson, given["title"].value) in names
            for _, _, given in made(cells)
            if given["lesson"].value != "demo"
        )


# What a learner may hand in -----------------------------------------------------------------------


X = torch.arange(1.0, 5.0)


def check_double(double):
    x = torch.arange(4.0)
    require_close(double(x), torch.tensor([0.0, 2.0, 4.0, 6.0]), "0, 1, 2, 3 become 0, 2, 4, 6")
    noise = torch.randn(3, 2)
    require_close(double(noise) / 2, noise, "half of the result is the input")


@pytest.fixture
def learner(tmp_path, monkeypatch):
    "Somebody with a progress file of their own"
    monkeypatch.delenv("FOUNDATION_STATIC", raising=False)
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("FOUNDATION_PROGRESS", str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def exercise(**options):
    return Exercise(
        "00_core/demo",
        "Double",
        check_double,
        ["one", "two", "three"],
        **dict(returns=Tensor, seconds=0.5) | options,
    )


def in_place(x):
    return x.mul_(2)


def endless(x):
    while True:
        try:
            x = x + 0
        except Exception:
            pass


def todo(x):
    raise NotImplementedError


class TodoToo:
    def __call__(self, x):
        raise NotImplementedError("forward is yours")


def typo(x):
    twice = x + x  # noqa: F841
    return twize  # noqa: F821


def loud(x):
    for i in range(2_000):
        print("line", i)
    return 2 * x


@pytest.mark.parametrize(
    "answer, state, words",
    [
        (lambda x: 2 * x, "solved", "✓ 0, 1, 2, 3 become 0, 2, 4, 6"),
        (lambda x: x * x, "refused", "expected  [0., 2., 4., 6.]"),
        (lambda x: x, "refused", "got       [0., 1., 2., 3.]"),
        (lambda x: 2 * x[None], "refused", "Got the shape `(1, 4)`, expected `(4,)`"),
        (lambda x: x / 0, "refused", "nan"),
        (lambda x: [2 * v for v in x], "solved", ""),
        (lambda x: (2 * x).tolist(), "solved", ""),
        (lambda x: 2 * x.numpy(), "solved", ""),
        (lambda x: str(2 * x), "refused", "gives back a Tensor\n\nIt gave back a str"),
        (lambda x: [[1.0], [1.0, 2.0]], "refused", "gives back a Tensor\n\nIt gave back a list"),
        (in_place, "refused", "leaves its inputs as they are"),
        (None, "unfinished", "still to be filled in"),
        (..., "unfinished", "still to be filled in"),
        (lambda x: None, "unfinished", "gives nothing back"),
        (todo, "unfinished", "`todo` still raises"),
        (TodoToo(), "unfinished", "`__call__` still raises"),
        (typo, "broken", "return twize  # noqa: F821\nNameError: name 'twize' is not defined"),
        (lambda x: x.frobnicate(), "broken", "no attribute 'frobnicate'"),
        (lambda x: sys.exit(3), "broken", "SystemExit: 3"),
        (lambda: 1, "broken", "takes 0 positional arguments"),
        (7, "broken", "an int"),
        (torch.ones(3), "broken", "a Tensor"),
        (endless, "broken", "Still running after 0.5 seconds"),
        (loud, "solved", "line 1\nline 2\n"),
    ],
)
def test_answers(learner, answer, state, words):
    verdict = exercise().check(answer)
    assert (verdict.state, bool(verdict)) == (state, state == "solved")
    assert words in repr(verdict) and len(repr(verdict)) < 2000
    assert "Traceback" not in repr(verdict) and "site-packages" not in repr(verdict)
    assert (
        verdict._repr_markdown_().count("<details>")
        == verdict._repr_markdown_().count("</details>")
        == (0 if verdict else 3)
    )


def test_claims_before_the_failing_one_are_shown(learner):
    verdict = exercise().check(lambda x: 2 * x.abs())
    assert verdict.held == [
        "0, 1, 2, 3 become 0, 2, 4, 6"
    ] and "✗ half of the result is the input" in repr(verdict)


def test_long_tensors_show_one_place(learner):
    def check(answer):
        require_close(answer, torch.zeros(100), "all zero")

    bumped = torch.zeros(100).index_fill(0, torch.tensor([41]), 3.0)
    assert "1 of 100 values differ, the first at [41]\ngot       3\nexpected  0" in repr(
        Exercise("a/b", "c", check, ["", ""]).check(bumped)
    )


def test_in_place_exercises(learner):
    def check(double):
        x = torch.ones(2)
        double(x)
        require_close(x, 2 * torch.ones(2), "x is doubled in place")

    assert Exercise("a/b", "c", check, ["", ""], returns=None).check(
        lambda x: x.mul_(2) and None if False else x.mul_(2)
    )


def test_a_try_leaves_no_trace(learner):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    seen = []
    for _ in range(2):
        exercise().check(lambda x: seen.append(torch.rand(1).item()) or 2 * x)
    assert (torch.rand(1), np.random.rand()) == expected and seen[:2] == seen[2:]


def test_every_try_meets_the_same_random_numbers_whatever_came_before(learner):
    import random

    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        exercise().check(
            lambda x: (
                seen.append((torch.rand(1).item(), np.random.rand(), random.random())) or 2 * x
            )
        )
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


def test_bad_exercises_are_named():
    with pytest.raises(ValueError, match="expected a list of two or more"):
        Exercise("a/b", "c", check_double, ["only one"])
    with pytest.raises(ValueError, match="expected a list of two or more"):
        Exercise("a/b", "c", check_double, "a sentence")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(solution=lambda x: x), "the solution came out as refused"),
        (dict(solution=typo), "the solution came out as broken"),
        (dict(stub=lambda x: 2 * x), "the stub came out as solved"),
        (dict(stub=typo), "the stub came out as broken"),
        (dict(wrong=[lambda x: x]), "1 wrong answers"),
        (dict(wrong=[lambda x: x, lambda x: x + x]), "wrong answer 2 came out as solved"),
        (dict(wrong=[lambda x: x, typo]), "wrong answer 2 came out as broken"),
        (dict(wrong=[lambda x: x, None]), "wrong answer 2 came out as unfinished"),
        (dict(wrong=[endless, lambda x: x]), "wrong answer 1 came out as broken"),
    ],
)
def test_proofs_fail(learner, monkeypatch, change, words):
    monkeypatch.setenv("IN_TEST", "1")
    sound = dict(stub=todo, solution=lambda x: 2 * x, wrong=[lambda x: x, lambda x: x * x])
    exercise().prove(**sound)
    with pytest.raises(AssertionError, match=words):
        exercise().prove(**sound | change)
    assert not learner.exists()


def test_a_solved_stub_does_not_stop_a_learner(learner):
    exercise().prove(
        stub=lambda x: 2 * x, solution=lambda x: 2 * x, wrong=[lambda x: x, lambda x: x * x]
    )
    assert not learner.exists()


# What ends though it would not, and what stays apart ----------------------------------------------


def swallows(x):
    while True:
        try:
            x = x + 0
        except:  # noqa: E722
            pass


def swallows_in_calls(x):
    def step(y):
        return y + 0

    while True:
        try:
            step(x)
        except BaseException:
            step(x)


def swallows_deep(x):
    def careful(y):
        try:
            return y + 0
        except:  # noqa: E722
            return y

    while True:
        try:
            while True:
                x = careful(x)
        except BaseException:
            pass


@pytest.mark.parametrize(
    "answer, returns, expected",
    [
        (lambda x: (1, 2), list, [1, 2]),
        (lambda x: np.array([1, 2]), (tuple, list), [1, 2]),
        (lambda x: torch.tensor([1, 2]), tuple, (1, 2)),
        (lambda x: np.int64(3), int, 3),
        (lambda x: torch.tensor(3), (int, float), 3),
        (lambda x: 3, float, 3.0),
        (lambda x: np.bool_(True), bool, True),
        (lambda x: np.float32(0.5), (float, Tensor), torch.tensor(0.5)),
    ],
)
def test_an_answer_in_another_wrapping_is_taken_as_what_was_asked(answer, returns, expected):
    given = []
    Exercise("a", "b", lambda answer: given.append(answer(X)), ["1", "2"], returns).check(answer)
    (got,) = given
    assert type(got) is type(expected) and got == expected


def test_gradients_pass_through_a_list_of_tensors(learner):
    def check(answer):
        x = X.clone().requires_grad_()
        answer(x).sum().backward()
        require_close(x.grad, torch.full_like(x, 2), "the gradient is 2")

    verdict = Exercise("a", "b", check, ["1", "2"], Tensor).check(lambda x: [2 * v for v in x])
    assert verdict, verdict


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm clock there")
def test_the_clock_counts_the_answers_own_time():
    "A slow check costs the learner nothing; many short calls add up; who waits is stopped later"

    def slow(answer):
        busy(0.4)
        check_double(answer)

    def many(answer):
        for _ in range(20):
            check_double(answer)

    def told(check, answer):
        return repr(Exercise("a", "b", check, ["1", "2"], Tensor, 0.2).check(answer))

    assert "**Solved" in told(slow, lambda x: 2 * x)
    assert "Still running after 0.2 seconds" in told(many, lambda x: [2 * x, busy(0.03)][0])
    begun = time.monotonic()
    assert "Still running" in told(check_double, lambda x: threading.Event().wait())
    assert 1.5 < time.monotonic() - begun < 20


def test_a_check_that_stumbles_tells_what_the_answer_gave(learner):
    def check(answer):
        require_close(float(answer(X)), 1.0, "it is one")

    verdict = repr(Exercise("a", "b", check, ["1", "2"], Tensor).check(lambda x: 2 * x))
    assert "which gave back a tensor of float32" in verdict and "(4,) at last" in verdict


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm clock there")
def test_an_answer_that_swallows_the_alarm_is_stopped():
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); import test_exercises as t\nbefore ="
        " signal.getsignal(signal.SIGALRM)\nfor answer in (t.swallows, t.swallows_in_calls,"
        " t.swallows_deep, lambda x: 2 * x):\n   "
        " print(repr(t.exercise(seconds=0.2).check(answer)).split('\\n')[-1], flush=True)\nassert"
        " signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) =="
        " (0, 0)"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FOUNDATION_STATIC": "1"},
    )
    try:  # in a process of its own, which can be killed if it hangs after all
        out, err = job.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"an answer was not stopped: {job.communicate()[0]}")
    assert (
        [line.startswith("Still running") for line in out.splitlines()] == [True, True, True, False]
        and not err
        and not job.returncode
    )


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm clock there")
def test_somebody_elses_alarm_is_set_again(learner):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 50)
        assert exercise().check(lambda x: 2 * x) and signal.getitimer(signal.ITIMER_REAL)[0] > 40
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped there")
def test_a_sleeping_process_that_holds_the_lock_is_not_waited_for(learner):
    code = (
        "import sys, time; from pathlib import Path; from foundation.core.exercises import _alone\n"
        "with _alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(learner)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    threading.Timer(10, holder.kill).start()  # or a check that waits would hang this test
    try:
        begin = time.monotonic()
        assert exercise().check(lambda x: 2 * x) and time.monotonic() - begin < 5
        assert entry(learner)["tries"] == 1
    finally:
        holder.kill()
        holder.communicate()


def test_checks_in_threads_keep_their_claims_their_luck_and_their_prints_apart(learner, capsys):
    drawn = {}

    def one(name):
        def check(answer):
            drawn[name] = []
            for i in range(20):
                drawn[name].append(answer())
                require(True, f"{name} {i}")
                time.sleep(0.001)

        def answer():
            print(name)
            return torch.rand(()).item()

        return Exercise("a/b", name, check, ["", ""]).check(answer)

    names = ["one", "two", "three", "four"]
    with ThreadPoolExecutor(4) as pool:
        verdicts = [pool.submit(one, name) for name in names]
        loud = pool.submit(lambda: [print("from outside"), time.sleep(0.01)])
        verdicts = [v.result() for v in verdicts]
        loud.result()
    for name, verdict in zip(names, verdicts):
        assert verdict and verdict.held == [f"{name} {i}" for i in range(20)]
        assert set(re.findall("one|two|three|four", verdict.notes[0])) == {name}
    assert (
        len({tuple(values) for values in drawn.values()}) == 1
    )  # each had the same random numbers


def test_what_another_thread_prints_during_a_check_is_not_lost(learner, capsys):
    inside, said = threading.Event(), threading.Event()

    def other():
        inside.wait(5)
        print("from outside")
        said.set()

    thread = threading.Thread(target=other)
    thread.start()
    verdict = exercise(seconds=5).check(lambda x: [inside.set(), said.wait(5), 2 * x][2])
    thread.join()
    assert (
        verdict
        and "from outside" in capsys.readouterr().out
        and "from outside" not in repr(verdict)
    )


def test_gradients_are_on_again_after_an_answer_that_turned_them_off(learner):
    exercise().check(lambda x: torch.set_grad_enabled(False) and None)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "printed", ["````", "```", "`" * 30, "````\n</div><script>x</script>", "~~~~~\n"]
)
def test_no_print_ends_the_fence_of_its_verdict(learner, printed):
    def answer(x):
        print(printed + "\n**bold** <b>html</b>")
        raise ValueError(printed)

    for text in (
        repr(exercise().check(answer)),
        repr(exercise().check(lambda x: print(printed) or 2 * x)),
    ):
        opened = None
        for line in text.split("\n"):
            if opened is None and (start := re.match("(`{3,})text$", line)):
                opened = start[1]
            elif opened and re.fullmatch("`+", line.strip()) and len(line.strip()) >= len(opened):
                opened = None
            elif opened is None:
                assert "<" not in line and "**bold" not in line
        assert opened is None


def test_complex_answers_are_compared_with_their_imaginary_part():
    require_close(torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), "equal")
    for got, want in [
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
        (torch.tensor([1 + 2j]), torch.tensor([1.0])),
    ]:
        with pytest.raises(exercises.Refused):
            require_close(got, want, "equal")
    with pytest.raises(ValueError, match="rtol is -1"):
        require_close(1, 1, "equal", rtol=-1)


def test_copies_of_damaged_files_are_numbered_and_reading_moves_nothing(learner):
    contents = [b"{ first", b"{ second", b"{ third"]
    for content in contents:
        learner.write_bytes(content)
        for _ in range(2):
            assert "is damaged" in exercise_progress().note and learner.read_bytes() == content
        assert exercise().check(lambda x: 2 * x)
    copies = ["progress.json.corrupt", "progress.json.corrupt2", "progress.json.corrupt3"]
    assert [learner.with_name(name).read_bytes() for name in copies] == contents


@pytest.mark.parametrize(
    "entry",
    [
        {"tries": True, "solved": None},
        {"tries": -1, "solved": None},
        {"tries": 1, "solved": "<b>"},
        {"tries": 1},
        {"tries": 1.5, "solved": None},
        {"tries": 1, "solved": 20240101},
        [1, 2],
        None,
    ],
)
def test_entries_that_this_module_does_not_write_are_damage(learner, entry):
    learner.write_text(json.dumps({"a/b#c": entry}))
    assert "is damaged" in exercise_progress().note and "damaged" in repr(
        exercise().check(lambda x: 2 * x)
    )


@pytest.mark.skipif(os.name == "nt", reason="homes are found another way there")
@pytest.mark.parametrize("chosen", ["", "~nobody_of_this_name/progress.json"])
def test_without_a_home_the_verdict_stands_and_a_sentence_is_added(monkeypatch, chosen):
    def nobody(self):
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(exercises.Path, "expanduser", nobody)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(exercises, "_told", set())
    for name in ("FOUNDATION_STATIC", "IN_TEST", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOUNDATION_PROGRESS", chosen)
    with pytest.raises(
        FileNotFoundError, match="no home folder for .*; set FOUNDATION_PROGRESS to a file"
    ):
        progress_file()
    first, second = (exercise().check(lambda x: 2 * x) for _ in range(2))
    assert (
        first
        and second
        and "not kept: there is no home folder" in repr(first)
        and "home" not in repr(second)
    )
    assert "No progress is kept: there is no home folder" in exercise_progress().note


@pytest.mark.skipif(os.name == "nt", reason="a folder that is used cannot be deleted there")
def test_progress_in_a_deleted_folder(learner, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    table = exercise_progress("00_core/05_exercises")
    assert "Mean of what is kept" in repr(table) and table.rows[0]["link"].endswith(
        "00_core/05_exercises.ipynb"
    )


def test_another_kind_of_argument_is_a_sentence():
    for call, words in [
        (lambda: Exercise(1, "b", check_double, ["", ""]), "lesson is 1; expected a string"),
        (lambda: Exercise("a", "b", 3, ["", ""]), "check is 3; expected a function"),
        (lambda: Exercise("a", "b", check_double, ["", ""], seconds=0), "seconds is 0"),
        (lambda: Exercise("a", "b", check_double, ["", ""], returns="float"), "returns is 'float'"),
        (lambda: exercise_progress(3), "lesson is 3"),
        (lambda: list_exercises(None), "folder is None"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            call()


# The progress file --------------------------------------------------------------------------------


def entry(path):
    return json.loads(path.read_text(encoding="utf-8")).get("00_core/demo#Double")


def test_tries_are_counted_and_a_solved_exercise_stays_solved(learner):
    for answer in (todo, lambda x: x, lambda x: 2 * x, lambda x: x):
        exercise().check(answer)
    assert entry(learner)["tries"] == 2 and re.fullmatch(
        r"\d{4}-\d\d-\d\d", entry(learner)["solved"]
    )


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"a": 1}',
        b'{"a": {"tries": "x", "solved": null}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_moved_aside(learner, damage):
    learner.write_bytes(damage)
    verdict = exercise().check(lambda x: 2 * x)
    assert verdict and "damaged" in repr(verdict) and entry(learner)["tries"] == 1
    assert learner.with_name("progress.json.corrupt").read_bytes() == damage
    assert "damaged" not in repr(exercise().check(lambda x: 2 * x))


def test_a_place_that_cannot_be_written_is_told_once(learner, monkeypatch):
    (learner.parent / "file").write_text("")
    monkeypatch.setenv("FOUNDATION_PROGRESS", str(learner.parent / "file" / "progress.json"))
    first, second = (exercise().check(lambda x: 2 * x) for _ in range(2))
    assert first and second and "not kept" in repr(first) and "not kept" not in repr(second)
    assert "cannot be read" in exercise_progress().note or not exercise_progress().note


def test_a_full_disk_keeps_the_old_entries(learner, monkeypatch):
    exercise().check(lambda x: x)
    before = learner.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exercises.json, "dump", full)
    assert (
        "No space left" in repr(exercise().check(lambda x: 2 * x))
        and learner.read_bytes() == before
    )
    assert {p.name for p in learner.parent.iterdir()} == {"progress.json", "progress.json.lock"}


def test_two_notebooks_at_once_lose_nothing(learner):
    code = (
        "from foundation.core.exercises import _remember\nfor i in range(10): assert not"
        " _remember('a', {0!r}, False), 'a note'"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code.format(f"t{k}")], cwd=ROOT) for k in range(2)
    ]
    assert [p.wait(60) for p in both] == [0, 0]
    assert {k: e["tries"] for k, e in json.loads(learner.read_text()).items()} == {
        "a#t0": 10,
        "a#t1": 10,
    }


def test_default_places(monkeypatch, tmp_path):
    monkeypatch.delenv("FOUNDATION_PROGRESS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(windows, "get_win_folder", lambda kind: str(tmp_path))
    for system in (Unix, windows.Windows, MacOS):
        monkeypatch.setattr(platformdirs, "PlatformDirs", system)
        assert progress_file().parts[-2:] == ("foundation", "progress.json")


def test_table(learner, monkeypatch):
    monkeypatch.chdir(NBS / "00_core")
    mine = Exercise("00_core/05_exercises", "Mean of what is kept", check_double, ["", ""])
    row = "| [Exercises](05_exercises.ipynb) | Mean of what is kept | easy | 10 | {} |"
    assert row.format("not yet") in repr(exercise_progress())
    mine.check(lambda x: x)
    assert row.format("tried 1 ×") in exercise_progress("00_core/05")._repr_markdown_()
    mine.check(lambda x: 2 * x)
    assert row.format("✓ " + time.strftime("%Y-%m-%d")) in repr(exercise_progress())
    monkeypatch.chdir(NBS)
    assert "](00_core/05_exercises.ipynb)" in repr(exercise_progress())
    monkeypatch.setenv("FOUNDATION_STATIC", "1")
    assert (
        not any(r["solved"] or r["tries"] for r in exercise_progress().rows)
        and not mine.check(lambda x: 2 * x).notes
    )


def test_table_where_only_the_library_is_installed(learner, monkeypatch):
    monkeypatch.setattr(exercises, "_lessons_folder", lambda: None)
    assert repr(exercise_progress()).endswith("0 of 0 solved.")
    exercise().check(lambda x: 2 * x)
    assert "| 00_core/demo | Double |  |  | ✓" in repr(
        exercise_progress()
    ) and "1 of 1 solved." in repr(exercise_progress())


def test_damaged_notebooks_do_not_stop_the_table(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    (tmp_path / "b.ipynb").write_text(json.dumps(own()))
    assert [e["lesson"] for e in list_exercises(tmp_path)] == ["b"]


def test_require():
    for bad in (False, 0, torch.tensor([True, False]), np.array([True, False]), np.bool_(False)):
        with pytest.raises(exercises.Refused) as no:
            require(bad, "it holds", got=[1, 2])
        assert no.value.claim == "it holds" and "[1, 2]" in no.value.found
    for good in (True, torch.tensor([True, True]), np.bool_(True), torch.tensor(1.0)):
        require(good, "it holds")


@pytest.mark.parametrize(
    "got, expected, ok",
    [
        (torch.ones(2), torch.ones(2, dtype=torch.int64), True),
        (1.0, 1, True),
        (torch.tensor(2.0), 2, True),
        (np.float32(2), 2.0, True),
        (torch.ones(2, requires_grad=True), [1, 1], True),
        (torch.tensor(float("inf")), float("inf"), True),
        (torch.ones(3, 1), torch.ones(3), False),
        ([1.0], torch.ones(1), True),
        (np.ones(1), torch.ones(1), True),
        ((torch.ones(2), torch.zeros(2)), [[1, 1], [0, 0]], True),
        ([2.0], torch.ones(1), False),
        ([[1.0], [1.0, 2.0]], torch.ones(2), False),
        ("1", 1, False),
        (None, 0, False),
        (float("nan"), 0, False),
        (1.001, 1, False),
    ],
)
def test_require_close(got, expected, ok):
    if ok:
        return require_close(got, expected, "agree")
    with pytest.raises(exercises.Refused, match="agree"):
        require_close(got, expected, "agree")


def test_a_lesson_that_is_just_being_written_is_read_again(tmp_path):
    "JupyterLab saves a lesson while one of its cells asks for the exercises"
    call = "> **Exercise:** Double · easy · 5 minutes\n>\n> Do it."
    cells = [dict(cell_type="markdown", source=text) for text in ("# Demo", call)]
    whole, path = json.dumps(dict(cells=cells)), tmp_path / "demo.ipynb"
    path.write_text(whole[: len(whole) // 2])
    saving = threading.Timer(0.05, path.write_text, [whole])
    saving.start()
    assert [row["title"] for row in list_exercises(tmp_path)] == ["Double"]
    saving.join()
    path.write_text("{")
    assert list_exercises(tmp_path) == []
