"""Expressions of a tile program at a point, or at a vector of points along one rank, as values of the target language."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...ir.errors import UnsupportedError
from ...ir.expr import (
    Bitcast, Cast, Const, Count, Expr, Extent, Index, Masked, Op, Read, Scalar, Seen, Start, Tile, walk,
)  # fmt: skip
from ...ir.infer import expression_ranks
from ...ir.tile import Loop
from ...ir.types import DType
from . import script as ts
from .cpu import Cpu
from .memory import Array, Memory
from .script import Alloc, For, Let, Names, Set, Statement, Value
from .tiles import TileBuffer

ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
IMPORTED = ("exp", "exp2", "log", "log2", "tanh", "sigmoid")
LIBRARY = ("erf", "log1p", "sin", "cos")
ROUNDING = {"floor": "floor", "ceil": "ceil", "round": "nearbyint", "trunc": "trunc"}
BITS = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "shl": "shift_left", "shr": "shift_right"}
INDEX_OPERATIONS = {
    "add": ts.add, "sub": ts.sub, "mul": ts.mul, "floordiv": ts.floor_div, "mod": ts.floor_mod, "minimum": ts.smaller, "maximum": ts.larger,
}  # fmt: skip
RANK_OF_KIND = {"bool": 0, "uint8": 1, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float32": 5, "float64": 6}


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


def compute_type(t: DType) -> str:
    """The type in which values of `t` are computed: narrow floats in f32."""
    if t.is_float:
        return "float64" if t.bits == 64 else "float32"
    if t.kind == "bool":
        return "bool"
    return "uint8" if t.name == "u8" else f"int{max(t.bits, 8)}"


class Evaluator:
    """Turns expressions into values for one kernel; remembers the helpers it used."""

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
        self.cpu = cpu
        self.names = names
        self.memory = memory
        self.tiles = tiles
        self.tile_types = tile_types
        self.tile_ranks = tile_ranks
        self.places = places
        self.starts = starts
        self.helpers: set[str] = set()
        self.statement = ""

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

    # -- values -----------------------------------------------------------------------------------------------------------------

    def helper(self, stem: str, *args: Value, dtype: str) -> Value:
        """A call of the imported helper, of the width of its widest argument."""
        lanes = max(a.lanes for a in args)
        function = f"{stem}_v{lanes}" if lanes > 1 else f"{stem}_s"
        self.helpers.add(function)
        wide = [ts.broadcast(a, lanes) if lanes > 1 else a for a in args]
        return ts.extern(function, *wide, dtype=dtype, lanes=lanes)

    def cast(self, v: Value, dtype: str) -> Value:
        """`v` converted to a compute type, as torch does."""
        if v.dtype == dtype:
            return replace(v, weak=False)
        if v.number is not None:
            number = v.number
            if dtype not in ts.FLOATS and dtype != "bool" and isinstance(number, float) and not math.isfinite(number):
                number = 0
            return ts.constant(number, dtype)
        type_name = Value("", dtype, v.lanes).type_name
        if dtype == "bool":
            zero = ts.broadcast(ts.constant(0, v.dtype), v.lanes)
            return Value(f"{v.text} != {zero.text}", "bool", v.lanes, binding=ts.OTHER)
        if v.dtype == "bool":
            one, zero = (ts.broadcast(ts.constant(x, dtype), v.lanes) for x in (1, 0))
            return Value(f"T.Select({v.text}, {one.text}, {zero.text})", dtype, v.lanes)
        return Value(f'T.Cast("{type_name}", {v.text})', dtype, v.lanes)

    def unify(self, *values: Value) -> list[Value]:
        """Operands brought to one type and width."""
        strong = [v for v in values if not v.weak] or list(values)
        dtype = max((v.dtype for v in strong), key=lambda d: RANK_OF_KIND[d])
        signs = {v.dtype for v in strong}
        if dtype in ("int8", "uint8") and {"int8", "uint8"} <= signs:
            dtype = "int16"
        for v in values:
            if v.weak and (v.dtype in ts.FLOATS) and dtype not in ts.FLOATS:
                dtype = "float32"
            elif v.weak and dtype == "bool" and v.dtype != "bool":
                dtype = "int32" if v.dtype == "int64" else v.dtype
        lanes = max(v.lanes for v in values)
        return [ts.broadcast(self.cast(v, dtype), lanes) if lanes > 1 else self.cast(v, dtype) for v in values]

    def value(self, e: Expr, at: Point, out: list[Statement]) -> Value:
        """`e` at the point: a vector if it varies along the lane, else a scalar. May add statements to `out`."""
        match e:
            case Const(value=v):
                if isinstance(v, bool):
                    return ts.constant(v, "bool", weak=True)
                return ts.constant(v, "int32" if isinstance(v, int) and abs(v) < 1 << 31 else "int64" if isinstance(v, int) else "float32", weak=True)
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
                return self._rounded(self.value(x, at, out), dtype)
            case Bitcast(x=x, dtype=dtype):
                return self._bits(x, dtype, at, out)
            case Op(name=name, args=args):
                return self._op(name, [self.value(a, at, out) for a in args], args, out)
        raise AssertionError(f"not an expression: {e!r}")

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

    def _lanewise(self, e: Expr, at: Point, dtype: str, out: list[Statement]) -> Value:
        """`e` computed lane by lane into a vector."""
        variable, lane = self.names.fresh("g"), self.names.fresh("l")
        stored = "int8" if dtype == "bool" else dtype
        body: list[Statement] = []
        inner = self.at_lane(at, lane, (e,), out)
        result = self.cast(self.value(e, inner, body), stored)
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
            if rank in at.local and not (rank in at.exact):
                tests.append(self.compare("<", self.value(Index(rank), at, out), ts.narrow(self.memory.extent(rank))))
            tests += [self.value(c, at, out) for c in active.loop.conditions]
        return self.all_of(tests)

    def all_of(self, tests: list[Value]) -> Value | None:
        """The conjunction."""
        result: Value | None = None
        for test in tests:
            if result is None:
                result = test
                continue
            a, b = self.unify(result, test)
            result = Value(f"T.And({a.text}, {b.text})", "bool", a.lanes)
        return result

    def compare(self, symbol: str, a: Value, b: Value) -> Value:
        """A comparison as a bool."""
        x, y = self.unify(a, b)
        return Value(f"{ts.wrapped(x, ts.SUM)} {symbol} {ts.wrapped(y, ts.SUM)}", "bool", x.lanes, binding=ts.OTHER)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`; both are computed."""
        x, y = self.unify(a, b)
        lanes = max(x.lanes, condition.lanes)
        c, x, y = (ts.broadcast(v, lanes) if lanes > 1 else v for v in (condition, x, y))
        return Value(f"T.Select({c.text}, {x.text}, {y.text})", x.dtype, lanes)

    def _masked(self, x: Expr, identity: Const, at: Point, out: list[Statement]) -> Value:
        v = self.value(x, at, out)
        condition = self.condition(at, out)
        if condition is None:
            return v
        return self.select(condition, v, self.value(identity, at, out))

    # -- memory -----------------------------------------------------------------------------------------------------------------

    def _read(self, e: Read, at: Point, out: list[Statement]) -> Value:
        array = self.memory.arrays[e.tensor]
        compute = compute_type(array.dtype)
        if any(self.uses_lane(c, at) for c in e.coords):
            if e.fill is not None or not self.is_vector(e, array, at):
                return self._lanewise(e, at, compute, out)
            return self._vector_read(e, array, at, out)
        coords, inside = self._coordinates(e, array, at, out)
        index = tuple(array.axis_index(i, coords, self.memory.extents) for i in range(len(array.axes)))
        v = array.element(index) if index else Value(f"{array.name}[()]", array.memory_type)
        if array.memory_type not in (compute, "bool"):
            v = Value(f'T.Cast("{compute}", {v.text})', compute)
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
        ranks = tuple(rank for axis in array.axes for rank in axis)
        coords, tests = [], []
        for rank, c in zip(ranks, e.coords, strict=True):
            if isinstance(c, Index):
                v = self.bounded(c.rank, at)
                if e.fill is not None and c.rank != rank:
                    v = self._clamped(v, rank, tests, e.fill, low=False)
            else:
                v = self.coordinate(c, at, out)
                moving = any(self.ragged(r, at) for r in expression_ranks(c, self.tile_ranks))
                gathered = any(isinstance(n, (Tile, Read)) for n in walk(c))
                if e.fill is not None or moving or gathered:
                    v = self._clamped(v, rank, tests, e.fill, low=True)
            coords.append(v)
        return tuple(coords), self.all_of(tests)

    def _clamped(self, v: Value, rank: str, tests: list[Value], fill: Const | None, low: bool) -> Value:
        extent = self.memory.extent(rank)
        if fill is not None:
            tests.append(Value(f"{ts.wrapped(v, ts.SUM)} < {extent.text}", "bool", binding=ts.OTHER))
            if low:
                tests.append(Value(f"{ts.wrapped(v, ts.SUM)} >= 0", "bool", binding=ts.OTHER))
        v = ts.smaller(v, ts.sub(extent, ts.integer(1)))
        return ts.larger(v, ts.integer(0)) if low else v

    def coordinate(self, e: Expr, at: Point, out: list[Statement]) -> Value:
        """An index expression; plain arithmetic stays wide."""
        match e:
            case Index(rank=rank):
                return self.index(rank, at)
            case Const(value=v):
                return ts.constant(int(v), "int32")
            case Extent(rank=rank):
                return self.memory.extent(rank)
            case Start(rank=rank):
                return self._start(rank, at)
            case Op(name=name, args=(a, b)) if name in INDEX_OPERATIONS:
                return INDEX_OPERATIONS[name](self.coordinate(a, at, out), self.coordinate(b, at, out))
            case _:
                v = self.value(e, at, out)
                return Value(f'T.Cast("int64", {v.text})', "int64", v.lanes) if v.dtype != "int64" else v

    def _vector_read(self, e: Read, array: Array, at: Point, out: list[Statement]) -> Value:
        lane = str(at.lane)
        head = replace(e, coords=e.coords[:-1])
        ranks = tuple(rank for axis in array.axes for rank in axis)
        base_at = replace(at, exact=at.exact | {lane})  # the lane's own tail is masked, not clamped
        tests: list[Value] = []
        coords = []
        for rank, c in zip(ranks[:-1], head.coords, strict=True):
            part = Read(e.tensor, (c,))
            v, _ = self._single(part, rank, at, out)
            coords.append(v)
        last, _ = self._single(Read(e.tensor, (e.coords[-1],)), ranks[-1], base_at, out)
        coords.append(last)
        index = tuple(array.axis_index(i, tuple(coords), self.memory.extents) for i in range(len(array.axes)))
        del tests
        limit = None
        if self.ragged(lane, at):
            limit = ts.narrow(ts.sub(array.shape[-1], index[-1]))
        return self.load(array, index, at.lanes, limit)

    def _single(self, e: Read, rank: str, at: Point, out: list[Statement]) -> tuple[Value, None]:
        c = e.coords[0]
        if isinstance(c, Index):
            return self.bounded(c.rank, at), None
        v = self.coordinate(c, at, out)
        moving = any(self.ragged(r, at) for r in expression_ranks(c, self.tile_ranks))
        gathered = any(isinstance(n, (Tile, Read)) for n in walk(c))
        return (self._clamped(v, rank, [], None, low=True) if moving or gathered else v), None

    def load(self, array: Array, index: tuple[Value, ...], lanes: int, limit: Value | None) -> Value:
        """A vector from memory; lanes at `limit` and beyond are not touched."""
        compute = compute_type(array.dtype)
        if limit is None and array.memory_type == compute and compute != "bool":
            return array.element((*index[:-1], ts.ramp(index[-1], lanes)))
        name = array.dtype.name if array.dtype.name in ("bf16", "f16") else array.memory_type
        function = f"{'load' if limit is None else 'mload'}_{name}_v{lanes}"
        self.helpers.add(function)
        args = [Value(f"T.address_of({array.element(index).text})", "handle"), *([] if limit is None else [limit])]
        loaded = ts.extern(function, *args, dtype="int8" if compute == "bool" else compute, lanes=lanes)
        return self.cast(loaded, "bool") if compute == "bool" else loaded

    # -- operations -------------------------------------------------------------------------------------------------------------

    def _rounded(self, v: Value, dtype: DType) -> Value:
        """`v` rounded to a declared type, held in the compute type."""
        compute = compute_type(dtype)
        if dtype.name in ("bf16", "f16"):
            v = self.cast(v, "float32")
            return self.helper(f"round_{dtype.name}", v, dtype="float32")
        if dtype.is_float and dtype.bits < 16 or dtype.bits < 8:
            raise UnsupportedError(f"the CPU backend does not round to {dtype}", statement=self.statement, hint="cast to bf16 or i8")
        return self.cast(v, compute)

    def _bits(self, x: Expr, dtype: DType, at: Point, out: list[Statement]) -> Value:
        source = self.type_of(x)
        v = self.value(x, at, out)
        if source.name == "bf16" and dtype.bits == 16:
            bits = self._reinterpret(self._rounded(v, source), "int32")
            shifted = Value(f"T.shift_right({bits.text}, {ts.broadcast(ts.integer(16), v.lanes).text})", "int32", v.lanes)
            return self._reinterpreted(self.cast(shifted, "int16"), dtype)
        if source.name == "f16" and dtype.bits == 16:
            return self._reinterpreted(self.helper("bits_f16", v, dtype="int16"), dtype)
        if dtype.name in ("bf16", "f16"):
            return self._reinterpreted(self.cast(v, "int16"), dtype)
        if source.bits != dtype.bits:
            raise UnsupportedError(f"a bitcast from {source} to {dtype} changes the size", statement=self.statement)
        return self._reinterpret(v, compute_type(dtype))

    def _reinterpreted(self, bits: Value, dtype: DType) -> Value:
        if dtype.name == "bf16":
            wide = self.cast(bits, "int32")
            shifted = Value(f"T.shift_left({wide.text}, {ts.broadcast(ts.integer(16), wide.lanes).text})", "int32", wide.lanes)
            return self._reinterpret(shifted, "float32")
        if dtype.name == "f16":
            return self.helper("from_bits_f16", bits, dtype="float32")
        return self._reinterpret(bits, compute_type(dtype))

    def _reinterpret(self, v: Value, dtype: str) -> Value:
        if v.dtype == dtype:
            return v
        return Value(f'T.reinterpret("{Value("", dtype, v.lanes).type_name}", {v.text})', dtype, v.lanes)

    def type_of(self, e: Expr) -> DType:
        """The declared type of an expression."""
        from ...ir.infer import expression_type

        types = {name: a.dtype for name, a in self.memory.arrays.items()} | dict(self.tile_types)
        return expression_type(e, types)[0]

    def _op(self, name: str, args: list[Value], exprs: tuple[Expr, ...], out: list[Statement]) -> Value:
        if name == "exact":
            return args[0]
        if name == "where":
            return self.select(self.cast(args[0], "bool"), args[1], args[2])
        if name in COMPARISONS:
            return self.compare(COMPARISONS[name], args[0], args[1])
        if name in ("isnan", "isinf", "isfinite"):
            if args[0].dtype not in ts.FLOATS:
                return ts.constant(name == "isfinite", "bool")
            return self.cast(self.helper(name, self.cast(args[0], "float32"), dtype="int32"), "bool")
        if name in ("popcount", "clz"):
            bits = args[0].dtype
            wide = self.cast(args[0], "int32") if bits in ("int8", "int16", "uint8") else args[0]
            counted = Value(f"T.{name}({wide.text})", wide.dtype, wide.lanes)
            return self.cast(counted, "int32")
        if OPS_FLOAT.get(name):
            x = args[0] if args[0].dtype == "float64" and not args[0].weak else self.cast(args[0], "float32")
            return self._float(name, x, out)
        if name == "div":
            a, b = self.unify(*args)
            if a.dtype not in ts.FLOATS:
                a, b = self.cast(a, "float32"), self.cast(b, "float32")
            return self._infix("/", a, b)
        if name == "pow":
            return self._power(args, exprs)
        operands = self.unify(*args)
        return self._arithmetic(name, operands)

    def _infix(self, symbol: str, a: Value, b: Value) -> Value:
        return Value(f"({ts.wrapped(a, ts.SUM)} {symbol} {ts.wrapped(b, ts.ATOM)})", a.dtype, a.lanes)

    def _arithmetic(self, name: str, operands: list[Value]) -> Value:
        a = operands[0]
        floating = a.dtype in ts.FLOATS
        if name in ARITHMETIC:
            return self._infix(ARITHMETIC[name], *operands)
        if name in ("minimum", "maximum"):
            return Value(f"T.{name[:3]}({a.text}, {operands[1].text})", a.dtype, a.lanes)
        if name in BITS and a.dtype == "bool":
            return self._logic(name, *operands)
        if name in BITS:
            return Value(f"T.{BITS[name]}({a.text}, {operands[1].text})", a.dtype, a.lanes)
        if name == "not":
            return Value(f"T.Not({a.text})" if a.dtype == "bool" else f"T.bitwise_not({a.text})", a.dtype, a.lanes)
        zero = ts.broadcast(ts.constant(0, a.dtype), a.lanes)
        if name == "neg":
            if floating:  # 0 - x loses the sign of zero
                return self._infix("*", a, ts.broadcast(ts.constant(-1, a.dtype), a.lanes))
            return self._infix("-", zero, a)
        if name == "abs":
            return Value(f"T.abs({a.text})", a.dtype, a.lanes) if floating else Value(f"T.max({a.text}, {zero.text} - {a.text})", a.dtype, a.lanes)
        if name == "sign":
            one, minus = (ts.broadcast(ts.constant(x, a.dtype), a.lanes) for x in (1, -1 if a.dtype != "uint8" else 0))
            negative = Value(f"T.Select({a.text} < {zero.text}, {minus.text}, {zero.text})", a.dtype, a.lanes)
            return Value(f"T.Select({a.text} > {zero.text}, {one.text}, {negative.text})", a.dtype, a.lanes)
        if name in ROUNDING:
            return Value(f"T.{ROUNDING[name]}({a.text})", a.dtype, a.lanes) if floating else a
        if name in ("floordiv", "mod"):
            return self._division(name, *operands)
        raise UnsupportedError(f"the CPU backend has no operation {name!r}", statement=self.statement)

    def _logic(self, name: str, a: Value, b: Value) -> Value:
        if name in ("and", "or"):
            return Value(f"T.{name.capitalize()}({a.text}, {b.text})", "bool", a.lanes)
        if name == "xor":
            return Value(f"T.Or(T.And({a.text}, T.Not({b.text})), T.And(T.Not({a.text}), {b.text}))", "bool", a.lanes)
        raise UnsupportedError(f"the CPU backend has no {name!r} of bools", statement=self.statement, hint="cast to an integer first")

    def _division(self, name: str, a: Value, b: Value) -> Value:
        """The quotient rounded down, or the remainder with the divisor's sign."""
        if a.dtype in ts.FLOATS:
            if name == "floordiv":
                return Value(f"T.floor({self._infix('/', a, b).text})", a.dtype, a.lanes)
            rest = self.helper("fmod", self.cast(a, "float32"), self.cast(b, "float32"), dtype="float32")
            zero = ts.broadcast(ts.constant(0, "float32"), rest.lanes)
            other = f"T.And({rest.text} != {zero.text}, T.Or(T.And({rest.text} < {zero.text}, {b.text} > {zero.text}), T.And({rest.text} > {zero.text}, {b.text} < {zero.text})))"
            return Value(f"T.Select({other}, {rest.text} + {b.text}, {rest.text})", "float32", rest.lanes)
        function = {"floordiv": "floordiv", "mod": "floormod"}[name]
        return Value(f"T.{function}({a.text}, {b.text})", a.dtype, a.lanes)

    def _float(self, name: str, x: Value, out: list[Statement]) -> Value:
        if name == "sqrt":
            return Value(f"T.sqrt({x.text})", x.dtype, x.lanes)
        if name == "rsqrt":
            one = ts.broadcast(ts.constant(1, x.dtype), x.lanes)
            return self._infix("/", one, Value(f"T.sqrt({x.text})", x.dtype, x.lanes))
        if x.dtype == "float64":
            if name in ("exp", "exp2", "log", "log2", "sin", "cos", "tanh"):
                return Value(f"T.{name}({x.text})", x.dtype, x.lanes)
            raise UnsupportedError(f"the CPU backend has no {name!r} of f64", statement=self.statement, hint="cast to f32 first")
        return self.helper(name, x, dtype="float32")

    def _power(self, args: list[Value], exprs: tuple[Expr, ...]) -> Value:
        base, exponent = args
        number = exponent.number
        if number is not None and not isinstance(number, bool) and number in (1, 2, 3, 4):
            result = base if base.dtype != "bool" else self.cast(base, "int32")
            for _ in range(int(number) - 1):
                result = self._infix("*", result, base)
            return result
        a, b = self.unify(base, exponent)
        if a.dtype == "float32":
            if number == 0.5:
                return Value(f"T.sqrt({a.text})", a.dtype, a.lanes)
            return self.helper("pow", a, b, dtype="float32")
        raise UnsupportedError(f"the CPU backend has no power of {a.dtype} by this exponent", statement=self.statement, hint="cast to f32 first")

    def bind(self, v: Value, wanted: str, out: list[Statement]) -> Value:
        """`v` under a name, so that its text is not repeated."""
        if v.number is not None or v.text.isidentifier():
            return v
        variable = self.names.fresh("v", wanted)
        out.append(Let(variable, v))
        return Value(variable, v.dtype, v.lanes)


OPS_FLOAT = dict.fromkeys((*IMPORTED, *LIBRARY, "sqrt", "rsqrt"), True)
