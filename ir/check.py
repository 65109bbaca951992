"""What is legal, as two tables: each function listed finds the breaches of one rule, which its docstring states.

The rules run in order, so that each may rely on those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .cascade import Cascade, defined
from .check_statements import (
    Fault,
    check_axes,
    check_concatenations,
    check_names,
    check_outputs,
    check_ranks,
    check_reads,
    check_sizes,
    check_types,
)  # fmt: skip
from .check_tiles import (
    TileFault,
    check_definitions,
    check_kernel_names,
    check_read_back,
    check_stores,
    check_tile_expressions,
    check_tile_ranks,
    check_tile_types,
    check_tiling,
)  # fmt: skip
from .errors import CascadeError
from .tile import TileProgram

CASCADE_CHECKS: tuple[Callable[[Cascade], Iterator[Fault]], ...] = (
    check_names, check_axes, check_reads, check_ranks, check_sizes, check_concatenations, check_types, check_outputs,
)  # fmt: skip
PROGRAM_CHECKS: tuple[Callable[[TileProgram], Iterator[TileFault]], ...] = (
    check_kernel_names, check_tiling, check_definitions, check_read_back, check_tile_ranks, check_tile_expressions, check_tile_types,
    check_stores,
)  # fmt: skip


def check_cascade(c: Cascade) -> None:
    """Raise `CascadeError`, located at the statement, for the first breach of a rule of `CASCADE_CHECKS`."""
    for check in CASCADE_CHECKS:
        for fault in check(c):
            names = ", ".join(name for name, _ in defined(fault.statement)) if fault.statement is not None else None
            location = fault.statement.location if fault.statement is not None else None
            raise CascadeError(fault.what, cascade=c.name, statement=names, location=location, hint=fault.hint)


def check_program(p: TileProgram) -> None:
    """Raise `CascadeError`, naming the node, for the first breach of a rule of `PROGRAM_CHECKS`."""
    for check in PROGRAM_CHECKS:
        for fault in check(p):
            raise CascadeError(fault.what, cascade=p.name, statement=fault.node, hint=fault.hint)
