"""One kernel: its loops one after the other, then what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from ...ir.cascade import Cascade, Output, RankDecl, Scan, Tensor
from ...ir.errors import ScheduleError, UnsupportedError
from ...ir.expr import Cast, Const, Expr, Extent, Index, Scalar, reads, walk
from ...ir.plan import KernelPlan
from ...ir.tile import Bounds, GridRank, Loop, Node, Store, TileOutput, TileProgram
from ...ir.types import DType, f32, f64
from ...schedules.default import default_tiles, tile_of
from ...schedules.roles import Roles, kernel_roles
from ...schedules.schedule import Schedule
from ..planned import storing_streams
from .share import (
    drop_dead,
    fold_scales,
    hoist_invariants,
    hoist_parts,
    map_node,
    merge_equal,
    node_expressions,
    share_costly,
    simplify,
)  # fmt: skip
from .stages import StageLowering
from .values import Mode, Section, Values, is_number_of_task

MAX_TILE = 1 << 20
FEW = 16


def lower_kernel(cascade: Cascade, kernel: KernelPlan, schedule: Schedule, sizes: Mapping[str, int]) -> TileProgram:
    """The tile program of one kernel."""
    known = cascade.solve_sizes(sizes)
    roles = kernel_roles(cascade, kernel, known)
    _check_types(cascade, kernel)
    tiles = _tiles(kernel, roles, schedule, known)
    return _KernelLowering(cascade, kernel, roles, tiles, known).program()


def _tiles(kernel: KernelPlan, roles: Roles, schedule: Schedule, sizes: Mapping[str, int]) -> dict[str, int]:
    """Elements of each rank in a tile: grid and stream by the schedule or the default, residents whole."""
    table = default_tiles(roles, sizes)
    for rank in table:
        chosen = tile_of(schedule, kernel, rank)
        if chosen is not None:
            table[rank] = chosen
    for rank in roles.resident:
        if rank not in sizes:
            raise ScheduleError(f"rank {rank!r} is held whole in a tile, so its extent must be known to lower {kernel.name}")
        table[rank] = max(1, sizes[rank])
    for rank, n in table.items():
        if n > MAX_TILE:
            raise ScheduleError(f"a tile of {n} elements along {rank!r} in {kernel.name} is beyond {MAX_TILE}")
    return table


def _check_types(cascade: Cascade, kernel: KernelPlan) -> None:
    for name in kernel.inputs:
        tensor = cascade.input(name)
        if tensor is not None and tensor.dtype == f64:
            raise UnsupportedError(
                f"{name} is f64, and kernels compute in f32", cascade=cascade.name, hint="pass f32 tensors, or use .reference(...) for f64"
            )


class _KernelLowering:
    def __init__(self, cascade: Cascade, kernel: KernelPlan, roles: Roles, tiles: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        self.cascade = cascade
        self.kernel = kernel
        self.roles = roles
        self.sizes = sizes
        self.tiles = tiles
        shaped = {r: n for r, n in tiles.items() if r == kernel.stream or r in roles.resident or n > 1}
        few = [r for r in roles.resident if tiles[r] < FEW]  # such a rank is no lane: it stands before the stream, as rows do
        ordered = [*(r for r in shaped if r in roles.grid), *few, *(r for r in shaped if r not in few and r not in roles.grid)]
        self.values = Values(cascade, kernel, {r: shaped[r] for r in ordered}, frozenset(roles.resident))
        self.done: list[StageLowering] = []
        self.counter = 0

    def program(self) -> TileProgram:
        """The whole kernel: its streams one after the other, each with what it can store on the way, then the rest."""
        v = self.values
        stream = self.kernel.stream or ""
        storing = storing_streams(self.cascade, self.kernel)
        inside = list(storing)
        for stage in self.kernel.stages:
            lowering = StageLowering(v, stage, self._final)
            now = [name for name in inside if storing[name] == stage.index]
            loop = lowering.loop(partial(self._stores, now))
            self.done.append(lowering)
            self._append_loop(loop)
            v.stored.update(name for name in now if v.statements[name].op is not None)
            inside = [name for name in inside if name not in now]
        for name in self.kernel.outputs:
            if stream not in v.cascade.tensor_ranks()[name]:
                v.outer.nodes.append(self._store(name))
        if inside:
            v.body, v.inside = Section(), set()
            for name in inside:
                v.body.nodes.append(self._store(name))
            nodes, carried, v.body = tuple(v.body.nodes), tuple(v.body.carried), None
            whole = Bounds(Const(0), Const(0), Extent(stream), Extent(stream))
            self._append_loop(Loop(stream, v.size(stream), (), whole, carried, nodes))
        return self._finish()

    # values ------------------------------------------------------------------------------------------------------------

    def _final(self, name: str) -> Expr:
        """A streamed reduction after its loop."""
        stage = next(s for s in self.done if name in s.by_reduction)
        return stage.value(name, stage.at_end, Extent(self.kernel.stream or ""), self._final_mode())

    def _final_mode(self) -> Mode:
        return Mode(self._final)

    def _stores(self, names: list[str]) -> list[Store]:
        return [self._store(name) for name in names]

    def _store(self, name: str) -> Store:
        v = self.values
        ranks = self.cascade.tensor_ranks()[name]
        statement = v.statements.get(name)
        e: Expr
        if name in v.streamed:
            e = self._final(name)
        elif isinstance(statement, Scan):
            e = v.scan(statement, self._final_mode())
        elif statement is not None and statement.op is None:
            e = v.convert(v.masked_map(statement), self._final_mode())
        elif statement is not None:
            e = v.inner(statement, self._final_mode())
        else:
            raise v.unsupported(f"{name} is an input and a result at once", name)
        return Store(name, tuple(Index(r) for r in ranks), simplify(e), note=name)

    # clean-up ------------------------------------------------------------------------------------------------------------

    def _name(self, e: Expr) -> str:
        self.counter += 1
        name = self.values.new_name(f"x{self.counter}")
        self.values.declare(name, self.values.ranks_of(e), self.values.type_of(e))
        return name

    def _append_loop(self, loop: Loop) -> None:
        v = self.values
        stream = loop.rank
        body = tuple(map_node(n, simplify) for n in loop.body)
        inside = {s.name for s in loop.states} | {n.dst for n in body if not isinstance(n, (Store, Loop))}
        before, body = hoist_invariants(body, inside, stream, v.ranks_of, self._name)
        v.outer.nodes.extend(before)
        loop = merge_equal(replace(loop, body=body))
        body = share_costly(loop.body, v.ranks_of, self._name)
        body = hoist_parts(body, v.ranks_of, self._name)
        v.outer.nodes.append(replace(loop, body=body))

    def _all_float32(self, e: Expr) -> bool:
        types = self.values.input_types()
        narrow = any(types.get(r.tensor, f32) != f32 for r in reads(e))
        return not narrow and not any(isinstance(n, Cast) for n in walk(e))

    def _finish(self) -> TileProgram:
        v = self.values
        outer = tuple(v.outer.nodes)
        last = max((i for i, n in enumerate(outer) if isinstance(n, Loop)), default=-1)
        tail = share_costly(tuple(map_node(n, simplify) for n in outer[last + 1 :]), v.ranks_of, self._name)
        tail = hoist_parts(tail, v.ranks_of, self._name)
        folded = fold_scales((*outer[: last + 1], *tail), lambda e: is_number_of_task(e, v.tiles), self._all_float32)
        body = drop_dead(folded, set())
        outputs = {o.name: o for o in self.cascade.outputs}
        stored = tuple(
            TileOutput(outputs.get(n) or Output(n, tuple((r,) for r in v.cascade.tensor_ranks()[n])), self._stored_type(n))
            for n in self.kernel.outputs
        )
        known = {r: Const(int(self.sizes[r])) for r in self.roles.resident}
        ranks = tuple(d if d.name not in known else RankDecl(d.name, known[d.name]) for d in self.cascade.ranks)
        declared = {d.name for d in ranks}
        ranks += tuple(RankDecl(r, size) for r, size in known.items() if r not in declared)
        inputs = self._inputs(known, body)
        ranks = self._used(ranks, inputs, body)
        grid = tuple(GridRank(r, self.tiles[r]) for r in self.roles.grid)
        scalars = tuple(s for s in self.cascade.scalars if _reads_scalar(body, s.name))
        return TileProgram(self.kernel.name, inputs, stored, scalars, ranks, grid, self.roles.resident, body)

    def _stored_type(self, name: str) -> DType:
        return self.values.types[name]

    def _used(self, declared: tuple[RankDecl, ...], inputs: tuple[Tensor, ...], body: tuple[Node, ...]) -> tuple[RankDecl, ...]:
        """The declarations of ranks that the kernel has, and of those that their sizes mention."""
        table = self.cascade.tensor_ranks()
        used = {r for t in inputs for r in t.ranks} | {r for name in self.kernel.outputs for r in table[name]}
        used |= {*self.roles.grid, *self.roles.resident}
        used |= {self.kernel.stream} if self.kernel.stream else set()
        used |= {n.rank for e in _all_expressions(body) for n in walk(e) if isinstance(n, (Extent, Index))}
        plain = {axis[0] for t in inputs for axis in t.axes if len(axis) == 1}
        parts = {d.name: {n.rank for n in walk(d.size) if isinstance(n, Extent)} for d in declared}
        before = -1
        while len(used) > before:
            before = len(used)
            needed = {name for name in used if name in parts and (name not in plain or parts[name] & used)}
            used |= {r for name in needed for r in parts[name]}
        return tuple(d for d in declared if d.name in used and parts[d.name] <= used)

    def _inputs(self, known: Mapping[str, Const], body: tuple[Node, ...]) -> tuple[Tensor, ...]:
        """The tensors that the kernel reads, inputs of the cascade first, and such as are needed only for the extent of a rank."""
        table = self.cascade.tensor_ranks()
        names = [*self.kernel.inputs]
        wanted = {r for name in self.kernel.outputs for r in table[name]} | set(self.roles.grid)
        wanted |= {self.kernel.stream} if self.kernel.stream else set()
        wanted |= {n.rank for e in _all_expressions(body) for n in walk(e) if isinstance(n, Extent)}
        wanted |= {n.rank for d in self.cascade.ranks if d.name in wanted for n in walk(d.size) if isinstance(n, Extent)}
        given = {r for name in names for r in table[name]} | set(known) | {d.name for d in self.cascade.ranks}
        for rank in sorted(wanted - given):
            carrier = next((t.name for t in self.cascade.inputs if rank in t.ranks), None)
            if carrier is not None and carrier not in names:
                names.append(carrier)
        inputs = [t for t in self.cascade.inputs if t.name in names]
        stored = {o.name: o.axes for o in self.cascade.outputs}
        for name in names:
            if self.cascade.input(name) is None:
                inputs.append(Tensor(name, stored.get(name, tuple((r,) for r in table[name])), self.values.types[name]))
        return tuple(inputs)


def _reads_scalar(nodes: tuple[Node, ...], name: str) -> bool:
    return any(n == Scalar(name) for e in _all_expressions(nodes) for n in walk(e))


def _all_expressions(nodes: tuple[Node, ...]) -> Iterator[Expr]:
    """Every expression of `nodes`, those that say where a loop runs included."""
    for node in nodes:
        yield from node_expressions(node)
        if isinstance(node, Loop):
            yield from (*node.conditions, node.bounds.begin, node.bounds.whole_begin, node.bounds.whole_end, node.bounds.end)
            yield from _all_expressions(node.body)
