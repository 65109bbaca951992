"""Operands of contractions copied into tiles where reading them in place would be slow: strided vectors, expressions, pairs of bf16."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.expr import Const, Expr, Index, Masked, Op, Read, Tile, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, TileProgram
from ...ir.types import DType, f32
from ...schedules.schedule import Schedule
from .cpu import Cpu
from .prepare import Step, Stream, all_steps, depends_on_loop, tile_table, tiles_written


@dataclass(frozen=True, slots=True)
class _Packer:
    program: TileProgram
    cpu: Cpu
    schedule: Schedule
    strided: frozenset[str]
    table: dict[str, tuple[tuple[str, ...], DType]]
    layouts: dict[str, tuple[str, ...]]
    dtypes: dict[str, DType]

    def ranks(self, e: Expr) -> tuple[str, ...]:
        tiles = {name: ranks for name, (ranks, _) in self.table.items()}
        grid_points = {axis.rank for axis in self.program.grid if axis.tile == 1}
        return tuple(r for r in expression_ranks(e, tiles) if r not in grid_points)


def pack_operands(
    steps: tuple[Step, ...], program: TileProgram, schedule: Schedule, cpu: Cpu, strided: frozenset[str]
) -> tuple[tuple[Step, ...], dict[str, tuple[str, ...]]]:
    """The steps with packing maps before the dots that need them (before the loop where nothing changes in it), and all layouts."""
    packer = _Packer(
        program, cpu, schedule, strided, tile_table(steps), dict(schedule.layout), {t.name: t.dtype for t in program.inputs}
    )
    packed, rest = _level(packer, steps)
    return (*rest, *packed), packer.layouts


def _level(packer: _Packer, steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps of one level, and the packing maps that nothing keeps inside the loop around it."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Stream):
            body, hoisted = _level(packer, step.body)
            inside = frozenset(t for s in all_steps(body) for t in tiles_written(s))
            moving = [m for m in hoisted if isinstance(m, Map) and depends_on_loop(m.expr, step.loop, inside)]
            result += [m for m in hoisted if m not in moving]
            result.append(Stream(step.loop, (*_insert(moving, body),)))
        elif isinstance(step, Dot):
            result += _packs(packer, step)
            result.append(_repacked(packer, step))
        else:
            result.append(step)
    return tuple(result), ()


def _insert(maps: list[Step], body: tuple[Step, ...]) -> tuple[Step, ...]:
    return (*maps, *body)


def _packs(packer: _Packer, dot: Dot) -> list[Step]:
    return [Map(_name(dot, side), packer.ranks(e), e, f32, f"pack {side} of {dot.dst}") for side, e in (("a", dot.a), ("b", dot.b)) if _needs(packer, dot, e)]


def _repacked(packer: _Packer, dot: Dot) -> Dot:
    a = Tile(_name(dot, "a")) if _needs(packer, dot, dot.a) else dot.a
    b = Tile(_name(dot, "b")) if _needs(packer, dot, dot.b) else dot.b
    return replace(dot, a=a, b=b)


def _name(dot: Dot, side: str) -> str:
    return f"{dot.dst}.{side}"


def _needs(packer: _Packer, dot: Dot, e: Expr) -> bool:
    """Whether an operand is packed."""
    del packer, dot
    return not isinstance(e, (Tile, Read, Masked, Const, Index)) and any(isinstance(n, Op) for n in walk(e))
