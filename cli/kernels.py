"""`einfall explain` and `einfall compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..ir.errors import EinfallError
from .options import kernel_options, print_json, request, using


@click.command("explain")
@kernel_options
@click.option("--html", metavar="FILE", help="Also write the report as a page.")
def explain_command(
    ref: str, target: str, dims: Any, dtype: Any, values: Any, database: str | None, as_json: bool, seed: int, html: str | None
) -> None:
    """Show the cascade of REF, its passes before and after, the rewrites, the plan, the traffic and the roofline.

    For a GPU, which need not be there, also the default schedule: tiles, warps, stages, cuts, what stands for f32, estimates.
    """
    asked = request(ref, target, dims, dtype, values, seed)
    with using(database):
        report = asked.kernel.explain(dims=asked.dims, dtypes=asked.dtypes, target=target, show=False, **asked.values)
    if html is not None:
        write_text(Path(html), report.to_html())
    if as_json:
        print_json(report.to_dict())
    else:
        report.print()


@click.command("compile")
@kernel_options
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder for source, binary and manifest.")
@click.option("--schedule", metavar="FILE", help="A schedule as JSON, instead of the best one known.")
def compile_command(
    ref: str,
    target: str,
    dims: Any,
    dtype: Any,
    values: Any,
    database: str | None,
    as_json: bool,
    seed: int,
    output: str,
    schedule: str | None,
) -> None:
    """Build REF for a target and write source, binary and manifest into a folder that `ef.load` reads.

    For a GPU, which need not be there, the assembly lies beside them. What is known of each kernel is printed.
    """
    asked = request(ref, target, dims, dtype, values, seed)
    chosen = None if schedule is None else _schedule(Path(schedule))
    with using(database):
        executable = asked.kernel.compile(dims=asked.dims, dtypes=asked.dtypes, target=target, schedule=chosen, **asked.values)
    folder = executable.save(output)
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        facts = {"target": target, "schedule": executable.schedule.to_dict(), "facts": executable.facts}
        print_json({"folder": str(folder), "files": files, **facts})
    else:
        click.echo(f"{folder}: {', '.join(files)}")
        for line in fact_lines(executable):
            click.echo(line)


def fact_lines(executable: Any) -> list[str]:
    """What is known of each kernel: its numbers in one line, and a line for every table in them."""
    lines = []
    for part in executable.kernels:
        plain = [f"{name} {value}" for name, value in part.facts.items() if not isinstance(value, dict)]
        lines.append(f"{part.call.kernel}: {', '.join(plain)}")
        for name, table in part.facts.items():
            if isinstance(table, dict):
                lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in table.items()))
    return lines


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises `EinfallError` where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EinfallError(f"{path} cannot be written: {error.strerror}", hint="name a file in a folder you may write") from None


def _schedule(path: Path) -> Any:
    from ..schedules.schedule import Schedule

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EinfallError(f"{path} cannot be read: {error}") from None
    return Schedule.from_json(text)
