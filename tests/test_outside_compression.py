"Networks of other libraries, compiled and distributed, taught, folded, quantised, stored, exported"

import importlib
import warnings

import pytest
import torch
import torchvision
from test_outside import alone, data, hf_bert, hf_distilbert, hf_gpt2, hf_vit, ours, seeded
from test_outside import timm_net, timm_vit, tv_resnet, tv_vit
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from foundation.compression.distillation import Hinted, distil, match_hints, match_teacher, tap
from foundation.compression.folding import Logits, as_linear, fold_batch_norm
from foundation.compression.integer_layers import IntegerLayer, quantize_dynamic, quantize_static
from foundation.compression.quantization import classify_rounded, quantize_weights
from foundation.compression.storage import load_model, save_model
from foundation.compression.weights import layer_weights
from foundation.core.checks import complaint
from foundation.core.modules import head_of, logits_of, unwrapped
from foundation.models.convnets import ResNet
from foundation.models.outside import as_encoder, without_last
from foundation.training.run import fit

FIXTURES = alone, seeded  # for each test of this file
SILENT = dict(steps=2, title="", precision="fp32")


def tv_mobilenet():
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]  # expansion, channels, blocks, stride
    return torchvision.models.MobileNetV2(3, 0.25, inverted_residual_setting=stages)


def timm_resnet():
    return timm_net("resnet10t")


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def plain(model):
    return model


TEXTS = [hf_bert, hf_gpt2]
KINDS = [ours, tv_resnet, tv_mobilenet, tv_vit, timm_vit, timm_resnet, hf_vit, *TEXTS]
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
wrapped = pytest.mark.parametrize("wrap", [plain, compiled, distributed], ids=lambda w: w.__name__)
runs = pytest.mark.parametrize(  # a run of a compiled network takes seconds: one of them does it
    "kind, wrap",
    [(kind, wrap) for kind in KINDS for wrap in (plain, distributed)] + [(ours, compiled)],
    ids=lambda x: x.__name__,
)


def network(kind, wrap=plain):
    "In eval mode, with batch norms that have seen the data and a head that says something"
    model = kind()
    nn.init.normal_(head_of(model)[1].weight)
    found = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in found:
        nn.init.uniform_(m.weight, 0.5, 1.5)
        m.momentum = 1.0  # the last batch alone counts
    if found:
        said(model.train(), data(kind)[0])
    return wrap(model.eval())


def said(model, x):
    with torch.no_grad():
        return logits_of(unwrapped(model), x)  # compiling takes seconds, and changes the last digit


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def gap(got, want):
    "The share of the spread over the examples that is wrong"
    return ((got - want).norm() / (want - want.mean(0)).norm()).item()


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def other_family(kind):
    return hf_distilbert() if kind in TEXTS else ours()


# Teachers and students ----------------------------------------------------------------------------


@runs
def test_a_student_of_another_family_learns_without_labels(kind, wrap):
    teacher, student, (x, _) = network(kind, wrap), other_family(kind), data(kind)
    before = [p.clone() for p in teacher.parameters()]
    objective = match_teacher(teacher)
    losses = fit(student, DataLoader(x, 6), objective, **SILENT)
    assert losses.isfinite().all() and (losses > 0).all()
    assert all(map(torch.equal, before, teacher.parameters()))
    assert objective(teacher, x)[0].abs() < 1e-5  # who answers like the teacher has learnt all


@runs
def test_a_student_learns_from_logits_or_from_a_teacher_and_labels(kind, wrap):
    student, (x, y) = wrap(kind()), data(kind)
    before = [p.clone() for p in student.parameters()]
    run = distil(student, x, torch.randn(len(x), 3), steps=1, title="")
    assert run.losses.isfinite().all()
    assert not all(map(torch.equal, before, student.parameters()))
    pairs = DataLoader(TensorDataset(x, y), 6)
    assert (
        fit(student, pairs, match_teacher(other_family(kind), hard=0.5), **SILENT).isfinite().all()
    )


@runs
def test_features_are_taught_through_an_encoder(kind, wrap):
    teacher, student, (x, _) = network(kind, wrap), other_family(kind), data(kind)
    width, dim = (head_of(m)[1].in_features for m in (student, teacher))
    teacher, student = (  # ours has an encoder, but is called for logits
        without_last(m) if type(unwrapped(m)) is ResNet else as_encoder(m)
        for m in (teacher, student)
    )
    hinted = Hinted(student, "", nn.Linear(width, dim))
    objective = match_hints(teacher, "")
    assert fit(hinted, [x], objective, **SILENT | dict(steps=1)).isfinite().all()
    same = Hinted(teacher, "", nn.Identity()).eval()
    assert objective(same, x)[0] < 1e-10
    said_so = complaint(Hinted(student, "", nn.Linear(width + 1, 3)), x)
    assert "the regressor fails on the hint, a tensor of float32" in said_so


@wrapped
def test_one_listens_inside_of_a_wrapped_network(wrap):
    model, (x, _) = network(tv_resnet), data(tv_resnet)
    want = tap(model, "layer2", x)[1]
    assert_close(tap(wrap(model), "layer2", x)[1], want)
    assert_close(Hinted(wrap(model), "layer2", nn.Identity())(x), want)


# Folded and quantised -----------------------------------------------------------------------------


@wrapped
@every
def test_folded_networks_say_the_same(kind, wrap):
    model, (x, _) = network(kind, wrap), data(kind)
    folded = quiet(fold_batch_norm, model, x)
    assert type(folded) is type(unwrapped(model)) and norms(unwrapped(model)) == norms(kind())
    left = ["bn1"] if kind is timm_resnet else []  # what stands before it is a whole Sequential
    assert norms(folded) == left
    want = said(model, x)
    assert_close(said(folded, x), want, rtol=0, atol=1e-5 * max(1, want.abs().max().item()))


def layers(model):
    return [m for m in as_linear(model).modules() if type(m) in (nn.Conv2d, nn.Linear)]


@wrapped
@every
@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_int8_logits_are_near_those_of_floats(kind, wrap, way):
    model, (x, y) = network(kind, wrap), data(kind)
    if way == "dynamic":
        small = quiet(quantize_dynamic, model, example=x)
    else:
        small = quiet(quantize_static, model, DataLoader(TensorDataset(x, y), 6))
    done = [m for m in small.modules() if isinstance(m, IntegerLayer)]
    assert len(done) == len(layers(unwrapped(model)))
    assert gap(said(small, x), said(model, x)) < 0.25
    assert not torch.equal(said(small, x), said(model, x))


def test_one_calibrates_on_whatever_holds_inputs():
    model, (x, y) = network(ours), data(ours)
    pairs = TensorDataset(x, y)
    ways = x, [x], [(x, y)], DataLoader(x, 12), DataLoader(pairs, 12), pairs
    want, *others = (said(quiet(quantize_static, model, way), x) for way in ways)
    assert all(torch.equal(want, other) for other in others)


@wrapped
@every
def test_weights_of_few_bits(kind, wrap):
    model, (x, _) = network(kind, wrap), data(kind)
    far = []
    for bits in (4, 8):
        rounded, integers = quiet(quantize_weights, as_linear(model), bits, group=8)
        assert len(integers) >= len(layers(unwrapped(model)))
        far.append(gap(said(rounded, x), said(model, x)))
    assert far[1] < 0.15 and far[1] < far[0]


@runs
def test_training_goes_on_with_rounded_weights(kind, wrap):
    model, (x, y) = wrap(kind()), data(kind)
    losses = quiet(fit, model, [(x, y)] * 2, classify_rounded(8), **SILENT)
    assert losses.isfinite().all()
    net = unwrapped(model).eval()
    want = nn.functional.cross_entropy(said(quiet(quantize_weights, net, 4)[0], x), y)
    assert_close(quiet(classify_rounded(4), net, (x, y))[0].detach(), want, rtol=1e-3, atol=1e-4)


def test_a_conv1d_is_told_and_becomes_linear():
    model, (x, _) = network(hf_gpt2), data(hf_gpt2)
    with pytest.warns(UserWarning, match=r"c_attn \(Conv1D\) .* hand in as_linear\(model\)"):
        assert len(layer_weights(model)) == 1
    linear = as_linear(model)
    assert_close(said(linear, x), said(model, x))
    assert len(layer_weights(linear)) == 1 + 4 * 3
    assert "Conv1D" in {type(m).__name__ for m in model.modules()}  # the model stays as it was


# Files --------------------------------------------------------------------------------------------


@wrapped
@every
def test_a_file_gives_back_what_was_written(kind, wrap, tmp_path):
    model = network(kind, wrap)
    again = kind().eval()
    again.load_state_dict(load_model(save_model(model, tmp_path / "whole")))
    state = unwrapped(model).state_dict()
    assert all(map(torch.equal, state.values(), again.state_dict().values()))
    found = load_model(save_model(model, tmp_path / "small", "int8", compress=True))
    assert found.keys() == state.keys()
    again.load_state_dict(found)
    for name, weight in state.items():
        if weight.ndim >= 2 and weight.is_floating_point():
            step = weight.flatten(1).abs().amax(1).max() / 127
            assert (found[name] - weight).abs().max() <= step
    sizes = [(tmp_path / name).stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.7 * sizes[1]


@wrapped
@every
def test_graphs_say_what_the_network_says(kind, wrap, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    deploy = importlib.import_module("foundation.deployment.export")
    model, (x, _) = network(kind, wrap), data(kind)
    graph = deploy.OnnxModel(deploy.export_onnx(model, x[:4], tmp_path / "net.onnx"))
    for batch in (x, x[:1], x[2:5]):
        want = said(model, batch)
        assert_close(graph(batch), want, rtol=1e-4, atol=1e-4 * max(1, want.abs().max().item()))


def test_a_mask_may_go_into_a_graph(tmp_path):
    deploy = importlib.import_module("foundation.deployment.export")
    model, (x, _) = network(hf_bert), data(hf_bert)
    mask = (x != 0).long()
    graph = deploy.OnnxModel(deploy.export_onnx(model, (x, mask), tmp_path / "net.onnx"))
    assert_close(graph(x, mask), said(model, x), rtol=1e-4, atol=1e-4)


@every
def test_torch_export_takes_it(kind):
    model, (x, _) = network(kind), data(kind)
    model = quiet(quantize_static, model, [x]) if kind in (ours, hf_bert) else model
    program = torch.export.export(Logits(model), (x,))
    assert_close(said(program.module(), x), said(model, x), rtol=1e-4, atol=1e-4)


def test_a_body_without_logits_is_told_what_it_lacks(tmp_path):
    deploy = importlib.import_module("foundation.deployment.export")
    model, (x, _) = network(hf_bert), data(hf_bert)
    said_so = complaint(deploy.export_onnx, model.bert, x, tmp_path / "net.onnx")
    assert "expected logits" in said_so and "\n" not in said_so
    graph = deploy.OnnxModel(deploy.export_onnx(as_encoder(model.bert), x, tmp_path / "net.onnx"))
    assert graph(x).shape == (12, 7, 16)
