"""Fetch the scripts that the site needs to work offline, through npm;
without npm or network a CDN gives them"""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PLACE = Path(__file__).resolve().parents[1] / "docs" / "_static" / "vendor"
STAMP = PLACE / "versions.json"
# file -> package, version, path in it, sha384 of the content: npm and the CDN serve the same bytes
SCRIPTS = {
    "tex-svg.js": (
        "mathjax",
        "3.2.2",
        "es5/tex-svg.js",
        "KKWa9jJ1MZvssLeOoXG6FiOAZfAgmzsIIfw8BXwI9+kYm0lPCbC6yTQPBC00F1/L",
    ),
    "mermaid.min.js": (
        "mermaid",
        "12.3.0",
        "dist/mermaid.min.js",
        "HHW54r639fK42Ip0coGF3mz8oSiGn0eEoWNTLs75X7H63pLSDBa0Tqs0RwGmLlXE",
    ),
}


def cdn(name):
    package, version, path, _ = SCRIPTS[name]
    return f"https://cdn.jsdelivr.net/npm/{package}@{version}/{path}"


def attributes(name):
    "What the script's tag says beside its address: a browser refuses other bytes from a CDN"
    return {} if ready() else dict(integrity=f"sha384-{SCRIPTS[name][3]}", crossorigin="anonymous")


def versions():
    return {package: version for package, version, *_ in SCRIPTS.values()}


def ready():
    "Do the scripts lie there, in the versions asked for? The stamp is written last"
    try:
        return json.loads(STAMP.read_text()) == versions() and all(
            (PLACE / name).exists() for name in SCRIPTS
        )
    except (OSError, ValueError):
        return False


def unpack(folder, package, version, path):
    "The bytes of one file of an npm package"
    done = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"],
        cwd=folder,
        timeout=300,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["npm failed"])[-1])
    with tarfile.open(next(Path(folder).glob(f"{package}-*.tgz"))) as archive:
        return archive.extractfile(f"package/{path}").read()


def intact(content, digest):
    return base64.b64encode(hashlib.sha384(content).digest()).decode() == digest


def fetch():
    with tempfile.TemporaryDirectory() as folder:
        files = {name: unpack(folder, *where) for name, (*where, _) in SCRIPTS.items()}
    for name, content in files.items():
        if not intact(content, SCRIPTS[name][3]):
            raise OSError(f"{name} has another content than the one that was looked at")
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    for name, content in files.items():
        (PLACE / name).write_bytes(content)
    STAMP.write_text(json.dumps(versions()))


def main():
    if ready():
        return
    if not shutil.which("npm"):
        return print(
            "npm is not there: the site will take MathJax and Mermaid from a CDN", file=sys.stderr
        )
    try:
        fetch()
    except (OSError, KeyError, StopIteration, subprocess.TimeoutExpired, tarfile.TarError) as error:
        print(
            f"npm could not fetch MathJax and Mermaid ({error}): the site will take them from"
            " a CDN",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
