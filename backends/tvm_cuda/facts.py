"""What is known of a built kernel without running it."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from ..base import Artifact
from ..triton.listings import read_ptx, read_sass, widest_load
from ..triton.resources import occupancy
from ..triton.tools import run_tool
from .build import Compiled

_MOVED = re.compile(r"\b(load|store)_(\w+)_v(\d+)\(\(?&")


def facts(artifact: Artifact) -> dict[str, Any]:
    """Counts; nothing here was measured.

    `vectors`: calls in the CUDA C that move adjacent elements, by type and number. With machine code also `registers`, `stack_bytes`,
    `spill_bytes`, `shared_bytes`, `warps`, `threads`; `occupancy`, an estimate; `instructions` of the PTX; `sass`, where the tool that
    prints it is there; `widest_load_bytes`; `compiler`.
    """
    compiled: Compiled = artifact.module
    kernel = compiled.cuda[compiled.cuda.rfind('extern "C" __global__') :]
    vectors: dict[str, int] = {}
    for verb, t, n in _MOVED.findall(kernel):
        vectors[f"{verb} {t} {n}"] = vectors.get(f"{verb} {t} {n}", 0) + 1
    known: dict[str, Any] = {"vectors": dict(sorted(vectors.items()))}
    if compiled.code is None:
        return known
    code, target = compiled.code, artifact.source.target
    counts, sass = read_ptx(code.ptx), read_sass(run_tool("cuobjdump", "-sass", code.cubin) or "")
    return {
        **known,
        **code.resources.to_dict(),
        "occupancy": asdict(occupancy(code.resources, target)),
        "instructions": counts,
        **({"sass": sass} if sass else {}),
        "widest_load_bytes": widest_load(counts),
        "compiler": code.compiler,
    }
