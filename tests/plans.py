"""A plan run step by step: kernels in the interpreter of tile programs, the rest by what the executable would call."""

from __future__ import annotations

import numpy as np
import torch
from einfall.backends.library import library_function
from einfall.compiler.lower import lower
from einfall.ir.binding import to_torch
from einfall.ir.check import check_program
from einfall.ir.infer import declared_types
from einfall.ir.plan import LibraryPlan, LoopPlan
from einfall.ir.tile_reference import run_program
from einfall.schedules.schedule import Schedule


def run_plan(plan, sizes, arrays, scalars=None, *, schedule=None, dtype=np.float32):
    """All tensors that the steps of `plan` store, beside `arrays`, as NumPy arrays."""
    found, scalars = dict(arrays), scalars or {}
    programs = iter(lower(plan, schedule or Schedule(), sizes))
    types = declared_types(plan.cascade)
    for step in plan.steps:
        if isinstance(step, LibraryPlan):
            found.update(_library(step, sizes, found, scalars, types, dtype))
        elif isinstance(step, LoopPlan):
            raise NotImplementedError("loops are tested compiled")
        else:
            program = next(programs)
            check_program(program)
            found.update(run_program(program, found, scalars, dtype=dtype))
    return found


def _library(step, sizes, arrays, scalars, types, dtype):
    known = step.cascade.solve_sizes(sizes)
    results = {}
    for o in step.cascade.outputs:
        shape = [int(np.prod([known[r] for r in axis])) for axis in o.axes]
        kind = torch.float64 if types[o.name].is_float and dtype == np.float64 else to_torch(types[o.name])
        results[o.name] = torch.empty(shape, dtype=kind)
    inputs = [torch.from_numpy(np.ascontiguousarray(arrays[t.name])) for t in step.cascade.inputs]
    library_function(step.cascade, known)(*inputs, *results.values(), *(scalars[s.name] for s in step.cascade.scalars))
    return {name: x.numpy() for name, x in results.items()}

