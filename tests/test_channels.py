"Channels of networks that people have: cut is silenced, and as many as torch-pruning cuts"

import warnings

import pytest
import torch
import torchvision
from torch import distributed as dist, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from foundation.compression.channel_groups import channel_groups
from foundation.compression.channels import (
    channel_masks,
    cut_like,
    mask_channels,
    remove_channels,
)
from foundation.compression.pruning import (
    Pruner,
    apply_masks,
    lamp_masks,
    magnitude_masks,
    sparsity,
)
from foundation.compression.storage import load_model, save_model
from foundation.compression.tracing import traced_steps
from foundation.core.basics import copy_model, count_macs
from foundation.data.images import ImageSet
from foundation.models.convnets import VGG
from foundation.recipes.vgg_pruned import recover

NETS = torchvision.models


def timm_net(name):
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=3)


def bert():
    hub = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return hub.BertModel(hub.BertConfig(vocab_size=20, **sizes))


def shaken(net):
    "Norms as after training: no scale of 1, no shift of 0"
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_()
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def resnet18():
    return NETS.resnet18(weights=None, num_classes=3)


def small_vgg():
    "A VGG with 7 × 7 places of each channel before its linear layers, which are 784 columns wide"
    convs = NETS.vgg.make_layers([8, "M", 16, "M", 16], batch_norm=True)
    net = NETS.VGG(convs, num_classes=3, init_weights=True)
    net.classifier[0], net.classifier[3] = nn.Linear(16 * 49, 32), nn.Linear(32, 24)
    net.classifier[6] = nn.Linear(24, 3)
    return net


def densenet():
    return NETS.DenseNet(8, (2, 3), 16, num_classes=3)


def perceptron():
    layers = nn.Linear(3 * 32 * 32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.GELU()
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 3))


OUTSIDE = {  # name -> network, how many groups, a word of its warning
    "ResNet-18": (resnet18, 12, None),
    "VGG": (small_vgg, 5, None),
    "MobileNet-v2": (lambda: NETS.mobilenet_v2(weights=None, num_classes=3), 25, None),
    "MobileNet-v3": (lambda: NETS.mobilenet_v3_small(weights=None, num_classes=3), 27, None),
    "DenseNet": (densenet, 12, None),
    "SqueezeNet": (lambda: NETS.squeezenet1_1(weights=None, num_classes=3), 25, None),
    "ResNeXt": (
        lambda: NETS.ResNet(NETS.resnet.Bottleneck, [1] * 4, groups=4, width_per_group=4),
        5,
        "has groups of channels",
    ),
    "perceptron": (perceptron, 2, None),
    "timm ResNet": (lambda: timm_net("resnet10t"), None, None),
    "timm EfficientNet": (lambda: timm_net("test_efficientnet"), None, None),
    "timm ConvNeXt": (lambda: timm_net("test_convnext"), None, "permute behind"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_cut_outside_net_equals_the_silent_one(name):
    make, groups, says = OUTSIDE[name]
    net, x = shaken(make()), torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = channel_masks(net, 0.5)
    assert len(masks) == (groups or len(masks)) > 0
    assert len(told) == (says is not None), [str(w.message) for w in told]
    assert says is None or says in str(told[0].message)
    small, silent = remove_channels(net, masks), mask_channels(copy_model(net), masks)
    assert_close(small(x), silent(x), rtol=1e-4, atol=1e-5 * silent(x).abs().max().item())
    assert (silent(x) - net(x)).abs().max() > 0.01 * net(x).abs().max() or "ConvNeXt" in name
    assert count_macs(small, x) < count_macs(net, x)
    small.train()(x).sum().backward()


def half(weights):
    "Half of the rows, as a mask, by their norm"
    sizes = sum(w.detach().flatten(1).norm(dim=1) for w in weights)
    kept = torch.ones(len(sizes), dtype=torch.bool)
    kept[sizes.argsort()[: len(sizes) // 2]] = False
    return kept


@pytest.mark.parametrize("name", ["ResNet-18", "VGG", "MobileNet-v2", "DenseNet"])
def test_half_of_the_channels_leaves_what_torch_pruning_leaves(name):
    tp = pytest.importorskip("torch_pruning")
    net, x = shaken(OUTSIDE[name][0]()), torch.randn(1, 3, 32, 32)
    ours, theirs = remove_channels(net, channel_masks(net, 0.5)), copy_model(net)
    last = [m for m in theirs.modules() if isinstance(m, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.MagnitudePruner(
        theirs, x, importance, pruning_ratio=0.5, ignored_layers=[last]
    ).step()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert count_macs(ours, x) == count_macs(theirs, x)


def test_the_same_channels_cut_by_torch_pruning_give_the_same_outputs():
    tp = pytest.importorskip("torch_pruning")
    net, x = shaken(densenet()), torch.randn(2, 3, 32, 32)
    masks, theirs = channel_masks(net, 0.5), copy_model(net)
    modules = dict(theirs.named_modules())
    for name, kept in masks.items():
        graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
        dropped = (~kept).nonzero().flatten().tolist()
        graph.get_pruning_group(modules[name], tp.prune_conv_out_channels, dropped).prune()
    assert_close(remove_channels(net, masks)(x), theirs(x), rtol=1e-4, atol=1e-4)


# What stands between two convolutions ------------------------------------------------------------


class Between(nn.Module):
    def __init__(self, what, columns=8 * 36):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.wide, self.one = nn.Conv2d(16, 6, 3), nn.Conv2d(3, 1, 3)
        self.free, self.norm = nn.Parameter(torch.randn(8, 1, 1)), nn.BatchNorm2d(16)
        self.gate, self.rows = nn.Conv2d(8, 8, 1), nn.Linear(columns, 5)
        self.what = what

    def forward(self, x):
        return self.what(self, self.a(x).relu(), x)


def squeezed(m, a, x):
    return m.rows((a * torch.sigmoid(m.gate(a.mean((2, 3), keepdim=True)))).flatten(1))


def with_picture(m, a, x):
    x = x[:, :, 2:, 2:]
    return m.wide(torch.cat([a, x, x, x[:, :2]], 1)).mean()


CASES = {  # name -> what is done, groups that can be cut
    "a plain chain": (lambda m, a, x: m.rows(a.flatten(1)), ["a"]),
    "viewed": (lambda m, a, x: m.rows(a.view(a.size(0), -1)), ["a"]),
    "reshaped": (lambda m, a, x: m.rows(a.reshape(a.shape[0], -1)), ["a"]),
    "viewed by a number": (lambda m, a, x: m.rows(a.view(-1, 8 * 36)), []),
    "a sum": (lambda m, a, x: m.rows((a + m.b(x)).flatten(1)), ["a"]),
    "side by side": (lambda m, a, x: m.wide(m.norm(torch.cat([a, m.b(x)], 1))).mean(), ["a", "b"]),
    "twice side by side": (lambda m, a, x: m.wide(torch.cat([a, a], dim=1)).mean(), ["a"]),
    "turned and added": (
        lambda m, a, x: m.wide(torch.cat([a, m.b(x)], 1) + torch.cat([m.b(x), a], 1)).mean(),
        [],  # b is called twice
    ),
    "crossed": (
        lambda m, a, x: (lambda b: m.wide(torch.cat([a, b], 1) + torch.cat([b, a], 1)).mean())(
            m.b(x)
        ),
        ["a"],
    ),
    "at another axis": (lambda m, a, x: m.c(torch.cat([a, m.b(x)], 2)).mean(), []),
    "with the picture": (with_picture, []),
    "squeezed": (squeezed, ["a"]),
    "a gate alone": (lambda m, a, x: m.rows(torch.sigmoid(a).flatten(1)), []),
    "a gate that is added": (lambda m, a, x: m.rows((a + torch.sigmoid(m.b(x))).flatten(1)), []),
    "plus one": (lambda m, a, x: m.rows((a + 1).flatten(1)), []),
    "times two": (lambda m, a, x: m.rows((a * 2.0).flatten(1)), ["a"]),
    "times a parameter": (lambda m, a, x: m.rows((a * m.free).flatten(1)), []),
    "plus a broadcast": (lambda m, a, x: m.rows((a + m.one(x)).flatten(1)), []),
    "the number of examples added": (lambda m, a, x: m.rows((a + x.size(0)).flatten(1)), []),
    "a linear layer on the last axis": (lambda m, a, x: F.linear(a, torch.ones(5, 6)).mean(), []),
    "some of the channels": (lambda m, a, x: m.c(torch.cat([a[:, :4], a[:, 4:]], 1)).mean(), []),
    "a softmax": (lambda m, a, x: m.rows(a.softmax(1).flatten(1)), []),
    "pooled": (lambda m, a, x: m.c(F.max_pool2d(a, 3, 1, 1)).mean(), ["a"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stands_between_is_followed_or_keeps_its_channels(name):
    what, groups = CASES[name]
    net, x = shaken(Between(what)), torch.randn(3, 3, 8, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = channel_masks(net, 0.5)
    assert [n for n in masks if n != "wide"] == groups and len(told) <= 1
    small, silent = remove_channels(net, masks), mask_channels(copy_model(net), masks)
    assert_close(small(x), silent(x), rtol=1e-4, atol=1e-5)
    assert not masks or (silent(x) - net(x)).abs().max() > 1e-5


def tied():
    net = shaken(Between(lambda m, a, x: m.rows((a + m.b(x)).flatten(1))))
    net.b.weight = net.a.weight
    return net


def test_tied_convolutions_keep_their_channels_and_one_warning_names_both():
    with pytest.warns(UserWarning, match="a .Conv2d., b .Conv2d. shares its weights") as told:
        assert channel_groups(tied()) == {} and len(told) == 1


def test_following_leaves_nothing_behind_in_the_network():
    net = Between(lambda m, a, x: m.rows((a * torch.ones(8, 1, 1)).flatten(1)))
    before = set(vars(net))
    with pytest.warns(UserWarning, match="mul behind a is not a layer"):
        channel_groups(net)
    assert set(vars(net)) == before


def test_the_list_of_steps_is_what_the_network_does():
    steps = traced_steps(VGG(widths=(4, 8), depths=(1, 1)))
    kinds = [step.op for step in steps]
    assert kinds[0] == "placeholder" and kinds[-1] == "output" and "call_module" in kinds
    with pytest.raises(TypeError, match="cannot be followed .*unit_masks"):
        traced_steps(type("Moody", (VGG,), dict(forward=lambda m, x: x if x.sum() > 0 else -x))())


# Around the cut -----------------------------------------------------------------------------------


@pytest.fixture
def alone():
    "A group of one process"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_and_distributed_networks_are_cut_as_what_is_in_them(alone):
    net, x = shaken(small_vgg()), torch.randn(1, 3, 32, 32)
    masks = channel_masks(net, 0.5)
    want = remove_channels(net, masks)(x)
    for wrap in (lambda m: torch.compile(m, backend="eager"), DistributedDataParallel):
        wrapped = wrap(copy_model(net))
        again = channel_masks(wrapped, 0.5)
        assert all(torch.equal(again.pop(name), masks[name]) for name in masks) and not again
        assert torch.equal(remove_channels(wrapped, masks)(x), want)
        assert_close(mask_channels(wrapped, masks)(x), want, rtol=1e-4, atol=1e-5)


def test_a_width_that_is_written_down_follows_the_cut():
    net = shaken(timm_net("resnet10t"))
    small = remove_channels(net, channel_masks(net, 0.5))
    assert small.num_features == small.fc.in_features == net.fc.in_features // 2
    assert VGG().dim == 2 * remove_channels(VGG(), channel_masks(VGG(), 0.5)).dim


def test_a_cut_net_comes_back_from_its_weights_or_the_error_says_how(tmp_path):
    net, x = shaken(densenet()), torch.randn(2, 3, 32, 32)
    shares = {"features.conv0": 0.5, "features.denseblock1.denselayer1.conv2": 0.7}
    small = remove_channels(net, channel_masks(net, shares))
    state = load_model(save_model(small, tmp_path / "small"))
    assert torch.equal(cut_like(densenet(), state).eval()(x), small(x))
    assert torch.equal(cut_like(densenet(), net.state_dict()).eval()(x), net(x))
    with pytest.raises(ValueError, match="not the weights of a cut DenseNet .*expected those"):
        cut_like(NETS.DenseNet(8, (2, 2), 16, num_classes=3), state)


def test_a_cut_net_recovers_by_training():
    net = shaken(densenet())
    small = remove_channels(net, channel_masks(net, 0.5))
    x, y = torch.randint(256, (24, 3, 32, 32)).to(torch.uint8), torch.arange(24) % 3
    images = ImageSet(x, y, x, y, tuple("abc"), "noise", "here", 0.5, 0.3)
    before = [p.clone() for p in small.parameters()]
    score, _ = recover(small, images, torch.randn(24, 3), steps=2)
    assert 0 <= score <= 1
    assert any(not torch.equal(b, p) for b, p in zip(before, small.parameters()))


ZEROS = {
    "torchvision": densenet,
    "timm ViT": lambda: timm_net("test_vit"),
    "timm convolutions": lambda: timm_net("test_efficientnet"),
    "BERT": bert,
    "compiled": lambda: torch.compile(densenet(), backend="eager"),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_in_any_network(name):
    net = ZEROS[name]()
    for masks in (magnitude_masks(net, 0.5), lamp_masks(net, 0.8)):
        zeros = 1 - sum(int(m.sum()) for m in masks.values()) / sum(
            map(torch.numel, masks.values())
        )
        assert sparsity(apply_masks(copy_model(net), masks)) == pytest.approx(zeros, abs=1e-6)
        assert all(name.endswith("weight") for name in masks) and zeros > 0.49
    pruner = Pruner(net, 0.9, begin=0, end=2)
    for step in range(3):
        pruner.update(step)
    assert sparsity(net) == pytest.approx(0.9, abs=1e-3)
