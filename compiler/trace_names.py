"""Names of intermediates: the local variables of the traced function and of the functions it calls."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from .trace_graph import Node
from .trace_value import Value

_HIDDEN = frozenset({"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"})  # inlined from Python 3.12 on: named alike everywhere
_OWN = frozenset(
    f"{__package__}.{name}"
    for name in ("functions", "trace", "trace_graph", "trace_names", "trace_signature", "trace_statements", "trace_value")
)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A variable that held a node when its function returned. `assigned` is False for an argument as it was passed in."""

    depth: int
    name: str
    node: Node
    assigned: bool


@dataclass(slots=True)
class NameRecorder:
    """Collects the variables that hold traced values, by watching functions return."""

    sightings: list[Sighting] = field(default_factory=list)
    _frames: list[dict[str, Value]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every Python function that returns meanwhile; a profiler that was set is put back."""
        previous = sys.getprofile()
        sys.setprofile(self._event)
        try:
            yield
        finally:
            if previous is None or callable(previous):
                sys.setprofile(previous)
            else:  # cProfile's is no function; it puts itself back
                sys.setprofile(None)
                previous.enable()

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._frames.append(_values(frame, arguments=True))
        elif event == "return" and self._frames:
            passed = self._frames.pop()
            code = frame.f_code
            if frame.f_globals.get("__name__") in _OWN or code.co_name in _HIDDEN:
                return
            for name, value in _values(frame, arguments=False).items():
                argument = passed.get(name)
                assigned = argument is None or argument.node is not value.node
                self.sightings.append(Sighting(len(self._frames), name, value.node, assigned))

    def names(self) -> dict[Node, tuple[int, str, bool]]:
        """For each node its depth, name and whether a variable was assigned; the outermost function wins, then the first to return."""
        best: dict[Node, tuple[int, str, bool]] = {}
        for sighting in self.sightings:
            found = best.get(sighting.node)
            if found is None or (not sighting.assigned, sighting.depth) < (not found[2], found[0]):
                best[sighting.node] = (sighting.depth, sighting.name, sighting.assigned)
        return best


def _values(frame: FrameType, *, arguments: bool) -> dict[str, Value]:
    """The frame's variables that hold traced values, in the order of the code; those of enclosing functions left out."""
    code = frame.f_code
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    count = code.co_argcount + code.co_kwonlyargcount + starred
    names = code.co_varnames[:count] if arguments else (*code.co_varnames, *code.co_cellvars)
    table = frame.f_locals
    return {name: table[name] for name in names if name in table and isinstance(table[name], Value) and not name.startswith((".", "_"))}


def called(function: Callable[..., object], arguments: dict[str, object], recorder: NameRecorder) -> object:
    """The result of `function(**arguments)`, its variables recorded."""
    with recorder.watching():
        return function(**arguments)
