"""What the machine code of a kernel says: vector multiply-adds, stack traffic among them, heap allocations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..base import Artifact

_LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
_FMA = re.compile(r"^\s+v(fn?m(add|sub)\w*|dpbf16ps)\s")
_STACK = re.compile(r"^\s+vmov\w*\s.*\(%r[sb]p\)")
_VECTOR = re.compile(r"%[yz]mm")
_ALLOCATION = re.compile(r"TVMBackendAllocWorkspace")


def facts(artifact: Artifact) -> Mapping[str, Any]:
    """Counts from the assembly.

    `fma` are vector multiply-adds, `stack_traffic` moves of vectors to or from the stack inside loops that hold multiply-adds (spills),
    `heap_allocations` calls for workspace. The last two should be 0. `bf16_dots` says whether the bf16 unit is used. None where an artifact
    was loaded from a file, which holds no assembly.
    """
    module = artifact.module.mod if hasattr(artifact.module, "mod") else artifact.module
    if module.kind != "llvm":
        return {"fma": None, "stack_traffic": None, "heap_allocations": None, "bf16_dots": None}
    lines = str(module.inspect_source("asm")).splitlines()
    loops = list(_innermost_loops(lines))
    hot = [body for body in loops if any(_FMA.match(line) for line in body)]
    return {
        "fma": sum(1 for line in lines if _FMA.match(line) and _VECTOR.search(line)),
        "stack_traffic": sum(1 for body in hot for line in body if _STACK.match(line) and _VECTOR.search(line)),
        "heap_allocations": sum(1 for line in lines if _ALLOCATION.search(line) and "call" in line),
        "bf16_dots": sum(1 for line in lines if "vdpbf16ps" in line),
    }


def _innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """The lines of every loop that holds no other: from a label to the jump back to it."""
    labels: dict[str, int] = {}
    last_end = -1
    for i, line in enumerate(lines):
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = i
            continue
        jump = _JUMP.match(line)
        start = labels.get(jump.group(1)) if jump else None
        if start is not None and start > last_end:
            yield lines[start : i + 1]
            last_end = i
