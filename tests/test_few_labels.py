"Few labels: studies of arms, probes and training of all weights, the metrics of a card"

from dataclasses import replace

import pytest
import torch
from torch import nn

from foundation.core.checks import complaint
from foundation.data.images import load_images, split
from foundation.data.tasks import few_labels
from foundation.evaluation import probes
from foundation.models.convnets import ConvNet
from foundation.recipes.few_labels import (
    card_metrics,
    curve_scores,
    label_efficiency,
    label_studies,
    probe_features,
    train_all,
)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


class Headed(nn.Module):
    "The smallest model with a head"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x))


def table():
    luck = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=luck), torch.randint(3, (40,), generator=luck)


# Training -----------------------------------------------------------------------------------------


def test_all_weights_move_at_one_rate():
    old, new = Headed(), train_all(Headed(), [table()], steps=1, lr=1e-3)
    for part in ("body", "head"):
        gap = (getattr(new, part).bias - getattr(old, part).bias).abs().max().item()
        assert gap == pytest.approx(1e-3, rel=0.06)  # Adam's first step is as long as the rate


def test_a_run_is_adamw_with_warmup_cosine_and_clipping():
    ours, theirs = Headed(), Headed()
    train_all(ours, [table()] * 20, steps=20, lr=3e-3)
    groups = [*theirs.head.parameters()], [*theirs.body.parameters()]
    opt = torch.optim.AdamW([dict(params=g) for g in groups], lr=3e-3, weight_decay=0.05)
    factors = torch.tensor([1 / 2, 1.0])
    rest = torch.arange(18) / 18
    factors = torch.cat([factors, 0.5 * (1 + torch.cos(torch.pi * rest))])
    x, y = table()
    for factor in factors:
        for group in opt.param_groups:
            group["lr"] = 3e-3 * factor.item()
        opt.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        opt.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "model, options, error, says",
    [
        (nn.ReLU(), dict(lr=0.1), TypeError, "has no linear `head`"),
        (Headed(), dict(lr=0.0), ValueError, "lr is 0.0"),
        (Headed(), dict(lr=0.1, steps=0), ValueError, "steps is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, options, error, says):
    with pytest.raises(error, match=says):
        train_all(model, [table()], **dict(steps=1) | options)


# Studies ------------------------------------------------------------------------------------------


def test_settings_are_picked_on_a_draw_that_does_not_count():
    asked = []

    def arm(labels, seed, setting, part):
        asked.append((labels, seed, setting, part))
        return setting if part == "dev" else -setting

    settings = torch.tensor([0.1, 0.3, 0.2], dtype=torch.double)
    found = label_studies({"a": arm}, {"a": settings}, [10], range(2), draws=(999,))
    assert found[10]["a"].tolist() == [-0.3, -0.3]  # best on held-out data, worst on the test
    assert [a[1:] for a in asked[:3]] == [(999, s, "dev") for s in settings.tolist()]
    assert asked[3:] == [(10, seed, 0.3, "test") for seed in range(2)]


@pytest.mark.parametrize(
    "arms, choices, counts, options, says",
    [
        ({"a": min}, {"b": (1.0,)}, [5], {}, "expected"),
        ({"a": min}, {}, [5], {}, "arms are"),
        ({"a": min}, {"a": ()}, [5], {}, "may pick from"),
        ({"a": min}, {"a": (1.0,)}, [0], {}, "one of the counts is 0"),
        ({"a": min}, {"a": (1.0,)}, [5], dict(draws=(0,)), "seed 0 is also a draw"),
    ],
)
def test_studies_that_cannot_be_are_refused_before_the_first_run(
    arms, choices, counts, options, says
):
    assert says in complaint(label_studies, arms, choices, counts, **options)


def test_a_curve_of_probes_is_a_loop_over_draws_with_settings_picked_on_held_out_pictures(digits):
    test_labels = (digits.test_labels + 1) % 10  # a test that likes the worst setting best
    data, settings = replace(digits, test_labels=test_labels), (1e-2, 1e4)
    plan = dict(counts=(30,), seeds=range(3), choices={"pixels, probe": settings})
    curve = label_efficiency(ConvNet(), ConvNet, data, **plan)

    def pixels(images):
        return data.floats(images).flatten(1)

    pool, dev = split(len(data.train_labels), (0.9, 0.1), seed=99)

    def score(seed, l2, images, labels):
        i = pool[few_labels(data.train_labels[pool], 30, seed)]
        x, y = pixels(data.train_images[i]), data.train_labels[i]
        return probes.linear_probe(x, y, pixels(images), labels, l2)

    held_out = data.train_images[dev], data.train_labels[dev]
    best = max(settings, key=lambda l2: score(1000, l2, *held_out))
    by_hand = [score(seed, best, data.test_images, test_labels) for seed in range(3)]
    worst = [score(0, l2, data.test_images, test_labels) for l2 in settings]
    assert curve[30]["pixels, probe"].tolist() == pytest.approx(by_hand)
    assert len(set(by_hand)) > 1 and worst[0] != worst[1] and score(0, best, *held_out) > 0.5


def test_arms_that_nobody_knows_are_refused(digits):
    says = complaint(label_efficiency, ConvNet(), ConvNet, digits, choices={"distilled": (1.0,)})
    assert "distilled" in says and "pixels, probe" in says
    assert "arms are" in complaint(label_efficiency, ConvNet(), ConvNet, digits, choices={})


def net(seed=0):
    torch.manual_seed(seed)
    return ConvNet(widths=(4, 8, 8))


def test_only_the_named_arms_run_and_each_picks_its_option(digits):
    small = replace(
        digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100]
    )
    arms = {"pixels, probe": (1.0,), "fine-tuned": (1e-3, 1e-9), "from scratch": (3e-3,)}
    encoder = net()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    curve = label_efficiency(
        encoder, net, small, counts=(20, 40), seeds=range(2), steps=3, choices=arms
    )
    assert (
        list(curve) == [20, 40]
        and list(curve[20].scores) == list(arms)
        and len(curve[40]["fine-tuned"]) == 2
    )
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_card_holds_every_score_as_json_can(digits):
    small = replace(
        digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100]
    )
    scores = card_metrics(net(), net, small, counts=(50,), steps=2)
    assert {"knn", "knn_pixels", "knn_random_weights", "linear_probe_all_labels"} | {
        f"linear_probe_{n}_labels_three_stages" for n in ("all", 100)
    } <= scores.keys()
    assert (
        len(scores["linear_probe_100_labels"]) == 5
        and scores["knn"] == scores["knn_random_weights"]
    )
    assert (
        all(len(rows["50"]) == 3 for rows in scores["label_efficiency"].values())
        and len(scores["label_efficiency"]) == 5
    )


# Features and cards -------------------------------------------------------------------------------


def test_features_are_probed_as_a_loop_would(digits):
    encoder = net()
    found = probe_features(encoder, digits, labels=40, seeds=2, bank=300)
    train = probes.encode_all(encoder, digits.floats(digits.train_images))
    test, y = probes.encode_all(encoder, digits.floats(digits.test_images)), digits.train_labels
    knn = probes.knn_accuracy(train[:300], y[:300], test, digits.test_labels)
    assert found["knn"] == pytest.approx(knn, abs=0.006)
    for seed, score in enumerate(found["probe"]):
        i = few_labels(y, 40, seed)
        probe = probes.linear_probe(train[i], y[i], test, digits.test_labels, 1.0)
        assert score == pytest.approx(probe, abs=0.006)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(labels=0), "labels is 0"),
        (dict(seeds=0), "seeds is 0"),
        (dict(bank=0), "bank is 0"),
        (dict(encode=lambda model, x: x), "expected features"),
    ],
)
def test_what_cannot_be_probed_is_refused(digits, options, says):
    assert says in complaint(probe_features, net(), digits, **options)


@pytest.mark.parametrize(
    "curve, says", [({5: None}, "expected a Comparison"), (None, "curve is None")]
)
def test_what_is_no_curve_is_not_listed(curve, says):
    assert says in complaint(curve_scores, curve)
