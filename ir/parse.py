"""Text to cascades and tile programs: Lark's LALR parser for the grammar in `cascade.lark`, and what its trees mean.

This module loads Lark, so it is itself loaded only when a text is parsed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lark import Token, Tree

from .cascade import (
    Axis,
    Cascade,
    Concat,
    Einsum,
    Iterate,
    IterState,
    Output,
    Populate,
    RankDecl,
    ScalarDecl,
    Scan,
    Scatter,
    Statement,
    Tensor,
)  # fmt: skip
from .errors import CascadeError, Location
from .expr import (
    OPS,
    Bitcast,
    Cast,
    Const,
    Count,
    Expr,
    Extent,
    Index,
    Masked,
    Op,
    Read,
    Scalar,
    Seen,
    Start,
    Tile,
    walk,
)  # fmt: skip
from .source import ONE_REDUCTION, REDUCTION_WORDS, ParseTree, Source
from .tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Node, Reduce, Store, TileOutput, TileProgram
from .tile import Scan as TileScan
from .types import DTYPES, DType, dtype, f32

_BINARY = {info.symbol: name for name, info in OPS.items() if info.symbol and info.arity == 2}
_PREFIX = {info.symbol: name for name, info in OPS.items() if info.symbol and info.arity == 1}
_LITERALS = {"inf": math.inf, "nan": math.nan, "true": True, "false": False}
_LEAVES: dict[str, Callable[[str], Expr]] = {
    "index": Index, "extent": Extent, "tile": Tile, "start": Start, "count": Count, "seen": Seen,
}  # fmt: skip


@dataclass(slots=True)
class _Builder:
    """Trees to nodes. `ranks` is the set of rank names of a tile program, None in a cascade, where any bare name is a rank."""

    source: Source
    scalars: frozenset[str] = frozenset()
    ranks: frozenset[str] | None = None
    pieces: dict[str, tuple[str, ...]] = field(default_factory=dict)

    # --- leaves of the tree --------------------------------------------------------------------------------------------------------
    def type_of(self, token: Token | None) -> DType:
        """The element type a token names, f32 if there is none."""
        if token is None:
            return f32
        try:
            return dtype(str(token))
        except KeyError:
            raise self.source.error(token, f"unknown type '{token}'", _nearest(str(token), DTYPES)) from None

    def axes(self, tree: Any) -> tuple[Axis, ...]:
        """The axes in brackets."""
        return tuple(tuple(str(name) for name in axis.children) for axis in tree.children if axis is not None)

    def expr(self, tree: Any, *, size: bool = False) -> Expr:
        """The expression of a tree; with `size` a bare name is an extent."""
        children = tree.children
        match tree.data:
            case "group":
                return self.expr(children[0], size=size)
            case "number":
                return Const(float(children[0]) if children[0].type == "FLOAT" else int(children[0]))
            case "name":
                return self._name(str(children[0]), size)
            case "prefix":
                if children[0] == "-" and _is_number(children[1]):
                    literal = self.expr(children[1])
                    assert isinstance(literal, Const)
                    return Const(-literal.value)
                return Op(_PREFIX[str(children[0])], (self.expr(children[1], size=size),))
            case "binary":
                a, symbol, b = children
                return Op(_BINARY[str(symbol)], (self.expr(a, size=size), self.expr(b, size=size)))
            case "read":
                name, coords, fill = children
                return Read(str(name), tuple(self.expr(c) for c in coords.children) if coords is not None else (), self._fill(fill))
            case _:
                return self._call(tree, size)

    def _name(self, name: str, size: bool) -> Expr:
        if name in _LITERALS:
            return Const(_LITERALS[name])
        if size:
            return Extent(name)
        if name in self.scalars:
            return Scalar(name)
        return Index(name) if self.ranks is None or name in self.ranks else Tile(name)

    def _fill(self, tree: Any) -> Const | None:
        if tree is None:
            return None
        value = self.expr(tree.children[0])
        if not isinstance(value, Const):
            raise self.source.error(tree, "what is read outside of a tensor must be a literal", "X[p-1 else 0.0]")
        return value

    def _call(self, tree: ParseTree, size: bool) -> Expr:
        token, *args = tree.children
        name = str(token)
        if name in _LEAVES:
            self._arity(tree, name, 1)
            return _LEAVES[name](self._bare(args[0], f"{name} takes the name of a {'tile' if name == 'tile' else 'rank'}"))
        if name == "bits":
            self._arity(tree, name, 2)
            self._bare(args[1], "bits takes a value and a type")
            return Bitcast(self.expr(args[0], size=size), self.type_of(args[1].children[0]))
        if name == "masked":
            self._arity(tree, name, 2)
            identity = self.expr(args[1])
            if not isinstance(identity, Const):
                raise self.source.error(args[1], "the identity of masked must be a literal", "masked(x, -inf)")
            return Masked(self.expr(args[0]), identity)
        if name in DTYPES:
            self._arity(tree, name, 1)
            return Cast(self.expr(args[0], size=size), DTYPES[name])
        return self._operation(tree, name, size)

    def _operation(self, tree: ParseTree, name: str, size: bool) -> Expr:
        if name in REDUCTION_WORDS:
            raise self.source.error(
                tree, f"'{name}' inside an expression", ONE_REDUCTION
            )
        info = OPS.get(name)
        if info is None or info.symbol:
            callable_names = [op for op, other in OPS.items() if not other.symbol] + ["extent", "bits", *DTYPES]
            infix = f"write {info.symbol} between or before the operands" if info is not None else None
            hint = infix or _nearest(name, callable_names)
            raise self.source.error(tree, f"unknown function '{name}'", hint)
        self._arity(tree, name, info.arity)
        return Op(name, tuple(self.expr(a, size=size) for a in tree.children[1:]))

    def _arity(self, tree: ParseTree, name: str, wanted: int) -> None:
        found = len(tree.children) - 1
        if found != wanted:
            raise self.source.error(tree, f"{name} takes {wanted} operand{'s' if wanted > 1 else ''}, found {found}")

    def _bare(self, tree: Any, what: str) -> str:
        if tree.data != "name":
            raise self.source.error(tree, what)
        return str(tree.children[0])

    # --- the header ------------------------------------------------------------------------------------------------------------------
    def arguments(self, tree: Any) -> tuple[tuple[Tensor, ...], tuple[ScalarDecl, ...]]:
        """The tensors and the scalars of a header."""
        tensors, scalars = [], []
        for argument in tree.children:
            name, axes, of_type = argument.children
            if axes is None:
                scalars.append(ScalarDecl(str(name), self.type_of(of_type)))
            else:
                tensors.append(Tensor(str(name), self.axes(axes), self.type_of(of_type)))
        self.scalars = frozenset(s.name for s in scalars)
        return tuple(tensors), tuple(scalars)

    def outputs(self, tree: Any) -> list[tuple[Output, Token | None]]:
        """The results of a header with their types."""
        return [(Output(str(r.children[0]), self.axes(r.children[1])), r.children[2]) for r in tree.children]

    def rank_line(self, tree: Any) -> RankDecl:
        """A size, remembered if it is a concatenation."""
        declared = RankDecl(str(tree.children[1]), self.expr(tree.children[2], size=True))
        if isinstance(declared.size, Op) and declared.size.name == "add":
            self.pieces[declared.name] = tuple(part.rank for part in walk(declared.size) if isinstance(part, Extent))
        return declared

    # --- statements ----------------------------------------------------------------------------------------------------------------
    def statement(self, tree: Any) -> Statement:
        """The statement of a tree."""
        children = _without_notes(tree)
        place = self.source.location(tree.meta.line, tree.meta.column)
        match tree.data:
            case "einsum":
                name, ranks = self.left(children[0])
                return Einsum(name, ranks, self.expr(children[1]), where=self._where(children[2]), location=place)
            case "reduction":
                name, ranks = self.left(children[0])
                _, op, over, where, x = children
                return Einsum(name, ranks, self.expr(x), str(op), _strings(over), self._where(where), place)
            case "scan":
                name, ranks = self.left(children[0])
                _, op, over, exclusive, where, x = children
                return Scan(name, ranks, self.expr(x), str(op)[3:], str(over), exclusive is not None, self._where(where), place)
            case "populate":
                return self._populate(tree, children, place)
            case "scatter":
                name, ranks = self.left(children[0])
                _, _, over, targets, where, x = children
                at = tuple((str(t.children[0]), self.expr(t.children[1])) for t in targets.children)
                return Scatter(name, ranks, self.expr(x), _strings(over), at, self._where(where), place)
            case "concat":
                return self._concat(tree, children, place)
            case _:
                return self._iterate(children, place)

    def _populate(self, tree: ParseTree, children: list[Any], place: Location) -> Populate:
        (values, ranks), (coords, other) = self.left(children[0]), self.left(children[1])
        if ranks != other:
            raise self.source.error(tree, f"{values}[{','.join(ranks)}] and {coords}[{','.join(other)}] must have the same ranks")
        rule, over, into, parameter, where, x = children[2:]
        least = None if parameter is None else self.expr(parameter.children[0])
        return Populate(values, coords, ranks, self.expr(x), str(rule), str(over), str(into), least, self._where(where), place)

    def _concat(self, tree: ParseTree, children: list[Any], place: Location) -> Concat:
        name, ranks = self.left(children[0])
        rank, given, parts = str(children[2]), children[3], children[4:]
        pieces = self.pieces.get(rank) if given is None else _strings(given.children[0])
        if pieces is None:
            hint = f"rank {rank} = s + t, with the rank of each part"
            raise self.source.error(tree, f"the pieces of rank '{rank}' are not declared", hint)
        if len(pieces) != len(parts):
            raise self.source.error(tree, f"rank '{rank}' has the pieces {', '.join(pieces)}, found {len(parts)} parts")
        return Concat(name, ranks, rank, tuple((piece, self.expr(x)) for piece, x in zip(pieces, parts, strict=True)), place)

    def _iterate(self, children: list[Any], place: Location) -> Iterate:
        states: list[IterState] = []
        body: list[Statement] = []
        until: Expr | None = None
        for line in children[2:]:
            if line.data == "state":
                if body:
                    raise self.source.error(line, "a state below the statements of its block", "states stand first")
                name, ranks = self.left(line.children[0])
                states.append(IterState(name, ranks, self.expr(line.children[1]), self.expr(line.children[2])))
            elif line.data == "until":
                until = self.expr(line.children[1])
            else:
                body.append(self.statement(line))
        return Iterate(str(children[1]), tuple(states), tuple(body), until, place)

    def grid_rank(self, tree: Any) -> GridRank:
        """A rank of the grid; its tile is 1 unless given."""
        rank, tile = tree.children
        return GridRank(str(rank), 1 if tile is None else int(tile))

    def left(self, tree: Any) -> tuple[str, tuple[str, ...]]:
        """The name and ranks on the left of `=`."""
        return str(tree.children[0]), _strings(tree.children[1])

    def _where(self, tree: Any) -> Expr | None:
        return None if tree is None else self.expr(tree.children[0])

    # --- nodes of tile programs ------------------------------------------------------------------------------------------------------
    def node(self, tree: Any) -> Node:
        """The node of a tree."""
        children = tree.children
        match tree.data:
            case "map":
                typed, x, note = children
                name, ranks = self.left(typed)
                return Map(name, ranks, self.expr(x), self.type_of(typed.children[2]), _note(note))
            case "reduce":
                typed, op, over, x, note = children
                name, ranks = self.left(typed)
                return Reduce(name, ranks, str(op), _strings(over), self.expr(x), self.type_of(typed.children[2]), _note(note))
            case "running":
                typed, op, over, exclusive, x, start, note = children
                name, ranks = self.left(typed)
                first = None if start is None else self.expr(start.children[0])
                of_type = self.type_of(typed.children[2])
                return TileScan(name, ranks, str(op)[3:], str(over), self.expr(x), first, exclusive is not None, of_type, _note(note))
            case "dot":
                typed, _, over, rounded, a, b, update, post, note = children
                if typed.children[2] is not None:
                    raise self.source.error(typed.children[2], "a dot accumulates in f32", "dot(e as bf16) rounds its operands")
                name, ranks = self.left(typed)
                first, last = (None if x is None else self.expr(x.children[0]) for x in (update, post))
                return Dot(name, ranks, _strings(over), self.expr(a), self.expr(b), first, last, self.type_of(rounded), _note(note))
            case "store":
                _, target, x, note = children
                read = self.expr(target)
                assert isinstance(read, Read)
                if read.fill is not None:
                    raise self.source.error(target, "a store has no fill", "points outside an extent are not written")
                return Store(read.tensor, read.coords, self.expr(x), _note(note))
            case _:
                return self._loop(tree)

    def _loop(self, tree: Any) -> Loop:
        _, rank, step, conditions, *lines = _without_notes(tree)
        bounds = Bounds(*(self.expr(b) for b in _trees(lines[0])))
        states = []
        for line in lines[1:]:
            if line.data == "carried":
                typed, init, after = line.children[1:4]
                name, ranks = self.left(typed)
                states.append(LoopState(name, ranks, self.expr(init), self.expr(after), self.type_of(typed.children[2])))
        body = tuple(self.node(line) for line in lines[1:] if line.data != "carried")
        where = () if conditions is None else tuple(self.expr(c) for c in conditions.children)
        return Loop(str(rank), int(step), where, bounds, tuple(states), body)


def _without_notes(tree: Any) -> list[Any]:
    return [c for c in tree.children if not (isinstance(c, Token) and c.type == "NOTE")]


def _is_number(tree: Any) -> bool:
    return tree.data == "number" or (tree.data == "name" and str(tree.children[0]) in ("inf", "nan"))


def _strings(tree: Any) -> tuple[str, ...]:
    return () if tree is None else tuple(str(token) for token in tree.children)


def _trees(tree: Any) -> list[Any]:
    return [c for c in tree.children if isinstance(c, Tree)]


def _note(token: Any) -> str:
    return "" if token is None else str(token).removeprefix("#").strip()


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"'{near[0]}'?" if near else f"one of {', '.join(known)}"


def _program_ranks(tree: ParseTree) -> frozenset[str]:
    """Every name that stands where a rank does."""
    found: set[str] = set()
    for part in tree.iter_subtrees():
        match part.data:
            case "axis" | "names":
                found.update(str(token) for token in part.children)
            case "grid_rank":
                found.add(str(part.children[0]))
            case "loop" | "rank_line":
                found.add(str(part.children[1]))
            case "running":
                found.add(str(part.children[2]))
            case _:
                pass
    for line in tree.find_data("rank_line"):
        found.update(str(name.children[0]) for name in line.find_data("name"))
    return frozenset(found)


def parse_cascade(text: str, file: str = "<text>") -> Cascade:
    """The cascade a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    source = Source.of(text, file)
    tree = source.parse("cascade")
    builder = _Builder(source)
    name, arguments, results, *lines = _without_notes(tree)
    with _naming(str(name)):
        inputs, scalars = builder.arguments(arguments)
        outputs = builder.outputs(results)
        for output, of_type in outputs:
            if of_type is not None:
                raise source.error(of_type, f"the type of {output.name} follows from its statement", "cast in the statement: bf16(x)")
        ranks = tuple(builder.rank_line(line) for line in _of(lines, "rank_line"))
        body = tuple(builder.statement(line) for line in lines if line.data != "rank_line")
    return Cascade(str(name), inputs, scalars, ranks, body, tuple(output for output, _ in outputs))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors on the way from the tree to nodes name the cascade; Python's limit on nesting becomes one of them."""
    try:
        yield
    except RecursionError:
        raise CascadeError("an expression is nested too deeply", cascade=name, hint="name parts of it in statements") from None
    except CascadeError as error:
        raise CascadeError(error.what, cascade=name, location=error.location, hint=error.hint) from None


def _of(lines: list[Any], data: str) -> list[Any]:
    return [line for line in lines if line.data == data]


def parse_program(text: str, file: str = "<text>") -> TileProgram:
    """The tile program a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    source = Source.of(text, file)
    tree = source.parse("kernel")
    builder = _Builder(source, ranks=_program_ranks(tree))
    name, arguments, results, *lines = _without_notes(tree)
    with _naming(str(name)):
        inputs, scalars = builder.arguments(arguments)
        outputs = tuple(TileOutput(output, builder.type_of(of_type)) for output, of_type in builder.outputs(results))
        ranks = tuple(builder.rank_line(line) for line in _of(lines, "rank_line"))
        grid = tuple(builder.grid_rank(axis) for line in _of(lines, "grid") for axis in _trees(line))
        resident = tuple(rank for line in _of(lines, "resident") for rank in _strings(line.children[1]))
        body = tuple(builder.node(line) for line in lines if line.data not in ("rank_line", "grid", "resident"))
    return TileProgram(str(name), inputs, outputs, scalars, ranks, grid, resident, body)
