"""What is compared: a kernel, its inputs, its peers in PyTorch, an oracle in float64 on a slice, and the work that must be done.

Operations are those of the mathematics (a multiply-add counts 2): a causal mask halves them, for every side alike. Bytes are those of
every input read once and every output written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import einfall as ef
import torch
from torch.nn import functional

from benchmarks import cascades

Size = Literal["tiny", "short", "full"]
Group = Literal["prefill", "fused"]
Tensors = Sequence[torch.Tensor]
Function = Callable[..., torch.Tensor]

SEQUENCES: Mapping[Size, tuple[int, ...]] = {"tiny": (64,), "short": (1024, 2048), "full": (1024, 2048, 4096)}
HEADS: Mapping[int, int] = {64: 16, 128: 8}  # by head width
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CHECKED_ROWS = 24
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table.

    Args:
        peers: what PyTorch offers, by name, the first being the one ratios are given to; `eager` is among them, and may be compiled.
        check: (tensors, result) -> the checked part of the result, and what it should be, computed in float64.
        flops, bytes: the least a kernel can do.
    """

    name: str
    group: Group
    dtype: Literal["f32", "bf16"]
    kernel: ef.Kernel
    make: Callable[[torch.Generator], tuple[torch.Tensor, ...]]
    peers: tuple[tuple[str, Function], ...]
    check: Callable[[Tensors, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    flops: float
    bytes: float
    scalars: Mapping[str, float] = field(default_factory=dict)
    causal: bool = False
    shape: tuple[int, ...] = ()

    @property
    def eager(self) -> Function:
        """The plain PyTorch function that torch.compile is given."""
        return dict(self.peers)["eager"]

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Fresh inputs, the same for the same seed."""
        return self.make(torch.Generator().manual_seed(seed))


def cases(size: Size) -> tuple[Case, ...]:
    """All rows at that size: prefill attention, then the other fused cascades."""
    return (*_prefill(size), *_fused(size))


def _prefill(size: Size) -> Iterator[Case]:
    for dtype in ("f32", "bf16"):
        for sequence in SEQUENCES[size]:
            for width in HEADS:
                for causal in (False, True):
                    yield attention_case(dtype, sequence, width, causal=causal, heads=2 if size == "tiny" else HEADS[width])


def attention_case(dtype: Literal["f32", "bf16"], sequence: int, width: int, *, causal: bool, heads: int) -> Case:
    """Attention over a whole prompt: B 1, so many heads, S queries and keys."""
    shape, t = (1, heads, sequence, width), DTYPES[dtype]
    scale = width**-0.5
    hidden = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * scale
        if causal:
            scores = scores.masked_fill(hidden, -math.inf)
        return torch.softmax(scores, -1) @ v

    def check(tensors: Tensors, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.linspace(0, sequence - 1, min(CHECKED_ROWS, sequence)).long()
        q, k, v = (x[:, -1].double() for x in tensors)
        scores = q[:, rows] @ k.mT * scale
        if causal:
            scores = scores.masked_fill(torch.arange(sequence) > rows[:, None], -math.inf)
        return result[:, -1, rows], torch.softmax(scores, -1) @ v

    work = 4.0 * heads * sequence**2 * width * (0.5 if causal else 1.0)
    return Case(
        name=f"{dtype} H{heads} S{sequence} D{width} {'causal' if causal else 'full'}",
        group="prefill",
        dtype=dtype,
        kernel=cascades.causal_attention if causal else cascades.attention,
        make=lambda g: tuple(torch.randn(shape, generator=g).to(t) for _ in range(3)),
        peers=(("SDPA", sdpa), ("eager", eager)),
        check=check,
        flops=work,
        bytes=4.0 * math.prod(shape) * t.itemsize,
        scalars={"scale": scale},
        causal=causal,
        shape=shape,
    )


def _fused(size: Size) -> Iterator[Case]:
    tiny = size == "tiny"
    yield decode_case(batch=1, groups=2, keys=96) if tiny else decode_case(batch=4, groups=8, keys=8192)
    yield log_sum_exp_case(8, 300) if tiny else log_sum_exp_case(1024, 32768)
    yield cross_entropy_case(16, 32, 200) if tiny else cross_entropy_case(512, 256, 32768)
    for rms in (True, False):
        yield norm_matmul_case(rms, 16, 96, 64) if tiny else norm_matmul_case(rms, 2048, 1024, 1024)


def decode_case(*, batch: int, groups: int, keys: int, width: int = 128, share: int = 4) -> Case:
    """One new token against a long context, four query heads to a key head, in bf16; the memory bounds it."""
    t = torch.bfloat16
    scale = width**-0.5

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = q.reshape(batch, groups, share, width)  # the query heads of a key head as rows: the fair way to ask
        return functional.scaled_dot_product_attention(rows, k, v).reshape(q.shape)

    def gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = q.reshape(batch, groups, share, width)
        return (torch.softmax(rows @ k.mT * scale, -1) @ v).reshape(q.shape)

    def check(tensors: Tensors, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x[-1:].double() for x in tensors)
        rows = q.reshape(1, groups, share, width)
        return result[-1:], (torch.softmax(rows @ k.mT * scale, -1) @ v).reshape(q.shape)

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        shapes = ((batch, groups * share, 1, width), (batch, groups, keys, width), (batch, groups, keys, width))
        return tuple(torch.randn(shape, generator=g).to(t) for shape in shapes)

    return Case(
        name=f"bf16 decode B{batch} H{groups * share}/{groups} S{keys} D{width}",
        group="fused",
        dtype="bf16",
        kernel=cascades.grouped_attention,
        make=make,
        peers=(("SDPA, heads as rows", grouped), ("SDPA enable_gqa", gqa), ("eager", eager)),
        check=check,
        flops=4.0 * batch * groups * share * keys * width,
        bytes=2.0 * t.itemsize * batch * groups * width * (keys + share),
        scalars={"scale": scale},
    )


def log_sum_exp_case(rows: int, columns: int) -> Case:
    """The logarithm of a sum of exponentials along rows; the memory bounds it."""

    def eager(x: torch.Tensor) -> torch.Tensor:
        top = x.amax(-1, keepdim=True)
        return (x - top).exp().sum(-1).log() + top[:, 0]

    return Case(
        name=f"f32 log-sum-exp {rows} x {columns}",
        group="fused",
        dtype="f32",
        kernel=cascades.log_sum_exp,
        make=lambda g: (torch.randn(rows, columns, generator=g),),
        peers=(("torch.logsumexp", lambda x: torch.logsumexp(x, -1)), ("eager", eager)),
        check=lambda tensors, result: (result[-CHECKED_ROWS:], torch.logsumexp(tensors[0][-CHECKED_ROWS:].double(), -1)),
        flops=2.0 * rows * columns,
        bytes=4.0 * rows * (columns + 1),
    )


def cross_entropy_case(tokens: int, width: int, vocabulary: int) -> Case:
    """The cross-entropy of a language model's head, the matmul of the logits included, which never reach memory."""

    def eager(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(x @ w.mT, y.long(), reduction="none")

    def check(tensors: Tensors, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, y = tensors
        logits = x[-CHECKED_ROWS:].double() @ w.double().mT
        return result[-CHECKED_ROWS:], functional.cross_entropy(logits, y[-CHECKED_ROWS:].long(), reduction="none")

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, w = torch.randn(tokens, width, generator=g), torch.randn(vocabulary, width, generator=g) * width**-0.5
        return x, w, torch.randint(0, vocabulary, (tokens,), generator=g, dtype=torch.int32)

    return Case(
        name=f"f32 cross-entropy T{tokens} E{width} V{vocabulary}",
        group="fused",
        dtype="f32",
        kernel=cascades.cross_entropy,
        make=make,
        peers=(("eager", eager),),
        check=check,
        flops=2.0 * tokens * width * vocabulary,
        bytes=4.0 * (tokens * width + vocabulary * width + 2 * tokens),
    )


def norm_matmul_case(rms: bool, rows: int, width: int, columns: int) -> Case:
    """RMSNorm or LayerNorm of the rows, then a matmul, in one pass over the rows."""

    def normalized(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if rms:
            return functional.rms_norm(x, (width,), weight, EPS)
        return functional.layer_norm(x, (width,), weight, None, EPS)

    def eager(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return normalized(x, g) @ w

    def check(tensors: Tensors, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, g, w = (t.double() for t in tensors)
        return result[-CHECKED_ROWS:], normalized(x[-CHECKED_ROWS:], g) @ w

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, weight = torch.randn(rows, width, generator=g) + 0.5, torch.rand(width, generator=g) + 0.5
        return x, weight, torch.randn(width, columns, generator=g) * width**-0.5

    return Case(
        name=f"f32 {'RMSNorm' if rms else 'LayerNorm'}-matmul {rows} x {width} x {columns}",
        group="fused",
        dtype="f32",
        kernel=cascades.rms_norm_matmul if rms else cascades.layer_norm_matmul,
        make=make,
        peers=(("eager", eager),),
        check=check,
        flops=2.0 * rows * width * columns,
        bytes=4.0 * (rows * width + width + width * columns + rows * columns),
        scalars={"eps": EPS},
    )
