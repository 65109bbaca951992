"""One exception class a mistake: what is wrong, where, why, and what to try.

Every error a user can cause is an `EinfallError`. Its message has the same four parts each time::

    CascadeError: sum over unknown rank 'q'
      in cascade scores, statement S
      at model.py:12
         12 |     S = (Q * K).sum("q")
            |     ^
      try: one of the operand's ranks b, h, m, e, p
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Location:
    """A line of the user's program: a Python file or a `.cascade` text. `column` counts from 1, 0 if unknown."""

    file: str
    line: int
    column: int = 0
    text: str | None = None

    def caret(self) -> str:
        """The line with a caret under the place, or the empty string if the source is not to be had."""
        source = self.text if self.text is not None else linecache.getline(self.file, self.line)
        source = source.rstrip("\n")
        if not source.strip():
            return ""
        column = self.column or len(source) - len(source.lstrip()) + 1
        gutter = f"{self.line:>5} | "
        return f"{gutter}{source}\n{' ' * (len(gutter) - 2)}| {' ' * (column - 1)}^"


class EinfallError(Exception):
    """The root of every error einfall raises on purpose.

    Args:
        what: one sentence that says what is wrong, with what was expected and what was found.
        cascade: the name of the cascade concerned.
        statement: the name (or text) of the statement concerned.
        location: the line of the user's file.
        hint: what to try.
    """

    def __init__(
        self,
        what: str,
        *,
        cascade: str | None = None,
        statement: str | None = None,
        location: Location | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.cascade = cascade
        self.statement = statement
        self.location = location
        self.hint = hint
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.what]
        places = []
        if self.cascade:
            places.append(f"cascade {self.cascade}")
        if self.statement:
            places.append(f"statement {self.statement}")
        if places:
            lines.append("  in " + ", ".join(places))
        if self.location is not None:
            lines.append(f"  at {self.location.file}:{self.location.line}")
            caret = self.location.caret()
            lines.extend("  " + line for line in caret.splitlines())
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class CascadeError(EinfallError):
    """The program itself is wrong: an unknown rank, a clash of ranks, an illegal type, a malformed text."""


class BindingError(EinfallError):
    """The tensors given to a kernel do not fit its declaration: extents, dtypes, devices, strides, indices."""


class UnsupportedError(EinfallError):
    """The program is right, but this target or this version cannot run it."""


class BuildError(EinfallError):
    """A target's compiler refused the emitted source, or a saved artifact cannot be loaded."""


class ScheduleError(EinfallError):
    """A schedule is malformed or not legal for this plan on this target."""


class DatabaseError(EinfallError):
    """A tuning database cannot be used: missing, foreign, newer than this version, read-only, damaged."""
