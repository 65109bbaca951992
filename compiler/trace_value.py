"""Values in a traced function: operators and methods that grow the graph instead of computing.

A value carries the conditions of every `.where` on its way: maps keep them all, a reduction skips the points where one that concerns
the reduced ranks is false, and an output holds 0 where the remaining ones are.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from ..ir.errors import CascadeError
from ..ir.expr import Const, Expr, Extent, Index, Op
from ..ir.types import DType, boolean, f32, i32
from ..ir.types import dtype as dtype_named
from .trace_graph import (
    Apply,
    Convert,
    Graph,
    Leaf,
    Node,
    Populate,
    Reduce,
    Result,
    Scan,
    Scatter,
    Step,
    View,
    joint_ranks,
    ordered,
    size_expression,
    user_location,
)  # fmt: skip

GRAPH: ContextVar[Graph] = ContextVar("einfall_trace")
_UNSET: Any = object()  # stands for "no fill given", which differs from a fill of None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Value:
    """A symbolic tensor: `node` under the conditions `where`. Its ranks have names, never positions."""

    node: Node
    where_: tuple[Node, ...]
    graph: Graph

    __array_ufunc__ = None  # NumPy scalars on the left leave the operation to this class

    # --- what it is ------------------------------------------------------------------------------------------------------------
    @property
    def ranks(self) -> tuple[str, ...]:
        """The names of its ranks, in order of first appearance."""
        here = inside(self)
        return joint_ranks((here.node, *here.where_))

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.node.dtype

    def __repr__(self) -> str:
        what = self.node.what
        made_by = getattr(what, "op", None) or getattr(what, "rule", None) or type(what).__name__.lower()
        condition = " under a condition" if self.where_ else ""
        return f"<traced {self.dtype}[{','.join(joint_ranks((self.node, *self.where_)))}] from {made_by}{condition}>"

    # --- arithmetic ------------------------------------------------------------------------------------------------------------
    def __add__(self, other: Operand) -> Value: return apply("add", self, other)
    def __radd__(self, other: Operand) -> Value: return self if type(other) is int and other == 0 else apply("add", other, self)
    def __sub__(self, other: Operand) -> Value: return apply("sub", self, other)
    def __rsub__(self, other: Operand) -> Value: return apply("sub", other, self)
    def __mul__(self, other: Operand) -> Value: return apply("mul", self, other)
    def __rmul__(self, other: Operand) -> Value: return apply("mul", other, self)
    def __truediv__(self, other: Operand) -> Value: return apply("div", self, other)
    def __rtruediv__(self, other: Operand) -> Value: return apply("div", other, self)
    def __floordiv__(self, other: Operand) -> Value: return apply("floordiv", self, other)
    def __rfloordiv__(self, other: Operand) -> Value: return apply("floordiv", other, self)
    def __mod__(self, other: Operand) -> Value: return apply("mod", self, other)
    def __rmod__(self, other: Operand) -> Value: return apply("mod", other, self)
    def __pow__(self, other: Operand) -> Value: return apply("pow", self, other)
    def __rpow__(self, other: Operand) -> Value: return apply("pow", other, self)
    def __and__(self, other: Operand) -> Value: return apply("and", self, other)
    def __rand__(self, other: Operand) -> Value: return apply("and", other, self)
    def __or__(self, other: Operand) -> Value: return apply("or", self, other)
    def __ror__(self, other: Operand) -> Value: return apply("or", other, self)
    def __xor__(self, other: Operand) -> Value: return apply("xor", self, other)
    def __rxor__(self, other: Operand) -> Value: return apply("xor", other, self)
    def __lshift__(self, other: Operand) -> Value: return apply("shl", self, other)
    def __rlshift__(self, other: Operand) -> Value: return apply("shl", other, self)
    def __rshift__(self, other: Operand) -> Value: return apply("shr", self, other)
    def __rrshift__(self, other: Operand) -> Value: return apply("shr", other, self)
    def __lt__(self, other: Operand) -> Value: return apply("lt", self, other)
    def __le__(self, other: Operand) -> Value: return apply("le", self, other)
    def __gt__(self, other: Operand) -> Value: return apply("gt", self, other)
    def __ge__(self, other: Operand) -> Value: return apply("ge", self, other)
    def __eq__(self, other: Operand) -> Value: return apply("eq", self, other)  # type: ignore[override]
    def __ne__(self, other: Operand) -> Value: return apply("ne", self, other)  # type: ignore[override]
    def __neg__(self) -> Value: return apply("neg", self)
    def __pos__(self) -> Value: return self
    def __invert__(self) -> Value: return apply("not", self)
    def __abs__(self) -> Value: return apply("abs", self)

    __hash__ = object.__hash__

    # --- what a symbolic value cannot do -----------------------------------------------------------------------------------------
    def __bool__(self) -> bool:
        self._refuse("a traced value has no truth value", "ef.where(cond, a, b), or .where(cond); for `and`, `or`, `not` write & | ~")

    def __float__(self) -> float:
        self._refuse("float() of a traced value", "keep it symbolic; ef.exp, ef.sqrt and the others take the place of math's")

    def __int__(self) -> int:
        self._refuse("int() of a traced value", "keep it symbolic, or .to(ef.i32); a Python number must be a static argument")

    __index__ = __int__

    def __iter__(self) -> NoReturn:
        self._refuse("a traced value cannot be iterated over", "reduce or scan over the rank by name, or ef.iterate")

    def __len__(self) -> int:
        self._refuse("len() of a traced value", 'ef.extent("p") is the extent of rank p')

    def __getitem__(self, key: object) -> NoReturn:
        self._refuse("a traced value has no positions to subscript", "name the rank: x.at(p=0), x.shift(p=-1), x.at(page=table)")

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise self.graph.error(what, hint)

    # --- reductions --------------------------------------------------------------------------------------------------------------
    def sum(self, *over: str, **wrong: object) -> Value: return self._reduce("sum", over, wrong)
    def max(self, *over: str, **wrong: object) -> Value: return self._reduce("max", over, wrong)
    def min(self, *over: str, **wrong: object) -> Value: return self._reduce("min", over, wrong)
    def prod(self, *over: str, **wrong: object) -> Value: return self._reduce("prod", over, wrong)
    def any(self, *over: str, **wrong: object) -> Value: return self._reduce("any", over, wrong)
    def all(self, *over: str, **wrong: object) -> Value: return self._reduce("all", over, wrong)
    def argmax(self, *over: str, **wrong: object) -> Value: return self._reduce("argmax", over, wrong)
    def argmin(self, *over: str, **wrong: object) -> Value: return self._reduce("argmin", over, wrong)

    def mean(self, *over: str, **wrong: object) -> Value:
        """The mean over the ranks, of the points that no `.where` leaves out."""
        return mean_of(self, self._over("mean", over, wrong))

    def _reduce(self, op: str, over: tuple[object, ...], wrong: Mapping[str, object]) -> Value:
        here = inside(self)
        ranks = here._over(op, over, wrong)
        if op in ("any", "all") and here.dtype != boolean:
            self.graph.settle((here.node,), boolean)
            raise self.graph.error(f"{op} needs bools, found {here.dtype}", f"compare first: (x != 0).{op}({' '.join(ranks)!r})")
        if op in ("argmax", "argmin") and len(ranks) != 1:
            raise self.graph.error(f"{op} over several ranks {', '.join(ranks)}", "join them first: x.join(('a', 'b'), into='c')")
        skipped, kept = here._conditions(ranks)
        return here._derive(Reduce(op, ranks, here.node, skipped), kept)

    def _over(self, op: str, over: tuple[object, ...], wrong: Mapping[str, object] | None = None) -> tuple[str, ...]:
        """The rank names in a method's arguments. Raises `CascadeError` for positions, repeats and unknown ranks."""
        known = self.ranks
        example = f'.{op}("{known[-1] if known else "p"}")'
        if wrong:
            raise self.graph.error(f"{op} takes no argument {next(iter(wrong))!r}", f"name the ranks: {example}")
        for item in over:
            if not isinstance(item, str):
                raise self.graph.error(f"{op} over {item!r}: ranks have names, not positions", f"name the ranks: {example}")
        names = tuple(name for item in over for name in str(item).split())
        if not names:
            raise self.graph.error(f"{op} over no rank", f"name the ranks: {example}")
        for name in names:
            if name not in known:
                raise self.graph.error(f"{op} over unknown rank {name!r}", self._rank_hint(name))
        if len(set(names)) < len(names):
            raise self.graph.error(f"{op} names a rank twice: {' '.join(names)}")
        return names

    def _rank_hint(self, name: str) -> str:
        if any(block.rank == name for block in self.graph.blocks):
            return f"inside the iterate block {name!r} is the index of the step; a state accumulates over it"
        known = self.ranks
        if not known:
            return "the operand has no ranks"
        close = difflib.get_close_matches(name, known, 1, 0.5)
        ranks = f"one of the operand's ranks {', '.join(known)}"
        return f"{close[0]!r}? {ranks}" if close else ranks

    def _conditions(self, over: Sequence[str]) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """The conditions that concern the ranks `over`, and the rest."""
        concerned = tuple(c for c in self.where_ if set(over) & set(c.ranks))
        return concerned, tuple(c for c in self.where_ if c not in concerned)

    def _derive(self, what: Any, where: tuple[Node, ...]) -> Value:
        return Value(self.graph.node(what), where, self.graph)

    # --- scans, populates and scatter ----------------------------------------------------------------------------------------------
    def cumsum(self, over: str, *, exclusive: bool = False) -> Value: return self._scan("sum", over, exclusive)
    def cumprod(self, over: str, *, exclusive: bool = False) -> Value: return self._scan("prod", over, exclusive)
    def cummax(self, over: str, *, exclusive: bool = False) -> Value: return self._scan("max", over, exclusive)
    def cummin(self, over: str, *, exclusive: bool = False) -> Value: return self._scan("min", over, exclusive)

    def _scan(self, op: str, over: str, exclusive: bool) -> Value:
        here = inside(self)
        ranks = here._over("cum" + op, (over,))
        if len(ranks) != 1:
            raise self.graph.error(f"cum{op} over several ranks {', '.join(ranks)}", "scan along one rank")
        return here._derive(Scan(op, ranks[0], bool(exclusive), here.node, here._conditions(ranks)[0]), here.where_)

    def topk(self, over: str, *, k: int | Value, into: str) -> tuple[Value, Value]:
        """The `k` largest along `over` in falling order and their coordinates, both over the new rank `into`."""
        return self._populate("topk", over, into, k)

    def sort(self, over: str, *, into: str) -> tuple[Value, Value]:
        """All values in falling order and their coordinates, over the new rank `into`."""
        return self._populate("sort", over, into, None)

    def threshold(self, over: str, least: Operand, *, into: str) -> tuple[Value, Value]:
        """The values of at least `least` in order of coordinate, and their coordinates; free slots hold 0 and -1."""
        return self._populate("threshold", over, into, least)

    def mass(self, over: str, reach: Operand, *, into: str) -> tuple[Value, Value]:
        """The shortest falling prefix whose sum reaches `reach`, and its coordinates; free slots hold 0 and -1."""
        return self._populate("mass", over, into, reach)

    def _populate(self, rule: str, over: str, into: str, parameter: Operand | None) -> tuple[Value, Value]:
        here = inside(self)
        (rank,) = here._over(rule, (over,))
        self._new_rank(into, here.ranks)
        node = None
        if parameter is not None:
            node = inside(lift(parameter, self.graph)).node
        size: Expr | None = Extent(rank)
        if rule == "topk" and node is not None:
            size = size_expression(node)
            if size is None:
                raise self.graph.error(f"topk needs a whole k, found {parameter!r}", "an int, a static argument, or ef.extent('p') // 2")
        assert size is not None
        self.graph.declare(into, size)
        skipped, kept = here._conditions((rank,))
        both = self.graph.node(Populate(rule, rank, into, node, here.node, skipped))
        return here._derive(Result(both, 0), kept), here._derive(Result(both, 1), kept)

    def _new_rank(self, name: object, present: Sequence[str]) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise self.graph.error(f"{name!r} is no name for a rank", "a plain name such as 's'")
        if name in present:
            raise self.graph.error(f"the operand has a rank {name!r} already", "give the new rank a name of its own")

    def scatter_add(self, *, into: str | Sequence[str], size: object = None, **at: Value) -> Value:
        """The sum, at each coordinate of the new rank `into`, of the points whose index `at` names it.

        Args:
            into: a new rank for every rank in `at`, in order.
            size: their extents: a number or an extent (or a sequence of them); None if an input has the rank.
            at: for each rank that goes away, the integer coordinate in the new one.
        """
        here = inside(self)
        news = tuple(into.split()) if isinstance(into, str) else tuple(into)
        sizes = tuple(size) if isinstance(size, (list, tuple)) else (size,) * len(news)
        if not at or len(news) != len(at) or len(sizes) != len(at):
            raise self.graph.error(f"scatter_add over {len(at)} ranks into {len(news)}", "x.scatter_add(p=index, into='c', size=64)")
        over = here._over("scatter_add", tuple(at))
        coords = []
        for new, extent, coordinate in zip(news, sizes, at.values(), strict=True):
            self._new_rank(new, ordered(here.ranks, over))
            declare_size(self.graph, new, extent)
            coords.append((new, integer(coordinate, self.graph, "a scatter coordinate")))
        where = tuple(dict.fromkeys(here.where_))
        skipped = tuple(c for c in where if set(over) & set(c.ranks))
        return here._derive(Scatter(over, tuple(coords), here.node, skipped), tuple(c for c in where if c not in skipped))

    # --- other coordinates ---------------------------------------------------------------------------------------------------------
    def at(self, *, fill: Any = _UNSET, **coords: Operand) -> Value:
        """This value read at other coordinates: `x.at(p=0)`, `x.at(e=(ef.index("e") + 1) % 64)`, `x.at(page=table)`.

        Args:
            fill: what is read where a coordinate leaves the tensor; None promises that none does. Unless given it is 0 for a
                coordinate that moves with an index under + - * //, and None for constants, remainders and gathered indices.
            coords: a coordinate, an integer value of any ranks, for each rank that is replaced.
        """
        here = inside(self)
        here._over("at", tuple(coords))
        nodes = tuple((rank, integer(c, self.graph, f"the coordinate of {rank!r}")) for rank, c in coords.items())
        if fill is _UNSET:
            fill = _zero(here.dtype).value if any(_may_leave(node) for _, node in nodes) else None
        return here._view(nodes, fill)

    def shift(self, *, fill: Any = 0, **by: int) -> Value:
        """This value read `by` further along a rank: `x.shift(p=-1)` holds at p what x holds at p - 1; `fill` outside."""
        here = inside(self)
        here._over("shift", tuple(by))
        nodes = []
        for rank, offset in by.items():
            if isinstance(offset, bool) or not isinstance(offset, (int, Value)):
                raise self.graph.error(f"shift of {rank!r} by {offset!r}", "a whole number, such as p=-1")
            index = lift_index(self.graph, rank)
            moved = apply("sub", index, -offset) if isinstance(offset, int) and offset < 0 else apply("add", index, offset)
            nodes.append((rank, moved.node))
        return here._view(tuple(nodes), fill)

    def rename(self, **names: str) -> Value:
        """The same tensor with ranks called otherwise: `K.rename(m="p")`. Both ranks have one extent."""
        here = inside(self)
        here._over("rename", tuple(names))
        for new in names.values():
            self._new_rank(new, ordered(here.ranks, names))
        for old, new in names.items():
            if new not in names:
                self.graph.equate(new, old)
        return here._view(tuple((old, self.graph.node(Leaf(Index(new)))) for old, new in names.items()), None)

    def split(self, over: str, *, into: Sequence[str] | str, **sizes: int | Value) -> Value:
        """Rank `over` read as several, the last one fastest: `x.split("p", into=("n", "j"), j=32)`. All but one need a size."""
        here = inside(self)
        (rank,) = here._over("split", (over,))
        parts = tuple(into.split()) if isinstance(into, str) else tuple(into)
        for part in parts:
            self._new_rank(part, ordered(here.ranks, (rank,)))
        unknown = [name for name in sizes if name not in parts]
        if unknown or len(parts) < 2:
            raise self.graph.error(f"split of {rank!r} into {', '.join(parts)}: no part {', '.join(unknown)}", 'into=("n", "j"), j=32')
        for part, size in sizes.items():
            declare_size(self.graph, part, size)
        open_parts = [part for part in parts if not self.graph.knows(part)]
        if len(open_parts) > 1:
            sizes_open = ", ".join(open_parts)
            raise self.graph.error(f"split of {rank!r} leaves the sizes of {sizes_open} open", f"give one, such as {parts[-1]}=32")
        self.graph.compose(rank, parts)
        position = lift_index(self.graph, parts[0])
        for part in parts[1:]:
            position = position * Value(self.graph.node(Leaf(Extent(part))), (), self.graph) + lift_index(self.graph, part)
        return here._view(((rank, position.node),), None)

    def join(self, over: Sequence[str] | str, *, into: str) -> Value:
        """Several ranks read as one, the last one fastest: `x.join(("n", "j"), into="p")`."""
        here = inside(self)
        parts = here._over("join", (over,) if isinstance(over, str) else tuple(over))
        self._new_rank(into, ordered(here.ranks, parts))
        self.graph.compose(into, parts)
        rest = lift_index(self.graph, into)
        coords = []
        for place, part in reversed(list(enumerate(parts))):
            size = Value(self.graph.node(Leaf(Extent(part))), (), self.graph)
            coords.append((part, rest.node if place == 0 else (rest % size).node))
            rest = rest // size
        return here._view(tuple(reversed(coords)), None)

    def _view(self, coords: tuple[tuple[str, Node], ...], fill: Any) -> Value:
        """The access, of the value and of its conditions; outside the tensor a filled value is under no condition."""
        constant = None if fill is None else literal(fill, self.graph)
        if constant is not None and self.dtype.is_float and type(constant.value) is int:
            constant = Const(float(constant.value))
        outside = None if fill is None else Const(True)
        where = tuple(dict.fromkeys(_viewed(self.graph, condition, coords, outside) for condition in self.where_))
        return Value(_viewed(self.graph, self.node, coords, constant), where, self.graph)

    # --- conditions and types --------------------------------------------------------------------------------------------------------
    def where(self, condition: Operand) -> Value:
        """This value on the points where `condition` holds only: reductions skip the others, an output holds 0 there."""
        here, held = inside(self), inside(lift(condition, self.graph))
        if held.dtype != boolean:
            self.graph.settle((held.node,), boolean)
            raise self.graph.error(f"where needs a bool condition, found {held.dtype}", "compare: x.where(mask != 0)")
        both = tuple(dict.fromkeys((*here.where_, *held.where_, *_conjuncts(held.node))))
        if here.node.gathers:  # a gathered index may be out of range where the condition is false: nothing may read there
            return Value(stored(Value(here.node, both, self.graph)), both, self.graph)
        return Value(here.node, both, self.graph)

    def to(self, dtype: object) -> Value:
        """Converted to `dtype`: a rounding point that no rewrite removes."""
        here = inside(self)
        return here._derive(Convert(here.node, type_named(dtype, self.graph), False), here.where_)

    def bitcast(self, dtype: object) -> Value:
        """The same bits read as `dtype`, of the same size."""
        here, wanted = inside(self), type_named(dtype, self.graph)
        if here.dtype.bits != wanted.bits:
            found = f"{here.dtype} ({here.dtype.bits} bits) to {wanted} ({wanted.bits} bits)"
            raise self.graph.error(f"bitcast of {found}", "types of one size")
        return here._derive(Convert(here.node, wanted, True), here.where_)


Operand: TypeAlias = Value | float | int | bool


def _viewed(graph: Graph, node: Node, coords: tuple[tuple[str, Node], ...], fill: Const | None) -> Node:
    mine = tuple((rank, c) for rank, c in coords if rank in node.ranks)
    if not mine:
        return node
    if fill is not None and isinstance(node.what, Leaf):  # only a tensor has an outside: the inner view becomes one
        node = graph.node(View(node, (), None))
    return graph.node(View(node, mine, fill))


def apply(op: str, *args: Operand) -> Value:
    """The operation on values and numbers; conditions join."""
    graph = next((a.graph for a in args if isinstance(a, Value)), None) or current()
    values = [inside(lift(a, graph)) for a in args]
    where = tuple(dict.fromkeys(c for v in values for c in v.where_))
    return Value(graph.node(Apply(op, tuple(v.node for v in values))), where, graph)


def current() -> Graph:
    """The graph being traced. Raises `CascadeError` outside of a trace."""
    graph = GRAPH.get(None)
    if graph is None:
        raise CascadeError(
            "this function takes values of a traced function", location=user_location(), hint="call it inside a function under @ef.kernel"
        )
    return graph


def lift(x: object, graph: Graph) -> Value:
    """`x` as a value of `graph`. Raises `CascadeError` for a value of another trace and for anything but numbers."""
    if isinstance(x, Value):
        if x.graph is not graph or GRAPH.get(None) is not graph:
            raise graph.error("a value of another traced function", "pass it as an argument; each trace has its own values")
        return x
    return Value(graph.node(Leaf(literal(x, graph))), (), graph)


def literal(x: object, graph: Graph) -> Const:
    """A Python or NumPy number as a constant."""
    if isinstance(x, bool):
        return Const(x)
    if isinstance(x, numbers.Integral):
        return Const(int(x))
    if isinstance(x, numbers.Real):
        return Const(float(x))
    if type(x).__module__ == "numpy" and getattr(x, "shape", None) == () and isinstance(x.item(), bool):  # type: ignore[attr-defined]
        return Const(bool(x))
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        raise graph.error(f"a {type(x).__name__} inside a traced function", "make it an argument with an annotation such as 'b m e'")
    raise graph.error(f"{type(x).__name__} {x!r} is no value", "traced values and numbers take part in expressions")


def inside(value: Value) -> Value:
    """`value` as seen in the iterate blocks being traced: a rank that is a block's step is bound to it."""
    graph = value.graph
    for node in (value.node, *value.where_):
        stray = node.blocks - set(graph.blocks)
        if stray:
            rank = next(iter(stray)).rank
            raise graph.error(f"a value of the iterate block over {rank!r} is used outside of it", "make it a state; use its final value")
    for block in graph.blocks:
        if any(block.rank in node.ranks for node in (value.node, *value.where_)):
            value = value._view(((block.rank, graph.node(Step(block))),), None)
    return value


def lift_index(graph: Graph, rank: str) -> Value:
    """The index of `rank`, or of the step where an iterate block binds it."""
    return inside(Value(graph.node(Leaf(Index(rank))), (), graph))


def integer(x: object, graph: Graph, what: str) -> Node:
    """`x` as an integer node. Raises `CascadeError` for anything else and for a value under a condition."""
    value = inside(lift(x, graph))
    if not value.dtype.is_integer:
        graph.settle((value.node,), i32)
        raise graph.error(f"{what} must be an integer, found {value.dtype}", "ef.index, an integer tensor, or .to(ef.i32)")
    if value.where_:
        raise graph.error(f"{what} is under a condition", "put .where on the result instead")
    return value.node


def declare_size(graph: Graph, rank: str, size: object) -> None:
    """Record the size of a rank from what the user gave: a number, an extent, or None if something else gives it."""
    if size is None:
        if not graph.knows(rank):
            raise graph.error(f"rank {rank!r} is in no input and has no size", f"size=64, or size=ef.extent('p') for {rank!r}")
        return
    if isinstance(size, (Const, Extent, Op)):
        graph.declare(rank, size)
        return
    expression = size_expression(lift(size, graph).node)
    if expression is None or (isinstance(expression, Const) and int(expression.value) < 1):
        raise graph.error(f"{size!r} is no size for rank {rank!r}", "a whole number above 0, or ef.extent('p') under + - * //")
    graph.declare(rank, expression)


def type_named(name: object, graph: Graph) -> DType:
    """The element type: ef.bf16, 'bf16', torch.bfloat16 or numpy.float32."""
    if isinstance(name, DType):
        return name
    spelled = getattr(name, "__name__", None) or str(name)
    try:
        return dtype_named(spelled.removeprefix("torch."))
    except KeyError:
        raise graph.error(f"unknown type {spelled!r}", "such as 'f32', 'bf16', 'i32', 'u8', 'f8e4m3'") from None


def mean_of(x: Value, over: tuple[str, ...]) -> Value:
    """The sum over the ranks by the number of points that count."""
    here = inside(x)
    return (here if here.dtype.is_float else here.to(f32)).sum(*over) / points(here, over)


def points(x: Value, over: Sequence[str]) -> Value:
    """How many points of the ranks `over` no condition of `x` leaves out, an i32."""
    graph = x.graph
    skipped, _ = inside(x)._conditions(over)
    conditioned = {rank for c in skipped for rank in c.ranks}
    factors = [Value(graph.node(Leaf(Extent(rank))), (), graph) for rank in over if rank not in conditioned]
    if skipped:
        ones = Value(graph.node(Leaf(Const(1))), skipped, graph)
        factors.insert(0, ones.sum(*[rank for rank in over if rank in conditioned]))
    count = factors[0]
    for factor in factors[1:]:
        count = count * factor
    return count


def stored(value: Value) -> Node:
    """The value as it is stored: 0 where a condition is false."""
    here = inside(value)
    if not here.where_:
        return here.node
    return here.graph.node(Apply("where", (conjunction(here.graph, here.where_), here.node, here.graph.node(Leaf(_zero(here.dtype))))))


def conjunction(graph: Graph, conditions: Sequence[Node]) -> Node:
    """All conditions joined by `&`."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = graph.node(Apply("and", (result, condition)))
    return result


def _conjuncts(node: Node) -> tuple[Node, ...]:
    if isinstance(node.what, Apply) and node.what.op == "and":
        return tuple(c for arg in node.what.args for c in _conjuncts(arg))
    return (node,)


def _zero(dtype: DType) -> Const:
    return Const(0.0) if dtype.is_float else Const(False) if dtype == boolean else Const(0)


def _may_leave(node: Node) -> bool:
    """Whether a coordinate moves with an index so that it may leave the tensor; see `Value.at`."""
    match node.what:
        case Apply(op="mod") | Leaf() | Step():
            return False
        case Apply(op=("add" | "sub" | "mul" | "floordiv" | "neg")):
            return node.affine and bool(node.ranks)
        case _:
            return False
