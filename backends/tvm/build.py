"""Building and calling emitted kernels with TVM. TVM is imported when first needed.

Threads: TVM's pool has one thread unless told, so the pool is set to the target's number when the first kernel is loaded, unless
`TVM_NUM_THREADS` is set. Set `OMP_WAIT_POLICY=passive` and `TVM_THREAD_POOL_SPIN_COUNT=1000` before torch is imported: spinning OpenMP
threads halve the speed of a kernel that follows a torch call, and TVM's spinning workers that of the torch call after it.
"""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import BuildError
from ...schedules.target import Target
from ..base import Source
from .cpu import cpu_of


@dataclass(frozen=True, slots=True)
class TvmArtifact:
    """A compiled kernel: TVM's module and the name of its function."""

    module: Any
    entry: str
    source: Source | None
    threads: int

    def save(self, path: Path) -> None:
        """Writes a shared library to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        built = path.with_suffix(".tmp.so")
        self.module.export_library(str(built))
        shutil.move(built, path)


def build(source: Source, target: Target) -> TvmArtifact:
    """Compiles a source for the processor of `target`. Raises `BuildError` with TVM's words."""
    import tvm
    from tvm.script import tirx
    from tvm.script.parser.core.entry import parse

    cpu = cpu_of(target)
    helpers, function = split(source)
    mcpu = cpu.mcpu or tvm.target.codegen.llvm_get_system_cpu()
    try:
        parsed = parse(function, extra_vars={"T": tirx, "LL": helpers})
        module = tvm.compile(parsed, target={"kind": "llvm", "mcpu": mcpu, "num-cores": target.threads})
    except Exception as error:  # TVM raises half a dozen unrelated classes; all of them mean that the source was refused
        raise BuildError(f"TVM refused the kernel: {error}", hint="the source is in the exception's notes or `.source`; please report it") from error
    return TvmArtifact(module, source.entry, source, target.threads)


def split(source: Source) -> tuple[str, str]:
    """The imported helpers and the function's text of an emitted file."""
    head, mark, tail = source.text.partition("@T.prim_func")
    tree = ast.parse(head)
    helpers = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)), "")
    return str(helpers), mark + tail


def restore(path: Path, target: Target, entry: str = "main") -> TvmArtifact:
    """Loads a saved kernel. Raises `BuildError` if the file cannot be loaded."""
    import tvm

    try:
        module = tvm.runtime.load_module(str(path))
    except Exception as error:  # as above
        raise BuildError(f"{path} cannot be loaded: {error}", hint="compile the kernel again") from error
    return TvmArtifact(module, entry, None, target.threads)


def load(artifact: TvmArtifact) -> Callable[..., None]:
    """`launch(*inputs, *outputs, *scalars)` on torch CPU tensors, without copying."""
    _configure_threads(artifact.threads)
    return artifact.module[artifact.entry]  # type: ignore[no-any-return]


def _configure_threads(threads: int) -> None:
    if "TVM_NUM_THREADS" in os.environ:
        return
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool")
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(threads))
    configure(-2, threads, [str(c) for c in cpus[:threads]])
