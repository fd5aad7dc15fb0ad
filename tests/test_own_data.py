"""A folder of pictures or a table of texts becomes a network, in a few lines or by the command"""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.command import main
from foundation.core.checks import complaint
from foundation.data.own import fit_image, image_set, read_image
from foundation.data.own_texts import read_texts
from foundation.data.text_tasks import own_text_task
from foundation.deployment.export import OnnxModel
from foundation.models.card import BadWeights
from foundation.models.pretrained import load_minilm
from foundation.own_data import LONGEST, load_tuned, tune, tune_pictures


def drawn(kind, seed):
    "A colour picture (h, w, 3) of bytes: stripes that lie or stand, of any size"
    rng = np.random.default_rng(seed)
    h, w = rng.integers(30, 60, 2)
    y, x = np.mgrid[:h, :w]
    wave = np.sin((y if kind == "lying" else x) * rng.uniform(0.4, 0.7))[..., None]
    return np.where(wave > 0, *rng.uniform(0, 255, (2, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stripes"
    for kind in ("lying", "standing"):
        (folder / kind).mkdir(parents=True)
        for i in range(30):
            suffix = ("png", "jpg", "webp")[i % 3]
            Image.fromarray(drawn(kind, 2 * i + len(kind))).save(folder / kind / f"{i}.{suffix}")
    return folder


@pytest.fixture(scope="module")
def tuned(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "mine"
    return tune_pictures(pictures, out, size=32, steps=3), out


def test_a_folder_becomes_a_network_that_answers_as_its_file_and_its_graph_do(pictures, tuned):
    mine, out = tuned
    files = sorted(pictures.glob("*/*"))[::7]
    answers = mine(files)
    assert mine.classes == ("lying", "standing")
    assert load_tuned(out)(files) == answers
    graph = OnnxModel(out / "model.onnx")(mine.read(files)).softmax(1)
    torch.testing.assert_close(
        graph.amax(1), torch.tensor([share for _, share in answers]), rtol=1e-3, atol=1e-3
    )
    assert [mine.classes[i] for i in graph.argmax(1)] == [name for name, _ in answers]
    found = mine.card["metrics"]
    assert found["test_examples"] == 12 and found["interval"][0] <= found["test_accuracy"]
    assert found["dev_accuracy"].keys() == {"fitted", "tuned"}
    assert mine.card["method"] == max(found["dev_accuracy"], key=found["dev_accuracy"].get)


def test_reading_a_file_gives_what_training_saw(pictures, tuned):
    "The accuracy on the card is that of the test pictures, read as files"
    mine, _ = tuned
    own = image_set(pictures, size=32)
    files = {fit_image(read_image(f, 3), 32).numpy().tobytes(): f for f in pictures.glob("*/*")}
    answers = mine([files[image.numpy().tobytes()] for image in own.test_images])
    right = [own.classes[k] == name for k, (name, _) in zip(own.test_labels, answers)]
    assert sum(right) / len(right) == pytest.approx(mine.card["metrics"]["test_accuracy"])


def test_the_command_trains_and_answers(pictures, tmp_path, capsys):
    out = str(tmp_path / "run")
    plan = ["--out", out, "--size", "32", "--steps", "2", "--seed", "1"]
    assert main(["finetune", str(pictures), *plan]) == 0
    said = capsys.readouterr().out
    assert "2 classes: lying, standing" in said and "Test accuracy" in said
    assert json.loads((tmp_path / "run" / "model.json").read_text())["seed"] == 1
    files = [str(file) for file in sorted(pictures.glob("*/*"))[:2]]
    assert main(["predict", out, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == files
    assert all(line.split("\t")[0] in ("lying", "standing") for line in lines)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "films.csv"
    good = "a moving story|wonderfully played|I laughed a lot|what a joy|splendid, all of it"
    bad = "a dull story|badly played|I fell asleep|what a waste|two lost hours, really"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("stars", "review"))
        for i in range(8):
            for name, texts in (("five", good), ("one", bad)):
                rows.writerows((name, f"{text}, part {i}") for text in texts.split("|"))
    return path


def test_a_table_becomes_a_network_that_answers_as_its_file_and_its_graph_do(
    table, tmp_path, capsys
):
    plan = ["--text", "review", "--label", "stars", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["finetune", str(table), *plan]) == 0
    assert "2 classes: five, one" in capsys.readouterr().out
    critic = load_tuned(tmp_path / "run")
    texts = ["a moving story", "bad, bad, bad " * 90, "what a joy"]  # one is cut
    answers = critic(texts)
    tokens = critic.read(texts)
    assert tokens.shape == (3, LONGEST)
    graph = OnnxModel(tmp_path / "run" / "model.onnx")(tokens).softmax(1)
    shares = torch.tensor([share for _, share in answers])
    torch.testing.assert_close(graph.amax(1), shares, rtol=1e-3, atol=1e-3)
    assert [critic([text])[0][0] for text in texts] == [name for name, _ in answers]
    task = own_text_task(read_texts(table, "review", "stars"), load_minilm()[1], longest=LONGEST)
    held = [(task.texts[i], task.classes[task.labels[i]]) for i in task.test]
    right = [critic([text])[0][0] == name for text, name in held]
    found = critic.card["metrics"]
    assert sum(right) / len(right) == pytest.approx(found["test_accuracy"])
    assert main(["predict", str(tmp_path / "run"), "what a joy"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("five", "one")


def test_what_cannot_be_read_is_one_sentence(pictures, table, tuned, tmp_path, capsys):
    mine, out = tuned
    one_class = tmp_path / "one.csv"
    one_class.write_text("text,label\ngood,a\nfine,a\nnice,a\nwell,a\n")
    assert "list" in complaint(mine, "a.png") and "list" in complaint(mine, [])
    (tmp_path / "flat").mkdir()
    Image.fromarray(drawn("lying", 0)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "notes.txt").write_text("no table")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    cases = [
        (["finetune", str(tmp_path / "nowhere")], "nowhere"),
        (["finetune", str(tmp_path / "flat")], "subfolder"),
        (["finetune", str(tmp_path / "notes.txt")], ".csv"),
        (["finetune", str(pictures), "--steps", "0"], "steps"),
        (["finetune", str(pictures), "--size", "16"], "size is 16"),
        (["finetune", str(pictures), "--text", "review"], "pictures, which have no text"),
        (["finetune", str(table), "--size", "64"], "texts, which have no size"),
        (["finetune", str(table), "--text", "stars", "--label", "review"], "column"),
        (["finetune", str(pictures), "--out", ""], "a folder of its own"),
        (["finetune", str(pictures), "--out", str(pictures)], "a folder of its own"),
        (["finetune", str(pictures), "--out", str(tmp_path / "notes.txt")], "no folder"),
        (["finetune", str(one_class)], "number of classes"),
        (["predict", str(out), ""], "no file"),
        (["predict", str(out), str(pictures / "lying")], "no file"),
        (["predict", str(tmp_path), "a.png"], "model.json"),
        (["predict", str(out), str(tmp_path / "bad.png")], "bad.png"),
        (["predict", str(out), str(tmp_path / "none.png")], "none.png"),
    ]
    for arguments, word in cases:
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert word in said and "Traceback" not in said, (arguments, said)
    assert not (tmp_path / "runs").exists()


def test_every_class_is_among_those_to_choose_by(tmp_path):
    few = tmp_path / "few"
    for kind, count in (("lying", 30), ("standing", 3)):
        (few / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(drawn(kind, 2 * i + len(kind))).save(few / kind / f"{i}.png")
    card = tune_pictures(few, tmp_path / "out", size=33, steps=1).card
    assert (card["pool"], card["dev"], card["metrics"]["test_examples"]) == (23, 3, 7)
    (tmp_path / "out" / "model.onnx").write_bytes(b"of a run before")
    tune_pictures(few, tmp_path / "out", size=50, steps=1)
    assert OnnxModel(tmp_path / "out" / "model.onnx").inputs[0].shape[2:] == [50, 50]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.json",
        "model.onnx",
        "model.safetensors",
    ]


def test_a_changed_file_is_refused(tuned, tmp_path):
    _, out = tuned
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BadWeights, match="model"):
        load_tuned(tmp_path)


def test_what_is_neither_folder_nor_table_is_refused(tmp_path):
    assert "folder" in complaint(tune, tmp_path / "a.parquet", tmp_path)
