"""MiniLM cut in half: texts, costs, the shipped student, and the recipe stopped and resumed"""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from foundation.compression.distillation import match_logits
from foundation.compression.transformers import keep_layers
from foundation.core.basics import count_macs, count_parameters
from foundation.data.sources import DataUnavailable, fetch
from foundation.data.tasks import sentiment_task
from foundation.evaluation.scores import accuracy
from foundation.models.bert import BERT
from foundation.models.heads import TextClassifier
from foundation.models.card import BadWeights, WEIGHTS, read_card
from foundation.models.pretrained import load_minilm, load_weights, save_weights
from foundation.recipes import minilm_sentiment
from foundation.recipes.minilm_sentiment import (
    load_student,
    sentiment_model,
    text_costs,
    text_logits,
    train_texts,
    usual_texts,
)
from foundation.training.state import BadCheckpoint
from foundation.training.loop import classify


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    try:
        fetch("reviews")
    except DataUnavailable:
        pytest.skip("the reviews are not here")
    made = Tokenizer.from_file(str(WEIGHTS / "bert_glosses.tokenizer.json"))
    made.enable_padding()
    return made


def encoder(depth=4, **sizes):
    return BERT(**dict(vocab_size=4096, context=64, dim=16, depth=depth, heads=2) | sizes).eval()


# Text ---------------------------------------------------------------------------------------------


def tokens(count=24, longest=9):
    rows = torch.randint(5, 4096, (count, longest))
    lengths = torch.randint(2, longest + 1, (count, 1))
    return rows.where(torch.arange(longest) < lengths, 0)


def test_padding_and_order_do_not_change_what_is_said():
    model, x = TextClassifier(encoder(), 3, zero=True).eval(), tokens()
    nn.init.normal_(model.head.weight)
    want = torch.cat([model(row[row != 0][None]) for row in x])
    assert_close(model(F.pad(x, (0, 5))), want, rtol=1e-4, atol=1e-5)
    assert_close(text_logits(model, x), want, rtol=1e-4, atol=1e-5)
    assert text_logits(model, x).shape == (24, 3)


def test_the_classifier_copies_its_encoder_and_leaves_the_embedding_alone():
    source, x, y = encoder(), tokens(), torch.randint(2, (24,))
    model, before = sentiment_model(source), deepcopy(source.state_dict())
    start = deepcopy(model.state_dict())
    train_texts(model, x, y, objective=classify, steps=3, lr=1e-2, batch_size=8)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items())
    same = [k for k, v in model.state_dict().items() if torch.equal(v, start[k])]
    assert set(same) == {k for k in start if k.startswith("encoder.embedding")}


def test_training_on_text_stopped_and_resumed_is_training_in_one_go(tmp_path):
    x, y, source = tokens(), torch.randint(2, (24,)), encoder()
    plan = dict(objective=classify, steps=6, lr=1e-3, batch_size=8, seed=2)
    whole, parts = sentiment_model(source), sentiment_model(source)
    parts.load_state_dict(whole.state_dict())
    run = train_texts(whole, x, y, **plan)

    def stop(step):
        if step.n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_texts(
            parts, x, y, **plan, checkpoint=tmp_path / "run.safetensors", save_every=2, each=stop
        )
    torch.manual_seed(9)
    again = train_texts(
        sentiment_model(source), x, y, **plan, checkpoint=tmp_path / "run.safetensors", save_every=2
    )
    assert_close(again.losses, run.losses)


def test_the_task_keeps_its_parts_apart(tokenizer):
    task = sentiment_task(tokenizer, pool=60, dev=20, test=30, longest=12)
    parts = [set(part.tolist()) for part in (task.pool, task.dev, task.test)]
    assert [len(p) for p in parts] == [60, 20, 30] and len(set.union(*parts)) == 110
    assert (
        task.inputs.shape == (110, 12)
        and task.labels.unique().tolist() == [0, 1]
        and tokenizer.padding is not None
    )
    again = sentiment_task(tokenizer, pool=60, dev=20, test=30, longest=12)
    assert torch.equal(task.inputs, again.inputs)
    rows = {tuple(r.tolist()) for r in task.inputs[task.test]}
    assert not rows & {tuple(r.tolist()) for r in task.inputs[task.pool]}


@pytest.mark.parametrize("sizes", [dict(pool=9000), dict(dev=0), dict(test=5000)])
def test_more_texts_than_there_are_is_refused(tokenizer, sizes):
    with pytest.raises(ValueError, match="asked for|expected a whole number from 1 on"):
        sentiment_task(tokenizer, **dict(pool=60, dev=20, test=30) | sizes)


def test_eight_bits_are_off_by_half_a_step_at_most(tmp_path):
    source = encoder()
    model = sentiment_model(keep_layers(source, (0, 1)))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    card = dict(config={}, layers=[0, 1])
    save_weights(model, "small", card, tmp_path, only="learnt", int8=True)
    back = load_student(source, "small", tmp_path)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        got = back.get_parameter(name)
        if name in names and p.ndim == 2:
            step = p.detach().abs().amax(1, keepdim=True) / 127
            assert ((got - p).abs() <= 0.501 * step + 0.002 * p.abs()).all(), name
        else:
            assert_close(got, p, rtol=1e-3, atol=1e-3)
    weights = sum(p.numel() for n, p in model.named_parameters() if n in names)
    assert (tmp_path / "small.safetensors").stat().st_size < 1.5 * weights + 10_000
    assert not back.training
    with pytest.raises(BadWeights):
        load_student(encoder(dim=8), "small", tmp_path)


def test_costs_are_counted_and_compared():
    source = encoder(depth=6)
    whole = sentiment_model(source).eval()
    found = text_costs({"6": whole, "3": keep_layers(whole, (0, 1, 2))}, tokens(4), rounds=2)
    assert (
        found["6"]["one_speedup"] == found["6"]["batch_speedup"] == 1
        and found["3"]["batch_speedup"] > 0
    )

    def blocks(m):
        return sum(p.numel() for p in m.encoder.blocks.parameters())

    assert found["6"]["parameters"] - found["3"]["parameters"] == blocks(whole) / 2
    assert found["3"]["macs"] - 32 == (found["6"]["macs"] - 32) / 2  # the head has 16 × 2


def test_usual_texts_are_of_about_median_length():
    x = tokens(101)
    lengths = (x != 0).sum(1)
    found = (usual_texts(x, 5) != 0).sum(1)
    assert found.shape == (5,) and (found - lengths.median()).abs().max() <= 1


def test_a_text_of_padding_only_counts_as_nothing_and_spoils_no_other():
    model = TextClassifier(encoder(), 3, zero=True).eval()
    nn.init.normal_(model.head.weight), nn.init.normal_(model.head.bias)
    x = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [7, 0, 8, 0]])
    said = model(x)
    assert_close(said[1], model.head.bias), assert_close(said[0], model(x[:1])[0])
    assert_close(model(torch.zeros(2, 3, dtype=torch.int32)), model.head.bias.expand(2, 3))
    assert_close(said[2], model(x[2:, :3])[0])  # padding in the middle cuts no word behind it
    said.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_kept_text_run_of_other_texts_labels_or_seed_is_refused(tmp_path):
    x, y, source = tokens(), torch.randint(2, (24,)), encoder()
    plan = dict(
        objective=classify,
        steps=2,
        lr=1e-3,
        batch_size=8,
        seed=2,
        checkpoint=tmp_path / "run.safetensors",
    )
    train_texts(sentiment_model(source), x, y, **plan)
    for i in range(0, 24, 3):  # wherever the one text or label stands
        texts, labels = x.clone(), y.clone()
        texts[i, 0], labels[i] = 1 + texts[i, 0] % 4000, 1 - labels[i]
        for change in ((texts, y), (x, labels)):
            with pytest.raises(BadCheckpoint):
                train_texts(sentiment_model(source), *change, **plan)
    for texts, labels, change in (
        (x, y, dict(seed=3)),
        (x, y, dict(lr=2e-3)),
        (x, y, dict(recipe=dict(a=1))),
    ):
        with pytest.raises(BadCheckpoint):
            train_texts(sentiment_model(source), texts, labels, **plan | change)


def test_as_many_usual_texts_as_asked_for():
    x = tokens(10)
    assert usual_texts(x, 8).shape == (8, 9) and torch.equal(
        usual_texts(x, 3), usual_texts(x, 5)[:3]
    )


def test_costs_are_those_of_eval_mode_and_leave_the_mode():
    net = sentiment_model(encoder()).train()
    assert (
        text_costs({"a": net}, tokens(2), rounds=1)["a"]["macs"] > 0
        and net.training
        and net.encoder.blocks[0].training
    )


def test_the_card_counts_what_its_networks_are():
    card, costs = read_card("minilm_sentiment"), read_card("minilm_sentiment")["metrics"]["costs"]
    whole = sentiment_model(BERT(30522, context=512, dim=384, depth=6, heads=12))
    models = {"6 layers": whole, "3 layers": keep_layers(whole, card["layers"])}
    for name, model in models.items():
        assert costs[name]["parameters"] == count_parameters(model)
        assert costs[name]["macs"] == count_macs(
            model, torch.ones(1, 26, dtype=torch.long)
        )  # a text of median length
    speed = costs["6 layers"]["batch_ms"] / costs["3 layers"]["batch_ms"]
    assert (
        0.8 < speed / costs["3 layers"]["batch_speedup"] < 1.25
    )  # a median of ratios, and a ratio of medians
    best = {arm: max(row, key=row.get) for arm, row in card["tuning"].items()}
    assert {arm: str(rate) for arm, rate in card["rates"].items() if rate} == {
        arm: best[arm] for arm in ("6 layers", "no teacher", "distilled")
    }
    assert best["layers"] == str(tuple(card["layers"])) and all(
        layers in minilm_sentiment.LAYERS for layers in [tuple(card["layers"])]
    )
    test = card["metrics"]["test_texts"]
    assert all(
        abs(score * test - round(score * test)) < 1e-6
        for runs in card["metrics"]["accuracy"].values()
        for score in runs
    )


def test_the_shipped_student_scores_what_its_card_says():
    try:
        base, words = load_minilm()
        task = sentiment_task(words)
    except (DataUnavailable, BadWeights, OSError):
        pytest.skip("MiniLM or the reviews are not here")
    some = task.test[::10]
    promised = read_card("minilm_sentiment")["metrics"]["accuracy"]["distilled"][0]
    found = accuracy(text_logits(load_student(base), task.inputs[some]), task.labels[some])
    assert abs(found - promised) < 3 * (promised * (1 - promised) / len(some)) ** 0.5


# The recipe ---------------------------------------------------------------------------------------

TINY = dict(
    seeds=range(2),
    labels=40,
    steps=2,
    student_steps=3,
    pool=80,
    dev=20,
    test=40,
    choice=dict(rates=(1e-3, 3e-3), layers=((0, 1, 2), (1, 2, 3))),
)


@pytest.fixture
def recipe(tokenizer, tmp_path):
    base = encoder(), tokenizer
    plan = TINY | dict(base=base, home=tmp_path / "runs" / "tiny", folder=tmp_path / "out")
    return lambda **changes: minilm_sentiment.make("tiny", **plan | changes)


def test_the_recipe_from_nothing_stopped_and_resumed(recipe, tmp_path, monkeypatch):
    calls, score = [], minilm_sentiment.accuracy

    def third_time(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(minilm_sentiment, "accuracy", third_time)
    with pytest.raises(KeyboardInterrupt):
        recipe()
    notes = json.loads((tmp_path / "runs" / "tiny" / "scores.json").read_text())
    assert len(notes["scores"]) == 4 and not (tmp_path / "out").exists()
    path = recipe()
    assert len(calls) - 5 + 4 in (17, 19)  # so many scores, four of them known; two may be shared
    card = read_card("tiny", path.parent)
    assert set(card["metrics"]["accuracy"]) == {"6 layers", "no teacher", "distilled", "as cut"}
    assert all(
        len(runs) == 2 and all(0 <= s <= 1 for s in runs)
        for runs in card["metrics"]["accuracy"].values()
    )
    assert len(card["metrics"]["controls"]["labels, untuned cut"]["accuracy"]) == 2
    assert (
        set(card["tuning"]) == {"6 layers", "layers", "no teacher", "distilled"}
        and len(card["layers"]) == 3
    )
    assert {"data", "steps", "seconds", "hardware", "sha256", "rates"} <= set(card) and card[
        "metrics"
    ]["costs"]["3 layers"]
    assert not (tmp_path / "runs" / "tiny").exists(), (
        "what is shipped is trained anew the next time"
    )


def test_the_distilled_arm_learns_the_teachers_logits_for_the_whole_pool(tokenizer, tmp_path):
    task = sentiment_task(tokenizer, pool=80, dev=20, test=40)
    plan = dict(labels=40, steps=2, student_steps=3)
    runs = minilm_sentiment.SentimentRuns(task, encoder(), tmp_path, plan)
    teacher = runs.teacher(0, 1e-3)
    assert runs.teacher(0, 1e-3) is teacher, "students of a draw share it"
    by_hand, pool = keep_layers(teacher, (0, 2)), task.inputs[task.pool]
    logits = text_logits(teacher, pool)
    train_texts(by_hand, pool, logits, objective=match_logits(2.0), steps=3, lr=1e-3, seed=0)
    student = minilm_sentiment._student(runs, "distilled", 0, ((0, 2), 1e-3), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), by_hand.parameters()))
    control = minilm_sentiment._student(runs, "no teacher", 0, ((0, 2), 1e-3), 1e-3)
    assert not torch.equal(control.head.weight, student.head.weight)


def test_the_untuned_control_never_met_the_teacher(tokenizer, tmp_path):
    "It is cut from the base itself and takes the steps of both stages on the labels"
    task = sentiment_task(tokenizer, pool=80, dev=20, test=40)
    plan = dict(labels=40, steps=2, student_steps=3)
    runs = minilm_sentiment.SentimentRuns(task, encoder(), tmp_path, plan)
    control = minilm_sentiment._untuned(runs, (0, 2), 0, 1e-3)
    torch.manual_seed(0)
    by_hand, index = (
        keep_layers(minilm_sentiment.sentiment_model(encoder()), (0, 2)),
        task.draw(40, 0),
    )
    batch = task.inputs[index], task.labels[index]
    train_texts(by_hand, *batch, objective=minilm_sentiment.classify, steps=5, lr=1e-3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(control.parameters(), by_hand.parameters()))


def stopped_at(count, monkeypatch, recipe):
    "Stop the recipe at its n-th score"
    calls, score = [], minilm_sentiment.accuracy

    def judge(*args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return score(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minilm_sentiment, "accuracy", judge)
        recipe()


def test_kept_runs_of_another_plan_or_base_are_refused(recipe, tokenizer, tmp_path, monkeypatch):
    stopped_at(2, monkeypatch, recipe)
    torch.manual_seed(1)
    for change in (dict(steps=5), dict(base=(encoder(), tokenizer)), dict(test=30)):
        with pytest.raises(ValueError, match="delete it or name another"):
            recipe(**change)
    notes = tmp_path / "runs" / "tiny" / "scores.json"
    notes.write_text(notes.read_text()[:-9])
    with pytest.raises(ValueError, match="scores.json is damaged"):
        recipe()


def test_the_shipped_student_is_what_its_card_says():
    if not (WEIGHTS / "minilm_sentiment.json").exists():
        pytest.skip("the recipe was not run yet")
    card = read_card("minilm_sentiment")
    assert (WEIGHTS / "minilm_sentiment.safetensors").stat().st_size < 6e6
    scores = {arm: torch.tensor(runs) for arm, runs in card["metrics"]["accuracy"].items()}
    assert len(card["layers"]) == 3 and all(len(runs) >= 3 for runs in scores.values())
    assert scores["6 layers"].mean() - scores["distilled"].mean() < 0.02
    assert (
        min(card["metrics"]["costs"]["3 layers"][f"{kind}_speedup"] for kind in ("one", "batch"))
        >= 1.6
    )
    student = sentiment_model(BERT(30522, context=512, dim=384, depth=3, heads=12))
    loaded = load_weights("minilm_sentiment", student, only="learnt")
    assert loaded is student and student.head.weight.abs().max() > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: sentiment_model(None),
        lambda: usual_texts(tokens(4), 5),
        lambda: usual_texts(torch.rand(3, 4)),
        lambda: text_logits(sentiment_model(encoder()), torch.zeros(0, 4).long()),
        lambda: sentiment_model(encoder())(torch.rand(2, 3)),
        lambda: text_costs({}, tokens(2)),
        lambda: text_costs({"a": None}, tokens(2)),
        lambda: train_texts(
            sentiment_model(encoder()), tokens(), objective=classify, steps=1, lr=0.0
        ),
    ],
)
def test_arguments_of_the_wrong_kind_get_a_sentence(call):
    with pytest.raises((TypeError, ValueError), match="; expected"):
        call()
