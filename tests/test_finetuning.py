"""Fine-tuning beyond what its lesson shows: modes, frozen layers,
groups, early stopping, leaks, bad input."""

import hashlib
import io
import json
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.core.basics import freeze, unfreeze
from foundation.core.precision import pick_precision
from foundation.data.augment import Augment
from foundation.data.batches import augmented
from foundation.data.images import load_images
from foundation.data.tasks import few_labels
from foundation.evaluation.scores import predict
from foundation.finetuning import loop
from foundation.recipes import resnet_fashion
from foundation.training import parameter_groups
from foundation.training.state import BadCheckpoint
from foundation.training.schedules import warmup_cosine
from foundation.data.images import ImageDataset
from foundation.data.own import check_classes, check_disjoint, number_labels, read_image
from foundation.finetuning.epochs import evaluate, train_epoch
from foundation.finetuning.loop import finetune, frozen_norms, thaw, thawed
from foundation.models.heads import replace_head
from foundation.models.outside import load_vgg
from foundation.recipes.resnet_fashion import ARMS, PHOTO_ARMS
from foundation.training.parameter_groups import head_groups, layer_groups, layers
from foundation.training.early_stopping import EarlyStopping
from foundation.models.bert import BERT
from foundation.models.convnets import VGG, ConvNet, EfficientNetLite, ResNet
from foundation.models.card import BadWeights, read_card
from foundation.models.pretrained import load_weights, save_weights
from foundation.models.vit import ViT


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def small(seed=0):
    torch.manual_seed(seed)
    return ResNet(widths=(8, 16), depths=(1, 1))


def dataset(digits, start=0, end=64):
    return ImageDataset(
        digits.train_images[start:end],
        digits.train_labels[start:end],
        lambda image: image.float() / 255,
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return [
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    ]


# Modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
def test_modes_are_restored_after_evaluate_also_when_it_raises(digits, broken):
    model = nn.Sequential(small(), nn.Dropout(0.5))
    model.train()
    model[0].body[0].eval()
    before, part = [m.training for m in model.modules()], dataset(digits, 0, 8)
    if broken:
        part.transform = lambda image: image  # bytes, which no network takes
        with pytest.raises(TypeError, match="uint8"):
            evaluate(model, part, 4)
    else:
        evaluate(model, part, 4)
    assert [m.training for m in model.modules()] == before


def test_the_check_of_modes_can_fail(digits):
    model = small().train()
    model.eval(), evaluate(model, dataset(digits, 0, 8), 4)  # as the article has it
    assert not model.training


def test_evaluate_counts_a_last_small_batch_too(digits):
    model, part = small(), dataset(digits, 0, 33)
    logits = predict(model, torch.stack([part[i]["image"] for i in range(33)]))
    assert (
        evaluate(model, part, 16)
        == (logits.argmax(1) == digits.train_labels[:33]).sum().item() / 33
    )


# Frozen -------------------------------------------------------------------------------------------


def test_a_frozen_body_keeps_weights_and_statistics_bit_for_bit(digits):
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before = state(model)
    finetune(
        model,
        digits.train_images[i],
        digits.train_labels[i],
        Augment(),
        steps=3,
        lr=0.0,
        head_lr=1e-2,
    )
    assert set(changed(before, model)) == {"head.weight", "head.bias"}


def test_without_frozen_norms_the_statistics_move(digits, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(loop, "frozen_norms", nullcontext)
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before = state(model)
    finetune(
        model,
        digits.train_images[i],
        digits.train_labels[i],
        Augment(),
        steps=3,
        lr=0.0,
        head_lr=1e-2,
    )
    assert any("running" in name for name in changed(before, model))


def test_norms_are_held_against_train_and_let_go_afterwards(digits):
    model, x = small(), torch.randn(4, 1, 28, 28)
    freeze(model.body)
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), frozen_norms(model):
        model.train()(x)
        raise RuntimeError("stop")
    assert not changed(before, model) and all(m.training for m in model.modules())
    model(x)
    assert changed(before, model)
    with frozen_norms(unfreeze(model)):  # learning norms are free …
        held = state(model)
        model.train()(x)
        assert changed(held, model)
    with frozen_norms(model, every=True):  # … unless all are to be held
        held = state(model)
        model.train()(x)
        assert not changed(held, model)


def test_gradual_unfreezing_moves_upper_layers_first(digits):
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before, seen = state(model), {}

    def look(step):
        seen[step.n] = set(changed(before, model))

    finetune(
        model,
        digits.train_images[i],
        digits.train_labels[i],
        Augment(),
        steps=16,
        lr=1e-3,
        gradual=True,
        each=look,
    )
    assert all(name.startswith("head") for name in seen[0])
    assert any(name.startswith("body.0") for name in seen[15]) and not any(
        name.startswith("body.0") for name in seen[3]
    )


# Layers and their rates ---------------------------------------------------------------------------


def models():
    import torchvision

    return [
        small(),
        ConvNet(),
        VGG(widths=(4, 8), depths=(1, 2)),
        VGG(widths=(4,) * 12, depths=(1,) * 12),
        ViT(depth=2),
        ViT(depth=2, pool="class"),
        BERT(vocab_size=50, context=8, dim=16, depth=2, heads=2),
        EfficientNetLite(),
        torchvision.models.vgg11_bn(num_classes=10),
    ]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_every_parameter_has_exactly_one_rate(model):
    groups = layer_groups(model, 1e-3, 0.5, 1e-2)
    ours = [id(p) for group in groups for p in group["params"]]
    assert len(ours) == len(set(ours)) and set(ours) == {id(p) for p in model.parameters()}
    rates = [group["lr"] for group in groups]
    assert rates[0] == 1e-2 and rates[1:] == [1e-3 * 0.5**depth for depth in range(len(groups) - 1)]
    torch.optim.AdamW(groups)  # refuses a parameter that stands twice


def rates_of(model, part):
    rate = {
        id(p): group["lr"] for group in layer_groups(model, 1.0, 0.1, 7.0) for p in group["params"]
    }
    return {round(rate[id(p)], 9) for p in part.parameters()}


def test_the_head_is_fast_and_the_stem_slow():
    model = small()
    assert (
        rates_of(model, model.head) == {7.0}
        and rates_of(model, model.body[-1]) == {1.0}
        and rates_of(model, model.body[0]) == {0.01}
    )


def test_rates_in_the_wrong_order_are_caught(monkeypatch):
    model, right = small(), parameter_groups.layers

    def order(parts):
        return dict([*reversed(list(parts.items())[:-1]), list(parts.items())[-1]])

    monkeypatch.setattr(
        parameter_groups, "layers", lambda model: order(right(model))
    )  # the stem next to the head
    assert (
        rates_of(model, model.head) == {7.0}
        and rates_of(model, model.body[-1]) != {1.0}
        and rates_of(model, model.body[0]) != {0.01}
    )


def test_an_optimizer_moves_each_layer_at_its_own_rate():
    model = small()
    opt = torch.optim.SGD(layer_groups(model, 1e-2, 0.1, 0.5))
    before = state(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    moved = {name: (before[name] - p).mean().item() for name, p in model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(0.5, rel=1e-4)
    assert all(
        moved[name] == pytest.approx(1e-2, rel=1e-3) for name in moved if name.startswith("body.2")
    )
    assert all(
        moved[name] == pytest.approx(1e-4, rel=0.05) for name in moved if name.startswith("body.0")
    )


@given(steps=st.integers(1, 200), count=st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_layers_open_one_way_and_all_are_open_in_the_second_half(steps, count):
    opened = [thawed(n, steps, count) for n in range(steps)]
    assert opened[0] == 1 and opened == sorted(opened) and max(opened) <= count
    assert all(n == count for n in opened[(steps + 1) // 2 + 1 :])


def test_thaw_opens_the_last_layers_and_no_others():
    model = small()
    assert thaw(model, 1) == ["head"] and not any(p.requires_grad for p in model.body.parameters())
    assert len(thaw(model, len(layers(model)))) == len(layers(model)) and all(
        p.requires_grad for p in model.parameters()
    )


# The protocol -------------------------------------------------------------------------------------


def test_finetune_is_the_plain_loop(digits):
    i = few_labels(digits.train_labels, 60, 0)
    x, y = digits.train_images[i], digits.train_labels[i]
    ours, theirs = small(), small()
    finetune(ours, x, y, Augment(), steps=6, lr=1e-3, batch_size=32, seed=3)
    opt = torch.optim.AdamW(head_groups(theirs, 1e-3), weight_decay=0.05)
    factors = warmup_cosine(6, 0).tolist()
    rates = [group["lr"] for group in opt.param_groups]
    theirs.train()
    batches = islice(augmented(x, y, augment=Augment(), batch_size=32, seed=3), 6)
    for factor, (images, labels) in zip(factors, batches):
        for group, rate in zip(opt.param_groups, rates):
            group["lr"] = rate * factor
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=pick_precision("cpu") == "bf16"):
            logits = theirs(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "how", [dict(lr=1e-3), dict(lr=1e-3, gradual=True), dict(lr=0.0, head_lr=1e-2)]
)
def test_finetune_stopped_and_resumed_is_finetune_in_one_go(digits, tmp_path, how):
    i = few_labels(digits.train_labels, 60, 0)
    plan = dict(images=digits.train_images[i], labels=digits.train_labels[i], augment=Augment())
    plan |= dict(steps=8, batch_size=16, seed=1) | how
    kept = dict(checkpoint=tmp_path / "run", save_every=3)
    whole, parts = small(), small()
    want = finetune(whole, **plan)

    def stop(step):
        if step.n == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(parts, **plan, **kept, each=stop)
    again = small()
    torch.testing.assert_close(finetune(again, **plan, **kept), want, atol=0, rtol=0)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(BadCheckpoint, match="data was"):
        finetune(small(), **plan | dict(images=255 - plan["images"]), **kept)


def test_finetune_is_repeatable(digits):
    i = few_labels(digits.train_labels, 60, 0)
    runs = [
        finetune(
            small(),
            digits.train_images[i],
            digits.train_labels[i],
            Augment(),
            steps=4,
            lr=1e-3,
            decay=0.5,
            seed=1,
        )
        for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_one_example_left_over_is_no_batch(digits):
    model, sizes = small(), []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    part = dataset(digits, 0, 65)
    train_epoch(model, part, 32, torch.optim.SGD(model.parameters(), lr=0.0))
    assert sizes == [32, 32]


# Early stopping -----------------------------------------------------------------------------------


def test_weights_kept_by_reference_are_caught():
    model = small()
    pointed = model.state_dict()
    first = pointed["head.weight"].clone()
    with torch.no_grad():
        model.head.weight += 1
    assert not torch.equal(pointed["head.weight"], first)


# Real weights -------------------------------------------------------------------------------------


class TinyVGG(nn.Sequential):
    def __init__(self, weights=None, init_weights=False):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1000)
        )


@pytest.fixture
def cached(tmp_path, monkeypatch):
    "Puts a file into torch's cache as VGG11, under a name with its hash or with another one"
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(models, "get_model", lambda name, **options: TinyVGG(**options))
    (tmp_path / "checkpoints").mkdir()

    def put(thing, honest=True):
        file = io.BytesIO()
        torch.save(thing, file)
        digest = hashlib.sha256(file.getvalue()).hexdigest() if honest else "8a719046"
        name = f"vgg11-{digest[:8]}.pth"
        (tmp_path / "checkpoints" / name).write_bytes(file.getvalue())
        kind = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://here.invalid/{name}"))
        monkeypatch.setattr(models, "get_model_weights", lambda name: kind)

    return put


def test_vgg_is_taken_when_torchvision_has_it_and_missed_in_one_sentence(digits, cached, tmp_path):
    from torchvision import transforms

    with pytest.raises(
        FileNotFoundError,
        match=r"vgg11-\w+\.pth, are not on this machine; run torchvision.models.vgg11\(",
    ):
        load_vgg(10, "vgg11")
    with pytest.raises(ValueError, match="torchvision has no 'vgg12'; it has vgg11"):
        load_vgg(10, "vgg12")
    torch.manual_seed(1)
    there = TinyVGG()
    cached(there.state_dict())
    model = load_vgg(10, "vgg11")
    assert (
        torch.equal(model.features[0].weight, there.features[0].weight)
        and model.classifier[-1].out_features == 10
    )
    colours = transforms.Compose(
        [
            transforms.ConvertImageDtype(torch.float),
            transforms.Lambda(lambda x: x.expand(3, -1, -1)),
        ]
    )
    part = ImageDataset(digits.train_images[:64], digits.train_labels[:64], colours)
    train_epoch(model, part, 16, torch.optim.AdamW(layer_groups(model, 1e-4, 0.8, 1e-3)))
    assert 0 <= evaluate(model, part, 16) <= 1


class Malice:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("honest", [False, True])
def test_a_pickle_in_the_cache_is_not_run(cached, tmp_path, honest):
    "Not under a name that promises another hash, and not under one that promises its own"
    cached(Malice(tmp_path / "run"), honest)
    words = "holds more than tensors" if honest else "not the file that its name speaks of"
    with pytest.raises(BadWeights, match=words):
        load_vgg(10, "vgg11")
    assert not (tmp_path / "run").exists()


# Data ---------------------------------------------------------------------------------------------


def test_a_leak_is_found_by_content(digits, tmp_path):
    from PIL import Image

    x = digits.train_images
    assert check_disjoint(train=x[:20], dev=x[20:30], test=dataset(digits, 30, 40)) == 40
    with pytest.raises(
        ValueError, match=r"train and dev share 1 images, such as train\[3\] = dev\[0\]"
    ):
        check_disjoint(train=x[:20], dev=[x[3].numpy().copy()])
    for name in ("a.png", "b.png"):
        Image.fromarray(x[0, 0].numpy()).save(tmp_path / name)
    with pytest.raises(ValueError, match="share 1 images"):
        check_disjoint(train=[tmp_path / "a.png"], dev=[tmp_path / "b.png"])
    assert (
        check_disjoint(train=[np.zeros((2, 8), np.uint8)], dev=[np.zeros((4, 4), np.uint8)]) == 2
    )  # same bytes, another shape


def test_class_order_is_stable_across_save_and_load(tmp_path):
    names = ["shirt", "bag", "coat", "bag"]
    labels, classes = number_labels(names)
    model = replace_head(small(), len(classes))
    save_weights(model, "net", dict(classes=classes), tmp_path, dtype=torch.float32)
    loaded, order = load_weights("net", folder=tmp_path), read_card("net", tmp_path)["classes"]
    again, _ = number_labels(["coat", "shirt"], order)
    assert loaded.config["classes"] == 3 and [order[i] for i in again] == ["coat", "shirt"]
    assert again.tolist() == [labels[2], labels[0]]
    x = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(predict(loaded, x), predict(model, x))
    assert number_labels(["coat", "shirt"])[0].tolist() != again.tolist()  # names numbered anew


def test_images_are_read_in_the_channels_asked_for(tmp_path):
    from PIL import Image

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png"), torch.from_numpy(pixels).permute(2, 0, 1))
    assert read_image(tmp_path / "x.png", 1).shape == (1, 4, 4)
    part = ImageDataset(
        [tmp_path / "x.png"] * 3, [0, 1, 0], lambda path: read_image(path).float() / 255
    )
    assert 0 <= evaluate(VGG(2, 3, (4,), (1,)), part, 2) <= 1


# Pictures from outside ----------------------------------------------------------------------------


def saved(folder, pixels, name="x.png", **options):
    from PIL import Image

    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(folder / name, **options)
    return folder / name


RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, name, channels):
    path = saved(tmp_path, RAMP + 255, name)
    assert torch.equal(
        read_image(path, channels),
        torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(channels, -1, -1),
    )


def test_big_endian_sixteen_bits(tmp_path):
    path = saved(tmp_path, RAMP.astype(">u2"), "x.tif")
    assert torch.equal(read_image(path, 1).flatten(), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize(
    "kind, words", [(np.float32, "holds floats"), (np.int32, "holds whole numbers of 32 bits")]
)
def test_numbers_without_a_white_are_refused(tmp_path, kind, words):
    with pytest.raises(ValueError, match=f"x.tif {words}.*scale it"):
        read_image(saved(tmp_path, np.ones((4, 4), kind), "x.tif"), 1)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_a_picture_stands_the_way_up_that_the_camera_says(tmp_path, turn, name):
    from PIL import Image

    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = turn
    seen = read_image(saved(tmp_path, np.ascontiguousarray(stored), name, exif=exif))
    assert seen.shape == (3, 16, 32)
    assert (seen.float() - torch.from_numpy(upright).permute(2, 0, 1).float()).abs().mean() < 3


def test_palettes_masks_and_inks(tmp_path):
    from PIL import Image

    red = Image.new("RGB", (4, 4), (255, 0, 0))
    want = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    for mode, name in (("P", "p.png"), ("P", "p.gif"), ("RGBA", "a.png"), ("CMYK", "c.tif")):
        assert torch.equal(read_image(saved(tmp_path, red.convert(mode), name)), want), (mode, name)
    bits = Image.fromarray(np.eye(4, dtype=np.uint8) * 255).convert("1")
    for channels in (1, 3):
        assert torch.equal(
            read_image(saved(tmp_path, bits, "b.png"), channels)[0],
            255 * torch.eye(4, dtype=torch.uint8),
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_what_one_can_see_through_is_white_whatever_hides_there(tmp_path, channels):
    from PIL import Image

    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 3] = [[0, 255], [0, 255]]  # black, its left half see-through
    want = torch.tensor([[255, 0], [255, 0]], dtype=torch.uint8).expand(channels, -1, -1)
    assert torch.equal(read_image(saved(tmp_path, pixels), channels), want)
    grey = Image.fromarray(pixels).convert("LA")
    assert torch.equal(read_image(saved(tmp_path, grey, "la.png"), channels), want)
    flat = Image.fromarray(np.array([[1, 0], [1, 0]], np.uint8)).convert("P")
    flat.putpalette([0, 0, 0, 9, 9, 9])
    assert torch.equal(read_image(saved(tmp_path, flat, "p.png", transparency=1), channels), want)


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.png", "x.webp"])
def test_several_pictures_in_one_file_are_refused(tmp_path, name):
    from PIL import Image

    a, b = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    with pytest.raises(ValueError, match="holds 2 pictures; expected one"):
        read_image(saved(tmp_path, a, name, save_all=True, append_images=[b]))


def test_a_photo_with_its_preview_is_the_photo(tmp_path):
    from PIL import Image

    a, b = Image.new("RGB", (8, 4), "white"), Image.new("RGB", (4, 2), "black")
    assert (
        read_image(saved(tmp_path, a, "x.mpo", save_all=True, append_images=[b])).float().mean()
        == 255
    )


def test_damaged_files_get_one_sentence(tmp_path, monkeypatch):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("x.png", "x.jpg", "x.gif", "x.tif", "x.bmp", "x.webp"):
        whole = saved(
            tmp_path, rng.integers(256, size=(20, 20, 3), dtype=np.uint8), name
        ).read_bytes()
        for n in range(30):
            data = bytearray(whole[: int(rng.integers(len(whole)))] if n % 2 else whole)
            for at in rng.integers(max(len(data), 1), size=4 * (n % 2 == 0)):
                data[at] = rng.integers(256)
            (tmp_path / name).write_bytes(data)
            try:
                assert read_image(tmp_path / name).dtype == torch.uint8
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        ValueError, match="x.png cannot be read as an image .DecompressionBombError"
    ):
        read_image(saved(tmp_path, np.zeros((20, 20), np.uint8)))


@pytest.mark.parametrize("path", ["", ".", "a\0b", "x" * 300, "x.png/y.png"])
def test_paths_that_are_no_files(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, np.zeros((2, 2), np.uint8))
    with pytest.raises(
        (ValueError, FileNotFoundError), match="cannot be read as an image|there is no image"
    ):
        read_image(path)


# Names and labels from outside --------------------------------------------------------------------


def test_missing_names_are_counted_and_no_class():
    for names in (
        [1.0, float("nan"), 2.0],
        ["cat", None, "dog"],
        ["cat", " ", "dog"],
        np.array([1.0, np.nan, 2.0]),
        ["a", np.nan],
    ):
        with pytest.raises(ValueError, match=f"1 of {len(names)} names are missing"):
            number_labels(names)
    with pytest.raises(ValueError, match="1 of 2 classes are missing"):
        number_labels(["a"], ["a", None])
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="2 of 3 names are missing"):
        number_labels(pandas.Series(["cat", None, pandas.NA]))


def test_names_of_other_kinds():
    for names in (["cat", 1], [1, 2.0], [True, 1]):
        with pytest.raises(TypeError, match="expected one kind"):
            number_labels(names)
    for names in ("cat", [], np.array([])):
        with pytest.raises(ValueError, match="expected a list of names"):
            number_labels(names)
    with pytest.raises(TypeError, match="a list"):
        number_labels([["a"], ["b"]])
    for names in (torch.tensor([7, 3, 7]), np.array([7, 3, 7]), (7, 3, 7)):
        labels, classes = number_labels(names)
        assert labels.tolist() == [1, 0, 1] and classes == (3, 7) and type(classes[0]) is int
    assert number_labels(np.array(["b", "a"]))[1] == ("a", "b")


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "int32", "list", "tuple", "numpy"])
def test_labels_of_any_whole_number_type_train_alike(digits, kind):
    i = few_labels(digits.train_labels, 50, 0)
    x, y = digits.train_images[i], digits.train_labels[i]
    other = {
        "list": y.tolist(),
        "tuple": tuple(y.tolist()),
        "numpy": y.numpy().astype(np.int32),
    }.get(kind)
    other = y.to(getattr(torch, kind)) if other is None else other
    losses = [
        finetune(small(), x, labels, Augment(), steps=1, lr=1e-3, seed=1) for labels in (y, other)
    ]
    assert torch.equal(*losses)
    part = ImageDataset(x.float() / 255, other)
    model = small()
    assert (
        train_epoch(model, part, 25, torch.optim.SGD(model.parameters(), lr=0.1)) > 0
        and 0 <= evaluate(model, part, 25) <= 1
    )
    assert check_classes(other, 10).dtype == torch.int64


def test_labels_that_are_no_whole_numbers_are_not_cut_down():
    class Half(ImageDataset):
        def __getitem__(self, i):
            return {"image": torch.zeros(1, 8, 8), "label": torch.tensor(1.7)}

    with pytest.raises(TypeError, match="labels"):
        evaluate(small(), Half(torch.zeros(2, 1, 8, 8), [0, 1]), 2)
    with pytest.raises(TypeError, match="expected a dictionary with `image` and `label`"):
        evaluate(small(), [(torch.zeros(1, 8, 8), 1)], 1)


def test_the_classes_of_a_model_are_counted_at_its_head():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 3), nn.Linear(4, 4)

    assert check_classes([0, 1, 2], Other()).tolist() == [0, 1, 2]


def test_parts_that_hashes_cannot_compare_are_refused(digits, tmp_path):
    x = digits.train_images[:4]
    path = saved(tmp_path, x[0, 0].numpy())
    for other in ([path], x.float()):
        with pytest.raises(ValueError, match="which hashes cannot compare"):
            check_disjoint(train=x, dev=other)
    with pytest.raises(TypeError, match=r"dev\[0\] is"):
        check_disjoint(train=x, dev=[None, None])
    half = torch.rand(4, 1, 2, 2).bfloat16().requires_grad_()
    assert check_disjoint(train=half[:2], dev=half[2:]) == 4


# Modes and layers of every kind -------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, None])
@pytest.mark.parametrize("options", [dict(gradual=True), dict(), dict(lr=0.0, head_lr=1e-2)])
def test_what_is_frozen_comes_back_also_after_ctrl_c(digits, stop, options):
    model, i = small().eval(), few_labels(digits.train_labels, 50, 0)
    freeze(model.body[1])
    before = [p.requires_grad for p in model.parameters()]

    def halt(step):
        if step.n == 1 and stop:
            raise stop

    def tune():
        return finetune(
            model,
            digits.train_images[i],
            digits.train_labels[i],
            Augment(),
            each=halt,
            **dict(steps=4, lr=1e-3) | options,
        )

    if stop:
        with pytest.raises(stop):
            tune()
    else:
        tune()
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_refused_run_leaves_the_model_as_it_was(digits):
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    freeze(model.body)
    before, learns = state(model), [p.requires_grad for p in model.parameters()]
    good = dict(
        images=digits.train_images[i],
        labels=digits.train_labels[i],
        augment=Augment(),
        steps=1,
        lr=1e-3,
    )
    for bad in (
        dict(steps=0),
        dict(steps=0.5),
        dict(batch_size=0),
        dict(smoothing=2.0),
        dict(weight_decay=-1.0),
        dict(head_lr=0.0),
        dict(labels=digits.train_labels[i][:-1]),
        dict(images=digits.train_images[i].float()),
        dict(augment=None),
    ):
        with pytest.raises((ValueError, TypeError)):
            finetune(model, **good | bad)
        assert [p.requires_grad for p in model.parameters()] == learns and not changed(
            before, model
        )


def test_each_norm_keeps_the_mode_that_it_has():
    model, x = small().train(), torch.randn(4, 1, 28, 28)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    modes = [m.training for m in model.modules()]
    with frozen_norms(freeze(model)):
        model(x)
        assert [m.training for m in model.modules()] == modes
    assert [m.training for m in model.modules()] == modes

    class Stop(BaseException):
        pass

    def stop(*args):
        raise Stop

    norms[1].register_forward_pre_hook(stop)  # after ours: in the midst of the layer
    with pytest.raises(Stop), frozen_norms(model):
        norms[1]._forward_pre_hooks.move_to_end(next(iter(norms[1]._forward_pre_hooks)))
        model(x)
    assert [m.training for m in model.modules()] == modes


def test_norms_without_weights_go_by_their_neighbours_and_instance_norms_have_statistics_too():
    def part(norm):
        return nn.Sequential(nn.Conv2d(1, 2, 1), norm)

    model = nn.Sequential(
        part(nn.BatchNorm2d(2, affine=False)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False)),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    )
    freeze(model[0]), freeze(model[2])
    before = state(model)
    with frozen_norms(model):
        model.train()(torch.randn(4, 1, 5, 5))
    assert {name.split(".")[0] for name in changed(before, model)} == {"1"}


def test_a_sequence_with_a_parameter_of_its_own_has_a_rate_for_it():
    class Scaled(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * super().forward(x)

    model = nn.ModuleDict(dict(body=Scaled(nn.Linear(2, 2)), head=nn.Linear(2, 2)))
    assert {id(p) for own in layers(model).values() for p in own} == {
        id(p) for p in model.parameters()
    }
    thaw(model, 1)
    assert not model["body"].scale.requires_grad and model["head"].weight.requires_grad


# Bad input ----------------------------------------------------------------------------------------


def refusals(digits, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n\x1a\n")
    model, opt = small(), torch.optim.SGD(small().parameters())

    def epoch(images, labels):
        return train_epoch(model, ImageDataset(images, labels, lambda i: i.float()), 4, opt)

    floats, i = torch.rand(10, 1, 8, 8), few_labels(digits.train_labels, 50, 0)

    def tune(y=digits.train_labels[i], **options):
        return finetune(
            model, digits.train_images[i], y, Augment(), **dict(steps=1, lr=1e-3) | options
        )

    return {
        "labels run from 1 to 10; expected 0 to 9": lambda: epoch(floats, torch.arange(1, 11)),
        "labels run from -1 to 8; expected 0": lambda: epoch(floats, torch.arange(-1, 9)),
        "no training example has the labels [9]": lambda: epoch(floats[:9], torch.arange(9)),
        "expected class numbers, whole numbers": lambda: check_classes(["a"], 2),
        "labels is a tensor of float32": lambda: check_classes(torch.rand(3), 2),
        "labels has shape (50, 1); expected one axis": lambda: tune(
            digits.train_labels[i][:, None]
        ),
        "labels run from 11 to 11": lambda: evaluate(model, ImageDataset(floats[:2], [11, 11]), 2),
        "there is no image gone": lambda: check_disjoint(train=[tmp_path / "gone"], dev=floats),
        "gradual unfreezing needs a rate": lambda: tune(lr=0.0, head_lr=1e-2, gradual=True),
        "one size": lambda: evaluate(
            model, ImageDataset([torch.zeros(1, 8, 8), torch.zeros(1, 9, 9)], [0, 1]), 2
        ),
        "images has shape (2, 3, 8, 8); expected (b, 1, h, w)": lambda: evaluate(
            model, ImageDataset(torch.rand(2, 3, 8, 8), [0, 1]), 2
        ),
        "an image is a tensor of uint8": lambda: evaluate(
            model, ImageDataset(digits.train_images[:2], [0, 1]), 2
        ),
        "the data set is empty": lambda: evaluate(model, [], 2),
        "torn.png cannot be read as an image": lambda: read_image(torn),
        "there is no image gone.png": lambda: read_image(tmp_path / "gone.png"),
        "channels is 2": lambda: read_image(torn, 2),
        "lr is 0.0; expected a finite number above 0": lambda: layer_groups(model, 0.0),
        "lr is nan": lambda: layer_groups(model, float("nan")),
        "decay is 1.5": lambda: layer_groups(model, 1e-3, 1.5),
        "lr is -1.0": lambda: tune(lr=-1.0),
        "head needs a rate": lambda: tune(lr=0.0),
        "decay is 0.0": lambda: tune(decay=0.0),
        "count is 9": lambda: thaw(model, 9),
        "expected a body and a head": lambda: layers(nn.Sequential(nn.Linear(2, 2))),
        "patience is 0": lambda: EarlyStopping(model, 0),
        "the dev score is nan": lambda: EarlyStopping(model).update(float("nan")),
        "no score yet": lambda: EarlyStopping(model).restore(),
        "no linear `head`": lambda: replace_head(nn.Linear(2, 2), 3),
        "are not among": lambda: number_labels(["hat"], ["bag"]),
        "stands twice": lambda: number_labels(["bag"], ["bag", "bag"]),
    }


@pytest.mark.parametrize("words", list(refusals(load_images("digits"), Path(tempfile.mkdtemp()))))
def test_bad_input_gets_one_sentence(digits, tmp_path, words):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        refusals(digits, tmp_path)[words]()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("width, plain", [(4, True), (8, False)])
def test_a_narrow_residual_net_reads_colour_pictures_in_the_plain_order(width, plain):
    """PyTorch's kernel for AVX2 writes beyond its memory where a strided 1 × 1 convolution reads
    fewer than 8 channels and the pictures or the weights are channels last."""
    seen, model = [], ResNet(channels=3, widths=(width, 8), depths=(1, 1))
    model.to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x, y = torch.randint(256, (32, 3, 28, 28), dtype=torch.uint8), torch.arange(32) % 10
    finetune(model, x, y, Augment(), steps=1, lr=1e-3, batch_size=32)
    for t in [*seen, *(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))]:
        order = torch.contiguous_format if plain else torch.channels_last
        assert t.is_contiguous(memory_format=order)


# The recipe ---------------------------------------------------------------------------------------


def test_the_recipe_writes_weights_and_a_card(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(resnet_fashion, "load_images", lambda: digits)
    monkeypatch.setattr(
        resnet_fashion,
        "compare_arms",
        partial(resnet_fashion.compare_arms, steps=2, batch_size=8, seeds=range(1)),
    )
    monkeypatch.setattr(resnet_fashion, "tune_photos", lambda data, arm, seed: 0.5)
    path = resnet_fashion.make(
        "net",
        tmp_path,
        seeds=[0],
        rates=[1e-3],
        steps=2,
        arms=["from scratch", "gradual"],
        labels=20,
    )
    card = json.loads(path.with_suffix(".json").read_text())
    few = card["metrics"]["few_labels"]
    assert (
        card["classes"] == list(digits.classes)
        and len(few["scores"]["gradual"]) == 1
        and set(few["rates"]) == {"from scratch", "gradual"}
    )
    assert len(card["metrics"]["all_labels"]["seconds"]["pretrained"]) == 1 and set(
        card["metrics"]["photos"]
    ) == set(PHOTO_ARMS)
    load_weights("net", folder=tmp_path)


def test_the_shipped_record_holds_what_the_lesson_promises():
    card = read_card("resnet_fashion")
    every, few, photos = (card["metrics"][key] for key in ("all_labels", "few_labels", "photos"))

    def mean(values):
        return sum(values) / len(values)

    assert all(len(row) >= 3 for row in every["scores"].values())
    assert (
        min(every["scores"]["pretrained"]) >= 0.92
        and min(every["scores"]["pretrained"]) > max(every["scores"]["from scratch"]) + 0.01
    )
    control = mean(few["scores"]["from scratch"])
    assert set(few["scores"]) == set(ARMS) and all(len(row) == 5 for row in few["scores"].values())
    assert all(
        mean(row) > control + 0.04 for arm, row in few["scores"].items() if arm != "from scratch"
    )
    assert set(photos) == set(PHOTO_ARMS) and min(photos["head only"]) > max(photos["as printed"])
    assert (
        mean(photos["head only"])
        > mean(photos["as printed"]) + 0.1
        > mean(photos["with care, same rate"]) + 0.2
    )


def test_the_shipped_weights_score_what_their_card_says():
    data, card = load_images(), read_card("resnet_fashion")
    right = (
        predict(
            load_weights("resnet_fashion"), data.test_images[:2000], transform=data.floats
        ).argmax(1)
        == data.test_labels[:2000]
    )
    assert (
        abs(right.float().mean().item() - card["metrics"]["all_labels"]["scores"]["pretrained"][0])
        < 0.015
    )


@pytest.mark.parametrize("change", ["LoRA", "adapter"])
def test_what_stands_beside_a_frozen_base_learns_and_the_base_does_not(change):
    from foundation.finetuning.adapters import add_adapters
    from foundation.finetuning.lora import add_lora
    from foundation.models.vit import ViT

    torch.manual_seed(0)
    net = ViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2, channels=1, classes=3)
    if change == "LoRA":
        add_lora(net, 2, train=["head"])
    else:
        add_adapters(net, 2, train=["head"])
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    pictures = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
    plan = dict(steps=4, lr=1e-2, batch_size=6)
    finetune(net, pictures, torch.arange(12) % 3, Augment(mean=0.5, std=0.5), **plan)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= learns and moved > {"head.weight", "head.bias"}
    assert {name for name, p in net.named_parameters() if p.requires_grad} == learns
    with pytest.raises(ValueError, match="keeps its base frozen"):
        finetune(net, pictures, torch.arange(12) % 3, Augment(), gradual=True, **plan)
