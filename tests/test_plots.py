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
from foundation.core.plots import draw, plot_bars, plot_curves, plot_matrix, plot_points, show_images

EACH = {
    "images": lambda rng, alt: show_images(rng.random((8, 1, 28, 28)), alt=alt, titles=range(8), title="t"),
    "curves": lambda rng, alt: plot_curves({"a": rng.random((3, 40)), "b": rng.random(40)}, alt=alt, title="t"),
    "bars": lambda rng, alt: plot_bars({"a": rng.random(3), "b": -.3}, alt=alt, title="t"),
    "matrix": lambda rng, alt: plot_matrix(rng.normal(size=(6, 9)), alt=alt, title="t"),
    "points": lambda rng, alt: plot_points(rng.random((500, 2)), np.arange(500) % 10, alt=alt, title="t"),
}


@pytest.mark.parametrize("name", EACH)
def test_picture(name):
    "Words, small, opaque, and the same bytes each time"
    picture = EACH[name](np.random.default_rng(1), 'A "quoted" <picture>.')
    bundle = picture._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert 'alt="A &quot;quoted&quot; &lt;picture&gt;."' in bundle["text/html"]
    assert "http" not in bundle["text/html"] and len(picture.png) < 30_000
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == picture.pixels.shape[1::-1] and "transparency" not in image.info and image.width < 1100
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture.pixels).mean() < 2
    assert EACH[name](np.random.default_rng(1), "Again.").png == picture.png


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("alt", ["", " \n", None])
def test_no_picture_without_words(name, alt):
    with pytest.raises(ValueError, match="alt is .* say in one sentence"):
        EACH[name](np.random.default_rng(1), alt)


@pytest.mark.parametrize("call, message", [
    (lambda a: plot_curves({}, alt=a), "at least one name"),
    (lambda a: plot_curves({"x": []}, alt=a), "'x' is empty"),
    (lambda a: plot_curves({"x": [1, np.inf]}, alt=a), "1 NaN or infinite"),
    (lambda a: plot_curves({"x": [[1, 2], [3]]}, alt=a), "rows of equal length"),
    (lambda a: plot_curves({"x": np.ones((2, 3, 4))}, alt=a), "expected 1 or 2 dimension"),
    (lambda a: plot_curves({"x": [1, 2, 3]}, x=[1, 2], alt=a), "x has 2 values and the curve 'x' has 3"),
    (lambda a: plot_curves({"x": [1, 2]}, x={"y": [1, 2]}, alt=a), "x has no values for the curve 'x'"),
    (lambda a: plot_curves({"x": np.ones((2, 3))}, interval="iqr", alt=a), 'expected "sd" or "bootstrap"'),
    (lambda a: plot_curves({i: [1, 2] for i in range(8)}, alt=a), "at most 7"),
    (lambda a: plot_bars([1, 2], alt=a), "map a name"),
    (lambda a: plot_bars({"x": float("nan")}, alt=a), "NaN"),
    (lambda a: plot_bars({"x": 1}, intervals=[(0, 2), (0, 2)], alt=a), "2 intervals for 1 bars"),
    (lambda a: plot_bars({"x": 1}, intervals={"x": (2, 3)}, alt=a), "round its 1"),
    (lambda a: plot_matrix([1, 2], alt=a), "expected 2 dimension"),
    (lambda a: plot_matrix(np.empty((0, 3)), alt=a), "empty"),
    (lambda a: plot_matrix(np.eye(2), columns="ab", alt=a), "columns must be 2 labels"),
    (lambda a: plot_matrix([["a"]], alt=a), "must be numbers"),
    (lambda a: plot_points(np.ones((3, 2)), [0, 1], alt=a), r"expected \(3,\)"),
    (lambda a: plot_points(np.ones((3, 2)), [0, 1, 5], names=["a", "b"], alt=a), "there are 2 names"),
    (lambda a: plot_points(np.ones((20, 2)), range(20), alt=a), "at most 12"),
    (lambda a: show_images(np.ones((2, 4, 5, 5)), alt=a), r"\(n, 1, h, w\)"),
    (lambda a: show_images(np.ones((5, 5)), alt=a), "expected 3 or 4"),
    (lambda a: show_images(torch.empty(0, 1, 5, 5), alt=a), "empty"),
    (lambda a: show_images(torch.ones(300, 1, 2, 2), alt=a), "at most 256"),
    (lambda a: show_images(torch.ones(3, 1, 2, 2), titles=["a"], alt=a), "titles must be 3 labels"),
    (lambda a: show_images(torch.ones(3, 1, 2, 2), columns=0, alt=a), "at least one image"),
])
def test_bad_input_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call("A picture.")
    assert "\n" not in str(caught.value)


def test_tensors_of_all_kinds():
    "bfloat16, gradients and booleans are numbers too"
    plot_curves(torch.ones(4, dtype=torch.bfloat16, requires_grad=True) * 2, alt="A line.")
    plot_matrix(torch.eye(3) > 0, alt="A mask.")
    plot_bars({"a": torch.tensor(.5)}, alt="A bar.")
    plot_points(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), names=["a", "b"], alt="Points.")


def test_image_values():
    "Bytes and unit floats are kept, other floats are stretched together"
    def shades(images): return sorted(set(show_images(images, alt="Squares.").pixels.ravel().tolist()))
    assert shades(torch.tensor([0, 100], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)) == [0, 100, 255]
    assert shades(torch.tensor([.0, .4]).view(2, 1, 1, 1).expand(2, 1, 4, 4)) == [0, 102, 255]
    assert shades(torch.tensor([-2., 0., 2.]).view(3, 1, 1, 1).expand(3, 1, 4, 4)) == [0, 128, 255]


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
    picture = draw(lambda axes: [ax.plot([0, 1]) for ax in axes], alt="Two lines.", panels=2, ylim=(0, 2))
    assert picture.save(tmp_path / "two.png").read_bytes() == picture.png
    assert re.search(rf'width="{picture.width}"', picture.html())
