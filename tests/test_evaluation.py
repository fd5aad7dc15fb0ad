"What the lessons on evaluation cannot say: properties over many inputs, interrupts, odd modules"

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit
from torch import nn
from torch.nn.utils import prune

from foundation.core.checks import complaint
from foundation.data.images import load_images
from foundation.evaluation import probes, scores
from foundation.evaluation.comparison import Comparison, compare, label_curve, plot_label_curve
from foundation.evaluation.intervals import bootstrap_interval, t_interval
from foundation.models.convnets import VGG, ConvNet

few = settings(max_examples=40, deadline=None)
finite = st.floats(-1e3, 1e3, allow_nan=False)
rows = st.lists(finite, min_size=2, max_size=12)
DIGITS = load_images("digits")


@pytest.fixture
def table():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=rng), torch.randint(5, (40,), generator=rng)


# scores -------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0.01, 0.999))
def test_wilson_lies_in_0_1_holds_the_estimate_and_is_symmetric(total, share, level):
    correct = round(share * total)
    low, high = scores.wilson_interval(correct, total, level)
    assert 0 <= low <= correct / total <= high <= 1
    mirror = scores.wilson_interval(total - correct, total, level)
    torch.testing.assert_close((1 - high, 1 - low), mirror, atol=1e-9, rtol=0)


@few
@given(st.integers(1, 40), st.integers(3, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_the_label_among_the_first_is_what_sorting_finds(n, k, top, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=rng)
    for logits in (torch.randn(n, k, generator=rng), torch.randint(3, (n, k), generator=rng)):
        logits = logits.double()  # the second ones with many ties
        first = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        want = (first == labels[:, None]).any(1).double().mean().item()
        assert scores.top_k_accuracy(logits, labels, top) == want


@few
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
def test_scores_agree_with_each_other(n, k, bins, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(n, k, generator=rng), torch.randint(k, (n,), generator=rng)
    table, seen = scores.confusion(logits, labels), scores.reliability(logits, labels, bins)
    assert (
        table.sum() == seen.count.sum() == n
        and 0 <= seen.gap <= 1
        and 0 <= scores.macro_f1(logits, labels) <= 1
    )
    right = scores.accuracy(logits, labels)
    torch.testing.assert_close(table.diag().sum().item() / n, right)
    torch.testing.assert_close((seen.accuracy * seen.count).nansum().item() / n, right)
    torch.testing.assert_close(scores.perplexity(torch.zeros(n, k), labels), float(k))


def test_predict_takes_any_batch_size_and_restores_each_module(table):
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4).eval(), nn.Dropout(0.5), nn.Linear(4, 3))
    modes = [m.training for m in net.modules()]
    one, many = (scores.predict(net, table[0], batch_size=size) for size in (7, 10**6))
    torch.testing.assert_close(one, many)
    assert (
        one.dtype == torch.float32
        and not one.requires_grad
        and modes == [m.training for m in net.modules()]
    )
    torch.testing.assert_close(
        scores.predict(net, table[0], precision="bf16"), one, atol=0.1, rtol=0.1
    )


def test_predict_restores_the_modes_after_an_error(table):
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
    with pytest.raises(RuntimeError):
        scores.predict(net, table[0])
    assert net.training and net[1].training and torch.is_grad_enabled()


def test_predict_works_for_a_model_without_parameters(table):
    torch.testing.assert_close(scores.predict(nn.Identity(), table[0]), table[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_to_the_device_of_the_model(table):
    net = nn.Linear(5, 3)
    here = scores.predict(net, table[0])
    torch.testing.assert_close(scores.predict(net.cuda(), table[0]), here)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(labels=torch.full((40,), 5)), ValueError, "0 to 4"),
        (dict(labels="01234" * 8), TypeError, "whole numbers"),
        (dict(labels=torch.full((40,), -1)), ValueError, "0 to 4"),
        (dict(labels=torch.rand(40)), TypeError, "whole numbers"),
        (dict(labels=[0.5] * 40), TypeError, "whole numbers"),
        (dict(labels=[5] * 40), ValueError, "0 to 4"),
        (dict(logits=[[0.0] * 5] * 40), TypeError, "tensor"),
        (dict(logits=torch.full((40, 5), -math.inf)), ValueError, "only -inf"),
        (dict(labels=torch.zeros(40, 1, dtype=torch.long)), ValueError, "expected"),
        (dict(logits=torch.randn(40)), ValueError, "(n, k)"),
        (dict(logits=torch.ones(40, 5, dtype=torch.long)), TypeError, "floats"),
        (dict(logits=torch.full((40, 5), math.nan)), ValueError, "NaN"),
        (
            dict(logits=torch.zeros(0, 5), labels=torch.zeros(0, dtype=torch.long)),
            ValueError,
            "at least one entry",
        ),
    ],
)
@pytest.mark.parametrize(
    "fn",
    [
        scores.accuracy,
        scores.confusion,
        scores.macro_f1,
        scores.reliability,
        scores.fit_temperature,
        scores.perplexity,
    ],
)
def test_bad_scores_are_refused_in_a_sentence(table, fn, change, error, says):
    given = dict(zip(("logits", "labels"), table)) | change
    with pytest.raises(
        (error, ValueError, TypeError) if fn is scores.perplexity else error
    ) as caught:
        fn(**given)
    assert fn is scores.perplexity or says in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("args", [(3, 2), (-1, 5), (0, 0)])
def test_impossible_counts_are_refused(args):
    with pytest.raises(ValueError):
        scores.wilson_interval(*args)


@pytest.mark.parametrize("level", [0, 1, 1.5, -1, math.nan])
def test_impossible_levels_are_refused(level):
    for make in (
        lambda: scores.wilson_interval(1, 2, level),
        lambda: t_interval([1, 2], level),
        lambda: bootstrap_interval([1, 2], level),
        lambda: Comparison.from_scores({"a": [1, 2]}, level=level),
    ):
        with pytest.raises(ValueError, match="level"):
            make()


# labels of any whole-number type, half precision, edges -------------------------------------------

KINDS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    np.int8,
    np.uint16,
    np.int32,
    list,
    tuple,
]


def as_kind(labels, kind):
    "The same labels in another dress"
    if kind in (list, tuple):
        return kind(labels.tolist())
    return labels.to(kind) if isinstance(kind, torch.dtype) else labels.numpy().astype(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_whole_number_type_give_the_same_scores(kind):
    rng = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(200, 100, generator=rng), torch.randint(100, (200,), generator=rng)
    logits[:80] += 5 * F.one_hot(labels[:80], 100)
    other = as_kind(labels, kind)
    assert torch.equal(scores.confusion(logits, other), scores.confusion(logits, labels))
    for fn in (
        scores.accuracy,
        scores.macro_f1,
        scores.expected_calibration_error,
        scores.fit_temperature,
        scores.perplexity,
    ):
        assert fn(logits, other) == fn(logits, labels)
    few, seen = logits[:40, :6], labels[:40] % 6
    small = as_kind(seen, kind)
    assert torch.equal(probes.knn_votes(few, small, few, 5), probes.knn_votes(few, seen, few, 5))
    assert probes.knn_accuracy(few, small, few, small, 5) == probes.knn_accuracy(
        few, seen, few, seen, 5
    )
    assert torch.equal(probes.fit_linear(few, small).weight, probes.fit_linear(few, seen).weight)
    assert probes.linear_probe(few, small, few, small) == probes.linear_probe(few, seen, few, seen)


def test_the_table_agrees_with_the_accuracy_where_a_byte_would_wrap():
    logits, labels = (
        F.one_hot(torch.tensor([16]), 17).float(),
        torch.tensor([16], dtype=torch.uint8),
    )
    assert scores.confusion(logits, labels).nonzero().tolist() == [[16, 16]]
    assert scores.macro_f1(logits, labels) == scores.accuracy(logits, labels) == 1


def test_rows_of_the_table_are_true_classes_and_columns_guesses():
    logits = torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 2, 1]])
    assert scores.confusion(logits, [0, 1, 1]).tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_macro_f1_needs_no_table():
    k = 100_000
    labels = torch.tensor([0, 7, k - 1, k - 1])
    logits = torch.zeros(4, k).scatter(1, torch.tensor([0, 7, k - 1, 5])[:, None], 1.0)
    torch.testing.assert_close(scores.macro_f1(logits, labels), (1 + 1 + 2 / 3 + 0) / 4)
    assert "from 1 to 10,000" in complaint(scores.confusion, logits, labels)


@few
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10**6))
def test_macro_f1_is_what_the_table_says(n, k, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(n, k, generator=rng), torch.randint(k, (n,), generator=rng)
    table = scores.confusion(logits, labels)
    sizes = table.sum(0) + table.sum(1)
    assert (
        scores.macro_f1(logits, labels)
        == (2 * table.diag() / sizes)[sizes > 0].double().mean().item()
    )


@pytest.mark.parametrize(
    "loss, value",
    [
        (1000.0, math.inf),
        (math.inf, math.inf),
        (0, 1.0),
        (-math.inf, 0.0),
        (np.float32(2), math.exp(2)),
        (torch.tensor(2.0), math.exp(2)),
    ],
)
def test_perplexity_of_a_loss_ends_in_infinity_as_that_of_logits(loss, value):
    assert scores.perplexity(loss) == pytest.approx(value)
    assert scores.perplexity(torch.tensor([[0.0, 5000.0]]), [0]) == math.inf


@pytest.mark.parametrize("loss", [math.nan, None, "2", torch.zeros(2, 3), True])
def test_perplexity_of_what_is_no_loss_is_refused(loss):
    assert "the mean loss is" in complaint(scores.perplexity, loss)


@few
@given(st.integers(5, 60), st.integers(2, 6), st.floats(0.1, 30), st.integers(0, 10**6))
def test_the_temperature_is_the_minimum_of_the_loss(n, k, size, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(n, k, generator=rng, dtype=torch.float64)
    labels = torch.randint(k, (n,), generator=rng)

    def loss(log_t):
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    limits = math.log(0.01), math.log(100)
    theirs = minimize_scalar(loss, bounds=limits, method="bounded", options=dict(xatol=1e-9))
    ours = scores.fit_temperature(logits, labels)
    assert 0.01 <= ours <= 100
    assert loss(math.log(ours)) <= min(theirs.fun, loss(0)) + 1e-9
    grid = [loss(x) for x in np.linspace(*limits, 400)]
    assert loss(math.log(ours)) <= min(grid) + 1e-9


def test_the_temperature_undoes_one_and_ends_at_its_limits():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=rng)
    labels = torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=rng)[
        :, 0
    ]
    fitted = scores.fit_temperature(logits, labels)
    assert fitted == pytest.approx(1, abs=0.05)
    assert scores.fit_temperature(3 * logits, labels) == pytest.approx(3 * fitted, rel=1e-6)
    always, never = logits.argmax(1), logits.argmin(1)
    assert scores.fit_temperature(logits, always) == pytest.approx(0.01)
    assert scores.fit_temperature(logits, never) == pytest.approx(100)
    masked = torch.cat([logits, torch.full((20_000, 1), -math.inf)], 1)  # a class that cannot be
    assert scores.fit_temperature(masked, labels) == fitted


def test_perplexity_leaves_out_places_whatever_stands_there():
    logits, labels = (
        torch.randn(2, 3, 5),
        torch.tensor([[1, -100, 2], [0, 4, -100]], dtype=torch.int32),
    )
    logits[0, 1] = math.nan
    kept = [(0, 0), (0, 2), (1, 0), (1, 1)]
    mean = sum(-logits[i, j].double().log_softmax(0)[labels[i, j].long()] for i, j in kept) / 4
    assert scores.perplexity(logits, labels) == pytest.approx(mean.exp().item())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_float_types_are_those_of_the_same_numbers(kind, table):
    logits, labels = table[0].to(kind), table[1]
    for fn in (
        scores.accuracy,
        scores.macro_f1,
        scores.expected_calibration_error,
        scores.fit_temperature,
        scores.perplexity,
    ):
        assert fn(logits, labels) == fn(logits.double(), labels)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_float_type_can_be_run(kind, table):
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    right = scores.predict(net, table[0])
    out = scores.predict(net.to(kind), table[0])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, right, atol=0.05, rtol=0.05)
    torch.testing.assert_close(
        scores.predict(nn.Linear(5, 3).to(kind), table[0].half()).shape, torch.Size([40, 3])
    )


@pytest.mark.parametrize(
    "model, says",
    [(nn.GRU(5, 2, batch_first=True), "gave a tuple"), (nn.Flatten(0), "expected a row for each")],
)
def test_a_model_that_gives_no_row_for_each_is_named(model, says):
    modes = [m.training for m in model.modules()]
    assert says in complaint(scores.predict, model, torch.randn(3, 4, 5))
    assert modes == [m.training for m in model.modules()]


def test_one_class_and_one_row():
    one = torch.zeros(1, 1)
    assert (
        scores.accuracy(one, [0]) == scores.macro_f1(one, [0]) == scores.perplexity(one, [0]) == 1
    )
    assert scores.confusion(one, [0]).tolist() == [[1]] and scores.reliability(one, [0]).gap == 0
    assert probes.knn_accuracy(torch.ones(1, 3), [0], torch.ones(1, 3), [0], k=1) == 1
    assert probes.fit_linear(torch.ones(1, 3), [0])(torch.ones(2, 3)).tolist() == [[0], [0]]
    assert probes.pca(torch.ones(1, 3)).tolist() == [[0, 0]]


# probes -------------------------------------------------------------------------------------------


class Encoder(nn.Linear):
    def encode(self, x):
        return self(x).relu()


def test_encode_all_is_encode(table):
    net = Encoder(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            probes.encode_all(net, table[0], batch_size=3), net.encode(table[0])
        )


@few
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_votes_are_a_sum_over_neighbours(k, seed):
    rng = torch.Generator().manual_seed(seed)
    bank, labels, rows = (
        torch.randn(40, 3, generator=rng),
        torch.randint(4, (40,), generator=rng),
        torch.randn(9, 3, generator=rng),
    )
    votes = probes.knn_votes(bank, labels, rows, k, temperature=None)
    torch.testing.assert_close(votes.sum(1), torch.full((9,), float(k)))
    if k == 40:
        torch.testing.assert_close(
            votes, labels.bincount(minlength=votes.shape[1]).float().expand(9, -1)
        )
    weighted = probes.knn_votes(bank, labels, rows, k)
    assert (weighted <= votes + 1e-5).all() and (weighted.sum(1) > 0).all()


def test_votes_stay_finite_at_a_small_temperature(table):
    assert probes.knn_votes(*table, table[0], k=5, temperature=1e-3).isfinite().all()


def test_a_linear_probe_separates_what_a_plane_separates():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=rng)
    x[:, 5] = 7.0  # a feature that never changes
    y = (x @ torch.tensor([1.0, -2, 0.5, 0, 0, 0]) > 0).long()
    assert probes.linear_probe(x, y, x, y, l2=1e-6) == 1.0
    assert probes.fit_linear(x, y, l2=1e6).weight.abs().max() < 1e-3


@pytest.mark.parametrize("l2", [1e-3, 0.1, 3.0])
def test_a_linear_probe_is_the_minimum_of_its_loss(table, l2):
    x, y = table
    x = x * torch.tensor([1.0, 100, 1e-3, 1, 7]) + 3
    probe = probes.fit_linear(x, y, l2)
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    w, b = (t.double().requires_grad_() for t in (probe.weight, probe.bias))
    (F.cross_entropy(scaled @ w.T + b, y) + l2 / 2 * (w**2).sum()).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4
    torch.testing.assert_close(probe(x), (scaled @ w.T + b).float(), atol=1e-4, rtol=1e-4)


@few
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10**6))
def test_pca_keeps_the_spread_and_orders_it(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    y = probes.pca(x, d)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(x, x), atol=2e-3, rtol=1e-3)
    assert (y.var(0).diff() <= 1e-4).all() and y.mean(0).abs().max() < 1e-4


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(train_features=torch.randn(40)), ValueError),
        (dict(train_features=torch.ones(40, 5, dtype=torch.long)), TypeError),
        (dict(train_features=torch.full((40, 5), math.nan)), ValueError),
        (dict(train_features=torch.randn(40, 4)), ValueError),
        (dict(train_features=torch.randn(0, 5)), ValueError),
        (dict(train_labels=torch.zeros(39, dtype=torch.long)), ValueError),
        (dict(train_labels=torch.full((40,), -1)), ValueError),
        (dict(train_labels=torch.rand(40)), TypeError),
        (dict(test_features=torch.full((40, 5), math.inf)), ValueError),
        (dict(test_labels=torch.zeros(3, dtype=torch.long)), ValueError),
    ],
)
@pytest.mark.parametrize("fn", [probes.knn_accuracy, probes.linear_probe])
def test_bad_features_are_refused(table, fn, change, error):
    good = dict(
        train_features=table[0], train_labels=table[1], test_features=table[0], test_labels=table[1]
    )
    with pytest.raises(error) as caught:
        fn(**good | change)
    assert "expected" in str(caught.value) or "hold" in str(caught.value)


def test_bad_settings_of_probes_are_refused(table):
    for call in (
        lambda: probes.knn_votes(*table, table[0], k=41),
        lambda: probes.knn_votes(*table, table[0], k=0),
        lambda: probes.knn_votes(*table, table[0], k=2, temperature=0),
        lambda: probes.fit_linear(*table, l2=-1),
        lambda: probes.pca(table[0], 6),
        lambda: probes.pca(table[0], 0),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_votes_of_half_precision_are_counted_in_float32(kind):
    rng = torch.Generator().manual_seed(0)
    bank, rows = (torch.randn(n, 64, generator=rng).to(kind) for n in (600, 9))
    labels = torch.randint(2, (600,), generator=rng)
    votes = probes.knn_votes(bank, labels, rows, 500)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes, probes.knn_votes(bank.float(), labels, rows.float(), 500))
    mixed = probes.knn_votes(
        bank, labels, rows.double(), 500
    )  # other types than the bank's are no obstacle
    torch.testing.assert_close(mixed, votes)


def test_features_of_any_float_type_can_be_probed(table):
    x, y = table
    right = probes.linear_probe(x, y, x, y)
    for kind in (torch.float64, torch.bfloat16):
        assert abs(probes.linear_probe(x.to(kind), y, x, y) - right) < 0.06
        assert probes.fit_linear(x, y)(x.to(kind)).shape == (40, 5)
    torch.testing.assert_close(
        probes.fit_linear(x.double(), y)(x.double()), probes.fit_linear(x, y)(x)
    )


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_neighbours_do_not_depend_on_the_length_of_a_vector(table, size):
    x, y = table
    torch.testing.assert_close(probes.knn_votes(x * size, y, x, 7), probes.knn_votes(x, y, x, 7))
    torch.testing.assert_close(probes.knn_votes(x, y, x * size, 7), probes.knn_votes(x, y, x, 7))


def test_a_zero_row_is_near_to_nobody_and_spoils_no_other(table):
    x, y = table[0].clone(), table[1]
    x[3] = 0
    votes = probes.knn_votes(x, y, x, 5)
    assert votes.isfinite().all() and votes[3].sum() == pytest.approx(5 * math.exp(-10), rel=1e-3)


def test_the_nearest_still_votes_where_its_weight_would_vanish():
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])
    for temperature in (0.1, 1e-3, 1e-6, 1e-30):
        assert (
            probes.knn_votes(bank, labels, torch.tensor([[1.0, 0.9]]), 2, temperature).argmax() == 1
        )
        assert (
            probes.knn_votes(bank, labels, torch.tensor([[-1.0, -1.5]]), 2, temperature).argmax()
            == 1
        )


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x, y: probes.knn_votes(x, y, x * math.nan, 2), "features hold"),
        (lambda x, y: probes.knn_votes(x, y, x[:, :3], 2), "expected (n, 5)"),
        (lambda x, y: probes.knn_votes(x, y, y, 2), "expected floats"),
        (lambda x, y: probes.knn_votes(x, y, x, 2, math.nan), "temperature is nan"),
        (lambda x, y: probes.knn_votes(x, y, x, 2.0), "k is 2.0"),
        (lambda x, y: probes.fit_linear(x, y, l2=math.inf), "l2 is inf"),
        (lambda x, y: probes.fit_linear(x, y, l2=math.nan), "l2 is nan"),
        (lambda x, y: probes.fit_linear(x, y, steps=0.5), "steps is 0.5"),
        (lambda x, y: probes.fit_linear(x, y, steps=0), "steps is 0"),
        (lambda x, y: probes.fit_linear(x.double() * 1e300, y), "NaN or infinity"),
        (lambda x, y: probes.fit_linear(x, y + 10**9), "labels run to 1,000,000,004"),
        (lambda x, y: probes.knn_accuracy(x, y + 10**9, x, y), "train_labels run to 1,000,000,004"),
        (lambda x, y: probes.linear_probe(x, y * 2**40, x, y), "train_labels run to"),
        (lambda x, y: probes.fit_linear(x, y)(x[:, :3]), "expected (..., 5)"),
        (lambda x, y: probes.pca(x, 2.0), "dims is 2.0"),
        (lambda x, y: probes.pca(x * math.inf), "points hold"),
    ],
)
def test_what_probes_cannot_use_is_named(table, call, says):
    assert says in complaint(call, *table)


def test_test_labels_may_be_of_classes_that_were_never_shown(table):
    x, y = table
    assert probes.knn_accuracy(x, y, x, torch.full((40,), 10**9), 3) == 0
    assert probes.linear_probe(x, y, x, torch.full((40,), 10**9)) == 0


def test_a_feature_below_the_rounding_of_the_others_gets_no_giant_weight():
    "MiniLM has three such: divided by their deviation they are noise, and tuning starts from it"
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=rng) * torch.tensor([1, 1, 1, 1e-8, 1e-32])
    probe = probes.fit_linear(x, (x[:, 0] + x[:, 1] > 0).long(), l2=1e-3)
    assert (probe.weight / probe.scale).abs().max() < 100
    large = probes.fit_linear(
        x * 1e-6, (x[:, 0] + x[:, 1] > 0).long(), l2=1e-3
    )  # all of them small
    torch.testing.assert_close(large.weight, probe.weight, rtol=1e-3, atol=1e-3)


def test_a_probe_is_fitted_inside_no_grad_and_keeps_none(table):
    x, y = table[0].clone().requires_grad_(), table[1]
    with torch.no_grad():
        inside = probes.fit_linear(x, y)
    assert (
        torch.equal(inside.weight, probes.fit_linear(x, y).weight) and inside.weight.abs().max() > 0
    )
    assert not any(part.requires_grad for part in inside)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m.head), "no plain parameter"),
        (lambda m: nn.utils.parametrizations.spectral_norm(m.head), "no plain parameter"),
        (lambda m: prune.random_unstructured(m.head, "weight", 0.5), "no plain parameter"),
        (lambda m: setattr(m, "head", nn.Linear(4, 3, bias=False)), "no plain parameter"),
        (lambda m: setattr(m, "head", nn.Identity()), "no linear `head`"),
        (lambda m: setattr(m.other, "weight", m.head.weight), "shares its weight with 'other'"),
    ],
)
def test_a_head_that_cannot_be_written_into_is_refused_and_nothing_changes(change, says):
    model = Encoding()
    change(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    assert says in complaint(probes.fit_head, model, x, y)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_head_under_two_names_is_one_head():
    model = Encoding()
    model.last = model.head
    x, y = torch.randn(30, 5), torch.arange(30, dtype=torch.int16) % 3
    probes.fit_head(model, x, y, l2=0.1)
    probe = probes.fit_linear(probes.encode_all(model, x), y, 0.1)
    torch.testing.assert_close(
        scores.predict(model, x), probe(probes.encode_all(model, x)), atol=1e-4, rtol=1e-4
    )


class Encoding(nn.Module):
    "The smallest model that encodes and has a head"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.other, self.head = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def encode(self, x):
        return self.body(x).relu()

    def forward(self, x):
        return self.head(self.encode(x))


# comparison ---------------------------------------------------------------------------------------


@few
@given(rows, st.floats(0.5, 0.99), st.floats(-100, 100))
def test_intervals_hold_the_mean_and_move_with_the_values(values, level, shift):
    x = torch.tensor(values, dtype=torch.double)
    for make in (t_interval, lambda v, level: bootstrap_interval(v, level, resamples=200)):
        low, high = make(x, level)
        assert low - 1e-6 <= x.mean() <= high + 1e-6 or make is not t_interval
        torch.testing.assert_close(
            make(x + shift, level), (low + shift, high + shift), atol=1e-6, rtol=1e-6
        )
        torch.testing.assert_close(make(x * 2, level), (low * 2, high * 2), atol=1e-6, rtol=1e-6)
    wide, narrow = t_interval(x, 0.999), t_interval(x, level)
    assert wide[0] <= narrow[0] and narrow[1] <= wide[1]


@few
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.booleans())
def test_a_comparison_has_no_favourite(pairs, lower):
    a, b = zip(*pairs)
    one = Comparison.from_scores({"a": a, "b": b}, lower_is_better=lower)
    two = Comparison.from_scores({"b": b, "a": a}, lower_is_better=not lower)
    there, back = one.difference("a", "b"), one.difference("b", "a")
    torch.testing.assert_close((-back.mean, -back.high, -back.low), tuple(there))
    assert one.winner("a", "b") == one.winner("b", "a")
    swapped = {None: None, "a": "b", "b": "a"}
    assert two.winner("a", "b") == swapped[one.winner("a", "b")]
    assert len(pairs) > 1 or one.winner("a", "b") is None
    assert repr(one) and one._repr_html_() and one.verdict("a", "b")


def test_more_rivals_make_it_harder_to_win():
    gaps = [0.010, 0.014, 0.011]
    arms = {"control": [0.5, 0.6, 0.7], "idea": [0.5 + gaps[0], 0.6 + gaps[1], 0.7 + gaps[2]]}
    assert Comparison.from_scores(arms).winner("idea", "control") == "idea"
    crowd = Comparison.from_scores(arms | {f"other {i}": [0.5, 0.61, 0.69] for i in range(20)})
    assert (
        crowd.winner("idea", "control") is None
        and crowd.winner("idea", "control", tries=1) == "idea"
    )
    assert "20" not in crowd.verdict("idea", "control", tries=1) and "21 tries" in crowd.verdict(
        "idea", "control"
    )


def test_arms_that_ignore_the_seed_have_no_winner():
    runs = compare({"a": lambda seed: 0.7, "b": lambda seed: 0.9}, range(5), progress=False)
    assert runs.winner("b", "a") is None and "copies" in runs.verdict("b", "a")


def test_each_arm_runs_once_with_each_seed():
    seen = []
    runs = compare(
        {
            "a": lambda s: seen.append(("a", s)) or s,
            "b": lambda s: seen.append(("b", s)) or torch.tensor(2.0 * s),
        },
        [3, 1, 4],
        progress=False,
    )
    assert seen == [(arm, s) for s in (3, 1, 4) for arm in "ab"] and runs.seeds == (3, 1, 4)
    assert runs["b"].tolist() == [6, 2, 8] and runs.mean("a") == pytest.approx(8 / 3)


def test_an_interrupt_keeps_complete_pairs():
    def arm(seed):
        if seed == 2:
            raise KeyboardInterrupt
        return float(seed)

    with pytest.warns(UserWarning, match="2 of 5 seeds"):
        runs = compare({"a": lambda s: s + 0.5, "b": arm}, range(5), progress=False)
    assert runs.seeds == (0, 1) and len(runs["a"]) == 2
    with pytest.raises(KeyboardInterrupt):
        compare({"b": arm}, [2], progress=False)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Comparison.from_scores({"a": [1, 2], "b": [1]}), "paired"),
        (lambda: Comparison.from_scores({}), "arms are"),
        (lambda: Comparison.from_scores({"a": [1, math.nan]}), "'a'"),
        (lambda: Comparison.from_scores({"a": []}), "'a'"),
        (lambda: Comparison.from_scores({"a": [1, 2]}, seeds=[4, 4]), "different"),
        (lambda: Comparison.from_scores({"a": [1, 2]}, seeds=[1]), "1 seeds"),
        (lambda: Comparison.from_scores({"a": [1, 2]}, method="guess"), "bootstrap"),
        (lambda: Comparison.from_scores({"a": [[1, 2]]}), "row"),
        (lambda: compare({"a": lambda s: math.inf}, [7], progress=False), "seed 7"),
        (lambda: compare({}, [1]), "arms are"),
        (lambda: compare({"a": float}, []), "at least one"),
        (lambda: bootstrap_interval([1.0, 2.0], resamples=0), "resamples"),
        (
            lambda: Comparison.from_scores({"a": [1, 2], "b": [2, 3]}).winner("a", "b", tries=0),
            "tries",
        ),
        (lambda: t_interval([]), "row"),
    ],
)
def test_what_cannot_be_compared_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda ran: compare({"a": ran}, 3), "seeds is 3"),
        (lambda ran: compare([ran], [1]), "arms is a list"),
        (lambda ran: compare({"a": 0.7}, [1]), "name -> function"),
        (lambda ran: compare({"a": ran}, [1], lvl=0.9), "lvl"),
        (lambda ran: t_interval("12"), "row of numbers"),
        (lambda ran: bootstrap_interval(None), "values is None"),
        (lambda ran: Comparison.from_scores({"a": ["x", 1]}), "'a'.*row of numbers"),
    ],
)
def test_what_is_no_number_is_refused(make, says):
    with pytest.raises(TypeError, match=says):
        make(lambda seed: pytest.fail("an arm ran"))


@pytest.mark.parametrize(
    "seeds, options",
    [
        ([1, 1], {}),
        (range(2), dict(level=95)),
        (range(2), dict(level="95")),
        (range(2), dict(method="guess")),
    ],
)
def test_a_bad_plan_is_refused_before_the_first_run(seeds, options):
    with pytest.raises((ValueError, TypeError), match="expected"):
        compare({"a": lambda seed: pytest.fail("an arm ran")}, seeds, progress=False, **options)


@pytest.mark.parametrize("score", [None, "good", torch.ones(2)])
def test_an_arm_that_gives_no_number_is_named(score):
    with pytest.raises(TypeError, match="'b'.*seed 4.*return"):
        compare({"a": lambda seed: 1.0, "b": lambda seed: score}, [4], progress=False)


def test_scores_that_still_carry_a_gradient_are_taken_as_numbers():
    a = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    runs = Comparison.from_scores({"a": a, "b": a * 2})
    assert not runs["a"].requires_grad and runs.plot().alt
    assert t_interval(a) == t_interval(a.detach())


def test_a_level_is_shared_by_all_tries():
    arms = {"control": [0.5, 0.6, 0.7], "one": [0.52, 0.61, 0.74], "two": [0.4, 0.63, 0.7]}
    gaps = [one - control for one, control in zip(arms["one"], arms["control"])]
    runs = Comparison.from_scores(arms, level=0.9)
    torch.testing.assert_close(
        tuple(runs.difference("one", "control"))[1:], t_interval(gaps, 0.95)
    )  # two rivals: 10 % / 2
    torch.testing.assert_close(
        tuple(runs.difference("one", "control", tries=1))[1:], t_interval(gaps, 0.9)
    )
    torch.testing.assert_close(runs.interval("one"), t_interval(arms["one"], 0.9))


def test_an_arm_that_ignores_the_seed_may_be_beaten_by_one_that_does_not():
    runs = Comparison.from_scores({"constant": [0.5, 0.5, 0.5], "trained": [0.70, 0.71, 0.72]})
    assert runs.winner("trained", "constant") == "trained"
    assert (
        Comparison.from_scores(dict(runs.scores), method="bootstrap").winner("trained", "constant")
        == "trained"
    )


def test_the_interval_of_students_table():
    torch.testing.assert_close(
        t_interval([1.0, 2.0, 3.0]),
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)),
        rtol=1e-6,
        atol=0,
    )


def test_scores_and_intervals_keep_every_digit_of_a_double():
    x = [0.1, 0.2, 0.4]
    mean, half = sum(x) / 3, stdtrit(2, 0.975) * statistics.stdev(x) / math.sqrt(3)
    assert t_interval(x) == pytest.approx((mean - half, mean + half), rel=1e-14)
    assert Comparison.from_scores({"a": x})["a"].tolist() == x
    assert compare({"a": lambda seed: x[seed]}, range(3), progress=False)["a"].tolist() == x
    assert t_interval(torch.tensor(x)) == t_interval(torch.tensor(x).double())


def test_for_losses_the_lower_wins_and_equal_arms_have_no_winner():
    arms = {"a": [1.0, 1.1, 1.3], "b": [0.5, 0.61, 0.79], "same": [0.5, 0.61, 0.79]}
    for lower, best in ((True, "b"), (False, "a")):
        runs = Comparison.from_scores(arms, lower_is_better=lower)
        assert runs.winner("a", "b") == runs.winner(
            "b", "a"
        ) == best and f"{best} wins" in runs.verdict("b", "a")
        assert runs.winner("b", "same") is None and tuple(runs.difference("b", "same")) == (0, 0, 0)


def test_an_arm_that_is_not_there_is_named():
    with pytest.raises(KeyError, match="'c'.*a, b"):
        Comparison.from_scores({"a": [1, 2], "b": [2, 4]}).difference("a", "c")


def test_names_of_arms_are_escaped_and_the_picture_describes_itself():
    runs = Comparison.from_scores({"<b>": [1.0, 2, 3], "x": [4.0, 6, 6.5]})
    assert "&lt;b&gt;" in runs._repr_html_() and "<b>" not in runs._repr_html_()
    assert "x wins" in runs.plot().alt and runs.plot(alt="mine").alt == "mine"
    assert Comparison.from_scores({"only": [1.0]}).plot().alt


def test_the_bootstrap_of_many_values_agrees_with_t():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    torch.testing.assert_close(bootstrap_interval(x), t_interval(x), atol=0.01, rtol=0.05)
    assert bootstrap_interval(x) == bootstrap_interval(x) != bootstrap_interval(x, seed=1)


def test_differences_that_agree_to_rounding_stay_readable():
    runs = Comparison.from_scores(
        {"a": [0.1, 0.2, 0.3], "b": [0.1 + 0.202, 0.2 + 0.202, 0.3 + 0.202]}
    )
    assert "+0.202000 " in repr(runs)


def test_coverage_is_what_the_level_says():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    for level in (0.5, 0.95):
        held = sum(low <= 0 <= high for low, high in (t_interval(row, level) for row in x)) / len(x)
        assert abs(held - level) < 4 * math.sqrt(level * (1 - level) / len(x))


def test_numbers_of_numpy_are_numbers():
    def run(seed):
        return torch.randn((), generator=torch.Generator().manual_seed(seed))

    arms = {"a": run, "b": lambda seed: np.float32(seed)}
    right = compare(arms, range(3), progress=False, level=0.9)
    for seeds in (
        np.arange(3),
        np.arange(3, dtype=np.uint8),
        torch.arange(3),
        list(np.arange(3)),
        (0, 1, 2),
    ):
        found = compare(arms, seeds, progress=False, level=np.float64(0.9))
        assert found.seeds == (0, 1, 2) and all(type(s) is int for s in found.seeds)
        assert torch.equal(found["a"], right["a"]) and found.difference(
            "a", "b"
        ) == right.difference("a", "b")
    assert t_interval([1, 2, 3], np.float32(0.5)) == t_interval(np.array([1.0, 2, 3]), 0.5)
    assert bootstrap_interval([1, 2, 4], seed=np.int64(1)) == bootstrap_interval([1, 2, 4], seed=1)
    curve = label_curve(
        {"a": lambda count, seed: count + seed}, np.array([5, 10]), np.arange(2), progress=False
    )
    assert list(curve) == [5, 10] and all(type(n) is int for n in curve)
    low, high = scores.wilson_interval(np.int64(3), np.int32(7), np.float32(0.95))
    torch.testing.assert_close((low, high), scores.wilson_interval(3, 7), rtol=1e-5, atol=0)


def test_a_constructor_checks_as_from_scores_does():
    one, two = Comparison({"a": [1, 2]}, (0, 1)), Comparison.from_scores({"a": [1, 2]})
    assert torch.equal(one["a"], two["a"]) and one.seeds == two.seeds
    assert "paired" in complaint(Comparison, {"a": [1, 2], "b": [1]}, (0, 1))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: Comparison.from_scores(None), "expected a mapping"),
        (lambda: Comparison.from_scores([1, 2]), "expected a mapping"),
        (lambda: Comparison.from_scores({"a": None}), "'a'"),
        (lambda: Comparison.from_scores({"a": {1: 2}}), "'a'"),
        (lambda: Comparison.from_scores({"a": [1j, 2]}), "'a'"),
        (lambda: Comparison.from_scores({"a": [10**400]}), "'a'"),
        (lambda: Comparison.from_scores({"a": [1e200, 1]}), "beyond"),
        (lambda: Comparison.from_scores({1: [1], "1": [2]}), "same name"),
        (lambda: Comparison.from_scores({"a": [1]}, seeds=3), "seeds are 3"),
        (lambda: Comparison.from_scores({"a": [1]}, seeds=["x"]), "seeds is 'x'"),
        (lambda: Comparison.from_scores({"a": [1]}, method=["t"]), "method is a list"),
        (
            lambda: Comparison.from_scores({"a": [1]}, lower_is_better="no"),
            "lower_is_better is 'no'",
        ),
        (lambda: Comparison.from_scores({"a": [1]})[["a"]], "no arm"),
        (lambda: t_interval([1, 2], None), "level is None"),
        (lambda: bootstrap_interval([1.0, 2.0], resamples=10**12), "resamples"),
        (lambda: bootstrap_interval([1.0, 2.0], seed=2**70), "seed"),
        (lambda: label_curve(None), "arms is None"),
        (lambda: label_curve([1]), "arms is a list"),
        (lambda: label_curve({"a": min}, counts=np.array([5, 5])), "counts are"),
        (lambda: label_curve({"a": min}, counts=5), "counts is 5"),
        (lambda: label_curve({"a": min}, counts=np.ones((2, 2), int)), "counts are"),
        (
            lambda: compare({"a": lambda seed: "0.7"}, [0], progress=False),
            "'a' for seed 0 is '0.7'",
        ),
        (lambda: plot_label_curve({}, alt="x"), "counts are"),
        (lambda: plot_label_curve({5: 3}, alt="x"), "expected a Comparison"),
        (
            lambda: plot_label_curve(
                {5: Comparison.from_scores({"a": [1, 2]}), 6: Comparison.from_scores({"a": [1]})},
                alt="x",
            ),
            "differ",
        ),
        (lambda: scores.wilson_interval(1, 10**400), "total is"),
        (lambda: scores.wilson_interval(1.0, 2), "correct is 1.0"),
    ],
)
def test_what_evaluation_cannot_use_is_named(call, says):
    assert says in complaint(call)


@pytest.mark.parametrize("level", [1e-300, 1 - 2**-53])
def test_extreme_levels_have_finite_intervals(level):
    for low, high in (
        scores.wilson_interval(3, 7, level),
        t_interval([1, 2, 4], level),
        t_interval([2, 2], level),
        bootstrap_interval([1, 2, 4], level),
    ):
        assert math.isfinite(low) and math.isfinite(high) and low <= high


# curves -------------------------------------------------------------------------------------------


def test_a_label_curve_asks_each_arm_for_each_count_and_seed():
    asked = []

    def arm(count, seed):
        return asked.append((count, seed)) or count + seed

    curve = label_curve(
        {"a": arm, "b": lambda count, seed: -count}, counts=(5, 10), seeds=(3, 4), progress=False
    )
    assert asked == [(5, 3), (5, 4), (10, 3), (10, 4)]
    assert curve[10]["a"].tolist() == [13, 14] and curve[5].mean("b") == -5
    assert plot_label_curve(curve, alt="two lines").alt == "two lines"


@pytest.mark.parametrize("counts", [(), (0,), (5, 5), (2.5,), (True,)])
def test_a_label_curve_needs_counts(counts):
    with pytest.raises((ValueError, TypeError), match="counts"):
        label_curve({"a": lambda count, seed: 0.0}, counts=counts)


def test_a_label_curve_refuses_what_is_no_arm():
    with pytest.raises(TypeError, match="arms"):
        label_curve({"a": 3})


# stages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net, widths",
    [(ConvNet(widths=(3, 4, 5)), (3, 4, 5)), (VGG(widths=(3, 4), depths=(2, 1)), (3, 4, 4))],
)
def test_a_stage_is_the_last_map_of_its_size(net, widths):
    x, maps = torch.randn(5, 1, 28, 28), {}
    net.eval()
    with torch.no_grad():
        for depth in range(1, len(net.body) + 1):  # the slow way: each layer from the pixels on
            y = net.body[:depth](x)
            maps[y.shape[-1]] = y.mean((2, 3))
    ends = list(maps.values())
    for stages in range(1, len(ends) + 1):
        found = probes.encode_stages(net, x, stages, batch_size=2)
        torch.testing.assert_close(found, torch.cat(ends[-stages:], 1))
    assert found.shape[1] == sum(widths)
    torch.testing.assert_close(probes.encode_stages(net, x, 1), probes.encode_all(net, x))


@pytest.mark.parametrize(
    "model, stages, error, words",
    [
        (nn.Linear(2, 2), 3, TypeError, "without a sequential `body`"),
        (ConvNet(), 0, ValueError, "whole number from 1"),
        (ConvNet(), True, TypeError, "a whole number"),
        (ConvNet(widths=(3, 4)), 3, ValueError, "from 1 to 2"),
    ],
)
def test_stages_that_are_not_there_are_refused(model, stages, error, words):
    with pytest.raises(error, match=words):
        probes.encode_stages(model, torch.randn(2, 1, 28, 28), stages)
