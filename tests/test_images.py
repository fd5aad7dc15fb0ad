"Balanced draws, splits that do not leak, augmentation against torchvision, and what both refuse."

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from foundation.data.augment import Augment, PerImage, _blur, _saturate, _turn_hue, sample_boxes
from foundation.data import own
from foundation.data.batches import endless
from foundation.data.images import (
    ImageDataset,
    ImageSet,
    check_set,
    duplicates,
    load_images,
    read_idx,
    split,
    standard_of,
    to_float,
)
from foundation.data.tasks import few_labels
from foundation.data.own import image_set
from foundation.data.sources import DataUnavailable
from foundation.data.tasks import image_task

IMAGES = torch.randint(
    256, (6, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


# Draws and splits ----------------------------------------


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_few_labels_are_as_balanced_as_can_be(sizes, share, seed):
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    count = len(sizes) + int(share * (len(labels) - len(sizes)))
    drawn = few_labels(labels, count, seed)
    per_class = torch.bincount(labels[drawn], minlength=len(sizes)).tolist()
    assert len(drawn.unique()) == count == sum(per_class)
    poorest = min(n for n, size in zip(per_class, sizes) if n < size) if count < len(labels) else 0
    assert all(n <= poorest + 1 for n in per_class) or count == len(
        labels
    )  # a class is behind only when it has no more
    assert torch.equal(few_labels(labels, len(sizes), seed), drawn[: len(sizes)])


@given(count=st.integers(10, 200), first=st.floats(0.15, 0.85), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition(count, first, seed):
    parts = split(count, (first, 1 - first), seed)
    assert (
        torch.equal(torch.cat(parts).sort().values, torch.arange(count))
        and abs(len(parts[0]) - first * count) <= 1
    )


@given(groups=st.lists(st.integers(-3, 12), min_size=20, max_size=80), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_split_by_groups_tears_none(groups, seed):
    groups = torch.tensor([*groups, -1, 0, 5, 7])  # four groups at least
    parts = split(len(groups), (0.5, 0.5), seed, groups)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(groups)))
    assert not set(groups[parts[0]].tolist()) & set(groups[parts[1]].tolist())


def test_draws_are_what_saved_results_depend_on():
    "These numbers must never change"
    labels = torch.arange(40) % 4
    assert (
        few_labels(labels, 6, seed=1).tolist() == FEW
        and split(8, (0.5, 0.5), seed=1)[0].tolist() == SPLIT
    )


FEW, SPLIT = [36, 5, 18, 11, 12, 17], [5, 4, 2, 6]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_numbers_of_numpy_draw_as_plain_ones(kind):
    labels = torch.arange(40) % 4
    assert (
        few_labels(labels, kind(6), seed=kind(1)).tolist() == FEW
        and split(kind(8), (np.float32(0.5), np.array(0.5)), seed=kind(1))[0].tolist() == SPLIT
    )


@pytest.mark.parametrize(
    "make",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        *(lambda t, d=d: t.to(d) for d in (torch.uint8, torch.int8, torch.int32)),
    ],
)
def test_labels_of_every_whole_kind(make):
    labels = torch.arange(40) % 4
    assert few_labels(make(labels), 6, seed=1).tolist() == FEW
    images, made = check_set(IMAGES.numpy(), make(torch.arange(6)), np.int64(6))
    assert torch.equal(images, IMAGES) and made.dtype == torch.int64
    whole = ImageSet(
        IMAGES.numpy(),
        make(torch.arange(6)),
        IMAGES,
        torch.arange(6),
        list("abcdef"),
        "x",
        "y",
        np.float32(0.5),
        0.25,
    )
    assert (
        whole.train_labels.dtype == torch.int64
        and isinstance(whole.train_images, torch.Tensor)
        and whole.classes == tuple("abcdef")
    )
    assert type(whole.mean) is float and torch.allclose(
        whole.floats(IMAGES), (IMAGES / 255 - 0.5) / 0.25, atol=1e-6
    )
    batch = next(
        iter(torch.utils.data.DataLoader(ImageDataset(IMAGES, make(torch.arange(6))), batch_size=6))
    )
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [0, 1, 2, 3, 4, 5]


def test_groups_of_every_whole_kind():
    groups = torch.arange(40) // 5
    want = split(40, groups=groups)
    for made in (groups.numpy(), groups.to(torch.uint8), groups.int()):
        assert all(map(torch.equal, split(40, groups=made), want))


def test_bytes_become_standard_floats():
    "Against the formula in float64, up to rounding"
    for mean, std in ((0.0, 1.0), (0.286, 0.353), (0.5, 1e-3)):
        torch.testing.assert_close(
            to_float(IMAGES, mean, std).double(),
            (IMAGES.double() / 255 - mean) / std,
            atol=2e-7 / std,
            rtol=1e-6,
        )
    assert torch.equal(to_float(IMAGES.numpy(), np.float64(0.5)), to_float(IMAGES, 0.5))


# Augmentation ----------------------------------------


@given(
    seed=st.integers(0, 99),
    low=st.floats(0.05, 1),
    aspect=st.floats(1, 3),
    channels=st.integers(1, 3),
    erase=st.sampled_from([0, 0.5, 1]),
)
@settings(max_examples=30, deadline=None)
def test_views_are_finite_in_range_and_repeatable(seed, low, aspect, channels, erase):
    augment = Augment(area=(low, 1), aspect=aspect, erase=erase)
    images = torch.rand(5, channels, 12, 10, generator=torch.Generator().manual_seed(seed))
    a, b = (augment(images, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == images.shape and 0 <= a.min() and a.max() <= 1
    bytes_ = (images * 255).byte()
    torch.testing.assert_close(
        augment(bytes_, torch.Generator().manual_seed(seed)),
        augment(bytes_ / 255, torch.Generator().manual_seed(seed)),
    )
    standard = Augment(area=(low, 1), aspect=aspect, erase=erase, mean=0.3, std=0.4)(
        images, torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(standard, (a - 0.3) / 0.4)


@given(
    top=st.integers(0, 8),
    left=st.integers(0, 8),
    height=st.integers(4, 12),
    width=st.integers(4, 12),
    shape=st.sampled_from([(16, 16), (20, 14), (13, 24)]),
)
@settings(max_examples=60, deadline=None)
def test_a_crop_is_torchvisions(top, left, height, width, shape):
    "Up to the picture's rim, where both repeat its last pixel; elsewhere ours looks on into it"
    h, w = shape
    height, width = min(height, h - top), min(width, w - left)
    image = torch.rand(1, 2, h, w, generator=torch.Generator().manual_seed(top))
    centers = torch.tensor([[(2 * left + width) / w - 1, (2 * top + height) / h - 1]])
    ours = sample_boxes(image, centers, torch.tensor([[width / w, height / h]]), size=20)
    theirs = V.resized_crop(image, top, left, height, width, [20, 20], antialias=False)

    def edge(length):
        return -(-20 // (2 * length)) + 1

    rows = slice(0 if top == 0 else edge(height), 20 if top + height == h else -edge(height))
    columns = slice(0 if left == 0 else edge(width), 20 if left + width == w else -edge(width))
    torch.testing.assert_close(
        ours[..., rows, columns], theirs[..., rows, columns], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 17), (1, 1, 8), (2, 8, 1), (1, 1, 1)])
def test_a_white_picture_stays_white(shape):
    "No black frame around a crop that touches the rim"
    crops = Augment(area=(0.05, 1), aspect=2, contrast=0, brightness=0)
    assert crops(torch.ones(300, *shape), torch.Generator().manual_seed(0)).min() > 1 - 1e-6
    beyond = sample_boxes(
        torch.ones(4, *shape),
        torch.tensor([[1.5, -3.0]]).expand(4, 2),
        torch.full((4, 2), 2.0),
        size=5,
    )
    assert beyond.min() > 1 - 1e-6


def boxes_of(augment, count=2000, shape=(12, 18), seed=0):
    "Centers, halves and mirrors that `augment` draws, from pictures whose pixels say their place"
    h, w = shape

    def place(n):
        return (torch.arange(n) + 0.5) / n

    ramps = torch.stack([place(w).expand(h, w), place(h)[:, None].expand(h, w)])[None].expand(
        count, 2, h, w
    )
    x, y = augment(ramps, torch.Generator().manual_seed(seed)).unbind(1)
    x, y = (
        2 * x[:, h // 2] - 1,
        2 * y[:, :, w // 2] - 1,
    )  # from -1 to 1: along a row, along a column

    def middle(v):
        return v[:, len(v[0]) // 2 - 1 : len(v[0]) // 2 + 1]

    def step(v):
        return (middle(v)[:, 1] - middle(v)[:, 0]) * v.shape[1] / 2

    return (
        torch.stack([middle(x).mean(1), middle(y).mean(1)], 1),
        torch.stack([step(x).abs(), step(y).abs()], 1),
        step(x) < 0,
    )


def test_each_picture_draws_its_own_box_mirror_light_and_contrast():
    "All choices differ within one batch, spread as they should, and none of them tells another"
    low = 0.3
    centers, halves, mirror = boxes_of(Augment(area=(low, 1), contrast=0, brightness=0))
    area, ratio = halves.prod(1), (halves[:, 0] / halves[:, 1]).log()
    assert len(area.unique()) > 1900 and low - 1e-3 < area.min() < low + 0.02 and area.max() > 0.97
    assert (
        abs(area.mean() - 0.63) < 0.03
        and abs(ratio.mean()) < 0.02
        and 0.25 < ratio.abs().max() < 0.29
    )
    assert (
        (centers.abs() <= 1 - halves + 1e-3).all()
        and abs(centers.mean()) < 0.02
        and 0.47 < mirror.float().mean() < 0.53
    )
    room = centers / (1 - halves).clamp(min=0.02)
    inner = (halves < 0.95).all(1)
    assert (room[inner].std(0) - 3**-0.5).abs().max() < 0.03
    grey = 0.25 + torch.linspace(0, 0.2, 16).view(1, 1, 4, 4).expand(2000, 1, 4, 4)
    seen = Augment(area=(1, 1), aspect=1, flip=0)(grey, torch.Generator().manual_seed(0))
    light, gain = (
        seen.mean((1, 2, 3)) / grey.mean((1, 2, 3)),
        seen.std((1, 2, 3)) / grey.std((1, 2, 3)),
    )
    gain = gain / light
    for factor in (light, gain):
        assert (
            len(factor.unique()) > 1900
            and factor.min() < 0.61
            and factor.max() > 1.39
            and abs(factor.mean() - 1) < 0.02
        )
    choices = torch.stack([area, ratio, *room.clamp(-1, 1).T, mirror.float(), light, gain])
    assert (choices[:, inner].corrcoef() - torch.eye(7)).abs().max() < 0.1


def test_erased_boxes_are_each_pictures_own_and_as_rare_as_asked_for():
    still = dict(area=(1, 1), aspect=1, flip=0, contrast=0, brightness=0)
    seen = (
        Augment(**still, erase=0.3)(
            torch.ones(2000, 2, 16, 12), torch.Generator().manual_seed(0)
        ).round()
        == 0
    )
    hit = seen.flatten(1).any(1)
    assert 0.26 < hit.float().mean() < 0.34 and torch.equal(seen[:, 0], seen[:, 1])
    places = seen[hit, 0]
    assert len(places.flatten(1).unique(dim=0)) > 300 and places.any(0).all()
    heights, widths = places.any(2).sum(1), places.any(1).sum(1)
    assert heights.min() >= 3 and heights.max() <= 9 and widths.min() >= 2 and widths.max() <= 7
    assert torch.equal(places.sum((1, 2)), heights * widths)  # boxes


@given(low=st.floats(0.05, 1), aspect=st.floats(1, 4))
@settings(max_examples=15, deadline=None)
def test_no_crop_keeps_less_than_was_asked_for(low, aspect):
    "Also where a wide crop is cut off at the rim"
    _, halves, _ = boxes_of(
        Augment(area=(low, 1), aspect=aspect, contrast=0, brightness=0), count=100, shape=(50, 60)
    )
    assert halves.prod(1).min() > low - 0.01 and halves.max() < 1.01


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_are_as_exact_in_half_precision_as_its_pixels_allow(kind):
    "Places are reckoned in float32: 300 pixels from the middle bfloat16 knows no single one"
    picture = torch.rand(1, 1, 8, 600, generator=torch.Generator().manual_seed(0)).to(kind)
    box = torch.tensor([[0.9, 0.0]]), torch.tensor([[0.1, 1.0]])
    seen = sample_boxes(picture, *box)
    assert seen.dtype == kind
    torch.testing.assert_close(
        seen.double(), sample_boxes(picture.float(), *box).double(), atol=5e-3, rtol=0
    )
    view = Augment()(picture, torch.Generator().manual_seed(0))
    wanted = Augment()(picture.float(), torch.Generator().manual_seed(0))
    assert view.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    torch.testing.assert_close(view.float(), wanted, atol=1e-4, rtol=0)


def test_arrays_and_numbers_of_numpy_give_the_same_views():
    plain = Augment(area=(0.5, 1), flip=0.25, mean=0.5, std=0.25)
    numpy = Augment(
        area=np.array([0.5, 1]).tolist(),
        flip=np.float32(0.25),
        mean=np.array(0.5),
        std=torch.tensor(0.25),
    )
    assert numpy == plain and repr(numpy) == repr(plain) and numpy.area == (0.5, 1.0)
    for images in (IMAGES, IMAGES / 255):
        assert torch.equal(
            *(plain(x, torch.Generator().manual_seed(1)) for x in (images, images.numpy()))
        )
    box = torch.zeros(6, 2), torch.ones(6, 2)
    assert torch.equal(
        sample_boxes(IMAGES / 255, *box, size=np.int64(4)),
        sample_boxes((IMAGES / 255).numpy(), *(t.numpy() for t in box), size=4),
    )


def test_gradients_flow_to_pictures_and_boxes():
    images, centers, halves = (
        t.requires_grad_()
        for t in (torch.rand(2, 1, 6, 6), torch.zeros(2, 2), torch.full((2, 2), 0.5))
    )
    sample_boxes(images, centers, halves).square().sum().backward()
    assert all(
        t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in (images, centers, halves)
    )
    assert not Augment()(images.detach().clamp(0, 1).requires_grad_()).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_are_made_where_the_pictures_are():
    generator = torch.Generator("cuda").manual_seed(0)
    views = Augment(erase=0.5)(IMAGES.cuda(), generator)
    assert views.is_cuda and torch.equal(
        views, Augment(erase=0.5)(IMAGES.cuda(), generator.manual_seed(0))
    )
    with pytest.raises(ValueError, match="the generator is on cpu, the images are on cuda"):
        Augment()(IMAGES.cuda(), torch.Generator())
    labels = torch.arange(40) % 4
    assert (
        torch.equal(few_labels(labels.cuda(), 6, 1), few_labels(labels, 6, 1))
        and len(duplicates(IMAGES.cuda(), IMAGES)) == 6
    )
    assert torch.equal(split(40, groups=labels.cuda())[0], split(40, groups=labels)[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(area=(0, 1)),
        dict(area=(0.5, 0.4)),
        dict(area=(0.5, 1.1)),
        dict(area=(float("nan"), 1)),
        dict(aspect=0.5),
        dict(aspect=float("nan")),
        dict(flip=-0.1),
        dict(flip=float("nan")),
        dict(erase=2),
        dict(contrast=-1),
        dict(brightness=1.5),
        dict(std=0),
        dict(std=float("nan")),
        dict(mean=float("inf")),
    ],
)
def test_ranges_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Augment(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(area=0.5),
        dict(area=(0.5,)),
        dict(area="ab"),
        dict(area=("a", 1)),
        dict(area=None),
        dict(flip="x"),
        dict(flip=None),
        dict(aspect=True),
        dict(std=["x"]),
        dict(mean=1j),
    ],
)
def test_ranges_of_another_kind_are_refused(options):
    with pytest.raises(TypeError, match="expected"):
        Augment(**options)


@pytest.mark.parametrize(
    "images, error, words",
    [
        (IMAGES[0], ValueError, r"shape \(1, 9, 9\); expected \(b, c, h, w\)"),
        (IMAGES[:0], ValueError, "images is empty"),
        (IMAGES.long(), TypeError, "images is a tensor of int64"),
        (IMAGES.bool(), TypeError, "tensor of bool"),
        (IMAGES.tolist(), TypeError, "images is a list"),
        (IMAGES[..., None], ValueError, r"expected \(b, c, h, w\)"),
        (IMAGES / 255 + 1j, TypeError, "complex"),
        (None, TypeError, "images is None"),
        (torch.full((1, 1, 2, 2), torch.inf), ValueError, "images run from inf"),
        (
            IMAGES.float(),
            ValueError,
            "run from .* expected floats from 0 to 1: augment first, standardise last",
        ),
        (IMAGES / 255 - 0.1, ValueError, "expected floats from 0 to 1"),
        (torch.full((1, 1, 4, 4), float("nan")), ValueError, "images run from nan"),
    ],
)
def test_images_that_cannot_be_augmented_are_refused(images, error, words):
    with pytest.raises(error, match=words):
        Augment()(images)


def test_a_generator_elsewhere_is_refused():
    with pytest.raises(TypeError, match="generator is 7; expected a Generator or None"):
        Augment()(IMAGES, 7)
    with pytest.raises(ValueError, match="the generator is on cpu, the images are on meta"):
        Augment()(torch.empty(1, 1, 4, 4, dtype=torch.uint8, device="meta"), torch.Generator())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(centers=torch.zeros(5, 2)), r"centers has shape \(5, 2\)"),
        (dict(halves=torch.ones(6, 3)), r"halves has shape \(6, 3\)"),
        (dict(size=0), "size is 0"),
        (dict(halves=torch.ones(6, 2, device="meta")), "halves is on meta"),
        (dict(centers=torch.full((6, 2), torch.nan)), "centers holds 12 NaN"),
        (dict(images=torch.full((6, 1, 4, 4), torch.inf)), "images holds 96 NaN or infinite"),
        (dict(halves=torch.full((6, 2), torch.inf)), "halves holds 12 NaN or infinite"),
        (dict(size=10**9), "size is 1000000000"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        sample_boxes(
            **dict(images=IMAGES / 255, centers=torch.zeros(6, 2), halves=torch.ones(6, 2)) | change
        )


# Files ----------------------------------------


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), packed=st.booleans())
@settings(max_examples=30, deadline=None)
def test_idx_files_come_back(tmp_path_factory, shape, packed):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + array.tobytes()
    path = tmp_path_factory.mktemp("i") / "x"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert np.array_equal(read_idx(path), array)
    for cut, words in (
        (raw[:-1], f"{array.size - 1} bytes of data" if array.size > 1 else "less"),
        (raw + b"x", "more"),
    ):
        path.write_bytes(gzip.compress(cut) if packed else cut)
        with pytest.raises(ValueError, match=f"x holds {words}; its header promises {array.size}"):
            read_idx(path)


def idx(*sizes, data=b""):
    return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}i", *sizes) + data


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"\0\0\x08", "begins with 00 00 08"),
        (b"\0", "begins with 00"),
        (idx(), "its sizes are not there"),
        (idx(-1, -5, data=b"12345"), r"\[-1, -5\]"),
        (idx(0, 3), r"\[0, 3\]"),
        (idx(*[2**31 - 1] * 3), "holds less; its header promises 9,903,520,300"),
        (idx(*[65536] * 4, data=b"1"), "promises 18,446,744,073,709,551,616"),
        (idx(-429496729, 599), "its sizes are"),
        (idx(*[1] * 40, data=b"1"), "its sizes are"),
        (bytes([0, 0, 8, 255]), "its sizes are not there"),
    ],
)
def test_headers_that_promise_what_is_not_there_are_refused(tmp_path, raw, words):
    for data in (raw, gzip.compress(raw)):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            read_idx(tmp_path / "x")
        assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    "A header of four bytes, then 20 MB of nothing: what is beyond the promise stays packed"
    (tmp_path / "x").write_bytes(gzip.compress(idx(4) + bytes(20_000_000), 1))
    unpacked, read = [], gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile,
        "read",
        lambda file, size=-1: unpacked.append(read(file, size)) or unpacked[-1],
    )
    with pytest.raises(ValueError, match="x holds more; its header promises 4"):
        read_idx(tmp_path / "x")
    assert sum(map(len, unpacked)) == 4 + 4 + 4 + 1


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_idx(tmp_path / name)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PNG",
        b"\0\0\x08\x03\0\0",
        b"\0\0\x0d\x01\0\0\0\1xxxx",
        gzip.compress(b"hello", mtime=0),
        gzip.compress(b"\0\0\x08", mtime=0)[:-3],
        b"\x1f\x8bnot really",
    ],
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="x (is not an IDX file|cannot be unpacked)"):
        read_idx(tmp_path / "x")


# Bad input ----------------------------------------

LABELS = torch.arange(6)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: check_set(IMAGES.float()),
            TypeError,
            r"images is a tensor of float32.* expected bytes \(torch.uint8\)",
        ),
        (lambda: check_set([1]), TypeError, "images is a list"),
        (lambda: check_set(IMAGES, [0.5] * 6), TypeError, "labels is a list of float64"),
        (lambda: check_set(IMAGES[0]), ValueError, "add the missing axis"),
        (lambda: check_set(IMAGES[:0]), ValueError, "empty"),
        (lambda: check_set(IMAGES, LABELS[:2]), ValueError, "2 labels for 6 images"),
        (lambda: check_set(IMAGES, LABELS, 5), ValueError, "0 to 4"),
        (lambda: check_set(IMAGES, LABELS - 1, 6), ValueError, "labels run from -1"),
        (lambda: check_set(IMAGES, LABELS, 0), ValueError, "classes is 0"),
        (lambda: check_set(IMAGES, LABELS[:, None]), ValueError, "one axis"),
        (lambda: check_set(IMAGES.to(torch.uint16), LABELS), TypeError, "uint16"),
        (
            lambda: ImageSet(IMAGES, LABELS, IMAGES, LABELS, (1, 2), "x", "y", 0.0, 1.0),
            TypeError,
            "classes is a tuple; expected the names",
        ),
        (
            lambda: ImageSet(IMAGES, LABELS, IMAGES, LABELS, tuple("abcdef"), "x", "y", 0.0, 0.0),
            ValueError,
            "std is 0.0",
        ),
        (
            lambda: ImageSet(
                IMAGES, LABELS, IMAGES[:, 0], LABELS, tuple("abcdef"), "x", "y", 0.0, 1.0
            ),
            ValueError,
            "add the missing axis",
        ),
        (lambda: to_float(IMAGES.float()), TypeError, "float32.* expected bytes"),
        (lambda: to_float([1]), TypeError, "images is a list"),
        (lambda: to_float(IMAGES, std=0), ValueError, "std is 0"),
        (lambda: to_float(IMAGES, mean=float("nan")), ValueError, "mean is nan"),
        (lambda: to_float(IMAGES, std=1e-40), ValueError, "std is 1e-40"),
        (lambda: to_float(IMAGES, mean=1e300), ValueError, "mean is 1e.300"),
        (lambda: to_float(IMAGES, std=None), TypeError, "std is None"),
        (lambda: to_float(IMAGES[0]), ValueError, "add the missing axis"),
        (lambda: read_idx("nowhere"), FileNotFoundError, "nowhere is not there"),
        (lambda: load_images("mnist2"), ValueError, "one of 'fashion_mnist', 'digits'"),
        (lambda: read_idx(3), TypeError, "path is 3"),
        (lambda: load_images(3), TypeError, "name is 3"),
        (lambda: few_labels(["a", "b"], 2), TypeError, "labels is a list of str"),
        (lambda: few_labels(LABELS.float(), 6), TypeError, "tensor of float32"),
        (lambda: few_labels(LABELS - 1, 6), ValueError, "labels run from -1"),
        (lambda: few_labels(LABELS, 6, seed=2**64), ValueError, "seed is 18446744073709551616"),
        (lambda: few_labels(LABELS, 6, seed=0.5), TypeError, "seed is 0.5"),
        (lambda: few_labels(LABELS, 6.0), TypeError, "count is 6.0"),
        (lambda: few_labels(LABELS[None], 6), ValueError, r"\(1, 6\)"),
        (lambda: few_labels(LABELS, 5), ValueError, "expected 6"),
        (lambda: few_labels(LABELS, 7), ValueError, "asked for 7 labels"),
        (lambda: few_labels(LABELS[:0], 0), ValueError, "labels is empty"),
        (lambda: split(10, (0.5, 0.6)), ValueError, "add up to 1"),
        (lambda: split(10, ()), ValueError, "add up to 1"),
        (lambda: split(10, (1.2, -0.2)), ValueError, "a part is -0.2"),
        (lambda: split(10, (float("nan"), 1)), ValueError, "a part is nan"),
        (lambda: split(10, ("a", 1)), TypeError, "a part is 'a'"),
        (lambda: split(10, 0.5), TypeError, "parts is 0.5"),
        (lambda: split(0), ValueError, "count is 0"),
        (lambda: split(10**20), ValueError, "8 bytes an example"),
        (lambda: split(10, seed=-(2**64)), ValueError, "seed is -18446744073709551616"),
        (lambda: split(3, (0.9, 0.1)), ValueError, "is empty"),
        (lambda: split(3, groups=LABELS), ValueError, r"whole numbers \(3,\)"),
        (lambda: split(6, groups=LABELS / 2), ValueError, "groups is a tensor of float32"),
        (lambda: split(3, groups=["a", "b", "c"]), TypeError, "groups is a list"),
        (lambda: duplicates(IMAGES, IMAGES[..., :4]), ValueError, "others .* one size"),
        (lambda: duplicates(IMAGES / 255, IMAGES), TypeError, "images is a tensor of float32"),
        (lambda: duplicates(IMAGES, [1]), TypeError, "others is a list"),
        (lambda: duplicates(IMAGES, IMAGES[:0]), ValueError, "others is empty"),
        (lambda: ImageDataset([1], [1, 2]), ValueError, "1 images and 2 labels"),
        (lambda: ImageDataset([], []), ValueError, "empty"),
        (
            lambda: ImageDataset([1], [1], transform=3),
            TypeError,
            "transform is 3; expected a function of one image",
        ),
        (lambda: ImageDataset(3, [1]), TypeError, "images is 3; expected a sequence"),
        (lambda: ImageDataset([1], None), TypeError, "labels is None"),
        (lambda: ImageDataset({"a": 1}, [1]), TypeError, "images is a dict"),
        (lambda: ImageDataset([1], torch.tensor(1)), TypeError, "labels is a tensor"),
        (
            lambda: ImageDataset([1], torch.tensor([0.5])),
            TypeError,
            "labels is a tensor of float32",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_image_dataset_is_the_articles():
    dataset = ImageDataset(IMAGES, LABELS, transform=lambda image: image.float() / 255)
    assert len(dataset) == 6 and set(dataset[2]) == {"image", "label"} and dataset[2]["label"] == 2
    assert torch.equal(dataset[-1]["image"], IMAGES[5] / 255) and ImageDataset("ab", [0, 1])[
        1
    ] == dict(image="b", label=1)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert batch["image"].shape == (4, 1, 9, 9) and batch["label"].tolist() == [0, 1, 2, 3]


# In colour -----------------------------------------------


COLOUR = torch.randint(
    256, (6, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def test_channels_are_standardised_each_by_its_own_numbers():
    mean, std = standard_of(COLOUR)
    floats = to_float(COLOUR, mean, std)
    known = V.normalize(COLOUR.float() / 255, list(mean), list(std))
    torch.testing.assert_close(floats, known, atol=1e-5, rtol=1e-5)
    for kind in (list, np.array, torch.tensor):
        assert torch.equal(to_float(COLOUR, kind(mean), kind(std)), floats)
    one = to_float(COLOUR[:, :1], mean[:1], std[:1])
    torch.testing.assert_close(one, to_float(COLOUR[:, :1], mean[0], std[0]))
    assert all(isinstance(x, float) for x in standard_of(COLOUR[:, :1]))
    assert standard_of(COLOUR[:1, :, :1, :1])[1] == (1e-4,) * 3  # one pixel does not spread


def test_a_colour_set_needs_a_number_a_channel_or_one():
    labels = torch.arange(6) % 2
    parts = COLOUR, labels, COLOUR, labels, ("a", "b"), "own", "here"
    data = ImageSet(*parts, *standard_of(COLOUR), train_groups=torch.arange(6) // 2)
    assert data.floats(COLOUR).shape == COLOUR.shape and isinstance(data.mean, tuple)
    for mean, std, says in (
        ((0.1, 0.2), 1.0, "2 numbers for images of 3 channels"),
        (0.1, (1.0, 1.0, 0.0), "a value of std"),
        ((), 1.0, "mean is empty"),
    ):
        with pytest.raises(ValueError, match=says):
            ImageSet(*parts, mean, std)
    with pytest.raises(ValueError, match="groups"):
        ImageSet(*parts, 0.0, 1.0, train_groups=torch.arange(5))


def test_emoji_of_one_concept_stay_on_one_side_of_every_split():
    try:
        data = load_images("emoji")
    except DataUnavailable as error:
        pytest.skip(str(error))
    assert data.train_images.shape[1:] == (3, 64, 64) and len(data.classes) == 9
    assert (len(data.train_images), len(data.test_images)) == (2850, 387)  # no skin tones here
    assert not len(duplicates(data.test_images, data.train_images))
    task = image_task(data)
    sides = [set(data.train_groups[part].tolist()) for part in (task.pool, task.dev)]
    assert not sides[0] & sides[1]
    assert data.test_labels.bincount().min() >= 19 and data.train_labels.bincount().min() >= 66
    white = data.test_images[:, :, 0, 0].float().mean()
    assert white > 230  # what one can see through is laid on white


def colors(n=16, h=10, w=14):
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(2))
    x[0], x[1], x[2, 1] = 0.3, 0, x[2, 0]  # gray, black, and ties
    return x


def test_colors_change_as_torchvisions():
    x, u = colors(), torch.linspace(-0.5, 0.5, 16)
    each = [V.adjust_hue(p, t.item()) for p, t in zip(x, u)]
    torch.testing.assert_close(_turn_hue(x, u), torch.stack(each), atol=1e-5, rtol=0)
    each = [V.adjust_saturation(p, 1 + t.item()) for p, t in zip(x, u)]
    torch.testing.assert_close(_saturate(x, 1 + u), torch.stack(each), atol=1e-5, rtol=0)
    each = [V.gaussian_blur(p, 3, 0.7 + t.item()) for p, t in zip(x, u)]
    torch.testing.assert_close(_blur(x, 0.7 + u), torch.stack(each), atol=1e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 9), (2, 1), (41, 3)])
def test_a_blur_of_any_size_keeps_a_plain_picture(h, w):
    plain = torch.full((2, 3, h, w), 0.4)
    torch.testing.assert_close(_blur(plain, torch.tensor([0.1, 2.0])), plain)
    assert (
        Augment(hue=0.5, saturation=1, gray=0.5, blur=1, solarize=0.5)(plain).shape == plain.shape
    )


def test_colors_of_a_batch_are_drawn_for_each_picture_and_repeat():
    same = colors()[3:4].expand(32, -1, -1, -1)
    still = dict(area=(1, 1), aspect=1, flip=0, contrast=0, brightness=0)
    for name, share in dict(hue=0.5, saturation=1, gray=0.5, blur=0.5, solarize=0.5).items():
        augment = Augment(**still, **{name: share})
        a, b = (augment(same, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(a, b) and len(a.flatten(1).unique(dim=0)) > 1, name
        assert 0 <= a.min() and a.max() <= 1


def test_dials_of_color_leave_gray_pictures_alone():
    plain = Augment()(IMAGES, torch.Generator().manual_seed(1))
    color = Augment(hue=0.3, saturation=0.4, gray=0.5)
    assert torch.equal(color(IMAGES, torch.Generator().manual_seed(1)), plain)
    with pytest.raises(ValueError, match="2 channels"):
        color(torch.rand(2, 2, 4, 4))
    for wrong in (dict(hue=0.6), dict(gray=2), dict(blur=-1), dict(solarize=float("nan"))):
        with pytest.raises(ValueError):
            Augment(**wrong)


def test_transforms_of_torchvision_repeat_and_leave_other_numbers_alone():
    steps = [v2.RandomResizedCrop(8, antialias=True), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]
    coat = PerImage(v2.Compose(steps), *standard_of(COLOUR))
    before = torch.random.get_rng_state()
    a = coat(COLOUR, torch.Generator().manual_seed(3))
    with torch.random.fork_rng([]):
        torch.manual_seed(99)
        b = coat(COLOUR, torch.Generator().manual_seed(3))
    assert torch.equal(a, b) and a.shape == (6, 3, 8, 8) and a.dtype == torch.float32
    assert torch.equal(torch.random.get_rng_state(), before)
    views = PerImage(steps[0])(COLOUR[:1].expand(9, -1, -1, -1))
    assert len(views.flatten(1).unique(dim=0)) > 5
    plain = PerImage(lambda x: x, *standard_of(COLOUR))(COLOUR)
    torch.testing.assert_close(plain, to_float(COLOUR, *standard_of(COLOUR)), atol=1e-5, rtol=1e-5)


# Your own ------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        kind = ("Hund", "猫")[i % 2]
        (tmp_path / kind / "deeper").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(9 + i, 20 - i, 3), dtype=np.uint8)
        place = tmp_path / kind / ("deeper" if i == 4 else "") / f"{i}.PNG"
        Image.fromarray(pixels).save(place)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "Hund" / ".DS_Store.png").write_bytes(b"x")
    (tmp_path / "Hund" / "notes.txt").write_text("x")
    Image.new("CMYK", (6, 9)).save(tmp_path / "Hund" / "cmyk.jpg")
    Image.new("P", (1, 1)).save(tmp_path / "猫" / "one.gif")
    (tmp_path / "猫" / "link.png").symlink_to(tmp_path / "猫" / "1.PNG")
    return tmp_path


def test_a_folder_becomes_a_set_whose_equal_pictures_stay_together(folder):
    data = image_set(folder, size=(8, 12))
    count = len(data.train_images) + len(data.test_images)
    assert (
        count == 15 and data.classes == ("Hund", "猫") and data.train_images.shape[1:] == (3, 8, 12)
    )
    assert data.test_labels.bincount().tolist() in ([1, 1], [1, 2])
    assert not len(duplicates(data.test_images, data.train_images))
    assert len(image_task(data).dev)
    again = image_set(folder, size=(8, 12))
    assert torch.equal(again.test_images, data.test_images)
    assert image_set(folder, size=8, channels=1).train_images.shape[1:] == (1, 8, 8)


def test_copies_of_a_picture_are_never_torn_apart():
    copies = COLOUR.repeat(5, 1, 1, 1)
    for seed in range(5):
        data = image_set(copies, torch.arange(30) % 2, test=0.4, seed=seed)
        assert not len(duplicates(data.test_images, data.train_images))
        assert len(data.test_images) == 10 and len(data.train_groups.unique()) == 4


def test_files_are_opened_only_when_asked_for(folder, monkeypatch):
    opened, read = [], own.read_image
    monkeypatch.setattr(own, "read_image", lambda path, c: opened.append(path) or read(path, c))
    files = own.ImageFiles(folder, size=8)
    assert not opened and len(files) == 15
    next(endless(files, batch_size=4))
    assert len(opened) == 4


def test_every_kind_of_source_gives_one_set():
    y = torch.arange(6) % 2
    first = image_set(COLOUR, y, test=0.3)
    last, share = COLOUR.permute(0, 2, 3, 1).numpy(), COLOUR / 255
    pairs = ImageDataset(COLOUR, y)
    for source, labels in ((last, y.tolist()), (share, y.numpy()), (pairs, None)):
        other = image_set(source, labels, test=0.3)
        assert torch.equal(other.train_images, first.train_images)
        assert torch.equal(other.test_labels, first.test_labels)
    pictures = [(Image.fromarray(x), int(k)) for x, k in zip(last, y)]
    assert torch.equal(image_set(pictures, test=0.3).train_images, first.train_images)
    assert image_set(COLOUR, y, classes=("a", "b"), test=0.3).classes == ("a", "b")
    assert image_set(COLOUR[:, 0], y, channels=1).train_images.shape[1:] == (1, 5, 7)


@pytest.mark.parametrize(
    "source, labels, options, words",
    [
        (COLOUR, None, {}, "a label for each picture"),
        (COLOUR, [0, 1], {}, "with 2 labels"),
        (COLOUR.float(), [0, 1] * 3, {}, "take the standardising transform away"),
        (COLOUR[:, :2], [0, 1] * 3, {}, "1 or 3 channels"),
        (COLOUR, [0, 0, 0, 0, 0, 1], {}, "1 has 1 pictures"),
        (COLOUR, [0, 1] * 3, dict(size=0), "size is 0"),
        (COLOUR, [0, 1] * 3, dict(size=(1, 2, 3)), "one side in pixels"),
        (COLOUR, [0, 1] * 3, dict(test=1.0), "test is 1"),
        (COLOUR[[0, 0, 1]], ["a", "b", "a"], {}, "equal but of two classes"),
        ([], None, {}, "there are no pictures"),
        ([5, 6], None, {}, "expected .picture, label."),
        ("nowhere", [0], {}, "leave labels"),
    ],
)
def test_what_makes_no_set_gets_a_sentence(source, labels, options, words):
    with pytest.raises(ValueError, match=words):
        image_set(source, labels, **options)


def test_folders_without_pictures_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder gone"):
        image_set(tmp_path / "gone")
    with pytest.raises(ValueError, match="a folder for each class"):
        image_set(folder / "Hund" / "deeper")
    whole = (folder / "Hund" / "0.PNG").read_bytes()
    (folder / "Hund" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.png cannot be read.*damaged_images"):
        image_set(folder, size=8)
    assert [path.name for path in own.damaged_images(folder)] == ["cut.png"]
    with pytest.raises(TypeError, match="hand in its .dataset"):
        image_set(iter([1]))


def test_a_sample_of_the_test_set_is_random_and_the_same_again():
    "Different images in random order, each with its label; all of them when all are asked for"
    images, names = torch.arange(100).view(100, 1, 1, 1).byte(), tuple(map(str, range(100)))
    data = ImageSet(images, torch.arange(100), images, torch.arange(100), names, "x", "y", 0.5, 0.3)
    x, y = data.test_sample(40, seed=3)
    assert torch.equal(x, images[y]) and len(set(y.tolist())) == 40
    assert not torch.equal(y, torch.arange(40)) and not torch.equal(y, data.test_sample(40)[1])
    torch.manual_seed(9)  # whatever else draws random numbers
    assert torch.equal(data.test_sample(40, seed=3)[1], y)
    assert sorted(data.test_sample(100)[1].tolist()) == list(range(100))
    for wrong in (0, 101):
        with pytest.raises(ValueError, match="expected a whole number from 1 to 100"):
            data.test_sample(wrong)
