"""XQuant: the cache holds the quantized input of the layer; keys and values are made from it inside of attention (arXiv 2508.10395).

One tensor is cached instead of two, and it has no outlier channels where keys have them. `rematerialized` is the method as published;
`rotated` has RoPE on the keys that it makes; `absorbed` moves the projections to the other side of the sums, which without RoPE is the
same with fewer operations where queries are few.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.attention.common import eager
from cookbook.attention.hydragen import unshared
from cookbook.recipe import Recipe, Step, serve

GROUP = 32


def dequantize(X8, A, Z):
    """Signed 8-bit numbers with a scale and a zero point for each group of channels of a token."""
    return (X8.to(ef.f32) - Z) * A


@ef.kernel
def rematerialized(
    Q: "b m (g r) e", X8: "b p (x j=32)", A: "b p x", Z: "b p x", Wk: "(x j) g e", Wv: "(x j) g f", L: "b", *, scale: float
) -> "b m (g r) f":
    """Attention to keys and values made from the cached input. The m new tokens of a request follow L earlier ones."""
    X = dequantize(X8, A, Z)
    K = (X * Wk).sum("x j")
    V = (X * Wv).sum("x j")
    S = ((Q * K).sum("e") * scale).where(ef.index("p") <= L + ef.index("m"))
    return (ef.softmax(S, "p") * V).sum("p")


@ef.kernel
def rotated(
    Q: "b m (g r) e", X8: "b p (x j=32)", A: "b p x", Z: "b p x", Wk: "(x j) g e", Wv: "(x j) g f", L: "b", *, scale: float
) -> "b m (g r) f":
    """The same with RoPE: the keys are rotated after they are made, the queries before they are used."""
    X = dequantize(X8, A, Z)
    K = ef.rope((X * Wk).sum("x j"), "e", position="p")
    V = (X * Wv).sum("x j")
    place = L + ef.index("m")
    S = ((ef.rope(Q, "e", position=place) * K).sum("e") * scale).where(ef.index("p") <= place)
    return (ef.softmax(S, "p") * V).sum("p")


@ef.kernel
def absorbed(
    Q: "b m (g r) e", X8: "b p (x j=32)", A: "b p x", Z: "b p x", Wk: "(x j) g e", Wv: "(x j) g f", L: "b", *, scale: float
) -> "b m (g r) f":
    """`rematerialized` with the sums in another order: queries go to the input's channels, and the weighted input to the values'."""
    X = dequantize(X8, A, Z)
    U = (Q * Wk).sum("e")
    S = ((U * X).sum("x j") * scale).where(ef.index("p") <= L + ef.index("m"))
    Y = (ef.softmax(S, "p") * X).sum("p")
    return (Y * Wv).sum("x j")


def quantize(x, bits=8):
    """Round to nearest with a scale and an integer zero point for each group of a token: (numbers, scales, zero points)."""
    grouped = x.unflatten(-1, (-1, GROUP))
    low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = ((high - low) / (most - least)).clamp(min=1e-8)
    zero = (least - low / step).round().clamp(least, most)
    numbers = (grouped / step[..., None] + zero[..., None]).round().clamp(least, most)
    return numbers.flatten(-2).to(torch.int8), step, zero.to(torch.int8)


def restored(numbers, step, zero):
    """What `quantize` kept of its input, in the type of the scales."""
    grouped = numbers.to(step.dtype).unflatten(-1, (-1, GROUP)) - zero.to(step.dtype)[..., None]
    return (grouped * step[..., None]).flatten(-2)


def oracle(q, x8, a, z, wk, wv, length, *, scale, turn=False):
    """Restores the layer's input, projects it to all keys and values, and takes a masked softmax."""
    x = restored(x8, a, z)
    k, v = torch.einsum("bpd,dge->bgpe", x, wk), torch.einsum("bpd,dgf->bgpf", x, wv)
    q, places, tokens = q.transpose(1, 2), length.long()[:, None] + torch.arange(q.shape[1]), torch.arange(x.shape[1])
    if turn:
        q, k = rope(q, places[:, None]), rope(k, tokens)
    seen = tokens <= places[..., None]
    return eager(q, k, v, seen[:, None], scale).transpose(1, 2)


def oracle_rotated(*tensors, scale):
    return oracle(*tensors, scale=scale, turn=True)


def rope(x, places):
    """RoPE of [..., token, e] by the places of the tokens, pairs being the two halves of e."""
    half = x.shape[-1] // 2
    angle = places.to(x.dtype)[..., None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def layer(generator, n):
    """Queries, the layer's input, projections of about unit gain, and lengths that leave room for the m new tokens."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    b, m, g, d, e, f = n["b"], n["m"], n["g"], n["x"] * GROUP, n["e"] + n["e"] % 2, n["f"]
    p = n["p"] + m
    length = torch.randint(0, p - m + 1, (b,), generator=generator, dtype=torch.int32)
    return normal(b, m, g * n["r"], e), normal(b, p, d), normal(d, g, e) / d**0.5, normal(d, g, f) / d**0.5, length


def inputs(generator, n):
    """A random layer with its input quantized to 8 bits; one group in eight is constant, at 0 or far from it."""
    q, x, wk, wv, length = layer(generator, n)
    grouped = x.unflatten(-1, (-1, GROUP))
    constant = torch.rand(grouped.shape[:-1], generator=generator) < 0.125
    level = 3.0 * torch.randint(-1, 2, grouped.shape[:-1], generator=generator)
    x = torch.where(constant[..., None], level[..., None], grouped).flatten(-2)
    return q, *quantize(x), wk, wv, length


BITS = (8, 6, 4, 3, 2)
ERRORS = {"b": 2, "m": 4, "g": 8, "r": 1, "x": 16, "p": 512, "e": 64, "f": 64}
QUERIES = (1, 4, 16, 64, 256)
WORK = {"b": 8, "g": 32, "r": 1, "x": 128, "j": 32, "p": 4096, "e": 128, "f": 128}


def errors(bits, seed=0):
    """Relative errors of the output: the input quantized; keys and values quantized; the same with outlier channels in the keys.

    Two channels a head are then 8 times as large in the keys and smaller by as much in the queries, so that the scores are the same ones.
    """
    q, x, wk, wv, _ = (t.double() for t in layer(torch.Generator().manual_seed(seed), ERRORS))
    length, scale = torch.full((q.shape[0],), x.shape[1] - q.shape[1]), q.shape[-1] ** -0.5
    seen = (torch.arange(x.shape[1]) <= (length[:, None] + torch.arange(q.shape[1]))[..., None])[:, None]
    k, v, queries = torch.einsum("bpd,dge->bgpe", x, wk), torch.einsum("bpd,dgf->bgpf", x, wv), q.transpose(1, 2)
    exact = eager(queries, k, v, seen, scale)
    uneven = torch.ones(k.shape[-1], dtype=k.dtype)
    uneven[::GROUP] = 8.0
    values = restored(*quantize(v, bits))
    found = (
        oracle(q, *quantize(x, bits), wk, wv, length, scale=scale).transpose(1, 2),
        eager(queries, restored(*quantize(k, bits)), values, seen, scale),
        eager(queries / uneven, restored(*quantize(k * uneven, bits)), values, seen, scale),
    )
    return tuple(float((out - exact).norm() / exact.norm()) for out in found)


def show(out: Path) -> list[str]:
    """Error by bits and the bytes that a token takes in the cache; then operations by the number of queries."""
    d, width = ERRORS["x"] * GROUP, ERRORS["g"] * ERRORS["e"]
    lines = [
        "| bits | X, bytes a token | error | K and V, bytes a token | error | error with outlier channels |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for bits in BITS:
        token, pair = (n * bits / 8 + n / GROUP * 3 for n in (d, 2 * width))
        ours, theirs, outliers = errors(bits)
        lines.append(f"| {bits} | {token:.0f} | {ours:.1e} | {pair:.0f} | {theirs:.1e} | {outliers:.1e} |")
    lines += ["", "| decode step | kernels | MB moved | Gop |", "|---|---:|---:|---:|"]
    for name, kernel in (("K and V cached in bf16", unshared), *((step.name, step.kernel) for step in RECIPE.steps)):
        kernels, moved, done = plan(kernel, 1)
        lines.append(f"| {name} | {kernels} | {moved / 1e6:.0f} | {done / 1e9:.1f} |")
    lines += ["", "| queries | rematerialized, Gop | absorbed, Gop | ratio |", "|---:|---:|---:|---:|"]
    for queries in QUERIES:
        made, moved = (plan(kernel, queries)[2] for kernel in (rematerialized, absorbed))
        lines.append(f"| {queries} | {made / 1e9:.0f} | {moved / 1e9:.0f} | {made / moved:.2f} |")
    return lines


def plan(kernel, queries):
    """What `explain` says of a call: the number of kernels, the bytes that they move, the operations."""
    types = {t.name: {"X8": "i8", "Z": "i8", "L": "i32"}.get(t.name, "bf16") for t in kernel.cascade.inputs}
    ranks = {rank: size for rank, size in {**WORK, "m": queries}.items() if rank in kernel.cascade.all_ranks()}
    data = kernel.explain(dims=ranks, dtypes=types, show=False).to_dict()
    return len(data["kernels"]), sum(k["traffic_bytes"] for k in data["kernels"]), data["flops"]


COMMON = {
    "inputs": inputs,
    "sizes": {"b": 2, "m": 2, "g": 2, "r": 2, "x": 3, "p": 60, "e": 32, "f": 32},
    "ranges": {"b": (1, 3), "m": (1, 4), "g": (1, 3), "r": (1, 3), "x": (1, 3), "p": (0, 23), "e": (1, 17), "f": (1, 17)},
    "scalars": {"scale": 0.2},
}

RECIPE = Recipe(
    name="xquant",
    title="XQuant: keys and values made from the cached, quantized input of the layer",
    source="XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization, arXiv 2508.10395; "
    "the quantizer's details are unverified",
    steps=(
        Step(name="rematerialized", kernel=rematerialized, oracle=oracle, **COMMON),
        Step(name="rotated", kernel=rotated, oracle=oracle_rotated, **COMMON),
        Step(name="absorbed", kernel=absorbed, oracle=oracle, **COMMON),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
