"""The benchmark without its clock: equal weights give equal numbers,
ratios are what they say, and results appear whole"""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is not part of the package

from bench import __main__ as command  # noqa: E402
from bench import duel as duels  # noqa: E402
from bench.duel import Duel, MissingPeer, measure, outcome, peer  # noqa: E402
from bench.mae import equal_losses, mae, their_loss, their_mae  # noqa: E402
from bench.prune import prune  # noqa: E402
from bench.masked_text import masked_text, their_bert  # noqa: E402
from bench.quantize import quantize  # noqa: E402
from bench.simclr import simclr  # noqa: E402
from bench.student import _their_loss, same_step, student  # noqa: E402
from foundation.models.bert import BERT  # noqa: E402
from foundation.models.convnets import VGG, ConvNet  # noqa: E402
from foundation.models.vit import ViT  # noqa: E402
from foundation.pretraining.masked_image import MaskedAutoencoder, masked_patches  # noqa: E402
from foundation.training.speed import Throughput  # noqa: E402

KEYS = {"name", "unit", "ours", "peers", "ratio", "same_result", "limit"}
SMALL = dict(vocab_size=60, context=16, dim=16, depth=2, heads=2, batch_size=4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def transformers():
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (pip install -e '.[bench]')"
    )


@pytest.fixture
def lightly():
    return pytest.importorskip(
        "lightly", reason="lightly is not installed (pip install -e '.[bench]')"
    )


def fake(ours=lambda: None, proof=(1.0, 1.0), peers=("theirs",), limit=2.0):
    return Duel(
        "calls/s",
        10,
        ours,
        {name: lambda: None for name in peers},
        dict(loss=proof),
        limit,
        "a note",
    )


# Equal weights, equal numbers ---------------------------------------------------------------------


def test_masked_text_is_equal_and_stays_equal_while_both_train(transformers):
    duel = masked_text(**SMALL)
    assert duel.same_result() and duel.items == 4 * 16 and duel.limit == 2.7
    for _ in range(4):  # the same batches, gradients and updates
        [ours], [theirs] = duel.ours(), duel.peers["transformers"]()
        assert_close(ours.loss, theirs, rtol=1e-4, atol=1e-4)


def test_a_weight_that_differs_is_noticed(transformers):
    ours = BERT(60, 16, 16, 2, 2)
    theirs, tokens = their_bert(ours), torch.randint(60, (2, 16))
    assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        theirs.bert.encoder.layer[1].output.dense.bias[3] += 0.1
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-3


def test_simclr_gives_lightlys_loss_and_takes_steps(lightly):
    duel = simclr(
        widths=(16, 32), batch_size=8, steps=2, workers=1
    )  # fewer channels than 8 can hang oneDNN 3.12 on AVX2
    assert duel.same_result() and duel.items == 16 and duel.limit == 3.0
    for _ in range(2):  # two passes of the loader
        assert len(duel.ours()) == 2
        for way in duel.peers.values():
            assert len(losses := way()) == 2 and all(math.isfinite(loss) for loss in losses)


def test_mae_is_equal_once_the_class_token_is_out_of_sight(transformers):
    ours, objective, images = (
        MaskedAutoencoder(ViT(dim=16, depth=2)),
        masked_patches(0.75),
        torch.randn(3, 1, 28, 28),
    )
    theirs = their_mae(ours)
    proof = equal_losses(ours, objective, theirs, images)
    assert all(math.isclose(*pair, rel_tol=1e-4) for pair in proof.values())
    torch.manual_seed(0)
    assert not math.isclose(
        proof["loss"][0], their_loss(theirs, images).item(), rel_tol=1e-4
    )  # with the token
    torch.manual_seed(1)
    assert not math.isclose(
        proof["loss"][0], objective(ours, images)[0].item(), rel_tol=1e-4
    )  # other patches


def test_mae_takes_steps(transformers):
    duel = mae(dim=16, depth=1, batch_size=4, steps=2)
    assert duel.same_result() and duel.items == 8 and duel.limit == 1.5
    assert len(duel.ours()) == 2 and all(
        math.isfinite(loss) for loss in duel.peers["transformers"]()
    )


@pytest.mark.filterwarnings("ignore")
def test_quantising_gives_the_rulers_and_weights_of_torch_ao():
    pytest.importorskip("torchao", reason="torchao is not installed (pip install -e '.[bench]')")
    duel = quantize(images=8, widths=(4, 8))
    assert (
        duel.same_result()
        and set(duel.proof) == {"scales", "weights", "inputs"}
        and duel.items == 8
    )
    images = torch.rand(8, 1, 28, 28)
    right = duel.ours()(images)
    for name, way in duel.peers.items():
        assert (way()(images) - right).abs().max() < 0.1 * right.abs().max(), name


@pytest.mark.parametrize(
    "row, size", [(masked_text, SMALL), (mae, dict(dim=16, depth=1, batch_size=4, steps=1))]
)
def test_half_precision_is_proved_in_full_and_has_no_limit(row, size, transformers):
    duel = row("bf16", **size)
    assert duel.same_result() and duel.limit is None
    [ours], [theirs] = duel.ours(), duel.peers["transformers"]()
    assert math.isfinite(ours.loss) and math.isfinite(theirs)


def test_nets_cut_by_us_and_by_torch_pruning_are_the_same():
    pytest.importorskip(
        "torch_pruning", reason="torch-pruning is not installed (pip install -e '.[bench]')"
    )
    duel = prune(widths=(4, 8, 8), calls=2)
    assert (
        duel.same_result()
        and duel.items == 2
        and set(duel.proof) == {"outputs", "first", "parameters"}
    )
    assert set(duel.peers) == {"torch-pruning", "uncut"}
    for way in (duel.ours, *duel.peers.values()):
        way()


@pytest.mark.filterwarnings("ignore")
def test_a_student_learns_the_same_from_answers_computed_once():
    duel = student(images=16, widths=(4, 8), batch_size=8, passes=3)
    assert (
        duel.same_result()
        and duel.items == 48
        and set(duel.peers) == {"PyTorch", "torch.ao int8 teacher"}
    )
    for _ in range(2):
        ours, theirs = duel.ours(), duel.peers["PyTorch"]()
        assert len(ours) == 6
        assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-3, atol=1e-4)
    assert all(math.isfinite(loss) for loss in duel.peers["torch.ao int8 teacher"]())
    x, teacher, pupil = (
        torch.randn(4, 1, 28, 28),
        VGG(widths=(4, 8), depths=(1, 1)).eval(),
        ConvNet(),
    )
    proof = same_step(teacher, pupil, x)
    assert not math.isclose(
        proof["loss"][0],
        _their_loss(VGG(widths=(4, 8), depths=(1, 1)).eval(), pupil, x).item(),
        rel_tol=1e-4,
    )


def test_outcome_sees_the_gradient():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    assert outcome(weight.square().sum(), weight) == (25.0, 10.0)


# Ratios and results -------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_rounds_over_the_best_peer(monkeypatch):
    seconds = dict(
        ours=[1.0, 2.0, 1.0, 1.0], slow=[9.0] * 4, fast=[2.0, 8.0, 3.0, 1.0]
    )  # fast over ours: 2, 4, 3, 1
    monkeypatch.setattr(
        duels, "throughput", lambda ways, items, rounds, warmup: Throughput(items, seconds)
    )
    row = measure("x", fake(peers=("slow", "fast")), rounds=4)
    assert (row["ours"], row["peers"], row["ratio"]) == (10.0, dict(slow=1.1, fast=4.0), 2.5)
    assert (
        row["spread"][0] < 2.5 < row["spread"][1]
        and row["limit"] == 2.0
        and row["same_result"] is True
    )


@pytest.mark.parametrize(
    "proof, same", [((2.0, 2.0001), True), ((2.0, 2.001), False), ((2.0, math.nan), False)]
)
def test_results_are_the_same_to_four_digits(proof, same):
    assert fake(proof=proof).same_result() is same


@pytest.fixture
def results(tmp_path, monkeypatch):
    "Two rows that do nothing, and a file of their own"
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(command, "ROWS", dict(one=fake, two=lambda: fake(limit=None)))
    monkeypatch.setattr(command, "peer", lambda name: torch)  # for its version
    return tmp_path / "results.json"


def test_all_rows_are_printed_and_written(results, capsys):
    assert command.main(["--rounds", "2"]) == 0
    found = json.loads(results.read_text())
    assert set(found) == {"machine", "rows"} and [row["name"] for row in found["rows"]] == [
        "one",
        "two",
    ]
    assert all(set(row) >= KEYS for row in found["rows"])
    assert {"processor", "cores", "threads", "torch", "transformers", "lightly"} <= set(
        found["machine"]
    )
    assert len(re.findall(r"^(?:one|two) .*calls/s.*yes$", capsys.readouterr().out, re.M)) == 2


def test_some_rows_are_printed_only(results, capsys):
    assert command.main(["two", "--rounds", "1"]) == 0
    assert "two" in capsys.readouterr().out and not results.exists()


def test_an_interrupted_run_leaves_the_old_results(results, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    results.write_text("old")
    monkeypatch.setitem(command.ROWS, "two", lambda: fake(ours=stop))
    assert "nothing was written" in command.main(["--rounds", "1"])
    assert results.read_text() == "old"


def test_different_results_are_an_error(results, monkeypatch, capsys):
    monkeypatch.setitem(command.ROWS, "two", lambda: fake(proof=(1.0, 2.0)))
    assert re.search("Not the same result.*two$", command.main(["--rounds", "1"]))
    assert (
        "NO" in capsys.readouterr().out
        and json.loads(results.read_text())["rows"][1]["same_result"] is False
    )


@pytest.mark.parametrize(
    "name, row", [("transformers", masked_text), ("lightly.loss", simclr), ("transformers", mae)]
)
def test_a_missing_peer_is_one_sentence(name, row, results, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPeer, match=re.escape("pip install -e '.[bench]'")):
        peer(name)
    monkeypatch.setitem(command.ROWS, "one", row)
    assert f"{name} cannot be imported" in command.main(["one"]) and not results.exists()


@pytest.mark.parametrize("bad", [["three"], ["--rounds", "0"]])
def test_bad_arguments(bad, results, capsys):
    with pytest.raises(SystemExit):
        command.main(bad)
    assert bad[-1] in capsys.readouterr().err


def test_a_busy_machine_is_told(results, monkeypatch, capsys):
    monkeypatch.setattr(command, "_load", lambda: 3.2)
    command.main(["one", "--rounds", "1"])
    assert "load average is 3.2" in capsys.readouterr().err


def test_the_three_rows_come_first():
    assert list(command.ROWS)[:3] == ["masked_text", "simclr", "mae"]
