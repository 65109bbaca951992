"""The CPU comparisons: attention, decode steps, quantizers, verification and other cascades against PyTorch and what the machine can do.

    python benchmarks/cpu.py                     the short rows, in some minutes: a table, out/cpu.json and out/cpu.png
    python benchmarks/cpu.py --list              their names, in the order they are run
    python benchmarks/cpu.py --size full         S 4096 as well
    python benchmarks/cpu.py --only '*bf16*' --tune 48
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

if not __package__:  # run as a script: the folder above holds the package `benchmarks`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


@click.command(context_settings={"show_default": True})
@click.option("--size", type=click.Choice(["tiny", "short", "full"]), default="short", help="tiny proves only that everything runs")
@click.option("--only", default="*", help="rows whose name matches this pattern, such as '*decode*'")
@click.option("--list", "show", is_flag=True, help="name the rows in the order they are run, and nothing else")
@click.option("--rounds", type=click.IntRange(3), default=15, help="samples of each subject")
@click.option("--budget", type=float, default=5.0, help="seconds a row is timed at most, warm-up apart")
@click.option("--inductor/--no-inductor", default=True, help="time the eager function under torch.compile as well")
@click.option("--database", "database", type=click.Path(path_type=Path), default=None, help="tuned schedules to time beside the default")
@click.option("--tune", type=click.IntRange(0), default=0, help="trials of tuning before a row is timed, recorded in the database")
@click.option("--metaschedule", type=click.IntRange(0), default=0, help="trials of TVM MetaSchedule on unfused f32 attention")
@click.option("--one-thread", is_flag=True, help="one thread, and its processor time: figures that repeat on a busy machine")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), help="the folder for cpu.json and cpu.png")
def main(
    size: str,
    only: str,
    show: bool,
    rounds: int,
    budget: float,
    inductor: bool,
    database: Path | None,
    tune: int,
    metaschedule: int,
    one_thread: bool,
    out: Path,
) -> None:
    """Compare einfall with PyTorch on this machine's processor."""
    from benchmarks.protocol import prepare

    prepare(one_thread=one_thread)
    import torch
    from rich.console import Console

    from benchmarks import report
    from benchmarks.protocol import machine
    from benchmarks.run import Options, Row, Runner

    torch.set_grad_enabled(False)
    console = Console(width=None if sys.stdout.isatty() else 190)
    if tune and database is None:
        database = out / "cpu.db"
    options = Options(size, only, rounds, budget, inductor, database, tune, metaschedule, one_thread)  # type: ignore[arg-type]
    chosen = options.chosen()
    if not chosen:
        raise click.BadParameter(f"no row is called {only!r}", param_hint="--only")
    if show:
        for case in chosen:
            click.echo(case.name)
        return
    out.mkdir(parents=True, exist_ok=True)
    about = machine()
    runner = Runner(options, lambda text: console.print(text, style="dim", highlight=False))
    limits = runner.limits()
    console.print(report.limits_table(limits))
    rows: list[Row] = []
    with console.status("") as status:
        for number, case in enumerate(chosen, 1):
            status.update(f"{number}/{len(chosen)} {case.name}")
            rows.append(runner.run(case))
            (out / "cpu.json").write_text(report.to_json(about, limits, rows, asdict(options)), encoding="utf-8")  # so far
            if not sys.stdout.isatty():
                console.print(f"{number}/{len(chosen)} {report.line(rows[-1])}", highlight=False)
    for group in report.TITLES:
        if any(row.group == group for row in rows):
            console.print(report.rows_table(rows, group))
    console.print(f"wrote {out / 'cpu.json'}", highlight=False)
    try:
        report.draw(rows, about, out / "cpu.png")
        console.print(f"wrote {out / 'cpu.png'}", highlight=False)
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'einfall[plots]')")
    for row in rows:
        if row.failed:
            console.print(f"[red]{row.name}: {row.failed}[/red]", highlight=False)
    if any(row.failed for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
