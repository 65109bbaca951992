"""Addresses, loads and stores.

An address is a pointer of the task (64-bit), a step of the loop and a tile of 32-bit offsets. Pointer and offsets stand before the
loop; inside it only the step is added:

    k_ptr = K_ptr + i_b.to(tl.int64) * K_b
    k_off = a_p[:, None] * K_p + a_e[None, :]
    for p0 in ...:
        k = tl.load(k_ptr + p0 * K_p + k_off, ...)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ...ir.binding import to_torch
from ...ir.cascade import Axis as MemoryAxis
from ...ir.cascade import Tensor
from ...ir.expr import Const, Expr, Extent, Index, Op, Read, walk
from ...ir.infer import expression_ranks
from ...ir.reference_ops import round_f4
from ...ir.tile import TileOutput, TileProgram
from ...ir.types import DType
from . import script as ts
from .arithmetic import BYTES
from .axes import Axis as TileAxis
from .kernel import Digits, Kernel, Mask, Scope, reads_memory
from .script import Value, held_type
from .signature import Memory, Parameter

POINTERS = {
    "f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8", "i4": "i8",
    "u8": "u8", "bool": "u8", "f8e4m3": "u8", "f8e5m2": "u8", "e8m0": "u8", "f4e2m1": "u8",
}  # fmt: skip
DESCRIBED = ("float32", "float16", "bfloat16", "int8", "uint8", "int16", "int32")
BOX = 256  # lanes of an axis that one fetch can have
LOADED = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "u8": "uint8"}


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor parameter: `strides` has a value a memory axis."""

    name: str
    pointer: str
    axes: tuple[MemoryAxis, ...]
    dtype: DType
    strides: tuple[Value, ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(rank for axis in self.axes for rank in axis)

    @property
    def loaded(self) -> str:
        """The type an element is loaded in."""
        code = POINTERS[self.dtype.name]
        return LOADED.get(code, f"int{code.lstrip('iu')}")


@dataclass(slots=True)
class Address:
    """The sum of a pointer's offsets: of the task, of the loop, and one a lane; each a list of terms."""

    task: list[Value] = field(default_factory=list)
    step: list[Value] = field(default_factory=list)
    lanes: list[Value] = field(default_factory=list)
    moving: list[Value] = field(default_factory=list)
    scope: Scope | None = None


def memories(program: TileProgram) -> tuple[tuple[Memory, ...], tuple[Memory, ...]]:
    """Inputs and outputs as the signature has them."""
    inputs = tuple(Memory(t.name, t.dtype.name, t.axes) for t in program.inputs)
    outputs = tuple(Memory(o.name, o.dtype.name, o.output.axes) for o in program.outputs)
    return inputs, outputs


def arrays_of(kernel: Kernel, strided: frozenset[str]) -> dict[str, Array]:
    """The tensors of the kernel; declares the parameters of pointers and strides."""
    tensors: list[Tensor | TileOutput] = [*kernel.program.inputs, *kernel.program.outputs]
    arrays: dict[str, Array] = {}
    for t in tensors:
        pointer = kernel.names.fresh(f"{t.name}_ptr")
        kernel.parameters.append(Parameter(pointer, "pointer", t.name, f"*{POINTERS[t.dtype.name]}"))
        arrays[t.name] = Array(t.name, pointer, t.axes if isinstance(t, Tensor) else t.output.axes, t.dtype, ())
    for name, array in arrays.items():
        strides = []
        for i, axis in enumerate(array.axes):
            if i == len(array.axes) - 1 and name not in strided:
                strides.append(ts.constant(1))
                continue
            parameter = kernel.names.fresh(f"{name}_{'_'.join(axis)}")
            kernel.parameters.append(Parameter(parameter, "stride", name, "i32", i))
            strides.append(ts.scalar(parameter))
        arrays[name] = replace(array, strides=tuple(strides))
    return arrays


class MemoryAccess(Kernel):
    """Loads and stores of one kernel; `coordinate` turns what is not an index into a value."""

    arrays: dict[str, Array]
    described: set[str]

    def coordinate(self, e: Expr, digits: Digits) -> Value:
        """A coordinate as a value."""
        raise NotImplementedError

    # -- addresses -----------------------------------------------------------------------------------------------------------------

    def address(self, array: Array, coords: tuple[Expr, ...], digits: Digits, wanted: str) -> tuple[str, tuple[str, ...]]:
        """The pointers of the elements at `coords` as text, and their axes."""
        parts = Address()
        first = 0
        for axis, stride in zip(array.axes, array.strides, strict=True):
            self._along(parts, axis, coords[first : first + len(axis)], array, stride, digits)
            first += len(axis)
        outer = self.scopes[0]
        pointer = array.pointer
        for term in parts.task:
            pointer += f" + {term.wrapped(ts.PRODUCT)}"
        base = Value(pointer, "pointer", binding=ts.SUM)
        if parts.task:
            base = self.define(f"{wanted}_ptr", base, outer, ("pointer", pointer))
        lanes = self._sum(parts.lanes)
        if lanes is not None and lanes.axes:
            lanes = self.define(f"{wanted}_off", lanes, outer, ("offsets", lanes.text))
        axes = ts.union([a for v in (*parts.lanes, *parts.moving) for a in v.axes], self.order)
        text = base.text
        for term in (*parts.step, *([] if lanes is None else [lanes]), *parts.moving):
            text += f" + {term.shaped(axes).wrapped(ts.PRODUCT)}"
        return text, axes

    def _sum(self, terms: list[Value]) -> Value | None:
        total: Value | None = None
        for term in terms:
            total = term if total is None else ts.add(total, term, self.order)
        return total

    def _along(self, parts: Address, axis: MemoryAxis, coords: tuple[Expr, ...], array: Array, stride: Value, digits: Digits) -> None:
        """The terms of one memory axis, whose index is composed of the ranks in it."""
        factors = [stride]
        for rank in reversed(axis[1:]):
            factors.insert(0, ts.mul(factors[0], self.extent(rank)))
        shared = self._shared(axis, coords)
        if shared is not None:  # the lanes follow each other in memory as they are
            self._index(parts, axis[0], digits, factors[0], lanes=False)
            parts.lanes.append(ts.mul(self.lane(shared), stride, self.order))
            return
        for rank, e, factor in zip(axis, coords, factors, strict=True):
            self._term(parts, e, rank, factor, digits)

    def _shared(self, axis: MemoryAxis, coords: tuple[Expr, ...]) -> TileAxis | None:
        """The axis of tensors that is the same composition of ranks as the memory axis, all whole but the first."""
        own = self.axes.of(axis[0])
        if own is None or len(axis) < 2 or own.ranks != axis or any(e != Index(r) for e, r in zip(coords, axis, strict=True)):
            return None
        whole = all(self.extent(r).number == n for r, n in zip(axis[1:], own.sizes[1:], strict=True))
        return own if whole and all(self.start(r).number == 0 for r in axis[1:]) else None

    def _term(self, parts: Address, e: Expr, rank: str, factor: Value, digits: Digits) -> None:
        """Adds `e * factor`: sums are taken apart, so that each index goes where it belongs."""
        match e:
            case Index(rank=r):
                self._index(parts, r, digits, factor)
            case Op(name="add", args=(a, b)):
                self._term(parts, a, rank, factor, digits)
                self._term(parts, b, rank, factor, digits)
            case Op(name="sub", args=(a, Const(value=int(k)))):
                self._term(parts, a, rank, factor, digits)
                parts.task.append(ts.mul(factor, ts.constant(-k)))
            case Op(name="mul", args=(a, Const(value=int(k)))) | Op(name="mul", args=(Const(value=int(k)), a)):
                self._term(parts, a, rank, ts.mul(factor, ts.constant(k)), digits)
            case Op(name="mul", args=(a, Extent(rank=r))):
                self._term(parts, a, rank, ts.mul(factor, self.extent(r)), digits)
            case Const(value=int(k)):
                if k:
                    parts.task.append(ts.mul(factor, ts.constant(k)))
            case _:
                v = self.coordinate(e, digits)
                self._moving(parts, self._clamped(v, e, rank), e, factor)

    def _moving(self, parts: Address, v: Value, e: Expr, factor: Value) -> None:
        outer = self.scope_of(e) is self.scopes[0]
        if not v.axes:
            wide = ts.method(v, "to", "tl.int64", type="int64", dtype=v.dtype) if v.number is None else v
            (parts.task if outer else parts.step).append(ts.mul(wide, factor))
        else:
            (parts.lanes if outer else parts.moving).append(ts.mul(v, factor, self.order))

    def _clamped(self, v: Value, e: Expr, rank: str) -> Value:
        """A coordinate from memory, moved into the tensor; others are inside by the rules of the language."""
        if not reads_memory(e):
            return v
        last = ts.add(self.extent(rank), ts.constant(-1))
        low = ts.call("tl.maximum", v, ts.constant(0), order=self.order, type=v.type, dtype=v.dtype)
        clamped = ts.call("tl.minimum", low, last, order=self.order, type=v.type, dtype=v.dtype)
        return self.define(f"at_{rank}", clamped, self.scope_of(e)) if clamped.axes else clamped

    def _index(self, parts: Address, rank: str, digits: Digits, factor: Value, lanes: bool = True) -> None:
        start = self.start(rank)
        if start.number is None:
            if self.scope_of_rank(rank) is not None:
                parts.step.append(ts.mul(start, factor))
            else:
                wide = ts.method(start, "to", "tl.int64", type="int64", dtype=start.dtype)
                parts.task.append(ts.mul(wide, factor))
        elif start.number:
            parts.task.append(ts.mul(start, factor))
        if not lanes:
            return
        lane = self.local(rank, digits)
        if lane.number is not None:
            if lane.number:
                parts.task.append(ts.mul(lane, factor))
        else:
            parts.lanes.append(ts.mul(lane, factor, self.order))

    # -- loads and stores ----------------------------------------------------------------------------------------------------------

    def load(self, e: Read, digits: Digits, wanted: str) -> Value:
        """The elements at the coordinates of `e`, in the type of memory; 0 where a lane holds no element."""
        array = self.arrays[e.tensor]
        e, kept = self._unclamped(e, array)
        used = tuple((rank, digits[rank]) for rank in sorted(digits) if _mentions(e, rank))
        key = ("load", e, used)
        for scope in self.scopes:
            if key in scope.made:
                return scope.made[key]
        if self.options.descriptors and not kept:
            whole = self.fetched(e, array, digits, wanted)
            if whole is not None:
                return self.define(wanted, whole, self.scope_of(e), key)
        text, axes = self.address(array, e.coords, digits, wanted)
        scope = self.deeper(self.scope_of(e), self.scope_of_ranks(tuple(r for name in axes for r in self.axes.named(name).ranks)))
        mask = self.holds(axes)
        mask = mask.joined(Mask(tuple(self._inside(e, array, digits, kept))))
        condition, always = self.mask_text(mask, axes)
        fill = 0 if e.fill is None else code_of(e.fill.value, array.dtype)
        other = ts.number_text(fill if not isinstance(fill, bool) else int(fill))
        if condition is not None:
            text += f", mask={condition}, other={other}" + ("" if always else " if edge else None")
        clean = frozenset(axes) if e.fill is None else frozenset()
        v = Value(f"tl.load({text})", array.loaded, array.dtype, axes, clean=clean)
        return self.define(wanted, v, scope, key)

    def fetched(self, e: Read, array: Array, digits: Digits, wanted: str) -> Value | None:
        """The elements by a tensor descriptor, where they are a rectangle: two whole axes, the last one contiguous, nothing else moving.

        What lies beyond the extents, and beyond a loop's bounds, is fetched as 0.
        """
        found = self._rectangle(e, array)
        if found is None or e.fill is not None:
            return None
        (row, outer), (column, inner) = found
        base = array.pointer
        first = 0
        for axis, stride in zip(array.axes, array.strides, strict=True):
            parts = Address()
            self._along(parts, axis, e.coords[first : first + len(axis)], array, stride, digits)
            first += len(axis)
            if axis not in ((row,), (column,)):
                base += "".join(f" + {term.wrapped(ts.PRODUCT)}" for term in parts.task)
        scope = self.scope_of_rank(row)
        rows = scope.high if scope is not None and scope.high is not None else self.extent(row)
        stride = array.strides[array.axes.index((row,))]
        shape = f"[{rows.text}, {self.extent(column).text}]"
        block = f"[{', '.join(self.shape((outer, inner)))}]"
        text = f"tl.make_tensor_descriptor({base}, {shape}, [{stride.text}, 1], {block})"
        descriptor = self.define(f"{wanted}_desc", Value(text, "descriptor"), self.scopes[0], ("descriptor", text))
        self.described.add(array.name)
        axes = ts.union((outer, inner), self.order)
        loaded = Value(f"{descriptor.text}.load([{self.start(row).text}, {self.start(column).text}])", array.loaded, array.dtype, axes)
        clean = frozenset(axes) if scope is None or scope.low is None else frozenset((inner,))
        if axes != (outer, inner):
            loaded = replace(loaded, text=f"tl.trans({loaded.text})")
        return replace(loaded, clean=clean)

    def _rectangle(self, e: Read, array: Array) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """The row rank and the column rank of a read, each with its axis, if a descriptor can fetch it."""
        if array.loaded not in DESCRIBED or not array.axes or array.strides[-1].number != 1:
            return None
        moving = [(r, axis) for r, c in zip(array.ranks, e.coords, strict=True) if c == Index(r) and (axis := self.axes.of(r)) is not None]
        still = [c for r, c in zip(array.ranks, e.coords, strict=True) if r not in [rank for rank, _ in moving]]
        if len(moving) != 2 or any(self.axes_over(tuple(expression_ranks(c))) or self.scope_of(c) is not self.scopes[0] for c in still):
            return None
        (row, outer), (column, inner) = moving
        alone = (row,) in array.axes and array.axes[-1] == (column,) and outer.ranks == (row,) and inner.ranks == (column,)
        streams = self.scope_of_rank(column) is not None
        return ((row, outer.name), (column, inner.name)) if alone and not streams and max(outer.lanes, inner.lanes) <= BOX else None

    def _unclamped(self, e: Read, array: Array) -> tuple[Read, frozenset[str]]:
        """`e` without clamps that a loop's domain makes needless, and the ranks along which the domain keeps it inside.

        Outside the domain the element is not needed, so that lanes there are masked instead.
        """
        conditions = {c for scope in self.scopes[1:] if scope.loop is not None for c in scope.loop.conditions}
        coords, kept = [], set()
        for rank, c in zip(array.ranks, e.coords, strict=True):
            match c:
                case Op(name="minimum", args=(x, Op(name="sub", args=(Extent(rank=r), Const(value=1))))) if (
                    r == rank and Op("lt", (x, Extent(r))) in conditions and self.is_natural(x)
                ):
                    coords.append(x)
                    kept.add(rank)
                case _:
                    coords.append(c)
        return replace(e, coords=tuple(coords)), frozenset(kept)

    def _inside(self, e: Read, array: Array, digits: Digits, kept: frozenset[str]) -> list[Value]:
        """The tests that coordinates lie in the tensor: where they may leave it, and nothing has moved them back."""
        tests = []
        for rank, c in zip(array.ranks, e.coords, strict=True):
            if rank in kept or self._stays(c, rank) or (e.fill is None and reads_memory(c)):
                continue
            v = self.coordinate(c, digits)
            if not self.is_natural(c):
                tests.append(self.infix(">=", v, ts.constant(0)))
            tests.append(self.infix("<", v, self.extent(rank)))
        return [t for t in tests if t.number is None]

    def _stays(self, c: Expr, rank: str) -> bool:
        """Whether a coordinate lies along `rank` by what it is: the rank's own index, or a part of a composed one."""
        match c:
            case Index(rank=r):
                return r == rank or self.extents.get(r) == self.extents.get(rank)
            case Op(name="mod", args=(_, Extent(rank=r))):
                return r == rank
            case Op(name="floordiv", args=(Index(rank=r), Extent(rank=inner))):
                return self._is_product(r, rank, inner)
            case Op(name="minimum", args=(x, Op(name="sub", args=(Extent(rank=r), Const(value=1))))):
                return r == rank and self.is_natural(x)
            case Const(value=int(k)):
                n = self.extents[rank].number if rank in self.extents else None
                return n is not None and 0 <= k < n
            case _:
                return False

    def _is_product(self, rank: str, outer: str, inner: str) -> bool:
        size = next((d.size for d in self.program.ranks if d.name == rank), None)
        match size:
            case Op(name="mul", args=(Extent(rank=a), Extent(rank=b))):
                return {a, b} == {outer, inner}
            case _:
                return False

    def store(self, tensor: str, coords: tuple[Expr, ...], v: Value, digits: Digits) -> str:
        """The statement that writes `v`."""
        array = self.arrays[tensor]
        text, axes = self.address(array, coords, digits, array.name.lower())
        condition, _ = self.mask_text(self.holds(axes), axes)
        written = self.written(v, array)
        shown = self.expanded(written, axes, self.shape(axes)).text if axes and not written.axes else written.over(axes)
        return f"tl.store({text}, {shown}" + (f", mask={condition})" if condition is not None else ")")

    def written(self, v: Value, array: Array) -> Value:
        """`v` as memory holds it."""
        t = array.dtype
        if t.name in BYTES:
            return ts.method(self.encode(v, t), "to", "tl.uint8", type="uint8", dtype=t)
        rounded = v if v.dtype == t and v.type == array.loaded else self.cast(v, t)
        if t.kind == "bool":
            return self.held(self._as_tensor(rounded), "uint8")
        return rounded

    def _as_tensor(self, v: Value) -> Value:
        return replace(v, text=f"tl.full([], {v.text}, tl.{v.type})", number=None) if v.number is not None else v

    def from_memory(self, v: Value, t: DType) -> Value:
        """An element as it is computed with: narrow floats of a byte decoded, bools tested; others as they were loaded."""
        if t.name in BYTES:
            return replace(self.decode(v, t), clean=v.clean if t.name != "e8m0" else frozenset())
        if t.kind == "bool":
            return replace(self.infix("!=", v, ts.constant(0)), dtype=t, clean=v.clean)
        return replace(v, type=v.type if v.type != "int1" else held_type(t))


def code_of(value: float | int | bool, t: DType) -> float | int | bool:
    """A number as memory holds it: the code of a narrow float of a byte, any other as it is."""
    if t.name not in BYTES:
        return value
    x = torch.tensor(float(value))
    return int((round_f4(x) if t.name == "f4e2m1" else x).to(to_torch(t)).view(torch.uint8))


def _mentions(e: Expr, rank: str) -> bool:
    return any(isinstance(node, Index) and node.rank == rank for node in walk(e))
