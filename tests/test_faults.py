"""Bad luck by the dozen: processes killed at random moments, files damaged at random places,
modules broken on purpose.

A few of each in `make test`; `make test-faults` (FOUNDATION_FAULTS=1) kills 20 times in each
kind of run, damages each kind of file 100 times, and breaks the package in all the ways that
`tests/breaks.json` lists."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foundation.compression.storage import load_model, save_model
from foundation.data.batches import mapped, open_documents, store, store_documents
from foundation.data.images import read_idx
from foundation.data.tokenizer import Tokenizer
from foundation.models.convnets import ConvNet
from foundation.models.pretrained import load_weights, save_weights
from foundation.training.checkpoint import load_checkpoint, save_checkpoint
from foundation.training.track import Log, read_log
from laws import is_sentence, same

ROOT = Path(__file__).resolve().parents[1]
LONG = bool(os.environ.get("FOUNDATION_FAULTS"))
KILLS, DAMAGES = (20, 100) if LONG else (1, 5)


# Killed at any moment ----------------------------------------------------------------------------

# The parent imports everything and forks for each try; an alarm without a handler ends the child
# at a random microsecond, as SIGKILL would: nothing is caught, nothing is cleaned up
KILLED = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
import torch, torch._dynamo
torch.set_num_threads(1)
from torch import nn
from foundation.recipes.vgg_pruned import recover
from foundation.core.basics import seed_everything
from foundation.data.augment import Augment
from foundation.data.batches import join
from foundation.data.images import ImageSet
from foundation.data.tokenizer import Tokenizer
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.vit import ViT
from foundation.pretraining import contrastive, masked_image, masked_text

kind, kills, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
dice = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (48, 1, 16, 16), generator=dice, dtype=torch.uint8)
labels = torch.arange(48) % 3
keep = dict(steps=12, save_every=3, title="")

def pairs(path):
    net = ConvNet(classes=3, widths=(8, 8))
    contrastive.pretrain(net, images, Augment(), batch_size=8, checkpoint=path, **keep)
    return net

def masks(path):
    vit = ViT(image_size=16, patch_size=4, channels=1, classes=3, dim=16, depth=1, heads=2)
    net = masked_image.MaskedAutoencoder(vit)
    masked_image.pretrain(net, images, Augment(), batch_size=8, checkpoint=path, **keep)
    return net

def words(path):
    tokenizer = Tokenizer([])
    texts = ["a small cat sat", "the old dog ran", "one owl"] * 8
    rows = [tokenizer.encode(text) for text in texts]
    net = BERT(tokenizer.vocab_size, 16, 24, 1, 2, segments=0)
    masked_text.pretrain(net, join(rows), tokenizer, batch_size=4, checkpoint=path, **keep)
    return net

def recovered(path):
    net = ConvNet(classes=3, widths=(8, 8))
    held_out = images[:9], labels[:9]
    data = ImageSet(images, labels, *held_out, ("a", "b", "c"), "toy", "here", 0.5, 0.3)
    recover(net, data, torch.nn.functional.one_hot(labels, 3).float(), 12, checkpoint=path)
    return net

def work(place):
    seed_everything(0)
    net = dict(pairs=pairs, masks=masks, words=words, recovered=recovered)[kind](place / "run")
    digest = hashlib.sha256()
    for name, x in net.state_dict().items():
        digest.update(name.encode() + x.detach().contiguous().numpy().tobytes())
    (place / "digest").write_text(digest.hexdigest())

def child(place, seconds=None):
    place.mkdir(exist_ok=True)
    if (pid := os.fork()) == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if seconds:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            work(place)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

began = time.perf_counter()
assert child(folder / "straight") == 0, "the run itself fails"
whole = time.perf_counter() - began
want = (folder / "straight/digest").read_text()
rng, done, tries = random.Random(kind), 0, 0
while done < kills:
    place, tries = folder / f"run{tries}", tries + 1
    while True:
        status = child(place, rng.uniform(0.02, whole))
        if status == 0:
            break
        alarmed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        assert alarmed, f"a resumed run failed: {status}"
        done += 1
        if done % 7 == 0:
            assert child(place) == 0, "a resumed run failed"
            break
    assert (place / "digest").read_text() == want, f"try {tries}: other weights after {done} kills"
    names = {p.name for p in place.iterdir() if p.suffix != ".lock"}
    litter = sorted(names - {"run", "run.old", "digest"})
    assert not litter or kind == "x", f"left behind: {litter}"
print("killed", done)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
@pytest.mark.parametrize("kind", ["pairs", "masks", "words", "recovered"])
def test_killed_at_random_moments_it_ends_in_the_same_weights(kind, tmp_path):
    env = dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    job = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(KILLS), str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
        cwd=ROOT,
    )
    assert job.returncode == 0, job.stderr[-3000:]
    assert job.stdout.startswith("killed")


# Damaged files -----------------------------------------------------------------------------------


def damage(path, rng):
    "Flip a bit, cut, blank out, append, or empty; what was done"
    raw = bytearray(path.read_bytes())
    way = rng.choice(["flip", "flip", "flip", "cut", "zeros", "extra", "byte"])
    at = rng.randrange(len(raw))
    if way == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del raw[at:]
    elif way == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif way == "extra":
        raw += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    else:
        raw[at] = rng.randrange(256)
    path.write_bytes(raw)
    return f"{way} at {at} of {path.name}"


def net():
    torch.manual_seed(0)
    return ConvNet(classes=3, widths=(4,))


def a_checkpoint(folder):
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    save_checkpoint(folder / "run", model, opt, 3, dict(a=1))

    def read():
        other = net()
        return load_checkpoint(folder / "run", other, torch.optim.AdamW(other.parameters())), other

    return [folder / "run"], read


def weights(folder):
    save_weights(net(), "mine", dict(score=0.5, data="toy"), folder=folder)
    return sorted(p for p in folder.iterdir() if p.is_file()), lambda: load_weights(
        "mine", folder=folder
    )


def a_small_model(folder):
    save_model(net(), folder / "m", "sparse", values="code4", compress="huffman")
    return [folder / "m"], lambda: load_model(folder / "m")


def a_tokenizer(folder):
    Tokenizer([(b"a", b"b")]).save(folder / "t.json")
    return [folder / "t.json"], lambda: Tokenizer.load(folder / "t.json").encode("ab ba cab")


def an_array(folder):
    store(folder / "a.npy", [torch.arange(40).view(10, 4)])
    return [folder / "a.npy"], lambda: mapped(folder / "a.npy").clone()


def documents(folder):
    store_documents(folder / "d", [[1, 2, 3], [4], [5, 6]], 10)

    def read():
        found = open_documents(folder / "d")
        return [found[i].tolist() for i in range(len(found))]

    return sorted(p for p in (folder / "d").rglob("*") if p.is_file()), read


def an_idx_file(folder):
    (folder / "x").write_bytes(
        b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(range(18))
    )
    return [folder / "x"], lambda: read_idx(folder / "x")


def a_log(folder):
    from foundation.training.loop import Step

    with Log(folder / "log.jsonl") as log:
        for n in range(4):
            log(Step(n, torch.tensor(1.0 / (n + 1)), 0.1, None, {}))
    return [folder / "log.jsonl"], lambda: read_log(folder / "log.jsonl")


SEALED = [a_checkpoint, weights, a_small_model]  # what has a hash: any change is noticed
OPEN = [a_tokenizer, an_array, documents, an_idx_file, a_log]  # read it, or say what is wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*SEALED, *OPEN], ids=lambda f: f.__name__)
def test_damaged_files_are_noticed_or_harmless(kind, tmp_path):
    rng, unnoticed = random.Random(kind.__name__), []
    for i in range(DAMAGES):
        folder = tmp_path / str(i)
        folder.mkdir()
        paths, read = kind(folder)
        want = read()
        what = damage(rng.choice(paths), rng)
        try:
            found = read()
        except Exception as error:
            assert is_sentence(error), f"{what}: by accident {type(error).__name__}: {error}"
        else:
            if not same(found, want):
                unnoticed.append(what)
    if kind in SEALED:
        assert not unnoticed, f"read as something else: {unnoticed}"


# Broken on purpose -------------------------------------------------------------------------------

BREAKS = json.loads((ROOT / "tests/breaks.json").read_text(encoding="utf-8"))
TRIED = BREAKS if LONG else []


def test_each_break_still_names_a_line_of_the_package():
    for b in BREAKS:
        text = (ROOT / b["module"]).read_text(encoding="utf-8")
        assert text.count(b["old"]) == 1, (
            f"{b['module']}: {b['old']!r} stands there {text.count(b['old'])} times"
        )
        assert b["new"] != b["old"]
    folders = {b["module"].split("/")[1] for b in BREAKS}
    assert len(BREAKS) >= 40 and len(folders) >= 10


@pytest.mark.skipif(not LONG, reason="`make test-faults` breaks the package")
@pytest.mark.parametrize("number", range(len(TRIED)))
def test_a_break_is_seen(number, tmp_path):
    b = BREAKS[number]
    for part in ("foundation", "tests", "docs", "nbs", "bench"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        "pyproject.toml",
        "settings.ini",
        "setup.py",
        "README.md",
        "Makefile",
        "CONTRIBUTING.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / file, tmp_path)
    path = tmp_path / b["module"]
    path.write_text(path.read_text(encoding="utf-8").replace(b["old"], b["new"]), encoding="utf-8")
    env = dict(
        os.environ,
        PYTHONPATH=str(tmp_path),
        OMP_NUM_THREADS="1",
        FOUNDATION_SHORT="1",
        FOUNDATION_FAULTS="",
    )
    job = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *b["tests"].split()],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert job.returncode == 1, (
        f"nothing in {b['tests']} saw {b['new']!r} in {b['module']}:\n{job.stdout[-1500:]}"
    )
