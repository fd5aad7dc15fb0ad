"""LoRA on layers of every kind and of other libraries: equal to peft, by layer, tied, spread"""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from foundation.finetuning.adapters import add_adapters, add_prefix
from foundation.finetuning.lora import LoRA, add_lora, merge, unload, unmerge
from foundation.finetuning.targets import as_weight, by_layer, find_layers, sides
from foundation.models.bert import BERT
from foundation.models.gpt import GPT
from foundation.models.heads import TextClassifier, without_head
from foundation.models.pretrained import load_weights, save_weights

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
from transformers.pytorch_utils import Conv1D  # noqa: E402

INNER = "base_model.model."  # where peft keeps the network
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
WORDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 3, 0, 0]])
PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)
FLOATS = torch.linspace(-2, 2, 2 * 5 * 6).cos().view(2, 5, 6)


class Net(nn.Module):
    "A layer that is the whole network"

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


OneD = type("Conv1D", (nn.Conv1d,), {})  # a convolution by the name of GPT-2's linear layer


def conv(*sizes, **options):
    return nn.Conv2d(3, 5, *sizes, **options), PICTURES[..., :9, :7]


LAYERS = {
    "linear": lambda: (nn.Linear(6, 5), FLOATS),
    "linear, no bias": lambda: (nn.Linear(6, 5, bias=False), FLOATS[0]),
    "Conv1D": lambda: (Conv1D(5, 6), FLOATS),
    "embedding": lambda: (nn.Embedding(12, 8), WORDS),
    "embedding, padded": lambda: (nn.Embedding(12, 8, padding_idx=0), WORDS),
    "conv": lambda: conv(3),
    "conv, stride": lambda: conv((3, 2), stride=2, padding=1),
    "conv, same": lambda: conv(3, padding="same", bias=False),
    "conv, reflect": lambda: conv(3, padding=1, padding_mode="reflect"),
    "conv, dilation": lambda: conv(3, dilation=2, padding=2),
    "conv of lines": lambda: (nn.Conv1d(5, 4, 3, stride=2), FLOATS),
    "conv of volumes": lambda: (nn.Conv3d(3, 4, 2), PICTURES[:, :, :8].unflatten(2, (4, 2))),
    "conv by GPT-2's name": lambda: (OneD(5, 4, 3), FLOATS),
    "conv, one picture": lambda: (nn.Conv2d(3, 5, 3), PICTURES[0]),
}
NOT_PEFTS = {"conv, reflect", "conv, dilation"}  # it leaves both out of A, and fails or differs
NOT_PEFTS |= {"conv by GPT-2's name"}


def drawn(model, std=0.3):
    for name, p in sorted(model.named_parameters()):
        if name.endswith((".A", ".B")):
            nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(len(name)))
    return model


def both(make, rank, alpha, targets, dtype=torch.float32, head=None):
    "The same network with ours and with peft's, and the same numbers in them"
    train = [] if head is None else [head]
    torch.manual_seed(0)
    ours = make().to(dtype).eval()
    plan = peft.LoraConfig(
        r=rank if isinstance(rank, int) else rank[".*"],
        lora_alpha=alpha,
        target_modules=targets,
        task_type="SEQ_CLS" if head == "classifier" else None,
        modules_to_save=[*train] or None,
        rank_pattern={} if isinstance(rank, int) else {k: v for k, v in rank.items() if k != ".*"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(deepcopy(ours), plan).eval()
        drawn(add_lora(ours, rank, alpha, targets, train=train))
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRA):
            for mine, other in zip((layer.A, layer.B), pair(theirs.get_submodule(INNER + name))):
                other.data.copy_(mine.view_as(other))
    return ours, theirs


def pair(layer):
    "The matrices A and B of peft's layer"
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out = getattr(out, "logits", out)
    out.float().square().sum().backward()
    return out


@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in NOT_PEFTS])
def test_a_layer_of_any_kind_is_that_of_peft(kind):
    x = LAYERS[kind]()[1]
    ours, theirs = both(lambda: Net(LAYERS[kind]()[0]), 2, 3.0, ["layer"])
    assert_close(gradients(ours, x), gradients(theirs, x), rtol=1e-5, atol=1e-5)
    for mine, other in zip(
        (ours.layer.A, ours.layer.B), pair(theirs.get_submodule(INNER + "layer"))
    ):
        assert_close(mine.grad, other.grad.view_as(mine), rtol=1e-4, atol=1e-4)
    merged = unload(merge(ours)).layer.weight
    assert_close(merged, theirs.merge_and_unload().layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_layer_gives_beside_it_gives_merged_and_before_it_was(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    plain = layer(x).detach()
    model = add_lora(Net(deepcopy(layer)), 2, targets=["layer"])
    assert torch.equal(model(x), plain)
    apart = drawn(model)(x).detach()
    assert (apart - plain).abs().max() > 1e-2
    assert_close(merge(model)(x), apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(unmerge(model)(x), apart) and torch.equal(unload(model)(x), plain)
    assert torch.equal(as_weight(layer, torch.ones(sides(layer))), torch.ones_like(layer.weight))


@pytest.mark.parametrize("kind", ["conv, stride", "embedding", "Conv1D", "linear"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_halves_are_those_of_peft(kind, half):
    x = LAYERS[kind]()[1]
    x = x.to(half) if x.is_floating_point() else x
    ours, theirs = both(lambda: Net(LAYERS[kind]()[0]), 2, 3.0, ["layer"], half)
    assert ours.layer.A.dtype == torch.float32 and ours(x).dtype == half
    unit = torch.finfo(half).eps
    assert_close(gradients(ours, x), gradients(theirs, x), rtol=2 * unit, atol=2 * unit)
    for mine, other in zip(
        (ours.layer.A, ours.layer.B), pair(theirs.get_submodule(INNER + "layer"))
    ):
        assert_close(mine.grad, other.grad.view_as(mine), rtol=8 * unit, atol=8 * unit)
    before = ours.layer.base.weight.clone()
    exact = before.float() + as_weight(ours.layer.base, 1.5 * ours.layer.B @ ours.layer.A)
    assert torch.equal(merge(ours).layer.weight, exact.to(half))  # rounded once, peft's twice
    other = theirs.merge_and_unload().layer.weight
    assert_close(ours.layer.weight, other, rtol=2 * unit, atol=2 * unit)
    assert torch.equal(unmerge(ours).layer.base.weight, before)


@pytest.mark.parametrize("kind", ["Conv1D", "conv, stride"])
def test_dropout_with_the_same_luck_is_that_of_peft(kind):
    x = LAYERS[kind]()[1]
    ours, theirs = both(lambda: Net(LAYERS[kind]()[0]), 2, 3.0, ["layer"])
    still = ours(x).detach()
    theirs.get_submodule(INNER + "layer").lora_dropout["default"] = nn.Dropout(0.4)
    ours.layer.dropout, outs = 0.4, []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        outs.append(model(x))
    assert_close(*outs, rtol=1e-5, atol=1e-5)
    assert (outs[0] - still).abs().max() > 1e-2 and torch.equal(ours.eval()(x), still)


def test_words_are_not_dropped():
    model = drawn(add_lora(Net(nn.Embedding(12, 8)), 2, targets=["layer"], dropout=0.9))
    assert torch.equal(model.train()(WORDS), model.eval()(WORDS))


# Whole networks -----------------------------------------------------------------------------------


def bert():
    plan = transformers.BertConfig(vocab_size=20, num_labels=3, **SMALL)
    return transformers.BertForSequenceClassification(plan)


def gpt2(kind=transformers.GPT2LMHeadModel, **options):
    plan = dict(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, **options)
    return kind(transformers.GPT2Config(**plan))


def llama():
    plan = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(plan)


def vit():
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return timm.models.VisionTransformer(**sizes)


MODELS = {  # network, inputs, targets, head
    "transformers BERT, all linear": (bert, WORDS, "all-linear", "classifier"),
    "transformers BERT, words": (bert, WORDS, ["word_embeddings", "query"], "classifier"),
    "GPT-2, all linear": (gpt2, WORDS, "all-linear", None),
    "GPT-2, Conv1D and words": (gpt2, WORDS, ["c_attn", "wte"], None),
    "LLaMA": (llama, WORDS, ["q_proj", "down_proj", "embed_tokens"], None),
    "timm ViT": (vit, PICTURES, ["qkv", "mlp.fc1", "patch_embed.proj"], "head"),
    "timm ConvNeXt": (
        lambda: timm.create_model("convnext_atto", num_classes=3),
        PICTURES,
        ["mlp.fc1", "mlp.fc2"],
        "head.fc",
    ),
    "ResNet-18": (
        lambda: torchvision.models.resnet18(num_classes=3),
        PICTURES,
        r".*layer[34].*conv\d",
        "fc",
    ),
    "MobileNet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
        PICTURES,
        r".*features\.[2-5]\.block\.0\.0",
        "classifier.3",
    ),
}


@pytest.mark.filterwarnings("ignore:.* shares its weight")
@pytest.mark.parametrize("name", MODELS)
def test_networks_of_other_libraries_are_those_of_peft(name, tmp_path):
    make, x, targets, head = MODELS[name]
    x = x.double() if x.is_floating_point() else x
    ours, theirs = both(make, 2, 3.0, targets, torch.float64, head)
    learn = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert learn == sum(p.numel() for p in theirs.parameters() if p.requires_grad) > 0
    apart = gradients(ours, x)
    assert_close(apart, gradients(theirs, x), rtol=1e-9, atol=1e-9)
    for place, layer in ours.named_modules():
        if isinstance(layer, LoRA):
            for mine, other in zip((layer.A, layer.B), pair(theirs.get_submodule(INNER + place))):
                assert_close(mine.grad, other.grad.view_as(mine), rtol=1e-6, atol=1e-9)
    if head:
        other = theirs.get_submodule(INNER + head).modules_to_save["default"].weight.grad
        assert_close(ours.get_submodule(head).weight.grad, other, rtol=1e-6, atol=1e-9)
    save_weights(ours, "delta", dict(config={}), tmp_path, dtype=torch.float32, only="learnt")
    torch.manual_seed(0)
    fresh = add_lora(make().eval(), 2, 3.0, targets, train=[head] if head else [])
    load_weights("delta", fresh, tmp_path, only="learnt")
    assert_close(gradients(fresh.double(), x), apart, rtol=1e-4, atol=1e-4)
    out = unload(merge(ours))(x)
    assert_close(getattr(out, "logits", out), apart, rtol=1e-9, atol=1e-9)
    assert list(ours.state_dict()) == list(make().state_dict())


# By layer -----------------------------------------------------------------------------------------


def test_ranks_by_layer_bring_as_many_numbers_as_in_peft():
    rank = {r"layer\.1\..*query": 1, "value": 3, "attention.output.dense": 5, ".*": 2}
    ours, theirs = both(bert, rank, 3.0, "all-linear", head="classifier")
    ranks = {n: m.rank for n, m in ours.named_modules() if isinstance(m, LoRA)}
    assert ranks["bert.encoder.layer.0.attention.self.query"] == 2
    assert ranks["bert.encoder.layer.1.attention.self.query"] == 1
    assert ranks["bert.encoder.layer.0.attention.self.value"] == 3
    assert ranks["bert.encoder.layer.1.attention.output.dense"] == 5
    learn = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert learn[0] == learn[1]
    assert_close(gradients(ours, WORDS), gradients(theirs, WORDS), rtol=1e-4, atol=1e-5)


def test_alpha_by_layer_scales_its_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora(model, 2, {"0": 4.0, "1": 6}, ["0", "1"])
    assert [layer.alpha / layer.rank for layer in model] == [2.0, 3.0]


@pytest.mark.parametrize(
    "rank, words",
    [
        ({"0": 2}, "rank says nothing for 1; add '.*': 8"),
        ({"0": 2, "mlp": 3, ".*": 1}, "rank has 'mlp', which is no end of a name"),
        ({"0": 9, ".*": 1}, "0: rank is 9; expected a whole number from 1 to 4"),
        ({"0": 1.5, ".*": 1}, "0: rank is 1.5"),
        ({}, "rank says nothing for 0"),
        ({"": 2, ".*": 1}, "rank has ''"),
    ],
)
def test_ranks_that_say_too_little_or_too_much_are_refused(rank, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises((TypeError, ValueError)) as error:
        add_lora(model, rank, targets=["0", "1"])
    assert words in str(error.value) and all(p.requires_grad for p in model.parameters())


def test_one_number_is_for_all_layers():
    with pytest.raises(ValueError, match="value has 'uery', which is no end of a name"):
        by_layer(["a.query"], {"uery": 2, ".*": 1})
    assert by_layer(["a", "b.c"], 3) == {"a": 3, "b.c": 3}
    assert by_layer(["a", "b.c"], {"c": 2, "a|b.c": 1}) == {"a": 1, "b.c": 2}  # the first that fits


# Tied, twice, refused -----------------------------------------------------------------------------


def test_a_table_of_words_that_is_tied_to_the_head_keeps_the_head_as_it_was():
    torch.manual_seed(0)
    model = gpt2().eval()
    table = model.transformer.wte.weight
    assert model.lm_head.weight is table
    apart = gradients(drawn(add_lora(model, 2, targets=["wte"])), WORDS)
    with pytest.warns(UserWarning, match="transformer.wte shares its weight .* ties") as said:
        merge(model)
    assert said[0].filename == __file__
    assert_close(model(WORDS).logits, apart, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is table and model.transformer.wte.weight is not table
    assert unmerge(model).transformer.wte.base.weight is table


@pytest.mark.parametrize("make", [GPT, BERT])
def test_a_table_that_this_course_reads_as_words_and_as_head_changes_in_both(make):
    torch.manual_seed(0)
    model = make(20, 16, 16, 1, 2).eval()
    before = model(WORDS).detach()
    add_lora(model, 2, targets=["embedding.token"])
    assert torch.equal(model(WORDS), before)
    apart = gradients(drawn(model), WORDS)
    assert (apart - before).abs().max() > 1e-2
    assert_close(merge(model)(WORDS), apart, rtol=1e-4, atol=1e-5)
    assert torch.equal(unload(unmerge(model))(WORDS), before)


def test_a_layer_answers_what_it_is_asked():
    layer = LoRA(nn.Conv2d(3, 4, 5, stride=2, bias=False), 2)
    assert (layer.in_channels, layer.kernel_size, layer.stride) == (3, (5, 5), (2, 2))
    assert layer.bias is None and deepcopy(layer).kind is nn.Conv2d
    with pytest.raises(AttributeError, match="num_embeddings"):
        layer.num_embeddings


def test_a_wrong_name_is_answered_by_the_names_that_are_like_it():
    with pytest.raises(ValueError, match="no layer is called 'attention.query'.*self.query"):
        add_lora(bert())


def test_a_convolution_used_twice_is_one_layer():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    apart = drawn(add_lora(model, 2, targets=["2"]))(PICTURES)
    assert model[0] is model[2] and isinstance(model[0], LoRA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one layer, one weight: nothing to tell
        assert_close(merge(model)(PICTURES), apart, rtol=1e-4, atol=1e-4)


def test_words_that_no_text_holds_and_padding_stay_as_they_were():
    torch.manual_seed(0)
    model = add_lora(Net(nn.Embedding(12, 8, padding_idx=0)), 2, targets=["layer"])
    opt = torch.optim.SGD([model.layer.A, model.layer.B], lr=0.1)
    before = model.layer.weight.detach().clone()
    gradients(model, WORDS)
    opt.step()
    moved = (model.layer.weight - before).abs().amax(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == [2, 3, 5, 7, 9, 11]


class OwnPadding(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_linear_layer_with_a_forward_of_its_own_is_adapted_but_not_merged():
    model = drawn(add_lora(Net(Halved(6, 5)), 2, targets=["layer"]))
    apart = model(FLOATS)
    with pytest.raises(ValueError, match="a forward of its own"):
        merge(model)
    assert torch.equal(model(FLOATS), apart)


@pytest.mark.parametrize(
    "layer, words",
    [
        (nn.Conv2d(4, 4, 1, groups=2), "a Conv2d with more than one group"),
        (nn.Embedding(4, 4, max_norm=1.0), "an Embedding with max_norm"),
        (OwnPadding(4, 4, 3), "an OwnPadding with a forward of its own"),
        (nn.ConvTranspose2d(4, 4, 3), "base is a ConvTranspose2d; expected a Linear"),
        (nn.EmbeddingBag(4, 4), "base is an EmbeddingBag; expected a Linear"),
        (nn.BatchNorm2d(4), "base is a BatchNorm2d; expected a Linear"),
    ],
)
def test_a_layer_that_is_not_one_matrix_is_refused_by_its_name(layer, words):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises((TypeError, ValueError), match=f"1: .*{words}"):
        add_lora(model, 2, targets=["0", "1"])
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


# Heads, compiled, spread --------------------------------------------------------------------------


def changes(**options):
    return {
        "LoRA": lambda m: add_lora(m, 2, targets="all-linear", **options),
        "adapters": lambda m: add_adapters(m, 2, targets="all-linear", **options),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("make, head", [(bert, "classifier"), (vit, "head")])
def test_a_head_that_stays_frozen_is_told(change, make, head):
    with pytest.warns(UserWarning, match=rf"the head '{head}' is frozen .*train=\['{head}'\]") as w:
        changes()[change](make())
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = changes(train=[head])[change](make())
        assert all(p.requires_grad for p in model.get_submodule(head).parameters())
        changes()[change](gpt2()), changes()[change](llama())  # a table of words is no new head
        add_lora(make(), 2, targets=[head])  # it learns by LoRA


def test_a_head_of_words_is_no_new_head(recwarn):
    net = nn.Sequential()
    net.words, net.body, net.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
    add_lora(net, 2, targets=["body"])
    assert not recwarn.list


@pytest.mark.parametrize("train", [["head"], ["blocks.1"]])
def test_what_is_a_target_cannot_learn_whole_as_well(train):
    model = vit()
    with pytest.raises(ValueError, match=rf"{train[0]}.*: it stands in targets and in train"):
        add_lora(model, 2, targets=["qkv", "head"], train=train)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("change", [add_lora, add_adapters])
def test_a_spread_network_is_changed_before_it_is_wrapped(change, tmp_path):
    rendezvous = dict(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    torch.distributed.init_process_group("gloo", **rendezvous)
    try:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        spread = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(ValueError, match="change the network first and wrap it then"):
            change(spread, 2, targets=["0"])
        assert all(p.requires_grad for p in net.parameters())
        model = nn.parallel.DistributedDataParallel(change(net, 2, targets=["0"]))
        gradients(model, torch.ones(2, 4))
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_network_is_changed_inside_and_compiles_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 49, 3))
    model, x = torch.compile(net, backend="eager", fullgraph=True), PICTURES[..., :9, :9]
    assert add_lora(model, 2, targets=["0", "2"]) is model and isinstance(net[0], LoRA)
    want = drawn(net)(x)
    assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert_close(merge(model)(x), want, rtol=1e-4, atol=1e-5)
    assert find_layers(unload(model), ["0"]) == ["0"]


@pytest.mark.parametrize(
    "make, targets",
    [(vit, ["attn.proj", "mlp.fc2"]), (bert, ["output.dense"]), (gpt2, ["c_proj"])],
)
def test_adapters_fit_behind_the_layers_of_other_libraries(make, targets):
    torch.manual_seed(0)
    model, x = make().eval(), PICTURES if make is vit else WORDS
    before = gradients(model, x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add_adapters(model, 4, targets)
    assert torch.equal(gradients(model, x), before)
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learn) == 16 and all(".down." in n or ".up." in n for n in learn)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_new_head_learns_beside_a_prefix():
    def model():
        return TextClassifier(without_head(BERT(20, 16, 16, 1, 2)), 3)

    named = add_prefix(model(), 2, train=["head"]).named_parameters()
    learn = {name.rpartition(".")[2] for name, p in named if p.requires_grad}
    assert learn == {"keys", "values", "weight", "bias"}
    with pytest.warns(UserWarning, match="the head 'head' is frozen"):
        add_prefix(model(), 2)


def test_a_prefix_is_for_the_attention_of_this_course():
    for make in (bert, vit):
        with pytest.raises(TypeError, match="has no Attention of this course; .*past_key_values"):
            add_prefix(make(), 2)
    with pytest.raises(TypeError, match="base is a Conv2d; expected a Linear"):
        add_adapters(torchvision.models.resnet18(), 2, ["conv1"])
