"""Given tensors against a cascade's declaration: the extent of every rank, or an error that names what does not fit.

Four-bit types arrive *unpacked*, one element an entry: i4 as int8 holding -8 .. 7, f4e2m1 as float8_e4m3fn holding its sixteen values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from .cascade import Cascade, Concat, Iterate, Populate, Statement, Tensor, expressions
from .coordinates import check_coordinates
from .errors import BindingError
from .expr import Const, Expr, Extent, Index, Op, Read, reads
from .types import DTYPES, DType

_TORCH: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu, "f4e2m1": torch.float8_e4m3fn,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i4": torch.int8, "bool": torch.bool,
}  # fmt: skip
_UNPACKED = ("i4", "f4e2m1")


def to_torch(dtype: DType) -> torch.dtype:
    """The torch type that holds elements of `dtype`; i4 is held in int8 and f4e2m1 in float8_e4m3fn, one element an entry."""
    return _TORCH[dtype.name]


def from_torch(dtype: torch.dtype) -> DType:
    """The element type of a torch type. Raises `BindingError` for one that einfall does not have, such as complex64."""
    for name, candidate in _TORCH.items():
        if candidate == dtype and name not in _UNPACKED:
            return DTYPES[name]
    raise BindingError(f"no element type for {dtype}", hint="one of " + ", ".join(str(t).removeprefix("torch.") for t in _TORCH.values()))


def bind_sizes(cascade: Cascade, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> dict[str, int]:
    """The extent of every rank of `cascade`, from the tensors it is called with.

    Checks presence, number of axes, element types, the one device, composed axes and that a rank has the same extent wherever it occurs.
    With `dtype` float64 a float input may also be given as float64.

    Raises:
        BindingError: naming the tensor, the axis, the rank, what was expected and what was found.
    """
    for declared in cascade.inputs:
        if declared.name not in tensors:
            raise BindingError(f"no tensor given for {declare(declared)}", cascade=cascade.name, hint=f"pass {declared.name}")
        _check_tensor(cascade, declared, tensors[declared.name], dtype)
    names = [t.name for t in cascade.inputs]
    for name in tensors:
        if name not in names:
            raise BindingError(f"'{name}' is no input", cascade=cascade.name, hint=f"the inputs are {', '.join(names) or '(none)'}")
    _check_device(cascade, tensors)
    return solve_extents(cascade, {name: tuple(tensors[name].shape) for name in names})


def solve_extents(cascade: Cascade, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The extent of every rank from the shapes of all inputs alone. Raises `BindingError` as `bind_sizes` does."""
    return _Solver(cascade, shapes).solve()


def declare(tensor: Tensor) -> str:
    """A tensor as a declaration spells it: `K[b, (n j), e]: bf16`."""
    axes = ", ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in tensor.axes)
    return f"{tensor.name}[{axes}]: {tensor.dtype}"


def _check_tensor(cascade: Cascade, declared: Tensor, given: torch.Tensor, dtype: torch.dtype | None) -> None:
    if not isinstance(given, torch.Tensor):
        raise BindingError(f"{declare(declared)} is given a {type(given).__name__}", cascade=cascade.name, hint="pass a torch tensor")
    if given.ndim != len(declared.axes):
        raise BindingError(
            f"{declare(declared)} has {len(declared.axes)} axes, found {given.ndim} in shape {list(given.shape)}", cascade=cascade.name
        )
    expected = to_torch(declared.dtype)
    if given.dtype != expected and not (dtype == torch.float64 == given.dtype and declared.dtype.is_float):
        raise BindingError(
            f"{declare(declared)} expects {expected}, found {given.dtype}",
            cascade=cascade.name,
            hint=f"declare {declared.name} as {from_torch(given.dtype)}, or convert with .to({expected})",
        )


def _check_device(cascade: Cascade, tensors: Mapping[str, torch.Tensor]) -> None:
    devices = {name: given.device for name, given in tensors.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise BindingError(f"the tensors lie on different devices: {found}", cascade=cascade.name, hint="move them to one device")


class _Solver:
    """Extents as they become known, each with where it is from, until nothing new follows."""

    def __init__(self, cascade: Cascade, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.cascade = cascade
        self.shapes = shapes
        self.known: dict[str, int] = {}
        self.source: dict[str, str] = {}

    def solve(self) -> dict[str, int]:
        for rank, size in self.cascade.static_sizes().items():
            self.learn(rank, size, f"declared {rank} = {size}")
        statements = tuple(_statements(self.cascade.body))
        before = -1
        while len(self.known) > before:
            before = len(self.known)
            self._axes()
            for declaration in self.cascade.ranks:
                self._equation(declaration.name, declaration.size, f"declared size of {declaration.name}")
            for statement in statements:
                self._statement(statement)
        unknown = [rank for rank in self.cascade.all_ranks() if rank not in self.known]
        if unknown:
            raise self._underdetermined(unknown)
        for statement in statements:
            self._check_slots(statement)
        check_coordinates(self.cascade, self.known)
        return self.known

    def _check_slots(self, statement: Statement) -> None:
        """A top-k of more elements than there are is a mistake of the caller: its slots would name elements outside of the tensor."""
        match statement:
            case Populate(rule="topk", into=into, over=over) if self.known[into] > self.known[over]:
                raise BindingError(
                    f"top-k keeps {into} = {self.known[into]} elements of rank {over}, which has extent {self.known[over]}",
                    cascade=self.cascade.name, statement=statement.values, location=statement.location,
                    hint=f"k of at most {self.known[over]}, or .sort(), which keeps all",
                )  # fmt: skip

    def learn(self, rank: str, size: int, source: str) -> None:
        """Records an extent, or raises where it contradicts what is known."""
        if rank not in self.known:
            self.known[rank] = size
            self.source[rank] = source
        elif self.known[rank] != size:
            raise BindingError(
                f"rank {rank} has extent {self.known[rank]} ({self.source[rank]}), but {source} makes it {size}",
                cascade=self.cascade.name,
                hint="the extents of a rank must agree wherever it occurs",
            )

    def _axes(self) -> None:
        for tensor in self.cascade.inputs:
            for position, (axis, extent) in enumerate(zip(tensor.axes, self.shapes[tensor.name], strict=True)):
                where = f"axis {position} of {tensor.name}"
                if len(axis) == 1:
                    self.learn(axis[0], extent, f"{where} with extent {extent}")
                else:
                    self._product(axis, extent, f"{where}, ({' '.join(axis)}) with extent {extent}")

    def _product(self, factors: tuple[str, ...], extent: int, source: str) -> None:
        """Learns the one unknown factor of a product, or checks the product."""
        unknown = [rank for rank in factors if rank not in self.known]
        rest = prod(self.known.get(rank, 1) for rank in factors)
        if not unknown and rest != extent:
            parts = " * ".join(f"{rank}={self.known[rank]}" for rank in factors)
            raise BindingError(f"{source}: expected {parts} = {rest}, found {extent}", cascade=self.cascade.name)
        if len(unknown) == 1 and rest:
            self._quotient(unknown[0], extent, rest, source)

    def _quotient(self, rank: str, extent: int, rest: int, source: str) -> None:
        if extent % rest:
            raise BindingError(
                f"{source}: no whole extent of {rank}, {extent} split into parts of {rest} leaves a remainder of {extent % rest}",
                cascade=self.cascade.name,
                hint=f"the extent must be a multiple of {rest}",
            )
        self.learn(rank, extent // rest, source)

    def _equation(self, rank: str, size: Expr, source: str) -> None:
        """Learns `rank` from its size, or the one unknown part of the size from `rank`."""
        value = self._value(size)
        if value is not None:
            self.learn(rank, value, source)
        elif rank in self.known and isinstance(size, Op) and size.name in ("mul", "add"):
            leaves = tuple(_leaves(size, size.name))
            unknown = [leaf.rank for leaf in leaves if isinstance(leaf, Extent) and leaf.rank not in self.known]
            others = [value for value in map(self._value, leaves) if value is not None]
            if len(unknown) != 1 or len(others) != len(leaves) - 1:
                return
            rest: int = prod(others)
            if size.name == "mul" and rest:
                self._quotient(unknown[0], self.known[rank], rest, source)
            elif size.name == "add" and sum(others) <= self.known[rank]:
                self.learn(unknown[0], self.known[rank] - sum(others), source)

    def _value(self, size: Expr) -> int | None:
        """A size as a number, or None while a rank in it is unknown."""
        match size:
            case Const(value=value):
                return int(value)
            case Extent(rank=rank):
                return self.known.get(rank)
            case Op(name=name, args=args):
                values = [self._value(arg) for arg in args]
                known = [value for value in values if value is not None]
                return _arithmetic(name, known) if len(known) == len(values) else None
            case _:
                return None

    def _statement(self, statement: Statement) -> None:
        """Learns the ranks that a statement makes: those of populate and concat, and ranks that only rename others."""
        match statement:
            case Populate(rule="topk", parameter=k, into=into) if k is not None:
                self._derive(into, k, f"k of {statement.values}")
            case Populate(into=into, over=over):
                self._derive(into, Extent(over), f"extent of {over} in {statement.values}")
            case Concat(rank=rank, parts=parts):
                size: Expr = Const(0)
                for piece, _ in parts:
                    size = Op("add", (size, Extent(piece)))
                self._derive(rank, size, f"concatenation {statement.out}")
            case _:
                pass
        ranks = self.cascade.tensor_ranks()
        for expression in expressions(statement):
            for read in reads(expression):
                if len(read.coords) == len(ranks.get(read.tensor, ())):  # what is malformed is named by the check of the cascade
                    self._renaming(read, ranks[read.tensor])

    def _derive(self, rank: str, size: Expr, source: str) -> None:
        value = self._value(size)
        if value is not None and self.cascade.size_of(rank) is None:
            self.learn(rank, value, source)

    def _renaming(self, read: Read, ranks: tuple[str, ...]) -> None:
        for coordinate, rank in zip(read.coords, ranks, strict=True):
            if isinstance(coordinate, Index) and coordinate.rank not in self.known and rank in self.known:
                self.learn(coordinate.rank, self.known[rank], f"rank {rank} of {read.tensor}")

    def _underdetermined(self, unknown: list[str]) -> BindingError:
        rank = unknown[0]
        for tensor in self.cascade.inputs:
            for position, axis in enumerate(tensor.axes):
                if rank in axis:
                    return BindingError(
                        f"axis {position} of {tensor.name}, ({' '.join(axis)}), does not tell the extents of {' and '.join(unknown)} apart",
                        cascade=self.cascade.name,
                        hint=f"declare the size of {unknown[-1]}",
                    )
        return BindingError(f"nothing determines the extent of rank {rank}", cascade=self.cascade.name, hint=f"declare the size of {rank}")


def _statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """Every statement, those of iterative blocks included."""
    for statement in body:
        yield statement
        if isinstance(statement, Iterate):
            yield from _statements(statement.body)


def _leaves(size: Expr, name: str) -> Iterator[Expr]:
    if isinstance(size, Op) and size.name == name:
        for arg in size.args:
            yield from _leaves(arg, name)
    else:
        yield size


def _arithmetic(name: str, values: list[int]) -> int | None:
    match name, values:
        case "add", [a, b]:
            return a + b
        case "sub", [a, b]:
            return a - b
        case "mul", [a, b]:
            return a * b
        case "floordiv", [a, b] if b:
            return a // b
        case "mod", [a, b] if b:
            return a % b
        case "minimum", [a, b]:
            return min(a, b)
        case "maximum", [a, b]:
            return max(a, b)
        case _:
            return None
