"""A built kernel as a function of tensors: `load(artifact)(*inputs, *outputs, *scalars)`.

What a call needs but its addresses and numbers (the build that serves it, the grid, strides, extents) depends on shapes, strides,
alignment and device alone. It is worked out and packed once, in a *plan*; a repeated call writes pointers and scalars into the plan's
memory and launches, on PyTorch's current stream of the tensors' device. Nothing is allocated, copied or waited for, so that calls can be
captured in a CUDA graph once the plan is made. Each thread has memory of its own.

    parameters of the binary  =  those of the signature, then the scratch pointers that this version of Triton appends

How many parameters there are, how wide each is, and how many threads a block has, is read from the PTX. **This launcher has been
tested against a driver library of the tests' own, and has not run on a device yet.**
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...ir.errors import BindingError, BuildError, EinfallError, UnsupportedError
from ..base import Artifact, Layout
from . import driver as cuda
from .signature import ALIGNED, Memory, Parameter, Signature, Variant

if TYPE_CHECKING:
    import torch

    from .build import Builds, Built

PLAN_LIMIT = 4096  # layouts of tensors that a kernel keeps plans for
MOST_PROGRAMS = (1 << 31) - 1  # of the first axis of a grid
SLOT = 8  # bytes of memory that each parameter has
FORMS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<rest>[^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+\.[a-z](?P<bits>\d+)\b")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(?P<sizes>\d+(?:\s*,\s*\d+)*)")
_ARCHITECTURE = re.compile(r"\.target\s+sm_(?P<number>\d+)(?P<suffix>[a-z]?)")


@dataclass(frozen=True, slots=True)
class Entry:
    """What the PTX of a kernel says: its name, the bytes of each parameter, the threads of a block, and the GPU it is for.

    `exact` tells that the code runs on that capability alone.
    """

    name: str
    parameters: tuple[int, ...]
    threads: int
    capability: tuple[int, int]
    exact: bool

    @staticmethod
    def of(ptx: str, name: str, warps: int) -> Entry:
        """The entry of that name. Raises `BuildError` for a text that has none."""
        architecture = _ARCHITECTURE.search(ptx)
        for found in _ENTRY.finditer(ptx):
            if found["name"] == name and architecture is not None:
                sizes = tuple(int(m["bits"]) // 8 for m in _PARAMETER.finditer(found["parameters"]))
                threads = _THREADS.search(found["rest"])
                count = 32 * warps
                if threads is not None:
                    count = 1
                    for size in threads["sizes"].split(","):
                        count *= int(size)
                number = int(architecture["number"])
                return Entry(name, sizes, count, divmod(number, 10), bool(architecture["suffix"]))
        raise BuildError(f"the PTX of {name} has no such entry", hint="compile the kernel again")


@dataclass(frozen=True, slots=True)
class Runtime:
    """What PyTorch knows: the current device of this thread, the current stream of a device, and memory on a device."""

    current_device: Callable[[], int]
    current_stream: Callable[[int], int]
    allocate: Callable[[int, int], Any]


def torch_runtime() -> Runtime:
    """PyTorch's own. Raises `UnsupportedError` for a PyTorch without CUDA."""
    import torch

    if torch.version.cuda is None or not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        raise UnsupportedError(
            f"this PyTorch ({torch.__version__}) is built without CUDA", hint="install one that is: pytorch.org/get-started says how"
        )
    return Runtime(
        torch._C._cuda_getDevice,
        torch._C._cuda_getCurrentRawStream,
        lambda size, device: torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device)),
    )


def load(artifact: Artifact) -> Launcher:
    """The kernel as a function of tensors. Driver and GPU are looked for when it is first called.

    Raises `UnsupportedError` for a target that kernels are only built for.
    """
    target = artifact.source.target
    if target.kind != "cuda":
        raise UnsupportedError(
            f"kernels for {target.name} are built ahead of time only; this version launches on CUDA devices",
            hint="exe.save(folder) writes the binary for a launcher of your own; or a target cuda:...",
        )
    return Launcher(artifact.module)


class Launcher:
    """See the module.

    Attributes:
        signature: of the kernel.
        count: its tensors.
        aligned: the positions of those whose address the full build takes to be a multiple of 16.
        lock: held while a plan is made.
    """

    def __init__(self, builds: Builds) -> None:
        signature = self.signature = builds.signature
        self._builds = builds
        pointers = {p.of for p in signature.parameters if p.kind == "pointer" and p.name in signature.aligned}
        self.count = len(signature.tensors)
        self.aligned = tuple(i for i, t in enumerate(signature.tensors) if t.name in pointers)
        self.lock = threading.RLock()
        self._bound: dict[tuple[Layout, ...], Bound] = {}
        self._loaded: dict[tuple[int, Variant], tuple[cuda.Function, Entry, Built]] = {}

    def __call__(self, *given: Any) -> None:
        """Launch on tensors of one device, in order, then the scalars. Returns before the kernel has run."""
        tensors = given[: self.count]
        self.bound(tuple([(tuple(t.shape), t.stride()) for t in tensors]))(*given)

    def bound(self, layouts: Sequence[Layout]) -> Bound:
        """The same for tensors of these shapes and strides alone, which are not looked at again."""
        key = tuple(layouts)
        found = self._bound.get(key)
        if found is None:
            with self.lock:
                if len(self._bound) >= PLAN_LIMIT:
                    self._bound.clear()
                found = self._bound.setdefault(key, Bound(self, key))
        return found

    def plan(self, layouts: Sequence[Layout], tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> Plan | None:
        """How tensors like these are launched; None where there is nothing to do."""
        signature = self.signature
        device = self._device(tensors)
        shapes = [shape for shape, _ in layouts]
        # the stride of an axis of one element leads nowhere, whatever it says
        strides = [tuple(s if n > 1 else 0 for n, s in zip(*layout, strict=True)) for layout in layouts]
        extents = signature.extents(shapes)
        programs = signature.programs(extents)
        if programs == 0:
            return None
        variant = signature.variant(pointers, shapes, strides)
        driver, runtime = cuda.load_driver(), torch_runtime()
        function, entry, built = self._load(driver, device, variant, pointers)
        if signature.persistent:
            programs = min(programs, driver.blocks_at_once(function, entry.threads, built.shared, device))
        if programs > MOST_PROGRAMS:
            raise UnsupportedError(f"{signature.entry} would have {programs} programs, more than {MOST_PROGRAMS}", hint="larger tiles")
        fixed = {p.name: _fixed(p, signature, extents, strides) for p in signature.parameters if p.kind in ("stride", "extent")}
        memory = Places.of(signature, variant, entry, fixed)
        scratch = int(built.metadata.get("global_scratch_size") or 0) * programs
        call = (ctypes.c_void_p(function.handle), programs, entry.threads, built.shared)
        return Plan(signature, driver, runtime, device, memory, call, scratch)

    def _device(self, tensors: Sequence[torch.Tensor]) -> int:
        devices = {t.name: x.get_device() for t, x in zip(self.signature.tensors, tensors, strict=True)}
        if len(set(devices.values())) != 1 or -1 in devices.values():
            places = ", ".join(f"{name} on {x.device}" for name, x in zip(devices, tensors, strict=True))
            raise BindingError(f"{self.signature.entry} takes tensors of one CUDA device: {places}", hint="move them to one device")
        return next(iter(devices.values()))

    def _load(self, driver: cuda.Driver, device: int, variant: Variant, pointers: Sequence[int]) -> tuple[cuda.Function, Entry, Built]:
        """The build for a variant, in the context of a device."""
        key = (device, variant)
        if key not in self._loaded:
            built = self._build(variant, pointers)
            entry = Entry.of(built.assembly, built.name, built.warps)
            for option in ("num_ctas", "launch_cooperative_grid", "launch_pdl"):
                if int(built.metadata.get(option) or 0) > (option == "num_ctas"):
                    raise UnsupportedError(f"{entry.name} was built with {option}, which this launcher does not know", hint="build without")
            code = _code(entry, built, driver.capability(device))
            self._loaded[key] = driver.function(code, entry.name, device, built.shared), entry, built
        return self._loaded[key]

    def _build(self, variant: Variant, pointers: Sequence[int]) -> Built:
        try:
            return self._builds.get(variant)
        except EinfallError as error:
            if variant == self.signature.full():
                raise
            name = next((self.signature.tensors[i].name for i in self.aligned if pointers[i] % ALIGNED), None)
            what = "strides beyond 32 bits" if variant.wide else f"{name} at an address" if name else "extents or strides"
            how = "" if variant.wide else f" that {'is' if name else 'are'} no multiple of {ALIGNED}"
            hint = f"{name}.clone(), which is aligned" if name and not variant.wide else "smaller tensors, or contiguous ones"
            raise UnsupportedError(
                f"{self.signature.entry} is called with {what}{how}, and the build for that failed: {error.what}", hint=hint
            ) from error


class Bound:
    """A launcher for tensors of some shapes and strides; what is left to look at is their device and their alignment."""

    __slots__ = ("_aligned", "_count", "_launcher", "_layouts", "_plans")

    def __init__(self, launcher: Launcher, layouts: tuple[Layout, ...]) -> None:
        self._launcher, self._layouts = launcher, layouts
        self._count, self._aligned = launcher.count, launcher.aligned
        self._plans: dict[tuple[int, tuple[int, ...]], Plan | None] = {}

    def __call__(self, *given: Any) -> None:
        tensors = given[: self._count]
        pointers = [t.data_ptr() for t in tensors]
        low = 0
        for i in self._aligned:
            low |= pointers[i]
        apart = () if low % ALIGNED == 0 else tuple(i for i in self._aligned if pointers[i] % ALIGNED)
        key = tensors[0].get_device(), apart
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._made(key, tensors, pointers)
        if plan is not None:
            plan(pointers, given[self._count :])

    def _made(self, key: tuple[int, tuple[int, ...]], tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> Plan | None:
        with self._launcher.lock:
            if key not in self._plans:
                self._plans[key] = self._launcher.plan(self._layouts, tensors, pointers)
            return self._plans[key]

    def prepared(self, *given: Any) -> Callable[[], int]:
        """The driver's launch with these arguments and nothing beside it: what a call is measured against. Launches once."""
        self(*given)
        tensors = given[: self._count]
        plans = [plan for plan in self._plans.values() if plan is not None]
        return plans[-1].prepared([t.data_ptr() for t in tensors], given[self._count :])


def _code(entry: Entry, build: Built, capability: tuple[int, int]) -> bytes:
    """What a device of this capability can load: the binary for its own generation, else the PTX, which its driver translates."""
    have, built = "sm_{}{}".format(*capability), "sm_{}{}".format(*entry.capability)
    if capability == entry.capability:
        return build.code
    if entry.exact or capability < entry.capability:
        raise UnsupportedError(f"{entry.name} was built for {built}, and this GPU is {have}", hint=f"target cuda:{have}, or an older one")
    return build.code if capability[0] == entry.capability[0] else build.assembly.encode()


def _fixed(p: Parameter, signature: Signature, extents: Mapping[str, int], strides: Sequence[Sequence[int]]) -> int:
    """The value of a stride or an extent."""
    if p.kind == "extent":
        return extents[p.of]
    return strides[_position(signature.tensors, p.of)][p.axis]


def _position(tensors: Sequence[Memory], name: str) -> int:
    return next(i for i, t in enumerate(tensors) if t.name == name)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parameters of a kernel lie in memory, a slot of 8 bytes each: what changes from call to call first, then the rest.

    Args:
        changing: the struct of pointers, scalars and scratch pointers.
        fixed: the bytes of strides and extents, which follow it.
        slots: for each parameter of the binary, the slot that holds it.
    """

    changing: struct.Struct
    fixed: bytes
    slots: tuple[int, ...]

    @staticmethod
    def of(signature: Signature, variant: Variant, entry: Entry, fixed: Mapping[str, int]) -> Places:
        """The layout for a build. Raises `BuildError` where the PTX takes something else, `BindingError` for a number that does not fit."""
        types = signature.types(variant)
        extra = len(entry.parameters) - len(signature.parameters)
        if extra not in (0, 1, 2):
            raise BuildError(
                f"{entry.name} takes {len(entry.parameters)} parameters, and its signature has {len(signature.parameters)}",
                hint="compile the kernel again",
            )
        numbers = {p.of: _form(types[p.name], p) for p in signature.parameters if p.kind == "scalar"}
        changing = ["Q"] * len(signature.tensors) + [numbers.get(s, "f") for s in signature.scalars] + ["Q"] * extra
        places = {t.name: i for i, t in enumerate(signature.tensors)}
        scalars = {s: len(places) + i for i, s in enumerate(signature.scalars)}
        slots, rest = [], b""
        for p, size in zip(signature.parameters, entry.parameters, strict=False):
            form = "Q" if p.kind == "pointer" else _form(types[p.name], p)
            if struct.calcsize("=" + form) != size:
                raise BuildError(f"{p.name} of {entry.name} has {size} bytes in the PTX, and is {types[p.name]} in its signature")
            if p.kind in ("pointer", "scalar"):
                slots.append(places[p.of] if p.kind == "pointer" else scalars[p.of])
                continue
            slots.append(len(changing) + len(rest) // SLOT)
            try:
                rest += struct.pack("=" + _slot(form), fixed[p.name])
            except struct.error:
                what = f"the {p.kind} of {p.of} is {fixed[p.name]}, more than {entry.name} can count"
                raise BindingError(what, hint="smaller tensors") from None
        slots += range(len(changing) - extra, len(changing))
        return Places(struct.Struct("=" + "".join(_slot(form) for form in changing)), rest, tuple(slots))


def _form(type_name: str, p: Parameter) -> str:
    if type_name not in FORMS:
        raise BuildError(f"{p.name} is of type {type_name}, which a launch cannot pass", hint="one of " + ", ".join(FORMS))
    return FORMS[type_name]


def _slot(form: str) -> str:
    return f"{form}{SLOT - struct.calcsize('=' + form)}x"


class Frame:
    """The memory of a launch, that of one thread: values, the addresses of the parameters, and the arguments of the driver's call."""

    __slots__ = ("arguments", "memory", "parameters", "stream")

    def __init__(self, layout: Places, call: tuple[Any, int, int, int]) -> None:
        function, programs, threads, shared = call
        size = layout.changing.size + len(layout.fixed)
        self.memory = (ctypes.c_uint64 * max(size // SLOT, 1))()
        struct.pack_into(f"{len(layout.fixed)}s", self.memory, layout.changing.size, layout.fixed)
        start = ctypes.addressof(self.memory)
        self.parameters = (ctypes.c_void_p * max(len(layout.slots), 1))(*(start + SLOT * slot for slot in layout.slots))
        self.stream = ctypes.c_void_p()
        one = ctypes.c_uint(1)
        grid, block = (ctypes.c_uint(programs), one, one), (ctypes.c_uint(threads), one, one)
        self.arguments = (function, *grid, *block, ctypes.c_uint(shared), self.stream, self.parameters, None)


class Plan:
    """How tensors of some shapes, strides and alignment on one device are launched: everything but pointers and scalars."""

    __slots__ = ("_call", "_device", "_driver", "_extra", "_frames", "_launch", "_layout", "_pack", "_runtime", "_scratch", "_signature")

    def __init__(
        self,
        signature: Signature,
        driver: cuda.Driver,
        runtime: Runtime,
        device: int,
        layout: Places,
        call: tuple[Any, int, int, int],
        scratch: int,
    ) -> None:
        self._signature, self._driver, self._runtime, self._device, self._layout = signature, driver, runtime, device, layout
        self._call, self._scratch = call, scratch
        self._launch, self._pack = driver.launch, layout.changing.pack_into
        self._extra = (0,) * (len(layout.slots) - len(signature.parameters))
        self._frames = threading.local()

    def __call__(self, pointers: Sequence[int], scalars: Sequence[float]) -> None:
        try:
            frame = self._frames.frame
        except AttributeError:
            frame = self._new_frame()
        extra = self._extra
        if self._scratch:  # memory of the caching allocator: safe in graphs, and free for the stream's next user after the launch
            scratch = self._runtime.allocate(self._scratch, self._device)
            extra = (scratch.data_ptr(), *extra[1:])
        try:
            self._pack(frame.memory, 0, *pointers, *scalars, *extra)
        except (struct.error, OverflowError):
            raise self._misfit(scalars) from None
        device = self._device
        frame.stream.value = self._runtime.current_stream(device)
        if self._runtime.current_device() == device:
            result = self._launch(*frame.arguments)
        else:
            with self._driver.within(device):
                result = self._launch(*frame.arguments)
        if result:
            self._driver.check(result, f"the launch of {self._signature.entry}")

    def prepared(self, pointers: Sequence[int], scalars: Sequence[float]) -> Callable[[], int]:
        """The driver's launch alone, on what is the current stream now."""
        frame = Frame(self._layout, self._call)
        self._pack(frame.memory, 0, *pointers, *scalars, *self._extra)
        frame.stream.value = self._runtime.current_stream(self._device)
        launch = self._launch
        return lambda: launch(*frame.arguments)

    def _new_frame(self) -> Frame:
        self._driver.ensure_context(self._device)
        frame = self._frames.frame = Frame(self._layout, self._call)
        return frame

    def _misfit(self, scalars: Sequence[float]) -> EinfallError:
        names = self._signature.scalars
        if len(scalars) != len(names):
            return BindingError(f"{self._signature.entry} takes {len(names)} scalars, found {len(scalars)}")
        said = ", ".join(f"{name} = {value!r}" for name, value in zip(names, scalars, strict=True))
        return BindingError(f"a scalar of {self._signature.entry} does not fit its type: {said}")
