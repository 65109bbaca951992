"""Every recipe against its oracle: the meaning of its cascade in float64, and its kernels, over random extents and values."""

import importlib
from pathlib import Path

import einfall as ef
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

COOKBOOK = Path(__file__).resolve().parents[2] / "cookbook"
MODULES = sorted(
    ".".join(("cookbook", *path.relative_to(COOKBOOK).with_suffix("").parts))
    for path in COOKBOOK.glob("*/*.py")
    if "\nRECIPE" in path.read_text()
)
STEPS = [
    pytest.param(step, id=f"{name.removeprefix('cookbook.')}:{step.name}")
    for name in MODULES
    for step in importlib.import_module(name).RECIPE.steps
]
FEW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))

FEWER = settings(FEW, max_examples=4)  # every drawing is a build of several kernels


def extents(step):
    return st.fixed_dictionaries({rank: st.integers(low, high) for rank, (low, high) in step.ranges.items()})


@pytest.mark.parametrize("step", STEPS)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
@FEW
def test_the_cascade_means_what_the_oracle_computes(step, data, seed):
    tensors = step.tensors(seed, {**step.sizes, **data.draw(extents(step))})
    kind = None if step.exact else torch.float64
    assert not step.compare(step.kernel.reference(*tensors, dtype=kind, **step.arguments()), tensors)


@pytest.mark.parametrize("step", STEPS)
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
@FEWER
def test_the_kernels_compute_what_the_oracle_computes(step, data, seed):
    tensors = step.tensors(seed, {**step.sizes, **data.draw(extents(step))})
    with ef.configure(database=None):
        assert not step.compare(step.kernel(*tensors, **step.arguments()), tensors)
