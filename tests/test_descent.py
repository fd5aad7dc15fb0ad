"""Rules of descent against PyTorch's optimizers on inputs that hypothesis draws;
laws; and bad input, one sentence each"""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from foundation.objectives.descent import (
    Descent,
    adafactor_step,
    adam_step,
    adamw_step,
    descend,
    sgd_step,
)

few = settings(max_examples=15, deadline=None)
seeds, rates, decays = (
    st.integers(0, 10**6),
    st.floats(1e-4, 0.3),
    st.sampled_from([0.0, 0.01, 0.5]),
)
shapes = st.sampled_from([(1,), (7,), (3, 4), (1, 5), (2, 3, 4), (2, 1, 3, 3)])
scales = st.sampled_from([1e-3, 1.0, 1e3])


def gradients(seed, shape, scale, steps):
    return scale * torch.randn(
        steps, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double
    )


def follow(rule, grads, **options):
    "The weight after all gradients, by the rule"
    weight, state = torch.linspace(-1, 2, grads[0].numel()).double().reshape(grads[0].shape), {}
    for grad in grads:
        weight, state = rule(weight, grad, state, **options)
    return weight


def torchs(kind, grads, **options):
    "The same by PyTorch"
    p = nn.Parameter(torch.linspace(-1, 2, grads[0].numel()).double().reshape(grads[0].shape))
    opt = kind([p], **options)
    for p.grad in grads:
        opt.step()
    return p.detach()


@few
@given(seeds, shapes, scales, rates, decays, st.sampled_from([0.0, 0.5, 0.99]))
def test_sgd_is_pytorchs(seed, shape, scale, lr, l2, momentum):
    grads = gradients(seed, shape, scale, 100)
    theirs = torchs(torch.optim.SGD, grads, lr=lr, weight_decay=l2, momentum=momentum)
    assert_close(
        follow(sgd_step, grads, lr=lr, l2=l2, momentum=momentum),
        theirs,
        rtol=1e-9,
        atol=1e-9 * scale,
    )
    if not momentum:
        assert_close(follow(sgd_step, grads, lr=lr, decay=l2), theirs, rtol=1e-9, atol=1e-9 * scale)


@few
@given(
    seeds, shapes, scales, rates, decays, st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.6)])
)
def test_adam_and_adamw_are_pytorchs(seed, shape, scale, lr, strength, betas):
    grads = gradients(seed, shape, scale, 100)
    close = dict(rtol=1e-9, atol=1e-9)
    assert_close(
        follow(adam_step, grads, lr=lr, l2=strength, betas=betas),
        torchs(torch.optim.Adam, grads, lr=lr, weight_decay=strength, betas=betas),
        **close,
    )
    assert_close(
        follow(adamw_step, grads, lr=lr, decay=strength, betas=betas),
        torchs(torch.optim.AdamW, grads, lr=lr, weight_decay=strength, betas=betas),
        **close,
    )


@few
@given(seeds, shapes, scales, rates, decays)
def test_adafactor_is_pytorchs(seed, shape, scale, lr, decay):
    grads = gradients(seed, shape, scale, 100)
    assert_close(
        follow(adafactor_step, grads, lr=lr, decay=decay),
        torchs(torch.optim.Adafactor, grads, lr=lr, weight_decay=decay),
        rtol=1e-9,
        atol=1e-9,
    )


@few
@given(seeds, st.floats(0.01, 100), rates)
def test_adam_ignores_the_scale_of_the_loss(seed, factor, lr):
    grads = gradients(seed, (6,), 1.0, 30)
    for options in (dict(eps=1e-20), dict(eps=1e-20, decay=0.1)):
        assert_close(
            follow(adam_step, factor * grads, lr=lr, **options),
            follow(adam_step, grads, lr=lr, **options),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_border_of_gradient_descent():
    def walk(lr):
        return descend(
            sgd_step, lambda w: 5 * w.square().sum(), torch.ones(3).double(), 600, lr=lr
        )  # curvature 10

    assert walk(0.199)[-1].abs().max() < 0.02 and walk(0.201)[-1].abs().max() > 5
    assert walk(0.1).shape == (601, 3) and not walk(0.1).requires_grad


def test_the_memory_of_each_rule():
    def kept(rule, **o):
        return sum(
            x.numel()
            for x in rule(torch.ones(8, 16), torch.ones(8, 16), {}, **o)[1].values()
            if torch.is_tensor(x)
        )

    assert [
        kept(sgd_step),
        kept(sgd_step, momentum=0.9),
        kept(adam_step),
        kept(adamw_step),
        kept(adafactor_step),
    ] == [
        0,
        128,
        256,
        256,
        24,
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(144, 3)).double()


def steps_of(net, opt, seed=1, steps=100):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.double)
        opt.zero_grad()
        (net(x) - x.mean((1, 2, 3))[:, None]).square().mean().backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    "rule, options, kind, theirs",
    [
        (
            sgd_step,
            dict(lr=0.01, momentum=0.9, l2=0.01),
            torch.optim.SGD,
            dict(lr=0.01, momentum=0.9, weight_decay=0.01),
        ),
        (adam_step, dict(lr=0.01, l2=0.1), torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
        (adamw_step, dict(lr=0.01, decay=0.1), torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
        (
            adafactor_step,
            dict(lr=0.01, decay=0.1),
            torch.optim.Adafactor,
            dict(lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "adam", "adamw", "adafactor"],
)
def test_descent_trains_a_network_like_pytorch_and_resumes(rule, options, kind, theirs):
    a, b, c = network(), network(), network()
    opt = Descent(a.parameters(), rule, **options)
    ours = steps_of(a, opt)
    assert_close(ours, steps_of(b, kind(b.parameters(), **theirs)), rtol=1e-8, atol=1e-8)
    file = io.BytesIO()
    torch.save(dict(model=a.state_dict(), opt=opt.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    c.load_state_dict(saved["model"])
    again = Descent(c.parameters(), rule, **options)
    again.load_state_dict(saved["opt"])
    assert_close(steps_of(c, again, seed=2), steps_of(a, opt, seed=2), rtol=0, atol=0)


def test_descent_has_groups_and_leaves_what_has_no_gradient():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    opt = Descent(
        [dict(params=[a, c]), dict(params=[b], lr=0.5, decay=0.0)], sgd_step, lr=0.1, decay=1.0
    )
    opt.step()
    assert_close(torch.stack([a, b, c])[:, 0], torch.tensor([0.8, 0.5, 1.0]))


def test_descent_is_what_the_training_loop_wants():
    from foundation.training.loop import classify, train

    model = nn.Linear(4, 2)
    x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    opt = Descent(model.parameters(), adamw_step, lr=0.1)
    losses = [
        float(step.loss)
        for step in train(model, iter([(x, y)] * 30), classify, opt, steps=30, schedule=[1.0] * 30)
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", [sgd_step, adam_step, adamw_step, adafactor_step])
def test_half_weights_take_the_steps_of_float32(rule, dtype):
    options = dict(lr=0.01) | (dict(momentum=0.9) if rule is sgd_step else {})
    weight, ours, exact = torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype), {}, {}
    for step in range(5):
        noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        grad = (1e-5 * noise).to(dtype)  # its square is 0 in float16
        want, exact = rule(weight.float(), grad.float(), exact, **options)
        weight, ours = rule(weight, grad, ours, **options)
        assert weight.dtype == dtype and torch.equal(weight, want.to(dtype))
    assert all(torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(exact[n])) for n in exact)
    assert all(x.dtype == torch.float32 for x in ours.values() if torch.is_tensor(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", [sgd_step, adam_step, adafactor_step])
def test_no_gradient_is_no_step(rule, dtype):
    weight = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    assert torch.equal(rule(weight, torch.zeros_like(weight), {})[0], weight)


@pytest.mark.parametrize(
    "rule, kind",
    [
        (sgd_step, torch.optim.SGD),
        (adam_step, torch.optim.Adam),
        (adamw_step, torch.optim.AdamW),
        (adafactor_step, torch.optim.Adafactor),
    ],
)
def test_a_single_number_can_be_learnt(rule, kind):
    ours, theirs = (
        nn.Parameter(torch.tensor(2.0).double()),
        nn.Parameter(torch.tensor(2.0).double()),
    )
    for p, opt in ((ours, Descent([ours], rule, lr=0.1)), (theirs, kind([theirs], lr=0.1))):
        for _ in range(5):
            opt.zero_grad()
            (p - 3).square().backward()
            opt.step()
    assert_close(ours, theirs)
    assert ours.shape == ()
    assert descend(rule, lambda w: w.square(), torch.tensor(1.0), 3).shape == (4,)


@pytest.mark.parametrize(
    "rule",
    [
        lambda p, lr: Descent(p, sgd_step, lr=lr, momentum=0.9),
        lambda p, lr: Descent(p, adam_step, lr=lr),
    ],
    ids=["sgd", "adam"],
)
def test_half_weights_resume_to_the_same_bits(rule):
    def steps(p, opt, which):
        for seed in which:
            p.grad = (1e-4 * torch.randn(6, generator=torch.Generator().manual_seed(seed))).half()
            opt.step()
        return p.detach().clone()

    whole, first, then = (nn.Parameter(torch.ones(6).half()) for _ in range(3))
    want = steps(whole, rule([whole], 0.01), range(8))
    opt = rule([first], 0.01)
    steps(first, opt, range(4))
    again = rule([then], 0.01)
    again.load_state_dict(opt.state_dict())
    then.data.copy_(first)
    assert all(x.dtype == torch.float32 for x in again.state[then].values() if torch.is_tensor(x))
    assert torch.equal(steps(then, again, range(4, 8)), want)


def test_a_step_that_fails_changes_nothing():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    opt = Descent([dict(params=[a]), dict(params=[b])], adam_step, lr=0.1)
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    opt.step()
    weights, state = [a.clone(), b.clone()], {n: x for n, x in opt.state[a].items()}
    a.grad, b.grad = torch.ones(2), torch.full((3,), math.nan)
    with pytest.raises(ValueError, match="grad holds 3 NaN"):
        opt.step()
    assert torch.equal(a, weights[0]) and torch.equal(b, weights[1]) and opt.state[a] == state
    with pytest.raises(ValueError, match="lr is -1"):
        opt.add_param_group(dict(params=[nn.Parameter(torch.ones(1))], lr=-1))
    assert len(opt.param_groups) == 2


def test_numbers_of_numpy_are_numbers():
    w, g = torch.tensor([1.0]), torch.tensor([0.5])
    assert torch.equal(
        adam_step(w, g, {}, np.float64(0.1), [np.float32(0.5), np.float64(0.25)])[0],
        adam_step(w, g, {}, 0.1, (0.5, 0.25))[0],
    )
    assert torch.equal(
        sgd_step(w.numpy(), g.numpy(), {}, np.float64(0.5))[0], sgd_step(w, g, {}, 0.5)[0]
    )
    assert descend(sgd_step, lambda w: w.sum(), np.ones(2, np.float32), np.int64(3)).shape == (4, 2)


def test_descend_walks_with_gradients_switched_off_around_it():
    with torch.no_grad():
        assert_close(
            descend(sgd_step, lambda w: w.square().sum(), torch.ones(1), 1, lr=0.25)[1],
            torch.tensor([0.5]),
        )


def test_the_weight_and_the_notes_that_come_in_are_left_alone():
    for rule in (sgd_step, adam_step, adamw_step, adafactor_step):
        weight, grad = torch.ones(2, 3), torch.full((2, 3), 0.5)
        _, state = rule(weight, grad, {}, **(dict(momentum=0.9) if rule is sgd_step else {}))
        kept = {name: x.clone() if torch.is_tensor(x) else x for name, x in state.items()}
        rule(weight, grad, state)
        assert (weight == 1).all() and (grad == 0.5).all()
        assert all(torch.equal(torch.as_tensor(kept[n]), torch.as_tensor(state[n])) for n in kept)


W = torch.ones(3)
BAD = {
    "a list": (lambda: sgd_step([1.0], W, {}), TypeError, "list"),
    "whole numbers": (lambda: adam_step(W.long(), W, {}), TypeError, "float"),
    "shapes": (lambda: sgd_step(W, W[:2], {}), ValueError, "(3,)"),
    "empty": (lambda: adam_step(W[:0], W[:0], {}), ValueError, "empty"),
    "devices": (lambda: adam_step(W, W.to("meta"), {}), ValueError, "meta"),
    "NaN gradient": (lambda: adam_step(W, W * math.nan, {}), ValueError, "grad holds 3 NaN"),
    "NaN weight": (lambda: adafactor_step(W * math.nan, W, {}), ValueError, "weight holds"),
    "negative rate": (lambda: sgd_step(W, W, {}, lr=-1.0), ValueError, "lr is -1.0"),
    "infinite rate": (lambda: adam_step(W, W, {}, lr=math.inf), ValueError, "finite"),
    "a rate of text": (lambda: adamw_step(W, W, {}, lr="0.1"), TypeError, "'0.1'"),
    "momentum of 1": (lambda: sgd_step(W, W, {}, momentum=1.0), ValueError, "momentum is 1.0"),
    "beta of 1": (lambda: adam_step(W, W, {}, betas=(0.9, 1.0)), ValueError, "betas[1] is 1.0"),
    "negative decay": (lambda: adamw_step(W, W, {}, decay=-0.1), ValueError, "decay is -0.1"),
    "clip of 0": (lambda: adafactor_step(W, W, {}, clip=0.0), ValueError, "clip is 0.0"),
    "negative forgetting": (
        lambda: adafactor_step(W, W, {}, forget=-0.8),
        ValueError,
        "forget is -0.8",
    ),
    "a loss of many": (
        lambda: descend(sgd_step, lambda w: w * 2, W, 3),
        ValueError,
        "take its mean",
    ),
    "a start that is none": (
        lambda: descend(sgd_step, lambda w: w.sum(), 3.0, 3),
        TypeError,
        "start is 3.0",
    ),
    "an option of another rule": (
        lambda: Descent([W], sgd_step, betas=(0.9, 0.9)),
        ValueError,
        "sgd_step knows no betas",
    ),
    "one beta": (lambda: adam_step(W, W, {}, betas=(0.9,)), ValueError, "expected two shares"),
    "betas of text": (lambda: adam_step(W, W, {}, betas="ab"), ValueError, "expected two shares"),
    "a beta that is none": (
        lambda: adamw_step(W, W, {}, betas=(0.9, None)),
        TypeError,
        "betas[1] is None",
    ),
    "notes of another shape": (
        lambda: sgd_step(W, W, dict(velocity=torch.zeros(2, 3))),
        ValueError,
        "state holds",
    ),
    "notes that would be stretched": (
        lambda: sgd_step(W, W, dict(velocity=torch.zeros(1)), momentum=0.9),
        ValueError,
        "(1,)",
    ),
    "notes of another rule": (
        lambda: sgd_step(W, W, adam_step(W, W, {})[1]),
        ValueError,
        "state holds",
    ),
    "half of the notes": (lambda: adam_step(W, W, dict(t=3, mean=W)), ValueError, "state holds"),
    "rows of another matrix": (
        lambda: adafactor_step(W[None], W[None], adafactor_step(W[:, None], W[:, None], {})[1]),
        ValueError,
        "state holds",
    ),
    "no notes": (lambda: sgd_step(W, W, None), TypeError, "state is None"),
    "a sparse gradient": (lambda: sgd_step(W, W.to_sparse(), {}), TypeError, "to_dense"),
    "squares that overflow": (lambda: adam_step(W, W * 1e25, {}), ValueError, "far too large"),
    "squares that overflow in rows": (
        lambda: adafactor_step(W[None], W[None] * 1e25, {}),
        ValueError,
        "far too large",
    ),
    "a loss that is a float": (
        lambda: descend(sgd_step, lambda w: 3.0, W, 3),
        TypeError,
        "the loss is 3.0",
    ),
    "a detached loss": (
        lambda: descend(sgd_step, lambda w: w.detach().sum(), W, 3),
        ValueError,
        "does not depend",
    ),
    "a loss of something else": (
        lambda: descend(sgd_step, lambda w: W.clone().requires_grad_().sum(), W, 3),
        ValueError,
        "does not depend",
    ),
    "steps below 0": (
        lambda: descend(sgd_step, lambda w: w.sum(), W, -1),
        ValueError,
        "steps is -1",
    ),
    "half a step": (
        lambda: descend(sgd_step, lambda w: w.sum(), W, 0.5),
        TypeError,
        "steps is 0.5",
    ),
    "a walk with options of another rule": (
        lambda: descend(sgd_step, lambda w: w.sum(), W, 1, betas=1),
        ValueError,
        "sgd_step knows no betas",
    ),
    "a rate below 0, when made": (
        lambda: Descent([W], sgd_step, lr=-1.0),
        ValueError,
        "lr is -1.0",
    ),
    "a momentum of 2, when made": (
        lambda: Descent([dict(params=[W], momentum=2.0)], sgd_step),
        ValueError,
        "momentum is 2.0",
    ),
    "parameters of whole numbers": (lambda: Descent([W.long()], sgd_step), TypeError, "int64"),
    "an option without a value": (
        lambda: Descent([W], lambda w, g, s, lr: (w, s)),
        ValueError,
        "needs lr",
    ),
    "no parameters": (lambda: Descent(3, sgd_step), TypeError, "params is 3"),
    "no rule": (lambda: Descent([W], "adam"), TypeError, "rule is 'adam'"),
}


@pytest.mark.parametrize("call, kind, word", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, word):
    with pytest.raises(kind) as error:
        call()
    assert word in str(error.value) and len(str(error.value)) < 250
