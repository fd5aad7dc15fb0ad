"""Random arguments of the kind one could mistake for the right one: a right value or a sentence,
nothing by accident.

FOUNDATION_FAULTS=1 tries 1,000 for each public function instead of a few, and prints what
slipped.
"""

import os
import random
import zlib
from collections import Counter, defaultdict

import pytest

from examples import EXAMPLES, make
from laws import outcome, spoiled

LONG = bool(os.environ.get("FOUNDATION_FAULTS"))
TRIES = int(os.environ.get("FOUNDATION_TRIES", 1000 if LONG else 12))
FOLDERS = sorted({name.split(".")[0] for name in EXAMPLES})


def tries(name):
    rng = random.Random(zlib.crc32(name.encode()) + int(os.environ.get("FOUNDATION_SEED", 0)))
    for _ in range(TRIES):
        function, args, options = make(name)
        args, options, where = spoiled(function, args, options, rng)
        yield where, args, options, outcome(function, args, options, seconds=20)


@pytest.mark.parametrize("folder", FOLDERS)
def test_hostile_arguments_get_a_right_value_or_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, slips = Counter(), defaultdict(list)
    for name in [n for n in EXAMPLES if n.split(".")[0] == folder]:
        for where, args, options, (kind, result) in tries(name):
            counts[kind] += 1
            if kind in ("raw", "hang", "bare"):
                first = where[0] if where else None
                value = (options if isinstance(first, str) else args)[first] if where else None
                slips[kind].append(
                    f"{name}({', '.join(map(str, where))} = {repr(value)[:60]}):"
                    f" {type(result).__name__}: {str(result)[:90]}"
                )
    total = sum(counts.values())
    print(f"\n{folder}: {dict(counts)} of {total}")
    for kind, texts in slips.items():
        print(kind, *texts[: 400 if LONG else 20], sep="\n  ")
    raw = counts["raw"] + counts["hang"]
    assert raw <= 0.01 * total, f"{raw} of {total} calls ended by accident:\n" + "\n".join(
        slips["raw"] + slips["hang"]
    )
