"""What an emitter knows of the kernel it writes: scopes, ranks, extents, indices, and which lanes hold an element.

A scope is the task or a loop's body. What does not change in a loop is defined before it, however deep the expression that asks for
it stands: every definition goes to the outermost scope it can live in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Literal

from ...ir.errors import ScheduleError, UnsupportedError
from ...ir.expr import Const, Count, Expr, Extent, Index, Op, Read, Seen, Start, Tile, walk
from ...ir.tile import Loop, TileProgram
from ...ir.types import DType
from ...schedules.schedule import KernelOptions
from . import script as ts
from .arithmetic import Arithmetic
from .axes import Axes, Axis
from .script import Assign, Names, Statement, Value
from .signature import Parameter

MOST_LANES = 1 << 20  # of a tensor in Triton
SHORT = 40  # characters of an expression that may stand twice
Edge = Literal["never", "some", "always"]


@dataclass(slots=True)
class Scope:
    """The task, or the body of a loop.

    Args:
        lines: the statements so far.
        made: values by what they stand for, defined here once.
        tiles: tiles that are new in every pass of the loop.
        loop: the loop, its first index in this pass, and whether its tiles reach over the domain: never, in some passes (then the
            constant `edge` says so), or always.
        low, high: the least index that may be read and the one that ends it; None where that is 0 and the extent.
    """

    lines: list[Statement] = field(default_factory=list)
    made: dict[object, Value] = field(default_factory=dict)
    tiles: set[str] = field(default_factory=set)
    loop: Loop | None = None
    start: Value | None = None
    edge: Edge = "never"
    low: Value | None = None
    high: Value | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """Which lanes hold an element: `always` in every pass, `edge` only where a loop's tile reaches over its domain."""

    always: tuple[Value, ...] = ()
    edge: tuple[Value, ...] = ()
    certain: bool = False  # whether every pass is one over the edge

    def joined(self, other: Mask) -> Mask:
        return Mask((*self.always, *other.always), (*self.edge, *other.edge), self.certain or other.certain)


Digits = Mapping[str, int]


class Kernel(Arithmetic):
    """The state of one emission; see the module."""

    def __init__(self, program: TileProgram, axes: Axes, options: KernelOptions) -> None:
        super().__init__(axes.order)
        self.program = program
        self.axes = axes
        self.options = options
        self.digit_sizes = dict(axes.digits)
        self.scopes = [Scope()]
        self.starts: dict[str, Value] = {}
        self.tiles: dict[tuple[str, tuple[int, ...]], Value] = {}
        self.tile_ranks: dict[str, tuple[str, ...]] = {}
        self.tile_types: dict[str, DType] = {}
        self.grid = {axis.rank: axis.tile for axis in program.grid}
        self.names = Names("tl", "triton", "edge", "bounds", "task", "tasks")
        self.parameters: list[Parameter] = []
        self.extents: dict[str, Value] = {}

    # -- scopes --------------------------------------------------------------------------------------------------------------------

    @property
    def here(self) -> Scope:
        return self.scopes[-1]

    def scope_of(self, e: Expr) -> Scope:
        """The outermost scope in which `e` has the value it has here."""
        for scope in reversed(self.scopes[1:]):
            rank = scope.loop.rank if scope.loop is not None else ""
            for node in walk(e):
                match node:
                    case Index(rank=found) | Start(rank=found) | Count(rank=found) | Seen(rank=found) if found == rank:
                        return scope
                    case Tile(name=name) if name in scope.tiles:
                        return scope
                    case _:
                        pass
        return self.scopes[0]

    def scope_of_ranks(self, ranks: tuple[str, ...]) -> Scope:
        """The innermost scope whose loop streams one of `ranks`."""
        return next((s for s in reversed(self.scopes[1:]) if s.loop is not None and s.loop.rank in ranks), self.scopes[0])

    def deeper(self, a: Scope, b: Scope) -> Scope:
        """The inner one of two scopes."""
        return next(s for s in reversed(self.scopes) if s is a or s is b)

    def check_lanes(self, axes: tuple[str, ...]) -> None:
        """Raise `ScheduleError` for a tensor of more lanes than Triton has."""
        lanes = prod(self.axes.lanes(axes))
        if lanes > MOST_LANES:
            ranks = ", ".join(rank for name in axes for rank in self.axes.named(name).ranks)
            place = f"{self.statement} of kernel {self.program.name}"
            what = f"{place} is a tile of {lanes} elements over {ranks}, and Triton has {MOST_LANES} at most"
            raise ScheduleError(what, hint=f"smaller tiles of {ranks}")

    def define(self, wanted: str, v: Value, scope: Scope, key: object = None) -> Value:
        """`v` under a name in a scope; under `key` only once."""
        if key is not None:
            for outer in self.scopes:
                if key in outer.made:
                    return outer.made[key]
        if v.number is not None or v.text.isidentifier():
            named = v
        else:
            self.check_lanes(v.axes)
            name = self.names.fresh(wanted)
            scope.lines.append(Assign(name, v.text))
            named = replace(v, text=name, binding=ts.ATOM)
        if key is not None:
            scope.made[key] = named
        return named

    # -- ranks ---------------------------------------------------------------------------------------------------------------------

    def combinations(self, ranks: tuple[str, ...]) -> list[dict[str, int]]:
        """The digits of every tensor that a value over `ranks` consists of."""
        written = [rank for rank in ranks if rank in self.digit_sizes]
        return [dict(zip(written, place, strict=True)) for place in product(*(range(self.digit_sizes[rank]) for rank in written))]

    def axes_over(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        """The axes of a tensor over `ranks`."""
        return tuple(axis.name for axis in self.axes.axes if set(axis.ranks) & set(ranks))

    def shape(self, axes: tuple[str, ...]) -> list[str]:
        """The lanes of axes as their constants are spelled."""
        return [f"B_{axis}" for axis in axes]

    def extent(self, rank: str) -> Value:
        """The extent of a rank."""
        if rank not in self.extents:
            raise UnsupportedError(f"the extent of rank {rank!r} is not known to the kernel", statement=self.statement)
        return self.extents[rank]

    def scope_of_rank(self, rank: str) -> Scope | None:
        """The scope of the loop over `rank`, if there is one."""
        return next((s for s in reversed(self.scopes) if s.loop is not None and s.loop.rank == rank), None)

    def start(self, rank: str) -> Value:
        """The first index along `rank` in this task and pass."""
        scope = self.scope_of_rank(rank)
        if scope is not None and scope.start is not None:
            return scope.start
        return self.starts.get(rank, ts.constant(0))

    def tile_of(self, rank: str) -> int:
        """Elements along `rank` in a tile."""
        scope = self.scope_of_rank(rank)
        return scope.loop.tile if scope is not None and scope.loop is not None else self.program.tile_size(rank)

    def lane(self, axis: Axis) -> Value:
        """The numbers of an axis' lanes."""
        v = Value(f"tl.arange(0, B_{axis.name})", axes=(axis.name,))
        return self.define(f"a_{axis.name}", v, self.scopes[0], ("lane", axis.name))

    def local(self, rank: str, digits: Digits) -> Value:
        """The index along `rank` within the tile."""
        if rank in digits:
            return ts.constant(digits[rank])
        axis = self.axes.of(rank)
        if axis is None:
            return ts.constant(0)
        lane = self.lane(axis)
        if len(axis.ranks) == 1:
            return lane
        place = axis.ranks.index(rank)
        below = 1
        for size in axis.sizes[place + 1 :]:
            below *= size
        v = lane if below == 1 else self.infix("//", lane, ts.constant(below))
        if place:
            v = self.infix("%", v, ts.constant(axis.sizes[place]))
        return self.define(f"l_{rank}", v, self.scopes[0], ("local", rank))

    def index(self, rank: str, digits: Digits) -> Value:
        """The index along `rank`: a number of the task or loop, or one a lane."""
        start = self.start(rank)
        v = ts.add(start, self.local(rank, digits), self.order)
        if not v.axes or start.number == 0:
            return v
        return self.define(f"i_{rank}", v, self.scope_of_ranks((rank,)), ("index", rank))

    # -- lanes that hold an element ------------------------------------------------------------------------------------------------

    def holds(self, axes: tuple[str, ...]) -> Mask:
        """Which lanes of a tensor lie within the tile, the extents and the bounds of the loops."""
        mask = Mask()
        for name in axes:
            mask = mask.joined(self._axis_holds(self.axes.named(name)))
        return mask

    def _axis_holds(self, axis: Axis) -> Mask:
        always: list[Value] = []
        edge: list[Value] = []
        certain = False
        for rank in axis.ranks:
            scope = self.scope_of_rank(rank)
            if scope is not None:
                if scope.edge != "never":
                    edge += self._within(rank, scope)
                    certain |= scope.edge == "always"
            elif rank in self.grid and not self._fits(rank):
                always.append(self.infix("<", self.index(rank, {}), self.extent(rank)))
        size = axis.size if len(axis.ranks) > 1 else self.tile_of(axis.ranks[0])
        if axis.lanes != size:
            always.append(self.infix("<", self.lane(axis), ts.constant(size)))
        return Mask(tuple(always), tuple(edge), certain)

    def _within(self, rank: str, scope: Scope) -> list[Value]:
        index = self.index(rank, {})
        tests = [] if scope.low is None else [self.infix(">=", index, scope.low)]
        return [*tests, self.infix("<", index, scope.high if scope.high is not None else self.extent(rank))]

    def _fits(self, rank: str) -> bool:
        size = self.program.static_size(rank)
        return size is not None and size % self.grid[rank] == 0

    def chosen(self, mask: Mask, v: Value, otherwise: Value) -> Value:
        """`v` in lanes that the mask names, else `otherwise`."""
        always, edge = self.all_of(mask.always), self.all_of(mask.edge)
        other = self.held(otherwise, v.type)
        if mask.certain:
            always, edge = self.all_of([*mask.always, *mask.edge]), None
        if always is not None:
            v = replace(self.select(always, v, other), clean=v.clean)
        if edge is None:
            return v
        if not v.text.isidentifier() and len(v.text) > SHORT:
            v = self.define(f"{self.statement}_all", v, self.here)
        chosen = self.select(edge, v, other)
        plain = self.expanded(v, chosen.axes, self.shape(chosen.axes))
        return replace(chosen, text=f"{chosen.text} if edge else {plain.text}", binding=ts.OTHER)

    def mask_text(self, mask: Mask, axes: tuple[str, ...]) -> tuple[str | None, bool]:
        """The `mask=` of a load or store over `axes`, and whether it is there in every pass."""
        always, edge = self.all_of(mask.always), self.all_of(mask.edge)
        if mask.certain or (edge is None):
            both = self.all_of([*mask.always, *mask.edge])
            return (None if both is None else both.over(axes)), True
        if always is None:
            return f"{edge.over(axes)} if edge else None", False
        both = self.infix("&", always, edge)
        return f"{both.over(axes)} if edge else {always.over(axes)}", True

    # -- whether an index is known to be inside ------------------------------------------------------------------------------------

    def is_natural(self, e: Expr) -> bool:
        """Whether a whole number is certainly not negative."""
        match e:
            case Index() | Extent() | Start() | Count() | Seen():
                return True
            case Const(value=value):
                return not isinstance(value, float) and value >= 0
            case Op(name="add" | "mul" | "floordiv" | "mod" | "minimum" | "maximum" | "shr", args=(a, b)):
                return self.is_natural(a) and self.is_natural(b)
            case _:
                return False


def reads_memory(e: Expr) -> bool:
    """Whether a coordinate is itself read from memory."""
    return any(isinstance(node, Read) for node in walk(e))

