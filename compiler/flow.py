"""How far each statement depends on whole traversals of a rank: the rules behind passes and phases.

For a statement s, a rank R and a set T of inputs,

    start(s)   the traversals that must be over before s may read, by the rules
               (a) a tensor read at R's own indices: what s needs of it is at hand as soon as that element is,
               (b) an intermediate read elsewhere (gathered, at a constant, at its last index): all of it must be there,
               (c) a tensor without R: it must be complete;
    roots(s)   the inputs of T whose current traversal s takes part in;
    done(s)    start(s), and one more where s consumes R: a reduction, top-k, sort, scatter, the end of an iteration.

An input gathered from or read at a constant is a *partial* read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..ir.cascade import Cascade, Iterate, Populate, Scatter, Statement, defined, expressions
from ..ir.errors import CascadeError
from ..ir.expr import Expr, Extent, Index, Op, Read, children, reads
from ..ir.plan import KernelPlan, Plan, Stage

_MAX_STEPS = 1024  # an iteration of known length is followed step by step so far
_EMPTY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fiber:
    """A rank as the analysis sees it: the ranks that make it up, and the inputs that carry it."""

    name: str
    ranks: frozenset[str]
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Effect:
    """Of a tensor or statement: inputs whose traversal it takes part in (`part` of them only partially), traversals over before it."""

    full: frozenset[str] = _EMPTY
    part: frozenset[str] = _EMPTY
    done: int = 0

    @property
    def roots(self) -> frozenset[str]:
        return self.full | self.part

    def join(self, other: Effect) -> Effect:
        """Both: the union of the roots, the later end."""
        return Effect(self.full | other.full, self.part | other.part, max(self.done, other.done))

    def closed(self) -> Effect:
        """What remains where the rank ends: nothing in flight, one more traversal over if there was one."""
        return Effect(done=self.done + bool(self.roots))


@dataclass(frozen=True, slots=True)
class Step:
    """What one statement (or stage of a plan) was found to do; `effect.done` is its start."""

    statement: str
    effect: Effect


def fiber(c: Cascade, rank: str) -> Fiber:
    """The fiber `rank` names: a rank, or several composed `(n j)`. Raises `CascadeError` with the nearest name for an unknown one.

    A composed rank is its components. A concatenated rank is its pieces, and a piece stands for the whole, restricted to the inputs
    that have the piece.
    """
    known = c.all_ranks()
    parts = rank.strip()[1:-1].split() if rank.strip().startswith("(") else [rank.strip()]
    for part in parts or [rank]:
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = (f"{near[0]!r}; " if near else "") + "the ranks are " + ", ".join(known)
            raise CascadeError(f"unknown rank {part!r}", cascade=c.name, hint=hint)
    found: set[str] = set()
    carriers: set[str] = set()
    for part in parts:
        below = _below(c, part)
        whole = below.union(*(_below(c, parent) for parent in _parents(c, part, concatenated=True)))
        found |= whole | _parents(c, part, concatenated=False)
        carriers |= below | _parents(c, part, concatenated=False)
    inputs = tuple(t.name for t in c.inputs if carriers & set(t.ranks))
    return Fiber(rank.strip(), frozenset(found), inputs)


def _below(c: Cascade, rank: str) -> set[str]:
    """`rank` and everything it is made of."""
    return {rank}.union(*(_below(c, part) for part in _parts(c, rank)))


def _parts(c: Cascade, rank: str) -> tuple[str, ...]:
    """The factors or pieces of `rank`; a rank that is another and a few elements more is of a size, not made of pieces."""
    return c.components(rank) if not c.is_concatenated(rank) or _only_extents(c.size_of(rank)) else ()


def _only_extents(size: Expr | None) -> bool:
    return isinstance(size, Extent) or (isinstance(size, Op) and size.name == "add" and all(_only_extents(a) for a in size.args))


def _parents(c: Cascade, rank: str, *, concatenated: bool) -> set[str]:
    """The ranks that `rank` is, directly or not, a piece (or else a factor) of."""
    direct = {d.name for d in c.ranks if rank in _parts(c, d.name) and c.is_concatenated(d.name) == concatenated}
    return direct.union(*(_parents(c, parent, concatenated=concatenated) for parent in direct))


@dataclass(slots=True)
class Flow:
    """The effects of one fiber on one cascade, worked out on demand; `steps` lists the statements reached."""

    cascade: Cascade
    along: Fiber
    inputs: frozenset[str]
    ranks: dict[str, tuple[str, ...]]
    owners: dict[str, Statement]
    stages: dict[str, Stage]
    effects: dict[str, Effect] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    every_source: bool = False
    implied: frozenset[str] = _EMPTY
    per_step: dict[str, None] = field(default_factory=dict)

    def effect(self, name: str) -> Effect:
        """The effect of a tensor, computing its statement first if need be."""
        if name not in self.effects:
            if name in self.stages:
                self._stage(self.stages[name])
            elif name in self.owners:
                self._statement(self.owners[name])
            else:
                carried = name in self.inputs and name in self.along.inputs
                self.effects[name] = Effect(full=frozenset({name}) if carried else _EMPTY)
        return self.effects[name]

    def indexed(self, name: str) -> bool:
        """Whether a tensor varies along the fiber."""
        return name in self.implied or bool(self.along.ranks & set(self.ranks.get(name, ())))

    def read(self, read: Read) -> Effect:
        """What reading an element brings in, by the rules (a), (b) and (c)."""
        effect = self.effect(read.tensor)
        if not self.indexed(read.tensor):
            return Effect(done=effect.done)
        coordinates = [x for rank, x in zip(self.ranks[read.tensor], read.coords, strict=True) if rank in self.along.ranks]
        indices = {rank for x in coordinates for rank in _plain_indices(x)}
        if read.tensor in self.implied or indices & self.along.ranks:
            return effect
        if self.cascade.input(read.tensor) is None:
            return effect.closed()
        return Effect(full=effect.roots) if indices else Effect(part=effect.roots)

    def collect(self, exprs: Iterator[Expr]) -> Effect:
        """The start and the roots of everything `exprs` read."""
        total = Effect()
        for e in exprs:
            for read in reads(e):
                total = total.join(self.read(read))
        return total

    def _statement(self, s: Statement) -> None:
        if isinstance(s, Iterate):
            self._iterate(s)
            return
        (name, _), *_ = defined(s)
        start = self.collect(expressions(s))
        self.steps.append(Step(name, start))
        for out, ranks in defined(s):
            self.ranks.setdefault(out, ranks)
            self.effects[out] = start if self._carried(s, ranks) else start.closed()
            if self.every_source and self.indexed(out) and not self.effects[out].roots and any(reads_of(s)):
                self.effects[out] = Effect(frozenset({out}), done=self.effects[out].done)

    def _carried(self, s: Statement, ranks: tuple[str, ...]) -> bool:
        """Whether the result of `s` still runs along the fiber, element by element."""
        placed = {s.into} if isinstance(s, Populate) else {r for r, _ in s.at} if isinstance(s, Scatter) else set()
        return bool(self.implied and defined(s)[0][0] in self.implied) or bool(self.along.ranks & (set(ranks) - placed))

    def _stage(self, stage: Stage) -> None:
        """All reductions of a stage at once: what moves with them does not wait, everything else they read does."""
        moving = {r.out for r in stage.reductions}
        total = Effect()
        for read in self._stage_reads(stage, moving):
            total = total.join(self.read(read))
        self.steps.append(Step(", ".join(r.out for r in stage.reductions), total))
        for reduction in stage.reductions:
            carried = bool(self.along.ranks & set(reduction.ranks))
            self.effects[reduction.out] = total if carried else total.closed()

    def store(self, kernel: KernelPlan) -> None:
        """Lets the first stage store what the kernel keeps: later ones read that, and take no part in the traversal of its operands."""
        for name in (*(r.out for r in kernel.stages[0].reductions), *kernel.kept):
            self.effect(name)
        kept = set(kernel.kept)
        for name in [n for n in self.effects if n not in self.stages and n not in kept and self._depends(n, kept)]:
            del self.effects[name]
        self.effects.update({name: Effect(done=self.effects[name].done) for name in kept})

    def _stage_reads(self, stage: Stage, moving: set[str]) -> Iterator[Read]:
        """What the reductions of a stage read from outside it, through the maps that move with them."""
        seen: set[str] = set()
        pending = [e for r in stage.reductions for e in expressions(r)]
        while pending:
            for read in reads(pending.pop()):
                owner = self.owners.get(read.tensor)
                if read.tensor in moving:
                    continue
                if owner is None or not self._depends(read.tensor, moving):
                    yield read
                elif read.tensor not in seen:
                    seen.add(read.tensor)
                    pending.extend(expressions(owner))

    def _depends(self, name: str, on: set[str]) -> bool:
        """Whether a tensor is computed from one of `on`."""
        pending, seen = [name], set()
        while pending:
            current = pending.pop()
            if current in on:
                return True
            if current in seen or current not in self.owners:
                continue
            seen.add(current)
            pending.extend(r.tensor for e in expressions(self.owners[current]) for r in reads(e))
        return False

    def _iterate(self, s: Iterate) -> None:
        """A block, to a fixpoint of its states; the iteration's own rank is carried by everything inside."""
        for e in expressions(s):  # what lies outside is worked out first, so that its steps are listed once
            for read in reads(e):
                if read.tensor not in self._inside(s):
                    self.effect(read.tensor)
        inside = s.rank in self.along.ranks
        outer = self.implied
        if inside:
            self.implied = outer | self._inside(s)
        entry = {state.name: self._result(self.collect(iter((state.init,))), state.ranks, inside) for state in s.states}
        trips = self._trips(s)
        mark = len(self.steps)
        before = entry
        for trip in range(trips):
            del self.steps[mark:]
            after = self._step(s, before, inside)
            if after == before:
                break
            if trip == trips - 1 and self._steps(s) is None:
                self.per_step[s.rank] = None
                del self.steps[mark:]
                after = self._step(s, entry, inside)
            before = after
        self.implied = outer
        for state in s.states:
            final = before[state.name]
            along = bool(self.along.ranks & set(state.ranks)) or state.name in outer
            self.effects[state.name] = final if along or not inside else final.closed()

    def _inside(self, s: Iterate) -> frozenset[str]:
        """The names a block defines: states and everything in its body."""
        names = {state.name for state in s.states}
        for inner in s.body:
            names |= self._inside(inner) if isinstance(inner, Iterate) else {name for name, _ in defined(inner)}
        return frozenset(names)

    def _steps(self, s: Iterate) -> int | None:
        """The steps of a block if they are known and repeat passes; inputs that vary with the step have a fiber of their own in each."""
        steps = self.cascade.static_sizes().get(s.rank)
        tables = {t.name: t.ranks for t in self.cascade.inputs}
        fresh = all(s.rank in tables[name] for name in self.inputs)
        return steps if steps is not None and steps <= _MAX_STEPS and not fresh else None

    def _trips(self, s: Iterate) -> int:
        enough = 2 + len(self._inside(s))  # a chain through all of them; longer means that every step adds passes
        steps = self._steps(s)
        return enough if steps is None else max(steps, 1)

    def _step(self, s: Iterate, before: dict[str, Effect], inside: bool) -> dict[str, Effect]:
        """The states after one more step; the body's statements are listed anew."""
        for name in self._inside(s):
            self.effects.pop(name, None)
        self.effects.update(before)
        for inner in s.body:
            self._statement(inner)
        after = {}
        for state in s.states:
            start = self.collect(iter((state.next,)))
            self.steps.append(Step(state.name, start))
            after[state.name] = before[state.name].join(self._result(start, state.ranks, inside))
        if s.until is not None:  # whether there is a next step depends on the condition, over the new states
            self.effects.update(after)
            control = self._result(self.collect(iter((s.until,))), (), inside)
            after = {name: effect.join(Effect(done=control.done)) for name, effect in after.items()}
        return after

    def _result(self, start: Effect, ranks: tuple[str, ...], inside: bool) -> Effect:
        return start if inside or self.along.ranks & set(ranks) else start.closed()


def trace_flow(c: Cascade, along: Fiber, inputs: frozenset[str], plan: Plan | None = None, *, every_source: bool = False) -> Flow:
    """The effects of all statements for the inputs `inputs`; of a plan's stages and whatever its outputs need beside them, given one.

    With `every_source` a tensor that first brings the fiber in (a top-k's slots, a scatter's result) counts as a root, too.
    """
    stages = {
        reduction.out: stage
        for kernel in (plan.steps if plan else ())
        if kernel.stream in along.ranks
        for stage in kernel.stages
        for reduction in stage.reductions
    }
    owners = {name: s for s in c.body for name, _ in defined(s)}
    flow = Flow(c, along, inputs, c.tensor_ranks(), owners, stages, every_source=every_source)
    for kernel in plan.kernels if plan else ():
        if kernel.kept and kernel.stream in along.ranks:
            flow.store(kernel)
    wanted = owners if plan is None else {o: None for k in plan.steps for o in k.outputs} | {o.name: None for o in c.outputs}
    for name in wanted:
        flow.effect(name)
    return flow


def reads_of(s: Statement) -> Iterator[Read]:
    """Every tensor access of a statement."""
    return (read for e in expressions(s) for read in reads(e))


def _plain_indices(e: Expr) -> Iterator[str]:
    """The ranks whose index `e` contains outside of any gather."""
    if isinstance(e, Index):
        yield e.rank
    elif not isinstance(e, Read):
        for child in children(e):
            yield from _plain_indices(child)
