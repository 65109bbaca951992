"""Other cascades that become one kernel: log-sum-exp, the cross-entropy of a language model's head, a norm and the matmul after it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks import cascades
from benchmarks.case import CHECKED_ROWS, EAGER, Case, Pairs, Peer, Size, Tensors, paired

EPS = 1e-5


def fused_rows(size: Size) -> Iterator[Case]:
    """One row each, two of norms."""
    tiny = size == "tiny"
    yield log_sum_exp_case(8, 300) if tiny else log_sum_exp_case(1024, 32768)
    yield cross_entropy_case(16, 32, 200) if tiny else cross_entropy_case(512, 256, 32768)
    for rms in (True, False):
        yield norm_matmul_case(rms, 16, 96, 64) if tiny else norm_matmul_case(rms, 2048, 1024, 1024)


def last(found: torch.Tensor) -> torch.Tensor:
    """The rows that are checked."""
    return found[-CHECKED_ROWS:]


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
        peers=(Peer("torch.logsumexp", lambda x: torch.logsumexp(x, -1)), Peer(EAGER, eager)),
        check=lambda tensors, results: paired(results, last, torch.logsumexp(last(tensors[0]).double(), -1)),
        flops=2.0 * rows * columns,
        bytes=4.0 * rows * (columns + 1),
        roof="read",
    )


def cross_entropy_case(tokens: int, width: int, vocabulary: int) -> Case:
    """The cross-entropy of a language model's head, the matmul of the logits included, which never reach memory."""

    def eager(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(x @ w.mT, y.long(), reduction="none")

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        x, w, y = tensors
        logits = last(x).double() @ w.double().mT
        return paired(results, last, functional.cross_entropy(logits, last(y).long(), reduction="none"))

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, w = torch.randn(tokens, width, generator=g), torch.randn(vocabulary, width, generator=g) * width**-0.5
        return x, w, torch.randint(0, vocabulary, (tokens,), generator=g, dtype=torch.int32)

    return Case(
        name=f"f32 cross-entropy T{tokens} E{width} V{vocabulary}",
        group="fused",
        dtype="f32",
        kernel=cascades.cross_entropy,
        make=make,
        peers=(Peer(EAGER, eager),),
        check=check,
        flops=2.0 * tokens * width * vocabulary,
        bytes=4.0 * (tokens * width + vocabulary * width + 2 * tokens),
        roof="read",
    )


def norm_matmul_case(rms: bool, rows: int, width: int, columns: int) -> Case:
    """RMSNorm or LayerNorm of the rows, then a matmul, in one pass over the rows."""

    def normalized(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if rms:
            return functional.rms_norm(x, (width,), weight, EPS)
        return functional.layer_norm(x, (width,), weight, None, EPS)

    def eager(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return normalized(x, g) @ w

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        x, g, w = (t.double() for t in tensors)
        return paired(results, last, normalized(last(x), g) @ w)

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, weight = torch.randn(rows, width, generator=g) + 0.5, torch.rand(width, generator=g) + 0.5
        return x, weight, torch.randn(width, columns, generator=g) * width**-0.5

    return Case(
        name=f"f32 {'RMSNorm' if rms else 'LayerNorm'}-matmul {rows} x {width} x {columns}",
        group="fused",
        dtype="f32",
        kernel=cascades.rms_norm_matmul if rms else cascades.layer_norm_matmul,
        make=make,
        peers=(Peer(EAGER, eager),),
        check=check,
        flops=2.0 * rows * width * columns,
        bytes=4.0 * (rows * width + width + width * columns + rows * columns),
        roof="read",
        scalars={"eps": EPS},
    )
