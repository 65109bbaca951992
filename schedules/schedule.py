"""A schedule: how a tile program is cut and laid out, as data. Frozen, versioned, JSON; never code.

    tile{rank: n}    layout{tile: (ranks..., lane)}    dot{dst: DotSchedule}    group{tile: GroupSchedule}    grid order    choices
    kernel{kernel: KernelOptions}

Every table may be partial: what a schedule leaves open, the default for the program and the target fills in (`default.py`,
`layout.py`), so a tuned schedule records only what was chosen. Keys of `layout`, `dot` and `group` are names of tiles of the lowered
program. `stream` says whether dependent reductions over a rank share a pass, `result` what becomes of a reduction inside a tile that is
needed more than once: worked out `again`, kept by its kernel between two streams, or stored by a kernel of its own. `split` cuts a
stream into so many stretches, tasks of their own whose states a second kernel merges. `kernel` says how a kernel uses a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from ..ir.errors import ScheduleError

VERSION = 1
GridOrder = Literal["heavy_first", "rising", "zigzag"]
Stream = Literal["online", "repeat"]
Result = Literal["again", "keep", "store"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DotSchedule:
    """A contraction's register tile.

    Args:
        register: accumulators a rank, such as (("m", 4), ("f", 64)); the lane's entry is a multiple of the vector width.
        lane: the rank along the vector; one of `over` makes it horizontal.
        k_block: elements of the contracted rank a block; None for all of it.
        update_at_load: the update enters as the accumulators are loaded rather than as they are written back.
    """

    register: tuple[tuple[str, int], ...] = ()
    lane: str | None = None
    k_block: int | None = None
    update_at_load: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", tuple(sorted(self.register)))  # equal register tiles are equal


@dataclass(frozen=True, slots=True)
class GroupSchedule:
    """A run of maps and reductions: the rank along the vector and how many vectors are in flight."""

    lane: str | None = None
    unroll: int | None = None


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """How one kernel uses a GPU.

    Args:
        warps: of a program.
        stages: tiles of a loop in flight; 1 loads what it needs when it needs it.
        edge: `split` runs tiles that lie wholly inside the domain in a loop without masks, `mask` masks all tiles alike.
        persistent: whether as many programs as fit the machine loop over the tasks.
        loads: `late` reads a tile of the stream where it is used first, `first` reads all of them at the head of the loop.
        descriptors: whether tiles of two axes, one of them contiguous, are fetched whole by the copy engine, by tensor descriptors.
        warp_specialize: whether some warps fetch while others compute; for loops whose loads all have descriptors.
        precision: of matrix products of f32: `ieee` has no matrix unit, `tf32x3` three products on it, `tf32` one of ten mantissa bits.
    """

    warps: int = 4
    stages: int = 2
    edge: Literal["split", "mask"] = "split"
    persistent: bool = False
    loads: Literal["late", "first"] = "late"
    descriptors: bool = False
    warp_specialize: bool = False
    precision: Literal["ieee", "tf32", "tf32x3"] = "ieee"


@dataclass(frozen=True, slots=True)
class Schedule:
    """See the module. Tables are tuples of pairs, sorted by key, so that equal schedules are equal and hash alike."""

    tile: tuple[tuple[str, int], ...] = ()
    layout: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dot: tuple[tuple[str, DotSchedule], ...] = ()
    group: tuple[tuple[str, GroupSchedule], ...] = ()
    grid_order: GridOrder = "heavy_first"
    stream: tuple[tuple[str, Stream], ...] = ()
    result: tuple[tuple[str, Result], ...] = ()
    split: tuple[tuple[str, int], ...] = ()
    kernel: tuple[tuple[str, KernelOptions], ...] = ()
    version: int = VERSION

    @property
    def plan(self) -> dict[str, Any]:
        """The choices that are made when the plan is: the keyword arguments of `make_plan`."""
        return {"repeat": self.repeated, "results": dict(self.result), "split": dict(self.split)}

    @property
    def repeated(self) -> frozenset[str]:
        """The ranks whose dependent reductions take a pass each."""
        return frozenset(rank for rank, choice in self.stream if choice == "repeat")

    @staticmethod
    def make(
        *,
        tile: Mapping[str, int] | None = None,
        layout: Mapping[str, tuple[str, ...]] | None = None,
        dot: Mapping[str, DotSchedule] | None = None,
        group: Mapping[str, GroupSchedule] | None = None,
        grid_order: GridOrder = "heavy_first",
        stream: Mapping[str, Stream] | None = None,
        result: Mapping[str, Result] | None = None,
        split: Mapping[str, int] | None = None,
        kernel: Mapping[str, KernelOptions] | None = None,
    ) -> Schedule:
        """A schedule from plain tables."""
        return Schedule(
            tile=_pairs(tile),
            layout=_pairs(layout),
            dot=_pairs(dot),
            group=_pairs(group),
            grid_order=grid_order,
            stream=_pairs(stream),
            result=_pairs(result),
            split=_pairs(split),
            kernel=_pairs(kernel),
        )

    def with_tiles(self, **tiles: int) -> Schedule:
        """This schedule with some tile sizes set."""
        return replace(self, tile=_pairs({**dict(self.tile), **tiles}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; empty tables are left out."""
        tables: dict[str, Any] = {
            "tile": dict(self.tile),
            "layout": {name: list(ranks) for name, ranks in self.layout},
            "dot": {name: {**asdict(d), "register": dict(d.register)} for name, d in self.dot},
            "group": {name: asdict(g) for name, g in self.group},
            "stream": dict(self.stream),
            "result": dict(self.result),
            "split": dict(self.split),
            "kernel": {name: asdict(k) for name, k in self.kernel},
        }
        return {"version": self.version, **{k: v for k, v in tables.items() if v}, "grid_order": self.grid_order}

    def to_json(self) -> str:
        """One line of canonical JSON: the form stored and hashed."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @staticmethod
    def from_dict(data: object) -> Schedule:
        """A schedule from plain data. Raises `ScheduleError` naming the entry that is unknown, of a wrong type or out of bounds."""
        table = _mapping(data, "a schedule")
        unknown = set(table) - {"version", "tile", "layout", "dot", "group", "grid_order", "stream", "result", "split", "kernel"}
        if unknown:
            hint = "entries are tile, layout, dot, group, grid_order, stream, result, split, kernel"
            raise ScheduleError(f"a schedule has no entry {sorted(unknown)[0]!r}", hint=hint)
        if table.get("version", VERSION) != VERSION:
            raise ScheduleError(f"schedule version {table.get('version')!r}, this einfall reads version {VERSION}")
        order = table.get("grid_order", "heavy_first")
        if order not in ("heavy_first", "rising", "zigzag"):
            raise ScheduleError(f"grid_order is {order!r}", hint="heavy_first, rising or zigzag")
        stream = {_name(k): v for k, v in _mapping(table.get("stream", {}), "stream").items()}
        for rank, choice in stream.items():
            if choice not in ("online", "repeat"):
                raise ScheduleError(f"stream[{rank}] is {choice!r}", hint="online or repeat")
        result = {_name(k): v for k, v in _mapping(table.get("result", {}), "result").items()}
        for name, choice in result.items():
            if choice not in ("again", "keep", "store"):
                raise ScheduleError(f"result[{name}] is {choice!r}", hint="again, keep or store")
        return Schedule.make(
            tile={_name(k): _size(v, f"tile[{k}]") for k, v in _mapping(table.get("tile", {}), "tile").items()},
            layout={_name(k): _names(v, f"layout[{k}]") for k, v in _mapping(table.get("layout", {}), "layout").items()},
            dot={_name(k): _dot(v, f"dot[{k}]") for k, v in _mapping(table.get("dot", {}), "dot").items()},
            group={_name(k): _group(v, f"group[{k}]") for k, v in _mapping(table.get("group", {}), "group").items()},
            grid_order=order,
            stream=stream,
            result=result,
            split={_name(k): _size(v, f"split[{k}]") for k, v in _mapping(table.get("split", {}), "split").items()},
            kernel={_name(k): _kernel(v, f"kernel[{k}]") for k, v in _mapping(table.get("kernel", {}), "kernel").items()},
        )

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The inverse of `to_json`; malformed text is a `ScheduleError`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScheduleError(f"a schedule is not JSON: {error}") from None
        return Schedule.from_dict(data)


def _pairs(table: Mapping[str, T] | None) -> tuple[tuple[str, T], ...]:
    return tuple(sorted((table or {}).items(), key=lambda item: item[0]))


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ScheduleError(f"{what} must be a table, found {value!r}")
    return dict(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 200:
        raise ScheduleError(f"{value!r} is no name of a rank or tile")
    return value


def _size(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 24:
        raise ScheduleError(f"{what} is {value!r}", hint="a whole number from 1 to 16777216")
    return value


def _names(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ScheduleError(f"{what} must be a list of ranks, found {value!r}")
    return tuple(_name(v) for v in value)


def _dot(value: object, what: str) -> DotSchedule:
    table = _mapping(value, what)
    unknown = set(table) - {"register", "lane", "k_block", "update_at_load"}
    if unknown:
        raise ScheduleError(f"{what} has no entry {sorted(unknown)[0]!r}")
    lane, k_block, late = table.get("lane"), table.get("k_block"), table.get("update_at_load", False)
    if not isinstance(late, bool):
        raise ScheduleError(f"{what}.update_at_load is {late!r}", hint="true or false")
    register = _mapping(table.get("register", {}), f"{what}.register")
    return DotSchedule(
        register=tuple((_name(k), _size(v, f"{what}.register[{k}]")) for k, v in register.items()),
        lane=None if lane is None else _name(lane),
        k_block=None if k_block is None else _size(k_block, f"{what}.k_block"),
        update_at_load=late,
    )


def _group(value: object, what: str) -> GroupSchedule:
    table = _mapping(value, what)
    unknown = set(table) - {"lane", "unroll"}
    if unknown:
        raise ScheduleError(f"{what} has no entry {sorted(unknown)[0]!r}")
    lane, unroll = table.get("lane"), table.get("unroll")
    return GroupSchedule(None if lane is None else _name(lane), None if unroll is None else _size(unroll, f"{what}.unroll"))


CHOICES = {"edge": ("split", "mask"), "loads": ("late", "first"), "precision": ("ieee", "tf32", "tf32x3")}
SWITCHES = ("persistent", "descriptors", "warp_specialize")
MAX_WARPS, MAX_STAGES = 32, 8


def _kernel(value: object, what: str) -> KernelOptions:
    table = _mapping(value, what)
    default = KernelOptions()
    unknown = set(table) - set(asdict(default))
    if unknown:
        raise ScheduleError(f"{what} has no entry {sorted(unknown)[0]!r}", hint=f"entries are {', '.join(asdict(default))}")
    for name, choices in CHOICES.items():
        if table.get(name, choices[0]) not in choices:
            raise ScheduleError(f"{what}.{name} is {table[name]!r}", hint=" or ".join(choices))
    for name in SWITCHES:
        if not isinstance(table.get(name, False), bool):
            raise ScheduleError(f"{what}.{name} is {table[name]!r}", hint="true or false")
    warps, stages = _size(table.get("warps", default.warps), f"{what}.warps"), _size(table.get("stages", default.stages), f"{what}.stages")
    if warps > MAX_WARPS or warps & (warps - 1):
        raise ScheduleError(f"{what}.warps is {warps}", hint=f"a power of two up to {MAX_WARPS}")
    if stages > MAX_STAGES:
        raise ScheduleError(f"{what}.stages is {stages}", hint=f"a whole number from 1 to {MAX_STAGES}")
    return KernelOptions(**{**asdict(default), **table, "warps": warps, "stages": stages})
