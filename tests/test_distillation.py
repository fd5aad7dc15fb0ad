"""Distillation: the gradient, the law of T², teachers that are left alone, hints, one front door"""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.compression.distillation import (
    Hinted,
    distil,
    match_hints,
    match_logits,
    match_teacher,
    tap,
)
from foundation.data.augment import Augment
from foundation.models.convnets import ConvNet
from foundation.objectives.divergence import distillation_loss
from foundation.training.state import BadCheckpoint
from foundation.training.schedules import one_cycle


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Given(nn.Module):
    "Logits that are parameters, whatever is asked"

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits


# Soft answers -------------------------------------------------------------------------------------


def softmax_by_loop(row, T):
    e = [(float(z) / T - float(row.max()) / T) for z in row]
    e = [torch.tensor(z, dtype=torch.double).exp().item() for z in e]
    return [z / sum(e) for z in e]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    b=st.integers(1, 5),
    k=st.integers(2, 12),
    T=st.sampled_from([0.7, 1.0, 2.0, 4.0, 20.0]),
    hard=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_the_gradient_is_said_minus_true(seed, b, k, T, hard):
    rng = torch.Generator().manual_seed(seed)
    z, v, y = (
        3 * torch.randn(b, k, generator=rng),
        3 * torch.randn(b, k, generator=rng),
        torch.randint(k, (b,), generator=rng),
    )
    student = Given(z)
    match_logits(T, hard)(student, (None, v, y))[0].backward()
    p, q, one = (
        torch.tensor([softmax_by_loop(row, heat) for row in rows])
        for rows, heat in ((z, T), (v, T), (z, 1.0))
    )
    want = ((1 - hard) * T * (p - q) + hard * (one - F.one_hot(y, k))) / b
    assert_close(student.logits.grad, want.float(), rtol=1e-3, atol=2e-6)


def size(loss, T):
    rng = torch.Generator().manual_seed(1)
    z, v = torch.randn(6, 10, generator=rng).requires_grad_(), torch.randn(6, 10, generator=rng)
    return torch.autograd.grad(loss(z, v, T), z)[0]


def keeps_size(loss):
    return bool(0.8 < size(loss, 64.0).norm() / size(loss, 8.0).norm() < 1.25)


def test_t_squared_keeps_the_size_of_the_gradient_and_a_loss_without_it_is_caught():
    assert keeps_size(distillation_loss)
    assert not keeps_size(lambda z, v, T: distillation_loss(z, v, T) / T**2)


def test_hot_answers_become_logit_matching():
    rng = torch.Generator().manual_seed(1)
    z, v = torch.randn(6, 10, generator=rng), torch.randn(6, 10, generator=rng)

    def centred(x):
        return x - x.mean(1, keepdim=True)

    limit = (centred(z) - centred(v)) / 10 / 6
    far = [(size(distillation_loss, T) - limit).norm() / limit.norm() for T in (16.0, 32.0, 64.0)]
    assert far[2] < 0.02 and all(0.45 < b / a < 0.55 for a, b in zip(far, far[1:]))


def pair():
    teacher = nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, 4),
    )
    return teacher, nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(16, 3, 4)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x), dtype=torch.long))]
)
def test_the_teacher_is_left_alone(wrap):
    teacher, student, x = pair()
    objective, before = match_teacher(teacher.train()), deepcopy(teacher.state_dict())
    loss, extra = objective(student, wrap(x))
    loss.backward()
    assert not teacher.training and extra == {}
    assert all(p.grad is None for p in teacher.parameters()) and all(
        p.grad is not None for p in student.parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values()))
    assert objective(student, wrap(x))[0] == loss


def sound(make):
    """Zero for the teacher, not for others, the same twice, nothing learnt by the teacher,
    and a size that T does not change"""
    teacher, student, x = pair()
    objective = make(teacher.train(), 2.0)
    loss = objective(student, x)[0]
    if not loss.requires_grad or objective(student, x)[0] != loss:
        return False
    loss.backward()
    if (
        any(p.grad is not None for p in teacher.parameters())
        or objective(teacher, x)[0].abs() > 1e-6
        or loss < 1e-3
    ):
        return False
    grads = []
    for T in (8.0, 64.0):
        student.zero_grad()
        make(teacher, T)(student, x)[0].backward()
        grads.append(student[1].weight.grad.norm())
    return bool(0.7 < grads[1] / grads[0] < 1.4)


def broken(kind):
    def make(teacher, T):
        if kind != "train mode":
            teacher.eval()

        def objective(model, x):
            said = teacher(x) if kind in ("teacher learns", "both sides") else teacher(x).detach()
            mine = said if kind == "both sides" else model(x)
            p, q = F.log_softmax(mine / T, 1), F.softmax(said / T, 1)
            return F.kl_div(p, q, reduction="batchmean") * (1 if kind == "no factor" else T**2), {}

        return objective

    return make


def test_broken_variants_are_caught():
    assert sound(match_teacher) and sound(broken("nothing"))
    for kind in ("no factor", "both sides", "train mode", "teacher learns"):
        assert not sound(broken(kind)), kind


@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_answers_computed_once_are_the_same(hard):
    teacher, student, x = pair()
    y = torch.randint(4, (16,))
    with torch.no_grad():
        said = teacher.eval()(x)
    once, live = (
        match_logits(3.0, hard)(student, (x, said, y)),
        match_teacher(teacher, 3.0, hard)(student, (x, y)),
    )
    assert_close(once[0], live[0])
    assert once[1].keys() == live[1].keys() == ({"soft"} if hard else set())


def test_half_precision_logits_give_a_loss_in_full():
    z, v = torch.randn(4, 10).bfloat16(), torch.randn(4, 10).bfloat16()
    loss, _ = match_logits(2.0)(Given(z), (None, v))
    assert loss.dtype == torch.float32
    assert_close(loss, distillation_loss(z.float(), v.float(), 2.0))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda t, s, x: match_teacher(t, hard=1), "hard is 1"),
        (lambda t, s, x: match_logits(hard=-0.1), "hard is -0.1"),
        (lambda t, s, x: match_teacher(t, hard=0.5)(s, x), "no labels"),
        (lambda t, s, x: match_teacher(t, 0.0)(s, x), "temperature"),
        (
            lambda t, s, x: match_teacher(t)(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), x),
            "same classes",
        ),
    ],
)
def test_soft_answers_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call(*pair())


def test_distil_learns_and_repeats():
    images, answers = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8), 4 * torch.randn(64, 10)
    augment = Augment((1, 1), aspect=1, contrast=0, brightness=0)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        student, seen = ConvNet(widths=(8, 8)), []
        run = distil(
            student,
            images,
            answers,
            augment,
            steps=30,
            lr=1e-2,
            batch_size=32,
            each=lambda step: seen.append(step.n),
        )
        losses = run.losses
        runs.append(losses)
    assert torch.equal(*runs) and seen == list(range(30)) and losses[-5:].mean() < losses[:5].mean()


# Hints --------------------------------------------------------------------------------------------


def test_hints_are_mean_squares_and_only_the_student_learns():
    teacher, student, x = (
        ConvNet(widths=(6, 8)).train(),
        ConvNet(widths=(4, 5)),
        torch.randn(3, 1, 12, 12),
    )
    hinted = Hinted(student, "body.0", nn.Conv2d(4, 6, 1))
    before = deepcopy(teacher.state_dict())
    loss, _ = match_hints(teacher, "body.0")(hinted, (x, torch.zeros(3)))
    with torch.no_grad():
        hint, guess = teacher.body[0](x), hinted.regressor(student.body[0](x))
    assert_close(loss, ((hint - guess) ** 2).sum() / hint.numel())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.state_dict().values()))
    assert student.body[0][0].weight.grad is not None and hinted.regressor.weight.grad is not None
    assert student.head.weight.grad is None, "what comes after the guided layer has no part"
    assert_close(match_hints()(hinted, (x, hint))[0], loss)


def test_a_twin_has_nothing_to_learn_and_hooks_go_away():
    teacher, x = ConvNet(widths=(6, 8)), torch.randn(3, 1, 12, 12)
    twin = Hinted(deepcopy(teacher).eval(), "body.1", nn.Identity())
    assert match_hints(teacher, "body.1")(twin, x)[0] == 0
    said, heard = tap(teacher, "body.1", x)
    assert_close(said, teacher(x)), assert_close(heard, teacher.body(x))
    with pytest.raises(ValueError):
        tap(teacher, "body.1", torch.randn(3, 2, 12, 12))
    assert not any(m._forward_hooks for m in teacher.modules())


def test_hints_teach():
    teacher, x = ConvNet(widths=(6, 8)), torch.randn(64, 1, 12, 12)
    hinted = Hinted(ConvNet(widths=(4, 5)), "body.0", nn.Conv2d(4, 6, 1))
    opt, objective, losses = (
        torch.optim.Adam(hinted.parameters(), 1e-2),
        match_hints(teacher, "body.0"),
        [],
    )
    for _ in range(60):
        opt.zero_grad()
        loss, _ = objective(hinted, x)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: tap(ConvNet(), "body.7", torch.randn(1, 1, 28, 28)), "body.0"),
        (lambda: tap(Twice(), "layer", torch.randn(1, 4)), "2 times"),
        (
            lambda: match_hints()(
                Hinted(nn.Sequential(nn.Linear(4, 4)), "0", nn.Linear(4, 1)),
                (torch.randn(2, 4), torch.randn(2, 8)),
            ),
            "same shape",
        ),
    ],
)
def test_hints_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Edges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student, teacher",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_any_two_float_types_give_the_loss_of_their_float_values(student, teacher):
    z, v, y = (
        torch.randn(4, 10).to(student),
        torch.randn(4, 10).to(teacher),
        torch.randint(10, (4,)),
    )
    model = Given(z)
    loss, extra = match_logits(3.0, 0.4)(model, (None, v, y))
    want = 0.6 * distillation_loss(z.double(), v.double(), 3.0) + 0.4 * F.cross_entropy(
        z.double(), y
    )
    assert loss.dtype == torch.promote_types(student, torch.float32)
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert model.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([1, 0], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.uint8), [1, 0]],
)
def test_labels_of_any_whole_type_and_tokens_of_any_shape(labels):
    z, v = torch.randn(2, 3), torch.randn(2, 3)
    want = match_logits(2.0, 0.5)(Given(z), (None, v, torch.tensor([1, 0])))[0]
    assert_close(match_logits(2.0, 0.5)(Given(z), (None, v, labels))[0], want)
    rows = match_logits(2.0, 0.5)(
        Given(z.view(1, 2, 3)), (None, v.view(1, 2, 3), torch.tensor([[1, 0]]))
    )[0]
    assert_close(rows, want)
    alone = match_logits(2.0, 0.5)(Given(z[:1]), (None, v[:1], torch.tensor([1])))[0]  # one row
    assert alone.isfinite()
    one = match_logits(2.0)(Given(z[:, :1]), (None, v[:, :1]))[
        0
    ]  # one class: nothing to learn, and no NaN
    assert one == 0


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3),
        (None,),
        (None, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 1),
        (None, [[1.0, 2.0, 3.0]] * 2),
        (None, torch.zeros(2, 3).long()),
        (None, torch.zeros(2, 3), torch.tensor([0, 3])),
    ],
)
def test_batches_that_do_not_fit_get_a_sentence(batch):
    with pytest.raises((TypeError, ValueError), match="; expected"):
        match_logits(2.0, 0.5)(Given(torch.zeros(2, 3)), batch)


def test_a_teacher_that_somebody_sets_to_train_mode_still_answers_in_eval_mode():
    teacher, student, x = pair()
    objective, before = match_teacher(teacher), deepcopy(teacher.state_dict())
    quiet = objective(student, x)[0]
    teacher.train()
    assert objective(student, x)[0] == quiet and teacher.training
    hints = match_hints(teacher, "0")(Hinted(student, "0", nn.Identity()), x)[0]
    assert hints == 0 and all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items())


def test_what_was_heard_is_not_overwritten_in_place():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(5, 4)
    said, heard = tap(net, "0", x)
    assert_close(heard, net[0](x)), assert_close(said, heard.relu())
    heard.sum().backward()
    assert_close(net[0].weight.grad, x.sum(0).expand(4, 4))
    twin = nn.ModuleDict(dict(a=net[0]))
    twin["b"], twin.forward = net[0], lambda x: twin["b"](x)
    assert_close(tap(twin, "b", x)[1], net[0](x))  # a layer's other name will do


def test_distil_keeps_a_narrow_network_in_plain_order_and_others_channels_last():
    images, answers = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), torch.randn(32, 4)
    augment, seen = Augment((1, 1), aspect=1, contrast=0, brightness=0), []
    for width in (7, 8):
        student = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.Conv2d(width, 4, 1, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        student[1].register_forward_pre_hook(
            lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        distil(student, images, answers, augment, steps=1, batch_size=16)
    assert seen == [False, True]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(images=torch.rand(8, 1, 8, 8)), "bytes"),
        (dict(logits=torch.randn(7, 10)), r"expected \(8, k\)"),
        (dict(logits=torch.full((8, 10), float("nan"))), "NaN"),
        (dict(hard=0.5), "without labels"),
        (dict(labels=torch.full((8,), 10), hard=0.5), "0 to 9"),
        (dict(labels=torch.zeros(7).long()), "expected"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(augment=None), "expected floats"),
        (dict(augment=3), "augment is 3"),
        (dict(temperature=0.0), "temperature"),
        (dict(student=ConvNet().bfloat16()), "float32"),
        (dict(student=None), "network"),
        (dict(lr=float("nan")), "lr"),
    ],
)
def test_distil_refuses_before_the_first_step(change, words):
    given = (
        dict(
            student=ConvNet(),
            images=torch.zeros(8, 1, 8, 8, dtype=torch.uint8),
            logits=torch.zeros(8, 10),
            augment=Augment((1, 1), aspect=1, contrast=0, brightness=0),
            steps=1,
        )
        | change
    )
    with pytest.raises((TypeError, ValueError), match=words):
        distil(**given)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tap(None, "a", torch.zeros(1)),
        lambda: tap(ConvNet(), 3, torch.zeros(1)),
        lambda: Hinted(ConvNet(), "nobody", nn.Identity()),
        lambda: match_hints()(Hinted(ConvNet(), "body.0", nn.Identity()), torch.zeros(1, 1, 8, 8)),
        lambda: match_teacher(None),
    ],
)
def test_arguments_of_the_wrong_kind_get_a_sentence(call):
    with pytest.raises((TypeError, ValueError), match="; (expected|there are)"):
        call()


# One front door -----------------------------------------------------------------------------------


def pictures():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 10
    x = torch.rand(64, 1, 8, 8, generator=rng) + labels.view(-1, 1, 1, 1) / 5
    return x, 4 * torch.randn(64, 10, generator=rng), labels


def test_pictures_as_they_are_give_the_steps_of_a_plain_loop():
    x, logits, labels = pictures()
    torch.manual_seed(0)
    student = ConvNet(widths=(4,))
    plain = deepcopy(student)
    how = dict(temperature=4.0, labels=labels, hard=0.3)
    run = distil(
        student,
        x,
        logits,
        steps=3,
        lr=1e-3,
        batch_size=64,
        schedule=None,
        precision="fp32",
        clip=None,
        **how,
    )
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=0.01), dict(params=others, weight_decay=0)]
    opt, losses = torch.optim.AdamW(groups, lr=1e-3), []
    for _ in range(3):
        said = plain(x)
        soft = distillation_loss(said, logits, 4.0)
        loss = 0.7 * soft + 0.3 * F.cross_entropy(said, labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    assert_close(run.losses, torch.stack(losses), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(student.parameters(), plain.parameters()):
        assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on_and_fits_its_own_data_alone(tmp_path):
    x, logits, labels = pictures()
    plan = dict(steps=6, batch_size=16, schedule=one_cycle(6))

    def run(x=x, logits=logits, start=0, **options):
        torch.manual_seed(start)
        student = ConvNet(widths=(4,))
        distil(student, x, logits, **plan | options)
        return student.head.weight.detach().clone()

    def stop(step):
        if step.n == 3:
            raise KeyboardInterrupt

    kept = dict(checkpoint=tmp_path / "r.safetensors", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(**kept, each=stop)
    assert torch.equal(run(**kept), run())
    late = x.clone()
    late[7] += 1
    others = [dict(x=late), dict(logits=logits.flip(1)), dict(start=1), dict(seed=1)]
    others += [dict(recipe=dict(a=1)), dict(labels=labels), dict(temperature=3.0)]
    for other in others:
        with pytest.raises(BadCheckpoint):
            run(**kept | other)


def test_answers_with_logits_are_read_as_the_logits():
    class Answer(nn.Linear):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    teacher, student, x = Answer(5, 3), Answer(5, 3), torch.randn(4, 5)
    told, said = (net(x).logits for net in (teacher, student))
    loss, _ = match_teacher(teacher, 2.0)(student, x)
    assert torch.equal(loss, distillation_loss(said, told, 2.0))
    assert torch.equal(match_teacher(nn.DataParallel(teacher), 2.0)(student, x)[0], loss)
