"Contrast: laws of views, queue and slow copy, each with a broken version; resuming; bad input"

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from foundation.core.checks import complaint
from foundation.data.augment import Augment
from foundation.data.views import two_views
from foundation.data.images import load_images
from foundation.models.convnets import ConvNet
from foundation.objectives.contrast import info_nce, nt_xent
from foundation.pretraining.contrastive import (
    ContrastiveModel,
    MomentumContrast,
    effective_rank,
    feature_spread,
    match_queue,
    match_views,
    pretrain,
)
from foundation.training.parameter_groups import adamw

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


# Views and NT-Xent --------------------------------------------------------------------------------


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
    return sum(
        torch.stack(row).logsumexp(0) - row[j - (j > i)]
        for i, (row, j) in enumerate(zip(rows, partner))
    ) / (2 * b)


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
    return nn.functional.cross_entropy(
        (z @ z.T / T).fill_diagonal_(-math.inf), torch.arange(len(z)).roll(len(a))
    )


def neighbours_are_partners(a, b, T):
    return nt_xent(*torch.cat([a, b]).view(len(a), 2, -1).unbind(1), T)


def lightlys(a, b, T):
    return pytest.importorskip(
        "lightly.loss", reason="lightly is not installed (pip install -e '.[bench]')"
    ).NTXentLoss(temperature=T)(a, b)


@pytest.mark.parametrize("judge", [by_rows, lightlys])
@pytest.mark.parametrize("n, d, T", [(2, 3, 0.5), (7, 5, 0.1), (16, 8, 1.0)])
def test_nt_xent_is_a_loop_and_lightlys_and_broken_ones_are_not(judge, n, d, T):
    a, noise = draw(n, n, d), draw(n + 1, n, d)
    b = a + noise  # views of one picture resemble each other
    want = judge(a, b, T)
    assert_close(nt_xent(a, b, T), want, rtol=1e-4, atol=1e-4)
    for broken in (
        itself_counts,
        partner_is_no_rival,
        one_direction,
        never_normalised,
        neighbours_are_partners,
    ):
        assert abs(broken(a, b, T) - want) > 1e-2, broken.__name__


def gradients_of_views(objective, views):
    x = views.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(fresh(), x)[0], x)
    return [half.abs().sum((1, 2, 3)) for half in grad.chunk(2)]


def one_sided(model, views):
    a, b = model(views).chunk(2)
    return nt_xent(a, b.detach(), 0.2), {}


def test_gradients_flow_through_both_views(views):
    assert all((size > 0).all() for size in gradients_of_views(match_views(), views))
    points = draw(0, 2, 6, 5).requires_grad_()

    def both(loss):
        return [g.abs().max() > 0 for g in torch.autograd.grad(loss, points)[0]]

    assert all(both(nt_xent(*points, 0.2)))
    assert both(nt_xent(points[0], points[1].detach(), 0.2)) == [
        True,
        False,
    ]  # the broken one is caught


def test_a_detached_view_changes_what_is_learnt(views):
    """Batch norm is common to both views, so pixels of a detached view may still get a gradient;
    the parameters' differs."""
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
    with pytest.raises(ValueError, match="from 2 on"):
        pretrain(fresh(), digits.train_images, Augment(), steps=1, batch_size=1, title="")
    for model, objective in ((fresh(), match_views()), (queued(), match_queue())):
        for some in ([0, 6], [0, 1, 6], [0], []):
            with pytest.raises(ValueError, match="at least 2 pictures"):
                objective(model, views[some])
    with pytest.raises(ValueError, match="m >= 2"):
        info_nce(torch.zeros(1, 1))


# MoCo ---------------------------------------------------------------------------------------------


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
    model, stream = (
        queued(size=16, momentum=1.0),
        two_views(digits.train_images, Augment(), batch_size=6),
    )
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
    assert scores.shape == (2, 2 + size) and int(scores.isinf().sum()) == 2 * max(
        0, size - len(all_keys)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_0_copies_and_1_freezes(momentum):
    model = queued(momentum=momentum)
    for p in model.model.parameters():
        p.data.add_(1)
    old = [p.clone() for p in model.slow.parameters()]
    model.follow()
    for slow, before, fast in zip(
        model.slow.parameters(), old, model.model.parameters(), strict=True
    ):
        assert_close(slow, momentum * before + (1 - momentum) * fast.detach())
        assert_close(slow, {0.0: fast.detach(), 1.0: before}.get(momentum, slow))


def test_the_slow_copy_gets_no_gradient_and_is_not_trained(views):
    model = queued(momentum=1.0)
    before = [p.clone() for p in model.slow.parameters()]
    opt = adamw(model, 1e-2)
    match_queue()(model, views)[0].backward()
    opt.step()
    assert all(
        p.grad is None and torch.equal(p, old) for p, old in zip(model.slow.parameters(), before)
    )
    assert all(
        p.grad is not None for name, p in model.model.named_parameters() if "head" not in name
    )
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.slow.parameters()}


def test_batch_norm_statistics_of_the_copy_are_its_own(views):
    model = queued(momentum=0.5)

    def statistics():
        return {k: v.clone() for k, v in model.slow.state_dict().items() if "running" in k}

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
    pretrain(
        model,
        digits.train_images,
        Augment(),
        steps=3,
        batch_size=8,
        objective=match_queue(),
        title="",
    )
    assert int(model.seen) == 24 and any(
        not torch.equal(p, old) for p, old in zip(model.encoder.parameters(), before)
    )


class Stopped(Exception):
    "The plug was pulled"


def test_a_stopped_moco_goes_on_with_its_queue(digits, tmp_path):
    def run(path=None, stop=None):
        def each(step):
            if step.n == stop:
                raise Stopped

        model = queued(size=20)
        losses = pretrain(
            model,
            digits.train_images,
            Augment(),
            steps=9,
            batch_size=8,
            objective=match_queue(),
            checkpoint=path,
            save_every=3,
            title="",
            each=each,
        ).losses
        return losses, model.queue, model.seen

    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=4)
    straight, resumed = run(), run(tmp_path / "run")
    for mine, theirs in zip(resumed, straight):
        assert_close(mine, theirs, rtol=0, atol=0)
    assert {"queue", "seen"} <= queued().state_dict().keys()
    with pytest.raises(ValueError, match="of another run"):  # the objective is part of it
        pretrain(
            queued(size=20),
            digits.train_images,
            Augment(),
            steps=9,
            batch_size=8,
            objective=match_views(),
            checkpoint=tmp_path / "run",
            title="",
        )


def test_a_queue_needs_its_objective_and_a_projector_an_encoder(digits):
    with pytest.raises(ValueError, match=r"expected objective=match_queue\(\)"):
        pretrain(queued(), digits.train_images, Augment(), steps=1, batch_size=8, title="")
    with pytest.raises(TypeError, match="Linear does not say how wide"):
        pretrain(nn.Linear(2, 2), digits.train_images, Augment(), steps=1, batch_size=8, title="")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(size=0), "size is 0"),
        (dict(momentum=-0.1), "momentum is -0.1"),
        (dict(momentum=1.5), "from 0 to 1"),
        (dict(momentum=math.nan), "momentum is nan"),
    ],
)
def test_a_queue_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        queued(**change)


def test_more_keys_than_places_are_refused():
    with pytest.raises(ValueError, match="9 keys for a queue of 8"):
        queued(8).enqueue(torch.zeros(9, 6))


# Half precision, edges, memory --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_slow_copy_follows_in_small_steps_whatever_the_type(kind):
    model = queued(momentum=0.999).to(kind)
    p = next(model.model.parameters())
    with torch.no_grad():
        p.fill_(1.0)
        next(model.slow.parameters()).fill_(1.0)
        p.fill_(1.125)  # a number that all types have
    for _ in range(5000):
        model.follow()
    slow = next(model.slow.parameters())
    assert (
        slow.dtype == model.queue.dtype == torch.float32
        and next(model.model.parameters()).dtype == kind
    )
    assert_close(slow, torch.full_like(slow, 1.125 - 0.125 * 0.999**5000), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_queue_works_for_models_of_other_types(kind, views):
    model = queued().to(kind)
    loss, _ = match_queue()(model, views.to(kind))
    loss.backward()
    assert (
        loss.isfinite()
        and int(model.seen) == 6
        and all(p.grad.isfinite().all() for p in model.model.projector.parameters())
    )
    assert_close(
        loss.double().item(), match_queue()(queued(), views)[0].item(), rtol=0.05, atol=0.05
    )


def test_zero_queries_get_no_gradient_and_spoil_no_other():
    model, q = queued(), draw(0, 4, 6)
    q[1] = 0
    model.enqueue(normalize(draw(1, 5, 6), dim=1))
    q.requires_grad_()
    info_nce(model.scores(q, normalize(draw(2, 4, 6), dim=1)) / 0.2).backward()
    assert (q.grad[1] == 0).all() and q.grad.isfinite().all() and q.grad.abs().max() < 10


def test_a_changed_model_is_not_followed_and_nothing_moves():
    model = queued()
    nn.utils.parametrizations.weight_norm(model.model.projector[0])
    before = [p.clone() for p in model.slow.parameters()]
    with pytest.raises(ValueError, match="changed since it was copied"):
        model.follow()
    assert all(torch.equal(p, old) for p, old in zip(model.slow.parameters(), before))


def test_parameters_are_followed_by_name():
    "In another order, as after a layer was put in anew, each still follows its own."
    model = queued(momentum=0.0)
    head, body = model.model.projector, model.model.encoder
    del model.model.projector, model.model.encoder
    model.model.projector, model.model.encoder = head, body
    model.follow()
    fast = dict(model.model.named_parameters())
    assert all(torch.equal(p, fast[name]) for name, p in model.slow.named_parameters())


def test_a_batch_too_large_for_the_queue_changes_nothing(views):
    model = queued(size=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="6 keys for a queue of 5"):
        match_queue()(model, views)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_temperature_may_be_learnt(views):
    T = torch.tensor(0.2, requires_grad=True)
    for objective, model in ((match_views(T), fresh()), (match_queue(T), queued())):
        T.grad = None
        objective(model, views)[0].backward()
        assert T.grad.isfinite() and T.grad != 0


def test_rank_and_spread_of_zeros_and_of_tiny_features():
    assert effective_rank(torch.zeros(4, 3)) == 1 and feature_spread(torch.zeros(4, 3)) == 0
    z = draw(0, 30, 5)
    for kind, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 3e-2)):
        assert effective_rank(z.to(kind)) == pytest.approx(effective_rank(z), rel=tolerance)
    for size in (1e-30, 1e30):
        assert effective_rank(z * size) == pytest.approx(effective_rank(z)) and feature_spread(
            z * size
        ) == pytest.approx(feature_spread(z))
    assert effective_rank(z.numpy()) == effective_rank(z)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda d: match_views(0), "temperature is 0"),
        (lambda d: match_queue(math.nan), "temperature is nan"),
        (lambda d: match_views()(fresh(), [1, 2]), "views is a list"),
        (lambda d: match_queue()(fresh(), draw(0, 8, 1, 8, 8)), "without `follow`"),
        (lambda d: ContrastiveModel(nn.Linear(2, 2)), "does not say how wide"),
        (lambda d: ContrastiveModel(ConvNet(), dim=0), "dim is 0"),
        (lambda d: MomentumContrast(nn.Linear(2, 2)), "model.dim is None"),
        (lambda d: queued().enqueue(draw(0, 2, 5)), r"(b, 6)"),
        (lambda d: two_views(d.train_images, Augment(), batch_size=0), "batch_size is 0"),
        (lambda d: two_views(d.train_images, None, 4), "augment is None"),
        (lambda d: two_views(None, Augment(), 4), "images is None"),
        (lambda d: pretrain(fresh(), d.train_images, Augment(), steps=0, title=""), "steps is 0"),
        (
            lambda d: pretrain(fresh(), d.train_images, Augment(), steps=1, lr=math.nan, title=""),
            "lr is nan",
        ),
        (
            lambda d: pretrain(
                fresh(), d.train_images, Augment(), steps=1, temperature=0, title=""
            ),
            "temperature is 0",
        ),
        (
            lambda d: pretrain(fresh().bfloat16(), d.train_images, Augment(), steps=1, title=""),
            "expected float32",
        ),
        (
            lambda d: pretrain(
                fresh(), d.train_images, Augment(), steps=1, objective="x", title=""
            ),
            "objective is 'x'",
        ),
    ],
)
def test_what_contrast_cannot_use_is_named(digits, call, says):
    assert says in complaint(call, digits)


def test_a_refused_plan_touches_nothing(digits):
    model = ConvNet(widths=(4, 8))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    order = model.body[0].state_dict()
    for bad in (dict(batch_size=10**6), dict(lr=0), dict(augment=3)):
        with pytest.raises((ValueError, TypeError)):
            pretrain(
                model,
                **dict(images=digits.train_images, augment=Augment(), steps=1, title="") | bad,
            )
    assert torch.equal(torch.get_rng_state(), state) and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
    assert [v.stride() for v in model.body[0].state_dict().values()] == [
        v.stride() for v in order.values()
    ]


def test_numpy_numbers_are_numbers(digits):
    def run(one):
        return pretrain(
            fresh(),
            digits.train_images,
            Augment(),
            steps=one(2),
            batch_size=one(8),
            seed=one(1),
            title="",
        ).losses

    assert_close(run(np.int64), run(int), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        dict(images=True),
        dict(augment=Augment(flip=0)),
        dict(objective=match_views(0.3)),
        dict(temperature=0.3),
        dict(seed=1),
        dict(batch_size=16),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path, change):
    "Images that differ in the last picture alone count too, whatever the first batch holds."

    def run(**change):
        images = digits.train_images.clone()
        if change.pop("images", False):
            images[-1] = 255 - images[-1]
        how = dict(
            augment=Augment(),
            steps=2,
            batch_size=8,
            objective=match_views(0.2),
            title="",
            checkpoint=tmp_path / "run",
        )
        return pretrain(fresh(), images, **how | change).losses

    first = run()
    assert torch.equal(run(), first)  # finished: the same run comes back
    with pytest.raises(ValueError, match="of another run"):
        run(**change)


def test_a_finished_run_goes_on_longer_on_purpose(digits, tmp_path):
    def run(**how):
        return pretrain(
            fresh(),
            digits.train_images,
            Augment(),
            batch_size=8,
            title="",
            checkpoint=tmp_path / "run",
            **how,
        )

    run(steps=2)
    with pytest.raises(ValueError, match="longer=True"):
        run(steps=4)
    assert len(run(steps=4, longer=True).losses) == 4


CRASH = """
import torch
from torch import nn
from foundation.training import loop
loop.pick_precision = lambda device: "fp32"  # bfloat16 takes another kernel
from foundation.data.augment import Augment
from foundation.models.convnets import ResNet
from foundation.pretraining import contrastive as c
from foundation.recipes.few_labels import train_all
images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
seen = []
def narrow(net):
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2):
            look = lambda m, x, y: seen.append((x[0].is_contiguous(), m.weight.is_contiguous()))
            m.register_forward_hook(look)
    return net
net = lambda: narrow(ResNet(widths=(4, 8), depths=(1, 1)).to(memory_format=torch.channels_last))
slow = c.MomentumContrast(c.ContrastiveModel(net()), 64)
for model, objective in ((net(), None), (slow, c.match_queue())):
    plan = dict(steps=8, batch_size=32, objective=objective, title="")
    run = c.pretrain(model, images, Augment(), **plan)
    assert run.losses.isfinite().all()
batch = images[:32].float().contiguous(memory_format=torch.channels_last), torch.arange(32) % 10
train_all(net(), [batch] * 8, steps=8, lr=1e-3)
assert len(seen) >= 24 and all(a and b for a, b in seen), seen[:3]
print("survived")
"""


def test_narrow_strided_networks_keep_clear_of_a_kernel_that_corrupts_memory():
    "In a process of its own, which PyTorch would end: one thread and AVX2 are where it is seen."
    env = dict(os.environ, OMP_NUM_THREADS="1", ONEDNN_MAX_CPU_ISA="AVX2")
    child = subprocess.run(
        [sys.executable, "-c", CRASH], env=env, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0 and "survived" in child.stdout, (
        child.returncode,
        child.stderr[-500:],
    )


def test_other_networks_keep_channels_last(digits):
    seen = []
    model = ConvNet(widths=(4, 8))
    model.body[0].register_forward_hook(
        lambda m, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    pretrain(model, digits.train_images, Augment(), steps=1, batch_size=8, title="")
    assert seen == [True]


# Rank and spread ----------------------------------------------------------------------------------


@few
@given(seeds, st.integers(2, 20), st.integers(1, 8))
def test_rank_and_spread_stay_in_their_bounds(seed, n, d):
    z = draw(seed, n, d)
    turn = torch.linalg.qr(draw(seed + 1, d, d).double())[0]
    assert (
        1 - 1e-9 <= effective_rank(z) <= min(n, d) + 1e-9 and -1e-9 <= feature_spread(z) <= 1 + 1e-9
    )
    assert effective_rank(z.double() @ turn * 7) == pytest.approx(effective_rank(z.double()))


def test_a_collapse_is_seen_and_neither_length_nor_a_gradient_matters():
    spot = torch.ones(30, 1) @ draw(0, 1, 8) * draw(1, 30, 1).exp()
    assert effective_rank(spot) == pytest.approx(1, abs=1e-4) and feature_spread(
        spot
    ) == pytest.approx(0, abs=1e-6)
    plane = draw(0, 500, 2) @ draw(1, 2, 8)
    assert 1.5 < effective_rank(plane.requires_grad_()) <= 2.001
    assert feature_spread(draw(0, 5000, 8)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("measure", [effective_rank, feature_spread])
@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(1, 3),
        torch.zeros(4),
        torch.zeros(3, 3).long(),
        torch.full((3, 3), math.nan),
        [[1.0]],
    ],
)
def test_rank_and_spread_refuse(measure, z):
    with pytest.raises((ValueError, TypeError), match="^z .*; expected"):
        measure(z)


# One view alone ---------------------------------------------------------------------------------


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
        (grad,) = torch.autograd.grad(objective(Plain(), x)[0], x)
        assert [bool(half.abs().max() > 0) for half in grad.chunk(2)] == want
