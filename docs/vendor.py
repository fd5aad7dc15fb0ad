"Fetch the scripts that the site needs to work offline, through npm; without npm or network a CDN gives them"

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PLACE = Path(__file__).resolve().parent / "_static" / "vendor"
STAMP = PLACE / "versions.json"
SCRIPTS = {
    "tex-svg.js": ("mathjax", "3.2.2", "es5/tex-svg.js"),
    "mermaid.min.js": ("mermaid", "12.3.0", "dist/mermaid.min.js"),
}


def cdn(name):
    package, version, path = SCRIPTS[name]
    return f"https://cdn.jsdelivr.net/npm/{package}@{version}/{path}"


def versions():
    return {package: version for package, version, _ in SCRIPTS.values()}


def ready():
    "Do the scripts lie there, in the versions asked for? The stamp is written last"
    try:
        return json.loads(STAMP.read_text()) == versions() and all((PLACE / name).exists() for name in SCRIPTS)
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


def fetch():
    with tempfile.TemporaryDirectory() as folder:
        files = {name: unpack(folder, *where) for name, where in SCRIPTS.items()}
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    for name, content in files.items():
        (PLACE / name).write_bytes(content)
    STAMP.write_text(json.dumps(versions()))


def main():
    if ready():
        return
    if not shutil.which("npm"):
        return print("npm is not there: the site will take MathJax and Mermaid from a CDN", file=sys.stderr)
    try:
        fetch()
    except (OSError, KeyError, StopIteration, subprocess.TimeoutExpired, tarfile.TarError) as error:
        print(f"npm could not fetch MathJax and Mermaid ({error}): the site will take them from a CDN", file=sys.stderr)


if __name__ == "__main__":
    main()
