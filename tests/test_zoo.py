"""Transformations of models on networks of every kind: the function that a law promises,
or one sentence and a model that stands as it stood."""

import copy
import warnings

import pytest
import torch
from torch import nn

from foundation.compression.channels import channel_masks, mask_channels, remove_channels
from foundation.compression.pruning import apply_masks, magnitude_masks
from foundation.compression.folding import fold_batch_norm
from foundation.compression.integer_layers import quantize_dynamic, quantize_static
from foundation.compression.quantization import quantize_weights
from foundation.compression.codebooks import share_weights
from foundation.compression.storage import load_model, save_model
from foundation.core.basics import EMA, count_macs, count_nonzero, count_parameters
from foundation.deployment.export import OnnxModel, export_onnx
from foundation.finetuning.lora import LoRA, add_lora, merge, unmerge
from foundation.training.checkpoint import load_checkpoint, save_checkpoint
from laws import is_sentence, same
from zoo import BODIES, ZOO, animal, lively, pictures

NAMES, GRAPHS = sorted(ZOO), sorted(BODIES)


def looks(model):
    "All that a refusal must leave alone"
    return (
        {n: (type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)},
        {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        {n: t.clone() for n, t in model.state_dict().items()},
    )


def tried(call, model):
    "The result; or None where a sentence refuses it, and then `model` is what it was"
    before = looks(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        assert is_sentence(error), f"by accident: {type(error).__name__}: {error}"
        after = looks(model)
        assert before[:2] == after[:2] and same(before[2], after[2], 0, 0), (
            f"refused, yet changed: {error}"
        )
        return None


def near(a, b, share):
    "The largest difference, measured by the size of b"
    assert a.shape == b.shape and a.isfinite().all()
    worst = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6)
    assert worst <= share, f"off by {worst:.2g} of the largest value"


def fine(x):
    return 3e-2 if x.dtype == torch.bfloat16 else 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_lora_begins_as_the_base_and_merges_into_what_it_was(name):
    model, x = animal(name)
    base = model(x).detach()
    linear = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    changed = tried(lambda: add_lora(model, 2, targets=linear or ["head"]), model)
    if changed is None:
        return
    near(model(x), base, fine(base))
    layers = {id(m): m for m in model.modules() if isinstance(m, LoRA)}.values()
    with torch.no_grad():
        for layer in layers:
            layer.B.normal_(generator=torch.Generator().manual_seed(7))
    adapted = model(x).detach()
    assert (adapted.float() - base.float()).abs().max() > 1e-3, "LoRA changes nothing"
    if tried(lambda: merge(model), model) is None:
        return
    near(model(x), adapted, 3 * fine(base))
    if any(isinstance(m, LoRA) for m in model.modules()):
        unmerge(model)
        near(model(x), adapted, 3 * fine(base))


@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_no_output(name):
    model, x = animal(name)
    before, base = looks(model), model(x)
    folded = tried(lambda: fold_batch_norm(model), model)
    assert folded is not None, "every model can be left unfolded"
    near(folded(x), base, 1e-5 if x.dtype != torch.bfloat16 else 3e-2)
    assert same(before[2], looks(model)[2], 0, 0), "the model itself was changed"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["dynamic", "static", "weights"])
def test_eight_bits_are_near(name, way):
    model, x = animal(name)
    base = model(x)
    whole = {
        "dynamic": lambda: quantize_dynamic(model),
        "static": lambda: quantize_static(model, [x]),
        "weights": lambda: quantize_weights(model, 8)[0],
    }[way]
    small = tried(whole, model)
    if small is None:
        return
    near(small(x), base, 0.08)
    again = animal(name)[0]
    assert same(model.state_dict(), again.state_dict(), 0, 0), "the model itself was changed"


@pytest.mark.parametrize("name", NAMES)
def test_quantisation_meets_every_name_of_a_layer(name):
    model, _ = animal(name)
    small = tried(lambda: quantize_dynamic(model), model)
    if small is None:
        return
    kinds = {}
    for n, m in model.named_modules(remove_duplicate=False):
        try:
            there = small.get_submodule(n)
        except AttributeError:
            continue
        kinds.setdefault(id(m), set()).add(id(there))
    assert all(len(found) == 1 for found in kinds.values()), "one layer became two"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "format, share", [("fp32", 1e-6), ("fp16", 5e-3), ("int8", 0.08), ("sparse", 5e-3)]
)
def test_a_saved_model_comes_back(name, format, share, tmp_path):
    model, x = animal(name)
    base = model(x)
    if tried(lambda: save_model(model, tmp_path / "m.safetensors", format), model) is None:
        return
    other, _ = animal(name)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_() if not any("original" in n for n, _ in other.named_parameters()) else None
    other.load_state_dict(load_model(tmp_path / "m.safetensors"))
    near(other(x), base, max(share, fine(base)))


@pytest.mark.parametrize("name", NAMES)
def test_masks_silence_what_they_say(name):
    model, x = animal(name)
    masks = tried(lambda: magnitude_masks(model, 0.5), model)
    if masks is None:
        return
    if tried(lambda: apply_masks(model, masks), model) is None:
        return
    state = dict(model.named_parameters(remove_duplicate=False))
    for weight, mask in masks.items():
        assert (state[weight][~mask] == 0).all(), f"{weight} holds what its mask drops"
        layer = model.get_submodule(weight.rpartition(".")[0])
        assert (layer.weight[~mask] == 0).all(), f"what {weight} computes is not silent"
    assert model(x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_shared_weights_are_few(name):
    model, x = animal(name)
    small = tried(lambda: share_weights(model, 16), model)
    if small is not None:
        near(small(x), model(x), 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_average_follows(name):
    model, x = animal(name)
    average = tried(lambda: EMA(model, 0.0), model)
    if average is None:
        return
    with torch.no_grad():
        for p in {id(p): p for p in model.parameters()}.values():
            p.add_(0.01 * torch.ones_like(p))
    average.update(model)
    wide = x.float() if x.dtype == torch.bfloat16 else x  # the average lives in float32
    near(average.model(wide), model(x), fine(x))


@pytest.mark.parametrize("name", NAMES)
def test_counting(name):
    model, x = animal(name)
    unique = {id(p): p for p in model.parameters()}.values()
    assert count_parameters(model) == sum(p.numel() for p in unique)
    assert count_nonzero(model) <= count_parameters(model)
    model.train()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.eval()
    before = looks(model)
    assert count_macs(model, x) >= 0
    assert before[:2] == looks(model)[:2], "counting changed a mode"


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_brings_everything_back(name, tmp_path):
    model, x = animal(name)
    if not list(model.parameters()):
        return
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        opt.zero_grad()
        (
            model(x).float().square().mean().backward()
            if any(p.requires_grad for p in model.parameters())
            else None
        )
        opt.step()

    step()
    if tried(lambda: save_checkpoint(tmp_path / "c", model, opt, 1) or True, model) is None:
        return
    step()
    wanted = model(x).detach()
    load_checkpoint(tmp_path / "c", model, opt)
    step()
    near(model(x), wanted, 1e-6)


@pytest.mark.parametrize("name", GRAPHS)
def test_cut_channels_are_the_silent_ones(name):
    torch.manual_seed(0)
    model, x = lively(BODIES[name]()), pictures()
    masks = tried(lambda: channel_masks(model, 0.5), model)
    if masks is None:
        return
    silent = tried(lambda: mask_channels(copy.deepcopy(model), masks), model)
    small = tried(lambda: remove_channels(model, masks), model)
    assert (silent is None) == (small is None)
    if small is not None:
        near(small(x), silent(x), 1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("float64",)])
def test_the_exported_model_answers_alike(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = animal(name)
    path = tried(lambda: export_onnx(model, x, tmp_path / "m.onnx"), model)
    if path is None:
        return
    run = OnnxModel(path)
    for y in (x, x.flip(0), x[:1]):
        near(torch.as_tensor(run(y)), model(y), 1e-3 if x.dtype != torch.bfloat16 else 5e-2)
