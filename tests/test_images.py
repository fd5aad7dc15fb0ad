"Balanced draws, splits that do not leak, augmentation against torchvision, and what both refuse."
import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as V

from foundation.data.augment import Augment, sample_boxes
from foundation.data.images import ImageDataset, ImageSet, check_images, duplicates, few_labels, load_images, read_idx, split, to_float

IMAGES = torch.randint(256, (6, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Draws and splits ------------------------------------------------------------------------------------------------------

@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_few_labels_are_as_balanced_as_can_be(sizes, share, seed):
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    count = len(sizes) + int(share * (len(labels) - len(sizes)))
    drawn = few_labels(labels, count, seed)
    per_class = torch.bincount(labels[drawn], minlength=len(sizes)).tolist()
    assert len(drawn.unique()) == count == sum(per_class)
    poorest = min(n for n, size in zip(per_class, sizes) if n < size) if count < len(labels) else 0
    assert all(n <= poorest + 1 for n in per_class) or count == len(labels)  # a class is behind only when it has no more
    assert torch.equal(few_labels(labels, len(sizes), seed), drawn[: len(sizes)])


@given(count=st.integers(10, 200), first=st.floats(0.15, 0.85), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition(count, first, seed):
    parts = split(count, (first, 1 - first), seed)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count)) and abs(len(parts[0]) - first * count) <= 1


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
    assert few_labels(labels, 6, seed=1).tolist() == FEW and split(8, (0.5, 0.5), seed=1)[0].tolist() == SPLIT


FEW, SPLIT = [36, 5, 18, 11, 12, 17], [5, 4, 2, 6]


# Augmentation ----------------------------------------------------------------------------------------------------------

@given(seed=st.integers(0, 99), low=st.floats(0.05, 1), aspect=st.floats(1, 3), channels=st.integers(1, 3), erase=st.sampled_from([0, 0.5, 1]))
@settings(max_examples=30, deadline=None)
def test_views_are_finite_in_range_and_repeatable(seed, low, aspect, channels, erase):
    augment = Augment(area=(low, 1), aspect=aspect, erase=erase)
    images = torch.rand(5, channels, 12, 10, generator=torch.Generator().manual_seed(seed))
    a, b = (augment(images, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == images.shape and 0 <= a.min() and a.max() <= 1
    bytes_ = (images * 255).byte()
    torch.testing.assert_close(augment(bytes_, torch.Generator().manual_seed(seed)), augment(bytes_ / 255, torch.Generator().manual_seed(seed)))
    standard = Augment(area=(low, 1), aspect=aspect, erase=erase, mean=0.3, std=0.4)(images, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(standard, (a - 0.3) / 0.4)


@given(top=st.integers(0, 8), left=st.integers(0, 8), height=st.integers(4, 12), width=st.integers(4, 12))
@settings(max_examples=40, deadline=None)
def test_a_crop_is_torchvisions(top, left, height, width):
    "Inside: at the rim ours looks on into the picture, theirs repeats the last pixel of the crop"
    height, width = min(height, 16 - top), min(width, 16 - left)
    image = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(top))
    centers = torch.tensor([[(2 * left + width) / 16 - 1, (2 * top + height) / 16 - 1]])
    ours = sample_boxes(image, centers, torch.tensor([[width / 16, height / 16]]), size=20)
    theirs = V.resized_crop(image, top, left, height, width, [20, 20], antialias=False)
    rim = -(-20 // (2 * min(height, width))) + 1
    inner = (..., slice(rim, -rim), slice(rim, -rim))
    torch.testing.assert_close(ours[inner], theirs[inner], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [
    dict(area=(0, 1)), dict(area=(0.5, 0.4)), dict(area=(0.5, 1.1)), dict(area=(float("nan"), 1)), dict(aspect=0.5), dict(aspect=float("nan")),
    dict(flip=-0.1), dict(flip=float("nan")), dict(erase=2), dict(contrast=-1), dict(brightness=1.5), dict(std=0), dict(std=float("nan")),
    dict(mean=float("inf")),
])
def test_ranges_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Augment(**options)


@pytest.mark.parametrize("images, error, words", [
    (IMAGES[0], ValueError, r"shape \(1, 9, 9\); expected \(b, c, h, w\)"), (IMAGES[:0], ValueError, "none of them 0"),
    (IMAGES.long(), TypeError, "images are torch.int64"), (IMAGES.numpy(), TypeError, "images are ndarray"),
    (IMAGES.float(), ValueError, "run from .* expected floats from 0 to 1: augment first, standardise last"),
    (IMAGES / 255 - 0.1, ValueError, "expected floats from 0 to 1"), (torch.full((1, 1, 4, 4), float("nan")), ValueError, "images run from nan"),
])
def test_images_that_cannot_be_augmented_are_refused(images, error, words):
    with pytest.raises(error, match=words):
        Augment()(images)


def test_a_generator_elsewhere_is_refused():
    with pytest.raises(ValueError, match="the generator is on cpu, the images are on meta"):
        Augment()(torch.empty(1, 1, 4, 4, dtype=torch.uint8, device="meta"), torch.Generator())


@pytest.mark.parametrize("change, words", [
    (dict(centers=torch.zeros(5, 2)), r"centers have shape \(5, 2\)"), (dict(halves=torch.ones(6, 3)), r"halves \(6, 3\)"), (dict(size=0), "size is 0"),
])
def test_boxes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        sample_boxes(**dict(images=IMAGES / 255, centers=torch.zeros(6, 2), halves=torch.ones(6, 2)) | change)


# Files -----------------------------------------------------------------------------------------------------------------

@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), packed=st.booleans())
@settings(max_examples=30, deadline=None)
def test_idx_files_come_back(tmp_path_factory, shape, packed):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + array.tobytes()
    path = tmp_path_factory.mktemp("i") / "x"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert np.array_equal(read_idx(path), array)
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match=f"x holds {array.size - 1} bytes of data; its header promises {array.size}"):
        read_idx(path)


@pytest.mark.parametrize("data", [b"", b"PNG", b"\0\0\x08\x03\0\0", b"\0\0\x0d\x01\0\0\0\1xxxx", gzip.compress(b"hello"), gzip.compress(b"\0\0\x08")[:-3],
                                  b"\x1f\x8bnot really"])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="x (is not an IDX file|cannot be unpacked)"):
        read_idx(tmp_path / "x")


# Bad input -------------------------------------------------------------------------------------------------------------

LABELS = torch.arange(6)


@pytest.mark.parametrize("call, error, words", [
    (lambda: check_images(IMAGES.numpy()), TypeError, "images are ndarray"), (lambda: check_images(IMAGES.float()), TypeError, "images are torch.float32"),
    (lambda: check_images(IMAGES[0]), ValueError, "add the missing axis"), (lambda: check_images(IMAGES[:0]), ValueError, "empty"),
    (lambda: check_images(IMAGES, LABELS.int()), TypeError, "labels are torch.int32"), (lambda: check_images(IMAGES, [1] * 6), TypeError, "labels are list"),
    (lambda: check_images(IMAGES, LABELS[:2]), ValueError, r"labels have shape \(2,\)"), (lambda: check_images(IMAGES, LABELS, 5), ValueError, "0 to 4"),
    (lambda: check_images(IMAGES, LABELS - 1, 6), ValueError, "labels run from -1"),
    (lambda: ImageSet(IMAGES, LABELS, IMAGES[:, 0], LABELS, tuple("abcdef"), "x", "y", 0.0, 1.0), ValueError, "add the missing axis"),
    (lambda: to_float(IMAGES.float()), TypeError, "no one standardises twice"), (lambda: to_float([1]), TypeError, "images are list"),
    (lambda: to_float(IMAGES, std=0), ValueError, "std is 0"), (lambda: to_float(IMAGES, mean=float("nan")), ValueError, "mean is nan"),
    (lambda: read_idx("nowhere"), FileNotFoundError, "nowhere is not there"), (lambda: load_images("mnist2"), ValueError, "known: fashion_mnist, digits"),
    (lambda: few_labels([0, 1], 2), TypeError, "labels are list"), (lambda: few_labels(LABELS.float(), 6), TypeError, "torch.float32"),
    (lambda: few_labels(LABELS[None], 6), TypeError, r"\(1, 6\)"), (lambda: few_labels(LABELS, 5), ValueError, "expected 6"),
    (lambda: few_labels(LABELS, 7), ValueError, "asked for 7 labels"), (lambda: few_labels(LABELS[:0], 0), TypeError, r"labels are \(0,\)"),
    (lambda: split(10, (0.5, 0.6)), ValueError, "add up to 1"), (lambda: split(10, ()), ValueError, "add up to 1"),
    (lambda: split(10, (1.2, -0.2)), ValueError, "positive shares"), (lambda: split(10, (float("nan"), 1)), ValueError, "positive shares"),
    (lambda: split(3, (0.9, 0.1)), ValueError, "is empty"), (lambda: split(3, groups=LABELS), ValueError, r"expected a tensor \(3,\)"),
    (lambda: split(3, groups=["a", "b", "c"]), ValueError, "expected a tensor"),
    (lambda: duplicates(IMAGES, IMAGES[..., :4]), ValueError, "others are .* one size"), (lambda: duplicates(IMAGES / 255, IMAGES), ValueError, "images are"),
    (lambda: duplicates(IMAGES.numpy(), IMAGES), (ValueError, AttributeError), "images are ndarray"),
    (lambda: ImageDataset([1], [1, 2]), ValueError, "1 images and 2 labels"), (lambda: ImageDataset([], []), ValueError, "empty"),
    (lambda: ImageDataset([1], [1], transform=3), TypeError, "transform is a int"),
])
def test_bad_input_gets_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_image_dataset_is_the_articles():
    dataset = ImageDataset(IMAGES, LABELS, transform=lambda image: image.float() / 255)
    assert len(dataset) == 6 and set(dataset[2]) == {"image", "label"} and dataset[2]["label"] == 2
    assert torch.equal(dataset[-1]["image"], IMAGES[5] / 255) and ImageDataset("ab", [0, 1])[1] == dict(image="b", label=1)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert batch["image"].shape == (4, 1, 9, 9) and batch["label"].tolist() == [0, 1, 2, 3]
