"Pruning: laws, parity with PyTorch and torch-pruning, cut nets equal silent nets, ONNX, and bad input"
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is not part of the package

from foundation.compression import pruning  # noqa: E402
from foundation.compression.pruning import (
    SLIM, Pruner, apply_masks, channel_groups, channel_masks, compare_pruning, cubic_sparsity, head_masks, keep_largest, layer_weights,
    magnitude_masks, mask_channels, recover, remove_channels, remove_heads, slim_vgg, sparsity, to_two_four, two_four_masks)
from foundation.compression.quantization import quantize_weights
from foundation.data.images import load_images
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet, EfficientNetLite, ResNet, VGG
from foundation.models.pretrained import load_weights, read_card
from foundation.models.vit import ViT


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 12, 3), nn.Flatten(),
                         nn.Linear(12 * 4 * 4, 10))


def shaken(net):
    "Batch norms as after training: no scale is 1, no shift and no mean is 0"
    torch.manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for part in (m.weight.data, m.bias.data, m.running_mean):
                part.normal_()
            m.running_var.uniform_(0.5, 2)
    return net.eval()


NETS = {"vgg": lambda: VGG(widths=(8, 12), depths=(2, 1)), "resnet": lambda: ResNet(widths=(8, 16), depths=(2, 2)),
        "convnet": ConvNet, "vgg of 6": VGG}


# Single weights -------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 50), share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_keep_largest_drops_as_many_as_asked_and_none_that_is_larger(n, share, seed):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    mask = keep_largest(scores, share)
    assert int((~mask).sum()) == round(share * n)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.9])
def test_layer_masks_equal_torch(share):
    net, theirs = make_net(), make_net()
    masks = magnitude_masks(net, share, "layer")
    for name, module in theirs.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            prune.l1_unstructured(module, "weight", share)
            assert torch.equal(masks[f"{name}.weight"], module.weight_mask.bool())


@pytest.mark.parametrize("share", [0.25, 0.8, 0.95])
def test_global_masks_equal_torch(share):
    net, theirs = make_net(), make_net()
    modules = {n: m for n, m in theirs.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=share)
    masks = magnitude_masks(net, share)
    assert all(torch.equal(masks[f"{n}.weight"], m.weight_mask.bool()) for n, m in modules.items())
    assert sparsity(apply_masks(net, masks)) == pytest.approx(share, abs=1e-3)


OPTIMIZERS = [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
              lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1), lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1)]


def steps(net, opt, count):
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    for n in range(count):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        yield n
        opt.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_zeros_stay_and_sparsity_only_grows(make):
    net = make_net()
    opt, pruner, before = make(net.parameters()), Pruner(net, 0.9, begin=3, end=20, every=4), {}
    for step in range(30):
        for _ in steps(net, opt, 1):
            pass
        target = pruner.update(step)
        assert target <= cubic_sparsity(step, 3, 20, 0.9)
        assert all(not (w[~pruner.masks[n]]).any() for n, w in layer_weights(net).items() if pruner.masks)
        assert all(not (mask & ~before.get(n, mask)).any() for n, mask in pruner.masks.items()), "a pruned weight came back"
        before = pruner.masks
    assert target == 0.9 and sparsity(net) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_masks_written_before_the_step_only_do_not_hold(make):
    net = make_net()
    opt, masks = make(net.parameters()), magnitude_masks(make_net(), 0.9)
    for _ in steps(net, opt, 5):
        apply_masks(net, masks)  # the broken order: the step comes after
    assert sparsity(net) < 0.5


def test_pruner_resumes_late_and_before_begin_does_nothing():
    net = make_net()
    pruner = Pruner(net, 0.8, begin=10, end=20)
    assert pruner.update(0) == 0 and sparsity(net) == 0
    assert pruner.update(500) == 0.8 and sparsity(net) == pytest.approx(0.8, abs=1e-3)


def test_skip_leaves_a_layer_alone_and_shared_weights_count_once():
    net = make_net()
    apply_masks(net, magnitude_masks(net, 0.9, skip=("5",)))
    assert (net[5].weight != 0).all() and sparsity(net, skip=("5",)) == pytest.approx(0.9, abs=2e-3)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert list(layer_weights(tied)) == ["0.weight"]


@pytest.mark.parametrize("call", [
    lambda net: magnitude_masks(net, 1.0), lambda net: magnitude_masks(net, -0.1), lambda net: magnitude_masks(net, float("nan")),
    lambda net: magnitude_masks(net, 0.5, "row"), lambda net: magnitude_masks(net, 0.5, skip=("head",)),
    lambda net: Pruner(net, 0.5, 10, 10), lambda net: Pruner(net, 1.0, 0, 10), lambda net: Pruner(net, 0.5, 0, 10, every=0),
    lambda net: apply_masks(net, {"0.weight": torch.ones(3, dtype=torch.bool)}),
    lambda net: apply_masks(net, {"nobody.weight": torch.ones(3, dtype=torch.bool)}),
    lambda net: layer_weights(nn.Sequential(nn.ReLU())), lambda net: cubic_sparsity(0, 0, 1, 0.2, initial=0.5),
    lambda net: head_masks(net, 0.5)])
def test_pruning_refuses(call):
    with pytest.raises(ValueError, match="."):
        call(make_net())


def test_layers_of_other_kinds_are_named_and_left_alone():
    net = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4), nn.Linear(4, 4))
    before = net[1].weight_hh_l0.detach().clone()
    with pytest.warns(UserWarning, match=r"1 \(LSTM\) is neither a convolution nor a linear layer") as told:
        masks = magnitude_masks(net, 0.5)
    assert len(told) == 1 and list(masks) == ["2.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_weights(net, skip=("1",))  # who leaves it out need not be told
    with pytest.warns(UserWarning, match="LSTM"):
        apply_masks(net, magnitude_masks(net, 0.9))
    assert torch.equal(net[1].weight_hh_l0, before)


def test_two_of_four():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(6, 4))
    with pytest.warns(UserWarning, match="1.weight has rows of 6"):
        masks = two_four_masks(net)
    assert set(masks) == {"0.weight"} and (masks["0.weight"].view(-1, 4).sum(1) == 2).all()
    kept = net[0].weight.detach().abs().view(-1, 4)
    best = kept.sort(dim=1).values[:, 2:].sum()
    assert_close((kept * masks["0.weight"].view(-1, 4)).sum(), best)


def test_two_four_kernels_need_their_gpu():
    net = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="0 has more than two weights in four"):
        to_two_four(net)
    net = apply_masks(net, two_four_masks(net)).half()
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
        with pytest.raises(RuntimeError, match="8.0"):
            to_two_four(net)
        return
    net = net.cuda()
    x = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    want = net(x)
    assert_close(to_two_four(net)(x), want, rtol=1e-2, atol=1e-2)


# Channels -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", NETS)
def test_a_cut_net_equals_the_silent_net(name, share):
    net = shaken(NETS[name]())
    masks, x = channel_masks(net, share), torch.randn(3, 1, 28, 28)
    small, silent = remove_channels(net, masks), mask_channels(deepcopy(net), masks)
    scale = silent(x).abs().max()
    assert (small(x) - silent(x)).abs().max() <= 1e-5 * scale
    assert share == 0 or sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters()) and small.encode(x).shape[1] == small.dim


def differs(small, silent):
    x = torch.randn(3, 1, 28, 28)
    return (small(x) - silent(x)).abs().max() > 1e-3 * silent(x).abs().max()


@pytest.mark.parametrize("name", NETS)
def test_a_forgotten_shift_of_batch_norm_is_caught(name):
    net = shaken(NETS[name]())
    masks = channel_masks(net, 0.5)
    silent = mask_channels(deepcopy(net), masks)
    for mine, first in zip(silent.modules(), net.modules()):
        if isinstance(mine, nn.BatchNorm2d):
            mine.bias.data.copy_(first.bias)
    assert differs(remove_channels(net, masks), silent)


def test_shortcuts_share_their_channels_and_misaligned_ones_are_caught():
    net = shaken(ResNet(widths=(8, 16), depths=(2, 2)))
    groups = channel_groups(net)
    assert groups["body.0.0"].writers == ["body.0.0", "body.1.body.1.0", "body.2.body.1.0"]
    assert {"body.3.shortcut.0", "body.3.body.1.0", "body.4.body.1.0"} in [set(g.writers) for g in groups.values()]
    assert next(g for g in groups.values() if "head" in g.readers).size == 16
    masks = channel_masks(net, 0.5)
    small, silent = remove_channels(net, masks), mask_channels(deepcopy(net), masks)
    for part in (small.body[3].shortcut[0].weight, small.body[3].shortcut[1].weight):
        part.data.copy_(part.data.roll(1, 0))  # the shortcut cut at other places than the sum it joins
    assert differs(small, silent)


def test_channel_counts_are_rounded_and_never_zero():
    net = VGG()
    kept = lambda **how: [int(m.sum()) for m in channel_masks(net, **how).values()]
    assert kept(sparsity=0.7, multiple=8) == [8, 8, 16, 16, 40, 40] and set(kept(sparsity=0.999)) == {1}
    assert kept(sparsity={"body.0.0": 0.5}) == [16]


def test_what_cannot_be_cut_is_named_and_kept():
    net = shaken(EfficientNetLite(10, 1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        groups = channel_groups(net)
    assert "body.3.body.0 (SameConv) is not a layer whose channels can be cut; it keeps them all" in [str(w.message) for w in told]
    assert groups and not any("body.3.body.0" in g.writers + g.readers for g in groups.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks, x = channel_masks(net, 0.5), torch.randn(2, 1, 32, 32)
        small, silent = remove_channels(net, masks), mask_channels(deepcopy(net), masks)
    assert_close(small(x), silent(x), rtol=1e-4, atol=1e-4 * silent(x).abs().max().item())


def test_a_layer_that_is_called_twice_keeps_its_channels():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = VGG(channels=4)
    net.body, net.head = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.ReLU(), conv), nn.Linear(4, 10)
    with pytest.warns(UserWarning, match="body.1"):
        assert not any("body.1" in g.writers + g.readers for g in channel_groups(net).values())


@pytest.mark.parametrize("call, says", [
    (lambda net: channel_masks(net, 1.0), "cannot lose all"), (lambda net: channel_masks(net, -0.1), "from 0 below 1"),
    (lambda net: channel_masks(net, {"body.9": 0.5}), "no channel groups"),
    (lambda net: remove_channels(net, {"body.0.0": torch.zeros(32, dtype=torch.bool)}), "all 32 channels"),
    (lambda net: remove_channels(net, {"body.0.0": torch.ones(31, dtype=torch.bool)}), "mask of body.0.0"),
    (lambda net: mask_channels(net, {"nobody": torch.ones(3, dtype=torch.bool)}), "mask of nobody"),
    (lambda net: remove_heads(net, {"head": torch.ones(2, dtype=torch.bool)}), "attention layer"),
    (lambda net: remove_heads(ViT(), {"blocks.0.attention": torch.zeros(4, dtype=torch.bool)}), "one kept at least")])
def test_cutting_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call(VGG())


def test_nets_without_body_and_nan_weights_are_refused():
    with pytest.raises(TypeError, match="lacks a `body`"):
        channel_groups(make_net())
    net = VGG()
    net.body[3][0].weight.data[0, 0, 0, 0] = float("nan")
    for call in (channel_masks, magnitude_masks):
        with pytest.raises(ValueError, match="body.3.0.weight holds NaN"):
            call(net, 0.5)
    for call in (two_four_masks, quantize_weights):
        with pytest.raises(ValueError, match="body.3.0.weight holds NaN"):
            call(net)


def test_what_cut_nets_give_is_what_torch_pruning_gives():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed (pip install -e '.[bench]')")
    from bench.prune import their_cut
    for name in ("vgg", "resnet"):
        net, x = shaken(NETS[name]()), torch.randn(3, 1, 28, 28)
        masks = channel_masks(net, 0.5)
        ours, theirs = remove_channels(net, masks), their_cut(net, masks, x)
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
        assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5 * ours(x).abs().max().item())


def test_onnx_of_a_cut_net_equals_pytorch(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install -e '.[deploy]')")
    from foundation.deployment.export import OnnxModel, export_onnx
    for net in (shaken(NETS["vgg"]()), shaken(NETS["resnet"]())):
        small, x = remove_channels(net, channel_masks(net, 0.5)).eval(), torch.randn(5, 1, 28, 28)
        there = OnnxModel(export_onnx(small, x[:1], tmp_path / "a.onnx", tolerance=1e-2))(x)
        assert_close(there, small(x).detach(), rtol=1e-4, atol=1e-4 * small(x).abs().max().item())


def test_slim_is_several_times_faster_in_onnx_runtime(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install -e '.[deploy]')")
    from foundation.deployment.export import OnnxModel, compare_latency, export_onnx
    net, x = VGG().eval(), torch.randn(1, 1, 28, 28)
    small = slim_vgg(net).eval()
    graphs = {name: OnnxModel(export_onnx(m, x, tmp_path / f"{name}.onnx")) for name, m in (("large", net), ("slim", small))}
    found = compare_latency(graphs, x, batch_sizes=(1, 2), rounds=9)
    assert found["large"]["latency_ms"] > 2.5 * found["slim"]["latency_ms"], found  # 5 and more on a quiet machine


# Heads ----------------------------------------------------------------------------------------------------------------

def silenced(model, masks):
    model = deepcopy(model)
    for name, kept in masks.items():
        layer = model.get_submodule(name)
        layer.out.weight.data[:, ~kept.repeat_interleave(layer.dim // layer.heads)] = 0
    return model


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("make, x", [
    (lambda: ViT(dim=32, depth=2), torch.randn(2, 1, 28, 28)), (lambda: BERT(50, 16, 32, 2, 4), torch.randint(50, (2, 9)))])
def test_removed_heads_equal_zeroed_heads(make, x, share):
    torch.manual_seed(0)
    model = make().eval()
    masks = head_masks(model, share)
    small = remove_heads(model, masks)
    assert_close(small(x), silenced(model, masks)(x), rtol=1e-5, atol=1e-5)
    assert all(m.any() for m in masks.values()) and all(model.get_submodule(n).heads == 4 for n in masks)
    other = {name: mask.roll(1) for name, mask in masks.items()}
    if 0 < share < 0.9:  # other heads are noticed
        assert (small(x) - silenced(model, other)(x)).abs().max() > 1e-4
    small(x).sum().backward()


# The recipe and what it shipped ---------------------------------------------------------------------------------------

def test_a_slim_vgg_is_the_cut_one_under_a_name_that_a_card_can_hold():
    net, x = shaken(VGG()), torch.randn(2, 1, 28, 28)
    small = slim_vgg(net).eval()
    assert small.config["widths"] == list(SLIM) and [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [8, 8, 24, 24, 48, 48]
    shares = {name: 1 - kept / group.size for (name, group), kept in zip(channel_groups(net).items(), [8, 8, 24, 24, 48, 48])}
    assert_close(small(x), remove_channels(net, channel_masks(net, shares))(x))
    for widths in ((8, 24), (0, 24, 48), (33, 24, 48)):
        with pytest.raises(ValueError, match=r"expected one for each stage, from 1 to \(32, 64, 128\)"):
            slim_vgg(net, widths)


@pytest.fixture
def few(monkeypatch):
    "Digits, and a count of the runs that really trained"
    data, real, trained = load_images("digits"), pruning.endless, []
    monkeypatch.setattr(pruning, "endless", lambda *tensors, start, **how: (trained.append(start), real(*tensors, start=start, **how))[1])
    return data, trained


def test_the_recipe_goes_on_with_the_run_that_is_missing(few, tmp_path, monkeypatch):
    data, trained = few
    monkeypatch.setattr(pruning, "SLIM", (2, 4))
    torch.manual_seed(0)
    teacher = VGG(widths=(4, 8), depths=(1, 1))
    first, nets, seconds = compare_pruning(teacher, data, seeds=range(2), steps=4, slim_steps=5, runs=tmp_path)
    assert trained == [0] * 10 and seconds > 0
    assert sparsity(nets["90 % gradually"]) == pytest.approx(0.9, abs=0.01) and sparsity(nets["dense"]) == 0
    assert nets["channels cut"].config["widths"] == nets["slim from scratch"].config["widths"] == [2, 4]
    (tmp_path / "dense-4-1.safetensors").unlink()
    again, nets, _ = compare_pruning(teacher, data, seeds=range(2), steps=4, slim_steps=5, runs=tmp_path)
    assert sorted(trained[10:]) == [0] * 10 + [4] * 5 + [5] * 4, "each run looks at its first batch; nine were read, one trained"
    assert all(torch.equal(first[arm], again[arm]) for arm in first.scores)
    compare_pruning(teacher, data, seeds=range(2), steps=4, slim_steps=6, runs=tmp_path)
    assert sorted(trained[29:]) == [0] * 10 + [4] * 6, "other slim runs, the same others"


def test_recovering_learns(few):
    data, _ = few
    torch.manual_seed(0)
    net = VGG(widths=(8, 16), depths=(1, 1))
    answers = nn.functional.one_hot(data.train_labels, 10).float() * 8
    score, seconds = recover(net, data, answers, steps=150, lr=1e-2)
    assert score > 0.4 and seconds > 0  # chance is 0.1


def test_the_cards_hold_what_was_promised():
    card, slim = read_card("vgg_pruned"), read_card("vgg_slim")
    scores = card["metrics"]["accuracy"]
    mean = {arm: sum(runs) / len(runs) for arm, runs in scores.items()}
    assert all(len(runs) == len(card["seeds"]) >= 3 for runs in scores.values()) and slim["metrics"]["accuracy"] == scores["channels cut"]
    assert mean["90 % gradually"] > mean["dense"] - 0.01
    assert mean["channels cut"] > card["metrics"]["teacher"] - 0.01
    assert all(cut > fresh for cut, fresh in zip(scores["channels cut"], scores["slim from scratch"]))
    assert sparsity(load_weights("vgg_pruned")) == pytest.approx(0.9, abs=1e-3)
    assert load_weights("vgg_slim").config["widths"] == list(SLIM)
