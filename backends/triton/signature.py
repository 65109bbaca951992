"""How an emitted Triton kernel is built and launched, as a literal in its own file: `SIGNATURE = {...}`.

Emitter, builder, launcher and interpreter agree through it, so a kernel's file is all that any of them needs. It is read as a
literal, never executed.

    parameters of the kernel  =  tensors' pointers, their strides, extents, scalars, in the order of `parameters`
    grid                      =  one axis of prod(ceil(extent / tile)) programs, or `programs` of them where it is persistent

A parameter is a *pointer* (of a tensor), a *stride* (of a memory axis of a tensor, in elements), an *extent* (of a rank) or a *scalar*.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from ...ir.errors import BindingError, BuildError
from ...ir.types import dtype as dtype_named
from ..base import Source

Kind = Literal["pointer", "stride", "extent", "scalar"]
ALIGNED = 16  # what "divisible" means to Triton: 16-byte pointers, strides and extents that are multiples of 16
FAR = 1 << 31  # elements from the first of a tensor that 32-bit offsets reach


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the kernel.

    Args:
        name: in the source.
        kind: see the module.
        of: the tensor, rank or scalar.
        axis: of a stride: the memory axis, counted from 0.
        type: Triton's spelling; `*bf16`, `i32`, `fp32`. Strides say `i32` and are `i64` in the wide variant.
    """

    name: str
    kind: Kind
    of: str
    type: str
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor: the ranks composed in each of its axes, slowest first, and its element type by its name in `ir.types`."""

    name: str
    dtype: str
    axes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One build of a kernel.

    Args:
        aligned: parameters (by name) that are divisible by 16: pointers by 16 bytes, strides and extents by 16 elements.
        wide: whether strides are 64-bit, for tensors whose last element is 2^31 or more elements from the first.
    """

    aligned: frozenset[str]
    wide: bool = False

    @property
    def name(self) -> str:
        """A short name, the same for equal variants of one kernel."""
        return ("wide_" if self.wide else "") + ("_".join(sorted(self.aligned)) or "any")


@dataclass(frozen=True, slots=True)
class Signature:
    """See the module.

    Args:
        entry: the name of the kernel function in its file.
        inputs, outputs: its tensors in order of a launch.
        scalars: run-time numbers in order, after the tensors.
        parameters: of the kernel, in order.
        sizes: the extents it is specialised to.
        grid: (rank, tile) of each grid rank, the fastest last.
        aligned: parameters that the full variant declares divisible by 16.
        warps, stages: the build options.
        persistent: whether programs loop over the tasks; then there are at most `cores` times `occupancy` of them.
        described: the tensors that are fetched by descriptors; their pointers and strides must be multiples of 16 bytes.
        fusion: whether a product and a sum may become one rounding (`enable_fp_fusion`); not where results are bits or decisions.
    """

    entry: str
    inputs: tuple[Memory, ...]
    outputs: tuple[Memory, ...]
    scalars: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    sizes: tuple[tuple[str, int], ...]
    grid: tuple[tuple[str, int], ...]
    aligned: tuple[str, ...]
    warps: int = 4
    stages: int = 1
    persistent: bool = False
    described: tuple[str, ...] = ()
    fusion: bool = True

    @property
    def tensors(self) -> tuple[Memory, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *self.outputs)

    def extents(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """The extent of every rank from the shapes of all tensors, in order. Raises `BuildError` for shapes that do not fit together."""
        known = dict(self.sizes)
        axes = [
            (t.name, axis, n) for t, shape in zip(self.tensors, shapes, strict=True) for axis, n in zip(t.axes, shape, strict=True)
        ]
        changed = True
        while changed:
            changed = False
            for _, axis, n in axes:
                unknown = [r for r in axis if r not in known]
                if len(unknown) == 1:
                    rest = prod(known[r] for r in axis if r in known)
                    known[unknown[0]] = n // rest if rest else 0
                    changed = True
        for name, axis, n in axes:
            if any(r not in known for r in axis) or prod(known[r] for r in axis) != n:
                raise BuildError(f"{name} has {n} elements along ({' '.join(axis)}), and {self.entry} knows {known}")
        return known

    def programs(self, extents: Mapping[str, int]) -> int:
        """How many tasks there are."""
        return prod(-(-extents[rank] // tile) for rank, tile in self.grid)

    def full(self) -> Variant:
        """The variant for tensors that are aligned as the kernel hopes."""
        return Variant(frozenset(self.aligned))

    def variant(self, pointers: Sequence[int], shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> Variant:
        """The build that serves tensors of these addresses (bytes), shapes and strides (elements), in order.

        It declares divisible what is so, of what the full variant declares. Raises `BindingError` for a tensor that descriptors
        cannot fetch.
        """
        extents = self.extents(shapes)
        place = {t.name: i for i, t in enumerate(self.tensors)}
        for name in self.described:
            self._check_described(self.tensors[place[name]], pointers[place[name]], shapes[place[name]], strides[place[name]])

        def number(p: Parameter) -> int:
            match p.kind:
                case "pointer":
                    return pointers[place[p.of]]
                case "stride":
                    return strides[place[p.of]][p.axis]
                case "extent":
                    return extents[p.of]
                case _:
                    return 1

        aligned = frozenset(p.name for p in self.parameters if p.name in self.aligned and number(p) % ALIGNED == 0)
        last = max((sum((n - 1) * abs(s) for n, s in zip(a, b, strict=True) if n) for a, b in zip(shapes, strides, strict=True)), default=0)
        return Variant(aligned, last >= FAR)

    def _check_described(self, t: Memory, pointer: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        """Raise `BindingError` for a tensor whose address or rows are no multiples of 16 bytes."""
        size = dtype_named(t.dtype).bytes
        odd = [i for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if n > 1 and i < len(shape) - 1 and s * size % ALIGNED]
        if pointer % ALIGNED or odd:
            start = f"starts at an address that is no multiple of {ALIGNED} bytes"
            what = start if pointer % ALIGNED else f"has a stride of {strides[odd[0]]}"
            raise BindingError(
                f"{t.name} {what}, and {self.entry} fetches it by tensor descriptors, which need multiples of {ALIGNED} bytes",
                hint=f"{t.name}.contiguous(), or a schedule without descriptors",
            )

    def types(self, variant: Variant) -> dict[str, str]:
        """Triton's type of each parameter in a variant."""
        return {p.name: "i64" if variant.wide and p.kind == "stride" else p.type for p in self.parameters}

    def to_literal(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        return {
            "entry": self.entry,
            "inputs": [(t.name, t.dtype, t.axes) for t in self.inputs],
            "outputs": [(t.name, t.dtype, t.axes) for t in self.outputs],
            "scalars": list(self.scalars),
            "parameters": [(p.name, p.kind, p.of, p.type, p.axis) for p in self.parameters],
            "sizes": dict(self.sizes),
            "grid": list(self.grid),
            "aligned": list(self.aligned),
            "warps": self.warps,
            "stages": self.stages,
            "persistent": self.persistent,
            "described": list(self.described),
            "fusion": self.fusion,
        }

    @staticmethod
    def from_literal(data: Mapping[str, Any]) -> Signature:
        """The inverse of `to_literal`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""

        def memory(entry: Any) -> Memory:
            name, dtype, axes = entry
            return Memory(str(name), str(dtype), tuple(tuple(str(r) for r in axis) for axis in axes))

        return Signature(
            entry=str(data["entry"]),
            inputs=tuple(memory(t) for t in data["inputs"]),
            outputs=tuple(memory(t) for t in data["outputs"]),
            scalars=tuple(str(s) for s in data["scalars"]),
            parameters=tuple(Parameter(str(n), k, str(of), str(t), int(a)) for n, k, of, t, a in data["parameters"]),
            sizes=tuple((str(r), int(n)) for r, n in data["sizes"].items()),
            grid=tuple((str(r), int(n)) for r, n in data["grid"]),
            aligned=tuple(str(n) for n in data["aligned"]),
            warps=int(data["warps"]),
            stages=int(data["stages"]),
            persistent=bool(data["persistent"]),
            described=tuple(str(n) for n in data.get("described", ())),
            fusion=bool(data["fusion"]),
        )


def signature_of(source: Source) -> Signature:
    """The signature that an emitted file holds. Raises `BuildError` for a file without one."""
    try:
        for node in ast.parse(source.text).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "SIGNATURE":
                return Signature.from_literal(ast.literal_eval(node.value))
    except (SyntaxError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the source of {source.entry} is no emitted kernel: {error}") from None
    raise BuildError(f"the source of {source.entry} has no SIGNATURE", hint="compile the kernel again")
