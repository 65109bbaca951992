"""Which backend serves a target. Backends are loaded when asked for."""

from __future__ import annotations

from ..ir.errors import UnsupportedError
from ..schedules.target import SECOND, Target
from .base import Backend


def backend_for(target: Target) -> Backend:
    """The backend that emits code for `target`. Raises `UnsupportedError` where there is none."""
    match target.kind:
        case "cpu":
            from .tvm import TvmCpu

            return TvmCpu()
        case "cuda" if target.name.endswith(SECOND):
            from .tvm_cuda import TvmCuda

            return TvmCuda()
        case "cuda" | "hip":
            from .triton import TritonCuda

            return TritonCuda()
    raise UnsupportedError(f"no backend builds for {target.name}", hint="target cpu, cuda:sm_80, cuda:sm_90, cuda:sm_100 or hip:gfx942")
