"""Which values are provably positive, and which origins are good ones."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from ...ir.cascade import Einsum
from ...ir.expr import Const, Expr, Extent, Op, Read, Scalar, Seen, children, walk

_POSITIVE = ("exp", "exp2", "rsqrt", "sigmoid")


def is_positive(e: Expr, statements: Mapping[str, Einsum]) -> bool:
    """Whether `e` > 0 wherever it is a number: exp, rsqrt, sigmoid, positive constants, extents, and + * / sqrt sum max min of these."""
    match e:
        case Const(value=value):
            return not isinstance(value, bool) and value > 0
        case Extent() | Seen():
            return True
        case Op(name=name) if name in _POSITIVE:
            return True
        case Op(name="add" | "mul" | "div" | "minimum", args=(a, b)):
            return is_positive(a, statements) and is_positive(b, statements)
        case Op(name="maximum", args=(a, b)):
            return is_positive(a, statements) or is_positive(b, statements)
        case Op(name="sqrt" | "exact", args=(a,)):
            return is_positive(a, statements)
        case Op(name="where", args=(_, a, b)):
            return is_positive(a, statements) and is_positive(b, statements)
        case Read(tensor=tensor) if tensor in statements:
            statement = statements[tensor]
            return statement.op in (None, "sum", "prod", "max", "min") and is_positive(statement.expr, statements)
        case _:
            return False


def built_of_maxima(e: Expr, statements: Mapping[str, Einsum], plain: Container[str]) -> bool:
    """Whether only -inf can make `e` non-finite: running maxima, inputs, numbers and maximum of these.

    `plain` are the reductions whose running value is a state itself; one that is rebuilt from others may be inf - inf at first.
    """
    match e:
        case Const(value=value):
            return math.isfinite(value) or value < 0
        case Scalar():
            return True
        case Read(tensor=tensor):
            return tensor not in statements or (statements[tensor].op == "max" and tensor in plain)
        case Op(name="maximum", args=(a, b)):
            return built_of_maxima(a, statements, plain) and built_of_maxima(b, statements, plain)
        case _:
            return False


def is_running(e: Expr, statements: Mapping[str, Einsum], moving: Container[str], divided: Container[str]) -> bool:
    """Whether `e` is near its final value from the first elements on: sums must be divided by something that runs with them.

    `divided` are the sums from which such a division was factored out.
    """
    match e:
        case Read(tensor=tensor):
            return tensor not in moving or statements[tensor].op != "sum" or tensor in divided
        case Op(name="div", args=(_, b)):
            return runs(b, moving)
        case Op(name="log" | "log2"):
            return True
        case _:
            return all(is_running(child, statements, moving, divided) for child in children(e))


def runs(e: Expr, moving: Container[str]) -> bool:
    """Whether `e` grows with the elements seen: it holds an extent or a reduction in flight."""
    return any(isinstance(n, Extent) or (isinstance(n, Read) and n.tensor in moving) for n in walk(e))
