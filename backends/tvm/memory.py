"""Tensors in memory: the kernel's parameters, extents found from their shapes, element addresses, loads and stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...ir.cascade import Axis, Tensor
from ...ir.errors import UnsupportedError
from ...ir.expr import Const, Expr, Extent, Op
from ...ir.tile import TileProgram
from ...ir.types import DType
from . import script as ts
from .reach import Reach
from .script import Let, Names, Value

MEMORY_TYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "i16": "int16",
    "i8": "int8", "u8": "uint8", "bool": "bool", "i4": "int8", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
    "e8m0": "float8_e8m0fnu", "f4e2m1": "float8_e4m3fn",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor parameter. `unit` says that its last axis has stride 1."""

    name: str
    handle: str
    axes: tuple[Axis, ...]
    dtype: DType
    shape: tuple[Value, ...]
    strides: tuple[str, ...]
    unit: bool

    @property
    def ranks(self) -> tuple[str, ...]:
        """The rank of every coordinate."""
        return tuple(rank for axis in self.axes for rank in axis)

    @property
    def memory_type(self) -> str:
        return MEMORY_TYPES[self.dtype.name]

    @property
    def helper_type(self) -> str:
        """The type as the names of helpers that move it spell it: of narrow floats their own, for they are converted on the way."""
        return self.dtype.name if self.dtype.is_float and self.dtype.bits < 32 else self.memory_type

    def axis_index(self, axis: int, coords: tuple[Value, ...], extents: dict[str, Value]) -> Value:
        """The index along a memory axis from the coordinates of the ranks composed in it."""
        first = sum(len(a) for a in self.axes[:axis])
        index = coords[first]
        for offset, rank in enumerate(self.axes[axis][1:], start=1):
            index = ts.add(ts.mul(index, extents[rank]), coords[first + offset])
        return index

    def element(self, index: tuple[Value, ...]) -> Value:
        """The element at one index a memory axis."""
        text = ", ".join(i.text for i in index) if index else "()"
        return Value(f"{self.name}[{text}]", self.memory_type, index[-1].lanes if index else 1)


class Memory:
    """The parameters of one kernel and every rank's extent.

    Args:
        program: the kernel.
        names: identifiers taken so far.
        strided: tensors whose last axis need not have stride 1.
    """

    def __init__(self, program: TileProgram, names: Names, strided: frozenset[str]) -> None:
        self.extents: dict[str, Value] = {}
        self.symbols: list[str] = []
        self.derived: list[Let] = []
        self._program = program
        self._names = names
        for declaration in program.ranks:
            size = program.static_size(declaration.name)
            if size is not None:
                self.extents[declaration.name] = ts.integer(size)
        tensors = [*program.inputs, *(Tensor(o.name, o.output.axes, o.dtype) for o in program.outputs)]
        for tensor in tensors:  # plain axes name their rank's extent before composed ones are looked at
            for axis in tensor.axes:
                if len(axis) == 1 and axis[0] not in self.extents:
                    self.extents[axis[0]] = self._symbol("n", axis[0])
        self._unsolved: list[tuple[Axis, Value]] = []
        self.arrays = {t.name: self._array(t, t.name not in strided) for t in tensors}
        self._solve()
        self.reach = Reach(self._size_of)
        self.scalars = {s.name: Value(names.fresh("a", s.name), "float64" if s.dtype.bits == 64 else "float32") for s in program.scalars}

    def _size_of(self, rank: str) -> int | Expr | None:
        """An extent as far as it is known before the call."""
        known = self.extents.get(rank)
        if known is not None and known.number is not None:
            return int(known.number)
        return next((d.size for d in self._program.ranks if d.name == rank), None)

    def _symbol(self, prefix: str, wanted: str) -> Value:
        symbol = self._names.fresh(prefix, wanted)
        self.symbols.append(symbol)
        return Value(symbol, "int64")

    def _array(self, tensor: Tensor, unit: bool) -> Array:
        own = self._names.fresh(tensor.name if tensor.name not in ("T", "LL") else f"{tensor.name}_")
        shape = []
        for position, axis in enumerate(tensor.axes):
            known = [self.extents.get(rank) for rank in axis]
            if all(k is not None and k.number is not None for k in known):
                size = 1
                for k in known:
                    size *= int(k.number) if k is not None and k.number is not None else 1
                shape.append(ts.integer(size))
            elif len(axis) == 1:
                shape.append(self.extents[axis[0]])
            else:
                dim = self._symbol("d", f"{tensor.name}_{position}")
                shape.append(dim)
                self._unsolved.append((axis, dim))
        last = len(shape) - 1
        strides = tuple("T.int64(1)" if unit and i == last else self._symbol("st", f"{tensor.name}_{i}").text for i in range(len(shape)))
        return Array(own, self._names.fresh("h", tensor.name), tensor.axes, tensor.dtype, tuple(shape), strides, unit)

    def _solve(self) -> None:
        """Derives the extents that follow from composed axes and declared sizes, in whatever order they become known."""
        changed = True
        while changed:
            changed = False
            for axis, dim in self._unsolved:
                changed |= self._one_factor(axis, dim)
            for declaration in self._program.ranks:
                if declaration.name not in self.extents:
                    value = self._size(declaration.size)
                    if value is not None:
                        self._derive(declaration.name, value)
                        changed = True
                elif isinstance(declaration.size, Op) and declaration.size.name == "mul":
                    factors = tuple(n.rank for n in declaration.size.args if isinstance(n, Extent))
                    if len(factors) == len(declaration.size.args):
                        changed |= self._one_factor(factors, self.extents[declaration.name])

    def _one_factor(self, factors: tuple[str, ...], product: Value) -> bool:
        unknown = [rank for rank in factors if rank not in self.extents]
        if len(unknown) != 1:
            return False
        divisor = ts.integer(1)
        for rank in factors:
            if rank != unknown[0]:
                divisor = ts.mul(divisor, self.extents[rank])
        self._derive(unknown[0], ts.quotient(product, divisor))
        return True

    def _derive(self, rank: str, value: Value) -> None:
        if value.number is not None:
            self.extents[rank] = value
            return
        variable = self._names.fresh("n", rank)
        self.derived.append(Let(variable, Value(value.text, value.dtype)))
        self.extents[rank] = Value(variable, value.dtype)

    def _size(self, e: Expr) -> Value | None:
        match e:
            case Const(value=value):
                return ts.integer(int(value))
            case Extent(rank=rank):
                return self.extents.get(rank)
            case Op(name=name, args=(a, b)) if name in ("add", "sub", "mul", "floordiv"):
                x, y = self._size(a), self._size(b)
                if x is None or y is None:
                    return None
                return {"add": ts.add, "sub": ts.sub, "mul": ts.mul, "floordiv": ts.quotient}[name](x, y)
            case _:
                return None

    def extent(self, rank: str) -> Value:
        """The extent of `rank`. Raises `UnsupportedError` if no argument tells it."""
        if rank not in self.extents:
            raise UnsupportedError(
                f"the extent of rank {rank!r} follows from no argument", statement=self._program.name, hint="declare its size, as in w = 5"
            )
        return self.extents[rank]

    def parameters(self) -> list[str]:
        """The parameter list: tensors as handles, then scalars."""
        handles = [f"{a.handle}: T.handle" for a in self.arrays.values()]
        return handles + [f"{v.text}: T.{v.dtype}" for v in self.scalars.values()]

    def bindings(self) -> Iterator[str]:
        """The lines that declare symbols and match the parameters to buffers."""
        for symbol in self.symbols:
            yield f"{symbol} = T.int64()"
        for a in self.arrays.values():
            shape = ", ".join(s.text if s.number is None else f"T.int64({s.number})" for s in a.shape) + ("," if len(a.shape) == 1 else "")
            align = max(1, a.dtype.bits // 8)
            strides = f", strides=[{', '.join(a.strides)}]" if a.strides else ""
            yield f'{a.name} = T.match_buffer({a.handle}, ({shape}), "{a.memory_type}"{strides}, align={align}, offset_factor=1)'
