"""Expressions of a tile program at a point, or at a vector of points along one rank, as values of the target language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...ir.errors import UnsupportedError
from ...ir.expr import (
    Bitcast,
    Cast,
    Const,
    Count,
    Expr,
    Extent,
    Index,
    Masked,
    Op,
    Read,
    Scalar,
    Seen,
    Start,
    Tile,
    walk,
)  # fmt: skip
from ...ir.infer import expression_ranks, expression_type
from ...ir.tile import Loop
from ...ir.types import DType, i4, i32, i64
from . import script as ts
from .arithmetic import Arithmetic, compute_type
from .cpu import Cpu
from .memory import Array, Memory
from .script import Alloc, For, Names, Set, Statement, Value
from .tiles import TileBuffer

CODE_TYPES = {16: "int16", 8: "int8", 4: "int8"}
INDEX_OPERATIONS = {
    "add": ts.add, "sub": ts.sub, "mul": ts.mul, "floordiv": ts.floor_div, "mod": ts.floor_mod, "minimum": ts.smaller, "maximum": ts.larger,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Active:
    """A loop being emitted: its first index in this tile, and in an edge body more.

    Args:
        valid: how many elements are to be computed; None in a tile wholly inside the domain.
        span: `valid` rounded up to what every statement of the body covers, so that none reads what another did not write.
        low: the least index that may be read, None where that is 0.
        high: the index that ends what may be read.
    """

    loop: Loop
    start: Value
    valid: Value | None = None
    span: Value | None = None
    low: Value | None = None
    high: Value | None = None

    @property
    def edge(self) -> bool:
        return self.valid is not None


@dataclass(frozen=True, slots=True)
class Point:
    """Where an expression is evaluated.

    Args:
        local: the index within the tile of every rank of the point; along `lane` that of the first element.
        lane: the rank along the vector of `lanes` elements.
        loops: the enclosing loops, outermost first.
        values: tiles at hand as values.
        exact: ranks whose index is known to lie within the extent.
    """

    local: Mapping[str, Value]
    lane: str | None = None
    lanes: int = 1
    loops: tuple[Active, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()

    def with_values(self, **values: Value) -> Point:
        return replace(self, values={**self.values, **values})


@dataclass(frozen=True, slots=True)
class RankPlace:
    """A rank of the kernel: first index of the task's tile, size of the tile and of its padding, and whether tiles always fit."""

    start: Value
    size: int
    padded: int
    fits: bool


class Evaluator(Arithmetic):
    """Turns expressions into values for one kernel."""

    def __init__(
        self,
        cpu: Cpu,
        names: Names,
        memory: Memory,
        tiles: Mapping[str, TileBuffer],
        tile_types: Mapping[str, DType],
        tile_ranks: Mapping[str, tuple[str, ...]],
        places: Mapping[str, RankPlace],
        starts: Mapping[str, Value],
    ) -> None:
        super().__init__(cpu, names)
        self.memory = memory
        self.tiles = tiles
        self.tile_types = tile_types
        self.tile_ranks = tile_ranks
        self.places = places
        self.starts = starts
        self.four_bits = i4 in (*(a.dtype for a in memory.arrays.values()), *tile_types.values())

    # -- ranks ------------------------------------------------------------------------------------------------------------------

    def active(self, rank: str, at: Point) -> Active | None:
        return next((a for a in reversed(at.loops) if a.loop.rank == rank), None)

    def index(self, rank: str, at: Point) -> Value:
        """The global index along `rank`, of the first element where it is the lane."""
        loop = self.active(rank, at)
        local = at.local.get(rank)
        if loop is not None:
            return loop.start if local is None else ts.add(loop.start, local)
        if rank in self.places and local is not None:
            return ts.add(self.places[rank].start, local)
        if rank in self.starts:
            return self.starts[rank]
        if local is not None:
            return local
        raise UnsupportedError(f"the index of rank {rank!r} is not known here", statement=self.statement)

    def bounded(self, rank: str, at: Point) -> Value:
        """The index along `rank` as memory may be read at: clamped where it may leave the extent, or a loop's bounds."""
        v = self.index(rank, at)
        loop = self.active(rank, at)
        if loop is not None and loop.low is not None and rank in at.local and rank != at.lane:
            v = ts.larger(v, loop.low)
        if self.ragged(rank, at):
            limit = loop.high if loop is not None and loop.high is not None else self.memory.extent(rank)
            v = ts.smaller(v, ts.sub(limit, ts.integer(1)))
        return v

    def ragged(self, rank: str, at: Point) -> bool:
        """Whether the index along `rank` may lie beyond the extent."""
        if rank in at.exact or rank not in at.local:
            return False
        loop = self.active(rank, at)
        if loop is not None:
            return loop.edge or self.places[rank].padded != loop.loop.tile
        place = self.places.get(rank)
        return place is None or not place.fits or (place.padded != place.size and rank == at.lane) or place.padded != place.size

    def size(self, rank: str, at: Point) -> int:
        loop = self.active(rank, at)
        return loop.loop.tile if loop is not None else self.places[rank].size

    def uses_lane(self, e: Expr, at: Point) -> bool:
        return at.lanes > 1 and at.lane in expression_ranks(e, self.tile_ranks)

    def value(self, e: Expr, at: Point, out: list[Statement]) -> Value:
        """`e` at the point: a vector if it varies along the lane, else a scalar. May add statements to `out`."""
        v = self._value(e, at, out)
        return replace(v, data=True) if isinstance(e, (Tile, Read, Cast, Bitcast)) and not v.data else v

    def _value(self, e: Expr, at: Point, out: list[Statement]) -> Value:
        match e:
            case Const(value=number):
                if isinstance(number, bool):
                    return ts.constant(number, "bool", weak=True)
                whole = "int32" if abs(number) < 1 << 31 else "int64"
                return ts.constant(number, whole if isinstance(number, int) else "float32", weak=True)
            case Scalar(name=scalar):
                return replace(self.memory.scalars[scalar], weak=True)
            case Extent(rank=rank):
                return ts.narrow(self.memory.extent(rank))
            case Start(rank=rank):
                return ts.narrow(self._start(rank, at))
            case Count(rank=rank):
                return self._count(rank, at)
            case Seen(rank=rank):
                return ts.add(ts.narrow(self._start(rank, at)), self._count(rank, at))
            case Index(rank=rank):
                base = ts.narrow(self.index(rank, at))
                return ts.ramp(base, at.lanes) if rank == at.lane and at.lanes > 1 else base
            case Tile(name=name):
                return self._tile(name, at, out)
            case Masked(x=x, identity=identity):
                return self._masked(x, identity, at, out)
            case Read():
                return self._read(e, at, out)
            case Cast(x=x, dtype=dtype):
                self.four_bits |= dtype == i4
                return self.rounded(self.value(x, at, out), dtype)
            case Bitcast(x=x, dtype=dtype):
                return self._bits(x, dtype, at, out)
            case Op(name=name, args=args):
                return self._applied(e, name, [self.value(a, at, out) for a in args])
        raise AssertionError(f"not an expression: {e!r}")

    def _applied(self, e: Op, name: str, args: list[Value]) -> Value:
        """An operation; four-bit integers, which are computed in eight, wrap around."""
        if not self.four_bits:
            return self.operation(name, args)
        if name in ("popcount", "clz") and self.type_of(e.args[0]).bits == 4:
            low = self.operation("and", [self.cast(args[0], "int32"), ts.constant(15, "int32")])
            counted = self.operation(name, [low])
            return self.operation("sub", [counted, ts.constant(28, "int32")]) if name == "clz" else counted
        result = self.operation(name, args)
        return self.rounded(result, i4) if self.type_of(e) == i4 and result.number is None else result

    def _start(self, rank: str, at: Point) -> Value:
        loop = self.active(rank, at)
        if loop is not None:
            return loop.start
        return self.places[rank].start if rank in self.places else self.starts[rank]

    def _count(self, rank: str, at: Point) -> Value:
        loop = self.active(rank, at)
        size = loop.loop.tile if loop is not None else self.places[rank].size
        if loop is not None and not loop.edge:
            return ts.integer(size)
        return ts.narrow(ts.smaller(ts.integer(size), ts.sub(self.memory.extent(rank), self._start(rank, at))))

    def _tile(self, name: str, at: Point, out: list[Statement]) -> Value:
        if name in at.values:
            return at.values[name]
        buffer = self.tiles[name]
        compute = compute_type(self.tile_types[name])
        vector = at.lanes > 1 and at.lane in buffer.ranks
        if buffer.paired is not None:
            return self._half(buffer, at, vector, out)
        if vector and not buffer.contiguous(str(at.lane), at.lanes):
            return self._lanewise(Tile(name), at, compute, out)
        v = buffer.at(at.local, at.lane, at.lanes) if vector else buffer.at(at.local)
        return self.cast(v, "bool") if compute == "bool" else v

    def _half(self, buffer: TileBuffer, at: Point, vector: bool, out: list[Statement]) -> Value:
        """One element of a pair as f32."""
        local = at.local[str(buffer.paired)]
        both = buffer.at(at.local, at.lane, at.lanes) if vector else buffer.at(at.local)
        odd = ts.remainder(local, ts.integer(2))
        low = Value(f"T.shift_left({both.text}, {ts.broadcast(ts.integer(16), both.lanes).text})", "int32", both.lanes)
        mask = ts.broadcast(Value("T.int32(-65536)", "int32"), both.lanes)
        high = Value(f"T.bitwise_and({both.text}, {mask.text})", "int32", both.lanes)
        chosen = high if odd.number == 1 else low
        if odd.number is None:
            test = ts.broadcast(Value(f"{odd.text} == 0", "bool", binding=ts.OTHER), both.lanes)
            chosen = Value(f"T.Select({test.text}, {low.text}, {high.text})", "int32", both.lanes)
        type_name = Value("", "float32", both.lanes).type_name
        return Value(f'T.reinterpret("{type_name}", {chosen.text})', "float32", both.lanes)

    def _lanewise(self, e: Expr, at: Point, dtype: str, out: list[Statement], *, raw: bool = False) -> Value:
        """`e` computed lane by lane into a vector; `raw` as the codes in memory."""
        variable, lane = self.names.fresh("g"), self.names.fresh("l")
        stored = "int8" if dtype == "bool" else dtype
        body: list[Statement] = []
        inner = self.at_lane(at, lane, (e,), out)
        value = self._read(e, inner, body, raw=True) if raw and isinstance(e, Read) else self.value(e, inner, body)
        result = self.cast(value, stored)
        out.append(Alloc(variable, (at.lanes,), stored))
        out.append(For(lane, ts.integer(0), ts.integer(at.lanes), "T.unroll", [*body, Set(Value(f"{variable}[{lane}]", stored), result)]))
        vector = Value(f"{variable}[T.ramp(0, 1, {at.lanes})]", stored, at.lanes)
        return self.cast(vector, "bool") if dtype == "bool" else vector

    def at_lane(self, at: Point, variable: str, exprs: tuple[Expr, ...], out: list[Statement]) -> Point:
        """The point of one lane; vectors at hand that `exprs` use are spilled, so that one lane of them can be read."""
        lane = str(at.lane)
        used = {n.name for e in exprs for n in walk(e) if isinstance(n, Tile)}
        values = {}
        for name, v in at.values.items():
            if v.lanes == 1:
                values[name] = v
            elif name in used:
                stored = self.cast(v, "int8") if v.dtype == "bool" else v
                spill = self.names.fresh("g", name)
                out.append(Alloc(spill, (v.lanes,), stored.dtype))
                out.append(Set(Value(f"{spill}[T.ramp(0, 1, {v.lanes})]", stored.dtype, v.lanes), stored))
                values[name] = self.cast(Value(f"{spill}[{variable}]", stored.dtype), v.dtype)
        local = {**at.local, lane: ts.add(at.local[lane], ts.name(variable))}
        return replace(at, local=local, lane=None, lanes=1, values=values)

    def condition(self, at: Point, out: list[Statement]) -> Value | None:
        """Whether the point lies in the domains of the loops around it; None where that is certain."""
        tests: list[Value] = []
        for active in at.loops:
            rank = active.loop.rank
            if not active.edge:
                continue
            if rank in at.local and rank not in at.exact:
                tests.append(self.compare("<", self.value(Index(rank), at, out), ts.narrow(self.memory.extent(rank))))
            tests += [self.value(c, at, out) for c in active.loop.conditions]
        return self.all_of(tests)

    def _masked(self, x: Expr, identity: Const, at: Point, out: list[Statement]) -> Value:
        v = self.value(x, at, out)
        condition = self.condition(at, out)
        if condition is None:
            return v
        chosen = self.select(condition, v, self.cast(self.value(identity, at, out), v.dtype))
        return replace(chosen, data=v.data)

    # -- memory -----------------------------------------------------------------------------------------------------------------

    def _read(self, e: Read, at: Point, out: list[Statement], *, raw: bool = False) -> Value:
        """An element or a vector of memory; `raw` gives the codes of a narrow float."""
        array = self.memory.arrays[e.tensor]
        compute = CODE_TYPES[array.dtype.bits] if raw else compute_type(array.dtype)
        narrow = array.dtype.is_float and array.dtype.bits < 32
        if any(self.uses_lane(c, at) for c in e.coords):
            if e.fill is None and self.is_vector(e, array, at):
                return self._vector_read(e, array, at, out, compute)
            if narrow and not raw and e.fill is None:  # gathered as codes, then converted at once
                codes = self._lanewise(e, at, CODE_TYPES[array.dtype.bits], out, raw=True)
                return self.helper(f"from_bits_{array.dtype.name}", codes, dtype=compute)
            return self._lanewise(e, at, compute, out, raw=raw)
        coords, inside = self._coordinates(e, array, at, out)
        index = tuple(array.axis_index(i, coords, self.memory.extents) for i in range(len(array.axes)))
        v = array.element(index)
        if raw or (narrow and array.dtype.bits < 16):
            v = self.helper(f"load_{compute if raw else array.dtype.name}", Value(f"T.address_of({v.text})", "handle"), dtype=compute)
        elif array.memory_type not in (compute, "bool"):
            v = Value(_converted(v.text, array.memory_type, compute), compute)
        if inside is None or e.fill is None:
            return v
        return self.select(inside, v, self.cast(self.value(e.fill, at, out), compute))

    def element(self, e: Read, at: Point, out: list[Statement]) -> Value:
        """The memory of one element."""
        array = self.memory.arrays[e.tensor]
        coords, _ = self._coordinates(e, array, at, out)
        return array.element(tuple(array.axis_index(i, coords, self.memory.extents) for i in range(len(array.axes))))

    def is_vector(self, e: Read, array: Array, at: Point) -> bool:
        """Whether the lanes read adjacent elements: only the last coordinate moves with the lane, by one."""
        if not array.unit or any(self.uses_lane(c, at) for c in e.coords[:-1]):
            return False
        return self.stride(e.coords[-1], at) == 1

    def stride(self, e: Expr, at: Point) -> int | None:
        """By how much an index expression grows from lane to lane; None if not by a constant."""
        match e:
            case Index(rank=rank):
                return int(rank == at.lane)
            case Op(name="add" | "sub" as name, args=(a, b)):
                x, y = self.stride(a, at), self.stride(b, at)
                if x is None or y is None:
                    return None
                return x + y if name == "add" else x - y
            case Op(name="mul", args=(a, b)):
                for factor, other in ((a, b), (b, a)):
                    if isinstance(factor, Const) and self.stride(other, at) is not None:
                        return int(factor.value) * int(self.stride(other, at) or 0)
                return None if self.uses_lane(e, at) else 0
            case _:
                return None if self.uses_lane(e, at) else 0

    def _coordinates(self, e: Read, array: Array, at: Point, out: list[Statement]) -> tuple[tuple[Value, ...], Value | None]:
        """Coordinates clamped to the tensor wherever they might leave it, and with a fill the test whether they are inside."""
        tests: list[Value] = []
        coords = [self._clamped(c, rank, at, e.fill, tests, out) for c, rank in zip(e.coords, array.ranks, strict=True)]
        return tuple(coords), self.all_of(tests)

    def within(self, c: Expr, rank: str, at: Point) -> tuple[bool, bool]:
        """Whether a coordinate is certainly 0 or more, and certainly below the extent of `rank`."""
        return self.memory.reach.within(c, rank, frozenset(r for r in expression_ranks(c, self.tile_ranks) if self.ragged(r, at)))

    def _clamped(self, c: Expr, rank: str, at: Point, fill: Const | None, tests: list[Value], out: list[Statement]) -> Value:
        """A coordinate clamped at the ends of `rank` that it might leave; with a fill, tests whether it keeps within them are added."""
        if isinstance(c, Index):
            v = self.bounded(c.rank, at)
            if c.rank == rank:
                return v
            low, high = self.memory.reach.within(c, rank, frozenset())  # bounded by the extent of its own rank it is already
        else:
            v = self.coordinate(c, at, out)
            low, high = self.within(c, rank, at)
        index, extent = ts.wrapped(v, ts.SUM), self.memory.extent(rank)
        if not high:
            v = ts.smaller(v, ts.sub(extent, ts.integer(1)))
        if not low:
            v = ts.larger(v, ts.integer(0))
        if fill is not None:
            ends = [(f"{index} < {extent.text}", high), (f"{index} >= 0", low)]
            tests += [Value(test, "bool", binding=ts.OTHER) for test, certain in ends if not certain]
        return v

    def coordinate(self, e: Expr, at: Point, out: list[Statement]) -> Value:
        """An index expression; plain arithmetic stays wide."""
        match e:
            case Index(rank=rank):
                return self.index(rank, at)
            case Const(value=number):
                return ts.constant(int(number), "int32")
            case Extent(rank=rank):
                return self.memory.extent(rank)
            case Start(rank=rank):
                return self._start(rank, at)
            case Op(name=name, args=(a, b)) if name in INDEX_OPERATIONS:
                return INDEX_OPERATIONS[name](self.coordinate(a, at, out), self.coordinate(b, at, out))
            case _:
                v = self.value(e, at, out)
                return Value(f'T.Cast("int64", {v.text})', "int64", v.lanes) if v.dtype != "int64" else v

    def _vector_read(self, e: Read, array: Array, at: Point, out: list[Statement], compute: str) -> Value:
        """Adjacent elements at once; where the lane's tail may stick out of the tensor it is masked."""
        *ranks, rank = array.ranks
        *others, moving = e.coords
        low, high = self.within(moving, rank, at)
        last = self.coordinate(moving, at, out)
        if not isinstance(moving, Index):  # kept near the tensor, and not in it: lanes that lie inside are read where they are
            last = last if high else ts.smaller(last, self.memory.extent(rank))
            last = last if low else ts.larger(last, ts.integer(-at.lanes))
        coords = (*(self._clamped(c, r, at, None, [], out) for c, r in zip(others, ranks, strict=True)), last)
        index = tuple(array.axis_index(i, coords, self.memory.extents) for i in range(len(array.axes)))
        first = None if low else ts.narrow(ts.sub(ts.integer(0), index[-1]))
        limit = None if low and high else ts.narrow(ts.sub(array.shape[-1], index[-1]))
        return self._load(array, index, at.lanes, first, limit, compute)

    def _load(self, array: Array, index: tuple[Value, ...], lanes: int, first: Value | None, limit: Value | None, compute: str) -> Value:
        """A vector from memory; lanes before `first`, and at `limit` and beyond, are not touched."""
        if limit is None and array.memory_type == compute and compute != "bool":
            return array.element((*index[:-1], ts.ramp(index[-1], lanes)))
        name = array.helper_type if compute == compute_type(array.dtype) else compute
        function = f"{'load' if limit is None else 'mload' if first is None else 'wload'}_{name}_v{lanes}"
        self.helpers.add(function)
        masked = [*([] if first is None else [first]), *([] if limit is None else [limit])]
        args = [Value(f"T.address_of({array.element(index).text})", "handle"), *masked]
        loaded = ts.extern(function, *args, dtype="int8" if compute == "bool" else compute, lanes=lanes)
        return self.cast(loaded, "bool") if compute == "bool" else loaded

    # -- operations -------------------------------------------------------------------------------------------------------------

    def rounded(self, v: Value, dtype: DType) -> Value:
        """`v` rounded to a declared type, held in the compute type."""
        if dtype.is_float and dtype.bits < 32:
            return self.helper(f"round_{dtype.name}", self.cast(v, "float32"), dtype="float32")
        if dtype == i4:
            return self.helper("wrap_nibble", self.cast(v, "int8"), dtype="int8")
        return self.cast(v, compute_type(dtype))

    def _bits(self, x: Expr, dtype: DType, at: Point, out: list[Statement]) -> Value:
        """The bits of `x` as another type: of a tensor's element those in memory, of a computed narrow float those of its code."""
        source = self.type_of(x)
        if source.bits != dtype.bits:
            if not (source == i64 and dtype.bits == 32):  # a literal
                raise UnsupportedError(f"a bitcast from {source} to {dtype} changes the size", statement=self.statement)
            source = i32
        self.four_bits |= dtype == i4
        if isinstance(x, Read) and x.fill is None and source.is_float and source.bits in (8, 16) and not dtype.is_float:
            return self._reinterpret(self._read(x, at, out, raw=True), compute_type(dtype))
        v = self.value(x, at, out)
        code = "nibble" if source.bits == 4 else source.name
        if source.is_float and source.bits < 32:
            v = self.helper(f"bits_{code}", self.cast(v, "float32"), dtype=CODE_TYPES[source.bits])
        else:
            v = self.cast(v, compute_type(source))
        if dtype.is_float and dtype.bits < 32:
            bits = self._reinterpret(v, CODE_TYPES[dtype.bits])
            return self.helper(f"from_bits_{'nibble' if dtype.bits == 4 else dtype.name}", bits, dtype="float32")
        return self._reinterpret(v, compute_type(dtype))

    def _reinterpret(self, v: Value, dtype: str) -> Value:
        if v.dtype == dtype:
            return v
        if "bool" in (v.dtype, dtype):
            return self.cast(v, dtype)
        return Value(f'T.reinterpret("{Value("", dtype, v.lanes).type_name}", {v.text})', dtype, v.lanes)

    def type_of(self, e: Expr) -> DType:
        """The declared type of an expression."""
        types = {name: a.dtype for name, a in self.memory.arrays.items()} | dict(self.tile_types)
        return expression_type(e, types)[0]


def _converted(text: str, memory_type: str, compute: str) -> str:
    """An element of memory in the type it is computed in. bf16 is widened by its bits: TVM's own legalization misses bound values."""
    if memory_type == "bfloat16" and compute == "float32":
        bits = f'T.Cast("uint32", T.reinterpret("uint16", {text}))'
        return f'T.reinterpret("float32", T.shift_left({bits}, T.uint32(16)))'
    return f'T.Cast("{compute}", {text})'
