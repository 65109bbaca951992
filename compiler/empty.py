"""Calls with a tensor that has no element although it is read: kernels have no address to read at, so the reference answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.cascade import Cascade, expressions
from ..ir.expr import Index, reads, walk


def reads_an_empty_tensor(cascade: Cascade, sizes: Mapping[str, int]) -> bool:
    """Whether a tensor without elements is read at some point, which only a condition can leave out: no rank of the point is empty."""
    if all(sizes.values()):
        return False
    ranks = cascade.tensor_ranks()
    for statement in cascade.body:
        for e in expressions(statement):
            for read in reads(e):
                moving = {n.rank for c in read.coords for n in walk(c) if isinstance(n, Index)}
                if any(sizes.get(r) == 0 for r in ranks.get(read.tensor, ())) and not any(sizes.get(r) == 0 for r in moving):
                    return True
    return False


@dataclass(frozen=True, slots=True)
class ByReference:
    """A launch `(*inputs, *outputs, *scalars)` of a whole cascade by the reference evaluator, which raises where nothing may be read."""

    cascade: Cascade

    def __call__(self, *values: Any) -> None:
        from ..ir.reference import evaluate

        names = [t.name for t in self.cascade.inputs]
        outputs = values[len(names) : len(names) + len(self.cascade.outputs)]
        scalars = values[len(names) + len(outputs) :]
        found = evaluate(
            self.cascade,
            dict(zip(names, values[: len(names)], strict=True)),
            dict(zip((s.name for s in self.cascade.scalars), scalars, strict=True)),
        )
        for declared, out in zip(self.cascade.outputs, outputs, strict=True):
            out.copy_(found[declared.name])
