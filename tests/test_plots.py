"""Pictures: what a notebook cannot say about them"""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.core import plots
from foundation.core.plots import (
    draw,
    plot_bars,
    plot_curves,
    plot_matrix,
    plot_points,
    show_images,
)

from foundation.evaluation.intervals import t_interval

EACH = {
    "images": lambda rng, alt: show_images(
        rng.random((8, 1, 28, 28)), alt=alt, titles=range(8), title="t"
    ),
    "curves": lambda rng, alt: plot_curves(
        {"a": rng.random((3, 40)), "b": rng.random(40)}, alt=alt, title="t"
    ),
    "bars": lambda rng, alt: plot_bars({"a": rng.random(3), "b": -0.3}, alt=alt, title="t"),
    "matrix": lambda rng, alt: plot_matrix(rng.normal(size=(6, 9)), alt=alt, title="t"),
    "points": lambda rng, alt: plot_points(
        rng.random((500, 2)), np.arange(500) % 10, alt=alt, title="t"
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_picture(name):
    "Words, small, opaque, and the same bytes each time"
    picture = EACH[name](np.random.default_rng(1), 'A "quoted" <picture>.')
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert 'alt="A &quot;quoted&quot; &lt;picture&gt;."' in bundle["text/html"]
    assert "http" not in bundle["text/html"] and len(picture.png) < 40_000
    image = Image.open(io.BytesIO(picture.png))
    assert (
        image.size == picture.pixels.shape[1::-1]
        and "transparency" not in image.info
        and image.width < 1100
    )
    off = np.abs(np.asarray(image.convert("RGB")).astype(int) - picture.pixels).max(2)
    assert off.mean() < 2
    _, which, counts = np.unique(
        picture.pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    shift = np.bincount(which.ravel(), off.ravel()) / counts
    assert shift[counts > 30].max() < 24  # two classes never become one colour
    assert EACH[name](np.random.default_rng(1), "Again.").png == picture.png


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("alt", ["", " \n", None])
def test_no_picture_without_words(name, alt):
    with pytest.raises(
        (TypeError, ValueError),
        match="alt is .* say in one sentence|alt is None; expected a string",
    ):
        EACH[name](np.random.default_rng(1), alt)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: plot_curves({}, alt=a), "at least one name"),
        (lambda a: plot_curves({"x": []}, alt=a), "'x' is empty"),
        (lambda a: plot_curves({"x": [1, np.inf]}, alt=a), "1 NaN or infinite"),
        (lambda a: plot_curves({"x": [[1, 2], [3]]}, alt=a), "rows of equal length"),
        (lambda a: plot_curves({"x": np.ones((2, 3, 4))}, alt=a), "expected 1 or 2 dimension"),
        (
            lambda a: plot_curves({"x": [1, 2, 3]}, x=[1, 2], alt=a),
            "x has 2 values and the curve 'x' has 3",
        ),
        (
            lambda a: plot_curves({"x": [1, 2]}, x={"y": [1, 2]}, alt=a),
            "x has no values for the curve 'x'",
        ),
        (
            lambda a: plot_curves({"x": np.ones((2, 3))}, interval="iqr", alt=a),
            "interval is 'iqr'; expected one of 't', 'sd', 'bootstrap'",
        ),
        (lambda a: plot_curves({i: [1, 2] for i in range(8)}, alt=a), "at most 7"),
        (lambda a: plot_bars([1, 2], alt=a), "map a name"),
        (lambda a: plot_bars({"x": float("nan")}, alt=a), "NaN"),
        (
            lambda a: plot_bars({"x": 1}, intervals=[(0, 2), (0, 2)], alt=a),
            "2 intervals for 1 bars",
        ),
        (lambda a: plot_bars({"x": 1}, intervals={"x": (2, 3)}, alt=a), "round its 1"),
        (lambda a: plot_matrix([1, 2], alt=a), "expected 2 dimension"),
        (lambda a: plot_matrix(np.empty((0, 3)), alt=a), "empty"),
        (lambda a: plot_matrix(np.eye(2), columns="ab", alt=a), "columns must be 2 labels"),
        (lambda a: plot_matrix([["a"]], alt=a), "must be numbers"),
        (lambda a: plot_points(np.ones((3, 2)), [0, 1], alt=a), r"expected \(3,\)"),
        (
            lambda a: plot_points(np.ones((3, 2)), [0, 1, 5], names=["a", "b"], alt=a),
            "there are 2 names",
        ),
        (lambda a: plot_points(np.ones((20, 2)), range(20), alt=a), "at most 12"),
        (lambda a: show_images(np.ones((2, 4, 5, 5)), alt=a), r"\(n, 1, h, w\)"),
        (lambda a: show_images(np.ones((5, 5)), alt=a), "expected 3 or 4"),
        (lambda a: show_images(torch.empty(0, 1, 5, 5), alt=a), "empty"),
        (lambda a: show_images(torch.ones(300, 1, 2, 2), alt=a), "at most 256"),
        (
            lambda a: show_images(torch.ones(3, 1, 2, 2), titles=["a"], alt=a),
            "titles must be 3 labels",
        ),
        (
            lambda a: show_images(torch.ones(3, 1, 2, 2), columns=0, alt=a),
            "columns is 0; expected a whole number from 1",
        ),
    ],
)
def test_bad_input_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call("A picture.")
    assert "\n" not in str(caught.value)


def test_tensors_of_all_kinds():
    "bfloat16, gradients and booleans are numbers too"
    plot_curves(torch.ones(4, dtype=torch.bfloat16, requires_grad=True) * 2, alt="A line.")
    plot_matrix(torch.eye(3) > 0, alt="A mask.")
    plot_bars({"a": torch.tensor(0.5)}, alt="A bar.")
    plot_points(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), names=["a", "b"], alt="Points.")


def test_image_values():
    "Bytes and unit floats are kept, other floats are stretched together"

    def shades(images):
        return sorted(set(show_images(images, alt="Squares.").pixels.ravel().tolist()))

    assert shades(
        torch.tensor([0, 100], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    ) == [0, 100, 255]
    assert shades(torch.tensor([0.0, 0.4]).view(2, 1, 1, 1).expand(2, 1, 4, 4)) == [0, 102, 255]
    assert shades(torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)) == [
        0,
        128,
        255,
    ]


def test_nothing_stays_open():
    "Neither pyplot nor matplotlib's settings are touched; the module itself loads neither"
    code = """
import sys
import foundation.core.plots as plots
assert "matplotlib" not in sys.modules and "IPython" not in sys.modules
import matplotlib
def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
before = settings()
plots.plot_curves([1, 2], alt="A line.")
assert settings() == before and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draw_panels_and_save(tmp_path):
    picture = draw(
        lambda axes: [ax.plot([0, 1]) for ax in axes], alt="Two lines.", panels=2, ylim=(0, 2)
    )
    assert picture.save(tmp_path / "two.png").read_bytes() == picture.png
    assert re.search(rf'width="{picture.width}"', picture.html())


# Names that somebody wrote ------------------------------------------------------------------------

ODD = [
    "$$",
    "$^$",
    "$\\foo$",
    "costs $5 and $6",
    "$",
    "\\$",
    "_hidden",
    "",
    "a\nb",
    "x" * 5000,
    "\udcff",
    "%s {} {0}",
    "<b>",
    "`",
]
NAMED = {
    "curves": lambda name: plot_curves({name: [1, 2], "b": [2, 1]}, alt="a"),
    "bars": lambda name: plot_bars({name: 1, "b": [1, 2]}, alt="a"),
    "rows": lambda name: plot_matrix(np.eye(2), rows=[name, "b"], columns=["b", name], alt="a"),
    "points": lambda name: plot_points(np.eye(2), [0, 1], names=[name, "b"], alt="a"),
    "labels of points": lambda name: plot_points(np.eye(2), [name, "b"], alt="a"),
    "images": lambda name: show_images(np.ones((2, 4, 4)), titles=[name, "b"], alt="a"),
    "title": lambda name: plot_curves([1, 2], title=name, xlabel=name, ylabel=name, alt="a"),
    "title of images": lambda name: show_images(np.ones((2, 4, 4)), title=name, alt="a"),
    "a form": lambda name: plot_bars(
        {"a": 1}, form=name.replace("{", "{{").replace("}", "}}") + "{:.2f}$", alt="a"
    ),
}


@pytest.mark.parametrize("place", NAMED)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_name_breaks_a_picture(place):
    for name in ODD:
        assert max(NAMED[place](name).pixels.shape) < 15_000


def shown(monkeypatch, make):
    "The texts of a picture as matplotlib draws them, and whether it took them for a formula"
    from matplotlib.text import Text

    seen, really = [], Text._preprocess_math
    monkeypatch.setattr(
        Text, "_preprocess_math", lambda self, s: seen.append(really(self, s)) or seen[-1]
    )
    make()
    return seen


@pytest.mark.parametrize("place", [p for p in NAMED if p != "a form"])
@pytest.mark.parametrize("name", ["costs $5 and $6", "$$", "$^$", "_hidden", "a$b"])
def test_dollars_are_dollars(monkeypatch, place, name):
    texts = shown(monkeypatch, lambda: NAMED[place](name))
    assert any(text == name and not formula for text, formula in texts) and not any(
        formula for text, formula in texts if "$" in text
    )


def test_powers_of_ten_are_still_set_as_such(monkeypatch):
    texts = shown(monkeypatch, lambda: plot_curves([1, 10, 1e5], yscale="log", alt="a"))
    assert any(formula and "10" in str(text) for text, formula in texts)


def test_two_names_that_read_alike_are_refused():
    for call in (
        lambda: plot_bars({1: 2, "1": 3}, alt="a"),
        lambda: plot_curves({1: [1, 2], "1": [2, 3]}, alt="a"),
    ):
        with pytest.raises(ValueError, match="two names read alike"):
            call()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: plot_curves([1 + 2j, 3], alt="a"), "must be numbers"),
        (lambda: plot_curves(torch.ones(2, dtype=torch.complex64), alt="a"), "must be numbers"),
        (lambda: plot_curves(["1", "2"], alt="a"), "must be numbers"),
        (lambda: plot_curves(np.array(["1", "2"]), alt="a"), "must be numbers"),
        (lambda: plot_curves([10**400], alt="a"), "must be numbers|NaN or infinite"),
        (lambda: plot_curves([1, 2], alt="a", colour=3), "the axes refuse"),
        (lambda: plot_curves([1, 2], alt="a", size=(0, 1)), "a side in size is 0"),
        (lambda: plot_curves([1, 2], alt="a", size=(1e6, 1)), "a side in size"),
        (lambda: plot_bars({"a": 1}, form="{:d}", alt="a"), "form is '{:d}'"),
        (lambda: plot_bars({"a": 1}, form="{x}", alt="a"), "form is '{x}'"),
        (lambda: plot_bars({"a": 1}, interval="iqr", alt="a"), "interval is 'iqr'"),
        (lambda: plot_bars({"a": 1}, intervals=3, alt="a"), "0 intervals for 1"),
        (lambda: plot_matrix(np.ones((100, 100)), form="{}", alt="a"), "too many to write"),
        (lambda: plot_matrix(np.eye(2), limits=(1, 1), alt="a"), "low < high"),
        (lambda: plot_matrix(np.eye(2), rows=iter("abc"), alt="a"), "2 labels"),
        (lambda: plot_points(np.eye(2), [0.5, np.nan], alt="a"), "NaN"),
        (lambda: plot_points(np.eye(2), limit=0, alt="a"), "limit is 0"),
        (lambda: plot_points(np.eye(2), [[0], [1, 2]], alt="a"), "labels must be"),
        (lambda: show_images(3, alt="a"), "expected 3 or 4 dimension"),
        (lambda: show_images(torch.tensor(3.0), alt="a"), "expected 3 or 4"),
        (lambda: plots.band([1, 2]), "expected 2 dimension"),
        (lambda: plots.band([[1, 2]]), "two seeds or more"),
        (lambda: plots.encode_png(np.zeros((2, 2, 3))), "expected an array"),
        (lambda: plots.encode_png(np.zeros((2, 2, 3), np.uint8), colours=300), "colours is 300"),
        (lambda: plots.Picture(np.zeros((2, 2), np.uint8), "a"), "expected an array"),
        (lambda: draw(None, alt="a"), "paint is None"),
        (lambda: draw(print, alt="a", panels=0), "panels is 0"),
    ],
)
def test_another_kind_of_argument_is_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_cloud_shows_the_same_points_whatever_its_labels_are_made_of():
    points = np.random.default_rng(0).random((30, 2))
    labels = [
        np.arange(30) % 3,
        (np.arange(30) % 3).astype(np.uint8),
        torch.arange(30) % 3,
        (np.arange(30) % 3).tolist(),
    ]
    assert len({plot_points(points, given, alt="a").png for given in labels}) == 1
    assert (
        plot_points(points, labels[0], names=np.array(["a", "b", "c"]), alt="a").png
        == plot_points(points, [*"abc"] * 10, alt="a").png
    )


def test_the_band_is_the_interval_it_says_it_is():
    values = np.array([[1.0, 5], [2, 5], [6, 5]])
    low, high = plots.band(values, "sd")
    np.testing.assert_allclose([low, high], [[3 - 7**0.5, 5], [3 + 7**0.5, 5]])
    low, high = plots.band(values)
    for column, edges in zip(values.T, zip(low, high)):
        np.testing.assert_allclose(edges, t_interval(column.tolist()), rtol=1e-6)
    draws = np.random.default_rng(1).normal(size=(400, 1))
    low, high = plots.band(draws, "bootstrap")
    assert low[0] < draws.mean() < high[0] and abs((high - low)[0] - 2 * 1.96 / 20) < 0.03


def test_each_point_is_drawn_once_in_the_colour_of_its_class(monkeypatch):
    from matplotlib.axes import Axes

    drawn, really = [], Axes.scatter
    monkeypatch.setattr(
        Axes,
        "scatter",
        lambda self, x, y, **look: (
            drawn.append((sorted(x), look["color"])) or really(self, x, y, **look)
        ),
    )
    points = np.stack([np.arange(6.0), np.zeros(6)], 1)
    plot_points(points, [1, 0, 2, 1, 0, 1], alt="a")
    assert [x for x, _ in drawn] == [[1, 4], [0, 3, 5], [2]] and len(
        {colour for _, colour in drawn}
    ) == 3


@pytest.mark.parametrize("pixels", [None, [[1]], np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8)])
def test_pixels_of_another_kind_are_refused(pixels):
    with pytest.raises(ValueError, match="^pixels is .*; expected an array"):
        plots.Picture(pixels, "A square.")
