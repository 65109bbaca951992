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
from pathlib import Path

from ...ir.errors import BuildError
from ..base import Artifact, Source
from .cpu import cpu_of

# storage rewriting merges register tiles with other buffers, which then stay in memory; LLVM finds common subexpressions itself
PASSES = {"tirx.disable_storage_rewrite": True, "tirx.disable_cse_tir": True}


def build(source: Source) -> Artifact:
    """Compiles a source for the processor of its target. Raises `BuildError` with TVM's words."""
    import tvm
    from tvm.script import tirx
    from tvm.script.parser.core.entry import parse

    cpu = cpu_of(source.target)
    constants, function = split(source)
    mcpu = cpu.mcpu or tvm.target.codegen.llvm_get_system_cpu()
    try:
        parsed = parse(function, extra_vars={"T": tirx, **constants})
        with tvm.transform.PassContext(config=PASSES):
            module = tvm.compile(parsed, target={"kind": "llvm", "mcpu": mcpu, "num-cores": source.target.threads})
    except Exception as error:  # TVM raises half a dozen unrelated classes; all of them mean that the source was refused
        raise BuildError(
            f"TVM refused the kernel: {error}", hint="this is a bug of the emitter; please report it with the source"
        ) from error
    return Artifact(source, module)


def split(source: Source) -> tuple[dict[str, object], str]:
    """The constants that an emitted file defines, and the text of its function."""
    head, mark, tail = source.text.partition("@T.prim_func")
    constants: dict[str, object] = {}
    for node in ast.parse(head).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    return constants, mark + tail


def save(artifact: Artifact, path: Path) -> None:
    """Writes the kernel as a shared library; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    built = path.with_name(f"{path.name}.{os.getpid()}.so")
    artifact.module.export_library(str(built))
    shutil.move(built, path)


def restore(path: Path, source: Source) -> Artifact:
    """Loads a saved kernel. Raises `BuildError` if the file cannot be loaded."""
    import tvm

    try:
        module = tvm.runtime.load_module(str(path))
    except Exception as error:  # as above
        raise BuildError(f"{path} cannot be loaded: {error}", hint="compile the kernel again") from error
    return Artifact(source, module)


def load(artifact: Artifact) -> Callable[..., object]:
    """`launch(*inputs, *outputs, *scalars)` on torch CPU tensors, without copying."""
    _configure_threads(artifact.source.target.threads)
    return artifact.module[artifact.source.entry]  # type: ignore[no-any-return]


def _configure_threads(threads: int) -> None:
    if "TVM_NUM_THREADS" in os.environ:
        return
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm

    configure = tvm.get_global_func("runtime.config_threadpool")
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(threads))
    configure(-2, threads, [str(c) for c in cpus[:threads]])
