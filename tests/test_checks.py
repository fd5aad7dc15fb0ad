"The checks of input: one voice, plain values, nothing accepted by accident"

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from foundation.core.checks import (
    check_choice,
    check_floats,
    check_images,
    check_labels,
    check_like,
    check_mask,
    check_model,
    check_number,
    check_rows,
    check_shares,
    check_sizes,
    check_tokens,
    check_whole,
    checked,
    complaint,
    got,
    refuse_nan,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "foundation").rglob("*.py"))
WHOLE = [np.int8, np.int32, np.int64, np.uint8, lambda x: np.array(x), torch.tensor]


@given(st.integers(0, 100), st.sampled_from(WHOLE))
def test_whole_numbers_of_every_kind_come_out_plain(value, kind):
    plain = check_whole(kind(value), "n", 0, 100)
    assert type(plain) is int and plain == value


@given(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([float, np.float64, np.array])
)
def test_numbers_of_every_kind_come_out_plain(value, kind):
    plain = check_number(kind(value), "x")
    assert type(plain) is float and plain == value


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(False),
        2.0,
        np.float32(1),
        "3",
        None,
        [1],
        torch.tensor([1]),
        1j,
        torch.tensor(1.0),
        torch.tensor(True),
        float("nan"),
        nn.Linear(1, 1),
    ],
)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(TypeError, match="n is .*; expected a whole number"):
        check_whole(value, "n")


@pytest.mark.parametrize(
    "value", [True, "0.5", None, [0.5], torch.ones(1), torch.tensor(0.5, requires_grad=True), 1j]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="x is .*; expected a finite number"):
        check_number(value, "x")


@pytest.mark.parametrize(
    "value, limits",
    [
        (float("nan"), {}),
        (float("inf"), {}),
        (-float("inf"), dict(infinite=True, least=0)),
        (float("nan"), dict(infinite=True)),
        (0, dict(above=0)),
        (1, dict(below=1)),
        (-0.001, dict(least=0)),
        (1.001, dict(most=1)),
    ],
)
def test_numbers_out_of_range_are_refused(value, limits):
    with pytest.raises(ValueError, match="x is .*; expected a"):
        check_number(value, "x", **limits)


def test_limits_are_what_they_say():
    assert check_number(0, "x", 0, 1) == 0 and check_number(1, "x", 0, 1) == 1
    assert check_number(float("inf"), "x", above=0, infinite=True) == float("inf")
    assert check_whole(1, "n", 1, 1) == 1
    for wrong in (0, 2):
        with pytest.raises(ValueError, match="from 1 to 1"):
            check_whole(wrong, "n", 1, 1)


def test_several_at_once():
    check_sizes(a=1, b=np.int64(2)), check_sizes(0, a=0), check_shares(p=0, q=1.0)
    assert complaint(check_sizes, a=1, b=0).startswith("b is 0; expected a whole number from 1 on")
    assert complaint(check_shares, p=0.5, q=1.5).startswith("q is 1.5")
    assert check_choice("a", "kind", ["a", "b"]) == "a"
    assert complaint(check_choice, 1.0, "kind", [1, 2]) == "kind is 1.0; expected one of 1, 2"


@pytest.mark.parametrize(
    "shape, fits",
    [
        ((2, 3), "(b, d)"),
        ((2, 3), "(..., d)"),
        ((2, 3), "(b, 3)"),
        ((3,), "(..., k)"),
        ((4, 2, 3), "(..., 2, 3)"),
        ((2, 3, 4, 5), "(b, h, n, e)"),
    ],
)
def test_shapes_that_fit(shape, fits):
    assert check_floats(torch.zeros(shape), "x", fits).shape == shape


@pytest.mark.parametrize(
    "shape, wrong",
    [
        ((2, 3), "(b, n, d)"),
        ((2, 3), "(d)"),
        ((2, 3), "(b, 4)"),
        ((), "(..., k)"),
        ((0, 3), "(b, d)"),
        ((3,), "(..., 2, 3)"),
        ((4, 3, 3), "(..., 2, 3)"),
    ],
)
def test_shapes_that_do_not_fit(shape, wrong):
    with pytest.raises(ValueError, match="shape"):
        check_floats(torch.zeros(shape), "x", wrong)


def test_floats_are_floats():
    assert check_floats(np.zeros((2, 3), ">f4"), "x").dtype == torch.float32
    assert check_floats(np.zeros((4, 3))[::-2], "x").shape == (2, 3)
    for wrong in (
        torch.zeros(2).long(),
        torch.zeros(2, dtype=torch.complex64),
        [0.5],
        None,
        np.array(["a"]),
        np.array([None]),
    ):
        with pytest.raises(TypeError, match="; expected"):
            check_floats(wrong, "x")
    assert "holds 1 NaN or infinite" in complaint(
        check_floats, torch.tensor([1, torch.nan]), "x", finite=True
    )


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize(
    "make",
    [
        *[lambda x, d=d: torch.tensor(x, dtype=d) for d in INTEGERS],
        list,
        tuple,
        lambda x: np.array(x, "uint8"),
        lambda x: [np.int64(v) for v in x],
        lambda x: [torch.tensor(v) for v in x],
        lambda x: np.array(x)[::-1][::-1],
    ],
)
def test_labels_of_every_kind_come_out_as_int64(make):
    labels = check_labels(make([0, 100, 3]), classes=101)
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 100, 3]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ([], "empty"),
        ([0, 3], "run from 0 to 3; expected 0 to 2"),
        ([-1], "run from -1"),
        ([0.5], "whole"),
        (["a"], "whole"),
        ([True], "whole"),
        ([None], "whole"),
        (None, "None"),
        (3, "3"),
        (torch.zeros(2), "long"),
        (torch.zeros(2).bool(), "bool"),
        (torch.zeros(2, 1).long(), r"shape \(2, 1\); expected one axis"),
        ([[0], [1, 2]], "differ"),
        ("012", "'012'"),
        ({}, "dict"),
    ],
)
def test_labels_that_are_none_are_refused(wrong, words):
    with pytest.raises((TypeError, ValueError), match=words):
        check_labels(wrong, classes=3)


def test_ignored_labels_do_not_count():
    assert check_labels([-100, 2], classes=3, ignore_index=-100).tolist() == [-100, 2]
    assert "only" in complaint(check_labels, [-100], classes=3, ignore_index=-100)


def test_tokens_masks_images_rows():
    assert check_tokens([[1, 2], [3, 4]], vocab_size=5).dtype == torch.int64
    assert "0 to 3" in complaint(check_tokens, [[1, 4]], vocab_size=4)
    assert "shape" in complaint(check_tokens, [1, 2])
    assert check_mask(np.array([True])).dtype == torch.bool
    assert "expected bool" in complaint(check_mask, torch.ones(2))
    assert check_images(np.zeros((1, 3, 4, 4), "uint8"), kind="bytes").dtype == torch.uint8
    assert "missing axis" in complaint(check_images, torch.zeros(3, 4, 4))
    assert "expected bytes" in complaint(check_images, torch.zeros(1, 3, 4, 4), kind="bytes")
    assert "expected floats" in complaint(
        check_images, torch.zeros(1, 3, 4, 4).byte(), kind="floats"
    )
    assert check_rows(a=torch.zeros(2), b=torch.zeros(2, 3)) == 2
    assert "a 2, b 3" in complaint(check_rows, a=torch.zeros(2), b=torch.zeros(3))
    assert "to fit y" in complaint(check_like, torch.zeros(2), "x", (3,), torch.zeros(3), "y")
    assert "`encode`" in complaint(check_model, nn.Linear(1, 1), "model", "encode")


def test_nan_is_traced_to_its_source_and_left_alone_while_training():
    bad = torch.tensor([1.0, torch.nan])
    assert complaint(refuse_nan, bad.sum(), a=torch.ones(1), b=bad).startswith(
        "b holds 1 NaN among 2 values"
    )
    assert "infinite" in complaint(refuse_nan, bad.sum(), a=torch.ones(1))
    refuse_nan(bad.sum().requires_grad_(), b=bad)
    refuse_nan(torch.ones(()), b=bad)


@checked
def sample(
    x: Tensor,
    model: nn.Module | None = None,
    n: int = 3,
    share: float = 0.5,
    top: float = float("inf"),
    path: Path | str = "a",
    each: Callable[[int], None] | None = None,
    rows: Sequence[int] = (),
    many: Iterable = (),
    flag: bool = False,
    t: float | Tensor = 1.0,
    free=None,
    **rest: int,
):
    "A doc"
    return dict(locals())


def test_arguments_are_made_plain():
    learnt = torch.ones((), requires_grad=True)
    out = sample(
        np.zeros(2, "float32"),
        None,
        np.int64(4),
        share=np.float32(0.25),
        flag=np.bool_(True),
        t=learnt,
        extra="x",
    )
    assert (
        type(out["x"]) is Tensor
        and type(out["n"]) is int
        and type(out["share"]) is float
        and out["flag"] is True
    )
    assert out["t"] is learnt and out["rest"] == {"extra": "x"}
    assert sample(torch.zeros(2), top=float("inf"))["top"] == float("inf")
    assert sample.__doc__ == "A doc" and sample.__name__ == "sample"


@pytest.mark.parametrize(
    "wrong",
    [
        dict(x=[1.0]),
        dict(x=None),
        dict(model=nn.Linear),
        dict(n=2.0),
        dict(n=True),
        dict(n=None),
        dict(share="a"),
        dict(share=True),
        dict(share=float("inf")),
        dict(share=float("nan")),
        dict(top=float("nan")),
        dict(path=3),
        dict(each=3),
        dict(rows=3),
        dict(many=3),
        dict(flag=1),
        dict(t="1"),
        dict(share=torch.ones((), requires_grad=True)),
    ],
)
def test_arguments_of_another_kind_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises((TypeError, ValueError)) as error:
        sample(**dict(x=torch.zeros(2)) | wrong)
    assert str(error.value).startswith(f"{name} is {got(value)}; expected ")


def test_a_compiled_function_is_recorded_whole():
    @checked
    def twice(x: Tensor, by: float = 2.0) -> Tensor:
        return x * by

    assert torch.equal(
        torch.compile(twice, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 2.0)
    )


# The family keeps house ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda p: p.relative_to(ROOT / "foundation").as_posix()
)
def test_no_module_takes_anothers_private_name(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith("foundation")
        ):
            private = [a.name for a in node.names if re.match(r"_(?!_)", a.name)]
            assert not private, f"{path.name} takes {private} of {node.module}"


def test_the_message_helper_exists_once():
    import json

    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            own = re.search(r"^def (complaint|refusal|message)\(", text, re.M)
            if cell["cell_type"] == "code" and own and "str(error)" in text:
                found.append(path.name)
    assert found == ["00_checks.ipynb"]


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda p: p.relative_to(ROOT / "foundation").as_posix()
)
def test_messages_have_one_voice(path):
    "No full stop at the end, and a name or a lower-case word at the start"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            not isinstance(node, ast.Raise)
            or not isinstance(node.exc, ast.Call)
            or not node.exc.args
        ):
            continue
        if getattr(node.exc.func, "id", "") in ("Refused", "_Unfinished", "DataUnavailable"):
            continue  # verdicts on exercises, and what to do about data, are prose
        message = node.exc.args[0]
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        last = parts[-1]
        if isinstance(last, ast.Constant) and isinstance(last.value, str):
            assert not last.value.endswith("."), (
                f"line {node.lineno}: …{last.value[-40:]!r} ends with a full stop"
            )


def test_what_follows_a_star_is_left_to_the_function():
    @checked
    def f(*rows: Tensor, size: int = 1):
        return rows, size

    x = torch.zeros(2)
    assert type(f(x, x, size=np.int64(3))[1]) is int
    assert len(f(x, x, x)[0]) == 3
    assert "size is 'a'" in complaint(f, x, size="a")
