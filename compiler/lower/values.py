"""Turning expressions of the cascade into expressions over tiles, computing inner reductions on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from ...ir.cascade import Cascade, Einsum, Scan, expressions
from ...ir.errors import UnsupportedError
from ...ir.expr import Cast, Const, Expr, Extent, Masked, Op, Read, Tile, children, reads, walk, with_children
from ...ir.infer import expression_ranks, expression_type, stored_types
from ...ir.plan import KernelPlan
from ...ir.tile import Dot, LoopState, Map, Node, Reduce
from ...ir.tile import Scan as ScanTile
from ...ir.types import DType, f32, i32, i64
from .contractions import contraction_type, find_contraction, is_plain

INTEGER_IDENTITY = {"sum": Const(0), "prod": Const(1), "max": Const(-(2**31)), "min": Const(2**31 - 1)}
IDENTITY: dict[str, Const] = {
    "sum": Const(0.0), "prod": Const(1.0), "max": Const(float("-inf")), "min": Const(float("inf")),
    "argmax": Const(float("-inf")), "argmin": Const(float("inf")),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mode:
    """How moving things read at a place: `value` gives a streamed reduction, `tiles` renames origins."""

    value: Callable[[str], Expr]
    tiles: Mapping[str, Expr] = field(default_factory=dict)


@dataclass(slots=True)
class Section:
    """A straight run of nodes: the code outside any loop, or one loop's body.

    `made` finds the tile of what was computed already; `carried` are states that scans bring into a loop.
    """

    nodes: list[Node] = field(default_factory=list)
    carried: list[LoopState] = field(default_factory=list)
    made: dict[object, str] = field(default_factory=dict)


class Values:
    """The expressions of one kernel. `outer` collects what is computed outside loops, `body` (if any) what a loop computes."""

    def __init__(self, cascade: Cascade, kernel: KernelPlan, tile: Mapping[str, int], resident: frozenset[str]) -> None:
        self.cascade = cascade
        self.kernel = kernel
        self.tile = dict(tile)
        self.resident = resident
        self.types = stored_types(cascade)
        self.statements = {s.out: s for s in kernel.statements}
        self.uses = Counter(r.tensor for e in kernel_expressions(kernel) for r in reads(e))
        self.stored: set[str] = set()  # what an earlier loop of the kernel stored, and later ones read
        self.streamed = {r.out for stage in kernel.stages for r in stage.reductions}
        self.outer = Section()
        self.body: Section | None = None
        self.tiles: dict[str, tuple[str, ...]] = {}
        self.tile_types: dict[str, DType] = {}
        self.inside: set[str] = set()

    # names and shapes ------------------------------------------------------------------------------------------------

    def size(self, rank: str) -> int:
        """Elements of a rank in a tile; 1 for a number of the task."""
        return self.tile.get(rank, 1)

    def ranks_of(self, e: Expr) -> tuple[str, ...]:
        """The tile ranks that `e` varies over: those with more than one element in a tile, in the kernel's order."""
        found = set(expression_ranks(e, self.tiles))
        return tuple(r for r in self.tile if r in found)

    def new_name(self, wanted: str) -> str:
        """A tile name that is not in use."""
        clean = wanted.replace(".", "_")
        if clean not in self.tiles:
            return clean
        return next(f"{clean}_{i}" for i in range(1, len(self.tiles) + 2) if f"{clean}_{i}" not in self.tiles)

    def declare(self, name: str, ranks: tuple[str, ...], dtype: DType = f32) -> str:
        """Records a tile."""
        self.tiles[name] = ranks
        self.tile_types[name] = dtype
        if self.body is not None:
            self.inside.add(name)
        return name

    def type_of(self, e: Expr) -> DType:
        """The type in which `e` is held in a tile: f32 for floats, i32 for integers but i64, bool."""
        t, weak = expression_type(e, {**self.types, **self.tile_types})
        if t.is_float:
            return f32
        if t == i64 and not weak:
            return i64
        return t if t.kind == "bool" else i32

    # sections ----------------------------------------------------------------------------------------------------------

    def changes(self, e: Expr) -> bool:
        """Whether `e` changes from tile to tile of the current loop."""
        if self.body is None:
            return False
        if self.kernel.stream in expression_ranks(e, self.tiles):
            return True
        return any(isinstance(n, Tile) and n.name in self.inside for n in walk(e))

    def section_for(self, e: Expr) -> Section:
        """Where `e` is to be computed."""
        return self.body if self.body is not None and self.changes(e) else self.outer

    def materialize(self, e: Expr, name: str, note: str = "") -> Tile:
        """`e` as a tile, computed once a section."""
        if isinstance(e, Tile):
            return e
        section = self.section_for(e)
        if e not in section.made:
            dst = self.new_name(name)
            ranks, dtype = self.ranks_of(e), self.type_of(e)
            self._declare_in(section, dst, ranks, dtype)
            section.nodes.append(Map(dst, ranks, e, dtype, note))
            section.made[e] = dst
        return Tile(section.made[e])

    def _declare_in(self, section: Section, name: str, ranks: tuple[str, ...], dtype: DType = f32) -> None:
        self.declare(name, ranks, dtype)
        if section is self.outer:
            self.inside.discard(name)

    # conversion ------------------------------------------------------------------------------------------------------------

    def convert(self, e: Expr, mode: Mode) -> Expr:
        """`e` with intermediates replaced by tiles, streamed reductions by their values in `mode`."""
        match e:
            case Read(tensor=tensor) if tensor in self.statements and tensor not in self.stored:
                s = self.statements[tensor]
                if isinstance(s, Scan):
                    return self.scan(s, mode)
                if s.op is None:
                    value = self.convert(self.masked_map(s), mode)
                    return self.materialize(value, tensor, tensor) if self.uses[tensor] > 1 and is_large(value) else value
                return self.inner(s, mode)
            case Read(tensor=tensor) if tensor in self.streamed:
                return mode.value(tensor)
            case Tile(name=name):
                return mode.tiles.get(name, e)
            case _:
                return with_children(e, tuple(self.convert(child, mode) for child in children(e)))

    def masked_map(self, s: Einsum) -> Expr:
        """A map's expression; 0 where its predicate is false."""
        return s.expr if s.where is None else Op("where", (s.where, s.expr, Const(0.0)))

    def inner(self, s: Einsum, mode: Mode) -> Tile:
        """The tile of a reduction that is done within a tile."""
        summand = self.convert(s.expr, mode)
        where = None if s.where is None else self.convert(s.where, mode)
        key = (s.op, s.over, summand, where)
        probe = summand if where is None else Op("and", (where, summand))
        section = self.section_for(probe)
        if key in section.made:
            return Tile(section.made[key])
        over = tuple(r for r in s.over if r in self.tile)
        result = tuple(r for r in self.ranks_of(probe) if r not in s.over)
        contraction = None
        held = set(self.ranks_of(summand)) - set(s.over)
        apart = where is None or set(self.ranks_of(where)) <= held  # then it may be asked of the sum
        if s.op == "sum" and apart and summand_is_float(self.types[s.out]):
            contraction = find_contraction(summand, result, over, self.tiles, self.size)
        if where is not None and contraction is None:
            summand = Op("where", (where, summand, IDENTITY[s.op or "sum"]))
        missing = tuple(r for r in s.over if r not in expression_ranks(summand, self.tiles))
        dst = self.new_name(s.out)
        dtype = self.type_of(Read(s.out, ()))
        if contraction is not None:
            post = None if where is None else Op("where", (where, Tile(dst), Const(0.0)))
            self._dot(section, dst, result, over, contraction.left, contraction.right, s, post)
        else:
            for rank in missing if s.op in ("sum", "prod") else ():
                repeat = "mul" if s.op == "sum" else "pow"
                summand = Op(repeat, (summand, Extent(rank)))
            kept = tuple(r for r in over if r not in missing)
            self._declare_in(section, dst, result, dtype)
            if kept:
                section.nodes.append(Reduce(dst, result, s.op or "sum", kept, summand, dtype, note=s.out))
            else:
                section.nodes.append(Map(dst, result, summand, dtype, note=s.out))
        section.made[key] = dst
        return Tile(dst)

    def scan(self, s: Scan, mode: Mode) -> Tile:
        """The tile of a scan along the stream. What it has run up to is carried from tile to tile."""
        assert self.body is not None
        identity = IDENTITY[s.op]
        expr = self.convert(s.expr, mode)
        if s.where is not None:
            expr = Op("where", (self.convert(s.where, mode), expr, identity))
        key = ("scan", s.op, s.exclusive, expr)
        if key not in self.body.made:
            masked = Masked(expr, identity)
            ranks = tuple(r for r in self.tile if r in {*self.ranks_of(expr), s.over})
            rest = tuple(r for r in ranks if r != s.over)
            dtype = self.type_of(Read(s.out, ()))
            carry = self.declare(self.new_name(f"{s.out}_before"), rest, dtype)
            total = self.declare(self.new_name(f"{s.out}_tile"), rest, dtype)
            dst = self.declare(self.new_name(s.out), ranks, dtype)
            self.body.nodes.append(ScanTile(dst, ranks, s.op, s.over, masked, Tile(carry), s.exclusive, dtype, note=s.out))
            self.body.nodes.append(Reduce(total, rest, s.op, (s.over,), masked, dtype, note=s.out))
            joined = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[s.op]
            start = identity if dtype == f32 else INTEGER_IDENTITY[s.op]
            self.body.carried.append(LoopState(carry, rest, start, Op(joined, (Tile(carry), Tile(total))), dtype))
            self.body.made[key] = dst
        return Tile(self.body.made[key])

    def _dot(
        self, section: Section, dst: str, ranks: tuple[str, ...], over: tuple[str, ...], a: Expr, b: Expr, s: Einsum, post: Expr | None
    ) -> None:
        left = self.operand(a, f"{dst}_lhs", section)
        right = self.operand(b, f"{dst}_rhs", section)
        self._declare_in(section, dst, ranks)
        dtype = contraction_type(s.expr, self.input_types())
        section.nodes.append(Dot(dst, ranks, over, left, right, post=post, dtype=dtype, note=s.out))

    def operand(self, e: Expr, name: str, section: Section) -> Expr:
        """A side of a contraction as a tile or a read. What does not change in a loop is packed before it."""
        if isinstance(e, Read) and section is self.body and not self.changes(e):
            return self.materialize(e, e.tensor.lower() if e.tensor.lower() not in self.cascade.all_ranks() else name)
        return e if is_plain(e) else self.materialize(e, name)

    def input_types(self) -> dict[str, DType]:
        """The types of the tensors in memory that this kernel reads."""
        return {name: self.types[name] for name in self.kernel.inputs}

    def unsupported(self, what: str, statement: str) -> UnsupportedError:
        """An error at a statement of the cascade."""
        location = next((s.location for s in self.cascade.body if getattr(s, "out", None) == statement), None)
        return UnsupportedError(what, cascade=self.cascade.name, statement=statement, location=location)


LARGE = 64


def is_large(e: Expr) -> bool:
    """Whether writing `e` out wherever it is read would make expressions grow without end."""
    return sum(1 for _ in islice(walk(e), LARGE + 1)) > LARGE


def kernel_expressions(kernel: KernelPlan) -> Iterator[Expr]:
    """The expressions of a kernel's statements and summands."""
    for s in kernel.statements:
        yield from expressions(s)
    for stage in kernel.stages:
        for r in stage.reductions:
            yield from expressions(r)


def summand_is_float(t: DType) -> bool:
    """Whether a sum of this declared type may be a matrix product on the float units."""
    return t.is_float and t.bits <= 32


def is_number_of_task(e: Expr, tiles: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether `e` is one number for the whole task, cheap to have at hand."""
    return not expression_ranks(e, tiles) and not any(isinstance(n, (Read, Tile, Cast)) for n in walk(e))


