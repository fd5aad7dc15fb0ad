"""The console command as it is typed: real processes, exit codes,
one sentence when something is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foundation import command
from foundation.command import Finding, check_software, check_shipped, doctor, main
from foundation.data.sources import SOURCES


def typed(*arguments, **variables):
    "What `foundation …` says in a process of its own."
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from foundation.command import main; sys.exit(main())",
            *arguments,
        ],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_sentence(text):
    return text.count("\n") == 1 and "Traceback" not in text and text.strip()


def test_version_is_quick_and_imports_no_torch():
    before = os.times()
    done = typed("--version")
    after = os.times()  # processor time: a busy machine is not the command's fault
    assert done.stdout == f"foundation {command.__version__}\n" and done.returncode == 0
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 0.5
    )
    code = (
        "import sys; from foundation.command import main; main(['--version']); print([m for m in"
        " ('torch', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.endswith("[]\n")


def test_the_entry_point_is_main():
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="console_scripts") if e.name == "foundation"]
    assert entry.value == "foundation.command:main"


@pytest.mark.parametrize(
    "arguments",
    [(), ("--help",), ("data",), ("data", "--help"), ("tour", "--help"), ("doctor", "--help")],
)
def test_help_is_help(arguments, capsys):
    assert main(list(arguments)) == 0
    assert "usage: foundation" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["tours"], "tours"),
        (["--nonsense"], "--nonsense"),
        (["data", "fetch"], "NAME"),
        (["data", "fetch", "mnist"], "fashion_mnist"),
        (["tour", "--out"], "--out"),
        (["doctor", "--jsno"], "--jsno"),
    ],
)
def test_misunderstood_is_one_sentence_and_2(arguments, word, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert one_sentence(told.err) and word in told.err and not told.out


def test_data_list_and_fetch(tmp_path):
    place = dict(FOUNDATION_DATA=str(tmp_path), FOUNDATION_OFFLINE="1")
    listed = typed("data", "list", **place)
    assert listed.returncode == 0 and listed.stdout.count("not fetched yet") == len(SOURCES)
    fetched = typed("data", "fetch", "digits", "digits", **place)
    assert (
        fetched.returncode == 0
        and fetched.stdout.count("digits is ready") == 1
        and not fetched.stderr
    )
    assert typed("data", "list", **place).stdout.count(" ready ") == 1


def test_one_set_that_fails_keeps_no_other_back(tmp_path):
    done = typed(
        "data", "fetch", "reviews", "digits", FOUNDATION_DATA=str(tmp_path), FOUNDATION_OFFLINE="1"
    )
    assert done.returncode == 1 and "digits is ready" in done.stdout
    assert (
        "By hand" in done.stderr
        and "FOUNDATION_OFFLINE" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_unwritable_data_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = typed("data", "fetch", "digits", FOUNDATION_DATA=str(tmp_path / "file" / "data"))
    assert (
        done.returncode == 1
        and one_sentence(done.stderr)
        and "Nothing can be written" in done.stderr
    )


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (ValueError("the set is empty; give it a picture"), 1, "the set is empty"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (RuntimeError("a\n  b"), 1, "RuntimeError: a b"),
        (ModuleNotFoundError("No module named 'foundation.tour'"), 1, "foundation.tour"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_every_ending_is_a_sentence(monkeypatch, capsys, error, code, words):
    def fail(*_):
        raise error

    monkeypatch.delenv("FOUNDATION_DEBUG", raising=False)
    monkeypatch.setattr(command, "tour", fail)
    assert main(["tour"]) == code
    told = capsys.readouterr().err
    assert one_sentence(told) and words in told


def test_ctrl_c_says_what_is_kept(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    for name, arguments, words in [
        ("tour", ["tour"], "Nothing of this tour is kept"),
        ("fetch_data", ["data", "fetch", "digits"], "that were ready are kept"),
        ("doctor", ["doctor"], "^Stopped.$"),
        ("list_data", ["data", "list"], "^Stopped.$"),
        ("_parser", [], "^Stopped.$"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(command, name, stop)
            assert main(arguments) == 130
        assert re.search(words, capsys.readouterr().err)


def test_without_a_home_and_a_temporary_folder_the_doctor_says_so():
    code = (
        "import sys, pathlib, tempfile; from foundation.command import main\ndef nobody(*_): raise"
        " RuntimeError('Could not determine home directory.')\ndef none(): raise"
        " FileNotFoundError('No usable temporary directory found')\npathlib.Path.expanduser ="
        " pathlib.Path.home = nobody; tempfile.gettempdir = none\nsys.exit(main(sys.argv[1:]))"
    )
    variables = {
        k: v
        for k, v in os.environ.items()
        if k not in ("FOUNDATION_DATA", "XDG_CACHE_HOME", "HOME")
    }
    for arguments, where in (
        (["doctor"], "stdout"),
        (["data", "list"], "stderr"),
        (["data", "fetch", "digits"], "stderr"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True
        )
        told = getattr(done, where)
        assert (
            done.returncode == 1
            and "neither a home folder nor one for temporary files" in told
            and "Traceback" not in done.stderr
        )
        assert where == "stdout" or one_sentence(told)


def test_a_set_that_fails_in_another_way_keeps_no_other_back(monkeypatch, capsys):
    from foundation.data import sources

    really = sources.fetch

    def fetch(name):
        if name == "reviews":
            raise PermissionError(13, "Permission denied")
        return really(name)

    monkeypatch.setattr(command, "fetch", fetch)
    assert command.fetch_data(["reviews", "digits"]) == 1
    told = capsys.readouterr()
    assert "digits is ready" in told.out and told.err == "reviews: [Errno 13] Permission denied\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
def test_make_lab_tells_root_what_jupyter_wants():
    root = Path(command.__file__).parents[1]
    for arguments, words in (
        ([], "ARGS=--allow-root"),
        (["ARGS=--allow-root"], "jupyter lab nbs --allow-root"),
    ):
        shown = subprocess.run(
            ["make", "-n", "lab", *arguments], cwd=root, capture_output=True, text=True
        ).stdout
        assert words in shown
    recipe = shown[shown.index("if [") : shown.index("jupyter lab")].rsplit("fi", 1)[0] + "fi"
    if hasattr(os, "getuid") and os.getuid() == 0:
        told = subprocess.run(
            ["sh", "-c", recipe.replace("--allow-root", "", 1)], capture_output=True, text=True
        )
        assert told.returncode == 1 and one_sentence(told.stderr)
        assert subprocess.run(["sh", "-c", recipe], capture_output=True).returncode == 0


def test_debug_shows_where(monkeypatch):
    monkeypatch.setenv("FOUNDATION_DEBUG", "1")
    monkeypatch.setattr(command, "tour", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["tour"])


def test_tour_gets_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "tour", lambda *args: asked.append(args) or 0)
    assert main(["tour"]) == main(["tour", "--short", "--out", "there"]) == 0
    assert asked == [
        ("runs/tour", None),
        ("there", True),
    ]  # without --short the variable FOUNDATION_SHORT decides


@pytest.mark.skipif(os.name == "nt", reason="no such pipes there")
def test_a_closed_pipe_is_no_error():
    line = (
        f'{sys.executable} -c \'from foundation.command import main; raise SystemExit(main(["data",'
        ' "list"]))\' | true'
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


def test_a_plain_terminal_is_no_error():
    done = typed("data", "list", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0 and "Fashion-MNIST" in done.stdout and not done.stderr


# The doctor ---------------------------------------------------------------------------------------


def test_doctor_tells_machines():
    done = typed("doctor", "--json")
    told = json.loads(done.stdout)
    names = {f["name"] for f in told["findings"]}
    assert {
        "python",
        "torch",
        "foundation",
        "device",
        "bf16",
        "threads",
        "memory",
        "disk",
        "data fashion_mnist",
        "jupyterlab",
        "onnxruntime",
        "browser",
    } <= names
    assert done.returncode == (0 if told["can_run_tour"] else 1) and not done.stderr
    assert told["can_run_tour"] == all(f["ok"] for f in told["findings"] if f["needed"])
    assert all(f["remedy"] for f in told["findings"] if not f["ok"])


@pytest.mark.parametrize("needed, code, mark", [(True, 1, "FAIL"), (False, 0, "gap")])
def test_only_what_the_tour_needs_decides(capsys, needed, code, mark):
    assert doctor(checks=[lambda: [Finding("thing", "missing", False, "get one", needed)]]) == code
    told = capsys.readouterr().out
    assert mark in told and "→ get one" in told


def test_doctor_notices_a_missing_or_old_requirement(monkeypatch):
    monkeypatch.setattr(
        command, "_requirements", lambda: ["torch>=99", "numpy", "no-such-package>=1"]
    )
    bad = {f.name: f for f in check_software() if not f.ok}
    assert set(bad) == {"torch", "no-such-package"} and all(f.needed for f in bad.values())
    assert bad["torch"].remedy == 'pip install "torch>=99"'


def test_doctor_notices_sick_weights(tmp_path):
    (none,) = check_shipped(tmp_path)
    assert not none.ok and none.needed
    (tmp_path / "a.safetensors").write_bytes(b"cut off")
    (tmp_path / "b.safetensors").write_bytes(b"cut off")
    (tmp_path / "b.json").write_text(
        json.dumps({"sha256": "0", "architecture": "ResNet", "config": {}})
    )
    (tmp_path / "c.json").write_text("{half")
    found = list(check_shipped(tmp_path))
    assert [f.name for f in found] == ["weights a", "weights b", "weights c"] and not any(
        f.ok for f in found
    )


def test_doctor_lives_with_a_wrong_device_name():
    done = typed("doctor", FOUNDATION_DEVICE="abacus")
    assert done.returncode == 1 and "abacus" in done.stdout and not done.stderr


def test_doctor_tells_a_damaged_set(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "digits.csv").write_text("1,2,3")
    done = typed("doctor", FOUNDATION_DATA=str(tmp_path))
    assert "damaged: digits.csv" in done.stdout and "foundation data fetch digits" in done.stdout


def test_weights_are_listed_with_their_recipes_and_made_once_each(tmp_path, monkeypatch, capsys):
    from foundation.recipes import page

    made = []
    monkeypatch.setattr(page, "recipes", lambda: dict(vgg_pruned="r.p", vgg_slim="r.p", net="r.n"))
    monkeypatch.setattr(page, "make", lambda name, folder: made.append((name, folder)))
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["net", "vgg_pruned", "vgg_slim"]
    assert main(["weights", "make", "all", "--folder", str(tmp_path)]) == 0
    assert len(made) == 2 and {str(folder) for _, folder in made} == {str(tmp_path)}
    assert main(["weights", "make", "resnet"]) == 1
    assert "no recipe makes 'resnet'" in capsys.readouterr().err


def test_every_shipped_file_has_a_recipe():
    from foundation.models.card import WEIGHTS
    from foundation.recipes.page import recipes

    shipped = {p.stem for p in WEIGHTS.glob("*.json") if not p.stem.endswith(".tokenizer")}
    assert shipped == set(recipes())
