"""`einfall check` and `einfall bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import kernel_options, print_json, progress, request, table, using

if TYPE_CHECKING:
    from ..tuner.property_check import Trial


@click.command("check")
@kernel_options
@click.option("--trials", default=10, show_default=True, type=click.IntRange(1), metavar="N", help="Sets of random extents.")
def check_command(
    ref: str, target: str, dims: Any, dtype: Any, values: Any, database: str | None, as_json: bool, seed: int, trials: int
) -> int:
    """Compare REF with the reference in float64, over random extents and values. --dims fixes extents.

    For a GPU that is not here the emitted kernels are interpreted on the CPU, over small extents.
    """
    asked = request(ref, target, dims, dtype, values, seed)
    with using(database), progress("checking", trials, quiet=as_json) as advance:

        def told(trial: Trial) -> None:
            advance("FAILED" if trial.failure else "ok")

        report = asked.kernel.check(
            dims=asked.dims, dtypes=asked.dtypes, target=target, trials=trials, seed=seed, on_trial=told, **asked.values
        )
    if as_json:
        print_json(report.to_dict())
    else:
        rows = [
            [
                ", ".join(f"{rank}={extent}" for rank, extent in trial.sizes),
                "-" if trial.largest_error is None else f"{trial.largest_error:.2g}",
                "-" if trial.tolerance is None else f"{trial.tolerance:.2g}",
                trial.failure or "ok",
            ]
            for trial in report.trials
        ]
        table(report.title, ["extents", "largest error", "allowed", "result"], rows)
    return 0 if report.passed else 1


@click.command("bench")
@kernel_options
@click.option("--compiled", is_flag=True, help="Let the reference under torch.compile compete as well.")
@click.option("--cold", is_flag=True, help="Keep the inputs out of the last-level cache.")
def bench_command(
    ref: str, target: str, dims: Any, dtype: Any, values: Any, database: str | None, as_json: bool, seed: int, compiled: bool, cold: bool
) -> None:
    """Time REF with the best schedule known against the default one, eager PyTorch and the roofline, interleaved in one run."""
    asked = request(ref, target, dims, dtype, values, seed)
    with using(database):
        found = asked.kernel.bench(
            dims=asked.dims, dtypes=asked.dtypes, target=target, compiled=compiled, cold=cold, seed=seed, **asked.values
        )
    if as_json:
        print_json(found.to_dict())
        return
    rows = [[e.name, f"{e.median_ms:.4g}", f"{e.spread * 100:.1f} %", f"{found.speedup(e):.2f}"] for e in found.entries]
    if found.roofline_ms is not None:
        rows.append(["roofline", f"{found.roofline_ms:.4g}", "-", f"{found.roofline_ms / found.entries[0].median_ms:.2f}"])
    sizes = ", ".join(f"{rank}={extent}" for rank, extent in found.sizes)
    table(f"{found.cascade} at {sizes}", ["", "ms", "quartiles apart", "time over the kernel's"], rows)
