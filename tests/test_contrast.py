"""Contrast: laws that a broken version loses, half precision, and bad input;
the rest stands in its lesson and in test_objectives"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from foundation.objectives.contrast import alignment, info_nce, nt_xent, uniformity

few = settings(max_examples=25, deadline=None)
seeds, sizes, widths, temperatures = (
    st.integers(0, 10**6),
    st.integers(2, 8),
    st.integers(2, 9),
    st.floats(0.05, 10),
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(seeds, sizes, widths, temperatures)
def test_neither_order_nor_length_nor_rotation_matters(seed, n, d, T):
    a, b = draw(seed, 2, n, d).double()
    turn, mix = (
        torch.linalg.qr(draw(seed + 1, d, d).double())[0],
        torch.randperm(n, generator=torch.Generator().manual_seed(seed)),
    )
    here = nt_xent(a, b, T)
    for other in (
        nt_xent(b, a, T),
        nt_xent(a[mix], b[mix], T),
        nt_xent(7 * a, b / 3, T),
        nt_xent(a @ turn, b @ turn, T),
    ):
        assert_close(other, here)
    assert_close(nt_xent(0 * a + 1, 0 * b + 1, T), torch.tensor(math.log(2 * n - 1)).double())


@few
@given(seeds, sizes, widths, temperatures)
def test_nt_xent_is_bounded_by_its_two_halves(seed, n, d, T):
    a, b = draw(seed, 2, n, d).double()
    t = 1 / (2 * T)
    assert (
        nt_xent(a, b, T)
        <= alignment(a, b) * t + uniformity(torch.cat([a, b]), t) + math.log(2 * n - 1) + 1e-9
    )


@few
@given(seeds, sizes, st.integers(0, 5))
def test_pull_and_pushes_of_a_question_cancel(seed, b, extra):
    scores = draw(seed, b, b + extra).requires_grad_()
    (force,) = torch.autograd.grad(info_nce(scores), scores)
    assert_close(force.sum(1), torch.zeros(b), rtol=0, atol=1e-6)
    assert (force.diagonal() < 0).all() and (
        force.masked_fill(torch.eye(b, b + extra).bool(), 1) > 0
    ).all()


def test_both_views_receive_a_gradient_and_so_does_a_learnt_temperature():
    a, b, T = (
        draw(0, 4, 3).requires_grad_(),
        draw(1, 4, 3).requires_grad_(),
        torch.tensor(0.5, requires_grad=True),
    )
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(nt_xent(a, b, T), [a, b, T]))


def test_extra_columns_are_negatives():
    scores = draw(0, 4, 4)
    assert info_nce(torch.cat([scores, torch.full((4, 2), 3.0)], 1)) > info_nce(scores)
    assert_close(info_nce(torch.cat([scores, torch.full((4, 2), -math.inf)], 1)), info_nce(scores))


@pytest.mark.parametrize(
    "measure",
    [lambda a, b: nt_xent(a, b, 0.05), alignment, lambda a, b: uniformity(torch.cat([a, b]), 20.0)],
    ids=["nt_xent", "alignment", "uniformity"],
)
def test_autocast_and_half_precision_are_computed_in_float32(measure):
    a = draw(0, 64, 32)
    b = a + 0.1 * draw(1, 64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(measure(a, b), measure(a.double(), b.double()).float(), rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        assert_close(measure(x, y), measure(x.float(), y.float()))


X, NAN, INF = draw(0, 4, 3), torch.full((4, 3), math.nan), torch.full((4, 3), math.inf)
BAD = {
    "one candidate": (lambda: info_nce(X[:1, :1]), ValueError, "m >= 2"),
    "tall table": (lambda: info_nce(X), ValueError, "m >= b"),
    "flat scores": (lambda: info_nce(X[0]), ValueError, "(b, m)"),
    "empty scores": (lambda: info_nce(X[:0]), ValueError, "empty"),
    "whole scores": (lambda: info_nce(torch.eye(3).long()), TypeError, "float"),
    "a list of scores": (lambda: info_nce([[1.0, 2.0]]), TypeError, "list"),
    "NaN scores": (lambda: info_nce(NAN[:3]), ValueError, "NaN"),
    "three axes": (lambda: nt_xent(X[None], X[None]), ValueError, "(b, d)"),
    "whole views": (lambda: nt_xent(X.long(), X), TypeError, "float"),
    "empty views": (lambda: nt_xent(X[:0], X[:0]), ValueError, "empty"),
    "infinite view": (lambda: nt_xent(INF, X), ValueError, "infinite"),
    "NaN in the second view": (lambda: nt_xent(X, NAN), ValueError, "b holds"),
    "one pair": (lambda: nt_xent(X[:1], X[:1]), ValueError, "nothing to pick from"),
    "temperature 0": (lambda: nt_xent(X, X, 0), ValueError, "above 0"),
    "views that differ": (lambda: alignment(X, X[:, :2]), ValueError, "fit"),
    "empty alignment": (lambda: alignment(X[:0], X[:0]), ValueError, "empty"),
    "one point": (lambda: uniformity(X[:1]), ValueError, "about pairs"),
    "NaN points": (lambda: uniformity(NAN), ValueError, "NaN"),
    "t as text": (lambda: uniformity(X, "2"), TypeError, "t is '2'"),
    "t infinite": (lambda: uniformity(X, math.inf), ValueError, "t is inf"),
}


@pytest.mark.parametrize("call, kind, word", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, word):
    with pytest.raises(kind) as error:
        call()
    assert word in str(error.value) and len(str(error.value)) < 250


# Edges --------------------------------------------------------------------------------------------

MEASURES = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.2),
    "alignment": alignment,
    "uniformity": lambda a, b: uniformity(torch.cat([a, b])),
    "info_nce": lambda a, b: info_nce(F.normalize(b, dim=1) @ a.T),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_row_of_zeros_has_no_direction_and_gets_a_bounded_gradient(measure, dtype):
    for zero in (0.0, -0.0, 1e-13):
        a = draw(0, 8, 16).to(dtype)
        a[0] = zero
        a.requires_grad_()
        loss = measure(a, draw(1, 8, 16).to(dtype))
        loss.backward()
        assert loss.isfinite() and a.grad.isfinite().all()
        assert a.grad[0].abs().max() <= 10 * a.grad[1:].abs().max()


def test_all_rows_zero_is_a_guess_among_the_others():
    zeros = torch.zeros(4, 3, requires_grad=True)
    loss = nt_xent(zeros, zeros * 0, 0.1)
    loss.backward()
    assert_close(loss, torch.tensor(math.log(7)))
    assert (zeros.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e6, 1e20, 1e37])
def test_views_of_any_length_that_a_float_can_hold(scale):
    a, b = draw(0, 6, 5), draw(1, 6, 5)
    assert_close(nt_xent(scale * a, b, 0.2), nt_xent(a, b, 0.2), rtol=1e-4, atol=1e-5)
    assert_close(alignment(a, scale * b), alignment(a, b), rtol=1e-4, atol=1e-5)
    assert_close(uniformity(scale * a), uniformity(a), rtol=1e-4, atol=1e-5)
    long = (scale * a).requires_grad_()
    nt_xent(long, b, 0.2).backward()
    assert long.grad.isfinite().all()


def test_candidates_that_are_ruled_out_send_no_gradient():
    scores = draw(0, 3, 5)
    scores[:, 3] = -math.inf
    scores.requires_grad_()
    info_nce(scores).backward()
    assert scores.grad.isfinite().all() and (scores.grad[:, 3] == 0).all()


def test_the_views_of_a_pair_are_never_compared_with_themselves():
    a, b = draw(0, 5, 4), draw(1, 5, 4)
    z = F.normalize(torch.cat([a, b]), dim=1)
    others = [
        F.cross_entropy(
            (z @ z[[j for j in range(10) if j != i]].T / 0.1)[i : i + 1],
            torch.tensor([(i + 5) % 10 - ((i + 5) % 10 > i)]),
        )
        for i in range(10)
    ]
    assert_close(nt_xent(a, b, 0.1), torch.stack(others).mean())
    apart = (z[:, None] - z[None]).square().sum(2)[~torch.eye(10).bool()]
    assert_close(uniformity(z, 3.0), (-3 * apart).exp().mean().log())
