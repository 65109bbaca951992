"""One new token, or a few, against a long context, four query heads to a key head: in bf16, in fewer bits, with a score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from benchmarks import cascades
from benchmarks.case import EAGER, Aim, Case, Function, Pairs, Peer, Size, Tensors, paired

BF16 = torch.bfloat16
GROUP = 32  # channels that share a scale
SDPA = "SDPA, heads as rows"
OWN_BF16, OWN_PLAIN = "own in bf16", "own without score"
POOL = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Extents of a decode step: `queries` new tokens after `keys`, `share` query heads to each of `groups` key heads."""

    batch: int
    groups: int
    keys: int
    width: int = 128
    share: int = 4
    queries: int = 1

    @property
    def text(self) -> str:
        queries = f" M{self.queries}" if self.queries > 1 else ""
        return f"B{self.batch}{queries} H{self.groups * self.share}/{self.groups} S{self.keys} D{self.width}"

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def flops(self) -> float:
        """Those of both products."""
        return 4.0 * self.batch * self.groups * self.share * self.queries * self.keys * self.width

    def query(self, g: torch.Generator) -> torch.Tensor:
        """Q [b, (g r), m, e] in bf16."""
        return torch.randn(self.batch, self.groups * self.share, self.queries, self.width, generator=g, device=g.device).to(BF16)

    def cache(self, g: torch.Generator) -> torch.Tensor:
        """Keys or values [b, g, p, e] in bf16."""
        return torch.randn(self.batch, self.groups, self.keys, self.width, generator=g, device=g.device).to(BF16)

    def rows(self, q: torch.Tensor) -> torch.Tensor:
        """The query heads of a key head as rows of it: the fair way to ask."""
        return q.reshape(q.shape[0], self.groups, self.share * self.queries, self.width)


def decode_rows(size: Size) -> Iterator[Case]:
    """bf16, int8, int4, then with H2O's and SnapKV's score."""
    tiny = size == "tiny"
    few, many = Shape(1, 2, 96), Shape(4, 8, 8192)
    yield decode_case(few if tiny else many)
    yield int8_case(few if tiny else many)
    yield int4_case(few if tiny else many)
    yield h2o_case(few if tiny else many)
    yield snapkv_case(replace(few, queries=8) if tiny else replace(many, batch=2, queries=16))


def sdpa(shape: Shape) -> Function:
    """torch's attention, query heads as rows."""
    return lambda q, k, v: functional.scaled_dot_product_attention(shape.rows(q), k, v).reshape(q.shape)


def last_attention(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last sequence of the batch is given, and its weights [1, g, r, m, p], in float64; causal among the new tokens."""
    q, k, v = (x[-1:].double() for x in (q, k, v))
    scores = (shape.rows(q) @ k.mT * shape.scale).unflatten(2, (shape.share, shape.queries))
    weights = torch.softmax(scores.masked_fill(~seen(shape).to(q.device), -math.inf), -1)
    return (weights.flatten(2, 3) @ v).reshape(q.shape), weights


def seen(shape: Shape) -> torch.Tensor:
    """Which tokens each new one attends to, [m, p]."""
    return torch.ones(shape.queries, shape.keys, dtype=torch.bool).tril(shape.keys - shape.queries)


def last(found: torch.Tensor) -> torch.Tensor:
    """The sequence that is checked."""
    return found[-1:]


def decode_case(shape: Shape) -> Case:
    """Keys and values in bf16; the memory bounds it."""

    def gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(shape.rows(q) @ k.mT * shape.scale, -1) @ v).reshape(q.shape)

    return Case(
        name=f"bf16 decode {shape.text}",
        group="decode",
        dtype="bf16",
        kernel=cascades.grouped_attention,
        make=lambda g: (shape.query(g), shape.cache(g), shape.cache(g)),
        peers=(Peer(SDPA, sdpa(shape)), Peer("SDPA enable_gqa", gqa), Peer(EAGER, eager)),
        check=lambda tensors, results: paired(results, last, last_attention(shape, *tensors)[0]),
        flops=shape.flops,
        bytes=cache_bytes(shape, 2.0),
        roof="read",
        aims=(Aim("speed", 3.7, SDPA), Aim("of_roof", 0.9)),
        scalars={"scale": shape.scale},
    )


def cache_bytes(shape: Shape, a_value: float) -> float:
    """Bytes of keys and values at so many each, and of queries and results in bf16."""
    rows = shape.keys * a_value + 2.0 * shape.share * shape.queries
    return 2.0 * shape.batch * shape.groups * shape.width * rows


def compressed_case(case: Case, shape: Shape, restore: Function, aim: float) -> Case:
    """A decode step whose keys and values `restore` gives from what is stored, in a type of choice; the peers get bf16."""

    def restored(tensors: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        half = (len(tensors) - 1) // 2
        return tensors[0], restore(tensors[1 : 1 + half], dtype), restore(tensors[1 + half :], dtype)

    def eager(*tensors: torch.Tensor) -> torch.Tensor:
        return sdpa(shape)(*restored(tensors, BF16))

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        of_last = restored([x[-1:] for x in tensors], torch.float64)
        return paired(results, last, last_attention(shape, *of_last)[0])

    own = Peer(OWN_BF16, cascades.grouped_attention, lambda tensors: restored(tensors, BF16), {"scale": shape.scale})
    return replace(case, peers=(own, Peer(EAGER, eager)), check=check, aims=(Aim("speed", aim, OWN_BF16),))


def blank(name: str, shape: Shape, a_value: float) -> Case:
    """What the rows over fewer bits have in common, before kernel and inputs are known."""
    plain = decode_case(shape)
    return replace(plain, name=f"{name} decode {shape.text}", bytes=cache_bytes(shape, a_value))


def int8_case(shape: Shape) -> Case:
    """Whole numbers of eight bits, an f16 scale for every 32 channels."""

    def stored(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        extents = (shape.batch, shape.groups, shape.keys, shape.width)
        codes = torch.randint(-127, 128, extents, dtype=torch.int8, generator=g, device=g.device)
        return codes, scales(shape, g, 1 / 73)  # 73: the standard deviation of such codes

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        return shape.query(g), *stored(g), *stored(g)

    def restore(parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        codes, scale = parts
        return (codes.unflatten(-1, (-1, GROUP)).to(dtype) * scale.to(dtype)[..., None]).flatten(-2)

    case = replace(blank("int8", shape, 1 + 2 / GROUP), kernel=cascades.int8_attention, make=make)
    return compressed_case(case, shape, restore, 1.8)


def int4_case(shape: Shape) -> Case:
    """Four bits, f16 scale and zero point for every 32 channels; byte x holds the channels x and x + D/2."""

    def stored(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        extents = (shape.batch, shape.groups, shape.keys, shape.width // 2)
        packed = torch.randint(0, 256, extents, dtype=torch.uint8, generator=g, device=g.device)
        scale = scales(shape, g, 1 / 4.6)  # 4.6: the standard deviation of such codes
        return packed, scale, scale * -7.5

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        return shape.query(g), *stored(g), *stored(g)

    def restore(parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
        packed, scale, zero = parts
        codes = torch.cat([packed & 15, packed >> 4], -1).unflatten(-1, (-1, GROUP)).to(dtype)
        return (codes * scale.to(dtype)[..., None] + zero.to(dtype)[..., None]).flatten(-2)

    case = replace(blank("int4", shape, 0.5 + 4 / GROUP), kernel=cascades.int4_attention, make=make)
    return compressed_case(case, shape, restore, 2.5)


def scales(shape: Shape, g: torch.Generator, around: float) -> torch.Tensor:
    """An f16 scale for every group, within a factor of three."""
    of_groups = (shape.batch, shape.groups, shape.keys, shape.width // GROUP)
    return (around * (0.5 + torch.rand(of_groups, generator=g, device=g.device))).half()


def scored_case(case: Case, shape: Shape, eager: Function, check: Function, plain: object) -> Case:
    """A decode step that also gives a score of each token, compared with the one that does not."""
    own = Peer(OWN_PLAIN, plain, scalars={"scale": shape.scale})  # type: ignore[arg-type]
    more = 2.0 * shape.batch * shape.groups * shape.keys
    aims = (Aim("more_time", 0.05, OWN_PLAIN),)
    return replace(case, peers=(own, Peer(EAGER, eager)), check=check, bytes=case.bytes + more, aims=aims)


def h2o_case(shape: Shape) -> Case:
    """The sum over the query heads of a key head of what attention each token received."""

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(shape.rows(q) @ k.mT * shape.scale, -1)
        return (weights @ v).reshape(q.shape), weights.sum(2)

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        out, weights = last_attention(shape, *tensors)
        return paired(results, last, out, weights.sum((2, 3)))

    case = replace(decode_case(shape), name=f"bf16 decode, H2O score {shape.text}", kernel=cascades.scored_attention)
    return scored_case(case, shape, eager, check, cascades.grouped_attention)


def snapkv_case(shape: Shape) -> Case:
    """The mean attention of the last tokens and of a key head's queries to every token before them, pooled over neighbours."""
    older = shape.keys - shape.queries

    def votes(weights: torch.Tensor) -> torch.Tensor:
        mean = weights.mean((2, 3))[..., :older]
        pooled = functional.avg_pool1d(mean, POOL, padding=POOL // 2, stride=1)
        return functional.pad(pooled, (0, shape.queries))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (shape.rows(q) @ k.mT * shape.scale).unflatten(2, (shape.share, shape.queries))
        weights = torch.softmax(scores.masked_fill(~seen(shape).to(q.device), -math.inf), -1)
        return (weights.flatten(2, 3) @ v).reshape(q.shape), votes(weights)

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        out, weights = last_attention(shape, *tensors)
        return paired(results, last, out, votes(weights))

    case = replace(decode_case(shape), name=f"bf16 decode, SnapKV score {shape.text}", kernel=cascades.voting_attention)
    return scored_case(case, shape, eager, check, cascades.window_attention)
