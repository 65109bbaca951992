"""From the graph of a trace to the statements of a cascade: which nodes are statements, what they are called, how they read.

A reduction, scan, populate, scatter, concat or iterate is a statement. A map is one if a variable names it, or if it is used more than
once; other maps are written into their consumer. Conditions and expressions that read no tensor are always written out, and so are
views of a tensor, which are only other coordinates; a table of exponentials or sines over indices is a map like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..ir import cascade as ir
from ..ir.check_statements import RESERVED
from ..ir.expr import OPS, Bitcast, Cast, Const, Expr, Index, Op, Read
from ..ir.types import boolean
from .trace_graph import (
    Apply,
    Block,
    Concat,
    Convert,
    Graph,
    Leaf,
    Loop,
    Node,
    Populate,
    Reduce,
    Result,
    Scan,
    Scatter,
    Source,
    State,
    Step,
    View,
    operands,
)  # fmt: skip

_ALWAYS = (Reduce, Scan, Scatter, Concat, Result)
_CONDITION_SIZE = 15  # a condition of up to so many nodes is written out wherever it is used
_INDEX_SIZE = 64  # likewise an expression over indices, extents and scalars alone
_LARGEST = 128  # a larger expression is cut, so that no walk over one goes deep
_TRIVIAL_SIZE = 3  # likewise any map used more than once: one operation on two operands


@dataclass(slots=True)
class Selection:
    """The nodes that are statements, found in one walk in the order in which they were made."""

    graph: Graph
    named: Mapping[Node, tuple[int, str, bool]]
    outputs: frozenset[Node]
    reachable: list[Node] = field(default_factory=list)
    uses: dict[Node, int] = field(default_factory=dict)
    statements: set[Node] = field(default_factory=set)
    size: dict[Node, int] = field(default_factory=dict)
    tensors: dict[Node, bool] = field(default_factory=dict)
    special: dict[Node, bool] = field(default_factory=dict)
    after: dict[Node, bool] = field(default_factory=dict)
    fills: dict[Node, bool] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, roots: Iterable[Node], named: Mapping[Node, tuple[int, str, bool]]) -> Selection:
        """The selection for the results `roots`."""
        self = Selection(graph, named, frozenset(roots))
        self._reach()
        views = [n.what for n in self.reachable if isinstance(n.what, View)]
        filled = {view.x for view in views if view.fill is not None}
        gathered = {view.x for view in views if not all(c.affine for _, c in view.coords)}
        for node in self.reachable:
            self._note(node)
            if self._is_statement(node, filled) or (node in gathered and self.fills[node]):  # a gathered index has no outside to fill
                self.statements.add(node)
            self.size[node] = 1 if node in self.statements else self._written(node)
        return self

    def _note(self, node: Node) -> None:
        """Whether `node` reads tensors, computes more than arithmetic, reads a state after its step, and reads with a fill."""
        what, args = node.what, operands(node.what)
        self.tensors[node] = isinstance(what, (Source, State, *_ALWAYS)) or any(self.tensors[a] for a in args)
        self.special[node] = (isinstance(what, Apply) and OPS[what.op].kind == "float") or any(self.special[a] for a in args)
        self.after[node] = what.after if isinstance(what, State) else not isinstance(what, Loop) and any(self.after[a] for a in args)
        written_out = (a for a in args if a not in self.statements)
        self.fills[node] = (isinstance(what, View) and what.fill is not None) or any(self.fills[a] for a in written_out)

    def _reach(self) -> None:
        seen: set[Node] = set(self.outputs)
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            for arg in operands(node.what):
                self.uses[arg] = self.uses.get(arg, 0) + 1
            for arg in (*operands(node.what), *self._siblings(node)):
                if arg not in seen:
                    seen.add(arg)
                    stack.append(arg)
        self.reachable = sorted(seen, key=lambda node: node.order)

    def _written(self, node: Node) -> int:
        """How many nodes it takes to write `node` out; a view may repeat its coordinates wherever it reads."""
        if isinstance(node.what, View):
            return self.size[node.what.x] * (1 + sum(self.size[c] for _, c in node.what.coords))
        return 1 + sum(self.size[a] for a in operands(node.what))

    def _siblings(self, node: Node) -> tuple[Node, ...]:
        """Both results of a populate, which gives them together, used or not."""
        return tuple(self.graph.node(Result(node, i)) for i in range(2)) if isinstance(node.what, Populate) else ()

    def _is_statement(self, node: Node, filled: set[Node]) -> bool:
        match node.what:
            case Leaf() | Source() | Step() | State() | Loop() | Populate():
                return False
            case Apply() | Convert() | View():
                pass
            case _:
                return True
        if self.after[node]:  # part of a stop condition, which reads the states after the step
            return False
        if node in self.outputs:
            return True
        if node in filled and not (isinstance(node.what, View) and self._only_renames(node)):
            return True
        size = self._written(node)
        if size > _LARGEST:
            return True
        if not self.tensors[node] and not self.special[node] and size <= _INDEX_SIZE:
            return False
        if node.dtype == boolean and size <= _CONDITION_SIZE:
            return False
        if isinstance(node.what, View) and self._is_tensor(node.what.x):
            return False
        if node in self.named and self.named[node][2]:
            return True
        return self.uses.get(node, 0) > 1 and size > _TRIVIAL_SIZE

    def _is_tensor(self, node: Node) -> bool:
        if isinstance(node.what, View) and node not in self.statements:
            return self._is_tensor(node.what.x)
        return node in self.statements or isinstance(node.what, (Source, State))

    def _only_renames(self, node: Node) -> bool:
        """Whether a view is a tensor under other ranks, so that a fill passes through it."""
        match node.what:
            case View(x=x, coords=coords, fill=None):
                return all(isinstance(c.what, Leaf) and isinstance(c.what.expr, Index) for _, c in coords) and self._only_renames(x)
            case Source() | State():
                return True
            case _:
                return node in self.statements


@dataclass(slots=True)
class Writer:
    """Writes nodes as expressions and statements. `names` and `ranks` are those of the statements' results."""

    graph: Graph
    selection: Selection
    names: dict[Node, str]
    state_names: dict[tuple[Block, str], str]
    ranks: dict[Node, tuple[str, ...]]

    def expression(self, node: Node, table: Mapping[str, Expr] | None = None, fill: Const | None = None, *, root: bool = False) -> Expr:
        """`node` with the ranks in `table` read elsewhere. With `root` its own definition, else a read if it is a statement."""
        table = table or {}
        what = node.what
        if node in self.selection.statements and not root:
            return self._read(self.names[node], self.ranks[node], table, fill)
        match what:
            case Leaf(expr=Index(rank=rank)):
                return table.get(rank, what.expr)
            case Leaf(expr=expr):
                return expr
            case Step(block=block):
                return Index(block.rank)
            case Source(tensor=tensor):
                return self._read(tensor.name, tensor.ranks, table, fill)
            case State(block=block, name=name, ranks=ranks):
                return self._read(self.state_names[block, name], ranks, table, fill)
            case Apply(op=op, args=args):
                return Op(op, tuple(self.expression(a, table) for a in args))
            case Convert(x=x, dtype=dtype, bits=bits):
                inner = self.expression(x, table)
                return Bitcast(inner, dtype) if bits else Cast(inner, dtype)
            case View(x=x, coords=coords, fill=own):
                inside = {rank: table[rank] for rank in x.ranks if rank in table}
                inside.update((rank, self.expression(c, table)) for rank, c in coords)
                return self.expression(x, inside, own if own is not None else fill)
            case _:
                raise AssertionError(f"{type(what).__name__} is no expression")

    @staticmethod
    def _read(name: str, ranks: tuple[str, ...], table: Mapping[str, Expr], fill: Const | None) -> Read:
        return Read(name, tuple(table.get(rank, Index(rank)) for rank in ranks), fill)

    def body(self, block: Block | None) -> tuple[ir.Statement, ...]:
        """The statements that live directly in `block`, in the order in which they were made."""
        written = []
        for node in self.selection.reachable:
            if innermost(node) is not block:
                continue
            statement = self.statement(node)
            if statement is not None:
                written.append(statement)
        return tuple(written)

    def statement(self, node: Node) -> ir.Statement | None:
        """The statement of a node, None for a node that is written into others."""
        what, where = node.what, node.location
        match what:
            case Reduce(op=op, over=over, x=x, where=conditions):
                return ir.Einsum(self.names[node], self.ranks[node], self.expression(x), op, over, self._all(conditions), where)
            case Scan(op=op, over=over, exclusive=exclusive, x=x, where=conditions):
                return ir.Scan(self.names[node], self.ranks[node], self.expression(x), op, over, exclusive, self._all(conditions), where)
            case Populate(rule=rule, over=over, into=into, parameter=parameter, x=x, where=conditions):
                values, coords = self._results(node)
                least = None if parameter is None else self.expression(parameter)
                return ir.Populate(
                    self.names[values], self.names[coords], self.ranks[values], self.expression(x), rule, over, into, least,
                    self._all(conditions), where,
                )  # fmt: skip
            case Scatter(over=over, at=at, x=x, where=conditions):
                to = tuple((rank, self.expression(c)) for rank, c in at)
                return ir.Scatter(self.names[node], self.ranks[node], self.expression(x), over, to, self._all(conditions), where)
            case Concat(rank=rank, parts=parts):
                return ir.Concat(self.names[node], self.ranks[node], rank, tuple((p, self.expression(x)) for p, x in parts), where)
            case Loop(block=block, states=states, until=until):
                written = tuple(
                    ir.IterState(self.state_names[block, name], ranks, self.expression(init), self.expression(after))
                    for name, ranks, init, after in states
                )
                stop = None if until is None else self.expression(until)
                return ir.Iterate(block.rank, written, self.body(block), stop, where)
            case Result():
                return None
            case _:
                if node not in self.selection.statements:
                    return None
                return ir.Einsum(self.names[node], self.ranks[node], self.expression(node, root=True), location=where)

    def _results(self, node: Node) -> tuple[Node, Node]:
        first, second = (self.graph.node(Result(node, i)) for i in range(2))
        return first, second

    def _all(self, conditions: tuple[Node, ...]) -> Expr | None:
        if not conditions:
            return None
        result = self.expression(conditions[0])
        for condition in conditions[1:]:
            result = Op("and", (result, self.expression(condition)))
        return result


def innermost(node: Node) -> Block | None:
    """The innermost block that `node` lives in."""
    return max(node.blocks, key=lambda block: block.depth, default=None)


@dataclass(slots=True)
class Names:
    """Gives every statement a name of its own; see `assign`."""

    taken: set[str]

    def free(self, wanted: str) -> str:
        """`wanted`, or with the first free number from 2 on."""
        return self.first(wanted, *(f"{wanted}{i}" for i in range(2, len(self.taken) + 3)))

    def first(self, *candidates: str) -> str:
        """The first candidate that is free, which is then taken."""
        name = next(c for c in candidates if c not in self.taken)
        self.taken.add(name)
        return name


def assign(
    selection: Selection, named: Mapping[Node, tuple[int, str, bool]], outputs: tuple[Node, ...], taken: set[str]
) -> tuple[dict[Node, str], dict[tuple[Block, str], str]]:
    """Names for the statements and for the states of iterate blocks.

    Variables first, the outermost function's before those of the functions it calls; a clash gets a number from 2 on. Then results
    without a variable: O, else Z, Y, W. Then whatever feeds a named statement S without a name of its own: S0, S1, ...
    """
    names = Names(taken | RESERVED)
    given: dict[Node, str] = {}
    states: dict[tuple[Block, str], str] = {}
    in_order = [node for node in selection.reachable if node in selection.statements]
    for node in selection.reachable:
        if isinstance(node.what, Loop):
            _name_states(node, selection, named, names, given, states)
    for node in sorted((n for n in in_order if n in named and n not in given), key=lambda n: (named[n][0], n.order)):
        given[node] = names.free(named[node][1])
    for node in outputs:
        if node in selection.statements and node not in given:
            given[node] = names.first("O", "Z", "Y", "W", *(f"O{i}" for i in range(2, len(names.taken) + 3)))
    _name_the_rest(selection, in_order, names, given, states)
    return given, states


def _name_states(
    node: Node,
    selection: Selection,
    named: Mapping[Node, tuple[int, str, bool]],
    names: Names,
    given: dict[Node, str],
    states: dict[tuple[Block, str], str],
) -> None:
    """Names the states as the user did; the one state of an unnamed block takes the name of the variable that holds the result."""
    assert isinstance(node.what, Loop)
    results = {n.what.index: n for n in selection.reachable if isinstance(n.what, Result) and n.what.of is node}
    for i, (name, *_) in enumerate(node.what.states):
        result = results.get(i)
        wanted = name or (named[result][1] if result is not None and result in named else "X")
        states[node.what.block, name] = names.free(wanted)
        if result is not None:
            given[result] = states[node.what.block, name]


def _name_the_rest(
    selection: Selection, in_order: list[Node], names: Names, given: dict[Node, str], states: dict[tuple[Block, str], str]
) -> None:
    owners: list[tuple[str, Iterable[Node]]] = []
    owners += [(given[n], operands(n.what)) for n in in_order if n in given and not isinstance(n.what, Result)]
    for node in selection.reachable:
        if isinstance(node.what, Loop):
            block = node.what.block
            owners += [(states[block, name], (init, after)) for name, _, init, after in node.what.states]
        elif isinstance(node.what, Result) and node in given and isinstance(node.what.of.what, Populate):
            owners.append((given[node], operands(node.what.of.what)))
    for owner, args in owners:
        for node in _unnamed(args, selection, given):
            given[node] = names.first(*(f"{owner}{i}" for i in range(len(names.taken) + 1)))
    for node in in_order:  # the result of a populate that nothing reads
        if node not in given:
            assert isinstance(node.what, Result)
            sibling = selection.graph.node(Result(node.what.of, 1 - node.what.index))
            given[node] = names.free(given[sibling] + ("_values" if node.what.index == 0 else "_coords"))


def _unnamed(args: Iterable[Node], selection: Selection, given: Mapping[Node, str]) -> list[Node]:
    """The unnamed statements that `args` reach without passing a named one, in the order in which they were made."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = list(args)
    while stack:
        node = stack.pop()
        if node in seen or node in given:
            continue
        seen.add(node)
        if node in selection.statements:
            found.add(node)
        stack.extend(operands(node.what))
    return sorted(found, key=lambda n: n.order)
