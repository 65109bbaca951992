"""A small decoder over bytes, in plain PyTorch: trained in about a minute, then asked to continue prompts from what is left of its cache.

    prompt -> `read` -> a cache a layer -> anything -> `follow` -> the log-probability of each following byte
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

TEXT = Path(__file__).with_name("opticks.txt")
NEAR = 4  # bytes that are embedded together


@dataclass(frozen=True)
class Size:
    """The shape of a decoder: layers, width, query heads, key heads, channels of a head, width of the inner layer."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    groups: int = 2
    channels: int = 64
    inner: int = 256
    base: float = 500_000.0  # of the rotary embedding


@dataclass(frozen=True)
class Cache:
    """What a layer keeps of a prompt: keys and values [b, g, p, e], and which tokens [b, g, p] there still are."""

    K: torch.Tensor
    V: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class Seen:
    """What a layer saw of a prompt, for the methods to judge by: Q [b, h, p, e] rotated, both without rotation, and its cache."""

    Q: torch.Tensor
    Q_plain: torch.Tensor
    K_plain: torch.Tensor
    cache: Cache


def rotate(x: torch.Tensor, start: int, base: float) -> torch.Tensor:
    """Rotary embedding of x [..., m, e] at the positions from `start` on; channel i turns with channel i + e/2."""
    half = x.shape[-1] // 2
    angles = torch.arange(start, start + x.shape[-2], dtype=x.dtype)[:, None] * frequencies(2 * half, base).to(x.dtype)
    first, second = x.split(half, -1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def frequencies(channels: int, base: float) -> torch.Tensor:
    """The angle a position of each pair of channels, [channels / 2]."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


class Layer(nn.Module):
    """Attention with grouped keys, then a gated inner layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.before, self.between = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.query = nn.Linear(size.width, size.heads * size.channels, bias=False)
        self.key, self.value = (nn.Linear(size.width, size.groups * size.channels, bias=False) for _ in range(2))
        self.out = nn.Linear(size.heads * size.channels, size.width, bias=False)
        self.gate, self.up = (nn.Linear(size.width, size.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(size.inner, size.width, bias=False)

    @torch.no_grad()
    def look_back(self) -> None:
        """Lets each group's first query look for what came after the same bytes: a key answers to the bytes before its own."""
        size = self.size
        heads = self.query.weight.view(size.groups, -1, size.channels, size.width)
        heads[:, 0] *= 2
        self.key.weight.copy_(heads[:, 0].flatten(0, 1).roll(size.width // NEAR, 1))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [b, heads, m, e], not rotated."""
        x = self.before(x)
        return tuple(f(x).unflatten(-1, (-1, self.size.channels)).transpose(1, 2) for f in (self.query, self.key, self.value))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """x with the heads' results [b, h, m, e] and the inner layer added."""
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Bytes in, the logits of the next byte out. A byte comes with the three before it, so that few layers and steps do."""

    def __init__(self, size: Size = Size(), seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.size = size
            self.tables = nn.ModuleList(nn.Embedding(256, size.width) for _ in range(NEAR))
            first = torch.randn(256, size.width)
            for i, table in enumerate(self.tables):  # an earlier byte is the same vector, rolled
                table.weight.data = first.roll(i * size.width // NEAR, 1)
            self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
            self.norm = nn.RMSNorm(size.width)
            self.head = nn.Linear(size.width, 256, bias=False)
            nn.init.zeros_(self.head.weight)
            for layer in self.layers:
                nn.init.zeros_(layer.out.weight)
                nn.init.zeros_(layer.down.weight)
                layer.look_back()

    def embed(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over the last NEAR bytes, each by a table of its own; `before` [b, NEAR - 1] are those in front of the first."""
        if before is None:
            before = tokens.new_zeros(len(tokens), NEAR - 1)
        text, m = torch.cat((before, tokens), 1), tokens.shape[1]
        return sum(table(text[:, NEAR - 1 - i : NEAR - 1 - i + m]) for i, table in enumerate(self.tables))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, m, 256] after each of the bytes [b, m]: the plain model, as it is trained."""
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = layer.project(x)
            q, k = (rotate(y, 0, self.size.base) for y in (q, k))
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return self.head(self.norm(x))

    @torch.no_grad()
    def read(self, prompt: torch.Tensor) -> list[Seen]:
        """What each layer sees of the prompts [b, p], attention over all of them."""
        x, seen = self.embed(prompt), []
        for layer in self.layers:
            q, k, v = layer.project(x)
            turned_q, turned_k = (rotate(y, 0, self.size.base) for y in (q, k))
            every = torch.ones(k.shape[:3], dtype=torch.bool)
            seen.append(Seen(turned_q, q, k, Cache(turned_k, v, every)))
            x = layer.finish(x, F.scaled_dot_product_attention(turned_q, turned_k, v, is_causal=True, enable_gqa=True))
        return seen

    @torch.no_grad()
    def follow(self, caches: Sequence[Cache], before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [b, m, 256] after each of the bytes [b, m] behind prompts that end in `before` and of which `caches` are left."""
        x, m, p = self.embed(tokens, before), tokens.shape[1], caches[0].K.shape[2]
        causal = torch.ones(m, m, dtype=torch.bool).tril()
        for layer, cache in zip(self.layers, caches, strict=True):
            q, k, v = layer.project(x)
            q, k = (rotate(y, p, self.size.base) for y in (q, k))
            kept = cache.kept.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(-1, -1, m, -1)
            mask = torch.cat((kept, causal.expand(*kept.shape[:3], m)), -1)
            keys, values = torch.cat((cache.K, k), 2), torch.cat((cache.V, v), 2)
            x = layer.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True))
        return self.head(self.norm(x))


def perplexity(model: Decoder, caches: Sequence[Cache], text: torch.Tensor) -> float:
    """The perplexity a byte behind prompts of which `caches` are left: of `text` [b, p + 1 + m] the last m, the one before them given."""
    p = caches[0].K.shape[2]
    logits = model.follow(caches, text[:, p - NEAR + 1 : p], text[:, p:-1])
    return math.exp(float(F.cross_entropy(logits.flatten(0, 1).double(), text[:, p + 1 :].flatten())))


def load_text(path: Path = TEXT) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a text: what is trained on, and the last twelfth, which is not."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    cut = len(data) * 11 // 12
    return data[:cut], data[cut:]


def windows(data: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """Pieces [b, length] of a text, taken every `stride` bytes."""
    return data.unfold(0, length, stride).contiguous()


def quote(text: torch.Tensor, start: torch.Tensor, length: int) -> torch.Tensor:
    """Texts [b, n] whose last `length` bytes repeat those from `start` [b] on: what comes after is in the prompt, far from its end."""
    places = start[:, None] + torch.arange(length)
    return torch.cat((text[:, :-length], text.gather(1, places)), 1)


def train(
    model: Decoder, data: torch.Tensor, *, steps: int = 350, batch: int = 8, length: int = 320,
    seed: int = 0, report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:  # fmt: skip
    """Trains, half of each batch being text and half text that ends in a quotation. Returns the seconds of processor time it took."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 10, 1.2 * (1 - s / steps) + 0.02)) for o in optimizers]
    start_s = time.process_time()
    for step in range(steps):
        places = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        text = torch.stack([data[i : i + length + 1] for i in places.tolist()])
        size = int(torch.randint(length // 10, 2 * length // 5, (1,), generator=generator))
        start = torch.randint(0, length + 1 - 2 * size, (batch // 2,), generator=generator)
        text = torch.cat((quote(text[: batch // 2], start, size), text[batch // 2 :]))
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        report(step, float(loss.detach()))
    return time.process_time() - start_s
