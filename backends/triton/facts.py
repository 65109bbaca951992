"""What is known of a built kernel without running it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..base import Artifact
from .build import Builds
from .listings import read_amdgcn, read_ptx, read_sass, widest_load
from .resources import occupancy
from .tools import run_tool


def facts(artifact: Artifact) -> dict[str, Any]:
    """Counts of the full variant: nothing here was measured.

    `registers`, `stack_bytes`, `spill_bytes`, `shared_bytes`, `warps`, `threads`, `tensor_columns`: see `Resources`.
    `occupancy`: see `resources.occupancy`, an estimate. `instructions`: counted in PTX or AMD assembly; `sass`: in NVIDIA machine
    code, where the tool that prints it is there. `widest_load_bytes`: the most a thread asks main memory for at once. `program`: the
    same for kernels of which Triton made the same program. `triton`: its version.
    """
    builds: Builds = artifact.module
    built, target = builds.full, artifact.source.target
    counts = read_amdgcn(built.assembly) if target.kind == "hip" else read_ptx(built.assembly)
    sass = read_sass(run_tool("cuobjdump", "-sass", built.code) or "") if target.kind == "cuda" else {}
    return {
        **built.resources.to_dict(),
        "occupancy": asdict(occupancy(built.resources, target)),
        "instructions": counts,
        **({"sass": sass} if sass else {}),
        "widest_load_bytes": widest_load(counts),
        "program": built.program,
        "triton": built.triton,
    }
