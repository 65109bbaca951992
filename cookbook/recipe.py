"""What every recipe of a system is made of, and the script that shows one.

A recipe is a module with a `RECIPE`: kernels traced from their cascades, for each an oracle in plain PyTorch that was written from the
paper and not from the cascade, inputs to try it on, and a figure. `python cookbook/<family>/<recipe>.py` explains, checks and shows it;
the tests hold every one against its oracle over random extents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import einfall as ef
import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of a recipe and what holds it to account.

    Args:
        kernel: the traced cascade, called with `inputs` in order and `scalars` and `static` by name.
        oracle: eager PyTorch with the same arguments; computes in the type of the tensors it is given, float64 included.
        inputs: (generator, extents) -> fresh tensors in the declared types.
        sizes: the extents of the recipe's own figures and of its page.
        ranges: for each of `sizes`, the least and greatest extent that the property test draws.
        exact: results are decisions or bits: the oracle runs in the declared types and every element must be equal.
        tolerance: the greatest error otherwise, relative to the largest magnitude of the oracle's result in float64.
    """

    name: str
    kernel: ef.Kernel
    oracle: Callable[..., Any]
    inputs: Callable[[torch.Generator, Mapping[str, int]], Tensors]
    sizes: Mapping[str, int]
    ranges: Mapping[str, tuple[int, int]]
    scalars: Mapping[str, float] = field(default_factory=dict)
    static: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    tolerance: float = 2e-5

    def tensors(self, seed: int, sizes: Mapping[str, int] | None = None) -> Tensors:
        """Fresh inputs, the same for the same seed."""
        return self.inputs(torch.Generator().manual_seed(seed), dict(sizes or self.sizes))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of kernel and oracle."""
        return {**self.scalars, **self.static}

    def wanted(self, tensors: Tensors) -> Tensors:
        """The oracle's results: in float64, or in the declared types where decisions or bits are compared."""
        given = tensors if self.exact else tuple(doubled(t) for t in tensors)
        return as_tuple(self.oracle(*given, **self.arguments()))

    def compare(self, found: Any, tensors: Tensors) -> list[str]:
        """What of `found` disagrees with the oracle, one line a result; empty if all is well."""
        wrong = []
        for i, (x, y) in enumerate(zip(as_tuple(found), self.wanted(tensors), strict=True)):
            problem = disagreement(x, y, exact=self.exact, tolerance=self.tolerance)
            if problem:
                wrong.append(f"{self.name}, result {i}: {problem}")
        return wrong


@dataclass(frozen=True, slots=True)
class Recipe:
    """A system as kernels of this language.

    Args:
        source: paper and section, for the reader; says so where a formula could not be checked against its source.
        show: prints the recipe's table or writes its picture into a folder, and returns the lines of the table for the page.
    """

    name: str
    title: str
    source: str
    steps: tuple[Step, ...]
    show: Callable[[Path], Sequence[str]]


def as_tuple(x: Any) -> Tensors:
    """One tensor or several, as a tuple."""
    return (x,) if isinstance(x, torch.Tensor) else tuple(x)


def doubled(t: torch.Tensor) -> torch.Tensor:
    """A float tensor in float64; others as they are."""
    return t.double() if t.is_floating_point() else t


def disagreement(found: torch.Tensor, wanted: torch.Tensor, *, exact: bool, tolerance: float) -> str | None:
    """What differs between two results, or None. Non-finite elements must be the same ones."""
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)}, the oracle's is {list(wanted.shape)}"
    if not wanted.numel():
        return None
    if exact:
        same = (found == wanted) | (found != found) & (wanted != wanted)
        return None if bool(same.all()) else f"{int((~same).sum())} of {same.numel()} elements differ"
    x, y = found.double(), wanted.double()
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(0.5), y[~finite].nan_to_num(0.5)) or not bool(x[finite].isfinite().all()):
        return "not finite where the oracle is, or the other way round"
    if not bool(finite.any()):
        return None
    error = float((x - y)[finite].abs().max()) / max(float(y[finite].abs().max()), 1e-30)
    return None if error <= tolerance else f"relative error {error:.1e} above {tolerance:.0e}"


def serve(recipe: Recipe) -> None:
    """The recipe as a script: explains each kernel, checks it against its oracle, shows the figure."""

    @click.command(name=recipe.name, help=f"{recipe.title}\n\n{recipe.source}")
    @click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="the folder for pictures")
    @click.option("--seed", default=0, show_default=True)
    @click.option("--explain/--no-explain", default=True, help="print what the compiler makes of each cascade")
    def command(out: Path, seed: int, explain: bool) -> None:
        click.echo(f"{recipe.title}\n{recipe.source}\n")
        wrong: list[str] = []
        for step in recipe.steps:
            tensors = step.tensors(seed)
            if explain:
                click.echo(str(step.kernel.explain(*tensors, show=False, **step.arguments())))
            found = step.compare(step.kernel(*tensors, **step.arguments()), tensors)
            wrong += found
            click.echo(f"{step.name}: {'; '.join(found) or 'agrees with its oracle'}")
        out.mkdir(parents=True, exist_ok=True)
        click.echo("\n" + "\n".join(recipe.show(out)))
        if wrong:
            raise click.exceptions.Exit(1)

    command()
