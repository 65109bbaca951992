"""CUDA through TVM, without tensor cores: a block of threads a task, tiles in registers. TVM itself is imported when a kernel is built."""

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
class TvmCuda:
    """The backend of CUDA targets whose name ends in `+tvm`; see `backends.base.Backend`."""

    @property
    def suffix(self) -> str:
        """Zips of plain files."""
        return ".zip"

    def emit(self, program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
        """The kernel as TVMScript. `strided` names tensors whose last axis has a stride other than 1."""
        from .emit import emit

        return emit(program, schedule, target, strided=strided)

    def build(self, source: Source) -> Artifact:
        """CUDA C by TVM, and machine code where NVIDIA's compiler is there."""
        from .build import build

        return build(source)

    def save(self, artifact: Artifact, path: Path) -> None:
        """Writes what was made as one file."""
        from .files import save

        save(artifact, path)

    def restore(self, path: Path, source: Source) -> Artifact:
        """What was made, from that file."""
        from .files import restore

        return restore(path, source)

    def listings(self, path: Path, source: Source) -> Mapping[str, bytes]:
        """CUDA C, PTX and machine code."""
        from .files import listings, restore

        return listings(restore(path, source))

    def load(self, artifact: Artifact) -> Callable[..., object]:
        """The function, taking torch tensors on the device."""
        from .launch import load

        return load(artifact)

    def facts(self, artifact: Artifact) -> Mapping[str, Any]:
        """Counts from what the compilers wrote."""
        from .facts import facts

        return facts(artifact)
