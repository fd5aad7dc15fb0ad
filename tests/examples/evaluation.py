"One sound call for each public name of foundation.evaluation, for the laws and the fuzz"

import functools

import torch
from torch import nn

from foundation.data.images import ImageSet
from foundation.evaluation import comparison, intervals, probes, scores, study
from foundation.models.convnets import ConvNet


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(n=8, k=3):
    return torch.randn(n, k, generator=luck())


def labels(n=8, k=3):
    return torch.arange(n) % k


def features(n=8, d=4, seed=0):
    return torch.randn(n, d, generator=luck(seed)) + torch.arange(n)[:, None] % 3


def net():
    torch.manual_seed(0)
    return ConvNet(classes=3, widths=(4, 4))


@functools.cache
def pictures():
    images = torch.randint(0, 256, (66, 1, 8, 8), dtype=torch.uint8, generator=luck())
    y = torch.arange(66) % 3
    parts = images[:48], y[:48], images[48:], y[48:]
    return ImageSet(*parts, ("a", "b", "c"), "noise", "here", 0.5, 0.25)


def two():
    return {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.65, 0.8]}


def curve():
    return {n: comparison.Comparison.from_scores(two()) for n in (10, 100)}


def arms():
    return {"a": lambda seed: float(seed), "b": lambda seed: 2.0 * seed}


def counting():
    return {"a": lambda count, seed: float(count + seed), "b": lambda count, seed: 1.0}


EXAMPLES = {
    "evaluation.scores.in_batches": lambda: (
        scores.in_batches,
        dict(
            fn=torch.sin,
            model=nn.Identity(),
            images=features(),
            batch_size=3,
            precision="fp32",
            transform=None,
        ),
    ),
    "evaluation.scores.predict": lambda: (
        scores.predict,
        dict(
            model=nn.Linear(4, 3), images=features(), batch_size=3, precision="fp32", transform=None
        ),
    ),
    "evaluation.scores.accuracy": lambda: (scores.accuracy, dict(logits=logits(), labels=labels())),
    "evaluation.scores.top_k_accuracy": lambda: (
        scores.top_k_accuracy,
        dict(logits=logits(), labels=labels(), top=2),
    ),
    "evaluation.scores.wilson_interval": lambda: (
        scores.wilson_interval,
        dict(correct=3, total=7, level=0.95),
    ),
    "evaluation.scores.confusion": lambda: (
        scores.confusion,
        dict(logits=logits(), labels=labels()),
    ),
    "evaluation.scores.macro_f1": lambda: (scores.macro_f1, dict(logits=logits(), labels=labels())),
    "evaluation.scores.reliability": lambda: (
        scores.reliability,
        dict(logits=logits(), labels=labels(), bins=5),
    ),
    "evaluation.scores.expected_calibration_error": lambda: (
        scores.expected_calibration_error,
        dict(logits=logits(), labels=labels(), bins=5),
    ),
    "evaluation.scores.fit_temperature": lambda: (
        scores.fit_temperature,
        dict(logits=logits(), labels=labels()),
    ),
    "evaluation.scores.perplexity": lambda: (
        scores.perplexity,
        dict(logits=logits(), labels=labels()),
    ),
    "evaluation.probes.encode_all": lambda: (
        probes.encode_all,
        dict(
            model=net(),
            images=torch.rand(5, 1, 8, 8, generator=luck()),
            batch_size=2,
            precision="fp32",
            transform=None,
        ),
    ),
    "evaluation.probes.encode_stages": lambda: (
        probes.encode_stages,
        dict(model=net(), images=torch.rand(5, 1, 8, 8, generator=luck()), stages=2, batch_size=2),
    ),
    "evaluation.probes.knn_votes": lambda: (
        probes.knn_votes,
        dict(
            train_features=features(),
            train_labels=labels(),
            features=features(5, seed=1),
            k=3,
            temperature=0.1,
        ),
    ),
    "evaluation.probes.knn_accuracy": lambda: (
        probes.knn_accuracy,
        dict(
            train_features=features(),
            train_labels=labels(),
            test_features=features(5, seed=1),
            test_labels=labels(5),
            k=3,
            temperature=0.1,
        ),
    ),
    "evaluation.probes.LinearProbe.__call__": lambda: (
        probes.LinearProbe(torch.zeros(4), torch.ones(4), torch.ones(3, 4), torch.zeros(3)),
        dict(features=features()),
    ),
    "evaluation.probes.fit_linear": lambda: (
        probes.fit_linear,
        dict(features=features(), labels=labels(), l2=0.1, steps=20),
    ),
    "evaluation.probes.linear_probe": lambda: (
        probes.linear_probe,
        dict(
            train_features=features(),
            train_labels=labels(),
            test_features=features(5, seed=1),
            test_labels=labels(5),
            l2=0.1,
        ),
    ),
    "evaluation.probes.pca": lambda: (probes.pca, dict(points=features(), dims=2)),
    "evaluation.probes.fit_head": lambda: (
        probes.fit_head,
        dict(
            model=net(), images=torch.rand(9, 1, 8, 8, generator=luck()), labels=labels(9), l2=1.0
        ),
    ),
    "evaluation.intervals.check_row": lambda: (
        intervals.check_row,
        dict(values=[0.5, 0.7], name="scores"),
    ),
    "evaluation.intervals.t_interval": lambda: (
        intervals.t_interval,
        dict(values=[0.5, 0.7, 0.6], level=0.95),
    ),
    "evaluation.intervals.bootstrap_interval": lambda: (
        intervals.bootstrap_interval,
        dict(values=[0.5, 0.7, 0.6], level=0.95, resamples=100, seed=0),
    ),
    "evaluation.comparison.Comparison": lambda: (
        comparison.Comparison,
        dict(scores=two(), seeds=(0, 1, 2), level=0.95, method="t", lower_is_better=False),
    ),
    "evaluation.comparison.Comparison.from_scores": lambda: (
        comparison.Comparison.from_scores,
        dict(scores=two(), seeds=[0, 1, 2], level=0.9, method="bootstrap", lower_is_better=True),
    ),
    "evaluation.comparison.Comparison.mean": lambda: (curve()[10].mean, dict(arm="a")),
    "evaluation.comparison.Comparison.interval": lambda: (curve()[10].interval, dict(arm="a")),
    "evaluation.comparison.Comparison.difference": lambda: (
        curve()[10].difference,
        dict(a="b", b="a", tries=2),
    ),
    "evaluation.comparison.Comparison.winner": lambda: (
        curve()[10].winner,
        dict(a="b", b="a", tries=2),
    ),
    "evaluation.comparison.Comparison.verdict": lambda: (
        curve()[10].verdict,
        dict(a="b", b="a", tries=2),
    ),
    "evaluation.comparison.Comparison.plot": lambda: (
        curve()[10].plot,
        dict(alt="two arms", title="two"),
    ),
    "evaluation.comparison.compare": lambda: (
        comparison.compare,
        dict(arms=arms(), seeds=[0, 1, 2], progress=False, level=0.95),
    ),
    "evaluation.comparison.label_curve": lambda: (
        comparison.label_curve,
        dict(arms=counting(), counts=[5, 10], seeds=[0, 1], progress=False),
    ),
    "evaluation.comparison.plot_label_curve": lambda: (
        comparison.plot_label_curve,
        dict(curve=curve(), alt="two arms", title="two", ylabel="accuracy"),
    ),
}
EXAMPLES |= {
    "evaluation.study.Study": lambda: (
        study.Study,
        dict(arms=dict(a=lambda *_: 0.5), settings=dict(a=(0.1, 1.0))),
    ),
}

SKIP = {
    "evaluation.scores.Reliability": "a record that `reliability` fills",
    "evaluation.probes.LinearProbe": "a record that `fit_linear` fills; its call is an example",
    "evaluation.comparison.Difference": "a record that `difference` fills",
}
