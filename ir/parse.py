"""Text to cascades and tile programs: Lark's LALR parser for the grammar in `cascade.lark`, and what its trees mean.

This module loads Lark, so it is itself loaded only when a text is parsed.
"""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

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
from .tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Node, Reduce, Store, TileOutput, TileProgram
from .types import DTYPES, DType, dtype, f32

_Tree: TypeAlias = "Tree[Token]"
_BINARY = {info.symbol: name for name, info in OPS.items() if info.symbol and info.arity == 2}
_PREFIX = {info.symbol: name for name, info in OPS.items() if info.symbol and info.arity == 1}
_LITERALS = {"inf": math.inf, "nan": math.nan, "true": True, "false": False}
_LEAVES: dict[str, Callable[[str], Expr]] = {
    "index": Index, "extent": Extent, "tile": Tile, "start": Start, "count": Count, "seen": Seen,
}  # fmt: skip
_REDUCTION_WORDS = ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin")
_OPERAND = frozenset({"NAME", "INT", "FLOAT", "LPAR", "MINUS", "NOT"})
_OPERATOR = frozenset({"OR", "XOR", "AND", "COMPARE", "SHIFT", "ADD", "MUL", "POW"})
_WORDS = {
    "NAME": "a name", "INT": "a whole number", "FLOAT": "a number", "NOTE": "", "$END": "the end of the text",
    "_NL": "the end of the line", "_INDENT": "an indented line", "_DEDENT": "the end of the block",
    "REDUCE": "a reduction", "SCAN": "a scan", "POPULATE": "topk, sort, threshold or mass", "SCATTER": "scatter", "CONCAT": "concat",
    "DOT": "dot", "RANK": "`rank`", "ITERATE": "`iterate`", "UNTIL": "`until`", "GRID": "`grid`", "RESIDENT": "`resident`",
    "STORE": "`store`", "STATE": "`state`", "FOR": "`for`",
}  # fmt: skip


@cache
def _parser() -> Lark:
    grammar = Path(__file__).with_name("cascade.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start=["cascade", "kernel"], postlex=_Lines(), propagate_positions=True, maybe_placeholders=True)


class _Lines:
    """Turns line breaks into blocks by their indentation; within brackets there are no lines and no notes."""

    always_accept = ("_NL", "NOTE")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens with `_INDENT` and `_DEDENT` put in."""
        brackets, levels = 0, [0]
        for token in stream:
            if token.type in ("LPAR", "LSQB"):
                brackets += 1
            elif token.type in ("RPAR", "RSQB"):
                brackets -= 1
            if token.type not in ("_NL", "NOTE"):
                yield token
            elif brackets > 0:
                continue
            elif token.type == "NOTE":
                yield token
            else:
                yield token
                yield from self._indentation(token, levels)
        for _ in levels[1:]:
            yield Token("_DEDENT", "")

    @staticmethod
    def _indentation(token: Token, levels: list[int]) -> Iterator[Token]:
        width = len(token.rsplit("\n", 1)[1].expandtabs(8))
        if width > levels[-1]:
            levels.append(width)
            yield Token.new_borrow_pos("_INDENT", "", token)
        while width < levels[-1]:
            levels.pop()
            yield Token.new_borrow_pos("_DEDENT", "", token)
        if width != levels[-1]:
            raise _BadIndent(token.end_line or 0, width)


class _BadIndent(Exception):
    """A line stands between the indentations of the blocks above it."""

    def __init__(self, line: int, width: int) -> None:
        super().__init__(line, width)
        self.line, self.width = line, width


@dataclass(frozen=True, slots=True)
class _Source:
    """A text, where it is from, and how much was cut from the left of each of its lines and put before the first."""

    text: str
    file: str
    margin: int

    @staticmethod
    def of(text: str, file: str) -> _Source:
        dedented = textwrap.dedent(text.expandtabs(8))
        first = next((line for line in text.expandtabs(8).splitlines() if line.strip()), "")
        margin = len(first) - len(next((line for line in dedented.splitlines() if line.strip()), ""))
        return _Source(dedented, file, margin)

    def parse(self, start: str) -> _Tree:
        """The tree of the whole text. Raises `CascadeError` at the first place that does not fit the grammar."""
        try:
            return _parser().parse("\n" + self.text + "\n", start=start)
        except UnexpectedInput as error:
            raise self._unexpected(error) from None
        except _BadIndent as error:
            location = self.location(error.line, error.width + 1)
            raise CascadeError("this line belongs to no block above it", location=location, hint="indent it like its neighbours") from None

    def location(self, line: int, column: int) -> Location:
        """The place of a token, which the parser counts in the dedented text with an empty line before it."""
        lines = self.text.splitlines()
        number = min(max(line - 1, 1), max(len(lines), 1))
        text = " " * self.margin + lines[number - 1] if lines else ""
        at = column + self.margin if number == line - 1 else len(text) + 1
        return Location(self.file, number, at, text)

    def error(self, at: _Tree | Token, what: str, hint: str | None = None) -> CascadeError:
        """An error at a tree or token."""
        place = at if isinstance(at, Token) else at.meta
        return CascadeError(what, location=self.location(getattr(place, "line", 1) or 1, getattr(place, "column", 1) or 1), hint=hint)

    def _unexpected(self, error: UnexpectedInput) -> CascadeError:
        location = self.location(error.line, error.column)
        if isinstance(error, UnexpectedCharacters):
            found, expected = repr(error.char), error.allowed or set()
        elif isinstance(error, UnexpectedToken):
            layout = error.token.type in ("_NL", "$END", "_INDENT", "_DEDENT")
            found = _WORDS[error.token.type] if layout else repr(str(error.token))
            expected = error.accepts or error.expected
        else:
            found, expected = "the end of the text", set()
        return CascadeError(f"unexpected {found}, expected {_listed(expected)}", location=location, hint=_hint(found, expected))


def _listed(expected: set[str]) -> str:
    """What the grammar would accept, in words."""
    words: list[str] = []
    rest = set(expected)
    if rest >= _OPERAND:
        words.append("an expression")
        rest -= _OPERAND
    if len(_OPERATOR & rest) > 3:
        words.append("an operator")
        rest -= _OPERATOR
    patterns = {t.name: t.pattern for t in _parser().terminals}
    for name in sorted(rest):
        word = _WORDS.get(name)
        if word is None:
            word = f"'{patterns[name].value}'" if name in patterns and patterns[name].type == "str" else name.lower()
        if word:
            words.append(word)
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1] if words else "nothing more"


def _hint(found: str, expected: set[str]) -> str:
    if "CASCADE" in expected or "KERNEL" in expected:
        return "a text begins with its header: cascade name(X[b,m]: f32) -> Y[b]"
    if found == "'='":
        return "== compares; a statement is one line: S[b,m] = sum(e) Q[b,m,e]"
    if found in ("'<'", "'>'", "'<='", "'>='", "'=='", "'!='"):
        return "comparisons do not chain: (a < b) & (b < c)"
    if "_INDENT" in expected:
        return "what belongs to the block is indented below it"
    return "a statement reads S[b,m] = sum(e) Q[b,m,e] * K[b,e]; the grammar is in ir/README.md"


@dataclass(slots=True)
class _Builder:
    """Trees to nodes. `ranks` is the set of rank names of a tile program, None in a cascade, where any bare name is a rank."""

    source: _Source
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

    def _call(self, tree: _Tree, size: bool) -> Expr:
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

    def _operation(self, tree: _Tree, name: str, size: bool) -> Expr:
        if name in _REDUCTION_WORDS:
            raise self.source.error(
                tree, f"'{name}' inside an expression", "a reduction binds the rest of its line: give it a statement of its own"
            )
        info = OPS.get(name)
        if info is None or info.symbol:
            callable_names = [op for op, other in OPS.items() if not other.symbol] + ["extent", "bits", *DTYPES]
            infix = f"write {info.symbol} between or before the operands" if info is not None else None
            hint = infix or _nearest(name, callable_names)
            raise self.source.error(tree, f"unknown function '{name}'", hint)
        self._arity(tree, name, info.arity)
        return Op(name, tuple(self.expr(a, size=size) for a in tree.children[1:]))

    def _arity(self, tree: _Tree, name: str, wanted: int) -> None:
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

    def _populate(self, tree: _Tree, children: list[Any], place: Location) -> Populate:
        (values, ranks), (coords, other) = self.left(children[0]), self.left(children[1])
        if ranks != other:
            raise self.source.error(tree, f"{values}[{','.join(ranks)}] and {coords}[{','.join(other)}] must have the same ranks")
        rule, over, into, parameter, where, x = children[2:]
        least = None if parameter is None else self.expr(parameter.children[0])
        return Populate(values, coords, ranks, self.expr(x), str(rule), str(over), str(into), least, self._where(where), place)

    def _concat(self, tree: _Tree, children: list[Any], place: Location) -> Concat:
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


def _program_ranks(tree: _Tree) -> frozenset[str]:
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
            case _:
                pass
    for line in tree.find_data("rank_line"):
        found.update(str(name.children[0]) for name in line.find_data("name"))
    return frozenset(found)


def parse_cascade(text: str, file: str = "<text>") -> Cascade:
    """The cascade a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    source = _Source.of(text, file)
    tree = source.parse("cascade")
    builder = _Builder(source)
    name, arguments, results, *lines = _without_notes(tree)
    try:
        inputs, scalars = builder.arguments(arguments)
        outputs = builder.outputs(results)
        for output, of_type in outputs:
            if of_type is not None:
                raise source.error(of_type, f"the type of {output.name} follows from its statement", "cast in the statement: bf16(x)")
        ranks = tuple(builder.rank_line(line) for line in _where_data(lines, "rank_line"))
        body = tuple(builder.statement(line) for line in lines if line not in _where_data(lines, "rank_line"))
    except RecursionError:
        raise CascadeError("an expression is nested too deeply", cascade=str(name), hint="name parts of it in statements") from None
    except CascadeError as error:
        raise CascadeError(error.what, cascade=str(name), location=error.location, hint=error.hint) from None
    return Cascade(str(name), inputs, scalars, ranks, body, tuple(output for output, _ in outputs))


def _where_data(lines: list[Any], data: str) -> list[Any]:
    return [line for line in lines if line.data == data]


def parse_program(text: str, file: str = "<text>") -> TileProgram:
    """The tile program a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    source = _Source.of(text, file)
    tree = source.parse("kernel")
    builder = _Builder(source, ranks=_program_ranks(tree))
    name, arguments, results, *lines = _without_notes(tree)
    inputs, scalars = builder.arguments(arguments)
    outputs = tuple(TileOutput(output, builder.type_of(of_type)) for output, of_type in builder.outputs(results))
    ranks = tuple(builder.rank_line(line) for line in _where_data(lines, "rank_line"))
    grid = tuple(
        GridRank(str(axis.children[0]), 1 if axis.children[1] is None else int(axis.children[1]))
        for line in _where_data(lines, "grid")
        for axis in _trees(line)
    )
    resident = tuple(rank for line in _where_data(lines, "resident") for rank in _strings(line.children[1]))
    body = tuple(builder.node(line) for line in lines if line.data not in ("rank_line", "grid", "resident"))
    return TileProgram(str(name), inputs, outputs, scalars, ranks, grid, resident, body)


