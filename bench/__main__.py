"""Measure all rows, print them and write bench/results.json; where rows are named, measure and
print only those."""

import argparse
import json
import os
import platform
import sys
from functools import partial
from pathlib import Path

import torch

from foundation.core.precision import supports_bf16
from foundation.core.files import atomic_write

from .duel import MissingPeer, measure, peer
from .mae import mae
from .masked_text import masked_text
from .prune import prune
from .quantize import quantize
from .simclr import simclr
from .student import student

RESULTS = Path(__file__).with_name("results.json")
BOTH = dict(
    masked_text=masked_text, simclr=simclr, mae=mae
)  # in fp32, and in bf16 where the processor has it
HALF = {f"{name}_bf16": partial(row, "bf16") for name, row in BOTH.items() if supports_bf16("cpu")}
ROWS = {
    **BOTH,
    **HALF,
    "prune": prune,
    "quantize": quantize,
    "student": student,
}  # name -> a function that builds a Duel; a row more is an entry more


def machine() -> dict:
    "What the figures depend on besides the code."
    return dict(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(_load(), 2),
        python=platform.python_version(),
        **{name: str(peer(name).__version__) for name in ("torch", "transformers", "lightly")},
    )


def _processor():
    "Its name, where the system tells"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _load():
    "Tasks that ran during the last minute, on average; 0 where the system does not tell"
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def table(rows: list[dict]) -> str:
    "The rows as text."
    line = "{:17} {:>8} {:>7}  {:50} {:>5} {:12} {:>5}  {}".format
    lines = [line("row", "unit", "ours", "peers", "ratio", "[quartiles]", "limit", "same result")]
    for row in rows:
        peers = ", ".join(f"{name} {rate:,.0f}" for name, rate in row["peers"].items())
        limit = (
            ""
            if row["limit"] is None
            else f"{row['limit']:.1f}" + ("" if row["ratio"] >= row["limit"] else " !")
        )
        lines.append(
            line(
                row["name"],
                row["unit"],
                f"{row['ours']:,.0f}",
                peers,
                f"{row['ratio']:.2f}",
                "[{:.2f}, {:.2f}]".format(*row["spread"]),
                limit,
                "yes" if row["same_result"] else "NO",
            )
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> str | int:
    """Exit status: a sentence when peers are missing or results differ, else 0, also for a ratio
    below its limit."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all where none is named"
    )
    parser.add_argument("--rounds", type=int, default=9, help="paired rounds of each row")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are: {', '.join(ROWS)}")
    if args.rounds < 1:
        parser.error(f"got --rounds {args.rounds}; expected 1 or more")
    if _load() > 1:
        print(
            f"The load average is {_load():.1f}: other work is running, which moves these figures",
            file=sys.stderr,
        )
    try:
        torch.manual_seed(0)
        about = None if args.rows else machine()
        rows = [measure(name, ROWS[name](), args.rounds) for name in args.rows or ROWS]
    except MissingPeer as error:
        return str(error)
    except KeyboardInterrupt:
        return "Interrupted: nothing was written"
    print(table(rows))
    if about:
        with atomic_write(RESULTS, "w") as file:
            json.dump(dict(machine=about, rows=rows), file, indent=1, ensure_ascii=False)
            file.write("\n")
    different = [row["name"] for row in rows if not row["same_result"]]
    return (
        f"Not the same result, so the ratio means nothing: {', '.join(different)}"
        if different
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
