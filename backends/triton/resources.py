"""What a block of a kernel takes, whether the target has it, and how many blocks run at once.

Triton compiles a kernel that exceeds the device without complaint, and without a driver nobody else looks: this is the only check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...ir.errors import BuildError
from ...schedules.fit import TooLarge
from ...schedules.target import Target
from .listings import Usage, read_amd_usage, read_assembler_log, read_resource_usage
from .signature import Signature
from .tools import run_tool


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes.

    Args:
        registers: of a thread, 32 bits each.
        stack_bytes: of a thread; more than 0 where registers do not suffice, or an array is indexed at run time.
        spill_bytes: stored to and loaded from the stack for want of registers, in the text of the program, not in its run.
        shared_bytes: of a block.
        warps, threads: of a block.
        tensor_columns: of tensor memory, of a block; 0 where there is none.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    threads: int
    tensor_columns: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Resources:
        """The inverse of `to_dict`. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        for f in fields(Resources):
            if type(data[f.name]) is not int or data[f.name] < 0:
                raise ValueError(f"{f.name} is {data[f.name]!r}")
        return Resources(**{f.name: data[f.name] for f in fields(Resources)})


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How many blocks and warps run at once on a multiprocessor, of how many warps at most, and what allows no more."""

    blocks: int
    warps: int
    most: int
    limited_by: str


def resources_of(metadata: Mapping[str, Any], code: bytes, assembly: str, log: str, target: Target) -> Resources:
    """What a build takes, from Triton's metadata and the listings. Raises `BuildError` where they do not say."""
    if target.kind == "hip":
        usage = read_amd_usage(assembly)
    else:
        usage = read_assembler_log(log) or _from_binary(code)
    if usage is None:
        raise BuildError(f"the registers of {metadata['name']} cannot be read from what its compiler wrote")
    warps = int(metadata["num_warps"])
    return Resources(
        registers=usage.registers,
        stack_bytes=usage.stack,
        spill_bytes=usage.stack if usage.spills is None else usage.spills,
        shared_bytes=int(metadata["shared"]),
        warps=warps,
        threads=warps * target.limit("warp", 32),
        tensor_columns=int(metadata.get("tmem_size") or 0),
    )


def _from_binary(code: bytes) -> Usage | None:
    """Where the assembler is one that says nothing: what the binary itself says."""
    return read_resource_usage(run_tool("cuobjdump", "-res-usage", code) or "")


def occupancy(resources: Resources, target: Target) -> Occupancy:
    """How many blocks run at once on a multiprocessor (a compute unit).

    The least of five, each rounded down, as in the CUDA occupancy calculator and LLVM's for AMD:

        warps             warps_per_core / warps of a block
        blocks            blocks_per_core
        shared memory     shared_memory_per_core / roundup(shared of a block + shared_reserved, shared_unit)
        registers         partitions * (registers_per_core / partitions / roundup(registers * warp, register_unit)) / warps of a block
        tensor memory     tensor_columns / columns of a block

    A multiprocessor consists of `partitions`, each with its share of the registers, so that the warps that registers allow are
    counted in one and multiplied. On AMD GPUs the blocks are limited by their barriers, of which a block of one warp has none. It is
    an estimate: a block that ends leaves room before the next begins.
    """
    whole = target.limit("warps_per_core") or target.limit("threads_per_core") // target.limit("warp", 32)
    shared = _up(resources.shared_bytes + target.limit("shared_reserved"), target.limit("shared_unit", 1))
    allowed = {
        "warps": whole // resources.warps,
        "registers": _warps_by_registers(resources, target) // resources.warps,
        "blocks": whole if target.kind == "hip" and resources.warps == 1 else target.limit("blocks_per_core", whole),
    }
    if shared:
        allowed["shared memory"] = target.limit("shared_memory_per_core") // shared
    if resources.tensor_columns and target.limit("tensor_columns"):
        allowed["tensor memory"] = target.limit("tensor_columns") // resources.tensor_columns
    limited_by = min(allowed, key=lambda name: allowed[name])
    blocks = allowed[limited_by]
    return Occupancy(blocks, blocks * resources.warps, whole, limited_by)


def check_resources(resources: Resources, signature: Signature, target: Target) -> None:
    """Raise `TooLarge` naming what a block takes more of than the target has. A stack is allowed: it is slow, not wrong."""
    tiles = ", ".join(f"{rank} ({tile})" for rank, tile in signature.grid if tile > 1)
    smaller = f"a smaller tile of {tiles}" if tiles else "smaller tiles"
    fewer = f", fewer stages than {signature.stages}" if signature.stages > 1 else ""
    warps = f"fewer warps than {resources.warps}"
    for what, amount, limit, hint in (
        ("bytes of shared memory", resources.shared_bytes, target.limit("shared_memory"), f"{smaller}, or of a streamed rank{fewer}"),
        ("threads", resources.threads, target.limit("threads"), warps),
        ("registers a thread", resources.registers, target.limit("registers"), smaller),
        (f"warps of {resources.registers} registers", resources.warps, _warps_by_registers(resources, target), f"{warps}, or {smaller}"),
        ("columns of tensor memory", resources.tensor_columns, target.limit("tensor_columns"), smaller),
    ):
        if limit and amount > limit:
            text = f"kernel {signature.entry} takes {amount} {what}, and a block of {target.name} has {limit}"
            raise TooLarge(text, kernel=signature.entry, times=amount / limit, hint=hint)


def _warps_by_registers(resources: Resources, target: Target) -> int:
    """How many warps there are registers for."""
    partitions = target.limit("partitions", 4)
    a_warp = _up(max(1, resources.registers) * target.limit("warp", 32), target.limit("register_unit", 1))
    return partitions * (target.limit("registers_per_core") // partitions // a_warp)


def _up(value: int, unit: int) -> int:
    return -(-value // max(1, unit)) * max(1, unit)
