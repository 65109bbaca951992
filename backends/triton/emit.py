"""A tile program as a readable Triton kernel, in a file of its own."""

from __future__ import annotations

import pprint
from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.expr import Const, Extent, Read, Start, Tile, reads, walk
from ...ir.infer import expression_ranks
from ...ir.text import print_node, print_program, program_ranks
from ...ir.tile import Dot, Loop, LoopState, Map, Node, Reduce, Scan, Store, TileProgram, body_expressions, kernel_tiles, nodes_of
from ...ir.types import f32, f64
from ...schedules.gpu import options_of
from ...schedules.schedule import KernelOptions, Schedule
from ...schedules.target import Target
from ..base import Source
from . import script as ts
from .analysis import ordered_tiles, precise_tiles
from .axes import axes_of
from .blocks import block_contractions
from .dots import Contractions
from .helpers import sources
from .kernel import Edge, Scope
from .memory import arrays_of, memories
from .script import Assign, Call, Comment, For, Statement, Value, held_type, render
from .signature import Parameter, Signature

HEADER = "import triton\nimport triton.language as tl\n"
MAIN = '''def main():
    """Compare the kernel with what its tile program says, on random inputs."""
    from einfall.backends.triton.runnable import run

    run(__file__)'''


def emit(program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
    """The kernel as source. `strided` names tensors whose last axis may have a stride other than 1.

    Raises `UnsupportedError` naming statement and operation for what the emitter cannot do, `ScheduleError` for an illegal schedule.
    """
    check_types(program)
    program = block_contractions(program, {name: dot.k_block for name, dot in schedule.dot if dot.k_block is not None})
    emitter = Emitter(program, options_of(program, schedule, target), strided)
    body = emitter.kernel(heavy_first=schedule.grid_order == "heavy_first")
    return Source.make(emitter.file(body), emitter.entry, target)


def check_types(program: TileProgram) -> None:
    """Raise `UnsupportedError` for tensors of f64."""
    for name, t in [*((t.name, t.dtype) for t in program.inputs), *((o.name, o.dtype) for o in program.outputs)]:
        if t == f64:
            raise UnsupportedError(f"{name} is f64, and kernels compute in f32", statement=program.name, hint="pass f32 tensors")


class Emitter(Contractions):
    """Writes one kernel."""

    def __init__(self, program: TileProgram, options: KernelOptions, strided: frozenset[str]) -> None:
        super().__init__(program, axes_of(program), options)
        self.entry = self.names.fresh(program.name)
        self.ranks = program_ranks(program)
        for axis in self.axes.axes:
            self.names.fresh(f"B_{axis.name}")
        self.arrays = arrays_of(self, strided)
        self.described = set()
        self.scalars = {}
        for s in program.scalars:
            self.scalars[s.name] = replace(ts.scalar(self.names.fresh(s.name), f32), weak=True)
        for name, (ranks, dtype) in kernel_tiles(program.body).items():
            self.tile_ranks[name] = ranks
            self.tile_types[name] = dtype
        self.precise_tiles = precise_tiles(program)
        self.ordered_tiles = ordered_tiles(program)
        self._declared = {d.name: d.size for d in program.ranks}
        self._in_memory = {rank for t in self.arrays.values() for rank in t.ranks}

    # -- the whole -----------------------------------------------------------------------------------------------------------------

    def extent(self, rank: str) -> Value:
        """The extent of a rank: a constant, a product of others, or a parameter."""
        if rank in self.extents:
            return self.extents[rank]
        size = self._declared.get(rank)
        if isinstance(size, Const):
            self.extents[rank] = ts.constant(int(size.value))
        elif rank in self._in_memory:
            name = self.names.fresh(f"n_{rank}")
            self.parameters.append(Parameter(name, "extent", rank, "i32"))
            self.extents[rank] = ts.scalar(name)
        elif size is not None:
            self.extents[rank] = self.define(f"n_{rank}", self.value(size, {}), self.scopes[0])
        else:
            raise UnsupportedError(f"the extent of rank {rank!r} is not known to the kernel", statement=self.program.name)
        return self.extents[rank]

    def kernel(self, *, heavy_first: bool) -> list[Statement]:
        """The statements of the kernel function."""
        for rank in dict.fromkeys(r for t in self.arrays.values() for axis in t.axes for r in axis[1:]):
            self.extent(rank)
        outer = self.scopes[0]
        self._tasks(heavy_first)
        stored: set[str] = set()
        for node in self.program.body:
            if stored & {r.tensor for e in body_expressions((node,)) for r in reads(e)}:
                outer.lines.append(Call("tl.debug_barrier()  # what the threads of this program stored is read below"))
                stored = set()
            self.node(node)
            stored |= {n.tensor for n in nodes_of((node,)) if isinstance(n, Store)}
        for s in self.program.scalars:
            self.parameters.append(Parameter(self.scalars[s.name].text, "scalar", s.name, "fp32"))
        if not self.options.persistent:
            return [Assign("task", "tl.program_id(0)"), *outer.lines]
        before, tasks = self._count_of_tasks()
        return [*before, For("task", f"tl.range(tl.program_id(0), {tasks}, tl.num_programs(0))", outer.lines)]

    def _count_of_tasks(self) -> tuple[list[Statement], str]:
        """How many tasks there are, for programs that loop over them."""
        total = ts.constant(1)
        for axis in self.program.grid:
            total = ts.mul(total, self._tiles_along(axis.rank))
        return [Assign("tasks", total.text)], "tasks"

    def _tiles_along(self, rank: str) -> Value:
        tile, extent = self.grid[rank], self.extent(rank)
        if tile == 1:
            return extent
        if extent.number is not None:
            return ts.constant(-(-int(extent.number) // tile))
        return ts.call("tl.cdiv", extent, str(tile), type="int32", dtype=extent.dtype)

    def _tasks(self, heavy_first: bool) -> None:
        """The place of the task in the grid, the last rank the fastest."""
        lines = self.scopes[0].lines
        heavy = self._heavy_ranks() if heavy_first else set()
        left = "place" if self.options.persistent else "task"
        if self.options.persistent:
            lines.append(Assign("place", "task"))
        grid = self.program.grid
        for position, axis in enumerate(reversed(grid)):
            rank, last = axis.rank, position == len(grid) - 1
            count = self._tiles_along(rank) if not last or rank in heavy or self._is_one(rank) else ts.scalar("")
            if count.number == 1:
                self.starts[rank] = ts.constant(0)
                continue
            place = Value(left) if last else ts.infix("%", Value(left), count, (), "int32", self.extent(rank).dtype)
            if rank in heavy:
                place = ts.infix("-", ts.add(count, ts.constant(-1)), place, (), "int32", place.dtype)
            name = self.names.fresh(f"{rank}0" if axis.tile > 1 else f"i_{rank}")
            lines.append(Assign(name, ts.mul(place, ts.constant(axis.tile)).text))
            self.starts[rank] = ts.scalar(name)
            if not last:
                lines.append(Assign(left, f"{left} // {count.wrapped(ts.UNARY)}"))

    def _is_one(self, rank: str) -> bool:
        size = self.program.static_size(rank)
        return size is not None and size <= self.grid[rank]

    def _heavy_ranks(self) -> set[str]:
        """Grid ranks along which tasks grow: the end of a loop follows their start, its beginning does not."""
        heavy: set[str] = set()
        for loop in nodes_of(self.program.body):
            if isinstance(loop, Loop):
                end, begin = ({n.rank for n in walk(e) if isinstance(n, Start)} for e in (loop.bounds.end, loop.bounds.begin))
                heavy |= (end - begin) & set(self.grid)
        return heavy

    # -- nodes ---------------------------------------------------------------------------------------------------------------------

    def node(self, node: Node) -> None:
        """Emits one node."""
        if isinstance(node, Loop):
            self.loop(node)
            return
        self.statement = node.tensor if isinstance(node, Store) else node.dst
        self.here.lines.append(Comment(print_node(node, self.ranks)))
        match node:
            case Map():
                precise = node.dst in self.precise_tiles
                for digits in self.combinations(node.ranks):
                    v = self.value(node.expr, digits, precise=precise, wanted=self._name(node.dst, digits))
                    self._set(node.dst, digits, self._settled(v, node))
            case Reduce():
                for digits in self.combinations(node.ranks):
                    self._set(node.dst, digits, self._settled(self.reduction(node, digits), node))
            case Scan():
                for digits in self.combinations(node.ranks):
                    self._set(node.dst, digits, self._settled(self.scanned(node, digits), node))
            case Dot():
                for digits in self.combinations(node.ranks):
                    self._set(node.dst, digits, self.contraction(node, digits))
                    if node.post is not None:
                        self._set(node.dst, digits, self.held(self.computed(self.value(node.post, digits)), "float32"))
            case Store():
                ranks = tuple(dict.fromkeys(r for c in node.coords for r in expression_ranks(c)))
                narrow = not self.arrays[node.tensor].dtype.is_float or self.arrays[node.tensor].dtype.bits < 16
                for digits in self.combinations(ranks):
                    v = self.value(node.expr, digits, precise=narrow)
                    self.here.lines.append(Call(self.store(node.tensor, node.coords, v, digits)))

    def _settled(self, v: Value, node: Map | Reduce | Scan) -> Value:
        """A value in the declared type of a tile; an f32 tile may stay in a narrower type that memory has it in."""
        if node.dtype == f32 and v.dtype.is_float:
            return replace(v, weak=False)
        return replace(self.cast(v, node.dtype), clean=v.clean) if v.dtype != node.dtype else replace(self.computed(v), weak=False)

    def _name(self, dst: str, digits: dict[str, int]) -> str:
        written = [rank for rank in self.tile_ranks.get(dst, ()) if rank in digits and self.digit_sizes[rank] > 1]
        return "_".join([dst, *(str(digits[rank]) for rank in written)])

    def _set(self, dst: str, digits: dict[str, int], v: Value) -> None:
        """`v` as a tile."""
        key = (dst, tuple(digits[rank] for rank in self.tile_ranks[dst] if rank in self.digit_sizes))
        self.tiles[key] = self.define(self._name(dst, digits), v, self.here)
        self.here.tiles.add(dst)

    # -- loops ---------------------------------------------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> None:
        """Emits a loop: states before it, its tiles in runs with and without masks, the states' next values at its end."""
        outer = self.here
        states = self._states(loop)
        self.statement = f"for {loop.rank}"
        first, whole_first, whole_last, last = self._bounds(loop)
        edge = self._edge(loop)
        start = ts.scalar(self.names.fresh(f"{loop.rank}0"))
        trivial = loop.bounds.end == Extent(loop.rank)
        low = None
        if loop.bounds.begin != Const(0):
            low = self._named("begin", ts.greatest(self.value(loop.bounds.begin, {}), ts.constant(0)))
        scope = Scope(loop=loop, start=start, edge=edge, low=low, high=None if trivial else last)
        self.scopes.append(scope)
        if self.options.loads == "first":
            self._load_first(loop)
        for node in loop.body:
            self.node(node)
        self._yield(loop, states)
        self.scopes.pop()
        step = f"B_{loop.rank}" if self._is_lanes(loop) else str(loop.tile)
        stages = f", num_stages={self.options.stages}" if self.options.stages > 1 else ""
        if self.options.warp_specialize and outer is self.scopes[0]:
            stages += ", warp_specialize=True"
        if edge != "some":
            outer.lines.append(For(start.text, f"tl.range({first.text}, {last.text}, {step}{stages})", scope.lines))
            return
        begins_whole = whole_first.text == first.text
        parts = (first, whole_last, last) if begins_whole else (first, whole_first, whole_last, last)
        runs = "whole tiles without a mask, then tiles over the edge"
        outer.lines.append(Comment(runs if begins_whole else f"tiles over the edge, {runs}"))
        name = self.names.fresh("bounds_of")
        outer.lines.append(Assign(name, f"({', '.join(p.text for p in parts)})"))
        before = 0 if begins_whole else 1  # runs before the whole tiles; `edge` is 0 for these alone
        this, after = ("edge", "edge + 1") if begins_whole else ("edge + 1", "edge + 2")
        inner = For(start.text, f"tl.range({name}[{this}], {name}[{after}], {step}{stages})", scope.lines)
        outer.lines.append(For("edge", f"tl.static_range({-before}, 2)" if before else "tl.static_range(2)", [inner]))

    def _load_first(self, loop: Loop) -> None:
        """Reads what a pass of the loop needs from memory, wherever that is known before anything is computed."""
        own = tuple(node for node in loop.body if not isinstance(node, Loop))
        inputs = {t.name for t in self.program.inputs}
        for read in dict.fromkeys(r for e in body_expressions(own) for r in reads(e) if r.tensor in inputs):
            ranks = tuple(dict.fromkeys(r for c in read.coords for r in expression_ranks(c)))
            known = not any(isinstance(n, (Tile, Read)) for c in read.coords for n in walk(c))
            if known and loop.rank in ranks:
                for digits in self.combinations(ranks):
                    self.load(read, digits, read.tensor.lower())

    def _is_lanes(self, loop: Loop) -> bool:
        axis = self.axes.of(loop.rank)
        return axis is not None and axis.lanes == loop.tile and axis.name == loop.rank

    def _states(self, loop: Loop) -> list[tuple[LoopState, dict[str, int], Value]]:
        """Defines the states before the loop."""
        found = []
        for s in loop.states:
            axes = self.axes_over(s.ranks)
            for digits in self.combinations(s.ranks):
                v = replace(self.held(self.computed(self.value(s.init, digits)), held_type(s.dtype)), dtype=s.dtype)
                wide = self._full(v, axes)
                name = self.names.fresh(self._name(s.name, digits))
                self.here.lines.append(Assign(name, wide.text))
                state = replace(wide, text=name, weak=False, number=None, binding=ts.ATOM, clean=frozenset())
                self.tiles[(s.name, tuple(digits[r] for r in s.ranks if r in self.digit_sizes))] = state
                found.append((s, digits, state))
        return found

    def _full(self, v: Value, axes: tuple[str, ...]) -> Value:
        """`v` as a tensor with all axes, a scalar tensor if there are none."""
        if not axes and v.number is not None:
            return replace(v, text=f"tl.full([], {v.text}, tl.{v.type})", number=None, binding=ts.ATOM)
        return self.expanded(v, axes, self.shape(axes))

    def _yield(self, loop: Loop, states: list[tuple[LoopState, dict[str, int], Value]]) -> None:
        """The states' next values, all worked out before any state changes."""
        following = []
        scope = self.here
        scope.tiles |= {s.name for s in loop.states}
        for s, digits, state in states:
            self.statement = s.name
            v = self.value(s.next, digits)
            v = replace(self.held(self.computed(v), state.type), dtype=s.dtype)
            wide = self._full(v, state.axes)
            following.append((state, self.define(f"{state.text}_next", wide, scope)))
        for state, v in following:
            if v.text != state.text:
                scope.lines.append(Assign(state.text, v.text))

    def _edge(self, loop: Loop) -> Edge:
        """Whether tiles reach over the domain."""
        size = self.program.static_size(loop.rank)
        plain = not loop.conditions and loop.bounds.begin == Const(0) and loop.bounds.end == Extent(loop.rank)
        if plain and size is not None and size % loop.tile == 0:
            return "never"
        if len(self.scopes) > 1 or any(isinstance(node, Loop) for node in loop.body):
            return "always"  # `edge` stands for one loop
        never_whole = loop.bounds.whole_end == Const(0) or (size is not None and size < loop.tile)
        return "always" if never_whole or self.options.edge == "mask" else "some"

    def _bounds(self, loop: Loop) -> tuple[Value, Value, Value, Value]:
        """Where the loop begins, where whole tiles begin and end, and where it ends, as numbers of the task."""
        tile = ts.constant(loop.tile)
        zero, extent = ts.constant(0), self.extent(loop.rank)
        begin, whole_begin, whole_end, end = (
            self.held(self.computed(self.value(e, {})), "int32")
            for e in (loop.bounds.begin, loop.bounds.whole_begin, loop.bounds.whole_end, loop.bounds.end)
        )

        def down(v: Value) -> Value:
            return zero if v.number == 0 else ts.mul(self.infix("//", v, tile), tile)

        first = self._named("first", down(ts.greatest(begin, zero)))
        last = end if loop.bounds.end == Extent(loop.rank) else self._named("last", ts.least(end, extent))
        if loop.bounds.whole_begin == loop.bounds.begin == Const(0):
            whole_first = first
        else:
            up = ts.add(ts.greatest(whole_begin, zero), ts.constant(loop.tile - 1))
            whole_first = self._named("whole_first", ts.greatest(down(up), first))
        inside = ts.least(whole_end, extent) if loop.bounds.whole_end != Extent(loop.rank) else extent
        whole = down(ts.greatest(inside, zero) if inside.text != extent.text else inside)
        if whole_first.number != 0:
            whole = ts.greatest(whole, whole_first)
        return first, whole_first, self._named("whole", whole), last

    def _named(self, wanted: str, v: Value) -> Value:
        return self.define(wanted, v, self.here)

    # -- the file ------------------------------------------------------------------------------------------------------------------

    def signature(self) -> Signature:
        """How the kernel is built and launched."""
        inputs, outputs = memories(self.program)
        contiguous = {axis[-1] for t in self.arrays.values() for axis in t.axes[-1:]}
        aligned = [p.name for p in self.parameters if p.kind in ("pointer", "stride") or (p.kind == "extent" and p.of in contiguous)]
        sizes = {d.name: self.program.static_size(d.name) for d in self.program.ranks}
        return Signature(
            entry=self.entry,
            inputs=inputs,
            outputs=outputs,
            scalars=tuple(s.name for s in self.program.scalars),
            parameters=tuple(self.parameters),
            sizes=tuple((rank, n) for rank, n in sizes.items() if n is not None),
            grid=tuple((axis.rank, axis.tile) for axis in self.program.grid),
            aligned=tuple(aligned),
            warps=self.options.warps,
            stages=self.options.stages,
            persistent=self.options.persistent,
            described=tuple(sorted(self.described)),
            fusion=not self.precise_tiles or any(isinstance(n, Dot) for n in nodes_of(self.program.body)),
        )

    def file(self, body: list[Statement]) -> str:
        """The whole file."""
        text = "\n".join(line.rstrip() for line in print_program(self.program).strip().splitlines())
        constants = [f"B_{axis.name} = tl.constexpr({axis.lanes})" for axis in self.axes.axes]
        literal = pprint.pformat(self.signature().to_literal(), width=130, compact=True, sort_dicts=False)
        head = f'"""Kernel {self.program.name}, emitted by einfall.\n\n{text}\n"""\n\n{HEADER}'
        parts = [head, "\n".join(constants), f"SIGNATURE = {literal}"]
        functions = [*sources(self.helpers), self._function(body)]
        tail = f'{MAIN}\n\n\nif __name__ == "__main__":\n    main()'
        return "\n".join([part for part in parts if part]) + "\n\n\n" + "\n\n\n".join([*functions, tail]) + "\n"

    def _function(self, body: list[Statement]) -> str:
        names = [p.name for p in self.parameters]
        lines = [f"def {self.entry}({', '.join(names)}):"]
        if len(lines[0]) > 120:
            lines = [f"def {self.entry}(", *_wrapped(names), "):"]
        return "\n".join(["@triton.jit", *lines, *render(body, 1)])


def _wrapped(names: list[str]) -> list[str]:
    """Parameters in lines of at most 120 characters."""
    lines, line = [], "   "
    for name in names:
        if len(line) + len(name) + 2 > 120:
            lines.append(line)
            line = "   "
        line += f" {name},"
    return [*lines, line]
