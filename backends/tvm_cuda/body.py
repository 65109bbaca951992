"""The statements of a kernel's body: each step as a nest over what a thread holds, vectors of memory before its innermost loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from ...ir.check_tiles import nodes
from ...ir.errors import UnsupportedError
from ...ir.expr import Bitcast, Cast, Expr, Op, Read, Tile, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, Reduce, Scan, Store, TileProgram, kernel_tiles
from ...ir.types import i4
from ..tvm import script as ts
from ..tvm.arithmetic import compute_type
from ..tvm.evaluate import CODE_TYPES, Active
from ..tvm.prepare import Assign, Stream, expressions_of
from ..tvm.reductions import combine, identity
from ..tvm.script import Alloc, Comment, Evaluate, For, If, Let, Names, Set, Statement, Value
from ..tvm.streams import as_int64
from ..tvm.tiles import storage_type
from .evaluate import ThreadEvaluator, ThreadPoint
from .spread import Block, adjacent_rank
from .steps import Partial, Step, Whole, as_reduction

UNROLLED = 64  # points of a nest whose loops are unrolled, so that its tiles stay in registers
MATRIX = 8  # a product of tiles with so many rows and so many columns is work for tensor cores


@dataclass
class Nest:
    """Loops being opened one inside the other; `body` is the innermost."""

    body: list[Statement]
    at: ThreadPoint


@dataclass(frozen=True, slots=True)
class Body:
    """What the steps of one kernel share."""

    program: TileProgram
    names: Names
    evaluator: ThreadEvaluator
    block: Block
    digits: Mapping[str, Value]

    # -- nests ------------------------------------------------------------------------------------------------------------------

    def nest(self, ranks: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement], exprs: tuple[Expr, ...] = ()) -> Nest:
        """Loops over what the thread holds of `ranks`; elements of memory that `exprs` read side by side are loaded as vectors."""
        lane = self.lane(ranks, exprs)
        points = 1
        for rank in ranks:
            points *= self.block.spreads[rank].held
        kind = "T.unroll" if points <= UNROLLED else "range"
        at = ThreadPoint(local={}, loops=loops)
        nest = Nest(out, at)
        for rank in ranks:
            spread = self.block.spreads[rank]
            step = self._open(nest, "k", rank, spread.steps, kind)
            element = ts.integer(0) if rank == lane else self._open(nest, "e", rank, spread.vector, kind)
            self._place(nest, rank, step, element)
        if lane is None:
            return nest
        loaded = self._loaded(exprs, lane, nest)
        base = nest.at.slots[lane]
        element = self._open(nest, "e", lane, self.block.spreads[lane].vector, "T.unroll")
        slots = {**nest.at.slots, lane: ts.add(base, element)}
        local = {**nest.at.local, lane: ts.add(nest.at.local[lane], element)}
        values = {key: replace(v, text=f"{v.text}[{element.text}]") for key, v in loaded.items()}
        nest.at = replace(nest.at, slots=slots, local=local, loaded=values)
        return nest

    def lane(self, ranks: tuple[str, ...], exprs: tuple[Expr, ...]) -> str | None:
        """The rank along which most reads of `exprs` are adjacent, if threads hold vectors along it."""
        count: dict[str, int] = {}
        for rank in ranks:
            if self.block.spreads[rank].vector > 1:
                count[rank] = len(self.evaluator.vector_reads(exprs, rank))
        best = max(count, key=lambda r: count[r], default=None)
        return best if best is not None and count[best] else None

    def _open(self, nest: Nest, prefix: str, rank: str, count: int, kind: str) -> Value:
        if count == 1:
            return ts.integer(0)
        variable = self.names.fresh(prefix, rank)
        inner: list[Statement] = []
        nest.body.append(For(variable, ts.integer(0), ts.integer(count), kind, inner))
        nest.body = inner
        return ts.name(variable)

    def _place(self, nest: Nest, rank: str, step: Value, element: Value) -> None:
        """Sets the indices of `rank` for a step and an element of its vector."""
        spread = self.block.spreads[rank]
        digit = self.digits[rank] if spread.threads > 1 else ts.integer(0)
        thread = ts.add(ts.mul(step, ts.integer(spread.threads)), digit)
        local = ts.add(ts.mul(thread, ts.integer(spread.vector)), element)
        slot = ts.add(ts.mul(step, ts.integer(spread.vector)), element)
        nest.at = replace(nest.at, local={**nest.at.local, rank: local}, slots={**nest.at.slots, rank: slot})

    def _tiled(self, exprs: tuple[Expr, ...]) -> tuple[str, ...]:
        """The ranks of tiles that expressions vary over."""
        found = dict.fromkeys(r for e in exprs for r in expression_ranks(e, self.evaluator.tile_ranks))
        return tuple(r for r in found if r in self.block.spreads)

    # -- steps ------------------------------------------------------------------------------------------------------------------

    def emit(self, steps: tuple[Step, ...], loops: tuple[Active, ...], out: list[Statement]) -> None:
        """All steps of a body, in order."""
        stored: set[str] = set()
        for step in steps:
            self._name(step)
            if not loops and stored & _memory_read(step):
                out.append(Comment("what other threads of the block have stored is read"))
                out.append(Evaluate(Value('T.tvm_storage_sync("shared")', "handle")))
                stored = set()
            match step:
                case Map() | Assign():
                    self._comment(step, out)
                    self._map(step.dst, step.ranks, step.expr, loops, out)
                case Reduce():
                    self._comment(step, out)
                    self._reduce(step, loops, out)
                case Dot():
                    self._comment(step, out)
                    self._dot(step, loops, out)
                case Scan():
                    self._comment(step, out)
                    self._scan(step, loops, out)
                case Store():
                    self._comment(step, out)
                    self._store(step, loops, out)
                case Partial(row=row):
                    out.append(Comment(f"{self._text(row)}, the part of this thread"))
                    self._accumulate(row, loops, out)
                case Whole():
                    self._whole(step, loops, out)
                case Stream():
                    self._stream(step, loops, out)
            stored |= _memory_written(step)

    def _name(self, step: Step) -> None:
        if isinstance(step, Store):
            self.evaluator.statement = f"store {step.tensor}"
        elif not isinstance(step, Stream):
            self.evaluator.statement = step.dst

    def _text(self, node: Map | Reduce | Dot | Scan | Store) -> str:
        return str(replace(self.program, body=(node,))).splitlines()[-1].strip()

    def _comment(self, step: Map | Assign | Reduce | Dot | Scan | Store, out: list[Statement]) -> None:
        shown = Map(step.dst, step.ranks, step.expr, step.dtype, step.note) if isinstance(step, Assign) else step
        out.append(Comment(self._text(shown)))

    def _set(self, tile: str, at: ThreadPoint, v: Value) -> Set:
        registers = self.evaluator.registers[tile]
        value = self.evaluator.cast(self.evaluator.rounded(v, self.evaluator.tile_types[tile]), registers.dtype)
        return Set(registers.at(at.slots), value)

    def _map(self, dst: str, ranks: tuple[str, ...], e: Expr, loops: tuple[Active, ...], out: list[Statement]) -> None:
        nest = self.nest(ranks, loops, out, (e,))
        v = self.evaluator.value(e, nest.at, nest.body)
        nest.body.append(self._set(dst, nest.at, v))

    def _reduce(self, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
        if row.op in ("argmax", "argmin"):
            self._arg_reduce(row, loops, out)
            return
        start = self.nest(row.ranks, loops, out)
        registers = self.evaluator.registers[row.dst]
        start.body.append(Set(registers.at(start.at.slots), identity(row.op, registers.dtype)))
        self._accumulate(row, loops, out)
        self._across(row.dst, row.ranks, row.op, row.over, loops, out)

    def _accumulate(self, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """The thread's own points into the registers of `row.dst`; what lies beyond the tile, in its padding, counts nothing."""
        evaluator = self.evaluator
        registers = evaluator.registers[row.dst]
        nest = self.nest((*row.ranks, *row.over), loops, out, (row.expr,))
        v = evaluator.value(row.expr, nest.at, nest.body)
        v = evaluator.cast(evaluator.cast(v, "bool") if row.op in ("any", "all") else v, registers.dtype)
        inside = evaluator.inside_tile(row.over, nest.at)
        if inside is not None:
            v = evaluator.select(inside, v, identity(row.op, registers.dtype))
        held = registers.at(nest.at.slots)
        nest.body.append(Set(held, self._combined(row.op, held, v)))

    def _combined(self, op: str, a: Value, b: Value) -> Value:
        if op in ("max", "min") and a.dtype in ts.FLOATS:  # a NaN stays one
            return self.evaluator.operation("maximum" if op == "max" else "minimum", [b, a])
        return combine(op, a, b)

    def _across(
        self, tile: str, ranks: tuple[str, ...], op: str, over: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement]
    ) -> None:
        """Every thread's part becomes the reduction over the threads along `over`."""
        bits = self.block.bits(over)
        if not bits:
            return
        nest = self.nest(ranks, loops, out)
        held = self.evaluator.registers[tile].at(nest.at.slots)
        dtype = held.dtype if held.dtype in ("float32", "float64", "int64") else "int32"
        word = {"any": "max", "all": "min"}.get(op, op)
        function = f"{word}_{dtype}_over_{bits:x}_of_{self.block.threads}"
        self.evaluator.helpers.add(function)
        whole = ts.extern(function, self.evaluator.cast(held, dtype), dtype=dtype)
        nest.body.append(Set(held, self.evaluator.cast(whole, held.dtype)))

    def _arg_reduce(self, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """Values beside their coordinates; of equals the lowest coordinate."""
        evaluator = self.evaluator
        if len(row.over) != 1:
            raise UnsupportedError(f"{row.op} over several ranks", statement=row.dst, hint="reduce one rank after the other")
        (rank,) = row.over
        compute = compute_type(evaluator.type_of(row.expr))
        dtype = compute if compute in ("float32", "float64", "int64") else "int32"
        places = evaluator.registers[row.dst]
        best = self.names.fresh("best", row.dst)
        held = replace(places, name=best, dtype=dtype)
        out.append(Alloc(best, (places.size,), dtype))
        start = self.nest(row.ranks, loops, out)
        start.body.append(Set(held.at(start.at.slots), identity(row.op, dtype)))
        start.body.append(Set(places.at(start.at.slots), ts.constant((1 << 31) - 1, "int32")))
        nest = self.nest((*row.ranks, rank), loops, out, (row.expr,))
        v = evaluator.bind(evaluator.cast(evaluator.value(row.expr, nest.at, nest.body), dtype), row.dst, nest.body)
        index = ts.narrow(evaluator.index(rank, nest.at))
        x, i = held.at(nest.at.slots), places.at(nest.at.slots)
        body: list[Statement] = [Set(x, v), Set(i, index)]
        nest.body.append(self._taken(row.op, v, x, index, i, evaluator.inside_tile((rank,), nest.at), body))
        bits = self.block.bits(row.over)
        if bits:
            across = self.nest(row.ranks, loops, out)
            function = f"{row.op}_{dtype}_over_{bits:x}_of_{self.block.threads}"
            evaluator.helpers.add(function)
            pointers = [Value(f"T.address_of({r.at(across.at.slots).text})", "handle") for r in (held, places)]
            across.body.append(Evaluate(ts.extern(function, *pointers, dtype="int32")))

    def _taken(self, op: str, v: Value, x: Value, index: Value, i: Value, inside: Value | None, body: list[Statement]) -> If:
        """The assignments of `body` where v is better than x, or equal at a lower coordinate; NaN is better than any number."""
        evaluator = self.evaluator
        better = evaluator.compare(">" if op == "argmax" else "<", v, x)
        equal = evaluator.compare("==", v, x)
        if v.dtype in ts.FLOATS:
            new, old = evaluator.operation("isnan", [v]), evaluator.operation("isnan", [x])
            better = Value(f"T.Or({better.text}, T.And({new.text}, {evaluator.operation('not', [old]).text}))", "bool")
            equal = Value(f"T.Or({equal.text}, T.And({new.text}, {old.text}))", "bool")
        lower = Value(f"T.And({equal.text}, {index.text} < {i.text})", "bool")
        taken = Value(f"T.Or({better.text}, {lower.text})", "bool")
        return If(taken if inside is None else Value(f"T.And({inside.text}, {taken.text})", "bool"), body)

    def _dot(self, dot: Dot, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """A product of few rows: multiplied and summed."""
        self._reduce(as_reduction(dot), loops, out)
        if dot.update is None and dot.post is None:
            return
        e: Expr = Tile(dot.dst)
        e = e if dot.update is None else Op("add", (e, dot.update))
        nest = self.nest(dot.ranks, loops, out, tuple(x for x in (dot.update, dot.post) if x is not None))
        v = self.evaluator.value(e, nest.at, nest.body)
        if dot.post is not None:
            v = self.evaluator.bind(v, dot.dst, nest.body)
            v = self.evaluator.value(dot.post, replace(nest.at, values={**nest.at.values, dot.dst: v}), nest.body)
        nest.body.append(self._set(dot.dst, nest.at, v))

    def _scan(self, scan: Scan, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """Step by step along the rank: the thread's own elements after what comes before them, in this step and in those before."""
        evaluator, spread = self.evaluator, self.block.spreads[scan.over]
        registers = evaluator.registers[scan.dst]
        dtype = registers.dtype if registers.dtype in ("float32", "float64", "int64") else "int32"
        lines = tuple(r for r in scan.ranks if r != scan.over)
        nest = self.nest(lines, loops, out)
        carried, before = self.names.fresh("carried", scan.dst), self.names.fresh("before", scan.dst)
        carry, running = Value(f"{carried}[0]", dtype), Value(f"{before}[0]", dtype)
        first = identity(scan.op, dtype) if scan.start is None else evaluator.value(scan.start, nest.at, nest.body)
        nest.body += [Alloc(carried, (1,), dtype), Alloc(before, (1,), dtype), Set(carry, evaluator.cast(first, dtype))]
        name = self.names.fresh("own", scan.dst)
        nest.body.append(Alloc(name, (spread.vector,), dtype))
        step = self._open(nest, "k", scan.over, spread.steps, "T.unroll" if spread.held <= UNROLLED else "range")
        whole = nest.body

        def each() -> tuple[Nest, Value]:
            inner = Nest(whole, nest.at)
            element = self._open(inner, "e", scan.over, spread.vector, "T.unroll")
            self._place(inner, scan.over, step, element)
            return inner, Value(f"{name}[{element.text}]", dtype)

        whole.append(Set(running, identity(scan.op, dtype)))
        inner, own = each()
        v = evaluator.cast(evaluator.value(scan.expr, inner.at, inner.body), dtype)
        inside = evaluator.inside_tile((scan.over,), inner.at)
        v = v if inside is None else evaluator.select(inside, v, identity(scan.op, dtype))
        inner.body += [Set(own, v), Set(running, self._combined(scan.op, running, own))]
        total = self._scan_across(scan.op, dtype, before, self.block.bits((scan.over,)), whole)
        whole.append(Set(running, self._combined(scan.op, carry, running)))
        inner, own = each()
        after = [Set(running, self._combined(scan.op, running, own))]
        store = [self._set(scan.dst, inner.at, running)]
        inner.body += [*store, *after] if scan.exclusive else [*after, *store]
        whole.append(Set(carry, self._combined(scan.op, carry, total)))

    def _scan_across(self, op: str, dtype: str, before: str, bits: int, out: list[Statement]) -> Value:
        """The thread's sum in `before` becomes that of the threads before it; returns the sum of all."""
        total = self.names.fresh("total")
        held = Value(f"{before}[0]", dtype)
        if not bits:
            out += [Let(total, held), Set(held, identity(op, dtype))]
            return Value(total, dtype)
        function = f"scan{op}_{dtype}_over_{bits:x}_of_{self.block.threads}"
        self.evaluator.helpers.add(function)
        out.append(Let(total, ts.extern(function, Value(f"T.address_of({held.text})", "handle"), dtype=dtype)))
        return Value(total, dtype)

    def _whole(self, step: Whole, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """The parts of all threads together, and what the state was before the loop."""
        out.append(Comment(f"{step.dst}: {step.op} over {', '.join(step.over)} across threads"))
        self._across(step.dst, step.ranks, step.op, step.over, loops, out)
        nest = self.nest(step.ranks, loops, out)
        held = self.evaluator.registers[step.dst].at(nest.at.slots)
        first = self.evaluator.registers[step.first].at(nest.at.slots)
        nest.body.append(Set(held, self._combined(step.op, held, first)))

    # -- stores -----------------------------------------------------------------------------------------------------------------

    def _store(self, store: Store, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """The elements of one thread; of threads that hold the same element the first one writes it."""
        ranks = self._tiled(store.coords)
        array = self.evaluator.memory.arrays[store.tensor]
        idle = (self.block.threads - 1) & ~self.block.bits(ranks)
        if idle:
            body: list[Statement] = []
            out.append(If(Value(f"T.bitwise_and(tid, {idle}) == 0", "bool", binding=ts.OTHER), body))
            out = body
        lane = adjacent_rank(store.coords)
        if lane in ranks and array.unit and self.block.spreads[str(lane)].vector > 1:
            self._store_vectors(store, str(lane), ranks, loops, out)
            return
        nest = self.nest(ranks, loops, out, (store.expr,))
        inside = self.evaluator.inside_extents(ranks, nest.at)
        if inside is not None:
            body = []
            nest.body.append(If(inside, body))
            nest.body = body
        kind, v = self._stored(store, nest)
        target = self._target(store, nest.at, nest.body)
        if array.dtype.is_float and array.dtype.bits < 32:
            self.evaluator.helpers.add(f"store_{kind}_s")
            pointer = Value(f"T.address_of({target.text})", "handle")
            nest.body.append(Evaluate(ts.extern(f"store_{kind}_s", pointer, v, dtype="int32")))
        else:
            nest.body.append(Set(target, v))

    def _target(self, store: Store, at: ThreadPoint, out: list[Statement]) -> Value:
        array = self.evaluator.memory.arrays[store.tensor]
        coords = tuple(self.evaluator.coordinate(c, at, out) for c in store.coords)
        return array.element(tuple(array.axis_index(i, coords, self.evaluator.memory.extents) for i in range(len(array.axes))))

    def _stored(self, store: Store, nest: Nest) -> tuple[str, Value]:
        """The stored type as helpers spell it, and the value as they take it. Bits of the stored type are stored as they are."""
        evaluator, t, e = self.evaluator, self.evaluator.memory.arrays[store.tensor].dtype, store.expr
        if t.is_float and t.bits in (8, 16) and isinstance(e, Bitcast) and e.dtype == t and not evaluator.type_of(e.x).is_float:
            code = CODE_TYPES[t.bits]
            return code, evaluator.cast(evaluator.value(e.x, nest.at, nest.body), code)
        if isinstance(e, Cast) and e.dtype == t and t.is_float and t.bits < 32:
            e = e.x
        v = evaluator.value(e, nest.at, nest.body)
        v = evaluator.rounded(v, t) if t == i4 else evaluator.cast(v, compute_type(t))
        return evaluator.memory.arrays[store.tensor].helper_type, v

    def _store_vectors(self, store: Store, lane: str, ranks: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement]) -> None:
        """Adjacent elements at once: computed into registers, then written as wide as their address allows."""
        evaluator, spread = self.evaluator, self.block.spreads[lane]
        others = tuple(r for r in ranks if r != lane)
        outer = self.nest(others, loops, out)
        step = self._open(outer, "k", lane, spread.steps, "T.unroll" if spread.held <= UNROLLED else "range")
        self._place(outer, lane, step, ts.integer(0))
        inside = evaluator.inside_extents(others, outer.at)
        if inside is not None:
            body: list[Statement] = []
            outer.body.append(If(inside, body))
            outer.body = body
        loaded = self._loaded((store.expr,), lane, outer)
        name = self.names.fresh("y", store.tensor)
        room = Alloc(name, (spread.vector,), "")
        outer.body.append(room)
        inner = Nest(outer.body, outer.at)
        element = self._open(inner, "e", lane, spread.vector, "T.unroll")
        self._place(inner, lane, step, element)
        inner.at = replace(inner.at, loaded={key: replace(v, text=f"{v.text}[{element.text}]") for key, v in loaded.items()})
        kind, v = self._stored(store, inner)
        array = evaluator.memory.arrays[store.tensor]
        dtype = kind if kind.startswith("int") else storage_type(array.dtype)
        outer.body[outer.body.index(room)] = Alloc(name, (spread.vector,), dtype)
        inner.body.append(Set(Value(f"{name}[{element.text}]", dtype), evaluator.cast(v, dtype)))
        function = f"store_{kind}_v{spread.vector}"
        evaluator.helpers.add(function)
        pointer = Value(f"T.address_of({self._target(store, outer.at, outer.body).text})", "handle")
        limit = self._room(lane, outer.at)
        outer.body.append(Evaluate(ts.extern(function, pointer, Value(f"T.address_of({name}[0])", "handle"), limit, dtype="int32")))

    def _loaded(self, exprs: tuple[Expr, ...], lane: str, nest: Nest) -> dict[tuple[Read, bool], Value]:
        """Vectors of memory from the point on, in buffers of their own."""
        loaded = {}
        for read, raw in self.evaluator.vector_reads(exprs, lane):
            name = self.names.fresh("x", read.tensor)
            dtype = self.evaluator.register_type(self.evaluator.memory.arrays[read.tensor], raw)
            nest.body.append(Alloc(name, (self.block.spreads[lane].vector,), dtype))
            self.evaluator.load_vector(read, lane, nest.at, name, raw, nest.body)
            loaded[(read, raw)] = Value(name, dtype)
        return loaded

    def _room(self, lane: str, at: ThreadPoint) -> Value:
        """How many elements from the point on lie within the tile and the extent."""
        evaluator, spread = self.evaluator, self.block.spreads[lane]
        room = ts.integer(spread.vector)
        if evaluator.ragged(lane, at):
            left = ts.sub(evaluator.memory.extent(lane), evaluator.index(lane, at))
            room = ts.narrow(ts.smaller(left, room))
        size = evaluator.size(lane, at)
        if spread.padded > size:
            room = ts.smaller(room, ts.sub(ts.integer(size), at.local[lane]))
        return room

    # -- streams ----------------------------------------------------------------------------------------------------------------

    def _stream(self, stream: Stream, loops: tuple[Active, ...], out: list[Statement]) -> None:
        """The loop over tiles that meet the domain; those wholly inside it have a body without conditions."""
        loop = stream.loop
        evaluator, tile, extent = self.evaluator, ts.integer(loop.tile), self.evaluator.memory.extent(loop.rank)
        outside = ThreadPoint(local={}, loops=loops)

        def bound(e: Expr, wanted: str) -> Value:
            v = evaluator.coordinate(e, outside, out)
            return v if v.text == extent.text else self._named(v, f"{wanted}_{loop.rank}", out)

        low = self._named(ts.larger(bound(loop.bounds.begin, "begin"), ts.integer(0)), f"low_{loop.rank}", out)
        end = bound(loop.bounds.end, "end")
        high = extent if end.text == extent.text else self._named(ts.smaller(end, extent), f"high_{loop.rank}", out)
        whole_begin, whole_end = bound(loop.bounds.whole_begin, "whole_begin"), bound(loop.bounds.whole_end, "whole_end")
        whole_end = extent if whole_end.text == extent.text else ts.smaller(whole_end, extent)
        first = ts.quotient(low, tile)
        last = ts.ceil_div(high if high.text == extent.text else ts.larger(high, ts.integer(0)), loop.tile)
        last = self._named(last if first.number == 0 else ts.larger(last, first), f"last_{loop.rank}", out)
        variable = self.names.fresh("j", loop.rank)
        counted = "int32" if first.number is not None and last.number is not None else "int64"
        start = Value(self.names.fresh("s", loop.rank), "int64")
        body: list[Statement] = [Let(start.text, as_int64(ts.mul(ts.name(variable, counted), tile)))]
        out.append(Comment(f"{loop.rank}: {loop.tile} at a time"))
        out.append(For(variable, first, last, "range", body))
        whole = Active(loop, start)
        edge = Active(loop, start, tile, tile, low if low.number != 0 else None, high)
        exact = end.text == extent.text and extent.number is not None and int(extent.number) % loop.tile == 0 and low.number == 0
        if exact and not loop.conditions:
            self.emit(stream.body, (*loops, whole), body)
            return
        tests = [f"{start.text} + {loop.tile} <= {whole_end.text}"]
        if whole_begin.number != 0:
            tests.append(f"{start.text} >= {whole_begin.text}")
        inside = self.names.fresh("inside", loop.rank)
        test = tests[0] if len(tests) == 1 else f"T.And({tests[0]}, {tests[1]})"
        body.append(Let(inside, Value(test, "bool")))
        bodies: tuple[list[Statement], list[Statement]] = ([], [])
        self.emit(stream.body, (*loops, whole), bodies[0])
        self.emit(stream.body, (*loops, edge), bodies[1])
        body += [
            If(Value(inside, "bool"), [Comment("a tile wholly inside the domain"), *bodies[0]]),
            If(Value(f"T.Not({inside})", "bool"), [Comment("a tile at an edge of the domain"), *bodies[1]]),
        ]

    def _named(self, v: Value, wanted: str, out: list[Statement]) -> Value:
        """An index under a name unless it is a constant."""
        if v.number is not None:
            return v
        variable = self.names.fresh(wanted)
        out.append(Let(variable, as_int64(v)))
        return Value(variable, "int64")


def check_dots(program: TileProgram, block: Block) -> None:
    """Raises `UnsupportedError` for a product of matrices, which is work for tensor cores."""
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    for dot, _, _ in nodes(program):
        if not isinstance(dot, Dot):
            continue
        left, right = ({r for r in expression_ranks(e, tiles) if r in block.spreads} - set(dot.over) for e in (dot.a, dot.b))
        rows, columns = (prod(block.spreads[r].size for r in side) for side in (left - right, right - left))
        if min(rows, columns) >= MATRIX:
            raise UnsupportedError(
                f"a product of {rows} by {columns} needs tensor cores, which TVM for CUDA does not use here",
                statement=dot.dst,
                hint="the Triton emitter: the target without +tvm",
            )


def _memory_read(step: Step) -> set[str]:
    match step:
        case Stream(loop=loop, body=body):
            own = {n.tensor for c in loop.conditions for n in walk(c) if isinstance(n, Read)}
            return own.union(*(_memory_read(s) for s in body))
        case Whole():
            return set()
        case Partial(row=row):
            return _memory_read(row)
        case _:
            return {n.tensor for e in expressions_of(step) for n in walk(e) if isinstance(n, Read)}


def _memory_written(step: Step) -> set[str]:
    if isinstance(step, Stream):
        return {t for s in step.body for t in _memory_written(s)}
    return {step.tensor} if isinstance(step, Store) else set()
