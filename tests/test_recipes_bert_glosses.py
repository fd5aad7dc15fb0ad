"The recipe of bert_glosses: its task and arms, its card, and what the shipped file is worth"

import json

import pytest
import torch

import foundation.recipes.bert_glosses as recipe
from foundation.data.batches import join
from foundation.data.sources import DataUnavailable
from foundation.data.tasks import Task
from foundation.data.text import _key, glosses, split_texts
from foundation.data.tokenizer import Tokenizer, train_bpe
from foundation.models.bert import BERT
from foundation.models.card import WEIGHTS, read_card
from foundation.models.pretrained import load_weights
from foundation.pretraining.masked_text import encode_documents, fill_mask, masked_accuracy
from foundation.recipes.bert_glosses import (
    compare_features,
    count_words,
    counting_arm,
    definition_task,
)
from foundation.recipes.few_labels import probe_arm

TEXTS = [
    "a large group of animals",
    "the state of being happy",
    "a small tree of the north",
    "cause to become hard",
] * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return encode_documents(TEXTS, tokenizer)


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.load(WEIGHTS / "bert_glosses.tokenizer.json")


def small(tokenizer, context=16):
    torch.manual_seed(0)
    sizes = dict(context=context, dim=16, depth=2, heads=2, segments=0)
    return BERT(tokenizer.vocab_size, **sizes)


def task_of(texts, tokens=None, labels=None):
    n = len(texts)
    tokens = torch.arange(n)[:, None] if tokens is None else tokens
    labels = torch.arange(n) % 2 if labels is None else labels
    parts = torch.arange(n).split([n // 2, n // 4, n - n // 2 - n // 4])
    return Task(tokens, labels, ("a", "b"), *parts, tuple(texts))


# The arms -----------------------------------------------------------------------------------------


def test_a_probe_arm_finds_what_is_there():
    task = task_of(["x"] * 400)
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    told = noise + 3 * task.labels[:, None]
    assert probe_arm(task, told.__getitem__)(50, 0, 0.1, "test") > 0.95
    assert probe_arm(task, noise.__getitem__)(50, 0, 0.1, "test") < 0.7


def test_counting_words_sees_the_words_and_nothing_of_the_test():
    texts = []
    for i in range(400):
        texts.append(f"{'animal' if i % 2 else 'plant'} of the {'north' if i % 3 else 'south'}")
    task = task_of(texts)
    counts = count_words(task)
    assert counts.shape[0] == 400 and counting_arm(counts, task)(50, 0, 10.0, "test") > 0.95
    blank = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(0))
    assert counting_arm(counts, task_of(texts, labels=blank))(50, 0, 10.0, "test") < 0.7
    alone = count_words(task_of(texts[:-1] + ["a new word"]))
    assert (alone[:-1] != counts[:-1]).nnz == 0
    assert alone[-1].nnz == 0  # words of the test are not counted


def test_a_table_without_a_row_for_each_text_is_refused():
    with pytest.raises(ValueError, match=r"expected \(8, words\)"):
        counting_arm(None, task_of(["x"] * 8))


@pytest.mark.parametrize(
    "sizes, says",
    [
        (dict(pool=10**6), "asked for 1000000 . 500 texts to learn from and 1000 to judge"),
        (dict(test=0), "test is 0"),
    ],
)
def test_more_texts_than_there_are_cannot_be_asked_for(shipped, sizes, says):
    real_glosses("noun")
    with pytest.raises(ValueError, match=says):
        definition_task(shipped, **sizes)


def test_all_arms_are_compared(tokenizer, documents, monkeypatch):
    tokens = torch.nn.utils.rnn.pad_sequence([*documents[:40]], batch_first=True)
    task = task_of(TEXTS[:40], tokens)
    monkeypatch.setattr(recipe, "load_minilm", lambda: ())
    monkeypatch.setattr(recipe, "embed_texts", lambda texts: torch.randn(len(texts), 4))
    monkeypatch.setattr(recipe, "knn_accuracy", lambda *parts: 0.5)
    found = compare_features(small(tokenizer), task, counts=(16,), seeds=range(2))
    assert set(found["knn"]) == {"TF-IDF", "random weights", "BERT", "MiniLM"}
    assert list(found["curve"][16]) == list(recipe.CHOICES)
    assert all(len(scores) == 2 for scores in found["curve"][16].values())


# The file -----------------------------------------------------------------------------------------


def test_the_recipe_writes_weights_tokenizer_and_card(tokenizer, documents, tmp_path, monkeypatch):
    def tiny(vocab_size, context, segments):
        return small(tokenizer, context=context)

    documents = join([*documents] * 60)
    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(recipe, "gloss_corpus", lambda: (tokenizer, documents, documents))
    monkeypatch.setattr(recipe, "definition_task", lambda tokenizer: None)
    monkeypatch.setattr(recipe, "BERT", tiny)
    judged = dict(knn={}, curve={50: {"a": [0.5]}})
    monkeypatch.setattr(recipe, "compare_features", lambda model, task: judged)
    path = recipe.make("net", epochs=1, folder=tmp_path)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["steps"] == len(documents.tokens) // (64 * 128) == len(card["losses"]) > 0
    assert {"knn", "curve", "masked_accuracy", "unigram_accuracy"} <= card["metrics"].keys()
    again = Tokenizer.load(tmp_path / "net.tokenizer.json")
    net = load_weights("net", small(tokenizer, context=64), folder=tmp_path)
    kept = card["metrics"]["masked_accuracy"]
    assert masked_accuracy(net, documents, again) == pytest.approx(kept, abs=0.02)


# Real glosses -------------------------------------------------------------------------------------


def real_glosses(*parts):
    try:
        return glosses(parts)
    except DataUnavailable as error:
        pytest.skip(f"the glosses are not here: {error}")


def test_no_text_to_be_classified_was_pretrained_on(shipped):
    everything = real_glosses("noun", "verb", "adjective", "adverb")
    trained, _ = split_texts(everything, 0.1)  # what gloss_corpus trains on
    seen, task = {_key(text) for text in trained.texts}, definition_task(shipped)

    def overlap(index):
        return sum(_key(task.texts[i]) in seen for i in index.tolist())

    assert overlap(task.test) == 0 and len(task.test) == 1000
    assert overlap(task.pool) == len(
        task.pool
    )  # the check can fail: labels are drawn from texts that were trained on

    def texts(index):
        return {task.texts[i] for i in index.tolist()}

    assert not texts(task.pool) & texts(task.dev) and not texts(task.dev) & texts(task.test)
    broken, _ = split_texts(
        everything, 0.1, seed=1
    )  # another seed for pretraining, and the test texts are in it
    leaked = {_key(text) for text in broken.texts}
    assert sum(_key(task.texts[i]) in leaked for i in task.test.tolist()) > 800
    assert len(torch.unique(task.labels)) == 25


def test_the_shipped_weights_are_worth_their_card():
    if not (WEIGHTS / "bert_glosses.safetensors").exists():
        pytest.skip("the weights are not made yet: make weights")
    held = split_texts(real_glosses("noun"), 0.1)[1]
    model, card, tokenizer = (
        load_weights("bert_glosses"),
        read_card("bert_glosses"),
        Tokenizer.load(WEIGHTS / "bert_glosses.tokenizer.json"),
    )
    found = masked_accuracy(model, encode_documents(held.texts, tokenizer), tokenizer, steps=10)
    assert found >= 3 * card["metrics"]["unigram_accuracy"] and found == pytest.approx(
        card["metrics"]["masked_accuracy"], abs=0.05
    )
    assert (
        next(iter(fill_mask(model, tokenizer, "the capital and largest [MASK] of Spain")[0]))
        == " city"
    )
    assert (WEIGHTS / "bert_glosses.safetensors").stat().st_size < 6e6
    assert set(card["metrics"]["curve"]) == {"50", "100", "500", "1000"}
    assert all(
        len(scores) >= 3 for arms in card["metrics"]["curve"].values() for scores in arms.values()
    )
