"""The graph behind traced values: nodes made once each, with their ranks and types.

    node  =  Leaf(expr) | Source(tensor) | Step(block) | State(block, name, after)       what a map reads
          |  Apply(op, args) | Convert(x, dtype, bits) | View(x, coords, fill)             maps
          |  Reduce | Scan | Populate | Scatter | Concat | Loop                            always statements
          |  Result(of, index)                                                             one tensor of a Populate or Loop

Equal nodes are one object, which is how common subexpressions are found before anything is named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TypeAlias

from ..ir.cascade import RankDecl, ScalarDecl, Tensor
from ..ir.errors import CascadeError, Location
from ..ir.expr import OPS, Const, Expr, Extent, Index, Op, Read, Scalar, walk
from ..ir.infer import combine, expression_type
from ..ir.text import print_size
from ..ir.types import DTYPES, DType, boolean, f32, i32, i64, reduced

_FRONT_END = (str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "helpers.py"))


@dataclass(frozen=True, slots=True)
class Leaf:
    """A constant, scalar argument, rank index or extent."""

    expr: Const | Scalar | Index | Extent


@dataclass(frozen=True, slots=True)
class Source:
    """An input at its own ranks."""

    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """An iterate block while it is traced, `depth` blocks inside others."""

    rank: str
    depth: int


@dataclass(frozen=True, slots=True)
class Step:
    """The index of the step inside a block."""

    block: Block


@dataclass(frozen=True, slots=True)
class State:
    """A state of a block: its value before the step, or after it in the stop condition."""

    block: Block
    name: str
    ranks: tuple[str, ...]
    dtype: DType
    after: bool


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation of `OPS`."""

    op: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Convert:
    """A cast, or a bitcast if `bits`."""

    x: Node
    dtype: DType
    bits: bool


@dataclass(frozen=True, slots=True)
class View:
    """`x` with some of its ranks' indices replaced; `fill` where they leave it."""

    x: Node
    coords: tuple[tuple[str, Node], ...]
    fill: Const | None


@dataclass(frozen=True, slots=True)
class Reduce:
    op: str
    over: tuple[str, ...]
    x: Node
    where: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    op: str
    over: str
    exclusive: bool
    x: Node
    where: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Populate:
    rule: str
    over: str
    into: str
    parameter: Node | None
    x: Node
    where: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Scatter:
    over: tuple[str, ...]
    at: tuple[tuple[str, Node], ...]
    x: Node
    where: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    rank: str
    parts: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """An iterate block: for each state its name (None to be named later), ranks, first and next value."""

    block: Block
    states: tuple[tuple[str, tuple[str, ...], Node, Node], ...]
    until: Node | None
    named: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Tensor number `index` of a Populate (values, coordinates) or a Loop (its states)."""

    of: Node
    index: int


What: TypeAlias = (
    Leaf | Source | Step | State | Apply | Convert | View | Reduce | Scan | Populate | Scatter | Concat | Loop | Result
)


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A traced value. What follows from its operands is kept, so that nothing walks over a graph again and again.

    Args:
        what: what computes it.
        ranks: in order of first appearance.
        dtype: its type, which is weak if `weak`.
        blocks: the iterate blocks inside which it lives.
        affine: whether it is made of indices, extents, scalars and constants alone.
        gathers: whether it is a map that reads a tensor at another tensor's value.
        typed_by: the inputs without a given type that it takes its type from.
        order: counts the nodes made before it.
        location: the user's line.
    """

    what: What
    ranks: tuple[str, ...]
    dtype: DType
    weak: bool
    blocks: frozenset[Block]
    affine: bool
    gathers: bool
    typed_by: frozenset[str]
    order: int
    location: Location | None


class Untyped(Exception):
    """Inputs whose types the caller left open turn out to need the types in `types`: the function is to be traced again."""

    def __init__(self, types: dict[str, DType]) -> None:
        super().__init__(types)
        self.types = types


@dataclass(slots=True, eq=False)
class Graph:
    """Everything one trace makes.

    `location` is the function's, `running` whether its body is; `open_types` are the inputs whose type the caller left open, `blocks`
    is the stack of iterate blocks being traced.
    """

    name: str
    location: Location | None = None
    running: bool = False
    open_types: frozenset[str] = frozenset()
    inputs: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, ScalarDecl] = field(default_factory=dict)
    sizes: dict[str, RankDecl] = field(default_factory=dict)
    nodes: dict[What, Node] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def error(self, what: str, hint: str | None = None, node: Node | None = None) -> CascadeError:
        """An error at `node`'s line, else at the line of the user's file that is running, else at the function."""
        location = node.location if node is not None else user_location() if self.running else self.location
        return CascadeError(what, cascade=self.name, location=location, hint=hint)

    def node(self, what: What) -> Node:
        """The node of that content, made once."""
        found = self.nodes.get(what)
        if found is None:
            dtype, weak = _type(what, self)
            blocks = frozenset(block for arg in operands(what) for block in arg.blocks)
            match what:
                case Step(block=block) | State(block=block):
                    blocks |= {block}
                case Loop(block=block):
                    blocks -= {block}
                case _:
                    pass
            args = operands(what)
            maps = isinstance(what, (Leaf, Step, Apply, Convert, View))
            affine = maps and all(a.affine for a in args)
            gathers = maps and (any(a.gathers for a in args) or _is_gather(what))
            found = Node(
                what, _ranks(what), dtype, weak, blocks, affine, gathers, _typed_by(what, self), len(self.nodes), user_location()
            )  # fmt: skip
            self.nodes[what] = found
        return found

    def settle(self, nodes: Iterable[Node], dtype: DType) -> None:
        """Raise `Untyped` if `nodes` are computed from inputs whose type is open, so that these can be of type `dtype`."""
        names = sorted({name for node in nodes for name in node.typed_by})
        if names:
            raise Untyped(dict.fromkeys(names, dtype))

    def declare(self, rank: str, size: Expr) -> None:
        """Record a rank's size. Raises `CascadeError` if it has another one already."""
        known = self.sizes.setdefault(rank, RankDecl(rank, size))
        if known.size != size:
            raise self.error(
                f"rank {rank!r} has size {print_size(known.size)} already, found {print_size(size)}",
                hint="one rank has one size; use another name for the other rank",
            )

    def equate(self, new: str, old: str) -> None:
        """Record that two ranks have one extent."""
        if new not in self.sizes:
            self.declare(new, Extent(old))
        elif old not in self.sizes and new != old:
            self.declare(old, Extent(new))
        elif self.sizes[new].size not in (Extent(old), self.sizes[old].size):
            size = self.constant(Extent(new))
            if size is None or size != self.constant(Extent(old)):
                self.declare(new, Extent(old))  # which says how the two sizes clash

    def compose(self, rank: str, parts: tuple[str, ...]) -> None:
        """Record that `rank` is composed of `parts`, or that the part of unknown size follows where `rank` has a size already."""
        product: Expr = Extent(parts[0])
        for part in parts[1:]:
            product = Op("mul", (product, Extent(part)))
        known = self.sizes.get(rank)
        if known is None or known.size == product:
            self.declare(rank, product)
            return
        open_part = next((part for part in parts if not self.knows(part)), None)
        others = [part for part in parts if part != open_part]
        whole, factors = self.constant(Extent(rank)), [self.constant(Extent(part)) for part in others]
        if whole is None or None in factors:
            if open_part is None:
                self.declare(rank, product)  # which says how the two sizes clash
            rest: Expr = Extent(others[0])
            for part in others[1:]:
                rest = Op("mul", (rest, Extent(part)))
            self.declare(str(open_part), Op("floordiv", (Extent(rank), rest)))
            return
        size = prod(factor for factor in factors if factor is not None)
        if whole % size or (open_part is None and whole != size):
            raise self.error(f"rank {rank!r} has size {whole}, which is not {' * '.join(parts)}", f"{' * '.join(others)} is {size}")
        if open_part is not None:
            self.declare(open_part, Const(whole // size))

    def constant(self, size: Expr) -> int | None:
        """The value of a size that is constant."""
        match size:
            case Const(value=value):
                return int(value)
            case Extent(rank=rank) if rank in self.sizes:
                return self.constant(self.sizes[rank].size)
            case Op(name="mul", args=(a, b)):
                x, y = self.constant(a), self.constant(b)
                return None if x is None or y is None else x * y
            case _:
                return None

    def input_ranks(self) -> dict[str, None]:
        """The ranks of the inputs, in order."""
        return {rank: None for tensor in self.inputs.values() for rank in tensor.ranks}

    def knows(self, rank: str) -> bool:
        """Whether something gives `rank` an extent."""
        return rank in self.sizes or any(rank in tensor.ranks for tensor in self.inputs.values()) or self._in_a_size(rank)

    def _in_a_size(self, rank: str) -> bool:
        return any(
            isinstance(decl.size, Op) and any(isinstance(part, Extent) and part.rank == rank for part in walk(decl.size))
            for decl in self.sizes.values()
        )


def operands(what: What) -> tuple[Node, ...]:
    """The nodes a node reads, in reading order."""
    match what:
        case Leaf() | Source() | Step() | State():
            return ()
        case Apply(args=args):
            return args
        case Convert(x=x):
            return (x,)
        case View(x=x, coords=coords):
            return (x, *(c for _, c in coords))
        case Reduce(x=x, where=where) | Scan(x=x, where=where):
            return (x, *where)
        case Populate(x=x, parameter=parameter, where=where):
            return (x, *((parameter,) if parameter is not None else ()), *where)
        case Scatter(x=x, at=at, where=where):
            return (x, *(c for _, c in at), *where)
        case Concat(parts=parts):
            return tuple(part for _, part in parts)
        case Loop(states=states, until=until):
            values = tuple(node for _, _, init, after in states for node in (init, after))
            return (*values, *((until,) if until is not None else ()))
        case Result(of=of):
            return (of,)


def ordered(ranks: Iterable[str], without: Iterable[str] = ()) -> tuple[str, ...]:
    """The ranks in order of first appearance, less some."""
    dropped = set(without)
    return tuple(rank for rank in dict.fromkeys(ranks) if rank not in dropped)


def joint_ranks(nodes: Iterable[Node]) -> tuple[str, ...]:
    """The ranks of several nodes in order of first appearance."""
    return ordered(rank for node in nodes for rank in node.ranks)


def _ranks(what: What) -> tuple[str, ...]:
    match what:
        case Leaf(expr=Index(rank=rank)):
            return (rank,)
        case Leaf() | Step() | Loop():
            return ()
        case Source(tensor=tensor):
            return tensor.ranks
        case State(ranks=ranks):
            return ranks
        case Apply(args=args):
            return joint_ranks(args)
        case Convert(x=x):
            return x.ranks
        case View(x=x, coords=coords):
            table = dict(coords)
            return ordered(r for rank in x.ranks for r in (table[rank].ranks if rank in table else (rank,)))
        case Reduce(over=over):
            return ordered(joint_ranks(operands(what)), over)
        case Scan():
            return joint_ranks(operands(what))
        case Populate(over=over, into=into, x=x):
            ranks = joint_ranks(operands(what))
            return ordered(into if rank == over else rank for rank in ranks) if over in x.ranks else (*ordered(ranks, (over,)), into)
        case Scatter(over=over, at=at, x=x):
            rest = ordered(joint_ranks((x, *(c for _, c in at), *what.where)), over)
            new = [rank for rank, _ in at if rank not in rest]
            place = next((i for i, rank in enumerate(ordered(x.ranks)) if rank in over), len(rest))
            return (*rest[:place], *new, *rest[place:])
        case Concat(rank=rank, parts=parts):
            return ordered(rank if r == piece else r for piece, part in parts for r in part.ranks)
        case Result(of=of, index=index):
            return of.what.states[index][1] if isinstance(of.what, Loop) else of.ranks


def _probe(node: Node) -> Expr:
    if not node.weak:
        return Read(node.dtype.name, ())
    return Const(True if node.dtype == boolean else 1 if node.dtype == i64 else 1.0)


def _type(what: What, graph: Graph) -> tuple[DType, bool]:
    match what:
        case Leaf(expr=expr):
            return expression_type(expr, {})
        case Source(tensor=tensor):
            return tensor.dtype, False
        case Step():
            return i32, False
        case State(dtype=dtype) | Convert(dtype=dtype):
            return dtype, False
        case Apply(op=op, args=args):
            try:
                return expression_type(Op(op, tuple(_probe(a) for a in args)), DTYPES)
            except CascadeError as error:
                if OPS[op].kind == "bit":
                    graph.settle(args, boolean if any(a.dtype == boolean for a in args) else i32)
                raise graph.error(error.what, error.hint) from None
        case View(x=x):
            return x.dtype, x.weak
        case Reduce(op=op, x=x) | Scan(op=op, x=x):
            return reduced(op, stored_type(x)), False
        case Populate(x=x):
            return stored_type(x), False
        case Scatter(x=x):
            return reduced("sum", stored_type(x)), False
        case Concat(parts=parts):
            joined = (parts[0][1].dtype, parts[0][1].weak)
            for _, part in parts[1:]:
                joined = combine(joined, (part.dtype, part.weak))
            return (i32 if joined[1] and joined[0] == i64 else joined[0]), False
        case Loop():
            return f32, False
        case Result(of=of, index=index):
            if isinstance(of.what, Loop):
                return stored_type(of.what.states[index][2]), False
            return (of.dtype if index == 0 else i32), False


def _typed_by(what: What, graph: Graph) -> frozenset[str]:
    match what:
        case Source(tensor=tensor):
            return graph.open_types & {tensor.name}
        case View(x=x):
            return x.typed_by
        case Apply(op=op, args=args) if OPS[op].kind in ("arith", "bit"):
            return frozenset(name for arg in args for name in arg.typed_by)
        case _:
            return frozenset()


def _is_gather(what: What) -> bool:
    return isinstance(what, View) and not all(c.affine for _, c in what.coords)


def stored_type(node: Node) -> DType:
    """The type in which a node's value is stored: a weak integer is i32."""
    return i32 if node.weak and node.dtype == i64 else node.dtype


def size_expression(node: Node) -> Expr | None:
    """A node as a rank's size: constants and extents under + - * //, or None."""
    match node.what:
        case Leaf(expr=(Const(value=bool()) | Const(value=float()))):
            return None
        case Leaf(expr=(Const() | Extent()) as expr):
            return expr
        case Apply(op=("add" | "sub" | "mul" | "floordiv") as op, args=(a, b)):
            x, y = size_expression(a), size_expression(b)
            return None if x is None or y is None else Op(op, (x, y))
        case _:
            return None


def user_location() -> Location | None:
    """The line of the nearest frame outside the front end."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_FRONT_END):
            return Location(frame.f_code.co_filename, frame.f_lineno)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
