"""What `bench/gpu.py` measures: a part is a function of the place and of the results so far, which
gives its rows and a note."""

import ast
import json
import re
import subprocess
import sys
import time
from functools import partial
from itertools import islice, repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.layers.attention import Attention, KeyValueCache, padding_mask

from bench.gpu_clock import ROOT, Operations, Place, checkpointed, rate, share, spread, turns, waits
from bench.gpu_steps import TASKS, counted_flops, find_batch, our_steps, started

HALF = torch.bfloat16
SHEET = {  # of NVIDIA's data sheets: dense bf16 with sums in float32, TFLOP/s
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "B200": 2250,
}


def sheet_peak(card: str) -> float | None:
    return next((peak for name, peak in SHEET.items() if name in card), None)


def measured_peak(results: dict) -> float | None:
    "The fastest bf16 product of the part `matmul`."
    rows = results["parts"]["matmul"]["rows"]
    return max((row["tflops"] or 0 for row in rows if row["kind"] == "bf16"), default=None)


def gpu_matmul(place: Place, results: dict):
    "Square products in four kinds of numbers."
    kinds = dict(bf16=HALF, fp16=torch.float16, tf32=torch.float32, fp32=torch.float32)
    rows = []
    for n in place.pick((1024, 2048, 4096, 8192, 16384), (64, 128)):
        for kind, dtype in kinds.items():
            if kind == "fp32" and n > 8192:
                continue  # a second each
            a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            found = spread(turns(place, {kind: partial(torch.matmul, a, b)}, 4)[kind])
            tflops = rate(2 * n**3 / 1e12, found["median_ms"])
            rows.append(dict(kind=kind, n=n, tflops=tflops, **found))
    torch.set_float32_matmul_precision("highest")
    return rows, "2 n³ FLOPs; random numbers: zeros would run faster, being cooler"


def gpu_bandwidth(place: Place, results: dict):
    "How fast memory is copied and read."
    count = place.pick(2**28, 2**16)  # 1 GiB of float32
    x, y = torch.randn(count, device=place.device), torch.empty(count, device=place.device)
    ways = {"copy": (partial(y.copy_, x), 2), "read": (x.sum, 1)}
    rows = []
    for name, (way, times) in ways.items():
        found = spread(turns(place, {name: way})[name])
        gb = rate(times * x.nbytes / 1e9, found["median_ms"])
        rows.append(dict(what=name, gb_per_second=gb, mb=x.nbytes / 1e6, **found))
    return rows, "a copy reads and writes: it counts twice"


def gpu_attention(place: Place, results: dict):
    "Which kernel our attention reaches in bf16, how fast, and how far it is from float32 by hand."
    b, n, d, heads = place.pick((16, 1024, 768, 12), (2, 16, 32, 2))
    layer = Attention(d, heads).to(place.device)
    x = torch.randn(b, n, d, device=place.device)
    owner = torch.arange(n, device=place.device) // (n // 4)
    cases = {
        "all see all": {},
        "causal": dict(causal=True),
        "padding": dict(mask=padding_mask(torch.full((b,), n - 5), n).to(place.device)),
        "documents": dict(mask=(owner[:, None] == owner).expand(b, 1, n, n)),
        "causal and padding": dict(
            mask=padding_mask(torch.full((b,), n - 5), n).to(place.device), causal=True
        ),
    }
    rows = []
    for name, how in cases.items():
        with torch.no_grad():
            q, k, v = layer.project(x)
            right = layer.out((layer.weights(x, **how) @ v).transpose(1, 2).flatten(2))
            with place.autocast(), Operations() as seen:
                miss = (layer(x, **how) - right).norm() / right.norm()

        def step(how=how):
            with place.autocast():
                layer(x, **how).float().mean().backward()

        found = spread(turns(place, {name: step}, 4)[name])
        kernel = dict(case=name, kernel=seen.attention(), error=miss.item())
        rows.append(kernel | dict(tokens=b * n, **found))
    with torch.no_grad(), place.autocast(), Operations() as seen:
        cache = KeyValueCache()
        layer(x, causal=True, cache=cache)
        seen.names.clear()
        layer(x[:, :1], causal=True, cache=cache)
    one = dict(case="one token, with a cache", kernel=seen.attention(), error=None, tokens=b)
    nothing = dict(median_ms=None, low_ms=None, high_ms=None, calls=0)
    return [*rows, one | nothing], "projections, there and back; kernel: PyTorch's operation"


def gpu_train(name: str, place: Place, results: dict):
    "One of the four training steps: ours, compiled, a plain loop, and the peer's."
    task = TASKS[name](place)
    b = find_batch(place, task)
    law = task.flops(2), counted_flops(task, 2)
    b, ways, said = started(place, task, b)
    card, rows = (results["machine"] or {}).get("card", ""), []
    for way, seconds in turns(place, ways, *place.pick((5, 5), (2, 2))).items():
        found = spread(seconds)
        own = way.startswith("our")
        tflops = rate(task.flops(b) / 1e12, found["median_ms"]) if own else None
        rows.append(
            dict(
                model=task.name,
                way=way,
                batch=b,
                unit=f"{task.unit}/s",
                per_second=rate(b * task.items, found["median_ms"]),
                tflops=tflops,
                of_measured_peak=share(tflops, measured_peak(results)),
                of_sheet=share(tflops, sheet_peak(card)),
                **found,
            )
        )
    flops = f"FLOPs of two examples: {law[0]:.6g} by formula, {law[1]:.6g} counted"
    return rows, f"{flops}; {said}"


def gpu_augment(place: Place, results: dict):
    "Pictures augmented on the device, each with its own numbers, beside torchvision's transforms."
    from foundation.data.augment import Augment

    shapes = place.pick({(1, 28): 4096, (3, 224): 256}, {(1, 28): 8, (3, 32): 4})
    rows, note = (
        [],
        "crop, mirror, light; torchvision draws once for a batch, or picture by picture",
    )
    for (c, side), b in shapes.items():
        images = torch.randint(256, (b, c, side, side), dtype=torch.uint8, device=place.device)
        ways = {"ours": partial(Augment(mean=0.3, std=0.35), images)}
        try:
            v2 = _their_transform(c, side)
        except ImportError:
            note += "; torchvision is not installed"
        else:
            ways["torchvision v2, one draw for the batch"] = partial(v2, images)
            few = images[: place.pick(64, 4)]
            ways["torchvision v2, each picture"] = lambda v2=v2, few=few: [*map(v2, few)]
        for way, seconds in turns(place, ways, *place.pick((4, 5), (2, 1))).items():
            found, count = spread(seconds), len(few) if way.endswith("each picture") else b
            per_second = rate(count, found["median_ms"])
            rows.append(dict(way=way, shape=[c, side, side], per_second=per_second, **found))
    return rows, note


def _their_transform(channels, side):
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(side, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), antialias=False)
    light = v2.ColorJitter(brightness=0.4, contrast=0.4)
    floats = v2.ToDtype(torch.float32, scale=True)
    grey = v2.Normalize([0.3] * channels, [0.35] * channels)
    return v2.Compose([floats, crop, v2.RandomHorizontalFlip(), light, grey])


def gpu_waits(place: Place, results: dict):
    "How often the host waits for the device in a step; between looks at the loss it should be 0."
    from foundation.data.augment import Augment

    rows, steps = [], 5
    for make in TASKS.values():
        task = make(place)
        if place.cuda:
            run = our_steps(task, task.model, repeat(task.batch(4)))
            next(run)
            with waits(place) as found:
                for _ in islice(run, steps):
                    pass
        else:  # without the loop, which looks at each loss there
            batch = task.batch(2)
            with waits(place) as found:
                for _ in range(steps):
                    task.objective(task.model, batch)[0].backward()
        per_step = sum(found.values()) / steps
        rows.append(dict(step=task.name, waits_per_step=per_step, where=dict(found)))
    images = torch.zeros(8, 3, 28, 28, dtype=torch.uint8, device=place.device)
    colors = dict(hue=0.1, saturation=0.4, gray=0.2, blur=0.5, mean=(0.5,) * 3, std=(0.3,) * 3)
    for name, augment in {"augmentation": Augment(), "in color": Augment(**colors)}.items():
        augment(images)
        with waits(place) as found:
            for _ in range(steps):
                augment(images)
        per_step = sum(found.values()) / steps
        rows.append(dict(step=name, waits_per_step=per_step, where=dict(found)))
    how = "as PyTorch tells" if place.cuda else "reads of values on a CPU, of scalars too"
    return rows, f"{how}; the loop's own look at the loss, every 50 steps, is not among them"


def gpu_products(place: Place, results: dict):
    "2:4 sparsity, int8 and fp8 against a linear layer in bf16: time, and error on random numbers."
    rows = []
    for n, d in place.pick(((4096, 4096), (8192, 4096), (8192, 8192)), ((32, 64),)):
        x, w = (torch.randn(rows_, d, device=place.device, dtype=HALF) for rows_ in (n, d))
        exact, ways = x.float() @ w.float().T, {}
        for kind, make in PRODUCTS.items():
            try:
                way = make(place, x, w)
                result = way()
            except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
                rows.append(_product(kind, n, d, str(error).partition("\n")[0][:120]))
                continue
            miss = (result.float() - exact).norm() / exact.norm()
            ways[kind] = way, None if kind == "int8 product" else miss.item()
        seconds = turns(place, {kind: way for kind, (way, _) in ways.items()}, 4)
        base = spread(seconds["bf16"])["median_ms"]
        for kind, (_, miss) in ways.items():
            found = spread(seconds[kind])
            row = _product(kind, n, d, "") | found
            rows.append(row | dict(speedup=share(base, found["median_ms"]), error=miss))
    return rows, (
        "(n, d) · (d, d); 'product' alone, or with what a layer has to do to its inputs, compiled; "
        "the error of 2:4 is that of half the weights of a random matrix, the worst case"
    )


def _product(kind, n, d, why):
    nothing = dict(median_ms=None, low_ms=None, high_ms=None, calls=0, speedup=None, error=None)
    return dict(kind=kind, n=n, d=d, why_not=why) | nothing


def _two_four(place, x, w):
    largest = w.abs().view(-1, 4).topk(2).indices
    half = torch.zeros_like(w).view(-1, 4).scatter(1, largest, w.view(-1, 4).gather(1, largest))
    if not place.cuda:
        raise RuntimeError("needs a GPU of compute capability 8.0 or more")
    return partial(F.linear, x, torch.sparse.to_sparse_semi_structured(half.view_as(w)))


def _rows8(x: Tensor, dtype, most: float) -> tuple[Tensor, Tensor]:
    "Each row in 8 bits, and its scale"
    scale = x.float().abs().amax(1, keepdim=True) / most
    x = x.float() / scale
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def _int8(place, x, w, whole):
    weight, scale = _rows8(w, torch.int8, 127)
    weight = weight.T
    if not whole:
        return partial(torch._int_mm, _rows8(x, torch.int8, 127)[0], weight)

    def layer(x):
        inputs, own = _rows8(x, torch.int8, 127)
        return (torch._int_mm(inputs, weight) * own * scale.T).to(HALF)

    return partial(torch.compile(layer, backend=place.pick("inductor", "eager")), x)


def _fp8(place, x, w, whole):
    kind = torch.float8_e4m3fn
    weight, scale = _rows8(w, kind, 448)
    weight, scale = weight.T, scale.T.contiguous()

    def product(inputs, own):
        return torch._scaled_mm(inputs, weight, own, scale, out_dtype=HALF)

    if not whole:
        return partial(product, *_rows8(x, kind, 448))
    fast = torch.compile(
        lambda x: product(*_rows8(x, kind, 448)), backend=place.pick("inductor", "eager")
    )
    return partial(fast, x)


PRODUCTS = {
    "bf16": lambda place, x, w: partial(F.linear, x, w),
    "2:4": _two_four,
    "int8 product": partial(_int8, whole=False),
    "int8 layer": partial(_int8, whole=True),
    "fp8 product": partial(_fp8, whole=False),
    "fp8 layer": partial(_fp8, whole=True),
}


def gpu_tests(place: Place, results: dict):
    "The tests that run on a GPU only."
    found = cuda_tests()
    row = dict(tests=len(found), passed=0, failed=0, skipped=len(found))
    if not place.cuda:
        return [row], "no GPU: all of them are skipped"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *found]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "No module named pytest" in done.stderr:
        return [row], "pytest is not installed"
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    for kind in ("passed", "failed", "skipped"):
        count = re.search(rf"(\d+) {kind}", last)
        row[kind] = int(count[1]) if count else 0
    return [row], last


def cuda_tests() -> list[str]:
    "Tests that are left out without a GPU, as pytest names them."
    asks, found = re.compile(r"if not \(?torch\.cuda\.is_avail|skipif\(not torch\.cuda"), []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if asks.search(text) else ():
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if asks.search("\n".join(text.splitlines()[first - 1 : node.end_lineno])):
                    found.append(f"tests/{path.name}::{node.name}")
    return found


def gpu_memory(place: Place, results: dict):
    "Peak memory of a training step, with and without activation checkpointing."
    from foundation.training.speed import peak_memory

    rows = []
    for make in TASKS.values():
        for again in (False, True):
            task = make(place)
            if again:
                checkpointed(task.parts)
            b = place.pick(32, 2)
            run = our_steps(task, task.model, repeat(task.batch(b)))
            next(run)  # the optimizer's moments come in it
            with peak_memory(place.device.type) as peak:
                next(run)
            held = torch.cuda.memory_allocated() / 1e6 if place.cuda else None
            row = dict(model=task.name, batch=b, checkpointing=again, peak_mb=round(peak.mb, 1))
            rows.append(row | dict(held_mb=held))
            del run, task
    return rows, "peak: beyond what weights, moments and batch hold; on a CPU it is not exact"


def gpu_simclr_run(place: Place, results: dict):
    "SimCLR on Fashion-MNIST, as the recipe of `resnet_simclr` trains it."
    from foundation.data.augment import Augment
    from foundation.models.convnets import ResNet
    from foundation.pretraining.contrastive import ContrastiveModel, pretrain
    from foundation.recipes.resnet_simclr import STAGES

    data = _data(place)
    torch.manual_seed(0)
    model = ContrastiveModel(ResNet().to(place.device))
    augment, began, steps = Augment(mean=data.mean, std=data.std), time.perf_counter(), 0
    for i, stage in enumerate(STAGES):
        plan = {name: value for name, value in stage.items() if name != "epochs"}
        plan |= _plan(place, data, stage["epochs"]) | dict(seed=i)
        run = pretrain(model, data.train_images, augment, title="", **plan)
        steps += len(run.losses)
    return _judged(place, model.encoder, data, began, steps, "resnet_simclr")


def gpu_mae_run(place: Place, results: dict):
    "A masked autoencoder on Fashion-MNIST, as the recipe of `vit_mae` trains it."
    from foundation.models.vit import ViT
    from foundation.pretraining.masked_image import MaskedAutoencoder, pretrain
    from foundation.recipes.vit_mae import crops

    data, began = _data(place), time.perf_counter()
    torch.manual_seed(0)
    model = MaskedAutoencoder(ViT(dim=128, depth=6)).to(place.device)
    run = pretrain(model, data.train_images, crops(data), title="", **_plan(place, data, 60))
    return _judged(place, model.encoder, data, began, len(run.losses), "vit_mae")


def _data(place):
    "Fashion-MNIST; at toy size noise of its shape"
    from foundation.data.images import ImageSet, load_images

    if not place.toy:
        return load_images()
    x, y = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8), torch.arange(64) % 10
    return ImageSet(x, y, x, y, tuple("abcdefghij"), "noise", "made up", 0.5, 0.3)


def _plan(place, data, epochs):
    batch = place.pick(256, 16)
    return dict(batch_size=batch, steps=place.pick(epochs * (len(data.train_images) // batch), 2))


def _judged(place, encoder, data, began, steps, name):
    "The row of a full run: minutes, and its score beside that of the shipped weights"
    from foundation.recipes.few_labels import probe_features

    place.wait()
    seconds = time.perf_counter() - began
    labels = place.pick(100, 20)
    score = probe_features(encoder, data, labels, seeds=1, bank=place.pick(10_000, 64))["knn"]
    card = json.loads((ROOT / f"foundation/weights/{name}.json").read_text(encoding="utf-8"))
    row = dict(run=name, steps=steps, minutes=round(seconds / 60, 3), ms_per_step=seconds / steps)
    row["ms_per_step"] *= 1e3
    shipped = dict(knn_shipped=card["metrics"]["knn"], minutes_shipped=card["seconds"] / 60)
    return [row | dict(knn=score) | shipped], f"shipped: {card['hardware']}"


PARTS = {
    "matmul": gpu_matmul,
    "bandwidth": gpu_bandwidth,
    "attention": gpu_attention,
    **{f"train_{name}": partial(gpu_train, name) for name in TASKS},
    "augment": gpu_augment,
    "waits": gpu_waits,
    "products": gpu_products,
    "memory": gpu_memory,
    "tests": gpu_tests,
    "simclr_run": gpu_simclr_run,
    "mae_run": gpu_mae_run,
}
