"""Ranks and types that follow from a cascade: the declared type of every tensor, the ranks an expression depends on."""

from __future__ import annotations

from collections.abc import Mapping

from .cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement
from .errors import CascadeError
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
)  # fmt: skip
from .types import DType, boolean, f32, i32, i64, promote, promote_weak, reduced

_WEAK_FLOAT, _WEAK_INT, _WEAK_BOOL = f32, i64, boolean


def expression_type(e: Expr, types: Mapping[str, DType]) -> tuple[DType, bool]:
    """The type of `e` and whether it is weak; `types` gives the tensors (and tiles). Raises `CascadeError` on an illegal mix."""
    match e:
        case Const(value=value):
            if isinstance(value, bool):
                return _WEAK_BOOL, True
            return (_WEAK_INT, True) if isinstance(value, int) else (_WEAK_FLOAT, True)
        case Scalar():
            return _WEAK_FLOAT, True
        case Index() | Extent() | Start() | Count() | Seen():
            return i32, False
        case Read(tensor=tensor):
            if tensor not in types:
                raise CascadeError(f"'{tensor}' is read before it is defined")
            return types[tensor], False
        case Tile(name=name):
            return types.get(name, f32), False
        case Masked(x=x):
            return expression_type(x, types)
        case Cast(dtype=dtype) | Bitcast(dtype=dtype):
            return dtype, False
        case Op(name=name, args=args):
            return operation_type(name, [expression_type(a, types) for a in args])
    raise AssertionError(f"not an expression: {e!r}")


def operation_type(name: str, args: list[tuple[DType, bool]]) -> tuple[DType, bool]:
    """The type of an operation of the table `OPS` on operands of these types, and whether it is weak."""
    kind = OPS[name].kind
    weak = all(w for _, w in args)
    match kind:
        case "compare" | "test":
            return boolean, weak
        case "count":
            return i32, False
        case "select":
            joined = combine(args[1], args[2])
            return joined[0], joined[1] and args[0][1]
        case "float":
            t = args[0][0]
            return (t if t.is_float else f32), weak
        case "bit":
            t = args[0][0] if len(args) == 1 else combine(args[0], args[1])[0]
            if t.is_float:
                what = f"'{OPS[name].symbol}' needs integers or bools, found {t}"
                raise CascadeError(what, hint="cast or .bitcast to an integer type first")
            return t, weak
    t = args[0][0] if len(args) == 1 else combine(args[0], args[1])[0]
    if name == "div" and not t.is_float:
        if not weak:
            raise CascadeError(f"{args[0][0]} / {args[1][0]} divides integers", hint="write // for a whole quotient, or .to(f32) first")
        t = f32
    return t, weak


def combine(a: tuple[DType, bool], b: tuple[DType, bool]) -> tuple[DType, bool]:
    """The type of an arithmetic result of two (type, weak) operands."""
    (ta, wa), (tb, wb) = a, b
    if wa == wb:
        return promote(ta, tb), wa
    return (promote_weak(tb, ta) if wa else promote_weak(ta, tb)), False


def stored_types(cascade: Cascade) -> dict[str, DType]:
    """The type of every tensor as it lies in memory between the kernels of a plan.

    An intermediate's declared type is a lower bound of its precision: what a kernel stores for another is f32 where it is declared
    narrower, since a value that others were computed from must not change on the way (a maximum is that of the values before rounding).
    """
    types = declared_types(cascade)
    outputs = {o.name for o in cascade.outputs}
    for s in cascade.body:
        if isinstance(s, (Einsum, Scan)) and s.out not in outputs and types[s.out].is_float and types[s.out].bits < f32.bits:
            types[s.out] = f32
    return types


def declared_types(cascade: Cascade) -> dict[str, DType]:
    """The declared type of every tensor of the cascade, by name. Raises `CascadeError` naming the statement."""
    types = {t.name: t.dtype for t in cascade.inputs}

    def of(e: Expr, statement: Statement, name: str) -> DType:
        try:
            t, weak = expression_type(e, types)
        except CascadeError as error:
            raise CascadeError(error.what, cascade=cascade.name, statement=name, location=statement.location, hint=error.hint) from None
        return i32 if weak and t == i64 else t

    def visit(body: tuple[Statement, ...]) -> None:
        for s in body:
            match s:
                case Einsum():
                    t = of(s.expr, s, s.out)
                    types[s.out] = t if s.op is None else reduced(s.op, t)
                case Scan():
                    types[s.out] = reduced(s.op, of(s.expr, s, s.out))
                case Populate():
                    types[s.values] = of(s.expr, s, s.values)
                    types[s.coords] = i32
                case Scatter():
                    types[s.out] = reduced("sum", of(s.expr, s, s.out))
                case Concat():
                    for _, part in s.parts:
                        of(part, s, s.out)
                    t, weak = expression_type(s.parts[0][1], types)
                    for _, part in s.parts[1:]:
                        t, weak = combine((t, weak), expression_type(part, types))
                    types[s.out] = i32 if weak and t == i64 else t
                case Iterate():
                    for state in s.states:
                        types[state.name] = of(state.init, s, state.name)
                    visit(s.body)

    visit(cascade.body)
    return types


def expression_ranks(e: Expr, tiles: Mapping[str, tuple[str, ...]] | None = None) -> tuple[str, ...]:
    """The ranks `e` varies over, in order of first appearance; a `Tile` contributes the ranks `tiles` gives it."""
    found: dict[str, None] = {}

    def visit(node: Expr) -> None:
        match node:
            case Index(rank=rank):
                found[rank] = None
            case Tile(name=name):
                found.update(dict.fromkeys((tiles or {}).get(name, ())))
            case Read(coords=coords):
                for c in coords:
                    visit(c)
            case Op(args=args):
                for a in args:
                    visit(a)
            case Cast(x=x) | Bitcast(x=x) | Masked(x=x):
                visit(x)
            case _:
                pass

    visit(e)
    return tuple(found)
