"""What LLVM made of a kernel, read from its assembly: spills in the loops that multiply, and allocations a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..base import Artifact

_LABEL = re.compile(r"^(\.L\w+|[\w.$]+):")
_JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
_MULTIPLY = re.compile(r"\s(vfn?m(add|sub)\w*p[sd]|vdpbf16ps|fmla|bfmmla|bfdot)\s")
_STACK = re.compile(r"\s(vmov\w*|vbroadcast\w*|v\w*p[sd])\s.*\(%r[sb]p\)")  # an indexed address is a tile that happens to lie there
MULTIPLIES = 8  # a loop with so many is one over a register tile


def facts(artifact: Artifact) -> dict[str, Any]:
    """Counts from the assembly of a kernel built in this process; of one loaded from a file nothing is known.

    `multiply_loops`: innermost loops of at least 8 vector multiply-adds. `multiplies`: the multiply-adds in them. `spills`: vector
    operands on the stack in them, which register tiles should not need. `allocations`: heap buffers a task asks for.
    """
    inspect = getattr(getattr(artifact.module, "mod", None), "inspect_source", None)
    if inspect is None:
        return {}
    return read_assembly(inspect("asm"))


def read_assembly(text: str) -> dict[str, Any]:
    """The counts of `facts`."""
    loops = [body for body in _innermost_loops(text.splitlines()) if sum(bool(_MULTIPLY.search(line)) for line in body) >= MULTIPLIES]
    return {
        "multiply_loops": len(loops),
        "multiplies": sum(bool(_MULTIPLY.search(line)) for body in loops for line in body),
        "spills": sum(bool(_STACK.search(line)) for body in loops for line in body),
        "allocations": len(re.findall(r"__TVMBackendAllocWorkspace(?:@\w+)?\(%rip\)", text)),
        "instructions": sum(line.startswith("\t") and not line.startswith("\t.") for line in text.splitlines()),
    }


def _innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """The bodies between a label and a jump back to it with no other backward jump in between."""
    labels: dict[str, int] = {}
    last_end = -1
    for number, line in enumerate(lines):
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = number
            continue
        jump = _JUMP.match(line)
        if jump and jump.group(1) in labels:
            start = labels[jump.group(1)]
            if start > last_end:
                yield lines[start : number + 1]
            last_end = number
