"""Operands of contractions that are computed where they are multiplied: few rows share each element, so a tile of them would not pay.

A tile of a computed operand is written and read once more than the memory it comes from. That pays where many register tiles use an
element. Where one holds every row that uses it, the element is computed in registers, from memory read in its own order.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from ..ir.expr import Masked, Tile, reads, walk
from ..ir.infer import expression_ranks
from ..ir.tile import Dot, Loop, Map, Node, TileProgram, body_expressions
from ..ir.types import f32
from .layout import rank_sizes
from .schedule import Schedule

ROWS_AT_ONCE = 4  # rows that every register tile can hold


def fold_operands(program: TileProgram, schedule: Schedule) -> TileProgram:
    """`program` with operands that few rows use as expressions of their dots. Tiles that `schedule` lays out stay."""
    used = Counter(n.name for e in body_expressions(program.body) for n in walk(e) if isinstance(n, Tile))
    kept = {name for name, _ in schedule.layout} | {name for name, n in used.items() if n > 1}
    body = _folded(program.body, rank_sizes(program), kept, inside=False)
    return program if body == program.body else replace(program, body=body)


def _folded(nodes: tuple[Node, ...], sizes: dict[str, int], kept: set[str], inside: bool) -> tuple[Node, ...]:
    """One body. Outside of loops a tile is computed once and stays."""
    operands = {n.dst: n for n in nodes if inside and isinstance(n, Map) and n.dst not in kept and _is_from_memory(n)}
    gone: set[str] = set()
    result: list[Node] = []
    for node in nodes:
        match node:
            case Loop():
                result.append(replace(node, body=_folded(node.body, sizes, kept, inside=True)))
            case Dot():
                sides = []
                for side in (node.a, node.b):
                    operand = operands.get(side.name) if isinstance(side, Tile) else None
                    if operand is not None and math.prod(sizes.get(r, 1) for r in node.ranks if r not in operand.ranks) <= ROWS_AT_ONCE:
                        gone.add(operand.dst)
                        sides.append(operand.expr)
                    else:
                        sides.append(side)
                result.append(replace(node, a=sides[0], b=sides[1]))
            case _:
                result.append(node)
    return tuple(n for n in result if not (isinstance(n, Map) and n.dst in gone))


def _is_from_memory(node: Map) -> bool:
    """Whether the tile is computed from memory alone, the same wherever in the body it is done."""
    fixed = not any(isinstance(n, (Tile, Masked)) for n in walk(node.expr))
    return node.dtype == f32 and fixed and any(True for _ in reads(node.expr)) and set(expression_ranks(node.expr)) >= set(node.ranks)
