"""A learner's hands: JupyterLab in a headless browser,
with a dial turned and an exercise solved by typing"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

NBS = Path(__file__).parents[1] / "nbs"
SHOTS = os.environ.get("SHOTS")  # a folder for screenshots, for people who want to look
CHROME = os.environ.get("CHROME") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

if not CHROME:
    pytest.skip(
        "no chromium on this machine; install it with the system's package client to run the"
        " browser tests",
        allow_module_level=True,
    )
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; pip install -e '.[dev]'"
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks, with settings and progress of its own"
    root, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(NBS, root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    own = {f"JUPYTER_{k}_DIR": str(root / k) for k in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{k}_DIR": str(root / k) for k in ("SETTINGS", "WORKSPACES")}
    own |= dict(
        IPYTHONDIR=str(root / "ipython"),
        FOUNDATION_PROGRESS=str(root / "progress.json"),
        FOUNDATION_SHORT="1",
    )
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "FOUNDATION_STATIC")} | own
    news = root / "SETTINGS/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = root / "lab.log"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=test",
        f"--ServerApp.root_dir={root}/nbs",
        "--ServerApp.open_browser=False",
    ]
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=test", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start: {log.read_text()[-2000:]}")
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", root=root)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=CHROME,
            headless=True,
            args=ARGS,
            viewport=dict(width=1400, height=950),
        )
        yield context.new_page()
        context.close()


def open_notebook(page, lab, path):
    page.goto(f"{lab.url}/lab/tree/{path}?token=test&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=90_000)
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle")).wait_for(timeout=120_000)


def run_all(page, lab, path, seconds):
    """Run every cell in a fresh kernel and save; fails on an error,
    or when cells are left after so many seconds"""
    file = lab.root / "nbs" / path
    deadline = time.time() + seconds
    waiting = ["everything"]
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    while waiting:  # cells out of sight are not drawn, so the saved file is asked and not the page
        assert time.time() < deadline, f"{path} was still running after {seconds} s: {waiting[0]}"
        page.wait_for_timeout(1500)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        try:
            saved = json.loads(file.read_text())
        except ValueError:  # just being written
            continue
        cells = [
            c for c in saved["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()
        ]
        errors = [
            f"{o['ename']}: {o['evalue']}"
            for c in cells
            for o in c["outputs"]
            if o["output_type"] == "error"
        ]
        assert not errors, errors
        waiting = ["".join(c["source"]) for c in cells if not c["execution_count"]]


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}.png")


def show(page, locator):
    "Scroll through the notebook until the thing is drawn, and into view"
    scroller = page.locator(".jp-WindowedPanel-outer").first
    scroller.evaluate("e => e.scrollTop = 0")
    for _ in range(200):
        if locator.count():
            locator.first.scroll_into_view_if_needed()
            return locator.first
        scroller.evaluate("e => e.scrollTop += 500")
        page.wait_for_timeout(100)
    raise AssertionError("not found in the notebook")


def code_cell(page, text):
    return show(
        page, page.locator(".jp-CodeCell", has=page.locator(f'.cm-content:has-text("{text}")'))
    )


def execute(page, cell, text=None):
    "Run a cell, typing `text` in place of what it holds"
    cell.locator(".cm-content").click()
    if text is not None:
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(400)


def test_tour_runs_and_its_dial_turns(lab, page):
    open_notebook(page, lab, "00_tour.ipynb")
    run_all(page, lab, "00_tour.ipynb", 300)
    dial = show(page, page.locator(".jp-OutputArea-output .widget-hslider .noUi-handle"))
    picture = (
        page.locator(".jp-OutputArea-output", has=page.locator(".widget-hslider"))
        .locator("img")
        .first
    )
    picture.wait_for(timeout=30_000)
    before = picture.get_attribute("alt")
    shot(page, "tour-before")
    dial.focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(picture).not_to_have_attribute("alt", before, timeout=30_000)
    shot(page, "tour-after")


def test_exercise_is_refused_and_solved(lab, page):
    (lesson,) = NBS.glob("00_core/*_exercises.ipynb")
    path = f"00_core/{lesson.name}"
    open_notebook(page, lab, path)
    run_all(page, lab, path, 180)

    def verdict():
        return code_cell(page, "exercise.check(my_mean)").locator(".jp-OutputArea-output")

    sync_api.expect(verdict()).to_contain_text("Not solved yet")
    wrong = "def my_mean(x, keep):\nreturn (x * keep).mean(-1)"
    right = (
        "def my_mean(x, keep):\nreturn torch.where(keep, x, 0.).sum(-1) / keep.sum(-1).clamp(min=1)"
    )
    for answer, words in (
        (wrong, "each row's mean counts the kept places alone"),
        (right, "Solved."),
    ):
        execute(
            page,
            code_cell(page, "def my_mean(x, keep):"),
            answer.replace("\nreturn", "\n    return"),
        )
        execute(page, code_cell(page, "exercise.check(my_mean)"))
        sync_api.expect(verdict()).to_contain_text(words, timeout=30_000)
        shot(page, f"exercise-{words[:6].strip(' .').lower()}")
