"""Where tiles live: one buffer a tile in its layout, padded so that whole vectors and register tiles fit; aliased tiles share one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.errors import ScheduleError
from ...ir.types import DType
from . import script as ts
from .script import Value


@dataclass(frozen=True, slots=True)
class Part:
    """An axis of a layout: a rank, its quotient `r/n` or its remainder `r%n`."""

    rank: str
    kind: str = ""
    n: int = 1

    def index(self, local: Value) -> Value:
        """This axis' index for the index `local` within the tile."""
        if self.kind == "/":
            return ts.quotient(local, ts.integer(self.n))
        return ts.remainder(local, ts.integer(self.n)) if self.kind == "%" else local

    def extent(self, padded: int) -> int:
        if self.kind == "/":
            return -(-padded // self.n)
        return self.n if self.kind == "%" else padded


def parse_layout(tile: str, ranks: tuple[str, ...], layout: tuple[str, ...]) -> tuple[Part, ...]:
    """The axes of a layout such as `("m/32", "e", "m%32")`. Raises `ScheduleError` unless it covers exactly `ranks`."""
    parts = []
    for entry in layout:
        for kind in "/%":
            rank, mark, number = entry.partition(kind)
            if mark:
                if not number.isdigit() or int(number) < 2:
                    raise ScheduleError(f"layout[{tile}] has the axis {entry!r}", hint="a rank, rank/n or rank%n")
                parts.append(Part(rank, kind, int(number)))
                break
        else:
            parts.append(Part(entry))
    for rank in ranks:
        of_rank = [p for p in parts if p.rank == rank]
        whole = [p.kind for p in of_rank] == [""]
        split = sorted(p.kind for p in of_rank) == ["%", "/"] and len({p.n for p in of_rank}) == 1
        if not whole and not split:
            raise ScheduleError(f"layout[{tile}] = ({', '.join(layout)}) does not lay out rank {rank!r} once")
    foreign = [p.rank for p in parts if p.rank not in ranks]
    if foreign:
        raise ScheduleError(f"layout[{tile}] names the rank {foreign[0]!r}", hint=f"the tile has {', '.join(ranks) or 'no ranks'}")
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class TileBuffer:
    """A tile's memory. A `paired` one holds two bf16 in an i32: the last axis is the pair's rank modulo 2."""

    name: str
    ranks: tuple[str, ...]
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: str
    paired: str | None = None

    @property
    def lane(self) -> str | None:
        """The rank along which elements are adjacent."""
        return self.parts[-1].rank if self.parts else None

    def contiguous(self, rank: str, lanes: int) -> bool:
        """Whether `lanes` elements along `rank` from a multiple of `lanes` are adjacent."""
        if not self.parts or self.parts[-1].rank != rank:
            return False
        last = self.parts[-1]
        return last.kind != "%" or last.n % lanes == 0

    def at(self, local: Mapping[str, Value], lane: str | None = None, lanes: int = 1) -> Value:
        """The element at `local`, or a vector of `lanes` along `lane` (which must be contiguous). Of a pair: both halves."""
        if not self.parts:
            return Value(f"{self.name}[0]", self.dtype)
        index = [p.index(local[p.rank]) for p in self.parts]
        if lane is not None and lanes > 1:
            index[-1] = ts.ramp(index[-1], lanes)
            return Value(f"{self.name}[{', '.join(i.text for i in index)}]", self.dtype, lanes)
        return Value(f"{self.name}[{', '.join(i.text for i in index)}]", self.dtype)


def storage_type(t: DType) -> str:
    """The element type of a tile's buffer. Narrow floats are kept as f32, bools as bytes."""
    if t.is_float:
        return "float64" if t.bits == 64 else "float32"
    if t.kind == "bool":
        return "int8"
    return {"u8": "uint8", "i4": "int8"}.get(t.name, f"int{t.bits}")


def tile_buffer(name: str, tile: str, ranks: tuple[str, ...], layout: tuple[str, ...], padded: Mapping[str, int], t: DType) -> TileBuffer:
    """The buffer `name` for a tile of that layout; a layout that ends in `r%2` of a bf16 tile is paired along r."""
    parts = parse_layout(tile, ranks, layout)
    if t.name == "bf16" and parts and parts[-1].kind == "%" and parts[-1].n == 2:
        rank = parts[-1].rank
        parts = parts[:-1]
        shape = tuple(p.extent(padded[p.rank] + padded[p.rank] % 2) for p in parts)
        return TileBuffer(name, ranks, parts, shape, "int32", rank)
    return TileBuffer(name, ranks, parts, tuple(p.extent(padded[p.rank]) for p in parts) or (1,), storage_type(t))
