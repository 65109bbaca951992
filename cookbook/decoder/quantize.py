"""The quantization recipes behind one interface: keys or values [b, g, p, e] -> what is read back of them, and the bits they took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import einfall as ef
import torch

from cookbook.decoder.model import Cache, Seen
from cookbook.quantization import bfp, gear, int4_groups, mustafar, mx
from cookbook.quantization.common import dequantize, unpack

Codec = Callable[[torch.Tensor], tuple[torch.Tensor, float]]  # [b, g, p, e] -> the same read back, bits a value


@dataclass(frozen=True)
class Format:
    """How keys and values are stored. `family` is what is drawn as one line."""

    family: str
    name: str
    keys: Codec
    values: Codec


def stored_bits(like: torch.Tensor, *stored: torch.Tensor) -> float:
    """Bits a value of all that was stored."""
    return 8 * sum(t.numel() * t.element_size() for t in stored) / like.numel()


@ef.kernel
def integer_groups(X: "b g p (n j=32)", *, bits: int = 8) -> ("b g p (n j)", "b g p n", "b g p n"):
    """Codes of `bits` bits, one a byte, and for every 32 channels a scale and a zero point in f16."""
    low, high = X.min("j"), X.max("j")
    Z, S = low.to(ef.f16), ((high - low) / (2.0**bits - 1)).to(ef.f16)
    C = ef.minimum(ef.maximum(ef.round((X - Z) / ef.where(S > 0.0, S, 1.0)), 0.0), 2.0**bits - 1).to(ef.i32).to(ef.u8)
    return C, S, Z


@ef.kernel
def read_groups(C: "b g p (n j=32)", S: "b g p n", Z: "b g p n") -> "b g p (n j)":
    return dequantize(C, S, Z)


@ef.kernel
def read_int4(P: "b g p (c j=32)", S: "b g p (s=2 c)", Z: "b g p (s c)") -> "b g p (s c j)":
    return dequantize(unpack(P, half="s"), S, Z)


@ef.kernel
def read_bfp8(M: "b g p (n j=32)", E: "b g p n") -> "b g p (n j)":
    return bfp.numbers(M, E, bits=8)


@ef.kernel
def read_bfp4(P: "b g p (c j=32)", E: "b g p (s=2 c)") -> "b g p (s c j)":
    return bfp.numbers((P.to(ef.i32) >> (4 * ef.index("s")) & 15 ^ 8) - 8, E, bits=4)


@ef.kernel
def read_pruned(V: "b g p s", B: "b g p w") -> "b g p (w i)":
    return mustafar.expand(V, B, slot="s", word="w", bit="i")


def groups(bits: int) -> Codec:
    """Integers with a scale and a zero point for 32 channels; four bits by the recipe, others by the same rule."""

    def codec(X: torch.Tensor) -> tuple[torch.Tensor, float]:
        if bits == 4:
            stored = int4_groups.quantize(X)
            return read_int4(*stored), stored_bits(X, *stored)
        C, S, Z = integer_groups(X, bits=bits)
        return read_groups(C, S, Z), bits + stored_bits(X, S, Z)  # as if codes were packed without gaps

    return codec


def along_tokens(codec: Codec) -> Codec:
    """The same with the groups laid along the tokens, a channel at a time, as KIVI stores keys."""

    def turned(X: torch.Tensor) -> tuple[torch.Tensor, float]:
        Y, bits = codec(X.mT.contiguous())
        return Y.mT.contiguous(), bits

    return turned


def bfp8(X: torch.Tensor) -> tuple[torch.Tensor, float]:
    stored = bfp.encode8(X)
    return read_bfp8(*stored), stored_bits(X, *stored)


def bfp4(X: torch.Tensor) -> tuple[torch.Tensor, float]:
    stored = bfp.encode4(X)
    return read_bfp4(*stored), stored_bits(X, *stored)


def pruned(k: int) -> Codec:
    """Mustafar: the k largest channels of a token, in bf16, and a bitmap."""

    def codec(X: torch.Tensor) -> tuple[torch.Tensor, float]:
        V, B = mustafar.compress(X, k=k)
        V = V.to(torch.bfloat16)
        return read_pruned(V.float(), B), stored_bits(X, V, B)

    return codec


def gear4(X: torch.Tensor) -> tuple[torch.Tensor, float]:
    """GEAR: four-bit groups, two outliers of each sign a token, a correction of rank 4."""
    start = torch.randn(X.shape[1], X.shape[3], 4, generator=torch.Generator().manual_seed(0))
    P, S, Z, O, at = gear.compress(X, k=2)
    U, W = gear.correct(X, P, S, Z, at, start, loops=2)
    U, W = U.half(), W.half()
    outliers = torch.zeros_like(X).scatter(-1, at.long(), O.float())  # each channel of a token at most once
    return read_int4(P, S, Z) + outliers + (U.float() @ W.float().mT), stored_bits(X, P, S, Z, O, at.to(torch.uint8), U, W)


def mx8(mode: str) -> Codec:
    """MXFP8, the rounding of the shared scale named."""

    def codec(X: torch.Tensor) -> tuple[torch.Tensor, float]:
        E, S = mx.quantize8(X.flatten(0, 2), mode=mode)
        return (E.float().unflatten(-1, (-1, mx.BLOCK)) * S.float()[..., None]).view_as(X), stored_bits(X, E, S)

    return codec


def mx4(mode: str) -> Codec:
    """MXFP4, two elements a byte: the first half of the channels in the low nibbles."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat((numbers, -numbers))

    def codec(X: torch.Tensor) -> tuple[torch.Tensor, float]:
        P, S = mx.quantize4(X.flatten(0, 2), mode=mode)
        elements = numbers[torch.cat((P & 15, P >> 4), -1).long()]
        return (elements.unflatten(-1, (-1, mx.BLOCK)) * S.float()[..., None]).view_as(X), stored_bits(X, P, S)

    return codec


def both(family: str, name: str, codec: Codec) -> Format:
    """Keys and values alike."""
    return Format(family, name, codec, codec)


FORMATS = (
    *(both("integer groups", f"int{bits}", groups(bits)) for bits in (8, 4, 3, 2)),
    *(Format("keys by channel (KIVI)", f"int{bits}, keys by channel", along_tokens(groups(bits)), groups(bits)) for bits in (4, 3, 2)),
    both("BFP", "BFP8", bfp8),
    both("BFP", "BFP4", bfp4),
    *(both(f"MX, {mode}", f"MXFP{bits}, {mode}", codec(mode)) for mode in ("floor", "rceil") for bits, codec in ((8, mx8), (4, mx4))),
    *(both("pruning (Mustafar)", f"{k} of 64 channels", pruned(k)) for k in (48, 32, 16, 8)),
    both("GEAR", "GEAR int4", gear4),
)


def stored(seen: Sequence[Seen], form: Format) -> tuple[list[Cache], float]:
    """The caches as they are read back from `form`, and the bits a value they took on the average."""
    caches, bits = [], []
    for s in seen:
        (K, key_bits), (V, value_bits) = form.keys(s.cache.K), form.values(s.cache.V.contiguous())
        caches.append(replace(s.cache, K=K, V=V))
        bits += [key_bits, value_bits]
    return caches, sum(bits) / len(bits)
