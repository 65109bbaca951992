"""Tunes the attention of a sentence encoder on this machine and runs the encoder with what was found.

    python cookbook/minilm/demo.py [--trials 24] [--seconds 40] [--model-seconds 20] [--batch 32] [--out out]

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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the recipe's other files, however this one is started

import einfall as ef
import torch
import transformers
from compare import Entry, compare, median, spread
from einfall.tuner.inputs import make_inputs
from einfall.tuner.search import Stop
from einfall.tuner.tune import Event, Failed, Finals, Incumbent, Measured, TuneResult
from encoder import (
    DTYPES,
    Batch,
    DefaultSchedule,
    Encoder,
    Stopwatch,
    attention,
    read_sentences,
    register,
    register_peers,
    run_kernel,
)
from floor import Machine, Needed, of_call, of_model
from picture import Roof, Tuning, draw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ENOUGH = 0.9999  # the least cosine with the unpatched model's embeddings


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ef.configure(database=out / "minilm.db")

    machine = Machine.measure(options.measure_seconds)
    print_machine(console, machine)
    encoder = Encoder()
    batches = list(encoder.batches(read_sentences(), options.batch))
    print_batches(console, batches)
    dims = encoder.dims(batches[0])
    print_cascade(console, dims, machine)

    tuned = tune(console, dims, trials=options.trials, seconds=options.seconds, seed=options.seed)
    print_winner(console, tuned, [encoder.dims(batch) for batch in batches])
    entries = run_model(console, encoder, batches, options.model_seconds)
    needed = of_model(encoder, batches, machine)
    print_table(console, entries, needed)

    lengths = make_inputs(attention.trace(dtypes=DTYPES), dims, "normal", options.seed)["L"]  # those that candidates are timed on
    write_picture(out / "minilm.png", tuned, of_call(dims, lengths, machine), needed, entries, machine)
    write_json(out / "minilm.json", tuned, needed, entries, machine)
    console.print(f"\nwritten: {out / 'minilm.png'}, {out / 'minilm.json'}; every measurement: {out / 'minilm.db'}")
    console.print(f"all of it took {time.perf_counter() - began:.0f} s")
    if (worst := min(entry.worst_cosine for entry in entries)) < ENOUGH:
        console.print(f"[red]the embeddings are not those of the unpatched model: cosine {worst}[/red]")
        return 1
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=24, help="candidates to measure at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="no candidate is begun after so long (%(default)s)")
    parser.add_argument("--model-seconds", type=float, default=20.0, help="how long the model is timed, about (%(default)s)")
    parser.add_argument("--measure-seconds", type=float, default=2.0, help="how long the machine's peaks are measured (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sentences in a batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (%(default)s)")
    parser.add_argument("--out", default="out", help="the folder to write into (%(default)s)")
    return parser


# -- what is to be done -------------------------------------------------------------------------------------------------------------


def print_machine(console: Console, machine: Machine) -> None:
    console.print(f"[bold]{machine.description}[/bold]: fp32 {machine.flops / 1e9:.0f} GFLOP/s, memory {machine.bandwidth / 1e9:.1f} GB/s")
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"einfall {ef.__version__}; {torch.get_num_threads()} threads; {datetime.date.today().isoformat()}"
    )


def print_batches(console: Console, batches: Sequence[Batch]) -> None:
    tokens, places = sum(int(b.mask.sum()) for b in batches), sum(b.mask.numel() for b in batches)
    shapes = " and ".join(f"{b.mask.shape[0]} x {b.mask.shape[1]}" for b in batches)
    shortest, longest = min(int(b.mask.sum(-1).min()) for b in batches), max(b.mask.shape[1] for b in batches)
    console.print(
        f"{sum(len(b.places) for b in batches)} sentences of {shortest} to {longest} tokens in batches of {shapes}, "
        f"{100 * (1 - tokens / places):.0f} % of that padding\n"
    )


def print_cascade(console: Console, dims: dict[str, int], machine: Machine) -> None:
    found = attention.explain(dims=dims, dtypes=DTYPES, target=machine.target, show=False).to_dict()
    before, after = found["passes"]["before"]["p"], found["passes"]["after"]["p"]
    console.print(found["text"].rstrip(), markup=False, soft_wrap=True)
    console.print(f"\npasses over the tokens p: [bold]{before} as written, {after} as derived[/bold], in {len(found['kernels'])} kernel(s)")
    for rewrite in found["rewrites"]:
        console.print(f"  {rewrite['name']}: {rewrite['did']}" + (f" (saves {rewrite['saved']})" if rewrite["saved"] else ""))
    console.print()


# -- tuning -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A tuning run as it was watched: what it found, and the time of each trial, None where it failed."""

    result: TuneResult
    dims: dict[str, int]
    trials_ms: tuple[float | None, ...]


def tune(console: Console, dims: dict[str, int], *, trials: int, seconds: float, seed: int) -> Tuned:
    """Searches for at most `trials` candidates or `seconds`, with a progress bar, and records into the database of the settings."""
    times: list[float | None] = []
    until = time.perf_counter() + seconds
    note = ""
    with _progress(console) as bar:
        task = bar.add_task("tuning the attention", total=trials, note="")

        def watch(event: Event) -> None:
            nonlocal note
            match event:
                case Incumbent(time_ms=time_ms, speedup=speedup):
                    note = f", best {time_ms:.3g} ms" + ("" if speedup is None else f", {speedup:.2f}x the default")
                case Measured(time_ms=time_ms):
                    times.append(time_ms)
                case Failed():
                    times.append(None)
                case Finals():
                    note += ", finals"
                case _:
                    pass
            left = max(0.0, until - time.perf_counter())
            bar.update(task, completed=len(times), note=f"{len(times)} of {trials}{note}, at most {left:.0f} s left")
            if left == 0.0 and isinstance(event, (Measured, Failed)) and any(t is not None for t in times):
                raise Stop  # ends the search; what was measured is recorded, and the finals are held

        result = attention.tune(dims=dims, dtypes=DTYPES, scale=dims["e"] ** -0.5, trials=trials, seed=seed, on_event=watch)
    return Tuned(result, dims, tuple(times))


def _progress(console: Console) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
    return Progress(*columns, console=console)


def print_winner(console: Console, tuned: Tuned, shapes: Sequence[dict[str, int]]) -> None:
    result = tuned.result
    speedup = "" if result.speedup is None else f", [bold]{result.speedup:.2f}x[/bold] the default's {result.default_ms:.3g} ms"
    failed = sum(t is None for t in tuned.trials_ms)
    console.print(f"found: {result.best_ms:.3g} ms a call{speedup}, in the finals of {len(tuned.trials_ms)} candidates ({failed} failed)")
    for dims in shapes:
        schedule = attention.compile(dims=dims, dtypes=DTYPES).schedule
        which = "the winner" if schedule == result.schedule else "the default, nothing near being recorded"
        console.print(f"  a call at {dims['b']} x {dims['m']} now runs {which} ({schedule.hash})")
    console.print()


# -- the model ----------------------------------------------------------------------------------------------------------------------


def run_model(console: Console, encoder: Encoder, batches: Sequence[Batch], seconds: float) -> list[Entry]:
    """Times the encoder with the attentions of transformers, and with the kernel by default and as tuned, in turns."""
    watch = Stopwatch()
    eager, sdpa = register_peers(watch)
    register("einfall_default", DefaultSchedule(), watch)
    register("einfall_tuned", run_kernel, watch)
    names = [("eager", eager), ("sdpa", sdpa), ("einfall, default", "einfall_default"), ("einfall, tuned", "einfall_tuned")]
    with _progress(console) as bar:
        task = bar.add_task("running the model", total=None, note="")
        return compare(encoder, batches, names, watch, seconds, lambda done: bar.update(task, note=f"{done} rounds"))


def print_table(console: Console, entries: Sequence[Entry], needed: Needed) -> None:
    sdpa = entries[1]  # what the model runs when nobody asks for anything else
    rounds = len(sdpa.model_ms)
    table = Table(title=f"the encoder with four attentions: medians of {rounds} interleaved rounds (and how far the quartiles are apart)")
    for column in ("", "attention, ms", "x sdpa", "of the floor", "model, ms", "x sdpa", "worst cosine", "neighbours"):
        table.add_column(column, justify="right" if column else "left")
    for entry in entries:
        mine, whole = median(entry.attention_ms), median(entry.model_ms)
        table.add_row(
            entry.name,
            f"{mine:.1f} ({100 * spread(entry.attention_ms):.0f} %)",
            f"{median(sdpa.attention_ms) / mine:.2f}",
            f"{100 * needed.floor_ms / mine:.0f} %",
            f"{whole:.0f} ({100 * spread(entry.model_ms):.0f} %)",
            f"{median(sdpa.model_ms) / whole:.2f}",
            f"{entry.worst_cosine:.9f}",
            "same" if entry.same_neighbours else "differ",
        )
    console.print(table)
    console.print(
        f"worst cosine of an embedding with the unpatched model's: [bold]{min(e.worst_cosine for e in entries):.9f}[/bold]; "
        f"the floor of the attention: {needed.floor_ms:.1f} ms"
    )


# -- files --------------------------------------------------------------------------------------------------------------------------


def write_picture(path: Path, tuned: Tuned, call: Needed, needed: Needed, entries: Sequence[Entry], machine: Machine) -> None:
    result = tuned.result
    title = f"Tuning one call: {', '.join(f'{rank}={extent}' for rank, extent in tuned.dims.items())}, random lengths"
    if result.default_ms is not None:
        title += f"\nin turns, at the end: default {result.default_ms:.3g} ms, winner {result.best_ms:.3g} ms"
    times = tuple((entry.name, median(entry.attention_ms)) for entry in entries)
    draw(
        Tuning(tuned.trials_ms, tuned.trials_ms[0], call.floor_ms, title),
        Roof(
            needed.operations, needed.bytes, machine.flops, machine.bandwidth, needed.floor_ms, times,
            "All layers, in the model\nmedians of interleaved rounds",
        ),
        f"The attention of all-MiniLM-L6-v2 on {machine.description}, {datetime.date.today().isoformat()}",
        path,
    )  # fmt: skip


def write_json(path: Path, tuned: Tuned, needed: Needed, entries: Sequence[Entry], machine: Machine) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    data = {
        "machine": {"description": machine.description, "fp32_flops": machine.flops, "bandwidth": machine.bandwidth},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {**versions, "einfall": ef.__version__},
        "threads": torch.get_num_threads(),
        "tuning": {**tuned.result.to_dict(), "trials_ms": tuned.trials_ms},
        "attention": {"operations": needed.operations, "bytes": needed.bytes, "floor_ms": needed.floor_ms},
        "entries": [entry.to_dict() for entry in entries],
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
