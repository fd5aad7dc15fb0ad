"Masked images beyond what the lesson shows: laws for any sizes, stopped runs, recipes, bad input."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from foundation.core.checks import complaint
from foundation.data.augment import Augment
from foundation.data.batches import epoch_order
from foundation.data.images import load_images
from foundation.layers.embedding import patchify, unpatchify
from foundation.models.vit import ViT
from foundation.pretraining.masked_image import (
    MaskedAutoencoder,
    PatchDecoder,
    hidden_error,
    masked_patches,
    patch_targets,
    pretrain,
    random_masking,
    take,
    visible,
)
from foundation.recipes import vit_mae, vit_short
from foundation.recipes.vit_mae import crops, naive_fill, paint, reconstruction

PLAIN = Augment(area=(0.5, 1.0), contrast=0, brightness=0)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    return MaskedAutoencoder(ViT(**dict(dim=16, depth=2, heads=2) | sizes), dim=8, depth=1, heads=2)


def batch(b=3, seed=0):
    return torch.randn(b, 1, 28, 28, generator=torch.manual_seed(seed))


# laws


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(1, 5), n=st.integers(2, 40), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
def test_places_are_different_and_as_many_as_promised(b, n, ratio, seed):
    m = round(n * (1 - ratio))
    if not 0 < m < n:
        with pytest.raises(ValueError, match="hides at least one"):
            random_masking(b, n, ratio)
        return
    keep = random_masking(b, n, ratio, generator=torch.manual_seed(seed))
    assert keep.shape == (b, m) and (visible(keep, n).sum(1) == m).all()
    assert torch.equal(keep, random_masking(b, n, ratio, generator=torch.manual_seed(seed)))


def test_the_order_of_the_noise_and_back():
    """As the paper has it: shuffle, cut, fill up, unshuffle;
    the decoder writes to the positions at once."""
    noise, x = torch.rand(4, 9), torch.randn(4, 9, 5)
    order = noise.argsort(1)
    restore = order.argsort(1)
    assert_close(take(take(x, order), restore), x)
    filled = take(torch.cat([take(x, order[:, :3]), torch.full((4, 6, 5), 7.0)], 1), restore)
    assert_close(x.where(visible(order[:, :3], 9)[:, :, None], 7.0), filled)
    assert not torch.equal(take(take(x, order), order), x)  # the order itself is no way back


def test_the_decoder_fills_up_as_the_paper_does():
    decoder, x, keep = small().decoder, torch.randn(3, 4, 16), random_masking(3, 16)
    order = torch.cat([keep, (~visible(keep, 16)).nonzero()[:, 1].view(3, 12)], 1)
    tokens = torch.cat([decoder.bridge(x), decoder.hidden.expand(3, 12, -1)], 1)
    y = take(tokens, order.argsort(1)) + decoder.position
    for block in decoder.blocks:
        y = block(y)
    assert_close(decoder(x, keep), decoder.head(decoder.norm(y)))


def test_every_patch_is_hidden_equally_often():
    share = visible(random_masking(20_000, 16, generator=torch.manual_seed(0)), 16).float().mean(0)
    assert (share - 0.25).abs().max() < 0.02  # six standard deviations
    noise = torch.rand(20_000, 16) * torch.linspace(1, 2, 16)  # noise that is not alike everywhere
    assert (visible(noise.argsort(1)[:, :4], 16).float().mean(0) - 0.25).abs().max() > 0.02


@pytest.mark.parametrize("b, m", [(1, 1), (3, 4), (2, 16)])
def test_visible_only_is_masked_attention(b, m):
    model, x = small().eval(), batch(b)
    keep = torch.rand(b, 16).argsort(1)[:, :m]
    look, full = visible(keep, 16)[:, None, None], model.encoder.embed(x)
    for block in model.encoder.blocks:
        full = block(full, mask=look)
    assert_close(
        model.encode_visible(x, keep), take(model.encoder.norm(full), keep), atol=1e-5, rtol=1e-5
    )
    if m < 16:
        with pytest.raises(AssertionError):  # the mask forgotten
            assert_close(
                model.encode_visible(x, keep),
                take(model.encoder.tokens(x), keep),
                atol=1e-5,
                rtol=1e-5,
            )


def test_hidden_pixels_never_reach_the_encoder():
    model, x, keep = small().eval(), batch(), random_masking(3, 16)
    noise = unpatchify(torch.randn(3, 16, 49) * ~visible(keep, 16)[:, :, None], 7, 1)
    assert_close(model(x + noise, keep), model(x, keep), rtol=0, atol=0)
    assert not torch.equal(model(x - noise + 1, keep), model(x, keep))


def test_the_loss_ignores_visible_patches():
    guess, target, keep = (
        torch.randn(3, 16, 4, requires_grad=True),
        torch.randn(3, 16, 4),
        random_masking(3, 16),
    )
    seen = visible(keep, 16)
    loss = hidden_error(guess, target, keep)
    assert_close(hidden_error(guess, target + 9 * seen[:, :, None], keep), loss, rtol=0, atol=0)
    assert_close(loss, (guess - target).square()[~seen].mean())
    loss.backward()
    assert (guess.grad[seen] == 0).all() and (guess.grad[~seen] != 0).all()


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0.1, 100),
    shift=st.floats(-10, 10),
    p=st.sampled_from([2, 4, 7, 14]),
    seed=st.integers(0, 99),
)
def test_targets_are_standard_and_know_neither_light_nor_contrast(scale, shift, p, seed):
    x = batch(2, seed)
    target = patch_targets(x * scale + shift, p)
    assert_close(target.mean(-1), torch.zeros(target.shape[:2]), atol=1e-2, rtol=0)
    plain = (
        scale * patchify(x, p).std(-1) > 0.02
    )  # flatter ones feel the small number that keeps an even patch from 0 / 0
    assert plain.float().mean() > 0.9
    assert_close(target.std(-1)[plain], torch.ones(int(plain.sum())), atol=1e-2, rtol=0)
    assert_close(target[plain], patch_targets(x, p)[plain], atol=2e-2, rtol=1e-2)


def test_even_patches_become_zero():
    assert_close(
        patch_targets(torch.full((1, 1, 28, 28), 3.0), 7), torch.zeros(1, 16, 49), atol=1e-2, rtol=0
    )


def test_naive_fills_keep_what_is_seen_and_copy_neighbours():
    x, keep = torch.arange(16.0).view(1, 16, 1), torch.tensor([[0, 15]])
    filled = naive_fill(x, keep)[0, :, 0]
    assert filled[0] == 0 and filled[15] == 15 and filled[1] == 0 and filled[14] == 15
    assert_close(naive_fill(x, keep, nearest=False), torch.full((1, 16, 1), 7.5))


def test_painting_leaves_visible_patches_and_training_mode():
    model, x, keep = small(), batch(), random_masking(3, 16)
    for normalise in (True, False):
        same = (patchify(paint(model.train(), x, keep, normalise), 7) == patchify(x, 7)).all(-1)
        assert torch.equal(same, visible(keep, 16)) and model.training


def test_who_guesses_the_pattern_gets_the_picture_back():
    class Perfect(MaskedAutoencoder):
        def forward(self, images, keep):
            return patch_targets(images, 7)

    x = batch()
    assert_close(paint(Perfect(small().encoder), x, random_masking(3, 16)), x, atol=1e-4, rtol=1e-4)


def test_reconstruction_knows_its_painters():
    errors = reconstruction(small().eval(), batch(50))
    assert set(errors) == {"model", "nobody", "nearest visible patch", "mean of the visible"}
    assert (
        abs(errors["nobody"] - 48 / 49) < 1e-3 and errors["nearest visible patch"] > 1.5
    )  # of noise nothing can be guessed


# precision, modes, what is not looked at


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_stands_at_visible_patches_reaches_neither_loss_nor_gradient(bad):
    guess, target, keep = torch.randn(3, 16, 4), torch.randn(3, 16, 4), random_masking(3, 16)
    right, seen = hidden_error(guess, target, keep), visible(keep, 16)
    guess = guess.masked_fill(seen[:, :, None], bad).requires_grad_()
    loss = hidden_error(guess, target, keep)
    assert_close(loss, right, rtol=0, atol=0)
    loss.backward()
    assert (
        (guess.grad[seen] == 0).all()
        and guess.grad.isfinite().all()
        and (guess.grad[~seen] != 0).all()
    )


def test_the_loss_is_the_mean_over_hidden_patches_by_hand():
    guess, target = torch.zeros(2, 4, 3), torch.arange(24.0).view(2, 4, 3)
    keep = torch.tensor([[1, 2], [0, 3]])
    hidden = [target[0, 0], target[0, 3], target[1, 1], target[1, 2]]
    assert hidden_error(guess, target, keep).item() == pytest.approx(
        sum(float((p**2).mean()) for p in hidden) / 4
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_errors_and_targets_of_other_float_types(kind):
    x, keep = batch(4).to(kind), random_masking(4, 16, generator=torch.manual_seed(0))
    target = patch_targets(x, 7)
    assert target.dtype == torch.promote_types(kind, torch.float32)
    assert_close(target.float(), patch_targets(x.float(), 7), atol=1e-5, rtol=1e-5)
    guess = torch.randn(4, 16, 49).to(kind)
    assert_close(
        hidden_error(guess, target, keep).float(), hidden_error(guess.float(), target.float(), keep)
    )
    assert_close(
        naive_fill(x.view(4, 16, 49), keep).float(), naive_fill(x.float().view(4, 16, 49), keep)
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16])
def test_places_of_any_whole_type_are_places(kind):
    model, x, keep = small().eval(), batch(), random_masking(3, 16)
    assert torch.equal(visible(keep.to(kind), 16), visible(keep, 16))
    assert_close(model(x, keep.to(kind)), model(x, keep), rtol=0, atol=0)
    assert torch.equal(take(x.view(3, 16, 49), keep.to(kind)), take(x.view(3, 16, 49), keep))
    assert torch.equal(visible(keep.numpy(), 16), visible(keep, 16))


def test_a_patch_of_one_pixel_has_no_pattern():
    assert torch.equal(patch_targets(torch.randn(2, 1, 4, 4), 1), torch.zeros(2, 16, 1))
    assert masked_patches()(small(image_size=8, patch_size=1), torch.randn(2, 1, 8, 8))[
        0
    ].isfinite()


def noisy():
    model = small()
    model.encoder.blocks[0].drop = model.decoder.blocks[0].drop = torch.nn.Dropout(0.5)
    return model.train()


def modes(model):
    return [m.training for m in model.modules()]


def test_judging_and_painting_use_eval_and_leave_each_mode_alone():
    model, x, keep = noisy(), batch(), random_masking(3, 16)
    model.encoder.norm.eval()  # a mode of its own
    before = modes(model)
    assert reconstruction(model, x) == reconstruction(model, x) and modes(model) == before
    assert torch.equal(paint(model, x, keep), paint(model, x, keep)) and modes(model) == before
    assert not torch.equal(model(x, keep), model(x, keep))  # in training mode dropout is at work


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_modes_come_back_after_an_error(error):
    class Broken(MaskedAutoencoder):
        def forward(self, images, keep):
            raise error

    model = Broken(small().encoder)
    model.encoder.norm.eval()
    before = modes(model)
    for call in (
        lambda: paint(model, batch(), random_masking(3, 16)),
        lambda: reconstruction(model, batch()),
    ):
        with pytest.raises(error):
            call()
        assert modes(model) == before and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda d: take(batch()[0, 0], torch.zeros(3, 1).long()), "expected (b, n, d)"),
        (
            lambda d: take(torch.zeros(2, 4, 3), torch.tensor([[0], [4]])),
            "positions runs from 0 to 4; expected 0 to 3",
        ),
        (lambda d: visible(torch.tensor(3), 4), "keep has shape ()"),
        (lambda d: visible(torch.zeros(2, 1).long(), 0), "n is 0"),
        (lambda d: hidden_error(None, torch.zeros(1, 4, 2), torch.tensor([[0]])), "guess is None"),
        (
            lambda d: hidden_error(
                torch.zeros(1, 4, 2).long(), torch.zeros(1, 4, 2), torch.tensor([[0]])
            ),
            "expected floats",
        ),
        (
            lambda d: small().decoder(torch.randn(2, 3, 16), random_masking(2, 16)),
            "to fit features",
        ),
        (lambda d: PatchDecoder(16, 16, 49, dim=0), "dim is 0"),
        (lambda d: PatchDecoder(16, 16, 49.5), "pixels is 49.5"),
        (lambda d: masked_patches(0.5, normalise="no"), "normalise is 'no'"),
        (lambda d: crops(None), "data is None"),
        (
            lambda d: pretrain(small(), d.train_images[:64], PLAIN, steps=1, lr=0, title=""),
            "lr is 0",
        ),
        (lambda d: pretrain(small(), d.train_images[:64], PLAIN, steps=0, title=""), "steps is 0"),
        (
            lambda d: pretrain(small().half(), d.train_images[:64], PLAIN, steps=1, title=""),
            "expected float32",
        ),
        (
            lambda d: pretrain(small(), d.train_images[:64], None, steps=1, title=""),
            "augment is None",
        ),
        (
            lambda d: vit_mae.compare_ratios(d, ratios=(0.501, 0.502)),
            "no two of the same per cent",
        ),
        (lambda d: vit_mae.compare_ratios(d, ratios=()), "ratios are []"),
        (lambda d: vit_short.make(methods="mae"), "methods are 'mae'"),
        (lambda d: vit_mae.make(epochs=0), "epochs is 0"),
    ],
)
def test_what_masked_images_cannot_use_is_named(digits, call, says):
    assert says in complaint(call, digits)


# runs


class Stopped(Exception):
    "The plug was pulled"


def test_a_stopped_run_goes_on_to_the_same_losses(digits, tmp_path):
    def run(path=None, stop=None, **change):
        def each(step):
            if step.n == stop:
                raise Stopped

        how = dict(
            steps=8,
            batch_size=16,
            checkpoint=path,
            save_every=3,
            title="",
            each=each,
            images=digits.train_images[:64],
            augment=PLAIN,
        )
        return pretrain(small(), **how | change)

    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=4)
    assert_close(run(tmp_path / "run").losses, run().losses, rtol=0, atol=0)
    other = digits.train_images[:64].clone()
    late = int(epoch_order(64, 0, 0)[-1])  # one picture, which is not in the first batch
    other[late] = 255 - other[late]
    for change in (
        dict(ratio=0.5),
        dict(normalise=False),
        dict(steps=9),
        dict(lr=1e-3),
        dict(seed=1),
        dict(images=other),
        dict(augment=Augment(area=(0.5, 1.0), contrast=0, brightness=0, flip=0)),
    ):
        with pytest.raises(ValueError, match="of another run"):
            run(tmp_path / "run", **change)


def test_it_learns(digits):
    losses = pretrain(
        small(dim=32), digits.train_images, PLAIN, steps=60, batch_size=32, lr=3e-3, title=""
    ).losses
    assert losses[-10:].mean() < 0.9 * losses[:3].mean()


# bad input: one clear sentence each


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, 0.01, 0.99, float("nan"), "all"])
def test_ratios_that_hide_nothing_or_all_are_refused(digits, ratio):
    for call in (
        lambda: random_masking(2, 16, ratio),
        lambda: masked_patches(ratio)(small(), batch()),
        lambda: pretrain(small(), digits.train_images[:64], PLAIN, steps=1, ratio=ratio, title=""),
    ):
        with pytest.raises(
            (ValueError, TypeError),
            match="hides at least one and leaves at least one|ratio is .* number",
        ):
            call()


@pytest.mark.parametrize(
    "keep, error, words",
    [
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, "different positions"),
        (torch.tensor([[0, 16]] * 3), ValueError, "0 to 15"),
        (torch.tensor([[-1, 0]] * 3), ValueError, "0 to 15"),
        (torch.tensor([[0, 1]]), ValueError, "a row for each image"),
        (torch.arange(4), ValueError, "a row for each image"),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, "a row for each image"),
        (torch.rand(3, 4), TypeError, "whole numbers"),
        ([[0, 1]] * 3, TypeError, "keep is a list"),
    ],
)
def test_wrong_places_are_refused(keep, error, words):
    with pytest.raises(error, match=words):
        small()(batch(), keep)


def test_other_bad_input_is_refused(digits):
    with pytest.raises(ValueError, match="without a class token"):
        MaskedAutoencoder(ViT(dim=16, depth=1, pool="class"))
    with pytest.raises(TypeError, match="expected a ViT"):
        MaskedAutoencoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="patches tile an image"):
        patch_targets(torch.randn(1, 1, 28, 28), 5)
    with pytest.raises(ValueError, match="patch_size|tile"):
        ViT(patch_size=5)
    with pytest.raises(TypeError, match="standardised floats"):
        patch_targets(digits.train_images[:2], 7)
    with pytest.raises(ValueError, match="expected \\(b, 1, 28, 28\\)"):
        small()(torch.randn(2, 1, 14, 14), random_masking(2, 16))
    with pytest.raises(ValueError, match="expected \\(b, m, 16\\)"):
        small().decoder(torch.randn(2, 4, 8), random_masking(2, 16))
    with pytest.raises(ValueError, match="at least one hidden"):
        hidden_error(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), torch.arange(4)[None])
    with pytest.raises(ValueError, match="expected \\(1, 4, 2\\) to fit guess"):
        hidden_error(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), torch.tensor([[0]]))
    with pytest.raises(TypeError, match="expected a MaskedAutoencoder"):
        pretrain(ViT(dim=16, depth=1), digits.train_images[:64], PLAIN, steps=1, title="")
    with pytest.raises(ValueError, match="got 15 patches of an image; expected a square number"):
        naive_fill(torch.randn(2, 15, 4), torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="b is 0"):
        random_masking(0, 16)
