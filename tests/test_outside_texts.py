"Texts with models and tokenizers of transformers: masked pretraining, fine-tuning, distillation"

import copy
import math

import pytest
import torch
from torch import nn

from foundation.compression.distillation import distil, match_teacher
from foundation.core.checks import complaint
from foundation.core.modules import head_of, logits_of
from foundation.data.augment import Augment
from foundation.data.batches import pad
from foundation.data.tasks import encoder_of
from foundation.data.text_tasks import (
    as_tokenizer,
    find_words,
    own_text_task,
    padding_id,
    text_set,
)
from foundation.data.tokenizer import train_bpe
from foundation.evaluation.scores import accuracy, predict
from foundation.finetuning.epochs import evaluate, train_epoch
from foundation.finetuning.loop import finetune
from foundation.finetuning.rate_search import range_test
from foundation.models.bert import BERT
from foundation.models.heads import Classifier, TextClassifier
from foundation.models.outside import as_encoder, guess_words, text_sizes
from foundation.objectives.divergence import distillation_loss
from foundation.pretraining.masked_text import (
    encode_documents,
    fill_mask,
    mask_tokens,
    masked_accuracy,
    masked_stream,
    masked_tokens,
    pretrain,
)
from foundation.training.loop import classify, train
from foundation.training.parameter_groups import layer_groups

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
        plain |= dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0)
        plain |= dict(attention_dropout=0.0, seq_classif_dropout=0.0)
    else:
        plain |= SIZES | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return getattr(transformers, f"{kind}Config")(**plain)


def guesser(kind, tokenizer, **more):
    return getattr(transformers, f"{kind}ForMaskedLM")(config(kind, tokenizer, **more))


def classifier(kind, tokenizer):
    net = getattr(transformers, f"{kind}ForSequenceClassification")
    return net(config(kind, tokenizer, 0.1, num_labels=2))


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
    documents = encode_documents(TEXTS, tokenizer)
    marks = [*range(5)] if make is ours else tokenizer.all_special_ids

    def is_word(tokens):
        return ~torch.isin(tokens, torch.tensor(marks))

    mark = as_tokenizer(tokenizer).special["[MASK]"]
    stream = masked_stream(documents, tokenizer, context=16, batch_size=8, ratio=0.4)
    for _ in range(20):
        inputs, _, positions, targets = next(stream)
        assert is_word(targets).all()
        shown = inputs[positions]
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
    inputs, positions = mask_tokens(tokens, find_words(tokenizer)(tokens), **rule)
    positions[-1, 1] = True  # in the padded row
    look = real[:, None, None] & real[:, None, :, None] | torch.eye(tokens.shape[1]).bool()
    labels = tokens.masked_fill(~positions, -100)
    want = model(input_ids=inputs, attention_mask=real.long(), labels=labels).loss
    loss, _ = masked_tokens(model, (inputs, look, positions, tokens[positions]))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    all_seen, _ = masked_tokens(model, (inputs, look | True, positions, tokens[positions]))
    assert abs(all_seen - want) > 1e-5  # the mask is heard


@kinds
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_row_do_not_see_each_other(kind, attention):
    tokenizer = words_with_marks_last()
    model = guesser(kind, tokenizer).eval()
    model.set_attn_implementation(attention)
    tokens = torch.tensor(tokenizer(TEXTS[:2])["input_ids"]).flatten()[None]
    owner = torch.tensor([0] * 5 + [1] * 5)[None]
    mask, positions = owner[:, None, :, None] == owner[:, None, None], owner == 0
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % 13
    same = guess_words(model, tokens, mask, positions), guess_words(model, other, mask, positions)
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


# Classifiers --------------------------------------------------------------------------------------


def task_of(tokenizer):
    return own_text_task(text_set(TEXTS, LABELS), tokenizer, test=0.25, seed=1)


def mean_of_theirs(tokenizer):
    return TextClassifier(as_encoder(transformers.BertModel(config("Bert", tokenizer))), 2)


def mean_of_ours(tokenizer):
    padding = padding_id(tokenizer)
    size = as_tokenizer(tokenizer).vocab_size
    return TextClassifier(BERT(size, context=32, dim=32, depth=1, heads=2), 2, padding)


def gpt2(tokenizer):
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=32)
    special = dict(pad_token_id=tokenizer.pad_token_id, num_labels=2)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **special)
    return transformers.GPT2ForSequenceClassification(config)


MODELS = {kind: lambda tokenizer, kind=kind: classifier(kind, tokenizer) for kind in KINDS}
MODELS |= dict(GPT2=gpt2, mean_of_theirs=mean_of_theirs, mean_of_ours=mean_of_ours)
models = pytest.mark.parametrize("name", MODELS)


@models
def test_finetuning_learns_texts(name):
    tokenizer = words_with_marks_last()
    task, model = task_of(tokenizer), MODELS[name](tokenizer)
    plan = dict(steps=60, batch_size=12, lr=2e-3, head_lr=2e-3)
    losses = finetune(model, *task.read(task.pool), None, **plan)
    assert losses[-5:].mean() < 0.3
    tokens, labels = task.read(task.test)
    assert accuracy(predict(model, tokens), labels) > 0.8
    assert (
        finetune(model, *task.read(task.pool), None, steps=4, lr=1e-3, gradual=True)
        .isfinite()
        .all()
    )


@models
def test_a_frozen_body_of_a_text_model_stays(name):
    tokenizer = words_with_marks_last()
    task, model = task_of(tokenizer), MODELS[name](tokenizer)
    head, before = head_of(model)[0], {k: v.clone() for k, v in model.state_dict().items()}
    finetune(model, *task.read(task.pool), None, steps=3, batch_size=8, lr=0.0, head_lr=1e-2)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(key.startswith(f"{head}.") for key in moved)


def test_a_step_of_finetuning_is_that_of_transformers():
    "One step at rates above 0 of the loss that the model computes itself"
    tokenizer = words_with_marks_last()
    task, model = task_of(tokenizer), classifier("DistilBert", tokenizer).eval()
    tokens, labels = task.read(task.pool)
    want = model(tokens, attention_mask=(tokens != tokenizer.pad_token_id).long(), labels=labels)
    torch.testing.assert_close(classify(model, (tokens, labels))[0], want.loss)
    losses = finetune(model, tokens, labels, None, steps=1, batch_size=len(tokens), lr=1e-3)
    torch.testing.assert_close(losses[0], want.loss.detach(), rtol=5e-3, atol=0)  # 16 bits


@models
def test_an_epoch_of_texts_of_several_lengths(name):
    tokenizer = words_with_marks_last()
    model, rows = MODELS[name](tokenizer), tokenizer([*TEXTS[:14], "film", "a"])["input_ids"]
    examples = [{"input_ids": row, "label": i % 2} for i, row in enumerate(rows)]
    opt = torch.optim.AdamW(layer_groups(model, 1e-3))
    assert math.isfinite(train_epoch(model, examples, 5, opt))
    alone = [evaluate(model, [example], 1) for example in examples]
    assert evaluate(model, examples, 16) == sum(alone) / 16
    found = range_test(
        model, [next(iter(batches(examples, model)))] * 20, classify, opt, steps=20, hi=0.1
    )
    assert len(found.losses) > 2


def batches(examples, model):
    rows, real = pad([example["input_ids"] for example in examples], padding_of(model))
    yield rows, torch.tensor([example["label"] for example in examples])


def padding_of(model):
    config = getattr(model, "config", None)
    return model.padding if config is None else config.pad_token_id


@models
def test_padding_changes_nothing(name):
    "A padded batch gives what each text gives alone; one token, int32, more padding"
    tokenizer = words_with_marks_last()
    model = MODELS[name](tokenizer).eval()
    rows = tokenizer([*TEXTS[:5], "film", TEXTS[3]])["input_ids"] + [[3]]
    tokens, _ = pad(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        together = logits_of(model, tokens)
        alone = torch.cat([logits_of(model, torch.tensor([row])) for row in rows])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits_of(model, tokens.int()), together)
        more = nn.functional.pad(tokens, (0, 3), value=tokenizer.pad_token_id)
        torch.testing.assert_close(logits_of(model, more), together, rtol=1e-4, atol=1e-5)
        assert torch.equal(together[3].argmax(), together[6].argmax())
        empty = torch.full((2, 4), tokenizer.pad_token_id)
        assert logits_of(model, empty).isfinite().all()
        half = copy.deepcopy(model).bfloat16()
        torch.testing.assert_close(logits_of(half, tokens).float(), together, rtol=0.2, atol=0.2)


@kinds
def test_the_loss_of_an_epoch_is_the_mean_of_its_texts(kind):
    tokenizer = words_with_marks_last()
    model, rows = classifier(kind, tokenizer), tokenizer([*TEXTS[:6], "film", "a"])["input_ids"]
    examples = [{"input_ids": row, "label": i % 2} for i, row in enumerate(rows)]
    alone = [
        classify(model, (torch.tensor([row]), torch.tensor([i % 2])))[0].item()
        for i, row in enumerate(rows)
    ]
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    assert abs(train_epoch(model, examples, 8, still) - sum(alone) / 8) < 1e-5


@kinds
def test_padding_on_the_left_is_read_as_transformers_reads_it(kind):
    tokenizer = words_with_marks_last()
    tokenizer.padding_side = "left"
    model = classifier(kind, tokenizer).eval()
    both = tokenizer([TEXTS[0], "film"], padding=True, return_tensors="pt")
    want = model(both["input_ids"], attention_mask=both["attention_mask"]).logits
    torch.testing.assert_close(logits_of(model, both["input_ids"]), want)


def test_what_does_not_fit_texts_is_told():
    tokenizer = words_with_marks_last()
    task, bert = task_of(tokenizer), transformers.BertModel(config("Bert", tokenizer))
    data, plan = task.read(task.pool), dict(steps=1, lr=1e-3)
    assert "TextClassifier" in complaint(
        finetune, Classifier(as_encoder(bert), 2), *data, None, **plan
    )
    said = complaint(finetune, classifier("Bert", tokenizer), *data, Augment(), **plan)
    assert "augment=None" in said
    pictures = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    assert "augment" in complaint(
        finetune, mean_of_ours(tokenizer), pictures, data[1][:8], None, **plan
    )
    bare = gpt2(tokenizer)
    bare.config.pad_token_id = None
    rows = [{"input_ids": [1, 2], "label": 0}, {"input_ids": [3], "label": 1}]
    assert "pad_token_id" in complaint(evaluate, bare, rows, 2)


def test_a_set_of_texts_is_learnt_from_as_its_tensors_are():
    tokenizer = words_with_marks_last()
    task, a = task_of(tokenizer), mean_of_ours(tokenizer)
    b, data, plan = copy.deepcopy(a), task.read(task.pool), dict(steps=4, lr=1e-3, batch_size=8)
    pairs = torch.utils.data.TensorDataset(*data)
    want = finetune(a, *data, None, **plan)
    torch.testing.assert_close(finetune(b, pairs, None, None, **plan), want)


# Tasks --------------------------------------------------------------------------------------------


@every
def test_parts_have_like_shares_and_share_no_text(make):
    data = text_set(TEXTS * 2 + ["A Lovely  FILM"], LABELS * 2 + ["good"])
    task = own_text_task(data, make(), dev=0.2, test=0.25, seed=3)
    sides = [{data.groups[i] for i in task.part(name)} for name in ("pool", "dev", "test")]
    assert len(set.union(*sides)) == sum(map(len, sides)) == len(TEXTS)
    for name, share in dict(pool=0.55, dev=0.2, test=0.25).items():
        shares = task.labels[task.part(name)].bincount() / data.labels.bincount()
        assert ((shares - share).abs() < 0.08).all()
    again = own_text_task(data, make(), dev=0.2, test=0.25, seed=3)
    other = own_text_task(data, make(), dev=0.2, test=0.25, seed=4)
    assert torch.equal(task.test, again.test) and not torch.equal(task.test, other.test)
    assert task.labels[task.draw(6, seed=0)].bincount().tolist() == [3, 3]


def test_tasks_that_cannot_be_are_told():
    said = complaint(own_text_task, text_set(["a", "b"], [0, 1]), ours())
    assert "0 has 1 different texts" in said
    assert "dev" in complaint(own_text_task, text_set(TEXTS, LABELS), ours(), dev=1.5)
    tokens = own_text_task(text_set(TEXTS, LABELS), pieces_with_marks_first(), longest=4).inputs
    assert tokens.shape[1] == 4 and (tokens[:, -1] == 2).sum() > 0  # [SEP] stays
    assert "text 1 is ''" in complaint(text_set, ["a", ""], [0, 1])
    assert "label 0 is None" in complaint(text_set, ["a"], [None])
    assert "2 texts and 1 labels" in complaint(text_set, ["a", "b"], [0])


# Distillation -------------------------------------------------------------------------------------


PAIRS = [("Bert", "DistilBert"), ("Roberta", "mean_of_ours"), ("mean_of_theirs", "GPT2")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_text_model_teaches_another(pair):
    tokenizer = words_with_marks_last()
    task = task_of(tokenizer)
    teacher, student = (MODELS[name](tokenizer) for name in pair)
    tokens, labels = task.read(task.pool)
    finetune(teacher, tokens, labels, None, steps=40, batch_size=12, lr=2e-3, head_lr=2e-3)
    told = predict(teacher, tokens)
    loss, _ = match_teacher(teacher)(student.eval(), tokens)  # a batch without labels
    torch.testing.assert_close(
        loss, distillation_loss(logits_of(student, tokens), told, 2.0), rtol=1e-4, atol=1e-5
    )
    run = distil(student, tokens, told, steps=60, batch_size=12, title="")
    assert run.losses[-5:].mean() < 0.2 * run.losses[0]
    agreed = accuracy(predict(student, tokens), predict(teacher, tokens).argmax(1))
    assert agreed > 0.9


def test_a_loop_takes_batches_without_labels():
    tokenizer = words_with_marks_last()
    teacher, student = classifier("Bert", tokenizer), classifier("DistilBert", tokenizer)
    tokens, _ = task_of(tokenizer).read(torch.arange(8))
    opt = torch.optim.AdamW(student.parameters(), lr=1e-3)
    run = train(student, [tokens] * 10, match_teacher(teacher), opt, steps=10)
    losses = [step.loss.item() for step in run]
    assert losses[-1] < losses[0]
