"""The package stands on its own: each module imports alone,
with the core dependencies, also from a wheel"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import notebooks
import pytest

ROOT = notebooks.ROOT
NAME = notebooks.settings()["lib_name"]  # for pip; the import name is foundation
MODULES = sorted(
    p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for p in (ROOT / "foundation").rglob("*.py")
    if p.stem not in ("__init__", "_modidx")
)
FRONT_ENDS = {
    "IPython",
    "ipykernel",
    "ipywidgets",
    "jupyter_client",
    "jupyter_core",
    "jupyterlab",
    "nbclient",
    "nbformat",
    "nbdev",
    "execnb",
    "fastcore",
    "ghapi",
}  # ipywidgets is a dependency, but only the widgets' functions import it

# One process imports torch, then forks for each module: as good as fresh, without torch's seconds
# for each
FORKS = """
import json, os, sys, traceback, importlib
importlib.import_module(sys.argv[2])
known, result = set(sys.modules), {}
for name in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
            answer = {"new": sorted({m.partition(".")[0] for m in set(sys.modules) - known})}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe: json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: text = pipe.read()
    os.waitpid(child, 0)
    result[name] = json.loads(text) if text else {"error": "the process died"}
print(json.dumps(result))
"""


def run(code, *args, cwd, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | env
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def imported(names, folder, first="torch"):
    done = run(FORKS, json.dumps(names), first, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def closure(names):
    "The distributions that the ones named need, with themselves"
    seen, todo = set(), list(names)
    while todo:
        name = re.match(r"[\w.-]+", todo.pop())[0].lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            try:
                todo += [r for r in metadata.requires(name) or [] if "extra ==" not in r]
            except metadata.PackageNotFoundError:
                pass  # for another system or Python
    return seen


def strangers():
    """Top-level names of installed packages that the core
    dependencies do not bring, and the front ends"""
    core = closure([r for r in metadata.requires(NAME) if "extra ==" not in r])
    return {
        name
        for name, owners in metadata.packages_distributions().items()
        if not {o.lower().replace("_", "-") for o in owners} & (core | {NAME})
    } | FRONT_ENDS


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_each_module_imports_in_a_fresh_process_with_core_dependencies_alone(tmp_path):
    assert len(MODULES) > 10
    result, outside = imported(MODULES, tmp_path), strangers()
    assert {"nbdev", "pytest", "IPython"} <= outside and not {"torch", "numpy", "sklearn"} & outside
    assert {name: answer["error"] for name, answer in result.items() if "error" in answer} == {}
    assert {
        name: bad for name, answer in result.items() if (bad := outside & set(answer["new"]))
    } == {}


@needs_fork
def test_what_does_not_import_is_caught(tmp_path):
    (tmp_path / "leans.py").write_text("x = variable_of_the_lesson\n")
    (tmp_path / "heavy.py").write_text("import fastcore.basics\n")
    result = imported(["leans", "heavy"], tmp_path, first="json")
    assert "NameError" in result["leans"]["error"]
    assert "fastcore" in strangers() & set(result["heavy"]["new"])


def test_the_bare_import_is_light(tmp_path):
    code = (
        "import sys, time; t = time.perf_counter(); import foundation; print(time.perf_counter() -"
        " t, 'torch' in sys.modules)"
    )
    runs = [run(code, cwd=tmp_path).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.2  # beyond what torch takes
    assert runs[0][1] == "False"


def test_versions_and_pins_agree():
    import foundation

    assert foundation.__version__ == metadata.version(NAME)
    assert "pkg_resources" not in (ROOT / "setup.py").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that nothing is left in the repository"
    place = tmp_path_factory.mktemp("wheel")
    for name in ["setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, place)
    shutil.copytree(
        ROOT / "foundation", place / "foundation", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
        ".",
    ]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next((place / "dist").glob(f"{NAME.replace('-', '_')}-*.whl"))


def test_the_wheel_holds_the_package_with_its_weights_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    have = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "foundation").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert have <= names
    assert {n.split("/")[0] for n in names} == {
        "foundation",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    assert wheel.stat().st_size < 26e6  # most of it weights


def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import foundation, foundation.core.basics, pathlib; here ="
        " pathlib.Path(foundation.__file__).parent; print(here, foundation.__version__,"
        " len(list(here.glob('weights/*.safetensors'))))"
    )
    place, version, weights = run(
        code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")
    ).stdout.split()
    assert Path(place) == tmp_path / "site" / "foundation"
    assert version == metadata.version(NAME)
    assert int(weights) == len(list((ROOT / "foundation/weights").glob("*.safetensors")))
    about = email.message_from_string(
        next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    )
    assert {"lab", "dev", "docs", "deploy", "bench"} <= set(about.get_all("Provides-Extra"))
