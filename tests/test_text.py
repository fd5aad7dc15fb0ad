"Bad input and the promises of the split that foundation.data.text makes."
import pytest
import torch

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


@pytest.mark.parametrize("text", ["no bar here\n", "a | b\n", LINE.replace(" 03 ", " 99 ")])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(ValueError, match="x.txt is not a data file of WordNet"):
        read_glosses(tmp_path / "x.txt")


@pytest.mark.parametrize("text", ["1\t0.5\n", "1\tgood\ttext\n"])
def test_a_broken_line_of_ratings_is_named(tmp_path, text):
    (tmp_path / "r.txt").write_text("1_1\t0.5\tfine &amp; good\n" + text)
    with pytest.raises(ValueError, match="r.txt, line 2: expected number, rating and text"):
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
