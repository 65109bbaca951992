"""Helpers for floats as torch has them: NaN in comparisons and extremes, remainders, functions of the C library lane by lane.

TVM computes with floats as with real numbers, and takes the negation of a < b for a >= b; it sees none of these.
"""

from __future__ import annotations

from .llvm_ir import LLVM_TYPES, Ir

LIBM = ("erf", "log1p", "pow", "fmod", "sin", "cos", "tanh64", "erf64", "log1p64", "pow64", "fmod64")
COMPARISONS = {"feq": "oeq", "fne": "une", "flt": "olt", "fle": "ole", "fgt": "ogt", "fge": "oge"}
PLAIN = ("fadd", "fsub", "fmul", "fdiv")
FLOATS = (*COMPARISONS, *PLAIN, "maximum", "minimum", "remainder", "quotient", "root")
TESTS = ("isnan", "isinf", "isfinite")


def test_ir(operation: str, n: int) -> str:
    """isnan, isinf, isfinite on the bits, where no optimizer assumes anything of floats. The result is 0 or 1."""
    double = operation.endswith("64")
    element, whole, special = ("double", "i64", 0x7FF0 << 48) if double else ("float", "i32", 0x7F800000)
    ir = Ir.define(operation, n, "i32", element)
    kind = ir.kind(whole)
    magnitude = ir.op(f"and {kind} {ir.cast('bitcast', '%x', element, whole)}, {ir.constant(whole, (1 << (63 if double else 31)) - 1)}")
    compare = {"isnan": "sgt", "isinf": "eq", "isfinite": "slt"}[operation.removesuffix("64")]
    truth = ir.op(f"icmp {compare} {kind} {magnitude}, {ir.constant(whole, special)}")
    return ir.finish(ir.i, ir.cast("zext", truth, "i1", "i32"))


def float_ir(operation: str, t: str, n: int) -> str:
    """Comparisons (0 or 1), sums that nobody simplifies, extremes that keep a NaN, quotient and remainder with the divisor's sign."""
    element = LLVM_TYPES[t]
    if operation == "root":
        return _root(t, n)
    compares = operation in COMPARISONS
    ir = Ir.define(f"{operation}_{t}", n, "i32" if compares else element, element, element)
    kind = ir.kind(element)
    if compares:
        return ir.finish(ir.i, ir.cast("zext", ir.op(f"fcmp {COMPARISONS[operation]} {kind} %x, %y"), "i1", "i32"))
    if operation in PLAIN:
        return ir.finish(kind, ir.op(f"{operation} {kind} %x, %y"))
    if operation in ("maximum", "minimum"):
        return ir.finish(kind, extreme(ir, operation, element, "%x", "%y"))
    rest = _remainder(ir, element)
    return ir.finish(kind, rest if operation == "remainder" else _quotient(ir, element))


def _root(t: str, n: int) -> str:
    """x to the power of a half: the square root, but 0 of -0 and inf of -inf."""
    element = LLVM_TYPES[t]
    ir = Ir.define(f"root_{t}", n, element, element)
    kind = ir.kind(element)
    root = ir.intrinsic("sqrt", element, ir.op(f"fadd {kind} %x, {ir.number(element, 0.0)}"))
    least = ir.op(f"fcmp oeq {ir.kind(element)} {ir.intrinsic('fabs', element, '%x')}, {ir.infinity(element)}")
    return ir.finish(kind, ir.select(least, ir.infinity(element), root, element))


def extreme(ir: Ir, operation: str, element: str, x: str, y: str) -> str:
    """The larger or smaller of two; a NaN if either is one. With a literal for x it is one instruction."""
    kind = ir.kind(element)
    better = ir.op(f"fcmp {'ogt' if operation == 'maximum' else 'olt'} {kind} {x}, {y}")
    chosen = ir.select(better, x, y, element)
    return ir.select(ir.op(f"fcmp uno {kind} {x}, {x}"), x, chosen, element)


def _fmod(ir: Ir, element: str) -> str:
    return _lanewise(ir, "fmodf" if element == "float" else "fmod", element, ("%x", "%y"))


def _remainder(ir: Ir, element: str) -> str:
    """fmod, and the divisor more where the signs differ."""
    kind, zero = ir.kind(element), "zeroinitializer" if ir.lanes > 1 else "0.0"
    rest = _fmod(ir, element)
    below, negative = (ir.op(f"fcmp olt {kind} {v}, {zero}") for v in (rest, "%y"))
    other = ir.op(f"xor {ir.kind('i1')} {below}, {negative}")
    moves = ir.op(f"and {ir.kind('i1')} {other}, {ir.op(f'fcmp une {kind} {rest}, {zero}')}")
    return ir.select(moves, ir.op(f"fadd {kind} {rest}, %y"), rest, element)


def _quotient(ir: Ir, element: str) -> str:
    """(x - remainder) / y, which is whole but for rounding; 0 has the sign of x / y, and division by 0 is that of floats."""
    kind, zero = ir.kind(element), "zeroinitializer" if ir.lanes > 1 else "0.0"
    one, half = (ir.number(element, v) for v in (1.0, 0.5))
    rest, plain = _fmod(ir, element), ir.op(f"fdiv {kind} %x, %y")
    whole = ir.op(f"fdiv {kind} {ir.op(f'fsub {kind} %x, {rest}')}, %y")
    below, negative = (ir.op(f"fcmp olt {kind} {v}, {zero}") for v in (rest, "%y"))
    other = ir.op(f"xor {ir.kind('i1')} {below}, {negative}")
    moves = ir.op(f"and {ir.kind('i1')} {other}, {ir.op(f'fcmp une {kind} {rest}, {zero}')}")
    whole = ir.select(moves, ir.op(f"fsub {kind} {whole}, {one}"), whole, element)
    floor = ir.intrinsic("floor", element, whole)
    high = ir.op(f"fcmp ogt {kind} {ir.op(f'fsub {kind} {whole}, {floor}')}, {half}")
    nearest = ir.select(high, ir.op(f"fadd {kind} {floor}, {one}"), floor, element)
    signed = ir.intrinsic("copysign", element, ir.number(element, 0.0), plain)
    result = ir.select(ir.op(f"fcmp une {kind} {whole}, {zero}"), nearest, signed, element)
    return ir.select(ir.op(f"fcmp oeq {kind} %y, {zero}"), plain, result, element)


def libm_ir(function: str, n: int) -> str:
    """A function of the C library, lane by lane."""
    name = function.removesuffix("64")
    element = "double" if function.endswith("64") else "float"
    operands = ("%x", "%y")[: 2 if name in ("pow", "fmod") else 1]
    ir = Ir.define(function, n, element, *(element for _ in operands))
    return ir.finish(ir.kind(element), _lanewise(ir, name if element == "double" else f"{name}f", element, operands))


def _lanewise(ir: Ir, symbol: str, element: str, operands: tuple[str, ...]) -> str:
    if ir.lanes == 1:
        return ir.call(element, symbol, *((element, x) for x in operands))
    kind, result = ir.kind(element), "poison"
    for lane in range(ir.lanes):
        args = [(element, ir.op(f"extractelement {kind} {x}, i32 {lane}")) for x in operands]
        result = ir.op(f"insertelement {kind} {result}, {element} {ir.call(element, symbol, *args)}, i32 {lane}")
    return result
