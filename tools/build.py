"""Build the site in _site/ from the notebooks as they stand;
a warning is an error. `--out` puts it elsewhere."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import vendor

ROOT = Path(__file__).resolve().parents[1]


def build(out, doctrees=ROOT / "build" / "doctrees"):
    "Run Sphinx, which remembers in `doctrees` what it has read; its exit status comes back"
    out = Path(out).resolve()
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-c",
        ROOT / "docs",
        "-d",
        doctrees,
        ROOT / "nbs",
        out,
    ]
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=dict(os.environ, FOUNDATION_STATIC="1")
    ).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "_site", type=Path)
    args = parser.parse_args()
    if importlib.util.find_spec("sphinx") is None:
        sys.exit(
            "The site needs Sphinx 9, which needs Python 3.11 or newer: remove .venv, then make"
            " docs PYTHON=python3.12"
        )
    vendor.main()
    status = build(args.out)
    if status == 0:
        print(f"The site is in {args.out}: open {args.out / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
