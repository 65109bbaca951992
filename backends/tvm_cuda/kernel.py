"""What every part of the emitter shares while one kernel is emitted: nests of loops over what one thread holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir.expr import Expr, Read
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, Reduce, Scan, Store, TileProgram
from ..tvm import script as ts
from ..tvm.evaluate import Active
from ..tvm.script import Alloc, For, Let, Names, Set, Statement, Value
from ..tvm.streams import as_int64
from .evaluate import ThreadEvaluator, ThreadPoint
from .spread import Block

UNROLLED = 128  # points of a nest whose loops are unrolled, so that its tiles stay in registers


@dataclass
class Nest:
    """Loops being opened one inside the other; `body` is the innermost."""

    body: list[Statement]
    at: ThreadPoint


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel being emitted; `digits` are the thread's indices along the ranks that lie over threads."""

    program: TileProgram
    names: Names
    evaluator: ThreadEvaluator
    block: Block
    digits: Mapping[str, Value]

    def nest(self, ranks: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement], exprs: tuple[Expr, ...] = ()) -> Nest:
        """Loops over what the thread holds of `ranks`; elements of memory that `exprs` read side by side are loaded as vectors."""
        lane = self._lane(ranks, exprs)
        points = 1
        for rank in ranks:
            points *= self.block.spreads[rank].held
        kind = "T.unroll" if points <= UNROLLED else "range"
        at = ThreadPoint(local={}, loops=loops)
        nest = Nest(out, at)
        for rank in ranks:
            spread = self.block.spreads[rank]
            step = self.open(nest, "k", rank, spread.steps, kind)
            element = ts.integer(0) if rank == lane else self.open(nest, "e", rank, spread.vector, kind)
            self.place(nest, rank, step, element)
        if lane is None:
            return nest
        loaded = self.loaded(exprs, lane, nest)
        base = nest.at.slots[lane]
        element = self.open(nest, "e", lane, self.block.spreads[lane].vector, "T.unroll")
        slots = {**nest.at.slots, lane: ts.add(base, element)}
        local = {**nest.at.local, lane: ts.add(nest.at.local[lane], element)}
        values = {key: replace(v, text=f"{v.text}[{element.text}]") for key, v in loaded.items()}
        nest.at = replace(nest.at, slots=slots, local=local, loaded=values)
        return nest

    def _lane(self, ranks: tuple[str, ...], exprs: tuple[Expr, ...]) -> str | None:
        """The rank along which most reads of `exprs` are adjacent, if threads hold vectors along it."""
        count: dict[str, int] = {}
        for rank in ranks:
            if self.block.spreads[rank].vector > 1:
                count[rank] = len(self.evaluator.vector_reads(exprs, rank))
        best = max(count, key=lambda r: count[r], default=None)
        return best if best is not None and count[best] else None

    def open(self, nest: Nest, prefix: str, rank: str, count: int, kind: str) -> Value:
        """Opens a loop of `count` turns inside what is open; returns its variable."""
        if count == 1:
            return ts.integer(0)
        variable = self.names.fresh(prefix, rank)
        inner: list[Statement] = []
        nest.body.append(For(variable, ts.integer(0), ts.integer(count), kind, inner))
        nest.body = inner
        return ts.name(variable)

    def place(self, nest: Nest, rank: str, step: Value, element: Value) -> None:
        """Sets the indices of `rank` for a step and an element of its vector."""
        spread = self.block.spreads[rank]
        digit = self.digits[rank] if spread.threads > 1 else ts.integer(0)
        thread = ts.add(ts.mul(step, ts.integer(spread.threads)), digit)
        local = ts.add(ts.mul(thread, ts.integer(spread.vector)), element)
        slot = ts.add(ts.mul(step, ts.integer(spread.vector)), element)
        nest.at = replace(nest.at, local={**nest.at.local, rank: local}, slots={**nest.at.slots, rank: slot})

    def tiled(self, exprs: tuple[Expr, ...]) -> tuple[str, ...]:
        """The ranks of tiles that expressions vary over."""
        found = dict.fromkeys(r for e in exprs for r in expression_ranks(e, self.evaluator.tile_ranks))
        return tuple(r for r in found if r in self.block.spreads)

    def loaded(self, exprs: tuple[Expr, ...], lane: str, nest: Nest) -> dict[tuple[Read, bool], Value]:
        """Vectors of memory from the point on, in buffers of their own."""
        loaded = {}
        for read, raw in self.evaluator.vector_reads(exprs, lane):
            name = self.names.fresh("x", read.tensor)
            dtype = self.evaluator.register_type(self.evaluator.memory.arrays[read.tensor], raw)
            nest.body.append(Alloc(name, (self.block.spreads[lane].vector,), dtype))
            self.evaluator.load_vector(read, lane, nest.at, name, raw, nest.body)
            loaded[(read, raw)] = Value(name, dtype)
        return loaded

    def text(self, node: Map | Reduce | Dot | Scan | Store) -> str:
        """A statement as the tile program spells it."""
        return str(replace(self.program, body=(node,))).splitlines()[-1].strip()

    def set(self, tile: str, at: ThreadPoint, v: Value) -> Set:
        """The thread's element of `tile` at the point = v, rounded to the tile's type."""
        registers = self.evaluator.registers[tile]
        value = self.evaluator.cast(self.evaluator.rounded(v, self.evaluator.tile_types[tile]), registers.dtype)
        return Set(registers.at(at.slots), value)

    def named(self, v: Value, wanted: str, out: list[Statement]) -> Value:
        """An index under a name unless it is a constant."""
        if v.number is not None:
            return v
        variable = self.names.fresh(wanted)
        out.append(Let(variable, as_int64(v)))
        return Value(variable, "int64")
