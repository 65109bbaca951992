"""Helpers for integers that wrap around: arithmetic, shifts and divisions of any operands, conversions, counts of bits.

They say nothing of overflow to the optimizer, and hide data from TVM, which takes integers for indices that never overflow.
"""

from __future__ import annotations

from .llvm_ir import LLVM_TYPES, Ir

ARITHMETIC = {"wadd": "add", "wsub": "sub", "wmul": "mul"}
INTEGER = (*ARITHMETIC, "wabs", "shl", "shr", "floordiv", "mod")


def _bits(t: str) -> int:
    return int(LLVM_TYPES[t][1:])


def cast_ir(source: str, target: str, n: int) -> str:
    """`cast_<source>_<target>`: as C does where the value fits; integers wrap around, and a float goes to narrow ones by way of i32."""
    old, new = LLVM_TYPES[source], LLVM_TYPES[target]
    ir = Ir.define(f"cast_{source}_{target}", n, new, old)
    floats = ("float32", "float64")
    if source in floats:
        wide = new if new == "i64" else "i32"
        value = ir.op(f"freeze {ir.kind(wide)} {ir.cast('fptosi', '%x', old, wide)}")
        return ir.finish(ir.kind(new), value if wide == new else ir.cast("trunc", value, wide, new))
    if target in floats:
        return ir.finish(ir.kind(new), ir.cast("uitofp" if source == "uint8" else "sitofp", "%x", old, new))
    if _bits(source) == _bits(target):
        return ir.finish(ir.kind(new), "%x")
    how = "trunc" if _bits(source) > _bits(target) else "zext" if source == "uint8" else "sext"
    return ir.finish(ir.kind(new), ir.cast(how, "%x", old, new))


def integer_ir(operation: str, t: str, n: int) -> str:
    """Arithmetic that wraps around, shifts by anything, and quotients and remainders rounded down, 0 where the divisor is."""
    element = LLVM_TYPES[t]
    unsigned = t == "uint8"
    if operation == "wabs":
        ir = Ir.define(f"wabs_{t}", n, element, element)
        negative = ir.op(f"sub {ir.kind(element)} {ir.constant(element, 0)}, %x")
        return ir.finish(ir.kind(element), "%x" if unsigned else ir.intrinsic("smax", element, "%x", negative))
    ir = Ir.define(f"{operation}_{t}", n, element, element, element)
    kind = ir.kind(element)
    if operation in ARITHMETIC:
        return ir.finish(kind, ir.op(f"{ARITHMETIC[operation]} {kind} %x, %y"))
    if operation in ("shl", "shr"):
        return ir.finish(kind, _shift(ir, operation, t, unsigned))
    return ir.finish(kind, _divide(ir, operation, t, unsigned))


def _shift(ir: Ir, operation: str, t: str, unsigned: bool) -> str:
    """By less than nothing or by at least the width: 0 to the left, the sign to the right."""
    element, bits = LLVM_TYPES[t], _bits(t)
    kind = ir.kind(element)
    if operation == "shr" and not unsigned:
        by = ir.intrinsic("umin", element, "%y", ir.constant(element, bits - 1))
        return ir.op(f"ashr {kind} %x, {by}")
    inside = ir.op(f"icmp ult {kind} %y, {ir.constant(element, bits)}")
    shifted = ir.op(f"{'shl' if operation == 'shl' else 'lshr'} {kind} %x, %y")
    return ir.select(inside, shifted, ir.constant(element, 0), element)


def _divide(ir: Ir, operation: str, t: str, unsigned: bool) -> str:
    """Of up to 32 bits by way of f64, whose rounded quotient never crosses a whole number; of 64 bits by the processor's division."""
    element = LLVM_TYPES[t]
    kind = ir.kind(element)
    zero, one = ir.constant(element, 0), ir.constant(element, 1)
    nothing = ir.op(f"icmp eq {kind} %y, {zero}")
    divisor = ir.select(nothing, one, "%y", element)
    if _bits(t) == 64:
        quotient = _divide_whole(ir, divisor, element)
    else:
        to, back = ("uitofp", "fptoui") if unsigned else ("sitofp", "fptosi")
        wide = ir.kind("double")
        a, b = (ir.cast(to, v, element, "double") for v in ("%x", divisor))
        floor = ir.intrinsic("floor", "double", ir.op(f"fdiv {wide} {a}, {b}"))
        quotient = ir.cast("trunc", ir.cast(back, floor, "double", "i64"), "i64", element)
    if operation == "floordiv":
        return ir.select(nothing, zero, quotient, element)
    rest = ir.op(f"sub {kind} %x, {ir.op(f'mul {kind} {quotient}, {divisor}')}")
    return ir.select(nothing, zero, rest, element)


def _divide_whole(ir: Ir, divisor: str, element: str) -> str:
    """A quotient by -1 is a negation: the processor traps where that overflows."""
    kind = ir.kind(element)
    zero, one = ir.constant(element, 0), ir.constant(element, 1)
    minus = ir.op(f"icmp eq {kind} {divisor}, {ir.constant(element, -1)}")
    safe = ir.select(minus, one, divisor, element)
    cut = ir.op(f"sdiv {kind} %x, {safe}")
    rest = ir.op(f"sub {kind} %x, {ir.op(f'mul {kind} {cut}, {safe}')}")
    differ = ir.op(f"icmp slt {kind} {ir.op(f'xor {kind} {rest}, {safe}')}, {zero}")
    inexact = ir.op(f"icmp ne {kind} {rest}, {zero}")
    crossed = ir.op(f"and {ir.kind('i1')} {differ}, {inexact}")
    floor = ir.op(f"add {kind} {cut}, {ir.cast('sext', crossed, 'i1', element)}")
    return ir.select(minus, ir.op(f"sub {kind} {zero}, %x"), floor, element)


def count_ir(operation: str, t: str, n: int) -> str:
    """popcount and clz, within the bits of the type, as i32."""
    element = LLVM_TYPES[t]
    ir = Ir.define(f"{operation}_{t}", n, "i32", element)
    kind = ir.kind(element)
    if operation == "popcount":
        counted = ir.intrinsic("ctpop", element, "%x")
    else:
        counted = ir.call(kind, f"llvm.ctlz.{ir.overload(element)}", (kind, "%x"), ("i1", "false"))
    if element == "i32":
        return ir.finish(ir.i, counted)
    return ir.finish(ir.i, ir.cast("trunc" if element == "i64" else "zext", counted, element, "i32"))


def wrap_nibble_ir(n: int) -> str:
    """The low four bits as a signed number."""
    ir = Ir.define("wrap_nibble", n, "i8", "i8")
    high = ir.op(f"shl {ir.kind('i8')} %x, {ir.constant('i8', 4)}")
    return ir.finish(ir.kind("i8"), ir.op(f"ashr {ir.kind('i8')} {high}, {ir.constant('i8', 4)}"))
