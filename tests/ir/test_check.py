"""The tables of what is legal: every rule refuses what breaks it, with a message that says what and where, and nothing else."""

from __future__ import annotations

import cascades
import einfall as ef
import pytest
from einfall.compiler.trace import trace
from einfall.ir.cascade import Cascade, Einsum, Output, Populate, Scan, Tensor
from einfall.ir.check import CASCADE_CHECKS, PROGRAM_CHECKS, check_cascade, check_program
from einfall.ir.expr import Const, Index, Masked, Op, Read, Scalar, Tile
from einfall.ir.text import parse_cascade, parse_program, print_cascade
from einfall.ir.types import f32
from hypothesis import given, settings
from strategies import cascades as random_cascades

HEADER = "cascade f(X[b,p]: f32, Y[p,e]: bf16, I[b]: i32, K[b,p]: bool, t: f32) -> O[b]\n"
OK = "  O[b] = sum(p) X[b,p]\n"

ILLEGAL = {
    "check_names": {
        "defined_twice": HEADER + OK + OK,
        "called_like_an_input": HEADER + "  X[b] = sum(p) X[b,p]\n" + OK,
        "called_like_a_scalar": HEADER + "  t[b] = sum(p) X[b,p]\n" + OK,
        "state_called_like_a_tensor": HEADER + "  A[b] = X[b,0]\n  iterate p\n    A[b] = 0.0 then A[b] + X[b,p]\n" + OK,
        "dotted": HEADER + "  a.b[b] = sum(p) X[b,p]\n" + OK,
        "literal": "cascade f(X[b,inf]: f32) -> O[b]\n  O[b] = sum(inf) X[b,0]\n",
        "rank_and_scalar": "cascade f(X[b,p]: f32, p: f32) -> O[b]\n" + OK,
        "cascade_name": "cascade f.g(X[b,p]: f32) -> O[b]\n" + OK,
    },
    "check_axes": {
        "input_rank_twice": "cascade f(X[b,b]: f32) -> O[b]\n  O[b] = X[b,b]\n",
        "result_rank_twice": HEADER + "  A[b,b] = X[b,0]\n" + OK,
        "output_rank_twice": "cascade f(X[b,p]: f32) -> O[b,b]\n" + OK,
    },
    "check_reads": {
        "unknown_tensor": HEADER + "  O[b] = sum(p) Z[b,p]\n",
        "nearly_a_tensor": HEADER + "  Sum[b] = sum(p) X[b,p]\n  O[b] = Sun[b]\n",
        "before_its_definition": HEADER + "  O[b] = A[b]\n  A[b] = X[b,0]\n",
        "outside_of_its_block": HEADER + "  iterate p\n    S[b] = 0.0 then S[b] + A[b]\n    A[b] = exp(X[b,p])\n  O[b] = A[b]\n",
        "in_its_own_first_value": HEADER + "  iterate p\n    S[b] = S[b] then S[b] + X[b,p]\n  O[b] = S[b]\n",
        "too_few_coordinates": HEADER + "  O[b] = X[b]\n",
        "tile_nodes": HEADER + "  O[b] = masked(X[b,0], 0.0)\n",
    },
    "check_ranks": {
        "left_over": HEADER + "  O[b] = X[b,p]\n",
        "left_over_by_a_condition": HEADER + "  O[b] = sum(p where p < e) X[b,p]\n",
        "reduced_rank_absent": HEADER + "  O[b] = sum(e) X[b,0]\n",
        "reduced_rank_kept": HEADER + "  O[b] = sum(b) X[b,0]\n",
        "scan_rank_dropped": HEADER + "  O[b] = cumsum(p) X[b,p]\n",
        "populate_rank_absent": HEADER + "  V[b,s], J[b,s] = topk(e -> s, 3) X[b,p]\n" + OK,
        "populate_rank_kept": HEADER + "  V[b,p,s], J[b,p,s] = topk(p -> s, 3) X[b,p]\n" + OK,
        "populate_into_an_old_rank": HEADER + "  V[b], J[b] = topk(p -> b, 3) X[b,p]\n" + OK,
        "populate_without_parameter": HEADER + "  V[b,s], J[b,s] = threshold(p -> s) X[b,p]\n" + OK,
        "sort_with_parameter": HEADER + "  V[b,s], J[b,s] = sort(p -> s, 3) X[b,p]\n" + OK,
        "scatter_at_no_rank": HEADER + "  A[b] = scatter(p at c = I[b]) X[b,p]\n" + OK,
        "scatter_at_an_old_rank": HEADER + "  A[b,e] = scatter(p at b = I[b]) X[b,p]\n" + OK,
        "concat_rank_lacking": HEADER + "  rank q = p + e\n  A[b] = concat(q) X[b,p]; 0.0\n" + OK,
        "concat_over_itself": HEADER + "  A[b,p] = concat(p: e, b) Y[p,e]; X[b,p]\n" + OK,
        "state_over_its_step": HEADER + "  iterate p\n    S[b,p] = 0.0 then X[b,p]\n" + OK,
        "state_left_over": HEADER + "  iterate e\n    S[b] = 0.0 then S[b] + X[b,p]\n" + OK,
        "stop_varies": HEADER + "  iterate p\n    S[b] = 0.0 then S[b] + X[b,p]\n    until S[b] > 1.0\n" + OK,
        "step_in_a_result": HEADER + "  iterate p\n    S[b] = 0.0 then S[b] + A[b,p]\n    A[b,p] = X[b,p]\n" + OK,
        "block_in_a_block": HEADER + "  iterate p\n    S[b] = 0.0 then R[b]\n    iterate p\n      R[b] = 0.0 then S[b]\n" + OK,
    },
    "check_sizes": {
        "unsized": HEADER + "  O[b] = sum(w) X[b,w+1]\n",
        "nearly_sized": "cascade f(X[head,p]: f32) -> O[head]\n  O[head] = sum(p) X[head,p] * extent(heat)\n",
        "declared_twice": HEADER + "  rank w = 3\n  rank w = 4\n" + OK,
        "fraction": HEADER + "  rank w = 3.5\n" + OK,
        "nothing": HEADER + "  rank w = 0\n" + OK,
        "no_size": HEADER + "  rank w = exp(p)\n" + OK,
        "two_unknown": HEADER + "  rank p = n * j\n" + OK,
        "unsized_step": HEADER + "  iterate w\n    S[b] = 0.0 then S[b] + 1.0\n" + OK,
    },
    "check_concatenations": {
        "other_pieces": HEADER + "  rank q = p + b\n  A[q] = concat(q: b, e) 0.0; 1.0\n" + OK,
        "topk_of_another_size": HEADER + "  rank s = 4\n  V[b,s], J[b,s] = topk(p -> s, 3) X[b,p]\n" + OK,
    },
    "check_types": {
        "integer_division": HEADER + "  O[b] = I[b] / I[b]\n",
        "integer_division_in_a_part": HEADER + "  rank q = b + p\n  A[q] = concat(q) 1.0; p / p\n" + OK,
        "integer_division_in_a_condition": HEADER + "  O[b] = sum(p where p / p > 1) X[b,p]\n",
        "bits_of_floats": HEADER + "  O[b] = X[b,0] & 1\n",
        "condition_of_floats": HEADER + "  O[b] = sum(p where X[b,p]) X[b,p]\n",
        "select_by_integers": HEADER + "  O[b] = where(I[b], 1.0, 0.0)\n",
        "coordinate_of_floats": HEADER + "  O[b] = X[b,t * 2.0]\n",
        "scatter_by_floats": HEADER + "  rank c = 4\n  A[c] = scatter(b,p at c = X[b,p]) 1.0\n" + OK,
        "bits_of_another_size": HEADER + "  O[b] = bits(X[b,0], i16)\n",
        "any_of_floats": HEADER + "  A[b] = any(p) X[b,p]\n" + OK,
        "maximum_of_bools": HEADER + "  A[b] = max(p) K[b,p]\n" + OK,
        "minus_a_bool": HEADER + "  A[b,p] = -K[b,p]\n" + OK,
        "fraction_of_topk": HEADER + "  rank s = 3\n  V[b,s], J[b,s] = topk(p -> s, t) X[b,p]\n" + OK,
        "fill_of_another_kind": HEADER + "  A[b] = I[b-1 else 0.5]\n" + OK,
        "state_changes_kind": HEADER + "  iterate p\n    S[b] = 0 then S[b] + X[b,p]\n" + OK,
        "stop_by_a_float": HEADER + "  iterate p\n    S[] = 0.0 then S[] + 1.0\n    until S[]\n" + OK,
        "bit_count_of_floats": HEADER + "  O[b] = popcount(X[b,0])\n",
    },
    "check_outputs": {
        "undefined": "cascade f(X[b,p]: f32) -> Z[b]\n" + OK,
        "an_input": "cascade f(X[b,p]: f32) -> X[b,p]\n" + OK,
        "other_ranks": "cascade f(X[b,p]: f32) -> O[p]\n" + OK,
        "twice": "cascade f(X[b,p]: f32) -> O[b], O[b]\n" + OK,
        "inside_a_block": "cascade f(X[b,p]: f32) -> A[b]\n  iterate p\n    O[b] = 0.0 then A[b]\n    A[b] = X[b,p]\n",
    },
}
PAIRS = [(rule, case) for rule, cases in ILLEGAL.items() for case in cases]


def first_broken(checks, subject):
    for check in checks:
        try:
            if list(check(subject)):
                return check.__name__
        except ef.CascadeError:  # raised by the inference of types
            return check.__name__
    return None


@pytest.mark.parametrize(("rule", "case"), PAIRS, ids=[f"{rule}-{case}" for rule, case in PAIRS])
def test_what_is_illegal_is_refused_by_its_rule(rule, case, golden):
    cascade = parse_cascade(ILLEGAL[rule][case], "f.cascade")
    with pytest.raises(ef.CascadeError) as caught:
        check_cascade(cascade)
    golden(f"{rule.removeprefix('check_')}_{case}", str(caught.value))
    assert first_broken(CASCADE_CHECKS, cascade) == rule


def test_every_rule_is_broken_by_some_case_and_explains_itself():
    assert set(ILLEGAL) == {check.__name__ for check in CASCADE_CHECKS}
    assert set(ILLEGAL_PROGRAMS) == {check.__name__ for check in PROGRAM_CHECKS}
    assert all(check.__doc__ for check in (*CASCADE_CHECKS, *PROGRAM_CHECKS))


# What no text can say, and a pass might build by mistake.
READ = Read("X", (Index("b"), Index("p")))
BUILT = {
    "no_reduction": Einsum("O", ("b",), READ, "median", ("p",)),
    "reduction_over_nothing": Einsum("O", ("b",), READ, "sum", ()),
    "reduction_over_a_rank_twice": Einsum("O", ("b",), READ, "sum", ("p", "p")),
    "no_scan": Scan("O", ("b", "p"), READ, "any", "p"),
    "no_rule": Populate("O", "J", ("b", "s"), READ, "bottomk", "p", "s", Const(3)),
    "no_operation": Einsum("O", ("b", "p"), Op("gelu", (READ,))),
    "operands_missing": Einsum("O", ("b", "p"), Op("add", (READ,))),
    "unknown_scalar": Einsum("O", ("b", "p"), Op("add", (READ, Scalar("u")))),
    "tile": Einsum("O", ("b", "p"), Tile("s")),
    "masked": Einsum("O", ("b", "p"), Masked(READ, Const(0.0))),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_no_text_can_say_is_refused_too(name, golden):
    output = Output("O", tuple((rank,) for rank in BUILT[name].ranks))
    cascade = Cascade("f", (Tensor("X", (("b",), ("p",)), f32),), (), (), (BUILT[name],), (output,))
    with pytest.raises(ef.CascadeError) as caught:
        check_cascade(cascade)
    golden(f"built_{name}", str(caught.value))


BLOCK = "  iterate p\n    S[b] = 0.0 then S[b] + X[b,p]\n    n[] = 0 then n[] + 1\n    until n[] > 3\n"
LEGAL = {
    "a result rank of no operand broadcasts": HEADER + "  A[b,e] = sum(p) X[b,p]\n" + OK,
    "a condition adds ranks": HEADER + "  A[b,e] = sum(p where p < e) X[b,p]\n" + OK,
    "a reduction counts points of its condition alone": HEADER + "  A[b] = sum(p where X[b,p] > 0.0) 1\n" + OK,
    "a product tells its unknown factor": HEADER + "  rank j = 4\n  rank p = n * j\n  A[b,n] = max(j) X[b,n*extent(j)+j]\n" + OK,
    "a read renames": HEADER + "  A[b,q] = X[b,q]\n" + OK,
    "a top-k rank is sized by k": HEADER + "  V[b,s], J[b,s] = topk(p -> s, 3) X[b,p]\n" + OK,
    "a sorted rank is sized by what is sorted": HEADER + "  V[b,s], J[b,s] = sort(p -> s) X[b,p]\n" + OK,
    "pieces size a concatenation": HEADER + "  A[q] = concat(q: p, e) Y[p,0]; Y[0,e]\n" + OK,
    "a step reads at its index": HEADER + BLOCK + OK,
    "a scatter may keep the rank it drops": HEADER + "  A[p] = scatter(b,p at p = I[b]) X[b,p]\n" + OK,
    "an integer fill fits a float": HEADER + "  A[b,p] = X[b,p-1 else 0]\n" + OK,
    "a map may have a condition": HEADER + "  A[b,p] = X[b,p] where p < I[b]\n" + OK,
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_passes(name):
    check_cascade(parse_cascade(LEGAL[name]))


@pytest.mark.parametrize("case", cascades.CASES, ids=lambda case: case.name)
def test_cascades_of_the_test_suite_are_legal(case):
    check_cascade(parse_cascade(print_cascade(trace(case.function))))


@settings(max_examples=30)
@given(random_cascades())
def test_random_legal_cascades_pass(drawn):
    check_cascade(drawn.cascade if hasattr(drawn, "cascade") else drawn[0])


# --- tile programs -------------------------------------------------------------------------------------------------------------------

KERNEL = "kernel k(X[b,p,e]: f32, I[b]: i32, t: f32) -> O[b,e]: f32\n  rank e = 8\n"
GRID = "  grid b\n  resident e\n"
STORE = "  store O[b,e] = s\n"
SUM = """\
  for p step 16 where p <= I[b]
    bounds 0, 0, I[b] + 1, I[b] + 1
    state acc[e] = 0.0 then next
    part[e] = sum(p) masked(X[b,p,e], 0.0)
    next[e] = acc + part
"""
LOOP = "  for p step 16\n    bounds 0, 0, extent(p), extent(p)\n    state acc[e] = 0.0 then next\n"

ILLEGAL_PROGRAMS = {
    "check_kernel_names": {
        "tile_twice": KERNEL + GRID + "  s[e] = 0.0\n  s[e] = 1.0\n" + STORE,
        "state_and_tile": KERNEL + GRID + LOOP + "    acc[e] = 1.0\n    next[e] = acc\n  s[e] = acc\n" + STORE,
        "tensor_twice": KERNEL.replace("I[b]: i32", "X[b]: i32") + GRID + "  s[e] = 0.0\n" + STORE,
        "tile_and_scalar": KERNEL + GRID + "  t[e] = 0.0\n  s[e] = 0.0\n" + STORE,
        "rank_and_scalar": KERNEL.replace("t: f32", "p: f32") + GRID + "  s[e] = 0.0\n" + STORE,
    },
    "check_tiling": {
        "grid_twice": KERNEL + "  grid b, b/4\n  resident e\n  s[e] = 0.0\n" + STORE,
        "grid_tile_of_nothing": KERNEL + "  grid b/0\n  resident e\n  s[e] = 0.0\n" + STORE,
        "resident_and_grid": KERNEL + "  grid b, e\n  resident e\n  s[e] = 0.0\n" + STORE,
        "resident_of_unknown_size": KERNEL + "  grid b\n  resident e, p\n  s[e] = 0.0\n" + STORE,
        "loop_over_the_grid": KERNEL + GRID + LOOP.replace("for p", "for b") + "    next[e] = acc\n  s[e] = acc\n" + STORE,
        "step_of_nothing": KERNEL + GRID + LOOP.replace("step 16", "step 0") + "    next[e] = acc\n  s[e] = acc\n" + STORE,
    },
    "check_definitions": {
        "undefined": KERNEL + GRID + "  s[e] = u + 1.0\n" + STORE,
        "before_its_definition": KERNEL + GRID + "  s[e] = u\n  u[e] = 0.0\n" + STORE,
        "outside_of_its_loop": KERNEL + GRID + SUM + "  s[e] = part\n" + STORE,
        "first_value_from_the_body": KERNEL + GRID + LOOP.replace("= 0.0", "= next") + "    next[e] = acc\n  s[e] = acc\n" + STORE,
        "coordinates_missing": KERNEL + GRID + "  s[e] = X[b,e]\n" + STORE,
    },
    "check_read_back": {"output_read": KERNEL + GRID + "  s[e] = O[b,e]\n" + STORE},
    "check_tile_ranks": {
        "rank_without_tile": KERNEL + GRID + "  s[e,p] = 0.0\n" + STORE,
        "rank_of_a_single_grid_tile": KERNEL + GRID + "  s[b,e] = 0.0\n" + STORE,
        "streamed_rank_outside": KERNEL + GRID + SUM + "  s[e] = sum(p) X[b,p,e]\n" + STORE,
        "varies_over_more": KERNEL + GRID + SUM + "  s[] = acc\n" + STORE,
        "state_varies_over_more": KERNEL + GRID + LOOP + "    next[e,p] = acc + X[b,p,e]\n  s[e] = acc\n" + STORE,
        "start_along_the_scan": KERNEL + GRID + "  s[e] = cumsum(e) X[b,0,e] from X[b,1,e]\n" + STORE,
        "bound_varies": KERNEL + GRID + LOOP.replace("0, 0,", "e, 0,") + "    next[e] = acc\n  s[e] = acc\n" + STORE,
        "rank_twice": KERNEL + GRID + "  s[e,e] = 0.0\n" + STORE,
    },
    "check_tile_expressions": {
        "masked_outside": KERNEL + GRID + "  s[e] = masked(X[b,0,e], 0.0)\n" + STORE,
        "count_outside": KERNEL + GRID + "  s[e] = count(p)\n" + STORE,
        "start_of_a_resident_rank": KERNEL + GRID + "  s[e] = start(e)\n" + STORE,
        "scan_of_another_rank": KERNEL + GRID + SUM.replace("part[e] = sum(p)", "part[e] = cumsum(p)") + "  s[e] = acc\n" + STORE,
        "dot_over_nothing": KERNEL + GRID + "  s[e] = dot() X[b,0,e], X[b,1,e]\n" + STORE,
    },
    "check_tile_types": {
        "integer_division": KERNEL + GRID + "  s[e] = I[b] / e\n" + STORE,
        "condition_of_floats": KERNEL + GRID + SUM.replace("p <= I[b]", "X[b,p,0]") + "  s[e] = acc\n" + STORE,
        "select_by_floats": KERNEL + GRID + "  s[e] = where(t, 1.0, 0.0)\n" + STORE,
    },
    "check_stores": {
        "never": KERNEL + GRID + "  s[e] = 0.0\n",
        "no_output": KERNEL + GRID + "  s[e] = 0.0\n  store Q[b,e] = s\n" + STORE,
        "coordinates_missing": KERNEL + GRID + "  s[e] = 0.0\n  store O[e] = s\n",
    },
}
PROGRAM_PAIRS = [(rule, case) for rule, cases in ILLEGAL_PROGRAMS.items() for case in cases]


@pytest.mark.parametrize(("rule", "case"), PROGRAM_PAIRS, ids=[f"{rule}-{case}" for rule, case in PROGRAM_PAIRS])
def test_what_is_illegal_in_a_program_is_refused_by_its_rule(rule, case, golden):
    program = parse_program(ILLEGAL_PROGRAMS[rule][case], "k.kernel")
    with pytest.raises(ef.CascadeError) as caught:
        check_program(program)
    golden(f"program_{rule.removeprefix('check_')}_{case}", str(caught.value))
    assert first_broken(PROGRAM_CHECKS, program) == rule


def test_a_legal_program_passes():
    check_program(parse_program(KERNEL + GRID + SUM + "  s[e] = acc * t\n" + STORE))
    nested = KERNEL + "  grid b\n" + (
        "  for e step 4\n    bounds 0, 0, extent(e), extent(e)\n"
        "    for p step 8\n      bounds start(b), start(e), extent(p), seen(e)\n      state acc[e] = 0.0 then next\n"
        "      part[e] = sum(p) masked(X[b,p,e] * count(p), 0.0)\n      next[e] = acc + part\n"
        "    store O[b,e] = acc\n"
    )
    check_program(parse_program(nested))
