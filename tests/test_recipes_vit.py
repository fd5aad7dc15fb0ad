"The recipes of vit_mae, its decoder, vit_mae_short and vit_simclr_short"

import json
from dataclasses import replace

import pytest

import foundation.recipes.few_labels as few_labels
import foundation.recipes.vit_mae as vit_mae
import foundation.recipes.vit_short as vit_short
from foundation.data.images import load_images
from foundation.evaluation.comparison import Comparison
from foundation.models.card import read_card
from foundation.models.pretrained import load_weights
from foundation.models.vit import ViT
from foundation.pretraining.masked_image import MaskedAutoencoder


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


class Tiny(ViT):
    "As the recipes ask for it, but small"

    def __init__(self, **sizes):
        super().__init__(**sizes | dict(dim=16, depth=1))


def test_recipes_write_weights_and_cards_that_fit(digits, tmp_path, monkeypatch):
    images, labels = digits.train_images[:600], digits.train_labels[:600]
    few = replace(digits, train_images=images, train_labels=labels)
    brief = dict(counts=(50,), seeds=[0], steps=1)

    def short(function):
        return lambda *args, **options: function(*args, **options | brief)

    def compared(data):
        return Comparison.from_scores({"a": [0.5]})

    def judged(*args, seeds=3, **options):
        return dict(knn=0.5, probe=[0.5] * seeds)

    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / "cache"))
    for recipe in (vit_mae, vit_short):
        monkeypatch.setattr(recipe, "load_images", lambda: few)
        monkeypatch.setattr(recipe, "ViT", Tiny)
    monkeypatch.setattr(vit_short, "probe_features", judged)
    monkeypatch.setattr(vit_short, "label_efficiency", short(few_labels.label_efficiency))
    monkeypatch.setattr(vit_mae, "card_metrics", short(few_labels.card_metrics))
    monkeypatch.setattr(vit_mae, "compare_ratios", compared)
    vit_mae.make(epochs=1, folder=tmp_path)
    vit_short.make(epochs=1, folder=tmp_path)
    metrics = read_card("vit_mae", tmp_path)["metrics"]
    assert set(metrics["label_efficiency"]["fine-tuned"]) == {"50"}
    assert len(metrics["scratch_with_five_times_the_steps"]) == 1
    mae, simclr = (read_card(f"vit_{method}_short", tmp_path) for method in ("mae", "simclr"))
    assert mae["steps"] == simclr["steps"] == 2 and mae["sha256"] != simclr["sha256"]
    assert set(mae["metrics"]["linear_probe"]) == {"50", "100", "1000"}
    json.dumps(metrics)
    painted = dict(reconstruction=metrics["reconstruction"])
    assert read_card("vit_mae_decoder", tmp_path)["metrics"] == painted
    model = MaskedAutoencoder(load_weights("vit_mae", Tiny(), tmp_path))
    load_weights("vit_mae_decoder", model.decoder, tmp_path)


def test_ratios_are_compared_with_a_control(digits, monkeypatch):
    def told(encoder, *args, **options):
        return dict(knn=encoder.position.sum().item())

    monkeypatch.setattr(vit_mae, "probe_features", told)
    result = vit_mae.compare_ratios(digits, ratios=(0.5,), seeds=[0], steps=1)
    assert list(result.scores) == ["random weights", "50% hidden", "75% hidden, plain pixels"]
    assert len({result.mean(arm) for arm in result.scores}) == 3


def test_methods_that_nobody_knows_are_refused():
    with pytest.raises(ValueError, match="'mae' and 'simclr'"):
        vit_short.make(methods=["vae"])
