"""Objectives against loops, PyTorch and lightly, on inputs that hypothesis draws;
and bad input, one sentence each"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.objectives.contrast import alignment, info_nce, nt_xent, uniformity
from foundation.objectives.divergence import distillation_loss, entropy, js, kl, softmax
from foundation.objectives.likelihood import (
    binary_cross_entropy,
    cross_entropy,
    log_softmax,
    log_sum_exp,
    masked_likelihood,
)

few = settings(max_examples=25, deadline=None)
sizes, seeds, scales = (
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
)
temperatures = st.floats(0.05, 50)


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed, k, *shape):
    return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


@few
@given(seeds, sizes, sizes, scales, st.integers(-1, 1))
def test_log_sum_exp_and_log_softmax_are_pytorchs(seed, b, k, scale, dim):
    x = draw(seed, b, k, scale=scale)
    assert_close(log_sum_exp(x, dim), x.logsumexp(dim))
    assert_close(log_softmax(x, dim), x.log_softmax(dim), rtol=1e-5, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_number_type(dtype):
    assert_close(cross_entropy(Z, Y.to(dtype)), F.cross_entropy(Z, Y))


def test_log_sum_exp_of_minus_infinity():
    x = torch.tensor([[-math.inf, -math.inf], [-math.inf, 3.0]])
    assert_close(log_sum_exp(x), x.logsumexp(1))


@few
@given(
    seeds, sizes, sizes, st.integers(2, 9), scales, st.sampled_from([0.0, 0.1, 1.0]), st.booleans()
)
def test_cross_entropy_is_pytorchs(seed, b, n, k, scale, smoothing, ignore):
    z, y = draw(seed, b, n, k, scale=scale).requires_grad_(), labels(seed, k, b, n)
    if ignore and b * n > 1:
        y.view(-1)[0] = -100
    ours = cross_entropy(z, y, smoothing, -100)
    theirs = F.cross_entropy(z.movedim(-1, 1), y, label_smoothing=smoothing)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, scale))
    assert_close(
        torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    z, y = draw(0, 64, 1000).to(dtype), labels(0, 1000, 64)
    assert_close(cross_entropy(z, y), F.cross_entropy(z.float(), y))
    answers = (z > 0).to(dtype)
    assert_close(
        binary_cross_entropy(z, answers),
        F.binary_cross_entropy_with_logits(z.float(), answers.float()),
    )
    with torch.autocast("cpu", torch.bfloat16):
        a, b = draw(1, 2, 32, 16)
        assert_close(
            nt_xent(a, b, 0.05), nt_xent(a.double(), b.double(), 0.05).float(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_divergences_are_those_of_float32(dtype):
    z, t = draw(0, 2, 8, 1000, scale=3.0).to(dtype)
    p, q = softmax(z), softmax(t)
    assert_close(p, z.float().softmax(-1))
    assert_close(distillation_loss(z, t), distillation_loss(z.float(), t.float()))
    p, q = p.to(dtype), q.to(dtype)
    P, Q = p.float(), q.float()
    M = (P + Q) / 2

    def by_hand(p, q):
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)

    assert_close(entropy(p), -torch.xlogy(P, P).sum(-1))
    assert_close(kl(p, q), by_hand(P, Q))
    assert_close(js(p, q), (by_hand(P, M) + by_hand(Q, M)) / 2)


@few
@given(seeds, sizes, sizes, scales)
def test_binary_cross_entropy_is_pytorchs(seed, b, k, scale):
    z, y = draw(seed, b, k, scale=scale), draw(seed + 1, b, k).sigmoid()
    z[:, 0] = (
        0.0  # where a model with zero weights starts, and where clamp and abs have their kinks
    )
    ours, theirs = (
        f(z.requires_grad_(), y) for f in (binary_cross_entropy, F.binary_cross_entropy_with_logits)
    )
    assert_close(ours, theirs)
    assert_close(
        torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0], rtol=1e-4, atol=1e-6
    )


@few
@given(seeds, sizes, st.integers(2, 9), st.integers(2, 9))
def test_masked_likelihood_sees_masked_places_alone(seed, b, n, v):
    z, words, visible = draw(seed, b, n, v), labels(seed, v, b, n), draw(seed + 1, b, n) > 0
    visible[0, 0] = False
    loss = masked_likelihood(z, words, visible)
    assert_close(loss, F.cross_entropy(z[~visible], words[~visible]))
    assert_close(
        loss, masked_likelihood(z + visible[..., None] * draw(seed + 2, b, n, v), words, visible)
    )


@few
@given(seeds, sizes, st.integers(1, 9), scales, temperatures)
def test_softmax_and_entropy(seed, b, k, scale, T):
    z = draw(seed, b, k, scale=scale)
    p = softmax(z, T)
    assert_close(p, (z / T).softmax(-1), rtol=1e-4, atol=1e-5)
    assert ((entropy(p) >= -1e-6) & (entropy(p) <= math.log(k) + 1e-5)).all()
    assert (entropy(softmax(z, 2 * T)) >= entropy(p) - 1e-4).all()


@few
@given(seeds, sizes, st.integers(2, 9), temperatures)
def test_divergences(seed, b, k, T):
    p, q = softmax(draw(seed, b, k), T), softmax(draw(seed + 1, b, k), T)
    assert_close(kl(p, q), F.kl_div(q.log(), p, reduction="none").sum(-1), rtol=1e-4, atol=1e-5)
    assert (kl(p, q) >= -1e-5).all() and kl(p, p).abs().max() < 1e-6
    assert_close(js(p, q), js(q, p))
    assert (js(p, q) <= math.log(2) + 1e-6).all()


def test_divergence_of_certainties():
    p, q = torch.eye(2)
    assert kl(p, q) == math.inf and kl(p, p) == 0 and entropy(p) == 0
    assert_close(js(p, q), torch.tensor(math.log(2)))


@few
@given(seeds, sizes, st.integers(2, 9), temperatures)
def test_distillation_is_pytorchs(seed, b, k, T):
    s, t = draw(seed, b, k).requires_grad_(), draw(seed + 1, b, k).requires_grad_()
    ours = distillation_loss(s, t, T)
    theirs = T**2 * F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="batchmean")
    assert_close(ours, theirs, rtol=1e-3, atol=1e-6 * T**2)
    grad, teachers = torch.autograd.grad(ours, [s, t], allow_unused=True)
    assert teachers is None
    assert_close(grad, T * ((s / T).softmax(1) - (t / T).softmax(1)) / b, rtol=1e-3, atol=1e-6 * T)


@few
@given(seeds, st.integers(2, 8), sizes, st.floats(0.05, 10))
def test_nt_xent_is_a_loop(seed, n, d, T):
    a, b = draw(seed, n, d), draw(seed + 1, n, d)
    z, slow = torch.cat([a, b]), 0.0
    for i in range(2 * n):
        cosine = F.cosine_similarity(z[i : i + 1], z) / T
        slow += cosine[torch.arange(2 * n) != i].logsumexp(0) - cosine[(i + n) % (2 * n)]
    assert_close(nt_xent(a, b, T), slow / (2 * n), rtol=1e-4, atol=1e-4)


def test_nt_xent_is_lightlys():
    loss = pytest.importorskip(
        "lightly.loss", reason="lightly is not installed (pip install -e '.[bench]')"
    )
    for n, d, T in [(2, 3, 0.5), (64, 32, 0.1), (256, 128, 0.5)]:
        a, b = draw(n, n, d), draw(d, n, d)
        assert_close(nt_xent(a, b, T), loss.NTXentLoss(temperature=T)(a, b), rtol=1e-4, atol=1e-4)


@few
@given(seeds, st.integers(2, 8), st.integers(1, 9), st.integers(0, 5))
def test_info_nce_picks_the_diagonal(seed, b, d, extra):
    scores = draw(seed, b, b + extra)
    assert_close(info_nce(scores), -scores.log_softmax(1).diagonal().mean())


@few
@given(seeds, st.integers(2, 9), sizes)
def test_alignment_and_uniformity(seed, n, d):
    a, b = draw(seed, n, d), draw(seed + 1, n, d)
    unit = F.normalize(a)
    assert_close(
        uniformity(a, 3.0),
        torch.pdist(unit).square().mul(-3).exp().mean().log(),
        rtol=1e-3,
        atol=1e-3,
    )
    assert_close(alignment(a, b), (2 - 2 * F.cosine_similarity(a, b)).mean(), rtol=1e-4, atol=1e-4)
    assert -1e-6 <= alignment(a, a) < 1e-6 and uniformity(a) < 1e-5


def test_gradients_by_finite_differences():
    a, b = (draw(i, 3, 4).double().requires_grad_() for i in (0, 1))
    for f in (
        nt_xent,
        alignment,
        lambda a, b: uniformity(torch.cat([a, b])),
        lambda a, b: kl(softmax(a), softmax(b)),
        lambda a, b: js(softmax(a), softmax(b)),
        lambda a, b: binary_cross_entropy(a, b.sigmoid()),
    ):
        assert torch.autograd.gradcheck(f, (a, b))
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, b, 3.0), (a,))


Z, Y, P = draw(0, 4, 3), torch.tensor([0, 1, 2, 0]), torch.full((4, 3), 1 / 3)
W, SEEN = draw(0, 2, 4, 3), torch.tensor([[True, False, True, True]] * 2)
NAN = Z.masked_fill(Z > 0, math.nan)
BAD = {
    "a list": (lambda: cross_entropy([[1.0]], Y), TypeError, "list"),
    "whole numbers": (lambda: log_sum_exp(Y), TypeError, "float"),
    "a number": (lambda: log_sum_exp(torch.tensor(1.0)), ValueError, "shape"),
    "float labels": (lambda: cross_entropy(Z, Y.float()), TypeError, "long"),
    "too few labels": (lambda: cross_entropy(Z, Y[:3]), ValueError, "labels has shape (3,)"),
    "label too high": (lambda: cross_entropy(Z, Y + 1), ValueError, "0 to 2"),
    "label below 0": (lambda: cross_entropy(Z, Y - 1), ValueError, "0 to 2"),
    "NaN logits": (lambda: cross_entropy(NAN, Y), ValueError, "NaN"),
    "infinite logits": (lambda: cross_entropy(Z + math.inf, Y), ValueError, "infinite"),
    "empty logits": (lambda: cross_entropy(Z[:0], Y[:0]), ValueError, "empty"),
    "nothing left": (
        lambda: cross_entropy(Z, Y * 0 - 100, ignore_index=-100),
        ValueError,
        "holds ignore_index (-100) only",
    ),
    "smoothing of 2": (lambda: cross_entropy(Z, Y, label_smoothing=2.0), ValueError, "0 to 1"),
    "another device": (lambda: cross_entropy(Z, Y.to("meta")), ValueError, "meta"),
    "targets above 1": (lambda: binary_cross_entropy(Z, Z + 9), ValueError, "0 to 1"),
    "targets below 0": (lambda: binary_cross_entropy(Z, P - 1), ValueError, "0 to 1"),
    "targets of another shape": (lambda: binary_cross_entropy(Z, Z[:, :1]), ValueError, "fit"),
    "NaN targets": (lambda: binary_cross_entropy(Z, NAN), ValueError, "0 to 1"),
    "NaN in BCE": (lambda: binary_cross_entropy(NAN, P), ValueError, "NaN"),
    "whole-number mask": (
        lambda: masked_likelihood(W, torch.zeros(2, 4).long(), SEEN.long()),
        TypeError,
        "bool",
    ),
    "nothing masked": (
        lambda: masked_likelihood(W, torch.zeros(2, 4).long(), SEEN | True),
        ValueError,
        "masked",
    ),
    "flat logits": (lambda: masked_likelihood(Z, Y, SEEN), ValueError, "(b, n, v)"),
    "temperature 0": (lambda: softmax(Z, 0.0), ValueError, "above 0"),
    "temperature NaN": (lambda: softmax(Z, math.nan), ValueError, "temperature is nan"),
    "learnt temperature below 0": (lambda: softmax(Z, torch.tensor(-1.0)), ValueError, "above 0"),
    "a number as logits": (
        lambda: binary_cross_entropy(Z[0, 0], P[0, 0]),
        ValueError,
        "logits has shape ()",
    ),
    "smoothing as text": (
        lambda: cross_entropy(Z, Y, "0.1"),
        TypeError,
        "label_smoothing is '0.1'",
    ),
    "masked target too high": (
        lambda: masked_likelihood(W, torch.full((2, 4), 3), SEEN),
        ValueError,
        "targets run",
    ),
    "float masked targets": (
        lambda: masked_likelihood(W, torch.zeros(2, 4), SEEN),
        TypeError,
        "targets.long()",
    ),
    "mask of another shape": (
        lambda: masked_likelihood(W, torch.zeros(2, 4).long(), SEEN[:, :3]),
        ValueError,
        "fit",
    ),
    "empty chances": (lambda: entropy(P[:0]), ValueError, "empty"),
    "chances of another dtype": (lambda: kl(Y, Y), TypeError, "float"),
    "overflow by a cold temperature": (lambda: softmax(Z * 1e4, 1e-38), ValueError, "too large"),
    "temperature text": (lambda: distillation_loss(Z, Z, "2"), TypeError, "temperature is '2'"),
    "NaN softmax": (lambda: softmax(NAN), ValueError, "NaN"),
    "logits as chances": (lambda: entropy(Z), ValueError, "softmax"),
    "halves as chances": (lambda: kl(P / 2, P), ValueError, "sum"),
    "NaN chances": (lambda: js(NAN, P), ValueError, "NaN"),
    "fewer rows": (lambda: kl(P, P[:2]), ValueError, "fit"),
    "other teacher": (lambda: distillation_loss(Z, Z[:, :2]), ValueError, "fit"),
    "NaN teacher": (lambda: distillation_loss(Z, NAN), ValueError, "teacher_logits"),
    "tall scores": (lambda: info_nce(Z), ValueError, "m >= b"),
    "one pair": (lambda: nt_xent(Z[:1], Z[:1]), ValueError, "nothing to pick from"),
    "views differ": (lambda: nt_xent(Z, Z[:, :2]), ValueError, "fit"),
    "NaN view": (lambda: nt_xent(Z, NAN), ValueError, "b holds"),
    "NaN aligned": (lambda: alignment(NAN, Z), ValueError, "a holds"),
    "cold views": (lambda: nt_xent(Z, Z, -1.0), ValueError, "above 0"),
    "one point": (lambda: uniformity(Z[:1]), ValueError, "about pairs"),
    "t of 0": (lambda: uniformity(Z, 0.0), ValueError, "above 0"),
    "an axis that is not there": (lambda: log_sum_exp(Z, 5), ValueError, "dim is 5"),
    "half an axis": (lambda: log_softmax(Z, 0.5), TypeError, "dim is 0.5"),
    "a hot teacher": (lambda: distillation_loss(Z, Z, 1e300), ValueError, "temperature is 1e+300"),
    "infinite temperature": (lambda: softmax(Z, math.inf), ValueError, "temperature is inf"),
    "learnt temperature, infinite": (
        lambda: nt_xent(Z, Z, torch.tensor(math.inf)),
        ValueError,
        "temperature is inf",
    ),
    "NaN as a tensor": (
        lambda: distillation_loss(Z, Z, torch.tensor(math.nan)),
        ValueError,
        "temperature is nan",
    ),
    "a temperature for each row": (
        lambda: softmax(Z, torch.ones(4, 1)),
        ValueError,
        "shape (4, 1)",
    ),
    "True as temperature": (lambda: softmax(Z, True), TypeError, "temperature is True"),
    "labels as a set": (lambda: cross_entropy(Z, {0, 1}), TypeError, "labels is a set"),
    "bool labels": (lambda: cross_entropy(Z, Y > 0), TypeError, "labels is a tensor of bool"),
    "whole-number answers": (
        lambda: binary_cross_entropy(Z, Y),
        TypeError,
        "targets is a tensor of int64",
    ),
    "None as chances": (lambda: kl(P, None), TypeError, "q is None"),
    "a table of complex numbers": (lambda: entropy(P.to(torch.complex64)), TypeError, "complex64"),
}


@pytest.mark.parametrize("call, kind, word", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, word):
    with pytest.raises(kind) as error:
        call()
    assert word in str(error.value) and len(str(error.value)) < 250


def test_arithmetic_hands_nan_on_and_numpy_numbers_are_temperatures():
    assert log_sum_exp(NAN).isnan().any() and log_softmax(NAN).isnan().any()
    assert_close(softmax(Z, np.float32(2)), softmax(Z, torch.tensor(2.0)))


def test_nan_passes_while_training():
    """The loop stops on a NaN loss and tells step and learning rate,
    so the losses let it through there"""
    z = NAN.clone().requires_grad_()
    for loss in (
        cross_entropy(z, Y),
        binary_cross_entropy(z, P),
        distillation_loss(z, Z),
        nt_xent(z, Z),
    ):
        assert loss.isnan()


# Edges --------------------------------------------------------------------------------------------

NO, SURE = -math.inf, [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]


def leaf(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).requires_grad_()


def slopes(loss, *leaves):
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_divergences_have_finite_gradients_where_probabilities_are_zero(dtype):
    p, q = leaf(SURE, dtype), leaf([[0.0, 0.25, 0.75], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], dtype)
    for loss in (entropy(p), kl(p, q), kl(q, p), kl(p, p.detach()), js(p, q), kl(p, p)):
        assert not loss.isnan().any() and all(g.isfinite().all() for g in slopes(loss, p, q))
    assert (slopes(entropy(p), p)[0][p == 0] == 0).all()
    assert all((g[(p == 0)] == 0).all() for g in slopes(kl(p, q), p, q))
    minus = leaf([[-0.0, 1.0]], dtype)
    assert entropy(minus) == 0 and slopes(kl(minus, minus), minus)[0].isfinite().all()


def test_gradients_through_a_softmax_that_underflows_are_the_limits():
    z = leaf([[0.0, -2.0, -200.0], [0.0, -2.0, NO]])
    want = torch.autograd.grad(entropy(softmax(z[:, :2])).sum(), z)[
        0
    ]  # without the class that is not there
    assert_close(slopes(entropy(softmax(z)), z)[0], want)
    even = torch.tensor([[0.5, 0.3, 0.2]])
    value = kl(softmax(z[:1]), even)
    assert_close(value, torch.tensor([0.3887]), rtol=0, atol=1e-4)
    assert_close(slopes(value, z)[0][0], torch.tensor([0.1564, -0.1564, 0.0]), rtol=0, atol=1e-4)
    for loss in (
        kl(even.expand(2, 3), softmax(z)),
        js(softmax(z), even.expand(2, 3)),
        kl(softmax(z), softmax(z).detach()),
    ):
        assert slopes(loss, z)[0].isfinite().all()
    assert kl(even, softmax(z[:1])) == math.inf  # infinitely wrong stays infinitely wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1.0, 2.0, 50.0, torch.tensor(2.0, requires_grad=True)])
def test_distillation_leaves_ruled_out_classes_out(T, dtype):
    s, t = (
        leaf([[1.0, 2.0, NO], [3.0, NO, 0.0]], dtype),
        torch.tensor([[2.0, 1.0, NO], [1.0, NO, 1.0]], dtype=dtype),
    )
    short = leaf([[1.0, 2.0], [3.0, 0.0]], dtype)
    loss, want = (
        distillation_loss(s, t, T),
        distillation_loss(short, torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=dtype), T),
    )
    assert_close(loss, want)
    got, expected = slopes(loss, s)[0], slopes(want, short)[0]
    assert_close(got[s != NO], expected.flatten())
    assert (got[s == NO] == 0).all()
    if isinstance(T, torch.Tensor):
        assert slopes(distillation_loss(s, t, T), T)[0].isfinite()
        assert slopes(softmax(s, T)[:, 0], T)[0].isfinite()


def test_distillation_is_infinite_where_only_the_student_rules_a_class_out():
    assert_close(
        distillation_loss(torch.tensor([[1.0, 2.0, NO]]), torch.tensor([[2.0, 1.0, NO]]), 2.0),
        torch.tensor(0.4898),
        rtol=0,
        atol=1e-4,
    )
    s = leaf([[1.0, NO]])
    loss = distillation_loss(s, torch.tensor([[1.0, 0.0]]), 2.0)
    assert loss == math.inf and slopes(loss, s)[0].isfinite().all()
    assert distillation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, NO]]), 2.0).isfinite()


def test_a_hot_distillation_is_right_as_far_as_it_is_taken():
    s, t = draw(0, 6, 5), draw(1, 6, 5)
    for T in (100.0, 800.0):
        assert_close(
            distillation_loss(s, t, T),
            distillation_loss(s.double(), t.double(), T).float(),
            rtol=0.1,
            atol=0.05,
        )
    assert_close(
        distillation_loss(s.double(), t.double(), 1e5),
        ((s - s.mean(1, True)) - (t - t.mean(1, True))).double().square().sum(1).mean() / 10,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_whole_number_type_in_every_loss(dtype):
    z, y = draw(0, 3, 200), torch.tensor([0, 100, 127])
    for labels in (y.to(dtype), y.to(dtype).numpy(), y.tolist(), tuple(y.tolist())):
        assert_close(cross_entropy(z, labels), F.cross_entropy(z, y))
        assert_close(
            cross_entropy(z, labels, 0.1, ignore_index=100),
            F.cross_entropy(z, y, label_smoothing=0.1, ignore_index=100),
        )
    words, seen = torch.tensor([[0, 100, 127]]), torch.tensor([[True, False, False]])
    for targets in (words.to(dtype), words.to(dtype).numpy(), words.tolist()):
        assert_close(masked_likelihood(z[None], targets, seen), F.cross_entropy(z[1:], y[1:]))
    assert_close(
        masked_likelihood(z.numpy()[None], words, seen.numpy()), F.cross_entropy(z[1:], y[1:])
    )
    assert_close(
        cross_entropy(z, torch.tensor([0, 255, 1], dtype=torch.uint8), ignore_index=255),
        F.cross_entropy(z[::2], torch.tensor([0, 1])),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sum_exp_and_log_softmax_are_rounded_once(dtype):
    x = 5 * draw(0, 4, 3000).to(dtype)
    assert (
        torch.equal(log_sum_exp(x), x.float().logsumexp(1).to(dtype))
        and log_sum_exp(x).dtype == dtype
    )
    assert torch.equal(log_softmax(x), (x.float() - log_sum_exp(x.float())[:, None]).to(dtype))
    assert_close(
        log_sum_exp(torch.zeros(70_000, dtype=dtype)).float(),
        torch.tensor(math.log(70_000)),
        rtol=1e-2,
        atol=0,
    )


def test_rows_that_rule_everything_out_send_no_gradient():
    x = leaf([[NO, NO], [NO, 3.0]])
    assert log_sum_exp(x).tolist() == [NO, 3.0]
    assert_close(slopes(log_sum_exp(x), x)[0], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    z = leaf([[NO, NO, NO], [1.0, NO, 2.0], [math.nan, 0.0, 0.0]])
    loss = cross_entropy(z, torch.tensor([-1, 2, -1]), ignore_index=-1)  # padding may hold anything
    assert_close(loss, F.cross_entropy(torch.tensor([[1.0, 2.0]]), torch.tensor([1])))
    grad = slopes(loss, z)[0]
    assert (grad[0] == 0).all() and grad[1].isfinite().all() and grad[1, 1] == 0


def test_a_label_that_is_ruled_out_costs_everything():
    z = leaf([[1.0, NO]])
    loss = cross_entropy(z, [1])
    assert loss == math.inf and slopes(loss, z)[0].isfinite().all()
    assert (
        cross_entropy(z.detach(), [0]) == 0 and cross_entropy(torch.randn(3, 1), [0, 0, 0]) == 0
    )  # one class


def test_infinite_scores_of_yes_or_no_questions():
    z, y = leaf([math.inf, NO, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    loss = binary_cross_entropy(z, y)
    assert_close(loss, binary_cross_entropy(z[2:], y[2:]) / 3)
    assert slopes(loss, z)[0].isfinite().all()
    for wrong in (torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.5, 1.0])):
        loss = binary_cross_entropy(z, wrong)
        assert loss == math.inf and slopes(loss, z)[0].isfinite().all()


def test_a_masked_place_alone_counts_whatever_the_others_hold():
    z = draw(0, 1, 3, 4)
    z[0, 0], z[0, 2] = NO, 9.0
    z.requires_grad_()
    loss = masked_likelihood(z, [[0, 1, 2]], torch.tensor([[True, False, True]]))
    assert_close(loss, F.cross_entropy(z[0, 1:2], torch.tensor([1])))
    grad = slopes(loss, z)[0]
    assert grad.isfinite().all() and (grad[0, ::2] == 0).all()


def test_temperatures_may_be_learnt_numbers_of_any_kind():
    want = softmax(Z, 2.0)
    for T in (
        np.float32(2),
        np.int64(2),
        np.array(2.0),
        torch.tensor(2),
        torch.tensor([2.0]),
        leaf(2.0),
        nn.Parameter(torch.tensor([2.0])),
    ):
        assert_close(softmax(Z, T), want)
        assert distillation_loss(Z, -Z, T).shape == nt_xent(Z, -Z, T).shape == ()
    for T in (leaf(2.0), nn.Parameter(torch.tensor([2.0]))):
        for loss in (softmax(Z, T)[:, 0], distillation_loss(Z, -Z, T), nt_xent(Z, -Z, T)):
            assert slopes(loss, T)[0].abs().sum() > 0
