"Setting up the environment: one clear sentence for each trouble, and nothing done twice"

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools/environment.py"


@pytest.fixture
def env(tmp_path, monkeypatch):
    "The module, with the roots in a folder of its own"
    spec = importlib.util.spec_from_file_location("environment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name, value in dict(
        ROOT=tmp_path,
        VENV=tmp_path / ".venv",
        BIN=tmp_path / ".venv/bin/python",
        STAMP=tmp_path / ".venv/ready",
    ).items():
        monkeypatch.setattr(module, name, str(value))
    monkeypatch.delenv("PYTHON", raising=False)
    return module


def fake_python(folder, name, version, good=True):
    "A command that answers as a Python of that version would"
    path = folder / name
    folder.mkdir(exist_ok=True)
    path.write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) echo {version};; *ensurepip*)'
        f" {'true' if good else 'false'};; esac\n"
    )
    path.chmod(0o755)
    return path


def test_settings_are_read_as_configparser_reads_them(env):
    import notebooks

    mine, theirs = env.settings(), notebooks.settings()
    assert {k: mine[k] for k in mine if k.endswith("requirements")} == {
        k: theirs[k] for k in theirs if k.endswith("requirements")
    }
    assert env.version(mine["min_python"]) == (3, 10)


def test_the_newest_fit_python_is_found(env, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    for name, version in [("python3.13", "3.13"), ("python3.11", "3.11"), ("python3", "3.14")]:
        fake_python(folder, name, version)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.find_python((3, 10), (3, 13)) == ("python3.13", "3.13")


@pytest.mark.parametrize(
    "version, good, words",
    [
        ("3.8", True, "is 3.8"),
        ("3.14", True, "is 3.14"),
        ("3.12", False, "no venv module"),
        (None, True, "none was found"),
    ],
)
def test_unfit_pythons_are_told(env, tmp_path, monkeypatch, version, good, words):
    folder = tmp_path / "bin"
    folder.mkdir()
    if version:
        fake_python(folder, "python3", version, good)
    shutil.copy("/bin/sh", folder / "sh")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(env.Trouble, match=re.escape(words)) as caught:
        env.find_python((3, 10), (3, 13))
    assert "3.10 to 3.13" in str(caught.value) and "make PYTHON=" in str(caught.value)


def test_an_old_python_can_run_the_script_and_is_refused_in_one_sentence(tmp_path):
    old = [
        p
        for v in ("2.7", "3.6", "3.8")
        for p in Path.home().glob(f".pyenv/versions/{v}.*/bin/python")
    ][:1] or [sys.executable]
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    done = subprocess.run(
        [old[0], tmp_path / "tools" / SCRIPT.name],
        capture_output=True,
        text=True,
        env=dict(
            os.environ, PYTHON="/nowhere/python", PYTHONDONTWRITEBYTECODE="1", HOME=str(tmp_path)
        ),
    )
    assert (
        done.returncode == 1
        and done.stderr.strip().count("\n") == 0
        and "/nowhere/python was found" not in done.stderr
    )
    assert "Python 3.10 to 3.13 is needed, but /nowhere/python does not run" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_full_disk_is_told_before_anything_is_made(env, monkeypatch):
    monkeypatch.setattr(env, "free_gb", lambda path: 2.5)
    with pytest.raises(env.Trouble, match="8 GB, but only 2.5 GB are free"):
        env.set_up()
    assert not os.path.exists(env.VENV)


@pytest.mark.parametrize(
    "said, words",
    [
        (
            (
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on"
                " device"
            ),
            "disk is full",
        ),
        (
            (
                "WARNING: Retrying: Failed to establish a new connection: [Errno -2] Name or"
                " service not known"
            ),
            "cannot reach",
        ),
        (
            "ERROR: No matching distribution found for torch>=99",
            "could not install the requirements",
        ),
    ],
)
def test_what_pip_says_becomes_one_sentence(env, tmp_path, monkeypatch, said, words):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(env, "BIN", str(python))
    with pytest.raises(env.Trouble, match=words):
        env.pip("torch")


def test_packages_that_were_cut_short_are_forgotten(env, tmp_path):
    place = Path(env.VENV) / "lib/python3.12/site-packages"
    for name in ["whole-1.dist-info", "half-1.dist-info", "~orch"]:
        (place / name).mkdir(parents=True)
    (place / "whole-1.dist-info/INSTALLER").write_text("pip")
    env.forget_unfinished()
    assert [p.name for p in place.iterdir()] == ["whole-1.dist-info"]


def test_requirements_decide_whether_to_set_up_again(env):
    config = env.settings()
    before = env.wanted(config)
    assert env.wanted(dict(config, description="other words")) == before
    for change in [
        dict(requirements="torch"),
        dict(dev_requirements="pytest"),
        dict(min_python="3.11"),
    ]:
        assert env.wanted(dict(config, **change)) != before


def test_a_finished_environment_is_left_alone_and_a_moved_one_made_anew(env, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env.VENV], check=True)
    pip = Path(env.VENV) / "bin/pip"
    pip.write_text(f"#!{env.VENV}/bin/python\n")
    Path(env.STAMP).write_text(env.wanted(env.settings()))
    monkeypatch.setattr(env, "pip", lambda *args: pytest.fail("nothing should be installed"))
    env.set_up()
    calls = []
    monkeypatch.setattr(env, "pip", lambda *args: calls.append(args))
    Path(env.STAMP).unlink()  # the last run was interrupted: go on
    env.set_up()
    assert len(calls) == 2 and Path(env.STAMP).exists()
    pip.write_text("#!/elsewhere/.venv/bin/python\n")
    assert not env.alive((3, 10), (3, 13))


def test_make_lists_its_targets_and_ci_run_is_executable():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ["lab", "tour", "test", "docs", "weights", "stamp", "clean"]:
        assert f"make {target} " in done.stdout
    assert os.access(ROOT / ".ci/run", os.X_OK) and "make test" in (ROOT / ".ci/run").read_text()


# What a fork expects ------------------------------------------------------------------------------

YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]
WORDS = [*ROOT.glob("*.md"), *(ROOT / ".github").glob("*.md"), *YAML]


def targets():
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def test_workflows_run_what_is_there():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in YAML[:-1]}
    assert {"test", "site", "weekly", "bug", "lesson"} <= workflows.keys()
    for name in ("test", "site", "weekly"):
        flow = workflows[name]
        assert {"name", "jobs", "permissions"} < flow.keys() and flow[True]  # YAML reads `on` so
        for job in flow["jobs"].values():
            assert "ubuntu" in job["runs-on"] and job["steps"]
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step), step
                words = step.get("run", "make test").split()
                known = words[1] in targets() if words[0] == "make" else True
                assert known and (
                    words[0] in ("make", ".venv/bin/pip") or (ROOT / words[0]).exists()
                )
                assert re.search(r"@v\d+$", step.get("uses", "@v1"))
    pythons = workflows["weekly"]["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert all(isinstance(number, str) for number in pythons)  # 3.10 is no 3.1


def test_issue_forms_ask_something():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"]
        asked = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert asked and len(set(asked)) == len(asked)
        assert all(part["attributes"]["label"] for part in form["body"])


def test_targets_that_are_named_exist():
    assert {"test", "check", "lint", "format", "docs", "setup"} <= targets()
    for path in WORDS:
        for name in re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")):
            assert name in targets(), f"{path.name} names `make {name}`, which the Makefile has not"


def test_hooks_do_what_make_lint_does():
    (repo,) = yaml.safe_load(YAML[-1].read_text())["repos"]
    hooks = [hook["entry"].split()[:2] for hook in repo["hooks"]]
    lint = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True).stdout
    assert repo["repo"] == "local" and hooks == [
        line.split()[:2] for line in lint.splitlines() if line.startswith(".venv/bin/ruff")
    ]


def test_a_citation_and_the_changes_name_this_version():
    import notebooks

    cfg = notebooks.settings()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == cfg["version"]
    assert f"\n## {cfg['version']} · " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_bent_version_is_a_sentence(env):
    for text in ("", "3.x", "three"):
        with pytest.raises(env.Trouble, match="min_python"):
            env.version(text)


def test_the_constraints_name_a_tested_version_of_each_requirement():
    import notebooks
    from packaging.requirements import Requirement

    lines = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    ]

    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {canonical(name): number for name, number in (line.split("==") for line in lines)}
    settings = notebooks.settings()
    for key in settings:
        for word in settings[key].split() if key.endswith("requirements") else ():
            wanted = Requirement(word)
            assert canonical(wanted.name) in pinned, f"{wanted.name} has no line in constraints.txt"
            assert wanted.specifier.contains(pinned[canonical(wanted.name)], prereleases=True), word
