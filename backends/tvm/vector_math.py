"""LLVM IR helpers that emitted kernels import: vector mathematics, masked memory, horizontal reductions, the bf16 dot.

Each helper is a function of the vector width, named `<operation>_v<lanes>` or `<operation>_<type>_v<lanes>`. Where AVX-512 has an
instruction it is used; otherwise plain LLVM IR does the same, so the emitted kernel reads alike on every processor.
exp2 of degree 5: relative error 1.4e-7, exactly 0 for -inf; the scalar forms compute one lane of a vector.
"""

from __future__ import annotations

import math
from functools import lru_cache

from .cpu import Cpu
from .llvm_ir import LLVM_TYPES, MANGLED, Ir
from .vector_floats import FLOATS, LIBM, TESTS, float_ir, libm_ir, test_ir
from .vector_integers import INTEGER, cast_ir, count_ir, integer_ir, wrap_nibble_ir
from .vector_memory import load_ir, load_pair_ir, load_pairs_ir, store_ir
from .vector_narrow import convert_ir, nibble_ir
from .vector_scans import prefix_ir

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
    signed = ir.call(f, f"llvm.copysign.v{n}f32", (f, near), (f, "%x"))  # -0 * 0 + -0 may be computed as 0
    return ir.finish(f, ir.select(ir.op(f"fcmp olt {f} {size}, {ir.real(0.625)}"), signed, far))


def _sigmoid(cpu: Cpu, n: int) -> str:
    ir = Ir(f"<{n} x float> @sigmoid_v{n}(<{n} x float> %x)", n)
    f = ir.f
    power = ir.call(f, f"exp_v{n}", (f, ir.op(f"fneg {f} %x")))
    ir.declared.clear()
    return ir.finish(f, ir.op(f"fdiv {f} {ir.real(1.0)}, {ir.op(f'fadd {f} {power}, {ir.real(1.0)}')}"))


def _scalar(function: str, n: int, result: str = "float") -> str:
    """The one-element form of a vector helper."""
    arity = 2 if function == "pack_bf16" else 1
    operands = ("%x", "%y")[:arity]
    ir = Ir(f"{result} @{function}_s({', '.join(f'float {x}' for x in operands)})", n)
    vectors = [(ir.f, ir.op(f"insertelement {ir.f} zeroinitializer, float {x}, i32 0")) for x in operands]
    value = ir.op(f"call <{n} x {result}> @{function}_v{n}({', '.join(f'{t} {v}' for t, v in vectors)})")
    return ir.finish(result, ir.op(f"extractelement <{n} x {result}> {value}, i32 0"))


def _horizontal(operation: str, t: str, n: int) -> str:
    """The sum, product, maximum or minimum of the lanes, in whatever order is fastest."""
    element = LLVM_TYPES[t]
    floating = element in ("float", "double")
    vector = f"<{n} x {element}>"
    ir = Ir(f"{element} @h{operation}_{t}_v{n}({vector} %x)", n)
    verb = {"sum": "add", "prod": "mul", "max": "max", "min": "min"}[operation]
    if floating and operation in ("sum", "prod"):
        function = f"llvm.vector.reduce.f{verb}.v{n}{MANGLED.get(element, element)}"
        ir.declared[f"declare {element} @{function}({element}, {vector})"] = None
        start = {"sum": "-0.0", "prod": "1.0"}[operation]
        return ir.finish(element, ir.op(f"call reassoc {element} @{function}({element} {start}, {vector} %x)"))
    sign = "f" if floating else "" if operation in ("sum", "prod") else "u" if t == "uint8" else "s"
    return ir.finish(element, ir.call(element, f"llvm.vector.reduce.{sign}{verb}.v{n}{MANGLED.get(element, element)}", (vector, "%x")))


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


def _join_bf16(n: int) -> str:
    """Two vectors of f32 rounded to bf16, one after the other as they would lie in memory."""
    ir = Ir(f"<{n} x i32> @join_bf16_v{n}(<{n} x float> %low, <{n} x float> %high)", n)
    wide = f"<{2 * n} x bfloat>"
    both = ir.call(wide, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{n * 32}", (ir.f, "%high"), (ir.f, "%low"))
    return ir.finish(ir.i, ir.op(f"bitcast {wide} {both} to {ir.i}"))


def _pack_bf16(n: int) -> str:
    """Two vectors of f32 rounded to bf16 and interleaved: `low` in the low halves of the result, `high` in the high ones."""
    ir = Ir(f"<{n} x i32> @pack_bf16_v{n}(<{n} x float> %low, <{n} x float> %high)", n)
    wide = f"<{2 * n} x bfloat>"
    both = ir.call(wide, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{n * 32}", (ir.f, "%high"), (ir.f, "%low"))
    order = ", ".join(f"i32 {k}, i32 {k + n}" for k in range(n))
    mixed = ir.op(f"shufflevector {wide} {both}, {wide} poison, <{2 * n} x i32> <{order}>")
    return ir.finish(ir.i, ir.op(f"bitcast {wide} {mixed} to {ir.i}"))


NEEDS = {"sigmoid": ("exp",), "tanh": ("exp",)}
PAIRED = {"dot_bf16": _dot_bf16, "join_bf16": _join_bf16, "pack_bf16": _pack_bf16}
SIMPLE = {"exp2": _exp2, "exp": _exp, "tanh": _tanh, "sigmoid": _sigmoid}


@lru_cache(maxsize=512)
def helper_ir(cpu: Cpu, function: str) -> str:
    """The IR that defines `function`, such as `exp2_v16`, `mload_bf16_v16`, `hsum_float32_v16` or the scalar `exp2_s`."""
    if function == "load_pair":
        return load_pair_ir()
    stem, _, end = function.rpartition("_")
    n = 1 if end == "s" else int(end[1:])
    if stem == "load_pairs":
        return load_pairs_ir(n)
    of_any_width = _of_any_width(stem, n)
    if of_any_width is not None:
        return of_any_width
    if end == "s":
        return _scalar(stem, cpu.lanes, "i32" if stem == "pack_bf16" else "float")
    if stem in SIMPLE:
        return SIMPLE[stem](cpu, n)
    if stem in ("log", "log2"):
        return _log(cpu, n, stem == "log2")
    if stem in PAIRED:
        return PAIRED[stem](n)
    if stem == "hsum4_float32":
        return _sum_of_four(n)
    verb, _, t = stem.partition("_")
    for lanewise in ("prefix", "last", "shift"):
        if verb.startswith(lanewise):
            return prefix_ir(lanewise, verb.removeprefix(lanewise), t, n)
    return _horizontal(verb[1:], t, n)


def _of_any_width(stem: str, n: int) -> str | None:
    """The helpers whose scalar form is no lane of a vector: memory, conversions, integers."""
    verb, _, t = stem.partition("_")
    match verb:
        case "load" | "mload" | "wload":
            return load_ir(verb, t, n)
        case "store" | "mstore":
            return store_ir(t, n, verb == "mstore")
        case "cast":
            source, _, target = t.partition("_")
            return cast_ir(source, target, n)
        case "popcount" | "clz":
            return count_ir(verb, t, n)
        case "wrap":
            return wrap_nibble_ir(n)
        case "round" | "bits" | "from":
            name = t.removeprefix("bits_")
            return nibble_ir(verb, n) if name == "nibble" else convert_ir("from_bits" if verb == "from" else verb, name, n)
        case _ if verb in FLOATS:
            return float_ir(verb, t, n)
        case _ if verb in LIBM:
            return libm_ir(verb, n)
        case _ if verb.removesuffix("64") in TESTS:
            return test_ir(verb, n)
        case _:
            return integer_ir(verb, t, n) if verb in INTEGER else None


def helpers_ir(cpu: Cpu, functions: tuple[str, ...]) -> str:
    """The IR of all `functions` and of those they call, each once, declarations merged."""
    wanted: dict[str, None] = {}

    def want(function: str) -> None:
        stem, _, end = function.rpartition("_")
        if end == "s" and _of_any_width(stem, 1) is None:
            want(f"{stem}_v{cpu.lanes}")
        for other in NEEDS.get(stem, ()):
            want(f"{other}_{end}")
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
