"""The rules for tile programs, one function each, which finds what breaks it; `check.py` has the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from .check_statements import RESERVED, nearest, node_types, operation_hint
from .errors import CascadeError
from .expr import OPS, REDUCTIONS, SCANS, Count, Expr, Masked, Op, Read, Scalar, Seen, Start, Tile, reads, walk
from .infer import expression_ranks, expression_type
from .text import program_ranks
from .tile import Dot, Loop, Map, Node, Reduce, Scan, Store, TileProgram, kernel_tiles
from .types import DType, boolean


@dataclass(frozen=True, slots=True)
class TileFault:
    """A breach of a rule, with the name of the node it is in."""

    what: str
    node: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """An expression of a node.

    Args:
        node: the name of the node.
        expr: the expression.
        ranks: the ranks it may vary over; None where it is a number of the task.
        tiles: the tiles it may read.
        loops: the loops it is inside, outermost first.
        bound: whether it is one of a loop's bounds.
    """

    node: str
    expr: Expr
    ranks: tuple[str, ...]
    tiles: frozenset[str]
    loops: tuple[Loop, ...]
    bound: bool = False


def name_of(node: Node) -> str:
    """What a fault calls a node."""
    match node:
        case Store(tensor=tensor):
            return f"store {tensor}"
        case Loop(rank=rank):
            return f"for {rank}"
        case _:
            return node.dst


_Placed: TypeAlias = tuple[Node, frozenset[str], tuple[Loop, ...]]


def nodes(p: TileProgram) -> Iterator[_Placed]:
    """Every node in order, with the tiles defined before it and the loops around it."""

    def visit(body: tuple[Node, ...], known: frozenset[str], loops: tuple[Loop, ...]) -> Iterator[_Placed]:
        for node in body:
            yield node, known, loops
            if isinstance(node, Loop):
                states = frozenset(s.name for s in node.states)
                yield from visit(node.body, known | states, (*loops, node))
                known |= states
            elif not isinstance(node, Store):
                known |= {node.dst}

    yield from visit(p.body, frozenset(), ())


def uses(p: TileProgram) -> Iterator[Use]:
    """Every expression of the program."""
    for node, known, loops in nodes(p):
        name = name_of(node)
        match node:
            case Map(ranks=ranks, expr=expr):
                yield Use(name, expr, ranks, known, loops)
            case Reduce(ranks=ranks, over=over, expr=expr):
                yield Use(name, expr, (*ranks, *over), known, loops)
            case Scan(ranks=ranks, expr=expr, start=start):
                yield Use(name, expr, (*ranks, node.over), known, loops)
                if start is not None:
                    yield Use(name, start, tuple(rank for rank in ranks if rank != node.over), known, loops)
            case Dot(ranks=ranks, over=over):
                yield Use(name, node.a, (*ranks, *over), known, loops)
                yield Use(name, node.b, (*ranks, *over), known, loops)
                if node.update is not None:
                    yield Use(name, node.update, ranks, known, loops)
                if node.post is not None:
                    yield Use(name, node.post, ranks, known | {node.dst}, loops)
            case Store(coords=coords, expr=expr):
                points = tuple(dict.fromkeys(rank for c in coords for rank in expression_ranks(c)))
                yield from (Use(name, c, points, known, loops) for c in coords)
                yield Use(name, expr, points, known, loops)
            case Loop():
                yield from _loop_uses(node, known, loops)


def _loop_uses(loop: Loop, known: frozenset[str], loops: tuple[Loop, ...]) -> Iterator[Use]:
    name, inside = name_of(loop), (*loops, loop)
    for bound in (loop.bounds.begin, loop.bounds.whole_begin, loop.bounds.whole_end, loop.bounds.end):
        yield Use(name, bound, (), known, loops, bound=True)
    states = frozenset(s.name for s in loop.states)
    body = frozenset(kernel_tiles(tuple(n for n in loop.body if not isinstance(n, Loop))))
    for inner in loop.body:
        if isinstance(inner, Loop):
            body |= {s.name for s in inner.states}
    for condition in loop.conditions:
        yield Use(name, condition, tuple(expression_ranks(condition)), known, inside)
    for s in loop.states:
        yield Use(s.name, s.init, s.ranks, known, loops)
        yield Use(s.name, s.next, s.ranks, known | states | body, inside)


def check_kernel_names(p: TileProgram) -> Iterator[TileFault]:
    """A tensor and a tile are each defined once, and a bare name means one thing: no scalar is called like a rank or a tile."""
    scalars = [s.name for s in p.scalars]
    tiles = [name_of(n) for n, _, _ in nodes(p) if not isinstance(n, (Store, Loop))]
    tiles += [s.name for n, _, _ in nodes(p) if isinstance(n, Loop) for s in n.states]
    for group in ([*(t.name for t in p.inputs), *(o.name for o in p.outputs), *scalars], [*tiles, *scalars]):
        seen: set[str] = set()
        for name in group:
            if name in seen:
                yield TileFault(f"{name!r} is defined twice", hint="a tile program is in single-assignment form")
            seen.add(name)
    ranks = program_ranks(p)
    for name in (*scalars, *tiles, *ranks):
        if name in RESERVED:
            yield TileFault(f"{name!r} is reserved and names nothing")
    for name in scalars:
        if name in ranks:
            yield TileFault(f"{name!r} is a rank and a scalar")


def check_tiling(p: TileProgram) -> Iterator[TileFault]:
    """A rank is cut once: by the grid, a loop or not at all; tiles hold at least an element; a resident rank has a known size."""
    cut: dict[str, str] = {}
    for axis in p.grid:
        if axis.rank in cut:
            yield TileFault(f"rank {axis.rank!r} is in the grid twice")
        if axis.tile < 1:
            yield TileFault(f"grid tile {axis.tile} of rank {axis.rank!r}")
        cut[axis.rank] = "a grid rank"
    for rank in p.resident:
        if rank in cut:
            yield TileFault(f"rank {rank!r} is resident and {cut[rank]}")
        if p.static_size(rank) is None:
            yield TileFault(f"resident rank {rank!r} has no constant size", hint=f"rank {rank} = 64")
        cut[rank] = "resident"
    for node, _, loops in nodes(p):
        if isinstance(node, Loop):
            if node.tile < 1:
                yield TileFault(f"step {node.tile}", name_of(node))
            if node.rank in cut or any(outer.rank == node.rank for outer in loops):
                taken = cut.get(node.rank, "streamed by a loop around it")
                yield TileFault(f"the loop is over {node.rank!r}, which is {taken}", name_of(node))


def check_definitions(p: TileProgram) -> Iterator[TileFault]:
    """A tile is read after it is defined, and a loop's own tiles inside it only; scalars are declared.

    Memory that is read is an input, or an output: what the same task stored before.
    """
    inputs = {t.name: t.ranks for t in p.inputs} | {t.name: t.ranks for t in p.outputs}
    scalars = {s.name for s in p.scalars}
    for use in uses(p):
        for node in walk(use.expr):
            match node:
                case Tile(name=name) if name not in use.tiles:
                    yield TileFault(f"tile {name!r} is not defined here", use.node, nearest(name, use.tiles))
                case Read(tensor=name) if name not in inputs:
                    yield TileFault(f"{name!r} is no input", use.node, nearest(name, inputs))
                case Read(tensor=name, coords=coords) if len(coords) != len(inputs[name]):
                    yield TileFault(f"{name}[{','.join(inputs[name])}] is read with {len(coords)} coordinates", use.node)
                case Scalar(name=name) if name not in scalars:
                    yield TileFault(f"unknown scalar {name!r}", use.node, nearest(name, scalars))
                case _:
                    pass


def check_read_back(p: TileProgram) -> Iterator[TileFault]:
    """An output is read only after the node, or the whole loop, that stores it."""
    outputs = {o.name for o in p.outputs}
    stored: set[str] = set()
    for top in p.body:
        alone = replace(p, body=(top,))
        for use in uses(alone):
            for read in reads(use.expr):
                if read.tensor in outputs and read.tensor not in stored:
                    yield TileFault(f"{read.tensor!r} is read before it is stored", use.node, "store it in an earlier loop")
        stored |= {node.tensor for node, _, _ in nodes(alone) if isinstance(node, Store)}


def check_tile_ranks(p: TileProgram) -> Iterator[TileFault]:
    """The ranks of a tile are cut into tiles where it stands, and an expression varies over no others."""
    ranks = {name: r for name, (r, _) in kernel_tiles(p.body).items()}
    single = {axis.rank for axis in p.grid if axis.tile == 1}
    for node, _, loops in nodes(p):
        for name, own in _own_ranks(node):
            for rank in own:
                if rank in single or not _has_tile(p, rank, loops):
                    yield TileFault(f"rank {rank!r} of {name} has no tile here", name_of(node), "a grid, resident or loop rank")
            if len(set(own)) < len(own):
                yield TileFault(f"{name} has a rank twice", name_of(node))
    for use in uses(p):
        rest = [rank for rank in expression_ranks(use.expr, ranks) if rank not in use.ranks and rank not in single]
        if rest and not use.bound:
            yield TileFault(f"an expression varies over {', '.join(rest)}, the tile over [{','.join(use.ranks)}]", use.node)
        for rank in rest if use.bound else ():
            yield TileFault(f"a bound varies over {rank!r}", use.node, "bounds are made of constants, extents and the grid's starts")


def _own_ranks(node: Node) -> Iterator[tuple[str, tuple[str, ...]]]:
    match node:
        case Map(dst=dst, ranks=ranks) | Scan(dst=dst, ranks=ranks):
            yield dst, ranks
        case Reduce(dst=dst, ranks=ranks, over=over) | Dot(dst=dst, ranks=ranks, over=over):
            yield dst, (*ranks, *over)
        case Loop(states=states):
            yield from ((s.name, s.ranks) for s in states)
        case Store():
            return


def _has_tile(p: TileProgram, rank: str, loops: tuple[Loop, ...]) -> bool:
    return rank in p.resident or any(loop.rank == rank for loop in loops) or any(axis.rank == rank for axis in p.grid)


def check_tile_expressions(p: TileProgram) -> Iterator[TileFault]:
    """Operations exist; `masked`, `count` and `seen` stand inside a loop, and each names a rank that is streamed there."""
    grid = {axis.rank for axis in p.grid}
    for node, _, _ in nodes(p):
        if isinstance(node, Reduce) and (node.op not in REDUCTIONS or not node.over):
            over = ", ".join(node.over) or "no rank"
            yield TileFault(f"no reduction {node.op!r} over {over}", name_of(node), nearest(node.op, REDUCTIONS))
        if isinstance(node, Scan) and node.op not in SCANS:
            yield TileFault(f"no scan {node.op!r}", name_of(node), nearest(node.op, SCANS))
        if isinstance(node, Scan) and node.over not in node.ranks:
            yield TileFault(f"the scan is over {node.over!r}, which is no rank of the tile", name_of(node), "a scan keeps its rank")
        if isinstance(node, Dot) and not node.over:
            yield TileFault("a dot over no rank", name_of(node), "a product of tiles is a map")
    for use in uses(p):
        streamed = {loop.rank for loop in use.loops}
        for e in walk(use.expr):
            match e:
                case Op(name=name, args=args) if name not in OPS or len(args) != OPS[name].arity:
                    yield TileFault(f"no operation {name!r} of {len(args)} operands", use.node, operation_hint(name))
                case Masked() if not use.loops:
                    yield TileFault("masked outside of a loop", use.node, "it refers to the domain of the loop around it")
                case Count(rank=rank) | Seen(rank=rank) if rank not in streamed:
                    yield TileFault(f"{type(e).__name__.lower()}({rank}) outside of a loop over {rank!r}", use.node)
                case Start(rank=rank) if rank not in streamed | grid:
                    yield TileFault(f"start({rank}), which is neither a grid rank nor streamed here", use.node)
                case _:
                    pass


def check_tile_types(p: TileProgram) -> Iterator[TileFault]:
    """Operations get operands of types they take, and a loop's conditions are bool."""
    types: dict[str, DType] = {t.name: t.dtype for t in p.inputs}
    types.update((name, dtype) for name, (_, dtype) in kernel_tiles(p.body).items())
    for use in uses(p):
        yield from _type_faults(use, types)
    for node, _, _ in nodes(p):
        for condition in node.conditions if isinstance(node, Loop) else ():
            found, _ = expression_type(condition, types)
            if found != boolean:
                yield TileFault(f"a condition is {found}, expected a bool", name_of(node), "compare: p <= m")


def _type_faults(use: Use, types: Mapping[str, DType]) -> Iterator[TileFault]:
    try:
        expression_type(use.expr, types)
    except CascadeError as error:
        yield TileFault(error.what, use.node, error.hint)
        return
    for node in walk(use.expr):
        yield from (TileFault(f.what, use.node, f.hint) for f in node_types(node, types))


def check_stores(p: TileProgram) -> Iterator[TileFault]:
    """Every output is stored, with a coordinate for each of its ranks; nothing else is."""
    outputs = {o.name: o.ranks for o in p.outputs}
    stored = {n.tensor: n for n, _, _ in nodes(p) if isinstance(n, Store)}
    for name, store in stored.items():
        if name not in outputs:
            yield TileFault(f"{name!r} is no output", name_of(store), nearest(name, outputs))
        elif len(store.coords) != len(outputs[name]):
            yield TileFault(f"{name}[{','.join(outputs[name])}] is stored with {len(store.coords)} coordinates", name_of(store))
    for name in outputs:
        if name not in stored:
            yield TileFault(f"output {name} is never stored")
