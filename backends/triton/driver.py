"""The CUDA driver through ctypes: contexts, modules, functions, launches. No toolkit is needed, only the driver's own library.

    driver = load_driver()                       libcuda.so.1, initialised; UnsupportedError with the remedy where there is none
    function = driver.function(image, "main", device)
    driver.launch(function, grid, 1, 1, threads, 1, 1, shared, stream, parameters, None)

Contexts are the primary ones, which PyTorch uses as well, so that streams and memory are the same. Every error is raised with the
driver's own name for it. **This module has been tested against a library of the tests' own, and has not run on a device yet.**
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...ir.errors import BuildError, EinfallError, UnsupportedError

LIBRARY = "libcuda.so.1"
NO_DEVICE = (100, 101)  # no CUDA device, none of that number
OUT_OF_MEMORY = 2
INVALID_IMAGE = (200, 209, 218, 222)  # not an image, not for this GPU, PTX that is wrong, or newer than the driver
TOO_LARGE = (1, 701)  # invalid value, too many resources
FAULTS = (700, 715, 716, 717, 718, 719)  # illegal address, instruction, alignment, ...: the context is lost
CAPTURING = range(900, 910)
SHARED_BYTES, LOCAL_BYTES, REGISTERS, DYNAMIC_SHARED_BYTES = 1, 3, 4, 8  # attributes of a function
CAPABILITY_MAJOR, CAPABILITY_MINOR, MULTIPROCESSORS, SHARED_OPTIN = 75, 76, 16, 97  # attributes of a device
PREFER_SHARED = 1
DEFAULT_SHARED = 48 << 10  # dynamic shared memory that a kernel has without asking


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel in a context: its handle, and what a thread of it takes."""

    handle: int
    registers: int
    local_bytes: int


class Driver:
    """The calls of the driver that a launch needs. Raises `UnsupportedError` where there is no driver or no GPU."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self.library = ctypes.CDLL(library)
        except OSError:
            raise UnsupportedError(
                f"this machine has no CUDA driver: {library} cannot be loaded",
                hint="install the NVIDIA driver (nvidia-smi then lists the GPUs), or use target cpu",
            ) from None
        self.launch: Callable[..., int] = self.library.cuLaunchKernel
        self._contexts: dict[int, int] = {}
        result = self.library.cuInit(0)
        if result in NO_DEVICE:
            raise UnsupportedError(
                f"the CUDA driver finds no GPU ({self.name(result)})",
                hint="nvidia-smi must list one, and CUDA_VISIBLE_DEVICES must not hide it; or use target cpu",
            )
        self.check(result, "cuInit")

    def name(self, result: int) -> str:
        """The driver's name of a result, such as CUDA_ERROR_OUT_OF_MEMORY."""
        found = ctypes.c_char_p()
        if self.library.cuGetErrorName(result, ctypes.byref(found)) or not found.value:
            return f"CUDA error {result}"
        return found.value.decode()

    def check(self, result: int, what: str) -> None:
        """Raise what `result` means, if it is an error; `what` failed."""
        if result:
            raise self._error(result, what)

    def _error(self, result: int, what: str) -> EinfallError:
        text = f"{what} failed: {self.name(result)}"
        if result in NO_DEVICE:
            return UnsupportedError(text, hint="nvidia-smi lists the GPUs; CUDA_VISIBLE_DEVICES says which of them are seen")
        if result == OUT_OF_MEMORY:
            return EinfallError(text, hint="free tensors, torch.cuda.empty_cache(), or a smaller call")
        if result in INVALID_IMAGE:
            return BuildError(text, hint="compile the kernel for this GPU: a call with tensors that lie on it does")
        if result in TOO_LARGE:
            return UnsupportedError(text, hint="the kernel needs more than a block of this GPU has: another schedule")
        if result in FAULTS:
            hint = "an earlier kernel of this process failed; CUDA_LAUNCH_BLOCKING=1 tells which, and a new process is needed"
            return EinfallError(text, hint=hint)
        if result in CAPTURING:
            return EinfallError(text, hint="call the kernel once with these tensors before a graph is captured")
        return EinfallError(text, hint="`einfall doctor` says what driver and GPU there are")

    def _number(self, call: str, *arguments: Any) -> int:
        """What a call writes into its first argument, as an int."""
        found = ctypes.c_int()
        self.check(getattr(self.library, call)(ctypes.byref(found), *arguments), call)
        return found.value

    def _handle(self, call: str, *arguments: Any) -> int:
        """What a call writes into its first argument, as a handle."""
        found = ctypes.c_void_p()
        self.check(getattr(self.library, call)(ctypes.byref(found), *arguments), call)
        return found.value or 0

    def device(self, number: int, attribute: int) -> int:
        """An attribute of a device."""
        return self._number("cuDeviceGetAttribute", attribute, self._number("cuDeviceGet", number))

    def capability(self, number: int) -> tuple[int, int]:
        """The compute capability of a device."""
        return self.device(number, CAPABILITY_MAJOR), self.device(number, CAPABILITY_MINOR)

    def context(self, number: int) -> int:
        """The primary context of a device, retained once for the life of the process."""
        if number not in self._contexts:
            self._contexts[number] = self._handle("cuDevicePrimaryCtxRetain", self._number("cuDeviceGet", number))
        return self._contexts[number]

    def ensure_context(self, number: int) -> None:
        """Give this thread the context of a device, if it has none: a thread that never used CUDA."""
        if not self._handle("cuCtxGetCurrent"):
            self.check(self.library.cuCtxSetCurrent(ctypes.c_void_p(self.context(number))), "cuCtxSetCurrent")

    @contextmanager
    def within(self, number: int) -> Iterator[None]:
        """The context of a device inside the block, that of before after it."""
        self.check(self.library.cuCtxPushCurrent_v2(ctypes.c_void_p(self.context(number))), "cuCtxPushCurrent")
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self.check(self.library.cuCtxPopCurrent_v2(ctypes.byref(popped)), "cuCtxPopCurrent")

    def function(self, image: bytes, name: str, number: int, shared: int = 0) -> Function:
        """A kernel of an image (cubin or PTX), loaded into the context of a device, allowed `shared` bytes of dynamic shared memory.

        Raises `BuildError` for an image that the device cannot take, `UnsupportedError` where its shared memory is too small.
        """
        with self.within(number):
            module = self._handle("cuModuleLoadData", ctypes.c_char_p(image))
            handle = self._handle("cuModuleGetFunction", ctypes.c_void_p(module), ctypes.c_char_p(name.encode()))
            function = ctypes.c_void_p(handle)
            if shared > DEFAULT_SHARED:
                most, static = self.device(number, SHARED_OPTIN), self._number("cuFuncGetAttribute", SHARED_BYTES, function)
                if shared + static > most:
                    raise UnsupportedError(
                        f"{name} needs {shared + static} bytes of shared memory, and a block of this GPU has {most}",
                        hint="smaller tiles or fewer stages",
                    )
                self.check(self.library.cuFuncSetCacheConfig(function, PREFER_SHARED), "cuFuncSetCacheConfig")
                self.check(self.library.cuFuncSetAttribute(function, DYNAMIC_SHARED_BYTES, shared), "cuFuncSetAttribute")
            registers, local = (self._number("cuFuncGetAttribute", a, function) for a in (REGISTERS, LOCAL_BYTES))
        return Function(handle, registers, local)

    def blocks_at_once(self, function: Function, threads: int, shared: int, number: int) -> int:
        """How many blocks of a kernel a device runs at once, on all of its multiprocessors."""
        with self.within(number):
            each = self._number(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.c_void_p(function.handle), threads, ctypes.c_size_t(shared)
            )
        return max(each, 1) * self.device(number, MULTIPROCESSORS)


@functools.cache
def load_driver() -> Driver:
    """The driver of this machine. Raises `UnsupportedError` where there is none, or no GPU."""
    return Driver(LIBRARY)
