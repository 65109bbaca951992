"""Extents from tensors: what follows, and what each misfit says."""

import pytest
import torch
from builders import at, cascade, op
from einfall.ir.cascade import Concat, Einsum, Populate
from einfall.ir.errors import BindingError
from einfall.ir.expr import Const, Extent, Index, Read
from einfall.ir.reference import bind_sizes, evaluate, from_torch, to_torch
from einfall.ir.types import DTYPES
from hypothesis import given
from hypothesis import strategies as st

SCORES = [Einsum("S", ("b", "m", "p"), op("mul", at("Q b m e"), at("K b p e")), "sum", ("e",))]


def scores(**changes):
    return cascade("scores", **{"inputs": ["Q: b m e", "K: b p e"], "body": SCORES, "outputs": "S: b m p", **changes})


def test_extents_come_from_the_axes():
    assert bind_sizes(scores(), {"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 4)}) == {"b": 2, "m": 3, "e": 4, "p": 5}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"Q": torch.zeros(2, 3, 4)}, r"no tensor given for K\[b, p, e\]: f32\n  in cascade scores"),
        ({"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 4), "V": torch.zeros(1)}, r"'V' is no input(.|\n)*inputs are Q, K"),
        ({"Q": torch.zeros(3, 4), "K": torch.zeros(2, 5, 4)}, r"Q\[b, m, e\]: f32 has 3 axes, found 2 in shape \[3, 4\]"),
        ({"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 4).int()}, r"K\[b, p, e\]: f32 expects torch.float32, found torch.int32"),
        ({"Q": torch.zeros(2, 3, 4).double(), "K": torch.zeros(2, 5, 4)}, r"found torch.float64(.|\n)*declare Q as f64"),
        ({"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 6)}, r"rank e has extent 4 \(axis 2 of Q.*\), but axis 2 of K.* makes it 6"),
        ({"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 4, device="meta")}, r"different devices: Q on cpu, K on meta"),
        ({"Q": [1.0], "K": torch.zeros(2, 5, 4)}, r"Q\[b, m, e\]: f32 is given a list"),
    ],
)
def test_what_does_not_fit_is_named(tensors, message):
    with pytest.raises(BindingError, match=message):
        bind_sizes(scores(), tensors)


def test_static_sizes_are_honoured():
    given_tensors = {"Q": torch.zeros(2, 3, 4), "K": torch.zeros(2, 5, 4)}
    assert bind_sizes(scores(ranks={"e": 4}), given_tensors)["e"] == 4
    with pytest.raises(BindingError, match=r"rank e has extent 64 \(declared e = 64\), but axis 2 of Q with extent 4 makes it 4"):
        bind_sizes(scores(ranks={"e": 64}), given_tensors)


@given(n=st.integers(1, 5), j=st.integers(1, 5), other=st.booleans())
def test_composed_axes_are_solved(n, j, other):
    body = [Einsum("Y", ("n", "j"), at("X n j"))]
    ranks = {"p": op("mul", Extent("n"), Extent("j")), **({} if other else {"j": j})}
    c = cascade(inputs=["X: (n j)", *(["Z: j"] if other else [])], body=body, outputs="Y: n j", ranks=ranks)
    tensors = {"X": torch.zeros(n * j), **({"Z": torch.zeros(j)} if other else {})}
    assert bind_sizes(c, tensors) == {"n": n, "j": j, "p": n * j}


@given(n=st.integers(1, 5), j=st.integers(1, 5))
def test_a_factor_follows_from_the_whole(n, j):
    split = Read("X", (op("add", op("mul", Index("n"), Extent("j")), Index("j")),))
    ranks = {"p": op("mul", Extent("n"), Extent("j")), "j": j}
    c = cascade(inputs="X: p", body=[Einsum("Y", ("n", "j"), split)], outputs="Y: n j", ranks=ranks)
    assert bind_sizes(c, {"X": torch.zeros(n * j)})["n"] == n
    with pytest.raises(BindingError, match="no whole extent of n"):
        bind_sizes(cascade(inputs="X: p", body=c.body, outputs="Y: n j", ranks={"p": op("mul", Extent("n"), 3)}), {"X": torch.zeros(7)})


def test_composed_axes_that_do_not_fit():
    body = [Einsum("Y", ("n", "j"), at("X n j"))]
    x = torch.zeros(10)
    with pytest.raises(BindingError, match=r"axis 0 of X, \(n j\) with extent 10: no whole extent of n, 10 split into parts of 4"):
        bind_sizes(cascade(inputs="X: (n j)", body=body, outputs="Y: n j", ranks={"j": 4}), {"X": x})
    with pytest.raises(BindingError, match=r"does not tell the extents of n and j apart(.|\n)*declare the size of j"):
        bind_sizes(cascade(inputs="X: (n j)", body=body, outputs="Y: n j"), {"X": x})
    with pytest.raises(BindingError, match=r"expected n=3 \* j=3 = 9, found 10"):
        bind_sizes(cascade(inputs="X: (n j)", body=body, outputs="Y: n j", ranks={"n": 3, "j": 3}), {"X": x})


def test_ranks_made_by_statements():
    body = [
        Concat("X", ("p", "e"), "p", (("s", at("A s e")), ("t", at("B t e")))),
        Populate("V", "I", ("e", "k"), at("X p e"), "topk", "p", "k", Const(3)),
        Populate("SV", "SI", ("e", "o"), at("X p e"), "sort", "p", "o"),
        Einsum("R", ("q", "e"), Read("X", (Index("q"), Index("e")))),
    ]
    c = cascade(inputs=["A: s e", "B: t e"], body=body, outputs=["V: e k", "SV: e o", "R: q e"])
    sizes = bind_sizes(c, {"A": torch.zeros(2, 3), "B": torch.zeros(5, 3)})
    assert sizes == {"s": 2, "t": 5, "e": 3, "p": 7, "k": 3, "o": 7, "q": 7}


def test_a_piece_follows_from_the_whole():
    body = [Einsum("Y", ("s",), Read("X", (Index("s"),)))]
    c = cascade(inputs=["X: p", "Z: t"], body=body, outputs="Y: s", ranks={"p": op("add", Extent("s"), Extent("t"))})
    assert bind_sizes(c, {"X": torch.zeros(7), "Z": torch.zeros(4)})["s"] == 3


def test_a_rank_without_any_extent_is_named():
    c = cascade(inputs="X: p", body=[Einsum("Y", ("p",), op("add", at("X p"), Index("w")), "sum", ("w",))], outputs="Y: p")
    with pytest.raises(BindingError, match=r"nothing determines the extent of rank w(.|\n)*declare the size of w"):
        bind_sizes(c, {"X": torch.zeros(3)})


def test_scalars_must_be_given():
    c = cascade(inputs="X: p", body=[Einsum("Y", ("p",), at("X p"))], outputs="Y: p", scalars=("scale",))
    with pytest.raises(BindingError, match=r"no value given for scalar scale"):
        evaluate(c, {"X": torch.zeros(2)})
    with pytest.raises(BindingError, match=r"'s' is no scalar(.|\n)*the scalars are scale"):
        evaluate(c, {"X": torch.zeros(2)}, {"scale": 1.0, "s": 2.0})
    with pytest.raises(BindingError, match=r"declared types or in float64, not in torch.float16"):
        evaluate(c, {"X": torch.zeros(2)}, {"scale": 1.0}, dtype=torch.float16)


def test_torch_types_round_trip():
    for name, t in DTYPES.items():
        assert from_torch(to_torch(t)).name == {"i4": "i8", "f4e2m1": "f8e4m3"}.get(name, name)
    with pytest.raises(BindingError, match=r"no element type for torch\.complex64"):
        from_torch(torch.complex64)
