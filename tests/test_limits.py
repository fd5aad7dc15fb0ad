"""The limits that keep lessons readable and modules small.

What is over a limit today stands in tests/limits.json with its value; that list may only shrink.
`python tests/test_limits.py` lowers its values to what is needed, and never raises one.
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]  # also when run as a script

import notebooks
import pytest
from test_floors import arrows, modules

WIDTH, LENGTH = 100, 25
METHODS = ("pretraining", "finetuning", "compression")
FRONT_DOORS = {"make", "pretrain"}  # one in each recipe, one in each method of pretraining
LIMITS = {  # name: the most that is allowed, what is counted, what to do
    "width": (0, f"code lines wider than {WIDTH} columns", "run make format, cut long strings"),
    "length": (0, f"code cells longer than {LENGTH} lines", "show the parts, then the whole"),
    "cells": (85, "cells", "move recipes, input checks and proofs out, or make two lessons"),
    "words": (2200, "words", "say it shorter, or make two lessons"),
    "hidden": (3, "hidden cells besides the exercises", "show them, or move them to the tests"),
    "equations": (0, "equations out of the scheme", "number them \\tag{chapter.lesson.number}"),
    "complaints": (0, "copies of core/checks.complaint", "import it from foundation.core.checks"),
    "imports": (9, "imports of our modules", "let recipes and tasks go to foundation/recipes"),
    "twins": (0, "public names that another module has too", "rename one, or share one home"),
    "lines": (250, "lines of code", "let recipes and tasks go to foundation/recipes"),
}
EXCEPTIONS = ROOT / "tests/limits.json"


# What is counted ----------------------------------------------------------------------------------


def wide(text):
    return sum(len(line) > WIDTH for line in text.splitlines())


def prose(cells):
    return "\n".join(notebooks.source(c) for c in cells if c["cell_type"] == "markdown")


def words(text):
    "Formulas and code do not count"
    return len(re.sub(r"\$\$.*?\$\$|^```.*?^```", "", text, flags=re.S | re.M).split())


def tags(text):
    return re.findall(r"\\tag\{([^}]*)\}", text)


def is_hidden(code):
    return re.search(r"^#\| *(hide\b|include: *false)", code, re.M)


def off_scheme(text, number, known):
    "Tags that are not `number`.1, `number`.2 … in order; and references to no equation in `known`"
    wrong = sum(tag != f"{number}.{i}" for i, tag in enumerate(tags(text), 1))
    return wrong + sum(name not in known for name in re.findall(r"\((\d+\.\d+\.\d+)\)", text))


def complaints(code):
    "Functions that call one of their arguments and give back the sentence of what it raised"
    tree = ast.parse(re.sub(r"^(\s*)[%!](?!=).*$", r"\1pass", code, flags=re.M))
    return sum(_is_complaint(f) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef))


def _is_complaint(function):
    mine = {a.arg for a in function.args.posonlyargs + function.args.args}
    tries = [node for node in ast.walk(function) if isinstance(node, ast.Try)]
    calls = [c.func for t in tries for b in t.body for c in ast.walk(b) if isinstance(c, ast.Call)]
    caught = {h.name for t in tries for h in t.handlers}
    given = [n for n in ast.walk(function) if isinstance(n, ast.Call) and n.args]
    return any(isinstance(f, ast.Name) and f.id in mine for f in calls) and any(
        ast.unparse(n.func) == "str" and ast.unparse(n.args[0]) in caught for n in given
    )


def of_notebook(nb, number, known):
    "Name of a limit → the value of a notebook; the stamped Colab cell is nobody's"
    text = prose(nb["cells"])
    cells = [c for c in nb["cells"] if not notebooks.is_colab(c)]
    codes = [notebooks.source(c) for c in cells if c["cell_type"] == "code"]
    hidden = [code for code in codes if is_hidden(code)]
    return dict(
        width=sum(map(wide, codes)),
        length=sum(len(code.splitlines()) > LENGTH for code in codes),
        cells=len(cells),
        words=words(text),
        hidden=sum("exercise" not in code.lower() for code in hidden),
        equations=off_scheme(text, number, known),
        complaints=sum(map(complaints, codes)),
    )


def of_module(path, reached):
    "Blank lines and comments do not count"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(imports=len(reached), lines=sum(bool(x) and x[0] != "#" for x in lines))


def public_names(path):
    "What a module defines for others"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    made = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {name for name in made if name[0] != "_"} - FRONT_DOORS


def twins(paths):
    "Path → how many of its public names one of the others has too"
    names = {path: public_names(path) for path in paths}
    homes = Counter(name for found in names.values() for name in found)
    return {path: sum(homes[name] > 1 for name in found) for path, found in names.items()}


def measured(root=ROOT):
    "Name of a limit → path below `root` → value"
    nbs, package = root / "nbs", root / "foundation"
    lessons = {p.relative_to(nbs).as_posix(): notebooks.load(p) for p in notebooks.lessons(root)}
    known = {tag for nb in lessons.values() for tag in tags(prose(nb["cells"]))}
    found = {}
    for lesson, nb in lessons.items():
        found[f"nbs/{lesson}"] = of_notebook(nb, notebooks.number(lesson), known)
        if lesson == "00_core/00_checks.ipynb":
            found[f"nbs/{lesson}"]["complaints"] = 0  # its home
    for folder in ("tests", "tools", "docs", "bench"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found[path.relative_to(root).as_posix()] = dict(width=wide(text))
    drawn, paths = arrows(package), modules(package)
    doubled = twins(paths.values())
    for name, path in paths.items():
        values = of_module(path, drawn[name]) if name.split(".")[0] in METHODS else {}
        found[path.relative_to(root).as_posix()] = values | dict(twins=doubled[path])
    return {
        limit: {path: values[limit] for path, values in found.items() if limit in values}
        for limit in LIMITS
    }


# What is wrong ------------------------------------------------------------------------------------


def trouble(values, exceptions):
    "A sentence for each value above its limit or exception, and for each exception above its value"
    found = [f"there is no limit {name!r}" for name in exceptions.keys() - LIMITS.keys()]
    for name, (most, what, remedy) in LIMITS.items():
        allowed = exceptions.get(name, {})
        for path in sorted(values[name].keys() | allowed.keys()):
            value, bar = values[name].get(path, 0), allowed.get(path, most)
            if value > bar:
                found.append(f"{path} has {value} {what}, at most {bar}: {remedy}")
            elif path in allowed and (value < bar or bar <= most):
                new = f"lower it to {value}" if value > most else "take it out"
                found.append(
                    f"{path} is allowed {bar} {what} and has {value}: {new} in tests/limits.json"
                    " (python tests/test_limits.py does it)"
                )
    return found


def shrunk(values, exceptions):
    "The exceptions that are still needed, each at most what it was"
    return {
        name: {
            path: min(old, values[name][path])
            for path, old in sorted(exceptions.get(name, {}).items())
            if values[name].get(path, 0) > most
        }
        for name, (most, *_) in LIMITS.items()
    }


def test_limits_hold():
    assert trouble(measured(), json.loads(EXCEPTIONS.read_text())) == []


# The checker itself -------------------------------------------------------------------------------


def cell(text, kind="code"):
    return dict(cell_type=kind, source=text.splitlines(True))


COPY = "def message(f, *args):\n    try:\n        f(*args)\n    except ValueError as e:\n"
COPY += "        return str(e)"
CASES = [
    ("width", cell("x = '" + "1" * WIDTH + "'"), 1),
    ("width", cell("x = 1"), 0),
    ("length", cell("x = 1\n" * 26), 1),
    ("length", cell("x = 1\n" * 25), 0),
    ("cells", cell("x"), 1),
    ("words", cell("two words\n\n$$ a + b $$\n\n```python\nx = 1\n```", "markdown"), 2),
    ("hidden", cell("#| hide\nprint('glue')"), 1),
    ("hidden", cell("#| include: false\nprint('glue')"), 1),
    ("hidden", cell("#| hide\nexercise.prove(wrong)"), 0),
    ("equations", cell(r"$$ a \tag{7.3.1} $$ and $$ b \tag{7.3.2} $$, see (1.2.1)", "markdown"), 0),
    ("equations", cell(r"$$ a \tag{3.1} $$", "markdown"), 1),
    ("equations", cell(r"$$ a \tag{7.3.2} $$", "markdown"), 1),
    ("equations", cell(r"$$ a \tag{7.3.1} $$, see (7.3.5)", "markdown"), 1),
    ("complaints", cell(COPY), 1),
    ("complaints", cell(COPY.replace("f(*args)", "print(f)")), 0),
    ("complaints", cell("%matplotlib inline\nx != 1"), 0),
]


@pytest.mark.parametrize("limit, made, value", CASES)
def test_each_count_sees_what_it_counts(limit, made, value):
    assert of_notebook(dict(cells=[made]), "7.3", {"7.3.1", "1.2.1"})[limit] == value


def test_the_colab_cell_is_not_counted():
    cells = [cell("x = 1"), notebooks.colab_cell(notebooks.settings())]
    value = of_notebook(dict(cells=cells), "", set())
    assert value["cells"] == 1 and value["hidden"] == 0


def test_a_module_is_counted_without_blank_lines_and_comments(tmp_path):
    (tmp_path / "a.py").write_text('"Docs"\n\n# %% cell\nimport x\n\n\ndef f():\n    return 1\n')
    assert of_module(tmp_path / "a.py", {"b", "c"}) == dict(imports=2, lines=4)


def test_names_with_two_homes_are_counted(tmp_path):
    texts = dict(
        a="def fit(): 1\ndef make(): 1\nclass _Own: 1", b="class fit: 1\ndef make(): 1", c="x = 1"
    )
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert list(twins([tmp_path / name for name in "abc"]).values()) == [1, 1, 0]


def test_what_is_above_its_limit_or_its_exception_is_told():
    none = {name: {} for name in LIMITS}
    assert trouble(none | dict(words={"a": 2200}), {}) == []
    (sentence,) = trouble(none | dict(words={"a": 2201}), {})
    assert "a has 2201 words, at most 2200: say it shorter" in sentence
    assert trouble(none | dict(words={"a": 2300}), dict(words={"a": 2300})) == []
    (sentence,) = trouble(none | dict(words={"a": 2301}), dict(words={"a": 2300}))
    assert "at most 2300" in sentence
    assert trouble(none, dict(speed={"a": 1})) == ["there is no limit 'speed'"]


@pytest.mark.parametrize(
    "value, words",
    [(2250, "lower it to 2250"), (2200, "take it out"), (None, "take it out")],
)
def test_an_exception_that_is_larger_than_needed_is_told_and_shrinks(value, words):
    values = {name: {} for name in LIMITS} | dict(words={"a": value} if value else {})
    (sentence,) = trouble(values, dict(words={"a": 2300}))
    assert words in sentence
    smaller = shrunk(values, dict(words={"a": 2300}))
    assert trouble(values, smaller) == [] and smaller["words"] in ({}, {"a": 2250})


def test_shrinking_never_raises_an_exception():
    values = {name: {} for name in LIMITS} | dict(words={"a": 2400, "b": 2400})
    assert shrunk(values, dict(words={"a": 2300}))["words"] == {"a": 2300}


def test_all_of_the_project_is_measured():
    values = measured()
    assert values["words"].keys() == {f"nbs/{p.relative_to(ROOT / 'nbs')}" for p in PATHS}
    assert {"tests/test_limits.py", "tools/notebooks.py"} <= values["width"].keys()
    assert {path.split("/")[1] for path in values["lines"]} == set(METHODS)
    assert max(values["imports"].values()) > 1


PATHS = notebooks.lessons()


if __name__ == "__main__":
    old = json.loads(EXCEPTIONS.read_text())
    new = shrunk(measured(), old)
    EXCEPTIONS.write_text(json.dumps(new, indent=1) + "\n")
    print("\n".join(trouble(measured(), new)) or "every limit holds")
