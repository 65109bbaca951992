"""The tile program: how a kernel computes, free of any target.

    program  =  TileProgram(name, inputs, outputs, scalars, ranks, grid, resident, body)
    node     =  Map(dst, ranks, expr)                     dst[ranks] = expr
             |  Reduce(dst, ranks, op, over, expr)        dst[ranks] = op(over) expr, within the tile
             |  Scan(dst, ranks, op, over, expr, start)   dst[ranks] = start op (running op along over) expr, within the tile
             |  Dot(dst, ranks, over, a, b, update, post) dst[ranks] = post(sum(over) a * b + update)
             |  Store(tensor, coords, expr)               one element of an output for each point of the tile
             |  Loop(rank, tile, conditions, bounds, states, body)

Tiles have *named ranks*. The tile of a rank is: the grid tile of a grid rank, the loop tile of the stream rank, the whole extent of a
resident rank. A grid rank of tile 1 is no rank of any tile; its index is a number of the task. Expressions read a tile of this
program as `Tile(name)` at the indices of its own ranks, and memory as `Read(tensor, coords)`: an input, or what the same task stored
before; `Index(rank)` is always the global index.

The program is in single-assignment form: every dst is new, and a loop's states take their next values by its `yields`. Values in tiles
are f32 unless declared otherwise. Points outside a rank's extent hold unspecified finite or non-finite garbage; only `Masked`
guards against them, so every reduction over a stream or padded rank goes through one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .cascade import Output, RankDecl, ScalarDecl, Tensor
from .expr import Expr
from .types import DType, f32


@dataclass(frozen=True, slots=True)
class TileOutput:
    """A tensor the kernel writes."""

    output: Output
    dtype: DType

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def ranks(self) -> tuple[str, ...]:
        return self.output.ranks


@dataclass(frozen=True, slots=True)
class GridRank:
    """A rank whose tiles are independent tasks."""

    rank: str
    tile: int


@dataclass(frozen=True, slots=True)
class Map:
    """`dst[ranks] = expr`, point by point."""

    dst: str
    ranks: tuple[str, ...]
    expr: Expr
    dtype: DType = f32
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reduce:
    """`dst[ranks] = op(over) expr` over the whole tile of the ranks `over`. An arg reduction gives the global index, i32."""

    dst: str
    ranks: tuple[str, ...]
    op: str
    over: tuple[str, ...]
    expr: Expr
    dtype: DType = f32
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scan:
    """`dst[ranks] = start op (the running reduction of expr along `over`)`, within the tile, in rising order; `over` is one of `ranks`.

    `start` is what came before the tile: it varies over `ranks` without `over`, and is the identity of `op` if None. An `exclusive` scan
    leaves the element itself out. Of the points that a condition of the loop excludes, only `Masked` keeps the values out of later ones.
    """

    dst: str
    ranks: tuple[str, ...]
    op: str
    over: str
    expr: Expr
    start: Expr | None = None
    exclusive: bool = False
    dtype: DType = f32
    note: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """`dst[ranks] = post(sum(over) a * b + update)`, accumulated in f32 (f64 where dtype is).

    `dtype` is the type to which both operands may be rounded before they are multiplied. In `post` the sum is `Tile(dst)`.
    """

    dst: str
    ranks: tuple[str, ...]
    over: tuple[str, ...]
    a: Expr
    b: Expr
    update: Expr | None = None
    post: Expr | None = None
    dtype: DType = f32
    note: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """`tensor[coords] = expr` for every point of the ranks that `coords` index; points outside an extent are not written."""

    tensor: str
    coords: tuple[Expr, ...]
    expr: Expr
    note: str = ""


@dataclass(frozen=True, slots=True)
class LoopState:
    """A value carried from tile to tile: `init` before the first, `next` (an expression over tiles) after each."""

    name: str
    ranks: tuple[str, ...]
    init: Expr
    next: Expr
    dtype: DType = f32


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where a loop runs, in elements of its rank: [begin, end) holds the domain, [whole_begin, whole_end) lies wholly inside it.

    Each is an expression over constants, `Extent`s and the grid's `Start`s. They need not be ordered or within the extent: an emitter
    clamps begin to 0 and end to the extent, rounds begin and whole_end down and whole_begin and end up to tiles.
    """

    begin: Expr
    whole_begin: Expr
    whole_end: Expr
    end: Expr


@dataclass(frozen=True, slots=True)
class Loop:
    """The stream: `for` every tile of `rank` that meets the domain, in rising order.

    `conditions` are the predicates of the domain beside `rank < extent`; `Masked` refers to all of them together. States keep their
    names in the body (the value before this tile) and after the loop (the final value). In a tile that is not wholly inside the
    domain, coordinates of memory use the stream's index clamped to [max(begin, 0), min(end, extent) - 1], so that what lies outside a
    domain that is the same for the whole task (padding beyond a length, say) is never read.
    """

    rank: str
    tile: int
    conditions: tuple[Expr, ...]
    bounds: Bounds
    states: tuple[LoopState, ...]
    body: tuple[Node, ...]


Node: TypeAlias = Map | Reduce | Scan | Dot | Store | Loop


@dataclass(frozen=True, slots=True)
class TileProgram:
    """A kernel. `ranks` declares the known sizes; every other extent is an argument. `resident` ranks are held whole in a tile."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[TileOutput, ...]
    scalars: tuple[ScalarDecl, ...]
    ranks: tuple[RankDecl, ...]
    grid: tuple[GridRank, ...]
    resident: tuple[str, ...]
    body: tuple[Node, ...]

    def static_size(self, rank: str) -> int | None:
        """The size of a rank if it is a constant."""
        from .expr import Const

        for declaration in self.ranks:
            if declaration.name == rank and isinstance(declaration.size, Const):
                return int(declaration.size.value)
        return None

    def tile_size(self, rank: str, loop: Loop | None = None) -> int:
        """The number of elements of `rank` in a tile. Raises `KeyError` for a rank of no tile."""
        if loop is not None and loop.rank == rank:
            return loop.tile
        for axis in self.grid:
            if axis.rank == rank:
                return axis.tile
        size = self.static_size(rank) if rank in self.resident else None
        if size is None:
            raise KeyError(rank)
        return size

    def __str__(self) -> str:
        from .text import print_program

        return print_program(self)


def kernel_tiles(nodes: tuple[Node, ...]) -> dict[str, tuple[tuple[str, ...], DType]]:
    """Every tile that `nodes` define, with ranks and type, in order; loop states and bodies included."""
    table: dict[str, tuple[tuple[str, ...], DType]] = {}
    for node in nodes:
        match node:
            case Map() | Reduce() | Scan():
                table[node.dst] = (node.ranks, node.dtype)
            case Dot():
                table[node.dst] = (node.ranks, f32)
            case Loop():
                table.update({s.name: (s.ranks, s.dtype) for s in node.states})
                table.update(kernel_tiles(node.body))
            case Store():
                continue
    return table


def body_expressions(nodes: tuple[Node, ...]) -> list[Expr]:
    """Every expression of a body in order, those of loops included, but for the loops' bounds."""
    found: list[Expr | None] = []
    for node in nodes:
        match node:
            case Map() | Reduce():
                found.append(node.expr)
            case Scan():
                found += [node.expr, node.start]
            case Dot():
                found += [node.a, node.b, node.update, node.post]
            case Store():
                found += [*node.coords, node.expr]
            case Loop():
                found += [*node.conditions, *(e for s in node.states for e in (s.init, s.next)), *body_expressions(node.body)]
    return [e for e in found if e is not None]


def nodes_of(body: tuple[Node, ...]) -> Iterator[Node]:
    """Every node, those inside of loops included."""
    for node in body:
        yield node
        if isinstance(node, Loop):
            yield from nodes_of(node.body)
