"""The same result from the same weights, then the same work in turns.

A row of the benchmark is a function that builds a `Duel`; `measure` turns it into what
results.json holds.
"""

import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from foundation.training.loop import Objective, train
from foundation.training.parameter_groups import adamw
from foundation.training.speed import throughput

CLOSE = 1e-4  # relative: as near as float32 brings two orders of the same sums


class MissingPeer(ImportError):
    "A library to compare with is not there."


def peer(name: str):
    "The module of a peer, or one sentence."
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeer(
            f"{name} cannot be imported ({error}); pip install -e '.[bench]' brings all peers"
        ) from None


@dataclass(frozen=True)
class Duel:
    "One piece of work, done by us and by others."

    unit: str  # what is counted, e.g. "tokens/s"
    items: int  # of them in one call
    ours: Callable[[], object]  # does the work once
    peers: dict[str, Callable[[], object]]  # name -> the same work
    proof: dict[
        str, tuple[float, float]
    ]  # of equal weights and inputs: name -> what came out of ours and of theirs
    limit: float | None  # what ours over the best peer must reach; None: only reported
    note: str  # what was made equal, and how

    def same_result(self) -> bool:
        "Did equal weights give equal numbers?"
        return all(math.isclose(*pair, rel_tol=CLOSE) for pair in self.proof.values())


def measure(name: str, duel: Duel, rounds: int = 9, warmup: int = 1) -> dict:
    """Time all sides in turns: a row of results.json. The ratio is the median of the rounds,
    `spread` their quartiles."""
    with tqdm(
        total=(rounds + warmup) * (1 + len(duel.peers)), desc=f"{name:18}", leave=False
    ) as bar:
        ways = {side: _ticking(way, bar) for side, way in {"ours": duel.ours, **duel.peers}.items()}
        timing = throughput(ways, duel.items, rounds, warmup)
    rates = {side: round(timing.rate(side), 1) for side in ways}
    ours, best = rates.pop("ours"), max(duel.peers, key=timing.rate)
    ratios = [1 / slower for slower in timing.ratios(best)]  # timed as best over ours
    low, ratio, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return dict(
        name=name,
        unit=duel.unit,
        ours=ours,
        peers=rates,
        ratio=round(ratio, 3),
        same_result=duel.same_result(),
        limit=duel.limit,
        spread=[round(low, 3), round(high, 3)],
        rounds=rounds,
        proof=duel.proof,
        note=duel.note,
    )


def _ticking(way, bar):
    "The same call, which moves the bar on"

    def call():
        way()
        bar.update()

    return call


# What rows are made of ----------------------------------------------------------------------------


def carry(
    ours: nn.Module,
    theirs: nn.Module,
    names: dict[str, str],  # our name of a weight -> theirs; others stay as they are
) -> None:
    """Copy our weights into their model. Where theirs has a row more in front, for a class token,
    that row stays."""
    source, target = ours.state_dict(), theirs.state_dict()
    for mine, other in names.items():
        value, place = source[mine], target[other]
        (place[0, 1:] if place.numel() > value.numel() else place.view_as(value)).copy_(value)


def outcome(loss: Tensor, weight: Tensor) -> tuple[float, float]:
    "The loss, and the length of its gradient at a first weight, in which all layers have a part."
    return loss.item(), torch.autograd.grad(loss, weight)[0].norm().item()


def paired(
    ours: tuple[float, float], theirs: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    "Two outcomes as the proof of a duel."
    return dict(zip(("loss", "gradient"), zip(ours, theirs)))


def our_steps(
    model: nn.Module, batches: Iterable, objective: Objective, precision: str
) -> Iterator:
    "The course's loop: a training step for each `next`."
    return train(model, batches, objective, adamw(model, 1e-3), steps=10**9, precision=precision)


def plain_steps(
    model: nn.Module, batches: Iterable, loss_of: Callable, precision: str
) -> Iterator[Tensor]:
    """The loop that a user of the peer would write, with the same fused AdamW: a training step for
    each `next`."""
    opt = adamw(model, 1e-3)
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, batch)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        yield loss.detach()


def several(steps: Iterator, count: int = 1) -> Callable[[], list]:
    "A call that takes the next few steps."
    return lambda: [next(steps) for _ in range(count)]
