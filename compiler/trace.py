"""A Python function becomes a cascade: it runs once on symbolic values.

There are no tricks with source code: helpers, loops, lambdas and closures are plain Python. Only the names of local variables are
read, so that the cascade's tensors are called as the user calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..ir.cascade import Cascade, Output, RankDecl, Statement, expressions
from ..ir.check import check_cascade
from ..ir.expr import Const, Extent, Index, Scalar, walk
from ..ir.types import DType
from .functions import (
    abs,
    ceil,
    clz,
    concat,
    cos,
    erf,
    exact,
    exp,
    exp2,
    extent,
    floor,
    index,
    isfinite,
    isinf,
    isnan,
    iterate,
    log,
    log1p,
    log2,
    maximum,
    minimum,
    popcount,
    round,
    rsqrt,
    sigmoid,
    sign,
    sin,
    sqrt,
    tanh,
    trunc,
    where,
)  # fmt: skip
from .trace_graph import Graph, Leaf, Loop, Node, Result, Source, State, Untyped, View
from .trace_names import NameRecorder, called
from .trace_signature import Axes, Signature, read_signature
from .trace_statements import Selection, Writer, assign
from .trace_value import GRAPH, Value, stored

__all__ = [
    "Value", "abs", "ceil", "clz", "concat", "cos", "erf", "exact", "exp", "exp2", "extent", "floor", "index", "isfinite", "isinf",
    "isnan", "iterate", "log", "log1p", "log2", "maximum", "minimum", "popcount", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt",
    "tanh", "trace", "trunc", "where",
]  # fmt: skip

_EMPTY: Mapping[str, object] = {}
_NO_TYPES: Mapping[str, DType] = {}


def trace(function: Callable[..., object], *, static: Mapping[str, object] = _EMPTY, dtypes: Mapping[str, DType] = _NO_TYPES) -> Cascade:
    """The cascade that `function` computes.

    Args:
        function: annotated arguments, as in the language reference; it returns one traced value or a tuple of them.
        static: values of `int`, `bool` and `str` arguments; their defaults otherwise.
        dtypes: element types of inputs. One not given is i32 if it is used as a coordinate or bit by bit, bool if as a condition, else f32.

    Raises:
        CascadeError: the function's annotations or its body are no cascade.
    """
    known = dict(dtypes)
    while True:
        try:
            cascade = _trace(function, static, known)
            break
        except Untyped as found:  # each round settles at least one more input
            known.update(found.types)
    check_cascade(cascade)
    return cascade


def _trace(
    function: Callable[..., object], static: Mapping[str, object], dtypes: Mapping[str, DType]
) -> Cascade:
    name = getattr(function, "__name__", "cascade")
    name = name if name.isidentifier() else "cascade"
    signature = read_signature(function, name, static, dtypes)
    graph = Graph(name, signature.location, open_types=frozenset(t.name for t in signature.inputs if t.name not in dtypes))
    graph.inputs.update((tensor.name, tensor) for tensor in signature.inputs)
    graph.scalars.update((scalar.name, scalar) for scalar in signature.scalars)
    for rank, size in signature.sizes:
        graph.declare(rank, Const(size))
    recorder = NameRecorder()
    token = GRAPH.set(graph)
    try:
        arguments = _arguments(graph, signature)
        graph.running = True
        returned = called(function, arguments, recorder)
        graph.running = False
        values, several = _results(returned, graph)
        axes = _result_axes(signature.results, values, several, graph)
        return _write(graph, values, axes, recorder)
    finally:
        GRAPH.reset(token)


def _arguments(graph: Graph, signature: Signature) -> dict[str, object]:
    arguments: dict[str, object] = dict(signature.static)
    for tensor in signature.inputs:
        arguments[tensor.name] = Value(graph.node(Source(tensor)), (), graph)
    for scalar in signature.scalars:
        arguments[scalar.name] = Value(graph.node(Leaf(Scalar(scalar.name))), (), graph)
    return {name: arguments[name] for name in signature.order}


def _results(returned: object, graph: Graph) -> tuple[tuple[Value, ...], bool]:
    several = isinstance(returned, (tuple, list))
    items: Sequence[object] = returned if isinstance(returned, (tuple, list)) else (returned,)
    for item in items:
        if not isinstance(item, Value):
            found = "None" if item is None else f"{type(item).__name__} {item!r}"
            forgotten = "return the value: did the last line forget `return`?"
            hint = forgotten if item is None else "return traced values: one, or a tuple of them"
            raise graph.error(f"{graph.name} returns {found}, which is no traced value", hint)
        if item.graph is not graph:
            raise graph.error(f"{graph.name} returns a value of another traced function", "pass it as an argument")
    if not items:
        raise graph.error(f"{graph.name} returns nothing", "return one traced value, or a tuple of them")
    return tuple(item for item in items if isinstance(item, Value)), several


def _result_axes(declared: tuple[Axes, ...] | None, values: tuple[Value, ...], several: bool, graph: Graph) -> tuple[Axes, ...]:
    """The axes of each result: as annotated, else its ranks in order of first appearance."""
    if declared is None:
        return tuple(Axes(tuple((rank,) for rank in value.ranks), ()) for value in values)
    if len(declared) != len(values):
        raise graph.error(
            f"{graph.name} returns {len(values)} values, its annotation names {len(declared)}", '-> ("b h m f", "b h p") for two results'
        )
    for i, (axes, value) in enumerate(zip(declared, values, strict=True)):
        which = f"result {i + 1}" if several else "the result"
        for rank, size in axes.sizes:
            graph.declare(rank, Const(size))
        said = tuple(rank for axis in axes.axes for rank in axis)
        missing = [rank for rank in value.ranks if rank not in said]
        unknown = [rank for rank in said if rank not in value.ranks and not graph.knows(rank)]
        if missing:
            raise graph.error(
                f"{which} has the ranks {' '.join(value.ranks)}, its annotation {' '.join(said)!r} lacks {', '.join(missing)}",
                f"reduce over {', '.join(missing)}, or add it to the annotation",
            )
        if unknown:
            raise graph.error(f"{which} is annotated with the unknown rank {unknown[0]!r}", f"its ranks are {', '.join(value.ranks)}")
    return declared


def _write(graph: Graph, values: tuple[Value, ...], axes: tuple[Axes, ...], recorder: NameRecorder) -> Cascade:
    named = recorder.names()
    roots: list[Node] = []
    ranks: dict[Node, tuple[str, ...]] = {}
    for value, axis in zip(values, axes, strict=True):
        wanted = tuple(rank for group in axis.axes for rank in group)
        root = _own(graph, _root(graph, value, named), wanted, ranks, named)
        ranks[root] = wanted
        roots.append(root)
    selection = Selection.of(graph, roots, named)
    _check_known(graph, selection)
    for node in selection.reachable:
        ranks.setdefault(node, node.ranks)
    names, states = assign(selection, named, tuple(roots), {*graph.inputs, *graph.scalars})
    writer = Writer(graph, selection, names, states, ranks)
    outputs = tuple(Output(names[root], axis.axes) for root, axis in zip(roots, axes, strict=True))
    body = writer.body(None)
    declared = _declared(graph, body, outputs)
    return Cascade(graph.name, tuple(graph.inputs.values()), tuple(graph.scalars.values()), declared, body, outputs)


def _root(graph: Graph, value: Value, named: dict[Node, tuple[int, str, bool]]) -> Node:
    """The node to store for a result; a condition's select takes over the variable's name."""
    root = stored(value)
    if root is not value.node and value.node in named:
        named.setdefault(root, named.pop(value.node))
    return root


def _own(
    graph: Graph, root: Node, wanted: tuple[str, ...], ranks: dict[Node, tuple[str, ...]], named: dict[Node, tuple[int, str, bool]]
) -> Node:
    """`root`, or a copy of it where it cannot be a result itself: an input, a result already, or a state in another order of ranks."""
    tied = isinstance(root.what, Result) and root.ranks != wanted
    if root in ranks or tied or isinstance(root.what, (Leaf, Source, State)):
        copy = graph.node(View(root, tuple((rank, graph.node(Leaf(Index(rank)))) for rank in root.ranks), None))
        while copy in ranks:
            copy = graph.node(View(copy, (), None))
        if tied and root not in ranks and root in named and not isinstance(getattr(root.what, "of", root).what, Loop):
            named[copy] = named.pop(root)
        return copy
    return root


def _declared(graph: Graph, body: tuple[Statement, ...], outputs: tuple[Output, ...]) -> tuple[RankDecl, ...]:
    """The sizes that mean something to the cascade, in the order they were declared: a split that nothing reads leaves none."""
    inputs = graph.input_ranks()
    bare = Cascade(graph.name, tuple(graph.inputs.values()), (), (), body, outputs)
    used = {*bare.all_ranks(), *(rank for output in outputs for rank in output.ranks)}
    used |= {node.rank for s in body for e in expressions(s) for node in walk(e) if isinstance(node, (Index, Extent))}
    needed: set[str] = set()
    before = -1
    while len(needed) > before:
        before = len(needed)
        for d in graph.sizes.values():
            parts = {node.rank for node in walk(d.size) if isinstance(node, Extent)}
            defines = d.name in used and (not parts or d.name not in inputs or parts & used)
            if defines or (parts & used) - inputs.keys():
                needed.add(d.name)
                used |= {d.name, *parts}
    return tuple(d for d in graph.sizes.values() if d.name in needed)


def _check_known(graph: Graph, selection: Selection) -> None:
    """Raise `CascadeError` for an index or extent of a rank that has no size."""
    for node in selection.reachable:
        match node.what:
            case Leaf(expr=Index(rank=rank) | Extent(rank=rank)) if not graph.knows(rank):
                raise graph.error(
                    f"rank {rank!r} is in no input and has no size",
                    f'ef.index("{rank}", size=64), or one of the inputs\' ranks {", ".join(graph.input_ranks())}',
                    node,
                )
            case _:
                pass


