"""What a notebook cannot say about foundation.models.pretrained: damaged and hostile cards and
files, shared weights, other number types."""

import hashlib
import json
import random
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.nn.utils import prune

from foundation.core.basics import count_parameters
from foundation.models import card as cards
from foundation.models import pretrained
from foundation.models.bert import BERT
from foundation.models.convnets import ConvNet
from foundation.models.gpt import GPT
from foundation.models.card import BadWeights, WEIGHTS, read_card, read_file, write_card
from foundation.models.pretrained import (
    embed_texts,
    imagenet_inputs,
    load_efficientnet_lite0,
    load_minilm,
    load_weights,
    read_tensors,
    rename_bert,
    save_weights,
    write_tensors,
)

pytestmark = pytest.mark.filterwarnings("error")
NAMES = sorted(p.stem for p in WEIGHTS.glob("*.json") if not p.stem.endswith(".tokenizer"))


def small(seed=0):
    torch.manual_seed(seed)
    return ConvNet(classes=3, widths=(4,)).eval()


@pytest.fixture
def shelf(tmp_path):
    save_weights(
        small(),
        "it",
        dict(data="none", steps=3, metrics={"accuracy": 0.75, 100: [0.1, 0.2]}),
        tmp_path,
    )
    return tmp_path


def told(call, *args, **options):
    with pytest.raises(BadWeights) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Cards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shipped_cards_have_a_hash_over_all_they_say_and_files_are_theirs(name):
    card, data = read_file(name)
    assert (
        card["card_sha256"] == cards._card_hash(card)
        and card["sha256"] == hashlib.sha256(data).hexdigest()
    )


@pytest.mark.parametrize("name", ["vgg_slim", "minilm_sentiment"])
def test_no_flipped_bit_or_digit_passes_unnoticed(tmp_path, name):
    good, rng = (WEIGHTS / f"{name}.json").read_bytes(), random.Random(0)
    card = json.loads(good)
    for _ in range(300):
        bad = bytearray(good)
        place = rng.randrange(len(bad))
        bad[place] ^= 1 << rng.randrange(8)
        (tmp_path / "it.json").write_bytes(bad)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read = read_card("it", tmp_path)
            except BadWeights:
                continue
        without = {k: v for k, v in read.items() if len(k) != 11}
        assert without == {
            k: v for k, v in card.items() if k != "card_sha256"
        }  # white space, or the last digits of a number
        assert caught or read == card


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{half",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"{}",
        b'{"sha256": 3}',
        b'{"architecture": [], "config": {}, "sha256": "0"}',
        b'{"architecture": "ConvNet", "config": [], "sha256": "0"}',
    ],
)
def test_a_card_that_is_none_is_bad_weights(shelf, damage):
    (shelf / "it.json").write_bytes(damage)
    for call in (read_card, read_file):
        assert "it.json" in told(call, "it", shelf)
    assert "it.json" in told(load_weights, "it", folder=shelf)


def test_a_folder_in_the_place_of_a_card_or_a_file(shelf):
    (shelf / "it.safetensors").unlink()
    (shelf / "it.safetensors").mkdir()
    assert "0 bytes" in told(load_weights, "it", folder=shelf)
    (shelf / "it.json").unlink()
    (shelf / "it.json").mkdir()
    assert "cannot be read" in told(read_card, "it", shelf)


def test_missing_weights_list_those_that_are_there_and_no_tokenizers():
    message = told(load_weights, "x")
    assert all(name in message for name in NAMES) and "tokenizer" not in message


def rewritten(shelf, **changes):
    "The card of a forger, who can compute hashes too"
    card = json.loads((shelf / "it.json").read_text())
    return write_card(
        shelf / "it.safetensors", {k: v for k, v in (card | changes).items() if v is not None}
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(architecture="Oracle"),
        dict(architecture="__class__"),
        dict(config={"ghannels": 1}),
        dict(config={"widths": "a"}),
        dict(config={"widths": [0]}),
        dict(config={"widths": [10**9]}),
        dict(config={"classes": -1, "widths": [4]}),
        dict(config={"classes": 10**12, "widths": [4]}),
        dict(config={"classes": None, "widths": [4]}),
        dict(architecture="BERT", config={"vocab_size": 5, "depth": 10**9}),
        dict(architecture="ResNet", config={"depths": [10**8, 1]}),
        dict(config={"widths": [4] * 10_000}),
    ],
)
def test_a_card_that_describes_no_model_of_this_size_is_bad_weights(shelf, changes):
    rewritten(shelf, **changes)
    told(load_weights, "it", folder=shelf)


def test_an_older_card_without_a_hash_is_taken_with_a_warning(shelf):
    card = json.loads((shelf / "it.json").read_text())
    del card["card_sha256"]
    (shelf / "it.json").write_text(json.dumps(card))
    with pytest.warns(UserWarning, match="it.json has no hash of its own.*write_card"):
        assert read_card("it", shelf) == card
    write_card(shelf / "it.safetensors", card)
    assert read_card("it", shelf)["card_sha256"]


def test_a_card_holds_what_json_can_and_nothing_is_written_otherwise(tmp_path):
    card = dict(
        seeds=(0, 1),
        rate=np.float32(0.5),
        count=np.int64(3),
        scores=torch.tensor([1, 2]),
        of={10: "a"},
        odd=float("nan"),
    )
    save_weights(small(), "it", card, tmp_path)
    read = read_card("it", tmp_path)
    assert [read[k] for k in ("seeds", "rate", "count", "scores", "of")] == [
        [0, 1],
        0.5,
        3,
        [1, 2],
        {"10": "a"},
    ]
    deep = []
    for _ in range(5000):
        deep = [deep]
    for bad in ({"a": object()}, {"a": {1j}}, {(1, 2): 3}, {"a": deep}):
        with pytest.raises(TypeError, match="card holds what JSON cannot"):
            save_weights(small(), "other", bad, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"it.json", "it.safetensors"}


# Files --------------------------------------------------------------------------------------------


def replaced(shelf, name="head.bias", value=None, data=None):
    "The file with one tensor replaced, and a card that fits it"
    path = shelf / "it.safetensors"
    state = load_file(path)
    path.write_bytes(save(state | {name: value}) if data is None else data)
    rewritten(shelf)


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.tensor([0, float("nan"), 0]), "head.bias holds NaN or infinite"),
        (torch.tensor([0, 1e300, 0], dtype=torch.float64), "NaN or infinite"),
        (torch.zeros(3, dtype=torch.int8), "head.bias is a tensor of int8, .*expected float32"),
        (torch.zeros(3, dtype=torch.bool), "tensor of bool"),
        (torch.zeros(3, dtype=torch.complex64), "tensor of complex64"),
        (torch.zeros(3, dtype=torch.int64), "tensor of int64"),
        (torch.zeros(1, 3), "has shape"),
    ],
)
def test_weights_that_are_no_numbers_of_their_kind_are_refused_and_the_model_is_as_it_was(
    shelf, value, words
):
    replaced(shelf, value=value)
    model = small(1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for given in (None, model):
        with pytest.raises(BadWeights, match=words):
            load_weights("it", given, shelf)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "value, like",
    [
        (torch.ones(3, dtype=d), torch.ones(3))
        for d in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    ],
)
def test_other_floats_become_the_models(shelf, value, like):
    replaced(shelf, value=value)
    assert torch.equal(load_weights("it", folder=shelf).head.bias, like)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E5M2", "X9", "C64"])
def test_number_types_that_pytorch_may_not_know_end_in_a_sentence(shelf, dtype):
    header = json.dumps(
        {"head.bias": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}
    ).encode()
    replaced(shelf, data=struct.pack("<Q", len(header)) + header + bytes(8))
    told(load_weights, "it", folder=shelf)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_files_that_are_no_safetensors_end_in_a_sentence(shelf, data):
    replaced(shelf, data=data)
    told(load_weights, "it", folder=shelf)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {}
        self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.words.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tied_weights_travel_and_stay_tied(tmp_path, dtype):
    save_weights(model := Tied(), "it", {}, tmp_path, dtype)
    again = load_weights("it", Tied(), tmp_path)
    assert again.out.weight is again.words.weight and torch.equal(
        again.out.weight, model.out.weight.to(dtype).float()
    )
    state = load_file(tmp_path / "it.safetensors")
    save_file(state | {"out.weight": state["out.weight"] + 1}, tmp_path / "it.safetensors")
    rewritten(tmp_path)
    assert "are one weight in the model and differ in the file" in told(
        load_weights, "it", Tied(), tmp_path
    )


def test_whole_numbers_are_kept_or_refused(tmp_path):
    class Counts(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.config = {}
            self.register_buffer("n", torch.tensor([1, 300]).to(dtype))

    save_weights(Counts(torch.int64), "it", {}, tmp_path)
    assert load_weights("it", Counts(torch.int32), tmp_path).n.tolist() == [1, 300]
    assert "expected uint8" in told(load_weights, "it", Counts(torch.uint8), tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
)
def test_models_whose_weights_are_computed_travel_too(tmp_path, wrap):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(wrap(nn.Linear(4, 3)))
        model.config = {}
        return model

    x = torch.ones(1, 4)
    save_weights(made(0), "it", {}, tmp_path, torch.float32)
    assert torch.equal(load_weights("it", made(1), tmp_path)(x), made(0).eval()(x))


def test_what_a_type_cannot_hold_is_not_written(tmp_path):
    large, tiny = small(), small()
    nn.init.constant_(large.head.bias, 1e6)
    nn.init.constant_(tiny.head.weight, 1e-9)
    assert "not finite in torch.float16" in told(save_weights, large, "it", {}, tmp_path)
    assert "so small that all are zero in torch.float16" in told(
        save_weights, tiny, "it", {}, tmp_path
    )
    assert not list(tmp_path.iterdir())
    for model in (large, tiny):
        save_weights(model, "it", {}, tmp_path, torch.float32)
        assert torch.equal(load_weights("it", folder=tmp_path).head.weight, model.head.weight)


# What training changed ----------------------------------------------------------------------------


def with_a_head_that_learns(seed=0):
    model = small(seed).requires_grad_(False)
    model.head.requires_grad_(True)
    return model


@pytest.mark.parametrize("int8", [False, True])
def test_only_what_learnt_is_stored_and_fits_only_a_base_that_learns_the_same(tmp_path, int8):
    tuned = with_a_head_that_learns()
    tuned.register_buffer("seen", torch.tensor(7))
    torch.nn.init.normal_(tuned.head.weight)
    save_weights(tuned, "head", {}, tmp_path, torch.float32, only="learnt", int8=int8)
    stored, notes = read_tensors(tmp_path / "head.safetensors")
    scale = {"head.weight.scale"} if int8 else set()
    buffers = {name for name, _ in tuned.named_buffers()}
    assert set(stored) == {"head.weight", "head.bias"} | scale | buffers and not notes
    base = with_a_head_that_learns()
    base.register_buffer("seen", torch.tensor(0))
    load_weights("head", base, tmp_path, only="learnt")
    assert base.seen == 7 and torch.equal(base.head.bias, tuned.head.bias)
    step = tuned.head.weight.abs().amax(1, keepdim=True) / 127 if int8 else 0
    assert ((base.head.weight - tuned.head.weight).abs() <= 0.51 * step).all()
    assert "None in the file" in told(load_weights, "head", base, tmp_path)
    assert "has shape" in told(load_weights, "head", small(), tmp_path, only="learnt")
    assert "has shape" in told(load_weights, "head", folder=tmp_path)


def test_eight_bits_are_those_of_the_shipped_student(tmp_path):
    "Read as floats and written again, the file is the same to the last byte"
    card, data = read_file("minilm_sentiment")
    state = pretrained._tensors(data, "minilm_sentiment")
    matrices = {key for key, value in state.items() if value.dtype == torch.int8}
    floats = pretrained._unpack(state, {}, "minilm_sentiment")
    assert len(floats) == len(state) - len(matrices) and matrices
    assert all(torch.equal(floats[k], state[k] * state[f"{k}.scale"].float()) for k in matrices)
    again = pretrained._pack(floats, "it", torch.float16, int8=True)
    path = write_tensors(tmp_path / "it", again)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(1, 3), torch.ones(3, 1).int(), torch.ones(3, 1) / 0]
)
def test_a_scale_that_is_none_of_its_matrix_is_bad_weights(shelf, scale):
    path = shelf / "it.safetensors"
    state = load_file(path)
    state["head.weight"] = torch.ones(3, 4, dtype=torch.int8)
    path.write_bytes(save(state | {"head.weight.scale": scale}))
    rewritten(shelf)
    told(load_weights, "it", small(), shelf)


def test_what_eight_bits_cannot_hold_is_not_written(tmp_path):
    for odd in (1e7, float("nan"), float("inf")):
        model = small()
        model.head.weight.data[0, 0] = odd
        assert "8 bits" in told(save_weights, model, "it", {}, tmp_path, int8=True)
    state = {"w": torch.ones(2, 2), "w.scale": torch.ones(2)}
    with pytest.raises(BadWeights, match="w.scale"):
        pretrained._pack(state, "it", torch.float16, int8=True)
    assert not list(tmp_path.iterdir())


def test_a_card_may_bring_the_config_of_a_model_that_has_none(tmp_path):
    save_weights(nn.Linear(2, 2), "it", dict(config=dict(base="tiny")), tmp_path)
    card = read_card("it", tmp_path)
    assert card["config"] == {"base": "tiny"} and card["architecture"] == "Linear"
    load_weights("it", nn.Linear(2, 2), tmp_path)


# Files with a mark of their own -------------------------------------------------------------------


def test_a_file_with_notes_is_refused_after_any_change(tmp_path):
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)
    tensors = {str(kind): torch.ones(2, 3).to(kind) for kind in kinds}
    tensors |= {"one": torch.tensor(3.0), "none": torch.zeros(0), "turned": torch.rand(2, 3).T}
    path = write_tensors(tmp_path / "it", tensors, dict(layout="{}"))
    found, notes = read_tensors(path)
    assert notes == dict(layout="{}") and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            again, remarks = read_tensors(path)
        except BadWeights:
            continue
        # only the white space and the name of the mark itself may change unnoticed
        assert all(torch.equal(again[k], v) for k, v in tensors.items() if k in again)
    for data in (b"", good[:20], good[:-1], good + b"0"):
        path.write_bytes(data)
        told(read_tensors, path)
    told(read_tensors, tmp_path / "none")
    told(read_tensors, tmp_path)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: save_weights(nn.Linear(1, 1), "a", {}, p), "without a `config`"),
        (lambda p: save_weights("model", "a", {}, p), "model is 'model'"),
        (lambda p: save_weights(small(), "a", [], p), "card is a list"),
        (lambda p: save_weights(small(), 3, {}, p), "name is 3"),
        (lambda p: save_weights(small(), "a", {}, p, torch.int8), "dtype is"),
        (lambda p: save_weights(small(), "a", {}, p, only="head"), "only is 'head'"),
        (lambda p: save_weights(small(), "a", dict(config=[]), p), "without a `config`"),
        (lambda p: load_weights("it", None, p, only=3), "only is 3"),
        (lambda p: write_tensors(p / "a", [1]), "tensors is a list"),
        (lambda p: load_weights(None), "name is None"),
        (lambda p: load_weights("it", "model", p), "model is 'model'"),
        (lambda p: rename_bert([1]), "state is a list"),
        (lambda p: embed_texts(None, None, ["a"]), "model is None"),
        (lambda p: embed_texts(BERT(9), None, ["a"]), "tokenizer is None"),
        (lambda p: embed_texts(BERT(9), None, ["a", 3]), "expected a list"),
        (lambda p: imagenet_inputs(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), 0), "size is 0"),
        (lambda p: imagenet_inputs(np.zeros((1, 3, 9, 9))), "expected bytes"),
    ],
)
def test_another_kind_of_argument_is_a_sentence(tmp_path, call, words):
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


# Fetched weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load, key",
    [(load_minilm, "weights"), (load_minilm, "tokenizer"), (load_efficientnet_lite0, "weights")],
)
def test_a_file_that_is_swapped_after_it_was_checked_is_not_read(tmp_path, monkeypatch, load, key):
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (mark.write_text, ("ran",))

    for name in ("weights", "tokenizer"):
        torch.save(Evil(), tmp_path / name)
    monkeypatch.setattr(
        pretrained,
        "fetch",
        lambda name: {"weights": tmp_path / "weights", "tokenizer": tmp_path / "tokenizer"},
    )
    assert "was changed while it was read" in told(load) and not mark.exists()


def test_even_with_the_right_hash_a_pickle_runs_nothing(tmp_path, monkeypatch):
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (mark.write_text, ("ran",))

    torch.save(Evil(), tmp_path / "weights")
    monkeypatch.setattr(
        pretrained, "_fetched", lambda name, key: (tmp_path / "weights").read_bytes()
    )
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_efficientnet_lite0()
    assert not mark.exists()


# Vectors of texts ---------------------------------------------------------------------------------


class Letters:
    "A tokenizer: a letter is its place in the alphabet, padding is 0"

    class Entry:
        def __init__(self, ids, n):
            self.ids, self.attention_mask = (
                ids + [0] * (n - len(ids)),
                [1] * len(ids) + [0] * (n - len(ids)),
            )

    def __init__(self, pads=True):
        self.pads = pads

    def encode_batch(self, texts):
        ids = [[ord(c) - 96 for c in text] for text in texts]
        return [self.Entry(i, max(map(len, ids)) if self.pads else len(i)) for i in ids]


def bert(dropout=0.0):
    torch.manual_seed(0)
    return BERT(30, 16, 16, 2, 2, dropout=dropout)


TEXTS = ["cab", "a", "bbbbb", "dead", "feed"]


def test_vectors_are_means_of_tokens_in_the_order_of_the_texts():
    model = bert().eval()
    want = torch.stack(
        [
            nn.functional.normalize(
                model.encode(torch.tensor([Letters().encode_batch([t])[0].ids]))[0].mean(0), dim=0
            )
            for t in TEXTS
        ]
    )
    for batch_size in (1, 2, np.int64(5), 100):
        for texts in (TEXTS, tuple(TEXTS), np.array(TEXTS).tolist()):
            torch.testing.assert_close(
                embed_texts(model, Letters(), texts, batch_size), want.detach(), atol=1e-5, rtol=0
            )
    with pytest.raises(ValueError, match="expected one that pads"):
        embed_texts(model, Letters(pads=False), TEXTS)
    with pytest.raises(ValueError, match="batch_size is 0"):
        embed_texts(model, Letters(), TEXTS, 0)


def test_vectors_can_be_trained_on():
    head, vectors = nn.Linear(16, 2), embed_texts(bert(), Letters(), TEXTS)
    assert not vectors.requires_grad and not vectors.is_inference()
    nn.functional.cross_entropy(head(vectors), torch.tensor([0, 1, 0, 1, 0])).backward()
    assert head.weight.grad.abs().sum() > 0


def test_vectors_come_without_dropout_and_modes_come_back():
    model = bert(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    assert torch.equal(embed_texts(model, Letters(), TEXTS), embed_texts(model, Letters(), TEXTS))
    assert [m.training for m in model.modules()] == modes
    with pytest.raises((ValueError, IndexError)):
        embed_texts(model, Letters(), ["zzzz{|}~"])
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_give_the_same_vectors(dtype):
    got = embed_texts(bert().to(dtype), Letters(), TEXTS)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        got.float(), embed_texts(bert(), Letters(), TEXTS), atol=0.05, rtol=0
    )


@pytest.mark.parametrize("kind", ["GPT", "BERT"])
def test_a_loaded_model_is_the_saved_one_to_the_last_bit_in_float32(tmp_path, kind):
    model = (GPT if kind == "GPT" else BERT)(20, 8, 16, 1, 2).eval()
    save_weights(model, "it", {}, tmp_path, torch.float32)
    again, x = load_weights("it", folder=tmp_path), torch.tensor([[1, 2, 3]])
    assert (
        torch.equal(model(x), again(x))
        and count_parameters(model) == count_parameters(again)
        and not again.training
    )
    shutil.copy(tmp_path / "it.safetensors", tmp_path / "it.bin")
    assert read_file("it", tmp_path)[1] == (tmp_path / "it.safetensors").read_bytes()
