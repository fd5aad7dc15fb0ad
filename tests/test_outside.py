"Networks of torchvision, timm and transformers, compiled and distributed, in every method"

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from foundation.core.checks import complaint
from foundation.core.modules import head_of, logits_of, unwrapped
from foundation.data.augment import Augment
from foundation.data.images import ImageDataset
from foundation.evaluation.probes import encode_all, fit_head, knn_accuracy, linear_probe
from foundation.evaluation.scores import accuracy, predict
from foundation.finetuning.epochs import evaluate, train_epoch
from foundation.finetuning.loop import finetune, frozen_norms, thaw
from foundation.finetuning.rate_search import range_test
from foundation.models.convnets import ResNet
from foundation.models.heads import Classifier, TextClassifier, replace_head
from foundation.models.outside import as_encoder, without_last
from foundation.training.loop import classify
from foundation.training.parameter_groups import head_groups, layer_groups, layers

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
SIDE = 32


def ours():
    return ResNet(channels=3, widths=(4, 8), depths=(1, 1), classes=3)


def tv_resnet(**more):
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=3, **more)


def tv_vit():
    return torchvision.models.VisionTransformer(SIDE, 8, 3, 2, 16, 32, num_classes=3)


def tv_mobilenet():
    return torchvision.models.mobilenet_v3_small(weights=None, num_classes=3)


def timm_net(name, **sizes):
    return timm.create_model(name, pretrained=False, num_classes=3, **sizes)


def timm_vit():
    sizes = dict(img_size=SIDE, patch_size=8, embed_dim=16, depth=3, num_heads=2)
    return timm_net("vit_tiny_patch16_224", **sizes)


def timm_convnext():
    return timm_net("convnext_atto", depths=(1, 2, 1, 1), dims=(4, 8, 8, 8))


def hf_vit():
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification(config)


def hf_resnet():
    sizes = dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    config = transformers.ResNetConfig(num_labels=3, **sizes)
    return transformers.ResNetForImageClassification(config)


def hf_bert():
    config = transformers.BertConfig(vocab_size=30, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def hf_distilbert():
    sizes = dict(dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    config = transformers.DistilBertConfig(vocab_size=30, num_labels=3, **sizes)
    return transformers.DistilBertForSequenceClassification(config)


def hf_gpt2():
    sizes = dict(n_embd=16, n_layer=3, n_head=2, n_positions=16)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    config = transformers.GPT2Config(vocab_size=30, num_labels=3, **sizes, **special)
    return transformers.GPT2ForSequenceClassification(config)


def compiled():
    return torch.compile(tv_resnet(), backend="eager")


def distributed():
    return nn.parallel.DistributedDataParallel(tv_resnet(), find_unused_parameters=True)


PICTURES = [ours, tv_resnet, tv_vit, tv_mobilenet, timm_vit, timm_convnext, hf_vit, hf_resnet]
WRAPPED = [compiled, distributed]
TEXTS = [hf_bert, hf_distilbert, hf_gpt2]
name = pytest.mark.parametrize("kind", PICTURES + WRAPPED + TEXTS, ids=lambda kind: kind.__name__)
pictures = pytest.mark.parametrize("kind", PICTURES + WRAPPED, ids=lambda kind: kind.__name__)
texts = pytest.mark.parametrize("kind", TEXTS, ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    "A process group of this process, as DistributedDataParallel wants one"
    place = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{place}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(kind, count=12):
    "Inputs as the network takes them, and labels 0, 1, 2, 0 …; each class is of a kind"
    labels = torch.arange(count) % 3
    if kind in TEXTS:
        tokens = torch.randint(2, 30, (count, 7))
        tokens[:, :3] = 4 + 5 * labels[:, None]
        tokens[::4, 5:] = 0
        return tokens, labels
    return torch.randn(count, 3, SIDE, SIDE) / 4 + labels[:, None, None, None], labels


def small_bytes(count=12):
    labels = torch.arange(count) % 3
    noise = torch.randint(60, (count, 3, SIDE, SIDE))
    return (noise + 70 * labels[:, None, None, None]).to(torch.uint8), labels


# What a network is made of ------------------------------------------------------------------------


@name
def test_every_parameter_stands_in_one_layer(kind):
    model = kind()
    found = [p for own in layers(model).values() for p in own]
    assert len(found) == len(set(found)) and set(found) == set(model.parameters())
    groups = layer_groups(model, 1e-3, 0.5)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert {*head_of(model)[1].parameters()} <= {*groups[0]["params"]}
    assert {*head_of(model)[1].parameters()} <= {*head_groups(model, 1e-3)[-1]["params"]}


BLOCKS = {  # kind: what a block is called in its library
    tv_resnet: ["BasicBlock"],
    tv_vit: ["EncoderBlock"],
    timm_vit: ["Block"],
    timm_convnext: ["ConvNeXtBlock"],
    hf_vit: ["ViTLayer"],
    hf_bert: ["BertLayer"],
    hf_distilbert: ["TransformerBlock"],
    hf_gpt2: ["GPT2Block"],
}


def block_of(kind):
    return [
        name
        for name, m in kind().named_modules()
        if type(m).__name__ in BLOCKS[kind] and "." in name
    ]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_blocks_are_layers_in_order(kind):
    "A plain count; a stage of a single block may stand for it"
    blocks, found = block_of(kind), list(layers(kind()))
    assert blocks
    places = [
        next(i for i, part in enumerate(found) if f"{block}.".startswith(f"{part}."))
        for block in blocks
    ]
    assert places == sorted(set(places))  # none shares its layer with another, early ones first
    assert 0 < places[0] and places[-1] < len(found) - 1  # what reads is before, the head after


def test_a_stage_is_opened_and_what_leads_to_it_stays_whole():
    found = list(layers(timm_convnext()))
    assert {"stages.1.downsample", "stages.1.blocks.0", "stages.1.blocks.1"} <= {*found}


def test_twelve_blocks_of_bert_are_twelve_layers():
    config = transformers.BertConfig(vocab_size=30, **SIZES | dict(num_hidden_layers=12))
    found = layers(transformers.BertForSequenceClassification(config))
    rows = [f"bert.encoder.layer.{i}" for i in range(12)]
    assert list(found) == ["bert.embeddings", *rows, "bert.pooler", "classifier"]
    bare = layers(TextClassifier(as_encoder(transformers.BertModel(config)), 3))
    assert [name for name in bare if "layer." in name] == [f"encoder.model.{n[5:]}" for n in rows]


@name
def test_a_new_head_has_other_classes_and_the_same_features(kind):
    model, (x, _) = kind().eval(), data(kind)
    before = without_last(model)(x) if kind not in TEXTS else logits_of(without_last(model), x)
    before = getattr(before, "logits", before)
    assert replace_head(model, 5) is model and logits_of(model, x).shape == (12, 5)
    after = logits_of(without_last(model), x)
    torch.testing.assert_close(after, before)
    head = head_of(model)[1]
    torch.testing.assert_close(head(after), logits_of(model, x), rtol=1e-4, atol=1e-5)
    for owner in (unwrapped(model), getattr(unwrapped(model), "config", None)):
        assert getattr(owner, "num_labels", 5) == 5 == getattr(owner, "num_classes", 5)


@pictures
def test_features_are_what_the_head_reads_and_have_gradients(kind):
    model, (x, _) = kind().eval(), data(kind)
    encoder = as_encoder(model)
    features = encoder.encode(x)
    assert features.shape == (12, encoder.dim)
    torch.testing.assert_close(
        head_of(model)[1](features), logits_of(model, x), rtol=1e-4, atol=1e-5
    )
    features.square().sum().backward()
    body = {*model.parameters()} - {*head_of(model)[1].parameters()}
    assert all(p.grad is not None for p in body)
    assert as_encoder(encoder) is encoder
    if kind is not ours:
        assert {*encoder.parameters()} == body  # nothing that would stay without a gradient


@texts
def test_texts_are_read_as_their_library_reads_them(kind):
    model, (tokens, _) = kind().eval(), data(kind)
    encoder, real = as_encoder(model), tokens != 0
    with torch.no_grad():
        want = model.base_model(tokens, attention_mask=real.long()).last_hidden_state
        torch.testing.assert_close(encoder.encode(tokens, real), want)
        short = encoder.encode(tokens[:1, :5])  # the first row without its padding
        torch.testing.assert_close(short[0], want[0, :5], rtol=1e-4, atol=1e-5)
    classifier = TextClassifier(encoder, 3)
    assert classifier(tokens).shape == (12, 3)
    classifier(tokens).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@texts
def test_padding_does_not_change_the_logits_of_a_text(kind):
    model, (tokens, _) = kind().eval(), data(kind)
    more = nn.functional.pad(tokens, (0, 4))
    torch.testing.assert_close(
        logits_of(model, more), logits_of(model, tokens), rtol=1e-4, atol=1e-5
    )


def test_bodies_without_a_head_say_their_width_or_are_tried():
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, **SIZES)
    x = torch.randn(2, 3, SIDE, SIDE)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())  # a map (b, 6, h, w)
    for model in (timm_net("resnet18"), transformers.ViTModel(config), hf_resnet().resnet):
        model = model.reset_classifier(0) or model if hasattr(model, "reset_classifier") else model
        encoder = as_encoder(model)
        assert encoder.encode(x).shape == (2, encoder.dim) and encoder.model is model
        assert Classifier(encoder, 4)(x).shape == (2, 4)
    encoder = as_encoder(body, x)
    assert encoder.dim == 6 and not encoder.model[0].weight.grad
    torch.testing.assert_close(encoder.encode(x), body(x).mean((2, 3)))


def test_tokens_without_a_summary_are_read_at_the_first():
    config = transformers.ViTConfig(image_size=SIDE, patch_size=8, **SIZES)
    model, x = transformers.ViTModel(config, add_pooling_layer=False).eval(), data(hf_vit)[0]
    torch.testing.assert_close(as_encoder(model).encode(x), model(x).last_hidden_state[:, 0])


def test_what_does_not_fit_is_told_how_to():
    x = torch.randn(2, 3, SIDE, SIDE)
    assert "hand in inputs" in complaint(as_encoder, nn.Conv2d(3, 4, 1))
    assert "method `encode`" in complaint(as_encoder, nn.Unfold(3), x)  # (b, n, m), but of maps
    assert "x.expand(-1, 3, -1, -1)" in complaint(as_encoder(tv_resnet()).encode, x[:, :1])
    assert "makes them grey" in complaint(as_encoder(nn.Conv2d(1, 4, 1), x[:, :1]).encode, x)
    assert "Classifier(as_encoder(model, example)" in complaint(replace_head, nn.Conv2d(3, 4, 1), 3)
    two = timm_net(
        "deit_tiny_distilled_patch16_224", img_size=SIDE, embed_dim=8, num_heads=2, depth=1
    )
    assert "no linear `head`" in complaint(replace_head, two, 5)
    t5 = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert "get_encoder" in complaint(as_encoder, transformers.T5Model(t5))


def test_copies_states_and_compiled_encoders_say_the_same():
    encoder, x = as_encoder(tv_resnet()).eval(), torch.randn(2, 3, SIDE, SIDE)
    want = encoder.encode(x)
    twin = copy.deepcopy(encoder)
    torch.testing.assert_close(twin.encode(x), want)
    other = as_encoder(tv_resnet()).eval()
    other.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(other.encode(x), want)
    torch.testing.assert_close(torch.compile(encoder, backend="eager")(x), want)


# Every method -------------------------------------------------------------------------------------


@name
def test_features_of_a_set_serve_probes(kind):
    model, (x, y) = kind().train(), data(kind, 30)
    features = encode_all(model, x, batch_size=7)
    assert features.ndim == 2 and all(m.training for m in model.modules())
    assert linear_probe(features, y, features, y) > 0.85
    assert knn_accuracy(features, y, features, y, k=1) == 1


@name
def test_a_fitted_head_is_the_probe(kind):
    model, (x, y) = kind(), data(kind, 30)
    if kind is hf_gpt2:
        assert "bias" in complaint(fit_head, model, x, y)  # its head has none
        replace_head(model, 3)
    body = {k: v.clone() for k, v in unwrapped(model).state_dict().items()}
    assert fit_head(model, x, y, l2=1e-3) is model
    assert accuracy(predict(model, x), y) > 0.9
    head = head_of(model)[0]
    now = unwrapped(model).state_dict()
    assert all(torch.equal(now[k], v) for k, v in body.items() if not k.startswith(f"{head}."))


@name
def test_thaw_opens_the_head_first(kind):
    model = kind()
    assert len(thaw(model, 1)) == 1
    learning = {p for p in model.parameters() if p.requires_grad}
    assert {*head_of(model)[1].parameters()} <= learning
    thaw(model, len(layers(model)))
    assert all(p.requires_grad for p in model.parameters())


@pictures
def test_finetuning_learns(kind):
    model, (images, labels) = kind(), small_bytes()
    before = [p.detach().clone() for p in model.parameters()]
    plan = dict(augment=Augment(mean=0.5, std=0.25), batch_size=6, steps=6)
    losses = finetune(model, images, labels, lr=1e-3, head_lr=1e-2, decay=0.9, **plan)
    assert losses.isfinite().all()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
    assert all(moved)
    finetune(model, images, labels, lr=1e-3, gradual=True, **plan)


@pictures
def test_a_frozen_body_stays_to_the_bit(kind):
    model, (images, labels) = kind(), small_bytes()
    if kind is compiled:
        predict(model, data(kind)[0])  # compiled before norms are held
        model.train()(data(kind)[0])
    head = head_of(model)[0]
    before = {k: v.clone() for k, v in unwrapped(model).state_dict().items()}
    plan = dict(augment=Augment(mean=0.5, std=0.25), batch_size=6, steps=3)
    finetune(model, images, labels, lr=0.0, head_lr=1e-2, **plan)
    now = unwrapped(model).state_dict()
    changed = {k for k, v in now.items() if not torch.equal(v, before[k])}
    assert f"{head}.weight" in changed <= {f"{head}.weight", f"{head}.bias"}


def test_what_waits_for_every_gradient_is_not_frozen():
    model, (images, labels) = nn.parallel.DistributedDataParallel(tv_resnet()), small_bytes()
    plan = dict(augment=Augment(mean=0.5, std=0.25), batch_size=6, steps=2)
    said = complaint(finetune, model, images, labels, lr=0.0, head_lr=1e-2, **plan)
    assert "find_unused_parameters=True" in said
    assert finetune(model, images, labels, lr=1e-3, **plan).isfinite().all()


@texts
def test_texts_are_no_pictures(kind):
    x, y = data(kind)
    said = complaint(finetune, kind(), x, y, Augment(mean=0.5, std=0.25), steps=1, lr=1e-3)
    assert "expected augment=None for texts" in said


@pictures
def test_an_epoch_and_its_score(kind):
    model, (images, labels) = kind(), small_bytes()
    known = ImageDataset(images, labels, lambda image: (image / 255 - 0.5) / 0.25)
    opt = torch.optim.AdamW(layer_groups(model, 1e-3))
    losses = [train_epoch(model, known, 6, opt) for _ in range(2)]
    assert all(map(math.isfinite, losses)) and 0 <= evaluate(model, known, 5) <= 1
    logits = predict(model, images, transform=known.transform)
    assert evaluate(model, known, 5) == accuracy(logits, labels)


def test_a_data_set_is_learnt_from_as_its_tensors_are():
    images, labels = small_bytes()
    pairs = torch.utils.data.TensorDataset(images, labels)
    plan = dict(augment=Augment(mean=0.5, std=0.25), batch_size=6, steps=4, lr=1e-3)
    a = tv_resnet()
    b = copy.deepcopy(a)
    torch.testing.assert_close(
        finetune(b, pairs, None, **plan), finetune(a, images, labels, **plan)
    )
    assert "labels=None" in complaint(finetune, a, pairs, labels, **plan)
    assert "a data set" in complaint(finetune, a, images, None, **plan)


KINDS = [tv_resnet, timm_vit, hf_vit, hf_resnet, *WRAPPED]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_range_test_leaves_no_trace(kind):
    model, (x, y) = kind(), data(kind)
    before = {k: v.clone() for k, v in unwrapped(model).state_dict().items()}
    opt = torch.optim.SGD(layer_groups(model, 1e-2))
    found = range_test(model, [(x, y)] * 20, classify, opt, steps=20, hi=0.1)
    assert len(found.losses) > 2
    assert all(torch.equal(v, before[k]) for k, v in unwrapped(model).state_dict().items())


def test_norms_of_a_compiled_network_are_held():
    model, x = compiled(), torch.randn(4, 3, SIDE, SIDE)
    model.train()(x)  # compiled already
    model.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with frozen_norms(model):
        model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
