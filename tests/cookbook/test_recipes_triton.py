"""Every recipe's kernels for a GPU, interpreted, against its oracle: small extents, the default schedule."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
from einfall.compiler.interpreted import interpreted
from einfall.schedules.target import load_target

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
SM90 = load_target("cuda:sm_90")


def small(step, seed):
    """Extents near the least that the recipe names, and now and then the least."""
    drawn = random.Random(seed)
    return {**step.sizes, **{rank: min(high, low + drawn.randint(0, 6)) for rank, (low, high) in step.ranges.items()}}


@pytest.mark.parametrize("step", STEPS)
def test_the_interpreted_kernels_compute_what_the_oracle_computes(step):
    tensors = step.tensors(7, small(step, 7))
    asked = step.kernel._definition.describe(tensors, step.arguments(), None, None)
    executable = interpreted(asked.cascade, sizes=asked.sizes, target=SM90, strided=asked.strided)
    assert not step.compare(executable(*tensors, **step.scalars), tensors)
