"""Groups of four-bit codes: what the recipes of integer quantization share."""

from __future__ import annotations

from typing import Any

import einfall as ef
import torch

GROUP = 32  # channels that share a scale and a zero point


def quantize(X: Any, over: str) -> tuple[Any, Any, Any]:
    """Codes 0 .. 15 and, for each group along `over`, scale and zero point in f16.

    The codes are taken against scale and zero point as they are stored. A group that is constant has scale 0 and is its zero point. A
    group that has an element which is not finite, or a range or a minimum beyond f16, has scale NaN and codes 0: it reads as NaN.
    """
    low, high = X.min(over), X.max(over)
    Z = low.to(ef.f16)
    S = ((high - low) / 15.0).to(ef.f16)
    usable = ef.isfinite(X).all(over) & ef.isfinite(S) & ef.isfinite(Z)
    C = ef.minimum(ef.maximum(ef.round((X - Z) / ef.where(S > 0.0, S, 1.0)), 0.0), 15.0)
    return ef.where(usable, C, 0.0).to(ef.i32), ef.where(usable, S, float("nan")), ef.where(usable, Z, 0.0)


def pack(C: Any, half: str) -> Any:
    """Codes whose channels are `(half ...)` as bytes: the first half in the low nibbles, the second in the high ones."""
    return (C << (4 * ef.index(half))).sum(half).to(ef.u8)


def unpack(P: Any, half: str) -> Any:
    """The codes of packed bytes; they gain the rank `half`."""
    return (P.to(ef.i32) >> (4 * ef.index(half))) & 15


def dequantize(C: Any, S: Any, Z: Any) -> Any:
    """Codes as numbers."""
    return C.to(ef.f32) * S.to(ef.f32) + Z.to(ef.f32)


def lattice(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Values whose codes no rounding error decides: each group spans 15 steps exactly, 0 among them, and none lies near a half step."""
    groups = (*shape[:-1], shape[-1] // GROUP, GROUP)
    codes = torch.randint(0, 16, groups, generator=generator).float() + (torch.rand(groups, generator=generator) - 0.5) * 0.7
    codes = codes.clamp(0.0, 15.0)
    codes[..., 0], codes[..., 1] = 0.0, 15.0
    steps = (torch.randint(16, 32, (*groups[:-1], 1), generator=generator) / 64.0)  # few bits: the span and a fifteenth of it are exact
    zeros = -torch.randint(0, 16, (*groups[:-1], 1), generator=generator) / 4.0
    return (codes * steps + zeros).reshape(shape)


def outlying(generator: torch.Generator, *shape: int, channels: int = 4, size: float = 12.0) -> torch.Tensor:
    """Normal values with a few channels that are much larger, as keys have them."""
    values = torch.randn(*shape, generator=generator)
    loud = torch.randperm(shape[-1], generator=generator)[:channels]
    values[..., loud] *= size
    return values


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square error, relative to that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
