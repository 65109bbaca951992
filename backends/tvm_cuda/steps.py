"""What the emitter does in order: the steps of the tile program, accumulations that each thread keeps to itself, reads done once.

    step  =  Map | Reduce | Scan | Dot | Store | Assign | Stream          as on the CPU
          |  Partial(state, row)                                          inside a stream: state op= the thread's own part of the row
          |  Whole(state, op, over, first)                                after it: the parts of all threads, and what came before

A state that only gathers, `s = s op reduce(...)`, where neither the result so far nor the tile's own part is needed before the end, is
reduced across threads once, after the stream: the operation is associative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...ir.expr import Bitcast, Cast, Const, Expr, Op, Read, Tile, children, walk, with_children
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, LoopState, Map, Reduce, Scan, Store
from ...ir.types import DType, f32, f64
from ..tvm.prepare import Assign, Stream, expressions_of, tiles_read
from ..tvm.prepare import Step as CommonStep

COMBINES = {"add": "sum", "mul": "prod", "maximum": "max", "minimum": "min", "or": "any", "and": "all"}
IDENTITY: dict[str, float | bool] = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf"), "any": False, "all": True}


@dataclass(frozen=True, slots=True)
class Partial:
    """The thread's own part of a reduction, into the state."""

    dst: str
    row: Reduce


@dataclass(frozen=True, slots=True)
class Whole:
    """The parts of all threads across the ranks `over`, then `op` with the tile `first`: the state before the loop."""

    dst: str
    ranks: tuple[str, ...]
    op: str
    over: tuple[str, ...]
    dtype: DType
    first: str


Step: TypeAlias = CommonStep | Partial | Whole


def as_reduction(dot: Dot) -> Reduce:
    """The sum of products of a dot, without its update."""
    t = f64 if dot.dtype == f64 else f32
    return Reduce(dot.dst, dot.ranks, "sum", dot.over, Op("mul", (Cast(dot.a, t), Cast(dot.b, t))), t, dot.note)


def read_by(step: Step) -> frozenset[str]:
    """The tiles a step reads."""
    match step:
        case Partial(row=row):
            return tiles_read(row)
        case Whole(first=first):
            return frozenset((first,))
        case Stream(loop=loop, body=body):
            conditions = {n.name for c in loop.conditions for n in walk(c) if isinstance(n, Tile)}
            return frozenset().union(conditions, *(read_by(s) for s in body))
        case _:
            return tiles_read(step)


def keep_partial(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Every gathering state as a part of each thread inside its loop and a whole after it."""
    done: list[Step] = []
    for step in steps:
        if not isinstance(step, Stream):
            done.append(step)
            continue
        body = list(keep_partial(step.body))
        wholes: list[Step] = []
        for state in step.loop.states:
            found = _gathers(state, body)
            if found is None:
                continue
            row, gone, place = found
            body = [Partial(state.name, row) if s is place else s for s in body if s is place or all(s is not g for g in gone)]
            start = next(i for i in reversed(range(len(done))) if isinstance(s := done[i], Assign) and s.dst == state.name)
            first = f"{state.name}.first"
            done[start : start + 1] = [
                Map(first, state.ranks, state.init, state.dtype, f"{state.name} before the loop"),
                Assign(state.name, state.ranks, Const(IDENTITY[row.op]), state.dtype, f"{state.name} of this thread"),
            ]
            wholes.append(Whole(state.name, state.ranks, row.op, row.over, state.dtype, first))
        done += [Stream(step.loop, tuple(body)), *wholes]  # type: ignore[arg-type]
    return tuple(done)


def _gathers(state: LoopState, body: list[Step]) -> tuple[Reduce, list[Step], Step] | None:
    """Of a state that only gathers: the reduction, the steps that disappear and the one that the thread's part replaces."""
    readers = {name: [s for s in body if name in read_by(s)] for name in {n for s in body for n in read_by(s)}}
    makers = {s.dst: s for s in body if isinstance(s, (Map, Reduce, Dot))}
    assigns = [s for s in body if isinstance(s, Assign) and s.dst == state.name]
    if len(assigns) != 1 or (state.dtype.bits < 32 and state.dtype.kind != "bool"):
        return None
    owner: Step = assigns[0]
    e, gone = assigns[0].expr, [owner]
    row: Reduce
    place: Step

    def private(name: str) -> bool:
        """Whether only the last step of the chain reads the tile."""
        return len(readers.get(name, [])) == 1 and readers[name][0] is owner

    while isinstance(e, Tile) and isinstance(m := makers.get(e.name), Map) and private(e.name) and set(m.ranks) == set(state.ranks):
        if m.dtype != state.dtype:
            return None
        owner, e = m, m.expr
        gone.append(m)
    if isinstance(e, Tile) and isinstance(dot := makers.get(e.name), Dot) and private(e.name):
        owner = dot
        if dot.update != Tile(state.name) or dot.post is not None or not private(state.name) or state.name in tiles_read(as_reduction(dot)):
            return None
        row, place = as_reduction(dot), dot
    else:
        if not (isinstance(e, Op) and e.name in COMBINES and Tile(state.name) in e.args and private(state.name)):
            return None
        other = e.args[1] if e.args[0] == Tile(state.name) else e.args[0]
        if not isinstance(other, Tile) or not isinstance(reduce := makers.get(other.name), Reduce) or not private(other.name):
            return None
        row, place = reduce, reduce
        if row.op != COMBINES[e.name] or (row.op in ("any", "all")) != (state.dtype.kind == "bool"):
            return None
    if row.dtype != state.dtype or set(row.ranks) != set(state.ranks):
        return None
    return replace(row, dst=state.name, ranks=state.ranks), gone, place


def read_once(
    steps: tuple[Step, ...], types: Mapping[str, DType], ranks: Mapping[str, int], fits: Callable[[tuple[str, ...]], bool]
) -> tuple[Step, ...]:
    """Elements of inputs that several steps of a body read become a tile of their own.

    Args:
        types: of the inputs.
        ranks: the ranks of tiles.
        fits: whether a thread has room for a tile of these ranks.
    """
    count: dict[Read, int] = {}
    for step in steps:
        if isinstance(step, Stream):
            continue
        for read in dict.fromkeys(r for e in _expressions(step) for r in _plain_reads(e)):
            own = tuple(r for r in expression_ranks(read) if r in ranks)
            if read.tensor in types and own and fits(own) and not any(isinstance(n, Tile) for n in walk(read)):
                count[read] = count.get(read, 0) + 1
    shared = {r: f"{r.tensor}.{i}" for i, r in enumerate(r for r, n in count.items() if n > 1)}
    done: list[Step] = []
    placed: set[Read] = set()
    for step in steps:
        if isinstance(step, Stream):
            inner = read_once(step.body, types, ranks, fits)
            done.append(Stream(step.loop, inner))  # type: ignore[arg-type]
            continue
        for read in dict.fromkeys(r for e in _expressions(step) for r in _plain_reads(e)):
            if read in shared and read not in placed:
                placed.add(read)
                own = tuple(r for r in expression_ranks(read) if r in ranks)
                done.append(Map(shared[read], own, read, types[read.tensor], f"{read.tensor}, read once"))
        done.append(_with_tiles(step, shared))
    return tuple(done)


def _expressions(step: Step) -> tuple[Expr, ...]:
    if isinstance(step, Partial):
        return (step.row.expr,)
    return () if isinstance(step, Whole) else expressions_of(step)


def _plain_reads(e: Expr) -> list[Read]:
    """The reads of values; those of bits stay where they are, and so do those in coordinates."""
    if isinstance(e, Read):
        return [e]
    if isinstance(e, Bitcast):
        return []
    return [r for child in children(e) for r in _plain_reads(child)]


def _with_tiles(step: Step, shared: Mapping[Read, str]) -> Step:
    def exchanged(e: Expr) -> Expr:
        if isinstance(e, Read):
            return Tile(shared[e]) if e in shared else e
        if isinstance(e, Bitcast):
            return e
        return with_children(e, tuple(exchanged(c) for c in children(e)))

    match step:
        case Partial(row=row):
            return replace(step, row=replace(row, expr=exchanged(row.expr)))
        case Map() | Reduce() | Assign():
            return replace(step, expr=exchanged(step.expr))
        case Scan(start=start):
            return replace(step, expr=exchanged(step.expr), start=None if start is None else exchanged(start))
        case Dot(update=update, post=post):
            before, after = (None if e is None else exchanged(e) for e in (update, post))
            return replace(step, a=exchanged(step.a), b=exchanged(step.b), update=before, post=after)
        case Store():
            return replace(step, expr=exchanged(step.expr))
        case _:
            return step
