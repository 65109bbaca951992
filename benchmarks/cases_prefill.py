"""Attention over a whole prompt."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch.nn import functional

from benchmarks import cascades
from benchmarks.case import CHECKED_ROWS, DTYPES, EAGER, Aim, Case, Pairs, Peer, Size, Tensors, paired

SEQUENCES: Mapping[Size, tuple[int, ...]] = {"tiny": (64,), "short": (1024, 2048), "full": (1024, 2048, 4096)}
HEADS: Mapping[int, int] = {64: 16, 128: 8}  # by head width
AIMS = {"f32": (Aim("speed", 2.4, "SDPA"), Aim("of_peak", 0.85)), "bf16": (Aim("speed", 4.5, "SDPA"),)}


def prefill_rows(size: Size) -> Iterator[Case]:
    """f32 and bf16, every length and head width, full and causal."""
    for dtype in ("f32", "bf16"):
        for sequence in SEQUENCES[size]:
            for width in HEADS:
                for causal in (False, True):
                    yield attention_case(dtype, sequence, width, causal=causal, heads=2 if size == "tiny" else HEADS[width])


def attention_case(dtype: Literal["f32", "bf16"], sequence: int, width: int, *, causal: bool, heads: int) -> Case:
    """B 1, so many heads, S queries and keys."""
    shape, t = (1, heads, sequence, width), DTYPES[dtype]
    scale = width**-0.5

    @functools.cache
    def hidden(device: torch.device) -> torch.Tensor:
        return torch.ones(sequence, sequence, dtype=torch.bool, device=device).triu(1)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(hidden(q.device), -math.inf)
        return torch.softmax(scores, -1) @ v

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        rows = torch.linspace(0, sequence - 1, min(CHECKED_ROWS, sequence)).long().to(tensors[0].device)
        q, k, v = (x[:, -1].double() for x in tensors)
        scores = q[:, rows] @ k.mT * scale
        if causal:
            scores = scores.masked_fill(torch.arange(sequence, device=rows.device) > rows[:, None], -math.inf)
        return paired(results, lambda found: found[:, -1, rows], torch.softmax(scores, -1) @ v)

    return Case(
        name=f"{dtype} H{heads} S{sequence} D{width} {'causal' if causal else 'full'}",
        group="prefill",
        dtype=dtype,
        kernel=cascades.causal_attention if causal else cascades.attention,
        make=lambda g: tuple(torch.randn(shape, generator=g, device=g.device).to(t) for _ in range(3)),
        peers=(Peer("SDPA", sdpa), Peer(EAGER, eager)),
        check=check,
        flops=4.0 * heads * sequence**2 * width * (0.5 if causal else 1.0),
        bytes=4.0 * math.prod(shape) * t.itemsize,
        aims=AIMS[dtype],
        scalars={"scale": scale},
        causal=causal,
        shape=shape,
    )
