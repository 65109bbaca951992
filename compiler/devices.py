"""Which target the tensors of a call ask for, and whether a target's kernels run where a tensor lies."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch

from ..ir.errors import UnsupportedError
from ..schedules.target import SECOND, Target, target_names

CPU = torch.device("cpu")
Capability = tuple[int, int]


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Where the first of the tensors lies; the CPU if there is none."""
    return next((t.device for t in tensors), CPU)


def target_for(device: torch.device, name: str = "a tensor") -> str:
    """The target of kernels for tensors on `device`; `name` lies there. Raises `UnsupportedError` where kernels do not run."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        hint = f"{name}.cpu() or {name}.cuda(); .reference(...) runs on any device"
        raise UnsupportedError(f"{name} lies on {device}; kernels run on the CPU and on CUDA devices", hint=hint)
    if torch.version.hip is not None:
        hint = f"{name}.cpu(), or .compile(dims=..., target='hip:...') and .save(folder) for a launcher of your own"
        raise UnsupportedError(f"{name} lies on {device}, an AMD device, for which kernels are built ahead of time only", hint=hint)
    return cuda_target(torch.cuda.get_device_capability(device))


@functools.cache
def cuda_target(capability: Capability) -> str:
    """The target for a GPU of this compute capability: its own, or the nearest known one whose code it runs, with a warning."""
    known = {capability_of(name): name for name in target_names() if name.startswith("cuda:sm_")}
    own = f"cuda:sm_{capability[0]}{capability[1]}"
    fitting = [c for c in known if runs_on(c, capability)]
    if not fitting:
        raise UnsupportedError(f"this GPU is {own}, older than any that kernels are built for: {', '.join(sorted(known.values()))}")
    found = known[max(fitting)]
    if max(fitting) != capability:
        warnings.warn(f"this GPU is {own}, which is no target; kernels are built for {found} instead", stacklevel=2)
    return found


def runs_on(built: Capability, capability: Capability) -> bool:
    """Whether code for one compute capability runs on a GPU of another.

    From 9.0 on kernels use instructions of their own architecture (`sm_90a`), which no other has; older code runs on all that follow.
    """
    return built == capability or (built < (9, 0) and built < capability)


def check_device(target: Target, name: str, tensor: torch.Tensor, cascade: str) -> None:
    """Raise `UnsupportedError` unless kernels built for `target` run where `tensor`, the argument `name`, lies."""
    device = tensor.device
    built = f"{name} lies on {device}; this executable was built for {target.name}"
    if target.kind == "cpu":
        if device.type != "cpu":
            hint = f"{name}.cpu(), or call the kernel itself, which builds for the device of its tensors"
            raise UnsupportedError(built, cascade=cascade, hint=hint)
    elif target.kind != "cuda":
        what = f"this executable was built for {target.name}, for which this version builds ahead of time only"
        raise UnsupportedError(what, cascade=cascade, hint="exe.save(folder) writes its binaries for a launcher of your own")
    elif device.type != "cuda" or torch.version.hip is not None:
        hint = f"{name}.cuda(), or call the kernel itself, which builds for the device of its tensors"
        raise UnsupportedError(built, cascade=cascade, hint=hint)
    else:
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(capability_of(target.name), capability):
            hint = "call the kernel itself, which builds for the device of its tensors"
            raise UnsupportedError(f"{built}, and {device} is sm_{capability[0]}{capability[1]}", cascade=cascade, hint=hint)


def capability_of(target: str) -> Capability:
    """(9, 0) of `cuda:sm_90`, whichever emitter it names."""
    major, minor = divmod(int(target.removesuffix(SECOND).rpartition("_")[2]), 10)
    return major, minor
