"""Traffic, footprint, operations and roofline against figures worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from einfall.compiler.analysis import plan_passes
from einfall.compiler.cost import (
    cost,
    kernel_traffic,
    live_footprint,
    minimal_traffic,
    roofline,
    tensor_bytes,
    time_bound,
)
from einfall.compiler.operations import Work, by_unit, mask_share, operations, plan_operations
from einfall.compiler.passes import make_plan
from einfall.compiler.sizes import complete_sizes, missing_sizes
from einfall.ir.cascade import Einsum
from einfall.ir.errors import CascadeError
from einfall.ir.expr import Const, Extent, Index, Op
from einfall.ir.plan import Domain, KernelPlan, Plan, Stage
from einfall.ir.text import parse_cascade
from einfall.ir.types import bf16, f32, i4
from einfall.schedules.target import Cache, Memory, Target, Unit
from hypothesis import given, settings
from hypothesis import strategies as st

ATTENTION = """
cascade attention(Q[b,m,e], K[b,p,e], V[b,p,f], scale: f32) -> O[b,m,f]
  S0[b,m,p] = sum(e) Q[b,m,e] * K[b,p,e]
  S[b,m,p] = S0[b,m,p] * scale
  M[b,m] = max(p) S[b,m,p]
  N[b,m,p] = exp(S[b,m,p] - M[b,m])
  D[b,m] = sum(p) N[b,m,p]
  P[b,m,p] = N[b,m,p] / D[b,m]
  O[b,m,f] = sum(p) P[b,m,p] * V[b,p,f]
"""
SIZES = {"b": 6, "m": 8, "p": 16, "e": 4, "f": 5}
CAUSAL = """
cascade causal(Q[m,e], K[p,e], V[p,f]) -> O[m,f]
  S[m,p] = sum(e) Q[m,e] * K[p,e]
  M[m] = max(p where p <= m) S[m,p]
  N[m,p] = exp(S[m,p] - M[m])
  D[m] = sum(p where p <= m) N[m,p]
  U[m,f] = sum(p where p <= m) N[m,p] * V[p,f]
  O[m,f] = U[m,f] / D[m]
"""


def work_of(text, sizes):
    return operations(parse_cascade(text), complete_sizes(parse_cascade(text), sizes))


def one(text, sizes):
    return by_unit(work_of(text, sizes))


def test_traffic_of_attention():
    moved = {t.tensor: (t.direction, t.bytes, t.partial) for t in minimal_traffic(parse_cascade(ATTENTION), SIZES)}
    assert moved == {
        "Q": ("in", 6 * 8 * 4 * 4, False),
        "K": ("in", 6 * 16 * 4 * 4, False),
        "V": ("in", 6 * 16 * 5 * 4, False),
        "O": ("out", 6 * 8 * 5 * 4, False),
    }


def test_operations_of_attention():
    work = work_of(ATTENTION, SIZES)
    points = 6 * 8 * 16
    assert by_unit(work) == {
        "matrix": 2 * points * 4 + 2 * points * 5,
        "vector": 4 * points,  # times scale, max, minus, sum
        "special": 2 * points,  # exp, division
    }
    assert {w.statement: w.operations for w in work if w.unit == "matrix"} == {"S0": 2 * points * 4, "O": 2 * points * 5}


def test_footprint_of_attention():
    live = {x.tensor: (x.whole, x.bytes) for x in live_footprint(parse_cascade(ATTENTION), SIZES)}
    assert live == {
        "S0": ((), 4),  # flows on as it is made
        "S": (("p",), 16 * 4),  # the maximum must be over before the exponential begins
        "M": ((), 4),
        "N": (("p",), 16 * 4),  # the sum must be over before the division
        "D": ((), 4),
        "P": ((), 4),
    }
    assert {x.tensor: x.whole for x in live_footprint(parse_cascade(ATTENTION))}["S"] == ("p",)
    assert all(x.bytes is None for x in live_footprint(parse_cascade(ATTENTION)) if x.whole)


def test_footprint_of_a_cascade_in_one_pass_does_not_grow():
    sums = "  C[k] = A[k] * B[k]\n  Y[] = sum(k) C[k]\n  X[] = sum(k) A[k]\n  Z[] = Y[] * X[]\n"
    c = parse_cascade("cascade sums(A[k], B[k]) -> Z[]\n" + sums)
    assert {x.tensor: x.whole for x in live_footprint(c)} == {"C": (), "Y": (), "X": ()}


def test_footprint_behind_top_k_and_gather():
    c = parse_cascade(
        """
cascade pick(X[p], T[q]: i32) -> Y[s], G[q]
  E[p] = exp(X[p])
  V[s], I[s] = topk(p -> s, 4) E[p]
  M[] = max(s) V[s]
  Y[s] = V[s] - M[]
  G[q] = E[T[q]]
"""
    )
    live = {x.tensor: x.whole for x in live_footprint(c)}
    assert live["E"] == ("p",)  # gathered from
    assert live["V"] == ("s",)  # read again after its maximum, although no input has the rank s
    assert live["M"] == ()


def test_packed_and_composed_inputs():
    text = """
cascade dequantize(K[(n j)]: i4, A[n]: bf16) -> Y[(n j)]
  Y[n,j] = bf16(K[n,j]) * A[n]
"""
    moved = {t.tensor: t.bytes for t in minimal_traffic(parse_cascade(text), {"n": 5, "j": 3})}
    assert moved == {"K": 8, "A": 10, "Y": 30}  # fifteen half bytes, rounded up
    assert tensor_bytes(("n",), i4, {"n": 7}) == 4


def test_partial_traffic_of_a_gather_and_of_unused_inputs():
    text = """
cascade pages(K[page,j,e]: bf16, T[n]: i32, U[e]) -> Y[n,j]
  Y[n,j] = sum(e) K[T[n],j,e]
"""
    c = parse_cascade(text)
    sizes = complete_sizes(c, {"page": 100, "j": 8, "e": 4, "n": 3})
    moved = {t.tensor: (t.bytes, t.partial) for t in minimal_traffic(c, sizes)}
    assert moved["K"] == (3 * 8 * 4 * 2, True)
    assert moved["T"] == (12, False)
    assert "U" not in moved
    few = {t.tensor: t.bytes for t in minimal_traffic(c, {**sizes, "page": 2})}
    assert few["K"] == 2 * 8 * 4 * 2  # never more than the whole


def test_split_reads_cover_the_whole_and_constants_one_element():
    text = """
cascade split(X[p], Z[p]) -> Y[n]
  rank p = n * j
  rank j = 4
  Y[n] = sum(j) X[n*extent(j)+j] * Z[0]
"""
    c = parse_cascade(text)
    moved = {t.tensor: t.bytes for t in minimal_traffic(c, complete_sizes(c, {"p": 12}))}
    assert moved == {"X": 48, "Z": 4, "Y": 12}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cascade c(A[m,k], B[k,n]) -> C[m,n]\n  C[m,n] = sum(k) A[m,k] * B[k,n]\n", (2 * 2 * 3 * 5, 0, 0)),
        ("cascade c(A[m,k], B[k]) -> C[m]\n  C[m] = sum(k) A[m,k] * B[k]\n", (2 * 2 * 5, 0, 0)),
        ("cascade c(A[k], B[k]) -> C[]\n  C[] = sum(k) A[k] * B[k]\n", (0, 10, 0)),  # both sides alike: nothing for a matrix unit
        ("cascade c(A[m,k]) -> C[m]\n  C[m] = sum(k) A[m,k] * A[m,k]\n", (0, 20, 0)),
        ("cascade c(A[m,k], B[k,n], S[m]) -> C[m,n]\n  C[m,n] = sum(k) A[m,k] * B[k,n] * S[m]\n", (60, 2 * 3, 0)),  # S leaves the sum
        ("cascade c(A[m,k], B[k,n], W[k]) -> C[m,n]\n  C[m,n] = sum(k) A[m,k] * B[k,n] * W[k]\n", (60, 2 * 5, 0)),  # W joins A
        ("cascade c(A[m,k], B[k,n]) -> C[m,n]\n  C[m,n] = sum(k) exp(A[m,k]) * B[k,n]\n", (60, 0, 10)),  # exp over m, k alone
        ("cascade c(A[m,k], B[k,n]) -> C[m,n]\n  C[m,n] = max(k) A[m,k] * B[k,n]\n", (0, 60, 0)),
        ("cascade c(A[m,k]) -> C[m]\n  C[m] = argmax(k) A[m,k]\n", (0, 20, 0)),
        ("cascade c(A[m,k]) -> C[m,k]\n  C[m,k] = A[m,k] * 2.0 + A[m,k] * 2.0\n", (0, 20, 0)),  # the equal product once
        ("cascade c(A[m,k], B[m]) -> C[m,k]\n  C[m,k] = A[m,k] + sqrt(B[m])\n", (0, 10, 2)),  # the root over m alone
        ("cascade c(A[m,k]) -> C[m,k]\n  C[m,k] = cumsum(k) A[m,k]\n", (0, 10, 0)),
        ("cascade c(A[m,k]) -> V[m,s], I[m,s]\n  V[m,s], I[m,s] = topk(k -> s, 3) A[m,k]\n", (0, 10 * 2, 0)),
        ("cascade c(A[m,k]) -> V[m,s], I[m,s]\n  V[m,s], I[m,s] = sort(k -> s) A[m,k]\n", (0, 10 * 3, 0)),
        ("cascade c(A[k], T[k]: i32) -> C[n]\n  rank n = 3\n  C[n] = scatter(k at n = T[k]) A[k]\n", (0, 5, 0)),
        ("cascade c(A[m,k]) -> C[m,k]\n  C[m,k] = A[m,(k + 1) % extent(k)]\n", (0, 0, 0)),  # addresses are not operations
        ("cascade c(A[m,k]: i8) -> C[m,k]\n  C[m,k] = f32(A[m,k])\n", (0, 10, 0)),
    ],
)
def test_operations_by_hand(text, expected):
    assert tuple(one(text, pick(text)).values()) == expected


def pick(text):
    c = parse_cascade(text)
    return {rank: size for rank, size in {"m": 2, "n": 3, "k": 5}.items() if rank in c.all_ranks()}


def test_operations_of_an_iteration_count_every_step():
    text = """
cascade steps(A[n,k], X[n]) -> Y[n]
  rank i = 4
  iterate i
    V[n] = X[n] then tanh(W[n])
    W[n] = sum(k) A[n,k] * V[k]
  Y[n] = V[n] + 1.0
"""
    assert one(text, {"n": 3, "k": 3}) == {"matrix": 4 * 2 * 9, "vector": 3, "special": 4 * 3}


def test_a_causal_mask_halves_what_is_needed():
    n = 6
    masked = n * (n + 1) // 2
    work = work_of(CAUSAL, {"m": n, "p": n, "e": 4, "f": 5})
    assert by_unit(work) == {
        "matrix": 2 * masked * 4 + 2 * masked * 5,  # the scores, too: nobody reads the others
        "vector": 3 * masked,  # max, minus, sum
        "special": masked + n * 5,
    }


def test_a_score_that_someone_reads_unmasked_is_needed_whole():
    everyone = CAUSAL.replace("-> O[m,f]", "-> O[m,f], S[m,p]")
    n = 6
    work = {w.statement: w.operations for w in work_of(everyone, {"m": n, "p": n, "e": 4, "f": 5}) if w.unit == "matrix"}
    assert work == {"S": 2 * n * n * 4, "U": 2 * (n * (n + 1) // 2) * 5}


def test_a_mask_of_data_counts_all_points_and_its_own_comparison():
    text = "cascade c(A[m,k], L[m]: i32) -> C[m]\n  C[m] = sum(k where k < L[m]) A[m,k]\n"
    assert one(text, {"m": 2, "k": 5})["vector"] == 10 + 10


def test_a_plan_computes_what_its_states_need():
    c = parse_cascade(ATTENTION)
    points, rows = 6 * 8 * 16, 6 * 8
    assert by_unit(plan_operations(make_plan(c, SIZES), SIZES)) == {
        "matrix": 2 * points * 4 + 2 * points * 5,
        "vector": 4 * points + rows * 5,  # as before, and the row's factor on the result
        "special": points + rows,  # one exponential for both sums, the division once a row
    }


def test_kernels_multiply_narrow_and_keep_the_rest_wide():
    c = parse_cascade(ATTENTION.replace("e],", "e]: bf16,").replace("f],", "f]: bf16,"))
    assert {(w.unit, w.dtype.name) for w in plan_operations(make_plan(c, SIZES), SIZES)} == {
        ("matrix", "bf16"), ("vector", "f32"), ("special", "f32"),
    }  # fmt: skip
    assert ("special", "bf16") in {(w.unit, w.dtype.name) for w in operations(c, SIZES)}  # as declared


def test_a_mask_written_as_minus_infinity_halves_the_plan():
    masked = CAUSAL.replace("(p where p <= m)", "(p)").replace("  M[m]", "  T[m,p] = where(p <= m, S[m,p], -inf)\n  M[m]")
    c = parse_cascade(masked.replace("max(p) S[", "max(p) T[").replace("exp(S[", "exp(T["))
    n = 6
    sizes = {"m": n, "p": n, "e": 4, "f": 5}
    assert by_unit(operations(c, sizes))["matrix"] == 2 * n * n * 9
    assert by_unit(plan_operations(make_plan(c, sizes), sizes))["matrix"] == 2 * (n * (n + 1) // 2) * 9


comparisons = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(-4, 4), comparisons, st.booleans())
def test_mask_share_counts_points(rows, columns, shift, name, band):
    mask = Op(name, (Index("p"), Op("add", (Index("m"), Const(shift)))))
    if band:
        mask = Op("and", (mask, Op("lt", (Op("sub", (Index("m"), Index("p"))), Op("floordiv", (Extent("p"), Const(2)))))))
    compare = {"lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__}[name]
    inside = [compare(p, m + shift) and (not band or m - p < columns // 2) for m in range(rows) for p in range(columns)]
    assert mask_share(mask, {"m": rows, "p": columns}) == pytest.approx(sum(inside) / len(inside))


def test_mask_share_of_a_large_triangle_is_close():
    mask = Op("le", (Index("p"), Index("m")))
    assert mask_share(mask, {"m": 100_000, "p": 100_000}) == pytest.approx(0.5, abs=0.01)
    assert mask_share(mask, {"m": 0, "p": 5}) == 1.0
    assert mask_share(None, {}) == 1.0


def test_the_type_a_matrix_unit_multiplies_in():
    def matrix_types(text, sizes):
        return {w.dtype.name for w in work_of(text, sizes) if w.unit == "matrix"}

    sizes = {"m": 2, "k": 3, "n": 4}
    product = "cascade c(A[m,k]: {}, B[k,n]: {}) -> C[m,n]\n  C[m,n] = sum(k) {} * {}\n"
    assert matrix_types(product.format("bf16", "bf16", "A[m,k]", "B[k,n]"), sizes) == {"bf16"}
    assert matrix_types(product.format("i8", "i8", "A[m,k]", "B[k,n]"), sizes) == {"i8"}
    assert matrix_types(product.format("bf16", "i8", "A[m,k]", "f32(B[k,n])"), sizes) == {"bf16"}
    assert matrix_types(product.format("f32", "f32", "A[m,k]", "B[k,n]"), sizes) == {"f32"}


# sizes ---------------------------------------------------------------------------------------------------------------------


def test_sizes_follow_from_each_other():
    text = """
cascade many(X[p], Y[(n j)], T[u]) -> V[s], C[w], Z[r]
  rank p = n * j
  rank j = 8
  rank w = n + u
  V[s], I[s] = topk(p -> s, 5) X[p]
  C[w] = concat(w) Y[n,0]; T[u]
  Z[r] = T[r]
"""
    c = parse_cascade(text)
    assert complete_sizes(c, {"p": 32, "u": 3}) == {"p": 32, "n": 4, "j": 8, "u": 3, "s": 5, "w": 7, "r": 3}
    assert missing_sizes(c, {"p": 32}) == ("u", "w", "r")
    assert missing_sizes(c, {"n": 1, "w": 3}) == ()
    with pytest.raises(CascadeError, match="p = 30 leaves a remainder when split by 8"):
        complete_sizes(c, {"p": 30})
    with pytest.raises(CascadeError, match="unknown rank 'q'"):
        complete_sizes(c, {"q": 3})
    with pytest.raises(CascadeError, match="size -1"):
        complete_sizes(c, {"u": -1})


def test_missing_sizes_are_named_with_the_option():
    with pytest.raises(CascadeError) as error:
        cost(parse_cascade(ATTENTION), {"b": 1, "e": 64, "f": 64}, target())
    assert "the size of m, p is not known" in str(error.value)
    assert "--dims m=...,p=..." in str(error.value)


# roofline ------------------------------------------------------------------------------------------------------------------


def target(*, bandwidth=1e9, shared=False):
    pipe = "one" if shared else None
    return Target(
        name="toy", kind="cpu", description="a toy", buildable=False, cores=1,
        units=(
            Unit("mm", "matrix", pipe or "mm", (("bf16", 4e9), ("f32", 2e9)), "estimated", "made up"),
            Unit("vv", "vector", pipe or "vv", (("f32", 1e9), ("i32", 1e9)), "estimated", "made up"),
            Unit("ss", "special", pipe or "ss", (("f32", 0.5e9),), "estimated", "made up"),
        ),
        memories=(Memory("RAM", 1 << 30, bandwidth, "estimated", "made up"),),
        caches=(Cache("L1", 1, 1 << 15, 1),), limits=(("threads", 1),), limits_source="made up",
    )  # fmt: skip


def test_roofline_takes_the_slowest():
    work = (Work("matrix", f32, 4000, "A"), Work("vector", f32, 1000, "A"), Work("special", f32, 1500, "B"))
    found = time_bound(1000, work, target())
    assert found.memory_us == pytest.approx(1.0)
    assert {u.does: u.time_us for u in found.units} == pytest.approx({"matrix": 2.0, "vector": 1.0, "special": 3.0})
    assert found.time_us == pytest.approx(3.0)
    assert found.bound_by == "special operations (ss, f32)"


def test_units_of_one_pipe_take_turns():
    work = (Work("matrix", f32, 4000, "A"), Work("vector", f32, 1000, "A"), Work("special", f32, 1500, "B"))
    found = time_bound(1000, work, target(shared=True))
    assert found.time_us == pytest.approx(6.0)
    assert found.bound_by == "special operations (ss, f32)"


def test_memory_bound_and_nothing_to_do():
    found = time_bound(9000, (Work("matrix", bf16, 4000, "A"), Work("matrix", f32, 2000, "B")), target())
    assert (found.time_us, found.bound_by) == (pytest.approx(9.0), "memory")
    assert {u.dtype: u.time_us for u in found.units} == pytest.approx({"bf16": 1.0, "f32": 1.0})
    assert time_bound(0, (), target()).time_us == 0.0


def test_a_type_without_a_unit_is_reported_as_what_it_runs_as():
    no_bf16 = replace(target(), units=(Unit("mm", "matrix", "mm", (("f32", 2e9),), "estimated", "made up"),))
    (unit,) = time_bound(1, (Work("matrix", bf16, 2000, "A"),), no_bf16).units
    assert (unit.dtype, unit.runs_as, unit.time_us) == ("bf16", "f32", pytest.approx(1.0))


def test_cost_of_attention_on_a_target():
    found = cost(parse_cascade(ATTENTION), SIZES, target())
    points = 6 * 8 * 16
    assert found.traffic_bytes == 4 * (6 * 8 * 4 + 6 * 16 * 4 + 6 * 16 * 5 + 6 * 8 * 5)
    assert found.flops == 18 * points + 4 * points + 2 * points
    assert found.intensity == pytest.approx(24 * points / found.traffic_bytes)
    assert found.roofline.time_us == pytest.approx(18 * points / 2e9 * 1e6)
    assert found.roofline.bound_by == "matrix operations (mm, f32)"
    planned = roofline(parse_cascade(ATTENTION), SIZES, target())
    assert planned == cost(parse_cascade(ATTENTION), SIZES, target(), make_plan(parse_cascade(ATTENTION), SIZES)).roofline
    assert {u.does: u.operations for u in planned.units}["special"] < 2 * points


def test_roofline_of_a_cascade_without_a_plan():
    c = parse_cascade("cascade pick(X[p]) -> V[s], I[s]\n  V[s], I[s] = sort(p -> s) X[p]\n")
    assert roofline(c, {"p": 15}, target()).bytes == 15 * 4 * 3


def stage(c, index, *names):
    return Stage(index, tuple(s for s in c.body if isinstance(s, Einsum) and s.out in names), (), (), (), Domain(), ())


def test_traffic_of_kernels_counts_every_stream():
    c = parse_cascade(ATTENTION)
    q, k, v, o = 6 * 8 * 4 * 4, 6 * 16 * 4 * 4, 6 * 16 * 5 * 4, 6 * 8 * 5 * 4

    def bytes_of(*stages):
        (moved,) = kernel_traffic(Plan(c, (KernelPlan("k", "p", stages, (), ("Q", "K", "V"), ("O",)),)), SIZES)
        return {t.tensor: t.bytes for t in moved}

    assert bytes_of(stage(c, 0, "M", "D", "O")) == {"Q": q, "K": k, "V": v, "O": o}
    assert bytes_of(stage(c, 0, "M"), stage(c, 1, "D"), stage(c, 2, "O")) == {"Q": q, "K": 3 * k, "V": v, "O": o}


def test_an_output_along_the_stream_is_one_more_stream():
    c = parse_cascade("cascade softmax(X[m,p]) -> Y[m,p]\n  M[m] = max(p) X[m,p]\n  N[m,p] = exp(X[m,p] - M[m])\n"
                      "  D[m] = sum(p) N[m,p]\n  Y[m,p] = N[m,p] / D[m]\n")  # fmt: skip
    plan = Plan(c, (KernelPlan("k", "p", (stage(c, 0, "M", "D"),), (), ("X",), ("Y",)),))
    (moved,) = kernel_traffic(plan, {"m": 2, "p": 3})
    assert {t.tensor: t.bytes for t in moved} == {"X": 2 * 24, "Y": 24}


def test_an_output_that_needs_no_sum_is_stored_in_the_first_stream():
    c = parse_cascade("cascade both(X[m,p]) -> M[m], Y[m,p]\n  M[m] = max(p) X[m,p]\n  Y[m,p] = X[m,p] * 2\n")
    plan = Plan(c, (KernelPlan("k", "p", (stage(c, 0, "M"),), (), ("X",), ("M", "Y")),))
    (moved,) = kernel_traffic(plan, {"m": 2, "p": 3})
    assert {t.tensor: t.bytes for t in moved} == {"X": 24, "M": 8, "Y": 24}


def test_a_product_that_is_kept_is_read_in_the_place_of_its_operands():
    c = parse_cascade("cascade score(Q[r,e], K[p,e], V[p,f]) -> O[r,f], C[p]\n  S[r,p] = sum(e) Q[r,e] * K[p,e]\n  M[r] = max(p) S[r,p]\n"
                      "  N[r,p] = exp(S[r,p] - M[r])\n  D[r] = sum(p) N[r,p]\n  O[r,f] = sum(p) N[r,p] / D[r] * V[p,f]\n"
                      "  C[p] = sum(r) N[r,p] / D[r]\n")  # fmt: skip
    sizes = {"r": 4, "p": 512, "e": 128, "f": 128}
    plan = make_plan(c, sizes)
    assert [kernel.kept for kernel in plan.kernels] == [("S",)]
    (moved,) = kernel_traffic(plan, sizes)
    scores, keys, rows = 4 * 512 * 4, 512 * 128 * 4, 4 * 128 * 4
    found = {(t.tensor, t.direction): t.bytes for t in moved}
    assert found == {("Q", "in"): rows, ("K", "in"): keys, ("V", "in"): keys, ("S", "in"): scores, ("S", "out"): scores,
                     ("O", "out"): rows, ("C", "out"): 512 * 4}  # fmt: skip
    assert plan_passes(plan, "p") == 1


def test_what_a_kernel_gathers_beside_its_stream_counts_as_the_elements_named():
    c = parse_cascade("cascade pick(X[t,v], Y[t]: i32) -> O[t]\n  M[t] = max(v) X[t,v]\n  O[t] = M[t] - X[t,Y[t]]\n")
    plan = Plan(c, (KernelPlan("k", "v", (stage(c, 0, "M"),), (), ("X", "Y"), ("O",)),))
    (moved,) = kernel_traffic(plan, {"t": 3, "v": 50})
    assert {t.tensor: t.bytes for t in moved} == {"X": 3 * 50 * 4 + 3 * 4, "Y": 12, "O": 12}


def test_a_large_share_agrees_with_numpy():
    mask = Op("and", (Op("le", (Index("p"), Index("m"))), Op("gt", (Index("p"), Op("sub", (Index("m"), Const(100)))))))
    m, p = np.meshgrid(np.arange(1000), np.arange(1500), indexing="ij")
    assert mask_share(mask, {"m": 1000, "p": 1500}) == pytest.approx(((p <= m) & (p > m - 100)).mean())
