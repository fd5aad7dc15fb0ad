"Contrastive pretraining: laws of views, queue and slow copy, each with a broken version that loses it; resuming; bad input"
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from foundation.data.augment import Augment
from foundation.data.images import load_images
from foundation.evaluation.label_efficiency import card_metrics, label_efficiency
from foundation.models.convnets import ConvNet
from foundation.objectives.contrast import info_nce, nt_xent
from foundation.pretraining.contrastive import (
    ContrastiveModel, MomentumContrast, effective_rank, feature_spread, match_queue, match_views, pretrain, two_views)
from foundation.training.loop import adamw

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def fresh(seed=0):
    torch.manual_seed(seed)
    return ContrastiveModel(ConvNet(widths=(4, 8)), dim=6, hidden=12)


def queued(size=8, momentum=0.9, seed=0):
    return MomentumContrast(fresh(seed), size, momentum)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def views(digits):
    return next(two_views(digits.train_images, Augment(), batch_size=6))


# Views and NT-Xent ------------------------------------------------------------------------------------------------------

def test_rows_i_and_b_plus_i_are_views_of_one_picture(digits):
    same = Augment(area=(1, 1), aspect=1, flip=0, contrast=0, brightness=0)
    a, b = next(two_views(digits.train_images, same, batch_size=7)).chunk(2)
    assert_close(a, b)
    other = next(two_views(digits.train_images, Augment(), batch_size=7))
    assert not torch.equal(*other.chunk(2))


def by_rows(a, b, T):
    "NT-Xent as a loop over all views"
    z, b = normalize(torch.cat([a, b]), dim=1), len(a)
    rows = [[z[i] @ z[j] / T for j in range(2 * b) if j != i] for i in range(2 * b)]
    partner = [(i + b) % (2 * b) for i in range(2 * b)]
    return sum(torch.stack(row).logsumexp(0) - row[j - (j > i)] for i, (row, j) in enumerate(zip(rows, partner))) / (2 * b)


def scores_of(a, b, T):
    z = normalize(torch.cat([a, b]), dim=1)
    return z @ z.T / T, torch.arange(2 * len(a)).roll(len(a))


def itself_counts(a, b, T):
    return nn.functional.cross_entropy(*scores_of(a, b, T))


def partner_is_no_rival(a, b, T):
    scores, partner = scores_of(a, b, T)
    right = scores[torch.arange(len(scores)), partner]
    rivals = scores.fill_diagonal_(-math.inf).scatter(1, partner[:, None], -math.inf)
    return (rivals.logsumexp(1) - right).mean()


def one_direction(a, b, T):
    return info_nce(normalize(a, dim=1) @ normalize(b, dim=1).T / T)


def never_normalised(a, b, T):
    z = torch.cat([a, b])
    return nn.functional.cross_entropy((z @ z.T / T).fill_diagonal_(-math.inf), torch.arange(len(z)).roll(len(a)))


def neighbours_are_partners(a, b, T):
    return nt_xent(*torch.cat([a, b]).view(len(a), 2, -1).unbind(1), T)


def lightlys(a, b, T):
    return pytest.importorskip("lightly.loss", reason="lightly is not installed (pip install -e '.[bench]')").NTXentLoss(temperature=T)(a, b)


@pytest.mark.parametrize("judge", [by_rows, lightlys])
@pytest.mark.parametrize("n, d, T", [(2, 3, 0.5), (7, 5, 0.1), (16, 8, 1.0)])
def test_nt_xent_is_a_loop_and_lightlys_and_broken_ones_are_not(judge, n, d, T):
    a, noise = draw(n, n, d), draw(n + 1, n, d)
    b = a + noise  # views of one picture resemble each other
    want = judge(a, b, T)
    assert_close(nt_xent(a, b, T), want, rtol=1e-4, atol=1e-4)
    for broken in (itself_counts, partner_is_no_rival, one_direction, never_normalised, neighbours_are_partners):
        assert abs(broken(a, b, T) - want) > 1e-2, broken.__name__


def gradients_of_views(objective, views):
    x = views.clone().requires_grad_()
    grad, = torch.autograd.grad(objective(fresh(), x)[0], x)
    return [half.abs().sum((1, 2, 3)) for half in grad.chunk(2)]


def one_sided(model, views):
    a, b = model(views).chunk(2)
    return nt_xent(a, b.detach(), 0.2), {}


def test_gradients_flow_through_both_views(views):
    assert all((size > 0).all() for size in gradients_of_views(match_views(), views))
    points = draw(0, 2, 6, 5).requires_grad_()
    both = lambda loss: [g.abs().max() > 0 for g in torch.autograd.grad(loss, points)[0]]
    assert all(both(nt_xent(*points, 0.2)))
    assert both(nt_xent(points[0], points[1].detach(), 0.2)) == [True, False]  # the broken one is caught


def test_a_detached_view_changes_what_is_learnt(views):
    "Batch norm is common to both views, so pixels of a detached view may still get a gradient; the parameters' differs."
    grads = []
    for objective in (match_views(), one_sided):
        model = fresh()
        objective(model, views)[0].backward()
        grads.append(model.projector[-1].weight.grad)
    with pytest.raises(AssertionError):
        assert_close(*grads)


def test_the_loss_does_not_mind_which_view_comes_first(views):
    a, b = views.chunk(2)
    assert_close(match_views()(fresh(), torch.cat([b, a]))[0], match_views()(fresh(), views)[0])


def test_a_batch_of_one_is_refused(digits, views):
    with pytest.raises(ValueError, match="at least 2"):
        pretrain(fresh(), digits.train_images, Augment(), steps=1, batch_size=1, title="")
    for model, objective in ((fresh(), match_views()), (queued(), match_queue())):
        for some in ([0, 6], [0, 1, 6], [0], []):
            with pytest.raises(ValueError, match="at least 2 pictures"):
                objective(model, views[some])
    with pytest.raises(ValueError, match="nothing to pick from"):
        info_nce(torch.zeros(1, 1))


# MoCo -------------------------------------------------------------------------------------------------------------------

def by_loop(model, views, T):
    a, b = views.chunk(2)
    queries, keys, losses = normalize(model(a).detach(), dim=1), normalize(model.slow(b), dim=1), []
    for i in range(len(a)):
        rivals = [*keys, *model.queue[: min(int(model.seen), len(model.queue))]]
        chances = [math.exp(float(queries[i] @ rival) / T) for rival in rivals]
        losses.append(-math.log(chances[i] / sum(chances)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_moco_is_a_loop_over_keys_and_queue(digits, batches):
    model, stream = queued(size=16, momentum=1.0), two_views(digits.train_images, Augment(), batch_size=6)
    for _ in range(batches):
        match_queue()(model, next(stream))
    views = next(stream)
    want = by_loop(model, views, 0.2)
    assert match_queue()(model, views)[0].item() == pytest.approx(want, rel=1e-4)


def test_keys_that_enter_before_the_loss_are_noticed(views):
    def too_early(model, views):
        a, b = views.chunk(2)
        model.enqueue(keys := model.keys(b))
        return info_nce(model.scores(model(a), keys) / 0.2), {}
    want = by_loop(queued(), views, 0.2)
    assert match_queue()(queued(momentum=1.0), views)[0].item() == pytest.approx(want, rel=1e-4)
    assert too_early(queued(momentum=1.0), views)[0].item() > want + 0.1


@few
@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6), seeds)
def test_the_queue_holds_the_newest_keys(size, sizes, seed):
    model, all_keys = queued(size), []
    for n in (n for n in sizes if n <= size):
        keys = normalize(draw(seed + n, n, 6), dim=1)
        model.enqueue(keys)
        all_keys += list(keys)
    assert int(model.seen) == len(all_keys)
    for place, key in enumerate(all_keys):
        if place >= len(all_keys) - size:  # later ones stand over the earlier
            assert_close(model.queue[place % size], key)
    scores = model.scores(draw(1, 2, 6), normalize(draw(2, 2, 6), dim=1))
    assert scores.shape == (2, 2 + size) and int(scores.isinf().sum()) == 2 * max(0, size - len(all_keys))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_0_copies_and_1_freezes(momentum):
    model = queued(momentum=momentum)
    for p in model.model.parameters():
        p.data.add_(1)
    old = [p.clone() for p in model.slow.parameters()]
    model.follow()
    for slow, before, fast in zip(model.slow.parameters(), old, model.model.parameters(), strict=True):
        assert_close(slow, momentum * before + (1 - momentum) * fast.detach())
        assert_close(slow, {0.0: fast.detach(), 1.0: before}.get(momentum, slow))


def test_the_slow_copy_gets_no_gradient_and_is_not_trained(views):
    model = queued(momentum=1.0)
    before = [p.clone() for p in model.slow.parameters()]
    opt = adamw(model, 1e-2)
    match_queue()(model, views)[0].backward()
    opt.step()
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.slow.parameters(), before))
    assert all(p.grad is not None for name, p in model.model.named_parameters() if "head" not in name)
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.slow.parameters()}


def test_batch_norm_statistics_of_the_copy_are_its_own(views):
    model = queued(momentum=0.5)
    statistics = lambda: {k: v.clone() for k, v in model.slow.state_dict().items() if "running" in k}
    before = statistics()
    model.model(views + 3)  # the fast one sees something
    model.follow()
    assert all(torch.equal(v, before[k]) for k, v in statistics().items())
    model.keys(views)
    assert any(not torch.equal(v, before[k]) for k, v in statistics().items())


def test_keys_have_length_1_and_bfloat16_does_not_coarsen_the_scores(views):
    model = queued()
    with torch.autocast("cpu", torch.bfloat16):
        keys = model.keys(views[:6])
        scores = model.scores(model(views[6:]), keys)
    assert keys.dtype == scores.dtype == torch.float32
    assert_close(keys.norm(dim=1), torch.ones(6))


def test_a_queue_is_no_part_of_the_encoder(digits):
    model = queued(16)
    before = [p.clone() for p in model.encoder.parameters()]
    pretrain(model, digits.train_images, Augment(), steps=3, batch_size=8, objective=match_queue(), title="")
    assert int(model.seen) == 24 and any(not torch.equal(p, old) for p, old in zip(model.encoder.parameters(), before))


class Stopped(Exception):
    "The plug was pulled"


def test_a_stopped_moco_goes_on_with_its_queue(digits, tmp_path):
    def run(path=None, stop=None):
        def each(step):
            if step.n == stop:
                raise Stopped
        model = queued(size=20)
        losses = pretrain(model, digits.train_images, Augment(), steps=9, batch_size=8, objective=match_queue(), checkpoint=path,
                          save_every=3, title="", each=each).losses
        return losses, model.queue, model.seen

    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=4)
    straight, resumed = run(), run(tmp_path / "run")
    for mine, theirs in zip(resumed, straight):
        assert_close(mine, theirs, rtol=0, atol=0)
    assert {"queue", "seen"} <= queued().state_dict().keys()
    with pytest.raises(ValueError, match="of the recipe"):  # the objective is part of it
        pretrain(queued(size=20), digits.train_images, Augment(), steps=9, batch_size=8, objective=match_views(),
                 checkpoint=tmp_path / "run", title="")


def test_a_queue_needs_its_objective_and_a_projector_an_encoder(digits):
    with pytest.raises(ValueError, match=r"expected objective=match_queue\(\)"):
        pretrain(queued(), digits.train_images, Augment(), steps=1, batch_size=8, title="")
    with pytest.raises(TypeError, match="the encoder is a Linear; expected one with `encode` and `dim`"):
        pretrain(nn.Linear(2, 2), digits.train_images, Augment(), steps=1, batch_size=8, title="")


@pytest.mark.parametrize("change, words", [(dict(size=0), "size=0"), (dict(momentum=-0.1), "momentum=-0.1"),
                                           (dict(momentum=1.5), "from 0 to 1"), (dict(momentum=math.nan), "from 0 to 1")])
def test_a_queue_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        queued(**change)


def test_more_keys_than_places_are_refused():
    with pytest.raises(ValueError, match="9 keys for a queue of 8"):
        queued(8).enqueue(torch.zeros(9, 6))


# Rank and spread --------------------------------------------------------------------------------------------------------

@few
@given(seeds, st.integers(2, 20), st.integers(1, 8))
def test_rank_and_spread_stay_in_their_bounds(seed, n, d):
    z = draw(seed, n, d)
    turn = torch.linalg.qr(draw(seed + 1, d, d).double())[0]
    assert 1 - 1e-9 <= effective_rank(z) <= min(n, d) + 1e-9 and -1e-9 <= feature_spread(z) <= 1 + 1e-9
    assert effective_rank(z.double() @ turn * 7) == pytest.approx(effective_rank(z.double()))


def test_a_collapse_is_seen_and_neither_length_nor_a_gradient_matters():
    spot = torch.ones(30, 1) @ draw(0, 1, 8) * draw(1, 30, 1).exp()
    assert effective_rank(spot) == pytest.approx(1, abs=1e-4) and feature_spread(spot) == pytest.approx(0, abs=1e-6)
    plane = draw(0, 500, 2) @ draw(1, 2, 8)
    assert 1.5 < effective_rank(plane.requires_grad_()) <= 2.001
    assert feature_spread(draw(0, 5000, 8)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("measure", [effective_rank, feature_spread])
@pytest.mark.parametrize("z", [torch.zeros(1, 3), torch.zeros(4), torch.zeros(3, 3).long(), torch.full((3, 3), math.nan), [[1.0]]])
def test_rank_and_spread_refuse(measure, z):
    with pytest.raises(ValueError, match="expected features"):
        measure(z)


# Judging ----------------------------------------------------------------------------------------------------------------

def net(seed=0):
    torch.manual_seed(seed)
    return ConvNet(widths=(4, 8, 8))


def test_only_the_named_arms_run_and_each_picks_its_option(digits):
    small = replace(digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100])
    arms = {"pixels, probe": (1.0,), "fine-tuned": (1e-3, 1e-9), "from scratch": (3e-3,)}
    encoder = net()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    curve = label_efficiency(encoder, net, small, counts=(20, 40), seeds=range(2), steps=3, choices=arms)
    assert list(curve) == [20, 40] and list(curve[20].scores) == list(arms) and len(curve[40]["fine-tuned"]) == 2
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_card_holds_every_score_as_json_can(digits):
    small = replace(digits, test_images=digits.test_images[:100], test_labels=digits.test_labels[:100])
    scores = card_metrics(net(), net, small, counts=(50,), steps=2)
    assert {"knn", "knn_pixels", "knn_random_weights", "linear_probe_all_labels"} | {f"linear_probe_{n}_labels_three_stages" for n in ("all", 100)} <= scores.keys()
    assert len(scores["linear_probe_100_labels"]) == 5 and scores["knn"] == scores["knn_random_weights"]
    assert all(len(rows["50"]) == 3 for rows in scores["label_efficiency"].values()) and len(scores["label_efficiency"]) == 5


class Plain(nn.Module):
    "No batch norm, so that the views of a batch do not meet inside of the net"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(784, 5)

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_without_batch_norm_a_detached_view_gets_nothing(views):
    x = views.clone().requires_grad_()
    for objective, want in ((match_views(), [True, True]), (one_sided, [True, False])):
        grad, = torch.autograd.grad(objective(Plain(), x)[0], x)
        assert [bool(half.abs().max() > 0) for half in grad.chunk(2)] == want
