"""Both levels as text, without loss: `parse_cascade(print_cascade(c)) == c`, and likewise for tile programs. See `ir/README.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cascade import (
    Axis,
    Cascade,
    Concat,
    Einsum,
    Iterate,
    Output,
    Populate,
    RankDecl,
    ScalarDecl,
    Scan,
    Scatter,
    Statement,
    Tensor,
    defined,
)  # fmt: skip
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
from .tile import Dot, Loop, Map, Node, Reduce, Store, TileProgram
from .tile import Scan as TileScan
from .types import DType, f32

_UNARY, _POWER, _ATOM = 8, 9, 10
_COMPARE = 4


@dataclass(frozen=True, slots=True)
class _Style:
    """What decides how a leaf reads. `ranks` are the names that a bare name means the index of; None if any may be.

    Args:
        ranks: in a tile program, every rank of it: a tile of such a name is spelled out, and so is the index of any other rank.
        sizes: whether a bare name is the extent of a rank, as in a `rank` line.
        tight: whether infix operators stand without spaces, as in a coordinate.
    """

    ranks: frozenset[str] | None = None
    tiles: bool = True
    sizes: bool = False
    tight: bool = False


_PLAIN = _Style()
_CASCADE = _Style(tiles=False)
_SIZE = _Style(sizes=True)


def print_expr(e: Expr) -> str:
    """An expression with as few brackets as it needs."""
    return _expr(e, _PLAIN)


def print_size(e: Expr) -> str:
    """A rank's size as in a `rank` line: a bare name is an extent."""
    return _expr(e, _SIZE)


def _expr(e: Expr, style: _Style, level: int = 0) -> str:
    text, precedence = _spell(e, style)
    return f"({text})" if precedence < level else text


def _spell(e: Expr, style: _Style) -> tuple[str, int]:
    """The text of `e` and how tightly it binds."""
    match e:
        case Const():
            text = print_const(e)
            return text, _UNARY if text.startswith("-") else _ATOM
        case Index(rank=name):
            known = not style.sizes and (style.ranks is None or name in style.ranks)
            return (name if known else f"index({name})"), _ATOM
        case Extent(rank=name):
            return (name if style.sizes else f"extent({name})"), _ATOM
        case Scalar(name=name):
            return name, _ATOM
        case Tile(name=name):
            known = style.tiles and (style.ranks is None or name not in style.ranks)
            return (name if known else f"tile({name})"), _ATOM
        case Start(rank=name) | Count(rank=name) | Seen(rank=name):
            return f"{type(e).__name__.lower()}({name})", _ATOM
        case Read(tensor=tensor, coords=coords, fill=fill):
            inner = _Style(style.ranks, style.tiles, style.sizes, tight=True)
            tail = "" if fill is None else f" else {print_const(fill)}"
            return f"{tensor}[{','.join(_expr(c, inner) for c in coords)}{tail}]", _ATOM
        case Cast(x=x, dtype=dtype):
            return f"{dtype}({_expr(x, style)})", _ATOM
        case Bitcast(x=x, dtype=dtype):
            return f"bits({_expr(x, style)}, {dtype})", _ATOM
        case Masked(x=x, identity=identity):
            return f"masked({_expr(x, style)}, {print_const(identity)})", _ATOM
        case Op(name=name, args=args):
            return _spell_op(name, args, style)


def _spell_op(name: str, args: tuple[Expr, ...], style: _Style) -> tuple[str, int]:
    info = OPS[name]
    if not info.symbol:
        return f"{name}({', '.join(_expr(a, style) for a in args)})", _ATOM
    level = info.precedence
    if len(args) == 1:
        inner = _expr(args[0], style, _UNARY)
        if name == "neg" and isinstance(args[0], Const) and inner[0] != "-" and not isinstance(args[0].value, bool):
            inner = f"({inner})"  # -(2) negates, -2 is a literal
        return info.symbol + inner, level
    a, b = args
    if level == _POWER:
        left, right = _expr(a, style, _ATOM), _expr(b, style, _UNARY)
    elif level == _COMPARE:
        left, right = _expr(a, style, level + 1), _expr(b, style, level + 1)
    else:
        left, right = _expr(a, style, level), _expr(b, style, level + 1)
    space = "" if style.tight or level == _POWER else " "
    return f"{left}{space}{info.symbol}{space}{right}", level


def print_const(c: Const) -> str:
    """A literal: `2`, `2.0`, `true`, `-inf`."""
    return str(c.value).lower() if isinstance(c.value, bool) else repr(c.value)


def _axes(axes: Iterable[Axis]) -> str:
    return ",".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def _left(name: str, ranks: Sequence[str]) -> str:
    return f"{name}[{','.join(ranks)}]"


def _header(keyword: str, name: str, inputs: Iterable[Tensor], scalars: Iterable[ScalarDecl], outputs: Iterable[str]) -> str:
    arguments = [f"{t.name}[{_axes(t.axes)}]: {t.dtype}" for t in inputs] + [f"{s.name}: {s.dtype}" for s in scalars]
    return f"{keyword} {name}({', '.join(arguments)}) -> {', '.join(outputs)}"


def _output(output: Output) -> str:
    return f"{output.name}[{_axes(output.axes)}]"


def _rank_lines(ranks: Iterable[RankDecl]) -> list[str]:
    return [f"  rank {d.name} = {_expr(d.size, _SIZE)}" for d in ranks]


def print_cascade(c: Cascade) -> str:
    """The text of a cascade, one statement a line, `=` aligned; ends in a line break."""
    lines = [_header("cascade", c.name, c.inputs, c.scalars, map(_output, c.outputs)), *_rank_lines(c.ranks)]
    return "\n".join(lines + _block(c.body, "  ", _pieces(c))) + "\n"


def print_statement(s: Statement) -> str:
    """A statement as it stands in a cascade, without its indentation."""
    return "\n".join(_block((s,), "", None, _PLAIN))


def _pieces(c: Cascade) -> dict[str, tuple[str, ...]]:
    """The pieces of every concatenated rank, as its declaration names them."""
    return {d.name: c.components(d.name) for d in c.ranks if c.is_concatenated(d.name) and c.size_of(d.name) == d.size}


def _block(
    body: Sequence[Statement], indent: str, pieces: dict[str, tuple[str, ...]] | None, style: _Style = _CASCADE
) -> list[str]:
    rows = [(s, ", ".join(_left(name, ranks) for name, ranks in defined(s))) for s in body if not isinstance(s, Iterate)]
    width = max((len(left) for _, left in rows), default=0)
    lines = []
    for s in body:
        if isinstance(s, Iterate):
            lines += _iterate(s, indent, pieces, style)
        else:
            left = ", ".join(_left(name, ranks) for name, ranks in defined(s))
            lines.append(f"{indent}{left:<{width}} = {_right(s, pieces, style)}")
    return lines


def _iterate(s: Iterate, indent: str, pieces: dict[str, tuple[str, ...]] | None, style: _Style) -> list[str]:
    inner = indent + "  "
    width = max((len(_left(state.name, state.ranks)) for state in s.states), default=0)
    lines = [f"{indent}iterate {s.rank}"]
    for state in s.states:
        left = _left(state.name, state.ranks)
        lines.append(f"{inner}{left:<{width}} = {_expr(state.init, style)} then {_expr(state.next, style)}")
    lines += _block(s.body, inner, pieces, style)
    if s.until is not None:
        lines.append(f"{inner}until {_expr(s.until, style)}")
    return lines


def _right(s: Statement, pieces: dict[str, tuple[str, ...]] | None, style: _Style) -> str:
    match s:
        case Einsum(op=None, expr=expr, where=where):
            return _expr(expr, style) + _where(where, style)
        case Einsum(op=str(op), over=over, expr=expr, where=where):
            return f"{op}({','.join(over)}{_where(where, style)}) {_expr(expr, style)}"
        case Scan(op=op, over=rank, exclusive=exclusive, expr=expr, where=where):
            return f"cum{op}({rank}{', exclusive' if exclusive else ''}{_where(where, style)}) {_expr(expr, style)}"
        case Populate(rule=rule, over=rank, into=into, parameter=parameter, expr=expr, where=where):
            tail = "" if parameter is None else f", {_expr(parameter, style)}"
            return f"{rule}({rank} -> {into}{tail}{_where(where, style)}) {_expr(expr, style)}"
        case Scatter(over=over, at=at, expr=expr, where=where):
            to = ", ".join(f"{rank} = {_expr(coordinate, style)}" for rank, coordinate in at)
            return f"scatter({','.join(over)} at {to}{_where(where, style)}) {_expr(expr, style)}"
        case Concat(rank=rank, parts=parts):
            names = tuple(piece for piece, _ in parts)
            long = f": {', '.join(names)}" if pieces is not None and pieces.get(rank) != names else ""
            return f"concat({rank}{long}) {'; '.join(_expr(part, style) for _, part in parts)}"
        case _:
            raise AssertionError(f"{type(s).__name__} is a block")


def _where(where: Expr | None, style: _Style) -> str:
    return "" if where is None else f" where {_expr(where, style)}"


# --- tile programs ---------------------------------------------------------------------------------------------------------------


def program_ranks(p: TileProgram) -> frozenset[str]:
    """Every name that is a rank somewhere in the program."""
    found = {rank for t in p.inputs for rank in t.ranks} | {rank for out in p.outputs for rank in out.ranks}
    found |= {axis.rank for axis in p.grid} | set(p.resident)
    for declaration in p.ranks:
        found |= {declaration.name} | {node.rank for node in walk(declaration.size) if isinstance(node, Extent)}

    def visit(nodes: tuple[Node, ...]) -> None:
        for node in nodes:
            match node:
                case Map(ranks=ranks):
                    found.update(ranks)
                case TileScan(ranks=ranks, over=rank):
                    found.update(ranks, (rank,))
                case Reduce(ranks=ranks, over=over) | Dot(ranks=ranks, over=over):
                    found.update(ranks, over)
                case Loop(rank=rank, states=states, body=body):
                    found.add(rank)
                    found.update(rank for state in states for rank in state.ranks)
                    visit(body)
                case Store():
                    pass

    visit(p.body)
    return frozenset(found)


def print_program(p: TileProgram) -> str:
    """The text of a tile program; a node's note follows it as a comment."""
    style = _Style(ranks=program_ranks(p))
    outputs = (f"{_output(out.output)}: {out.dtype}" for out in p.outputs)
    lines = [_header("kernel", p.name, p.inputs, p.scalars, outputs), *_rank_lines(p.ranks)]
    if p.grid:
        lines.append("  grid " + ", ".join(a.rank if a.tile == 1 else f"{a.rank}/{a.tile}" for a in p.grid))
    if p.resident:
        lines.append("  resident " + ", ".join(p.resident))
    return "\n".join(lines + _nodes(p.body, "  ", style)) + "\n"


def print_node(node: Node, ranks: frozenset[str]) -> str:
    """One line of a tile program that is no loop; `ranks` are those of the program."""
    style = _Style(ranks=ranks)
    return f"{_node_left(node, style)} = {_node_right(node, style)}"


def _nodes(nodes: Sequence[Node], indent: str, style: _Style) -> list[str]:
    width = max((len(_node_left(n, style)) for n in nodes if not isinstance(n, Loop)), default=0)
    lines = []
    for node in nodes:
        if isinstance(node, Loop):
            lines += _loop(node, indent, style)
        else:
            note = f"  # {node.note}" if node.note else ""
            lines.append(f"{indent}{_node_left(node, style):<{width}} = {_node_right(node, style)}{note}")
    return lines


def _typed(name: str, ranks: Sequence[str], dtype: DType) -> str:
    return _left(name, ranks) + ("" if dtype == f32 else f": {dtype}")


def _node_left(node: Node, style: _Style) -> str:
    match node:
        case Map() | Reduce() | TileScan():
            return _typed(node.dst, node.ranks, node.dtype)
        case Dot(dst=dst, ranks=ranks):
            return _left(dst, ranks)
        case Store(tensor=tensor, coords=coords):
            return "store " + _expr(Read(tensor, coords), style)
        case Loop():
            raise AssertionError("a loop has no left side")


def _node_right(node: Node, style: _Style) -> str:
    match node:
        case Map(expr=expr) | Store(expr=expr):
            return _expr(expr, style)
        case Reduce(op=op, over=over, expr=expr):
            return f"{op}({','.join(over)}) {_expr(expr, style)}"
        case TileScan(op=op, over=rank, expr=expr, start=start, exclusive=exclusive):
            text = f"cum{op}({rank}{', exclusive' if exclusive else ''}) {_expr(expr, style)}"
            return text + ("" if start is None else f" from {_expr(start, style)}")
        case Dot(over=over, a=a, b=b, update=update, post=post, dtype=dtype):
            rounded = "" if dtype == f32 else f" as {dtype}"
            text = f"dot({','.join(over)}{rounded}) {_expr(a, style)}, {_expr(b, style)}"
            if update is not None:
                text += f" update {_expr(update, style)}"
            return text + ("" if post is None else f" post {_expr(post, style)}")
        case Loop():
            raise AssertionError("a loop has no right side")


def _loop(loop: Loop, indent: str, style: _Style) -> list[str]:
    inner = indent + "  "
    where = f" where {', '.join(_expr(c, style) for c in loop.conditions)}" if loop.conditions else ""
    bounds = (loop.bounds.begin, loop.bounds.whole_begin, loop.bounds.whole_end, loop.bounds.end)
    lines = [f"{indent}for {loop.rank} step {loop.tile}{where}", f"{inner}bounds {', '.join(_expr(b, style) for b in bounds)}"]
    width = max((len(_typed(s.name, s.ranks, s.dtype)) for s in loop.states), default=0)
    for s in loop.states:
        lines.append(f"{inner}state {_typed(s.name, s.ranks, s.dtype):<{width}} = {_expr(s.init, style)} then {_expr(s.next, style)}")
    return lines + _nodes(loop.body, inner, style)


def parse_cascade(text: str, file: str = "<text>") -> Cascade:
    """The cascade a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    from .parse import parse_cascade as parse

    return parse(text, file)


def parse_program(text: str, file: str = "<text>") -> TileProgram:
    """The tile program a text describes. Raises `CascadeError` with the place, what was expected and a hint."""
    from .parse import parse_program as parse

    return parse(text, file)
