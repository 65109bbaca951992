"""What an executable is made of: kernels with their binaries, library calls, and loops over an executable of their own.

Every part is called alike, `launch(*inputs, *outputs, *scalars)`, writes its outputs and returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..backends.library import library_function, logical_view
from ..backends.registry import backend_for
from ..ir.binding import to_torch
from ..ir.cascade import Axis, Cascade, Iterate, IterState
from ..ir.expr import Const, Read
from ..ir.plan import STEP, LibraryPlan, LoopPlan
from ..ir.tile import TileProgram
from ..ir.types import DType
from ..ir.types import dtype as dtype_named
from .binding import shape_of

if TYPE_CHECKING:
    from pathlib import Path

    from ..backends.base import Artifact, Source
    from .executable import Executable

Function = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor that a kernel writes: a result of the cascade, or an intermediate that a later kernel reads."""

    name: str
    axes: tuple[Axis, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel: the tensors and scalars it takes, in order, and the extents it was specialised to."""

    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[Written, ...]
    scalars: tuple[str, ...]
    static: tuple[tuple[str, int], ...]

    @staticmethod
    def of(program: TileProgram) -> Call:
        """How `program` is called."""
        sizes = {declaration.name: program.static_size(declaration.name) for declaration in program.ranks}
        return Call(
            kernel=program.name,
            inputs=tuple(t.name for t in program.inputs),
            outputs=tuple(Written(o.name, o.output.axes, o.dtype.name) for o in program.outputs),
            scalars=tuple(s.name for s in program.scalars),
            static=tuple(sorted((rank, size) for rank, size in sizes.items() if size is not None)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Call:
        """The inverse of `to_dict`. Raises `KeyError` or `TypeError` for anything else."""
        return Call(
            kernel=str(data["kernel"]),
            inputs=tuple(str(name) for name in data["inputs"]),
            outputs=tuple(
                Written(str(o["name"]), tuple(tuple(str(r) for r in axis) for axis in o["axes"]), str(o["dtype"])) for o in data["outputs"]
            ),
            scalars=tuple(str(name) for name in data["scalars"]),
            static=tuple((str(rank), int(size)) for rank, size in data["static"]),
        )


@dataclass(frozen=True, slots=True)
class LibraryPart:
    """A statement of an executable that library calls compute: how it is called, and the statement as a cascade of its own."""

    call: Call
    cascade: Cascade

    @staticmethod
    def of(step: LibraryPlan, types: Mapping[str, DType]) -> LibraryPart:
        """The part of a plan's step; `types` gives the declared type of every tensor."""
        return LibraryPart(_call(step, types), step.cascade)

    def function(self, sizes: Mapping[str, int]) -> Function:
        """`launch(*inputs, *outputs, *scalars)` at these extents."""
        return library_function(self.cascade, sizes)


@dataclass(frozen=True, slots=True)
class LoopPart:
    """An iterative block of an executable: the block as a cascade of its own, and what computes one step."""

    call: Call
    cascade: Cascade
    body: Executable

    @staticmethod
    def of(step: LoopPlan, types: Mapping[str, DType], body: Executable) -> LoopPart:
        """The part of a plan's step; `types` gives the declared type of every tensor."""
        return LoopPart(_call(step, types), step.cascade, body)

    @property
    def block(self) -> Iterate:
        """The block itself."""
        (block,) = self.cascade.body
        assert isinstance(block, Iterate)
        return block

    def function(self, sizes: Mapping[str, int]) -> Function:
        """`launch(*inputs, *outputs, *scalars)` at these extents: steps until the block ends or stops."""
        states, names = self.block.states, [t.name for t in self.cascade.inputs]
        count = len(names), len(names) + len(states)

        def call(*given: Any) -> None:
            tensors = dict(zip(names, given[: count[0]], strict=True))
            scalars = dict(zip(self.call.scalars, given[count[1] :], strict=True))
            final = self._run(sizes, tensors, scalars, given[count[0]].device)
            for memory, output in zip(given[count[0] : count[1]], self.cascade.outputs, strict=True):
                x, ranks = final[output.name], next(s.ranks for s in states if s.name == output.name)
                logical_view(memory, output.axes, sizes).copy_(x.permute([ranks.index(r) for r in output.ranks]))

        return call

    def _run(
        self, sizes: Mapping[str, int], tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The states after the last step. Two sets of tensors take turns. Whether a block stops is asked of the device after each step."""
        block = self.block
        types = {o.name: to_torch(dtype_named(o.dtype)) for o in self.call.outputs}
        shapes = {s.name: shape_of(tuple((r,) for r in s.ranks), sizes) for s in block.states}
        now, after = ({name: torch.empty(shape, dtype=types[name], device=device) for name, shape in shapes.items()} for _ in range(2))
        for state in block.states:
            self._begin(now[state.name], state, tensors, sizes)
        step, stop = (torch.zeros((), dtype=kind, device=device) for kind in (torch.int32, torch.bool))
        numbers = {s.name: scalars[s.name] for s in self.body.cascade.scalars}
        for i in range(sizes[block.rank]):
            step.fill_(i)
            known = {**tensors, **now, STEP: step}
            results = [*after.values(), stop] if block.until is not None else list(after.values())
            self.body(*(known[t.name] for t in self.body.cascade.inputs), out=tuple(results), **numbers)
            now, after = after, now
            if block.until is not None and bool(stop):
                break
        return now

    def _begin(self, memory: torch.Tensor, state: IterState, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Fill a state with its initial value."""
        if isinstance(state.init, Const):
            memory.fill_(state.init.value)
            return
        assert isinstance(state.init, Read)
        given = next(t for t in self.cascade.inputs if t.name == state.init.tensor)
        x = logical_view(tensors[given.name], given.axes, sizes).permute([given.ranks.index(r) for r in state.ranks if r in given.ranks])
        memory.copy_(x[tuple(slice(None) if r in given.ranks else None for r in state.ranks)])


def _call(step: LibraryPlan | LoopPlan, types: Mapping[str, DType]) -> Call:
    c = step.cascade
    outputs = tuple(Written(o.name, o.axes, types[o.name].name) for o in c.outputs)
    return Call(step.name, step.inputs, outputs, tuple(s.name for s in c.scalars), ())


@dataclass(slots=True)
class Part:
    """One kernel of an executable: how it is called, its source, and its binary, in memory or in a file.

    A binary in a file is loaded when it is first called; until then the target's toolkit is not imported.
    """

    call: Call
    source: Source
    known: Mapping[str, Any] | None = None
    artifact: Artifact | None = None
    path: Path | None = None
    loaded: Function | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known of the binary. Worked out when it is asked for; where a saved one does not say, it is built once more."""
        if self.known is None:
            backend = backend_for(self.source.target)
            self.known = dict(backend.facts(self.restored()) or backend.facts(backend.build(self.source)))
        return self.known

    def restored(self) -> Artifact:
        """The binary in memory. Raises `BuildError` if its file cannot be loaded."""
        if self.artifact is None:
            if self.path is None:
                raise AssertionError("a part has an artifact or a path")
            self.artifact = backend_for(self.source.target).restore(self.path, self.source)
        return self.artifact

    def function(self, sizes: Mapping[str, int]) -> Function:
        """`launch(*inputs, *outputs, *scalars)`, whatever the extents."""
        if self.loaded is None:
            self.loaded = backend_for(self.source.target).load(self.restored())
        return self.loaded

    def binary(self, scratch: Path) -> Path:
        """A file that holds the binary; `scratch` is written if there is none yet."""
        if self.path is not None and self.path.is_file():
            return self.path
        backend_for(self.source.target).save(self.restored(), scratch)
        return scratch
