"""What every backend does: tile program -> source -> artifact -> callable, and facts about what the compiler made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..ir.tile import TileProgram
from ..schedules.schedule import Schedule
from ..schedules.target import Target


@dataclass(frozen=True, slots=True)
class Source:
    """Emitted code.

    Args:
        text: the whole file, readable by itself.
        entry: the function to call.
        target: the machine it was emitted for.
        hash: the first 16 hex digits of the SHA-256 of the text.
    """

    text: str
    entry: str
    target: Target
    hash: str

    @staticmethod
    def make(text: str, entry: str, target: Target) -> Source:
        """A source with its hash."""
        return Source(text, entry, target, hashlib.sha256(text.encode()).hexdigest()[:16])


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled kernel.

    Args:
        source: what it was built from.
        module: the toolkit's handle of the code.
    """

    source: Source
    module: Any


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # of a tensor: shape and strides


@runtime_checkable
class Binds(Protocol):
    """A launch that can do some of its work in advance for tensors whose layouts are known."""

    def bound(self, layouts: Sequence[Layout]) -> Callable[..., object]:
        """The same launch, for tensors of these layouts alone."""
        ...


class Backend(Protocol):
    """Everything the compiler asks of a backend. Toolkits are imported when first used."""

    @property
    def suffix(self) -> str:
        """The ending of the files that `save` writes: `.so`."""
        ...

    def emit(self, program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = ...) -> Source:
        """The kernel as source; `strided` names tensors whose last axis has a stride other than 1.

        Raises `UnsupportedError` or `ScheduleError` before anything is built.
        """
        ...

    def build(self, source: Source) -> Artifact:
        """The compiled kernel. Raises `BuildError` with the toolkit's words."""
        ...

    def save(self, artifact: Artifact, path: Path) -> None:
        """Writes the binary to the file `path`."""
        ...

    def restore(self, path: Path, source: Source) -> Artifact:
        """A kernel that `save` wrote, built from `source`. Raises `BuildError` if it cannot be loaded."""
        ...

    def listings(self, path: Path, source: Source) -> Mapping[str, bytes]:
        """What there is to read in a file that `save` wrote, beside the source, by the endings of files: `{"ptx": ...}`."""
        ...

    def load(self, artifact: Artifact) -> Callable[..., object]:
        """`launch(*inputs, *outputs, *scalars)`: tensors in order of the program, then its scalars as Python floats."""
        ...

    def facts(self, artifact: Artifact) -> Mapping[str, Any]:
        """What the toolkit made of it, by name; nothing where a saved one does not say."""
        ...
