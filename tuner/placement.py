"""Where kernels are checked and timed: on this processor, or on a GPU, whose work the clock has to wait for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ..ir.errors import UnsupportedError
from ..schedules.target import Target

CPU = torch.device("cpu")


def place_of(target: Target) -> torch.device:
    """The device that kernels for `target` run on here: the current one of its kind. Raises `UnsupportedError` where there is none."""
    if target.kind == "cpu":
        return CPU
    if target.kind != "cuda" or not torch.cuda.is_available():
        raise no_device(target)
    return torch.device("cuda", torch.cuda.current_device())


def no_device(target: Target) -> UnsupportedError:
    """That kernels for `target` do not run here, why, and what can be done without."""
    what = f"this machine has no device for {target.name}"
    if target.kind == "cuda" and torch.version.cuda is None:
        what += f": this PyTorch ({torch.__version__}) is built without CUDA"
    elif target.kind == "cuda":
        what += ": PyTorch finds no GPU, or no driver (nvidia-smi lists both)"
    hint = "`einfall explain`, `compile` and `check` need none; `einfall targets` lists what this machine can run"
    return UnsupportedError(what, hint=hint)


def clock_of(place: torch.device) -> Callable[[], float]:
    """Seconds, once the device has done what it was told."""
    return time.perf_counter if place.type == "cpu" else _waited


def _waited() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def moved(tensors: Sequence[torch.Tensor], device: torch.device) -> Iterator[list[torch.Tensor]]:
    """The tensors on a device with the memory around them, which is copied back in the end: what was written beside them shows."""
    around = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}  # tensors of one storage stay so
    copies = {address: torch.empty(0, dtype=torch.uint8).set_(s).to(device, copy=True) for address, s in around.items()}
    there = [copies[t.untyped_storage().data_ptr()].untyped_storage() for t in tensors]
    yield [
        torch.empty(0, dtype=t.dtype, device=device).set_(storage, t.storage_offset(), t.shape, t.stride())
        for t, storage in zip(tensors, there, strict=True)
    ]
    for address, storage in around.items():
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(copies[address])
