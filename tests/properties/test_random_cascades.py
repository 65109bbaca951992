"""Random cascades of dependent reductions: every rewrite, the derived streams and the lowered programs keep the float64 reference."""

from __future__ import annotations

import numpy as np
import torch
from einfall.compiler.lower import lower
from einfall.compiler.passes import PIPELINE, make_plan
from einfall.compiler.passes.write_streams import write_streams
from einfall.ir.check import check_cascade, check_program
from einfall.ir.reference import bind_sizes, evaluate
from einfall.ir.tile_reference import run_programs
from einfall.schedules.schedule import Schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cascades

TILES = {"m": st.sampled_from([1, 2, 4, 8]), "p": st.sampled_from([2, 4, 16]), "f": st.sampled_from([1, 2, 128])}


def assert_same(found, expected, cascade):
    """Finite wherever the reference is, and equal there."""
    for name, reference in expected.items():
        wide, result = reference.double(), torch.as_tensor(np.asarray(found[name])).double()
        finite = torch.isfinite(wide)
        where = f"{name} of\n{cascade}"
        torch.testing.assert_close(result[finite], wide[finite], rtol=1e-6, atol=1e-7, msg=lambda text, where=where: f"{text}\n{where}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=cascades())
def test_every_rewrite_keeps_the_reference(drawn):
    cascade, tensors, scalars = drawn
    expected = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    rewritten = cascade
    for rewrite, _ in PIPELINE:
        rewritten = rewrite(rewritten)
        check_cascade(rewritten)
        assert_same(evaluate(rewritten, tensors, scalars, dtype=torch.float64), expected, f"{rewrite.__name__}\n{cascade}\n{rewritten}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=cascades())
def test_derived_streams_keep_the_reference(drawn):
    cascade, tensors, scalars = drawn
    expected = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    streamed = write_streams(make_plan(cascade, bind_sizes(cascade, tensors)))
    check_cascade(streamed)
    assert_same(evaluate(streamed, tensors, scalars, dtype=torch.float64), expected, f"{cascade}\n{streamed}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=cascades(), tiles=st.fixed_dictionaries(TILES), repeat=st.booleans())
def test_lowered_programs_keep_the_reference(drawn, tiles, repeat):
    cascade, tensors, scalars = drawn
    expected = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    sizes = bind_sizes(cascade, tensors)
    schedule = Schedule.make(tile=tiles, stream={"p": "repeat"} if repeat else None)
    programs = lower(make_plan(cascade, sizes, repeat=schedule.repeated), schedule, sizes)
    for program in programs:
        check_program(program)
    arrays = {name: t.numpy() for name, t in tensors.items()}
    found = run_programs(programs, arrays, scalars, dtype=np.float64, sizes=sizes)
    assert_same(found, expected, "\n".join(map(str, (cascade, *programs))))
