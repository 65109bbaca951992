"""The tile interpreter on programs written by hand, against torch; and what it must notice when a program is wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import at, lift, op, tensor
from einfall.ir.cascade import Output, RankDecl, ScalarDecl
from einfall.ir.check import check_program
from einfall.ir.errors import BindingError, CascadeError
from einfall.ir.expr import Cast, Const, Count, Extent, Index, Masked, Read, Scalar, Seen, Start, Tile
from einfall.ir.tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Reduce, Scan, Store, TileOutput, TileProgram
from einfall.ir.tile_reference import run_program, run_programs
from einfall.ir.types import bf16, dtype, f32, i32
from hypothesis import given
from hypothesis import strategies as st

INF = float("inf")
EXTENT = st.integers(1, 13)


def t(name):
    return Tile(name)


def masked(x, identity):
    return Masked(lift(x), Const(identity))


def bounds(rank, begin=0, whole_begin=0, whole_end=None, end=None):
    return Bounds(*(lift(Extent(rank) if bound is None else bound) for bound in (begin, whole_begin, whole_end, end)))


def program(inputs, outputs, grid, resident, body, scalars=(), ranks=None):
    """A tile program; outputs like `O: b m = bf16`."""
    written = []
    for spec in outputs:
        declared = tensor(spec)
        written.append(TileOutput(Output(declared.name, declared.axes), declared.dtype))
    return TileProgram(
        "kernel",
        tuple(tensor(spec) for spec in inputs),
        tuple(written),
        tuple(ScalarDecl(name, f32) for name in scalars),
        tuple(RankDecl(rank, lift(size)) for rank, size in (ranks or {}).items()),
        tuple(GridRank(rank, tile) for rank, tile in grid.items()),
        tuple(resident),
        tuple(body),
    )


def attention(bm, bp, loop_bounds=None, kind="f32"):
    """Streaming causal attention: key p is seen by queries m >= p."""
    causal = Bounds(Const(0), Const(0), op("add", Start("m"), 1), op("add", Start("m"), bm))
    body = (
        Dot("s", ("m", "p"), ("e",), at("Q b h m e"), at("K b h p e"), post=op("mul", t("s"), Scalar("scale")), dtype=dtype(kind)),
        Reduce("tm", ("m",), "max", ("p",), masked(t("s"), -INF)),
        Map("m2", ("m",), op("maximum", t("mx"), t("tm"))),
        Map("ms", ("m",), op("maximum", t("m2"), -3.4e38)),
        Map("c", ("m",), op("exp", op("sub", op("maximum", t("mx"), -3.4e38), t("ms")))),
        Map("n", ("m", "p"), masked(op("exp", op("sub", t("s"), t("ms"))), 0.0)),
        Reduce("td", ("m",), "sum", ("p",), t("n")),
        Dot("o2", ("m", "f"), ("p",), t("n"), masked(at("V b h p f"), 0.0), update=op("mul", t("o"), t("c")), dtype=dtype(kind)),
    )
    states = (
        LoopState("mx", ("m",), Const(-INF), t("m2")),
        LoopState("d", ("m",), Const(0.0), op("add", op("mul", t("d"), t("c")), t("td"))),
        LoopState("o", ("m", "f"), Const(0.0), t("o2")),
    )
    loop = Loop("p", bp, (op("le", Index("p"), Index("m")),), loop_bounds or causal, states, body)
    store = Store("O", tuple(Index(r) for r in ("b", "h", "m", "f")), op("div", t("o"), t("d")))
    inputs = [f"Q: b h m e = {kind}", f"K: b h p e = {kind}", f"V: b h p f = {kind}"]
    return program(inputs, [f"O: b h m f = {kind}"], {"b": 1, "h": 1, "m": bm}, ("e", "f"), (loop, store), ("scale",))


def rows(*extents, seed=0):
    return torch.randn(*extents, generator=torch.Generator().manual_seed(seed))


def queries_and_keys(m, p, seed=0):
    return {"Q": rows(2, 2, m, 5, seed=seed), "K": rows(2, 2, p, 5, seed=seed + 1), "V": rows(2, 2, p, 3, seed=seed + 2)}


def causal_attention(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, scale=0.3).numpy()


def arrays(tensors):
    return {name: x.numpy() for name, x in tensors.items()}


@given(m=EXTENT, p=EXTENT, bm=st.sampled_from([2, 3, 4, 8]), bp=st.sampled_from([1, 2, 4, 5, 16]))
def test_streaming_causal_attention(m, p, bm, bp):
    tensors = queries_and_keys(m, p)
    expected = causal_attention(*tensors.values())
    exact = run_program(attention(bm, bp), arrays(tensors), {"scale": 0.3}, dtype=np.float64)["O"]
    np.testing.assert_allclose(exact, expected, rtol=1e-10, atol=1e-12)
    single = run_program(attention(bm, bp), arrays(tensors), {"scale": 0.3})["O"]
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=2e-5, atol=2e-6)


def test_narrow_operands_are_rounded_and_accumulated_wide():
    tensors = {name: x.bfloat16() for name, x in queries_and_keys(9, 9).items()}
    widened = {name: x.float().numpy() for name, x in tensors.items()}
    result = run_program(attention(4, 4, kind="bf16"), widened, {"scale": 0.3})["O"]
    expected = causal_attention(*tensors.values())
    np.testing.assert_allclose(result, expected, rtol=0.02, atol=0.02)
    assert np.array_equal(result, torch.from_numpy(result).bfloat16().float().numpy())
    assert np.abs(result - expected).max() > 1e-4


def test_the_operands_of_a_dot_are_rounded_to_its_type():
    dot = Dot("s", ("m",), ("k",), at("A m k"), at("B k"), dtype=bf16)
    p = program(["A: m k", "B: k"], ["O: m"], {"m": 2}, ("k",), [dot, Store("O", (Index("m"),), t("s"))])
    tensors = {"A": rows(3, 40), "B": rows(40, seed=1)}
    rounded = tensors["A"].bfloat16().double() @ tensors["B"].bfloat16().double()
    exact = tensors["A"].double() @ tensors["B"].double()
    np.testing.assert_allclose(run_program(p, arrays(tensors))["O"], rounded.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run_program(p, arrays(tensors), dtype=np.float64)["O"], exact.numpy(), rtol=1e-12)


def logsumexp(bp, guard=True):
    x = at("X m p")
    body = (
        Reduce("tm", (), "max", ("p",), masked(x, -INF)),
        Map("m2", (), op("maximum", t("mx"), t("tm"))),
        Map("ms", (), op("maximum", t("m2"), -3.4e38)),
        Reduce("td", (), "sum", ("p",), masked(op("exp", op("sub", x, t("ms"))), 0.0) if guard else op("exp", op("sub", x, t("ms")))),
    )
    scaled = op("mul", t("d"), op("exp", op("sub", op("maximum", t("mx"), -3.4e38), t("ms"))))
    states = (LoopState("mx", (), Const(-INF), t("m2")), LoopState("d", (), Const(0.0), op("add", scaled, t("td"))))
    loop = Loop("p", bp, (), bounds("p"), states, body)
    result = op("add", op("maximum", t("mx"), -3.4e38), op("log", t("d")))
    return program(["X: m p"], ["L: m"], {"m": 1}, (), (loop, Store("L", (Index("m"),), result)))


@given(m=EXTENT, p=EXTENT, bp=st.sampled_from([1, 3, 4, 16]), masked_row=st.booleans())
def test_streaming_logsumexp(m, p, bp, masked_row):
    x = rows(m, p) * 20
    x[0, ::2] = -INF
    if masked_row:
        x[-1] = -INF
    expected = torch.logsumexp(x.double(), -1).numpy()
    np.testing.assert_allclose(run_program(logsumexp(bp), {"X": x.numpy()}, dtype=np.float64)["L"], expected, rtol=1e-12, atol=1e-12)


def layernorm_matmul(bm, bk):
    """y = layernorm(x) * g @ w in one pass over k: the mean runs, and the accumulator is carried from the old mean to the new one."""
    x, shift = at("X m k"), op("sub", t("mu"), t("mu2"))
    centred = masked(op("sub", x, t("mu2")), 0.0)
    body = (
        Reduce("step", ("m",), "sum", ("k",), masked(op("sub", x, t("mu")), 0.0)),
        Map("mu2", ("m",), op("add", t("mu"), op("div", t("step"), Cast(Seen("k"), f32)))),
        Map("w", ("k", "n"), masked(op("mul", at("G k"), at("W k n")), 0.0)),
        Map("x", ("m", "k"), centred),
        Reduce("tv", ("m",), "sum", ("k",), op("mul", t("x"), t("x"))),
        Reduce("tg", ("n",), "sum", ("k",), t("w")),
        Dot("a2", ("m", "n"), ("k",), t("x"), t("w"), update=op("add", t("a"), op("mul", shift, t("gw")))),
    )
    moved = op("mul", op("mul", shift, shift), Cast(Start("k"), f32))
    states = (
        LoopState("mu", ("m",), Const(0.0), t("mu2")),
        LoopState("v", ("m",), Const(0.0), op("add", op("add", t("v"), moved), t("tv"))),
        LoopState("gw", ("n",), Const(0.0), op("add", t("gw"), t("tg"))),
        LoopState("a", ("m", "n"), Const(0.0), t("a2")),
    )
    variance = op("div", t("v"), Cast(Extent("k"), f32))
    result = op("mul", t("a"), op("rsqrt", op("add", variance, Scalar("eps"))))
    loop = Loop("k", bk, (), bounds("k"), states, body)
    store = Store("Y", (Index("m"), Index("n")), result)
    return program(["X: m k", "G: k", "W: k n"], ["Y: m n"], {"m": bm, "n": 4}, (), (loop, store), ("eps",))


@given(m=EXTENT, k=EXTENT, n=EXTENT, bm=st.sampled_from([1, 2, 4]), bk=st.sampled_from([1, 3, 8]))
def test_layernorm_and_matmul_with_a_running_mean(m, k, n, bm, bk):
    bm = max(bm, 2)
    x, g, w = rows(m, k).double() + 5, rows(k, seed=1).double(), rows(k, n, seed=2).double()
    expected = torch.nn.functional.layer_norm(x, (k,), g, None, 1e-3) @ w
    inputs = {"X": x.numpy(), "G": g.numpy(), "W": w.numpy()}
    exact = run_program(layernorm_matmul(bm, bk), inputs, {"eps": 1e-3}, dtype=np.float64)["Y"]
    np.testing.assert_allclose(exact, expected.numpy(), rtol=1e-9, atol=1e-9)
    single = run_program(layernorm_matmul(bm, bk), inputs, {"eps": 1e-3})["Y"]
    np.testing.assert_allclose(single, expected.numpy(), rtol=1e-3, atol=1e-3)


ACCUMULATE = {"sum": (np.add, 0.0), "prod": (np.multiply, 1.0), "max": (np.maximum, -INF), "min": (np.minimum, INF)}
CARRY = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def running(word, tile, exclusive, resident):
    """A scan over p, streamed with a carry (`tile` at a time) or resident, of a tile of rows."""
    identity = ACCUMULATE[word][1]
    scan = Scan("y", ("m", "p"), word, "p", masked(at("X m p"), identity) if not resident else at("X m p"), None, exclusive)
    store = Store("Y", (Index("m"), Index("p")), t("y"))
    if resident:
        return program(["X: m p"], ["Y: m p"], {"m": 2}, ("p",), (scan, store), ranks={"p": resident})
    part = Reduce("part", ("m",), word, ("p",), masked(at("X m p"), identity))
    state = LoopState("before", ("m",), Const(identity), op(CARRY[word], t("before"), t("part")))
    loop = Loop("p", tile, (), bounds("p"), (state,), (replace(scan, start=t("before")), store, part))
    return program(["X: m p"], ["Y: m p"], {"m": 2}, (), (loop,))


@given(m=EXTENT, p=EXTENT, tile=st.integers(1, 5), word=st.sampled_from(sorted(ACCUMULATE)), exclusive=st.booleans(), split=st.booleans())
def test_scans_within_a_tile_and_carried_from_tile_to_tile(m, p, tile, word, exclusive, split):
    x = rows(m, p).double().numpy()
    function, identity = ACCUMULATE[word]
    expected = function.accumulate(x, axis=1)
    if exclusive:
        expected = np.concatenate([np.full((m, 1), identity), expected[:, :-1]], 1)
    scanned = running(word, tile, exclusive, 0 if split else p)
    check_program(scanned)
    np.testing.assert_allclose(run_program(scanned, {"X": x}, dtype=np.float64)["Y"], expected, rtol=1e-12, atol=1e-12)


def test_a_scan_of_integers_wraps_around_and_rounds_to_its_type():
    body = [Scan("y", ("p",), "sum", "p", at("X p"), Const(7), dtype=i32), Scan("z", ("p",), "max", "p", at("X p"), dtype=i32)]
    stores = [Store("Y", (Index("p"),), t("y")), Store("Z", (Index("p"),), t("z"))]
    p = program(["X: p = i32"], ["Y: p = i32", "Z: p = i32"], {}, ("p",), body + stores, ranks={"p": 4})
    x = np.array([2**31 - 1, 3, -5, 4], dtype=np.int32)
    result = run_program(p, {"X": x})
    assert result["Y"].tolist() == [-(2**31) + 6, -(2**31) + 9, -(2**31) + 4, -(2**31) + 8]
    assert result["Z"].tolist() == [2**31 - 1] * 4
    body = [Scan("y", ("p",), "sum", "p", at("X p"), dtype=bf16)]
    p = program(["X: p"], ["Y: p"], {}, ("p",), [*body, Store("Y", (Index("p"),), t("y"))], ranks={"p": 3})
    assert run_program(p, {"X": np.array([256, 1, 1], dtype=np.float32)})["Y"].tolist() == [256, 256, 258]


# What must show ---------------------------------------------------------------------------------------------------------------------


def test_wrong_bounds_show():
    tensors = queries_and_keys(12, 12)
    expected = causal_attention(*tensors.values())
    too_whole = Bounds(Const(0), Const(0), op("add", Start("m"), 4), op("add", Start("m"), 4))
    too_short = Bounds(Const(0), Const(0), Start("m"), Start("m"))
    cautious = Bounds(Const(-5), Const(100), Const(-100), Const(100))
    for wrong in (too_whole, too_short):
        result = run_program(attention(4, 4, wrong), arrays(tensors), {"scale": 0.3})["O"]
        assert not np.allclose(result, expected, atol=1e-3)
    result = run_program(attention(4, 4, cautious), arrays(tensors), {"scale": 0.3})["O"]
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)


def test_an_unguarded_reduction_shows():
    x = rows(2, 5).double()
    whole = run_program(logsumexp(5, guard=False), {"X": x.numpy()}, dtype=np.float64)["L"]
    np.testing.assert_allclose(whole, torch.logsumexp(x, -1).numpy(), rtol=1e-12)
    edge = run_program(logsumexp(4, guard=False), {"X": x.numpy()}, dtype=np.float64)["L"]
    clamped = torch.cat([x, x[:, -1:].expand(2, 3)], 1)
    np.testing.assert_allclose(edge, torch.logsumexp(clamped, -1).numpy(), rtol=1e-12)


def test_lanes_of_the_grid_outside_an_extent_are_garbage():
    body = (Reduce("s", (), "sum", ("m",), at("X m")), Store("O", (op("floordiv", Start("m"), 4),), t("s")))
    p = program(["X: m"], ["O: n"], {"m": 4}, (), body, ranks={"n": 2})
    x = np.arange(6.0)
    assert np.array_equal(run_program(p, {"X": x})["O"], [6, np.nan], equal_nan=True)
    assert run_program(p, {"X": x}, garbage=100.0)["O"].tolist() == [6, 209]
    assert run_program(p, {"X": x}, garbage=None)["O"].tolist() == [6, 19]


def test_an_edge_tile_reads_nothing_outside_the_bounds_of_its_loop():
    x = torch.tensor([[INF, 1.0, 2.0, 3.0, INF, INF], [INF, 4.0, 5.0, 6.0, INF, INF]])
    guarded = Bounds(Const(1), Const(1), Const(4), Const(4))
    conditions = (op("ge", Index("p"), 1), op("lt", Index("p"), 4))
    step = Dot("o2", ("m",), ("p",), masked(at("W p"), 0.0), at("X m p"), update=t("o"))
    loop = Loop("p", 4, conditions, guarded, (LoopState("o", ("m",), Const(0.0), t("o2")),), (step,))
    p = program(["X: m p", "W: p"], ["O: m"], {"m": 2}, (), (loop, Store("O", (Index("m"),), t("o"))))
    assert run_program(p, {"X": x.numpy(), "W": np.ones(6)})["O"].tolist() == [6, 15]


def test_elements_that_nothing_stores_show():
    x = np.arange(6, dtype=np.float32)

    def stored(kind, value):
        where = Bounds(Const(2), Const(2), Const(4), Const(4))
        loop = Loop("p", 2, (), where, (), (Store("O", (Index("p"),), value),))
        return run_program(program(["X: p"], [f"O: p = {kind}"], {}, (), (loop,)), {"X": x})["O"]

    assert np.array_equal(stored("f32", at("X p")), [np.nan, np.nan, 2, 3, np.nan, np.nan], equal_nan=True)
    assert stored("i32", Cast(at("X p"), i32)).tolist() == [-(2**31), -(2**31), 2, 3, -(2**31), -(2**31)]
    with pytest.raises(CascadeError, match=r"no task stores 4 elements of O"):
        stored("bool", op("gt", at("X p"), 0.0))


def test_an_element_that_two_tasks_store_is_an_error():
    body = (Store("O", (op("mod", Index("m"), 2),), Const(1.0)),)
    with pytest.raises(CascadeError, match="two tasks store the same element of O"):
        run_program(program(["X: m"], ["O: n"], {"m": 1}, (), body, ranks={"n": 2}), {"X": np.zeros(3)})


def test_names_that_do_not_exist():
    body = (Store("O", (Index("m"),), t("q")),)
    p = program(["X: m"], ["O: m"], {"m": 2}, (), body)
    with pytest.raises(CascadeError, match="tile q is read before it is defined"):
        run_program(p, {"X": np.zeros(3)})
    with pytest.raises(BindingError, match="no array given for X"):
        run_program(p, {})
    with pytest.raises(BindingError, match="no value given for scalar s"):
        run_program(replace(p, scalars=(ScalarDecl("s", f32),)), {"X": np.zeros(3)})
    with pytest.raises(CascadeError, match="no tile has a rank m here"):
        run_program(replace(p, grid=(GridRank("m", 1),), body=(Map("y", ("m",), at("X m")),)), {"X": np.zeros(3)})


# Accesses, indices, axes ------------------------------------------------------------------------------------------------------------


@given(p=EXTENT, tile=st.integers(1, 5), window=st.integers(1, 4))
def test_windows_start_late_and_arg_reductions_give_global_indices(p, tile, window):
    """The position of the maximum among the `window` last elements up to each m, its payload carried from tile to tile."""
    first = op("sub", op("add", Index("m"), 1), window)
    body = (
        Reduce("tm", (), "max", ("p",), masked(at("X p"), -INF)),
        Reduce("ti", (), "argmax", ("p",), masked(at("X p"), -INF), dtype=i32),
        Map("m2", (), op("maximum", t("mx"), t("tm"))),
    )
    place = op("where", op("gt", t("tm"), t("mx")), t("ti"), t("ix"))
    states = (LoopState("mx", (), Const(-INF), t("m2")), LoopState("ix", (), Const(-1), place, i32))
    where = Bounds(first, first, op("add", Index("m"), 1), op("add", Index("m"), 1))
    conditions = (op("le", Index("p"), Index("m")), op("ge", Index("p"), first))
    loop = Loop("p", tile, conditions, where, states, body)
    stores = (Store("V", (Index("m"),), t("mx")), Store("I", (Index("m"),), t("ix")))
    x = rows(p).numpy()
    result = run_program(program(["X: p"], ["V: m", "I: m = i32"], {"m": 1}, (), (loop, *stores), ranks={"m": Extent("p")}), {"X": x})
    for m in range(p):
        low = max(m + 1 - window, 0)
        assert result["V"][m] == x[low : m + 1].max() and result["I"][m] == low + x[low : m + 1].argmax()


@given(n=EXTENT, j=st.integers(1, 5), tile=st.integers(2, 4))
def test_composed_axes_of_inputs_and_outputs(n, j, tile):
    body = (Map("x", ("n", "j"), op("mul", at("X n j"), at("S n"))), Store("O", (Index("j"), Index("n")), t("x")))
    p = program(["X: (n j)", "S: n"], ["O: (j n)"], {"n": tile}, ("j",), body)
    x, s = rows(n * j).numpy(), rows(n, seed=1).numpy()
    np.testing.assert_array_equal(run_program(p, {"X": x, "S": s})["O"], (x.reshape(n, j) * s[:, None]).T.reshape(-1))


def test_gathers_fills_and_counts():
    pages = np.array([2, 0, 1], dtype=np.int32)
    k = np.arange(6, dtype=np.float32).reshape(3, 2)
    gathered = Read("K", (Read("T", (op("floordiv", Index("p"), 2),)), op("mod", Index("p"), 2)))
    shifted = Read("X", (op("sub", Index("p"), 1),), Const(-7))
    counts = op("add", op("mul", Count("p"), 100), op("add", op("mul", Seen("p"), 10), Start("p")))
    body = (
        Store("G", (Index("p"),), gathered),
        Store("S", (Index("p"),), shifted),
        Store("C", (Index("p"),), counts),
        Store("B", (Index("p"),), op("lt", at("X p"), 2.0)),
    )
    outputs = ["G: p", "S: p", "C: p = i32", "B: p = bool"]
    p = program(["K: n j", "T: n = i32", "X: p"], outputs, {}, (), (Loop("p", 4, (), bounds("p"), (), body),))
    result = run_program(p, {"K": k, "T": pages, "X": np.arange(6, dtype=np.float32)})
    assert result["G"].tolist() == k[pages].reshape(-1).tolist()
    assert result["S"].tolist() == [-7, 0, 1, 2, 3, 4]
    assert result["C"].tolist() == [440] * 4 + [264] * 2
    assert result["B"].dtype == np.bool_ and result["B"].tolist() == [True, True] + [False] * 4


def test_states_take_their_next_values_at_once_and_nothing_runs_over_an_empty_rank():
    states = (LoopState("a", (), Const(1.0), t("b")), LoopState("b", (), Const(2.0), op("add", t("a"), t("b"))))
    loop = Loop("p", 2, (), bounds("p"), states, ())
    p = program(["X: p"], ["A:", "B:"], {}, (), (loop, Store("A", (), t("a")), Store("B", (), t("b"))))
    result = run_program(p, {"X": np.zeros(5)})
    assert (result["A"].item(), result["B"].item()) == (5.0, 8.0)
    result = run_program(p, {"X": np.zeros(0)})
    assert (result["A"].item(), result["B"].item()) == (1.0, 2.0)


def test_a_rank_that_no_array_has_takes_its_extent_from_the_call():
    count = LoopState("n", (), Const(0.0), op("add", t("n"), t("tile")))
    loop = Loop("p", 4, (), bounds("p"), (count,), (Reduce("tile", (), "sum", ("p",), masked(1.0, 0.0)),))
    p = program([], ["N:"], {}, (), (loop, Store("N", (), t("n"))))
    assert run_program(p, {}, sizes={"p": 7})["N"].item() == 7
    with pytest.raises(BindingError, match="nothing determines the extent of rank p"):
        run_program(p, {})


def test_kernels_run_in_order_and_hand_over_what_they_store():
    store = Store("Y", (Index("p"),), op("mul", at("X p"), 2.0))
    first = program(["X: p"], ["Y: p = bf16"], {"p": 4}, (), (store,))
    second = program(["Y: p = bf16"], ["Z: p"], {"p": 3}, (), (Store("Z", (Index("p"),), op("add", at("Y p"), 1.0)),))
    x = rows(7).numpy()
    result = run_programs((first, second), {"X": x})
    doubled = (torch.from_numpy(x) * 2).bfloat16().float().numpy()
    np.testing.assert_array_equal(result["Y"], doubled)
    np.testing.assert_array_equal(result["Z"], doubled + 1)
