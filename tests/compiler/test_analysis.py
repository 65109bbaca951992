"""Passes and phases: FuseMax's published counts, cases worked out by hand, and a simulation of reading element by element."""

from pathlib import Path

import pytest
import torch
from einfall.compiler.analysis import input_ranks, pass_report, passes, phases, plan_passes, plan_reads
from einfall.ir.cascade import Cascade, Einsum, Output, Scan, Tensor
from einfall.ir.check import check_cascade
from einfall.ir.errors import CascadeError
from einfall.ir.expr import Const, Extent, Op, Read, aligned
from einfall.ir.plan import Domain, KernelPlan, Plan, Stage
from einfall.ir.reference import evaluate
from einfall.ir.text import parse_cascade
from einfall.ir.types import f32
from hypothesis import given, settings
from hypothesis import strategies as st

FUSEMAX = Path(__file__).parent / "fusemax"


@pytest.mark.parametrize(("number", "rank", "published"), [(1, "k", 2), (2, "k", 1), (3, "i", 1), (4, "m", 3), (5, "(m1 m0)", 1)])
def test_published_counts(number, rank, published):
    cascade = parse_cascade((FUSEMAX / f"cascade{number}.cascade").read_text())
    check_cascade(cascade)
    assert passes(cascade, rank) == published


def test_the_published_cascades_compute_the_same():
    torch.manual_seed(0)

    def value(number, **tensors):
        c = parse_cascade((FUSEMAX / f"cascade{number}.cascade").read_text())
        return next(iter(evaluate(c, tensors, dtype=torch.float64).values()))

    a, b = torch.rand(7), torch.rand(7)
    torch.testing.assert_close(value(1, A=a, B=b), value(2, A=a, B=b))
    torch.testing.assert_close(value(1, A=a, B=b), (a.double() * b.double()).sum() * a.double().sum())
    q, k, v = torch.randn(4, 3), torch.randn(4, 12), torch.randn(5, 12)
    blocks = torch.nn.functional.softmax(k.double().T @ q.double(), dim=0)
    torch.testing.assert_close(value(4, Q=q, K=k, V=v), v.double() @ blocks)
    torch.testing.assert_close(value(5, Q=q, K=k, V=v), v.double() @ blocks)


ATTENTION = """
cascade attention(Q[b,h,m,e], K[b,h,p,e], V[b,h,p,f], scale: f32) -> O[b,h,m,f]
  S0[b,h,m,p] = sum(e) Q[b,h,m,e] * K[b,h,p,e]
  S[b,h,m,p] = S0[b,h,m,p] * scale
  M[b,h,m] = max(p) S[b,h,m,p]
  N[b,h,m,p] = exp(S[b,h,m,p] - M[b,h,m])
  D[b,h,m] = sum(p) N[b,h,m,p]
  P[b,h,m,p] = N[b,h,m,p] / D[b,h,m]
  O[b,h,m,f] = sum(p) P[b,h,m,p] * V[b,h,p,f]
"""
COLUMN_SCORE = ATTENTION.replace("O[b,h,m,f]\n", "O[b,h,m,f], C[b,h,p]\n", 1) + "  C[b,h,p] = sum(m) P[b,h,m,p]\n"
BLOCKS = """
cascade quantize(X[(n j)]) -> Y[(n j)]
  A[n] = max(j) abs(X[n,j])
  Y[n,j] = round(X[n,j] / A[n])
"""
SPLIT_BLOCKS = """
cascade quantize(X[p]) -> Y[n,j]
  rank p = n * j
  rank j = 32
  A[n] = max(j) abs(X[n*extent(j)+j])
  Y[n,j] = round(X[n*extent(j)+j] / A[n])
"""
SCAN = """
cascade scan(X[i]) -> Y[i], Z[i]
  A[i] = cumsum(i) X[i]
  Y[i] = X[i] * A[i]
  Z[i] = X[i] / A[extent(i)-1]
"""
SELECT = """
cascade select(Q[w,e], K[p,e], V[p,f]) -> G[s,e], H[s,f]
  S[w,p] = sum(e) Q[w,e] * K[p,e]
  M[w] = max(p) S[w,p]
  N[w,p] = exp(S[w,p] - M[w])
  D[w] = sum(p) N[w,p]
  C[p] = sum(w) N[w,p] / D[w]
  T[s], I[s] = topk(p -> s, 4) C[p]
  G[s,e] = K[I[s],e]
  H[s,f] = V[I[s],f]
"""


def test_attention():
    c = parse_cascade(ATTENTION)
    assert passes(c, "p") == 3
    assert {r: passes(c, r) for r in ("b", "h", "m", "e", "f")} == {"b": 1, "h": 1, "m": 1, "e": 1, "f": 1}
    reads = dict(pass_report(c).of("p").inputs)
    assert [r.number for r in reads["K"]] == [1, 2, 3]
    assert [r.number for r in reads["V"]] == [1]  # V alone is read once; the lower bound is K's
    assert reads["V"][0].statements == ("O",)
    assert reads["K"][0].statements == ("S0", "S", "M")


def test_attention_with_column_score():
    c = parse_cascade(COLUMN_SCORE)
    assert (passes(c, "p"), passes(c, "m")) == (3, 1)


def test_one_component_of_a_composed_rank_is_no_barrier_for_the_whole():
    c = parse_cascade(BLOCKS)
    assert (passes(c, "(n j)"), passes(c, "j"), passes(c, "n")) == (1, 2, 1)
    split = parse_cascade(SPLIT_BLOCKS)
    assert (passes(split, "p"), passes(split, "(n j)"), passes(split, "j"), passes(split, "n")) == (1, 1, 2, 1)


def test_a_reduction_of_the_whole_composed_rank_is_a_barrier():
    c = parse_cascade("cascade whole(X[(n j)]) -> Y[(n j)]\n  A[] = max(n, j) abs(X[n,j])\n  Y[n,j] = X[n,j] / A[]\n")
    assert passes(c, "(n j)") == 2


def test_phases_count_dependent_reads_of_different_inputs():
    c = parse_cascade("cascade two(A[p], B[p]) -> Z[]\n  Y[] = sum(p) A[p]\n  Z[] = sum(p) Y[] * B[p]\n")
    assert (passes(c, "p"), phases(c, "p")) == (1, 2)


def test_a_scan_is_no_barrier_but_its_final_coordinate_is():
    c = parse_cascade(SCAN)
    assert passes(c, "i") == 2
    reads = dict(pass_report(c).of("i").inputs)["X"]
    assert [(r.number, r.statements) for r in reads] == [(1, ("A", "Y")), (2, ("Z",))]


def test_gather_after_top_k_is_a_partial_pass():
    c = parse_cascade(SELECT)
    assert passes(c, "p") == 4
    reads = dict(pass_report(c).of("p").inputs)
    assert [(r.number, r.partial) for r in reads["K"]] == [(1, False), (2, False), (3, False), (4, True)]
    assert reads["K"][-1].statements == ("G",)
    assert [(r.number, r.partial, r.statements) for r in reads["V"]] == [(1, True, ("H",))]
    assert phases(c, "p") == 4


def test_a_gathered_intermediate_must_be_complete():
    c = parse_cascade("cascade g(X[p], T[p]: i32) -> Y[p]\n  A[p] = exp(X[p])\n  Y[p] = A[T[p]] + X[p]\n")
    assert passes(c, "p") == 2


def test_a_constant_coordinate_of_an_input_is_partial_and_no_barrier():
    c = parse_cascade("cascade g(X[p], W[p]) -> Y[p]\n  Y[p] = X[0] * W[p]\n")
    reads = dict(pass_report(c).of("p").inputs)
    assert passes(c, "p") == 1
    assert [r.partial for r in reads["X"]] == [True]
    assert [r.partial for r in reads["W"]] == [False]


def test_sort_and_scatter_are_barriers_even_along_the_same_rank():
    scattered = parse_cascade("cascade s(X[p], T[p]: i32) -> Y[p]\n  Z[p] = scatter(q at p = T[q]) X[q]\n  Y[p] = Z[p] + X[p]\n")
    assert passes(scattered, "p") == 2
    kept = parse_cascade("cascade s(X[p]) -> Y[s]\n  V[s], I[s] = sort(p -> s) X[p]\n  Y[s] = V[s] * X[I[s]]\n")
    assert passes(kept, "p") == 2


def test_a_tensor_read_under_another_index_is_read_whole():
    c = parse_cascade("cascade pairs(X[p]) -> Y[p]\n  Y[p] = sum(q) X[p] * X[q]\n")
    assert passes(c, "p") == 1  # the rule for inputs: a second reader, not a second pass
    assert [r.partial for r in dict(pass_report(c).of("p").inputs)["X"]] == [False]
    mapped = parse_cascade("cascade pairs(X[p]) -> Y[p]\n  E[p] = exp(X[p])\n  Y[p] = sum(q) E[p] * E[q]\n")
    assert passes(mapped, "p") == 2


def test_concatenated_rank_and_its_pieces():
    c = parse_cascade(
        """
cascade shared_prefix(Q[b,e], A[s,e], B[b,t,e]) -> O[b]
  rank p = s + t
  X[b,p,e] = concat(p) A[s,e]; B[b,t,e]
  S[b,p] = sum(e) Q[b,e] * X[b,p,e]
  M[b] = max(p) S[b,p]
  O[b] = sum(p) exp(S[b,p] - M[b])
"""
    )
    assert {r: passes(c, r) for r in ("p", "s", "t", "b")} == {"p": 2, "s": 2, "t": 2, "b": 1}
    report = pass_report(c)
    assert [name for name, _ in report.of("p").inputs] == ["A", "B"]
    assert [name for name, _ in report.of("s").inputs] == ["A"]
    assert [name for name, _ in report.of("t").inputs] == ["B"]


def test_a_shifted_extent_is_no_concatenation():
    c = parse_cascade("cascade pad(X[m], Y[p]) -> Z[p]\n  rank p = m + 4\n  A[] = sum(m) X[m]\n  Z[p] = Y[p] * A[]\n")
    assert [name for name, _ in pass_report(c).of("m").inputs] == ["X"]
    assert passes(c, "p") == 1
    assert phases(c, "p") == 1


POWER = """
cascade power(A[n,k], X[n]) -> Y[n]
  rank i = 5
  iterate i
    V[n] = X[n] then W[n] / L[]
    W[n] = sum(k) A[n,k] * V[k]
    L[] = sum(n) W[n] * W[n]
  Y[n] = V[n] * 1.0
"""


def test_every_step_of_an_iteration_over_another_rank_repeats_its_passes():
    c = parse_cascade(POWER)
    assert passes(c, "k") == 5  # A is read once in each of the five steps
    unknown = parse_cascade(POWER.replace("  rank i = 5\n", ""))
    assert passes(unknown, "k") == 1  # one step's passes, and the report says so
    assert pass_report(unknown).of("k").per_step == ("i",)
    assert pass_report(c).of("k").per_step == ()


def test_a_step_that_stops_on_a_sum_waits_for_it():
    c = parse_cascade(
        """
cascade descend(A[n], X[]) -> Y[]
  rank i = 3
  iterate i
    V[] = X[] then V[] * 0.5
    R[] = sum(n) A[n] * V[]
    until R[] < 1.0
  Y[] = V[] * 1.0
"""
    )
    assert passes(c, "n") == 3


def test_final_states_and_steps_of_the_streamed_rank():
    c = parse_cascade(
        """
cascade running(X[i]) -> Y[i]
  iterate i
    M[] = -inf then maximum(M[], X[i])
  Y[i] = X[i] - M[]
"""
    )
    assert passes(c, "i") == 2


@pytest.mark.parametrize("rank", ["q", "(b q)", "", "()", "scale"])
def test_unknown_rank(rank):
    with pytest.raises(CascadeError) as error:
        passes(parse_cascade(ATTENTION), rank)
    assert "unknown rank" in str(error.value)
    assert "in cascade attention" in str(error.value)
    assert "b, h, m, e, p, f" in str(error.value)


def test_unknown_rank_names_the_nearest():
    c = parse_cascade("cascade sums(X[batch, keys]) -> Y[batch]\n  Y[batch] = sum(keys) X[batch,keys]\n")
    with pytest.raises(CascadeError, match="'keys'; the ranks are batch, keys"):
        phases(c, "key")


def test_report_lists_every_rank_of_the_inputs_and_is_json():
    c = parse_cascade(BLOCKS)
    assert input_ranks(c) == ("n", "j", "(n j)")
    assert input_ranks(parse_cascade(SPLIT_BLOCKS)) == ("p",)
    data = pass_report(c).to_dict()
    assert data["j"]["passes"] == 2
    assert data["(n j)"]["inputs"]["X"] == [{"pass": 1, "statements": ["A", "Y"], "partial": False}]
    with pytest.raises(KeyError):
        pass_report(c).of("z")


def stage(c, index, *names):
    found = tuple(s for s in c.body if isinstance(s, Einsum) and s.out in names)
    assert len(found) == len(names)
    return Stage(index, found, (), (), (), Domain(), ())


def kernel(stream, stages, outputs, inputs=()):
    return KernelPlan("k", stream, tuple(stages), (), tuple(inputs), tuple(outputs))


def test_passes_of_a_plan_are_its_stages():
    c = parse_cascade(ATTENTION)
    together = Plan(c, (kernel("p", [stage(c, 0, "M", "D", "O")], ["O"]),))
    apart = Plan(c, (kernel("p", [stage(c, 0, "M"), stage(c, 1, "D"), stage(c, 2, "O")], ["O"]),))
    assert plan_passes(together, "p") == 1
    assert plan_passes(apart, "p") == 3
    assert plan_passes(together, "m") == 1
    two = Plan(c, (kernel("p", [stage(c, 0, "M", "D"), stage(c, 1, "O")], ["O"]),))
    assert plan_passes(two, "p") == 2


def test_an_output_along_the_rank_adds_a_pass():
    c = parse_cascade(COLUMN_SCORE)
    plan = Plan(c, (kernel("p", [stage(c, 0, "M", "D", "O")], ["M", "D", "O"]), kernel("m", [stage(c, 0, "C")], ["C"], ["M", "D"])))
    assert (plan_passes(plan, "p"), plan_passes(plan, "m")) == (2, 1)
    reads = dict(plan_reads(plan, "p"))
    assert [r.number for r in reads["K"]] == [1, 2]
    assert [r.number for r in reads["V"]] == [1]


def test_gather_in_a_plan_stays_partial():
    c = parse_cascade(SELECT)
    plan = Plan(
        c,
        (
            kernel("p", [stage(c, 0, "M", "D")], ["M", "D"]),
            kernel("w", [stage(c, 0, "C")], ["C"]),
            kernel(None, [], ["T", "I"]),
            kernel(None, [], ["G", "H"]),
        ),
    )
    assert plan_passes(plan, "p") == 3  # statistics, score, gather
    assert [r.partial for r in dict(plan_reads(plan, "p"))["K"]] == [False, False, True]


# a simulation of reading ---------------------------------------------------------------------------------------------------
#
# The rank has three elements, visited in order, pass after pass; a time is (pass, element). What depends on an element of the input
# under study is at hand only while that element is visited, in this pass or a later one; a number stays from the moment it is
# complete, and so does what depends on numbers and the other input alone.

EXTENT = 3
NEVER_WAITS = (0, 0)


def simulate(c: Cascade, root: str) -> int:
    """The passes over `root` that reading in order takes, worked out element by element."""
    visit: dict[str, list[int]] = {root: [1] * EXTENT}  # the first pass in which each element is at hand
    ready: dict[str, list[tuple[int, int]]] = {}  # for the others: when each element, or the number, is complete
    worst = 1

    def element(names: list[str], r: int) -> int:
        number = max(visit[n][r] for n in names if n in visit)
        waits = max((ready[n][r if len(ready[n]) > 1 else 0] for n in names if n in ready), default=NEVER_WAITS)
        return next(k for k in range(number, 99) if (k, r) > waits)

    for s in c.body:
        operands = list(reads_in(s.expr))
        names = [node.tensor for node in operands]
        if any(isinstance(x, Op) for node in operands for x in node.coords):  # the final coordinate of a scan
            source = names[0]
            ready[s.out] = [(visit[source][-1], EXTENT - 1)] if source in visit else [ready.get(source, [NEVER_WAITS])[-1]]
        elif any(n in visit for n in names):
            found = [element(names, r) for r in range(EXTENT)]
            if isinstance(s, Scan):  # each value needs those before it
                found = [max(found[: r + 1]) for r in range(EXTENT)]
            worst = max(worst, *found)
            if s.ranks:
                visit[s.out] = found
            else:
                ready[s.out] = [max((number, r) for r, number in enumerate(found))]
        else:
            complete = max((t for n in names for t in ready.get(n, ())), default=NEVER_WAITS)
            ready[s.out] = [complete] * (EXTENT if s.ranks else 1)
    return worst


def reads_in(e):
    if isinstance(e, Read):
        yield e
    for part in getattr(e, "args", ()):
        yield from reads_in(part)


@st.composite
def random_cascades(draw):
    """Maps, sums, maxima, scans and final coordinates over one rank p of three elements."""
    inputs = ("A", "B")
    vectors, scans, numbers, body = list(inputs), [], [], []
    for i in range(draw(st.integers(1, 9))):
        name = f"T{i}"
        kind = draw(st.sampled_from(["map", "map", "sum", "max", "scan", "last", "number"]))
        if kind in ("last", "number") and not (numbers if kind == "number" else scans):
            kind = "sum"
        picked = [aligned(v, "p") for v in draw(st.lists(st.sampled_from(vectors), min_size=1, max_size=2))]
        if numbers and draw(st.booleans()):
            picked.append(Read(draw(st.sampled_from(numbers)), ()))
        e = picked[0]
        for other in picked[1:]:
            e = Op("add", (e, other))
        match kind:
            case "map":
                body.append(Einsum(name, ("p",), e))
                vectors.append(name)
            case "scan":
                body.append(Scan(name, ("p",), e, "sum", "p"))
                vectors.append(name)
                scans.append(name)
            case "last":
                source = draw(st.sampled_from(scans))
                body.append(Einsum(name, (), Read(source, (Op("sub", (Extent("p"), Const(1))),))))
                numbers.append(name)
            case "number":
                body.append(Einsum(name, (), Op("exp", (Read(draw(st.sampled_from(numbers)), ()),))))
                numbers.append(name)
            case _:
                body.append(Einsum(name, (), e, kind, ("p",)))
                numbers.append(name)
    last = body[-1]
    result = Output(last.out, tuple((r,) for r in last.ranks))
    return Cascade("c", tuple(Tensor(n, (("p",),), f32) for n in inputs), (), (), tuple(body), (result,))


@settings(max_examples=300, deadline=None)
@given(random_cascades())
def test_counts_agree_with_reading_element_by_element(c):
    reads = dict(pass_report(c).of("p").inputs)
    used = {node.tensor for s in c.body for node in reads_in(s.expr)}
    for name in ("A", "B"):
        if name in used:
            assert max(r.number for r in reads[name]) == simulate(c, name), str(c)
