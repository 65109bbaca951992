"""The text of both levels: what is printed is parsed back to the same nodes, and what is malformed is refused with its place."""

from __future__ import annotations

import math
import string
import subprocess
import sys

import einfall as ef
import pytest
from einfall.ir.cascade import (
    Cascade,
    Concat,
    Einsum,
    Iterate,
    IterState,
    Output,
    Populate,
    RankDecl,
    ScalarDecl,
    Scan,
    Scatter,
    Tensor,
    defined,
)
from einfall.ir.expr import (
    OPS,
    REDUCTIONS,
    SCANS,
    Bitcast,
    Cast,
    Const,
    Count,
    Extent,
    Index,
    Masked,
    Op,
    Read,
    Scalar,
    Seen,
    Start,
    Tile,
)
from einfall.ir.text import parse_cascade, parse_program, print_cascade, print_expr, print_program, print_statement
from einfall.ir.tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Reduce, Store, TileOutput, TileProgram
from einfall.ir.tile import Scan as TileScan
from einfall.ir.types import DTYPES, bf16, f32, i32
from hypothesis import given
from hypothesis import strategies as st

# Names that are words of the language somewhere else, so that nothing depends on their not being used as names.
RANKS = ("b", "m", "p", "e", "sum", "where", "at", "then", "exclusive", "rank", "step", "rang_é", "f32")
TENSORS = ("X", "Y", "max", "cumsum", "topk", "iterate", "until", "rank", "where", "bits", "as", "update", "store", "grid", "for", "x_1")
TILES = ("s", "mx", "m.old", "O.0", "update", "post", "dot", "state", "b", "p")
SCALARS = ("scale", "t", "masked")

ranks = st.sampled_from(RANKS)
dtypes = st.sampled_from(tuple(DTYPES.values()))
consts = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-300])
).map(Const)
extra_names = st.text(string.ascii_letters, min_size=1, max_size=3).map("n_".__add__)


def operations(inner):
    return st.sampled_from(tuple(OPS)).flatmap(lambda name: st.tuples(*[inner] * OPS[name].arity).map(lambda args: Op(name, args)))


def expressions(*, tiles: bool):
    leaves = [consts, ranks.map(Index), ranks.map(Extent), st.sampled_from(SCALARS).map(Scalar)]
    if tiles:
        leaves += [st.sampled_from(TILES).map(Tile), ranks.map(Start), ranks.map(Count), ranks.map(Seen)]

    def grow(inner):
        read = st.builds(Read, st.sampled_from(TENSORS), st.lists(inner, max_size=3).map(tuple), st.none() | consts)
        kinds = [operations(inner), read, st.builds(Cast, inner, dtypes), st.builds(Bitcast, inner, dtypes)]
        if tiles:
            kinds.append(st.builds(Masked, inner, consts))
        return st.one_of(kinds)

    return st.recursive(st.one_of(leaves), grow, max_leaves=12)


rank_lists = st.lists(ranks, max_size=4, unique=True).map(tuple)
some_ranks = st.lists(ranks, min_size=1, max_size=3, unique=True).map(tuple)
names = st.sampled_from(TENSORS) | extra_names
exprs = expressions(tiles=False)
conditions = st.none() | exprs
einsums = st.builds(Einsum, names, rank_lists, exprs, where=conditions)
reductions = st.builds(Einsum, names, rank_lists, exprs, st.sampled_from(tuple(REDUCTIONS)), some_ranks, conditions)
scans = st.builds(Scan, names, rank_lists, exprs, st.sampled_from(SCANS), ranks, st.booleans(), conditions)
rules = st.sampled_from(("topk", "sort", "threshold", "mass"))
populates = st.builds(Populate, names, names, rank_lists, exprs, rules, ranks, ranks, conditions, conditions)
scatters = st.builds(
    Scatter, names, rank_lists, exprs, some_ranks, st.lists(st.tuples(ranks, exprs), min_size=1, max_size=2).map(tuple), conditions
)
concats = st.builds(Concat, names, rank_lists, ranks, st.lists(st.tuples(ranks, exprs), min_size=1, max_size=3).map(tuple))
flat = st.one_of(einsums, reductions, scans, populates, scatters, concats)
states = st.builds(IterState, names, rank_lists, exprs, exprs)


def blocks(inner):
    return st.builds(
        Iterate, ranks, st.lists(states, min_size=1, max_size=2).map(tuple), st.lists(inner, max_size=3).map(tuple), st.none() | exprs
    )


statements = st.recursive(flat, blocks, max_leaves=4)
axes = st.lists(st.lists(ranks, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
sizes = st.recursive(
    st.integers(1, 99).map(Const) | ranks.map(Extent),
    lambda inner: st.builds(lambda op, a, b: Op(op, (a, b)), st.sampled_from(("add", "mul", "sub", "floordiv")), inner, inner),
    max_leaves=4,
)
rank_lines = st.lists(st.builds(RankDecl, ranks, sizes), max_size=3).map(tuple)
scalars = st.just(tuple(ScalarDecl(s, f32) for s in SCALARS))
cascades = st.builds(
    Cascade,
    names,
    st.lists(st.builds(Tensor, names, axes, dtypes), max_size=3).map(tuple),
    scalars,
    rank_lines,
    st.lists(statements, max_size=5).map(tuple),
    st.lists(st.builds(Output, names, axes), min_size=1, max_size=2).map(tuple),
)

tile_exprs = expressions(tiles=True)
optional_expr = st.none() | tile_exprs
tiles = st.sampled_from(TILES)
notes = st.text(string.ascii_letters + string.digits + " #()[]'=", max_size=12).map(str.strip)
maps = st.builds(Map, tiles, rank_lists, tile_exprs, dtypes, notes)
reduces = st.builds(Reduce, tiles, rank_lists, st.sampled_from(tuple(REDUCTIONS)), some_ranks, tile_exprs, dtypes, notes)
running = st.builds(
    TileScan, tiles, rank_lists, st.sampled_from(SCANS), ranks, tile_exprs, optional_expr, st.booleans(), dtypes, notes
)
dots = st.builds(Dot, tiles, rank_lists, some_ranks, tile_exprs, tile_exprs, optional_expr, optional_expr, dtypes, notes)
stores = st.builds(Store, names, st.lists(tile_exprs, max_size=3).map(tuple), tile_exprs, notes)
carried = st.builds(LoopState, tiles, rank_lists, tile_exprs, tile_exprs, dtypes)
bounds = st.builds(Bounds, tile_exprs, tile_exprs, tile_exprs, tile_exprs)


def loops(inner):
    return st.builds(
        Loop,
        ranks,
        st.integers(1, 512),
        st.lists(tile_exprs, max_size=2).map(tuple),
        bounds,
        st.lists(carried, max_size=2).map(tuple),
        st.lists(inner, max_size=3).map(tuple),
    )


nodes = st.recursive(st.one_of(maps, reduces, running, dots, stores), loops, max_leaves=4)
programs = st.builds(
    TileProgram,
    names,
    st.lists(st.builds(Tensor, names, axes, dtypes), max_size=2).map(tuple),
    st.lists(st.builds(TileOutput, st.builds(Output, names, axes), dtypes), min_size=1, max_size=2).map(tuple),
    scalars,
    rank_lines,
    st.lists(st.builds(GridRank, ranks, st.integers(1, 256)), max_size=2).map(tuple),
    st.lists(ranks, max_size=2).map(tuple),
    st.lists(nodes, max_size=4).map(tuple),
)


# --- round trips ---------------------------------------------------------------------------------------------------------------------


@given(cascades)
def test_cascades_survive_print_and_parse(cascade):
    text = print_cascade(cascade)
    parsed = parse_cascade(text)
    assert parsed == cascade
    assert print_cascade(parsed) == text


@given(programs)
def test_programs_survive_print_and_parse(program):
    text = print_program(program)
    parsed = parse_program(text)
    assert parsed == program
    assert print_program(parsed) == text


def wrap(e):
    scalars = tuple(ScalarDecl(s, f32) for s in SCALARS)
    return Cascade("c", (), scalars, (), (Einsum("O", ("b",), e),), (Output("O", (("b",),)),))


@given(exprs)
def test_brackets_are_needed(e):
    """Leaving out any one pair of brackets that groups changes the meaning or is no text at all: there are no more than needed."""
    text = print_expr(e)
    for start, end in grouping(text):
        without = text[:start] + text[start + 1 : end] + text[end + 1 :]
        try:
            parsed = parse_cascade(print_cascade(wrap(Const(0))).replace("= 0\n", f"= {without}\n"))
        except ef.CascadeError:
            continue
        assert parsed != wrap(e), text


def grouping(text):
    """The brackets that follow no name."""
    stack = []
    for i, char in enumerate(text):
        if char == "(":
            stack.append(i)
        elif char == ")":
            start = stack.pop()
            if start == 0 or not (text[start - 1].isalnum() or text[start - 1] == "_"):
                yield start, i


a, b, c = Index("a"), Index("b"), Index("c")


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (Op("add", (Op("add", (a, b)), c)), "a + b + c"),
        (Op("add", (a, Op("add", (b, c)))), "a + (b + c)"),
        (Op("mul", (Op("add", (a, b)), c)), "(a + b) * c"),
        (Op("sub", (a, Op("neg", (b,)))), "a - -b"),
        (Op("neg", (Op("pow", (a, Const(2))),)), "-a**2"),
        (Op("pow", (Op("neg", (a,)), Const(2))), "(-a)**2"),
        (Op("pow", (Const(-2), a)), "(-2)**a"),
        (Op("pow", (a, Const(-2))), "a**-2"),
        (Op("pow", (a, Op("pow", (b, c)))), "a**b**c"),
        (Op("pow", (Op("pow", (a, b)), c)), "(a**b)**c"),
        (Op("neg", (Const(2),)), "-(2)"),
        (Op("neg", (Const(-2),)), "--2"),
        (Op("and", (Op("le", (a, b)), Op("lt", (b, c)))), "a <= b & b < c"),
        (Op("eq", (Op("and", (a, b)), c)), "(a & b) == c"),
        (Op("shr", (a, Op("add", (b, c)))), "a >> b + c"),
        (Op("not", (Op("or", (a, b)),)), "~(a | b)"),
        (Read("X", (Op("sub", (a, Const(1))), b), Const(0.0)), "X[a-1,b else 0.0]"),
        (Read("X", (Read("I", (a, Op("mod", (Op("add", (b, c)), Const(3)))), None),), None), "X[I[a,(b+c)%3]]"),
        (Read("L", (), None), "L[]"),
        (Cast(Bitcast(a, i32), bf16), "bf16(bits(a, i32))"),
        (Op("where", (Const(True), Const(math.inf), Const(-math.inf))), "where(true, inf, -inf)"),
        (Op("minimum", (Extent("p"), Const(1e-05))), "minimum(extent(p), 1e-05)"),
    ],
)
def test_spelling(e, text):
    assert print_expr(e) == text
    assert parse_cascade(f"cascade c() -> O[]\n  O[] = {text}\n").body[0].expr == e


def test_a_bare_name_means_what_the_header_says():
    body = parse_cascade("cascade f(X[p]: f32, t: f32) -> O[p]\n  rank q = p * 2\n  O[p] = X[p] * t + p\n")
    (statement,) = body.body
    assert statement.expr == Op("add", (Op("mul", (Read("X", (Index("p"),)), Scalar("t"))), Index("p")))
    assert body.ranks == (RankDecl("q", Op("mul", (Extent("p"), Const(2)))),)


def test_bare_names_in_a_program():
    text = "kernel k(X[p]: f32, t: f32) -> O[p]: f32\n  grid p/4\n  s[p]       = X[p] * t + p\n  store O[p] = s\n"
    program = parse_program(text)
    assert print_program(program) == text
    assert program.body[0].expr == Op("add", (Op("mul", (Read("X", (Index("p"),)), Scalar("t"))), Index("p")))
    assert program.body[1].expr == Tile("s")


def test_statements_alone():
    text = "cascade f(X[b,p]: f32) -> O[b]\n  iterate p\n    O[b] = 0.0 then O[b] + X[b,p]\n    until O[b] > 1.0\n"
    (block,) = parse_cascade(text).body
    assert print_statement(block) == "iterate p\n  O[b] = 0.0 then O[b] + X[b,p]\n  until O[b] > 1.0"


def test_the_pieces_of_a_concatenation_come_from_its_declaration():
    text = "cascade f(A[s]: f32, B[t]: f32) -> X[p]\n  rank p = s + t\n  X[p] = concat(p) A[s]; B[t]\n"
    cascade = parse_cascade(text)
    assert cascade.body[0].parts == (("s", Read("A", (Index("s"),))), ("t", Read("B", (Index("t"),))))
    assert print_cascade(cascade) == text
    long = parse_cascade(text.replace("  rank p = s + t\n", "").replace("concat(p)", "concat(p: s, t)"))
    assert long.body == cascade.body
    assert "concat(p: s, t)" in print_cascade(long)


def test_layout_is_free():
    """Comments, blank lines, lines within brackets, tabs, carriage returns and a margin change nothing."""
    plain = parse_cascade("cascade f(X[b,p]: f32) -> O[b]\n  rank p = 4\n  M[b] = max(p) X[b,p]\n  O[b] = sum(p) exp(X[b,p] - M[b])\n")
    text = """
        # what it is for
        cascade f(X[b,p]:    # an input
                  f32) -> O[b]  # the result

          rank p = 4
        # a comment at the margin
          M[b] = max(p) X[ b , p ]   # the maximum

          O[b] = sum(p) exp(
            X[b,p]
            - M[b])
    """
    assert parse_cascade(text) == plain
    assert parse_cascade(print_cascade(plain).replace("\n", "\r\n")) == plain
    assert parse_cascade(print_cascade(plain).replace("  ", "\t")) == plain


def test_statements_know_their_place():
    text = "\n    cascade f(X[b,p]: f32) -> O[b]\n      M[b] = max(p) X[b,p]\n\n      O[b] = exp(M[b])\n"
    first, second = (s.location for s in parse_cascade(text, "a.cascade").body)
    assert (first.file, first.line, first.column, first.text) == ("a.cascade", 3, 7, "      M[b] = max(p) X[b,p]")
    assert (second.line, second.column) == (5, 7)


def test_many_lines_and_deep_brackets():
    lines = "".join(f"  A{i}[b] = {'X' if i == 0 else f'A{i - 1}'}[b] + 1.0\n" for i in range(400))
    cascade = parse_cascade(f"cascade f(X[b]: f32) -> A399[b]\n{lines}")
    assert len(cascade.body) == 400
    assert defined(cascade.body[-1]) == (("A399", ("b",)),)
    with pytest.raises(ef.CascadeError, match="nested too deeply"):
        parse_cascade(f"cascade f(X[b]: f32) -> O[b]\n  O[b] = {'-(' * 5000}X[b]{')' * 5000}\n")


def test_printing_does_not_load_the_parser():
    code = "import sys, einfall.ir.text\nprint('lark' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "False"


# --- malformed text ----------------------------------------------------------------------------------------------------------------

HEADER = "cascade f(X[b,p]: f32, t: f32) -> O[b]\n"
MALFORMED = {
    "empty": "",
    "no_header": "O[b] = sum(p) X[b,p]\n",
    "open_bracket": HEADER + "  O[b] = sum(p X[b,p]\n",
    "open_read": HEADER + "  O[b] = sum(p) X[b,p\n",
    "missing_operand": HEADER + "  O[b] = sum(p) X[b,p] *\n",
    "stray_character": HEADER + "  O[b] = sum(p) X[b,p] $ 2\n",
    "assignment_in_expression": HEADER + "  O[b] = sum(p) X[b,p] = 2\n",
    "chained_comparison": HEADER + "  O[b] = sum(p) where(0 < p < 3, X[b,p], 0.0)\n",
    "no_ranks_on_the_left": HEADER + "  O = sum(p) X[b,p]\n",
    "reduction_inside": HEADER + "  O[b] = 2.0 * sum(p) X[b,p]\n",
    "reduction_in_a_call": HEADER + "  O[b] = exp(max(p))\n",
    "unknown_function": HEADER + "  O[b] = sum(p) expp(X[b,p])\n",
    "function_of_an_operator": HEADER + "  O[b] = sum(p) add(X[b,p], 1.0)\n",
    "too_many_operands": HEADER + "  O[b] = sum(p) exp(X[b,p], 2.0)\n",
    "unknown_type": "cascade f(X[b,p]: f33) -> O[b]\n  O[b] = sum(p) X[b,p]\n",
    "unknown_bits_type": HEADER + "  O[b] = sum(p) bits(X[b,p], word)\n",
    "extent_of_an_expression": HEADER + "  O[b] = extent(p + 1)\n",
    "fill_that_varies": HEADER + "  O[b] = sum(p) X[b,p-1 else p]\n",
    "typed_output": "cascade f(X[b,p]: f32) -> O[b]: bf16\n  O[b] = sum(p) X[b,p]\n",
    "untyped_pieces": HEADER + "  O[b] = concat(b) X[b,0]; X[b,1]\n",
    "too_few_pieces": HEADER + "  rank b = s + t\n  O[b] = concat(b) X[b,0]; X[b,1]; X[b,2]\n",
    "populate_ranks_differ": HEADER + "  V[b,s], I[s,b] = topk(p -> s, 3) X[b,p]\n",
    "state_below_statement": HEADER + "  iterate p\n    A[b] = exp(X[b,p])\n    O[b] = 0.0 then O[b] + A[b]\n",
    "empty_block": HEADER + "  iterate p\n  O[b] = X[b,0]\n",
    "bad_indent": HEADER + "    A[b] = X[b,0]\n  O[b] = X[b,1]\n",
    "indented_statement": HEADER + "  A[b] = X[b,0]\n    O[b] = X[b,1]\n",
    "two_cascades": HEADER + "  O[b] = X[b,0]\n" + HEADER + "  O[b] = X[b,0]\n",
    "margin": f"\n        {HEADER}          O[b] = sum(p) X[b,p] *\n",
    "python": "def f(X):\n    return X\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_text_is_refused_with_its_place(name, golden):
    with pytest.raises(ef.CascadeError) as caught:
        parse_cascade(MALFORMED[name], "f.cascade")
    golden(f"malformed_{name}", str(caught.value))
    assert caught.value.location is not None


PROGRAM = "kernel k(X[b,p]: f32) -> O[b]: f32\n  grid b\n"
MALFORMED_PROGRAMS = {
    "not_a_kernel": HEADER + "  O[b] = X[b,0]\n",
    "loop_without_bounds": PROGRAM + "  for p step 4\n    s[p] = X[b,p]\n",
    "step_of_a_name": PROGRAM + "  for p step n\n    bounds 0, 0, 0, 0\n",
    "typed_dot": PROGRAM + "  s[b]: bf16 = dot(p) X[b,p], X[b,p]\n",
    "store_with_fill": PROGRAM + "  store O[b else 0.0] = X[b,0]\n",
    "scan_over_two": PROGRAM + "  s[b,p] = cumsum(b,p) X[b,p]\n",
    "scan_that_starts_twice": PROGRAM + "  s[b] = cumsum(b) X[b,0] from 0.0 from 1.0\n",
    "masked_by_a_tile": PROGRAM + "  s[b] = masked(X[b,0], t)\n",
}


@pytest.mark.parametrize("name", MALFORMED_PROGRAMS)
def test_malformed_programs_are_refused_with_their_place(name, golden):
    with pytest.raises(ef.CascadeError) as caught:
        parse_program(MALFORMED_PROGRAMS[name], "k.kernel")
    golden(f"program_{name}", str(caught.value))


scraps = st.sampled_from([*" \n\t()[],:;=+-*<>|#", "cascade ", "sum(p) ", "X[b]", "-> ", "O[b]", "  ", "1.0"])


@given(st.text(max_size=80) | st.lists(scraps).map("".join))
def test_any_text_is_parsed_or_refused(text):
    """Nothing but `CascadeError` escapes, whatever is given."""
    for source in (text, HEADER + text, HEADER + "  O[b] = " + text):
        for parse in (parse_cascade, parse_program):
            try:
                parse(source)
            except ef.CascadeError as error:
                assert error.location is not None or "nested" in error.what
