"""Compiles emitted kernels with Triton, in a process of its own: a program that reads jobs from stdin, a JSON line each.

    {"path", "entry", "types": {parameter: type}, "aligned": [...], "target": [kind, arch, warp], "options": {...},
     "shared": most bytes, "folder", "seconds"}
    -> {"ok": true, "metadata": {...}, "files": {"ttir": name, "ttgir": ..., "ptx": ..., "cubin": ...}, "log": ..., "triton": version}
       with no files where it takes more shared memory
    -> {"ok": false, "kind": class, "error": message}

LLVM can end the whole process, a kernel can compile for ever, and Triton decides once a process whether it compiles or interprets:
so the parent never imports it. Whatever Triton prints goes to stderr; stdout carries the answers alone. It ends with its stdin, and
removes the folder it is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

GRACE = 10  # seconds that the parent has to end this process before it ends itself


def main() -> None:
    """Serve until stdin ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]  # the modules beside this one are none of the toolkit's
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Triton prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        signal.alarm(int(job["seconds"]) + GRACE)  # a hang ends here even if the parent is gone
        answers.write(json.dumps(answer(job)) + "\n")
        answers.flush()
        signal.alarm(0)
    for scratch in sys.argv[1:]:  # the parent has ended, or it would have removed its folder itself
        shutil.rmtree(scratch, ignore_errors=True)


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a job, whatever happens to it."""
    try:
        return {"ok": True, **compile_kernel(job)}
    except Exception as error:  # Triton raises a dozen unrelated classes; all of them mean that the kernel was refused
        return {"ok": False, "kind": type(error).__name__, "error": str(error)}


def compile_kernel(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one kernel and write every stage of it into the job's folder."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module_of(job["path"]), job["entry"])
    names, types = list(function.arg_names), job["types"]
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in names},
        constexprs={},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in job["aligned"]},
    )
    printed = io.StringIO()
    files: dict[str, str] = {}
    try:
        with contextlib.redirect_stdout(printed), stopping(job["shared"]):  # the log of the assembler knows registers and spills
            kernel = triton.compile(source, target=GPUTarget(*job["target"]), options=job["options"])
    except Stopped as stopped:
        return {"metadata": plain(stopped.metadata), "files": files, "log": "", "triton": triton.__version__}
    for stage, text in kernel.asm.items():
        if isinstance(text, (str, bytes)):
            files[stage] = f"kernel.{stage}"
            with open(os.path.join(job["folder"], files[stage]), "wb") as out:
                out.write(text if isinstance(text, bytes) else text.encode())
    metadata = kernel.metadata._asdict() if hasattr(kernel.metadata, "_asdict") else dict(vars(kernel.metadata))
    return {"metadata": plain(metadata), "files": files, "log": printed.getvalue(), "triton": triton.__version__}


class Stopped(Exception):
    """A kernel takes more shared memory than there is, which is known before the assembler, the slowest of all stages, has begun."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = dict(metadata)
        super().__init__(f"{self.metadata['shared']} bytes of shared memory")


@contextlib.contextmanager
def stopping(most: int) -> Iterator[None]:
    """Within it a compilation raises `Stopped` once it is known to take more than `most` bytes of shared memory."""
    from triton import knobs

    def inspect(*given: Any) -> tuple[str, str] | None:
        if not given:  # asked for what it adds to the key of Triton's cache
            return "", ""
        _, stages, *_ = given
        name = next(stage for stage in ("ptx", "amdgcn") if stage in stages)
        go_on = stages[name]

        def assemble(module: Any, metadata: Any) -> Any:
            if metadata["shared"] > most:
                raise Stopped(metadata)
            return go_on(module, metadata)

        stages[name] = assemble
        return None

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = inspect
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def module_of(path: str) -> Any:
    """The emitted file as a module; read again for every job, so that nothing is kept of the one before."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("einfall_kernel_" + hashlib.sha256(path.encode()).hexdigest()[:16], path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    return plain(vars(value)) if hasattr(value, "__dict__") else str(value)


if __name__ == "__main__":
    main()
