"""Every node type of the cascade language against loops over Python numbers, and whole cascades against plain torch."""

import itertools
import math

import pytest
import torch
from builders import at, cascade, op
from einfall.ir.cascade import Concat, Einsum, Iterate, IterState, Populate, Scan, Scatter
from einfall.ir.errors import BindingError, CascadeError
from einfall.ir.expr import Const, Extent, Index, Read
from einfall.ir.reference import evaluate
from hypothesis import given
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
EXTENT = st.sampled_from([1, 2, 3, 5, 7])
VALUE = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([0.5, INF, -INF, NAN]))


@st.composite
def arrays(draw, *extents, values=VALUE, dtype=torch.float64):
    """A tensor of these extents that is often not contiguous: a permuted, strided or reversed-order view of a larger one."""
    count = math.prod(extents)
    x = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype).reshape(extents)
    layout = draw(st.sampled_from(["plain", "permuted", "strided"]))
    if layout == "permuted":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    if layout == "strided":
        wide = x.new_zeros([2 * n + 1 for n in extents])
        wide[tuple(slice(1, None, 2) for _ in extents)] = x
        return wide[tuple(slice(1, None, 2) for _ in extents)]
    return x


def run(c, dtype=torch.float64, scalars=None, **tensors):
    return evaluate(c, tensors, scalars, dtype=dtype)


def same(result, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=result.dtype)
    torch.testing.assert_close(result, expected, equal_nan=True, **{"rtol": 1e-12, "atol": 1e-12, **tolerance})


# Reductions -------------------------------------------------------------------------------------------------------------------------


def larger(a, b):
    """Whether `a` comes before `b` as a maximum, NaN above everything."""
    return b == b and (a != a or a > b)


def extreme(values, sign):
    """The position of the largest (sign 1) or smallest (sign -1) value, the first of equals; NaN before everything."""
    best = None
    for k, v in enumerate(values):
        if best is None or larger(sign * v, sign * values[best]):
            best = k
    return best


REDUCE = {
    "sum": lambda values: sum(values, 0.0),
    "prod": lambda values: math.prod(values, start=1.0),
    "max": lambda values: values[extreme(values, 1)] if values else -INF,
    "min": lambda values: values[extreme(values, -1)] if values else INF,
    "any": lambda values: any(v != 0 for v in values),
    "all": lambda values: all(v != 0 for v in values),
}


@pytest.mark.parametrize("name", REDUCE)
@given(data=st.data(), b=EXTENT, p=EXTENT)
def test_reduction_skips_where_the_predicate_is_false(name, data, b, p):
    x = data.draw(arrays(b, p))
    keep = data.draw(arrays(b, p, values=st.booleans(), dtype=torch.bool))
    body = [Einsum("R", ("b",), at("X b p"), name, ("p",)), Einsum("W", ("b",), at("X b p"), name, ("p",), at("C b p"))]
    result = run(cascade(inputs=["X: b p", "C: b p = bool"], body=body, outputs=["R: b", "W: b"]), X=x, C=keep)
    rows = [[v for v, k in zip(*pair, strict=True) if k] for pair in zip(x.tolist(), keep.tolist(), strict=True)]
    same(result["R"], [REDUCE[name](row) for row in x.tolist()])
    same(result["W"], [REDUCE[name](row) for row in rows])


@pytest.mark.parametrize("name", ["argmax", "argmin"])
@given(data=st.data(), b=EXTENT, p=EXTENT)
def test_arg_reduction_gives_the_first_of_the_points_that_count(name, data, b, p):
    x = data.draw(arrays(b, p))
    keep = data.draw(arrays(b, p, values=st.booleans(), dtype=torch.bool))
    body = [Einsum("R", ("b",), at("X b p"), name, ("p",)), Einsum("W", ("b",), at("X b p"), name, ("p",), at("C b p"))]
    result = run(cascade(inputs=["X: b p", "C: b p = bool"], body=body, outputs=["R: b", "W: b"]), None, X=x.float(), C=keep)
    sign = 1 if name == "argmax" else -1
    assert result["R"].dtype == torch.int32
    assert result["R"].tolist() == [extreme(row, sign) for row in x.tolist()]
    for row, kept, found in zip(x.tolist(), keep.tolist(), result["W"].tolist(), strict=True):
        places = [k for k in range(p) if kept[k]]
        assert found == (places[extreme([row[k] for k in places], sign)] if places else -1)


@given(data=st.data(), b=EXTENT, n=EXTENT, j=EXTENT)
def test_reduction_over_several_ranks(data, b, n, j):
    x = data.draw(arrays(n, b, j))
    body = [Einsum(f"R{name}", ("b",), at("X n b j"), name, ("n", "j")) for name in (*REDUCE, "argmax")]
    result = run(cascade(inputs="X: n b j", body=body, outputs=[f"R{name}: b" for name in (*REDUCE, "argmax")]), X=x)
    rows = [[x[k, row, m].item() for k in range(n) for m in range(j)] for row in range(b)]
    for name, oracle in REDUCE.items():
        same(result[f"R{name}"], [oracle(row) for row in rows])
    assert result["Rargmax"].tolist() == [extreme(row, 1) for row in rows]


@given(b=EXTENT, p=EXTENT)
def test_ranks_that_an_expression_lacks_count(b, p):
    body = [
        Einsum("N", ("b",), Const(1.0), "sum", ("p",), op("le", Index("p"), Index("b"))),
        Einsum("T", ("b", "p"), at("X b")),
        Einsum("S", ("b",), at("X b"), "sum", ("p",)),
    ]
    x = torch.arange(1.0, b + 1)
    result = run(cascade(inputs=["X: b", "Y: p"], body=body, outputs=["N: b", "T: b p", "S: b"]), None, X=x, Y=torch.zeros(p))
    assert result["N"].tolist() == [min(k + 1, p) for k in range(b)]
    assert torch.equal(result["T"], x[:, None].expand(b, p))
    assert torch.equal(result["S"], x * p)


@given(data=st.data(), b=EXTENT, m=EXTENT, p=EXTENT)
def test_contraction_is_the_sum_of_products(data, b, m, p):
    finite = st.floats(-4, 4, width=32)
    x, y = data.draw(arrays(b, m, p, values=finite)), data.draw(arrays(p, b, values=finite))
    z, s = data.draw(arrays(b, values=finite)), data.draw(finite)
    product = op("mul", op("mul", at("X b m p"), op("mul", at("Y p b"), at("Z b"))), op("mul", Const(s), 2))
    body = [
        Einsum("R", ("m", "b"), product, "sum", ("p",)),
        Einsum("W", ("m", "b"), product, "sum", ("p",), op("le", Index("p"), Index("m"))),
    ]
    c = cascade(inputs=["X: b m p", "Y: p b", "Z: b"], body=body, outputs=["R: m b", "W: m b"])
    result = run(c, X=x, Y=y, Z=z)

    def total(row, batch, extent):
        return sum(x[batch, row, k].item() * y[k, batch].item() for k in range(extent)) * z[batch].item() * s * 2

    same(result["R"], [[total(row, batch, p) for batch in range(b)] for row in range(m)], atol=1e-9)
    same(result["W"], [[total(row, batch, min(row + 1, p)) for batch in range(b)] for row in range(m)], atol=1e-9)


def test_skipped_points_of_a_contraction_do_not_leak():
    x, y = torch.tensor([[1.0, 2.0], [NAN, 4.0]]), torch.tensor([[1.0], [INF]])
    body = [Einsum("R", ("m", "f"), op("mul", at("X m p"), at("Y p f")), "sum", ("p",), op("ne", Index("p"), Index("m")))]
    c = cascade(inputs=["X: m p", "Y: p f"], body=body, outputs="R: m f")
    result = run(c, None, X=x, Y=y)["R"]
    assert result[0].item() == INF and math.isnan(result[1].item())
    finite = run(c, None, X=torch.tensor([[INF, 2.0], [3.0, NAN]]), Y=y[:1].expand(2, 1))
    assert finite["R"].tolist() == [[2.0], [3.0]]


def test_narrow_types_accumulate_wide():
    ones = torch.ones(4097, dtype=torch.bfloat16)
    body = [Einsum("R", (), at("X p"), "sum", ("p",)), Einsum("D", ("m",), op("mul", at("X p"), at("Y m")), "sum", ("p",))]
    result = run(cascade(inputs=["X: p = bf16", "Y: m = bf16"], body=body, outputs=["R:", "D: m"]), None, X=ones, Y=ones[:2] * 3)
    assert result["R"].dtype == torch.bfloat16 and result["R"].item() == 4096
    assert result["D"].tolist() == [12288.0, 12288.0]
    small = torch.full((3,), 100, dtype=torch.int8)
    body = [Einsum("R", (), at("X p"), "sum", ("p",)), Einsum("D", (), op("mul", at("X p"), at("X p")), "sum", ("p",))]
    result = run(cascade(inputs="X: p = i8", body=body, outputs=["R:", "D:"]), None, X=small)
    assert (result["R"].dtype, result["R"].item(), result["D"].item()) == (torch.int32, 300, 30000)


def test_reduction_of_integers_over_nothing():
    names = ("max", "min", "sum", "prod")
    body = [Einsum(f"R{name}", (), at("X p"), name, ("p",), op("lt", Index("p"), 0)) for name in names]
    c = cascade(inputs="X: p = i8", body=body, outputs=[f"R{name}:" for name in names])
    result = run(c, None, X=torch.zeros(3, dtype=torch.int8))
    assert [result[f"R{name}"].item() for name in names] == [-128, 127, 0, 1]


def test_extents_of_zero():
    names = (*REDUCE, "argmax")
    body = [Einsum(f"R{name}", ("b",), at("X b p"), name, ("p",)) for name in names]
    body += [Einsum("C", ("b", "m"), op("mul", at("X b p"), at("Y m p")), "sum", ("p",)), Scan("S", ("b", "p"), at("X b p"), "max", "p")]
    c = cascade(inputs=["X: b p", "Y: m p"], body=body, outputs=[*(f"R{name}: b" for name in names), "C: b m", "S: b p"])
    result = run(c, X=torch.zeros(2, 0), Y=torch.zeros(3, 0))
    nothing = [0, 1, -INF, INF, False, True, -1]
    assert [result[f"R{name}"].tolist() for name in names] == [[value] * 2 for value in nothing]
    assert result["C"].shape == (2, 3) and not result["C"].any() and result["S"].shape == (2, 0)
    empty = run(c, X=torch.zeros(0, 4), Y=torch.zeros(3, 4))
    assert empty["Rmax"].shape == (0,) and empty["C"].shape == (0, 3)


def test_a_map_with_a_predicate_stores_zero():
    body = [Einsum("R", ("p",), op("div", 1.0, at("X p")), where=op("ne", at("X p"), 0))]
    assert run(cascade(inputs="X: p", body=body, outputs="R: p"), None, X=torch.tensor([2.0, 0.0, -4.0]))["R"].tolist() == [0.5, 0.0, -0.25]


# Scans ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("name", ["sum", "prod", "max", "min"])
@given(data=st.data(), b=EXTENT, p=EXTENT)
def test_scan(name, exclusive, data, b, p):
    x = data.draw(arrays(p, b))
    keep = data.draw(arrays(p, values=st.booleans(), dtype=torch.bool))
    body = [Scan("R", ("b", "p"), at("X p b"), name, "p", exclusive), Scan("W", ("p", "b"), at("X p b"), name, "p", exclusive, at("C p"))]
    result = run(cascade(inputs=["X: p b", "C: p = bool"], body=body, outputs=["R: b p", "W: p b"]), X=x, C=keep)
    reach = 0 if exclusive else 1
    columns = x.T.tolist()
    same(result["R"], [[REDUCE[name](column[: k + reach]) for k in range(p)] for column in columns])
    kept = [[[v for v, c in zip(column[: k + reach], keep.tolist(), strict=False) if c] for k in range(p)] for column in columns]
    same(result["W"].T, [[REDUCE[name](prefix) for prefix in rows] for rows in kept])


# Populate ---------------------------------------------------------------------------------------------------------------------------


def falling(row, keep):
    """The coordinates that count, largest value first, NaN before all, lower coordinates first among equals."""
    places = [k for k, kept in enumerate(keep) if kept]
    return sorted(places, key=lambda k: (0, 0) if row[k] != row[k] else (1, -row[k]))


def slots(row, places, count):
    places = places[:count]
    return [row[k] for k in places] + [0.0] * (count - len(places)), places + [-1] * (count - len(places))


@given(data=st.data(), b=EXTENT, p=EXTENT, k=st.integers(0, 9))
def test_topk_and_sort(data, b, p, k):
    x = data.draw(arrays(b, p))
    k = min(k, p)
    keep = data.draw(arrays(b, p, values=st.booleans(), dtype=torch.bool))
    body = [
        Populate("V", "I", ("s", "b"), at("X b p"), "topk", "p", "s", Const(k), at("C b p")),
        Populate("SV", "SI", ("b", "t"), at("X b p"), "sort", "p", "t"),
    ]
    c = cascade(inputs=["X: b p", "C: b p = bool"], body=body, outputs=["V: s b", "I: s b", "SV: b t", "SI: b t"])
    result = run(c, X=x, C=keep)
    for row in range(b):
        values = x[row].tolist()
        expected = slots(values, falling(values, keep[row].tolist()), k)
        same(result["V"][:, row], expected[0])
        assert result["I"][:, row].tolist() == expected[1]
        expected = slots(values, falling(values, [True] * p), p)
        same(result["SV"][row], expected[0])
        assert result["SI"][row].tolist() == expected[1]


def test_a_top_k_of_more_than_there_is():
    c = cascade(inputs=["X: p"], body=[Populate("V", "I", ("s",), at("X p"), "topk", "p", "s", Const(4))], outputs=["V: s"])
    with pytest.raises(BindingError, match="top-k keeps s = 4 elements of rank p, which has extent 3"):
        run(c, X=torch.zeros(3))


@given(data=st.data(), b=EXTENT, p=EXTENT, bound=st.floats(-1, 6, width=16))
def test_threshold_and_mass(data, b, p, bound):
    x = data.draw(arrays(b, p, values=st.integers(0, 4).map(float)))
    keep = data.draw(arrays(b, p, values=st.booleans(), dtype=torch.bool))
    body = [
        Populate("V", "I", ("b", "s"), at("X b p"), "threshold", "p", "s", Const(bound), at("C b p")),
        Populate("MV", "MI", ("b", "t"), at("X b p"), "mass", "p", "t", op("add", at("B b"), bound), at("C b p")),
    ]
    c = cascade(inputs=["X: b p", "C: b p = bool", "B: b"], body=body, outputs=["V: b s", "I: b s", "MV: b t", "MI: b t"])
    result = run(c, X=x, C=keep, B=torch.arange(b, dtype=torch.float64))
    for row in range(b):
        values, kept = x[row].tolist(), keep[row].tolist()
        expected = slots(values, [k for k in range(p) if kept[k] and values[k] >= bound], p)
        assert (result["V"][row].tolist(), result["I"][row].tolist()) == expected
        order, chosen, total = falling(values, kept), [], 0.0
        while len(chosen) < len(order) and total < bound + row:
            chosen.append(order[len(chosen)])
            total += values[chosen[-1]]
        assert (result["MV"][row].tolist(), result["MI"][row].tolist()) == slots(values, chosen, p)


def test_populate_keeps_the_type_of_its_values():
    body = [Populate("V", "I", ("s",), at("X p"), "topk", "p", "s", Const(2))]
    x = torch.tensor([1.0, 3.0, 3.0], dtype=torch.bfloat16)
    result = run(cascade(inputs="X: p = bf16", body=body, outputs=["V: s", "I: s"]), None, X=x)
    assert result["V"].dtype == torch.bfloat16 and result["I"].dtype == torch.int32
    assert result["V"].tolist() == [3.0, 3.0] and result["I"].tolist() == [1, 2]


# Scatter, concat, iterate -----------------------------------------------------------------------------------------------------------


@given(data=st.data(), b=EXTENT, p=EXTENT, f=EXTENT, c=EXTENT)
def test_scatter_adds_and_drops_coordinates_outside(data, b, p, f, c):
    x = data.draw(arrays(p, f, values=st.integers(-4, 4).map(float)))
    place = data.draw(arrays(b, p, values=st.integers(-2, c + 1), dtype=torch.int32))
    keep = data.draw(arrays(p, values=st.booleans(), dtype=torch.bool))
    body = [Scatter("Z", ("f", "c", "b"), at("X p f"), ("p",), (("c", at("I b p")),), at("C p"))]
    program = cascade(inputs=["X: p f", "I: b p = i32", "C: p = bool"], body=body, outputs="Z: f c b", ranks={"c": c})
    expected = torch.zeros(f, c, b, dtype=torch.float64)
    for batch, k, column in itertools.product(range(b), range(p), range(f)):
        target = place[batch, k].item()
        if keep[k] and 0 <= target < c:
            expected[column, target, batch] += x[k, column]
    same(run(program, X=x, I=place, C=keep)["Z"], expected)


@given(data=st.data(), b=EXTENT, s=EXTENT, t=EXTENT, e=EXTENT)
def test_concat_broadcasts_missing_ranks(data, b, s, t, e):
    x, y = data.draw(arrays(s, e)), data.draw(arrays(b, t, e))
    body = [Concat("X", ("b", "p", "e"), "p", (("s", at("A s e")), ("t", op("mul", at("B b t e"), 2.0))))]
    result = run(cascade(inputs=["A: s e", "B: b t e"], body=body, outputs="X: b p e"), A=x, B=y)["X"]
    same(result, torch.cat([x.expand(b, s, e), y * 2], 1))


@given(data=st.data(), b=EXTENT, steps=st.integers(0, 6))
def test_iterate_updates_all_states_at_once(data, b, steps):
    x = data.draw(arrays(steps, b, values=st.integers(-3, 3).map(float)))
    states = (
        IterState("A", ("b",), Const(1.0), op("add", at("B b"), at("Y b"))),
        IterState("B", ("b",), at("S b"), op("add", at("A b"), Index("i"))),
    )
    body = [Iterate("i", states, (Einsum("Y", ("b",), op("mul", Read("X", (Index("i"), Index("b"))), at("A b"))),))]
    start = torch.arange(b, dtype=torch.float64)
    result = run(cascade(inputs=["X: i b", "S: b"], body=body, outputs=["A: b", "B: b"]), X=x, S=start)
    first, second = torch.ones(b, dtype=torch.float64), start
    for k in range(steps):
        first, second = second + x[k] * first, first + k
    same(result["A"], first)
    same(result["B"], second)


@given(limit=st.integers(0, 12), steps=st.integers(1, 12))
def test_iterate_stops_when_the_new_states_say_so(limit, steps):
    states = (IterState("A", (), Const(0.0), op("add", Read("A", ()), 1.0)),)
    body = [Iterate("i", states, (), op("ge", Read("A", ()), float(limit)))]
    result = run(cascade(body=body, outputs="A:", ranks={"i": steps}))["A"].item()
    assert result == min(max(limit, 1), steps)


def test_iterate_as_breadth_first_search():
    edges = torch.zeros(6, 6, dtype=torch.bool)
    for a, b in ((0, 1), (1, 2), (2, 3), (4, 5)):
        edges[a, b] = True
    reached = Einsum("N", ("v",), op("and", at("F u"), at("E u v")), "any", ("u",))
    fresh = Einsum("G", ("v",), op("and", at("N v"), op("not", at("R v"))))
    left = Einsum("L", (), at("G v"), "any", ("v",))
    states = (
        IterState("R", ("v",), op("eq", Index("v"), 0), op("or", at("R v"), at("G v"))),
        IterState("F", ("v",), op("eq", Index("v"), 0), at("G v")),
        IterState("D", ("v",), Const(0), op("add", at("D v"), op("where", at("R v"), 0, 1))),
    )
    body = [Iterate("i", states, (reached, fresh, left), op("not", Read("L", ())))]
    c = cascade(inputs="E: u v = bool", body=body, outputs=["R: v", "D: v"], ranks={"i": 50})
    result = run(c, None, E=edges)
    assert result["R"].tolist() == [True] * 4 + [False] * 2
    assert result["D"].tolist() == [0, 1, 2, 3, 4, 4]


# Accesses ---------------------------------------------------------------------------------------------------------------------------


@given(data=st.data(), b=EXTENT, p=EXTENT, by=st.integers(-8, 8))
def test_shift_reads_the_fill_outside(data, b, p, by):
    x = data.draw(arrays(b, p))
    body = [Einsum("R", ("b", "p"), Read("X", (Index("b"), op("add", Index("p"), by)), Const(7)))]
    result = run(cascade(inputs="X: b p", body=body, outputs="R: b p"), X=x)["R"]
    same(result, [[x[row, k + by].item() if 0 <= k + by < p else 7.0 for k in range(p)] for row in range(b)])


@given(data=st.data(), n=EXTENT, j=EXTENT, w=EXTENT)
def test_windows_splits_diagonals_and_modular_access(data, n, j, w):
    p = n * j
    x, square = data.draw(arrays(p)), data.draw(arrays(p, p))
    split = Read("X", (op("add", op("mul", Index("n"), Extent("j")), Index("j")),))
    body = [
        Einsum("P", ("p",), Read("X", (op("add", Index("p"), Index("w")),), Const(-INF)), "max", ("w",)),
        Einsum("S", ("n", "j"), split),
        Einsum("D", ("p",), Read("Y", (Index("p"), Index("p")))),
        Einsum("M", ("p",), Read("X", (op("mod", op("sub", Index("p"), Index("w")), Extent("p")),)), "sum", ("w",)),
        Einsum("F", (), Read("X", (Const(0),))),
    ]
    outputs = ["P: p", "S: n j", "D: p", "M: p", "F:"]
    ranks = {"p": op("mul", Extent("n"), Extent("j")), "j": j, "w": w, "q": Extent("p")}
    c = cascade(inputs=["X: p", "Y: p q"], body=body, outputs=outputs, ranks=ranks)
    result = run(c, X=x, Y=square)
    values = x.tolist()
    same(result["P"], [REDUCE["max"](values[k : k + w]) for k in range(p)])
    same(result["S"], x.reshape(n, j))
    same(result["D"], square.diagonal())
    same(result["M"], [sum(values[(k - o) % p] for o in range(w)) for k in range(p)])
    same(result["F"], values[0])


def test_affine_access_outside_without_a_fill_is_an_error():
    body = [Einsum("R", ("p",), Read("X", (op("add", Index("p"), 1),)))]
    message = r"index 3 is outside rank p of X, which has extent 3\n  in cascade case, statement R\n.*fill value"
    with pytest.raises(BindingError, match=message):
        run(cascade(inputs="X: p", body=body, outputs="R: p"), X=torch.zeros(3))


@given(data=st.data(), b=EXTENT, s=EXTENT, p=EXTENT, e=EXTENT)
def test_gather(data, b, s, p, e):
    k = data.draw(arrays(p, e))
    table = data.draw(arrays(b, s, values=st.integers(0, p - 1), dtype=torch.int32))
    body = [Einsum("R", ("b", "s", "e"), Read("K", (at("T b s"), Index("e"))))]
    result = run(cascade(inputs=["K: p e", "T: b s = i32"], body=body, outputs="R: b s e"), K=k, T=table)["R"]
    same(result, k[table.long()])


def test_a_gathered_index_outside_is_an_error_unless_it_is_skipped():
    k, table = torch.arange(4.0), torch.tensor([2, -1, 7], dtype=torch.int32)
    gather, good = Read("K", (at("T s"),), Const(0)), op("and", op("ge", at("T s"), 0), op("lt", at("T s"), 4))

    def attempt(statement, outputs="R: s"):
        return run(cascade(inputs=["K: p", "T: s = i32"], body=[statement], outputs=outputs), None, K=k, T=table)["R"]

    with pytest.raises(BindingError, match=r"gathered index -1 from T is outside rank p of K, which has extent 4"):
        attempt(Einsum("R", ("s",), gather))
    with pytest.raises(BindingError, match=r"gathered index 7 from T"):
        attempt(Einsum("R", (), gather, "sum", ("s",), op("ge", at("T s"), 0)), "R:")
    assert attempt(Einsum("R", ("s",), gather, where=good)).tolist() == [2, 0, 0]
    assert attempt(Einsum("R", ("s",), op("where", good, gather, -5))).tolist() == [2, -5, -5]
    assert attempt(Einsum("R", ("s",), op("where", op("not", good), -5, gather))).tolist() == [2, -5, -5]
    assert attempt(Einsum("R", (), gather, "max", ("s",), good), "R:").item() == 2


# Whole cascades ---------------------------------------------------------------------------------------------------------------------


def attention(where=None, kind="f32"):
    """FuseMax's cascade of attention with a division at the end of the softmax; `where` restricts the keys."""
    body = [
        Einsum("S0", ("b", "h", "m", "p"), op("mul", at("Q b h m e"), at("K b h p e")), "sum", ("e",)),
        Einsum("S", ("b", "h", "m", "p"), op("mul", at("S0 b h m p"), Const(0.25))),
        Einsum("M", ("b", "h", "m"), at("S b h m p"), "max", ("p",), where),
        Einsum("N", ("b", "h", "m", "p"), op("exp", op("sub", at("S b h m p"), at("M b h m")))),
        Einsum("D", ("b", "h", "m"), at("N b h m p"), "sum", ("p",), where),
        Einsum("P", ("b", "h", "m", "p"), op("div", at("N b h m p"), at("D b h m"))),
        Einsum("O", ("b", "h", "m", "f"), op("mul", at("P b h m p"), at("V b h p f")), "sum", ("p",), where),
    ]
    inputs = [f"Q: b h m e = {kind}", f"K: b h p e = {kind}", f"V: b h p f = {kind}"]
    return cascade("attention", inputs=inputs, body=body, outputs="O: b h m f")


@given(data=st.data(), m=EXTENT, p=EXTENT, f=EXTENT, causal=st.booleans())
def test_attention_against_torch(data, m, p, f, causal):
    finite = st.floats(-4, 4, width=32)
    q, k, v = (data.draw(arrays(1, 2, rows, columns, values=finite)) for rows, columns in ((m, 3), (p, 3), (p, f)))
    result = run(attention(op("le", Index("p"), Index("m")) if causal else None), Q=q, K=k, V=v)["O"]
    mask = torch.ones(m, p, dtype=torch.bool).tril() if causal else None
    same(result, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25), rtol=1e-9, atol=1e-9)


def test_attention_of_a_long_context_in_declared_types():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1024, 32, generator=generator).bfloat16() for _ in range(3))
    result = run(attention(op("le", Index("p"), Index("m")), "bf16"), None, Q=q, K=k, V=v)["O"]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.25)
    assert result.dtype == torch.bfloat16 and (result.double() - exact).abs().max() < 0.05
    exact_mode = run(attention(op("le", Index("p"), Index("m")), "bf16"), Q=q, K=k, V=v)["O"]
    same(exact_mode, exact, rtol=1e-9, atol=1e-9)


def test_outputs_are_composed_permuted_and_fresh():
    x = torch.arange(24.0).reshape(2, 12)
    body = [Einsum("Y", ("b", "n", "j"), at("X b n j"))]
    c = cascade(inputs="X: b (n j)", body=body, outputs=["Y: (j n) b", "X: b (n j)"], ranks={"j": 3})
    result = run(c, None, X=x)
    assert torch.equal(result["Y"], x.reshape(2, 4, 3).permute(2, 1, 0).reshape(12, 2)) and result["Y"].is_contiguous()
    assert torch.equal(result["X"], x) and result["X"].data_ptr() != x.data_ptr()


def test_integer_states_and_weak_statements_have_declared_types():
    body = [
        Einsum("A", ("p",), Const(1)),
        Einsum("B", ("p",), op("lt", at("X p"), 0.0)),
        Einsum("C", (), at("B p"), "sum", ("p",)),
        Scan("D", ("p",), at("B p"), "sum", "p"),
    ]
    result = run(cascade(inputs="X: p", body=body, outputs=["A: p", "B: p", "C:", "D: p"]), None, X=torch.tensor([-1.0, 2.0, -3.0]))
    assert [result[name].dtype for name in "ABCD"] == [torch.int32, torch.bool, torch.int32, torch.int32]
    assert result["C"].item() == 2 and result["D"].tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (Einsum("R", ("p",), at("Y p")), "'Y' is read before it is defined"),
        (Einsum("R", (), at("X p")), "leaves rank p unreduced"),
        (Einsum("R", ("p",), Read("X", ())), "is read with 0 coordinates"),
        (Iterate("i", (IterState("R", ("p",), Const(0.0), at("R p")),), (), op("ge", at("R p"), 1.0)), "stop condition varies over p"),
    ],
)
def test_malformed_statements_are_named(statement, message):
    c = cascade(inputs="X: p", body=[statement], outputs="R: p", ranks={"i": 2})
    with pytest.raises(CascadeError, match=message) as caught:
        run(c, X=torch.zeros(2))
    assert caught.value.statement == "R" and caught.value.cascade == "case"
