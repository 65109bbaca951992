"""The picture of a run: how tuning went, and where the attentions stand under the roofline of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, QUIET, BLUE, ORANGE, GREEN, RED = "#1b1f24", "#6e7781", "#0969da", "#d1741a", "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Tuning:
    """A tuning run: the time of each trial in order (None where it failed), of the default, and the least the machine allows."""

    trials_ms: tuple[float | None, ...]
    default_ms: float | None
    floor_ms: float
    title: str


@dataclass(frozen=True)
class Roof:
    """A machine and what ran on it: operations and bytes of the work, and for each attention its name and time."""

    operations: float
    bytes: float
    flops_a_second: float
    bytes_a_second: float
    floor_ms: float
    times_ms: tuple[tuple[str, float], ...]
    title: str

    @property
    def intensity(self) -> float:
        return self.operations / self.bytes


def draw(tuning: Tuning, roof: Roof, title: str, path: Path) -> Figure:
    """Draws both side by side and writes them to `path`."""
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, w_pad=0.08, h_pad=0.08)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        axes.grid(True, which="major", color="#d8dee4", linewidth=0.6)
        axes.set_axisbelow(True)
    _draw_tuning(left, tuning)
    _draw_roof(right, roof)
    figure.suptitle(title, fontsize=12.5, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return figure


def _draw_tuning(axes: Axes, tuning: Tuning) -> None:
    measured = [(i, t) for i, t in enumerate(tuning.trials_ms, 1) if t is not None]
    failed = [i for i, t in enumerate(tuning.trials_ms, 1) if t is None]
    count = max(len(tuning.trials_ms), 1)
    best, curve = float("inf"), []
    for i, t in measured:
        best = min(best, t)
        curve.append((i, best))
    axes.set_yscale("log")
    axes.scatter(*zip(*measured, strict=True), s=34, color=BLUE, alpha=0.75, linewidths=0, label="candidate", zorder=3)
    axes.step([i for i, _ in curve] + [count], [t for _, t in curve] + [best], where="post", color=GREEN, linewidth=2.2, zorder=2)
    top = max(t for _, t in measured)
    if failed:
        axes.scatter(failed, [top * 1.25] * len(failed), marker="x", s=36, color=RED, label="failed", zorder=3)
    right = count * 1.03 + 0.3
    levels = [(best, f"best  {_ms(best)}", GREEN), (tuning.floor_ms, f"floor  {_ms(tuning.floor_ms)}", INK)]
    axes.plot([0, count], [tuning.floor_ms] * 2, color=INK, linewidth=1.2, linestyle=(0, (1, 1.5)))
    if tuning.default_ms is not None:
        axes.plot([0, count], [tuning.default_ms] * 2, color=ORANGE, linewidth=1.4, linestyle="--")
        levels.append((tuning.default_ms, f"default  {_ms(tuning.default_ms)}", ORANGE))
    low, high = tuning.floor_ms / 1.35, top * 1.5
    axes.set_ylim(low, high)
    axes.set_xlim(0.2, count * 1.28)
    for (_, text, colour), y in zip(sorted(levels), _apart([y for y, *_ in sorted(levels)], (high / low) ** 0.045), strict=True):
        axes.text(right, y, text, color=colour, va="center", ha="left", fontsize=9.5, fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda t, _: f"{t:g}" if high / low < 12 else ""))
    axes.tick_params(which="minor", labelsize=8, colors=QUIET)
    axes.set_xlabel("trial, in the order they were measured")
    axes.set_ylabel("milliseconds a call")
    axes.set_title(tuning.title, fontsize=10.5, color=INK, loc="left")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _draw_roof(axes: Axes, roof: Roof) -> None:
    reachable = roof.operations / roof.floor_ms / 1e6
    rates = [roof.operations / ms / 1e6 for _, ms in roof.times_ms]
    peak, slope, at = roof.flops_a_second / 1e9, roof.bytes_a_second / 1e9, roof.intensity
    knee = peak / slope
    x0, x1 = min(at, knee) / 6, max(at, knee) * 40
    y0, y1 = min([*rates, slope * x0 * 2]) / 2, peak * 2
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([x0, knee, x1], [slope * x0, peak, peak], color=INK, linewidth=2)
    axes.axvline(at, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set_xlim(x0, x1)
    axes.set_ylim(y0, y1)
    axes.text(x1 / 1.1, peak * 1.08, f"fp32 multiply-adds  {peak:.0f} GFLOP/s", ha="right", va="bottom", fontsize=9.5, color=INK)
    axes.text(x0 * 2.1, slope * x0 * 1.35, f"memory  {slope:.1f} GB/s", ha="left", va="center", fontsize=9.5, color=INK)
    labels = [(reachable, f"floor {_ms(roof.floor_ms)}, exponentials included", INK)]
    for (name, ms), rate, colour in zip(roof.times_ms, rates, _colours(len(rates)), strict=True):
        labels.append((rate, f"{name}  {_ms(ms)}, {100 * rate / reachable:.0f} % of the floor", colour))
    labels.sort()
    for (rate, text, colour), y in zip(labels, _apart([rate for rate, *_ in labels], (y1 / y0) ** 0.052), strict=True):
        axes.scatter([at], [rate], s=64, marker="_" if colour == INK else "o", color=colour, zorder=3, linewidths=2 if colour == INK else 0)
        axes.annotate(
            text, (at, rate), xytext=(at * 1.5, y), fontsize=9.5, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("operations for each byte that must move")
    axes.set_ylabel("GFLOP/s, of the operations that are needed")
    axes.set_title(roof.title, fontsize=10.5, color=INK, loc="left")


def _colours(count: int) -> Sequence[str]:
    """The last two are the kernel's: its default schedule and the tuned one, as on the left."""
    return [*(QUIET, "#8250df")[: max(0, count - 2)], *(ORANGE, GREEN)[-min(count, 2) :]]


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """The ascending `values`, moved up where two labels would be closer than `factor`."""
    placed: list[float] = []
    for value in values:
        placed.append(value if not placed else max(value, placed[-1] * factor))
    return placed


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms"
