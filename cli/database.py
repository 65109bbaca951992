"""`einfall db`: what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..configuration import current
from ..ir.errors import DatabaseError
from . import suggest
from .options import database_option, json_option, print_json, table

if TYPE_CHECKING:
    from ..tuner.database import Database, Record


class _Actions(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        suggest(ctx, self.list_commands(ctx), args)
        return super().resolve_command(ctx, args)


@click.group("db", cls=_Actions)
def db_command() -> None:
    """Look at the tuning database."""


def open_database(path: str | None) -> Database:
    """The database of `--db` or of the settings, to read. Raises `DatabaseError` where there is none."""
    from ..tuner.database import Database

    place = Path(path) if path is not None else current().database
    if place is None:
        raise DatabaseError("no tuning database is set", hint="--db FILE, or EINFALL_DB")
    return Database.open(place, read_only=True)


@db_command.command("ls")
@database_option
@json_option
def ls_command(database: str | None, as_json: bool) -> None:
    """List every winner, by kernel and extents."""
    with open_database(database) as opened:
        records = opened.ls()
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    rows = [
        [r.name, _extents(r), f"{r.median_ms:.4g}", _ratio(r.relative), str(r.samples), r.device_model, r.workload[:12]] for r in records
    ]
    table("", ["kernel", "extents", "ms", "against default", "samples", "device", "id"], rows)


@db_command.command("show")
@click.argument("name", metavar="ID")
@database_option
@json_option
def show_command(name: str, database: str | None, as_json: bool) -> None:
    """Show everything about one thing, by its id or the beginning of it."""
    with open_database(database) as opened:
        found = opened.show(name)
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        text = str(value)
        click.echo(f"{key}: {text}" if "\n" not in text else f"{key}:\n  " + text.replace("\n", "\n  "))


@db_command.command("best")
@click.argument("name", metavar="KERNEL")
@database_option
@json_option
def best_command(name: str, database: str | None, as_json: bool) -> None:
    """Show the winning schedules of a kernel, by its name or the beginning of a workload's id."""
    with open_database(database) as opened:
        records = [r for r in opened.ls() if name == r.name or (len(name) >= 4 and r.workload.startswith(name))]
        names = sorted({r.name for r in opened.ls()})
    if not records:
        raise DatabaseError(f"nothing was tuned for {name!r}", hint=f"tuned kernels: {', '.join(names) or 'none'}")
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    for record in records:
        click.echo(f"{record.name} {_extents(record)} on {record.device_model}")
        click.echo(f"  {record.median_ms:.4g} ms, {_ratio(record.relative)} of the default's time, {record.samples} samples")
        click.echo(f"  {record.schedule.to_json()}")


def _extents(record: Record) -> str:
    return ", ".join(f"{rank}={extent}" for rank, extent in record.extents)


def _ratio(relative: Any) -> str:
    return "-" if relative is None else f"{relative:.3f}"
