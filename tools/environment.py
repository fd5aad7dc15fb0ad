"""Set up .venv for this project.

It is left alone while nothing has changed, goes on after an interruption, and is made anew when it
is broken, has been moved, or has an unfit Python. Any Python from 2.7 on may run this file: it
looks for a fit one itself.
"""

from __future__ import print_function

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "ready")
BIN = os.path.join(VENV, "bin", "python")
EXTRAS = "lab,dev,docs,deploy,bench"
NEWEST = (3, 13)
SPACE = 8  # GB for all of it; torch alone takes 5.4

UNREACHABLE = re.compile(
    r"Failed to establish a new connection|name resolution|Name or service not known|"
    r"nodename nor servname|Network is unreachable|ConnectTimeout|timed out|ProxyError|"
    r"getaddrinfo failed|Connection refused|Could not fetch URL|Connection reset|"
    r"RemoteDisconnected",
    re.I,
)


class Trouble(Exception):
    "One sentence for the user"


def say(text):
    print(text, file=sys.stderr)
    sys.stderr.flush()


def settings():
    "settings.ini as a dict of strings; configparser has another name in Python 2"
    lines = open(os.path.join(ROOT, "settings.ini"), "rb").read().decode("utf-8").splitlines()
    pairs = [
        line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "[", " "))
    ]
    return dict((key.strip(), value.strip()) for key, value in pairs)


def version(text):
    if not re.match(r"\d+(\.\d+)*$", text):
        raise Trouble("min_python in settings.ini is '%s'; expected a version such as 3.10" % text)
    return tuple(int(n) for n in text.split("."))


def dotted(numbers):
    return ".".join(str(n) for n in numbers)


def ask(python, code):
    "What `python` prints for `code`, or None when it does not run"
    try:
        pipe = subprocess.PIPE
        job = subprocess.Popen([python, "-c", code], stdout=pipe, stderr=pipe, stdin=pipe)
        out = job.communicate()[0]
    except OSError:
        return None
    return out.decode("utf-8", "replace").strip() if job.returncode == 0 else None


def find_python(oldest, newest):
    "The newest fit Python: the one that PYTHON names, or one on the path or from pyenv"
    named = os.environ.get("PYTHON")
    names = ["python3.%d" % minor for minor in range(newest[1], oldest[1] - 1, -1)]
    pyenv = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")), reverse=True)
    seen = []
    for name in [named] if named else names + ["python3", "python"] + pyenv:
        found = ask(name, "import sys; print('%d.%d' % sys.version_info[:2])")
        if found is None:
            continue
        if not oldest <= version(found) <= newest:
            seen.append("%s is %s" % (name, found))
        elif ask(name, "import venv, ensurepip") is None:
            seen.append(
                "%s has no venv module (on Debian: apt-get install python%s-venv)" % (name, found)
            )
        else:
            return name, found
    why = "; ".join(seen) or (named + " does not run" if named else "none was found")
    raise Trouble(
        "Python %s to %s is needed, but %s. Install one, or name it: make PYTHON=/path/to/python%s"
        % (dotted(oldest), dotted(newest), why, dotted(newest))
    )


def wanted(config):
    "All that the environment is made from: when it changes, so does this"
    parts = [VENV, EXTRAS] + [
        key + "=" + config[key]
        for key in sorted(config)
        if key.endswith("requirements") or key in ("min_python", "console_scripts", "lib_name")
    ]
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()


def free_gb(path):
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize / 1e9


def check_space(need):
    if free_gb(ROOT) < need:
        raise Trouble(
            "The environment needs about %d GB, but only %.1f GB are free in %s: make room and run"
            " make again" % (need, free_gb(ROOT), ROOT)
        )


def alive(oldest, newest):
    "Does .venv hold a fit Python that runs, and do its commands still lie where they were made?"
    found = ask(BIN, "import sys; print('%d.%d' % sys.version_info[:2])")
    if found is None or not oldest <= version(found) <= newest:
        return False
    try:
        home = re.search(
            r"(/[^'\"\n]*)/bin/python", open(os.path.join(VENV, "bin", "pip")).read(1000)
        )
    except IOError:
        return False
    return bool(home) and os.path.realpath(home.group(1)) == os.path.realpath(VENV)


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def site_packages():
    return glob.glob(os.path.join(VENV, "lib", "python3*", "site-packages"))


def forget_unfinished():
    """pip writes INSTALLER last: a package without it was cut short,
    so pip shall install it once more"""
    for place in site_packages():
        for info in glob.glob(os.path.join(place, "*.dist-info")):
            if not os.path.exists(os.path.join(info, "INSTALLER")):
                shutil.rmtree(info)
        for rest in glob.glob(os.path.join(place, "~*")):
            remove(rest)


def pip(*args):
    "Run pip, pass on what it says, and put its commonest troubles into one sentence"
    command = [BIN, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"] + list(
        args
    )
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    said = []
    for line in iter(job.stderr.readline, b""):
        said.append(line.decode("utf-8", "replace"))
        say(said[-1].rstrip())
    if job.wait() == 0:
        return
    text = "".join(said)
    if "No space left" in text:
        raise Trouble(
            "The disk is full: make room (%d GB, and 3 GB for temporary files) and run make again"
            % SPACE
        )
    if UNREACHABLE.search(text):
        raise Trouble(
            "pip cannot reach its package registry: check the network or the proxy and run make"
            " again; what is there is kept"
        )
    raise Trouble(
        "pip could not install the requirements of settings.ini; its own words stand above"
    )


def set_up():
    config = settings()
    oldest = version(config["min_python"])
    want = wanted(config)
    sound = alive(oldest, NEWEST)
    if sound and os.path.exists(STAMP) and open(STAMP).read() == want:
        return
    if not sound:
        python, number = find_python(oldest, NEWEST)
        if os.path.lexists(VENV):
            say("The environment in .venv is broken or has been moved: making it anew")
            remove(VENV)
        check_space(SPACE)
        say(
            "Making .venv with Python %s; this takes some minutes and %d GB, once" % (number, SPACE)
        )
        if subprocess.call([python, "-m", "venv", VENV]) != 0:
            raise Trouble("%s -m venv failed; its own words stand above" % python)
    elif not any(
        glob.glob(os.path.join(place, "torch", "__init__.py")) for place in site_packages()
    ):
        check_space(SPACE)
    if os.path.exists(STAMP):
        os.remove(STAMP)
    forget_unfinished()
    pip("setuptools>=77", "wheel")
    pip("--no-build-isolation", "-e", ".[%s]" % EXTRAS)
    with open(STAMP + ".tmp", "w") as f:
        f.write(want)
    os.rename(STAMP + ".tmp", STAMP)
    say("The environment is ready")


if __name__ == "__main__":
    try:
        set_up()
    except Trouble as trouble:
        say("\n" + str(trouble))
        sys.exit(1)
    except KeyboardInterrupt:
        say("\nInterrupted: the next make goes on from here")
        sys.exit(130)
    except (IOError, OSError) as error:
        say("\nThe environment cannot be set up: %s" % error)
        sys.exit(1)
