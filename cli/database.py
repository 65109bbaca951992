"""`einfall db`: what was measured, why a schedule was chosen, and how it is shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..configuration import current
from ..ir.errors import DatabaseError
from . import suggest
from .options import database_option, json_option, print_json
from .options import table as print_table

if TYPE_CHECKING:
    from ..tuner.database import Database, Record
    from ..tuner.database.segments import Shared
    from ..tuner.database.why import Why

FAULTY = 1


class _Actions(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        suggest(ctx, self.list_commands(ctx), args)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a user's path."""
        return list(self.commands)


@click.group("db", cls=_Actions)
def db_command() -> None:
    """Look at the tuning database, and share it."""


def open_database(path: str | None, *, write: bool = False, create: bool = False) -> Database:
    """The database of `--db` or of the settings, to read unless said otherwise. Raises `DatabaseError` where there is none."""
    from ..tuner.database import Database

    place = Path(path) if path is not None else current().database
    if place is None:
        raise DatabaseError("no tuning database is set", hint="--db FILE, or EINFALL_DB")
    return Database.open(place, create=create) if write or create else Database.open(place, read_only=True)


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
        text = _clean(str(value))
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
        from ..tuner.database.why import plain_name

        raise DatabaseError(f"nothing was tuned for {name!r}", hint=f"tuned kernels: {', '.join(map(plain_name, names)) or 'none'}")
    if as_json:
        print_json([record.to_dict() for record in records])
        return
    for record in records:
        click.echo(_clean(f"{record.name} {_extents(record)} on {record.device_model}"))
        click.echo(f"  {record.median_ms:.4g} ms, {_ratio(record.relative)} of the default's time, {record.samples} samples")
        click.echo(f"  {record.schedule.to_json()}")


@db_command.command("why")
@click.argument("name", metavar="KERNEL")
@click.option("--all", "everything", is_flag=True, help="Every candidate, not only the first ten.")
@database_option
@json_option
def why_command(name: str, everything: bool, database: str | None, as_json: bool) -> None:
    """Explain a choice: the candidates with samples and intervals, the evidence, and where every measurement came from.

    KERNEL is a name or the beginning of a workload's id.
    """
    from ..tuner.database.why import why

    with open_database(database) as opened:
        found = why(opened, name)
    if as_json:
        print_json([each.to_dict() for each in found])
        return
    for each in found:
        _print_why(each, None if everything else 10)


def _print_why(found: Why, limit: int | None) -> None:
    device, toolchain, policy = (found.key[kind] for kind in ("device", "toolchain", "policy"))
    click.echo(_clean(f"{found.name} {found.key['workload'].get('extents', '')} on {device.get('model', device['id'])}"))
    built = " ".join(str(toolchain.get(part, "?")) for part in ("version", "backend", "compiler"))
    timed = f"{policy.get('mode')}, {policy.get('cache')} cache"
    click.echo(_clean(f"  built by {built}, code generation {toolchain.get('abi', '?')}; timed {timed}"))
    click.echo(_clean(f"  {found.winner or 'no winner'}: {found.reason}"))
    if found.schedule is not None:
        click.echo(_clean(f"  {found.schedule}"))
    if found.evidence is not None:
        e = found.evidence
        click.echo(
            _clean(
                f"  right by {e['oracle']}: error {e['largest_error']:.3g} of {e['tolerance']:.3g} allowed, "
                f"{len(e['shapes'])} shapes, distributions {', '.join(e['distributions'])}"
            )
        )
    for s in found.sources:
        click.echo(
            _clean(f"  {s['role']} of {s['samples']} samples by {s['host'] or 'unknown'} at {s['time'] or 'unknown'}, {s['origin']}")
        )
    rows = [
        [e.schedule_id[:16], _time(e.median, e.relative), _interval(e.low, e.high), str(e.samples or "-"), e.verdict]
        for e in found.entrants[:limit]
    ]
    table("", ["schedule", "median", "95 % interval", "samples", "verdict"], rows)
    if limit is not None and len(found.entrants) > limit:
        click.echo(f"  and {len(found.entrants) - limit} more: --all")


@db_command.command("stats")
@database_option
@json_option
def stats_command(database: str | None, as_json: bool) -> None:
    """Count what is in the file: rows, outcomes, who measured what where, and what came from other files."""
    from ..tuner.database.upkeep import stats

    with open_database(database) as opened:
        found = stats(opened)
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['path']}: schema {found['schema']}, {found['bytes'] / 1e6:.1f} MB")
    click.echo("  " + ", ".join(f"{number} {name}" for name, number in found["rows"].items()))
    click.echo("  " + _clean(", ".join(f"{number} {name}" for name, number in {**found["statuses"], **found["bases"]}.items())))
    columns = ["device", "host", "version", "abi", "backend", "measurements", "runs", "workloads", "ok"]
    table("", columns, [[str(row[name]) for name in columns] for row in found["measured"]])
    for row in found["transfers"]:
        click.echo(_clean(f"  {row['kind']} {row['place']}: measurements {row['first']} to {row['last']}"))


@db_command.command("diff")
@click.argument("other", metavar="OTHER")
@database_option
@json_option
def diff_command(other: str, database: str | None, as_json: bool) -> None:
    """Compare with another file: measurements that only one of them has, and winners that differ."""
    from ..tuner.database.upkeep import diff

    with open_database(database) as mine, open_database(other) as theirs:
        found = diff(mine, theirs)
    if as_json:
        print_json(found)
        return
    counted = found["measurements"]
    click.echo(f"measurements: {counted['both']} in both, {counted['first']} only in {found['first']}, {counted['second']} only in {other}")
    rows = [
        [w["name"], ", ".join(f"{r}={n}" for r, n in w["extents"].items()), w["device_model"], _winner(w["first"]), _winner(w["second"])]
        for w in found["winners"]
    ]
    table("", ["kernel", "extents", "device", "winner here", "winner there"], rows)


@db_command.command("merge")
@click.argument("sources", metavar="FILE...", nargs=-1, required=True)
@database_option
@json_option
def merge_command(sources: tuple[str, ...], database: str | None, as_json: bool) -> None:
    """Add everything that other files hold; the order does not matter, and twice changes nothing.

    The file of --db is made if it is missing.
    """
    from ..tuner.database.merge import merge

    with open_database(database, create=True) as opened:
        found = {source: merge(opened, source) for source in sources}
        winners = len(opened.ls())
    if as_json:
        print_json({"sources": {source: taken.to_dict() for source, taken in found.items()}, "winners": winners})
        return
    for source, taken in found.items():
        click.echo(f"{source}: {taken.measurements} measurements are new{_left(taken.mended, taken.refused)}")
    click.echo(f"{winners} winners")


@db_command.command("export")
@click.argument("url", metavar="URL")
@database_option
@json_option
def export_command(url: str, database: str | None, as_json: bool) -> None:
    """Write what a store does not have yet, as files named by their content: a folder, s3://, gcs://, or any URL of fsspec."""
    from ..tuner.database.segments import export_segments

    with open_database(database, write=True) as opened:
        found = export_segments(opened, url)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(f"{url}: {len(found.segments)} segments written, {found.taken.measurements} measurements")


@db_command.command("import")
@click.argument("url", metavar="URL")
@database_option
@json_option
def import_command(url: str, database: str | None, as_json: bool) -> int:
    """Add the segments of a store that are new here. One that is not what its name says is refused, and the status is 1.

    The file of --db is made if it is missing.
    """
    from ..tuner.database.segments import import_segments

    with open_database(database, create=True) as opened:
        return _print_shared(url, import_segments(opened, url), as_json)


@db_command.command("pull")
@click.argument("url", metavar="URL")
@database_option
@json_option
def pull_command(url: str, database: str | None, as_json: bool) -> int:
    """Add what a server (`einfall db serve`) or a store of segments has and this file has not.

    The file of --db is made if it is missing.
    """
    from ..tuner.database.pull import pull

    with open_database(database, create=True) as opened:
        return _print_shared(url, pull(opened, url), as_json)


def _print_shared(url: str, found: Shared, as_json: bool) -> int:
    if as_json:
        print_json(found.to_dict())
    else:
        new = f"{found.taken.measurements} measurements are new{_left(found.taken.mended, found.taken.refused)}"
        click.echo(_clean(f"{url}: {len(found.segments)} segments read, {new}"))
        for name, reason in found.refused:
            click.echo(_clean(f"  {name} was refused: {reason}"), err=True)
    return FAULTY if found.refused or found.taken.refused else 0


@db_command.command("verify")
@database_option
@json_option
def verify_command(database: str | None, as_json: bool) -> int:
    """Check the file, every row against its name and its bounds, and the winners against the measurements; status 1 for a fault."""
    from ..tuner.database.upkeep import verify

    with open_database(database) as opened:
        found = verify(opened)
    if as_json:
        print_json({"sound": not found, "faults": found})
    elif found:
        table("", ["table", "id", "fault"], [[row[name] for name in ("table", "id", "fault")] for row in found])
    else:
        click.echo("sound")
    return FAULTY if found else 0


@db_command.command("gc")
@click.option("--damaged", is_flag=True, help="Also remove rows that do not hash to their names; no reader takes them.")
@database_option
@json_option
def gc_command(damaged: bool, database: str | None, as_json: bool) -> None:
    """Remove what no measurement refers to, derive the winners again, and give space back. Measurements stay."""
    from ..tuner.database.upkeep import gc

    with open_database(database, write=True) as opened:
        found = gc(opened, damaged=damaged)
    if as_json:
        print_json(found)
        return
    removed = ", ".join(f"{number} {name}" for name, number in found["removed"].items() if number)
    click.echo(f"removed {removed or 'nothing'}; {found['winners']} winners")
    click.echo(f"{found['bytes_before'] / 1e6:.1f} MB before, {found['bytes_after'] / 1e6:.1f} MB now")


@db_command.command("serve")
@click.argument("files", metavar="[FILE...]", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="The address to listen at.")
@click.option("--port", default=8001, show_default=True, metavar="N", help="The port; 0 takes a free one.")
@database_option
@json_option
def serve_command(files: tuple[str, ...], host: str, port: int, database: str | None, as_json: bool) -> int:
    """Serve databases to browsers and to `einfall db pull`, read-only, until Ctrl-C. Needs einfall[serve].

    Without FILE it is the one of --db. --json writes the address as JSON.
    """
    from ..tuner.database.server import serve

    places = files
    if not files:
        with open_database(database) as opened:
            places = (str(opened.path),)

    def started(url: str) -> None:
        if as_json:
            print_json({"url": url})
        else:
            click.echo(f"{url}  (Ctrl-C ends it)")

    return serve(places, host=host, port=port, on_start=started)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table of texts from a file: nothing in them is taken for markup or steers the terminal."""
    from rich.markup import escape

    print_table(title, columns, [[escape(_clean(cell)) for cell in row] for row in rows])


def _extents(record: Record) -> str:
    return ", ".join(f"{rank}={extent}" for rank, extent in record.extents)


def _ratio(relative: Any) -> str:
    return "-" if relative is None else f"{relative:.3f}"


def _time(median: float | None, relative: bool) -> str:
    if median is None:
        return "-"
    return f"{median:.3f} of the default" if relative else f"{median:.4g} ms"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _winner(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['schedule_id']} {found['median_ms']:.4g} ms"


def _left(mended: int, refused: int) -> str:
    parts = [f"{mended} damaged rows were mended"] * bool(mended) + [f"{refused} rows were refused: damaged"] * bool(refused)
    return "".join(f", {part}" for part in parts)


def _clean(text: str) -> str:
    """Text from a file without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
