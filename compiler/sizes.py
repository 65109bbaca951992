"""Extents of ranks: those that follow from the given ones, and those that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ..ir.cascade import Cascade, Concat, Iterate, Populate, Statement, expressions
from ..ir.errors import CascadeError
from ..ir.expr import Const, Expr, Extent, Index, Op, reads, walk


def complete_sizes(c: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` and every extent that follows: declared sizes, products with one unknown factor, top-k's slots, renamed ranks.

    Raises `CascadeError` for a rank the cascade does not have, a size below 0, and a product that leaves a remainder.
    """
    known = c.all_ranks()
    for rank, size in sizes.items():
        if rank not in known:
            raise CascadeError(f"unknown rank {rank!r} among the sizes", cascade=c.name, hint="the ranks are " + ", ".join(known))
        if size < 0:
            raise CascadeError(f"rank {rank} is given the size {size}", cascade=c.name, hint="a size is 0 or more")
    result = dict(sizes)
    before = -1
    while len(result) > before:
        before = len(result)
        result = c.solve_sizes(result)
        for declaration in c.ranks:
            _solve_part(c, declaration.name, declaration.size, result)
        for s in all_statements(c.body):
            _learn(c, s, result)
    return {rank: result[rank] for rank in (*known, *result) if rank in result}


def missing_sizes(c: Cascade, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The ranks whose extent does not follow from `sizes`, in order of first appearance."""
    known = complete_sizes(c, sizes)
    return tuple(rank for rank in c.all_ranks() if rank not in known)


def _solve_part(c: Cascade, rank: str, size: Expr, known: dict[str, int]) -> None:
    """The one unknown factor or piece of `rank`, if it follows."""
    if rank not in known or not isinstance(size, Op) or size.name not in ("mul", "add"):
        return
    leaves = [node for node in walk(size) if isinstance(node, (Extent, Const))]
    unknown = [leaf.rank for leaf in leaves if isinstance(leaf, Extent) and leaf.rank not in known]
    if len(unknown) != 1:
        return
    others = [int(leaf.value) if isinstance(leaf, Const) else known[leaf.rank] for leaf in leaves if leaf != Extent(unknown[0])]
    if size.name == "add":
        known[unknown[0]] = max(known[rank] - sum(others), 0)
    elif prod(others):
        if known[rank] % prod(others):
            raise CascadeError(
                f"{rank} = {known[rank]} leaves a remainder when split by {prod(others)}",
                cascade=c.name,
                hint=f"a multiple of {prod(others)}",
            )
        known[unknown[0]] = known[rank] // prod(others)


def all_statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """Every statement, those inside iterative blocks after the block itself."""
    for s in body:
        yield s
        if isinstance(s, Iterate):
            yield from all_statements(s.body)


def _learn(c: Cascade, s: Statement, known: dict[str, int]) -> None:
    """The ranks a statement makes, and those that merely rename a tensor's."""
    if isinstance(s, Populate) and s.into not in known:
        if s.rule == "topk":
            if isinstance(s.parameter, Const):
                known[s.into] = int(s.parameter.value)
        elif s.over in known:
            known[s.into] = known[s.over]
    if isinstance(s, Concat) and all(piece in known for piece, _ in s.parts):
        known.setdefault(s.rank, sum(known[piece] for piece, _ in s.parts))
    table = c.tensor_ranks()
    for e in expressions(s):
        for read in reads(e):
            for x, rank in zip(read.coords, table[read.tensor], strict=True):
                if isinstance(x, Index) and rank in known and read.fill is None:
                    known.setdefault(x.rank, known[rank])


def dims(ranks: tuple[str, ...]) -> str:
    """The option that would give those sizes: `--dims m=...,p=...`."""
    return "--dims " + ",".join(f"{rank}=..." for rank in ranks)
