"""Which intermediates must lie in memory whole before they are read, and the steps of a plan that are no kernels of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...ir.cascade import (
    Cascade,
    Concat,
    Einsum,
    Iterate,
    Output,
    Populate,
    RankDecl,
    Scan,
    Scatter,
    Statement,
    Tensor,
    defined,
    expressions,
)
from ...ir.expr import Cast, Const, Expr, Extent, Index, Op, Read, Scalar, reads, rewrite, walk
from ...ir.infer import declared_types, stored_types
from ...ir.plan import STEP
from ...ir.types import i32
from .graph import defined_inside, fresh, map_expressions


def whole_tensors(cascade: Cascade) -> dict[str, str]:
    """The results of Einsums and scans that some statement reads elsewhere than at their own indices, or needs whole; with the reason."""
    table = computed(cascade)
    found: dict[str, str] = {}
    for s in cascade.body:
        name = defined(s)[0][0]
        for r in far_reads(s, table):
            if r.tensor in table:
                whole = f"{_KINDS[type(s)]} {name} needs it whole" if not isinstance(s, Computed) else ""
                found.setdefault(r.tensor, whole or f"{name} reads it at other indices than its own")
    return found


Computed = (Einsum, Scan)
_KINDS: dict[type, str] = {
    Populate: "the selection", Scatter: "the scatter", Concat: "the concatenation",
    Iterate: "the block",
}  # fmt: skip


def computed(cascade: Cascade) -> dict[str, Einsum | Scan]:
    """The statements that kernels compute, by name; all others work on whole tensors."""
    return {s.out: s for s in cascade.body if isinstance(s, Computed)}


def far_reads(s: Statement, table: Mapping[str, Einsum | Scan]) -> Iterator[Read]:
    """The reads of `s` for which a result must be complete: every read of a statement over whole tensors, reads at other indices."""
    for e in expressions(s):
        for r in reads(e):
            source = table.get(r.tensor)
            if not isinstance(s, Computed) or source is None or r.coords != tuple(Index(rank) for rank in source.ranks):
                yield r


def behind(cascade: Cascade) -> dict[str, frozenset[str]]:
    """For every tensor the tensors that must be complete in memory before a kernel that makes it can start."""
    table = computed(cascade)
    depends: dict[str, frozenset[str]] = {t.name: frozenset() for t in cascade.inputs}
    found: dict[str, frozenset[str]] = {t.name: frozenset() for t in cascade.inputs}
    for s in cascade.body:
        direct = {r.tensor for e in expressions(s) for r in reads(e)}
        far = {r.tensor for r in far_reads(s, table)}
        reached = frozenset(direct).union(*(depends.get(name, frozenset()) for name in direct))
        before = frozenset(far).union(*(depends.get(name, frozenset()) for name in far))
        before = before.union(*(found.get(name, frozenset()) for name in direct))
        own = {*dict(defined(s)), *defined_inside(s)}  # a block reads its own states
        for name, _ in defined(s):
            depends[name], found[name] = reached - own, before - own
    return found


def single(cascade: Cascade, s: Statement) -> Cascade:
    """The cascade of one statement: what it reads are inputs, what it defines are outputs."""
    types = stored_types(cascade)
    table = cascade.tensor_ranks()
    names = dict.fromkeys(r.tensor for e in expressions(s) for r in reads(e))
    names = {n: None for n in names if n not in {*dict(defined(s)), *defined_inside(s)}}
    given = {o.name: o for o in cascade.outputs}
    stored = {n: given[n].axes if n in given else tuple((r,) for r in table[n]) for n in names}
    inputs = tuple(cascade.input(n) or Tensor(n, stored[n], types[n]) for n in names)
    outputs = tuple(given.get(n) or Output(n, tuple((r,) for r in ranks)) for n, ranks in defined(s))
    used = {n.name for e in expressions(s) for n in walk(e) if isinstance(n, Scalar)}
    scalars = tuple(x for x in cascade.scalars if x.name in used)
    alone = replace(cascade, name=defined(s)[0][0], inputs=inputs, scalars=scalars, ranks=(), body=(s,), outputs=outputs)
    return replace(alone, ranks=_declared(cascade, set(alone.all_ranks())))


def _declared(cascade: Cascade, used: set[str]) -> tuple[RankDecl, ...]:
    """The declarations of the ranks in `used`, and of those that these sizes mention."""
    before = -1
    while len(used) > before:
        before = len(used)
        used |= {n.rank for d in cascade.ranks if d.name in used for n in walk(d.size) if isinstance(n, Extent)}
    return tuple(d for d in cascade.ranks if d.name in used)


def one_step(cascade: Cascade, block: Iterate, alone: Cascade) -> Cascade:
    """A step of `block` as a cascade: from the states before it, what the block reads and the number of the step to the next states.

    The stop condition is the last output. `alone` is the block as `single` gives it.
    """
    types = declared_types(cascade)
    taken = {*cascade.tensor_ranks(), STEP}
    new = {s.name: fresh(f"{s.name}_next", taken) for s in block.states}

    def at_step(e: Expr) -> Expr:
        return rewrite(e, lambda node: Read(STEP, ()) if node == Index(block.rank) else None)

    def after(e: Expr) -> Expr:
        return rewrite(e, lambda n: replace(n, tensor=new[n.tensor]) if isinstance(n, Read) and n.tensor in new else None)

    read = {r.tensor for inner in block.body for e in expressions(inner) for r in reads(e)}
    read |= {r.tensor for s in block.states for r in reads(s.next)}
    read |= {r.tensor for r in reads(block.until)} if block.until is not None else set()
    inputs = tuple(t for t in alone.inputs if t.name in read)
    inputs += tuple(Tensor(s.name, tuple((r,) for r in s.ranks), types[s.name]) for s in block.states)
    body = [map_expressions(inner, at_step) for inner in block.body]
    for s in block.states:
        body.append(Einsum(new[s.name], s.ranks, Cast(at_step(s.next), types[s.name]), location=block.location))
    outputs = [Output(new[s.name], tuple((r,) for r in s.ranks)) for s in block.states]
    if block.until is not None:
        body.append(Einsum(fresh("until", taken), (), Op("ne", (after(at_step(block.until)), Const(0))), location=block.location))
        outputs.append(Output(body[-1].out, ()))  # type: ignore[union-attr]
    number = Tensor(STEP, (), i32)
    step = replace(cascade, name=alone.name, inputs=(*inputs, number), ranks=(), body=tuple(body), outputs=tuple(outputs))
    return replace(step, ranks=_declared(cascade, set(step.all_ranks())))
