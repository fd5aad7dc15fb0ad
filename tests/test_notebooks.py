"""The notebooks as files: executed as they stand, stamped, small,
with nobody's paths, each in its place"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter

import notebooks
import pytest

ROOT = notebooks.ROOT
PATHS = notebooks.lessons()
NAMES = [p.relative_to(ROOT / "nbs").as_posix() for p in PATHS]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_each_notebook_is_fit_to_be_read(path):
    assert notebooks.problems(notebooks.load(path)) == []


def test_stamps_follow_settings():
    assert notebooks.stamp(PATHS, check=True) == []


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_nbdev_clean_would_change_nothing(path):
    from nbdev.clean import clean_nb

    cfg, nb = notebooks.settings(), notebooks.load(path)
    clean_nb(
        nb,
        allowed_metadata_keys=cfg["allowed_metadata_keys"].split(),
        allowed_cell_metadata_keys=cfg["allowed_cell_metadata_keys"].split(),
    )
    assert notebooks.text_of(nb) == path.read_text(encoding="utf-8")


def test_every_lesson_is_in_the_sidebar_and_on_the_map():
    sidebar = (ROOT / "nbs/sidebar.yml").read_text()
    assert re.findall(r"- (\S+\.ipynb)$", sidebar, re.M) == NAMES
    index = notebooks.load(ROOT / "nbs/index.ipynb")
    shown = "".join(
        "".join(o["data"].get("text/markdown", ""))
        for c in index["cells"]
        for o in c.get("outputs", [])
        if "data" in o
    )
    assert set(re.findall(r"\]\(([^)]+\.ipynb)\)", shown)) == set(NAMES) - {"index.ipynb"}


def test_modules_are_named_after_their_notebooks_and_only_once():
    exports = {}
    for path, name in zip(PATHS, NAMES):
        code = "\n".join(notebooks.source(c) for c in notebooks.code_cells(notebooks.load(path)))
        if found := re.search(r"^#\| *default_exp +(\S+)", code, re.M):
            exports[name] = found[1]
    plain = {
        name: re.sub(r"(^|/)\d+_", r"\1", name).removesuffix(".ipynb").replace("/", ".")
        for name in exports
    }
    # the lesson belongs to evaluation, what it exports trains networks
    elsewhere = {"06_evaluation/05_label_efficiency.ipynb": "recipes.few_labels"}
    assert {n: module for n, module in exports.items() if module != plain[n]} == elsewhere
    # numbers may be shared: a companion stands beside the lesson that it serves
    twice = [
        what
        for values in (
            exports.values(),
            (notebooks.title(p)[0] for p in PATHS),
        )
        for what, count in Counter(values).items()
        if count > 1
    ]
    assert twice == []


def test_links_between_notebooks_lead_somewhere():
    dead = []
    for path in PATHS:
        for cell in notebooks.load(path)["cells"]:
            if cell["cell_type"] == "markdown":
                for link in re.findall(
                    r"\]\(([^)#\s:]+\.ipynb)(?:#[^)]*)?\)", notebooks.source(cell)
                ):
                    if not (path.parent / link).exists():
                        dead.append((path.name, link))
    assert dead == []


# The checks themselves ----------------------------------------------------------------------------


def notebook(*code, outputs=()):
    "A small sound notebook, unstamped"
    head = dict(
        cell_type="markdown",
        id="head",
        metadata={},
        source=["# A lesson\n", "\n", "> What it promises"],
    )
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={},
            execution_count=None,
            outputs=[],
            source=text.splitlines(True),
        )
        for i, text in enumerate(code)
    ]
    cells[0]["outputs"] = list(outputs)
    nb = dict(cells=[head, *cells], metadata={}, nbformat=4, nbformat_minor=5)
    nb["metadata"]["foundation"] = {"executed": notebooks.digest(nb)}
    return nb


def shows(**data):
    return dict(output_type="execute_result", execution_count=None, metadata={}, data=data)


def _swallowed(code):
    """Lines where `assert_close(...) and check` stands:
    the first gives back None, so the second never runs"""
    code = re.sub(r"^(\s*)[%!](?!=).*$", r"\1pass", code, flags=re.M)

    def calls(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("assert_close", "test_eq", "test_close")
        )

    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.BoolOp) and any(map(calls, node.values))
    ]


def test_no_check_stands_behind_one_that_gives_back_nothing():
    assert _swallowed("assert_close(a, b) and c == 1") and not _swallowed(
        "assert_close(a, b)\nassert c == 1"
    )
    cells = (
        (name, notebooks.source(c))
        for path, name in zip(PATHS, NAMES)
        for c in notebooks.code_cells(notebooks.load(path))
    )
    files = ((p.name, p.read_text()) for p in (ROOT / "tests").glob("*.py"))
    assert [(name, lines) for name, code in (*cells, *files) if (lines := _swallowed(code))] == []


def test_a_sound_notebook_has_no_problems():
    nb = notebook(
        "1 + 1",
        outputs=[
            shows(
                **{"text/plain": "2 in [0, 1/home] of https://x.org/home/page, /usr/share/datasets"}
            )
        ],
    )
    assert notebooks.problems(nb) == []


@pytest.mark.parametrize(
    "output, words",
    [
        (dict(output_type="error", ename="E", evalue="", traceback=[]), "shows an error"),
        (
            dict(output_type="stream", name="stdout", text=["saved in /home/ada/model.pt"]),
            "/home/ada",
        ),
        (shows(**{"text/html": '<img src="/root/x.png">'}), "/root/x.png"),
        (shows(**{"text/plain": r"'C:\\Users\\ada'"}), "Users"),
        (shows(**{"text/plain": "x" * 250_000}), "are allowed"),
    ],
)
def test_bad_outputs_are_caught(output, words):
    assert any(
        words in problem for problem in notebooks.problems(notebook("1 + 1", outputs=[output]))
    )


def test_pictures_are_not_searched_for_paths():
    assert (
        notebooks.problems(
            notebook(
                "1",
                outputs=[
                    shows(**{"text/html": '<img src="data:image/png;base64,iVBO/root/abc=">'})
                ],
            )
        )
        == []
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda nb: nb["cells"][1].update(source=["1 + 2"]), "code has changed"),
        (lambda nb: nb["cells"].reverse(), "first cell"),
        (lambda nb: nb["cells"][0].update(source=["# A lesson\n", "no promise"]), "first cell"),
        (
            lambda nb: nb["cells"][0]["source"].append(
                "\n\nmore words that the site would not show"
            ),
            "nothing but the title",
        ),
        (
            lambda nb: nb["cells"][1].update(source=["import nbdev; nbdev.nbdev_export()"]),
            "calls nbdev_export",
        ),
        (lambda nb: nb["cells"][1].update(source=["open('/home/ada/x')"]), "/home/ada"),
    ],
)
def test_broken_notebooks_are_caught(change, words):
    nb = notebook("1 + 1", "2 + 2")
    change(nb)
    assert any(words in problem for problem in notebooks.problems(nb)), notebooks.problems(nb)


def test_exchanged_cells_are_stale():
    nb = notebook("a = 1", "b = 2")
    nb["cells"][1], nb["cells"][2] = nb["cells"][2], nb["cells"][1]
    assert notebooks.is_stale(nb)


def test_stamping_is_idempotent_follows_a_fork_and_keeps_torch():
    cfg, path = dict(notebooks.settings()), ROOT / "nbs/07_x/03_y.ipynb"
    once = notebooks.stamped(notebook("1"), path, cfg)
    assert notebooks.stamped(once, path, cfg) == once
    assert notebooks.problems(once) == []  # the stamped cell is not the author's code
    fork = notebooks.stamped(once, path, cfg | {"user": "ada", "repo": "course"})
    head, colab = (notebooks.source(c) for c in fork["cells"][:2])
    assert (
        head.count("colab-badge.svg") == 1
        and "github/ada/course/blob/main/nbs/07_x/03_y.ipynb" in head
    )
    assert "git+https://github.com/ada/course@main" in colab and len(fork["cells"]) == len(
        once["cells"]
    )
    assert not re.search(r"install.*torch", colab) and "--no-deps" in colab and "einops" in colab


def test_the_colab_cell_does_nothing_elsewhere():
    cell = notebooks.source(notebooks.colab_cell(notebooks.settings()))
    plain = re.sub(r"%pip.*", "raise SystemExit('would install')", cell)
    assert plain.count("%precision %.4g\n") == 1  # how numbers are shown, and nothing else
    plain = plain.replace("%precision %.4g\n", "")
    exec(compile(plain, "colab", "exec"), {})


def test_a_notebook_without_title_is_refused():
    nb = notebook("1")
    nb["cells"].pop(0)
    with pytest.raises(ValueError, match="first cell must be Markdown"):
        notebooks.stamped(nb, ROOT / "nbs/x.ipynb", notebooks.settings())


def test_outputs_are_tidied_like_a_terminal():
    def stream(text, name="stdout"):
        return dict(output_type="stream", name=name, text=text)

    bar = "\r 50%|█████     | 1/2 [00:01<00:01]\r100%|██████████| 2/2 [00:02<00:00]\n"
    out = notebooks.tidy(
        [
            stream("one\n"),
            stream("old\rnew\n"),
            stream(bar, "stderr"),
            stream("three\n"),
            shows(**{"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider()"}),
            shows(
                **{
                    "application/vnd.jupyter.widget-view+json": {},
                    "text/html": "<b>static</b>",
                    "text/plain": "x",
                }
            ),
        ]
    )
    assert [o.get("text") for o in out] == ["one\nnew\n", "three\n", None]
    assert out[-1]["data"] == {"text/html": "<b>static</b>", "text/plain": "x"}


def test_writing_is_atomic_and_lazy(tmp_path):
    path = tmp_path / "a.ipynb"
    assert (
        notebooks.write(path, "one")
        and not notebooks.write(path, "one")
        and notebooks.write(path, "two")
    )
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def project(tmp_path):
    "A project of its own with one lesson, a good one"
    for name in ["settings.ini"]:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    nb = notebook("#| default_exp a.first", "#| export\ndef one(): return 1", "one()")
    path = tmp_path / "nbs/01_a/01_first.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(notebooks.text_of(nb))
    (tmp_path / "foundation").mkdir()
    return tmp_path


def test_export_finds_and_mends_every_difference(project):
    assert {p.name for p in notebooks.export(root=project)} == {
        "first.py",
        "__init__.py",
        "_modidx.py",
    }
    assert notebooks.export(check=True, root=project) == []
    module, orphan = project / "foundation/a/first.py", project / "foundation/a/orphan.py"
    good = module.read_text()
    module.write_text(good.replace("return 1", "return 2"))
    orphan.write_text("")
    assert notebooks.export(check=True, root=project) == [module, orphan]
    notebooks.export(root=project)
    assert module.read_text() == good and not orphan.exists()


def test_running_gives_true_outputs_and_the_same_file_twice(project):
    path = project / "nbs/01_a/01_first.ipynb"
    nb = notebook(
        "import os, sys",
        "print('x'); print(object()); print('err', file=sys.stderr)",
        "os.environ['FOUNDATION_STATIC']",
        "#| eval: false\n1/0",
    )
    path.write_text(notebooks.text_of(nb))
    assert notebooks.run([path], root=project) == []
    ran = path.read_text()
    assert notebooks.problems(json.loads(ran)) == [] and "'1'" in ran and "at 0x" not in ran
    assert notebooks.run([path], root=project) == [] and path.read_text() == ran


def test_a_failing_notebook_is_told_and_left_alone(project, capsys):
    path = project / "nbs/01_a/01_first.ipynb"
    path.write_text(notebooks.text_of(notebook("1/0")))
    before = path.read_text()
    assert notebooks.run([path], root=project) == [path]
    assert path.read_text() == before and "ZeroDivisionError" in capsys.readouterr().err


def test_unknown_paths_are_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/notebooks.py", "run", "nowhere.ipynb"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no notebook at nowhere.ipynb" in done.stderr
