"""Lowered programs: their text, and their numbers in the interpreter at several schedules."""

from __future__ import annotations

import einfall as ef
import numpy as np
import pytest
import torch
from cascades import CASES, Case, make_inputs, traced
from einfall.compiler.lower import lower
from einfall.compiler.passes import make_plan
from einfall.ir.reference import evaluate
from einfall.ir.tile_reference import run_program
from einfall.schedules.schedule import Schedule

by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
GOLDEN = ("causal", "window", "grouped", "cross_entropy", "layer_matmul", "best")


def run(case: Case, sizes, tensors, schedule=None, dtype=np.float64):
    schedule = schedule or Schedule()
    plan = make_plan(traced(case), sizes, repeat=schedule.repeated)
    arrays = {name: t.numpy() for name, t in tensors.items()}
    for program in lower(plan, schedule, sizes):
        arrays.update(run_program(program, arrays, case.scalars, dtype=dtype))
    return arrays


def assert_equal(case: Case, sizes, tensors, arrays, tolerance):
    expected = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)
    for name, reference in expected.items():
        np.testing.assert_allclose(arrays[name], reference.numpy(), rtol=tolerance, atol=tolerance, err_msg=name)


@by_name
def test_default_schedule(case: Case):
    tensors = make_inputs(case, case.sizes, seed=5)
    assert_equal(case, case.sizes, tensors, run(case, case.sizes, tensors), 1e-10)


@by_name
def test_small_and_odd_tiles(case: Case):
    tensors = make_inputs(case, case.sizes, seed=6)
    schedule = Schedule.make(tile={case.reduced: 16, "m": 8, "t": 8, "n": 16})
    assert_equal(case, case.sizes, tensors, run(case, case.sizes, tensors, schedule), 1e-10)


@by_name
def test_repeated_passes(case: Case):
    tensors = make_inputs(case, case.sizes, seed=7)
    schedule = Schedule.make(stream={case.reduced: "repeat"})
    assert_equal(case, case.sizes, tensors, run(case, case.sizes, tensors, schedule), 1e-10)


@by_name
def test_extents_of_one(case: Case):
    sizes = dict.fromkeys(case.sizes, 1)
    tensors = make_inputs(case, sizes, seed=8)
    assert_equal(case, sizes, tensors, run(case, sizes, tensors), 1e-10)


@pytest.mark.parametrize("name", GOLDEN)
def test_text_of_the_program(name, golden):
    case = next(c for c in CASES if c.name == name)
    programs = lower(make_plan(traced(case), case.sizes), Schedule(), case.sizes)
    golden(name, "\n".join(str(p) for p in programs))


@pytest.mark.parametrize("stream", [{}, {"p": "repeat"}], ids=["streamed", "repeated"])
@pytest.mark.parametrize("together", [1, 2])
def test_masked_rows_are_nan_only_where_eager_is(stream, together):
    case = next(c for c in CASES if c.name == "ragged")
    tensors = make_inputs(case, case.sizes, seed=9)
    tensors["L"][0] = 0
    found = run(case, case.sizes, tensors, Schedule.make(stream=stream, tile={"b": together}))["O"]
    expected = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)["O"].numpy()
    assert not np.isnan(found[~np.isnan(expected)]).any()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-10)


def test_padding_beyond_a_length_is_never_read():
    case = next(c for c in CASES if c.name == "ragged")
    tensors = make_inputs(case, case.sizes, seed=10)
    tensors["L"][:] = torch.tensor([17, 1], dtype=torch.int32)
    expected = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)["O"].numpy()
    for b, length in enumerate((17, 1)):
        tensors["K"][b, :, length:] = float("nan")
        tensors["V"][b, :, length:] = float("inf")
    np.testing.assert_allclose(run(case, case.sizes, tensors)["O"], expected, rtol=1e-10)


def test_a_tile_beyond_reason_is_refused():
    case = CASES[0]
    with pytest.raises(ef.ScheduleError, match="along 'p'"):
        lower(make_plan(traced(case), case.sizes), Schedule.make(tile={"p": 1 << 21}), case.sizes)
