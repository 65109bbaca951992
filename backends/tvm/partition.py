"""Runs of maps, reductions, stores and assignments that share loops: groups, and the stages inside each.

A group is a maximal run with common result ranks and one lane. Every statement is computed at the common ranks (a row); what has
further ranks, or reduces over them, in loops inside. A stage is a run of those inner loops; it ends where a statement reads a
reduction made in it, or where the inner ranks change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, Reduce, Scan, Store
from .prepare import Assign, Step, Stream, tiles_read, tiles_written

Row: TypeAlias = Map | Reduce | Store | Assign
Part: TypeAlias = "Group | Dot | Scan | Stream"


@dataclass(frozen=True, slots=True)
class Group:
    """Statements over the common ranks `common`, vectors along `lane` (None: scalars)."""

    common: tuple[str, ...]
    lane: str | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """Statements computed in one set of loops over the `inner` ranks; `inner` is empty for those of the row itself."""

    inner: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RowInfo:
    """A statement's result ranks, the ranks it reduces, the lane it wants, how many points it has, the rank it packs in pairs."""

    ranks: tuple[str, ...]
    over: tuple[str, ...]
    lane: str | None
    points: int
    pair: str | None = None

    @property
    def space(self) -> tuple[str, ...]:
        return (*self.ranks, *self.over)


def row_ranks(row: Row, tiles: dict[str, tuple[str, ...]], tiled: Callable[[str], bool]) -> tuple[str, ...]:
    """The result ranks of a statement: of a store, the tiled ranks its coordinates and value depend on."""
    if not isinstance(row, Store):
        return row.ranks
    found: dict[str, None] = {}
    for e in (*row.coords, row.expr):
        found.update({r: None for r in expression_ranks(e, tiles) if tiled(r)})
    return tuple(found)


def partition(steps: tuple[Step, ...], info: Callable[[Row], RowInfo]) -> list[Part]:
    """The steps with runs of row statements gathered into groups."""
    result: list[Part] = []
    run: list[Row] = []

    def flush() -> None:
        if run:
            result.append(_group(run, info))
            run.clear()

    for step in steps:
        if isinstance(step, (Dot, Scan, Stream)):
            flush()
            result.append(step)
        elif run and not _joins(run, step, info):
            flush()
            run.append(step)
        else:
            run.append(step)
    flush()
    return result


def _common(run: list[Row], info: Callable[[Row], RowInfo]) -> tuple[str, ...]:
    common = info(run[0]).ranks
    for row in run[1:]:
        common = tuple(r for r in common if r in info(row).ranks)
    return common


def _joins(run: list[Row], row: Row, info: Callable[[Row], RowInfo]) -> bool:
    """Whether `row` can be computed in the loops of `run`."""
    trial = [*run, row]
    common = set(_common(trial, info))
    if not common and all(info(r).ranks for r in trial):
        return False
    for r in trial:
        one = info(r)
        if isinstance(r, Reduce) and set(one.ranks) != common:
            return False
        if set(one.over) & common:
            return False
    pairs = {info(r).pair for r in trial} - {None}
    if len(pairs) > 1 or pairs & {info(r).lane for r in trial} or (pairs & common and any(set(info(r).space) - common for r in trial)):
        return False  # both rows of a pair are computed at one point of a stage
    before = set(_common(run, info))
    if before != common and not any(isinstance(r, Reduce) for r in trial):
        return False  # without a reduction nothing is gained by pulling a rank out of the common ones
    lanes = [info(r) for r in trial if set(info(r).space) - common]
    wanted = {one.lane for one in lanes if one.lane is not None}
    if len(wanted) > 1:
        return False
    if not lanes:  # all of the row itself
        return len({info(r).lane for r in trial}) <= 1
    return True


def _group(run: list[Row], info: Callable[[Row], RowInfo]) -> Group:
    common = _common(run, info)
    widest = max(run, key=lambda r: info(r).points)
    return Group(common, info(widest).lane, tuple(run))


def stages(group: Group, info: Callable[[Row], RowInfo]) -> list[Stage]:
    """The stages of a group in order. A row statement independent of the open stage is computed before it."""
    result: list[Stage] = []
    open_inner: tuple[str, ...] = ()
    open_rows: list[Row] = []

    def close() -> None:
        if open_rows:
            result.append(Stage(open_inner, tuple(open_rows)))
            open_rows.clear()

    for row in group.rows:
        inner = tuple(r for r in info(row).space if r not in group.common)
        reduced = {r.dst for r in open_rows if isinstance(r, Reduce)}
        touched = frozenset(t for r in open_rows for t in tiles_written(r) | tiles_read(r))
        if not inner:
            written = frozenset(t for r in open_rows for t in tiles_written(r))
            if tiles_read(row) & written or tiles_written(row) & touched or isinstance(row, (Assign, Store)):
                close()
            result.append(Stage((), (row,)))
            continue
        same = set(inner) == set(open_inner) and open_rows
        later = frozenset(t for r in open_rows if isinstance(r, Reduce) for t in tiles_written(r))
        if not same or tiles_read(row) & (reduced | later):
            close()
            open_inner = inner
        open_rows.append(row)
    close()
    return _merged(result)


def _merged(parts: list[Stage]) -> list[Stage]:
    """Neighbouring row-level stages joined."""
    result: list[Stage] = []
    for part in parts:
        if result and not part.inner and not result[-1].inner:
            result[-1] = Stage((), (*result[-1].rows, *part.rows))
        else:
            result.append(part)
    return result
