"""The functions of the language on traced values: maps, indices, concatenation and iteration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from ..ir.expr import Extent, Op
from ..ir.types import boolean, i32
from .trace_graph import (
    Apply,
    Block,
    Concat,
    Convert,
    Leaf,
    Loop,
    Node,
    Result,
    State,
    Step,
    View,
    operands,
    ordered,
    stored_type,
)
from .trace_value import Operand, Value, apply, current, declare_size, inside, lift, lift_index, stored

_MAX_STATE_GROWTH = 8  # a state gains at least one rank in each round; no cascade comes near this many


def exp(x: Operand) -> Value: return apply("exp", x)
def exp2(x: Operand) -> Value: return apply("exp2", x)
def log(x: Operand) -> Value: return apply("log", x)
def log2(x: Operand) -> Value: return apply("log2", x)
def log1p(x: Operand) -> Value: return apply("log1p", x)
def sqrt(x: Operand) -> Value: return apply("sqrt", x)
def rsqrt(x: Operand) -> Value: return apply("rsqrt", x)
def sin(x: Operand) -> Value: return apply("sin", x)
def cos(x: Operand) -> Value: return apply("cos", x)
def tanh(x: Operand) -> Value: return apply("tanh", x)
def sigmoid(x: Operand) -> Value: return apply("sigmoid", x)
def erf(x: Operand) -> Value: return apply("erf", x)
def abs(x: Operand) -> Value: return apply("abs", x)
def sign(x: Operand) -> Value: return apply("sign", x)
def floor(x: Operand) -> Value: return apply("floor", x)
def ceil(x: Operand) -> Value: return apply("ceil", x)
def round(x: Operand) -> Value: return apply("round", x)
def trunc(x: Operand) -> Value: return apply("trunc", x)
def minimum(a: Operand, b: Operand) -> Value: return apply("minimum", a, b)
def maximum(a: Operand, b: Operand) -> Value: return apply("maximum", a, b)
def isnan(x: Operand) -> Value: return apply("isnan", x)
def isinf(x: Operand) -> Value: return apply("isinf", x)
def isfinite(x: Operand) -> Value: return apply("isfinite", x)
def popcount(x: Operand) -> Value: return _count_bits("popcount", x)
def clz(x: Operand) -> Value: return _count_bits("clz", x)


def _count_bits(op: str, x: Operand) -> Value:
    value = apply(op, x)
    held = lift(x, value.graph)
    if not held.dtype.is_integer:
        value.graph.settle((held.node,), i32)
        raise value.graph.error(f"{op} needs an integer, found {held.dtype}", "x.bitcast(ef.i32) reads a float's bits")
    return value


def where(condition: Operand, a: Operand, b: Operand) -> Value:
    """`a` where the condition holds, else `b`. A select: what is not taken does not matter, not even a NaN."""
    graph = next((x.graph for x in (condition, a, b) if isinstance(x, Value)), None) or current()
    held = lift(condition, graph)
    if held.dtype != boolean:
        graph.settle((held.node,), boolean)
        raise graph.error(f"where needs a bool condition, found {held.dtype}", "compare: ef.where(mask != 0, a, b)")
    return apply("where", condition, a, b)


def exact(x: Operand) -> Value:
    """`x`, with no operand of a contraction rounded on the way: switches off the rounding rule of the language."""
    return apply("exact", x)


def index(rank: str, *, size: int | Value | None = None) -> Value:
    """The index along `rank`, an i32. `size` gives the extent of a rank that is in no input."""
    graph = current()
    _rank_name(rank)
    if size is not None:
        declare_size(graph, rank, size)
    return lift_index(graph, rank)


def extent(rank: str) -> Value:
    """The extent of `rank`, an i32."""
    graph = current()
    _rank_name(rank)
    return Value(graph.node(Leaf(Extent(rank))), (), graph)


def _rank_name(rank: object) -> None:
    if not isinstance(rank, str) or not rank.isidentifier():
        raise current().error(f"{rank!r} is no name of a rank", 'one name, such as "p"')


def concat(*parts_: Value, rank: str, parts: Sequence[str] | str) -> Value:
    """Tensors one after the other along the new rank `rank`; `parts` names the piece rank of each. A missing rank broadcasts."""
    graph = current()
    pieces = tuple(parts.split()) if isinstance(parts, str) else tuple(parts)
    if len(pieces) != len(parts_) or len(pieces) < 2 or len(set(pieces)) < len(pieces):
        raise graph.error(f"concat of {len(parts_)} tensors with parts {', '.join(pieces)}", 'ef.concat(A, B, rank="p", parts=("s", "t"))')
    _rank_name(rank)
    nodes = []
    for piece, part in zip(pieces, parts_, strict=True):
        value = inside(lift(part, graph))
        if piece not in value.ranks:
            found = ", ".join(value.ranks)
            raise graph.error(f"a part of concat has no rank {piece!r}; its ranks are {found}", f"rename its rank to {piece!r}")
        if rank in value.ranks:
            raise graph.error(f"a part of concat has the rank {rank!r} that concat makes", f"rename it: x.rename({rank}={piece!r})")
        nodes.append((piece, stored(value)))
    size: Extent | Op = Extent(pieces[0])
    for piece in pieces[1:]:
        size = Op("add", (size, Extent(piece)))
    graph.declare(rank, size)
    return Value(graph.node(Concat(rank, tuple(nodes))), (), graph)


def iterate(
    rank: str,
    *,
    init: Mapping[str, Operand] | Operand,
    step: Callable[..., object],
    until: Callable[..., Operand] | None = None,
    size: int | Value | None = None,
) -> Value | tuple[Value, ...]:
    """States that step along `rank`: each step all of them take their next values at once. Gives the final values.

    Args:
        rank: the index of the step, from 0. Tensors that have the rank are read at the step.
        init: the value of each state before the first step, by name; or one value, for a single unnamed state.
        step: takes the states by name (or the one state) and gives their next values: a mapping, or a sequence in order of `init`.
        until: takes the states after the step; the iteration stops when it is true. Rank 0, made of states alone.
        size: the number of steps, if no input has the rank.
    """
    graph = current()
    _rank_name(rank)
    if size is not None or not graph.knows(rank):
        declare_size(graph, rank, size)
    named = isinstance(init, Mapping)
    table: Mapping[str, Operand] = init if isinstance(init, Mapping) else {"": init}
    if not table:
        raise graph.error("iterate without a state", "init={'M': 0.0}")
    first = {name: stored(lift(x, graph)) for name, x in table.items()}
    ranks = {name: node.ranks for name, node in first.items()}
    for _ in range(_MAX_STATE_GROWTH):
        block = Block(rank, len(graph.blocks))
        after = _one_step(block, first, ranks, step, named)
        grown = {name: ordered((*ranks[name], *after[name].ranks)) for name in ranks}
        if grown == ranks:
            break
        ranks = grown
    else:
        raise graph.error(f"the states of the iterate block over {rank!r} gain ranks without end", "check the ranks that `step` returns")
    stop = _stop(block, first, ranks, until, named)
    node = graph.node(Loop(block, tuple((name, ranks[name], first[name], after[name]) for name in first), stop, named))
    results = tuple(Value(graph.node(Result(node, i)), (), graph) for i in range(len(first)))
    return results if named else results[0]


def _states(block: Block, first: Mapping[str, Node], ranks: Mapping[str, tuple[str, ...]], after: bool) -> dict[str, Value]:
    graph = current()
    made = {name: State(block, name, ranks[name], stored_type(node), after) for name, node in first.items()}
    return {name: Value(graph.node(state), (), graph) for name, state in made.items()}


def _one_step(
    block: Block, first: Mapping[str, Node], ranks: Mapping[str, tuple[str, ...]], step: Callable[..., object], named: bool
) -> dict[str, Node]:
    graph = current()
    for name, state_ranks in ranks.items():
        if block.rank in state_ranks:
            raise graph.error(f"state {name or '?'} has the rank {block.rank!r} of its iterate block", "another name for the step's rank")
    graph.blocks.append(block)
    try:
        states = _states(block, first, ranks, after=False)
        given = step(**states) if named else step(*states.values())
        if isinstance(given, Mapping):
            results = dict(given)
        elif isinstance(given, (tuple, list)) and named:
            results = dict(zip(first, given, strict=False)) if len(given) == len(first) else {}
        else:
            results = {next(iter(first)): given} if len(first) == 1 else {}
        if list(results) != list(first) and set(results) != set(first):
            wanted = ", ".join(name or "one value" for name in first)
            raise graph.error(f"the step of iterate must give the next values of {wanted}", "a mapping with the names of init")
        return {name: stored(lift(results[name], graph)) for name in first}
    finally:
        graph.blocks.pop()


def _stop(
    block: Block, first: Mapping[str, Node], ranks: Mapping[str, tuple[str, ...]], until: Callable[..., Operand] | None, named: bool
) -> Node | None:
    if until is None:
        return None
    graph = current()
    graph.blocks.append(block)
    try:
        states = _states(block, first, ranks, after=True)
        wanted = set(inspect.signature(until).parameters) if named else set()
        given = until(**{name: s for name, s in states.items() if name in wanted}) if named else until(*states.values())
        value = lift(given, graph)
    finally:
        graph.blocks.pop()
    hint = "reduce in the step and keep the result as a state"
    if value.node.ranks or value.node.dtype != boolean or value.where_:
        raise graph.error(f"`until` must be one bool, found {value.node.dtype}[{', '.join(value.node.ranks)}]", hint)
    if _reduces(value.node, block):
        raise graph.error("`until` reduces a state", hint)
    return value.node


def _reduces(node: Node, block: Block) -> bool:
    """Whether `node` is computed from the states of `block` by more than maps."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        if block not in found.blocks or found in seen:
            continue
        if not isinstance(found.what, (Apply, Convert, View, State, Step)):
            return True
        seen.add(found)
        stack.extend(operands(found.what))
    return False
