"""Look after the notebooks: run them as a reader would, stamp what follows from settings.ini, tell
what is stale.

python tools/notebooks.py COMMAND [nbs/00_core/01_basics.ipynb ...] [--check]

run      stamp, execute in place, clean (--stale: only those whose code has changed)
stamp    badges, Colab cells, sidebar.yml (--check only tells)
export   write the package (--check only tells what differs)
check    executed as they stand, no errors, no private paths, small
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 200_000  # bytes of outputs that one notebook may hold
BADGE = re.compile(r"\n*\[!\[[^\]]*\]\([^)]*colab-badge\.svg\)\]\([^)]*\)")
PRIVATE = re.compile(
    r"(?<![\w.%/-])(?:/(?:home|root|Users|work|tmp|mnt|private|work\w*)/[\w.@+-]+"
    r"|[A-Z]:\\+Users\\+\w+)"
)
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s\\n]+")
SKIPPED = re.compile(r"^#\|\s*eval:\s*false", re.M)


# Settings, files ----------------------------------------------------------------------------------


def settings(root=ROOT):
    "The one place that a fork changes"
    config = ConfigParser(delimiters=["="])
    config.read(Path(root) / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def lessons(root=ROOT):
    "All notebooks in reading order, `index` first"
    nbs = Path(root) / settings(root)["nbs_path"]
    paths = [
        p
        for p in nbs.rglob("*.ipynb")
        if not any(part[0] in "._" for part in p.relative_to(nbs).parts)
    ]
    return sorted(
        paths,
        key=lambda p: (
            len(p.relative_to(nbs).parts) > 1,
            p.stem != "index",
            p.relative_to(nbs).as_posix(),
        ),
    )


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def text_of(nb):
    "The notebook as nbdev_clean writes it, byte for byte"
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write(path, text):
    """Write so that a reader sees the old file or the new one,
    never half of it; True when something changed"""
    path = Path(path)
    if path.exists() and path.read_bytes() == text.encode():
        return False
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(text.encode())
    os.replace(draft, path)
    return True


def source(cell):
    return "".join(cell["source"])


def set_source(cell, text):
    cell["source"] = text.splitlines(True)


def code_cells(nb):
    "The author's code cells: the stamped one is not theirs"
    return [c for c in nb["cells"] if c["cell_type"] == "code" and not is_colab(c)]


# Stamping -----------------------------------------------------------------------------------------


def badge(path, cfg, root=ROOT):
    "The Colab button of the notebook at `path`"
    place = Path(path).resolve().relative_to(Path(root).resolve()).as_posix()
    base = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}"
    url = f"{base}/blob/{cfg['branch']}/{place}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def colab_cell(cfg):
    """Installs the library on Colab and nowhere else; shows numbers with four digits.
    Colab's torch fits its driver, so it stays as it is"""
    rest = [r for r in cfg["requirements"].split() if not re.match(r"torch(vision)?\b", r)]
    url = f"git+https://github.com/{cfg['user']}/{cfg['repo']}@{cfg['branch']}"
    words, whole = " ".join(map(quoted, rest)), dict(break_on_hyphens=False, break_long_words=False)
    lines = [
        "#| hide",
        "# @title On Colab: install the library. Everywhere: show numbers with four digits",
        "import sys",
        "",
        "%precision %.4g",
        'if "google.colab" in sys.modules:',
        *(f"    %pip install -q {part}" for part in textwrap.wrap(words, 75, **whole)),
        f"    %pip install -q --no-deps {quoted(url)}",
    ]
    return dict(
        cell_type="code",
        execution_count=None,
        id="colab",
        outputs=[],
        metadata={"cellView": "form", "jupyter": {"source_hidden": True}},
        source="\n".join(lines).splitlines(True),
    )


def quoted(requirement):
    "One word for a `%pip` line, which a shell reads"
    if not re.fullmatch(r"[\w.\[\],<>=!~;' +/@:-]+", requirement):
        raise ValueError(
            f"{requirement!r} in settings.ini cannot stand in a line for pip; expected a"
            " requirement"
        )
    return requirement if re.fullmatch(r"[\w.=/@:+-]+", requirement) else f'"{requirement}"'


def is_colab(cell):
    return cell["cell_type"] == "code" and source(cell).startswith("#| hide\n# @title On Colab")


def stamped(nb, path, cfg, root=ROOT):
    "A copy of `nb` with its badge, the Colab cell in second place, and what is glue folded"
    nb = json.loads(json.dumps(nb))
    cells = [c for c in nb["cells"] if not is_colab(c)]
    first = source(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    if not first.startswith("# "):
        raise ValueError(f"{path}: the first cell must be Markdown that begins with '# Title'")
    set_source(cells[0], BADGE.sub("", first).strip() + "\n\n" + badge(path, cfg, root))
    for cell in cells:
        off_the_page = re.match(r"#\| (export|hide)\n", source(cell))
        if off_the_page or "#| code-fold: true\n" in source(cell):  # folded in JupyterLab, too
            cell["metadata"] |= {"jupyter": {"source_hidden": True}}
    nb["cells"] = [cells[0], colab_cell(cfg), *cells[1:]]
    return nb


def readable(folder):
    "`07_pretraining` → `7 · Pretraining`; what stands in the nineties is an appendix"
    number, _, name = folder.partition("_")
    name = name.replace("_", " ").capitalize()
    return f"{int(number)} · {name}" if number.isdigit() and int(number) < 90 else name or folder


def number(page):
    """`07_pretraining/03_contrastive` → `7.3`;
    lessons outside of a folder and in an appendix go without"""
    page = Path(page)
    m = re.match(r"(\d+)_.*/(\d+)_", page.as_posix())
    return f"{int(m[1])}.{int(m[2])}" if m and int(m[1]) < 90 else ""


def title(path):
    "Title and promise of a lesson, from its first cell"
    head = source(load(path)["cells"][0])
    found = re.search(r"^# +(.+?)\s*$", head, re.M)
    promise = re.search(r"^> +(.+?)\s*$", head, re.M)
    return found[1] if found else readable(Path(path).stem), promise[1] if promise else ""


def sidebar(root=ROOT):
    """sidebar.yml for those who build the site with Quarto:
    nbdev's own stumbles over folders with numbers"""
    nbs, folders = Path(root) / settings(root)["nbs_path"], {}
    for path in lessons(root):
        folders.setdefault(path.parent.relative_to(nbs).as_posix(), []).append(
            path.relative_to(nbs).as_posix()
        )
    lines = [
        "# Made from the folder list by tools/notebooks.py stamp: do not edit",
        "website:",
        "  sidebar:",
        "    contents:",
    ]
    for folder, paths in folders.items():
        indent = "    "
        if folder != ".":
            lines += [
                f"    - section: {json.dumps(readable(folder), ensure_ascii=False)}",
                "      contents:",
            ]
            indent = "      "
        lines += [f"{indent}- {p}" for p in paths]
    return "\n".join(lines) + "\n"


def stamp(paths, check=False, root=ROOT):
    "Bring badges, Colab cells and the sidebar up to date; what was stale comes back"
    cfg, stale = settings(root), []
    new = {p: text_of(stamped(load(p), p, cfg, root)) for p in paths}
    if set(paths) >= set(lessons(root)):
        new[Path(root) / cfg["nbs_path"] / "sidebar.yml"] = sidebar(root)
    for path, text in new.items():
        if not (path.exists() and path.read_text(encoding="utf-8") == text):
            stale.append(path)
            if not check:
                write(path, text)
    return stale


# Running ------------------------------------------------------------------------------------------


def digest(nb):
    "What the outputs were made from: the code of all cells, in order"
    return hashlib.sha256(
        "\0".join(source(c).strip() for c in code_cells(nb)).encode()
    ).hexdigest()[:16]


def is_stale(nb):
    return nb["metadata"].get("foundation", {}).get("executed") != digest(nb)


def terminal(text):
    """What a terminal would show: a carriage return goes back to the start of its line,
    finished progress bars go"""
    lines = [
        line.rstrip("\r").rpartition("\r")[2]
        for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).split("\n")
    ]
    return "\n".join(line for line in lines if not re.search(r"\d+%\|.*\| *[\d.]+\w?/[\d.]+", line))


def public(text, root=ROOT):
    "Leave out where this machine keeps things"
    text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", text)
    text = re.sub(r"/\S*/site-packages/", "", text)
    return text.replace(str(root), ".").replace(str(Path.home()) + "/", "~/")


def tidy(outputs):
    "Merge streams, show what a terminal would, drop live widgets, which no saved notebook can move"
    merged = []
    for o in outputs:
        if o["output_type"] == "stream" and merged and merged[-1].get("name") == o["name"]:
            merged[-1]["text"] += o["text"]
        elif "application/vnd.jupyter.widget-view+json" not in o.get("data", {}):
            merged.append(o)
        elif "text/html" in o["data"]:
            merged.append(
                o | {"data": {k: v for k, v in o["data"].items() if "widget-view" not in k}}
            )
    for o in merged:
        if o["output_type"] == "stream":
            o["text"] = public(terminal(o["text"]))
        for kind in [k for k in o.get("data", {}) if k in ("text/plain", "text/markdown")]:
            o["data"][kind] = public(o["data"][kind])
    return [o for o in merged if o["output_type"] != "stream" or o["text"].strip()]


def execute(path, timeout=900, root=ROOT):
    """Run a notebook in place, top to bottom, in a fresh kernel;
    cells that nbdev_test skips stay as they are"""
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kw):
            skip = cell.cell_type != "code" or SKIPPED.search(cell.source)
            return cell if skip else await super().async_execute_cell(cell, cell_index, **kw)

    cfg = settings(root)
    nb = nbformat.reads(text_of(stamped(load(path), path, cfg, root)), 4)
    Client(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=40"],
    ).execute()
    for cell in nb.cells:
        if "outputs" in cell:
            cell.outputs = tidy(cell.outputs)
    nb.metadata.pop("widgets", None)
    nb.metadata.kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    nb.metadata.foundation = {"executed": digest(nb)}
    raw = json.loads(nbformat.writes(nb))
    clean_nb(
        raw,
        allowed_metadata_keys=cfg["allowed_metadata_keys"].split(),
        allowed_cell_metadata_keys=cfg["allowed_cell_metadata_keys"].split(),
    )
    write(path, text_of(raw))


def run(paths, root=ROOT):
    "Execute each; the paths that failed come back, their files untouched"
    os.environ.update(
        FOUNDATION_STATIC="1",
        TQDM_DISABLE="1",
        PYTHONHASHSEED="0",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )
    failed = []
    for path in paths:
        start = time.time()
        try:
            execute(path, root=root)
            print(f"{path}: {time.time() - start:.0f} s, {outputs_size(load(path)) / 1000:.0f} kB")
        except Exception as error:
            failed.append(path)
            print(f"{path}: {type(error).__name__}\n{error}", file=sys.stderr)
    return failed


# Exporting ----------------------------------------------------------------------------------------


def exported(root=ROOT):
    "The modules that the notebooks export, path → text, made in a folder of their own"
    cfg, root = settings(root), Path(root)
    with tempfile.TemporaryDirectory() as place:
        lib = Path(place) / cfg["lib_path"]
        lib.mkdir()
        for path in [root / "settings.ini", root / cfg["lib_path"] / "__init__.py", *lessons(root)]:
            if path.exists():
                copy = Path(place) / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
        subprocess.run([sys.executable, "-c", code], cwd=place, check=True)
        return {
            p.relative_to(lib).as_posix(): p.read_text(encoding="utf-8")
            for p in sorted(lib.rglob("*.py"))
        }


def export(check=False, root=ROOT):
    """Make the package what the notebooks say; what differed comes back.
    Needs no git and minds no uncommitted change"""
    lib = Path(root) / settings(root)["lib_path"]
    new = exported(root)
    old = {p.relative_to(lib).as_posix(): p.read_text(encoding="utf-8") for p in lib.rglob("*.py")}
    differ = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in [] if check else differ:
        if name in new:
            (lib / name).parent.mkdir(parents=True, exist_ok=True)
            write(lib / name, new[name])
        else:
            (lib / name).unlink()
    return [lib / name for name in differ]


# Checking -----------------------------------------------------------------------------------------


def outputs_size(nb):
    return sum(
        len(json.dumps(c.get("outputs", []), ensure_ascii=False).encode()) for c in nb["cells"]
    )


def texts(outputs):
    "All that a reader can see as text"
    for o in outputs:
        for part in [o.get("text", ""), o.get("traceback", ""), *o.get("data", {}).values()]:
            yield EMBEDDED.sub("", part if isinstance(part, str) else "".join(map(str, part)))


def problems(nb):
    "What keeps a notebook from being published, a sentence each"
    found, cells = [], nb["cells"]
    head = source(cells[0]) if cells else ""
    if not re.match(r"# \S.*\n\n> \S.*(\n\n|$)", head):
        found.append("the first cell must be '# Title', an empty line, '> promise'")
    elif re.sub(r"^# .*\n\n> .*$", "", BADGE.sub("", head), count=1, flags=re.M).strip():
        found.append(
            "the first cell must hold nothing but the title, the promise and the badge: the site"
            " does not show the rest"
        )
    if any("nbdev_export()" in source(c) for c in code_cells(nb)):
        found.append(
            "a cell calls nbdev_export: learners need no nbdev, and authors have `make export`"
        )
    if is_stale(nb):
        found.append(
            "the code has changed since the outputs were made: python tools/notebooks.py run it"
        )
    for i, cell in enumerate(cells):
        outputs = cell.get("outputs", [])
        if any(o["output_type"] == "error" for o in outputs):
            found.append(f"cell {i} shows an error")
        for text in [source(cell), *texts(outputs)]:
            if m := PRIVATE.search(text):
                found.append(f"cell {i} holds a path of somebody's machine: {m[0]}")
    if outputs_size(nb) > LIMIT:
        found.append(f"outputs take {outputs_size(nb):,} bytes, at most {LIMIT:,} are allowed")
    return found


def report(stale, check, what, fine):
    print("\n".join(f"{'stale' if check else what}: {p.relative_to(ROOT)}" for p in stale) or fine)
    return 1 if stale and check else 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "stamp", "export", "check"])
    parser.add_argument(
        "paths", nargs="*", type=Path, help="notebooks or folders (all when left out)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="stamp, export: change nothing, fail when something is stale",
    )
    parser.add_argument(
        "--stale", action="store_true", help="run: only those whose code has changed since they ran"
    )
    args = parser.parse_args(argv)
    given = [p.resolve() for p in args.paths]
    paths = [p for p in lessons() if not given or any(p == g or g in p.parents for g in given)]
    if not paths:
        parser.error(f"no notebook at {', '.join(map(str, args.paths)) or ROOT / 'nbs'}")
    if args.command == "run":
        return 1 if run([p for p in paths if not args.stale or is_stale(load(p))]) else 0
    if args.command == "stamp":
        return report(stamp(paths, args.check), args.check, "stamped", "all stamps are fresh")
    if args.command == "export":
        return report(
            export(args.check), args.check, "written", "the package is what the notebooks export"
        )
    found = [f"{p.relative_to(ROOT)}: {problem}" for p in paths for problem in problems(load(p))]
    print("\n".join(found) or f"{len(paths)} notebooks are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
