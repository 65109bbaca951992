"""Expressions of a tile program at one point of one thread, as values of the target language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...ir.errors import UnsupportedError
from ...ir.expr import Bitcast, Expr, Read, children
from ...ir.types import DType
from ..tvm import script as ts
from ..tvm.arithmetic import compute_type
from ..tvm.cpu import Cpu
from ..tvm.evaluate import CODE_TYPES, Evaluator, Point, RankPlace
from ..tvm.memory import Array, Memory
from ..tvm.script import Evaluate, Names, Statement, Value
from ..tvm.tiles import storage_type
from .spread import Block, Spread, adjacent_rank

SCALAR = Cpu(mcpu="", lanes=1, registers=255, avx512=False, bf16_dot=False, threads=1)  # a thread computes one element at a time


@dataclass(frozen=True, slots=True)
class Registers:
    """The elements of a tile that one thread holds: a flat local buffer, so that TVM cannot compact it."""

    name: str
    ranks: tuple[str, ...]
    dtype: str
    spreads: Mapping[str, Spread]

    @property
    def size(self) -> int:
        size = 1
        for rank in self.ranks:
            size *= self.spreads[rank].held
        return size

    def at(self, slots: Mapping[str, Value]) -> Value:
        """The element at the thread's own index of every rank."""
        index = ts.integer(0)
        for rank in self.ranks:
            index = ts.add(ts.mul(index, ts.integer(self.spreads[rank].held)), slots[rank])
        return Value(f"{self.name}[{index.text}]", self.dtype)


@dataclass(frozen=True, slots=True)
class ThreadPoint(Point):
    """A point of a thread.

    Args:
        slots: of every rank the index among the elements that the thread holds.
        loaded: reads, and whether as codes, that a vector load has brought into registers: the element of this point.
    """

    slots: Mapping[str, Value] = field(default_factory=dict)
    loaded: Mapping[tuple[Read, bool], Value] = field(default_factory=dict)


class ThreadEvaluator(Evaluator):
    """The evaluator of one kernel, with tiles in registers."""

    def __init__(
        self, names: Names, memory: Memory, registers: Mapping[str, Registers], types: Mapping[str, DType],
        places: Mapping[str, RankPlace], starts: Mapping[str, Value], block: Block,
    ) -> None:  # fmt: skip
        ranks = {name: r.ranks for name, r in registers.items()}
        super().__init__(SCALAR, names, memory, {}, types, ranks, places, starts)
        self.registers = registers
        self.block = block

    def _unknown(self, name: str, what: str, hint: str) -> UnsupportedError:
        return UnsupportedError(f"TVM for CUDA has no {name!r} of {what}", statement=self.statement, hint=hint)

    def _tile(self, name: str, at: Point, out: list[Statement]) -> Value:
        if name in at.values:
            return at.values[name]
        assert isinstance(at, ThreadPoint)
        return self.cast(self.registers[name].at(at.slots), compute_type(self.tile_types[name]))

    def _read(self, e: Read, at: Point, out: list[Statement], *, raw: bool = False) -> Value:
        """An element of memory, from registers where a vector load has brought it."""
        assert isinstance(at, ThreadPoint)
        loaded = at.loaded.get((e, raw))
        if loaded is not None:
            array = self.memory.arrays[e.tensor]
            return self.cast(loaded, "bool") if compute_type(array.dtype) == "bool" else loaded
        return super()._read(e, at, out, raw=raw)

    def vector_reads(self, exprs: tuple[Expr, ...], lane: str) -> list[tuple[Read, bool]]:
        """The reads, and whether as codes, whose elements are adjacent along `lane`, each once."""
        found: dict[tuple[Read, bool], None] = {}

        def visit(e: Expr) -> None:
            if isinstance(e, Read) and e.fill is None and adjacent_rank(e.coords) == lane and self.memory.arrays[e.tensor].unit:
                found[(e, False)] = None
            if isinstance(e, Bitcast) and isinstance(e.x, Read) and self.reads_codes(e):
                if e.x.fill is None and adjacent_rank(e.x.coords) == lane and self.memory.arrays[e.x.tensor].unit:
                    found[(e.x, True)] = None
                return
            for child in children(e):
                visit(child)

        for e in exprs:
            visit(e)
        return list(found)

    def reads_codes(self, e: Bitcast) -> bool:
        """Whether the bits of an element of memory are asked for, which are read as they stand there."""
        source = self.type_of(e.x)
        return isinstance(e.x, Read) and e.x.fill is None and source.is_float and source.bits in (8, 16) and not e.dtype.is_float

    def load_vector(self, e: Read, lane: str, at: ThreadPoint, name: str, raw: bool, out: list[Statement]) -> None:
        """Brings `vector` adjacent elements from the point on into the buffer `name`; zeros stand for what must not be read."""
        array = self.memory.arrays[e.tensor]
        pointer = self.first_element(e, array, lane, at, out)
        kind = self.memory_kind(array, raw)
        function = f"load_{kind}_v{self.block.spreads[lane].vector}"
        self.helpers.add(function)
        to = Value(f"T.address_of({name}[0])", "handle")
        out.append(Evaluate(ts.extern(function, to, pointer, self.valid(lane, at), dtype="int32")))

    def memory_kind(self, array: Array, raw: bool) -> str:
        """The type of elements as helpers spell it."""
        return CODE_TYPES[array.dtype.bits] if raw else array.helper_type

    def register_type(self, array: Array, raw: bool) -> str:
        """The type in which elements of memory stand in registers."""
        return CODE_TYPES[array.dtype.bits] if raw else storage_type(array.dtype)

    def first_element(self, e: Read, array: Array, lane: str, at: ThreadPoint, out: list[Statement]) -> Value:
        """The address of the element at the point; along `lane` it is not clamped, the count of valid elements guards it."""
        coords = [*self._coordinates(e, array, at, out)[0][:-1], self.index(lane, at)]
        index = tuple(array.axis_index(i, tuple(coords), self.memory.extents) for i in range(len(array.axes)))
        return Value(f"T.address_of({array.element(index).text})", "handle")

    def valid(self, lane: str, at: ThreadPoint) -> Value:
        """How many of the elements from the point on may be read or written."""
        vector = self.block.spreads[lane].vector
        if not self.ragged(lane, at):
            return ts.integer(vector)
        loop = self.active(lane, at)
        limit = loop.high if loop is not None and loop.high is not None else self.memory.extent(lane)
        return ts.narrow(ts.smaller(ts.sub(limit, self.index(lane, at)), ts.integer(vector)))

    def inside_tile(self, ranks: tuple[str, ...], at: ThreadPoint) -> Value | None:
        """Whether the point lies within the tile along `ranks`, None where that is certain."""
        tests = []
        for rank in ranks:
            size = self.size(rank, at)
            if self.block.spreads[rank].padded > size:
                tests.append(Value(f"{ts.wrapped(at.local[rank], ts.SUM)} < {size}", "bool", binding=ts.OTHER))
        return self.all_of(tests)

    def inside_extents(self, ranks: tuple[str, ...], at: ThreadPoint) -> Value | None:
        """Whether the point lies within the tile and all extents."""
        tests = []
        for rank in ranks:
            if self.ragged(rank, at):
                index = self.index(rank, at)
                tests.append(Value(f"{ts.wrapped(index, ts.SUM)} < {self.memory.extent(rank).text}", "bool", binding=ts.OTHER))
        within = self.inside_tile(ranks, at)
        return self.all_of([*tests, *([] if within is None else [within])])
