"""The rules for cascades, one function each, which finds what breaks it; `check.py` has the table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement, defined
from .errors import CascadeError
from .expr import (
    OPS,
    REDUCTIONS,
    SCANS,
    Bitcast,
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
    reads,
    walk,
)  # fmt: skip
from .infer import declared_types, expression_ranks, expression_type
from .types import DType, boolean

RULES = ("topk", "sort", "threshold", "mass")
RESERVED = frozenset({"inf", "nan", "true", "false", "else"})  # literals, and what ends the coordinates of a read
_NAMES = f"letters, digits and underscores, and none of {', '.join(sorted(RESERVED))}"
_SIZE_OPS = ("add", "sub", "mul", "floordiv", "mod", "minimum", "maximum")


@dataclass(frozen=True, slots=True)
class Fault:
    """A breach of a rule, with the statement it is in and what to try."""

    what: str
    statement: Statement | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A statement with what it may read: tensors by name with their ranks, and the ranks whose index is the step of a block.

    `after` are the tensors that the next values of a block's states may read, its own body's included.
    """

    statement: Statement
    tensors: Mapping[str, tuple[str, ...]]
    steps: frozenset[str]
    after: Mapping[str, tuple[str, ...]]


def sites(c: Cascade) -> Iterator[Site]:
    """Every statement in order, those of iterate blocks after the block itself."""

    def visit(body: Iterable[Statement], visible: dict[str, tuple[str, ...]], steps: frozenset[str]) -> Iterator[Site]:
        for s in body:
            if isinstance(s, Iterate):
                inner = {**visible, **dict(defined(s))}
                inside = list(visit(s.body, inner, steps | {s.rank}))
                yield Site(s, dict(visible), steps, inner)
                yield from inside
            else:
                yield Site(s, dict(visible), steps, visible)
            visible.update(defined(s))

    yield from visit(c.body, {t.name: t.ranks for t in c.inputs}, frozenset())


def uses(site: Site) -> Iterator[tuple[Expr, Mapping[str, tuple[str, ...]], frozenset[str]]]:
    """The statement's own expressions, each with the tensors it may read and the ranks that are steps there."""
    s = site.statement
    if isinstance(s, Iterate):
        inner = site.steps | {s.rank}
        states = {**site.tensors, **dict(defined(s))}
        for state in s.states:
            yield state.init, site.tensors, site.steps
            yield state.next, site.after, inner
        if s.until is not None:
            yield s.until, states, inner
        return
    parts: list[Expr | None] = []
    match s:
        case Concat(parts=pieces):
            parts += [x for _, x in pieces]
        case Scatter(expr=x, at=at, where=where):
            parts += [x, *(coordinate for _, coordinate in at), where]
        case Populate(expr=x, parameter=parameter, where=where):
            parts += [x, parameter, where]
        case Einsum(expr=x, where=where) | Scan(expr=x, where=where):
            parts += [x, where]
    for part in parts:
        if part is not None:
            yield part, site.tensors, site.steps


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A did-you-mean, or the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 1, 0.6)
    if close:
        return f"{close[0]!r}?"
    return f"one of {', '.join(names)}" if names else None


def operation_hint(name: str) -> str | None:
    """What to write instead of an operation that is none, or that has other operands."""
    return f"{name} takes {OPS[name].arity}" if name in OPS else nearest(name, OPS)


def space(s: Einsum | Scan | Populate | Scatter, steps: frozenset[str]) -> tuple[str, ...]:
    """The iteration space of a statement: the ranks that its expression, condition and coordinates index."""
    parts = [s.expr, *([s.where] if s.where is not None else []), *((x for _, x in s.at) if isinstance(s, Scatter) else ())]
    if isinstance(s, Populate) and s.parameter is not None:
        parts.append(s.parameter)
    return tuple(rank for rank in dict.fromkeys(r for part in parts for r in expression_ranks(part)) if rank not in steps)


# --- names and sizes -------------------------------------------------------------------------------------------------------------


def check_names(c: Cascade) -> Iterator[Fault]:
    """Names are plain, every tensor and scalar is defined once, and a bare name in an expression means one thing."""
    if not c.name.isidentifier():
        yield Fault(f"{c.name!r} is no name for a cascade", hint="a plain name such as scores")
    seen: dict[str, str] = {}
    named = [(t.name, "an input", None) for t in c.inputs] + [(s.name, "a scalar", None) for s in c.scalars]
    statements = [(name, "a tensor", site.statement) for site in sites(c) for name, _ in defined(site.statement)]
    for name, what, statement in [*named, *statements]:
        if not name.isidentifier() or name in RESERVED:
            yield Fault(f"{name!r} is no name for {what}", statement, _NAMES)
        if name in seen:
            yield Fault(f"{name!r} is {seen[name]} already, and defined again as {what}", statement, "every tensor has a name of its own")
        seen[name] = what
    scalars = {s.name for s in c.scalars}
    for rank in c.all_ranks():
        if not rank.isidentifier() or rank in RESERVED:
            yield Fault(f"{rank!r} is no name for a rank", hint=_NAMES)
        if rank in scalars:
            yield Fault(f"{rank!r} is a rank and a scalar", hint="a bare name must mean one of them: rename the scalar")


def check_axes(c: Cascade) -> Iterator[Fault]:
    """No tensor has a rank twice, and every axis has a rank."""
    for what, name, axes in [("input", t.name, t.axes) for t in c.inputs] + [("output", o.name, o.axes) for o in c.outputs]:
        ranks = [rank for axis in axes for rank in axis]
        yield from (Fault(f"{what} {name} has the rank {rank!r} twice") for rank in dict.fromkeys(ranks) if ranks.count(rank) > 1)
        if not all(axes):
            yield Fault(f"{what} {name} has an axis without a rank", hint="an axis of one element is left out")
    for site in sites(c):
        for name, result in defined(site.statement):
            for rank in dict.fromkeys(result):
                if result.count(rank) > 1:
                    yield Fault(f"{name} has the rank {rank!r} twice", site.statement)


def check_sizes(c: Cascade) -> Iterator[Fault]:
    """A size is made of whole numbers and extents, each rank has at most one, and every rank gets its extent from somewhere."""
    declared: set[str] = set()
    for d in c.ranks:
        if d.name in declared:
            yield Fault(f"rank {d.name!r} is declared twice", hint="one `rank` line each")
        declared.add(d.name)
        for node in walk(d.size):
            whole = isinstance(node, Const) and type(node.value) is int
            if not (whole or isinstance(node, Extent) or (isinstance(node, Op) and node.name in _SIZE_OPS)):
                yield Fault(f"the size of rank {d.name!r} is no size", hint="whole numbers and ranks: 64, n * j, s + t, p // 4")
        if isinstance(d.size, Const) and d.size.value < 1:
            yield Fault(f"rank {d.name!r} has size {d.size.value}", hint="at least 1")
    known = _sized(c)
    mentions: list[tuple[str, Statement | None]] = []
    for site in sites(c):
        for e, _, _ in uses(site):
            mentions += [(node.rank, site.statement) for node in walk(e) if isinstance(node, (Index, Extent))]
        mentions += [(rank, site.statement) for _, ranks in defined(site.statement) for rank in ranks]
        if isinstance(site.statement, Iterate):
            mentions.append((site.statement.rank, site.statement))
    mentions += [(rank, None) for rank in c.all_ranks()]
    for rank, statement in mentions:
        if rank not in known:
            yield Fault(f"nothing gives rank {rank!r} an extent", statement, _size_hint(rank, known))


def _size_hint(rank: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(rank, list(known), 1, 0.6)
    return (f"{near[0]!r}? " if near else "") + f"an input with the rank, or its size: rank {rank} = 64"


def _sized(c: Cascade) -> set[str]:
    """The ranks whose extents follow from the inputs, the declarations and the statements that make ranks."""
    known = {rank for t in c.inputs for rank in t.ranks}
    tensors = c.tensor_ranks()
    before = -1
    while len(known) > before:
        before = len(known)
        for d in c.ranks:
            parts = {node.rank for node in walk(d.size) if isinstance(node, Extent)}
            unknown = parts - known
            if not unknown:
                known.add(d.name)
            elif d.name in known and len(unknown) == 1 and isinstance(d.size, Op) and d.size.name in ("mul", "add"):
                known |= unknown
        for site in sites(c):
            match site.statement:
                case Populate(over=over, into=into, rule=rule) if rule == "topk" or over in known:
                    known.add(into)
                case Concat(rank=rank, parts=parts_) if all(piece in known for piece, _ in parts_):
                    known.add(rank)
                case _:
                    pass
            for e, _, _ in uses(site):
                for read in reads(e):
                    known |= _renamed(read, tensors.get(read.tensor, ()), known)
    return known


def _renamed(read: Read, ranks: tuple[str, ...], known: set[str]) -> set[str]:
    """Ranks that only rename one of a tensor's whose extent is known."""
    if len(read.coords) != len(ranks):
        return set()
    return {x.rank for x, rank in zip(read.coords, ranks, strict=True) if isinstance(x, Index) and rank in known}


# --- what expressions read -------------------------------------------------------------------------------------------------------


def check_reads(c: Cascade) -> Iterator[Fault]:
    """A tensor is read after it is defined, with a coordinate for each of its ranks; scalars are declared."""
    later = {name for site in sites(c) for name, _ in defined(site.statement)}
    scalars = {s.name for s in c.scalars}
    for site in sites(c):
        for e, tensors, _ in uses(site):
            for node in walk(e):
                match node:
                    case Scalar(name=name) if name not in scalars:
                        yield Fault(f"unknown scalar {name!r}", site.statement, nearest(name, scalars))
                    case Tile() | Masked() | Start() | Count() | Seen():
                        yield Fault(f"{type(node).__name__.lower()} belongs to tile programs only", site.statement)
                    case Read(tensor=name) if name not in tensors:
                        what = "is read before it is defined, or outside of its block" if name in later else "is no tensor"
                        yield Fault(f"{name!r} {what}", site.statement, nearest(name, tensors))
                    case Read(tensor=name, coords=coords) if len(coords) != len(tensors[name]):
                        ranks = ",".join(tensors[name])
                        yield Fault(f"{name}[{ranks}] is read with {len(coords)} coordinates", site.statement, f"{name}[{ranks}]")
                    case Op(name=name, args=args) if name not in OPS or len(args) != OPS[name].arity:
                        yield Fault(f"no operation {name!r} of {len(args)} operands", site.statement, operation_hint(name))
                    case _:
                        pass


# --- ranks of statements -----------------------------------------------------------------------------------------------------------


def check_ranks(c: Cascade) -> Iterator[Fault]:
    """A rank of the iteration space is in the result or goes away by the statement's operation; the other way round, so do the rest."""
    for site in sites(c):
        s = site.statement
        for fault in _rank_faults(s, site.steps):
            yield Fault(fault.what, s, fault.hint)
        for name, ranks in defined(s):
            for rank in ranks:
                if rank in site.steps:
                    yield Fault(f"{name} has the rank {rank!r}, the step of its iterate block", s, "inside the block it is one index")


def _rank_faults(s: Statement, steps: frozenset[str]) -> Iterator[Fault]:
    match s:
        case Einsum(op=None):
            yield from _left_over(space(s, steps), s.ranks, ())
        case Einsum(op=op, over=over) if op not in REDUCTIONS:
            yield Fault(f"no reduction {op!r}", hint=nearest(str(op), REDUCTIONS))
        case Einsum(op=str(op), over=over):
            yield from _reduced(op, over, s.ranks, space(s, steps))
            yield from _left_over(space(s, steps), s.ranks, over)
        case Scan(op=op, over=over):
            if op not in SCANS:
                yield Fault(f"no scan 'cum{op}'", hint=nearest(op, SCANS))
            if over not in space(s, steps) or over not in s.ranks:
                yield Fault(f"cum{op} along {over!r}, which must be a rank of the operand and of the result")
            yield from _left_over(space(s, steps), s.ranks, ())
        case Populate():
            yield from _populate_faults(s, space(s, steps))
        case Scatter():
            yield from _scatter_faults(s, space(s, steps))
        case Concat():
            yield from _concat_faults(s, steps)
        case Iterate():
            yield from _iterate_faults(s, steps)


def _reduced(op: str, over: tuple[str, ...], ranks: tuple[str, ...], points: tuple[str, ...]) -> Iterator[Fault]:
    if not over or len(set(over)) < len(over):
        yield Fault(f"{op} over {', '.join(over) or 'no rank'}", hint="each reduced rank once")
    for rank in over:
        if rank not in points:
            yield Fault(f"{op} over {rank!r}, which is no rank of the operand", hint=nearest(rank, points))
        if rank in ranks:
            yield Fault(f"{op} over {rank!r}, which is a rank of the result", hint="a running reduction is cum" + op)


def _left_over(points: tuple[str, ...], ranks: tuple[str, ...], gone: tuple[str, ...]) -> Iterator[Fault]:
    rest = [rank for rank in points if rank not in ranks and rank not in gone]
    if rest:
        what = f"the operand varies over {', '.join(rest)}, which the result [{','.join(ranks)}] lacks"
        yield Fault(what, hint=f"reduce over it: sum({','.join(rest)})")


def _populate_faults(s: Populate, points: tuple[str, ...]) -> Iterator[Fault]:
    if s.rule not in RULES:
        yield Fault(f"no rule {s.rule!r}", hint=nearest(s.rule, RULES))
    if (s.parameter is None) != (s.rule == "sort"):
        yield Fault(f"{s.rule} {'takes no parameter' if s.rule == 'sort' else 'needs a parameter'}")
    if s.over not in points:
        yield Fault(f"{s.rule} over {s.over!r}, which is no rank of the operand", hint=nearest(s.over, points))
    if s.over in s.ranks:
        yield Fault(f"{s.rule} over {s.over!r}, which is a rank of the result")
    if s.into not in s.ranks or s.into in points:
        yield Fault(f"{s.rule} into {s.into!r}, which must be a new rank, of the result alone")
    yield from _left_over(points, s.ranks, (s.over,))


def _scatter_faults(s: Scatter, points: tuple[str, ...]) -> Iterator[Fault]:
    kept = tuple(rank for rank in s.ranks if rank not in dict(s.at))
    yield from _reduced("scatter", s.over, kept, points)
    for rank, _ in s.at:
        if rank not in s.ranks:
            yield Fault(f"scatter at {rank!r}, which is no rank of the result", hint=nearest(rank, s.ranks))
        if rank in points and rank not in s.over:
            yield Fault(f"scatter at {rank!r}, which is a rank of the operand already")
    if not s.at or len(dict(s.at)) < len(s.at):
        yield Fault("scatter needs one coordinate for each new rank", hint="scatter(p at c = I[p])")
    yield from _left_over(points, s.ranks, s.over)


def _concat_faults(s: Concat, steps: frozenset[str]) -> Iterator[Fault]:
    pieces = [piece for piece, _ in s.parts]
    if s.rank not in s.ranks:
        yield Fault(f"concat makes the rank {s.rank!r}, which the result lacks")
    if len(set(pieces)) < len(pieces) or len(pieces) < 2 or s.rank in pieces:
        yield Fault(f"concat of the pieces {', '.join(pieces)}", hint="two or more, each with a rank of its own")
    for piece, x in s.parts:
        ranks = tuple(rank for rank in expression_ranks(x) if rank not in steps)
        if s.rank in ranks or piece in s.ranks:
            yield Fault(f"a part of concat is over its piece {piece!r}, the result over {s.rank!r}")
        yield from _left_over(ranks, s.ranks, (piece,))


def _iterate_faults(s: Iterate, steps: frozenset[str]) -> Iterator[Fault]:
    inner = steps | {s.rank}
    if not s.states:
        yield Fault(f"the iterate block over {s.rank!r} has no state", hint="M[b] = -inf then ...")
    if s.rank in steps:
        yield Fault(f"iterate over {s.rank!r} inside a block over the same rank")
    for state in s.states:
        if s.rank in state.ranks:
            yield Fault(f"state {state.name} has the rank {s.rank!r} of its block", hint="its value at a step has no such rank")
        for what, e, bound in (("first", state.init, steps), ("next", state.next, inner)):
            rest = [rank for rank in expression_ranks(e) if rank not in state.ranks and rank not in bound]
            if rest:
                yield Fault(f"the {what} value of {state.name}[{','.join(state.ranks)}] varies over {', '.join(rest)}")
    if s.until is not None:
        ranks = [rank for rank in expression_ranks(s.until) if rank not in inner]
        if ranks:
            yield Fault(f"the stop condition varies over {', '.join(ranks)}", hint="reduce in the block and keep the result as a state")


def check_concatenations(c: Cascade) -> Iterator[Fault]:
    """The declared size of a concatenated rank is the sum of its pieces in order; that of a top-k rank is k."""
    for site in sites(c):
        match site.statement:
            case Concat(rank=rank, parts=parts) as s if c.size_of(rank) is not None:
                pieces = tuple(piece for piece, _ in parts)
                if not c.is_concatenated(rank) or c.components(rank) != pieces:
                    yield Fault(f"rank {rank!r} is not declared as {' + '.join(pieces)}", s, f"rank {rank} = {' + '.join(pieces)}")
            case Populate(rule="topk", into=into, parameter=Const(value=k)) as s:
                size = c.size_of(into)
                if isinstance(size, Const) and size.value != k:
                    yield Fault(f"topk keeps {k}, but rank {into!r} has size {size.value}", s, f"rank {into} = {k}")
            case _:
                pass


# --- types -------------------------------------------------------------------------------------------------------------------------


def check_types(c: Cascade) -> Iterator[Fault]:
    """Operations get operands of types they take; conditions are bool, coordinates integers; a state keeps its type."""
    types = declared_types(c)
    for site in sites(c):
        s = site.statement
        for e, _, _ in uses(site):
            try:
                expression_type(e, types)
            except CascadeError as error:
                yield Fault(error.what, s, error.hint)
            for node in walk(e):
                yield from (Fault(f.what, s, f.hint) for f in node_types(node, types))
        if not isinstance(s, (Concat, Iterate)) and s.where is not None:
            yield from _must_be_bool("the condition", s.where, types, s)
        yield from _statement_types(s, types)


def node_types(node: Expr, types: Mapping[str, DType]) -> Iterator[Fault]:
    """The type faults of one node of an expression."""
    match node:
        case Read(tensor=tensor, coords=coords, fill=fill):
            for coordinate in coords:
                found, _ = expression_type(coordinate, types)
                if not found.is_integer:
                    yield Fault(f"a coordinate of {tensor} is {found}, expected an integer", hint="i32(x) converts")
            if fill is not None and tensor in types and not _fits(fill, types[tensor]):
                yield Fault(f"{tensor} is {types[tensor]} and cannot be read as {fill.value} outside")
        case Bitcast(x=x, dtype=dtype):
            found, weak = expression_type(x, types)
            if found.bits != dtype.bits and not weak:
                yield Fault(f"bits of {found} ({found.bits} bits) as {dtype} ({dtype.bits} bits)", hint="types of one size")
        case Op(name="where", args=(condition, _, _)):
            found, _ = expression_type(condition, types)
            if found != boolean:
                yield Fault(f"where needs a bool condition, found {found}", hint="compare: x != 0")
        case Op(name=("neg" | "sub") as name, args=args):
            if any(expression_type(a, types)[0] == boolean for a in args):
                yield Fault(f"'{OPS[name].symbol}' of a bool", hint="~x negates a condition; i32(x) counts")
        case Op(name=("popcount" | "clz") as name, args=(x,)):
            found, _ = expression_type(x, types)
            if not found.is_integer:
                yield Fault(f"{name} needs an integer, found {found}", hint="bits(x, i32) first")
        case _:
            pass


def _fits(fill: Const, dtype: DType) -> bool:
    if isinstance(fill.value, bool) or dtype == boolean:
        return isinstance(fill.value, bool) and dtype == boolean
    return dtype.is_float or isinstance(fill.value, int)


def _must_be_bool(what: str, e: Expr, types: Mapping[str, DType], s: Statement) -> Iterator[Fault]:
    found, _ = expression_type(e, types)
    if found != boolean:
        yield Fault(f"{what} is {found}, expected a bool", s, "compare: x != 0")


def _statement_types(s: Statement, types: Mapping[str, DType]) -> Iterator[Fault]:
    match s:
        case Einsum(op=str(op), expr=x):
            found, _ = expression_type(x, types)
            if op in ("any", "all") and found != boolean:
                yield Fault(f"{op} of {found}, expected bools", s, "compare: x != 0")
            if op in ("max", "min", "argmax", "argmin") and found == boolean:
                yield Fault(f"{op} of bools", s, "any and all reduce bools")
        case Scatter(at=at):
            for rank, coordinate in at:
                found, _ = expression_type(coordinate, types)
                if not found.is_integer:
                    yield Fault(f"the coordinate in {rank!r} is {found}, expected an integer", s, "i32(x) converts")
        case Populate(rule="topk", parameter=k) if k is not None and not expression_type(k, types)[0].is_integer:
            yield Fault("topk needs a whole k", s)
        case Iterate():
            for state in s.states:
                found, _ = expression_type(state.next, types)
                kept = types[state.name]
                if _KINDS[found.kind] > _KINDS[kept.kind] or (found == boolean) != (kept == boolean):
                    yield Fault(f"state {state.name} is {kept}, its next value {found}", s, f"begin with a {found}, or cast: {kept}(...)")
            if s.until is not None:
                yield from _must_be_bool("the stop condition", s.until, types, s)
        case _:
            pass


_KINDS = {"bool": 0, "uint": 1, "int": 1, "float": 2}


def check_outputs(c: Cascade) -> Iterator[Fault]:
    """There are outputs, each a tensor that a statement defines, returned once and over its own ranks."""
    tensors = {name: ranks for s in c.body for name, ranks in defined(s)}
    if not c.outputs:
        yield Fault("no output", hint="-> O[b,m]")
    for i, output in enumerate(c.outputs):
        if output.name not in tensors:
            what = "an input; an output is a tensor of its own" if c.input(output.name) else "defined by no statement outside of blocks"
            yield Fault(f"output {output.name} is {what}", hint=nearest(output.name, tensors))
        elif sorted(output.ranks) != sorted(tensors[output.name]):
            declared, found = ",".join(output.ranks), ",".join(tensors[output.name])
            yield Fault(f"output {output.name} is declared over [{declared}], defined over [{found}]")
        if output.name in (other.name for other in c.outputs[:i]):
            yield Fault(f"output {output.name} is named twice")
