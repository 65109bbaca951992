"""A CUDA device that is none, so that everything but the kernels' arithmetic can be tested: a driver library, and tensors that say they
lie on `cuda:n` while their elements are on the CPU. PyTorch's own operations on them are computed there, and refuse to mix devices.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = Path(__file__).parent / "fake_cuda.c"


def build_library(folder: Path) -> Path:
    """The driver library, compiled into `folder`."""
    library = folder / "libcuda_fake.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(CALLS), "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Launch:
    """A launch as the driver saw it."""

    name: str
    device: int
    image: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    allowed: int
    stream: int
    parameters: tuple[bytes, ...]

    def values(self, forms: str) -> tuple[float | int, ...]:
        """The parameters as numbers, by their struct codes."""
        return tuple(struct.unpack("=" + form, raw)[0] for form, raw in zip(forms, self.parameters, strict=True))


class FakeDriver:
    """What the tests say to the library, and what it tells them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.current, self.streams = 0, {0: 0, 1: 0}
        self.reset()

    def reset(self) -> None:
        """Two devices of capability 9.0, nothing recorded, nothing failing."""
        self.device()
        self.fail("", 0)
        self.library.fake_forget()
        self.current, self.streams = 0, {0: 0x700000001000, 1: 0x700000002000}

    def device(self, count: int = 2, capability: tuple[int, int] = (9, 0), optin: int = 232448, cores: int = 132, blocks: int = 2) -> None:
        """What the devices are like."""
        self.library.fake_device(count, *capability, optin, cores, blocks)

    def fail(self, call: str, code: int) -> None:
        """Have a call of the driver fail with this code."""
        self.library.fake_failure(call.encode(), code)

    def takes(self, *sizes: int) -> None:
        """How many bytes each parameter of the kernels has."""
        self.library.fake_parameters((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    @property
    def lines(self) -> list[str]:
        """Everything recorded."""
        return self.library.fake_log().decode().splitlines()

    @property
    def launches(self) -> list[Launch]:
        """The launches, in order."""
        return [_launch(line) for line in self.lines if line.startswith("launch ")]


def _launch(line: str) -> Launch:
    _, name, *fields = line.split(" ")
    said = dict(field.split("=") for field in fields)

    def numbers(key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in said[key].split(","))

    return Launch(
        name=name,
        device=int(said["ctx"]),
        image=said["image"],
        grid=numbers("grid"),
        block=numbers("block"),
        shared=int(said["shared"]),
        allowed=int(said["allowed"]),
        stream=int(said["stream"]),
        parameters=tuple(bytes.fromhex(h) for h in said["parameters"].split(",") if h),
    )


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a device; `inner` has its elements, on the CPU."""

    inner: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device) -> OnDevice:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )
        found.inner, found.place = inner, place
        return found

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self):
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_on_device(function, args, kwargs or {})


def on_device(tensor: torch.Tensor, number: int = 0) -> OnDevice:
    """`tensor` as one that lies on `cuda:number`."""
    return OnDevice(tensor, torch.device("cuda", number))


class FakeDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on `cuda:n`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_on_device(function, args, kwargs or {})


def run_on_device(function, args, kwargs):
    """Compute on the CPU what is asked of a device; the result lies where the operands do. Operands on different devices are refused."""
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    places = {t.device for t in given if isinstance(t, OnDevice) or t.ndim > 0}
    copies = function in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    if len(places) > 1 and not copies:
        raise RuntimeError(f"{function} is given tensors on {sorted(map(str, places))}")
    asked = kwargs.get("device")
    place = asked if asked is not None else given[0].device if given else torch.device("cpu")
    place = torch.device(place)
    if asked is None and any(isinstance(t, OnDevice) for t in given) and place.type == "cpu":
        place = next(t.device for t in given if isinstance(t, OnDevice))
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", 0)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = pytree.tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if function._schema.is_mutable and given:
        return args[0]
    return pytree.tree_map(
        lambda x: OnDevice(x, place) if isinstance(x, torch.Tensor) and place.type == "cuda" and not isinstance(x, OnDevice) else x, result
    )
