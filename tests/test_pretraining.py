"Pretraining and fine-tuning beyond their lessons: interrupted recipes, small sets, bad input"

import json
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2

import foundation.pretraining.contrastive as contrastive
import foundation.pretraining.masked_image as masked_image
import foundation.recipes.few_labels as few_labels_recipe
import foundation.recipes.resnet_simclr as resnet_simclr
import foundation.training.run as training_run
from foundation.data.augment import Augment, PerImage
from foundation.data.images import load_images
from foundation.data.tasks import few_labels
from foundation.evaluation.probes import encode_all, fit_head, fit_linear
from foundation.evaluation.scores import predict
from foundation.finetuning.loop import finetune
from foundation.models.convnets import ResNet
from foundation.models.card import WEIGHTS, read_card
from foundation.models.outside import as_encoder
from foundation.models.pretrained import load_weights
from foundation.models.vit import ViT
from foundation.pretraining.masked_image import PatchDecoder

STAGES = dict(epochs=2, lr=1e-3, temperature=0.2), dict(epochs=2, lr=1e-3, temperature=0.5)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def small(seed=0):
    torch.manual_seed(seed)
    return ResNet(widths=(8, 16, 16), depths=(1, 1, 1))


class Stopped(Exception):
    "The plug was pulled"


def test_a_stopped_recipe_goes_on_to_the_same_weights(digits, tmp_path, monkeypatch):
    few = replace(
        digits, train_images=digits.train_images[:640], train_labels=digits.train_labels[:640]
    )
    monkeypatch.setattr(resnet_simclr, "load_images", lambda: few)
    monkeypatch.setattr(resnet_simclr, "ResNet", small)
    judged = few_labels_recipe.label_efficiency
    monkeypatch.setattr(
        few_labels_recipe,
        "label_efficiency",
        lambda *args, **options: judged(*args, **options | dict(steps=2)),
    )

    def recipe(name, stop=None):
        monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / name))
        plain = training_run.train

        def train(*args, **kwargs):
            for step in plain(*args, **kwargs):
                yield step
                if step.n == stop:
                    raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(training_run, "train", train)
            return resnet_simclr.make("net", STAGES, batch_size=64, folder=tmp_path)

    straight = json.loads(recipe("straight").with_suffix(".json").read_text())
    with pytest.raises(Stopped):
        recipe("stopped", stop=19)  # the last step of the first stage, which has been saved
    resumed = json.loads(recipe("stopped").with_suffix(".json").read_text())
    assert (
        resumed["sha256"] == straight["sha256"]
        and resumed["steps"] == 40
        and resumed["epochs"] == 4
    )
    assert len(straight["metrics"]["linear_probe_100_labels"]) == 5
    load_weights("net", folder=tmp_path)


def test_channels_last_momentum_survives_a_stop(digits, tmp_path):
    """Momentum saved in one memory layout and read back in another is
    silently shuffled by a fused optimizer."""
    augment, images = Augment(), digits.train_images[:256]

    def run(path=None, stop=None):
        def each(step):
            if step.n == stop:
                raise Stopped

        return contrastive.pretrain(
            small(),
            images,
            augment,
            steps=8,
            batch_size=32,
            checkpoint=path,
            save_every=3,
            title="",
            each=each,
        )

    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=4)
    torch.testing.assert_close(run(tmp_path / "run").losses, run().losses, rtol=0, atol=0)


def test_a_checkpoint_of_another_recipe_is_refused(digits, tmp_path):
    def run(steps):
        return contrastive.pretrain(
            small(),
            digits.train_images[:64],
            Augment(),
            steps=steps,
            batch_size=16,
            checkpoint=tmp_path / "run",
            title="",
        )

    run(2)
    with pytest.raises(ValueError, match="of another run"):
        run(4)


@pytest.mark.parametrize("batch_size, words", [(1, "from 2 on"), (65, "64")])
def test_batches_that_cannot_be_are_refused(digits, batch_size, words):
    with pytest.raises(ValueError, match=words):
        contrastive.pretrain(
            small(), digits.train_images[:64], Augment(), steps=1, batch_size=batch_size, title=""
        )


def test_a_fitted_head_says_what_the_probe_says(digits):
    model, x, y = small(), digits.floats(digits.train_images[:300]), digits.train_labels[:300]
    body = {name: v.clone() for name, v in model.body.state_dict().items()}
    fit_head(model, x, y, l2=0.3)
    probe = fit_linear(encode_all(model, x), y, 0.3)
    torch.testing.assert_close(predict(model, x), probe(encode_all(model, x)), atol=1e-4, rtol=1e-4)
    assert (
        all(torch.equal(v, body[name]) for name, v in model.body.state_dict().items())
        and model.training
    )


def test_a_head_needs_every_class(digits):
    keep = digits.train_labels[:300] != 3
    with pytest.raises(ValueError, match="9 classes; the head has 10 outputs"):
        fit_head(
            small(), digits.floats(digits.train_images[:300][keep]), digits.train_labels[:300][keep]
        )


def test_a_frozen_body_keeps_its_weights_to_the_last_bit(digits):
    model, i = small(), few_labels(digits.train_labels, 50, 0)
    before = {name: p.clone() for name, p in model.body.named_parameters()}
    finetune(
        model,
        digits.train_images[i],
        digits.train_labels[i],
        Augment(),
        steps=3,
        lr=0.0,
        head_lr=1e-2,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.body.named_parameters())
    with pytest.raises(AssertionError):  # and a body that is not frozen does move
        finetune(model, digits.train_images[i], digits.train_labels[i], Augment(), steps=3, lr=1e-3)
        assert all(torch.equal(p, before[name]) for name, p in model.body.named_parameters())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(labels=torch.tensor([0, 1, 2, 10])), "0 to 10"),
        (dict(labels=torch.tensor([0, -1, 2, 3])), "-1 to 3"),
        (dict(labels=torch.empty(0, dtype=torch.long)), "labels is empty|no labels|none"),
        (dict(lr=-1.0), "lr is -1.0|lr=-1.0"),
        (dict(head_lr=0.0), "head_lr is 0.0|head_lr=0.0"),
    ],
)
def test_fine_tuning_refuses(digits, change, words):
    good = dict(labels=torch.arange(10), steps=1, lr=1e-3) | change
    with pytest.raises(ValueError, match=words):
        finetune(
            small(), digits.train_images[: len(good["labels"]) or 4], augment=Augment(), **good
        )


@pytest.mark.parametrize("name", sorted(path.stem for path in WEIGHTS.glob("*.safetensors")))
def test_a_shipped_file_is_small_and_its_card_tells_how_it_was_made(name):
    card = read_card(name)
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 6e6
    assert (
        card["steps"] > 0
        and card["seconds"] > 0
        and card["data"]
        and card["hardware"]
        and card["sha256"]
    )
    assert "loss_first" not in card or card["loss_last"] < card["loss_first"]
    if card["architecture"] in ("Delta", "Stored"):
        return  # tests/test_lora.py and tests/test_distillation.py load them into their base
    model = load_weights(
        name, PatchDecoder(**card["config"]) if card["architecture"] == "PatchDecoder" else None
    )
    assert not model.training and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "bert_glosses",
        "resnet_simclr",
        "vit_mae",
        "vit_mae_decoder",
        "vit_mae_short",
        "vit_simclr_short",
    ],
)
def test_a_card_of_pretraining_is_complete(name):
    card = read_card(name)
    assert {
        "data",
        "method",
        "epochs",
        "steps",
        "batch_size",
        "seconds",
        "hardware",
        "metrics",
        "sha256",
        "code_version",
    } <= card.keys()
    assert card["metrics"] and "no labels" in card["data"] and card["steps"] > card["epochs"] > 0


def mean(scores):
    return sum(scores) / len(scores)


def gain(metrics, labels="100"):
    arms = metrics["label_efficiency"]
    assert all(len(arms[arm][labels]) >= 3 for arm in ("fine-tuned", "from scratch"))
    return mean(arms["fine-tuned"][labels]) - mean(arms["from scratch"][labels])


def test_the_cards_keep_what_was_promised():
    text, contrast, masked = (
        read_card(name)["metrics"] for name in ("bert_glosses", "resnet_simclr", "vit_mae")
    )
    assert text["masked_accuracy"] >= 3 * text["unigram_accuracy"]
    assert contrast["linear_probe_all_labels_three_stages"] >= 0.90
    assert gain(masked) >= 0.10 and gain(contrast) >= 0.08  # at equal steps
    for metrics in (
        contrast,
        masked,
    ):  # a scratch net that trains five times as long is nearer, and still behind
        arms = metrics["label_efficiency"]
        patient = mean(metrics["scratch_with_five_times_the_steps"])
        assert mean(arms["from scratch"]["100"]) < patient < mean(arms["fine-tuned"]["100"]) - 0.05
        assert set(arms) == set(few_labels_recipe.CHOICES) and all(
            set(rows) == {"50", "100", "1000"} for rows in arms.values()
        )
        assert metrics["knn"] > metrics["knn_pixels"] > metrics["knn_random_weights"]


def test_what_was_not_reached_is_on_the_card_as_it_is():
    """80 % from 100 labels, and 90 % from one stage: the lesson says so,
    and no card may say otherwise unnoticed."""
    scores = read_card("resnet_simclr")["metrics"]
    assert (
        0.77 < mean(scores["linear_probe_100_labels"]) < 0.80
        and 0.88 < scores["linear_probe_all_labels"] < 0.90
    )
    assert 0.77 < mean(scores["linear_probe_100_labels_three_stages"]) < 0.80


def test_contrast_and_masked_images_had_the_same_encoder_data_and_steps():
    a, b = (read_card(f"vit_{method}_short") for method in ("mae", "simclr"))
    assert all(
        a[key] == b[key]
        for key in ("architecture", "config", "data", "steps", "epochs", "batch_size")
    )
    assert all(
        len(scores) >= 3 for card in (a, b) for scores in card["metrics"]["linear_probe"].values()
    )


# networks and pictures from outside


def tv_resnet():
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as Theirs

    torch.manual_seed(0)
    return Theirs(BasicBlock, [1, 1, 1, 1], num_classes=3)


def timm_vit(size=16, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = dict(patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return timm.models.VisionTransformer(size, **sizes | options)


def hf_vit(size=16):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(image_size=size, patch_size=4, **sizes)
    return transformers.ViTModel(config, add_pooling_layer=False)


def tv_vit(size=16):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(size, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)


def colors(n=8, h=16, w=16):
    bits = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=bits)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


PLAN = dict(steps=2, batch_size=4, title="", precision="fp32")


@pytest.mark.parametrize("make", [tv_resnet, timm_vit, hf_vit, tv_vit])
def test_contrast_trains_networks_from_outside(make):
    net = make()
    before = weights(net)
    run = contrastive.pretrain(net, colors(), Augment(hue=0.1), **PLAN)
    assert run.losses.isfinite().all() and not torch.equal(before, weights(net))


def test_contrast_takes_a_compiled_network():
    plain, net = tv_resnet(), tv_resnet()
    a = contrastive.pretrain(plain, colors(), Augment(), **PLAN).losses
    b = contrastive.pretrain(torch.compile(net, backend="eager"), colors(), Augment(), **PLAN)
    torch.testing.assert_close(b.losses, a)
    assert not torch.equal(weights(net), weights(tv_resnet()))  # it is this network that has learnt


class Outside(torch.nn.Module):
    "One of ours as a stranger: pictures in, features out"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.encode(x)


def test_ours_as_a_stranger_learns_the_same(digits):
    images, known = digits.train_images[:64], small()
    stranger = Outside(small())
    example = torch.zeros(2, 1, 28, 28)
    a = contrastive.pretrain(known, images, Augment(), **PLAN)
    b = contrastive.pretrain(as_encoder(stranger, example), images, Augment(), **PLAN)
    torch.testing.assert_close(a.losses, b.losses, rtol=0, atol=0)
    torch.testing.assert_close(weights(known), weights(stranger), rtol=0, atol=0)
    with pytest.raises(TypeError, match="hand in inputs to try it on"):
        contrastive.pretrain(Outside(small()), images, Augment(), **PLAN)


class Lazy(torch.utils.data.Dataset):
    "Pictures with a label, one at a time"

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], 7


@pytest.mark.parametrize("masked", [False, True])
def test_a_data_set_gives_what_its_tensor_gives(masked):
    images = colors()

    def losses(source, augment=Augment(hue=0.1)):
        if masked:
            net = masked_image.MaskedAutoencoder(timm_vit(), dim=8, depth=1, heads=2)
            return masked_image.pretrain(net, source, augment, **PLAN).losses
        return contrastive.pretrain(timm_vit(), source, augment, **PLAN).losses

    torch.testing.assert_close(losses(Lazy(images)), losses(images), rtol=0, atol=0)
    flip = PerImage(v2.RandomHorizontalFlip())  # a transform of torchvision in the place of ours
    torch.testing.assert_close(losses(images, flip), losses(images, flip), rtol=0, atol=0)
    assert not torch.equal(losses(images, flip), losses(images))


@pytest.mark.parametrize("make", [timm_vit, hf_vit, tv_vit])
def test_masking_trains_transformers_from_outside(make):
    net = make()
    model = masked_image.MaskedAutoencoder(net, dim=8, depth=1, heads=2)
    before = weights(net)
    run = masked_image.pretrain(model, colors(), Augment(), **PLAN)
    assert run.losses.isfinite().all() and not torch.equal(before, weights(net))
    x = colors().float() / 255
    keep = masked_image.random_masking(8, 16)
    hidden = torch.kron(
        1 - masked_image.visible(keep, 16).float().view(8, 1, 4, 4), torch.ones(4, 4)
    )
    with torch.no_grad():  # whatever stands at hidden places
        torch.testing.assert_close(
            model.encode_visible(x + 9 * hidden, keep), model.encode_visible(x, keep)
        )
        assert not torch.allclose(
            model.encode_visible(x + 9 * (1 - hidden), keep), model.encode_visible(x, keep)
        )


def test_masking_takes_pictures_that_are_not_square():
    model = masked_image.MaskedAutoencoder(timm_vit(size=(8, 16)), dim=8, depth=1, heads=2)
    losses = masked_image.pretrain(model, colors(h=8), Augment(), **PLAN).losses
    assert losses.isfinite().all() and model.encoder.patches.count == 8


def test_masking_says_why_a_convolution_does_not_fit():
    with pytest.raises(TypeError, match="reads the visible patches alone.*by contrast"):
        masked_image.MaskedAutoencoder(tv_resnet())


def test_a_compiled_masked_autoencoder_is_one():
    def model():
        torch.manual_seed(0)
        return masked_image.MaskedAutoencoder(timm_vit(), dim=8, depth=1, heads=2)

    a = masked_image.pretrain(model(), colors(), Augment(), **PLAN).losses
    b = masked_image.pretrain(torch.compile(model(), backend="eager"), colors(), Augment(), **PLAN)
    torch.testing.assert_close(b.losses, a)


def as_timm(ours):
    "The same weights in timm's ViT, without a class token"
    options = dict(embed_dim=ours.dim, depth=len(ours.blocks), class_token=False)
    theirs = timm_vit(**options, num_heads=4, global_pool="avg", fc_norm=False)
    a, b = ours.state_dict(), theirs.state_dict()
    new = {"pos_embed": a["position"][None]}
    new["patch_embed.proj.weight"] = a["patches.project.weight"].view(-1, 3, 4, 4)
    new["patch_embed.proj.bias"] = a["patches.project.bias"]
    for name in b:
        if ".attn.qkv." in name:
            block, kind = name.split(".attn.qkv.")
            parts = [a[f"{block}.attention.{q}.{kind}"] for q in ("query", "key", "value")]
            new[name] = torch.cat(parts)
        elif name not in new and not name.startswith("head"):
            swap = (("attn.proj", "attention.out"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))
            key = name
            for old, mine in swap:
                key = key.replace(old, mine)
            new[name] = a[key]
    theirs.load_state_dict(new, strict=False)
    return theirs


def test_our_vit_and_the_same_weights_in_timms_paint_the_same():
    torch.manual_seed(0)
    ours = ViT(image_size=16, patch_size=4, channels=3, dim=16, depth=2)
    models = []
    for encoder in (ours, as_timm(ours)):
        torch.manual_seed(1)
        models.append(masked_image.MaskedAutoencoder(encoder, dim=8, depth=1, heads=2))
    runs = [masked_image.pretrain(m, colors(), Augment(), **PLAN | dict(steps=3)) for m in models]
    torch.testing.assert_close(runs[0].losses, runs[1].losses, atol=1e-5, rtol=1e-5)
    x, keep = colors().float() / 255, masked_image.random_masking(8, 16)
    torch.testing.assert_close(models[0](x, keep), models[1](x, keep), atol=1e-4, rtol=1e-4)


def test_what_the_encoder_says_of_visible_patches_is_what_transformers_vitmae_says():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(image_size=16, patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1)
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(**sizes, decoder_num_attention_heads=2, mask_ratio=0.75)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(**config.to_dict()), add_pooling_layer=False)
    vit.load_state_dict(theirs.vit.state_dict())
    model = masked_image.MaskedAutoencoder(vit.eval())
    x, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    keep = noise.argsort(1)[:, :4]
    with torch.no_grad():
        said = theirs.vit(x, noise=noise).last_hidden_state[:, 1:]
        torch.testing.assert_close(model.encode_visible(x, keep), said, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model.encode_visible(x, keep.flip(1)), said, atol=1e-3)
        out = theirs(x, noise=noise)  # and the loss is theirs, but for where a patch's pixels stand
    guess = out.logits.view(3, 16, 4, 4, 3).permute(0, 1, 4, 2, 3).flatten(2)
    loss = masked_image.hidden_error(guess, masked_image.patchify(x, 4), keep)
    torch.testing.assert_close(loss, out.loss)
