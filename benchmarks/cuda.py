"""The CUDA comparisons: attention, decode steps and a shared prefix against PyTorch, FlexAttention and what the GPU can do.

    python benchmarks/cuda.py                    every row within 8 minutes: tables, out/cuda.json and out/cuda.png
    python benchmarks/cuda.py --list             the rows with their inputs, peers and work; needs no GPU
    python benchmarks/cuda.py --only '*decode*' --tune 32

Each row is a process of its own with a share of the time, so that one that hangs, or loses the GPU's context, is a failed row and not
the end. A machine without a GPU is told so in one sentence, and the status is 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if not __package__:  # run as a script: the folder above holds the package `benchmarks`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from benchmarks.case import Case
    from benchmarks.run import Row

LEAST_SECONDS = 20.0  # that a row is given, however little time is left
QUERY = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit"


@click.command(context_settings={"show_default": True})
@click.option("--size", type=click.Choice(["tiny", "full"]), default="full", help="tiny proves only that everything runs")
@click.option("--only", default="*", help="rows whose name matches this pattern, such as '*decode*'")
@click.option("--list", "show", is_flag=True, help="name the rows, their inputs, peers and work, and nothing else")
@click.option("--rounds", type=click.IntRange(3), default=15, help="samples of each subject")
@click.option("--tune", type=click.IntRange(0), default=8, help="trials of tuning before a row is timed, at most half of its time")
@click.option("--seconds", type=float, default=480.0, help="for all rows together")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), help="the folder for cuda.json, cuda.png and cuda.db")
@click.option("--row", "one", type=click.Path(path_type=Path), default=None, hidden=True, help="run one row here, and write it there")
def main(size: str, only: str, show: bool, rounds: int, tune: int, seconds: float, out: Path, one: Path | None) -> None:
    """Compare einfall with PyTorch on this machine's GPU."""
    from benchmarks.protocol import prepare

    prepare()
    import torch

    from benchmarks.cuda_run import CudaOptions

    torch.set_grad_enabled(False)
    budget_s = min(5.0, seconds / 4)
    options = CudaOptions(
        size, only, rounds, budget_s, False, out / "cuda.db" if tune else None, tune, device="cuda", seconds=seconds  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = options.chosen()
    if not chosen:
        raise click.BadParameter(f"no row is called {only!r}", param_hint="--only")
    if show:
        for case in chosen:
            click.echo(described(case))
        return
    missing = no_gpu()
    if missing:
        click.echo(f"{missing}: nothing is measured; --list names the rows")
        return
    out.mkdir(parents=True, exist_ok=True)
    if one is not None:
        run_here(options, chosen[0], one)
        return
    everything(options, chosen, out)


def no_gpu() -> str:
    """Why nothing can be measured here; empty if there is a GPU."""
    import torch

    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return "" if torch.cuda.is_available() else "this machine has no CUDA GPU that PyTorch can use"


def described(case: Case) -> str:
    """A row without running it: inputs, peers, the least that must be computed and moved, and what it should reach."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # shapes alone: the tensors of some rows are gigabytes
        tensors = case.make(torch.Generator())
    inputs = ", ".join(f"{t.name} {list(x.shape)} {str(x.dtype)[6:]}" for t, x in zip(case.kernel.cascade.inputs, tensors, strict=True))
    aims = ", ".join(aim.text for aim in case.aims) or "none"
    peers = ", ".join(peer.name for peer in case.peers)
    return (
        f"{case.name}\n    inputs {inputs}\n    peers  {peers}\n"
        f"    work   {case.flops / 1e9:.3f} GFLOP, {case.bytes / 1e6:.3f} MB\n    aim    {aims}"
    )


def everything(options: Any, chosen: list[Case], out: Path) -> None:
    """Every row in turn, each in a process of its own; what is known is written after each."""
    from dataclasses import asdict

    from rich.console import Console

    from benchmarks import report

    console = Console(width=None if sys.stdout.isatty() else 190)
    about, rows, began = machine_with_gpu(), [], time.monotonic()
    for number, case in enumerate(chosen, 1):
        left = options.seconds - (time.monotonic() - began)
        seconds = max(LEAST_SECONDS, left / (len(chosen) - number + 1))
        rows.append(run_apart(options, case, seconds, out))
        text = report.to_json(about, [], rows, {**asdict(options), "growth": growth(rows)})
        (out / "cuda.json").write_text(text, encoding="utf-8")
        console.print(f"{number}/{len(chosen)} {report.line(rows[-1])}", highlight=False)
    for group in report.TITLES:
        if any(row.group == group for row in rows):
            console.print(report.rows_table(rows, group))
    for name, found in growth(rows).items():
        console.print(f"{name}: {found['measured']:.2f} times as long, at least {found['floor']:.2f} by the floors", highlight=False)
    console.print(f"wrote {out / 'cuda.json'} after {time.monotonic() - began:.0f} s", highlight=False)
    try:
        report.draw(rows, about, out / "cuda.png")
        console.print(f"wrote {out / 'cuda.png'}", highlight=False)
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'einfall[plots]')")
    for row in rows:
        if row.failed:
            console.print(f"[red]{row.name}: {row.failed}[/red]", highlight=False)
    if any(row.failed for row in rows):
        raise SystemExit(1)


def run_here(options: Any, case: Case, place: Path) -> None:
    """Run a row in this process and write what was found."""
    from benchmarks.cuda_run import CudaRunner

    row = CudaRunner(options, lambda text: click.echo(text, err=True)).run(case)
    place.write_text(json.dumps(row.to_dict(), default=str), encoding="utf-8")


def run_apart(options: Any, case: Case, seconds: float, out: Path) -> Row:
    """Run a row in a process of its own, which is ended when its time is up. What goes wrong is said in the row."""
    from benchmarks.run import Row

    with tempfile.TemporaryDirectory(prefix="einfall-row-") as folder:
        place = Path(folder) / "row.json"
        command = [
            sys.executable, str(Path(__file__).resolve()), "--row", str(place), "--only", glob_of(case.name), "--size", options.size,
            "--rounds", str(options.rounds), "--tune", str(options.tune), "--seconds", f"{0.8 * seconds:.1f}", "--out", str(out),
        ]  # fmt: skip
        problem = ended(command, seconds)
        with contextlib.suppress(OSError):  # what it wrote before it was ended is whole, or is not there
            return Row.from_dict(json.loads(place.read_text(encoding="utf-8")))
    names, own = tuple(p.name for p in case.peers), tuple(p.name for p in case.peers if p.own)
    row = Row(case.name, case.group, case.dtype, case.flops, case.bytes, names, own, case.aims)
    row.failed = problem or "it wrote nothing"
    return row


def ended(command: list[str], seconds: float) -> str:
    """Run a command and everything that it starts for so long at most. Returns what went wrong."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"it took longer than its {seconds:.0f} s"
    last = (said.strip().splitlines() or ["no reason given"])[-1]
    return f"it ended with status {process.returncode}: {last[:200]}" if process.returncode else ""


def glob_of(name: str) -> str:
    """The pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def growth(rows: list[Row]) -> dict[str, dict[str, float]]:
    """How many times as long the row with the longest shared prefix takes as the one with the shortest, and its floor."""
    from benchmarks.run import DEFAULT, TUNED, figures

    found = [(row, figures(row)) for row in rows if "shared prefix" in row.name]
    timed = [(row.name, f.get(TUNED) or f[DEFAULT], f["floor_ms"]) for row, f in found if f]
    if len(timed) < 2:
        return {}
    (short, first, least), (long, last, most) = timed[0], timed[-1]
    return {f"{short} -> {long}": {"measured": last["ms"] / first["ms"], "floor": most / least}}


def machine_with_gpu() -> dict[str, Any]:
    """What the figures depend on, the GPU and its driver included."""
    import torch

    from benchmarks.protocol import machine

    properties = torch.cuda.get_device_properties(0)
    try:
        answer = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True, check=True)
        said = dict(zip(QUERY.split(","), (x.strip() for x in answer.stdout.splitlines()[0].split(",")), strict=False))
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = {}
    about = machine()
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **said,
    }
    return {**about, "processor": f"{properties.name}, host {about['processor']}", "gpu": gpu}


if __name__ == "__main__":
    main()
