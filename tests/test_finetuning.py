"Fine-tuning beyond what its lesson shows: modes, frozen layers, groups, early stopping, leaks, bad input."
import copy
import json
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.core.basics import freeze, unfreeze
from foundation.data.augment import Augment
from foundation.data.batches import augmented
from foundation.data.images import few_labels, load_images
from foundation.evaluation.probes import fine_tune
from foundation.evaluation.scores import predict
from foundation.finetuning import loop
from foundation.finetuning.loop import (
    ARMS, PHOTO_ARMS, Best, ImageDataset, check_disjoint, check_labels, evaluate, finetune, frozen_norms, layer_groups, layers,
    load_vgg, number_labels, read_image, replace_head, thaw, thawed, train_epoch)
from foundation.models.bert import BERT
from foundation.models.convnets import VGG, ConvNet, EfficientNetLite, ResNet
from foundation.models.pretrained import load_weights, read_card, save_weights
from foundation.models.vit import ViT


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def small(seed=0):
    torch.manual_seed(seed)
    return ResNet(widths=(8, 16), depths=(1, 1))


def dataset(digits, start=0, end=64):
    return ImageDataset(digits.train_images[start:end], digits.train_labels[start:end], lambda image: image.float() / 255)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


# Modes ----------------------------------------------------------------------------------------------------------------


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
    assert evaluate(model, part, 16) == (logits.argmax(1) == digits.train_labels[:33]).sum().item() / 33


# Frozen ---------------------------------------------------------------------------------------------------------------


def test_a_frozen_body_keeps_weights_and_statistics_bit_for_bit(digits):
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before = state(model)
    finetune(model, digits.train_images[i], digits.train_labels[i], Augment(), steps=3, lr=0.0, head_lr=1e-2)
    assert set(changed(before, model)) == {"head.weight", "head.bias"}


def test_without_frozen_norms_the_statistics_move(digits, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(loop, "frozen_norms", nullcontext)
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before = state(model)
    finetune(model, digits.train_images[i], digits.train_labels[i], Augment(), steps=3, lr=0.0, head_lr=1e-2)
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

    finetune(model, digits.train_images[i], digits.train_labels[i], Augment(), steps=16, lr=1e-3, gradual=True, each=look)
    assert all(name.startswith("head") for name in seen[0])
    assert any(name.startswith("body.0") for name in seen[15]) and not any(name.startswith("body.0") for name in seen[3])


# Layers and their rates -----------------------------------------------------------------------------------------------


def models():
    import torchvision

    return [small(), ConvNet(), VGG(widths=(4, 8), depths=(1, 2)), VGG(widths=(4,) * 12, depths=(1,) * 12), ViT(depth=2), ViT(depth=2, pool="class"),
            BERT(vocab_size=50, context=8, dim=16, depth=2, heads=2), EfficientNetLite(), torchvision.models.vgg11_bn(num_classes=10)]


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_every_parameter_has_exactly_one_rate(model):
    groups = layer_groups(model, 1e-3, 0.5, 1e-2)
    ours = [id(p) for group in groups for p in group["params"]]
    assert len(ours) == len(set(ours)) and set(ours) == {id(p) for p in model.parameters()}
    rates = [group["lr"] for group in groups]
    assert rates[0] == 1e-2 and rates[1:] == [1e-3 * 0.5**depth for depth in range(len(groups) - 1)]
    torch.optim.AdamW(groups)  # refuses a parameter that stands twice


def rates_of(model, part):
    rate = {id(p): group["lr"] for group in layer_groups(model, 1.0, 0.1, 7.0) for p in group["params"]}
    return {round(rate[id(p)], 9) for p in part.parameters()}


def test_the_head_is_fast_and_the_stem_slow():
    model = small()
    assert rates_of(model, model.head) == {7.0} and rates_of(model, model.body[-1]) == {1.0} and rates_of(model, model.body[0]) == {0.01}


def test_rates_in_the_wrong_order_are_caught(monkeypatch):
    model, right = small(), loop.layers
    order = lambda parts: dict([*reversed(list(parts.items())[:-1]), list(parts.items())[-1]])
    monkeypatch.setattr(loop, "layers", lambda model: order(right(model)))  # the stem next to the head
    assert rates_of(model, model.head) == {7.0} and rates_of(model, model.body[-1]) != {1.0} and rates_of(model, model.body[0]) != {0.01}


def test_an_optimizer_moves_each_layer_at_its_own_rate():
    model = small()
    opt = torch.optim.SGD(layer_groups(model, 1e-2, 0.1, 0.5))
    before = state(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    moved = {name: (before[name] - p).mean().item() for name, p in model.named_parameters()}
    assert moved["head.weight"] == pytest.approx(0.5, rel=1e-4)
    assert all(moved[name] == pytest.approx(1e-2, rel=1e-3) for name in moved if name.startswith("body.2"))
    assert all(moved[name] == pytest.approx(1e-4, rel=0.05) for name in moved if name.startswith("body.0"))


@given(steps=st.integers(1, 200), count=st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_layers_open_one_way_and_all_are_open_in_the_second_half(steps, count):
    opened = [thawed(n, steps, count) for n in range(steps)]
    assert opened[0] == 1 and opened == sorted(opened) and max(opened) <= count
    assert all(n == count for n in opened[(steps + 1) // 2 + 1 :])


def test_thaw_opens_the_last_layers_and_no_others():
    model = small()
    assert thaw(model, 1) == ["head"] and not any(p.requires_grad for p in model.body.parameters())
    assert len(thaw(model, len(layers(model)))) == len(layers(model)) and all(p.requires_grad for p in model.parameters())


# The protocol ---------------------------------------------------------------------------------------------------------


def test_finetune_is_the_protocol_of_the_probes(digits):
    i = few_labels(digits.train_labels, 60, 0)
    x, y = digits.train_images[i], digits.train_labels[i]
    ours, theirs = small(), small()
    finetune(ours, x, y, Augment(), steps=6, lr=1e-3, batch_size=32, seed=3)
    batches = islice(augmented(x, y, augment=Augment(), batch_size=32, seed=3), 6)
    fine_tune(theirs, batches, steps=6, lr=1e-3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_finetune_is_repeatable(digits):
    i = few_labels(digits.train_labels, 60, 0)
    runs = [finetune(small(), digits.train_images[i], digits.train_labels[i], Augment(), steps=4, lr=1e-3, decay=0.5, seed=1) for _ in range(2)]
    assert torch.equal(*runs)


def test_one_example_left_over_is_no_batch(digits):
    model, sizes = small(), []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    part = dataset(digits, 0, 65)
    train_epoch(model, part, 32, torch.optim.SGD(model.parameters(), lr=0.0))
    assert sizes == [32, 32]


# Early stopping -------------------------------------------------------------------------------------------------------


def test_the_best_weights_come_back_and_not_the_last():
    model = small()
    best, kept = Best(model, patience=2), None
    for score, stop in ((0.3, False), (0.8, False), (0.8, False), (0.7, True)):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 1
        if score == 0.8 and kept is None:
            kept = copy.deepcopy(model.state_dict())
        assert best.update(score) is stop
    last = state(model)
    best.restore()
    assert best.epoch == 2 and all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert changed(last, model) and any("running" in name for name in changed(last, model))


def test_keeping_the_last_weights_is_caught():
    class Last(Best):
        def update(self, score):
            self.score = -1.0  # every score looks like the best
            return super().update(score)

    kept = {}
    for kind in (Best, Last):
        model = nn.Linear(1, 1)
        best = kind(model, patience=2)
        for score in (0.3, 0.8, 0.7):
            nn.init.constant_(model.weight, score)
            best.update(score)
        kept[kind] = round(best.restore().weight.item(), 2)
    assert kept == {Best: 0.8, Last: 0.7}


def test_weights_kept_by_reference_are_caught():
    model = small()
    pointed = model.state_dict()
    first = pointed["head.weight"].clone()
    with torch.no_grad():
        model.head.weight += 1
    assert not torch.equal(pointed["head.weight"], first)


# Real weights ---------------------------------------------------------------------------------------------------------


def test_vgg_is_taken_when_torchvision_has_it_and_missed_in_one_sentence(digits, tmp_path, monkeypatch):
    from torchvision import models, transforms

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg11-\w+\.pth, are not on this machine; run torchvision.models.vgg11\(weights='DEFAULT'\)"):
        load_vgg(10, "vgg11")
    with pytest.raises(ValueError, match="torchvision has no 'vgg12'; it has vgg11"):
        load_vgg(10, "vgg12")
    asked = []

    class Tiny(nn.Sequential):  # a narrow VGG
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1000))

    weights = models.VGG11_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / weights.url.rsplit("/", 1)[1]).touch()
    monkeypatch.setattr(models, "get_model", lambda name, weights: asked.append((name, weights)) or Tiny())
    model = load_vgg(10, "vgg11")
    assert asked == [("vgg11", weights)] and model.classifier[-1].out_features == 10
    colours = transforms.Compose([transforms.ConvertImageDtype(torch.float), transforms.Lambda(lambda x: x.expand(3, -1, -1))])
    part = ImageDataset(digits.train_images[:64], digits.train_labels[:64], colours)
    train_epoch(model, part, 16, torch.optim.AdamW(layer_groups(model, 1e-4, 0.8, 1e-3)))
    assert 0 <= evaluate(model, part, 16) <= 1


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_leak_is_found_by_content(digits, tmp_path):
    from PIL import Image

    x = digits.train_images
    assert check_disjoint(train=x[:20], dev=x[20:30], test=dataset(digits, 30, 40)) == 40
    with pytest.raises(ValueError, match=r"train and dev share 1 images, such as train\[3\] = dev\[0\]"):
        check_disjoint(train=x[:20], dev=[x[3].numpy().copy()])
    for name in ("a.png", "b.png"):
        Image.fromarray(x[0, 0].numpy()).save(tmp_path / name)
    with pytest.raises(ValueError, match="share 1 images"):
        check_disjoint(train=[tmp_path / "a.png"], dev=[tmp_path / "b.png"])
    assert check_disjoint(train=[np.zeros((2, 8), np.uint8)], dev=[np.zeros((4, 4), np.uint8)]) == 2  # same bytes, another shape


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
    part = ImageDataset([tmp_path / "x.png"] * 3, [0, 1, 0], lambda path: read_image(path).float() / 255)
    assert 0 <= evaluate(VGG(2, 3, (4,), (1,)), part, 2) <= 1


# Bad input ------------------------------------------------------------------------------------------------------------


def refusals(digits, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n\x1a\n")
    model, opt = small(), torch.optim.SGD(small().parameters())
    epoch = lambda images, labels: train_epoch(model, ImageDataset(images, labels, lambda i: i.float()), 4, opt)
    floats, i = torch.rand(10, 1, 8, 8), few_labels(digits.train_labels, 50, 0)
    tune = lambda y=digits.train_labels[i], **options: finetune(
        model, digits.train_images[i], y, Augment(), **dict(steps=1, lr=1e-3) | options)
    return {
        "labels are 1 to 10": lambda: epoch(floats, torch.arange(1, 11)),
        "labels are -1 to 8": lambda: epoch(floats, torch.arange(-1, 9)),
        "no training example has the labels [9]": lambda: epoch(floats[:9], torch.arange(9)),
        "labels are no numbers": lambda: check_labels(["a"], 2),
        "labels are torch.float32": lambda: check_labels(torch.rand(3), 2),
        "of shape (50, 1); expected one row": lambda: tune(digits.train_labels[i][:, None]),
        "labels run from 11 to 11": lambda: evaluate(model, ImageDataset(floats[:2], [11, 11]), 2),
        "there is no image gone": lambda: check_disjoint(train=[tmp_path / "gone"], dev=floats),
        "gradual unfreezing needs a rate": lambda: tune(lr=0.0, head_lr=1e-2, gradual=True),
        "one size": lambda: evaluate(model, ImageDataset([torch.zeros(1, 8, 8), torch.zeros(1, 9, 9)], [0, 1]), 2),
        "expected float images (b, 1, h, w)": lambda: evaluate(model, ImageDataset(torch.rand(2, 3, 8, 8), [0, 1]), 2),
        "an image is torch.uint8": lambda: evaluate(model, ImageDataset(digits.train_images[:2], [0, 1]), 2),
        "the data set is empty": lambda: evaluate(model, [], 2),
        "torn.png (8 bytes) cannot be read": lambda: read_image(torn),
        "there is no image gone.png": lambda: read_image(tmp_path / "gone.png"),
        "channels is 2": lambda: read_image(torn, 2),
        "lr=0.0": lambda: layer_groups(model, 0.0),
        "lr=nan": lambda: layer_groups(model, float("nan")),
        "decay=1.5": lambda: layer_groups(model, 1e-3, 1.5),
        "lr=-1.0": lambda: tune(lr=-1.0),
        "head needs a rate": lambda: tune(lr=0.0),
        "decay=0.0": lambda: tune(decay=0.0),
        "count is 9": lambda: thaw(model, 9),
        "expected a body and a head": lambda: layers(nn.Sequential(nn.Linear(2, 2))),
        "patience is 0": lambda: Best(model, 0),
        "the dev score is nan": lambda: Best(model).update(float("nan")),
        "no score yet": lambda: Best(model).restore(),
        "no linear `head`": lambda: replace_head(nn.Linear(2, 2), 3),
        "are not among": lambda: number_labels(["hat"], ["bag"]),
        "stands twice": lambda: number_labels(["bag"], ["bag", "bag"]),
    }


@pytest.mark.parametrize("words", list(refusals(load_images("digits"), Path(tempfile.mkdtemp()))))
def test_bad_input_gets_one_sentence(digits, tmp_path, words):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        refusals(digits, tmp_path)[words]()
    assert words in str(error.value) and "\n" not in str(error.value)


# The recipe -----------------------------------------------------------------------------------------------------------


def test_the_recipe_writes_weights_and_a_card(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_images", lambda: digits)
    monkeypatch.setattr(loop, "compare_arms", partial(loop.compare_arms, steps=2, batch_size=8, seeds=range(1)))
    monkeypatch.setattr(loop, "tune_photos", lambda data, arm, seed: 0.5)
    path = loop.make_weights("net", tmp_path, seeds=[0], rates=[1e-3], steps=2, arms=["from scratch", "gradual"], labels=20)
    card = json.loads(path.with_suffix(".json").read_text())
    few = card["metrics"]["few_labels"]
    assert card["classes"] == list(digits.classes) and len(few["scores"]["gradual"]) == 1 and set(few["rates"]) == {"from scratch", "gradual"}
    assert len(card["metrics"]["all_labels"]["seconds"]["pretrained"]) == 1 and set(card["metrics"]["photos"]) == set(PHOTO_ARMS)
    load_weights("net", folder=tmp_path)


def test_the_shipped_record_holds_what_the_lesson_promises():
    card = read_card("resnet_fashion")
    every, few, photos = (card["metrics"][key] for key in ("all_labels", "few_labels", "photos"))
    mean = lambda values: sum(values) / len(values)
    assert all(len(row) >= 3 for row in every["scores"].values())
    assert min(every["scores"]["pretrained"]) >= 0.92 and min(every["scores"]["pretrained"]) > max(every["scores"]["from scratch"]) + 0.01
    control = mean(few["scores"]["from scratch"])
    assert set(few["scores"]) == set(ARMS) and all(len(row) == 5 for row in few["scores"].values())
    assert all(mean(row) > control + 0.04 for arm, row in few["scores"].items() if arm != "from scratch")
    assert set(photos) == set(PHOTO_ARMS) and min(photos["head only"]) > max(photos["as printed"])
    assert mean(photos["head only"]) > mean(photos["as printed"]) + 0.1 > mean(photos["with care, same rate"]) + 0.2


def test_the_shipped_weights_score_what_their_card_says():
    data, card = load_images(), read_card("resnet_fashion")
    right = predict(load_weights("resnet_fashion"), data.test_images[:2000], transform=data.floats).argmax(1) == data.test_labels[:2000]
    assert abs(right.float().mean().item() - card["metrics"]["all_labels"]["scores"]["pretrained"][0]) < 0.015
