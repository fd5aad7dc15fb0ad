"""Tables and folders of labelled texts: read whole, or refused with the line that is wrong"""

import csv
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foundation.core.checks import complaint
from foundation.data.own_texts import read_texts
from foundation.data.text import split_texts

WORDS = st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t and _plain(t))
NAMES = st.sampled_from(["+", "-", "so, so", 'a "b"', "ü"])


def _plain(text):
    "What UTF-8 can write"
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def write(path, rows, head=("text", "label"), **options):
    with open(path, "w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **options).writerows([head, *rows])
    return path


@given(rows=st.lists(st.tuples(WORDS, NAMES), min_size=1, max_size=8))
def test_whatever_is_written_is_read_again(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "a.csv", rows)
    write(folder / "b.tsv", rows, delimiter="\t")
    write(folder / "c.CSV", rows, encoding="utf-8-sig", lineterminator="\r\n")
    objects = [json.dumps(dict(text=text, label=name)) for text, name in rows]
    (folder / "d.jsonl").write_text("\n".join(objects) + "\n\n", encoding="utf-8")
    for path in sorted(folder.iterdir()):
        data = read_texts(path)
        assert list(data.texts) == [text.strip() for text, _ in rows], path.name
        assert [data.classes[i] for i in data.labels] == [name for _, name in rows]
        assert data.classes == tuple(sorted(set(name for _, name in rows)))


def test_other_columns_other_order_and_named_classes(tmp_path):
    head = ("id", "stars", "review")
    path = write(tmp_path / "a.csv", [(1, "5", "good"), (2, "1", "bad")], head)
    data = read_texts(path, text="review", label="stars", classes=["1", "5"])
    assert data.texts == ("good", "bad") and data.labels.tolist() == [1, 0]
    assert read_texts(path, "review", "stars", ["5", "1"]).labels.tolist() == [0, 1]
    assert "'3'" in complaint(
        read_texts, write(tmp_path / "b.csv", [(1, "3", "so")], head), "review", "stars", ["5", "1"]
    )


def test_a_folder_of_files_is_the_same_set(tmp_path):
    for name, content in (("neg/a", "bad"), ("neg/deep/b", "worse"), ("pos/c", "\ufeffgood\r\n")):
        path = tmp_path / "films" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (tmp_path / "films" / ".hidden").mkdir()
    (tmp_path / "films" / ".hidden" / "d.txt").write_text("no")
    data = read_texts(tmp_path / "films")
    assert data.texts == ("bad", "worse", "good") and data.classes == ("neg", "pos")
    (tmp_path / "films" / "pos" / "empty.txt").write_text(" ")
    assert "pos/empty.txt" in complaint(read_texts, tmp_path / "films")


def test_equal_texts_stay_on_one_side(tmp_path):
    rows = [(f"Text  {i % 30}" if i < 30 else f"text {i % 30} ", "ab"[i % 2]) for i in range(60)]
    data = read_texts(write(tmp_path / "a.csv", rows))
    for seed in range(10):
        train, held = split_texts(data, 0.3, seed)
        assert not set(train.groups) & set(held.groups)
        assert len(train) + len(held) == 60
    assert torch.equal(data.labels, torch.arange(60) % 2)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "text,label\ngood,+\nbad\n", "line 3: the label is None"),
        ("a.csv", "text,label\ngood, really,+\n", "line 2: a field too many"),
        ("a.csv", 'text,label\nok,+\n"never closed,+\nbad,-\n', "line 3"),
        ("a.csv", "text,label\n  ,+\n", "line 2: the text is"),
        ("a.csv", "text,label\ngood,nan\nbad,\n", "line 3: the label is ''"),
        ("a.csv", "text|label\ngood|+\n", "no column is called 'text'"),
        ("a.csv", "text,text,label\na,b,c\n", "'text' twice"),
        ("a.csv", "text,label\n", "holds no texts"),
        ("a.csv", "", "holds no texts"),
        ("a.tsv", "text,label\na,b\n", "no column"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text"\n', "line 3"),
        ("a.jsonl", "[1, 2]\n", "line 1: a list"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "line 1: the label is nan"),
        ("a.jsonl", '{"text": 3, "label": "b"}\n', "line 1: the text is 3"),
        ("a.txt", "good\n", ".csv, .tsv or .jsonl"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert words in complaint(read_texts, tmp_path / name)


def test_other_bytes_and_no_file(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nschön,+\n".encode("latin-1"))
    assert "UTF-8" in complaint(read_texts, tmp_path / "a.csv")
    assert "no file or folder" in complaint(read_texts, tmp_path / "none.csv")


def test_a_table_separated_by_semicolons(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext;label\r\n"Gut; sehr";+\r\nSchön, nicht;-\r\n', encoding="utf-8")
    data = read_texts(path)
    assert data.texts == ("Gut; sehr", "Schön, nicht") and data.classes == ("+", "-")
