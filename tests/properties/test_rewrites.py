"""Random cascades: every rewrite, the streamed text and the lowered program keep the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einfall.compiler.lower import lower
from einfall.compiler.passes import PIPELINE, make_plan
from einfall.compiler.passes.write_streams import write_streams
from einfall.ir.binding import bind_sizes
from einfall.ir.check import check_cascade, check_program
from einfall.ir.reference import evaluate
from einfall.ir.tile_reference import run_program
from einfall.schedules.schedule import Schedule
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from strategies import cascades

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def assert_kept(found, expected, what):
    """Equal to rounding; NaN at most where the reference is NaN or divides nothing by nothing."""
    for name, reference in expected.items():
        a = np.asarray(found[name], dtype=np.float64)
        b = reference.to(torch.float64).numpy()
        finite = np.isfinite(b)
        assert not np.isnan(a[finite]).any(), f"{what}: NaN in {name} where the reference is finite"
        scale = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
        np.testing.assert_allclose(a[finite], b[finite], rtol=1e-6, atol=1e-7 * scale, err_msg=f"{what}: {name}")


def arrays_of(outputs):
    return {name: t.to(torch.float64).numpy() for name, t in outputs.items()}


@many
@given(drawn=cascades())
def test_each_rewrite(drawn):
    cascade, tensors, scalars = drawn
    note(str(cascade))
    expected = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    for rewrite, _ in PIPELINE:
        cascade = rewrite(cascade)
        check_cascade(cascade)
        assert_kept(arrays_of(evaluate(cascade, tensors, scalars, dtype=torch.float64)), expected, rewrite.__name__)


@many
@given(drawn=cascades())
def test_the_streamed_text(drawn):
    cascade, tensors, scalars = drawn
    note(str(cascade))
    streamed = write_streams(make_plan(cascade, bind_sizes(cascade, tensors)))
    check_cascade(streamed)
    expected = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    assert_kept(arrays_of(evaluate(streamed, tensors, scalars, dtype=torch.float64)), expected, "streamed")


@pytest.mark.parametrize("repeat", [False, True], ids=["online", "repeat"])
def test_the_lowered_program(repeat):
    @settings(many, max_examples=100)
    @given(drawn=cascades(limit=40), tile=st.sampled_from((16, 32)), rows=st.sampled_from((1, 4, 16)))
    def check(drawn, tile, rows):
        cascade, tensors, scalars = drawn
        note(str(cascade))
        sizes = bind_sizes(cascade, tensors)
        schedule = Schedule.make(tile={"p": tile, "m": rows}, stream={"p": "repeat"} if repeat else {})
        plan = make_plan(cascade, sizes, repeat=schedule.repeated)
        arrays = {name: t.numpy() for name, t in tensors.items()}
        for program in lower(plan, schedule, sizes):
            check_program(program)
            arrays.update(run_program(program, arrays, scalars, dtype=np.float64))
        assert_kept(arrays, evaluate(cascade, tensors, scalars, dtype=torch.float64), "lowered")

    check()
