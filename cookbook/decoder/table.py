"""Trains the decoder, evicts and quantizes the caches of held-out prompts with the recipes' kernels, and writes the table and the picture.

    python cookbook/decoder/table.py --out out
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import click
import einfall as ef
import torch

from cookbook.decoder import evict, picture, quantize
from cookbook.decoder.model import Decoder, Seen, load_text, perplexity, quote, train, windows

PROMPT, REST, CUE = 256, 64, 16
BUDGETS = (256, 192, 128, 96, 64, 48, 32, 24)


@dataclass(frozen=True)
class Task:
    """The decoder with texts, their prompts as its layers saw them, and prompts to calibrate on."""

    model: Decoder
    seen: Sequence[Seen]
    text: torch.Tensor
    calibration: torch.Tensor

    @staticmethod
    def following(model: Decoder, stride: int = REST) -> Task:
        """Held-out text that goes on."""
        trained, held_out = load_text()
        return Task._of(model, windows(held_out, PROMPT + 1 + REST, stride), trained)

    @staticmethod
    def quoting(model: Decoder, stride: int = REST) -> Task:
        """Held-out text that quotes itself: the first bytes of the quotation end the prompt, the others are scored."""
        trained, held_out = load_text()
        text, size = windows(held_out, PROMPT + 1 + REST, stride), CUE + 1 + REST
        start = torch.randint(0, PROMPT - CUE - size, (len(text),), generator=torch.Generator().manual_seed(0))
        return Task._of(model, quote(text, start, size), trained)

    @staticmethod
    def _of(model: Decoder, text: torch.Tensor, trained: torch.Tensor) -> Task:
        return Task(model, model.read(text[:, :PROMPT]), text, windows(trained, PROMPT, 8192))

    def plain(self) -> float:
        """The perplexity with all of the cache as it is."""
        return perplexity(self.model, [s.cache for s in self.seen], self.text)

    def evicted(self, method: evict.Method, budgets: Sequence[int]) -> list[float]:
        """The perplexity of each budget."""
        keeper = method(self.model, self.seen)
        return [perplexity(self.model, evict.left(self.seen, keeper(n)), self.text) for n in budgets]

    def quantized(self, form: quantize.Format) -> tuple[float, float]:
        """Bits a value and perplexity."""
        caches, bits = quantize.stored(self.seen, form)
        return bits, perplexity(self.model, caches, self.text)


def measure(
    tasks: Mapping[str, Task], budgets: Sequence[int] = BUDGETS, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Everything of the table, for each task."""
    first = next(iter(tasks.values()))
    found: dict[str, Any] = {"prompts": len(first.text), "prompt": PROMPT, "scored": REST, "budgets": list(budgets)}
    found["plain"] = {name: task.plain() for name, task in tasks.items()}
    report(f"all of the cache: {found['plain']}")
    found["evicted"], found["quantized"] = {}, []
    for name, method in evict.methods(first.calibration).items():
        found["evicted"][name] = {kind: task.evicted(method, budgets) for kind, task in tasks.items()}
        report(f"{name}: {found['evicted'][name]}")
    for form in quantize.FORMATS:
        results = {kind: task.quantized(form) for kind, task in tasks.items()}
        row = {"family": form.family, "name": form.name, "bits": next(iter(results.values()))[0]}
        found["quantized"].append(row | {kind: value for kind, (_, value) in results.items()})
        report(str(found["quantized"][-1]))
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """The tables as lines of Markdown."""
    lines = []
    for kind, plain in found["plain"].items():
        lines += [f"{kind.capitalize()}, {plain:.3f} with all of the cache:", "", "| kept of 256 | " + " | ".join(found["evicted"]) + " |"]
        lines.append("|---" * (1 + len(found["evicted"])) + "|")
        for place, budget in enumerate(found["budgets"]):
            lines.append(f"| {budget} | " + " | ".join(f"{rows[kind][place]:.3f}" for rows in found["evicted"].values()) + " |")
        lines.append("")
    kinds = list(found["plain"])
    lines += ["| keys and values | bits a value | " + " | ".join(kinds) + " |", "|---|---" + "|---" * len(kinds) + "|"]
    for row in found["quantized"]:
        lines.append(f"| {row['name']} | {row['bits']:.2f} | " + " | ".join(f"{row[kind]:.3f}" for kind in kinds) + " |")
    return lines


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="the folder for table and picture")
@click.option("--steps", default=350, show_default=True, help="of training")
@click.option("--weights", type=click.Path(path_type=Path), help="a file: read instead of training if it exists, else written")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, steps: int, weights: Path | None, seed: int) -> None:
    model = Decoder(seed=seed)
    trained: dict[str, Any] = {"steps": steps, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    if weights is not None and weights.exists():
        model.load_state_dict(torch.load(weights))
    else:
        seconds = train(model, load_text()[0], steps=steps, seed=seed, report=lambda i, x: i % 50 or click.echo(f"step {i}: {x:.3f}"))
        trained |= {"processor_seconds": round(seconds, 1), "threads": torch.get_num_threads()}
        if weights is not None:
            torch.save(model.state_dict(), weights)
    tasks = {"following": Task.following(model), "quoting": Task.quoting(model)}
    versions = {"torch": torch.__version__, "einfall": ef.__version__}
    found = {"versions": versions, "training": trained, **measure(tasks, report=click.echo)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "decoder.json").write_text(json.dumps(found, indent=1) + "\n")
    picture.draw(found, out / "decoder.png")
    click.echo("\n" + "\n".join(table(found)))


if __name__ == "__main__":
    main()
