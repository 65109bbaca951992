"""The tables of content: their columns, and the names that rows have from what they hold.

A row of these tables is named by a hash of its own content, so that a row is the same row in every file, a copy can be told from a
forgery, and the union of two files depends on neither their order nor their number. The name of most rows is the first 32 hex digits
of the SHA-256 of the JSON list of their values in the order below; a workload is named by its family and extents, a family by the
cascade's text, layout and alignment, a schedule by its own text. What a row is worth is not asked here: that is checked as it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, TypeAlias

Value: TypeAlias = "str | int | float | None"
Values: TypeAlias = Sequence[Any]
Kind = Literal["text", "whole", "real", "text?", "real?"]

MAX_TEXT = 1 << 20
MAX_ROW = 1 << 22
MAX_WHOLE = 1 << 63
_TYPES: Mapping[Kind, tuple[type, ...]] = {
    "text": (str,), "whole": (int,), "real": (float,), "text?": (str, type(None)), "real?": (float, type(None)),
}  # fmt: skip
_encode = json.JSONEncoder(separators=(",", ":")).encode
_encode_sorted = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode


class Invalid(ValueError):
    """A stored value that cannot be used. Never leaves the tuner: readers count it as a miss."""


def canonical(data: object) -> str:
    """One line of JSON with sorted keys."""
    return _encode_sorted(data)


def digest(text: str, digits: int = 32) -> str:
    """The first hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:digits]


def content_id(*values: object) -> str:
    """The name of some plain data: 32 hex digits of the SHA-256 of its canonical JSON."""
    return digest(canonical(values))


def workload_id(family: str, extents: str) -> str:
    """The name of a workload, from its family and its extents as text."""
    return digest(f"{family} {extents}")


def _name_of_values(values: Values) -> str:
    return hashlib.sha256(_encode(list(values)).encode()).hexdigest()[:32]


def _name_of_workload(values: Values) -> str:
    family, cascade, layout, alignment, extents = values
    return workload_id(family, extents) if family == content_id(cascade, layout, alignment) else ""


def _name_of_schedule(values: Values) -> str:
    return digest(values[0], 16)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of content: `columns` without the id, in the order in which they are hashed; `names` has the id before them."""

    name: str
    columns: tuple[tuple[str, Kind], ...]
    name_of: Callable[[Values], str] = _name_of_values
    names: tuple[str, ...] = field(init=False)
    _types: frozenset[tuple[type, ...]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", ("id", *(name for name, _ in self.columns)))
        object.__setattr__(self, "_types", frozenset(product(*(_TYPES[kind] for _, kind in self.columns))))

    def has_types(self, values: Values) -> bool:
        """Whether every value has the type of its column."""
        return tuple(map(type, values)) in self._types

    def is_named_right(self, name: object, values: Values) -> bool:
        """Whether `values` have the right types, are of bounded size and hash to `name`: whoever they come from, they can be stored."""
        if not self.has_types(values):
            return False
        text = "".join([v for v in values if v.__class__ is str])
        try:
            if len(text) > MAX_ROW or (not text.isascii() and not text.encode()):
                return False
            return all(-MAX_WHOLE <= v < MAX_WHOLE for v in values if v.__class__ is int) and self.name_of(values) == name
        except ValueError:  # a surrogate that UTF-8 has no bytes for
            return False

    def row(self, values: Mapping[str, Value]) -> tuple[Any, ...]:
        """The row of some named values, as it is stored: id first, texts that UTF-8 can hold, reals as reals. Raises `Invalid`."""
        found = [_stored(values[name], kind) for name, kind in self.columns]
        if not self.has_types(found):
            wrong = next(name for (name, kind), value in zip(self.columns, found, strict=True) if type(value) not in _TYPES[kind])
            raise Invalid(f"{self.name}.{wrong} is {str(values[wrong])[:80]!r}")
        return (self.name_of(found), *found)

    def verified(self, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """Those of `rows` (id first) that hash to their own name."""
        for row in rows:
            if row and self.is_named_right(row[0], row[1:]):
                yield tuple(row)


def _stored(value: Value, kind: Kind) -> Value:
    if isinstance(value, str):
        if value.isascii() and "\x00" not in value:
            return value
        return value.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")
    if isinstance(value, (int, float)) and kind.startswith("real"):
        return float(value) + 0.0  # no negative zero: SQLite does not keep its sign
    return value


WORKLOAD = Table(
    "workload",
    (("family", "text"), ("cascade", "text"), ("layout", "text"), ("alignment", "whole"), ("extents", "text")),
    _name_of_workload,
)
DEVICE = Table("device", (("vendor", "text"), ("model", "text"), ("arch", "text"), ("units", "whole"), ("power_cap_w", "real?")))
TOOLCHAIN = Table("toolchain", (("version", "text"), ("abi", "whole"), ("backend", "text"), ("compiler", "text")))
POLICY = Table("policy", (("mode", "text"), ("cache", "text"), ("timer", "text"), ("method", "whole")))
SCHEDULE = Table("schedule", (("json", "text"),), _name_of_schedule)
CODE = Table("code", (("source", "text"), ("backend", "text"), ("facts", "text")))
EVIDENCE = Table(
    "evidence",
    (
        ("oracle", "text"), ("seeds", "text"), ("distributions", "text"), ("shapes", "text"), ("tolerance", "real"),
        ("largest_error", "real"),
    ),
)  # fmt: skip
MEASUREMENT = Table(
    "measurement",
    (
        ("workload", "text"), ("device", "text"), ("toolchain", "text"), ("policy", "text"), ("schedule", "text"), ("code", "text?"),
        ("evidence", "text?"), ("basis", "text"), ("status", "text"), ("reason", "text"), ("role", "text"), ("samples_ms", "text"),
        ("samples", "whole"), ("median_ms", "real?"), ("baseline_ms", "real?"), ("name", "text"), ("run", "text"), ("trial", "whole"),
        ("host", "text"), ("driver", "text"), ("memory_bytes", "whole"), ("seed", "whole"), ("code_commit", "text"), ("event", "text"),
    ),
)  # fmt: skip
# what measurements refer to comes first
TABLES = (WORKLOAD, DEVICE, TOOLCHAIN, POLICY, SCHEDULE, CODE, EVIDENCE, MEASUREMENT)
