"""A compiled cascade: kernels in launch order, bound to tensors once a signature and then only launched.

    Executable(*tensors, **scalars) -> the output, or a tuple of them

What a call is checked for (ranks, extents, types, devices, layouts) depends on the shapes, strides, types and devices of the tensors
alone. It is checked when such a signature is first seen; afterwards a call is a look-up, the allocation of the outputs, on the device
of the inputs, and the launches.
Extents that no kernel was specialised to are arguments of the launch, so one executable serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..backends.base import Binds, Layout
from ..configuration import current
from ..ir.binding import bind_sizes, to_torch
from ..ir.cascade import Cascade, expressions
from ..ir.errors import BindingError, UnsupportedError
from ..ir.expr import reads
from ..ir.tile import TileProgram
from ..ir.types import dtype as dtype_named
from ..schedules.schedule import Schedule
from .binding import arguments, given_outputs, shape_of, strided_inputs
from .devices import CPU, check_device, device_of
from .empty import ByReference, reads_an_empty_tensor
from .parts import Function, LibraryPart, LoopPart, Part
from .scalars import converter

if TYPE_CHECKING:
    from pathlib import Path

    from ..backends.base import Artifact
    from ..ir.plan import Plan
    from ..schedules.target import Target

MEMO_LIMIT = 4096  # signatures kept; a cache that grows by one key a step would otherwise never stop

T = TypeVar("T")
Tensors = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A launch with its arguments as positions: in the list of inputs, outputs and temporaries, and in that of scalars.

    `quick` is the function for tensors of the layouts that were bound, which need not be looked at again; `all` tells that it takes all
    tensors and scalars in their order.
    """

    function: Function
    quick: Function
    tensors: tuple[int, ...]
    scalars: tuple[int, ...]
    all: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """What a signature was checked to: the tensors to allocate (outputs, then temporaries) and the launches.

    `restrided` gives the stride 1 to a last axis of one element, whose stride says nothing but is checked by the kernel. `device` is
    None for the CPU.
    """

    allocated: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    outputs: int
    steps: tuple[Step, ...]
    differentiable: bool
    device: torch.device | None = None
    restrided: tuple[tuple[int, tuple[int, ...]], ...] = ()


class Executable:
    """See the module.

    Attributes:
        cascade, target, sizes: what was compiled, for which machine, and the extents of the call it was compiled for.
        schedule: the schedule of its kernels, as given or chosen.
        parts: the kernels, library calls and loops, in launch order.
        static: the extents that kernels were specialised to.
        strided: inputs whose last axis need not be contiguous.

    An `inner` one is the body of a loop, whose indices are checked with the whole cascade's.
    """

    def __init__(
        self,
        cascade: Cascade,
        target: Target,
        schedule: Schedule,
        sizes: Mapping[str, int],
        parts: Sequence[Part | LibraryPart | LoopPart],
        strided: frozenset[str] = frozenset(),
        *,
        inner: bool = False,
    ) -> None:
        self.cascade = cascade
        self.target = target
        self.schedule = schedule
        self.sizes = dict(sizes)
        self.parts = tuple(parts)
        self.strided = strided
        self.static = {rank: size for part in parts for rank, size in _static(part)}
        self._names = tuple(t.name for t in cascade.inputs)
        self._scalars = tuple(s.name for s in cascade.scalars)
        self._converters = tuple((s.name, converter(s.dtype)) for s in cascade.scalars)
        coordinates = (c for s in cascade.body for e in expressions(s) for r in reads(e) for c in r.coords)
        self._gathers = not inner and any(True for c in coordinates for _ in reads(c))
        self._memo: dict[tuple[object, ...], Bound] = {}
        self._plan: Plan | None = None
        self._programs: tuple[TileProgram, ...] | None = None

    def __call__(self, *tensors: torch.Tensor, out: Tensors | None = None, **named: Any) -> Any:
        """Run on tensors in the order of the cascade's inputs (or by name), with scalars by name.

        Returns the output, or a tuple in the order of the cascade's outputs; `out` gives the tensors to write instead.
        Raises `BindingError` naming the argument that does not fit.
        """
        try:
            key = tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors])
            bound = self._memo[key]
            scalars = [convert(named[name]) for name, convert in self._converters]
            known = len(scalars) == len(named)
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):
            known = False
        if not known:  # something is new or wrong: look closely, outside of the handler
            tensors, scalars, bound = self._bind(tensors, named)
        return self.launch(bound, tensors, scalars, out)

    def launch(self, bound: Bound, tensors: Sequence[torch.Tensor], scalars: Sequence[Any], out: Tensors | None = None) -> Any:
        """Run the kernels on tensors whose signature was bound before."""
        if bound.differentiable:
            tensors = self._detached(tensors)
        if self._gathers and current().debug:
            self._check_indices(tensors, scalars)
        slots = [*tensors]
        for i, strides in bound.restrided:
            slots[i] = slots[i].as_strided(slots[i].shape, strides)
        allocated = bound.allocated
        if out is not None:
            slots += given_outputs(self.cascade, tensors, out, allocated[: bound.outputs], bound.device or CPU)
            allocated = allocated[bound.outputs :]
        if bound.device is None:
            for shape, dtype in allocated:
                slots.append(torch.empty(shape, dtype=dtype))
        else:
            for shape, dtype in allocated:
                slots.append(torch.empty(shape, dtype=dtype, device=bound.device))
        for step in bound.steps:
            function = step.quick if out is None else step.function
            if step.all:
                function(*slots, *scalars)
            else:
                function(*[slots[i] for i in step.tensors], *[scalars[i] for i in step.scalars])
        if bound.outputs == 1:
            return slots[len(tensors)]
        return tuple(slots[len(tensors) : len(tensors) + bound.outputs])

    def bind(self, tensors: Sequence[torch.Tensor]) -> Bound:
        """Check tensors, in the order of the cascade's inputs, and remember their signature."""
        key = tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors])
        bound = self._memo.get(key)
        if bound is None:
            bound = self._checked(dict(zip(self._names, tensors, strict=True)))
            if len(self._memo) >= MEMO_LIMIT:
                self._memo.clear()
            self._memo[key] = bound
        return bound

    def fits(self, sizes: Mapping[str, int], strided: frozenset[str] = frozenset()) -> bool:
        """Whether the kernels serve these extents and layouts, that is, whether what they were specialised to is the same."""
        return strided <= self.strided and all(sizes.get(rank, size) == size for rank, size in self.static.items())

    def remember(self, plan: Plan, programs: Sequence[TileProgram]) -> None:
        """Keep what the executable was made from, which is otherwise worked out again when it is asked for."""
        self._plan, self._programs = plan, tuple(programs)

    @property
    def kernels(self) -> tuple[Part, ...]:
        """The parts that are kernels of our own, those of loops included."""
        found: list[Part] = []
        for part in self.parts:
            if isinstance(part, LoopPart):
                found.extend(part.body.kernels)
            elif isinstance(part, Part):
                found.append(part)
        return tuple(found)

    @property
    def source(self) -> str:
        """The emitted source of all kernels, in launch order."""
        return "\n\n".join(part.source.text for part in self.kernels)

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What the target's compiler made, one a kernel, in launch order."""
        return tuple(part.restored() for part in self.kernels)

    @property
    def artifact(self) -> Artifact:
        """What the target's compiler made of the only kernel, or of the last one where there are several (see `artifacts`)."""
        return self._last(self.artifacts)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the binary; by kernel where there are several."""
        parts = self.kernels
        return dict(parts[0].facts) if len(parts) == 1 else {part.call.kernel: dict(part.facts) for part in parts}

    @property
    def plan(self) -> Plan:
        """The derived plan; worked out again where the executable came from a cache or a file."""
        if self._plan is None:
            from .passes import make_plan

            self._plan = make_plan(self.cascade, self.sizes, **self.schedule.plan)
        return self._plan

    @property
    def programs(self) -> tuple[TileProgram, ...]:
        """The tile programs of the kernels, in launch order."""
        if self._programs is None:
            from .lower import lower

            self._programs = lower(self.plan, self.schedule, self.sizes, self.target)
        return self._programs

    @property
    def program(self) -> TileProgram:
        """The tile program of the only kernel, or of the last one where there are several (see `programs`)."""
        return self._last(self.programs)

    def _last(self, kernels: Sequence[T]) -> T:
        if not kernels:
            raise UnsupportedError(
                "no step of its plan is a kernel of its own", cascade=self.cascade.name, hint="exe.plan.steps says what it is made of"
            )
        return kernels[-1]

    def save(self, folder: str | Path) -> Path:
        """Write source, binaries and a manifest into `folder`, for `ef.load`. Returns the folder.

        Raises `BuildError` for a folder that holds something else or cannot be written.
        """
        from .store import save_executable

        return save_executable(self, folder)

    def __repr__(self) -> str:
        static = ", ".join(f"{rank}={size}" for rank, size in self.static.items()) or "nothing"
        kernels = ", ".join(part.call.kernel for part in self.parts)
        return f"<einfall.Executable {self.cascade.name} for {self.target.name}: {kernels}; specialised to {static}>"

    # -- the slow path: a signature seen for the first time, tensors by name, or a mistake ----------------------------------------

    def _bind(self, tensors: Sequence[Any], named: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, ...], list[float | int], Bound]:
        given, scalars = arguments(self.cascade, tensors, named)
        return given, scalars, self.bind(given)

    def _checked(self, tensors: Mapping[str, torch.Tensor]) -> Bound:
        sizes = bind_sizes(self.cascade, tensors)
        for name, tensor in tensors.items():
            self._check_kind(name, tensor)
        for rank, size in self.static.items():
            if sizes.get(rank, size) != size:
                raise BindingError(
                    f"rank {rank} has extent {sizes[rank]}, but this executable was specialised to {rank} = {size}",
                    cascade=self.cascade.name,
                    hint="call the kernel itself, which compiles again, or .compile() for these extents",
                )
        single = [(i, t) for i, t in enumerate(tensors.values()) if t.ndim and t.shape[-1] == 1 and t.stride(-1) != 1]
        restrided = tuple((i, (*t.stride()[:-1], 1)) for i, t in single)
        device = device_of(tensors.values()) if tensors else torch.device("cpu" if self.target.kind == "cpu" else "cuda")
        strides = [dict(restrided).get(i, t.stride()) for i, t in enumerate(tensors.values())]
        layouts = [(tuple(t.shape), tuple(s)) for t, s in zip(tensors.values(), strides, strict=True)]
        bound = self._steps(sizes, layouts, None if device.type == "cpu" else device)
        return replace(bound, restrided=restrided, differentiable=any(t.requires_grad for t in tensors.values()))

    def _check_kind(self, name: str, tensor: torch.Tensor) -> None:
        check_device(self.target, name, tensor, self.cascade.name)
        if name not in self.strided and name in strided_inputs({name: tensor}):
            raise BindingError(
                f"{name} has stride {tensor.stride(-1)} along its last axis, but this executable was built for contiguous rows",
                cascade=self.cascade.name,
                hint=f"call the kernel itself, which builds for such a layout, or .compile() with such a tensor, or {name}.contiguous()",
            )
        if tensor.is_neg():
            raise BindingError(f"{name} is a lazily negated view", cascade=self.cascade.name, hint=f"{name}.resolve_neg()")

    def _check_indices(self, tensors: Sequence[torch.Tensor], scalars: Sequence[Any]) -> None:
        """Under the debug setting: raise `BindingError` for a gathered index outside its tensor, as the reference does."""
        from ..ir.reference import evaluate

        evaluate(self.cascade, dict(zip(self._names, tensors, strict=True)), dict(zip(self._scalars, scalars, strict=True)))

    def _steps(self, sizes: Mapping[str, int], layouts: Sequence[Layout], device: torch.device | None) -> Bound:
        """The launches for inputs of these shapes and strides; what is allocated for them is contiguous."""
        sizes = {**self.static, **sizes}  # ranks that the plan made, such as that of a stream's stretches, have constant extents
        calls = [part.call for part in self.parts]
        written = {o.name: o for call in calls for o in call.outputs}
        results = [o.name for o in self.cascade.outputs]
        temporaries = [name for name in written if name not in results]
        slot = {name: i for i, name in enumerate((*self._names, *results, *temporaries))}
        allocated = tuple(
            (shape_of(written[name].axes, sizes), to_torch(dtype_named(written[name].dtype))) for name in (*results, *temporaries)
        )
        if reads_an_empty_tensor(self.cascade, sizes):
            whole = ByReference(self.cascade)
            step = Step(whole, whole, tuple(range(len(self._names) + len(results))), tuple(range(len(self._scalars))), not temporaries)
            return Bound(allocated, len(results), (step,), False, device)
        known = [*layouts, *((shape, contiguous(shape)) for shape, _ in allocated)]
        steps = []
        for part in self.parts:
            if any(size == 0 for o in part.call.outputs for size in shape_of(o.axes, sizes)):
                continue  # nothing to write, nothing to launch
            function = part.function(sizes)
            tensors = tuple(slot[name] for name in (*part.call.inputs, *(o.name for o in part.call.outputs)))
            scalars = tuple(self._scalars.index(name) for name in part.call.scalars)
            quick = function.bound([known[i] for i in tensors]) if isinstance(function, Binds) and device is not None else function
            everything = tensors == tuple(range(len(slot))) and scalars == tuple(range(len(self._scalars)))
            steps.append(Step(function, quick, tensors, scalars, everything))
        return Bound(allocated, len(results), tuple(steps), False, device)

    def _detached(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if torch.is_grad_enabled():
            names = [name for name, t in zip(self._names, tensors, strict=True) if t.requires_grad]
            raise UnsupportedError(
                f"{' and '.join(names)} require{'s' if len(names) == 1 else ''} a gradient, and kernels have no backward yet",
                cascade=self.cascade.name,
                hint="call it under torch.no_grad(), or pass .detach()ed tensors",
            )
        return [t.detach() for t in tensors]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that `torch.empty` makes."""
    return torch.empty(shape, device="meta").stride()


def _static(part: Part | LibraryPart | LoopPart) -> Iterable[tuple[str, int]]:
    return part.body.static.items() if isinstance(part, LoopPart) else part.call.static
