"""What the compilers write, read as text: the log of the assembler, PTX, machine code of both vendors, and Triton's GPU dialect.

Every function here takes text and gives numbers; none runs anything.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_OPCODE = re.compile(r"^\s*(?:@!?[%\w]+\s+)?([a-z][\w.]*(?:::[\w.]+)*)\b", re.M)
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_AMD = re.compile(r"^\t([svd]_\w+|ds_\w+|buffer_\w+|global_\w+|flat_\w+|scratch_\w+)\b", re.M)


@dataclass(frozen=True, slots=True)
class Usage:
    """Registers of a thread; bytes a thread of stack, and of registers written to and read from it."""

    registers: int
    stack: int
    spills: int | None  # None where the listing does not say


def read_assembler_log(log: str) -> Usage | None:
    """The registers, stack and spills that `ptxas -v` reports; None where it does not.

    `spills` counts the bytes stored and the bytes loaded.
    """
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if frame is None or used is None:
        return None
    stack, stores, loads = (int(n) for n in frame.groups())
    return Usage(int(used[1]), stack, stores + loads)


def read_resource_usage(text: str) -> Usage | None:
    """What `cuobjdump -res-usage` reports of the last function in it."""
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return Usage(int(found[-1][0]), int(found[-1][1]), None) if found else None


def read_amd_usage(text: str) -> Usage | None:
    """The registers, stack and spills that the metadata at the end of AMD assembly reports; spilled registers have 4 bytes."""

    def number(name: str) -> int | None:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.M)
        return int(found[1]) if found else None

    registers, stack, spilled = number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count")
    if registers is None or stack is None:
        return None
    return Usage(registers, stack, None if spilled is None else 4 * spilled)


def read_ptx(text: str) -> dict[str, int]:
    """How many instructions of each kind PTX has, those of inline assembly included. Kinds that do not occur are left out.

    `cp.async` and global loads and stores are told apart by the bytes a thread moves: `cp.async 16`, `ld.global 16`.
    """
    counts: Counter[str] = Counter()
    for line in _statements(text):
        found = _OPCODE.match(line)
        if found:
            counts[_ptx_kind(found[1], line)] += 1
    counts.pop("", None)
    return dict(sorted(counts.items()))


def _statements(text: str) -> Iterable[str]:
    """The instructions of PTX, one at a time: comments, labels and braces removed."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    for line in re.split(r"[;\n]", text):
        line = re.sub(r"^[\s{}]*(?:\$?[\w$]+:)?", "", line).strip("{} \t")
        if line and not line.startswith((".", ")", "(")):
            yield line


_PTX_KINDS = (
    ("wgmma.mma_async", "wgmma"), ("tcgen05.mma", "tcgen05.mma"), ("tcgen05.ld", "tcgen05.ld"), ("tcgen05.st", "tcgen05.st"),
    ("mma.sync", "mma"), ("cp.async.bulk.tensor", "cp.async.bulk.tensor"), ("ldmatrix", "ldmatrix"), ("stmatrix", "stmatrix"),
    ("ex2", "ex2"), ("lg2", "lg2"), ("rcp", "rcp"), ("rsqrt", "rsqrt"), ("sqrt", "sqrt"), ("sin", "sin"), ("cos", "cos"), ("tanh", "tanh"),
    ("shfl", "shfl"), ("bar", "bar"), ("atom", "atom"), ("red.", "atom"), ("cvt", "cvt"),
    ("ld.shared", "ld.shared"), ("st.shared", "st.shared"), ("ld.local", "ld.local"), ("st.local", "st.local"),
)  # fmt: skip


def _ptx_kind(opcode: str, line: str) -> str:
    """The name an instruction is counted under; the empty string for one that is not."""
    if opcode.startswith(("ld.global", "st.global")):
        return f"{opcode[:9]} {_bytes(opcode)}"
    if opcode.startswith(("cp.async.ca", "cp.async.cg")):
        size = re.search(r",\s*(0x[0-9a-f]+|\d+)\s*(?:,|$)", line)
        return f"cp.async {int(size[1], 0)}" if size else "cp.async"
    for start, kind in _PTX_KINDS:
        if opcode.startswith(start):
            return kind
    head, _, rest = opcode.partition(".")
    if head in ("fma", "mul", "add", "sub", "max", "min", "div") and re.search(r"\.(?:f|bf)\d", "." + rest):
        return f"{head}.float"
    return ""


def _bytes(opcode: str) -> int:
    """The bytes that one thread moves: `ld.global.v4.b32` 16."""
    vector = re.search(r"\.v(\d)", opcode)
    bits = re.search(r"\.[bufs]f?(\d+)$", opcode)
    return (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 32) // 8


def read_sass(text: str) -> dict[str, int]:
    """How many instructions of each kind NVIDIA machine code has, by the first part of the name: `HMMA`, `FFMA`, `LDGSTS`.

    Loads and stores keep their width (`LDG 16`), and what of the special functions is asked for is kept (`MUFU EX2`).
    """
    counts: Counter[str] = Counter()
    for opcode in _SASS.findall(text):
        head, *rest = opcode.split(".")
        if head in ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL"):
            counts[f"{head} {next((int(r) // 8 for r in rest if r in ('64', '128', '256')), 4)}"] += 1
        elif head == "MUFU" and rest:
            counts[f"MUFU {rest[0]}"] += 1
        elif head != "NOP":
            counts[head] += 1
    return dict(sorted(counts.items()))


_AMD_KINDS = (
    ("v_mfma", "mfma"), ("v_exp_f32", "exp"), ("v_log_f32", "log"), ("v_rcp", "rcp"), ("v_rsq", "rsq"), ("v_sqrt", "sqrt"),
    ("v_fma", "fma"), ("v_fmac", "fma"), ("v_pk_fma", "fma"), ("ds_bpermute", "shuffle"), ("ds_swizzle", "shuffle"),
    ("s_barrier", "barrier"), ("scratch_load", "scratch load"), ("scratch_store", "scratch store"), ("v_cvt", "cvt"),
)  # fmt: skip
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
_AMD_WIDTHS.update({f"dwordx{n}": 4 * n for n in (2, 3, 4)})


def read_amdgcn(text: str) -> dict[str, int]:
    """How many instructions of each kind AMD assembly has; global and buffer loads and stores by bytes: `load 16`."""
    counts: Counter[str] = Counter()
    for opcode in _AMD.findall(text):
        moved = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+?)(?:_d16(?:_hi)?)?$", opcode)
        if moved and moved[2] in _AMD_WIDTHS:
            counts[f"{moved[1]} {_AMD_WIDTHS[moved[2]]}"] += 1
            continue
        kind = next((kind for start, kind in _AMD_KINDS if opcode.startswith(start)), None)
        if kind is None and opcode.startswith(("ds_read", "ds_write")):
            kind = "shared load" if opcode.startswith("ds_read") else "shared store"
        if kind is not None:
            counts[kind] += 1
    return dict(sorted(counts.items()))


def widest_load(instructions: Iterable[str]) -> int:
    """The most bytes that one thread asks main memory for at once; a bulk copy moves a whole tile and counts nothing here."""
    sizes = [int(name.rsplit(" ", 1)[1]) for name in instructions if re.match(r"(ld\.global|cp\.async|load) \d+$", name)]
    return max(sizes, default=0)


def program_hash(text: str) -> str:
    """A name for the program that a text of Triton's GPU dialect describes: the same for texts that differ in names and places alone."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))
    text = _without_places(text)
    names: dict[str, str] = {}
    text = re.sub(r"%[\w$.-]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), text)
    return hashlib.sha256(re.sub(r"[ \t]+", " ", text).encode()).hexdigest()[:16]


def _without_places(text: str) -> str:
    """`text` without its `loc(...)`, in which strings and parentheses nest."""
    pieces, at = [], 0
    for found in re.finditer(r"\s*\bloc\(", text):
        if found.start() < at:
            continue
        pieces.append(text[at : found.start()])
        depth, at = 1, found.end()
        while depth and at < len(text):
            if text[at] == '"':
                at = text.find('"', at + 1) if text.find('"', at + 1) >= 0 else len(text)
            depth += (text[at : at + 1] == "(") - (text[at : at + 1] == ")")
            at += 1
    return "".join([*pieces, text[at:]])
