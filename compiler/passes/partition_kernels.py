"""`partition_kernels`: which statements share a kernel, and what that kernel streams.

A kernel is grown backwards from the tensors it stores. Its stream is a rank that the last reductions before them reduce; other
reductions on the way are done within a tile, over ranks held whole, unless such a rank is also one that the kernel iterates over
or is too long for that: then the reduction's result is stored by a kernel of its own (statistics are exported, not elements).
Stored tensors with the same stream and grid share a kernel, unless one must lie in memory whole before the other is computed.
Statements over whole tensors (sorts, selections, scatters) are steps of their own between the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

from ...ir.cascade import Cascade, Einsum, Iterate, Scan, Statement, defined
from ...ir.errors import UnsupportedError
from ...ir.expr import Expr, Op, Read, aligned, children, reads
from ...ir.infer import declared_types
from ...ir.plan import KernelPlan, LibraryPlan, LoopPlan, Plan, Rejected, Stage, Step
from ...schedules.schedule import Result
from .graph import conjuncts, definitions, dependencies
from .stream_reductions import Streamer
from .whole_tensors import Computed, behind, one_step, single, whole_tensors

RESIDENT_LIMIT, SHORT_LIMIT = 1024, 64
INNER_LIMIT = 1 << 14
SHARED_LIMIT = 1024
SHARING_ROWS, STORED_BYTES = 64, 4  # rows of a task that share a streamed operand; bytes of a stored element
FEW = 8  # a rank of so few elements is no stream if there is another
REPEATED_SIZE, REPEATED_LIMIT = 16, 512  # elements of an inner reduction, elements of the ranks that repeat it


@dataclass(slots=True)
class _Group:
    """A kernel while it grows."""

    stream: str | None
    ranks: frozenset[str]
    roots: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Partition:
    """The steps, and for each result stored only for a later step the reason."""

    steps: tuple[Step, ...]
    cuts: tuple[Rejected, ...]


def partition_kernels(
    cascade: Cascade,
    sizes: Mapping[str, int],
    plan: Callable[[Cascade], Plan],
    *,
    repeat: frozenset[str] = frozenset(),
    results: Mapping[str, Result],
) -> Partition:
    """The steps in launch order. `plan` gives the plan of one step of an iterative block.

    Raises `UnsupportedError` where the kernels would need each other's results.
    """
    return _Partitioner(cascade, sizes, plan, repeat, results).partition()


def over(s: Einsum | Scan) -> tuple[str, ...]:
    """The ranks along which a statement is more than a map."""
    return s.over if isinstance(s, Einsum) else (s.over,)


class _Partitioner:
    def __init__(
        self,
        cascade: Cascade,
        sizes: Mapping[str, int],
        plan: Callable[[Cascade], Plan],
        repeat: frozenset[str],
        results: Mapping[str, Result],
    ) -> None:
        self.cascade = cascade
        self.plan = plan
        self.sizes = {**cascade.solve_sizes(sizes)}
        self.static = cascade.static_sizes()
        self.types = declared_types(cascade)
        self.repeat = repeat
        self.results = results
        self.table = definitions(cascade)
        self.depends = dependencies(cascade)
        self.whole = whole_tensors(cascade)
        self.behind = behind(cascade)
        self.levels: dict[str, int] = {}
        self.order = {name: i for i, s in enumerate(cascade.body) for name, _ in defined(s)}

    def partition(self) -> Partition:
        """Kernels are grown anew whenever one turns out to need a result stored, so that results with equal streams share a kernel."""
        library = [self._whole(s) for s in self.cascade.body if not isinstance(s, Computed)]
        made = {name for step in library for name in step.outputs}
        given = {t.name for t in self.cascade.inputs}
        roots = [name for name in dict.fromkeys((*(o.name for o in self.cascade.outputs), *self.whole)) if name not in made | given]
        careful = False
        while True:
            groups = self._group(roots, careful=careful)
            elsewhere = {name: group for group in groups for name in group.roots}
            grown = [self._grow(group, i, elsewhere) for i, group in enumerate(groups)]
            missing = [name for _, needs in grown for name in needs if name not in roots]
            if not missing:
                steps = self._sorted([*(plan for plan, _ in grown), *library], again=careful)
                if not steps:
                    careful = True
                    continue
                given.update(o.name for o in self.cascade.outputs)
                return Partition(steps, tuple(Rejected("fuse", name, self._why(name)) for name in roots if name not in given))
            roots.extend(dict.fromkeys(missing))

    def _why(self, name: str) -> str:
        """The reason why a result is stored for a later kernel."""
        if name in self.whole:
            return f"stored: {self.whole[name]}"
        s = self.table[name]
        ranks = ", ".join(over(s)) if isinstance(s, Computed) else ""
        return f"stored: a reduction over {ranks} cannot be done within the tiles of the kernel that reads it, or many would do it again"

    def _whole(self, s: Statement) -> LibraryPlan | LoopPlan:
        alone = single(self.cascade, s)
        if not isinstance(s, Iterate):
            return LibraryPlan(alone.name, alone)
        step = one_step(self.cascade, s, alone)
        return LoopPlan(alone.name, alone, step, self.plan(step))

    def _group(self, roots: list[str], *, careful: bool) -> list[_Group]:
        """Roots that may share a kernel.

        A `careful` one never has a root of another kernel between two of its own, and all its roots wait for equally long chains of
        whole tensors, so that two kernels cannot wait for each other.
        """
        groups: list[_Group] = []
        for root in sorted(roots, key=lambda name: self.order.get(name, -1)):
            stream = self._stream(root)
            ranks = frozenset(self._ranks(root)) - {stream}
            for group in groups:
                apart = any(other in self.behind[root] or root in self.behind[other] for other in group.roots)
                if careful and self._level(root) != self._level(group.roots[0]):
                    continue
                if careful and any(self._between(root, other.roots, group.roots) for other in groups if other is not group):
                    continue
                if group.stream == stream and not apart and self._share(group.ranks, ranks):
                    group.roots.append(root)
                    group.ranks = group.ranks | ranks
                    break
            else:
                groups.append(_Group(stream, ranks, [root]))
        return self._ride_along(groups)

    def _ride_along(self, groups: list[_Group]) -> list[_Group]:
        """Groups without a stream that work out what a streaming kernel needs tile by tile are stored by that kernel on its way."""
        kept: list[_Group] = []
        for group in groups:
            host = next((other for other in groups if self._carries(other, group)), None)
            if host is None:
                kept.append(group)
            else:
                host.roots.extend(group.roots)
                host.ranks = host.ranks | group.ranks - {host.stream or ""}
        return kept

    def _carries(self, host: _Group, group: _Group) -> bool:
        """Whether the tasks of `host` come by everything that `group` stores, and both need the same reductions."""
        if host.stream is None or group.stream is not None or host.stream not in group.ranks:
            return False
        if any(name in self.behind[root] for root in host.roots for name in group.roots) or not self._apart_from(host, group):
            return False
        extra = host.ranks ^ (group.ranks - {host.stream})
        if not all(self._is_short(r, extra) or self.sizes.get(r, INNER_LIMIT) <= SHORT_LIMIT for r in extra):
            return False
        needs = {n for root in host.roots for n in self.depends[root] if self._reduces(n)}
        return any(needs & {root, *self.depends[root]} for root in group.roots)

    def _apart_from(self, host: _Group, group: _Group) -> bool:
        """Whether nothing that `group` stores needs what `host` streams."""
        return not any(root in self.depends[name] or root in self.behind[name] for name in group.roots for root in host.roots)

    def _reduces(self, name: str) -> bool:
        s = self.table.get(name)
        return isinstance(s, Einsum) and s.op is not None

    def _level(self, name: str) -> int:
        """The length of the longest chain of tensors that must be whole one after the other before `name` can be made."""
        if name not in self.levels:
            self.levels[name] = max((1 + self._level(other) for other in self.behind.get(name, ())), default=0)
        return self.levels[name]

    def _between(self, root: str, others: list[str], mine: list[str]) -> bool:
        """Whether `root` needs one of `others` that needs one of `mine`."""
        return any(other in self.depends[root] and any(name in self.depends[other] for name in mine) for other in others)

    def _share(self, a: frozenset[str], b: frozenset[str]) -> bool:
        """Whether two results may be made by the same tasks: ranks that one of them lacks are short."""
        extra = max(math.prod(self.sizes.get(rank, INNER_LIMIT) for rank in side) for side in (a - b, b - a))
        nested = a <= b or b <= a or all(self._is_short(rank, a | b) or self.sizes.get(rank, INNER_LIMIT) <= FEW for rank in a ^ b)
        return nested and extra <= SHARED_LIMIT

    # the stream --------------------------------------------------------------------------------------------------------

    def _stream(self, root: str) -> str | None:
        last = self._last_reductions(root)
        mine = set(self._ranks(root))
        candidates: dict[str, None] = {}
        for r in last:
            candidates.update({rank: None for rank in over(r) if isinstance(r, Scan) or not self._is_short(rank, mine)})
        free = [rank for rank in candidates if not any(self._feeds(rank, r) for r in last if rank not in over(r))]
        if candidates and all(self.sizes.get(rank, INNER_LIMIT) <= FEW for rank in candidates):
            last_stream = self._last_stream(root)
            if last_stream is not None:
                return last_stream
        ranked = sorted(free or candidates, key=lambda rank: -self.sizes.get(rank, INNER_LIMIT))
        chosen = ranked[0] if ranked else None
        shaped = {rank for r in last if chosen in over(r) for rank in (*r.ranks, *over(r))}
        if chosen is not None and any(rank not in shaped and not self._is_short(rank, mine) for rank in mine):
            return None  # a map along a rank of its own: others store the reductions that it reads
        return chosen

    def _last_stream(self, root: str) -> str | None:
        """A long rank of `root` that reductions before it run over: it can be stored when these are done, in a last stream."""
        reduced = {rank for n in self.depends[root] if isinstance(s := self.table.get(n), Einsum) and s.op is not None for rank in s.over}
        mine = self._ranks(root)
        found = [rank for rank in mine if rank in reduced and self.sizes.get(rank, INNER_LIMIT) > FEW and not self._is_short(rank, mine)]
        return max(found, key=lambda rank: self.sizes.get(rank, INNER_LIMIT), default=None)

    def _is_short(self, rank: str, stored: Container[str]) -> bool:
        """Whether a rank of constant size is held whole rather than streamed: a block, a group, a window."""
        size = self.static.get(rank)
        return size is not None and size <= (RESIDENT_LIMIT if rank in stored else SHORT_LIMIT)

    def _last_reductions(self, root: str) -> list[Einsum | Scan]:
        """The reductions and scans from which `root` is reached through maps alone."""
        found: dict[str, Einsum | Scan] = {}

        def visit(name: str) -> None:
            s = self.table.get(name)
            if name in found or not isinstance(s, Computed) or (name in self.whole and name != root):
                return
            if s.op is not None:
                found[name] = s
                return
            for e in (s.expr, *([s.where] if s.where is not None else [])):
                for r in reads(e):
                    visit(r.tensor)

        visit(root)
        return list(found.values())

    def _feeds(self, rank: str, r: Einsum | Scan) -> bool:
        """Whether a reduction or scan over `rank` comes before `r`."""
        return any(isinstance(s := self.table.get(n), Computed) and rank in over(s) for n in self.depends[r.out])

    # the statements ------------------------------------------------------------------------------------------------------

    def _grow(self, group: _Group, index: int, elsewhere: Mapping[str, _Group]) -> tuple[KernelPlan, list[str]]:
        reductions: dict[str, None] = {}
        statements: dict[str, Einsum | Scan] = {}
        inputs: dict[str, None] = {}
        missing: list[str] = []

        def visit(name: str) -> None:
            if name in reductions or name in statements or name in inputs:
                return
            s = self.table.get(name)
            if not isinstance(s, Computed) or (name in self.whole and name not in group.roots):
                inputs[name] = None
                return
            if self._is_read(name, group, elsewhere):
                inputs[name] = None
                return
            streamed = isinstance(s, Einsum) and s.op is not None and group.stream in s.over
            if name not in group.roots and s.op is not None and not streamed and not self._inner(s, group):
                inputs[name] = None
                missing.append(name)
                return
            if streamed:
                reductions[name] = None
            else:
                statements[name] = s
            for e in (s.expr, *([s.where] if s.where is not None else [])):
                for r in reads(e):
                    visit(r.tensor)

        for root in group.roots:
            visit(root)
        names = sorted(reductions, key=self.order.__getitem__)
        stages: tuple[Stage, ...] = ()
        if group.stream is not None:
            stages = Streamer(self._without(inputs), group.stream, names, online=group.stream not in self.repeat).stages()
        ordered = tuple(statements[n] for n in sorted(statements, key=self.order.__getitem__))
        name = self.cascade.name if index == 0 else f"{self.cascade.name}_{index}"
        kept = tuple(s.out for s in ordered if group.stream and self._is_kept(s, group, stages, inputs))
        outputs = tuple(dict.fromkeys((*group.roots, *kept)))
        return KernelPlan(name, group.stream, stages, ordered, tuple(inputs), outputs, kept), missing

    def _is_read(self, name: str, group: _Group, elsewhere: Mapping[str, _Group]) -> bool:
        """Whether a result that another kernel stores is read rather than worked out again: it takes a reduction to have it."""
        other = elsewhere.get(name)
        if other is None or other is group or any(root in self.depends[o] for root in group.roots for o in other.roots):
            return False
        return any(isinstance(s := self.table.get(n), Computed) and s.op is not None for n in (name, *self.depends[name]))

    def _is_kept(self, s: Einsum | Scan, group: _Group, stages: tuple[Stage, ...], inputs: Container[str]) -> bool:
        """Whether a product that several streams of the kernel need is better stored by the first than summed again by the others.

        It is where writing and reading it moves less than reading its operands again: when few rows share them.
        """
        stream = group.stream or ""
        if not isinstance(s, Einsum) or s.op != "sum" or stream not in s.ranks or s.out in group.roots:
            return False
        streams = [{r.out for r in stage.reductions} for stage in stages]
        streams.append({root for root in group.roots if stream in self._ranks(root)})
        if sum(any(s.out in self.depends[name] for name in names) for names in streams) < 2:
            return False
        if not all(self._within(name, s.out, stages[0].domain.predicates) for names in streams[1:] for name in names):
            return False
        if s.out in self.results:
            return self.results[s.out] == "keep"
        operands = self._operands(s)
        lacking = [r for r in s.ranks if r != stream and any(stream in self._ranks(t) and r not in self._ranks(t) for t in operands)]
        rows = min(SHARING_ROWS, math.prod(self.sizes.get(r, SHARING_ROWS) for r in lacking))
        again = sum(self._bytes_along(t, s.over) for t in operands if stream in self._ranks(t) and t in inputs)
        return 2 * STORED_BYTES * rows < again

    def _operands(self, s: Einsum) -> list[str]:
        """The tensors that the summand reads, through the maps that it is written with."""
        found: dict[str, None] = {}

        def visit(e: Expr) -> None:
            for r in reads(e):
                source = self.table.get(r.tensor)
                if isinstance(source, Einsum) and source.op is None and r.tensor not in self.whole:
                    visit(source.expr)
                else:
                    found[r.tensor] = None

        visit(s.expr)
        return list(found)

    def _within(self, name: str, kept: str, domain: tuple[Expr, ...]) -> bool:
        """Whether `name` depends on `kept` only at points that satisfy `domain`, where the first stream has been."""

        def used(e: Expr, known: tuple[Expr, ...]) -> bool:
            match e:
                case Op(name="where", args=(c, a, b)):
                    return used(c, known) and used(a, (*known, *conjuncts(c))) and used(b, known)
                case Read(tensor=tensor) if tensor == kept:
                    return set(domain) <= set(known)
                case Read(tensor=tensor) if isinstance(s := self.table.get(tensor), Computed) and kept in self.depends[tensor]:
                    return used(s.expr, (*known, *conjuncts(s.where)))
                case _:
                    return all(used(child, known) for child in children(e))

        return not domain or used(aligned(name, *self._ranks(name)), ())

    def _bytes_along(self, tensor: str, ranks: tuple[str, ...]) -> float:
        """The bytes of `tensor` along `ranks`, at one index of the others."""
        return math.prod(self.sizes.get(r, 1) for r in self._ranks(tensor) if r in ranks) * self.types[tensor].bytes

    def _inner(self, s: Einsum | Scan, group: _Group) -> bool:
        """Whether the reduction can be done within a tile of the kernel, and is not done over and over by tasks that all need it.

        A scan can if it runs along the stream.
        """
        if isinstance(s, Scan):
            return s.over == group.stream
        if any(rank not in self.static and self._chained(rank, s) for rank in s.over) or group.stream in s.over:
            return False
        size = math.prod(self.sizes.get(rank, INNER_LIMIT + 1) for rank in s.over)
        apart = all(rank not in group.ranks or self._is_short(rank, group.ranks) or self.sizes.get(rank, FEW + 1) <= FEW for rank in s.over)
        if size > INNER_LIMIT or not apart:
            return False
        if s.out in self.results:
            return self.results[s.out] != "store"
        tasks = (rank for rank in group.ranks if rank not in s.ranks and not self._is_short(rank, group.ranks))
        repeated = math.prod(n for rank in tasks if (n := self.sizes.get(rank, 1)) > FEW)
        return size < REPEATED_SIZE or repeated < REPEATED_LIMIT

    def _chained(self, rank: str, s: Einsum) -> bool:
        """Whether another reduction over `rank` comes before `s` or after it: together they are a stream of their own."""
        others = (o for o in self.cascade.body if isinstance(o, Einsum) and rank in o.over and o.out != s.out)
        return any(o.out in self.depends[s.out] or s.out in self.depends[o.out] for o in others)

    def _without(self, inputs: Container[str]) -> Cascade:
        """The cascade for a kernel that reads `inputs` from memory: how these came about is none of its business."""
        return replace(self.cascade, body=tuple(s for s in self.cascade.body if not any(name in inputs for name, _ in defined(s))))

    def _ranks(self, name: str) -> tuple[str, ...]:
        s = self.table.get(name)
        if s is None:
            tensor = self.cascade.input(name)
            return tensor.ranks if tensor is not None else ()
        return dict(defined(s))[name]

    def _sorted(self, steps: list[Step], *, again: bool) -> tuple[Step, ...]:
        """Producers before consumers, otherwise as found; nothing if some need each other's results, an error if that is so `again`."""
        ready: list[Step] = []
        waiting = list(steps)
        while waiting:
            made = {name for step in waiting for name in step.outputs}
            free = [step for step in waiting if not made & set(step.inputs) - set(step.outputs)]
            ready.extend(free)
            waiting = [step for step in waiting if step not in free]
            if not free and not again:
                return ()
            if not free:
                raise UnsupportedError("the kernels of this cascade would need each other's results", cascade=self.cascade.name)
        return tuple(ready)
