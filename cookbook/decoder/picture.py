"""The picture of the table: perplexity against the tokens that are kept, and against the bits a value takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, GRID = "#1b1f24", "#d8dee4"
COLOURS = ("#b6bfc8", "#6e7781", "#0969da", "#d1741a", "#1a7f37", "#8250df", "#cf222e", "#0b7285", "#9a6700")
MARKS = "osD^vP*Xh"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws both panels of what `measure` found: the quoting task in full lines, the following one in faint ones."""
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for plain in found["plain"].values():
            axes.axhline(plain, color=INK, linewidth=1, linestyle=(0, (1, 1.5)))
    _evicted(left, found)
    _quantized(right, found)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_ylabel("perplexity a byte: quoting (full lines), following (faint)")
        axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _evicted(axes: Axes, found: Mapping[str, Any]) -> None:
    for (name, results), colour, mark in zip(found["evicted"].items(), COLOURS, MARKS, strict=False):
        axes.plot(found["budgets"], results["quoting"], color=colour, marker=mark, markersize=5, linewidth=1.5, label=name)
        axes.plot(found["budgets"], results["following"], color=colour, linewidth=1, alpha=0.4)
    axes.set_xlabel("tokens kept of each prompt, of 256")
    axes.set_title(f"eviction: {found['scored']} bytes after each of {found['prompts']} prompts", fontsize=10.5, loc="left", color=INK)


def _quantized(axes: Axes, found: Mapping[str, Any]) -> None:
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["quantized"]:
        families.setdefault(row["family"], []).append(row)
    for (name, rows), colour, mark in zip(families.items(), COLOURS[1:], MARKS, strict=False):
        rows = sorted(rows, key=lambda row: row["bits"])
        bits = [row["bits"] for row in rows]
        axes.plot(bits, [row["quoting"] for row in rows], color=colour, marker=mark, markersize=6, linewidth=1.5, label=name)
        axes.plot(bits, [row["following"] for row in rows], color=colour, linewidth=1, alpha=0.4)
    axes.set_xlabel("bits a value, scales and indices included")
    axes.set_title("storage of keys and values", fontsize=10.5, loc="left", color=INK)
