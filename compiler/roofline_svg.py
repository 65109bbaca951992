"""The roofline of a cascade as a drawing, written by hand as SVG. Colours are the CSS variables of the page around it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import ceil, floor, log10

from .cost import Cost
from .figures import quantity

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 380, 70, 30, 26, 50


def roofline_svg(found: Cost) -> str:
    """Rate over intensity, both logarithmic: the memory's slope, a ceiling for each unit in use, and this cascade's point."""
    roof = found.roofline
    if roof.time_us <= 0 or roof.memory_us <= 0 or not found.intensity:
        return ""
    bandwidth = roof.bytes / roof.memory_us * 1e6
    ceilings = {f"{u.unit}, {u.runs_as}": u.operations / u.time_us * 1e6 for u in roof.units if u.time_us > 0}
    point = (found.intensity, found.flops / roof.time_us * 1e6)
    highest = max([*ceilings.values(), point[1]])
    x0, x1 = floor(log10(min(found.intensity, highest / bandwidth))) - 1, ceil(log10(max(found.intensity, highest / bandwidth))) + 1
    y0, y1 = floor(log10(min(bandwidth * 10**x0, point[1]))), ceil(log10(highest) + 0.2)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        across = (log10(intensity) - x0) / (x1 - x0)
        up = (log10(rate) - y0) / (y1 - y0)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    lines = [*_grid(at, x0, x1, y0, y1)]
    low, knee = at(10.0**x0, bandwidth * 10.0**x0), at(highest / bandwidth, highest)
    lines.append(_line(low, knee, "var(--accent)", 2))
    middle = ((low[0] + knee[0]) / 2, (low[1] + knee[1]) / 2)
    lines.append(_text(middle[0] - 10, middle[1] - 6, f"memory {quantity(bandwidth, 'B/s')}", "end"))
    for label, rate in ceilings.items():
        begin, end = at(max(rate / bandwidth, 10.0**x0), rate), at(10.0**x1, rate)
        lines.append(_line(begin, end, "var(--accent)", 2 if rate == highest else 1))
        lines.append(_text(end[0] - 4, end[1] - 5, f"{label} {quantity(rate, 'op/s')}", "end"))
    x, y = at(*point)
    lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="var(--mark)"/>')
    lines.append(_text(x + 9, y + 16, quantity(point[1], "op/s"), "start"))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="roofline">{"".join(lines)}</svg>'


def _grid(at: Callable[[float, float], tuple[float, float]], x0: int, x1: int, y0: int, y1: int) -> list[str]:
    """The decades of both axes, and what the axes are."""
    lines = []
    for decade in range(x0, x1 + 1):
        a, b = at(10.0**decade, 10.0**y0), at(10.0**decade, 10.0**y1)
        lines.append(_line(a, b, "var(--line)", 1))
        lines.append(_text(a[0], a[1] + 16, f"{10.0**decade:g}", "middle"))
    for decade in range(y0, y1 + 1):
        a, b = at(10.0**x0, 10.0**decade), at(10.0**x1, 10.0**decade)
        lines.append(_line(a, b, "var(--line)", 1))
        lines.append(_text(a[0] - 6, a[1] + 4, quantity(10.0**decade), "end"))
    lines.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "operations a byte", "middle"))
    lines.append(_text(_LEFT, _TOP - 8, "operations a second", "start"))
    return lines


def _line(a: tuple[float, float], b: tuple[float, float], colour: str, width: int) -> str:
    return f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
