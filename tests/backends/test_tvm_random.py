"""Random tile programs: emitted kernels against the interpreter of tile programs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einfall.ir.tile_reference import run_program
from kernels import run
from random_programs import random_program, random_tensors

EXTENTS = ({"b": 1, "m": 1, "p": 1}, {"b": 2, "m": 9, "p": 33}, {"b": 1, "m": 70, "p": 150})


@pytest.mark.parametrize("seed", range(100, 107))
def test_random_program(seed):
    program = random_program(seed)
    few = program.grid[1].tile < 16  # the interpreter takes tasks and tiles one by one
    for extents in EXTENTS[:2] if few else EXTENTS[::2]:
        tensors = random_tensors(program, extents, seed)
        expected = run_program(program, {name: t.numpy() for name, t in tensors.items()}, {}, dtype=np.float64, garbage=None)
        actual = run(program, tensors, narrowed=seed == 103)
        for name, reference in expected.items():
            wanted = torch.as_tensor(np.asarray(reference)).double()
            torch.testing.assert_close(
                actual[name].double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
