"""The benchmark for a GPU, at toy size on a CPU: every part runs, the work of a step is counted
rightly, and a run that was stopped goes on"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is not part of the package

from bench import gpu, gpu_steps  # noqa: E402
from bench.gpu_clock import Place, rate, share, spread, turns, waits  # noqa: E402
from bench.gpu_parts import cuda_tests, measured_peak, sheet_peak  # noqa: E402
from bench.gpu_steps import TASKS, block_flops, counted_flops, equal, fitting, same  # noqa: E402

TOY = Place(torch.device("cpu"), True)


def forbidden(*args, **options):
    raise AssertionError("a CPU machine was asked for CUDA")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "All parts once, without the peers, and with CUDA out of reach"
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformers", "lightly.loss"):
            patch.setitem(sys.modules, name, None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "_lazy_init", forbidden)
        assert gpu.main(["--toy", "--out", str(path)]) == 0
    return path


# What is measured ---------------------------------------------------------------------------------


def test_every_part_runs_at_toy_size(ran):
    results = json.loads(ran.read_text())
    assert gpu._sound(results) and results["machine"]["toy"] is True
    for name, part in results["parts"].items():
        assert part["status"] == "measured" and part["date"] and part["seconds"] >= 0, name
        assert part["rows"] and len({tuple(row) for row in part["rows"]}) == 1, name
    assert measured_peak(results) > 0
    text = ran.with_suffix(".md").read_text()
    assert "these numbers mean nothing" in text and "transformers is not installed" in text
    assert "toy sizes: no measurement" in ran.with_suffix(".svg").read_text()


def test_the_host_does_not_wait_in_a_step(ran):
    rows = json.loads(ran.read_text())["parts"]["waits"]["rows"]
    found = {row["step"]: row["waits_per_step"] for row in rows}
    assert found["ViT-B/16 MAE"] == found["ResNet-50 SimCLR"] == found["GPT-2 small"] == 0


def test_a_wait_is_found_with_its_line():
    x = torch.arange(4.0)
    with waits(TOY) as found:
        x.sum().item()
        x[x > 1]
        x[torch.tensor([1, 2])]  # numbers of rows: their count is known
    assert sum(found.values()) == 2 and all("test_bench_gpu.py" in place for place in found)


def test_steps_of_a_way_stand_in_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = turns(TOY, ways, rounds=2, each=2, warmup=1)
    assert "".join(calls) == "ab" + "aabb" * 2 and {*map(len, seconds.values())} == {4}
    assert spread([3.0, 1.0, 2.0])["median_ms"] == 2000 and spread([1.0])["calls"] == 1


def test_nothing_is_divided_by_zero():
    assert rate(1, 0) is None and share(1, 0) is None and share(None, 1) is None
    assert fitting(1e9, 0, 0, 64) == 64 and fitting(1e9, 1e9, 1e6, 64) == 1
    assert measured_peak(gpu.fresh()) is None and sheet_peak("a card of tomorrow") is None
    assert sheet_peak("NVIDIA H100 80GB HBM3") == 989 and sheet_peak("NVIDIA H100 PCIe") == 756
    assert sheet_peak("NVIDIA L40") == 181


def test_the_batch_fits_the_memory():
    for total, base, each in ((80e9, 2e9, 3e8), (8e9, 1e8, 5e7)):
        b = fitting(total, base, each, 1024)
        assert 5 * base + b * each <= 0.85 * total < 5 * base + 2 * b * each
        assert b == 2 ** int(math.log2(b)) and fitting(total, base, each, 8) == 8


def test_who_is_out_of_memory_halves_the_batch_of_all(monkeypatch):
    def ways_of(place, task, b):
        def way():
            if b > 2:
                raise torch.OutOfMemoryError

        return {"ours": way}, ""

    monkeypatch.setattr(gpu_steps, "ways_of", ways_of)
    assert gpu_steps.started(TOY, None, 16)[0] == 2


def test_a_way_that_fails_is_left_out_and_said(monkeypatch):
    def fail():
        raise RuntimeError("no compiler\nat all")

    ways = {"ours": lambda: None, "ours, compiled": fail}
    monkeypatch.setattr(gpu_steps, "ways_of", lambda *args: (dict(ways), "peer"))
    b, left, said = gpu_steps.started(TOY, None, 4)
    assert (b, [*left], said) == (4, ["ours"], "peer; ours, compiled failed: no compiler")
    ways["ours"] = fail
    with pytest.raises(RuntimeError, match="no compiler"):
        gpu_steps.started(TOY, None, 4)


# The work of a step -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_formula_gives_what_pytorch_counts(name):
    task = TASKS[name](TOY)
    for b in (2, 3):
        assert task.flops(b) == counted_flops(task, b)
    if hasattr(task.model, "blocks"):
        del task.model.blocks[0]
        assert counted_flops(task, 3) < task.flops(3)


def test_the_formulas_give_the_numbers_of_the_papers():
    d, depth, n, v = 768, 12, 1024, 50_304
    weights = depth * 12 * d * d + v * d
    palm = n * (6 * weights + 12 * depth * d * n)  # Chowdhery et al. 2022, appendix B
    assert gpu_steps.gpt_flops(1, n, v, d, depth) == palm
    assert 12 * block_flops(197, 768) == pytest.approx(2 * 17.5e9, rel=0.01)  # ViT-B/16 at 224
    conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)  # the first of ResNet-50: 118 million products
    step = gpu_steps.net_flops(nn.Sequential(conv), torch.zeros(2, 3, 224, 224))
    assert step == 2 * 2 * 118_013_952


@pytest.mark.parametrize("name, library", [("mae", "transformers"), ("gpt", "transformers")])
def test_peers_with_our_weights_give_our_loss(name, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    task = TASKS[name](TOY)
    theirs, their_loss = task.peer(task.model)
    assert same(proof := equal(task, theirs, their_loss)), proof
    with torch.no_grad():
        [*theirs.named_parameters()][-1][1].add_(0.1)  # a bias
    assert not same(equal(task, theirs, their_loss))


def test_tests_for_a_gpu_are_found():
    found = cuda_tests()
    assert "tests/test_training.py::test_on_a_gpu" in found and len(found) == len({*found}) >= 7
    assert not any("test_bench_gpu" in name for name in found)


# Stopped, damaged, of another card ----------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    "Three parts that do nothing, and the names of those that ran"
    names, log = ("matmul", "bandwidth", "tests"), []

    def part(name):
        def work(place, results):
            "A part."
            log.append(name)
            return [dict(kind="bf16", tflops=1.0)], ""

        return work

    monkeypatch.setattr(gpu, "PARTS", {name: part(name) for name in names})
    return log


def toy(path, *more):
    return gpu.main(["--toy", "--out", str(path), *more])


def test_a_run_that_was_stopped_goes_on(tmp_path, parts, monkeypatch):
    def stop(place, results):
        raise KeyboardInterrupt

    path = tmp_path / "gpu.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(gpu.PARTS, "bandwidth", stop)
        toy(path)
    states = {k: p["status"] for k, p in json.loads(path.read_text())["parts"].items()}
    assert [*states.values()] == ["measured", "not yet measured", "not yet measured"]
    assert toy(path) == 0 and parts == ["matmul", "bandwidth", "tests"]
    assert toy(path) == 0 and len(parts) == 3
    assert toy(path, "--part", "tests", "--again") == 0 and parts[3:] == ["tests"]


def test_a_part_that_fails_is_a_sentence_and_is_tried_again(tmp_path, parts, monkeypatch):
    def fail(place, results):
        raise RuntimeError("no kernel\nfor this")

    def lack(place, results):
        raise ModuleNotFoundError("No module named 'x'", name="x")

    path = tmp_path / "gpu.json"
    with monkeypatch.context() as patch:
        patch.setitem(gpu.PARTS, "matmul", fail)
        patch.setitem(gpu.PARTS, "tests", lack)
        assert toy(path).startswith("failed: matmul;")
    found = json.loads(path.read_text())["parts"]
    assert found["matmul"]["note"] == "RuntimeError: no kernel"
    assert found["tests"]["note"] == "x is not installed"
    assert toy(path) == 0 and parts == ["bandwidth", "matmul", "tests"]


def shapes(path):
    "Files that are not what the program wrote"
    sound = path.read_text()
    yield sound[:40]
    yield "[" * 10**5
    for key, value in (("parts", {}), ("machine", 3), ("parts", dict(matmul=1))):
        yield json.dumps(json.loads(sound) | {key: value})
    other = json.loads(sound)
    other["machine"]["card"] = "another"
    yield json.dumps(other)


def test_a_damaged_file_or_one_of_another_card_is_set_aside(tmp_path, parts, capsys):
    path = tmp_path / "gpu.json"
    toy(path)
    for i, text in enumerate(shapes(path), 1):
        path.write_text(text)
        parts.clear()
        assert toy(path) == 0 and len(parts) == 3
        assert f"it is kept as gpu.old{i}.json" in capsys.readouterr().out
        assert (tmp_path / f"gpu.old{i}.json").read_text() == text


def test_without_a_gpu_nothing_is_said_to_be_measured(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert "sees no GPU" in gpu.main(["--out", str(path)]) and not parts
    assert path.with_suffix(".md").read_text().count("not yet measured") == 4
    path.write_text("kept")
    gpu.main(["--out", str(path)])
    assert path.read_text() == "kept"


def test_what_is_shipped_is_whole():
    found = json.loads((ROOT / "bench/gpu.json").read_text())
    assert gpu._sound(found) and (ROOT / "bench/gpu.md").read_text() == gpu.page(found)


def test_no_figure_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not gpu.draw(gpu.fresh(), tmp_path / "x.svg") and not any(tmp_path.iterdir())
