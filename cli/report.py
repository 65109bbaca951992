"""`einfall report`: what a tuning run did, as one page."""

from __future__ import annotations

from pathlib import Path

import click

from .database import open_database
from .kernels import write_text
from .options import database_option, json_option, print_json
from .references import load_kernel


@click.command("report")
@click.argument("name", metavar="[REF|WORKLOAD-ID]", required=False)
@click.option("-o", "--output", required=True, metavar="FILE", help="The page to write.")
@database_option
@json_option
def report_command(name: str | None, output: str, database: str | None, as_json: bool) -> None:
    """Write a page about a tuning run: curve, candidates, cost model, winner against default and floor.

    The page is one file and loads nothing. REF is a kernel as for `tune`, or its name; without, it is what was measured last.
    """
    from ..tuner.report import tuning_reports
    from ..tuner.report_page import tuning_page

    if name is not None and (":" in name or name.endswith(".cascade")):
        name = load_kernel(name).name
    with open_database(database) as opened:
        found = tuning_reports(opened, name)
    write_text(Path(output), tuning_page(found))
    if as_json:
        print_json({"page": output, "reports": [report.to_dict() for report in found]})
    else:
        click.echo(f"{output}: {sum(len(r.candidates) for r in found)} candidates, {sum(len(r.runs) for r in found)} runs")
