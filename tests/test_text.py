"Bad input and the promises of the split that foundation.data.text makes."

import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.data.text import (
    FIELDS,
    TextSet,
    glosses,
    read_glosses,
    read_snippets,
    reviews,
    split_texts,
)

LINE = (
    "00001740 03 n 02 entity 0 whole_thing 0 001 ~ 00001930 n 0000 | "
    'a thing; not "nothing"; "an example"; "another one"  \n'
)


def some(n=100, groups=None):
    return TextSet(
        "some",
        tuple(f"text {i}" for i in range(n)),
        torch.arange(n) % 2,
        ("a", "b"),
        tuple(groups or (str(i) for i in range(n))),
    )


def test_one_gloss(tmp_path):
    (tmp_path / "data.noun").write_text("  1 the licence\n" + LINE)
    (gloss,) = read_glosses(tmp_path / "data.noun")
    assert (gloss.words, gloss.field, gloss.examples) == (
        ("entity", "whole thing"),
        "noun.Tops",
        ("an example", "another one"),
    )
    assert gloss.definition == 'a thing; not "nothing"'
    assert len(FIELDS) == len(set(FIELDS)) == 45


@pytest.mark.parametrize(
    "text", ["", "  1 only a licence\n", "no bar here\n", "a | b\n", LINE.replace(" 03 ", " 99 ")]
)
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match="x.txt is not a data file of WordNet"):
        read_glosses(tmp_path / "x.txt")


@pytest.mark.parametrize("text", ["1\t0.5\n", "1\tgood\ttext\n", "1\tnan\ttext\n", "1\t7\ttext\n"])
def test_a_broken_line_of_ratings_is_named(tmp_path, text):
    (tmp_path / "r.txt").write_text("1_1\t0.5\tfine &amp; good\n" + text)
    with pytest.raises(
        ValueError, match="r.txt, line 2: expected number, rating from -4 to 4 and text"
    ):
        read_snippets(tmp_path / "r.txt")


def test_a_set_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="there are no indices"):
        some().take([])
    with pytest.raises(ValueError, match="the same number of each"):
        TextSet("x", ("a",), torch.tensor([0, 1]), ("a", "b"), ("1",))
    with pytest.raises(ValueError, match="labels run from 0 to 2; expected 0 to 1"):
        TextSet("x", ("a", "b"), torch.tensor([0, 2]), ("a", "b"), ("1", "2"))


def test_split_keeps_groups_together_and_is_stable():
    data = some(1000, groups=[str(i // 10) for i in range(1000)])
    train, test = split_texts(data, test=0.3)
    assert (
        not set(train.groups) & set(test.groups)
        and len(train) + len(test) == 1000
        and 150 < len(test) < 450
    )
    assert (
        split_texts(data, test=0.3)[1].texts
        == test.texts
        != split_texts(data, test=0.3, seed=1)[1].texts
    )
    shuffled = data.take(torch.randperm(1000, generator=torch.Generator().manual_seed(0)))
    assert set(split_texts(shuffled, test=0.3)[1].texts) == set(test.texts)
    assert set(split_texts(data, test=0.1)[1].texts) < set(test.texts)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_split_refuses_shares_that_are_none(share):
    with pytest.raises(ValueError, match="expected a finite number above 0 below 1"):
        split_texts(some(), share)


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match="all 1 groups fall on one side"):
        split_texts(some(10, ["one"] * 10))


@pytest.mark.parametrize(
    "call",
    [
        lambda: glosses("nouns"),
        lambda: glosses([]),
        lambda: reviews("films", task="mood"),
        lambda: reviews("books"),
        lambda: reviews(margin=-1),
        lambda: reviews("films", task="genre"),
    ],
)
def test_loaders_say_what_they_know(call):
    with pytest.raises(ValueError, match="expected|needs"):
        call()


@pytest.mark.parametrize("read", [read_glosses, read_snippets])
def test_a_missing_or_empty_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="none.txt is not there; fetch"):
        read(tmp_path / "none.txt")
    (tmp_path / "none.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="none.txt"):
        read(tmp_path / "none.txt")
    for raw in (
        b"\xff\xfe\x00",
        LINE.encode() + b"1_1\t0.5\tcaf\xe9\n",
        "1\t0\tx\n".encode("utf-16"),
    ):
        (tmp_path / "none.txt").write_bytes(raw)
        with pytest.raises(
            ValueError, match=r"none.txt is no text in UTF-8 \(byte [\d,]+\); delete it"
        ):
            read(tmp_path / "none.txt")


@pytest.mark.parametrize("read", [read_glosses, read_snippets])
@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300])
def test_a_path_that_is_no_file_is_named(tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match="is not there; fetch"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "old, new",
    [
        (" 03 ", " -1 "),
        (" 03 ", " 3 "),
        (" 03 ", " 45 "),
        (" 03 ", " 0x "),
        (" 02 ", " 01 "),
        (" 02 ", " 03 "),
        (" 02 ", " 00 "),
        (" 02 ", " -2 "),
        (" 02 ", " 0g "),
        ("00001740", "1740"),
        ("entity 0", "entity x"),
        (" 001 ", " 002 "),
        (" 001 ", " 1 "),
        (" | ", " "),
        (" 0 001 ~ 00001930 n 0000", ""),
        ("0 001", "0"),
        (" 03 ", " \u0660\u0663 "),
    ],
)
def test_a_damaged_line_of_the_dictionary_is_named(tmp_path, old, new):
    "Fields and counts that do not fit one another"
    assert old in LINE
    (tmp_path / "x.txt").write_text("  1 the licence\n" + LINE + LINE.replace(old, new, 1))
    with pytest.raises(
        ValueError, match="x.txt is not a data file of WordNet: line 3 is "
    ) as caught:
        read_glosses(tmp_path / "x.txt")
    assert "\n" not in str(caught.value)


def test_lines_end_where_a_file_says_so_and_not_at_other_separators(tmp_path):
    "Unicode has seven more line ends; in a text they are white space"
    (tmp_path / "r.txt").write_bytes(
        "\ufeff1_1\t0.5\tone\u2028two\x85three\r\n2\t-1\tfour\n".encode()
    )
    assert [(row.text, row.valence, row.document) for row in read_snippets(tmp_path / "r.txt")] == [
        ("one\u2028two\x85three", 0.5, "1"),
        ("four", -1.0, None),
    ]


def test_a_margin_that_leaves_nothing_is_a_sentence(tmp_path):
    (tmp_path / "r.txt").write_text("1\t0.5\tfine\n")
    with (
        patch("foundation.data.text.fetch", lambda name: {"films": tmp_path / "r.txt"}),
        pytest.raises(ValueError, match="no text is left"),
    ):
        reviews("films", margin=3.9)


def test_of_equal_texts_the_first_is_kept_and_parts_count_once(tmp_path):
    (tmp_path / "r.txt").write_text(
        "1\t2\tFine film!\n2\t-2\tfine film\n3\t-3\tdull\n4\t0.1\tso so\n"
    )
    with patch("foundation.data.text.fetch", lambda name: {"films": tmp_path / "r.txt"}):
        made = reviews(["films", "films"])
        assert made.texts == ("Fine film!", "dull") and made.labels.tolist() == [1, 0]
        with pytest.raises(ValueError, match="genre needs two"):
            reviews(["films", "films"], task="genre")


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_numbers_of_numpy_split_as_plain_ones(kind):
    want = split_texts(some(), 0.5, 3)
    assert (
        split_texts(some(), kind(0.5) if kind is not np.int64 else np.float64(0.5), kind(3))[
            1
        ].texts
        == want[1].texts
    )
    assert some().take(np.array([3, -1], np.int32)).texts == ("text 3", "text 99")
    with pytest.raises(TypeError, match="seed is 3.0"):
        split_texts(some(), 0.5, 3.0)


def test_a_split_is_what_saved_results_depend_on():
    "These must never change, nor does half a character stop them"
    data = some(12, groups=[f"group {i}" for i in range(11)] + ["\ud800"])
    assert [re.sub(r"\D", "", text) for text in split_texts(data, 0.4, 1)[1].texts] == SPLIT


SPLIT = ["1", "3", "5", "6", "8", "11"]


@pytest.mark.parametrize(
    "labels",
    [
        [0.5, 1],
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0, 1]]),
        torch.tensor([True, False]),
        None,
        "01",
        [0, None],
        ["a", "b"],
    ],
)
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises((TypeError, ValueError), match="labels .*; expected"):
        TextSet("x", ("a", "b"), labels, ("a", "b"), ("1", "2"))


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1],
        (0, 1),
        np.array([0, 1], np.int16),
        *(torch.tensor([0, 1], dtype=d) for d in (torch.uint8, torch.int32, torch.int64)),
    ],
)
def test_labels_of_every_whole_kind(labels):
    made = TextSet("x", ["a", "b"], labels, ("a", "b"), ("1", "2"))
    assert (
        made.labels.dtype == torch.int64
        and made.labels.tolist() == [0, 1]
        and made.texts == ("a", "b")
    )


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("texts", "ab", "texts is 'ab'; expected a tuple of strings"),
        ("texts", ("a", None), "texts hold 1 of 2 that are no strings, the first is None"),
        ("texts", (float("nan"), float("nan")), "texts hold 2 of 2"),
        ("groups", (1, 2), "groups hold 2 of 2"),
        ("classes", None, "classes is None"),
    ],
)
def test_texts_groups_and_classes_are_strings(field, value, words):
    with pytest.raises(TypeError, match=words):
        TextSet(
            **dict(name="x", texts=("a", "b"), labels=[0, 1], classes=("a", "b"), groups=("1", "2"))
            | {field: value}
        )


@pytest.mark.parametrize(
    "indices, error, words",
    [
        (torch.ones(100).bool(), TypeError, "nonzero"),
        ([0.5], TypeError, "whole numbers"),
        ([[1]], TypeError, r"\(1, 1\)"),
        (None, TypeError, "indices is None"),
        ("ab", TypeError, "indices is 'ab'"),
        ([[1], [2, 3]], TypeError, "indices is a list"),
        ([2**70], TypeError, "indices is a list"),
        (torch.tensor(1), TypeError, "tensor of int64"),
        ([100], IndexError, "from 100 to 100 in a set of 100"),
        ([-101], IndexError, "in a set of 100"),
    ],
)
def test_indices_that_mean_something_else_are_refused(indices, error, words):
    with pytest.raises(error, match=words):
        some().take(indices)


def test_split_wants_a_set_of_texts():
    with pytest.raises(TypeError, match="data is a list; expected a TextSet"):
        split_texts(["a", "b"])


@given(
    names=st.lists(st.integers(0, 20), min_size=30, max_size=60),
    seed=st.integers(0, 9),
    share=st.floats(0.3, 0.7),
)
@settings(max_examples=40, deadline=None)
def test_no_group_is_ever_torn(names, seed, share):
    data = some(len(names) + 40, [*map(str, names), *(f"own {i}" for i in range(40))])
    train, test = split_texts(data, share, seed)
    assert not set(train.groups) & set(test.groups) and sorted(train.texts + test.texts) == sorted(
        data.texts
    )
