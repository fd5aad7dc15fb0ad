"""Measure the course on a GPU: `python bench/gpu.py`, with PyTorch and what `foundation` needs.

Each part is written when it is done, into gpu.json, gpu.md and gpu.svg; a second call goes on with
those that are missing. `--toy` tries the code at toy size, on a CPU too, into runs/."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HOME = Path(__file__).resolve().parent
if sys.path[0] == str(HOME):  # run as a file: the folder above is where `bench` is found
    sys.path[0] = str(HOME.parent)

import torch  # noqa: E402

from bench.gpu_clock import Place  # noqa: E402
from bench.gpu_parts import PARTS  # noqa: E402
from foundation.core.files import atomic_write  # noqa: E402

STATES = ("measured", "failed", "not installed", "not yet measured")
EMPTY = dict(status="not yet measured", date=None, seconds=None, note="", rows=[])


def machine(place: Place) -> dict:
    "What the figures depend on besides the code, as far as PyTorch and the driver tell."
    about = dict(card=platform.processor() or platform.machine(), memory_gb=None, toy=place.toy)
    asked = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    about |= dict.fromkeys(asked)
    if place.cuda:
        card = torch.cuda.get_device_properties(place.device)
        about |= dict(card=card.name, memory_gb=round(card.total_memory / 1e9, 1))
        about |= zip(asked, _driver(asked))
    software = dict(torch=torch.__version__, cuda=torch.version.cuda, cores=os.cpu_count())
    return about | software | dict(python=platform.python_version())


def _driver(asked):
    "What nvidia-smi says; nothing where it is not there"
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return [None] * len(asked)


def fresh(about: dict | None = None) -> dict:
    return dict(machine=about, parts={name: dict(EMPTY, rows=[]) for name in PARTS})


def opened(path: Path, about: dict) -> dict:
    "The results so far; what is damaged or of another machine is set aside, and said."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return fresh(about)
    except (ValueError, RecursionError):
        return _set_aside(path, "is damaged", about)
    if not _sound(found):
        return _set_aside(path, "is damaged: it has another shape", about)
    if found["machine"] is None:
        return fresh(about)
    same = [found["machine"].get(key) == about[key] for key in ("card", "torch", "toy")]
    return found if all(same) else _set_aside(path, "is of another card or PyTorch", about)


def _sound(found) -> bool:
    "Does it have the shape that this program writes?"
    if not isinstance(found, dict) or set(found) != {"machine", "parts"}:
        return False
    parts = found["parts"]
    return (
        isinstance(found["machine"], (dict, type(None)))
        and isinstance(parts, dict)
        and set(parts) == set(PARTS)
        and all(isinstance(part, dict) and set(part) == set(EMPTY) for part in parts.values())
        and all(part["status"] in STATES for part in parts.values())
        and all(isinstance(part["rows"], list) for part in parts.values())
    )


def _set_aside(path, why, about):
    number = next(i for i in range(1, 10**6) if not path.with_suffix(f".old{i}.json").exists())
    old = path.rename(path.with_suffix(f".old{number}.json"))
    print(f"{path.name} {why}; it is kept as {old.name}, and all parts begin anew")
    return fresh(about)


def measure(name: str, place: Place, results: dict) -> dict:
    "A part of the results; what goes wrong is a sentence in it."
    began, part = time.perf_counter(), dict(EMPTY, status="measured")
    try:
        part["rows"], part["note"] = PARTS[name](place, results)
    except ImportError as error:
        part |= dict(status="not installed", note=f"{error.name or error} is not installed")
    except Exception as error:  # one part that fails, out of memory say, does not stop the others
        first = str(error).partition("\n")[0]
        part |= dict(status="failed", note=f"{type(error).__name__}: {first}"[:300])
    if place.cuda:
        torch.cuda.empty_cache()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return part | dict(date=date, seconds=round(time.perf_counter() - began, 2))


def write(path: Path, results: dict) -> None:
    "The results as numbers and as a page."
    with atomic_write(path, "w") as file:
        json.dump(results, file, indent=1, ensure_ascii=False)
        file.write("\n")
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(page(results))


def page(results: dict) -> str:
    "The results as tables; what no GPU has run says so."
    about = results["machine"]
    lines = ["# On a GPU", "", "Written by `python bench/gpu.py`.", ""]
    if about is None:
        lines += ["No GPU has run this yet: all of it is **not yet measured**.", ""]
    else:
        lines += [", ".join(f"{key} {value}" for key, value in about.items() if value), ""]
        seconds = sum(part["seconds"] or 0 for part in results["parts"].values())
        lines += [f"{seconds:.0f} seconds in all (the aim is 480 on an H100).", ""]
    if about and about["toy"]:
        lines += ["Toy sizes: these numbers mean nothing.", ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", _about(name), ""]
        if part["status"] != "measured":
            lines += [f"**{part['status']}**{': ' if part['note'] else ''}{part['note']}", ""]
        else:
            lines += [
                *table(part["rows"]),
                "",
                f"{part['date']}, {part['seconds']} s: {part['note']}",
                "",
            ]
    return "\n".join(lines)


def _about(name):
    return getattr(PARTS[name], "func", PARTS[name]).__doc__ or ""


def table(rows: list[dict]) -> list[str]:
    "Rows as lines of a Markdown table."
    if not rows:
        return ["(no rows)"]
    body = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/")


def draw(results: dict, path: Path) -> bool:
    "Utilisation of each way to train; nothing where matplotlib or rows are missing."
    rows = [r for name, part in results["parts"].items() if "train_" in name for r in part["rows"]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    figure = Figure(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row['model']}: {row['way']}" for row in rows]
    best = {model: 1e-9 for model in {row["model"] for row in rows}}
    for row in rows:
        best[row["model"]] = max(best[row["model"]], row["per_second"] or 0)
    left.barh(names, [100 * (row["of_measured_peak"] or 0) for row in rows])
    left.axvline(50, color="black", linewidth=0.8)
    left.set_xlabel("model FLOPs, % of the measured peak")
    right.barh(names, [100 * (row["per_second"] or 0) / best[row["model"]] for row in rows])
    right.set_xlabel("speed, % of the fastest way")
    left.invert_yaxis()
    about = results["machine"]
    figure.suptitle(f"{about['card']}{', toy sizes: no measurement' if about['toy'] else ''}")
    figure.savefig(path)
    return True


def main(argv: list[str] | None = None) -> str | int:
    "Exit status: a sentence when there is no GPU or a part failed, else 0."
    parser = argparse.ArgumentParser("python bench/gpu.py", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--again", action="store_true", help="measure what is measured once more")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--out", type=Path, help="the file of results")
    args = parser.parse_args(argv)
    path = args.out or (HOME.parent / "runs/gpu-toy.json" if args.toy else HOME / "gpu.json")
    if not torch.cuda.is_available() and not args.toy:
        if not path.exists():
            write(path, fresh())
        return "PyTorch sees no GPU: nothing was measured. `--toy` tries the code at toy size"
    place = Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.toy)
    results = opened(path, machine(place))
    for name in args.part or PARTS:
        if results["parts"][name]["status"] != "measured" or args.again:
            print(f"{name:12}", end=" ", flush=True)
            torch.manual_seed(0)
            results["parts"][name] = part = measure(name, place, results)
            write(path, results)
            if name.startswith("train"):
                draw(results, path.with_suffix(".svg"))
            print(f"{part['seconds']:7.1f} s  {part['status']}  {part['note']}")
    bad = [name for name, part in results["parts"].items() if part["status"] == "failed"]
    return f"failed: {', '.join(bad)}; the same command tries them again" if bad else 0


if __name__ == "__main__":
    sys.exit(main())
