"""The rewrites, in order, and the plan they end in.

A rewrite is a function Cascade -> Cascade that keeps the meaning; `PIPELINE` lists them with the reason for their place.
`make_plan` runs them and partitions the result into kernels whose reductions are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from .canonicalize_exponentials import canonicalize_exponentials
from .decide_logic import decide_logic
from .expand_scans import expand_scans
from .lift_predicates import lift_predicates
from .merge_duplicates import merge_duplicates
from .name_operands import name_operands
from .sink_accesses import sink_accesses
from .split_reductions import split_reductions, split_stream
from .unroll_blocks import unroll_blocks

if TYPE_CHECKING:
    from ...ir.cascade import Cascade
    from ...ir.plan import Plan
    from ...schedules.schedule import Result

Rewrite = Callable[..., "Cascade"]

PIPELINE: tuple[tuple[Rewrite, str], ...] = (
    (merge_duplicates, "first, so that later passes see each computation once"),
    (unroll_blocks, "before everything that looks at statements: its steps are statements like any other"),
    (expand_scans, "before accesses sink, since it renames the rank that is scanned"),
    (decide_logic, "any and all become max and min before masks and laws look at reductions"),
    (sink_accesses, "before predicates, since a shifted read brings a condition of its own"),
    (lift_predicates, "before exponents are rewritten, while -inf still marks what a mask hides"),
    (canonicalize_exponentials, "before streaming: it removes origins"),
    (split_reductions, "when summands have the form in which they stream, since it uses the same corrections"),
    (name_operands, "when expressions are final: what works on memory gets what lies there"),
    (merge_duplicates, "again: the passes above make equal statements"),
)


SIZED: tuple[Rewrite, ...] = (expand_scans, sink_accesses)


def rewritten(cascade: Cascade, sizes: Mapping[str, int]) -> Iterator[tuple[Rewrite, Cascade]]:
    """The passes of the pipeline one after the other, each with the cascade as it leaves it.

    Those of `SIZED` weigh what they do by the extents, as far as these are known.
    """
    for rewrite, _ in PIPELINE:
        cascade = rewrite(cascade, sizes) if rewrite in SIZED else rewrite(cascade)
        yield rewrite, cascade


def prepare(cascade: Cascade, sizes: Mapping[str, int]) -> tuple[Cascade, tuple[str, ...]]:
    """The cascade after the pipeline, and a note for each pass that changed it."""
    notes: list[str] = []
    for rewrite, new in rewritten(cascade, sizes):
        if new != cascade:
            notes.append(rewrite.__name__)
        cascade = new
    return cascade, tuple(notes)


def make_plan(
    cascade: Cascade,
    sizes: Mapping[str, int],
    *,
    repeat: frozenset[str] = frozenset(),
    results: Mapping[str, Result] | None = None,
    split: Mapping[str, int] | None = None,
) -> Plan:
    """The kernels that compute `cascade`, derived for extents like `sizes`.

    Args:
        sizes: the extent of each rank of the inputs at the call; decides which ranks are short enough to be held whole, and what is
            stored rather than worked out again.
        repeat: ranks over which dependent reductions take a pass each instead of carrying corrected states.
        results: what becomes of reductions inside tiles that are needed more than once; else what moves least.
        split: ranks whose stream is cut into so many stretches, each a task of its own. These three are a schedule's choices.

    Raises `UnsupportedError` where the kernels would need each other's results.
    """
    from ...ir.plan import Plan
    from .partition_kernels import partition_kernels

    prepared, notes = prepare(cascade, sizes)
    for rank, parts in (split or {}).items():
        prepared = split_stream(prepared, rank, parts)

    def of_step(step: Cascade) -> Plan:
        return make_plan(step, sizes, repeat=repeat, results=results)

    partition = partition_kernels(prepared, sizes, of_step, repeat=repeat, results=results or {})
    return Plan(prepared, partition.steps, notes, partition.cuts)
