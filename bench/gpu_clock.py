"Where the parts of `bench/gpu.py` run, how they are timed, and how waits of the host are found."

import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    "A device, and whether the parts run at toy size there."

    device: torch.device
    toy: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, real, toy):
        "The size for this place."
        return toy if self.toy else real

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def stamp(self):
        "A point in the device's own time, without waiting for it."
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a, b) -> float:
        "Seconds from one stamp to the next, after `wait`."
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)


def turns(
    place: Place,
    ways: dict[str, Callable],  # name -> one call
    rounds: int = 5,
    each: int = 5,  # calls of a way in its turn
    warmup: int = 3,
) -> dict[str, list[float]]:  # name -> seconds of each call, rounds · each of them
    "Time several ways in turns, so that heat and clocks meet all of them alike."
    for way in ways.values():
        for _ in range(warmup):
            way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            place.wait()
            stamps = [place.stamp()]
            for _ in range(each):
                way()
                stamps.append(place.stamp())
            place.wait()
            seconds[name] += [place.between(a, b) for a, b in zip(stamps, stamps[1:])]
    return seconds


def spread(seconds: list[float]) -> dict:
    "Median and quartiles in milliseconds, and of how many calls."
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    ms = dict(median_ms=middle, low_ms=low, high_ms=high)
    return {name: round(1e3 * value, 4) for name, value in ms.items()} | dict(calls=len(seconds))


def rate(work: float, ms: float) -> float | None:
    "Work a second; None where the clock saw nothing."
    return work / ms * 1e3 if ms > 0 else None


def share(part: float | None, whole: float | None) -> float | None:
    "A quotient of three digits; None where one of the two is not known, or is 0."
    return round(part / whole, 3) if part and whole else None


class Operations(TorchDispatchMode):
    "Notes each operation that reaches the device, and which line of the course asked for it."

    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}

    def __init__(self):
        super().__init__()
        self.names, self.reads = [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.names.append(name)
        if name in self.READS or name == "aten::index" and _by_mask(args[1]):
            self.reads[_asked_by(traceback.extract_stack())] += 1
        return function(*args, **(kwargs or {}))

    def attention(self) -> str:
        "The kernel of attention's way forward."
        found = [name for name in self.names if "scaled_dot_product" in name]
        return found[0].removeprefix("aten::_scaled_dot_product_") if found else "math"


def _by_mask(indices) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _asked_by(stack) -> str:
    "File and line of the last frame that is the course's, else of the last that is not PyTorch's"
    stack = [f for f in stack if f.filename != __file__ and "/torch/" not in f.filename]
    ours = [frame for frame in stack if str(ROOT / "foundation") in frame.filename]
    return _place((ours or stack)[-1].filename, (ours or stack)[-1].lineno)


def _place(filename, line) -> str:
    path = Path(filename)
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{line}"


@contextmanager
def waits(place: Place) -> Iterator[Counter]:
    """Count where the host waits for the device, by file and line.

    On a GPU PyTorch tells. On a CPU reads of values are counted, while the course's checks believe
    that a look is not free, as on a GPU."""
    found = Counter()
    if place.cuda:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for w in told:
            if "called a synchronizing" in str(w.message):
                found[_place(w.filename, w.lineno)] += 1
    else:
        with mock.patch("torch.compiler.is_compiling", return_value=True), Operations() as seen:
            yield found
        found.update(seen.reads)


def checkpointed(parts) -> None:
    "The parts of a model keep their inputs only, and are computed again on the way back."
    from torch.utils.checkpoint import checkpoint

    for part in parts:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def plain_attention(on: bool = True):
    "Attention by separate products, which PyTorch's counter of FLOPs sees."
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if on else nullcontext()
