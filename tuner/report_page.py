"""A tuning run as one self-contained page: drawings are SVG in the page, nothing is loaded, and no text of a database becomes markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..compiler.figures import basis_of
from ..compiler.report_html import PAGE_STYLE, section
from ..schedules.target import load_target
from .database.figures import MAX_DRAWN, rank_plot, rooflines
from .report import Candidate, Run, TuningReport

_MORE_STYLE = "svg .grid { stroke: var(--line); } svg .tried { fill: var(--faint); } td:last-child { overflow-wrap: anywhere; }"


def tuning_page(reports: Sequence[TuningReport]) -> str:
    """A whole page; it loads nothing."""
    drawings = files("einfall.tuner.database.server").joinpath("einfall_style.html").read_text(encoding="utf-8")
    names = ", ".join(dict.fromkeys(report.choice.name for report in reports))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(names)} · einfall report</title>",
        drawings,
        f"<style>{PAGE_STYLE}{_MORE_STYLE}</style></head><body>",
        *(_one(report) for report in reports),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _one(report: TuningReport) -> str:
    key = report.choice.key
    extents = str(key["workload"].get("extents", "")).replace(",", ", ")
    return "\n".join(
        part
        for part in (
            f"<h1>{escape(report.choice.name)}</h1>",
            f'<p class="sub">{escape(extents)} · {escape(str(key["device"].get("model", key["device"]["id"])))}</p>',
            f"<pre>{escape(str(key['workload'].get('cascade', '')))}</pre>",
            _outcome(report),
            *(_curve(run) for run in report.runs),
            _cut(report.runs),
            _candidates(report.candidates),
            *(_accuracy(run) for run in report.runs),
            _machine(report),
        )
        if part
    )


# Winner, default, floor ---------------------------------------------------------------------------------------------------


def _outcome(report: TuningReport) -> str:
    winner, default = report.winner, report.default
    floor = None if winner is None else winner["floor_ms"]
    rows = []
    if winner is not None:
        won = winner["median_ms"]
        rows.append(["winner", winner["schedule_id"], _ms(won), _times(winner["relative"]), _over(won, floor)])
    if default is not None:
        rows.append(["default", default[0], _ms(default[1]), _times(1.0), _over(default[1], floor)])
    rows.append(["floor", "", _ms(floor), _over(floor, default[1] if default else None), _times(None if floor is None else 1.0)])
    said = f"<p>{escape(report.choice.winner or 'No winner')}: {escape(report.choice.reason)}.</p>"
    head = ["", "schedule", "ms", "of the default's time", "of the floor"]
    drawn = rooflines([winner]) if winner is not None else []
    return section("Winner, default and floor", head, rows) + said + _floor_note(winner) + "".join(d["svg"] for d in drawn)


def _floor_note(winner: Mapping[str, Any] | None) -> str:
    if winner is None:
        return ""
    if winner["floor_ms"] is None:
        return "<p>The floor is not known: there is no description of this device here, or the cascade cannot be read.</p>"
    basis = basis_of(load_target(winner["target"]))
    return (
        f"<p>The floor is the roofline's least time for {winner['flops']:,} operations and {winner['bytes']:,} bytes; the figures of the "
        f"device are {escape(basis)}. The ratio of the winner to the default is that of the finals, in which they took turns.</p>"
    )


# Curve, candidates --------------------------------------------------------------------------------------------------------


def _curve(run: Run) -> str:
    told = f"{run.about['trials']} trials, {run.about['failures']} failed, seed {run.about['seed']}"
    best = f"; the best took {_ms(run.best[-1][1])} ms" if run.best else "; none gave a time"
    return f"<h2>Best so far in run {escape(_name(run))}</h2><p>{escape(told + best)}.</p>{run.svg}"


def _cut(runs: Sequence[Run]) -> str:
    """What is said where more trials may have been made than are read."""
    whole = sum(run.about["trials"] for run in runs) < MAX_DRAWN
    return "" if whole else f"<p>Of the trials the first {MAX_DRAWN} are shown as curves; the table has all candidates.</p>"


def _candidates(candidates: Sequence[Candidate]) -> str:
    head = ["schedule", "trial, ms", "median", "95 % interval", "samples", "verdict", "choices"]
    rows: list[list[object]] = []
    for c in candidates:
        e = c.entrant
        unit = " of the default" if e.relative else " ms"
        median = "–" if e.median is None else _ms(e.median) + unit
        interval = "–" if e.low is None else f"{_ms(e.low)} to {_ms(e.high)}{unit}"
        rows.append([e.schedule_id, _ms(c.trial_ms), median, interval, e.samples, e.verdict, c.schedule or "cannot be read"])
    return section("Candidates", head, rows)


# Cost model ---------------------------------------------------------------------------------------------------------------


def _accuracy(run: Run) -> str:
    title = f"<h2>Cost model over run {escape(_name(run))}</h2>"
    found = run.accuracy
    if found.missing:
        return f"{title}<p>Not worked out: {escape(found.missing)}.</p>"
    rows: list[list[object]] = [[s.known, s.later, f"{s.tau:.3f}"] for s in found.steps]
    note = (
        "<p>The model of the search, made again from the first trials and asked about those that followed, without what other extents and "
        "devices would add. Kendall's tau is 1 for the order of the times, 0 for none; failures count as the slowest.</p>"
    )
    drawn = ""
    if found.half is not None:
        labelled = [(predicted, measured, name) for name, predicted, measured in found.ranks]
        drawn = f"<p>Knowing {found.half.known} trials, tau {found.half.tau:.3f} over {found.half.later}:</p>{rank_plot(labelled)}"
    return title + note + drawn + section("Along the run", ["trials known", "trials ranked", "tau"], rows)


# Machine, toolchain, seeds ------------------------------------------------------------------------------------------------


def _machine(report: TuningReport) -> str:
    rows: list[list[object]] = []
    for kind in ("device", "toolchain", "policy"):
        told = ", ".join(f"{name} {value}" for name, value in report.choice.key[kind].items() if name != "id" and value is not None)
        rows.append([kind, told])
    told_of = ("host", "driver", "memory_bytes", "commit", "time", "ended")
    runs: list[list[object]] = [
        [_name(run), *(str(run.about[name] or "–") for name in told_of), str(run.about["seed"])] for run in report.runs
    ]
    head = ["run", "host", "driver", "memory, bytes", "commit", "begun", "ended", "seed"]
    return section("Machine and toolchain", ["", ""], rows) + section("Runs and seeds", head, runs) + _evidence(report)


def _evidence(report: TuningReport) -> str:
    e = report.choice.evidence
    if e is None:
        return ""
    told = (
        f"Right by {e['oracle']}: error {e['largest_error']:.3g} of {e['tolerance']:.3g} allowed; {len(e['shapes'])} shapes; "
        f"distributions {', '.join(e['distributions'])}; seeds {', '.join(map(str, e['seeds']))}."
    )
    return f"<h2>Evidence of the winner</h2><p>{escape(told)}</p>"


def _name(run: Run) -> str:
    return str(run.about["run"]) or "without a name"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def _over(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else _times(value / base)
