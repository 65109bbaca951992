"""`einfall tune`: a search with its progress, the best so far and the time left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..configuration import current
from .options import kernel_options, print_json, progress, request, table, using

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..tuner.tune import Event, TuneResult
    from .options import Advance


@click.command("tune")
@kernel_options
@click.option("--trials", default=64, show_default=True, type=click.IntRange(1), metavar="N", help="Candidates to measure at most.")
@click.option("--resume", is_flag=True, help="Count what the database knows already as measured.")
def tune_command(
    ref: str, target: str, dims: Any, dtype: Any, values: Any, database: str | None, as_json: bool, seed: int, trials: int, resume: bool
) -> int:
    """Search for the fastest schedule of REF on this machine and record it. Ctrl-C ends the search and keeps what was measured."""
    asked = request(ref, target, dims, dtype, values, seed)
    with using(database), progress("tuning", trials, quiet=as_json) as advance:
        result = asked.kernel.tune(
            target=target, trials=trials, seed=seed, resume=resume, dims=asked.dims, dtypes=asked.dtypes, on_event=_teller(advance),
            **asked.values,
        )  # fmt: skip
        place = current().database
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
        click.echo(f"recorded in {place}; the next call at these extents uses the winner")
    return 130 if result.interrupted else 0


def _teller(advance: Advance) -> Callable[[Event], None]:
    """What is shown beside the bar: the best time so far, and how many candidates failed."""
    from ..tuner.tune import Failed, Incumbent, Measured

    best: list[str] = ["-"]
    failed: list[str] = []

    def tell(event: Event) -> None:
        match event:
            case Incumbent(time_ms=time_ms, speedup=speedup):
                best[0] = f"{time_ms:.4g} ms" + ("" if speedup is None else f", {speedup:.2f}x the default")
            case Failed(reason=reason):
                failed.append(reason)
            case _:
                pass
        if isinstance(event, (Measured, Failed, Incumbent)):
            text = f"best {best[0]}" + (f", {len(failed)} failed" if failed else "")
            advance(text, 0 if isinstance(event, Incumbent) else 1)

    return tell


def _show(result: TuneResult) -> None:
    rows = [
        [
            ("default" if row.is_default else row.schedule.hash) + (" (winner)" if row.is_winner else ""),
            f"{row.median_ms:.4g}",
            "-" if row.relative is None else f"{1 / row.relative:.2f}",
            str(row.samples),
        ]
        for row in result.table
    ]
    ended = ", interrupted" if result.interrupted else ""
    title = f"{result.workload.name}: {len(result.history)} trials ({result.failures} failed) in {result.seconds:.1f} s{ended}"
    table(title, ["schedule", "ms", "times as fast as the default", "samples in the finals"], rows)
