"""What every backend does: tile program -> source -> artifact -> callable, and facts about what the compiler made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..ir.tile import TileProgram
from ..schedules.schedule import Schedule
from ..schedules.target import Target


@dataclass(frozen=True, slots=True)
class Source:
    """Emitted code.

    Args:
        text: the whole file, readable by itself.
        entry: the function to call.
        hash: the first 16 hex digits of the SHA-256 of the text.
    """

    text: str
    entry: str
    hash: str

    @staticmethod
    def make(text: str, entry: str) -> Source:
        """A source with its hash."""
        return Source(text, entry, hashlib.sha256(text.encode()).hexdigest()[:16])


class Artifact(Protocol):
    """A compiled kernel that can be saved."""

    @property
    def source(self) -> Source | None:
        """What it was built from, None if it was loaded from a file."""
        ...

    def save(self, path: Path) -> None:
        """Writes the binary to `path`."""
        ...


class Backend(Protocol):
    """Everything the compiler asks of a backend. Toolkits are imported when first used."""

    def emit(self, program: TileProgram, schedule: Schedule, target: Target) -> Source:
        """The kernel as source. Raises `UnsupportedError` or `ScheduleError` before anything is built."""
        ...

    def build(self, source: Source, target: Target) -> Artifact:
        """The compiled kernel. Raises `BuildError` with the toolkit's words."""
        ...

    def restore(self, path: Path, target: Target) -> Artifact:
        """A kernel that `Artifact.save` wrote. Raises `BuildError` if it cannot be read."""
        ...

    def load(self, artifact: Any) -> Callable[..., None]:
        """`launch(*inputs, *outputs, *scalars)`: tensors in order of the program, then its scalars as Python floats."""
        ...

    def facts(self, artifact: Any) -> Mapping[str, Any]:
        """What the compiler made of it, by name."""
        ...
