"""Tunes the attention of a sentence encoder on this machine and runs the encoder with what was found.

    python cookbook/minilm/demo.py [--trials 24] [--seconds 40] [--model-seconds 25] [--batch 32] [--out out]

Writes into the folder `out`: minilm.db (every measurement), minilm.png (the tuning run and the roofline), minilm.json (raw samples).
"""

from __future__ import annotations

import os

# Before torch is loaded: a thread that spins after its work takes the core from the kernel that runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"  # the weights lie in a package, nothing is fetched

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the recipe's other files, however this one is started

import einfall as ef
import torch
import transformers
from compare import Entry, compare, median, spread
from einfall.compiler.cost import Cost, cost
from einfall.schedules.host import host_target, measure_host, with_measured
from einfall.schedules.target import Target
from einfall.tuner.inputs import make_inputs
from einfall.tuner.search import Stop
from einfall.tuner.tune import Event, Failed, Finals, Incumbent, Measured, TuneResult
from encoder import Batch, Encoder, Stopwatch, attention, read_sentences, register, register_peers, run_kernel
from picture import Roof, Tuning, draw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

DTYPES = {"L": "i32"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    console = Console()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ef.configure(database=out / "minilm.db")

    target = measured_target(options.measure_seconds)
    print_machine(console, target)
    encoder = Encoder()
    batches = list(encoder.batches(read_sentences(), options.batch))
    print_batches(console, batches)
    dims = dims_of(encoder, batches[0])
    print_cascade(console, dims, target)

    default = DefaultSchedule()
    run = tune(console, dims, trials=options.trials, seconds=options.seconds, seed=options.seed)
    print_winner(console, run, [dims_of(encoder, b) for b in batches])

    watch = Stopwatch()
    eager, sdpa = register_peers(watch)
    register("einfall_default", default, watch)
    register("einfall_tuned", run_kernel, watch)
    names = [("eager", eager), ("sdpa", sdpa), ("einfall, default", "einfall_default"), ("einfall, tuned", "einfall_tuned")]
    with progress(console, "running the model", None) as (bar, task):
        entries = compare(
            encoder, batches, names, watch, options.model_seconds, lambda done: bar.update(task, completed=done, note=f"{done} rounds")
        )
    needed = work(encoder, batches, target)
    print_table(console, entries, needed)
    write_picture(out / "minilm.png", run, needed, entries, target, dims)
    write_json(out / "minilm.json", run, needed, entries, target, dims)
    console.print(f"written: {out / 'minilm.png'}, {out / 'minilm.json'}; every measurement: {out / 'minilm.db'}")
    console.print(f"all of it took {time.perf_counter() - began:.0f} s")
    worst = min(entry.worst_cosine for entry in entries)
    if worst < 0.9999:
        console.print(f"[red]the embeddings differ from those of the unpatched model: cosine {worst}[/red]")
        return 1
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=24, help="candidates to measure at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="no candidate is begun after so long (%(default)s)")
    parser.add_argument("--model-seconds", type=float, default=25.0, help="how long the model is timed, about (%(default)s)")
    parser.add_argument("--measure-seconds", type=float, default=2.0, help="how long the machine's peaks are measured (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sentences in a batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (%(default)s)")
    parser.add_argument("--out", default="out", help="the folder to write into (%(default)s)")
    return parser


# -- the machine, the model's shapes, the cascade -----------------------------------------------------------------------------------


def measured_target(seconds: float) -> Target:
    """This machine, with the better of what its features promise and what torch reaches: either alone may be too low."""
    target = host_target()
    found = measure_host(seconds)
    promised = target.peak("matrix", ef.f32)[2]
    return with_measured(target, replace(found, f32_flops=max(found.f32_flops, promised)))


def print_machine(console: Console, target: Target) -> None:
    peak, bandwidth = target.peak("matrix", ef.f32)[2] / 1e9, target.memory.bandwidth / 1e9
    console.print(f"[bold]{target.description}[/bold]: fp32 {peak:.0f} GFLOP/s, memory {bandwidth:.1f} GB/s")
    console.print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
                  f"einfall {ef.__version__}; {torch.get_num_threads()} threads; {datetime.date.today().isoformat()}")  # fmt: skip


def print_batches(console: Console, batches: Sequence[Batch]) -> None:
    tokens, places = sum(int(b.mask.sum()) for b in batches), sum(b.mask.numel() for b in batches)
    shapes = " and ".join(f"{b.mask.shape[0]} x {b.mask.shape[1]}" for b in batches)
    count = sum(len(b.places) for b in batches)
    console.print(f"{count} sentences of {min(int(b.mask.sum(-1).min()) for b in batches)} to {batches[0].mask.shape[1]} tokens "
                  f"in batches of {shapes}, {100 * (1 - tokens / places):.0f} % of them padding\n")  # fmt: skip


def dims_of(encoder: Encoder, batch: Batch) -> dict[str, int]:
    """The extents of the attention in a batch."""
    config, (b, m) = encoder.model.config, batch.tokens.shape
    width = config.hidden_size // config.num_attention_heads
    return {"b": b, "h": config.num_attention_heads, "m": m, "p": m, "e": width, "f": width}


def print_cascade(console: Console, dims: dict[str, int], target: Target) -> None:
    found = attention.explain(dims=dims, dtypes=DTYPES, target=target, show=False).to_dict()
    before, after = found["passes"]["before"]["p"], found["passes"]["after"]["p"]
    console.print(found["text"].rstrip(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nover the tokens p: [bold]{before} passes as written, {after} as derived[/bold]")
    for rewrite in found["rewrites"]:
        console.print(f"  {rewrite['name']}: {rewrite['did']}" + (f" (saves {rewrite['saved']})" if rewrite["saved"] else ""))
    count = len(found["kernels"])
    console.print(f"  {count} kernel{'s' if count > 1 else ''}; {found['intensity']:.0f} operations a byte\n")


# -- tuning -------------------------------------------------------------------------------------------------------------------------


class DefaultSchedule:
    """The attention as it is compiled where no database knows better."""

    def __init__(self) -> None:
        self._built: dict[torch.Size, ef.Executable] = {}

    def __call__(self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, L: torch.Tensor, scale: float) -> torch.Tensor:
        if Q.shape not in self._built:
            with ef.configure(database=None):
                self._built[Q.shape] = attention.compile(Q, K, V, L, scale=scale)
        return self._built[Q.shape](Q, K, V, L, scale=scale)


@dataclass
class Run:
    """A tuning run as it was watched: the time of each trial, None where it failed."""

    result: TuneResult
    trials_ms: list[float | None] = field(default_factory=list)


def tune(console: Console, dims: dict[str, int], *, trials: int, seconds: float, seed: int) -> Run:
    """Searches for at most `trials` candidates or `seconds`, with a progress bar, and records into the database of the settings."""
    times: list[float | None] = []
    best = ""
    until = time.perf_counter() + seconds
    with progress(console, "tuning the attention", trials) as (bar, task):

        def watch(event: Event) -> None:
            nonlocal best
            match event:
                case Incumbent(time_ms=time_ms, speedup=speedup):
                    best = f"best {time_ms:.3g} ms" + ("" if speedup is None else f", {speedup:.2f}x the default")
                case Measured(time_ms=time_ms):
                    times.append(time_ms)
                case Failed():
                    times.append(None)
                case Finals():
                    best += "; finals"
                case _:
                    pass
            left = max(0.0, until - time.perf_counter())
            bar.update(task, completed=len(times), note=f"{best}; {left:.0f} s left")
            if left == 0.0 and isinstance(event, (Measured, Failed)) and any(t is not None for t in times):
                raise Stop  # ends the search; what was measured is recorded, and the finals are held

        result = attention.tune(dims=dims, dtypes=DTYPES, scale=dims["e"] ** -0.5, trials=trials, seed=seed, on_event=watch)
    return Run(result, times[: max(len(times), 1)])


def print_winner(console: Console, run: Run, shapes: Sequence[dict[str, int]]) -> None:
    result = run.result
    failed = sum(t is None for t in run.trials_ms)
    speedup = "" if result.speedup is None else f", [bold]{result.speedup:.2f}x[/bold] the default's {result.default_ms:.3g} ms"
    console.print(f"tuned: {result.best_ms:.3g} ms{speedup}, after {len(run.trials_ms)} candidates ({failed} failed) in {result.seconds:.0f} s")
    for dims in shapes:
        schedule = attention.compile(dims=dims, dtypes=DTYPES).schedule
        origin = "the winner" if schedule == result.schedule else "another schedule"
        console.print(f"  at {dims['b']} x {dims['m']} a call now runs {origin}, {schedule.hash}")
    console.print()


def progress(console: Console, title: str, total: int | None) -> ProgressBar:
    return ProgressBar(console, title, total)


class ProgressBar:
    """A line with a bar and a note while something takes its time."""

    def __init__(self, console: Console, title: str, total: int | None) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
        if total is not None:
            columns.insert(2, MofNCompleteColumn())
        self._progress = Progress(*columns, console=console)
        self._title, self._total = title, total

    def __enter__(self):
        self._progress.start()
        return self._progress, self._progress.add_task(self._title, total=self._total, note="")

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()


# -- what it came to ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """The work that all layers need for all batches, padding left out, and the least time for it."""

    operations: float
    bytes: float
    floor_ms: float


def work(encoder: Encoder, batches: Sequence[Batch], target: Target) -> Needed:
    layers = encoder.model.config.num_hidden_layers
    found = [needed(dims_of(encoder, batch), batch.mask.sum(-1), target) for batch in batches]
    return Needed(*(layers * sum(getattr(n, name) for n in found) for name in ("operations", "bytes", "floor_ms")))


def needed(dims: dict[str, int], lengths: torch.Tensor, target: Target) -> Needed:
    """The work of one call: what `explain` counts, sentence by sentence, with as many keys and values as the sentence has tokens."""
    executable = attention.compile(dims=dims, dtypes=DTYPES)
    found: list[Cost] = [
        cost(executable.cascade, {**dims, "b": 1, "p": int(length)}, target, executable.plan) for length in lengths if length > 0
    ]
    bytes_ = sum(c.traffic_bytes for c in found)
    compute_us = sum(sum(u.time_us for u in c.roofline.units) for c in found)  # of one pipe: they take turns
    return Needed(sum(c.flops for c in found), bytes_, max(bytes_ / target.memory.bandwidth * 1e3, compute_us / 1e3))


def print_table(console: Console, entries: Sequence[Entry], needed: Needed) -> None:
    peer = entries[1]
    rounds = len(peer.model_ms)
    table = Table(title=f"the encoder with four attentions, median of {rounds} interleaved rounds (and distance of the quartiles)")
    for column in ("attention", "in the attention, ms", "x sdpa", "of the floor", "whole model, ms", "x sdpa", "worst cosine", "neighbours"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for entry in entries:
        mine, whole = median(entry.attention_ms), median(entry.model_ms)
        table.add_row(
            entry.name,
            f"{mine:.1f}  ({100 * spread(entry.attention_ms):.0f} %)",
            f"{median(peer.attention_ms) / mine:.2f}",
            f"{100 * needed.floor_ms / mine:.0f} %",
            f"{whole:.0f}  ({100 * spread(entry.model_ms):.0f} %)",
            f"{median(peer.model_ms) / whole:.2f}",
            f"{entry.worst_cosine:.9f}",
            "same" if entry.same_neighbours else "differ",
        )
    console.print(table)
    console.print(f"worst cosine with the unpatched model: [bold]{min(e.worst_cosine for e in entries[2:]):.9f}[/bold]; "
                  f"the least this machine needs for the attention: {needed.floor_ms:.1f} ms")  # fmt: skip


def tuning_floor_ms(run: Run, dims: dict[str, int], target: Target, seed: int) -> float:
    """The floor of the inputs that candidates were timed on, whose lengths are random."""
    cascade = attention.trace(dtypes=DTYPES)
    return needed(dims, make_inputs(cascade, dims, "normal", seed)["L"], target).floor_ms


def write_picture(path: Path, run: Run, needed: Needed, entries: Sequence[Entry], target: Target, dims: dict[str, int]) -> None:
    extents = ", ".join(f"{rank}={extent}" for rank, extent in dims.items())
    default = run.trials_ms[0]
    draw(
        Tuning(tuple(run.trials_ms), default, tuning_floor_ms(run, dims, target, 0), f"Tuning one call: {extents}, random lengths"),
        Roof(
            needed.operations, needed.bytes, target.peak("matrix", ef.f32)[2], target.memory.bandwidth, needed.floor_ms,
            tuple((e.name, median(e.attention_ms)) for e in entries), "The attention of all layers, in the model",
        ),
        f"all-MiniLM-L6-v2 on {target.description}, {datetime.date.today().isoformat()}",
        path,
    )  # fmt: skip


def write_json(path: Path, run: Run, needed: Needed, entries: Sequence[Entry], target: Target, dims: dict[str, int]) -> None:
    data = {
        "machine": target.description,
        "fp32_flops_a_second": target.peak("matrix", ef.f32)[2],
        "memory_bytes_a_second": target.memory.bandwidth,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                     "einfall": ef.__version__},
        "threads": torch.get_num_threads(),
        "extents": dims,
        "tuning": run.result.to_dict() | {"trials_ms": run.trials_ms},
        "attention": {"operations": needed.operations, "bytes": needed.bytes, "floor_ms": needed.floor_ms},
        "entries": [entry.to_dict() for entry in entries],
    }  # fmt: skip
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
