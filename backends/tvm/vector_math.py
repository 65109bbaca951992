"""LLVM IR helpers that emitted kernels import: vector mathematics, masked memory, horizontal reductions, the bf16 dot.

Each helper is a function of the vector width, named `<operation>_v<lanes>` or `<operation>_<type>_v<lanes>`. Where AVX-512 has an
instruction it is used; otherwise plain LLVM IR does the same, so the emitted kernel reads alike on every processor.
exp2 of degree 5: relative error 1.4e-7, exactly 0 for -inf; the scalar forms compute one lane of a vector.
"""

from __future__ import annotations

import math
from functools import lru_cache

from .cpu import Cpu
from .llvm_ir import LLVM_TYPES, Ir
from .vector_scans import prefix_ir

LIBM = {"erf": "erff", "log1p": "log1pf", "pow": "powf", "fmod": "fmodf", "sin": "sinf", "cos": "cosf"}


# 2**f on [0, 1): Chebyshev fit of the relative error, degree 5, constant term last
EXP2 = (0.0018762329455207936, 0.008992584030501403, 0.05582360446300757, 0.2401545298864825, 0.6931529681766547, 0.9999999269249821)
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
    -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def _exp2(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x float> @exp2_v{n}(<{n} x float> %x)", n)
    f = ir.f
    if cpu.avx512 and n == 16:
        mask, rounding = ("i16", "-1"), ("i32", "8")
        fraction = ir.call(f, "llvm.x86.avx512.mask.reduce.ps.512", (f, "%x"), ("i32", "1"), (f, "zeroinitializer"), mask, rounding)
        poly = ir.horner(fraction, EXP2)
        result = ir.call(f, "llvm.x86.avx512.mask.scalef.ps.512", (f, poly), (f, "%x"), (f, "zeroinitializer"), mask, ("i32", "4"))
        return ir.finish(f, result)
    high = ir.call(f, f"llvm.minnum.v{n}f32", (f, "%x"), (f, ir.real(129.0)))
    bounded = ir.call(f, f"llvm.maxnum.v{n}f32", (f, high), (f, ir.real(-152.0)))
    whole = ir.unary("floor", bounded)
    fraction = ir.op(f"fsub {f} {bounded}, {whole}")
    scaled = ir.scale(ir.horner(fraction, EXP2), whole)
    nan = ir.op(f"fcmp uno {f} %x, %x")
    return ir.finish(f, ir.select(nan, "%x", scaled))


def _exp(cpu: Cpu, n: int) -> str:
    """exp(x) with the reduction in two parts, so that a large |x| costs no accuracy (Cody and Waite)."""
    ir = Ir(f"<{n} x float> @exp_v{n}(<{n} x float> %x)", n)
    f = ir.f
    wide = cpu.avx512 and n == 16
    low, high = ir.real(-105.0), ir.real(90.0)
    if wide:  # the second operand is the result where either is NaN
        bounded = "%x"
        for operation, bound in (("max", low), ("min", high)):
            bounded = ir.call(f, f"llvm.x86.avx512.{operation}.ps.512", (f, bound), (f, bounded), ("i32", "4"))
    else:
        bounded = ir.call(f, f"llvm.maxnum.v{n}f32", (f, ir.call(f, f"llvm.minnum.v{n}f32", (f, "%x"), (f, high))), (f, low))
    whole = ir.unary("rint", ir.op(f"fmul {f} {bounded}, {ir.real(math.log2(math.e))}"))
    rest = ir.fma(whole, ir.real(-0.693359375), bounded)
    rest = ir.fma(whole, ir.real(2.12194440e-4), rest)
    poly = ir.horner(rest, EXP)
    if wide:
        scaled = ir.call(
            f, "llvm.x86.avx512.mask.scalef.ps.512", (f, poly), (f, whole), (f, "zeroinitializer"), ("i16", "-1"), ("i32", "4")
        )
        return ir.finish(f, scaled)
    scaled = ir.scale(poly, whole)
    return ir.finish(f, ir.select(ir.op(f"fcmp uno {f} %x, %x"), "%x", scaled))


def _log(cpu: Cpu, n: int, base2: bool) -> str:
    """log(x) or log2(x), after Cephes: mantissa in [sqrt(1/2), sqrt(2)), subnormals scaled first."""
    function = "log2" if base2 else "log"
    ir = Ir(f"<{n} x float> @{function}_v{n}(<{n} x float> %x)", n)
    f, i = ir.f, ir.i
    tiny = ir.op(f"fcmp olt {f} %x, {ir.real(2.0**-126)}")
    scaled = ir.select(tiny, ir.op(f"fmul {f} %x, {ir.real(2.0**24)}"), "%x")
    bits = ir.op(f"bitcast {f} {scaled} to {i}")
    shifted = ir.op(f"sub {i} {bits}, {ir.whole(0x3F3504F3)}")
    exponent = ir.op(f"ashr {i} {shifted}, {ir.whole(23)}")
    mantissa = ir.op(f"sub {i} {bits}, {ir.op(f'shl {i} {exponent}, {ir.whole(23)}')}")
    e = ir.op(f"sitofp {i} {exponent} to {f}")
    e = ir.op(f"fsub {f} {e}, {ir.select(tiny, ir.real(24.0), ir.real(0.0))}")
    r = ir.op(f"fsub {f} {ir.op(f'bitcast {i} {mantissa} to {f}')}, {ir.real(1.0)}")
    square = ir.op(f"fmul {f} {r}, {r}")
    tail = ir.op(f"fmul {f} {ir.op(f'fmul {f} {r}, {square}')}, {ir.horner(r, LOG)}")
    tail = ir.fma(square, ir.real(-0.5), tail)
    if base2:  # (r + tail) * log2(e) + e with log2(e) = 1 + 0.4427
        extra = ir.real(math.log2(math.e) - 1)
        y = ir.fma(tail, extra, ir.op(f"fmul {f} {r}, {extra}"))
        for term in (tail, r, e):
            y = ir.op(f"fadd {f} {y}, {term}")
    else:
        y = ir.fma(e, ir.real(-2.12194440e-4), tail)
        y = ir.fma(e, ir.real(0.693359375), ir.op(f"fadd {f} {r}, {y}"))
    infinite = ir.op(f"fcmp oeq {f} %x, {ir.real(math.inf)}")
    zero = ir.op(f"fcmp oeq {f} %x, {ir.real(0.0)}")
    illegal = ir.op(f"fcmp ult {f} %x, {ir.real(0.0)}")
    y = ir.select(infinite, "%x", y)
    y = ir.select(zero, ir.real(-math.inf), y)
    return ir.finish(f, ir.select(illegal, ir.real(math.nan), y))


def _tanh(cpu: Cpu, n: int) -> str:
    """tanh after Cephes: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose all accuracy."""
    ir = Ir(f"<{n} x float> @tanh_v{n}(<{n} x float> %x)", n)
    f = ir.f
    square = ir.op(f"fmul {f} %x, %x")
    cube = ir.op(f"fmul {f} %x, {square}")
    near = ir.fma(cube, ir.horner(square, TANH), "%x")
    size = ir.unary("fabs", "%x")
    power = ir.op(f"call {f} @exp_v{n}({f} {ir.op(f'fadd {f} {size}, {size}')})")
    rest = ir.op(f"fdiv {f} {ir.real(2.0)}, {ir.op(f'fadd {f} {power}, {ir.real(1.0)}')}")
    far = ir.call(f, f"llvm.copysign.v{n}f32", (f, ir.op(f"fsub {f} {ir.real(1.0)}, {rest}")), (f, "%x"))
    return ir.finish(f, ir.select(ir.op(f"fcmp olt {f} {size}, {ir.real(0.625)}"), near, far))


def _sigmoid(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x float> @sigmoid_v{n}(<{n} x float> %x)", n)
    f = ir.f
    power = ir.call(f, f"exp_v{n}", (f, ir.op(f"fneg {f} %x")))
    ir.declared.clear()
    return ir.finish(f, ir.op(f"fdiv {f} {ir.real(1.0)}, {ir.op(f'fadd {f} {power}, {ir.real(1.0)}')}"))


def _round_bf16(cpu: Cpu, n: int) -> str:
    """f32 rounded to the nearest bf16, ties to even; a NaN stays one."""
    ir = Ir(f"<{n} x float> @round_bf16_v{n}(<{n} x float> %x)", n)
    f, i = ir.f, ir.i
    bits = ir.op(f"bitcast {f} %x to {i}")
    odd = ir.op(f"and {i} {ir.op(f'lshr {i} {bits}, {ir.whole(16)}')}, {ir.whole(1)}")
    carried = ir.op(f"add {i} {ir.op(f'add {i} {bits}, {ir.whole(0x7FFF)}')}, {odd}")
    rounded = ir.op(f"bitcast {i} {ir.op(f'and {i} {carried}, {ir.whole(-65536)}')} to {f}")
    return ir.finish(f, ir.select(ir.op(f"fcmp uno {f} %x, %x"), "%x", rounded))


def _round_f16(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x float> @round_f16_v{n}(<{n} x float> %x)", n)
    half = ir.op(f"fptrunc {ir.f} %x to <{n} x half>")
    return ir.finish(ir.f, ir.op(f"fpext <{n} x half> {half} to {ir.f}"))


def _bits_f16(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x i16> @bits_f16_v{n}(<{n} x float> %x)", n)
    half = ir.op(f"fptrunc {ir.f} %x to <{n} x half>")
    return ir.finish(f"<{n} x i16>", ir.op(f"bitcast <{n} x half> {half} to <{n} x i16>"))


def _from_bits_f16(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x float> @from_bits_f16_v{n}(<{n} x i16> %x)", n)
    half = ir.op(f"bitcast <{n} x i16> %x to <{n} x half>")
    return ir.finish(ir.f, ir.op(f"fpext <{n} x half> {half} to {ir.f}"))


def _test(cpu: Cpu, n: int, operation: str) -> str:
    """isnan, isinf, isfinite on the bits, where no optimizer assumes anything of floats. The result is 0 or 1."""
    ir = Ir(f"<{n} x i32> @{operation}_v{n}(<{n} x float> %x)", n)
    magnitude = ir.op(f"and {ir.i} {ir.op(f'bitcast {ir.f} %x to {ir.i}')}, {ir.whole(0x7FFFFFFF)}")
    compare = {"isnan": "sgt", "isinf": "eq", "isfinite": "slt"}[operation]
    truth = ir.op(f"icmp {compare} {ir.i} {magnitude}, {ir.whole(0x7F800000)}")
    return ir.finish(ir.i, ir.op(f"zext <{n} x i1> {truth} to {ir.i}"))


def _differ(n: int) -> str:
    """Whether two floats differ; a NaN differs from everything. The result is 0 or 1."""
    ir = Ir(f"<{n} x i32> @differ_v{n}(<{n} x float> %x, <{n} x float> %y)", n)
    return ir.finish(ir.i, ir.op(f"zext <{n} x i1> {ir.op(f'fcmp une {ir.f} %x, %y')} to {ir.i}"))


def _from_integer(n: int) -> str:
    """i32 to f32."""
    ir = Ir(f"<{n} x float> @float_int32_v{n}(<{n} x i32> %x)" if n > 1 else "float @float_int32_s(i32 %x)", n)
    source, result = (ir.i, ir.f) if n > 1 else ("i32", "float")
    return ir.finish(result, ir.op(f"sitofp {source} %x to {result}"))


def _count_bits(operation: str, t: str, n: int) -> str:
    """popcount and clz of integers."""
    element = LLVM_TYPES[t]
    kind, suffix, mangled = (f"<{n} x {element}>", f"v{n}", f"v{n}{element}") if n > 1 else (element, "s", element)
    ir = Ir(f"{kind} @{operation}_{t}_{suffix}({kind} %x)", n)
    if operation == "popcount":
        return ir.finish(kind, ir.call(kind, f"llvm.ctpop.{mangled}", (kind, "%x")))
    return ir.finish(kind, ir.call(kind, f"llvm.ctlz.{mangled}", (kind, "%x"), ("i1", "false")))


def _libm(function: str, n: int) -> str:
    """A function of the C library, lane by lane."""
    arity = 2 if function in ("pow", "fmod") else 1
    symbol = LIBM[function]
    operands = ("%x", "%y")[:arity]
    ir = Ir(f"<{n} x float> @{function}_v{n}({', '.join(f'<{n} x float> {x}' for x in operands)})", n)
    result = "poison"
    for lane in range(n):
        args = [("float", ir.op(f"extractelement {ir.f} {x}, i32 {lane}")) for x in operands]
        result = ir.op(f"insertelement {ir.f} {result}, float {ir.call('float', symbol, *args)}, i32 {lane}")
    return ir.finish(ir.f, result)


def _scalar(function: str, n: int, result: str = "float") -> str:
    """The one-element form of a vector helper."""
    arity = 2 if function in ("pow", "fmod", "differ", "pack_bf16") else 1
    operands = ("%x", "%y")[:arity]
    ir = Ir(f"{result} @{function}_s({', '.join(f'float {x}' for x in operands)})", n)
    vectors = [(ir.f, ir.op(f"insertelement {ir.f} zeroinitializer, float {x}, i32 0")) for x in operands]
    value = ir.op(f"call <{n} x {result}> @{function}_v{n}({', '.join(f'{t} {v}' for t, v in vectors)})")
    return ir.finish(result, ir.op(f"extractelement <{n} x {result}> {value}, i32 0"))


def _mask(ir: Ir, count: str = "%n") -> str:
    """Lanes below `count`."""
    first = ir.op(f"insertelement {ir.i} poison, i32 {count}, i32 0")
    splat = ir.op(f"shufflevector {ir.i} {first}, {ir.i} poison, {ir.i} zeroinitializer")
    return ir.op(f"icmp sgt {ir.i} {splat}, <{', '.join(f'i32 {k}' for k in range(ir.lanes))}>")


def _hidden(ir: Ir) -> str:
    """The count %n, made unknown to the optimizer."""
    slot = ir.op("alloca i32")
    ir.lines.append(f"  store volatile i32 %n, ptr {slot}")
    return ir.op(f"load volatile i32, ptr {slot}")


def _element(t: str) -> str:
    return "bfloat" if t == "bf16" else "half" if t == "f16" else LLVM_TYPES[t]


def _mangled(t: str) -> str:
    return {"float": "f32", "double": "f64", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64"}[t]


def _stored(t: str) -> str:
    """The type moved through memory: 16-bit floats go as integers."""
    return "i16" if t in ("bf16", "f16") else LLVM_TYPES[t]


def _size(t: str) -> int:
    return {"float": 4, "double": 8, "i8": 1, "i16": 2, "i32": 4, "i64": 8}[_stored(t)]


def _widen(ir: Ir, t: str, value: str) -> str:
    """16-bit floats as read from memory to f32, exactly."""
    n = ir.lanes
    if t == "bf16":
        shifted = ir.op(f"shl {ir.i} {ir.op(f'zext <{n} x i16> {value} to {ir.i}')}, {ir.whole(16)}")
        return ir.op(f"bitcast {ir.i} {shifted} to {ir.f}")
    return ir.op(f"fpext <{n} x half> {ir.op(f'bitcast <{n} x i16> {value} to <{n} x half>')} to {ir.f}")


def _load(t: str, n: int, masked: bool) -> str:
    """A vector from memory that need not be aligned; lanes from `n` on are 0. 16-bit floats come as f32."""
    stored = _stored(t)
    result = f"<{n} x float>" if t in ("bf16", "f16") else f"<{n} x {stored}>"
    ir = Ir(f"{result} @{'mload' if masked else 'load'}_{t}_v{n}(ptr %p{', i32 %n' if masked else ''})", n)
    if masked:
        vector = f"<{n} x {stored}>"
        value = ir.call(
            vector,
            f"llvm.masked.load.v{n}{_mangled(stored)}.p0",
            ("ptr", f"align {_size(t)} %p"),
            (f"<{n} x i1>", _mask(ir)),
            (vector, "zeroinitializer"),
        )
    else:
        value = ir.op(f"load <{n} x {stored}>, ptr %p, align {_size(t)}, !invariant.load !0")
    if t in ("bf16", "f16"):
        value = _widen(ir, t, value)
    return ir.finish(result, value)


def _narrowed(ir: Ir, cpu: Cpu, t: str) -> str:
    """%v of f32 as the 16 bits of a narrow float."""
    n = ir.lanes
    if t == "f16":
        return ir.op(f"bitcast <{n} x half> {ir.op(f'fptrunc {ir.f} %v to <{n} x half>')} to <{n} x i16>")
    rounded = ir.op(f"call {ir.f} @round_bf16_v{n}({ir.f} %v)")
    bits = ir.op(f"lshr {ir.i} {ir.op(f'bitcast {ir.f} {rounded} to {ir.i}')}, {ir.whole(16)}")
    return ir.op(f"trunc {ir.i} {bits} to <{n} x i16>")


def _store(cpu: Cpu, t: str, n: int, masked: bool) -> str:
    """A vector to memory that need not be aligned; lanes from `n` on are left alone. f32 is rounded to a 16-bit float."""
    stored = _stored(t)
    given = f"<{n} x float>" if t in ("bf16", "f16") else f"<{n} x {stored}>"
    ir = Ir(f"i32 @{'mstore' if masked else 'store'}_{t}_v{n}(ptr %p, {given} %v{', i32 %n' if masked else ''})", n)
    value = _narrowed(ir, cpu, t) if t in ("bf16", "f16") else "%v"
    vector = f"<{n} x {stored}>"
    if masked:
        # LLVM 22 makes a masked store of one lane of 8 or 16 bits, if the mask is known, a store of 32 bits: the count is hidden from it
        mask = _mask(ir) if _size(t) >= 4 else _mask(ir, _hidden(ir))
        ir.declared[f"declare void @llvm.masked.store.v{n}{_mangled(stored)}.p0({vector}, ptr, <{n} x i1>)"] = None
        ir.lines.append(
            f"  call void @llvm.masked.store.v{n}{_mangled(stored)}.p0({vector} {value}, ptr align {_size(t)} %p, <{n} x i1> {mask})"
        )
    else:
        ir.lines.append(f"  store {vector} {value}, ptr %p, align {_size(t)}")
    return ir.finish("i32", "0")


def _horizontal(operation: str, t: str, n: int) -> str:
    """The sum, product, maximum or minimum of the lanes, in whatever order is fastest."""
    element = LLVM_TYPES[t]
    floating = element in ("float", "double")
    vector = f"<{n} x {element}>"
    ir = Ir(f"{element} @h{operation}_{t}_v{n}({vector} %x)", n)
    verb = {"sum": "add", "prod": "mul", "max": "max", "min": "min"}[operation]
    if floating and operation in ("sum", "prod"):
        function = f"llvm.vector.reduce.f{verb}.v{n}{_mangled(element)}"
        ir.declared[f"declare {element} @{function}({element}, {vector})"] = None
        start = {"sum": "-0.0", "prod": "1.0"}[operation]
        return ir.finish(element, ir.op(f"call reassoc {element} @{function}({element} {start}, {vector} %x)"))
    sign = "f" if floating else "" if operation in ("sum", "prod") else "u" if t == "uint8" else "s"
    return ir.finish(element, ir.call(element, f"llvm.vector.reduce.{sign}{verb}.v{n}{_mangled(element)}", (vector, "%x")))


def _sum_of_four(n: int) -> str:
    """The sums of the lanes of four vectors, in the four lanes of one: halves are added until each vector has one lane left."""
    operands = ", ".join(f"<{n} x float> %{v}" for v in "abcd")
    ir = Ir(f"<4 x float> @hsum4_float32_v{n}({operands})", n)

    def halves(x: str, y: str, pieces: int) -> str:
        """Both vectors hold `pieces` pieces; the halves of each piece added, those of x before those of y."""
        width = n // pieces
        low = [p * width + k for p in range(pieces) for k in range(width // 2)]
        parts = []
        for shift in (0, width // 2):
            lanes = [i + shift for i in low] + [n + i + shift for i in low]
            mask = ", ".join(f"i32 {i}" for i in lanes)
            parts.append(ir.op(f"shufflevector {ir.f} {x}, {ir.f} {y}, <{n} x i32> <{mask}>"))
        return ir.op(f"fadd {ir.f} {parts[0]}, {parts[1]}")

    total = halves(halves("%a", "%b", 1), halves("%c", "%d", 1), 2)
    width = n // 4
    while width > 1:
        width //= 2
        mask = ", ".join(f"i32 {k ^ width}" for k in range(n))
        swapped = ir.op(f"shufflevector {ir.f} {total}, {ir.f} poison, <{n} x i32> <{mask}>")
        total = ir.op(f"fadd {ir.f} {total}, {swapped}")
    mask = ", ".join(f"i32 {k * n // 4}" for k in range(4))
    return ir.finish("<4 x float>", ir.op(f"shufflevector {ir.f} {total}, {ir.f} poison, <4 x i32> <{mask}>"))


def _dot_bf16(n: int) -> str:
    """c + the products of the low halves + the products of the high halves (vdpbf16ps)."""
    ir = Ir(f"<{n} x float> @dot_bf16_v{n}(<{n} x float> %c, <{n} x i32> %a, <{n} x i32> %b)", n)
    wide = f"<{2 * n} x bfloat>"
    a, b = (ir.op(f"bitcast {ir.i} {x} to {wide}") for x in ("%a", "%b"))
    return ir.finish(ir.f, ir.call(ir.f, f"llvm.x86.avx512bf16.dpbf16ps.{n * 32}", (ir.f, "%c"), (wide, a), (wide, b)))


def _pack_bf16(n: int) -> str:
    """Two vectors of f32 rounded to bf16 and interleaved: `low` in the low halves of the result, `high` in the high ones."""
    ir = Ir(f"<{n} x i32> @pack_bf16_v{n}(<{n} x float> %low, <{n} x float> %high)", n)
    wide = f"<{2 * n} x bfloat>"
    both = ir.call(wide, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{n * 32}", (ir.f, "%high"), (ir.f, "%low"))
    order = ", ".join(f"i32 {k}, i32 {k + n}" for k in range(n))
    mixed = ir.op(f"shufflevector {wide} {both}, {wide} poison, <{2 * n} x i32> <{order}>")
    return ir.finish(ir.i, ir.op(f"bitcast {wide} {mixed} to {ir.i}"))


def _load_pair() -> str:
    ir = Ir("i32 @load_pair(ptr %p)", 1)
    return ir.finish("i32", ir.op("load i32, ptr %p, align 2, !invariant.load !0"))


NEEDS = {"sigmoid": ("exp",), "tanh": ("exp",), "store_bf16": ("round_bf16",), "mstore_bf16": ("round_bf16",)}
SIMPLE = {
    "exp2": _exp2, "exp": _exp, "tanh": _tanh, "sigmoid": _sigmoid, "round_bf16": _round_bf16, "round_f16": _round_f16,
    "bits_f16": _bits_f16, "from_bits_f16": _from_bits_f16,
}  # fmt: skip


@lru_cache(maxsize=512)
def helper_ir(cpu: Cpu, function: str) -> str:
    """The IR that defines `function`, such as `exp2_v16`, `mload_bf16_v16`, `hsum_float32_v16` or the scalar `exp2_s`."""
    stem, _, suffix = function.rpartition("_")
    operation, _, t = stem.partition("_")
    if stem == "float_int32":
        return _from_integer(1 if suffix == "s" else int(suffix[1:]))
    if operation in ("popcount", "clz"):
        return _count_bits(operation, t, 1 if suffix == "s" else int(suffix[1:]))
    if suffix == "s":
        result = {"isnan": "i32", "isinf": "i32", "isfinite": "i32", "differ": "i32", "pack_bf16": "i32", "bits_f16": "i16"}.get(
            stem, "float"
        )
        return _scalar(stem, cpu.lanes, result)
    if function == "load_pair":
        return _load_pair()
    n = int(suffix[1:])
    if stem in SIMPLE:
        return SIMPLE[stem](cpu, n)
    if stem in LIBM:
        return _libm(stem, n)
    if stem in ("isnan", "isinf", "isfinite"):
        return _test(cpu, n, stem)
    if stem == "differ":
        return _differ(n)
    if stem in ("log", "log2"):
        return _log(cpu, n, stem == "log2")
    if stem in ("dot_bf16", "pack_bf16"):
        return _dot_bf16(n) if stem == "dot_bf16" else _pack_bf16(n)
    if stem == "hsum4_float32":
        return _sum_of_four(n)
    verb, _, t = stem.partition("_")
    for lanewise in ("prefix", "last", "shift"):
        if verb.startswith(lanewise):
            return prefix_ir(lanewise, verb.removeprefix(lanewise), t, n)
    if verb in ("load", "mload"):
        return _load(t, n, verb == "mload")
    if verb in ("store", "mstore"):
        return _store(cpu, t, n, verb == "mstore")
    return _horizontal(verb[1:], t, n)


def helpers_ir(cpu: Cpu, functions: tuple[str, ...]) -> str:
    """The IR of all `functions` and of those they call, each once, declarations merged."""
    wanted: dict[str, None] = {}

    def want(function: str) -> None:
        stem, _, suffix = function.rpartition("_")
        if suffix == "s" and not stem.startswith(("popcount", "clz", "float_")):
            want(f"{stem}_v{cpu.lanes}")
        for other in NEEDS.get(stem, ()):
            want(f"{other}_{suffix}")
        wanted[function] = None

    for function in sorted(functions):
        want(function)
    declarations: dict[str, None] = {}
    definitions: list[str] = []
    for function in wanted:
        lines = helper_ir(cpu, function).splitlines()
        declarations.update(dict.fromkeys(line for line in lines if line.startswith("declare")))
        definitions.append("\n".join(line for line in lines if not line.startswith("declare")))
    return "\n".join([*declarations, *definitions, "!0 = !{}"]) + "\n"
