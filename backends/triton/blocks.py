"""Contractions over many elements, block by block.

    for v ...:                                          for v ...:
      s[m,v] = dot(e) q[m,e], W[v,e]                      for e in blocks:
                                              becomes       state s_sum[m,v] = 0 then s_next
                                                            s_next[m,v] = dot(e) Q[m,e], W[v,e] update s_sum
                                                          s[m,v] = s_sum

A rank that is held whole only to be summed over in products need not be: its operands are read again in every pass, a block at a time,
and no longer take shared memory or registers for all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.check_tiles import uses
from ...ir.expr import Const, Expr, Extent, Masked, Op, Read, Tile, substitute, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Bounds, Dot, Loop, LoopState, Map, Node, Reduce, TileProgram, kernel_tiles, nodes_of
from ...schedules.roles import WHOLE

BLOCK = 64


def block_contractions(program: TileProgram, blocks: Mapping[str, int]) -> TileProgram:
    """`program` with deep products in blocks; `blocks` gives the elements a block by the name of the product, else the default."""
    for rank in program.resident:
        size = program.static_size(rank) or 0
        sums = [n for n in nodes_of(program.body) if isinstance(n, (Dot, Reduce)) and n.over == (rank,)]
        wanted = {blocks[n.dst] for n in sums if n.dst in blocks}
        if not wanted and size <= WHOLE:
            continue
        inlined = _operands(program, rank, sums)
        if inlined is None:
            continue
        tile = min(wanted, default=BLOCK)
        body = _blocked(program.body, rank, tile, inlined)
        program = replace(program, body=body, resident=tuple(r for r in program.resident if r != rank))
    return program


def _operands(program: TileProgram, rank: str, sums: list[Dot | Reduce]) -> dict[Expr, Expr] | None:
    """What each tile over the rank is made of, if nothing but these sums reads them and they can be made block by block."""
    tiles = kernel_tiles(program.body)
    over = {name for name, (ranks, _) in tiles.items() if rank in ranks}
    made = {n.dst: n for n in nodes_of(program.body) if isinstance(n, Map) and n.dst in over}
    if set(made) != over or not any(isinstance(n, Dot) for n in sums) or any(isinstance(n, Reduce) and n.op != "sum" for n in sums):
        return None
    names = {n.dst for n in sums} | set(made)
    for use in uses(program):
        mentions = rank in expression_ranks(use.expr, {name: ranks for name, (ranks, _) in tiles.items()})
        if mentions and use.node not in names:
            return None
    for node in made.values():
        if any(isinstance(n, (Tile, Masked)) for n in walk(node.expr)) or not any(isinstance(n, Read) for n in walk(node.expr)):
            return None
    return {Tile(name): node.expr for name, node in made.items()}


def _blocked(nodes: tuple[Node, ...], rank: str, tile: int, inlined: dict[Expr, Expr]) -> tuple[Node, ...]:
    result: list[Node] = []
    whole = Bounds(Const(0), Const(0), Extent(rank), Extent(rank))
    for node in nodes:
        match node:
            case Map(dst=dst) if Tile(dst) in inlined:
                continue
            case Reduce(over=(over,)) if over == rank:
                total, part = f"{node.dst}_sum", f"{node.dst}_part"
                inner_sum = replace(node, dst=part, expr=Masked(substitute(node.expr, inlined), Const(0.0)))
                sum_state = LoopState(total, node.ranks, Const(0.0), Op("add", (Tile(total), Tile(part))), node.dtype)
                result.append(Loop(rank, tile, (), whole, (sum_state,), (inner_sum,)))
                result.append(Map(node.dst, node.ranks, Tile(total), node.dtype, node.note))
            case Dot(over=(over,)) if over == rank:
                total = f"{node.dst}_sum"
                inner = replace(
                    node,
                    dst=f"{node.dst}_next",
                    a=substitute(node.a, inlined),
                    b=substitute(node.b, inlined),
                    update=Tile(total),
                    post=None,
                )
                state = LoopState(total, node.ranks, Const(0.0) if node.update is None else node.update, Tile(inner.dst))
                result.append(Loop(rank, tile, (), whole, (state,), (inner,)))
                value: Expr = Tile(total) if node.post is None else substitute(node.post, {Tile(node.dst): Tile(total)})
                result.append(Map(node.dst, node.ranks, value, note=node.note))
            case Loop():
                result.append(replace(node, body=_blocked(node.body, rank, tile, inlined)))
            case _:
                result.append(node)
    return tuple(result)
