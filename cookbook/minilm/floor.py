"""The least time that the encoder's attention can take here: operations and bytes as the compiler counts them, the machine as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import einfall as ef
import torch
from einfall.compiler.cost import Cost, cost
from einfall.compiler.passes import make_plan
from einfall.schedules.host import host_target, measure_host, with_measured
from einfall.schedules.target import Target
from encoder import DTYPES, Batch, Encoder, attention


@dataclass(frozen=True)
class Machine:
    """A processor with what it reaches: operations and bytes a second."""

    target: Target

    @staticmethod
    def measure(seconds: float) -> Machine:
        """This machine, with the better of what its features promise and what torch reaches: either alone may be too low."""
        target = host_target()
        found = measure_host(seconds)
        promised = target.peak("matrix", ef.f32)[2]
        return Machine(with_measured(target, replace(found, f32_flops=max(found.f32_flops, promised))))

    @property
    def description(self) -> str:
        return self.target.description

    @property
    def flops(self) -> float:
        """fp32 multiply-adds a second, each as two."""
        return self.target.peak("matrix", ef.f32)[2]

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a copy, reads and writes together."""
        return self.target.memory.bandwidth


@dataclass(frozen=True)
class Needed:
    """Work that nobody gets around, and the least time for it."""

    operations: float
    bytes: float
    floor_ms: float


def of_call(dims: Mapping[str, int], lengths: torch.Tensor, machine: Machine) -> Needed:
    """The work of one call: counted sentence by sentence, with as many keys and values as each has tokens; padding is no work."""
    cascade = attention.trace(dtypes=DTYPES)
    plan = make_plan(cascade, dims)
    found: list[Cost] = [cost(cascade, {**dims, "b": 1, "p": int(length)}, machine.target, plan) for length in lengths if length > 0]
    bytes_ = sum(c.traffic_bytes for c in found)
    compute_us = sum(unit.time_us for c in found for unit in c.roofline.units)  # on a CPU they all take turns in one pipe
    return Needed(sum(c.flops for c in found), bytes_, max(bytes_ / machine.bandwidth * 1e3, compute_us / 1e3))


def of_model(encoder: Encoder, batches: Sequence[Batch], machine: Machine) -> Needed:
    """The work of the attention of all layers for all batches."""
    layers = encoder.model.config.num_hidden_layers
    calls = [of_call(encoder.dims(batch), batch.mask.sum(-1), machine) for batch in batches]
    return Needed(
        layers * sum(c.operations for c in calls), layers * sum(c.bytes for c in calls), layers * sum(c.floor_ms for c in calls)
    )
