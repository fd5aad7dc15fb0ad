"""Dials without a notebook, and in a browser where there is one"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from foundation.core import widgets
from foundation.core.plots import draw, plot_curves
from foundation.core.widgets import Explorer, explore, make_dial


def line(n):
    return plot_curves(np.arange(5) * n, alt=f"A line of slope {n}.", ylim=(0, 20), size=(4, 2))


@pytest.fixture(autouse=True)
def static(monkeypatch):
    monkeypatch.setenv("FOUNDATION_STATIC", "1")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: explore(line), "one dial|start needs"),
        (lambda: explore(line, n=3), "expected a list of values"),
        (lambda: explore(line, n="abc"), "expected a list of values"),
        (lambda: explore(line, n=[1]), "two or more"),
        (lambda: explore(line, n=(3, 1)), "low < high"),
        (lambda: explore(line, n=(0.0, float("inf"))), "low < high"),
        (lambda: explore(line, n=[1, 2], start={"n": 7}), "cannot start at 7"),
        (lambda: explore(line, m=[1, 2]), "do not fit the function"),
        (lambda: explore(line, n=(1, 60)), "60 = 60 combinations"),
        (lambda: explore(line, n=(1, 20), max_kb=5), "kB, at most 5"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_a_function_may_return():
    import matplotlib.pyplot as plt

    class Table:
        def _repr_html_(self):
            return "<table></table>"

    def figure(n):
        fig, ax = plt.subplots()
        ax.plot([0, n])
        return fig

    assert "&lt;b&gt; 1" in explore(lambda n: f"<b> {n}", n=[1, 2]).shown()
    assert "0.333333" in explore(lambda n: n / 3, n=[1.0, 2.0]).shown()
    assert "<table>" in explore(lambda n: Table(), n=[1, 2]).shown()
    page = explore(figure, n=[1, 2], alt="A line.").page
    assert 'alt="A line. (n = 1)"' in page and not plt.get_fignums()
    with pytest.raises(RuntimeError, match="hand alt="):
        explore(figure, n=[1, 2])
    with pytest.raises(RuntimeError, match="returned None"):
        explore(lambda n: None, n=[1, 2])


def test_error_is_told_and_escaped():
    explorer = Explorer(lambda n: {}["<n>"], [make_dial("n", [1, 2])], "t")
    assert (
        'role="alert"' in explorer.shown()
        and "KeyError" in explorer.shown()
        and "<n>" not in explorer.shown()
    )


def test_page_holds_each_frame_once_and_nothing_leaks_out_of_the_script():
    page = explore(lambda n, loud: f"</script>{n}", n=[1, 2, 3], loud=False).page
    data = json.loads(re.search(r"const data = (\{.*\});", page)[1])
    assert len(data["frames"]) == 3 and data["order"] == [0, 0, 1, 1, 2, 2]
    assert page.count("</script>") == 1 and "http" not in page


def test_pictures_of_different_sizes_share_a_page():
    sizes = [(2, 1.5), (3, 2)]
    explore(lambda i: draw(lambda ax: ax.plot([0, 1]), alt="A line.", size=sizes[i]), i=[0, 1])


def test_same_bytes_in_a_new_process():
    code = (
        "import os; os.environ['FOUNDATION_STATIC'] = '1'\n"
        "from foundation.core.widgets import explore\n"
        "print(explore(lambda n: str(n), n=(1, 5)).page)"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=dict(os.environ, PYTHONHASHSEED=seed),
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "12"
    }
    assert len(runs) == 1


def test_live_panel_moves_and_survives_an_error():
    pytest.importorskip("ipywidgets")
    explorer = Explorer(
        lambda n, up: 1 / n + up, [make_dial("n", (0, 3), 1), make_dial("up", False)], "t"
    )
    _, dial, box, view = explorer.panel.children
    assert "1" in view.value
    dial.value = 0
    assert "ZeroDivisionError" in view.value
    dial.value = 2
    assert "0.5" in view.value
    box.value = True
    assert "1.5" in view.value


def test_not_live_outside_a_front_end(monkeypatch):
    monkeypatch.delenv("FOUNDATION_STATIC")
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert not widgets.live()  # no kernel, whatever the environment says


def spread(spec):
    return make_dial("n", spec).values


@pytest.mark.parametrize(
    "spec",
    [
        (0, 10**6),
        (0, 10**400),
        (0.0, 1e3, 0.001),
        (0.0, 1.0, 1e-300),
        range(10**9),
        itertools.count(),
        dict.fromkeys(range(2000)),
    ],
)
def test_a_dial_is_counted_before_it_is_made(spec):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1,000 values"):
            explore(lambda n: 1, n=spec)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "spec, want",
    [
        ((1, 5), (1, 2, 3, 4, 5)),
        ((np.int64(1), np.int64(5)), (1, 2, 3, 4, 5)),
        ((np.int32(1), 5, np.uint8(2)), (1, 3, 5)),
        ((0, 10, 4), (0, 4, 8)),
        ((torch.tensor(1), torch.tensor(3)), (1, 2, 3)),
        ((np.float32(0), np.float32(1), np.float32(0.5)), (0, 0.5, 1)),
        ((0.0, 1.0, 0.25), (0, 0.25, 0.5, 0.75, 1)),
        ((0.0, 0.8), tuple(i / 10 for i in range(9))),
        ((0.1, 0.3, 0.1), (0.1, 0.2, 0.3)),
    ],
)
def test_a_range_is_a_range_whatever_its_numbers_are_made_of(spec, want):
    assert spread(spec) == want and all(type(v) in (int, float) for v in spread(spec))


@pytest.mark.parametrize(
    "low, high",
    [(1e-12, 1e-11), (0.0, 1e-200), (-1e-300, 1e-300), (1e-5, 9e-5), (1e6, 9e6), (0.5, 0.5000001)],
)
def test_small_ranges_keep_their_values(low, high):
    values = spread((low, high))
    np.testing.assert_allclose(
        values, np.linspace(low, high, 9), rtol=1e-6, atol=(high - low) * 1e-6
    )
    assert len(set(values)) == 9 and len(set(make_dial("n", (low, high)).labels)) == 9


def test_labels_have_the_digits_that_tell_values_apart():
    assert make_dial("n", [1.00001, 1.00002]).labels == ("1.00001", "1.00002")
    assert make_dial("n", [0.1 + 0.2, 0.3]).labels == ("0.30000000000000004", "0.29999999999999999")
    assert make_dial("n", [1 / 3, 0.5]).labels == ("0.3333", "0.5")
    for same in ([1.0, 1.0], [1, 1.0], [float("nan")] * 2):
        with pytest.raises(ValueError, match="all different"):
            make_dial("n", same)


def test_values_may_be_arrays_and_the_start_one_of_them():
    values = {"a": np.arange(3), "b": torch.ones(2), "c": None}
    assert (
        make_dial("n", values, start=torch.ones(2)).start == 1
        and make_dial("n", values, start=np.arange(3)).start == 0
    )
    with pytest.raises(ValueError, match="cannot start at a tensor"):
        make_dial("n", values, start=torch.ones(1))
    assert explore(lambda n: str(n), n=values).shown(0).count("[0 1 2]") == 1


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: explore(3, n=[1, 2]), "fn is 3; expected a function"),
        (lambda: explore(line, n=[1, 2], limit=0), "limit is 0"),
        (lambda: explore(line, n=[1, 2], max_kb=-1), "max_kb is -1"),
        (lambda: make_dial(3, [1, 2]), "name is 3"),
        (lambda: make_dial("n", None), "is None"),
        (
            lambda: widgets.overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)),
            "as many in both",
        ),
        (lambda: widgets.same_size([]), "one or more pictures"),
        (lambda: widgets.same_size([3]), "one or more pictures"),
        (lambda: widgets.debounced(print, -1), "seconds is -1"),
    ],
)
def test_another_kind_of_argument_is_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROME") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


def test_keyboard_in_a_page_without_a_kernel(browser):
    "Two equal dials and a third on one page, each on its own; network never asked"
    same = explore(line, n=[1, 2, 3], title="Lines").page
    words = explore(lambda mode, loud: f"{mode} {loud}", mode=["kl", "js"], loud=True).page
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_content(same + same + words)
    first, second, third = page.locator(".explore").all()
    first.get_by_role("slider", name="n").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert first.get_by_role("slider").get_attribute("aria-valuetext") == "3"
    assert first.locator("img").first.get_attribute("alt") == "A line of slope 3."
    assert second.locator("img").first.get_attribute("alt") == "A line of slope 1."
    under, over = (image.bounding_box() for image in first.locator("img").all())
    assert under == over  # the overlay lies exactly on the picture
    third.get_by_role("combobox", name="mode").select_option("js")
    third.get_by_role("checkbox", name="loud").focus()
    page.keyboard.press("Space")
    assert third.locator(".explore-stage").inner_text() == "js False"
    assert (
        not page.locator(".explore-note").count()
        and not errors
        and not [u for u in asked if not u.startswith("data:")]
    )
    page.close()


def test_first_picture_without_scripts(browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_content(explore(line, n=[1, 2, 3], start={"n": 2}).page)
    assert (
        page.get_by_role("img", name="A line of slope 2.").is_visible()
        and not page.locator("input").count()
    )
    assert page.get_by_text("Run this cell").is_visible()
    context.close()
