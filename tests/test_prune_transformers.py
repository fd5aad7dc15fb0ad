"Heads, hidden units and layers of transformers that people have"

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from foundation.compression.transformers import (
    head_masks,
    keep_layers,
    remove_heads,
    remove_units,
    unit_masks,
)
from foundation.core.basics import count_macs, count_parameters
from foundation.models.bert import BERT
from foundation.models.vit import ViT

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
IDS, PICTURES = torch.arange(1, 13).view(2, 6), torch.randn(2, 3, 16, 16)


def hf(kind, **sizes):
    hub = pytest.importorskip("transformers")
    return getattr(hub, kind)(getattr(hub, kind).config_class(**SIZES | sizes))


def distilbert():
    hub = pytest.importorskip("transformers")
    config = hub.DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
    return hub.DistilBertModel(config)


def timm_vit(**more):
    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=3)
    create = pytest.importorskip("timm").create_model
    return create("vit_tiny_patch16_224", pretrained=False, **sizes | more)


def tv_vit():
    return torchvision.models.VisionTransformer(16, 8, 2, 4, 16, 24, num_classes=3)


NETS = {  # name -> network, input, where the output layers of attention and of the MLP are
    "our ViT": (
        lambda: ViT(image_size=16, channels=3, patch_size=8, dim=16, depth=2, heads=4),
        PICTURES,
        ("blocks.0.attention.out", "blocks.0.mlp.3"),
    ),
    "our BERT": (
        lambda: BERT(20, 16, 16, 2, 4),
        IDS,
        ("blocks.0.attention.out", "blocks.0.mlp.3"),
    ),
    "BERT": (
        lambda: hf("BertModel", vocab_size=20),
        IDS,
        ("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"),
    ),
    "DistilBERT": (
        distilbert,
        IDS,
        ("transformer.layer.0.attention.out_lin", "transformer.layer.0.ffn.lin2"),
    ),
    "ViT of transformers": (
        lambda: hf("ViTModel", image_size=16, patch_size=8),
        PICTURES,
        ("layers.0.attention.o_proj", "layers.0.mlp.fc2"),
    ),
    "timm ViT": (timm_vit, PICTURES, ("blocks.0.attn.proj", "blocks.0.mlp.fc2")),
    "timm ViT with normed heads": (
        lambda: timm_vit(qk_norm=True),
        PICTURES,
        ("blocks.0.attn.proj", "blocks.0.mlp.fc2"),
    ),
    "torchvision ViT": (
        tv_vit,
        PICTURES,
        (None, "encoder.layers.encoder_layer_0.mlp.3"),
    ),
}


def made(name):
    torch.manual_seed(0)
    make, x, places = NETS[name]
    model = make().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model, x, places


def answer(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def silenced(model, place, kept):
    model = deepcopy(model)
    model.get_submodule(place).weight.data[:, ~kept] = 0
    return model


@pytest.mark.parametrize("name", [name for name in NETS if "torchvision" not in name])
def test_a_cut_head_is_one_that_writes_zeros(name):
    model, x, (place, _) = made(name)
    masks = dict([next(iter(head_masks(model, 0.5).items()))])
    (kept,) = masks.values()
    silent, small = silenced(model, place, kept.repeat_interleave(4)), remove_heads(model, masks)
    assert kept.sum() == 2
    assert_close(answer(small, x), answer(silent, x), rtol=1e-4, atol=1e-5)
    assert (answer(silent, x) - answer(model, x)).abs().max() > 1e-3
    assert count_parameters(model) - count_parameters(small) >= 4 * 8 * 16
    again = remove_heads(small, head_masks(small, 0.5))  # a cut one can be cut again
    answer(again, x).sum().backward()


@pytest.mark.parametrize("name", NETS)
def test_a_cut_unit_is_one_that_nobody_reads(name):
    model, x, (_, place) = made(name)
    masks = dict([next(iter(unit_masks(model, 0.5, multiple=4).items()))])
    (kept,) = masks.values()
    silent, small = silenced(model, place, kept), remove_units(model, masks)
    assert kept.sum() == len(kept) // 2
    assert_close(answer(small, x), answer(silent, x), rtol=1e-4, atol=1e-5)
    assert (answer(silent, x) - answer(model, x)).abs().max() > 1e-3
    answer(remove_units(small, unit_masks(small, 0.5)), x).sum().backward()


@pytest.mark.parametrize("name", NETS)
def test_layers_of_any_library_can_be_dropped(name):
    model, x, _ = made(name)
    small = keep_layers(model, (0,))
    assert answer(small, x).shape == answer(model, x).shape
    assert torch.equal(answer(keep_layers(model, (0, 1)), x), answer(model, x))
    assert count_parameters(small) < count_parameters(model)


def test_a_compiled_transformer_is_cut_as_what_is_in_it():
    model, x, _ = made("timm ViT")
    wrapped = torch.compile(model, backend="eager")
    for masks_of, remove in ((head_masks, remove_heads), (unit_masks, remove_units)):
        masks = masks_of(model, 0.5)
        assert torch.equal(remove(wrapped, masks_of(wrapped, 0.5))(x), remove(model, masks)(x))
    assert torch.equal(keep_layers(wrapped, (1,))(x), keep_layers(model, (1,))(x))


def test_half_of_a_bert_leaves_what_torch_pruning_leaves():
    tp = pytest.importorskip("torch_pruning")
    model, x, _ = made("BERT")
    ours = remove_units(remove_heads(model, head_masks(model, 0.5)), unit_masks(model, 0.5))
    theirs, heads, ratios = deepcopy(model), {}, {}
    for name, m in theirs.named_modules():
        if type(m).__name__ == "BertSelfAttention":
            heads |= {m.query: 4, m.key: 4, m.value: 4}
            ratios |= {m.query: 0.5, m.key: 0.5, m.value: 0.5}
        if type(m).__name__ == "BertIntermediate":
            ratios[m.dense] = 0.5
    tp.pruner.MagnitudePruner(
        theirs,
        x,
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0,
        pruning_ratio_dict=ratios,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        output_transform=lambda out: out.last_hidden_state.sum(),
    ).step()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert count_parameters(ours) == count_parameters(theirs) < 0.9 * count_parameters(model)


def with_hook():
    model = timm_vit()
    model.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: out)
    return model


@pytest.mark.parametrize(
    "call, make, says",
    [
        (head_masks, tv_vit, "has no attention layers but nn.MultiheadAttention.*unit_masks"),
        (head_masks, lambda: hf("GPT2Model", vocab_size=20), "GPT2Model has no attention layers"),
        (
            head_masks,
            lambda: hf("LlamaModel", vocab_size=20, num_key_value_heads=2),
            "has shared heads; expected .* the same heads",
        ),
        (head_masks, with_hook, "blocks.0.attn has a changed, watched or shared layer"),
        (head_masks, lambda: timm_vit(scale_attn_norm=True), "has norm; expected"),
        (head_masks, torchvision.models.swin_t, "relative_position_bias_table; expected"),
        (unit_masks, lambda: timm_vit(scale_mlp_norm=True), "has no feed-forward parts"),
        (unit_masks, lambda: hf("LlamaModel", vocab_size=20), "has no feed-forward parts"),
        (unit_masks, lambda: nn.Linear(2, 2), "has no feed-forward parts"),
    ],
)
def test_what_is_not_known_is_refused_in_a_sentence(call, make, says):
    with pytest.raises(ValueError, match=says):
        call(make(), 0.5)


def test_masks_of_units_that_do_not_fit_are_refused():
    model, _, _ = made("our ViT")
    name = next(iter(unit_masks(model, 0.5)))
    none = torch.zeros(64, dtype=torch.bool)
    for masks, says in (({"head": none}, "belongs to no"), ({name: none}, "keeps no unit")):
        with pytest.raises(ValueError, match=says):
            remove_units(model, masks)


def test_units_are_ranked_by_what_they_write_and_what_reads_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2))
    sizes = [(net[0].weight[i].norm() * net[2].weight[:, i].norm()).item() for i in range(6)]
    best = sorted(range(6), key=lambda i: -sizes[i])[:3]
    assert unit_masks(net, 0.5)["0"].nonzero().flatten().tolist() == sorted(best)
    assert count_macs(remove_units(net, unit_masks(net, 0.5)), torch.ones(1, 3)) == 15


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_a_decoder_without_some_layers_still_writes_with_its_cache(kind):
    "Blocks of transformers know their number: after a cut they must count anew"
    import transformers

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, vocab_size=30)
    config = getattr(transformers, f"{kind}Config")(num_attention_heads=2, **sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    small, tokens = keep_layers(model, (0, 1, 3)), torch.arange(5)[None]
    with torch.no_grad():
        cached, plain = small(tokens, use_cache=True), small(tokens, use_cache=False)
    torch.testing.assert_close(cached.logits, plain.logits)
    assert len(cached.past_key_values) == 3
    written = small.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 8)
