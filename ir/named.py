"""A torch tensor whose dimensions have names: what both interpreters compute with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import CascadeError
from .types import DType

Ranks = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor with one dimension for each of `ranks`. Its element type is `dtype`, whatever torch type holds it."""

    data: Tensor
    ranks: Ranks
    dtype: DType
    weak: bool = False


def aligned(value: Value, ranks: Ranks) -> Tensor:
    """`value` with its dimensions in the order of `ranks`, extent 1 where it lacks one. Raises `CascadeError` if it has another."""
    present = [rank for rank in ranks if rank in value.ranks]
    if len(present) != len(value.ranks):
        extra = [rank for rank in value.ranks if rank not in ranks]
        raise CascadeError(f"a value over {', '.join(value.ranks)} leaves rank {', '.join(extra)} unreduced")
    data = value.data.permute([value.ranks.index(rank) for rank in present])
    return data[tuple(slice(None) if rank in value.ranks else None for rank in ranks)]


def union(*values: Value | Ranks) -> Ranks:
    """Ranks in order of first appearance."""
    return tuple(dict.fromkeys(rank for v in values for rank in (v.ranks if isinstance(v, Value) else v)))
