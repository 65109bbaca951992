"""CUDA C helpers in which the threads of a block work together: reductions and scans across some bits of the thread's index.

    <op>_<type>_over_<bits>_of_<threads>        a value of each thread -> the reduction over all threads that differ in `bits` only
    arg<op>_<type>_over_...                     (value, coordinate) of each thread, by address -> the best, the lowest coordinate of equals
    scan<op>_<type>_over_...                    a value by address -> what comes before the thread along `bits`; returns the whole

`bits` is hexadecimal. The five low bits are a warp's lanes and go by shuffles; the others through shared memory. All threads of the block
call them together, and every thread gets the same bits of the result, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterator

INLINE = "__device__ __forceinline__"
LANES = 0x1F
C_TYPES = {"float32": "float", "float64": "double", "int32": "int", "int64": "long long"}
OPERATIONS = {
    "sum": "{x} + {y}",
    "prod": "{x} * {y}",
    "max": "{x} > {y} || {x} != {x} ? {x} : {y}",  # a NaN stays one
    "min": "{x} < {y} || {x} != {x} ? {x} : {y}",
}
IDENTITIES = {
    ("max", "float32"): "-INFINITY", ("max", "float64"): "-INFINITY", ("max", "int32"): "(-2147483647 - 1)",
    ("max", "int64"): "(-9223372036854775807LL - 1)", ("min", "float32"): "INFINITY", ("min", "float64"): "INFINITY",
    ("min", "int32"): "2147483647", ("min", "int64"): "9223372036854775807LL",
}  # fmt: skip


def collective_c(function: str) -> str:
    """The definition of one of them."""
    name, t, _, bits, _, threads = function.split("_")
    mask, count = int(bits, 16), int(threads)
    if name.startswith("arg"):
        return _arg(function, name.removeprefix("arg"), C_TYPES[t], mask, count)
    if name.startswith("scan"):
        return _scan(function, name.removeprefix("scan"), t, mask, count)
    return _reduce(function, name, C_TYPES[t], mask, count)


def _combined(op: str, x: str, y: str) -> str:
    return OPERATIONS[op].format(x=x, y=y)


def _bits(mask: int) -> Iterator[int]:
    """The bits that are set, the lowest first."""
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


def _places(mask: int) -> list[int]:
    """Every number made of bits of `mask`, in rising order."""
    places = [0]
    for bit in _bits(mask):
        places += [p | bit for p in places]
    return sorted(places)


def _reduce(function: str, op: str, c: str, mask: int, threads: int) -> str:
    lines = [f"{INLINE} {c} {function}({c} x) {{"]
    if mask & LANES:
        lines.append(f"  {c} y;")
    for bit in _bits(mask & LANES):
        lines.append(f"  y = __shfl_xor_sync(0xffffffffu, x, {bit}); x = {_combined(op, 'x', 'y')};")
    high = mask & ~LANES
    if high:
        first, *rest = _places(high)
        lines += [
            f"  __shared__ {c} parts[{threads}];",
            "  __syncthreads();",
            "  parts[threadIdx.x] = x;",
            "  __syncthreads();",
            f"  int own = (int)threadIdx.x & ~{high};",
            f"  x = parts[own | {first}];",
        ]
        lines += [f"  {{ {c} z = parts[own | {place}]; x = {_combined(op, 'x', 'z')}; }}" for place in rest]
    return "\n".join([*lines, "  return x;", "}"])


def _arg(function: str, op: str, c: str, mask: int, threads: int) -> str:
    """A NaN is the best of all, as in torch."""
    symbol = ">" if op == "max" else "<"
    take = f"if (y {symbol} x || (y != y && x == x) || ((y == x || (y != y && x != x)) && j < i)) {{ x = y; i = j; }}"
    lines = [f"{INLINE} int {function}(void* value, void* place) {{", f"  {c} x = *({c}*)value, y;", "  int i = *(int*)place, j;"]
    for bit in _bits(mask & LANES):
        lines.append(f"  y = __shfl_xor_sync(0xffffffffu, x, {bit}); j = __shfl_xor_sync(0xffffffffu, i, {bit});")
        lines.append(f"  {take}")
    high = mask & ~LANES
    if high:
        lines += [
            f"  __shared__ {c} parts[{threads}];",
            f"  __shared__ int places[{threads}];",
            "  __syncthreads();",
            "  parts[threadIdx.x] = x; places[threadIdx.x] = i;",
            "  __syncthreads();",
            f"  int own = (int)threadIdx.x & ~{high};",
            "  x = parts[own]; i = places[own];",
        ]
        lines += [f"  y = parts[own | {place}]; j = places[own | {place}]; {take}" for place in _places(high)[1:]]
    return "\n".join([*lines, f"  *({c}*)value = x; *(int*)place = i;", "  return 0;", "}"])


def _scan(function: str, op: str, t: str, mask: int, threads: int) -> str:
    """`mask` is one run of bits, the digit of the thread along the scanned rank."""
    c = C_TYPES[t]
    neutral = IDENTITIES.get((op, t), {"sum": "0", "prod": "1"}.get(op, "0"))
    lanes, high = mask & LANES, mask & ~LANES
    lines = [f"{INLINE} {c} {function}(void* value) {{", f"  {c} x = *({c}*)value, y, before = {neutral}, total;"]
    lines.append(f"  int lane = (int)threadIdx.x & {lanes};")
    for bit in _bits(lanes):
        lines.append(f"  y = __shfl_up_sync(0xffffffffu, x, {bit}); if (lane >= {bit}) x = {_combined(op, 'y', 'x')};")
    if lanes:
        least = lanes & -lanes
        lines.append(f"  y = __shfl_up_sync(0xffffffffu, x, {least}); if (lane >= {least}) before = y;")
        lines.append(f"  total = __shfl_sync(0xffffffffu, x, ((int)threadIdx.x & {LANES}) | {lanes});")
    else:
        lines.append("  total = x;")
    if high:
        lines += [
            f"  __shared__ {c} parts[{threads}];",
            "  __syncthreads();",
            "  parts[threadIdx.x] = total;",
            "  __syncthreads();",
            f"  int own = (int)threadIdx.x & ~{high}, mine = (int)threadIdx.x & {high};",
            f"  {c} earlier = {neutral}; total = {neutral};",
        ]
        for place in _places(high):
            before = f"if ({place} < mine) earlier = {_combined(op, 'earlier', 'y')};"
            lines.append(f"  y = parts[own | {place}]; {before} total = {_combined(op, 'total', 'y')};")
        lines.append(f"  before = {_combined(op, 'earlier', 'before')};")
    return "\n".join([*lines, f"  *({c}*)value = before;", "  return total;", "}"])
