"""CUDA C helpers that emitted kernels import: arithmetic as torch has it, conversions, vectors from and to memory.

Each is named as the CPU's helpers are: `<operation>_<type>_s` for one value, `_v<n>` for n adjacent ones. TVM computes with floats as
with real numbers and takes integers for indices; it sees none of what stands here. Pointers are void: the kernel's own spelling of
64-bit integers and of narrow floats does not matter then.
"""

from __future__ import annotations

import re

from .collectives import collective_c
from .narrow import NARROW, narrow_c

C_TYPES = {
    "float32": "float", "float64": "double", "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "bool": "signed char",
}  # fmt: skip
BYTES = {"float32": 4, "float64": 8, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}
WORDS = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}
INLINE = "__device__ __forceinline__"
COMPARISONS = {"feq": "==", "fne": "!=", "flt": "<", "fle": "<=", "fgt": ">", "fge": ">="}
PLAIN = {"fadd": "+", "fsub": "-", "fmul": "*", "fdiv": "/"}
WRAPPING = {"wadd": "+", "wsub": "-", "wmul": "*"}
FUNCTIONS = ("exp", "exp2", "log", "log2", "tanh", "erf", "log1p", "sin", "cos")
_CALL = re.compile(r"\b([a-z]\w*_(?:s|v\d+))\(")


def helpers_c(functions: tuple[str, ...]) -> str:
    """The CUDA C of all `functions` and of those they call, each once, in an order in which they may stand."""
    texts: dict[str, str] = {}

    def want(function: str) -> None:
        if function in texts:
            return
        text = helper_c(function)
        for other in dict.fromkeys(_CALL.findall(text)):
            if other != function:
                want(other)
        texts[function] = text

    for function in sorted(functions):
        want(function)
    return "\n".join(texts.values())


def helper_c(function: str) -> str:
    """The definition of one helper, such as `exp2_s`, `load_bf16_v8` or `sum_float32_over_1f_of_256`."""
    if "_over_" in function:
        return collective_c(function)
    stem, _, end = function.rpartition("_")
    verb, _, t = stem.partition("_")
    if end != "s":
        return _vector(verb, t, int(end[1:]))
    if verb in ("load", "store"):
        return _scalar(verb, t)
    if verb in ("round", "bits", "from", "wrap"):
        return narrow_c(stem)
    if verb == "cast":
        return _cast(*t.split("_"))
    return _operation(verb, t)


def _operation(verb: str, t: str) -> str:
    name = f"{verb}_{t}_s" if t else f"{verb}_s"
    if verb in COMPARISONS:
        return f"{INLINE} int {name}({C_TYPES[t]} x, {C_TYPES[t]} y) {{ return x {COMPARISONS[verb]} y; }}"
    if verb in PLAIN:
        return f"{INLINE} {C_TYPES[t]} {name}({C_TYPES[t]} x, {C_TYPES[t]} y) {{ return x {PLAIN[verb]} y; }}"
    if verb in ("maximum", "minimum"):  # a NaN if either is one
        order = ">" if verb == "maximum" else "<"
        return f"{INLINE} {C_TYPES[t]} {name}({C_TYPES[t]} x, {C_TYPES[t]} y) {{ return x {order} y || x != x ? x : y; }}"
    if verb in ("root", "remainder", "quotient"):
        return _of_floats(verb, name, C_TYPES[t])
    wide = verb.endswith("64")
    plain = verb.removesuffix("64")
    c, f = ("double", "") if wide else ("float", "f")
    if plain in ("isnan", "isinf", "isfinite"):
        test = {"isnan": "x != x", "isinf": f"fabs{f}(x) == INFINITY", "isfinite": f"fabs{f}(x) < INFINITY"}[plain]
        return f"{INLINE} int {name}({c} x) {{ return {test}; }}"
    if plain == "pow":
        return f"{INLINE} {c} {name}({c} x, {c} y) {{ return pow{f}(x, y); }}"
    if plain == "sigmoid":
        return f"{INLINE} float {name}(float x) {{ return 1.0f / (1.0f + expf(-x)); }}"
    if plain in FUNCTIONS:
        return f"{INLINE} {c} {name}({c} x) {{ return {plain}{f}(x); }}"
    return _of_integers(verb, name, t)


def _of_floats(verb: str, name: str, c: str) -> str:
    """A root that is inf of -inf and 0 of -0; remainder and quotient with the divisor's sign."""
    f = "f" if c == "float" else ""
    if verb == "root":
        return f"{INLINE} {c} {name}({c} x) {{ return fabs{f}(x) == INFINITY ? ({c})INFINITY : sqrt{f}(x + ({c})0); }}"
    rest = f"{c} r = fmod{f}(x, y); bool moves = r != 0 && (r < 0) != (y < 0);"
    if verb == "remainder":
        return f"{INLINE} {c} {name}({c} x, {c} y) {{ {rest} return moves ? r + y : r; }}"
    return f"""{INLINE} {c} {name}({c} x, {c} y) {{
  {rest}
  {c} whole = (x - r) / y - (moves ? ({c})1 : ({c})0), down = floor{f}(whole);
  {c} nearest = whole - down > ({c})0.5 ? down + ({c})1 : down;
  return y == 0 ? x / y : whole != 0 ? nearest : copysign{f}(({c})0, x / y);
}}"""


def _of_integers(verb: str, name: str, t: str) -> str:
    """Integers that wrap around: sums, shifts by anything, quotients and remainders rounded down (0 where the divisor is), counts."""
    c, bits = C_TYPES[t], 8 * BYTES[t]
    unsigned = {8: "unsigned char", 16: "unsigned short", 32: "unsigned int", 64: "unsigned long long"}[bits]
    wide = "unsigned long long" if bits == 64 else "unsigned int"
    head = f"{INLINE} {c} {name}({c} x, {c} y)"
    match verb:
        case "wadd" | "wsub" | "wmul":
            return f"{head} {{ return ({c})(({wide})x {WRAPPING[verb]} ({wide})y); }}"
        case "wabs":
            return f"{INLINE} {c} {name}({c} x) {{ return x < 0 ? ({c})(({wide})0 - ({wide})x) : x; }}"
        case "shl":
            return f"{head} {{ return ({unsigned})y < {bits} ? ({c})(({wide})x << y) : ({c})0; }}"
        case "shr":
            beyond = "0" if t == "uint8" else f"x >> {bits - 1}"
            return f"{head} {{ return ({unsigned})y < {bits} ? ({c})(x >> y) : ({c})({beyond}); }}"
        case "floordiv" | "mod":
            minus = f"({c})(({wide})0 - ({wide})x)" if verb == "floordiv" else "0"
            negative = "" if t == "uint8" else f"if (y == -1) return {minus}; "
            rest = f"{c} q = ({c})(x / y), r = ({c})(x % y); bool crossed = r != 0 && (r < 0) != (y < 0);"
            result = f"({c})(q - crossed)" if verb == "floordiv" else f"({c})(crossed ? r + y : r)"
            return f"{head} {{ if (y == 0) return 0; {negative}{rest} return {result}; }}"
        case "popcount":
            return f"{INLINE} int {name}({c} x) {{ return __popc{'ll' if bits == 64 else ''}(({unsigned})x); }}"
        case "clz":
            count = "__clzll((long long)x)" if bits == 64 else f"__clz((int)({unsigned})x) - {32 - bits}"
            return f"{INLINE} int {name}({c} x) {{ return {count}; }}"
    raise AssertionError(f"no helper {name}")


def _cast(source: str, target: str) -> str:
    """As C where the value fits; integers wrap around, and a float goes to narrow ones by way of 32 bits."""
    a, b = C_TYPES[source], C_TYPES[target]
    by_way = "(int)" if source.startswith("float") and not target.startswith("float") and target != "int64" else ""
    return f"{INLINE} {b} cast_{source}_{target}_s({a} x) {{ return ({b}){by_way}x; }}"


def _element(t: str) -> tuple[str, str, str, str]:
    """Of a type in memory: its C type there and in registers, and the conversions from and to memory as prefixes of a call."""
    if t in NARROW:
        return NARROW[t], "float", f"from_bits_{t}_s", f"bits_{t}_s"
    return C_TYPES[t], C_TYPES[t], "", ""


def _scalar(verb: str, t: str) -> str:
    """One element of memory."""
    code, c, widen, narrow = _element(t)
    if verb == "load":
        return f"{INLINE} {c} load_{t}_s(const void* from) {{ return {widen}(*(const {code}*)from); }}"
    return f"{INLINE} int store_{t}_s(void* to, {c} x) {{ *({code}*)to = {narrow}(x); return 0; }}"


def _vector(verb: str, t: str, n: int) -> str:
    """n adjacent elements, in as wide words as their address allows; of the elements from `valid` on memory is not touched."""
    code, c, widen, narrow = _element(t)
    size = n * (BYTES[t] if t not in NARROW else 2 if NARROW[t].endswith("short") else 1)
    word = max(w for w in WORDS if size % w == 0)
    union = f"union {{ {WORDS[word]} words[{size // word}]; {code} codes[{n}]; }} u;"
    aligned = f"valid >= {n} && ((unsigned long long){{}} & {word - 1}) == 0"
    words, each = f"for (int i = 0; i < {size // word}; ++i)", f"for (int i = 0; i < {n}; ++i)"
    if verb == "load":
        return f"""{INLINE} int load_{t}_v{n}(void* to, const void* from, int valid) {{
  {c}* x = ({c}*)to;
  if ({aligned.format("from")}) {{
    {union}
    #pragma unroll
    {words} u.words[i] = ((const {WORDS[word]}*)from)[i];
    #pragma unroll
    {each} x[i] = {widen}(u.codes[i]);
  }} else {{
    #pragma unroll
    {each} x[i] = i < valid ? {widen}(((const {code}*)from)[i]) : ({c})0;
  }}
  return 0;
}}"""
    return f"""{INLINE} int store_{t}_v{n}(void* to, const void* from, int valid) {{
  const {c}* x = (const {c}*)from;
  if ({aligned.format("to")}) {{
    {union}
    #pragma unroll
    {each} u.codes[i] = {narrow}(x[i]);
    #pragma unroll
    {words} (({WORDS[word]}*)to)[i] = u.words[i];
  }} else {{
    #pragma unroll
    {each} if (i < valid) (({code}*)to)[i] = {narrow}(x[i]);
  }}
  return 0;
}}"""
