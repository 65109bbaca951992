"""What a measurement was taken with: the device, the toolchain, the host and the commit, as the database names them."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..ir.errors import UnsupportedError
from ..schedules.target import Target
from .database.records import Device, Toolchain

# Raised whenever the compiler emits other code for the same schedule: earlier winners then become seeds of a new search.
CODEGEN_ABI = 4
_COMPILERS = {"cpu": ("tvm", "apache-tvm"), "cuda": ("triton", "triton"), "hip": ("triton", "triton"), "ascend": ("ascend", "triton")}


def describe_device(target: Target) -> Device:
    """The device of `target` in this machine. Raises `UnsupportedError` where a GPU target has none, or another than it names."""
    if target.kind == "cpu":
        return Device(
            vendor="cpu",
            model=target.description,
            arch=platform.machine(),
            units=target.cores,
            memory_bytes=target.memory.bytes,
            driver=platform.release(),
        )
    if target.kind == "cuda":
        import torch

        from ..compiler.devices import capability_of, cuda_target, runs_on

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            if not runs_on(capability_of(target.name), (properties.major, properties.minor)):
                here, own = f"sm_{properties.major}{properties.minor}", cuda_target((properties.major, properties.minor))
                hint = f"--target {own}, or another GPU by CUDA_VISIBLE_DEVICES"
                raise UnsupportedError(f"the GPU of this machine is {here}, where kernels for {target.name} do not run", hint=hint)
            return Device(
                vendor="nvidia",
                model=properties.name,
                arch=f"sm_{properties.major}{properties.minor}",
                units=properties.multi_processor_count,
                memory_bytes=properties.total_memory,
                driver=torch.version.cuda or "",
            )
    from .placement import no_device

    raise no_device(target)


def describe_toolchain(target: Target) -> Toolchain:
    """What builds kernels for `target` here. Loads none of it."""
    backend, package = _COMPILERS[target.kind]
    return Toolchain(version=_installed("einfall"), abi=CODEGEN_ABI, backend=backend, compiler=f"{package} {_installed(package)}")


def host_name() -> str:
    """The name of this machine."""
    return platform.node()


def source_commit() -> str:
    """The commit of the checkout this package runs from, or the empty string for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
