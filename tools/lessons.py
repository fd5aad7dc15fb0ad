"""nbdev_test for every notebook, two at a time with one thread each; then the five slowest.

The command's own timing is silent when a notebook fails, and leaves out the folders."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test(path):
    from nbdev.config import get_config
    from nbdev.test import test_nb

    try:
        return path, *test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    except Exception as error:  # a notebook that cannot even be read
        print(f"{path}: {error}", file=sys.stderr)
        return path, False, 0.0


def main(workers=2):
    import notebooks

    os.environ.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        FOUNDATION_SHORT="1",
        FOUNDATION_STATIC="1",
        TQDM_DISABLE="1",
        MPLBACKEND="agg",
    )
    os.chdir(ROOT)
    results = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for path, passed, seconds in pool.map(test, notebooks.lessons()):
            print(
                f"{'passed' if passed else 'FAILED'} {seconds:6.1f} s  {path.relative_to(ROOT)}",
                flush=True,
            )
            results.append((path.relative_to(ROOT).as_posix(), passed, seconds))
    failed = [name for name, passed, _ in results if not passed]
    print(
        "The five slowest: "
        + ", ".join(f"{name} {s:.0f} s" for name, _, s in sorted(results, key=lambda r: -r[2])[:5])
    )
    print(
        f"{len(results) - len(failed)} notebooks passed"
        + (f", {len(failed)} failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed or not results else 0


if __name__ == "__main__":
    # a running notebook takes the name __main__, so the workers need this module's own
    import lessons

    sys.exit(lessons.main())
