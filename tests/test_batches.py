"Streams of batches: every token once, documents kept apart, any step entered at once; and what they refuse."
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.data.batches import (Documents, augmented, endless, epoch_order, join, mapped, open_documents, packed, pad, padded,
                                     same_document, store, store_documents)

rows_of_tokens = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12)


def steps_of_an_epoch(documents, context, batch_size):
    return -(-len(documents.tokens) // context) // batch_size


def real(batches):
    "Count of (document, token) pairs"
    return Counter((d, t) for tokens, owner in batches for d, t in zip(owner.flatten().tolist(), tokens.flatten().tolist()) if d >= 0)


# Whole tensors ---------------------------------------------------------------------------------------------------------

@given(count=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(-5, 2**40), start=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_an_epoch_repeats_nothing_and_any_step_can_be_entered(count, batch, seed, start):
    batch = min(batch, count)
    per_epoch = count // batch
    stream = [x.tolist() for (x,) in islice(endless(torch.arange(count), batch_size=batch, seed=seed), 3 * per_epoch)]
    for e in range(3):
        seen = sum(stream[e * per_epoch : (e + 1) * per_epoch], [])
        assert len(set(seen)) == len(seen) == per_epoch * batch
    start %= 3 * per_epoch
    late = endless(torch.arange(count), batch_size=batch, seed=seed, start=start)
    assert [x.tolist() for (x,) in islice(late, 3 * per_epoch - start)] == stream[start:]


def test_draws_are_what_saved_runs_depend_on():
    "These numbers must never change: runs that are resumed would see other data"
    assert epoch_order(8, seed=3, epoch=2).tolist() == ORDER
    assert [x.tolist() for (x,) in islice(endless(torch.arange(7), batch_size=3, seed=1, start=4), 3)] == STREAM
    noise = lambda x, generator: x + torch.randint(1000, x.shape, generator=generator)
    (views,) = next(augmented(torch.zeros(4, 1, 1, 1, dtype=torch.int64), augment=noise, batch_size=2, seed=2, start=5, views=2))
    assert views.flatten().tolist() == NOISE


ORDER, STREAM, NOISE = [2, 3, 5, 7, 4, 0, 6, 1], [[2, 4, 1], [6, 5, 3], [1, 4, 2]], [339, 897, 265, 900]


# Padded ----------------------------------------------------------------------------------------------------------------

@given(rows=rows_of_tokens, longest=st.none() | st.integers(1, 10), value=st.integers(-1, 200))
@settings(max_examples=60, deadline=None)
def test_padding_changes_no_token(rows, longest, value):
    tokens, mask = pad(rows, value, longest)
    assert [t[m].tolist() for t, m in zip(tokens, mask)] == [row[:longest] for row in rows]
    assert (tokens[~mask] == value).all() and tokens.shape == mask.shape == (len(rows), min(max(map(len, rows)), longest or 99))
    assert (mask.int().diff(dim=1) <= 0).all()  # the padding is at the end


@given(rows=rows_of_tokens, batch=st.integers(1, 12), pool=st.integers(1, 5), seed=st.integers(0, 99), start=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_padded_rows_come_once_with_what_belongs_to_them(rows, batch, pool, seed, start):
    batch = min(batch, len(rows))
    labels, per_epoch = torch.arange(len(rows)), len(rows) // batch
    stream = list(islice(padded(rows, labels, batch_size=batch, pool=pool, seed=seed), 2 * per_epoch))
    for epoch in (stream[:per_epoch], stream[per_epoch:]):
        seen = [i for _, _, index in epoch for i in index.tolist()]
        assert len(set(seen)) == len(seen) == per_epoch * batch
    for tokens, mask, index in stream:
        assert [t[m].tolist() for t, m in zip(tokens, mask)] == [rows[i] for i in index.tolist()]
    start %= 2 * per_epoch
    for a, b in zip(padded(join(rows), labels, batch_size=batch, pool=pool, seed=seed, start=start), stream[start:]):
        assert all(map(torch.equal, a, b))


def test_pools_of_similar_length_pad_less():
    rows = [[1] * int(n) for n in np.random.default_rng(0).integers(1, 100, 512)]
    share = lambda pool: torch.stack([m.float().mean() for _, m in islice(padded(rows, batch_size=16, pool=pool), 32)]).mean()
    assert share(32) > 0.93 > 0.85 > share(4) > share(1) > 0.3 and share(1) < 0.6


# Packed ----------------------------------------------------------------------------------------------------------------

@given(rows=rows_of_tokens, context=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_packed_has_every_token_once_in_an_epoch(rows, context, seed):
    documents = join(rows)
    stream = packed(documents, context=context, batch_size=1, seed=seed)
    want = Counter((d, t) for d, row in enumerate(rows) for t in row)
    for _ in range(2):
        assert real(islice(stream, steps_of_an_epoch(documents, context, 1))) == want


@given(rows=rows_of_tokens, context=st.integers(1, 8), batch=st.integers(1, 4), start=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_packed_can_be_entered_at_any_step(rows, context, batch, start):
    documents = join(rows)
    batch = min(batch, -(-len(documents.tokens) // context))
    stream = list(islice(packed(documents, context=context, batch_size=batch, seed=7), start, start + 4))
    for a, b in zip(packed(documents, context=context, batch_size=batch, seed=7, start=start), stream):
        assert all(map(torch.equal, a, b))


def test_packed_rows_are_in_order_and_only_the_last_is_padded():
    documents = join([[1, 2, 3], [4], [5, 6]])
    rows = {tuple(t[0].tolist()): o[0].tolist() for t, o in islice(packed(documents, context=4, batch_size=1, value=9), 2)}
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
    feel = lambda v: F.scaled_dot_product_attention(v, v, v, attn_mask=same_document(owner))
    assert torch.equal(feel(x)[0, 0, ~mine], feel(y)[0, 0, ~mine]) and feel(x).isfinite().all()
    if not mine.all():
        open_to_all = lambda v: F.scaled_dot_product_attention(v, v, v)
        assert not torch.equal(open_to_all(x)[0, 0, ~mine], open_to_all(y)[0, 0, ~mine])  # without the mask they would


# On disk ---------------------------------------------------------------------------------------------------------------

@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), kind=st.sampled_from(["uint8", "int16", "int64", "float32", "float64", "bool"]),
       width=st.sampled_from([(), (1,), (2, 3)]))
@settings(max_examples=60, deadline=None)
def test_parts_on_disk_are_the_parts_in_memory(tmp_path_factory, sizes, kind, width):
    path = tmp_path_factory.mktemp("s") / "x.npy"
    parts = [np.random.default_rng(i).integers(0, 2, (n, *width)).astype(kind) for i, n in enumerate(sizes)]
    if not sum(sizes):
        with pytest.raises(ValueError, match="nothing to store"):
            store(path, parts)
        assert not path.exists()
        return
    got = mapped(store(path, (torch.from_numpy(p) for p in parts)))
    assert np.array_equal(got.numpy(), np.concatenate(parts)) and np.array_equal(np.load(path), np.concatenate(parts))


def test_a_mapped_tensor_never_writes_into_its_file(tmp_path):
    path = store(tmp_path / "x.npy", [np.arange(6)])
    x = mapped(path)
    x += 1
    assert x.tolist() == [1, 2, 3, 4, 5, 6] and mapped(path).tolist() == [0, 1, 2, 3, 4, 5]


def own_memory():
    "Bytes of this process that no file stands behind"
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not __import__("os").path.exists("/proc/self/status"), reason="only Linux tells")
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
    documents = open_documents(store_documents(folder, iter(rows), vocab_size=100_000 if large else 100))
    assert [d.tolist() for d in documents] == rows and len(documents) == len(rows) and documents[-1].tolist() == rows[-1]
    assert documents.tokens.dtype == (torch.int32 if large else torch.int16) and documents[0].dtype == torch.int64
    for a, b in islice(zip(packed(documents, context=3, batch_size=1), packed(join(rows), context=3, batch_size=1)), 9):
        assert all(map(torch.equal, a, b))


# Bad input -------------------------------------------------------------------------------------------------------------

x, documents = torch.arange(6), join([[1, 2], [3]])
same = lambda x, generator: x


@pytest.mark.parametrize("call, error, words", [
    (lambda: epoch_order(0, 0, 0), ValueError, "count is 0"), (lambda: epoch_order(3, 0.5, 0), ValueError, "seed is 0.5; expected a whole number"),
    (lambda: epoch_order(3, 0, -1), ValueError, "epoch is -1"),
    (lambda: endless(batch_size=1), ValueError, "got no tensors"), (lambda: endless([1], batch_size=1), TypeError, "got a list; expected tensors"),
    (lambda: endless(torch.tensor(1), batch_size=1), TypeError, "got a single number"),
    (lambda: endless(x, x[:2], batch_size=1), ValueError, r"lengths \[2, 6\]"),
    (lambda: endless(x, torch.empty(6, device="meta"), batch_size=1), ValueError, r"on \['cpu', 'meta'\]; move all"),
    (lambda: endless(x, batch_size=7), ValueError, "batch_size is 7 for a set of 6"), (lambda: endless(x, batch_size=0), ValueError, "batch_size is 0"),
    (lambda: endless(x, batch_size=2.0), ValueError, "batch_size is 2.0; expected a whole number"),
    (lambda: endless(x[:0], batch_size=1), ValueError, "a set of 0 examples"), (lambda: endless(x, batch_size=1, start=-1), ValueError, "start is -1"),
    (lambda: augmented(x, augment=None, batch_size=2), TypeError, "augment is a NoneType"),
    (lambda: augmented(x, augment=same, batch_size=2, views=0), ValueError, "views is 0"),
    (lambda: augmented(x, augment=same, batch_size=9), ValueError, "batch_size is 9"),
    (lambda: pad([]), ValueError, "got 0 rows"), (lambda: pad([[1], []]), ValueError, "got 2 rows, 1 of them empty"),
    (lambda: pad([[1]], longest=-1), ValueError, "longest is -1"), (lambda: pad([[1, 0.5]]), TypeError, "rows hold floats"),
    (lambda: padded([[1], [2, 3]], batch_size=3), ValueError, "batch_size is 3"), (lambda: padded([[1]], batch_size=1, pool=0), ValueError, "pool is 0"),
    (lambda: padded([[1], []], batch_size=1), ValueError, "row 1 is empty"), (lambda: padded([[1]], x, batch_size=1), ValueError, r"lengths \[1, 6\]"),
    (lambda: padded([[1]], batch_size=1, longest=0), ValueError, "longest is 0"), (lambda: padded([], batch_size=1), ValueError, "a set of 0 examples"),
    (lambda: join([]), ValueError, "at least one document"), (lambda: join([[1], []]), ValueError, "none of them empty"),
    (lambda: join([[0.5]]), TypeError, "tokens are torch.float32"), (lambda: Documents(x, torch.tensor([3, 3, 6])), ValueError, "ends that grow"),
    (lambda: Documents(x, torch.tensor([2, 5])), ValueError, "to the number of tokens"), (lambda: documents[2], IndexError, "out of range"),
    (lambda: packed([[1]], context=2, batch_size=1), TypeError, "documents are a list; expected Documents"),
    (lambda: packed(documents, context=0, batch_size=1), ValueError, "context is 0"),
    (lambda: packed(documents, context=2, batch_size=3), ValueError, "batch_size is 3 for a set of 2"),
    (lambda: same_document(x), ValueError, r"owner has shape \(6,\)"),
])
def test_bad_input_gets_one_sentence_at_the_call(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parts", [[], [np.zeros((0, 2))], [np.zeros(2), np.zeros((2, 1))], [np.zeros(2), np.zeros(2, int)],
                                   [np.array([{}])], [np.array(["a", object()], dtype=object)]])
def test_parts_that_do_not_fit_leave_no_file(tmp_path, parts):
    with pytest.raises(ValueError, match="nothing to store|expected"):
        store(tmp_path / "x.npy", parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_another_file_is_refused(tmp_path, data):
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(ValueError, match="x.npy is no array that can be mapped"):
        mapped(tmp_path / "x.npy")


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = store(tmp_path / "x.npy", [np.arange(100)])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        mapped(path)
    with pytest.raises(FileNotFoundError, match="nothing.npy does not exist"):
        mapped(tmp_path / "nothing.npy")


@pytest.mark.parametrize("row", [[], [1, 100], [-1], [0.5], ["a"], [[1]], 3, [float("nan")]])
def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path, row):
    with pytest.raises(ValueError, match="document 1 is .* whole numbers from 0 to 99"):
        store_documents(tmp_path / "d", [[1], row], vocab_size=100)
