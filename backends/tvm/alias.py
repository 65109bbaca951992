"""Tiles that can share memory: a next value computed in place of its state, a map written over an operand that dies there."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.expr import Expr, Tile, walk
from ...ir.tile import Dot, Map
from .prepare import Assign, Step, Stream, all_steps, expressions_of, tiles_read, tiles_written


def alias_tiles(steps: tuple[Step, ...], same_place: Mapping[str, object]) -> tuple[tuple[Step, ...], dict[str, str]]:
    """The steps with assignments that became idle left out, and for every tile that lives in another's memory that other.

    `same_place` gives each tile's layout and type: only tiles that agree can share. A state is never written over while its old
    value is still read: `prepare` places the assignment after the last reader.
    """
    aliases: dict[str, str] = {}
    return _states(steps, same_place, aliases), _maps(steps, same_place, aliases)


def _states(steps: tuple[Step, ...], place: Mapping[str, object], aliases: dict[str, str]) -> tuple[Step, ...]:
    """Dots and maps whose only purpose is a state's next value compute it in place."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Stream):
            result.append(Stream(step.loop, _states(step.body, place, aliases)))
            continue
        if isinstance(step, Assign) and isinstance(step.expr, Tile):
            source = step.expr.name
            maker = next((s for s in result if source in tiles_written(s)), None)
            if maker is not None and _in_place(maker, step, result, place) and source not in aliases:
                aliases[source] = step.dst
                continue
        result.append(step)
    return tuple(result)


def _in_place(maker: Step, assign: Assign, before: list[Step], place: Mapping[str, object]) -> bool:
    if not isinstance(maker, Dot) or place[maker.dst] != place[assign.dst]:
        return False
    operands = {n.name for e in (maker.a, maker.b) for n in _tiles(e)}
    if assign.dst in operands or (maker.post is not None and any(n.name == assign.dst for n in _tiles(maker.post))):
        return False
    at = next(i for i, s in enumerate(before) if s is maker)
    later = before[at + 1 :]
    return not any(assign.dst in tiles_read(s) | tiles_written(s) for s in later)


def _tiles(e: Expr) -> list[Tile]:
    return [n for n in walk(e) if isinstance(n, Tile)]


def _maps(steps: tuple[Step, ...], place: Mapping[str, object], aliases: dict[str, str]) -> dict[str, str]:
    """Maps written over an operand of the same layout that nothing reads afterwards."""
    states = {s.dst for s in all_steps(steps) if isinstance(s, Assign)}
    writers: dict[str, int] = {}
    for s in all_steps(steps):
        if not isinstance(s, Stream):
            for t in tiles_written(s):
                writers[t] = writers.get(t, 0) + 1
    taken = set(aliases.values())

    def visit(level: tuple[Step, ...]) -> None:
        for i, step in enumerate(level):
            if isinstance(step, Stream):
                visit(step.body)
            if not isinstance(step, Map) or step.dst in aliases:
                continue
            local = {t for s in level[:i] if not isinstance(s, Stream) for t in tiles_written(s)}
            for operand in dict.fromkeys(n.name for e in expressions_of(step) for n in _tiles(e)):
                root = aliases.get(operand, operand)
                fits = operand in local and operand not in states and root not in states and place[operand] == place[step.dst]
                dies = not any(operand in tiles_read(s) for s in level[i + 1 :])
                if fits and dies and operand not in taken and writers[operand] == 1 and step.dst not in states:
                    aliases[step.dst] = root
                    taken.add(operand)
                    break

    visit(steps)
    return aliases
