"Bad input and the promises of the split that foundation.data.text makes."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.data.text import FIELDS, TextSet, glosses, read_glosses, read_snippets, reviews, split_texts

LINE = '00001740 03 n 02 entity 0 whole_thing 0 001 ~ 00001930 n 0000 | a thing; not "nothing"; "an example"; "another one"  \n'


def some(n=100, groups=None):
    return TextSet("some", tuple(f"text {i}" for i in range(n)), torch.arange(n) % 2, ("a", "b"),
                   tuple(groups or (str(i) for i in range(n))))


def test_one_gloss(tmp_path):
    (tmp_path / "data.noun").write_text("  1 the licence\n" + LINE)
    (gloss,) = read_glosses(tmp_path / "data.noun")
    assert (gloss.words, gloss.field, gloss.examples) == (("entity", "whole thing"), "noun.Tops", ("an example", "another one"))
    assert gloss.definition == 'a thing; not "nothing"'
    assert len(FIELDS) == len(set(FIELDS)) == 45


@pytest.mark.parametrize("text", ["", "  1 only a licence\n", "no bar here\n", "a | b\n", LINE.replace(" 03 ", " 99 ")])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match="x.txt is not a data file of WordNet"):
        read_glosses(tmp_path / "x.txt")


@pytest.mark.parametrize("text", ["1\t0.5\n", "1\tgood\ttext\n", "1\tnan\ttext\n", "1\t7\ttext\n"])
def test_a_broken_line_of_ratings_is_named(tmp_path, text):
    (tmp_path / "r.txt").write_text("1_1\t0.5\tfine &amp; good\n" + text)
    with pytest.raises(ValueError, match="r.txt, line 2: expected number, rating from -4 to 4 and text"):
        read_snippets(tmp_path / "r.txt")


def test_a_set_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="0 texts"):
        some().take([])
    with pytest.raises(ValueError, match="the same number of each"):
        TextSet("x", ("a",), torch.tensor([0, 1]), ("a", "b"), ("1",))
    with pytest.raises(ValueError, match="labels run from 0 to 2; expected 0 to 1"):
        TextSet("x", ("a", "b"), torch.tensor([0, 2]), ("a", "b"), ("1", "2"))


def test_split_keeps_groups_together_and_is_stable():
    data = some(1000, groups=[str(i // 10) for i in range(1000)])
    train, test = split_texts(data, test=0.3)
    assert not set(train.groups) & set(test.groups) and len(train) + len(test) == 1000 and 150 < len(test) < 450
    assert split_texts(data, test=0.3)[1].texts == test.texts != split_texts(data, test=0.3, seed=1)[1].texts
    shuffled = data.take(torch.randperm(1000, generator=torch.Generator().manual_seed(0)))
    assert set(split_texts(shuffled, test=0.3)[1].texts) == set(test.texts)
    assert set(split_texts(data, test=0.1)[1].texts) < set(test.texts)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_split_refuses_shares_that_are_none(share):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        split_texts(some(), share)


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match="all 1 groups fall on one side"):
        split_texts(some(10, ["one"] * 10))


@pytest.mark.parametrize("call", [lambda: glosses("nouns"), lambda: glosses([]), lambda: reviews("films", task="mood"), lambda: reviews("books"),
                                  lambda: reviews(margin=-1), lambda: reviews("films", task="genre")])
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
    (tmp_path / "none.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError):
        read(tmp_path / "none.txt")


@pytest.mark.parametrize("labels", [[0, 1], torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0, 1]])])
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises(TypeError, match="expected a tensor .* of torch.int64"):
        TextSet("x", ("a", "b"), labels, ("a", "b"), ("1", "2"))


@pytest.mark.parametrize("indices, error, words", [
    (torch.ones(100).bool(), TypeError, "nonzero"), ([0.5], TypeError, "whole numbers"), ([[1]], TypeError, r"\(1, 1\)"),
    ([100], IndexError, "from 100 to 100 in a set of 100"), ([-101], IndexError, "in a set of 100"),
])
def test_indices_that_mean_something_else_are_refused(indices, error, words):
    with pytest.raises(error, match=words):
        some().take(indices)


def test_split_wants_a_set_of_texts():
    with pytest.raises(TypeError, match="data are a list; expected a TextSet"):
        split_texts(["a", "b"])


@given(names=st.lists(st.integers(0, 20), min_size=30, max_size=60), seed=st.integers(0, 9), share=st.floats(0.3, 0.7))
@settings(max_examples=40, deadline=None)
def test_no_group_is_ever_torn(names, seed, share):
    data = some(len(names) + 40, [*map(str, names), *(f"own {i}" for i in range(40))])
    train, test = split_texts(data, share, seed)
    assert not set(train.groups) & set(test.groups) and sorted(train.texts + test.texts) == sorted(data.texts)
