"""GPUs through Triton: kernels as Triton source, compiled ahead of time. Triton is imported in other processes, or at a launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.tile import TileProgram
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from ..base import Artifact, Source


@dataclass(frozen=True, slots=True)
class TritonCuda:
    """The backend of CUDA and HIP targets; see `backends.base.Backend`."""

    @property
    def suffix(self) -> str:
        """Zips of plain files."""
        return ".zip"

    def emit(self, program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
        """The kernel as Triton source. `strided` names tensors whose last axis has a stride other than 1."""
        from .emit import emit

        return emit(program, schedule, target, strided=strided)

    def build(self, source: Source) -> Artifact:
        """Compiles in another process, for tensors that are aligned as the kernel hopes; for others when they come."""
        from .build import build

        return build(source)

    def save(self, artifact: Artifact, path: Path) -> None:
        """Writes what was compiled as one file."""
        from .build import save

        save(artifact, path)

    def restore(self, path: Path, source: Source) -> Artifact:
        """What was compiled, from that file."""
        from .build import restore

        return restore(path, source)

    def listings(self, path: Path, source: Source) -> Mapping[str, bytes]:
        """The assembly and the binary of the full variant."""
        from .build import listings, restore

        return listings(restore(path, source))

    def load(self, artifact: Artifact) -> Callable[..., object]:
        """The function, taking torch tensors on the device."""
        from .launch import load

        return load(artifact)

    def facts(self, artifact: Artifact) -> Mapping[str, Any]:
        """Counts from what the compilers wrote."""
        from .facts import facts

        return facts(artifact)
