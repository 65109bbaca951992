"""What a row of the comparison is made of: a kernel, its inputs, its peers, an oracle in float64 on a slice, the work, and the aims.

Operations are those of the mathematics (a multiply-add counts 2): a causal mask halves them, for every side alike. Bytes are those of
every input that is needed read once and every output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import einfall as ef
import torch

Size = Literal["tiny", "short", "full"]
Group = Literal["prefill", "decode", "quantize", "verify", "fused", "dispatch"]
Roof = Literal["", "read", "copy"]
Tensors = Sequence[torch.Tensor]
Function = Callable[..., Any]
Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CHECKED_ROWS = 24
EAGER = "eager"


def as_given(tensors: Tensors) -> Tensors:
    """The tensors of the case."""
    return tensors


@dataclass(frozen=True, slots=True)
class Peer:
    """Another way to the result of a case.

    Args:
        run: a function of tensors, or a kernel of ours that does without what the case is about.
        arrange: the tensors it wants, made from those of the case once and not timed.
        scalars: those of a kernel.
    """

    name: str
    run: Function | ef.Kernel
    arrange: Callable[[Tensors], Tensors] = as_given
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it is a kernel of ours."""
        return isinstance(self.run, ef.Kernel)


@dataclass(frozen=True, slots=True)
class Aim:
    """What a row should reach: a ratio to a peer (`speed`, or at most so much `more_time`, or so many microseconds more, `more_us`), or
    a share of a limit of the machine."""

    kind: Literal["speed", "more_time", "more_us", "of_peak", "of_roof"]
    value: float
    peer: str = ""

    @property
    def text(self) -> str:
        match self.kind:
            case "speed":
                return f"≥ {self.value:g}× {self.peer}"
            case "more_time":
                return f"≤ {self.value:.0%} over {self.peer}"
            case "more_us":
                return f"≤ {self.value:g} µs over {self.peer}"
            case "of_peak":
                return f"≥ {self.value:.0%} of peak"
            case "of_roof":
                return f"≥ {self.value:.0%} of roof"

    def reached(self, ours: Mapping[str, Any]) -> float | None:
        """What the figures of a kernel give for it; None where they do not say."""
        if self.kind in ("of_peak", "of_roof"):
            return ours[self.kind]
        speed = ours["speed"].get(self.peer)
        if speed is None or self.kind == "speed":
            return speed
        return 1 / speed - 1 if self.kind == "more_time" else (1 - speed) * ours["ms"] * 1e3

    def met(self, ours: Mapping[str, Any]) -> bool | None:
        """Whether the figures of a kernel reach it; None where they do not say."""
        reached = self.reached(ours)
        if reached is None:
            return None
        return reached <= self.value if self.kind in ("more_time", "more_us") else reached >= self.value


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table.

    Args:
        dtype: of the operands of its products, whose peak counts.
        make: the inputs, on the device of a generator.
        peers: the other ways, the first being the one the picture is scaled by; `eager` is among them, and may be compiled.
        check: (tensors, results) -> for each result, the part of it that is checked and what that should be, by float64. A peer that
            gives only the first results is checked for these.
        flops, bytes: the least a kernel can do.
        roof: the bandwidth that bounds it, that of reading or of copying; of a prompt only the peak counts.
    """

    name: str
    group: Group
    dtype: Literal["f32", "bf16"]
    kernel: ef.Kernel
    make: Callable[[torch.Generator], tuple[torch.Tensor, ...]]
    peers: tuple[Peer, ...]
    check: Callable[[Tensors, Tensors], Pairs]
    flops: float
    bytes: float
    roof: Roof = ""
    aims: tuple[Aim, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)
    causal: bool = False
    shape: tuple[int, ...] = ()

    @property
    def eager(self) -> Function:
        """The plain PyTorch function that torch.compile is given."""
        return next(peer.run for peer in self.peers if peer.name == EAGER)

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """Fresh inputs, made on the device, the same for the same seed."""
        return self.make(torch.Generator(device).manual_seed(seed))


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    """One tensor or several, as a tuple."""
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def paired(results: Tensors, checked: Callable[[torch.Tensor], torch.Tensor], *wanted: torch.Tensor) -> Pairs:
    """The checked part of each result with what it should be; a peer may give only the first results."""
    return tuple((checked(found), right) for found, right in zip(results, wanted, strict=False))


def bytes_of(*tensors: torch.Tensor) -> float:
    """The bytes of whole tensors."""
    return float(sum(t.numel() * t.element_size() for t in tensors))
