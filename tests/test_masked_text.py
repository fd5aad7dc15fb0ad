"Masked text beyond its lesson: laws, the loss of transformers, packed rows, resuming, bad input"

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.core.checks import complaint
from foundation.data.batches import join, packed, same_document
from foundation.data.tokenizer import Tokenizer, train_bpe
from foundation.models.bert import BERT, mean_tokens
from foundation.models.heads import TextClassifier
from foundation.models.pretrained import rename_bert
from foundation.pretraining.masked_text import (
    encode_documents,
    fill_mask,
    mask_tokens,
    masked_accuracy,
    masked_stream,
    masked_tokens,
    pretrain,
    unigram_accuracy,
)

TEXTS = [
    "a large group of animals",
    "the state of being happy",
    "a small tree of the north",
    "cause to become hard",
] * 30
CLOSE = dict(atol=1e-5, rtol=1e-5)
RULE = dict(mask_id=3, vocab_size=300, first_word=5)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def documents(tokenizer):
    return encode_documents(TEXTS, tokenizer)


def small(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    return BERT(
        **dict(vocab_size=tokenizer.vocab_size, context=16, dim=16, depth=2, heads=2, segments=0)
        | changes
    )


def first(documents, tokenizer, **options):
    return next(masked_stream(documents, tokenizer, **dict(context=16, batch_size=8) | options))


# The rule -----------------------------------------------------------------------------------------


def faults(rule, ratio=0.15):
    "What a masking rule gets wrong on 800,000 words and 200,000 marks; nothing for a sound one"
    tokens = torch.randint(5, 300, (1000, 1000), generator=torch.Generator().manual_seed(0))
    tokens[:, ::5] = torch.arange(200) % 5
    inputs, positions = rule(
        tokens, tokens >= 5, **RULE, ratio=ratio, generator=torch.Generator().manual_seed(1)
    )
    n, asked, shown = 800_000, int(positions.sum()), inputs[positions]

    def far(share, expected, n):
        return abs(share - expected) > 5 * (expected * (1 - expected) / n) ** 0.5

    def share(hit):
        return hit.double().mean().item()

    found = dict(
        asked=far(asked / n, ratio, n),
        masked=far(share(shown == 3), 0.8, asked),
        kept=far(share(shown == tokens[positions]), 0.1 + 0.1 / 295, asked),
        marks=bool(positions[:, ::5].any() or ((shown < 5) & (shown != 3)).any()),
        elsewhere=not torch.equal(inputs[~positions], tokens[~positions]),
    )
    return [name for name, bad in found.items() if bad]


def always_mask(tokens, can_hide, *, mask_id, ratio, generator, **_):
    positions = (torch.rand(tokens.shape, generator=generator) < ratio) & can_hide
    return tokens.masked_fill(positions, mask_id), positions


def same_luck(tokens, can_hide, *, mask_id, vocab_size, first_word, ratio, generator):
    "A classic: the number that chose the place also decides its fate"
    luck = torch.rand(tokens.shape, generator=generator)
    positions = (luck < ratio) & can_hide
    words = torch.randint(first_word, vocab_size, tokens.shape, generator=generator)
    return (
        torch.where(
            positions & (luck >= 0.9), words, tokens.masked_fill(positions & (luck < 0.8), mask_id)
        ),
        positions,
    )


@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.85])
def test_the_rule_has_its_shares(ratio):
    assert faults(mask_tokens, ratio) == []


@pytest.mark.parametrize(
    "broken, seen",
    [
        (always_mask, "masked"),
        (same_luck, "masked"),
        (lambda t, c, **o: mask_tokens(t, c | True, **o), "marks"),
        (lambda t, c, **o: mask_tokens(t, c, **o | dict(first_word=0)), "marks"),
        (lambda t, c, **o: mask_tokens(t, c, **o | dict(ratio=o["ratio"] * 0.8)), "asked"),
        (
            lambda t, c, **o: (mask_tokens(t, c, **o)[0].roll(1, 1), mask_tokens(t, c, **o)[1]),
            "elsewhere",
        ),
    ],
)
def test_broken_rules_are_seen(broken, seen):
    assert seen in faults(broken)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.floats(0.01, 0.99), st.integers(0, 10_000))
def test_the_rule_equals_a_loop(b, n, ratio, seed):
    def luck():
        return torch.Generator().manual_seed(seed)

    tokens = torch.randint(0, 300, (b, n), generator=luck())
    inputs, positions = mask_tokens(tokens, tokens >= 5, **RULE, ratio=ratio, generator=luck())
    rng = luck()
    chosen, fate = torch.rand(b, n, generator=rng), torch.rand(b, n, generator=rng)
    words = torch.randint(5, 300, (b, n), generator=rng)
    for i in range(b):
        for j in range(n):
            asked = bool(tokens[i, j] >= 5 and chosen[i, j] < ratio)
            want = 3 if fate[i, j] < 0.8 else words[i, j] if fate[i, j] >= 0.9 else tokens[i, j]
            assert positions[i, j] == asked and inputs[i, j] == (want if asked else tokens[i, j])


def test_masking_leaves_the_tokens_and_the_global_luck_alone():
    tokens = torch.randint(5, 300, (4, 50))
    before, state = tokens.clone(), torch.get_rng_state()
    mask_tokens(tokens, tokens >= 5, **RULE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens, before) and torch.equal(torch.get_rng_state(), state)


# The loss -----------------------------------------------------------------------------------------


def test_places_only_equals_all_logits_with_ignore_index(tokenizer, documents):
    model, (inputs, mask, positions, targets) = small(tokenizer), first(documents, tokenizer)
    labels = torch.full(inputs.shape, -100).masked_scatter(positions, targets)
    everything = F.cross_entropy(model(inputs, mask).transpose(1, 2), labels)
    loss, extra = masked_tokens(model, (inputs, mask, positions, targets))
    torch.testing.assert_close(loss, everything, **CLOSE)
    assert extra["right"] == (model(inputs, mask).argmax(-1) == labels)[positions].float().mean()
    mine, theirs = (torch.autograd.grad(x, [*model.parameters()]) for x in (loss, everything))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, **CLOSE)


def test_labels_of_unmasked_places_do_not_count(tokenizer, documents):
    model, (inputs, mask, positions, targets) = small(tokenizer), first(documents, tokenizer)
    logits = model(inputs, mask).transpose(1, 2)
    losses = []
    for seed in range(3):
        labels = torch.randint(
            5, tokenizer.vocab_size, inputs.shape, generator=torch.Generator().manual_seed(seed)
        )
        labels[positions] = targets
        losses.append(
            (
                F.cross_entropy(logits, labels.masked_fill(~positions, -100)),
                F.cross_entropy(logits, labels),
            )
        )
    ours, broken = zip(*losses)
    for loss in ours:
        torch.testing.assert_close(
            loss, masked_tokens(model, (inputs, mask, positions, targets))[0], **CLOSE
        )
    assert max(broken) - min(broken) > 1e-3  # a loss over all positions does depend on them


def test_the_loss_equals_that_of_transformers():
    library = pytest.importorskip("transformers")
    config = library.BertConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=40,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    torch.manual_seed(0)
    theirs = library.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    state = {
        k.removeprefix("bert."): v
        for k, v in theirs.state_dict().items()
        if "decoder" not in k and "position_ids" not in k
    }
    names = {
        "cls.predictions.transform.dense": "head.0",
        "cls.predictions.transform.LayerNorm": "head.2",
        "cls.predictions.bias": "bias",
    }
    ours = BERT(300, context=40, dim=48, depth=2, heads=4)
    for theirs_name, name in names.items():
        state = {k.replace(theirs_name, name): v for k, v in state.items()}
    ours.load_state_dict(rename_bert(state))
    tokens, lengths = torch.randint(5, 300, (6, 30)), torch.tensor([30, 12, 25, 30, 7, 19])
    real = torch.arange(30) < lengths[:, None]
    inputs, positions = mask_tokens(
        tokens.masked_fill(~real, 0),
        real,
        **RULE,
        ratio=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    assert positions.any() and not positions[~real].any()
    want = theirs(
        inputs, attention_mask=real.long(), labels=tokens.masked_fill(~positions, -100)
    ).loss
    torch.testing.assert_close(
        masked_tokens(ours.eval(), (inputs, real, positions, tokens[positions]))[0], want, **CLOSE
    )


# The stream ---------------------------------------------------------------------------------------


def test_a_stream_holds_what_it_hid(tokenizer, documents):
    inputs, mask, positions, targets = first(documents, tokenizer, ratio=0.5)
    tokens, owner = next(packed(documents, context=16, batch_size=8))
    assert torch.equal(inputs.masked_scatter(positions, targets), tokens) and torch.equal(
        mask, same_document(owner)
    )
    assert (targets >= 5).all() and not positions[tokens < 5].any()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_resumed_stream_asks_the_same_questions(tokenizer, documents):
    options = dict(context=16, batch_size=8, seed=3)
    straight = [*islice(masked_stream(documents, tokenizer, **options), 40)]  # over several epochs
    for start in (1, 7, 33):
        resumed = islice(masked_stream(documents, tokenizer, **options, start=start), 40 - start)
        assert all(map(same, straight[start:], resumed))
    assert not same(straight[1], next(masked_stream(documents, tokenizer, **options, start=2)))
    assert not same(straight[0], first(documents, tokenizer, seed=4))
    per_epoch = -(-len(documents.tokens) // 16) // 8
    rows = [
        {tuple(row) for batch in straight[i : i + per_epoch] for row in batch[0].tolist()}
        for i in (0, per_epoch)
    ]
    assert len(rows[0] & rows[1]) < len(rows[0]) / 2  # dynamic: the next epoch has other holes


def leak(model, tokens, owner, mask):
    "How far the logits of each row's first document move when all other documents change"
    mine = owner == owner[:, :1]
    other = torch.where(mine, tokens, (tokens + 17) % 300)
    with torch.no_grad():
        return (model(tokens, mask) - model(other, mask))[mine].abs().max().item()


def test_packed_documents_do_not_attend_to_each_other(tokenizer, documents):
    model, (tokens, owner) = small(tokenizer), next(packed(documents, context=16, batch_size=8))
    assert (owner != owner[:, :1]).any()
    assert leak(model, tokens, owner, same_document(owner)) < 1e-6
    assert leak(model, tokens, owner, None) > 1e-3  # broken: no mask
    assert leak(model, tokens, owner, torch.ones_like(same_document(owner))) > 1e-3


def test_long_texts_are_cut_and_short_ones_framed(tokenizer):
    documents = encode_documents(["happy " * 99, "", "a"], tokenizer, longest=6)
    assert [len(d) for d in documents] == [8, 2, 3]
    assert all(
        d[0] == tokenizer.special["[CLS]"] and d[-1] == tokenizer.special["[SEP]"]
        for d in documents
    )


# Training and judging -----------------------------------------------------------------------------


class Stopped(Exception):
    "The plug was pulled"


def test_a_stopped_run_goes_on_to_the_same_weights(tokenizer, documents, tmp_path):
    def run(path=None, stop=None):
        def each(step):
            if step.n == stop:
                raise Stopped

        model = small(tokenizer)
        losses = pretrain(
            model,
            documents,
            tokenizer,
            steps=9,
            batch_size=8,
            checkpoint=path,
            save_every=3,
            title="",
            each=each,
        ).losses
        return losses, torch.cat([p.flatten() for p in model.parameters()])

    with pytest.raises(Stopped):
        run(tmp_path / "run", stop=7)
    for resumed, straight in zip(run(tmp_path / "run"), run()):
        assert torch.equal(resumed, straight)
    with pytest.raises(ValueError, match="of another run"):
        pretrain(
            small(tokenizer),
            documents,
            tokenizer,
            steps=9,
            batch_size=8,
            ratio=0.4,
            checkpoint=tmp_path / "run",
            title="",
        )


def test_it_learns_and_is_judged_the_same_way_twice(tokenizer, documents):
    model = small(tokenizer, dim=64, depth=1)
    before = masked_accuracy(model, documents, tokenizer)
    pretrain(
        model, documents, tokenizer, steps=200, batch_size=16, lr=4e-3, title="", precision="fp32"
    )
    model.train()
    torch.manual_seed(1)
    after = masked_accuracy(model, documents, tokenizer)
    torch.manual_seed(2)
    assert after == masked_accuracy(model, documents, tokenizer) and model.training
    assert after > 1.4 * unigram_accuracy(documents, documents, tokenizer) and after > before
    assert after != masked_accuracy(model, documents, tokenizer, seed=1)


def test_masked_accuracy_equals_a_loop(tokenizer, documents):
    model, right, total = small(tokenizer), 0, 0
    size = min(64, rows := -(-len(documents.tokens) // 16))
    for inputs, mask, positions, targets in islice(
        masked_stream(documents, tokenizer, context=16, batch_size=size), rows // size
    ):
        guess, behind = (
            model(inputs, mask).argmax(-1)[positions],
            inputs[positions] == tokenizer.special["[MASK]"],
        )
        right, total = right + int((guess == targets)[behind].sum()), total + int(behind.sum())
    assert masked_accuracy(model, documents, tokenizer) == pytest.approx(right / total)


def test_words_that_are_shown_earn_nothing(tokenizer, documents):
    class Copier(torch.nn.Module):
        "Answers what it sees: right at each word that was kept, wrong behind each [MASK]"

        def __init__(self):
            super().__init__()
            self.config, self.scale = small(tokenizer).config, torch.nn.Parameter(torch.ones(()))

        def forward(self, tokens, mask, positions):
            return self.scale * F.one_hot(tokens[positions], tokenizer.vocab_size).float()

    assert masked_accuracy(Copier(), documents, tokenizer) == 0
    _, extra = masked_tokens(Copier(), first(documents, tokenizer, ratio=0.5))
    assert 0 < extra["right"] < 0.3  # a tenth and some luck: those are asked too, in training


def test_the_commonest_word_is_what_a_loop_finds(tokenizer):
    known, unseen = (
        encode_documents(["a a a b", "b a c"], tokenizer),
        encode_documents(["a b b", "c", "a"], tokenizer),
    )

    def words(documents):
        return [t for d in documents for t in d.tolist() if t >= 5]

    best = max(set(words(known)), key=words(known).count)
    expected = words(unseen).count(best) / len(words(unseen))
    assert (
        unigram_accuracy(known, unseen, tokenizer) == pytest.approx(expected) and 0 < expected < 1
    )
    asked = torch.cat(
        [
            batch[3]
            for batch in islice(
                masked_stream(unseen, tokenizer, context=4, batch_size=2, ratio=0.5), 2000
            )
        ]
    )
    assert (asked == best).float().mean().item() == pytest.approx(
        expected, abs=0.02
    )  # what always guessing it really earns


# Small sets, padding, types -----------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.15, 1e-6])
def test_at_least_one_word_of_a_batch_is_hidden(ratio):
    t = Tokenizer([])
    few = encode_documents(["a cat", "a dog", "the owl"] * 4, t)
    for _, positions, targets in (
        (b[0], b[2], b[3])
        for b in islice(masked_stream(few, t, context=8, batch_size=1, ratio=ratio), 300)
    ):
        assert positions.any() and len(targets) == int(positions.sum()) and (targets >= 5).all()
    model = BERT(t.vocab_size, 8, 16, 1, 2, segments=0)
    losses = pretrain(model, few, t, steps=50, batch_size=1, ratio=ratio, title="").losses
    assert losses.isfinite().all() and len(losses) == 50


def test_drawing_again_depends_on_seed_and_step_alone():
    t = Tokenizer([])
    few = encode_documents(["ab", "", "", "c"] * 3, t)  # rows of 2 tokens: some hold marks alone
    options = dict(context=2, batch_size=1, seed=2)
    straight = [*islice(masked_stream(few, t, **options), 40)]
    assert all(batch[2].any() for batch in straight)
    for start in (1, 13, 27):
        assert all(
            map(
                same,
                straight[start:],
                islice(masked_stream(few, t, **options, start=start), 40 - start),
            )
        )


def test_a_usual_batch_is_masked_by_the_rule_alone(tokenizer, documents):
    "Drawing again must not change the numbers where nothing has to be drawn again."
    for step, (inputs, _, positions, _) in zip(
        range(5), masked_stream(documents, tokenizer, context=16, batch_size=8, seed=3)
    ):
        tokens, _ = next(packed(documents, context=16, batch_size=8, seed=3, start=step))
        luck = torch.Generator().manual_seed(3 * 1_000_003 + step)
        rule = dict(
            mask_id=tokenizer.special["[MASK]"], vocab_size=tokenizer.vocab_size, first_word=5
        )
        assert same((inputs, positions), mask_tokens(tokens, tokens >= 5, **rule, generator=luck))


def test_documents_without_a_word_are_refused():
    t = Tokenizer([])
    for call in (
        lambda d: next(masked_stream(d, t, context=4, batch_size=1)),
        lambda d: masked_accuracy(BERT(t.vocab_size, 4, 8, 1, 1, segments=0), d, t),
        lambda d: unigram_accuracy(d, d, t),
    ):
        assert "expected" in complaint(call, encode_documents([""] * 4, t))


def test_a_small_held_out_set_is_judged_for_every_seed():
    t = Tokenizer([])
    held = encode_documents(["owl"], t)
    model = BERT(t.vocab_size, 8, 8, 1, 1, segments=0)
    scores = [masked_accuracy(model, held, t, seed=seed) for seed in range(12)]
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("tokens", [[[1, 2, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0], [0]]])
def test_a_text_of_padding_only_has_features_0(tokens):
    torch.manual_seed(0)
    model = TextClassifier(BERT(20, 8, 16, 1, 2, segments=0), 2)
    tokens = torch.tensor(tokens)
    features = model.encode(tokens)
    blank = (tokens == 0).all(1)
    assert (features[blank] == 0).all() and (features[~blank].abs().sum(1) > 0).all()
    model(tokens).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if not blank.all():
        torch.testing.assert_close(features[:1], model.encode(tokens[:1]), **CLOSE)


def test_padding_in_front_or_between_loses_no_token():
    torch.manual_seed(0)
    seen = []
    model = TextClassifier(BERT(20, 8, 16, 1, 2, segments=0), 2)
    plain, encode = (
        model.encoder.encode,
        lambda tokens, mask: seen.append(tokens) or plain(tokens, mask),
    )
    model.encoder.encode = encode
    model.encode(torch.tensor([[0, 0, 5, 6, 0], [7, 0, 8, 0, 0]]))
    assert seen[0].tolist() == [[0, 0, 5, 6], [7, 0, 8, 0]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000))
def test_the_mean_of_tokens_is_a_loop(b, n, seed):
    rng = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(b, n, 3, generator=rng), torch.rand(b, n, generator=rng) < 0.5
    found = mean_tokens(x.masked_fill(~mask[..., None], float("nan")).requires_grad_(), mask)
    for i in range(b):
        real = x[i][mask[i]]
        torch.testing.assert_close(found[i].detach(), real.mean(0) if len(real) else torch.zeros(3))


def test_the_mean_of_tokens_has_sound_gradients_and_no_overflow():
    x = torch.full((2, 3, 4), float("inf"))
    x[0, 0] = 1
    x.requires_grad_()
    mask = torch.tensor([[True, False, False], [False, False, False]])
    mean_tokens(x, mask).sum().backward()
    assert (x.grad[0, 0] == 1).all() and x.grad.sum() == 4
    long = torch.full((1, 512, 2), 200.0)
    assert torch.equal(
        mean_tokens(long.half(), torch.ones(1, 512, dtype=torch.bool)), long[:, 0].half()
    )


def test_names_of_special_tokens_in_a_text_stay_text(tokenizer):
    for names in ("a [PAD] b", "[MASK] [SEP][CLS]", "[EOS]"):
        ids = encode_documents([names], tokenizer)[0]
        assert (ids[1:-1] >= len(tokenizer.special)).all() and tokenizer.decode(
            ids[1:-1].tolist()
        ) == names
        assert ids[1:-1].tolist() == tokenizer.encode(names)


def test_only_the_mask_is_special_in_a_question(tokenizer):
    model, asked = small(tokenizer), []
    forward = model.forward
    model.forward = lambda tokens, **options: (
        asked.append(tokens[0].tolist()) or forward(tokens, **options)
    )
    fill_mask(model, tokenizer, "[PAD] [MASK] a")
    one, two = tokenizer.encode("[PAD]"), tokenizer.encode(" a")
    mark = tokenizer.special
    assert asked == [[mark["[CLS]"], *one, mark["[MASK]"], *two, mark["[SEP]"]]]
    plain = tokenizer.encode("[CLS]the[MASK] of a[MASK][SEP]", special=True)
    fill_mask(model, tokenizer, "the [MASK] of a [MASK]")
    assert asked[1] == plain


def test_guesses_that_read_alike_are_all_told():
    t = Tokenizer([])  # single bytes: many are halves of a letter and read alike
    torch.manual_seed(0)
    (found,) = fill_mask(
        BERT(t.vocab_size, 8, 8, 1, 1, segments=0), t, "[MASK]", count=t.vocab_size
    )
    assert len(found) == t.vocab_size and sum(found.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
def test_tokens_of_every_whole_number_type(tokenizer, documents, kind):
    tokens = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(0))

    def luck():
        return torch.Generator().manual_seed(1)

    for a, b in zip(
        mask_tokens(tokens.to(kind), tokens >= 5, **RULE, generator=luck()),
        mask_tokens(tokens, tokens >= 5, **RULE, generator=luck()),
    ):
        assert torch.equal(a, b) and a.dtype == b.dtype
    model = TextClassifier(small(tokenizer), 3)
    torch.testing.assert_close(model(tokens.to(kind)), model(tokens))
    inputs, mask, positions, targets = first(documents, tokenizer)
    if kind != torch.uint8:
        wide, narrow = (
            masked_tokens(model.encoder, (inputs, mask, positions, targets.to(k)))[0]
            for k in (torch.int64, kind)
        )
        assert torch.equal(wide, narrow)


def test_numpy_numbers_make_the_same_stream(tokenizer, documents):
    plain = dict(context=16, batch_size=8, ratio=0.25, seed=2, start=3)
    kinds = dict(
        context=np.int64, batch_size=np.int32, ratio=np.float32, seed=np.int64, start=np.uint8
    )
    streams = (
        masked_stream(documents, tokenizer, **{k: f(plain[k]) for k, f in fs.items()})
        for fs in ({k: type(v) for k, v in plain.items()}, kinds)
    )
    assert all(map(same, *(islice(stream, 3) for stream in streams)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_model_of_another_float_type_is_judged(tokenizer, documents, kind):
    model = small(tokenizer).to(kind)
    loss, _ = masked_tokens(model, first(documents, tokenizer))
    assert loss.dtype == torch.promote_types(kind, torch.float32) and loss.isfinite()
    assert 0 <= masked_accuracy(model, documents, tokenizer) <= 1 and fill_mask(
        model, tokenizer, "a [MASK]"
    )


def test_the_loss_is_blind_to_words_that_are_not_hidden(tokenizer, documents):
    "By the batch alone: another target list is another loss, and logits elsewhere get no gradient."

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(
                torch.randn(8, 16, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
            )

        def forward(self, tokens, mask, positions):
            assert positions.any() and not positions.all()
            return self.table[positions]

    model, (inputs, mask, positions, targets) = Logits(), first(documents, tokenizer)
    loss, extra = masked_tokens(model, (inputs, mask, positions, targets))
    by_hand = -model.table.detach().log_softmax(-1)[positions].gather(1, targets[:, None]).mean()
    torch.testing.assert_close(loss.detach(), by_hand)
    loss.backward()
    assert (model.table.grad[~positions] == 0).all() and (model.table.grad[positions] != 0).any(
        1
    ).all()


@pytest.mark.parametrize(
    "change",
    [
        dict(documents=True),
        dict(lr=2e-3),
        dict(weight_decay=0.1),
        dict(seed=1),
        dict(batch_size=4),
        dict(ratio=0.3),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tokenizer, documents, tmp_path, change):
    other = [d.clone() for d in documents]
    other[-1][1] = 5 + (other[-1][1] - 4) % 200  # one word of the last text

    def run(documents=documents, **how):
        return pretrain(
            small(tokenizer),
            documents,
            tokenizer,
            **dict(steps=2, batch_size=8, checkpoint=tmp_path / "run", title="") | how,
        )

    kept = run().losses
    assert torch.equal(run().losses, kept)
    with pytest.raises(ValueError, match="of another run"):
        run(**change | (dict(documents=join(other)) if "documents" in change else {}))
    assert len(run(steps=3, longer=True).losses) == 3


# Bad input ----------------------------------------------------------------------------------------

IDS = torch.full((2, 6), 7)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda t, d: mask_tokens(IDS, IDS > 4, **RULE, ratio=0),
            "ratio is 0.0; expected a finite number above 0",
        ),
        (lambda t, d: mask_tokens(IDS, IDS > 4, **RULE, ratio=1), "nothing is left to guess from"),
        (lambda t, d: mask_tokens(IDS, IDS > 4, **RULE, ratio=float("nan")), "ratio is nan"),
        (lambda t, d: mask_tokens(IDS, IDS > 4, **RULE, ratio="15 %"), "ratio is '15 %'"),
        (
            lambda t, d: mask_tokens(IDS.float(), IDS > 4, **RULE),
            r"a tensor of float32, shape \(2, 6\); expected token numbers",
        ),
        (
            lambda t, d: mask_tokens(IDS[0], IDS[0] > 4, **RULE),
            r"tokens has shape \(6,\); expected \(b, n\)",
        ),
        (lambda t, d: mask_tokens([[7]], IDS > 4, **RULE), "tokens is a list"),
        (lambda t, d: mask_tokens(IDS, IDS, **RULE), "can_hide is a tensor of int64"),
        (
            lambda t, d: mask_tokens(IDS, IDS[:1] > 4, **RULE),
            r"can_hide has shape \(1, 6\); expected \(2, 6\)",
        ),
        (lambda t, d: mask_tokens(IDS, IDS > 4, mask_id=300, vocab_size=300), "mask_id is 300"),
        (
            lambda t, d: mask_tokens(IDS, IDS > 4, mask_id=3, vocab_size=300, first_word=300),
            "first_word is 300",
        ),
        (lambda t, d: masked_stream(d, t, ratio=1.0), "ratio is 1.0"),
        (lambda t, d: masked_stream([[1, 2]], t), "documents is a list; expected a Documents"),
        (lambda t, d: masked_stream(d, t, batch_size=10**6), "batch_size is 1000000"),
        (lambda t, d: pretrain(small(t), d, t, steps=1, ratio=0, title=""), "ratio is 0"),
        (
            lambda t, d: pretrain(small(t, vocab_size=400), d, t, steps=1, title=""),
            "the model knows 400 tokens and the tokenizer makes",
        ),
        (
            lambda t, d: masked_accuracy(small(t, vocab_size=400), d, t),
            "expected the one it was trained with",
        ),
        (
            lambda t, d: fill_mask(small(t, vocab_size=400), t, "a [MASK]"),
            "the model knows 400 tokens",
        ),
        (lambda t, d: fill_mask(small(t), t, "a herd"), r"holds no \[MASK\]"),
        (
            lambda t, d: fill_mask(small(t), t, "word " * 40 + "[MASK]"),
            "do not fit a context of 16",
        ),
        (
            lambda t, d: masked_tokens(small(t), first(d, t, context=32)),
            "do not fit a context of 16",
        ),
        (
            lambda t, d: masked_tokens(small(t), (IDS, IDS > 4, IDS < 0, IDS[IDS < 0])),
            "expected a hidden token, True",
        ),
        (lambda t, d: fill_mask(small(t), t, ["a [MASK]"]), "text is a list; expected a string"),
        (
            lambda t, d: fill_mask(small(t), t, "a [MASK]", count=0),
            "count is 0; expected a whole number from 1 to",
        ),
        (lambda t, d: fill_mask(small(t), t, "a [MASK]", count=10**6), "count is 1000000"),
        (lambda t, d: encode_documents("one text", t), r"in a list, so \[text\]"),
        (
            lambda t, d: encode_documents(["a"], t, longest=0),
            "longest is 0; expected a whole number from 1",
        ),
        (lambda t, d: encode_documents([], t), "texts is a list; expected one string or more"),
        (lambda t, d: mask_tokens(IDS, IDS > 4, mask_id=3, vocab_size=6), "tokens run from 7 to 7"),
        (lambda t, d: encode_documents([None], t), "one string or more"),
        (
            lambda t, d: encode_documents(["a"], Tokenizer([], special=("[PAD]",))),
            r"are \[PAD\]; expected \[CLS\] too",
        ),
        (lambda t, d: masked_tokens(small(t), IDS), "the batch is a tensor of int64"),
        (
            lambda t, d: masked_tokens(small(t), (IDS, IDS > 4, IDS > 4, IDS[0])),
            r"targets has shape \(6,\)",
        ),
        (lambda t, d: masked_accuracy(small(t), d, t, steps=0), "steps is 0"),
        (
            lambda t, d: masked_accuracy(torch.nn.Linear(2, 2), d, t),
            "a Linear without `vocab_size`",
        ),
        (lambda t, d: pretrain(small(t), d, t, steps=1, batch_size=8, lr=0, title=""), "lr is 0"),
        (lambda t, d: pretrain(small(t), d, t, steps=0, title=""), "steps is 0"),
        (lambda t, d: TextClassifier(torch.nn.Linear(2, 2), 3), "a Linear without `encode`"),
        (lambda t, d: TextClassifier(small(t), 0), "classes is 0"),
        (
            lambda t, d: mean_tokens(torch.zeros(2, 3, 4), torch.ones(2, 3)),
            "mask is a tensor of float32",
        ),
        (
            lambda t, d: mean_tokens(torch.zeros(2, 3), torch.ones(2, 3) > 0),
            r"expected \(b, n, d\)",
        ),
    ],
)
def test_bad_input_gets_one_clear_sentence(tokenizer, documents, call, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        call(tokenizer, documents)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
