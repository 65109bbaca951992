"""Whatever the coordinates say, a kernel reads in its tensors alone, and what lies inside it reads where it lies."""

from __future__ import annotations

import random

import pytest
import torch
from einfall.backends.tvm.reach import Reach
from einfall.ir.expr import Const, Extent, Index, Op
from einfall.ir.text import parse_program
from hypothesis import given
from hypothesis import strategies as st
from kernels import run

COORDINATES = {
    "0": lambda m, q, i: 0, "2": lambda m, q, i: 2, "30": lambda m, q, i: 30, "m": lambda m, q, i: m, "q": lambda m, q, i: q,
    "m+1": lambda m, q, i: m + 1, "q-3": lambda m, q, i: q - 3, "q+5": lambda m, q, i: q + 5, "2*q": lambda m, q, i: 2 * q,
    "2*m+q": lambda m, q, i: 2 * m + q, "q-m": lambda m, q, i: q - m, "m-q+3": lambda m, q, i: m - q + 3,
    "q//2": lambda m, q, i: q // 2, "(q-4)//3": lambda m, q, i: (q - 4) // 3, "q%3": lambda m, q, i: q % 3,
    "(q+2)%5": lambda m, q, i: (q + 2) % 5, "q*q": lambda m, q, i: q * q, "I[m]": lambda m, q, i: i, "q+I[m]": lambda m, q, i: q + i,
    "I[m]-q": lambda m, q, i: i - q, "minimum(I[m], q)": lambda m, q, i: min(i, q), "maximum(I[m], 0)": lambda m, q, i: max(i, 0),
}  # fmt: skip
SIZES = [{"m": 3, "q": 21, "p": 4, "e": 18}, {"m": 2, "q": 16, "p": 1, "e": 3}, {"m": 5, "q": 32, "p": 9, "e": 64}]


def amid_poison(tensor):
    """The same elements with a margin of NaN on every side."""
    whole = torch.full([n + 160 for n in tensor.shape], float("nan"))
    return whole[tuple(slice(80, 80 + n) for n in tensor.shape)].copy_(tensor)


def program_of(pairs, sizes):
    """One program that reads X[p,e] at every pair of coordinates, each into an output of its own."""
    outputs = ", ".join(f"O{k}[m,q]" for k in range(len(pairs)))
    declared = "".join(f"  rank {rank} = {size}\n" for rank, size in sizes.items())
    stores = "".join(f"  store O{k}[m,q] = X[{p},{e}] + Y[m,q]\n" for k, (p, e) in enumerate(pairs))
    return parse_program(f"kernel reads(X[p,e]: f32, Y[m,q]: f32, I[m]: i32) -> {outputs}\n{declared}  grid m/2, q/16\n{stores}")


@pytest.mark.parametrize(("sizes", "narrowed", "known"), [(0, False, False), (1, False, False), (2, True, False), (0, True, True)])
def test_no_coordinate_reads_beyond_its_tensor(sizes, narrowed, known):
    rng, extents = random.Random(sizes), SIZES[sizes]
    rows, columns = (rng.sample([*COORDINATES], len(COORDINATES)) for _ in range(2))
    pairs = [*zip(rows, columns, strict=True), ("m", "I[m]"), ("m", "q+I[m]"), ("I[m]", "q")]
    x = torch.randn(extents["p"], extents["e"])
    i = torch.tensor([-4, 1, 900, -(2**31), 2][: extents["m"]], dtype=torch.int32)
    y = torch.zeros(extents["m"], extents["q"])
    found = run(program_of(pairs, extents if known else {}), {"X": amid_poison(x), "Y": y, "I": i}, narrowed=narrowed)
    for k, (p, e) in enumerate(pairs):
        o = found[f"O{k}"]
        assert not o.isnan().any(), f"X[{p},{e}] reads beyond its tensor"
        for m in range(extents["m"]):
            for q in range(extents["q"]):
                row, column = (COORDINATES[c](m, q, int(i[m])) for c in (p, e))
                if 0 <= row < extents["p"] and 0 <= column < extents["e"]:
                    assert o[m, q] == x[row, column], f"X[{p},{e}] at m={m}, q={q}"


OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "minimum": min, "maximum": max,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
}  # fmt: skip
LEAVES = st.one_of(
    st.integers(-3, 4).map(Const), st.sampled_from(["a", "b", "c"]).map(Index), st.sampled_from(["a", "b", "ab", "d"]).map(Extent)
)
EXPRESSIONS = st.recursive(
    LEAVES, lambda inner: st.builds(lambda name, a, b: Op(name, (a, b)), st.sampled_from([*OPERATIONS]), inner, inner), max_leaves=6
)


def values(e, sizes):
    """The values of an expression at all points, None where it divides by no natural number."""
    points = [{"a": a, "b": b, "c": c} for a in range(sizes["a"]) for b in range(sizes["b"]) for c in range(sizes["c"])]

    def value(e, point):
        match e:
            case Const(value=number):
                return number
            case Index(rank=rank):
                return point[rank]
            case Extent(rank=rank):
                return sizes[rank]
            case Op(name=name, args=(a, b)):
                x, y = value(a, point), value(b, point)
                return None if x is None or y is None or (name in ("floordiv", "mod") and y <= 0) else OPERATIONS[name](x, y)

    return [value(e, point) for point in points]


@given(EXPRESSIONS, st.sampled_from(["a", "b", "ab", "d"]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7))
def test_what_is_certain_holds_at_every_point(e, rank, a, b, c, d):
    sizes = {"a": a, "b": b, "c": c, "d": d, "ab": a * b}
    found = Reach({"ab": Op("mul", (Extent("a"), Extent("b"))), "c": c}.get)
    low, high = found.within(e, rank, frozenset())
    assert not low or all(v is None or v >= 0 for v in values(e, sizes))
    assert not high or all(v is None or v < sizes[rank] for v in values(e, sizes))


i, j, n = Index("i"), Index("j"), Extent("n")


@pytest.mark.parametrize(
    ("e", "rank", "certain"),
    [
        (Op("add", (Op("mul", (i, Extent("j"))), j)), "p", (True, True)),
        (Op("floordiv", (Index("p"), Extent("j"))), "i", (True, True)),
        (Op("mod", (Index("p"), Extent("j"))), "j", (True, True)),
        (Op("add", (Index("m"), Index("w"))), "n", (True, True)),
        (Op("add", (Index("m"), Const(4))), "n", (True, True)),
        (Op("add", (Index("m"), Const(5))), "n", (True, False)),
        (Op("mod", (Op("add", (Index("n"), Op("floordiv", (n, Const(2))))), n)), "n", (True, True)),
        (Op("sub", (n, Const(1))), "n", (True, True)),
        (Op("sub", (Index("n"), Const(1))), "n", (False, True)),
        (Index("i"), "j", (True, False)),
        (Const(4), "w", (True, True)),
        (Const(5), "w", (True, False)),
    ],
    ids=str,
)
def test_what_must_not_cost_a_clamp(e, rank, certain):
    sizes = {"p": Op("mul", (Extent("i"), Extent("j"))), "m": Op("sub", (n, Const(4))), "w": 5}
    assert Reach(sizes.get).within(e, rank, frozenset()) == certain
