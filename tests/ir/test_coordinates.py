"""Coordinates that extents decide: refused when a call is bound, in the reference's words, and only where the reference refuses."""

from __future__ import annotations

import einfall as ef
import pytest
import torch
from einfall.ir.binding import solve_extents
from einfall.ir.coordinates import reach
from einfall.ir.expr import Const, Extent, Index, Op
from einfall.ir.reference import evaluate
from hypothesis import given
from hypothesis import strategies as st


def refusal(text, p=3, e=4, q=2):
    """What binding says of the extents, and what the reference says of the call; None where it says nothing."""
    cascade = ef.parse(text)
    tensors = {"X": torch.ones(p, e), "Y": torch.ones(q)}
    found = []
    for attempt in (
        lambda: solve_extents(cascade, {"X": (p, e), "Y": (q,)}),
        lambda: evaluate(cascade, tensors),
    ):
        try:
            attempt()
            found.append(None)
        except ef.BindingError as error:
            found.append(error.what)
    return found


@pytest.mark.parametrize(
    ("out", "expr", "what"),
    [
        ("e,q", "X[5,e] * Y[q]", "index 5 is outside rank p of X, which has extent 3"),
        ("e,q", "X[-1,e] * Y[q]", "index -1 is outside rank p of X, which has extent 3"),
        ("e,q", "X[extent(p),e] * Y[q]", "index 3 is outside rank p of X, which has extent 3"),
        ("e,q", "X[q+2,e] * Y[q]", "index 3 is outside rank p of X, which has extent 3"),
        ("e,q", "X[q-1,e] * Y[q]", "index -1 is outside rank p of X, which has extent 3"),
        ("e,q", "where(X[3,e] > 1.0, Y[q], 0.0)", "index 3 is outside rank p of X, which has extent 3"),
        ("p,q", "X[p,q*3+1]", "index 4 is outside rank e of X, which has extent 4"),
        ("p,q", "X[p,q*3]", None),
        ("e,q", "where(Y[q] > 1.0, X[7,e], 0.0)", None),
        ("e", "sum(q where q < 1) X[q*2+1,e] * Y[q]", None),
        ("p,q", "X[p+q,0 else 2.0]", None),
    ],
)
def test_only_what_no_condition_leaves_out(out, expr, what):
    assert refusal(f"cascade f(X[p,e]: f32, Y[q]: f32) -> O[{out}]\n  O[{out}] = {expr}\n") == [what, what]


@given(st.integers(0, 4), st.integers(0, 4), st.integers(-2, 3), st.integers(-3, 4), st.sampled_from(["add", "sub", "minimum", "maximum"]))
def test_both_ends_are_reached(a, b, factor, offset, name):
    e = Op(name, (Op("mul", (Index("a"), Const(factor))), Op("add", (Index("b"), Op("sub", (Extent("b"), Const(offset)))))))
    combine = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "minimum": min, "maximum": max}[name]
    values = [combine(i * factor, j + b - offset) for i in range(a) for j in range(b)]
    assert reach(e, {"a": a, "b": b}) == ((min(values), max(values)) if values else None)


def test_an_index_that_occurs_twice_is_not_judged():
    twice = Op("sub", (Index("a"), Index("a")))
    assert reach(twice, {"a": 5}) is None


@ef.kernel
def fifth(X: "p e", Y: "q") -> "q e":
    return X.at(p=5) * Y


def test_nothing_is_compiled_for_a_coordinate_outside(monkeypatch):
    monkeypatch.setattr("einfall.compiler.driver.compile_cascade", None)
    with pytest.raises(ef.BindingError, match=r"index 5 is outside rank p of X, which has extent 3") as raised:
        fifth(torch.ones(3, 4), torch.ones(2))
    assert raised.value.hint == "give the access a fill value, or restrict it by a predicate"
