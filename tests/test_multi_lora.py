"""Several LoRAs on one model: equal to peft, the base bit for bit, each alone"""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from foundation.finetuning.lora import LoRA, merge, unload, unmerge
from foundation.finetuning.multi_lora import MultiLoRA
from foundation.models.bert import BERT
from foundation.models.heads import TextClassifier, without_head
from foundation.models.pretrained import load_weights, save_weights

pytestmark = pytest.mark.filterwarnings("ignore:the head 'head' is frozen")
IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 3, 0, 0]])
PLANS = {
    "one": dict(rank=4, targets="all-linear", train=["head"]),
    "two": dict(rank=2, alpha=3.0, targets=["mlp.0"], train=["head"]),
    "three": dict(rank=1, targets=["attention.query", "mlp.0"]),
}


def classifier():
    torch.manual_seed(0)
    return TextClassifier(without_head(BERT(50, context=16, dim=16, depth=2, heads=2)), 3).eval()


@pytest.fixture
def loras():
    several = MultiLoRA(classifier())
    for name, plan in PLANS.items():
        several.add(name, **plan)
        for p in several.model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    return several


def outputs(several):
    return {name: several.use(name)(IDS).detach() for name in (*PLANS, None)}


def test_none_in_use_is_the_base_and_each_is_itself_in_any_order(loras):
    first, plain = outputs(loras), classifier()
    assert torch.equal(first[None], plain(IDS))
    assert list(loras.model.state_dict()) == list(plain.state_dict())
    assert not any(p.requires_grad for p in loras.model.parameters())
    for name in ("three", "one", None, "two", "two", "one"):
        assert torch.equal(loras.use(name)(IDS), first[name])
    gaps = [(first[a] - first[b]).abs().max() for a in first for b in first if a != b]
    assert min(gaps) > 1e-2


def test_several_are_those_of_peft(loras):
    peft = pytest.importorskip("peft")
    theirs = None
    for name, plan in PLANS.items():
        ours = loras.use(name)
        places = [n for n, m in ours.named_modules() if isinstance(m, LoRA)]
        config = peft.LoraConfig(
            r=plan["rank"],
            lora_alpha=plan.get("alpha", 16.0),
            target_modules=places,
            modules_to_save=plan.get("train"),
        )
        if theirs is None:
            theirs = peft.get_peft_model(classifier(), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        inner = theirs.base_model.model
        for place in places:
            mine, other = ours.get_submodule(place), inner.get_submodule(place)
            other.lora_A[name].weight.data.copy_(mine.A)
            other.lora_B[name].weight.data.copy_(mine.B)
        if "train" in plan:
            inner.head.modules_to_save[name].load_state_dict(ours.head.state_dict())
    theirs.eval()
    for name in reversed(PLANS):
        theirs.set_adapter(name)
        assert_close(loras.use(name)(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
        learn = [
            sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (loras.model, theirs)
        ]
        assert learn[0] == learn[1]
    with theirs.disable_adapter():
        assert_close(loras.use(None)(IDS), theirs(IDS))


def test_training_one_moves_nothing_else(loras):
    first = outputs(loras)
    opt = torch.optim.SGD([p for p in loras.use("two").parameters() if p.requires_grad], lr=0.1)
    loras.model(IDS).square().sum().backward()
    opt.step()
    after = outputs(loras)
    assert {name for name in after if not torch.equal(after[name], first[name])} == {"two"}


def test_one_is_saved_and_read_alone(loras, tmp_path):
    want = loras.use("two")(IDS)
    save_weights(loras.model, "two", dict(config={}), tmp_path, torch.float32, only="learnt")
    other = MultiLoRA(classifier())
    other.add("three", **PLANS["three"])
    load_weights("two", other.add("mine", **PLANS["two"]), tmp_path, only="learnt")
    assert torch.equal(other.use("mine").eval()(IDS), want)
    assert torch.equal(other.use(None)(IDS), classifier()(IDS))


def test_the_one_in_use_is_merged_and_no_other_beside_it(loras):
    first = outputs(loras)
    model = merge(loras.use("one"))
    assert_close(model(IDS), first["one"], rtol=1e-4, atol=1e-5)
    for call in (lambda: loras.use("two"), lambda: loras.use(None), lambda: loras.add("four")):
        with pytest.raises(ValueError, match="'one' is merged into the base; unmerge it first"):
            call()
    unmerge(model)
    assert all(torch.equal(v, first[name]) for name, v in outputs(loras).items())
    assert_close(unload(merge(loras.use("one")))(IDS), first["one"], rtol=1e-4, atol=1e-5)


def test_bad_names_and_bad_layers_add_nothing(loras):
    first = outputs(loras)
    with pytest.raises(ValueError, match="there is a LoRA 'one' already"):
        loras.add("one")
    with pytest.raises(ValueError, match="there is no LoRA 'five'; there are: one, two, three"):
        loras.use("five")
    for wrong in (dict(rank=99), dict(targets=["norm1"]), dict(rank=2, train=["haed"])):
        with pytest.raises((TypeError, ValueError)):
            loras.add("four", **wrong)
    assert list(loras.parts) == list(PLANS)
    assert all(torch.equal(v, first[name]) for name, v in outputs(loras).items())


def test_layers_at_two_names_parts_in_parts_modes_and_copies():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    net = nn.Sequential(layer, nn.Sequential(layer, nn.Linear(4, 4)), nn.Dropout())
    several = MultiLoRA(net.eval())
    plain = net(x).detach()
    several.add("deep", rank=1, targets=["1.0"])
    several.add("whole", rank=1, targets=["0"], train=["1.1"])
    several.add("part", rank=2, targets=["1.1"])
    for name in ("deep", "whole"):
        model = several.use(name)
        assert model[0] is model[1][0] and isinstance(model[0], LoRA)
    assert several.use("part")[0] is layer
    assert torch.equal(several.use(None)(x), plain) and net[1][0] is layer
    net.train()
    assert all(m.training for m in several.use("deep").modules())
    net.eval()
    assert not any(m.training for m in several.use("whole").modules())
    again = deepcopy(several)
    assert torch.equal(again.use("deep")(x), several.use("deep")(x))
    again.use("deep")[0].B.data.fill_(1.0)
    assert torch.equal(several.model[0].B, torch.zeros(4, 1))


def test_a_part_that_one_trains_whole_is_the_home_of_a_layer_of_another():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(3, 4)
    plain, inner = net(x).detach(), net[1]
    several = MultiLoRA(net)
    several.add("whole", rank=1, targets="0", train=["1"])
    assert not any(p.requires_grad for p in several.use(None).parameters())
    several.add("inside", rank=1, targets=["1.0"])
    for _ in range(2):
        assert several.use("inside")[1] is inner and isinstance(net[1][0], LoRA)
        assert several.use("whole")[1] is not inner and type(net[1][0]) is nn.Linear
        assert all(p.requires_grad for p in net[1].parameters())
    assert torch.equal(several.use(None)(x), plain)


def test_a_compiled_model_sees_the_one_in_use():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(2, 4)
    model = torch.compile(net, backend="eager")
    several = MultiLoRA(model)
    plain = model(x).detach()
    several.add("one", rank=2, targets=["0"], train=["1"])
    nn.init.normal_(net[1].bias)
    assert (model(x) - plain).abs().max() > 1e-2 and several.model is net
    several.use(None)
    assert torch.equal(model(x), plain)
