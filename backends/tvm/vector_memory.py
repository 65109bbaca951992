"""Helpers that move vectors and narrow scalars between memory and registers, masked at tails; narrow floats are converted on the way."""

from __future__ import annotations

from .llvm_ir import LLVM_TYPES, Ir, suffix
from .vector_narrow import CODES, narrow, widen

_SIZES = {"float": 4, "double": 8, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


def stored_type(t: str) -> str:
    """The element type moved through memory: narrow floats go as their codes."""
    return CODES.get(t) or LLVM_TYPES[t]


def _mask(ir: Ir, count: str = "%n") -> str:
    """Lanes below `count`."""
    first = ir.op(f"insertelement {ir.i} poison, i32 {count}, i32 0")
    splat = ir.op(f"shufflevector {ir.i} {first}, {ir.i} poison, {ir.i} zeroinitializer")
    return ir.op(f"icmp sgt {ir.i} {splat}, <{', '.join(f'i32 {k}' for k in range(ir.lanes))}>")


def _hidden(ir: Ir) -> str:
    """The count %n, made unknown to the optimizer by an assembly of no instruction."""
    return ir.op('call i32 asm "", "=r,0"(i32 %n)')


MASKS = {"load": (), "mload": ("%n",), "wload": ("%first", "%n")}


def load_ir(verb: str, t: str, n: int) -> str:
    """Elements from memory that need not be aligned. Narrow floats come as f32.

    Of `mload` lanes from `n` on are 0, of `wload` those before `first` as well.
    """
    stored = stored_type(t)
    given = "float" if t in CODES else stored
    ir = Ir("", n)
    vector = ir.kind(stored)
    counts = MASKS[verb]
    ir.lines = [f"define {ir.kind(given)} @{verb}_{t}_{suffix(n)}({', '.join(('ptr %p', *(f'i32 {c}' for c in counts)))}) alwaysinline {{"]
    if counts:
        mask = _mask(ir)
        if len(counts) > 1:
            before = ir.op(f"xor <{n} x i1> {_mask(ir, counts[0])}, <{', '.join(['i1 true'] * n)}>")
            mask = ir.op(f"and <{n} x i1> {mask}, {before}")
        source = (("ptr", f"align {_SIZES[stored]} %p"), (f"<{n} x i1>", mask), (vector, "zeroinitializer"))
        value = ir.call(vector, f"llvm.masked.load.{ir.overload(stored)}.p0", *source)
    else:
        value = ir.op(f"load {vector}, ptr %p, align {_SIZES[stored]}, !invariant.load !0")
    return ir.finish(ir.kind(given), widen(ir, t, value) if t in CODES else value)


def store_ir(t: str, n: int, masked: bool) -> str:
    """Elements to memory that need not be aligned; masked, lanes from `n` on are left alone. f32 is rounded to a narrow float."""
    stored = stored_type(t)
    ir = Ir("", n)
    vector = ir.kind(stored)
    given = ir.kind("float") if t in CODES else vector
    name = f"{'mstore' if masked else 'store'}_{t}_{suffix(n)}"
    ir.lines = [f"define i32 @{name}(ptr %p, {given} %v{', i32 %n' if masked else ''}) alwaysinline {{"]
    value = narrow(ir, t, "%v") if t in CODES else "%v"
    if masked:
        # LLVM 22 makes a masked store of one lane of 8 or 16 bits, if the mask is known, a store of 32 bits: the count is hidden from it
        mask = _mask(ir) if _SIZES[stored] >= 4 else _mask(ir, _hidden(ir))
        function = f"llvm.masked.store.{ir.overload(stored)}.p0"
        ir.declared[f"declare void @{function}({vector}, ptr, <{n} x i1>)"] = None
        ir.lines.append(f"  call void @{function}({vector} {value}, ptr align {_SIZES[stored]} %p, <{n} x i1> {mask})")
    else:
        ir.lines.append(f"  store {vector} {value}, ptr %p, align {_SIZES[stored]}")
    return ir.finish("i32", "0")


def load_pairs_ir(n: int) -> str:
    """Neighbours of 16 bits, two an i32, from memory that need not be aligned."""
    ir = Ir(f"<{n} x i32> @load_pairs_v{n}(ptr %p)", n)
    return ir.finish(ir.i, ir.op(f"load {ir.i}, ptr %p, align 2, !invariant.load !0"))


def load_pair_ir() -> str:
    """Two neighbours of 16 bits as one i32."""
    ir = Ir("i32 @load_pair(ptr %p)", 1)
    return ir.finish("i32", ir.op("load i32, ptr %p, align 2, !invariant.load !0"))
