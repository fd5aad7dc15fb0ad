"""Byte-level BPE: any Unicode round-trips, equal to the library tokenizers,
bad input in one sentence"""

import json
import pickle
import time
import unicodedata
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from foundation.data.tokenizer import (
    SPECIAL,
    Tokenizer,
    find_merges,
    show_token,
    split_words,
    train_bpe,
)

few = settings(max_examples=60, deadline=None)
TEXTS = [
    "the cat sat on the mat",
    "a mat for the cat's naïve café",
    "那只猫 坐在 那只垫子上",
    "1234 12 123 the the",
    "aaaa aaaaaaa aaa",
    "\n\n  the   cat",
] * 3
SMALL = train_bpe(TEXTS, 300)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
old = unicodedata.ucd_3_2_0  # letters that every version of Unicode knows, in the same category
known_text = st.text(
    st.characters(exclude_categories=["Cs", "Cn"]).filter(
        lambda c: old.category(c) == unicodedata.category(c)
    ),
    max_size=60,
)
english = st.lists(st.text("abc '12.\n", max_size=30), min_size=1, max_size=8)


@few
@given(unicode_text)
def test_any_unicode_comes_back(text):
    assert "".join(split_words(text)) == text
    for tokenizer in (SMALL, Tokenizer([]), Tokenizer([], special=())):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(
            len(tokenizer.special) <= n < tokenizer.vocab_size for n in ids
        )


@few
@given(known_text)
def test_the_same_numbers_as_the_library(text):
    assert SMALL.fast().encode(text).ids == SMALL.encode(text)
    assert [piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)] == [
        show_token(w.encode()) for w in split_words(text)
    ]


def library(texts, size):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


@few
@given(english, st.integers(261, 320))
def test_the_same_vocabulary_as_the_library(texts, size):
    if any(texts):
        assert train_bpe(texts, size).fast().get_vocab() == library(texts, size).get_vocab()


def slow_merges(counts, size):
    "All pairs counted anew each time; of equals the older tokens first"
    rows, merges = {word: [bytes([b]) for b in word.encode()] for word in counts}, []
    order = {token: n for n, token in enumerate(Tokenizer([]).tokens)}
    while len(order) < size:
        pairs = Counter()
        for word, row in rows.items():
            for pair in zip(row, row[1:]):
                pairs[pair] += counts[word]
        if not pairs or max(pairs.values()) < 2:
            break
        a, b = min(pairs, key=lambda p: (-pairs[p], order[p[0]], order[p[1]]))
        order.setdefault(a + b, len(order))
        merges.append((a, b))
        for word, row in rows.items():
            out = []
            for token in row:
                if out and out[-1] == a and token == b:
                    out[-1] = a + b
                else:
                    out.append(token)
            rows[word] = out
    return merges


@few
@given(
    st.dictionaries(
        st.text("abcde", min_size=1, max_size=9), st.integers(1, 9), min_size=1, max_size=12
    ),
    st.integers(256, 290),
)
def test_quick_counts_are_slow_counts(counts, size):
    assert find_merges(counts, size) == slow_merges(counts, size)


def test_special_tokens():
    pad, cls, mask = (SMALL.special[name] for name in ("[PAD]", "[CLS]", "[MASK]"))
    assert pad == 0 and list(SMALL.special) == list(SPECIAL)
    assert mask not in SMALL.encode("the [MASK]")
    ids = SMALL.encode("[CLS]the [MASK] cat", special=True)
    assert ids[0] == cls and mask in ids
    assert (
        SMALL.decode(ids) == "[CLS]the [MASK] cat"
        and SMALL.decode(ids, special=False) == "the  cat"
    )
    assert SMALL.decode(torch.tensor(ids)) == SMALL.decode(ids)
    assert SMALL.fast(special=True).encode("[CLS]the [MASK] cat").ids == ids


# Gluing in the order of learning, and what stands outside the text ----------------------------


def slow_cut(word, rank):
    "One gluing at a time: the earliest, the leftmost of equals"
    row = [bytes([b]) for b in word.encode()]
    while places := [(rank[pair], i) for i, pair in enumerate(zip(row, row[1:])) if pair in rank]:
        _, i = min(places)
        row[i : i + 2] = [row[i] + row[i + 1]]
    return row


@st.composite
def merge_lists(draw):
    "Sound merges of any kind: several pairs for one token, late pairs of early ones, pairs twice"
    tokens, merges = [b"a", b"b", b"c"], []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append(pair)
        if (new := pair[0] + pair[1]) not in tokens and len(new) < 9:
            tokens.append(new)
        elif len(new) >= 9:
            merges.pop()
    return merges


@few
@given(merge_lists(), st.text("abc [", max_size=40))
def test_words_are_cut_as_the_library_and_as_one_gluing_at_a_time_cut_them(merges, text):
    tokenizer = Tokenizer(merges)
    rank = {pair: i for i, pair in enumerate(merges)}
    slow = [
        tokenizer._number[token] for word in split_words(text) for token in slow_cut(word, rank)
    ]
    assert tokenizer.encode(text) == slow == tokenizer.fast().encode(text).ids


def test_two_ways_to_one_token_are_taken_in_the_order_of_the_library():
    "After the first (a, bc) comes the earlier (abc, a); glued all at once it would be abc|abc"
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"abc", b"a"), (b"a", b"bc")]
    tokenizer = Tokenizer(merges)
    assert [tokenizer.decode([n]) for n in tokenizer.encode("abcabc")] == ["abca", "bc"]
    assert tokenizer.encode("abcabc") == tokenizer.fast().encode("abcabc").ids


def test_a_chain_of_letters_without_a_blank_takes_no_square_of_its_length():
    chain = "".join(np.random.default_rng(0).choice(list("thecatsmon"), 40_000))
    start = time.perf_counter()
    ids = SMALL.encode(chain)
    assert (
        time.perf_counter() - start < 2
    )  # one step over the whole row for each gluing takes half a minute
    assert ids == SMALL.fast().encode(chain).ids and SMALL.decode(ids) == chain


special_names = st.lists(
    st.sampled_from(["[A]", "[A]B", "[A][A]", "<|end|>", "[MASK]", "an end", " [X]", "狐狸"]),
    unique=True,
    max_size=4,
)


@few
@given(
    special_names,
    st.lists(
        st.sampled_from(
            ["[A]", "B", "<|end|>", "[MASK]", "an end", "an", " [X]", "狐狸", "aa ", "[", " "]
        ),
        max_size=8,
    ),
)
def test_names_in_a_text_are_text_unless_asked_for_here_and_in_the_library(names, parts):
    tokenizer, text = Tokenizer([(b"a", b"a"), (b"[", b"A")], names), "".join(parts)
    for special in (False, True):
        ids = tokenizer.encode(text, special=special)
        assert (
            ids
            == tokenizer.fast(special).encode(text).ids
            == tokenizer.fast(special).encode_batch([text])[0].ids
        )
        assert tokenizer.decode(ids) == text
    assert all(n >= len(names) for n in tokenizer.encode(text))


def test_of_two_names_that_begin_alike_the_longer_is_read():
    for names in (["[A]", "[A]B"], ["[A]B", "[A]"]):
        tokenizer = Tokenizer([], names)
        assert tokenizer.encode("[A]B", special=True) == [tokenizer.special["[A]B"]]
        assert tokenizer.encode("[A][A]Bb", special=True)[:2] == [
            tokenizer.special["[A]"],
            tokenizer.special["[A]B"],
        ]
        assert (
            tokenizer.encode("[A][A]Bb", special=True)
            == tokenizer.fast(special=True).encode("[A][A]Bb").ids
        )


@pytest.mark.parametrize(
    "merges, name",
    [
        ([], "a"),
        ([(b"a", b"b")], "ab"),
        ([], "\u0120"),
        ([(b" ", b"a")], "\u0120a"),
        ([], "\u00e9"),
    ],
)
def test_a_name_that_is_how_a_token_of_the_text_is_written_is_refused(merges, name):
    "The file holds both under one key, and one of the two would be lost"
    with pytest.raises(ValueError, match="also how a token of the text is shown"):
        Tokenizer(merges, [name])


def test_words_are_remembered_and_forgotten_without_a_change():
    tokenizer, text = Tokenizer(SMALL.merges), "the cat sat"
    ids = tokenizer.encode(text)
    ids.append(3)
    assert tokenizer.encode(text) == ids[:-1]
    tokenizer._known.update((str(n), []) for n in range(100_000))
    assert (
        tokenizer.encode(text + " mat") == SMALL.encode(text + " mat") and len(tokenizer._known) < 9
    )


@pytest.mark.parametrize(
    "ids",
    [
        SMALL.encode("a cat"),
        tuple(SMALL.encode("a cat")),
        iter(SMALL.encode("a cat")),
        np.array(SMALL.encode("a cat"), np.int32),
        np.array(SMALL.encode("a cat"), np.uint16),
        torch.tensor(SMALL.encode("a cat")),
        list(torch.tensor(SMALL.encode("a cat"))),
    ],
)
def test_numbers_of_any_whole_kind_are_decoded(ids):
    assert SMALL.decode(ids) == "a cat"


def test_numpy_sizes():
    assert (
        train_bpe(TEXTS, np.int64(300)).merges
        == SMALL.merges
        == find_merges(Counter(w for t in TEXTS for w in split_words(t)), np.int32(295))
    )


def test_half_a_character_is_shown_as_such():
    ids = SMALL.encode("狐")
    assert SMALL.decode(ids[:1]) == "\ufffd" and SMALL.decode([]) == ""


def test_saved_and_loaded(tmp_path):
    path = SMALL.save(tmp_path / "deep" / "tokenizer.json")
    again = Tokenizer.load(path)
    assert (again.merges, again.special, again.vocab_size) == (
        SMALL.merges,
        SMALL.special,
        SMALL.vocab_size,
    )
    assert json.loads(tokenizers.Tokenizer.from_file(str(path)).to_str()) == json.loads(
        path.read_text()
    )
    assert pickle.loads(pickle.dumps(SMALL)).encode("the cat") == SMALL.encode("the cat")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(type="WordPiece"),
        lambda d: d["model"]["merges"].pop(0),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d.pop("model"),
        lambda d: d["model"]["merges"][0].append("x"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path, change):
    path = SMALL.save(tmp_path / "t.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="t.json is no byte-level BPE"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"no",
        b"",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[]",
        b"3",
        b"null",
        b'{"added_tokens": [], "model": {"merges": [3]}}',
        b'{"added_tokens": [{"content": "a"}], "model": {"merges": []}}',
        b'{"added_tokens": [{"content": 3}], "model": {"merges": []}}',
        b'{"added_tokens": 3, "model": []}',
        b'{"a": 1e999}',
        "{}".encode("utf-16"),
    ],
)
def test_what_is_another_file_is_refused(tmp_path, raw):
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(ValueError, match="t.json is no byte-level BPE"):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["none.json", ".", "a\0b", "x" * 300, ""])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="is no file; `Tokenizer.save` writes one"):
        Tokenizer.load(tmp_path / name)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = Tokenizer([]).save(tmp_path / "t.json")
    before = path.read_bytes()
    with (
        patch("os.fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError),
    ):
        SMALL.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


BAD = {
    "one bare text": (lambda: train_bpe("text", 300), TypeError, "hand in [text]"),
    "bytes": (lambda: train_bpe([b"text"], 300), TypeError, "text is b'text'; expected a string"),
    "no text": (lambda: train_bpe([], 300), ValueError, "nothing to learn"),
    "empty texts": (lambda: train_bpe(["", ""], 300), ValueError, "nothing to learn"),
    "too few tokens": (
        lambda: train_bpe(["a"], 260),
        ValueError,
        "expected a whole number from 261 on: 256 bytes and 5 special tokens",
    ),
    "a number": (lambda: SMALL.encode(3), TypeError, "text is 3; expected a string"),
    "a special number": (
        lambda: SMALL.encode(3, special=True),
        TypeError,
        "text is 3; expected a string",
    ),
    "half a character": (lambda: SMALL.encode("a\ud800"), ValueError, "surrogate"),
    "training on half a character": (lambda: train_bpe(["a\ud800"], 300), ValueError, "surrogate"),
    "a token too high": (
        lambda: SMALL.decode([SMALL.vocab_size]),
        ValueError,
        "expected a whole number from 0 to 299",
    ),
    "a token below 0": (lambda: SMALL.decode([-1]), ValueError, "a token is -1"),
    "a merge of nothing": (lambda: Tokenizer([(b"ab", b"c")]), ValueError, "merge 0"),
    "equal names": (lambda: Tokenizer([], ["[A]", "[A]"]), ValueError, "different names"),
    "an empty name": (lambda: Tokenizer([], [""]), ValueError, "none empty"),
    "one bare name": (lambda: Tokenizer([], "[A]"), TypeError, "hand in [name]"),
    "a name that is no text": (lambda: Tokenizer([], [3]), ValueError, "different names"),
    "half a character as a name": (lambda: Tokenizer([], ["\ud800"]), ValueError, "surrogate"),
    "a merge of three": (lambda: Tokenizer([(b"a", b"b", b"c")]), ValueError, "merge 0"),
    "a merge that is a number": (lambda: Tokenizer([3]), ValueError, "merge 0 is 3"),
    "merges of text": (lambda: Tokenizer([("a", "b")]), ValueError, "two pieces of bytes"),
    "a missing text": (lambda: train_bpe(["a", None], 300), TypeError, "text is None"),
    "a fraction as a token": (lambda: SMALL.decode([1.7]), TypeError, "a token is 1.7"),
    "a fraction in an array": (lambda: SMALL.decode(np.array([1.0])), TypeError, "a token is 1.0"),
    "letters as tokens": (lambda: SMALL.decode("12"), TypeError, "a token is '1'"),
    "a table of tokens": (
        lambda: SMALL.decode(torch.ones(2, 2).long()),
        ValueError,
        "ids has shape (2, 2)",
    ),
    "one token": (lambda: SMALL.decode(3), TypeError, "ids is 3"),
    "text as a token": (lambda: show_token("a"), TypeError, "token is 'a'"),
    "no counts": (lambda: find_merges({"a": 1.5}, 300), TypeError, "the count of 'a' is 1.5"),
    "no words": (lambda: find_merges({3: 1}, 300), TypeError, "counts hold 3; expected words"),
    "fewer than the bytes": (lambda: find_merges({"a": 1}, 255), ValueError, "from 256 on"),
}


@pytest.mark.parametrize("call, kind, word", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, word):
    with pytest.raises(kind) as error:
        call()
    assert word in str(error.value) and len(str(error.value)) < 250
