"""Figures as people read them, and what they rest on."""

from __future__ import annotations

from ..schedules.target import Target
from .sizes import dims


def basis_of(target: Target) -> str:
    """What the target's figures rest on, the weakest first: `estimated`, `derived`, `datasheet` or `measured`."""
    order = ("estimated", "derived", "datasheet", "measured")
    return min([u.basis for u in target.units] + [m.basis for m in target.memories], key=order.index)


def missing_hint(missing: tuple[str, ...]) -> str:
    """The sentence that stands where the figures in bytes would be."""
    return f"no extent for {', '.join(missing)}: bytes, operations and times are left out; give {dims(missing)}"


def quantity(x: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 1.23 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= 0.9995 * factor:  # what rounds up to 1000 of one prefix is 1 of the next
            return f"{x / factor:.3g} {prefix}{unit}"
    return f"{x:.3g} {unit}".rstrip()


def byte_count(x: float) -> str:
    """Bytes with a decimal prefix: 1.23 MB."""
    return quantity(x, "B")


def duration(us: float) -> str:
    """A time given in microseconds: 1.23 ms."""
    return f"{us / 1e6:.3g} s" if us >= 1e6 else f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} us"
