"Byte-level BPE: any Unicode round-trips, equal to the library tokenizers in training and use, and bad input in one sentence"
import json
import pickle
import unicodedata
from collections import Counter

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from foundation.data.tokenizer import SPECIAL, Tokenizer, find_merges, show_token, split_words, train_bpe

few = settings(max_examples=60, deadline=None)
TEXTS = ["the cat sat on the mat", "a mat for the cat's naïve café", "那只猫 坐在 那只垫子上", "1234 12 123 the the", "aaaa aaaaaaa aaa", "\n\n  the   cat"] * 3
SMALL = train_bpe(TEXTS, 300)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
old = unicodedata.ucd_3_2_0  # letters that every version of Unicode knows, in the same category
known_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: old.category(c) == unicodedata.category(c)), max_size=60)
english = st.lists(st.text("abc '12.\n", max_size=30), min_size=1, max_size=8)


@few
@given(unicode_text)
def test_any_unicode_comes_back(text):
    assert "".join(split_words(text)) == text
    for tokenizer in (SMALL, Tokenizer([]), Tokenizer([], special=())):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(len(tokenizer.special) <= n < tokenizer.vocab_size for n in ids)


@few
@given(known_text)
def test_the_same_numbers_as_the_library(text):
    assert SMALL.fast().encode(text).ids == SMALL.encode(text)
    assert [piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)] == [show_token(w.encode()) for w in split_words(text)]


def library(texts, size):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL),
                                                                   initial_alphabet=ByteLevel.alphabet(), show_progress=False))
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
@given(st.dictionaries(st.text("abcde", min_size=1, max_size=9), st.integers(1, 9), min_size=1, max_size=12), st.integers(256, 290))
def test_quick_counts_are_slow_counts(counts, size):
    assert find_merges(counts, size) == slow_merges(counts, size)


def test_special_tokens():
    pad, cls, mask = (SMALL.special[name] for name in ("[PAD]", "[CLS]", "[MASK]"))
    assert pad == 0 and list(SMALL.special) == list(SPECIAL)
    assert mask not in SMALL.encode("the [MASK]")
    ids = SMALL.encode("[CLS]the [MASK] cat", special=True)
    assert ids[0] == cls and mask in ids
    assert SMALL.decode(ids) == "[CLS]the [MASK] cat" and SMALL.decode(ids, special=False) == "the  cat"
    assert SMALL.decode(torch.tensor(ids)) == SMALL.decode(ids)
    assert SMALL.fast().encode("[CLS]the [MASK] cat").ids == ids


def test_half_a_character_is_shown_as_such():
    ids = SMALL.encode("狐")
    assert SMALL.decode(ids[:1]) == "\ufffd" and SMALL.decode([]) == ""


def test_saved_and_loaded(tmp_path):
    path = SMALL.save(tmp_path / "deep" / "tokenizer.json")
    again = Tokenizer.load(path)
    assert (again.merges, again.special, again.vocab_size) == (SMALL.merges, SMALL.special, SMALL.vocab_size)
    assert json.loads(tokenizers.Tokenizer.from_file(str(path)).to_str()) == json.loads(path.read_text())
    assert pickle.loads(pickle.dumps(SMALL)).encode("the cat") == SMALL.encode("the cat")


@pytest.mark.parametrize("change", [
    lambda d: d["model"].update(type="WordPiece"), lambda d: d["model"]["merges"].pop(0), lambda d: d.update(normalizer={"type": "NFC"}),
    lambda d: d["pre_tokenizer"].update(add_prefix_space=True), lambda d: d.pop("model"), lambda d: d["model"]["merges"][0].append("x"),
])
def test_another_kind_of_file_is_refused(tmp_path, change):
    path = SMALL.save(tmp_path / "t.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="t.json is no byte-level BPE"):
        Tokenizer.load(path)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("no")
    with pytest.raises(ValueError, match="t.json is no byte-level BPE"):
        Tokenizer.load(tmp_path / "t.json")


BAD = {
    "one bare text": (lambda: train_bpe("text", 300), TypeError, "hand in [text]"),
    "bytes": (lambda: train_bpe([b"text"], 300), TypeError, "decode"),
    "no text": (lambda: train_bpe([], 300), ValueError, "nothing to learn"),
    "empty texts": (lambda: train_bpe(["", ""], 300), ValueError, "nothing to learn"),
    "too few tokens": (lambda: train_bpe(["a"], 260), ValueError, "261 at least"),
    "a number": (lambda: SMALL.encode(3), TypeError, "int"),
    "a special number": (lambda: SMALL.encode(3, special=True), TypeError, "int"),
    "half a character": (lambda: SMALL.encode("a\ud800"), ValueError, "surrogate"),
    "training on half a character": (lambda: train_bpe(["a\ud800"], 300), ValueError, "surrogate"),
    "a token too high": (lambda: SMALL.decode([SMALL.vocab_size]), ValueError, "expected numbers from 0"),
    "a token below 0": (lambda: SMALL.decode([-1]), ValueError, "got the token -1"),
    "a merge of nothing": (lambda: Tokenizer([(b"ab", b"c")]), ValueError, "merge 0"),
    "equal names": (lambda: Tokenizer([], ["[A]", "[A]"]), ValueError, "different names"),
    "an empty name": (lambda: Tokenizer([], [""]), ValueError, "none of them empty"),
}


@pytest.mark.parametrize("call, kind, word", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(call, kind, word):
    with pytest.raises(kind) as error:
        call()
    assert word in str(error.value) and len(str(error.value)) < 250
