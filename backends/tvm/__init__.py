"""The CPU through TVM: TVMScript with register tiles and imported LLVM helpers. TVM itself is imported when a kernel is built."""

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
class TvmCpu:
    """The backend of CPU targets; see `backends.base.Backend`."""

    @property
    def suffix(self) -> str:
        """Shared libraries."""
        return ".so"

    def emit(self, program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
        """The kernel as TVMScript. `strided` names tensors whose last axis has a stride other than 1."""
        from .emit import emit

        return emit(program, schedule, target, strided=strided)

    def build(self, source: Source) -> Artifact:
        """Compiles with TVM's LLVM."""
        from .build import build

        return build(source)

    def save(self, artifact: Artifact, path: Path) -> None:
        """Writes a shared library."""
        from .build import save

        save(artifact, path)

    def restore(self, path: Path, source: Source) -> Artifact:
        """A saved shared library."""
        from .build import restore

        return restore(path, source)

    def listings(self, path: Path, source: Source) -> Mapping[str, bytes]:
        """Nothing: the source is what there is to read."""
        return {}

    def load(self, artifact: Artifact) -> Callable[..., object]:
        """The function, taking torch CPU tensors without copying."""
        from .build import load

        return load(artifact)

    def facts(self, artifact: Artifact) -> Mapping[str, Any]:
        """Counts from the assembly."""
        from .facts import facts

        return facts(artifact)
