"Texts with models and tokenizers of transformers: masked pretraining, fine-tuning, distillation"

import copy

import pytest
import torch
from torch import nn

from foundation.core.checks import complaint
from foundation.core.modules import logits_of
from foundation.data.batches import pad
from foundation.data.tasks import encoder_of
from foundation.data.text_tasks import (
    as_tokenizer,
    find_words,
    own_text_task,
    padding_id,
    text_set,
)
from foundation.data.tokenizer import Tokenizer, train_bpe
from foundation.evaluation.scores import accuracy, predict
from foundation.models.bert import BERT
from foundation.models.heads import Classifier, TextClassifier
from foundation.models.outside import as_encoder, guess_words, text_sizes
from foundation.pretraining.masked_text import (
    encode_documents,
    fill_mask,
    mask_tokens,
    masked_accuracy,
    masked_stream,
    masked_tokens,
    pretrain,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

GOOD, BAD = "lovely warm funny bright".split(), "dull cold bland grim".split()
THINGS = "film play song book".split()
TEXTS = [f"a {how} {what}" for how in GOOD + BAD for what in THINGS]
LABELS = [how in GOOD for how in GOOD + BAD for _ in THINGS]
LABELS = ["good" if good else "bad" for good in LABELS]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
MARKS = "unk cls sep pad mask".split()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wrapped(library, names):
    "With the marks that BERT puts around a text"
    first, last = names["cls"], names["sep"]
    pairs = [(first, library.token_to_id(first)), (last, library.token_to_id(last))]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=pairs
    )
    more = {f"{role}_token": names[role] for role in MARKS}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **more)


def words_with_marks_last():
    "A word level tokenizer: its special tokens have the largest numbers, above the words"
    words = sorted({word for text in TEXTS for word in text.split()})
    names = {role: f"<{role}>" for role in MARKS}
    known = {word: n for n, word in enumerate([*words, *names.values()])}
    model = tokenizers.models.WordLevel(known, unk_token="<unk>")
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return wrapped(library, names)


def pieces_with_marks_first():
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {role: f"[{role.upper()}]" for role in MARKS}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=list(names.values()), show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return wrapped(library, names)


def ours():
    return train_bpe(TEXTS, 300)


TOKENIZERS = [words_with_marks_last, pieces_with_marks_first, ours]
theirs = pytest.mark.parametrize("make", TOKENIZERS[:2], ids=lambda make: make.__name__)
every = pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)


def config(kind, tokenizer, initializer_range=0.2, **more):
    more |= dict(initializer_range=initializer_range)
    size, pad_id = as_tokenizer(tokenizer).vocab_size, padding_id(tokenizer)
    plain = dict(vocab_size=size, pad_token_id=pad_id, max_position_embeddings=64, **more)
    if kind == "DistilBert":
        plain |= dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    else:
        plain |= SIZES
    return getattr(transformers, f"{kind}Config")(**plain)


def guesser(kind, tokenizer, **more):
    return getattr(transformers, f"{kind}ForMaskedLM")(config(kind, tokenizer, **more))


def classifier(kind, tokenizer):
    net = getattr(transformers, f"{kind}ForSequenceClassification")
    return net(config(kind, tokenizer, num_labels=2))


KINDS = ["Bert", "DistilBert", "Roberta"]
kinds = pytest.mark.parametrize("kind", KINDS)


# Tokenizers ---------------------------------------------------------------------------------------


@theirs
def test_a_tokenizer_says_what_its_library_says(make):
    tokenizer = make()
    asked = as_tokenizer(tokenizer)
    assert as_tokenizer(asked) is asked
    assert asked.vocab_size == len(tokenizer)
    assert {*asked.special.values()} == {*tokenizer.all_special_ids}
    for ours_, role in (("[PAD]", "pad"), ("[CLS]", "cls"), ("[SEP]", "sep"), ("[MASK]", "mask")):
        assert asked.special[ours_] == getattr(tokenizer, f"{role}_token_id")
    for text in TEXTS[:5]:
        assert asked.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert encoder_of(tokenizer)(TEXTS) == tokenizer(TEXTS)["input_ids"]
    assert encoder_of(asked)(TEXTS) == tokenizer(TEXTS)["input_ids"]
    numbers = torch.arange(len(tokenizer))
    special = tokenizer.get_special_tokens_mask(numbers.tolist(), already_has_special_tokens=True)
    assert torch.equal(find_words(tokenizer)(numbers), ~torch.tensor(special).bool())


@theirs
def test_the_library_beneath_says_the_same(make):
    tokenizer = make()
    beneath = tokenizer.backend_tokenizer
    assert encoder_of(beneath)(TEXTS) == encoder_of(tokenizer)(TEXTS)
    assert as_tokenizer(beneath).encode(TEXTS[0]) == as_tokenizer(tokenizer).encode(TEXTS[0])


@every
def test_documents_are_texts_between_two_marks(make):
    tokenizer = make()
    documents = encode_documents(TEXTS, tokenizer)
    if make is not ours:
        assert [row.tolist() for row in documents[:]] == tokenizer(TEXTS)["input_ids"]
    assert len(documents) == len(TEXTS)


def test_tokenizers_that_lack_something_are_told():
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_with_marks_last().backend_tokenizer, unk_token="<unk>"
    )
    assert "pad_token = tokenizer.eos_token" in complaint(padding_id, bare)
    assert "expected [CLS] too" in complaint(encode_documents, TEXTS, bare)
    assert "expected ours, or one of" in complaint(as_tokenizer, "bert-base-uncased")


# Masked text --------------------------------------------------------------------------------------


@every
def test_only_words_are_hidden_and_drawn(make):
    tokenizer = make()
    is_word, documents = find_words(tokenizer), encode_documents(TEXTS, tokenizer)
    mark = as_tokenizer(tokenizer).special["[MASK]"]
    stream = masked_stream(documents, tokenizer, context=16, batch_size=8, ratio=0.4)
    for _ in range(20):
        inputs, _, places, targets = next(stream)
        assert is_word(targets).all()
        shown = inputs[places]
        assert (is_word(shown) | (shown == mark)).all()


def test_words_from_a_list_are_those_from_a_first_one():
    tokens = torch.randint(5, 50, (20, 30))
    plan = dict(mask_id=3, vocab_size=50)
    draws = [
        mask_tokens(tokens, tokens >= 5, **plan, **more, generator=torch.manual_seed(1))
        for more in (dict(first_word=5), dict(words=torch.arange(5, 50)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*draws))


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_that_of_transformers_for_the_same_batch(kind, attention):
    "Each row one text, so that a padding mask says the same as ours of documents"
    tokenizer = words_with_marks_last()
    model = guesser(kind, tokenizer).eval()
    model.set_attn_implementation(attention)
    tokens, real = pad(tokenizer(TEXTS[:6] + ["film"])["input_ids"], tokenizer.pad_token_id)
    rule = dict(mask_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), ratio=0.5)
    inputs, places = mask_tokens(tokens, find_words(tokenizer)(tokens), **rule)
    places[-1, 1] = True  # in the padded row
    look = real[:, None, None] & real[:, None, :, None] | torch.eye(tokens.shape[1]).bool()
    labels = tokens.masked_fill(~places, -100)
    want = model(input_ids=inputs, attention_mask=real.long(), labels=labels).loss
    loss, _ = masked_tokens(model, (inputs, look, places, tokens[places]))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    all_seen, _ = masked_tokens(model, (inputs, look | True, places, tokens[places]))
    assert abs(all_seen - want) > 1e-5  # the mask is heard


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_row_do_not_see_each_other(kind, attention):
    tokenizer = words_with_marks_last()
    model = guesser(kind, tokenizer).eval()
    model.set_attn_implementation(attention)
    tokens = torch.tensor(tokenizer(TEXTS[:2])["input_ids"]).flatten()[None]
    owner = torch.tensor([0] * 5 + [1] * 5)[None]
    mask, places = owner[:, None, :, None] == owner[:, None, None], owner == 0
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % 13
    same = guess_words(model, tokens, mask, places), guess_words(model, other, mask, places)
    torch.testing.assert_close(*same)


@kinds
def test_masked_pretraining_learns(kind):
    tokenizer = words_with_marks_last()
    model, documents = guesser(kind, tokenizer), encode_documents(TEXTS, tokenizer)
    plan = dict(steps=60, batch_size=2, lr=3e-3, ratio=0.3, precision="fp32", title="")
    run = pretrain(model, documents, tokenizer, **plan)
    assert run.losses[-10:].mean() < 0.75 * run.losses[:5].mean()
    assert masked_accuracy(model, documents, tokenizer, ratio=0.3, steps=4) > 0.15
    [first] = fill_mask(model, tokenizer, "a [MASK] film", count=3)
    assert len(first) == 3 and sum(first.values()) <= 1
    assert text_sizes(model) == (
        len(tokenizer),
        64 if kind != "Roberta" else 64 - padding_id(tokenizer) - 1,
    )


def test_our_bert_learns_with_their_tokenizer():
    tokenizer = words_with_marks_last()
    model = BERT(len(tokenizer), context=32, dim=32, depth=1, heads=2)
    documents = encode_documents(TEXTS, tokenizer)
    plan = dict(steps=60, batch_size=4, lr=3e-3, ratio=0.3, precision="fp32", title="")
    losses = pretrain(model, documents, tokenizer, **plan).losses
    assert losses[-10:].mean() < 0.75 * losses[:5].mean()


def test_what_guesses_no_words_is_told():
    tokenizer = words_with_marks_last()
    documents = encode_documents(TEXTS, tokenizer)
    plan = dict(steps=1, batch_size=1, title="")
    for model in (transformers.BertModel(config("Bert", tokenizer)), classifier("Bert", tokenizer)):
        assert "ForMaskedLM" in complaint(pretrain, model, documents, tokenizer, **plan)
    small = guesser("Bert", pieces_with_marks_first())
    small.config.vocab_size = 5
    assert "the model knows 5 tokens" in complaint(pretrain, small, documents, tokenizer, **plan)
    assert "`vocab_size`" in complaint(text_sizes, nn.Linear(2, 2))
