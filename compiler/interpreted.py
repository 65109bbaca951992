"""Executables whose kernels are interpreted: what is emitted for a machine that is not here, on CPU tensors.

The plan, the schedule and the sources are those of the machine; library calls and loops run as on any other. Only the kernels' numbers are
told by it, nothing of what the machine's compiler makes of them, and nothing is kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..backends.base import Source
from ..backends.triton.interpret import interpret
from ..ir.cascade import Cascade
from ..ir.errors import UnsupportedError
from ..ir.infer import declared_types
from ..ir.plan import KernelPlan, LibraryPlan, LoopPlan
from ..schedules.schedule import Schedule
from ..schedules.target import SECOND, Target, host_target
from .driver import Lowered, Order, lower_cascade, lower_plan
from .executable import Executable
from .parts import Call, Function, LibraryPart, LoopPart, Part

INTERPRETED = ("cuda", "hip")  # kinds of targets whose emitted sources can be interpreted


def interpreted(
    cascade: Cascade,
    *,
    sizes: Mapping[str, int],
    target: Target,
    schedule: Schedule | None = None,
    strided: frozenset[str] = frozenset(),
) -> Executable:
    """`cascade` as it is emitted for `target`, to run on CPU tensors in the interpreter.

    Args:
        sizes: the extent of every rank at the call.
        schedule: the default one for the target if None.
        strided: inputs whose last axis need not be contiguous.

    Raises `UnsupportedError` for a target whose kernels have no interpreter, and what the lowering and emitting of the kernels raise.
    """
    if target.kind not in INTERPRETED:
        raise UnsupportedError(f"kernels for {target.name} cannot be interpreted", hint=f"targets of the kinds {', '.join(INTERPRETED)}")
    order = Order(cascade, dict(sizes), target, strided)
    return _executable(order, lower_cascade(order, schedule))


def _executable(order: Order, lowered: Lowered, *, inner: bool = False) -> Executable:
    here = replace(host_target(), name=f"{order.target.name}, interpreted")  # the tensors lie on this machine's processor
    executable = Executable(order.cascade, here, lowered.schedule, order.sizes, _parts(order, lowered), order.strided, inner=inner)
    executable.remember(lowered.plan, lowered.programs)
    return executable


def _parts(order: Order, lowered: Lowered) -> list[Part | LibraryPart | LoopPart]:
    """The steps of the plan, every kernel loaded."""
    parts: list[Part | LibraryPart | LoopPart] = []
    kernels = zip(lowered.programs, lowered.sources, strict=True)
    types = declared_types(lowered.plan.cascade)
    for step in lowered.plan.steps:
        match step:
            case LibraryPlan():
                parts.append(LibraryPart.of(step, types))
            case LoopPlan():
                inside = replace(order, cascade=step.step)
                body = _executable(inside, lower_plan(inside, step.body, None), inner=True)
                parts.append(LoopPart.of(step, types, body))
            case KernelPlan():
                program, source = next(kernels)
                parts.append(Part(Call.of(program), source, loaded=_loaded(source)))
    return parts


def _loaded(source: Source) -> Function:
    """The kernel on CPU tensors: in Triton's interpreter, or emulated from the CUDA C of the second emitter."""
    if not source.target.name.endswith(SECOND):
        return interpret(source)
    from ..backends.tvm_cuda.emulator import emulate

    return emulate(source)
