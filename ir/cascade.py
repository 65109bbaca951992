"""The cascade: an ordered list of extended Einsums over named ranks (arXiv 2406.10491; EDGE, arXiv 2404.11591).

    cascade   =  Cascade(name, inputs, scalars, ranks, body, outputs)
    input     =  Tensor(name, axes, dtype)            an axis is one rank, or several composed: `(n j)`
    rank      =  RankDecl(name, size)                 only where a size is known: 64, n * j (composed), s + t (concatenated)
    statement =  Einsum | Scan | Populate | Scatter | Concat | Iterate

A statement's `ranks` are those of its result, in order. Ranks that a statement's expression indexes are its iteration space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from .errors import Location
from .expr import Const, Expr, Extent, Op, reads, walk
from .types import DType

Axis: TypeAlias = tuple[str, ...]




@dataclass(frozen=True, slots=True)
class Tensor:
    """An input. `axes` group its ranks as they lie in memory: (("b",), ("n", "j")) is the two-dimensional `b (n j)`."""

    name: str
    axes: tuple[Axis, ...]
    dtype: DType

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(rank for axis in self.axes for rank in axis)


@dataclass(frozen=True, slots=True)
class ScalarDecl:
    """A run-time scalar argument."""

    name: str
    dtype: DType


@dataclass(frozen=True, slots=True)
class RankDecl:
    """A rank whose size is known or follows from others: a constant, a product (composed) or a sum (concatenated)."""

    name: str
    size: Expr


@dataclass(frozen=True, slots=True)
class Output:
    """A result: a statement's tensor, with the axes in which it is returned."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(rank for axis in self.axes for rank in axis)


@dataclass(frozen=True, slots=True)
class Einsum:
    """`out[ranks] = op(over where ...) expr`; a map if `op` is None.

    A reduction skips the points where `where` is false; over no points it gives its identity.
    """

    out: str
    ranks: tuple[str, ...]
    expr: Expr
    op: str | None = None
    over: tuple[str, ...] = ()
    where: Expr | None = None
    location: Location | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Scan:
    """`out[ranks] = cum<op>(over) expr`: the running reduction along `over`, including the element itself unless `exclusive`."""

    out: str
    ranks: tuple[str, ...]
    expr: Expr
    op: str
    over: str
    exclusive: bool = False
    where: Expr | None = None
    location: Location | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Populate:
    """`values[ranks], coords[ranks] = rule(over -> into; parameter) expr`.

    `topk` keeps the `parameter` largest in falling order; `sort` all in falling order; `threshold` those >= parameter in
    order of coordinate; `mass` the shortest falling prefix whose sum reaches parameter. Ties keep the lower coordinate first.
    The rank `into` has extent k for topk and the extent of `over` otherwise; slots not filled hold value 0 and coordinate -1.
    """

    values: str
    coords: str
    ranks: tuple[str, ...]
    expr: Expr
    rule: str
    over: str
    into: str
    parameter: Expr | None = None
    where: Expr | None = None
    location: Location | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Scatter:
    """`out[ranks] = scatter(over) expr at (rank: coordinate)`: every point adds its value to the element its coordinate names.

    Coordinates outside 0 .. extent are dropped. `at` pairs result ranks with coordinate expressions.
    """

    out: str
    ranks: tuple[str, ...]
    expr: Expr
    over: tuple[str, ...]
    at: tuple[tuple[str, Expr], ...]
    where: Expr | None = None
    location: Location | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Concat:
    """`out[ranks] = concat(rank) part; part`: along `rank`, the parts one after the other, each over its own piece rank."""

    out: str
    ranks: tuple[str, ...]
    rank: str
    parts: tuple[tuple[str, Expr], ...]
    location: Location | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class IterState:
    """A state of an iterative block: its value before the first step, and the expression of its next value."""

    name: str
    ranks: tuple[str, ...]
    init: Expr
    next: Expr


@dataclass(frozen=True, slots=True)
class Iterate:
    """Steps along `rank`: the body computes, then all states take their next values at once; stops early when `until` holds.

    Inside the body a state's name is its value before the step. `until` is a scalar condition read after a step's update,
    over the new states. After the block the names are the final values. The number of steps is the extent of `rank`.
    """

    rank: str
    states: tuple[IterState, ...]
    body: tuple[Statement, ...]
    until: Expr | None = None
    location: Location | None = field(default=None, compare=False, repr=False)


Statement: TypeAlias = Einsum | Scan | Populate | Scatter | Concat | Iterate


def defined(statement: Statement) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The tensors a statement defines, with their ranks."""
    match statement:
        case Einsum() | Scan() | Scatter() | Concat():
            return ((statement.out, statement.ranks),)
        case Populate():
            return ((statement.values, statement.ranks), (statement.coords, statement.ranks))
        case Iterate():
            return tuple((state.name, state.ranks) for state in statement.states)


def expressions(statement: Statement) -> Iterator[Expr]:
    """Every expression of a statement, predicates, parameters and coordinates included; of a block, those of its body too."""
    match statement:
        case Einsum() | Scan():
            yield statement.expr
        case Populate():
            yield statement.expr
            if statement.parameter is not None:
                yield statement.parameter
        case Scatter():
            yield statement.expr
            yield from (coordinate for _, coordinate in statement.at)
        case Concat():
            yield from (part for _, part in statement.parts)
        case Iterate():
            yield from (state.init for state in statement.states)
            for inner in statement.body:
                yield from expressions(inner)
            yield from (state.next for state in statement.states)
            if statement.until is not None:
                yield statement.until
    if not isinstance(statement, (Concat, Iterate)) and statement.where is not None:
        yield statement.where


@dataclass(frozen=True, slots=True)
class Cascade:
    """What is computed; never how. See the module's grammar."""

    name: str
    inputs: tuple[Tensor, ...]
    scalars: tuple[ScalarDecl, ...]
    ranks: tuple[RankDecl, ...]
    body: tuple[Statement, ...]
    outputs: tuple[Output, ...]

    def input(self, name: str) -> Tensor | None:
        """The input of that name, or None."""
        return next((t for t in self.inputs if t.name == name), None)

    def tensor_ranks(self) -> dict[str, tuple[str, ...]]:
        """The ranks of every tensor, inputs first, in order of definition; those inside iterative blocks included."""
        table = {t.name: t.ranks for t in self.inputs}

        def visit(body: tuple[Statement, ...]) -> None:
            for statement in body:
                if isinstance(statement, Iterate):
                    table.update(defined(statement))
                    visit(statement.body)
                else:
                    table.update(defined(statement))

        visit(self.body)
        return table

    def all_ranks(self) -> tuple[str, ...]:
        """Every rank, in order of first appearance: inputs, then the body, then the declarations."""
        found: dict[str, None] = {rank: None for t in self.inputs for rank in t.ranks}

        def visit(body: tuple[Statement, ...]) -> None:
            for statement in body:
                match statement:
                    case Einsum() | Scatter():
                        found.update(dict.fromkeys(statement.over))
                    case Scan():
                        found[statement.over] = None
                    case Populate():
                        found.update(dict.fromkeys((statement.over, statement.into)))
                    case Concat():
                        found.update(dict.fromkeys(piece for piece, _ in statement.parts))
                    case Iterate():
                        found[statement.rank] = None
                        visit(statement.body)
                for _, ranks in defined(statement):
                    found.update(dict.fromkeys(ranks))

        visit(self.body)
        for declaration in self.ranks:
            found[declaration.name] = None
            found.update({node.rank: None for node in walk(declaration.size) if isinstance(node, Extent)})
        return tuple(found)

    def size_of(self, rank: str) -> Expr | None:
        """The declared size of a rank, or None where it is a symbol until the call."""
        return next((d.size for d in self.ranks if d.name == rank), None)

    def static_sizes(self) -> dict[str, int]:
        """The ranks with a constant size."""
        return {d.name: int(d.size.value) for d in self.ranks if isinstance(d.size, Const)}

    def components(self, rank: str) -> tuple[str, ...]:
        """The ranks that make up `rank`: its factors if composed, its pieces if concatenated, else none."""
        size = self.size_of(rank)
        if isinstance(size, Op) and size.name in ("mul", "add"):
            return tuple(node.rank for node in walk(size) if isinstance(node, Extent))
        return ()

    def is_concatenated(self, rank: str) -> bool:
        """Whether `rank` is the concatenation of pieces."""
        size = self.size_of(rank)
        return isinstance(size, Op) and size.name == "add"

    def solve_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """`sizes` with every declared rank's size worked out, as far as it follows from the others."""
        known = {**sizes}
        for declaration in self.ranks:
            value = _evaluate(declaration.size, known)
            if value is not None:
                known.setdefault(declaration.name, value)
        return known

    def uses(self, tensor: str) -> bool:
        """Whether any statement reads `tensor`."""
        return any(r.tensor == tensor for s in self.body for e in expressions(s) for r in reads(e))

    def __str__(self) -> str:
        from .text import print_cascade

        return print_cascade(self)


def _evaluate(size: Expr, known: Mapping[str, int]) -> int | None:
    match size:
        case Const(value=value):
            return int(value)
        case Extent(rank=rank):
            return known.get(rank)
        case Op(name=name, args=(a, b)) if name in ("add", "mul", "sub", "floordiv"):
            x, y = _evaluate(a, known), _evaluate(b, known)
            if x is None or y is None:
                return None
            return {"add": x + y, "mul": x * y, "sub": x - y, "floordiv": x // y if y else 0}[name]
        case _:
            return None
