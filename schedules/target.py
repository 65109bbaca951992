"""Targets by name: `cpu` is this machine, the others are the descriptions in `targets/*.toml`.

A CUDA target has two emitters: `cuda:sm_90` is served by Triton, `cuda:sm_90+tvm` by TVM, which has no tensor cores.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from ..ir.errors import UnsupportedError
from .host import Measured, host_target, measure_host, with_measured
from .machine import Basis, Cache, Does, Kind, Memory, Target, Unit, read_target, target_folder

SECOND = "+tvm"  # what asks for the second emitter

__all__ = [
    "SECOND", "Basis", "Cache", "Does", "Kind", "Measured", "Memory", "Target", "Unit",
    "host_target", "load_target", "measure_host", "read_target", "target_names", "with_measured",
]  # fmt: skip


def target_names() -> tuple[str, ...]:
    """The names `load_target` knows: `cpu` (this machine) and one for every file in `targets/`."""
    described = sorted(f.name[: -len(".toml")].replace("_", ":", 1) for f in target_folder().iterdir() if f.name.endswith(".toml"))
    return ("cpu", *described)


def load_target(name: str) -> Target:
    """The target of that name; `cpu` is the processor of this machine, and `+tvm` behind a CUDA target asks for the second emitter.

    Raises `UnsupportedError` with the nearest name and the list for an unknown one.
    """
    if name == "cpu":
        return host_target()
    names = target_names()
    first = name.removesuffix(SECOND)
    if first != name and first in names and first.startswith("cuda:"):
        return replace(read_target(first), name=name)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"{near[0]!r}; the targets are " if near else "one of "
        raise UnsupportedError(f"unknown target {name!r}", hint=hint + ", ".join(names))
    return read_target(name)
