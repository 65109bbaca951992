"""What the passes share: looking statements up, inlining maps, dropping what nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ...ir.cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement, Tensor, defined, expressions
from ...ir.expr import Const, Expr, Index, Op, Read, reads, rewrite


def definitions(cascade: Cascade) -> dict[str, Statement]:
    """The statement that defines each intermediate, by tensor name."""
    return {name: s for s in cascade.body for name, _ in defined(s)}


def maps(cascade: Cascade) -> dict[str, Einsum]:
    """The map statements by name."""
    return {s.out: s for s in cascade.body if isinstance(s, Einsum) and s.op is None}


def dependencies(cascade: Cascade) -> dict[str, frozenset[str]]:
    """For every tensor, all tensors it depends on, directly or not."""
    table: dict[str, frozenset[str]] = {t.name: frozenset() for t in cascade.inputs}
    for statement in cascade.body:
        direct = {r.tensor for e in expressions(statement) for r in reads(e)}
        found = frozenset(direct).union(*(table.get(name, frozenset()) for name in direct))
        table.update({name: found for name, _ in defined(statement)})
    return table


def inline(e: Expr, bodies: dict[str, Einsum], wanted: Callable[[str], bool]) -> Expr:
    """`e` with every read of a wanted map replaced by that map's expression at the read's coordinates, repeatedly."""

    def rule(node: Expr) -> Expr | None:
        if not isinstance(node, Read) or node.tensor not in bodies or not wanted(node.tensor) or node.fill is not None:
            return None
        statement = bodies[node.tensor]
        body = inline(statement.expr, bodies, wanted)
        return at_coordinates(body, dict(zip(statement.ranks, node.coords, strict=True)))

    return rewrite(e, rule)


def at_coordinates(e: Expr, coordinates: dict[str, Expr]) -> Expr:
    """`e` with the index of each rank replaced by its coordinate."""
    moved = {rank: c for rank, c in coordinates.items() if c != Index(rank)}
    if not moved:
        return e
    return rewrite(e, lambda node: moved.get(node.rank) if isinstance(node, Index) else None)


def map_expressions(statement: Statement, f: Callable[[Expr], Expr]) -> Statement:
    """The statement with `f` applied to each of its expressions, bodies of blocks included."""

    def maybe(e: Expr | None) -> Expr | None:
        return None if e is None else f(e)

    match statement:
        case Einsum() | Scan():
            return replace(statement, expr=f(statement.expr), where=maybe(statement.where))
        case Populate():
            return replace(statement, expr=f(statement.expr), parameter=maybe(statement.parameter), where=maybe(statement.where))
        case Scatter():
            at = tuple((rank, f(e)) for rank, e in statement.at)
            return replace(statement, expr=f(statement.expr), at=at, where=maybe(statement.where))
        case Concat():
            return replace(statement, parts=tuple((piece, f(e)) for piece, e in statement.parts))
        case Iterate():
            states = tuple(replace(s, init=f(s.init), next=f(s.next)) for s in statement.states)
            body = tuple(map_expressions(s, f) for s in statement.body)
            return replace(statement, states=states, body=body, until=maybe(statement.until))


def drop_unused(cascade: Cascade) -> Cascade:
    """The cascade without statements that no output depends on."""
    needed = {o.name for o in cascade.outputs}
    kept: list[Statement] = []
    for statement in reversed(cascade.body):
        if any(name in needed for name, _ in defined(statement)):
            kept.append(statement)
            needed.update(r.tensor for e in expressions(statement) for r in reads(e))
    return replace(cascade, body=tuple(reversed(kept)))


def fresh(name: str, taken: Iterable[str]) -> str:
    """`name`, or `name_1`, `name_2`, ... if that is taken."""
    used = set(taken)
    if name not in used:
        return name
    return next(f"{name}_{i}" for i in range(1, len(used) + 2) if f"{name}_{i}" not in used)


def conjuncts(condition: Expr | None) -> tuple[Expr, ...]:
    """The parts of a conjunction, each once, in order; none for None."""
    match condition:
        case None:
            return ()
        case Op(name="and", args=(a, b)):
            return tuple(dict.fromkeys((*conjuncts(a), *conjuncts(b))))
        case _:
            return (condition,)


def conjunction(parts: Iterable[Expr]) -> Expr | None:
    """The inverse of `conjuncts`."""
    result: Expr | None = None
    for part in parts:
        if part != Const(True):
            result = part if result is None else Op("and", (result, part))
    return result


def ordered_body(statements: Iterable[Statement], inputs: Iterable[Tensor]) -> tuple[Statement, ...]:
    """The statements with every definition before its uses, otherwise in the order given."""
    known = {t.name for t in inputs}
    waiting = list(statements)
    ready: list[Statement] = []
    while waiting:
        later: list[Statement] = []
        for s in waiting:
            inside = {name for name, _ in defined(s)} | defined_inside(s)
            if all(r.tensor in known or r.tensor in inside for e in expressions(s) for r in reads(e)):
                ready.append(s)
                known.update(name for name, _ in defined(s))
            else:
                later.append(s)
        if len(later) == len(waiting):
            raise AssertionError("statements that read each other: " + ", ".join(defined(s)[0][0] for s in later))
        waiting = later
    return tuple(ready)


def defined_inside(s: Statement) -> set[str]:
    """The tensors that an iterative block defines for itself."""
    if not isinstance(s, Iterate):
        return set()
    return {name for inner in s.body for name, _ in defined(inner)} | {n for inner in s.body for n in defined_inside(inner)}
