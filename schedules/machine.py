"""A target: the machine a kernel is built for, as data. Frozen, hashable, JSON; read from `targets/*.toml`.

    Target(name, kind, units, memories, caches, limits, features)
    Unit(name, does, pipe, peaks)          operations a second by type; units of one pipe take turns
    Memory(name, bytes, bandwidth)         the first is the main memory
    Cache(name, level, bytes, shared_by)

Every table says where its numbers are from (`source`) and how much they are worth (`basis`): `datasheet` is the vendor's word,
`derived` follows from it by arithmetic, `estimated` is a guess from the processor's features, `measured` was measured here.
`target.py` loads one by name, `host.py` describes the processor this program runs on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal, get_args

from ..ir.errors import ScheduleError, UnsupportedError
from ..ir.types import DTYPES, DType

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["cpu", "cuda", "hip", "ascend"]
Does = Literal["matrix", "vector", "special"]
Basis = Literal["datasheet", "derived", "estimated", "measured"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Hardware that does one kind of operation.

    Args:
        does: `matrix` (a multiply-add counts 2), `vector` (one operation an element) or `special` (exp, division, roots, ...).
        pipe: units with the same pipe take turns, so their times add up; different pipes overlap.
        peaks: operations a second by type.
    """

    name: str
    does: Does
    pipe: str
    peaks: tuple[tuple[str, float], ...]
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of `bytes` bytes, moved at `bandwidth` bytes a second, reads and writes together."""

    name: str
    bytes: int
    bandwidth: float
    basis: Basis
    source: str


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache of `bytes` bytes at `level`, one for every `shared_by` cores; 0 shares it among all."""

    name: str
    level: int
    bytes: int
    shared_by: int
    line: int = 64


@dataclass(frozen=True, slots=True)
class Target:
    """See the module.

    `limits` are whole numbers a schedule must keep: `vector_width` (f32 lanes), `registers` (vector registers of a CPU core, 32-bit
    registers of a GPU thread), `threads` (workers of a CPU, threads of a GPU block), `warp`, `shared_memory` (bytes a block), ...
    Those `_per_core` are what the blocks that run at once on a multiprocessor share: `warps_per_core`, `blocks_per_core`,
    `registers_per_core` in `partitions` equal parts, handed out to warps in units of `register_unit`, and `shared_memory_per_core`
    bytes in units of `shared_unit`, of which `shared_reserved` bytes a block are the system's.
    """

    name: str
    kind: Kind
    description: str
    buildable: bool
    cores: int
    units: tuple[Unit, ...]
    memories: tuple[Memory, ...]
    caches: tuple[Cache, ...]
    limits: tuple[tuple[str, int], ...]
    limits_source: str
    features: tuple[str, ...] = ()

    def limit(self, name: str, default: int = 0) -> int:
        """The limit of that name, `default` where the target has none."""
        return dict(self.limits).get(name, default)

    def has(self, feature: str) -> bool:
        """Whether the processor has `feature`, such as `fma` or `avx512_bf16`."""
        return feature in self.features

    @property
    def vector_width(self) -> int:
        """f32 lanes of a vector register; the warp of a GPU."""
        return self.limit("vector_width", 1)

    @property
    def threads(self) -> int:
        """Workers of a CPU, threads of a GPU block."""
        return self.limit("threads", 1)

    @property
    def memory(self) -> Memory:
        """The main memory."""
        return self.memories[0]

    def cache(self, level: int) -> Cache | None:
        """The data cache of that level, or None."""
        return next((c for c in self.caches if c.level == level), None)

    def peak(self, does: Does, dtype: DType) -> tuple[Unit, str, float]:
        """The unit, the type and the rate at which operations of `dtype` run.

        A type no such unit has runs in the narrowest wider one (bf16 as f32 where there is no bf16 dot); a target without units of
        that kind uses its vector units. Raises `UnsupportedError` if nothing fits.
        """
        units = [u for u in self.units if u.does == does] or [u for u in self.units if u.does == "vector"]
        rates = [(u, DTYPES[name], rate) for u in units for name, rate in u.peaks]
        fitting = [r for r in rates if _holds(r[1], dtype)]
        if not fitting and not dtype.is_float:  # i64 where lanes have 32 bits: in parts
            fitting = [r for r in rates if r[1].is_integer] or rates
        if not fitting:
            raise UnsupportedError(f"{self.name} has no unit for {does} operations on {dtype}", hint="cast to f32 before the operation")
        unit, used, rate = min(fitting, key=lambda r: (r[1] != dtype, r[1].is_float != dtype.is_float, r[1].bits, -r[2]))
        return unit, used.name, rate

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` is the inverse."""
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("units", "memories", "caches", "limits", "features")},
            "units": [{**asdict(u), "peaks": dict(u.peaks)} for u in self.units],
            "memories": [asdict(m) for m in self.memories],
            "caches": [asdict(c) for c in self.caches],
            "limits": dict(self.limits),
            "features": list(self.features),
        }

    def to_json(self) -> str:
        """One line of canonical JSON: the form stored and hashed."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @staticmethod
    def from_dict(data: object) -> Target:
        """A target from plain data. Raises `ScheduleError` naming what is missing or wrong."""
        try:
            return _target(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) else f"is malformed: {error}"
            raise ScheduleError(f"a target description {what}", hint="compare with schedules/targets/cpu_generic.toml") from None

    @staticmethod
    def from_json(text: str) -> Target:
        """The inverse of `to_json`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScheduleError(f"a target description is not JSON: {error}") from None
        return Target.from_dict(data)


def _holds(wide: DType, dtype: DType) -> bool:
    """Whether operations on `dtype` can run in `wide`: at least as wide, and a float for a float."""
    if wide == dtype:
        return True
    if dtype.is_float:
        return wide.is_float and wide.bits > dtype.bits
    return wide.bits >= dtype.bits


def _target(data: Any) -> Target:
    if data["kind"] not in get_args(Kind):
        raise ValueError(f"kind {data['kind']!r} is none of {', '.join(get_args(Kind))}")
    target = Target(
        name=str(data["name"]),
        kind=data["kind"],
        description=str(data["description"]),
        buildable=bool(data["buildable"]),
        cores=_positive(data["cores"], "cores"),
        units=tuple(_unit(u) for u in data["units"]),
        memories=tuple(
            Memory(str(m["name"]), _positive(m["bytes"], "bytes"), float(m["bandwidth"]), _basis(m["basis"]), str(m["source"]))
            for m in data["memories"]
        ),
        caches=tuple(
            Cache(str(c["name"]), int(c["level"]), _positive(c["bytes"], "bytes"), int(c["shared_by"]), int(c.get("line", 64)))
            for c in data.get("caches", ())
        ),
        limits=tuple(sorted((str(k), int(v)) for k, v in data["limits"].items())),
        limits_source=str(data["limits_source"]),
        features=tuple(sorted(str(f) for f in data.get("features", ()))),
    )
    if not target.memories or not target.units:
        raise ValueError("a target needs at least one unit and one memory")
    return target


def _unit(data: Any) -> Unit:
    if data["does"] not in get_args(Does):
        raise ValueError(f"a unit does {data['does']!r}, not one of {', '.join(get_args(Does))}")
    unknown = set(data["peaks"]) - set(DTYPES)
    if unknown:
        raise ValueError(f"unit {data['name']!r} has a peak for the unknown type {sorted(unknown)[0]!r}")
    peaks = tuple(sorted((str(t), float(rate)) for t, rate in data["peaks"].items()))
    return Unit(str(data["name"]), data["does"], str(data["pipe"]), peaks, _basis(data["basis"]), str(data["source"]))


def _basis(value: Any) -> Any:
    if value not in get_args(Basis):
        raise ValueError(f"basis {value!r} is none of {', '.join(get_args(Basis))}")
    return value


def _positive(value: Any, what: str) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{what} is {value!r}, not a whole number of at least 1")
    return int(value)


def read_target(name: str) -> Target:
    """The description `targets/<name>.toml` as it stands."""
    text = (target_folder() / f"{name.replace(':', '_', 1)}.toml").read_text(encoding="utf-8")
    return Target.from_dict(tomllib.loads(text))


def target_folder() -> Any:
    """Where the descriptions lie."""
    return files(__package__) / "targets"
