"""Distillation: the gradient, the law of T², teachers that are left alone, hints, dropped layers,
and the recipe stopped and resumed"""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.compression import distillation
from foundation.compression.distillation import (
    RATES,
    Hinted,
    Stored,
    TextClassifier,
    answer_texts,
    distil,
    keep_layers,
    load_student,
    make_weights,
    match_answers,
    match_hints,
    match_teacher,
    sentiment_task,
    tap,
    text_costs,
    train_text,
    usual_texts,
)
from foundation.core.basics import count_macs, count_parameters
from foundation.data.sources import DataUnavailable, fetch
from foundation.data.augment import Augment
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.gpt import GPT
from foundation.evaluation.scores import accuracy
from foundation.models.pretrained import (
    WEIGHTS,
    BadWeights,
    load_minilm,
    load_weights,
    read_card,
    save_weights,
)
from foundation.models.vit import ViT
from foundation.objectives.divergence import distillation_loss
from foundation.training.checkpoint import BadCheckpoint
from foundation.training.loop import classify


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    try:
        fetch("reviews")
    except DataUnavailable:
        pytest.skip("the reviews are not here")
    made = Tokenizer.from_file(str(WEIGHTS / "bert_glosses.tokenizer.json"))
    made.enable_padding()
    return made


def encoder(depth=4, **sizes):
    return BERT(**dict(vocab_size=4096, context=64, dim=16, depth=depth, heads=2) | sizes).eval()


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
    match_answers(T, hard)(student, (None, v, y))[0].backward()
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
        match_answers(3.0, hard)(student, (x, said, y)),
        match_teacher(teacher, 3.0, hard)(student, (x, y)),
    )
    assert_close(once[0], live[0])
    assert once[1].keys() == live[1].keys() == ({"soft"} if hard else set())


def test_half_precision_logits_give_a_loss_in_full():
    z, v = torch.randn(4, 10).bfloat16(), torch.randn(4, 10).bfloat16()
    loss, _ = match_answers(2.0)(Given(z), (None, v))
    assert loss.dtype == torch.float32
    assert_close(loss, distillation_loss(z.float(), v.float(), 2.0))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda t, s, x: match_teacher(t, hard=1), "hard is 1"),
        (lambda t, s, x: match_answers(hard=-0.1), "hard is -0.1"),
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
        losses = distil(
            student,
            images,
            answers,
            augment,
            steps=30,
            lr=1e-2,
            batch_size=32,
            each=lambda step: seen.append(step.n),
        )
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


# Dropped layers -----------------------------------------------------------------------------------

STACKS = {
    "bert": (lambda: encoder(), lambda: torch.randint(1, 4096, (2, 7))),
    "gpt": (
        lambda: GPT(50, context=16, dim=16, depth=4, heads=2),
        lambda: torch.randint(50, (2, 7)),
    ),
    "vit": (lambda: ViT(dim=16, depth=4, heads=2), lambda: torch.randn(2, 1, 28, 28)),
}


@pytest.mark.parametrize("name", STACKS)
def test_dropping_none_is_the_identity_and_the_original_stays(name):
    model, x = STACKS[name][0]().eval(), STACKS[name][1]()
    before, want = deepcopy(model.state_dict()), model(x)
    assert torch.equal(keep_layers(model, range(4))(x), want)
    small = keep_layers(model, (0, 2))
    assert (
        not torch.equal(small(x), want)
        and len(small.blocks) == 2
        and len(model.blocks) == 4
        and model.config["depth"] == 4
    )
    small.blocks[1].requires_grad_(True)
    for p in small.parameters():
        p.data.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), (
        "the copy shares nothing"
    )


def test_what_is_kept_is_kept():
    model = encoder()
    small = keep_layers(model, (1, 3))
    for mine, theirs in zip(small.blocks, (model.blocks[1], model.blocks[3])):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
    rebuilt = BERT(**small.config)
    rebuilt.load_state_dict(small.state_dict())
    x = torch.randint(1, 4096, (2, 7))
    assert torch.equal(rebuilt.eval()(x), small(x))
    around = keep_layers(TextClassifier(model), (1, 3))
    assert len(around.encoder.blocks) == 2 and torch.equal(
        around.encoder.blocks[0].mlp[0].weight, model.blocks[1].mlp[0].weight
    )


@pytest.mark.parametrize("layers", [(), (4,), (-1, 0), (1, 0), (0, 0), (0, 1, 2, 3, 4)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="0 to 3"):
        keep_layers(encoder(), layers)


@pytest.mark.parametrize("model", [ConvNet(), nn.ModuleList([encoder(), encoder()])])
def test_models_without_one_stack_are_refused(model):
    with pytest.raises(TypeError, match="lists of blocks"):
        keep_layers(model, (0,))


# Text ---------------------------------------------------------------------------------------------


def tokens(count=24, longest=9):
    rows = torch.randint(5, 4096, (count, longest))
    lengths = torch.randint(2, longest + 1, (count, 1))
    return rows.where(torch.arange(longest) < lengths, 0)


def test_padding_and_order_do_not_change_what_is_said():
    model, x = TextClassifier(encoder(), 3).eval(), tokens()
    nn.init.normal_(model.head.weight)
    want = torch.cat([model(row[row != 0][None]) for row in x])
    assert_close(model(F.pad(x, (0, 5))), want, rtol=1e-4, atol=1e-5)
    assert_close(answer_texts(model, x), want, rtol=1e-4, atol=1e-5)
    assert answer_texts(model, x).shape == (24, 3)


def test_the_classifier_copies_its_encoder_and_leaves_the_embedding_alone():
    source, x, y = encoder(), tokens(), torch.randint(2, (24,))
    model, before = TextClassifier(source), deepcopy(source.state_dict())
    start = deepcopy(model.state_dict())
    train_text(model, x, y, objective=classify, steps=3, lr=1e-2, batch_size=8)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items())
    same = [k for k, v in model.state_dict().items() if torch.equal(v, start[k])]
    assert set(same) == {k for k in start if k.startswith("encoder.embedding")}


def test_training_on_text_stopped_and_resumed_is_training_in_one_go(tmp_path):
    x, y, source = tokens(), torch.randint(2, (24,)), encoder()
    plan = dict(objective=classify, steps=6, lr=1e-3, batch_size=8, seed=2)
    whole, parts = TextClassifier(source), TextClassifier(source)
    parts.load_state_dict(whole.state_dict())
    run = train_text(whole, x, y, **plan)

    def stop(step):
        if step.n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(
            parts, x, y, **plan, checkpoint=tmp_path / "run.safetensors", save_every=2, each=stop
        )
    torch.manual_seed(9)
    again = train_text(
        TextClassifier(source), x, y, **plan, checkpoint=tmp_path / "run.safetensors", save_every=2
    )
    assert_close(again.losses, run.losses)


def test_the_task_keeps_its_parts_apart(tokenizer):
    task = sentiment_task(tokenizer, pool=60, valid=20, test=30, longest=12)
    parts = [set(part.tolist()) for part in (task.pool, task.valid, task.test)]
    assert [len(p) for p in parts] == [60, 20, 30] and len(set.union(*parts)) == 110
    assert (
        task.tokens.shape == (110, 12)
        and task.labels.unique().tolist() == [0, 1]
        and tokenizer.padding is not None
    )
    again = sentiment_task(tokenizer, pool=60, valid=20, test=30, longest=12)
    assert torch.equal(task.tokens, again.tokens)
    rows = {tuple(r.tolist()) for r in task.tokens[task.test]}
    assert not rows & {tuple(r.tolist()) for r in task.tokens[task.pool]}


@pytest.mark.parametrize("sizes", [dict(pool=9000), dict(valid=0), dict(test=5000)])
def test_more_texts_than_there_are_is_refused(tokenizer, sizes):
    with pytest.raises(ValueError, match="asked for|expected a whole number from 1 on"):
        sentiment_task(tokenizer, **dict(pool=60, valid=20, test=30) | sizes)


def test_eight_bits_are_off_by_half_a_step_at_most(tmp_path):
    source = encoder()
    model = TextClassifier(keep_layers(source, (0, 1)))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    save_weights(Stored(model), "small", dict(layers=[0, 1]), tmp_path)
    back = load_student(source, "small", tmp_path)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        got = back.get_parameter(name)
        if name in names and p.ndim == 2:
            step = p.detach().abs().amax(1, keepdim=True) / 127
            assert ((got - p).abs() <= 0.501 * step + 0.002 * p.abs()).all(), name
        else:
            assert_close(got, p, rtol=1e-3, atol=1e-3)
    weights = sum(p.numel() for n, p in model.named_parameters() if n in names)
    assert (tmp_path / "small.safetensors").stat().st_size < 1.5 * weights + 10_000
    assert not back.training
    with pytest.raises(BadWeights):
        load_student(encoder(dim=8), "small", tmp_path)


def test_costs_are_counted_and_compared():
    source = encoder(depth=6)
    whole = TextClassifier(source).eval()
    found = text_costs({"6": whole, "3": keep_layers(whole, (0, 1, 2))}, tokens(4), rounds=2)
    assert (
        found["6"]["one_speedup"] == found["6"]["batch_speedup"] == 1
        and found["3"]["batch_speedup"] > 0
    )

    def blocks(m):
        return sum(p.numel() for p in m.encoder.blocks.parameters())

    assert found["6"]["parameters"] - found["3"]["parameters"] == blocks(whole) / 2
    assert found["3"]["macs"] - 32 == (found["6"]["macs"] - 32) / 2  # the head has 16 × 2


def test_usual_texts_are_of_about_median_length():
    x = tokens(101)
    lengths = (x != 0).sum(1)
    found = (usual_texts(x, 5) != 0).sum(1)
    assert found.shape == (5,) and (found - lengths.median()).abs().max() <= 1


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
    loss, extra = match_answers(3.0, 0.4)(model, (None, v, y))
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
    want = match_answers(2.0, 0.5)(Given(z), (None, v, torch.tensor([1, 0])))[0]
    assert_close(match_answers(2.0, 0.5)(Given(z), (None, v, labels))[0], want)
    rows = match_answers(2.0, 0.5)(
        Given(z.view(1, 2, 3)), (None, v.view(1, 2, 3), torch.tensor([[1, 0]]))
    )[0]
    assert_close(rows, want)
    alone = match_answers(2.0, 0.5)(Given(z[:1]), (None, v[:1], torch.tensor([1])))[0]  # one row
    assert alone.isfinite()
    one = match_answers(2.0)(Given(z[:, :1]), (None, v[:, :1]))[
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
        match_answers(2.0, 0.5)(Given(torch.zeros(2, 3)), batch)


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


def test_blocks_that_share_stay_shared():
    model = encoder()
    model.blocks[2].mlp[0].weight = model.blocks[1].mlp[0].weight
    model.blocks[3] = model.blocks[0]
    small = keep_layers(model, (0, 1, 2, 3))
    x = torch.randint(1, 4096, (2, 7))
    assert (
        small.blocks[3] is small.blocks[0]
        and small.blocks[2].mlp[0].weight is small.blocks[1].mlp[0].weight
    )
    assert torch.equal(small(x), model(x))
    around = nn.Module()
    around.model, around.blocks = model, model.blocks  # the same list under two names
    fewer = keep_layers(around, (0, 2))
    assert (
        fewer.blocks is fewer.model.blocks
        and len(fewer.blocks) == 2
        and fewer.model.config["depth"] == 2
    )


def test_a_copy_keeps_modes_and_what_is_frozen():
    model = encoder().eval()
    model.blocks[1].requires_grad_(False)
    model.blocks[2].train()
    small = keep_layers(model, (1, 2))
    assert not any(p.requires_grad for p in small.blocks[0].parameters()) and all(
        p.requires_grad for p in small.blocks[1].parameters()
    )
    assert [small.training, small.blocks[0].training, small.blocks[1].training] == [
        False,
        False,
        True,
    ]


def test_a_text_of_padding_only_counts_as_nothing_and_spoils_no_other():
    model = TextClassifier(encoder(), 3).eval()
    nn.init.normal_(model.head.weight), nn.init.normal_(model.head.bias)
    x = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [7, 0, 8, 0]])
    said = model(x)
    assert_close(said[1], model.head.bias), assert_close(said[0], model(x[:1])[0])
    assert_close(model(torch.zeros(2, 3, dtype=torch.int32)), model.head.bias.expand(2, 3))
    assert_close(said[2], model(x[2:, :3])[0])  # padding in the middle cuts no word behind it
    said.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_kept_text_run_of_other_texts_labels_or_seed_is_refused(tmp_path):
    x, y, source = tokens(), torch.randint(2, (24,)), encoder()
    plan = dict(
        objective=classify,
        steps=2,
        lr=1e-3,
        batch_size=8,
        seed=2,
        checkpoint=tmp_path / "run.safetensors",
    )
    train_text(TextClassifier(source), x, y, **plan)
    for i in range(0, 24, 3):  # wherever the one text or label stands
        texts, labels = x.clone(), y.clone()
        texts[i, 0], labels[i] = 1 + texts[i, 0] % 4000, 1 - labels[i]
        for change in ((texts, y), (x, labels)):
            with pytest.raises(BadCheckpoint):
                train_text(TextClassifier(source), *change, **plan)
    for texts, labels, change in (
        (x, y, dict(seed=3)),
        (x, y, dict(lr=2e-3)),
        (x, y, dict(recipe=dict(a=1))),
    ):
        with pytest.raises(BadCheckpoint):
            train_text(TextClassifier(source), texts, labels, **plan | change)


def test_eight_bits_refuse_what_they_cannot_keep_and_names_that_end_alike():
    model = nn.Sequential(nn.Linear(4, 3))
    for value in (float("nan"), float("inf"), 1e8):
        stored = Stored(deepcopy(model))
        stored.model[0].weight.data[0, 0] = value
        with pytest.raises(ValueError, match="0.weight holds numbers that 8 bits"):
            stored.state_dict()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    first, second = Stored(Scaled()), Stored(Scaled())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.model.scale, second.model.scale)
    before = {k: v.clone() for k, v in second.state_dict().items()}
    with pytest.raises(ValueError, match="missing on one side"):
        second.load_state_dict(
            {k: v for k, v in Stored(Scaled()).state_dict().items() if k != "scale"}
        )
    assert all(torch.equal(before[k], v) for k, v in second.state_dict().items())


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
        (dict(answers=torch.randn(7, 10)), r"expected \(8, k\)"),
        (dict(answers=torch.full((8, 10), float("nan"))), "NaN"),
        (dict(hard=0.5), "without labels"),
        (dict(labels=torch.full((8,), 10), hard=0.5), "0 to 9"),
        (dict(labels=torch.zeros(7).long()), "expected"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(augment=None), "augment is None"),
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
            answers=torch.zeros(8, 10),
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
        lambda: keep_layers(encoder(), [0.5]),
        lambda: keep_layers(None, [0]),
        lambda: TextClassifier(None),
        lambda: TextClassifier(encoder(), 0),
        lambda: sentiment_task("words"),
        lambda: usual_texts(tokens(4), 5),
        lambda: usual_texts(torch.rand(3, 4)),
        lambda: answer_texts(TextClassifier(encoder()), torch.zeros(0, 4).long()),
        lambda: TextClassifier(encoder())(torch.rand(2, 3)),
        lambda: text_costs({}, tokens(2)),
        lambda: text_costs({"a": None}, tokens(2)),
        lambda: train_text(
            TextClassifier(encoder()), tokens(), objective=classify, steps=1, lr=0.0
        ),
        lambda: match_teacher(None),
    ],
)
def test_arguments_of_the_wrong_kind_get_a_sentence(call):
    with pytest.raises((TypeError, ValueError), match="; (expected|there are)|found 0 lists"):
        call()


def test_as_many_usual_texts_as_asked_for():
    x = tokens(10)
    assert usual_texts(x, 8).shape == (8, 9) and torch.equal(
        usual_texts(x, 3), usual_texts(x, 5)[:3]
    )


def test_costs_are_those_of_eval_mode_and_leave_the_mode():
    net = TextClassifier(encoder()).train()
    assert (
        text_costs({"a": net}, tokens(2), rounds=1)["a"]["macs"] > 0
        and net.training
        and net.encoder.blocks[0].training
    )


def test_the_card_counts_what_its_networks_are():
    card, costs = read_card("minilm_sentiment"), read_card("minilm_sentiment")["metrics"]["costs"]
    whole = TextClassifier(BERT(30522, context=512, dim=384, depth=6, heads=12))
    models = {"6 layers": whole, "3 layers": keep_layers(whole, card["layers"])}
    for name, model in models.items():
        assert costs[name]["parameters"] == count_parameters(model)
        assert costs[name]["macs"] == count_macs(
            model, torch.ones(1, 26, dtype=torch.long)
        )  # a text of median length
    speed = costs["6 layers"]["batch_ms"] / costs["3 layers"]["batch_ms"]
    assert (
        0.8 < speed / costs["3 layers"]["batch_speedup"] < 1.25
    )  # a median of ratios, and a ratio of medians
    best = {arm: max(row, key=row.get) for arm, row in card["tuning"].items()}
    assert {arm: str(rate) for arm, rate in card["rates"].items() if rate} == {
        arm: best[arm] for arm in RATES
    }
    assert best["layers"] == str(tuple(card["layers"])) and all(
        layers in distillation.LAYERS for layers in [tuple(card["layers"])]
    )
    test = card["metrics"]["test_texts"]
    assert all(
        abs(score * test - round(score * test)) < 1e-6
        for runs in card["metrics"]["accuracy"].values()
        for score in runs
    )


def test_the_shipped_student_scores_what_its_card_says():
    try:
        base, words = load_minilm()
        task = sentiment_task(words)
    except (DataUnavailable, BadWeights, OSError):
        pytest.skip("MiniLM or the reviews are not here")
    some = task.test[::10]
    promised = read_card("minilm_sentiment")["metrics"]["accuracy"]["distilled"][0]
    found = accuracy(answer_texts(load_student(base), task.tokens[some]), task.labels[some])
    assert abs(found - promised) < 3 * (promised * (1 - promised) / len(some)) ** 0.5


# The recipe ---------------------------------------------------------------------------------------

TINY = dict(
    seeds=range(2),
    labels=40,
    steps=2,
    student_steps=3,
    layers=((0, 1, 2), (1, 2, 3)),
    pool=80,
    valid=20,
    test=40,
    rates={arm: (1e-3, 3e-3) for arm in RATES},
)


@pytest.fixture
def recipe(tokenizer, tmp_path):
    base = encoder(), tokenizer
    plan = TINY | dict(base=base, runs=tmp_path / "runs", folder=tmp_path / "out")
    return lambda **changes: make_weights("tiny", **plan | changes)


def test_the_recipe_from_nothing_stopped_and_resumed(recipe, tmp_path, monkeypatch):
    calls, score = [], distillation.accuracy

    def third_time(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(distillation, "accuracy", third_time)
    with pytest.raises(KeyboardInterrupt):
        recipe()
    notes = json.loads((tmp_path / "runs" / "tiny" / "scores.json").read_text())
    assert len(notes["scores"]) == 4 and not (tmp_path / "out").exists()
    path = recipe()
    assert len(calls) == 5 + 15 - 4  # fifteen scores, four of them known
    card = read_card("tiny", path.parent)
    assert set(card["metrics"]["accuracy"]) == {"6 layers", "no teacher", "distilled", "as cut"}
    assert all(
        len(runs) == 2 and all(0 <= s <= 1 for s in runs)
        for runs in card["metrics"]["accuracy"].values()
    )
    assert (
        set(card["tuning"]) == {"6 layers", "layers", "no teacher", "distilled"}
        and len(card["layers"]) == 3
    )
    assert {"data", "steps", "seconds", "hardware", "sha256", "rates"} <= set(card) and card[
        "metrics"
    ]["costs"]["3 layers"]
    assert not (tmp_path / "runs" / "tiny").exists(), (
        "what is shipped is trained anew the next time"
    )


def stopped_at(count, monkeypatch, recipe):
    "Stop the recipe at its n-th score"
    calls, score = [], distillation.accuracy

    def judge(*args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return score(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distillation, "accuracy", judge)
        recipe()


def test_kept_runs_of_another_plan_or_base_are_refused(recipe, tokenizer, tmp_path, monkeypatch):
    stopped_at(2, monkeypatch, recipe)
    torch.manual_seed(1)
    for change in (dict(steps=5), dict(base=(encoder(), tokenizer)), dict(test=30)):
        with pytest.raises(ValueError, match="delete it or name another"):
            recipe(**change)
    notes = tmp_path / "runs" / "tiny" / "scores.json"
    notes.write_text(notes.read_text()[:-9])
    with pytest.raises(ValueError, match="scores.json is damaged"):
        recipe()


def test_the_shipped_student_is_what_its_card_says():
    if not (WEIGHTS / "minilm_sentiment.json").exists():
        pytest.skip("the recipe was not run yet")
    card = read_card("minilm_sentiment")
    assert (WEIGHTS / "minilm_sentiment.safetensors").stat().st_size < 6e6
    scores = {arm: torch.tensor(runs) for arm, runs in card["metrics"]["accuracy"].items()}
    assert len(card["layers"]) == 3 and all(len(runs) >= 3 for runs in scores.values())
    assert scores["6 layers"].mean() - scores["distilled"].mean() < 0.02
    assert (
        min(card["metrics"]["costs"]["3 layers"][f"{kind}_speedup"] for kind in ("one", "batch"))
        >= 1.6
    )
    student = TextClassifier(BERT(30522, context=512, dim=384, depth=3, heads=12))
    assert (
        load_weights("minilm_sentiment", Stored(student))
        .model.encoder.blocks[2]
        .mlp[0]
        .weight.abs()
        .max()
        > 0
    )
