"""From a tile program to steps in the order they are emitted: explicit assignments to states, packed operands.

    step  =  Map | Reduce | Scan | Dot | Store | Assign | Stream

A loop becomes an `Assign` of every state's first value, then a `Stream` whose body assigns the next values as early as nothing reads
the old ones any more, so that they can share registers with what computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...ir.expr import Count, Expr, Index, Masked, Seen, Start, Tile, walk
from ...ir.tile import Dot, Loop, LoopState, Map, Node, Reduce, Scan, Store
from ...ir.types import DType, f32, f64


@dataclass(frozen=True, slots=True)
class Assign:
    """`state[ranks] = expr`."""

    dst: str
    ranks: tuple[str, ...]
    expr: Expr
    dtype: DType = f32
    note: str = ""


@dataclass(frozen=True, slots=True)
class Stream:
    """A loop whose states are explicit."""

    loop: Loop
    body: tuple[Step, ...]


Step: TypeAlias = Map | Reduce | Scan | Dot | Store | Assign | Stream


def to_steps(nodes: tuple[Node, ...]) -> tuple[Step, ...]:
    """The steps of a body."""
    steps: list[Step] = []
    for node in nodes:
        if not isinstance(node, Loop):
            steps.append(node)
            continue
        steps += [Assign(s.name, s.ranks, s.init, s.dtype, f"{s.name} starts") for s in node.states]
        steps.append(Stream(node, tuple(_with_yields(list(to_steps(node.body)), node.states))))
    return tuple(steps)


def expressions_of(step: Step) -> tuple[Expr, ...]:
    """The expressions a step evaluates, nested ones included."""
    match step:
        case Map() | Reduce() | Assign():
            return (step.expr,)
        case Scan():
            return (step.expr,) if step.start is None else (step.expr, step.start)
        case Dot():
            return tuple(e for e in (step.a, step.b, step.update, step.post) if e is not None)
        case Store():
            return (*step.coords, step.expr)
        case Stream(loop=loop, body=body):
            return (*loop.conditions, *(e for inner in body for e in expressions_of(inner)))
    raise AssertionError(f"not a step: {step!r}")


def tiles_read(step: Step) -> frozenset[str]:
    """The tiles a step reads. A dot's own name in `post` is the sum, not the tile."""
    names = {n.name for e in expressions_of(step) for n in walk(e) if isinstance(n, Tile)}
    if isinstance(step, Dot):
        names.discard(step.dst)
    return frozenset(names)


def tiles_written(step: Step) -> frozenset[str]:
    """The tiles a step writes."""
    match step:
        case Map() | Reduce() | Scan() | Dot() | Assign():
            return frozenset((step.dst,))
        case Stream(body=body):
            return frozenset(t for inner in body for t in tiles_written(inner))
        case _:
            return frozenset()


def all_steps(steps: tuple[Step, ...]) -> Iterator[Step]:
    """Every step, those inside streams after the stream itself."""
    for step in steps:
        yield step
        if isinstance(step, Stream):
            yield from all_steps(step.body)


def tile_table(steps: tuple[Step, ...]) -> dict[str, tuple[tuple[str, ...], DType]]:
    """Ranks and type of every tile."""
    table: dict[str, tuple[tuple[str, ...], DType]] = {}
    for step in all_steps(steps):
        match step:
            case Map() | Reduce() | Scan() | Assign():
                table.setdefault(step.dst, (step.ranks, step.dtype))
            case Dot():
                table[step.dst] = (step.ranks, f64 if step.dtype == f64 else f32)
            case _:
                pass
    return table


def _with_yields(body: list[Step], states: tuple[LoopState, ...]) -> list[Step]:
    """`body` with every state's next value assigned after its last reader; all next values see the old states."""
    pending = {s.name: s for s in states if s.next != Tile(s.name)}
    reads = {name: {n.name for n in walk(s.next) if isinstance(n, Tile)} for name, s in pending.items()}
    placed = list(body)
    while pending:
        free = [name for name in pending if not any(name in reads[other] for other in pending if other != name)]
        if not free:  # states that exchange values: one of them through a tile of its own
            name = next(iter(pending))
            state = pending[name]
            copy = f"{name}.next"
            placed.append(Map(copy, state.ranks, state.next, state.dtype))
            pending[name] = replace(state, next=Tile(copy))
            reads[name] = {copy}
            continue
        name = free[0]
        state = pending.pop(name)
        position = 0
        for i, step in enumerate(placed):
            if tiles_written(step) & reads[name] or name in tiles_read(step):
                position = i + 1
        placed.insert(position, Assign(name, state.ranks, state.next, state.dtype))
    return placed


def depends_on_loop(e: Expr, loop: Loop, inside: frozenset[str]) -> bool:
    """Whether `e` changes from tile to tile of `loop`; `inside` are the tiles written in its body."""
    for node in walk(e):
        match node:
            case Tile(name=name) if name in inside:
                return True
            case Index(rank=rank) | Start(rank=rank) | Count(rank=rank) | Seen(rank=rank) if rank == loop.rank:
                return True
            case Masked():
                return True
            case _:
                continue
    return False
