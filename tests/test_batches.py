"Streams of batches: every token once, documents kept apart, any step entered at once; refusals."

import os
import warnings
from collections import Counter
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.data.batches import (
    Documents,
    augmented,
    by_length,
    endless,
    epoch_order,
    join,
    mapped,
    open_documents,
    packed,
    pad,
    padded,
    same_document,
    store,
    store_documents,
)
from foundation.data.views import two_views

rows_of_tokens = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12
)


def steps_of_an_epoch(documents, context, batch_size):
    return -(-len(documents.tokens) // context) // batch_size


def real(batches):
    "Count of (document, token) pairs"
    return Counter(
        (d, t)
        for tokens, owner in batches
        for d, t in zip(owner.flatten().tolist(), tokens.flatten().tolist())
        if d >= 0
    )


# Whole tensors ----------------------------------------


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 40),
    seed=st.integers(-5, 2**40),
    start=st.integers(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_repeats_nothing_and_any_step_can_be_entered(count, batch, seed, start):
    batch = min(batch, count)
    per_epoch = count // batch
    stream = [
        x.tolist()
        for (x,) in islice(endless(torch.arange(count), batch_size=batch, seed=seed), 3 * per_epoch)
    ]
    for e in range(3):
        seen = sum(stream[e * per_epoch : (e + 1) * per_epoch], [])
        assert len(set(seen)) == len(seen) == per_epoch * batch
    start %= 3 * per_epoch
    late = endless(torch.arange(count), batch_size=batch, seed=seed, start=start)
    assert [x.tolist() for (x,) in islice(late, 3 * per_epoch - start)] == stream[start:]


def test_draws_are_what_saved_runs_depend_on():
    "These numbers must never change: runs that are resumed would see other data"
    assert epoch_order(8, seed=3, epoch=2).tolist() == ORDER
    assert [
        x.tolist() for (x,) in islice(endless(torch.arange(7), batch_size=3, seed=1, start=4), 3)
    ] == STREAM

    def noise(x, generator):
        return x + torch.randint(1000, x.shape, generator=generator)

    (views,) = next(
        augmented(
            torch.zeros(4, 1, 1, 1, dtype=torch.int64),
            augment=noise,
            batch_size=2,
            seed=2,
            start=5,
            views=2,
        )
    )
    assert views.flatten().tolist() == NOISE
    rows = [[i] * (i % 4 + 1) for i in range(9)]
    made = padded(rows, torch.arange(9), batch_size=2, pool=2, seed=3, start=2)
    assert [index.tolist() for _, _, index in islice(made, 6)] == PADDED
    made = packed(join(rows), context=5, batch_size=1, seed=3, start=2)
    assert [tokens[0].tolist() for tokens, _ in islice(made, 3)] == PACKED


ORDER, STREAM, NOISE = (
    [2, 3, 5, 7, 4, 0, 6, 1],
    [[2, 4, 1], [6, 5, 3], [1, 4, 2]],
    [339, 897, 265, 900],
)
PADDED = [[3, 7], [4, 0], [8, 6], [1, 7], [2, 3], [0, 4]]
PACKED = [[2, 3, 3, 3, 3], [6, 7, 7, 7, 7], [0, 1, 1, 2, 2]]


# Padded ----------------------------------------


@given(rows=rows_of_tokens, longest=st.none() | st.integers(1, 10), value=st.integers(-1, 200))
@settings(max_examples=60, deadline=None)
def test_padding_changes_no_token(rows, longest, value):
    tokens, mask = pad(rows, value, longest)
    assert [t[m].tolist() for t, m in zip(tokens, mask)] == [row[:longest] for row in rows]
    assert (tokens[~mask] == value).all() and tokens.shape == mask.shape == (
        len(rows),
        min(max(map(len, rows)), longest or 99),
    )
    assert (mask.int().diff(dim=1) <= 0).all()  # the padding is at the end


@given(
    rows=rows_of_tokens,
    batch=st.integers(1, 12),
    pool=st.integers(1, 5),
    seed=st.integers(0, 99),
    start=st.integers(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_padded_rows_come_once_with_what_belongs_to_them(rows, batch, pool, seed, start):
    batch = min(batch, len(rows))
    labels, per_epoch = torch.arange(len(rows)), len(rows) // batch
    stream = list(
        islice(padded(rows, labels, batch_size=batch, pool=pool, seed=seed), 2 * per_epoch)
    )
    for epoch in (stream[:per_epoch], stream[per_epoch:]):
        seen = [i for _, _, index in epoch for i in index.tolist()]
        assert len(set(seen)) == len(seen) == per_epoch * batch
    for tokens, mask, index in stream:
        assert [t[m].tolist() for t, m in zip(tokens, mask)] == [rows[i] for i in index.tolist()]
    start %= 2 * per_epoch
    for a, b in zip(
        padded(join(rows), labels, batch_size=batch, pool=pool, seed=seed, start=start),
        stream[start:],
    ):
        assert all(map(torch.equal, a, b))


def as_runs_before_drew_them(tokens, labels, batch_size, seed):
    "What saved runs of fine-tuning have seen"
    rng, lengths = torch.Generator().manual_seed(seed), (tokens != 0).sum(1)
    while True:
        order = torch.randperm(len(tokens), generator=rng)
        batches = order[lengths[order].argsort(stable=True)].split(batch_size)
        for i in torch.randperm(len(batches), generator=rng).tolist():
            yield tokens[batches[i]], labels[batches[i]]


@given(rows_of_tokens, st.integers(1, 12), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_batches_of_like_length_visit_each_row_once_an_epoch(rows, batch, seed):
    tokens, real = pad([[t + 1 for t in row] for row in rows])
    labels, lengths = torch.arange(len(rows)), real.sum(1)
    steps = -(-len(rows) // batch)
    stream = islice(by_length(tokens, labels, batch_size=batch, seed=seed), 2 * steps)
    known = as_runs_before_drew_them(tokens, labels, batch, seed)
    seen = []
    for (x, y), (a, b) in zip(stream, known):
        assert torch.equal(x, a) and torch.equal(y, b) and torch.equal(x, tokens[y])
        seen.append(y)
    for epoch in (seen[:steps], seen[steps:]):
        assert sorted(torch.cat(epoch).tolist()) == labels.tolist()
        spans = sorted((lengths[y].min().item(), lengths[y].max().item()) for y in epoch)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


def test_two_views_are_of_one_picture_and_repeat_for_a_step():
    pictures = torch.arange(8.0)[:, None, None, None].expand(8, 1, 2, 2)

    def shift(x, generator):
        return x + torch.rand(len(x), 1, 1, 1, generator=generator) / 2

    stream = list(islice(two_views(pictures, shift, batch_size=4, seed=3), 3))
    for views in stream:
        a, b = views.chunk(2)
        assert torch.equal(a.floor(), b.floor()) and not torch.equal(a, b)
    assert torch.equal(next(two_views(pictures, shift, 4, seed=3, start=2)), stream[2])


def test_pools_of_similar_length_pad_less():
    rows = [[1] * int(n) for n in np.random.default_rng(0).integers(1, 100, 512)]

    def share(pool):
        return torch.stack(
            [m.float().mean() for _, m in islice(padded(rows, batch_size=16, pool=pool), 32)]
        ).mean()

    assert share(32) > 0.93 > 0.85 > share(4) > share(1) > 0.3 and share(1) < 0.6


# Packed ----------------------------------------


@given(rows=rows_of_tokens, context=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_packed_has_every_token_once_in_an_epoch(rows, context, seed):
    documents = join(rows)
    stream = packed(documents, context=context, batch_size=1, seed=seed)
    want = Counter((d, t) for d, row in enumerate(rows) for t in row)
    for _ in range(2):
        assert real(islice(stream, steps_of_an_epoch(documents, context, 1))) == want


@given(
    rows=rows_of_tokens,
    context=st.integers(1, 8),
    batch=st.integers(1, 4),
    start=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_packed_can_be_entered_at_any_step(rows, context, batch, start):
    documents = join(rows)
    batch = min(batch, -(-len(documents.tokens) // context))
    stream = list(
        islice(packed(documents, context=context, batch_size=batch, seed=7), start, start + 4)
    )
    for a, b in zip(
        packed(documents, context=context, batch_size=batch, seed=7, start=start), stream
    ):
        assert all(map(torch.equal, a, b))


def test_packed_rows_are_in_order_and_only_the_last_is_padded():
    documents = join([[1, 2, 3], [4], [5, 6]])
    rows = {
        tuple(t[0].tolist()): o[0].tolist()
        for t, o in islice(packed(documents, context=4, batch_size=1, value=9), 2)
    }
    assert rows == {(1, 2, 3, 4): [0, 0, 0, 1], (5, 6, 9, 9): [2, 2, -1, -1]}


@given(rows=rows_of_tokens, context=st.integers(2, 16), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_document_feels_another(rows, context, seed):
    "Attention under the mask, while one document of the row says something else"
    tokens, owner = next(packed(join(rows), context=context, batch_size=1, seed=seed))
    words = torch.randn(100, 4, generator=torch.Generator().manual_seed(seed))
    x = words[tokens][:, None]  # (1, 1, n, 4)
    y = x.clone()
    mine = owner[0] == owner[0, 0]
    y[0, 0, mine] += 1

    def feel(v):
        return F.scaled_dot_product_attention(v, v, v, attn_mask=same_document(owner))

    assert torch.equal(feel(x)[0, 0, ~mine], feel(y)[0, 0, ~mine]) and feel(x).isfinite().all()
    if not mine.all():

        def open_to_all(v):
            return F.scaled_dot_product_attention(v, v, v)

        assert not torch.equal(
            open_to_all(x)[0, 0, ~mine], open_to_all(y)[0, 0, ~mine]
        )  # without the mask they would


# On disk ----------------------------------------


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    kind=st.sampled_from(["uint8", "int16", "int64", "float32", "float64", "bool"]),
    width=st.sampled_from([(), (1,), (2, 3)]),
)
@settings(max_examples=60, deadline=None)
def test_parts_on_disk_are_the_parts_in_memory(tmp_path_factory, sizes, kind, width):
    path = tmp_path_factory.mktemp("s") / "x.npy"
    parts = [
        np.random.default_rng(i).integers(0, 2, (n, *width)).astype(kind)
        for i, n in enumerate(sizes)
    ]
    if not sum(sizes):
        with pytest.raises(ValueError, match="nothing to store"):
            store(path, parts)
        assert not path.exists()
        return
    got = mapped(store(path, (torch.from_numpy(p) for p in parts)))
    assert np.array_equal(got.numpy(), np.concatenate(parts)) and np.array_equal(
        np.load(path), np.concatenate(parts)
    )


def test_a_mapped_tensor_never_writes_into_its_file(tmp_path):
    path = store(tmp_path / "x.npy", [np.arange(6)])
    x = mapped(path)
    x += 1
    assert x.tolist() == [1, 2, 3, 4, 5, 6] and mapped(path).tolist() == [0, 1, 2, 3, 4, 5]


def own_memory():
    "Bytes of this process that no file stands behind"
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(
    not __import__("os").path.exists("/proc/self/status"), reason="only Linux tells"
)
def test_a_stream_over_a_large_file_takes_little_memory(tmp_path):
    part = np.zeros((1000, 4096), np.uint8)  # 4 MB
    path = store(tmp_path / "x.npy", (part + i for i in range(40)))
    before = own_memory()
    stream = endless(mapped(path), batch_size=64)
    assert sum(int(x[:, 0].sum()) for (x,) in islice(stream, 200)) > 0
    assert own_memory() - before < 40e6 < path.stat().st_size / 3.9


@given(rows=rows_of_tokens, large=st.booleans())
@settings(max_examples=30, deadline=None)
def test_documents_on_disk_are_the_documents_in_memory(tmp_path_factory, rows, large):
    folder = tmp_path_factory.mktemp("d")
    documents = open_documents(
        store_documents(folder, iter(rows), vocab_size=100_000 if large else 100)
    )
    assert (
        [d.tolist() for d in documents] == rows
        and len(documents) == len(rows)
        and documents[-1].tolist() == rows[-1]
    )
    assert (
        documents.tokens.dtype == (torch.int32 if large else torch.int16)
        and documents[0].dtype == torch.int64
    )
    for a, b in islice(
        zip(
            packed(documents, context=3, batch_size=1), packed(join(rows), context=3, batch_size=1)
        ),
        9,
    ):
        assert all(map(torch.equal, a, b))


# Bad input ----------------------------------------

x, documents, pictures = torch.arange(6), join([[1, 2], [3]]), torch.zeros(6, 1, 2, 2)


def same(x, generator):
    return x


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: epoch_order(0, 0, 0), ValueError, "count is 0"),
        (lambda: epoch_order(3, 0.5, 0), TypeError, "seed is 0.5; expected a whole number"),
        (lambda: epoch_order(3, 0, -1), ValueError, "epoch is -1"),
        (lambda: endless(batch_size=1), ValueError, "got none"),
        (lambda: endless([1], batch_size=1), TypeError, "a list; expected a tensor"),
        (lambda: epoch_order(10**20, 0, 0), ValueError, "cut larger sets"),
        (lambda: endless(x, batch_size=2, seed=None), TypeError, "seed is None"),
        (lambda: endless(torch.tensor(1), batch_size=1), ValueError, "got a single number"),
        (lambda: endless(x, x[:2], batch_size=1), ValueError, r"lengths \[2, 6\]"),
        (
            lambda: endless(x, torch.empty(6, device="meta"), batch_size=1),
            ValueError,
            r"on \['cpu', 'meta'\]; expected one device",
        ),
        (lambda: endless(x, batch_size=7), ValueError, "batch_size is 7 for a set of 6"),
        (lambda: endless(x, batch_size=0), ValueError, "batch_size is 0"),
        (
            lambda: endless(x, batch_size=2.0),
            TypeError,
            "batch_size is 2.0; expected a whole number",
        ),
        (lambda: endless(x[:0], batch_size=1), ValueError, "a set of 0 examples"),
        (lambda: endless(x, batch_size=1, start=-1), ValueError, "start is -1"),
        (
            lambda: augmented(pictures, augment=None, batch_size=2),
            TypeError,
            "augment is None; expected a function of",
        ),
        (
            lambda: augmented(pictures, augment=same, batch_size=2, views=0),
            ValueError,
            "views is 0",
        ),
        (lambda: augmented(pictures, augment=same, batch_size=9), ValueError, "batch_size is 9"),
        (
            lambda: augmented(x, augment=same, batch_size=2),
            ValueError,
            r"images has shape \(6,\); expected \(b, c, h, w\)",
        ),
        (
            lambda: augmented(pictures[:, 0], augment=same, batch_size=2),
            ValueError,
            "add the missing axis",
        ),
        (
            lambda: augmented([pictures], augment=same, batch_size=2),
            TypeError,
            "a list; expected a tensor",
        ),
        (
            lambda: next(augmented(pictures, augment=lambda v, g: v[:1], batch_size=2)),
            ValueError,
            r"augment gave .* \(1, 1, 2, 2\); expected images \(2, c, h, w\)",
        ),
        (
            lambda: next(augmented(pictures, augment=lambda v, g: None, batch_size=2)),
            ValueError,
            "augment gave None",
        ),
        (lambda: pad([]), ValueError, "at least one row"),
        (lambda: pad([[1], []]), ValueError, "row 1 is empty"),
        (lambda: pad(3), TypeError, "rows is 3"),
        (lambda: pad([[1]], longest=-1), ValueError, "longest is -1"),
        (lambda: pad([[1, 0.5]]), TypeError, "row 0 is .* expected whole numbers"),
        (lambda: pad([1, 2]), ValueError, r"row 0 has shape \(\)"),
        (lambda: pad([[[1, 2, 3]]]), ValueError, r"row 0 has shape \(1, 3\)"),
        (lambda: pad([[1], "ab"]), TypeError, "row 1 is 'ab'"),
        (lambda: pad([[1], None]), TypeError, "row 1 is None"),
        (lambda: pad([[1], [2, None]]), TypeError, "row 1 is a list"),
        (lambda: pad([[2**64]]), TypeError, "row 0 is a list"),
        (lambda: pad([[True]]), TypeError, "row 0 is a tensor of bool"),
        (lambda: pad([[1]], value=float("nan")), TypeError, "value is nan"),
        (lambda: pad([[1]], value=2**63), ValueError, "value is 9223372036854775808"),
        (lambda: pad([[1]], value=0.5), TypeError, "value is 0.5"),
        (
            lambda: pad([x, torch.empty(2, dtype=torch.int64, device="meta")]),
            ValueError,
            r"rows are on \['cpu', 'meta'\]",
        ),
        (lambda: padded([[1], [2, 3]], batch_size=3), ValueError, "batch_size is 3"),
        (lambda: padded([[1]], batch_size=1, pool=0), ValueError, "pool is 0"),
        (lambda: padded([[1], []], batch_size=1), ValueError, "row 1 is empty"),
        (lambda: padded([[1]], x, batch_size=1), ValueError, r"lengths \[1, 6\]"),
        (lambda: padded([[1]], batch_size=1, longest=0), ValueError, "longest is 0"),
        (lambda: padded([], batch_size=1), ValueError, "rows is empty"),
        (lambda: padded([1, 2], batch_size=1), TypeError, "rows is a list; expected Documents"),
        (lambda: padded(None, batch_size=1), TypeError, "rows is None"),
        (lambda: padded("ab", batch_size=1), TypeError, "rows is 'ab'"),
        (lambda: padded(iter([[1]]), batch_size=1), TypeError, "rows is a list_iterator"),
        (lambda: padded({1: [2]}, batch_size=1), TypeError, "rows is a dict"),
        (lambda: padded([[1]], [2], batch_size=1), TypeError, "a list; expected a tensor"),
        (lambda: padded([[1]], batch_size=1, value=None), TypeError, "value is None"),
        (lambda: join([]), ValueError, "at least one row"),
        (lambda: join([[1], []]), ValueError, "row 1 is empty"),
        (lambda: join([1, 2]), ValueError, "row 0 has shape"),
        (lambda: join([[0.5]]), TypeError, "row 0 is a tensor of float32"),
        (lambda: Documents(x, torch.tensor([3, 3, 6])), ValueError, "ends that grow"),
        (
            lambda: Documents(x, torch.tensor([4, 2, 6], dtype=torch.uint8)),
            ValueError,
            "ends that grow",
        ),
        (lambda: Documents([1], [1]), TypeError, "tokens is a list"),
        (
            lambda: Documents(x.float(), torch.tensor([6])),
            TypeError,
            "tokens is a tensor of float32",
        ),
        (lambda: Documents(x[None], torch.tensor([1])), ValueError, "one axis"),
        (lambda: Documents(x, torch.tensor([6.0])), TypeError, "ends is a tensor of float32"),
        (lambda: Documents(x, torch.tensor(6)), ValueError, "ends has shape"),
        (lambda: documents["a"], TypeError, "the number of a document is 'a'"),
        (lambda: documents[1:1], ValueError, "the slice holds no document"),
        (lambda: documents[-3], IndexError, "document -3 is out of range; there are 2"),
        (lambda: documents[0.0], TypeError, "document is 0.0"),
        (lambda: Documents(x, torch.tensor([2, 5])), ValueError, "to the number of tokens"),
        (lambda: documents[2], IndexError, "out of range"),
        (
            lambda: packed([[1]], context=2, batch_size=1),
            TypeError,
            "documents is a list; expected a Documents",
        ),
        (lambda: packed(documents, context=0, batch_size=1), ValueError, "context is 0"),
        (
            lambda: packed(documents, context=2, batch_size=3),
            ValueError,
            "batch_size is 3 for a set of 2",
        ),
        (lambda: same_document(x), ValueError, r"owner has shape \(6,\)"),
        (lambda: same_document([[1]]), TypeError, "owner is a list"),
        (lambda: same_document(x[None] / 2), TypeError, "owner is a tensor of float32"),
        (lambda: packed(documents, context=2, batch_size=1, value=0.5), TypeError, "value is 0.5"),
        (
            lambda: store("x.npy", x),
            TypeError,
            r"parts is a tensor of int64, shape \(6,\); expected several",
        ),
        (lambda: store("x.npy", 3), TypeError, "parts is 3"),
        (lambda: store_documents("d", [[1]], 0), ValueError, "vocab_size is 0"),
        (lambda: store_documents("d", [[1]], 2**32), ValueError, "vocab_size is 4294967296"),
        (lambda: open_documents(3), TypeError, "folder is 3"),
        (lambda: mapped(3), TypeError, "path is 3"),
        (lambda: by_length(x[None], x, batch_size=1), ValueError, "tensors have lengths"),
        (lambda: by_length(x[None], batch_size=0), ValueError, "batch_size is 0"),
        (lambda: by_length([[1]], batch_size=1), TypeError, "tokens is a list"),
        (lambda: two_views(x, len, 2), ValueError, "images"),
        (lambda: two_views(x.view(6, 1, 1, 1) / 6, None, 2), TypeError, "augment is None"),
    ],
)
def test_bad_input_gets_one_sentence_at_the_call(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [np.zeros((0, 2))],
        [np.zeros(2), np.zeros((2, 1))],
        [np.zeros(2), np.zeros(2, int)],
        [np.zeros((3, 0))],
        [np.zeros(3), np.zeros(3, ">f4")],
        iter([torch.zeros(2), torch.zeros(2, 2)]),
    ],
)
def test_parts_that_do_not_fit_leave_no_file(tmp_path, parts):
    with pytest.raises(ValueError, match="nothing to store|as before"):
        store(tmp_path / "x.npy", parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part",
    [
        np.array([{}]),
        np.array(["a", object()], dtype=object),
        np.array(["a", "b"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.zeros(2, np.longdouble),
        np.zeros(2, "i4,f4"),
        torch.tensor(3.0),
        np.float32(3),
        3,
        None,
        "ab",
        [[1], [2, 3]],
        {},
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2).to(torch.float8_e5m2),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ],
)
def test_parts_that_no_array_file_holds_are_named(tmp_path, part):
    with pytest.raises(TypeError, match="part 1 is .*; expected rows of numbers") as caught:
        store(tmp_path / "x.npy", [np.zeros(2), part])
    assert not list(tmp_path.iterdir()) and "\n" not in str(caught.value)
    if isinstance(part, torch.Tensor) and part.dtype == torch.bfloat16:
        assert "float32 or float16" in str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        torch.tensor([[1.5, 2.5]], requires_grad=True),
        torch.nn.Parameter(torch.ones(2, 3)),
        torch.arange(6.0).view(2, 3).T,
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(2).half(),
        torch.tensor([1, 65535]).to(torch.uint16),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(12.0)[::-2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        [[1, 2], [3, 4]],
    ],
)
def test_parts_of_every_kind_come_back(tmp_path, part):
    "With a gradient, in another byte or memory order, a view that is only marked as conjugate"
    want = (
        part.detach().resolve_conj().resolve_neg().numpy()
        if isinstance(part, torch.Tensor)
        else np.asarray(part)
    )
    back = mapped(store(tmp_path / "x.npy", [part, part]))
    assert np.array_equal(back.numpy(), np.concatenate([want, want])) and not back.requires_grad


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no array",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
        b"PK\x03\x04" + bytes(100),
        b"\x93NUMPY\x01\x00\x05\x00(((((",
    ],
)
def test_another_file_is_refused(tmp_path, data):
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match="x.npy is no array that can be mapped") as caught:
        mapped(tmp_path / "x.npy")
    assert "\n" not in str(caught.value)


def test_a_damaged_header_is_refused_or_means_as_many_bytes(tmp_path):
    "Each byte of the header flipped in turn: a sentence, or rows that fill the file exactly"
    path = store(tmp_path / "x.npy", [np.arange(24, dtype=np.int32).reshape(6, 4)])
    raw, rng, accepted = path.read_bytes(), np.random.default_rng(0), 0
    for place in [*range(80), *range(80)]:
        path.write_bytes(
            raw[:place] + bytes([raw[place] ^ (1 << int(rng.integers(8)))]) + raw[place + 1 :]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows = mapped(path)
            except ValueError as error:
                assert "\n" not in str(error)
                continue
        accepted += 1
        assert rows.numel() * rows.element_size() == 96
    assert accepted < 60  # "<i4" can become "<u4", and a blank another blank


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + b"more",
        lambda raw: raw.replace(b"(6, 4)", b"(5, 4)"),
        lambda raw: raw.replace(b"(6, 4)", b"(7, 4)"),
        lambda raw: raw.replace(b"(6, 4), ", b"(), "[:0] + b"(),     "),
    ],
)
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path, change):
    path = store(tmp_path / "x.npy", [np.arange(24).reshape(6, 4)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="x.npy is no array"):
        mapped(path)


@pytest.mark.parametrize("name", ["", ".", "none.npy", "a\0b", "x" * 300])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mapped(tmp_path / name)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = store(tmp_path / "x.npy", [np.arange(100)])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        mapped(path)
    with pytest.raises(FileNotFoundError, match="nothing.npy does not exist"):
        mapped(tmp_path / "nothing.npy")


@pytest.mark.parametrize(
    "row",
    [
        [],
        [1, 100],
        [-1],
        [0.5],
        ["a"],
        [[1]],
        3,
        [float("nan")],
        None,
        "12",
        [[1], [2, 3]],
        {},
        [2**70],
        [True],
    ],
)
def test_what_is_no_row_of_tokens_of_the_vocabulary_is_refused(tmp_path, row):
    with pytest.raises(
        (TypeError, ValueError), match="document 1 (is|has) .*; expected .*"
    ) as caught:
        store_documents(tmp_path / "d", [[1], row], vocab_size=100)
    assert len(str(caught.value)) < 200 and not list((tmp_path / "d").iterdir())


# Documents that are replaced ----------------------------------------

OLD, NEW = (
    [[1, 2], [3, 4, 5], [6]],
    [[7], [8, 9], [10, 11, 12]],
)  # as many documents, as many tokens


def rows_in(folder):
    return [row.tolist() for row in open_documents(folder)]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("moment", range(8))
def test_documents_that_are_stopped_while_they_are_written_are_old_or_new_or_refused(
    tmp_path, moment, older
):
    "Stopped before any of the moves that put a file in its place; older folders have no note"
    store_documents(tmp_path, OLD, 100)
    if older:
        (tmp_path / "documents.json").unlink()
    left, move = [moment], os.replace

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        move(*args)

    stopped = False
    with patch("os.replace", stop):
        try:
            store_documents(tmp_path, NEW, 100)
        except KeyboardInterrupt:
            stopped = True
    try:
        seen = rows_in(tmp_path)
    except ValueError as error:
        assert stopped and "store them again" in str(error)
        store_documents(tmp_path, NEW, 100)
        seen = NEW
    assert seen == (OLD if moment < 3 else NEW) and rows_in(tmp_path) == seen
    names = {p.name for p in tmp_path.iterdir()} | {"documents.json"}
    assert names == {"tokens.npy", "ends.npy", "documents.json"}


def test_documents_of_two_sets_are_refused(tmp_path):
    for name, rows in dict(a=OLD, b=NEW).items():
        store_documents(tmp_path / name, rows, 100)
    os.replace(tmp_path / "b" / "tokens.npy", tmp_path / "a" / "tokens.npy")
    with pytest.raises(ValueError, match="the files in a are not of one set"):
        open_documents(tmp_path / "a")


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"[" * 100_000, b"\xff", b"{}", b"[]", b'{"tokens.npy": "0", "ends.npy": "0"}'],
)
def test_a_note_that_says_something_else_is_refused_and_none_is_an_older_folder(tmp_path, note):
    store_documents(tmp_path, OLD, 100)
    (tmp_path / "documents.json").write_bytes(note)
    with pytest.raises(ValueError, match="not of one set"):
        open_documents(tmp_path)
    (tmp_path / "documents.json").unlink()
    assert rows_in(tmp_path) == OLD


def test_one_changed_token_of_many_is_seen(tmp_path):
    store_documents(tmp_path, [range(1, 50)] * 2000, 100)
    path = tmp_path / "tokens.npy"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="not of one set"):
        open_documents(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/deeper", "a\0b", "x" * 300, "\ud800"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((OSError, ValueError), match="the folder .* cannot be made: "):
        store_documents(tmp_path / name, OLD, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_documents(tmp_path):
    store_documents(tmp_path, OLD, 100)
    with (
        patch("os.fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="tokens.npy does not fit on the disk; make room"),
    ):
        store_documents(tmp_path, NEW, 100)
    assert rows_in(tmp_path) == OLD and len(list(tmp_path.iterdir())) == 3


# Numbers and rows of every kind ----------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.array, torch.tensor])
def test_numbers_of_numpy_are_plain_numbers(kind, tmp_path):
    def noise(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    streams = {
        "endless": lambda k: endless(torch.arange(9), batch_size=k(4), seed=k(200), start=k(3)),
        "augmented": lambda k: augmented(
            pictures, augment=noise, batch_size=k(4), seed=k(200), start=k(3), views=k(2)
        ),
        "padded": lambda k: padded(
            [[1, 2], [3], [4, 5, 6]] * 3,
            torch.arange(9),
            batch_size=k(2),
            value=k(7),
            longest=k(2),
            seed=k(200),
            start=k(3),
            pool=k(2),
        ),
        "packed": lambda k: packed(
            join([[1, 2], [3], [4, 5, 6]]),
            context=k(4),
            batch_size=k(1),
            value=k(7),
            seed=k(200),
            start=k(3),
        ),
    }
    for make in streams.values():
        for a, b in islice(zip(make(kind), make(int)), 5):
            assert all(map(torch.equal, a, b))
    assert torch.equal(epoch_order(kind(9), kind(200), kind(3)), epoch_order(9, 200, 3))
    assert torch.equal(pad([[1], [2, 3]], kind(5), kind(1))[0], pad([[1], [2, 3]], 5, 1)[0])
    assert (
        documents[kind(1)].tolist() == [3]
        and len(open_documents(store_documents(tmp_path, [[1]], kind(9)))) == 1
    )


KINDS = [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_whole_kind(kind, tmp_path):
    rows = [[1, 2], [3], [250, 5, 6]]
    arrays = [np.array(row, kind) for row in rows]
    for made in (join(arrays), open_documents(store_documents(tmp_path, arrays, 300))):
        assert [row.tolist() for row in made] == rows
    assert pad(arrays)[0].tolist() == pad(rows)[0].tolist()
    whole = Documents(np.concatenate(arrays), np.array([2, 3, 6], kind))
    assert [row.tolist() for row in whole] == rows and [row.tolist() for row in whole[1:]] == rows[
        1:
    ]
    for a, b in islice(
        zip(packed(whole, context=2, batch_size=1), packed(join(rows), context=2, batch_size=1)), 3
    ):
        assert all(map(torch.equal, a, b))
    for a, b in islice(
        zip(
            padded(arrays, np.arange(3), batch_size=2), padded(rows, torch.arange(3), batch_size=2)
        ),
        3,
    ):
        assert all(map(torch.equal, a, b))


def test_arrays_that_cannot_be_written_to():
    frozen = np.arange(6)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = next(endless(frozen, batch_size=6))
        pad([frozen, [1]])
    assert sorted(batch.tolist()) == [0, 1, 2, 3, 4, 5]


@given(
    rows=rows_of_tokens,
    a=st.none() | st.integers(-14, 14),
    b=st.none() | st.integers(-14, 14),
    step=st.sampled_from([None, 1, 2, -1, -3]),
)
@settings(max_examples=60, deadline=None)
def test_slices_of_documents_are_slices_of_a_list(rows, a, b, step):
    want = rows[a:b:step]
    if want:
        part = join(rows)[a:b:step]
        assert isinstance(part, Documents) and [row.tolist() for row in part] == want
        assert int(part.ends[-1]) == len(part.tokens)


def test_a_slice_shares_its_tokens():
    whole = join([[1, 2], [3], [4]])
    assert whole[1:].tokens.data_ptr() == whole.tokens[2:].data_ptr()


def test_the_padding_is_the_number_that_was_asked_for():
    "Also one that no float64 holds"
    assert pad([[1], [2, 3]], 2**60 + 1)[0].tolist() == [[1, 2**60 + 1], [2, 3]] and pad(
        [[1], [-100, 3]], -100
    )[0].tolist() == [[1, -100], [-100, 3]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_stay_where_their_tensors_are():
    rows = [torch.tensor(row, device="cuda") for row in ([1, 2], [3], [4, 5, 6])]
    made = join(rows)
    for a, b in islice(
        zip(
            packed(made, context=2, batch_size=1),
            packed(join(r.cpu() for r in rows), context=2, batch_size=1),
        ),
        3,
    ):
        assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(a, b))
    for batch in islice(
        padded(made, torch.arange(3, device="cuda"), torch.arange(3), batch_size=2), 3
    ):
        assert [t.is_cuda for t in batch] == [True, True, True, False]

    def noise(x, generator):
        return x + torch.rand(x.shape, generator=generator, device=x.device)

    assert next(augmented(torch.zeros(4, 1, 2, 2, device="cuda"), augment=noise, batch_size=2))[
        0
    ].is_cuda


# Data sets that decode as they go ------------------------


class Counted(torch.utils.data.Dataset):
    "Pictures with their number, which note what was opened"

    def __init__(self, count=40, form=tuple):
        self.count, self.form, self.opened = count, form, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.opened.append(i)
        x = torch.full((1, 2, 2), i, dtype=torch.uint8)
        return dict(image=x, label=i) if self.form is dict else (x, i)


@pytest.mark.parametrize("form", [tuple, dict])
@pytest.mark.parametrize("start", [0, 3, 11])
def test_a_data_set_streams_as_its_tensors_would_and_opens_no_more(form, start):
    data, numbers = Counted(form=form), torch.arange(40)
    x = numbers.to(torch.uint8).view(40, 1, 1, 1).expand(40, 1, 2, 2)
    plan = dict(batch_size=6, seed=4, start=start)
    before = torch.random.get_rng_state()
    for (a, i), (b, j) in islice(zip(endless(data, **plan), endless(x, numbers, **plan)), 9):
        assert torch.equal(a, b) and torch.equal(i, j)
    assert len(data.opened) <= 6 * 10 and len(data.opened) >= 6 * 9
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_change_nothing():
    one, two = (islice(endless(Counted(), batch_size=8, seed=1, workers=w), 7) for w in (0, 2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, two))


def test_views_of_a_data_set_are_those_of_its_pictures():
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 2, 2)

    def shift(x, generator):
        return x + torch.rand(len(x), 1, 1, 1, generator=generator)

    plan = dict(augment=shift, batch_size=5, seed=2, start=9)
    for a, b in islice(zip(two_views(Counted(), **plan), two_views(x, **plan)), 4):
        assert torch.equal(a, b)


def test_a_data_set_that_does_not_fit_gets_a_sentence():
    class Odd(Counted):
        def __getitem__(self, i):
            return torch.zeros(1, 2 + i % 2, 2)

    with pytest.raises(ValueError, match="expected one: resize in"):
        next(endless(Odd(), batch_size=8))
    with pytest.raises(ValueError, match="batch_size is 50"):
        endless(Counted(), batch_size=50)
    with pytest.raises(ValueError, match="workers is -1"):
        endless(Counted(), batch_size=5, workers=-1)
