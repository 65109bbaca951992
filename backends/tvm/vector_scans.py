"""Helpers for running reductions within a vector: prefixes by log-many shuffles, the last lane in all, lanes moved up by one."""

from __future__ import annotations

from .llvm_ir import LLVM_TYPES, Ir
from .vector_floats import extreme


def _neutral(operation: str, t: str, n: int) -> str:
    """What changes nothing, in all lanes; -0.0 for a sum of floats, so that -0.0 stays."""
    element = LLVM_TYPES[t]
    if element in ("float", "double"):
        value = {"sum": "-0.0", "prod": "1.0", "max": "0xFFF0000000000000", "min": "0x7FF0000000000000"}[operation]
    else:
        bits = int(element[1:])
        low, high = (0, (1 << bits) - 1) if t == "uint8" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        value = str({"sum": 0, "prod": 1, "max": low, "min": high}[operation])
    return f"<{', '.join([f'{element} {value}'] * n)}>"


def _shifted(ir: Ir, operation: str, t: str, x: str, by: int) -> str:
    """The lanes moved up by `by`, neutral ones at the bottom."""
    n, vector = ir.lanes, f"<{ir.lanes} x {LLVM_TYPES[t]}>"
    mask = ", ".join(f"i32 {k - by if k >= by else n + k}" for k in range(n))
    return ir.op(f"shufflevector {vector} {x}, {vector} {_neutral(operation, t, n)}, <{n} x i32> <{mask}>")


def _combined(ir: Ir, operation: str, t: str, a: str, b: str) -> str:
    element = LLVM_TYPES[t]
    vector = f"<{ir.lanes} x {element}>"
    floating = element in ("float", "double")
    if operation in ("sum", "prod"):
        verb = "add" if operation == "sum" else "mul"
        return ir.op(f"{'f' if floating else ''}{verb} {vector} {a}, {b}")
    if floating:
        return extreme(ir, {"max": "maximum", "min": "minimum"}[operation], element, a, b)
    sign, less = "u" if t == "uint8" else "s", "gt" if operation == "max" else "lt"
    return ir.select(ir.op(f"icmp {sign}{less} {vector} {a}, {b}"), a, b, element)


def prefix_ir(verb: str, operation: str, t: str, n: int) -> str:
    """prefix: every lane with all below it, in steps of 1, 2, 4, ...; last: the highest lane in all; shift: moved up by one lane."""
    vector = f"<{n} x {LLVM_TYPES[t]}>"
    ir = Ir(f"{vector} @{verb}{operation}_{t}_v{n}({vector} %x)", n)
    if verb == "last":
        mask = ", ".join([f"i32 {n - 1}"] * n)
        return ir.finish(vector, ir.op(f"shufflevector {vector} %x, {vector} poison, <{n} x i32> <{mask}>"))
    if verb == "shift":
        return ir.finish(vector, _shifted(ir, operation, t, "%x", 1))
    x, by = "%x", 1
    while by < n:
        x = _combined(ir, operation, t, _shifted(ir, operation, t, x, by), x)
        by *= 2
    return ir.finish(vector, x)
