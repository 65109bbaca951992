"""A batch of decode steps after a prefix that all of it shares, each with a suffix of its own; the prefix is read once for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import einfall as ef
import torch
from torch.nn import functional

from benchmarks.case import EAGER, Aim, Case, Pairs, Peer, Size, Tensors, paired
from cookbook.attention import hydragen

OWN_UNSHARED = "own without sharing"


@dataclass(frozen=True, slots=True)
class Shape:
    """Extents: `share` query heads to each of `groups` key heads, all the suffixes padded to one length."""

    batch: int
    groups: int
    prefix: int
    suffix: int
    width: int = 128
    share: int = 4

    @property
    def text(self) -> str:
        return f"B{self.batch} H{self.groups * self.share}/{self.groups} S{self.prefix}+{self.suffix} D{self.width}"

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def bytes(self) -> float:
        """Of the prefix once, the suffixes, queries and results, in bf16."""
        return 4.0 * self.groups * self.width * (self.prefix + self.batch * (self.suffix + self.share))

    def rows(self, q: torch.Tensor) -> torch.Tensor:
        """The queries [b, 1, (g r), e] as [b, g, r, e]."""
        return q.reshape(-1, self.groups, self.share, self.width)

    def tensors(self, g: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Q, prefix and suffixes, each keys then values, and how many tokens of its suffix each request has before the new one."""

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=g.device).to(torch.bfloat16)

        heads = self.groups, self.width
        prefixes = (normal(self.prefix, *heads) for _ in "KV")
        suffixes = (normal(self.batch, self.suffix, *heads) for _ in "KV")
        lengths = torch.randint(0, self.suffix, (self.batch,), generator=g, device=g.device, dtype=torch.int32)
        return normal(self.batch, 1, self.groups * self.share, self.width), *prefixes, *suffixes, lengths


def shared_rows(size: Size) -> Iterator[Case]:
    """As attention over both parts, merged, and as one softmax over their concatenation, which the compiler has to take apart."""
    shape = Shape(3, 2, 64, 16) if size == "tiny" else Shape(32, 8, 8192, 64)
    yield shared_case(f"bf16 decode, shared prefix {shape.text}", hydragen.decomposed, shape)
    yield shared_case(f"bf16 decode, shared prefix, one softmax {shape.text}", hydragen.hydragen, shape)


def shared_case(name: str, kernel: ef.Kernel, shape: Shape) -> Case:
    """A row about sharing, by this kernel."""

    def eager(q: torch.Tensor, kp: torch.Tensor, vp: torch.Tensor, kt: torch.Tensor, vt: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return merged(shape, q, kp, vp, kt, vt, n)

    def without_sharing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(shape.rows(q), k, v, attn_mask=present).reshape(q.shape)

    def with_heads_first(tensors: Tensors) -> Tensors:
        q, k, v, length = copied(tensors)
        present = (torch.arange(k.shape[1], device=k.device) <= length[:, None])[:, None, None].expand(-1, shape.groups, shape.share, -1)
        return q, k.transpose(1, 2), v.transpose(1, 2), present

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        q, kp, vp, kt, vt, length = tensors
        q, k, v, n = copied((q[-1:].double(), kp.double(), vp.double(), kt[-1:].double(), vt[-1:].double(), length[-1:]))
        k, v = (x[0, : int(n) + 1].transpose(0, 1) for x in (k, v))
        weights = torch.softmax(shape.rows(q)[0] @ k.mT * shape.scale, -1)
        return paired(results, lambda found: found[-1:], (weights @ v).reshape(q.shape))

    return Case(
        name=name,
        group="decode",
        dtype="bf16",
        kernel=kernel,
        make=shape.tensors,
        peers=(
            Peer(OWN_UNSHARED, hydragen.unshared, copied, {"scale": shape.scale}),
            Peer("SDPA without sharing", without_sharing, with_heads_first),
            Peer(EAGER, eager),
        ),
        check=check,
        flops=4.0 * shape.batch * shape.groups * shape.share * (shape.prefix + shape.suffix) * shape.width,
        bytes=shape.bytes,
        roof="read",
        aims=(Aim("speed", 8.0, OWN_UNSHARED),),
        scalars={"scale": shape.scale},
    )


def copied(tensors: Tensors) -> Tensors:
    """What is run without sharing: each request has the prefix in front of its suffix, and so many tokens before the new one."""
    q, kp, vp, kt, vt, length = tensors
    keys, values = (torch.cat([x.expand(len(y), *x.shape), y], 1) for x, y in ((kp, kt), (vp, vt)))
    return q, keys, values, len(kp) + length


def merged(
    shape: Shape, q: torch.Tensor, kp: torch.Tensor, vp: torch.Tensor, kt: torch.Tensor, vt: torch.Tensor, n: torch.Tensor
) -> torch.Tensor:
    """Eager PyTorch that shares: the queries of the batch as rows of one product with the prefix, then the merge of both parts."""
    rows = shape.rows(q)
    together = rows.transpose(0, 1).flatten(1, 2)
    of_prefix = part(shape, together, kp.transpose(0, 1), vp.transpose(0, 1))
    first, over_first = (x.unflatten(1, (-1, shape.share)).transpose(0, 1) for x in of_prefix)
    present = (torch.arange(shape.suffix, device=n.device) <= n[:, None])[:, None, None]
    second, over_second = part(shape, rows, kt.transpose(1, 2), vt.transpose(1, 2), present)
    weight = torch.sigmoid(over_first - over_second).to(q.dtype)
    return (first * weight + second * (1 - weight)).reshape(q.shape)


def part(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, present: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over some of the keys, and the logarithm of its sum of exponentials."""
    scores = (q @ k.mT * shape.scale).float()
    if present is not None:
        scores = scores.masked_fill(~present, -math.inf)
    total = torch.logsumexp(scores, -1, keepdim=True)
    return (scores - total).exp().to(v.dtype) @ v, total
