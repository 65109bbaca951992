"""The options that commands share, and the call they describe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from .references import Pairs, load_kernel, merge

if TYPE_CHECKING:
    from ..api import Kernel
    from ..configuration import Settings

F = TypeVar("F", bound=Callable[..., Any])


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, last: str, steps: int = 1) -> None: ...


def kernel_options(function: F) -> F:
    """REF and what describes a call of it: --target, --dims, --dtype, --set, --db, --json, --seed."""
    for option in reversed(
        (
            click.argument("ref"),
            click.option("--target", default="cpu", show_default=True, metavar="NAME", help="The machine; `einfall targets` lists them."),
            click.option("--dims", multiple=True, type=Pairs("int"), help="Extents of the ranks, such as b=1,h=8,m=1024."),
            click.option("--dtype", multiple=True, type=Pairs("type"), help="Types of the inputs: bf16 for all, or Q=bf16,K=i8."),
            click.option("--set", "values", multiple=True, type=Pairs("value"), help="Scalars and static arguments, such as scale=0.125."),
            database_option,
            json_option,
            click.option("--seed", default=0, show_default=True, metavar="N", help="The seed of everything random."),
        )
    ):
        function = option(function)
    return function


def database_option(function: F) -> F:
    """--db FILE."""
    return click.option("--db", "database", metavar="FILE", help="The tuning database; $EINFALL_DB otherwise.")(function)


def json_option(function: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON on stdout.")(function)


@dataclass(frozen=True, slots=True)
class Request:
    """A kernel and the call that options describe."""

    kernel: Kernel
    target: str
    dims: dict[str, int]
    dtypes: Mapping[str, str] | str | None
    values: dict[str, Any]
    seed: int


def request(ref: str, target: str, dims: tuple[Any, ...], dtype: tuple[Any, ...], values: tuple[Any, ...], seed: int) -> Request:
    """The request that the shared options make. Raises `EinfallError` for a REF that is not there."""
    types: Mapping[str, str] | str | None = None
    for given in dtype:
        types = given if isinstance(given, str) else {**(types if isinstance(types, dict) else {}), **given}
    return Request(load_kernel(ref), target, merge(dims), types, merge(values), seed)


@contextlib.contextmanager
def using(database: str | None) -> Iterator[Settings]:
    """The settings of a command: `--db` over the environment."""
    from ..configuration import configure, current

    if database is None:
        yield current()
    else:
        with configure(database=database) as settings:
            yield settings


@contextlib.contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """A bar on stderr with the time left; the function it gives says what happened last and moves it by one, or by a number of steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(title, total=total, last="")

        def advance(last: str, steps: int = 1) -> None:
            bar.update(task, advance=steps, last=last)

        yield advance


def print_json(data: object) -> None:
    """One JSON document on stdout; infinities and nan are written as text, which JSON lacks."""
    import json

    click.echo(json.dumps(plain(data), indent=2))


def plain(data: object) -> Any:
    """`data` as JSON has it."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [plain(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return str(data)
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    return str(data)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; plain text with all columns where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numbers = all(row[index][:1].isdigit() or row[index] == "-" for row in rows)
        shown.add_column(column, overflow="fold", justify="right" if rows and numbers else "left")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(shown)
