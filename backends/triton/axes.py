"""The axes of a kernel's tensors: which ranks become an axis, which share one, and which are written out digit by digit.

    axis   =  one or more ranks of tiles, slowest first; a power of two of lanes
    digit  =  a rank of a few elements that never becomes an axis: a value that carries it is one tensor a digit

Ranks share an axis where nothing tells them apart: the same tiles carry both, the same reductions sum over both. So the rows of a
matrix product are one axis, whatever ranks they are made of. Digits are small ranks by whose index bits are shifted, as the halves of
a packed byte are: each half is a tensor of its own, and nothing has to be interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...ir.cascade import Tensor
from ...ir.check_tiles import uses
from ...ir.expr import Expr, Index, Op, children, reads, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Loop, Reduce, Scan, TileOutput, TileProgram, kernel_tiles, nodes_of
from ...schedules.footprint import ceil_power

DIGIT = 4  # elements of a rank that may be written out
CONTRACTED = 16  # lanes of a summed axis that a matrix unit takes at least


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of tensors.

    Args:
        name: of its variables.
        ranks: slowest first.
        sizes: elements of each in a tile.
        lanes: of the axis, a power of two.
    """

    name: str
    ranks: tuple[str, ...]
    sizes: tuple[int, ...]
    lanes: int

    @property
    def size(self) -> int:
        """Elements of a tile along the axis."""
        return prod(self.sizes)

    @property
    def padded(self) -> bool:
        """Whether some lanes hold no element."""
        return self.lanes != self.size


@dataclass(frozen=True, slots=True)
class Axes:
    """All axes in the kernel's order, and the sizes of digits. A rank of neither is a number of the task or of a loop."""

    axes: tuple[Axis, ...]
    digits: tuple[tuple[str, int], ...]

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(axis.name for axis in self.axes)

    def of(self, rank: str) -> Axis | None:
        """The axis that holds `rank`."""
        return next((axis for axis in self.axes if rank in axis.ranks), None)

    def named(self, name: str) -> Axis:
        """The axis of that name."""
        return next(axis for axis in self.axes if axis.name == name)

    def lanes(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.named(name).lanes for name in names)


def axes_of(program: TileProgram) -> Axes:
    """The axes of a program."""
    sizes = tile_sizes(program)
    digits = {rank: n for rank, n in sizes.items() if _is_digit(program, rank, n)}
    ranks = [rank for rank in _ordered(program, sizes) if rank not in digits and sizes[rank] > 1]
    contracted = {rank for node in nodes_of(program.body) if isinstance(node, Dot) for rank in node.over}
    axes: list[Axis] = []
    for group in _grouped(program, ranks, sizes):
        count = tuple(sizes[rank] for rank in group)
        least = CONTRACTED if set(group) & contracted and len(_sharing(program, group, sizes, digits)) == 1 else 2
        name = "".join(group) if all(len(r) == 1 for r in group) else "_".join(group)
        axes.append(Axis(name, group, count, ceil_power(prod(count), least)))
    return Axes(tuple(axes), tuple((rank, n) for rank, n in sizes.items() if n == 1 or rank in digits))


def tile_sizes(program: TileProgram) -> dict[str, int]:
    """Elements of each rank in a tile; a rank that several loops stream has the largest of their tiles."""
    sizes = {axis.rank: axis.tile for axis in program.grid if axis.tile > 1}
    for rank in program.resident:
        sizes[rank] = max(1, program.tile_size(rank))
    for node in nodes_of(program.body):
        if isinstance(node, Loop) and node.tile > 1:
            sizes[node.rank] = max(sizes.get(node.rank, 0), node.tile)
    return sizes


def _is_digit(program: TileProgram, rank: str, size: int) -> bool:
    """A rank of one element, or a small whole one whose index says by how much bits are shifted."""
    if size == 1:
        return True
    return rank in program.resident and size <= DIGIT and any(_shifts_by(use.expr, rank) for use in uses(program))


def _shifts_by(e: Expr, rank: str) -> bool:
    match e:
        case Op(name="shl" | "shr", args=(_, by)) if any(isinstance(n, Index) and n.rank == rank for n in walk(by)):
            return True
        case _:
            return any(_shifts_by(child, rank) for child in children(e))


def _ordered(program: TileProgram, sizes: dict[str, int]) -> list[str]:
    """Grid ranks, whole ranks that nothing streamed carries, streams, and the other whole ranks in the order of memory."""
    streams = [n.rank for n in nodes_of(program.body) if isinstance(n, Loop)]
    carried: set[str] = set()
    rows = _rows(program, streams)
    for use in uses(program):
        for read in reads(use.expr):
            ranks = {rank for c in read.coords for rank in expression_ranks(c)}
            if ranks & set(streams):
                carried |= ranks
    tensors: list[Tensor | TileOutput] = [*program.inputs, *program.outputs]
    memory = [rank for t in tensors for rank in t.ranks]
    place = {rank: i for i, rank in reversed(list(enumerate(memory)))}
    joined = {r for t in tensors for axis in _axes_in_memory(t) if set(axis) & set(streams) for r in axis}
    grid = [axis.rank for axis in program.grid]

    def key(rank: str) -> tuple[int, int]:
        if rank in grid:
            return 0, grid.index(rank)
        if rank in streams:
            return 2, streams.index(rank)
        last = 3 if rank in joined else 4 if rank in carried else 1
        return (1 if rank in rows else last), place.get(rank, len(memory))

    return sorted(sizes, key=key)


def _rows(program: TileProgram, streams: list[str]) -> set[str]:
    """The ranks of a matrix product that only the side without the stream has."""
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    rows: set[str] = set()
    for node in nodes_of(program.body):
        if isinstance(node, Dot):
            a, b = (set(expression_ranks(side, tiles)) for side in (node.a, node.b))
            for own, other in ((a, b), (b, a)):
                if any(rank in other and rank not in own for rank in streams):
                    rows |= own - other - set(node.over)
    return rows


def _axes_in_memory(tensor: Tensor | TileOutput) -> tuple[tuple[str, ...], ...]:
    return tensor.axes if isinstance(tensor, Tensor) else tensor.output.axes


def _grouped(program: TileProgram, ranks: list[str], sizes: dict[str, int]) -> list[tuple[str, ...]]:
    """Runs of ranks that nothing tells apart."""
    marks = {rank: _mark(program, rank) for rank in ranks}
    groups: list[list[str]] = []
    for rank in ranks:
        last = groups[-1][-1] if groups else None
        if last is not None and marks[last] == marks[rank] and not _parted(program, last, rank):
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return [tuple(group) for group in groups]


def _mark(program: TileProgram, rank: str) -> tuple[object, ...]:
    """Where a rank occurs: the tiles that have it and the reductions over it."""
    tiles = frozenset(name for name, (ranks, _) in kernel_tiles(program.body).items() if rank in ranks)
    over: list[bool] = []
    for node in nodes_of(program.body):
        match node:
            case Reduce(over=summed) | Dot(over=summed):
                over.append(rank in summed)
            case Scan(over=scanned):
                over.append(rank == scanned)
            case _:
                pass
    return tiles, tuple(over)


def _parted(program: TileProgram, a: str, b: str) -> bool:
    """Whether memory is read or written along only one of the two where it is contiguous, or a scan or an index needs them apart."""
    for node in nodes_of(program.body):
        if isinstance(node, Scan) and {a, b} & set(node.ranks):
            return True
        if isinstance(node, Reduce) and node.op in ("argmax", "argmin") and {a, b} & set(node.over):
            return True
    accesses = [read.coords for use in uses(program) for read in reads(use.expr)]
    accesses += [node.coords for node in nodes_of(program.body) if hasattr(node, "coords")]
    for coords in accesses:
        last = set(expression_ranks(coords[-1])) if coords else set()
        every = {rank for c in coords for rank in expression_ranks(c)}
        if (a in last) != (b in last) and len(every & {a, b}) == 1:
            return True
    return False


def _sharing(program: TileProgram, group: tuple[str, ...], sizes: dict[str, int], digits: dict[str, int]) -> set[str]:
    """The ranks that some matrix product sums over together with the group, the group itself counted once."""
    found = {group[0]}
    for node in nodes_of(program.body):
        if isinstance(node, Dot) and set(group) & set(node.over):
            found |= {rank for rank in node.over if rank not in group and rank not in digits and sizes.get(rank, 1) > 1}
    return found
