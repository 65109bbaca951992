"""What an emitted file does when it is run: random inputs, the kernel, and what its tile program says of them.

    python kernel_of_something.py

The kernel runs in Triton's interpreter on this machine's processor; the program is read from the file's docstring and evaluated by
the interpreter of tile programs, which shares no code with the emitter.
"""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.binding import to_torch
from ...ir.errors import BuildError
from ...ir.tile import Loop, TileProgram
from ...ir.types import dtype as dtype_named
from ...schedules.target import load_target
from ..base import Source
from .interpret import FLAG, interpret
from .signature import Memory, Signature, signature_of

SMALL = (1, 2, 3, 5)  # extents of ranks that are free
LONG = 37  # elements along a stream or the last axis, a little more than a tile if it can be
TOLERANCE = 2e-2


def run(file: str) -> None:
    """Compare a kernel with its program, in a process that interprets (the file's own has Triton imported already)."""
    done = subprocess.run([sys.executable, "-m", __name__, file], env={**os.environ, FLAG: "1"}, check=False)
    raise SystemExit(done.returncode)


def compare(path: Path, seed: int = 0) -> tuple[str, bool]:
    """A line for each output, and whether all agree. Raises `BuildError` for a file that is no emitted kernel."""
    from ...ir.text import parse_program
    from ...ir.tile_reference import run_program

    text = path.read_text(encoding="utf-8")
    source = Source.make(text, path.stem, load_target("cuda:sm_90"))
    signature = signature_of(source)
    program = parse_program(program_text(text), str(path))
    sizes = extents(program, signature, random.Random(seed))
    tensors = {t.name: values(t, sizes, seed + i) for i, t in enumerate(signature.inputs)}
    scalars = dict.fromkeys(signature.scalars, 0.5)
    outputs = {t.name: torch.zeros(shape(t, sizes), dtype=to_torch(dtype_named(t.dtype))) for t in signature.outputs}
    interpret(source)(*tensors.values(), *outputs.values(), *scalars.values())
    wanted = run_program(program, {name: as_array(t) for name, t in tensors.items()}, scalars, sizes=sizes)
    lines = [f"{signature.entry} at {', '.join(f'{rank}={n}' for rank, n in sizes.items())}, interpreted"]
    right = True
    for name, found in outputs.items():
        apart = distance(found, np.asarray(wanted[name]))
        right = right and apart <= TOLERANCE
        lines.append(f"  {name}: {'agrees' if apart <= TOLERANCE else 'DIFFERS'}, {apart:.1e} of the largest value")
    return "\n".join(lines), right


def program_text(text: str) -> str:
    """The tile program in the docstring of an emitted file."""
    documented = ast.get_docstring(ast.parse(text), clean=False) or ""
    start = documented.find("\nkernel ")
    if start < 0:
        raise BuildError("the file has no tile program in its docstring", hint="compile the kernel again")
    return documented[start + 1 :]


def extents(program: TileProgram, signature: Signature, draw: random.Random) -> dict[str, int]:
    """Small extents for every rank of the tensors."""
    sizes = dict(signature.sizes)
    streamed = {node.rank for node in program.body if isinstance(node, Loop)}
    for t in signature.tensors:
        for axis in t.axes:
            for rank in axis:
                sizes.setdefault(rank, LONG if rank in streamed else draw.choice(SMALL))
    return sizes


def shape(t: Memory, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(int(np.prod([sizes[rank] for rank in axis], dtype=np.int64)) for axis in t.axes)


def values(t: Memory, sizes: Mapping[str, int], seed: int) -> torch.Tensor:
    """Random elements: floats near 1, whole numbers that are coordinates of small tensors too."""
    generator = torch.Generator().manual_seed(seed)
    kind, wanted = dtype_named(t.dtype), shape(t, sizes)
    if kind.is_float:
        return torch.randn(wanted, generator=generator).to(to_torch(kind))
    high = 2 if kind.kind == "bool" or kind.bits >= 32 else 8
    return torch.randint(0, high, wanted, generator=generator).to(to_torch(kind))


def as_array(t: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the interpreter of tile programs takes it."""
    return (t.float() if t.is_floating_point() else t).numpy()


def distance(found: torch.Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """The greatest difference, relative to the largest finite magnitude; infinite where other elements are not finite."""
    x, y = found.double(), torch.from_numpy(np.asarray(wanted, dtype=np.float64))
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(0.5), y[~finite].nan_to_num(0.5)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((x - y)[finite].abs().max()) / max(float(y[finite].abs().max()), 1e-30)


if __name__ == "__main__":
    report, agrees = compare(Path(sys.argv[1]))
    sys.stdout.write(report + "\n")
    raise SystemExit(0 if agrees else 1)
