"""Block floating point keys: integers under one exponent for every 32 channels, with the channels sorted by the norms of W_k."""

import math
import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.quantization.common import outlying, relative
from cookbook.recipe import Recipe, Step, serve

BLOCK = 32  # channels that share an exponent
LEAST = -120  # of the exponents: a step of any width is a normal f32, and so is its inverse
UNUSABLE = -128  # the exponent of a block with an element that is not finite


def power_of_two(n):
    """2**n for -126 <= n <= 127, exactly: the bits of an f32."""
    return ((n + 127) << 23).bitcast(ef.f32)


def mantissas(X, over, bits):
    """Whole numbers of `bits` bits and the exponent E of each block: x is close to M * 2**(E + 2 - bits)."""
    top = ef.abs(X).max(over)
    E = ef.maximum((top.bitcast(ef.i32) >> 23 & 255) - 127, LEAST)
    most = 2.0 ** (bits - 1) - 1
    M = ef.minimum(ef.maximum(ef.round(X * power_of_two(bits - 2 - E)), -most), most)
    usable = ef.isfinite(X).all(over)
    return ef.where(usable, M, 0.0).to(ef.i32), ef.where(usable, E, UNUSABLE).to(ef.i8)


def numbers(M, E, bits):
    """What whole numbers under an exponent stand for."""
    E = E.to(ef.i32)
    return M.to(ef.f32) * ef.where(E == UNUSABLE, float("nan"), power_of_two(ef.maximum(E, LEAST) + (2 - bits)))


@ef.kernel
def k_sort(Wk: "g e d") -> "g n":
    """The order of each head's channels by the norm of their rows in W_k, the largest first."""
    _, order = (Wk * Wk).sum("d").sort("e", into="n")
    return order


@ef.kernel
def reorder(Wq: "(g r) e d", Wk: "g e d", order: "g n") -> ("(g r) n d", "g n d"):
    """Both projections with their output channels in that order. Done once, when the model is compiled."""
    return Wq.at(e=order), Wk.at(e=order)


@ef.kernel
def encode8(K: "b g p (n j=32)") -> ("b g p (n j)", "b g p n"):
    """Eight bits a value and eight for each block's exponent."""
    M, E = mantissas(K, over="j", bits=8)
    return M.to(ef.i8), E


@ef.kernel
def encode4(K: "b g p (s=2 c j=32)") -> ("b g p (c j)", "b g p (s c)"):
    """Four bits a value, packed: byte x holds channel x in its low and channel x + E/2 in its high nibble."""
    M, E = mantissas(K, over="j", bits=4)
    P = ((M & 15) << (4 * ef.index("s"))).sum("s").to(ef.u8)
    return P, E


@ef.kernel
def decode8(Q: "b (g r) (n j=32)", M: "b g p (n j)", E: "b g p n", V: "b g p f", L: "b", *, scale: float) -> "b (g r) f":
    """One new token a sequence attends over L keys in block floating point."""
    A = ((Q * numbers(M, E, bits=8)).sum("n j") * scale).where(ef.index("p") < L)
    return (ef.softmax(A, over="p") * V).sum("p")


@ef.kernel
def decode4(
    Q: "b (g r) (s=2 c j=32)", P: "b g p (c j)", E: "b g p (s c)", V: "b g p f", L: "b", *, scale: float
) -> "b (g r) f":  # fmt: skip
    """The same over packed four-bit mantissas."""
    M = (P.to(ef.i32) >> (4 * ef.index("s")) & 15 ^ 8) - 8
    A = ((Q * numbers(M, E, bits=4)).sum("s c j") * scale).where(ef.index("p") < L)
    return (ef.softmax(A, over="p") * V).sum("p")


# The oracles, on positions.


def k_sort_oracle(Wk):
    return Wk.square().sum(-1).argsort(dim=-1, descending=True, stable=True).int()


def reorder_oracle(Wq, Wk, order):
    shared = Wq.shape[0] // Wk.shape[0]
    rows = order.long().unsqueeze(-1)
    return Wq.take_along_dim(rows.repeat_interleave(shared, 0), 1), Wk.take_along_dim(rows, 1)


def two_to(n):
    """2**n in float64."""
    return torch.ldexp(torch.ones_like(n, dtype=torch.float64), n)


def encoded(K, bits):
    """Mantissas as int8 and exponents as int8, by `frexp` and `ldexp` instead of bits."""
    blocks = K.unflatten(-1, (-1, BLOCK))
    good = blocks.isfinite().all(-1)
    top = torch.where(good, blocks.abs().amax(-1), 0)
    exponent = torch.where(top > 0, torch.frexp(top).exponent - 1, LEAST).clamp(min=LEAST)
    step = two_to(exponent + 2 - bits)
    most = 2 ** (bits - 1) - 1
    whole = torch.where(good[..., None], blocks.double() / step[..., None], 0).round().clamp(-most, most)
    return whole.flatten(-2).to(torch.int8), torch.where(good, exponent, UNUSABLE).to(torch.int8)


def encode8_oracle(K):
    return encoded(K, 8)


def encode4_oracle(K):
    M, E = encoded(K, 4)
    first, second = (M.int() % 16).to(torch.uint8).chunk(2, -1)
    return first | second << 4, E


def decoded(M, E, bits, dtype):
    """Mantissas under their exponents as numbers."""
    step = two_to(E.int() + 2 - bits).masked_fill(E == UNUSABLE, math.nan)
    return (M.unflatten(-1, (-1, BLOCK)) * step[..., None]).flatten(-2).to(dtype)


def unpacked(P):
    """The mantissas of packed bytes."""
    M = torch.cat([P & 15, P >> 4], -1).to(torch.int8)
    return torch.where(M > 7, M - 16, M)


def attention(Q, K, V, L, scale):
    """Decode attention over the first L keys of each sequence."""
    shared = Q.shape[1] // K.shape[1]
    K, V = K.repeat_interleave(shared, 1), V.repeat_interleave(shared, 1)
    beyond = torch.arange(K.shape[2]) >= L[:, None, None]
    scores = (torch.einsum("bhe,bhpe->bhp", Q, K) * scale).masked_fill(beyond, -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(beyond, 0)  # a sequence of length 0 has no weights
    return torch.einsum("bhp,bhpf->bhf", weights, V)


def decode8_oracle(Q, M, E, V, L, *, scale):
    return attention(Q, decoded(M, E, 8, Q.dtype), V, L, scale)


def decode4_oracle(Q, P, E, V, L, *, scale):
    return attention(Q, decoded(unpacked(P), E, 4, Q.dtype), V, L, scale)


# Inputs.


def weights(generator, g, e, d):
    """Small whole numbers under a power of two for each row, a few rows loud: norms are exact, whatever order they are summed in."""
    rows = torch.randint(-4, 5, (g, e, d), generator=generator).float()
    loud = torch.randint(0, 8, (g, e, 1), generator=generator) == 0
    return rows * torch.where(loud, 4.0, 0.25)


def k_sort_inputs(generator, n):
    return (weights(generator, n["g"], n["e"], n["d"]),)


def reorder_inputs(generator, n):
    Wk = weights(generator, n["g"], n["e"], n["d"])
    Wq = torch.randn(n["g"] * n["r"], n["e"], n["d"], generator=generator)
    return Wq, Wk, k_sort_oracle(Wk)


def encode_inputs(generator, n):
    return (outlying(generator, n["b"], n["g"], n["p"], 2 * n["c"] * BLOCK),)


def decode_inputs(encode):
    def inputs(generator, n):
        e = 2 * n["c"] * BLOCK
        Q = torch.randn(n["b"], n["g"] * n["r"], e, generator=generator) / 4
        K = torch.randn(n["b"], n["g"], n["p"], e, generator=generator)
        V = torch.randn(n["b"], n["g"], n["p"], n["f"], generator=generator)
        L = torch.randint(0, n["p"] + 1, (n["b"],), generator=generator, dtype=torch.int32)
        return Q, *encode(K), V, L

    return inputs


def show(folder):
    """Errors of keys and scores against bits, channels as they come and sorted."""
    generator = torch.Generator().manual_seed(0)
    g, r, e, d, p = 2, 4, 128, 256, 512
    Wk = torch.randn(g, e, d, generator=generator) / math.sqrt(d)
    Wk *= torch.exp(0.8 * torch.randn(g, e, 1, generator=generator))  # norms of rows as unequal as those of trained keys may be
    Wq = torch.randn(g * r, e, d, generator=generator) / math.sqrt(d)
    X, x = torch.randn(p, d, generator=generator), torch.randn(16, d, generator=generator)
    lines = ["| channels | mantissa | bits a value | keys' error | mean over the channels | scores' error |", "|---|---|---|---|---|---|"]
    for name in ("as they come", "sorted"):
        q, k = (Wq, Wk) if name == "as they come" else reorder.reference(Wq, Wk, k_sort.reference(Wk))
        K, Q = torch.einsum("pd,ged->gpe", X, k)[None], torch.einsum("md,hed->hme", x, q)
        for bits, encode in ((8, encode8), (4, encode4)):
            M, E = encode.reference(K)
            size = 8 * (M.numel() * M.element_size() + E.numel()) / K.numel()
            found = decoded(M if bits == 8 else unpacked(M), E, bits, torch.float32)
            a, b = (torch.einsum("hme,hpe->hmp", Q, t[0].repeat_interleave(r, 0)) for t in (found, K))
            each = ((found - K).norm(dim=2) / K.norm(dim=2)).mean()
            lines.append(f"| {name} | {bits} | {size:.2f} | {relative(found, K):.4f} | {each:.4f} | {relative(a, b):.4f} |")
    return lines


SIZES = {"b": 2, "g": 2, "r": 4, "p": 96, "c": 2, "f": 64}
RANGES = {"b": (1, 3), "g": (1, 3), "r": (1, 4), "p": (1, 37), "c": (1, 2), "f": (1, 33)}
W_SIZES = {"g": 2, "r": 4, "e": 128, "d": 256}
W_RANGES = {"g": (1, 3), "r": (1, 3), "e": (1, 67), "d": (1, 31)}


def _some(table, ranks):
    return {rank: table[rank] for rank in ranks}


RECIPE = Recipe(
    name="bfp",
    title="Block floating point keys, their channels sorted by the norms of W_k",
    source="Accurate Block Quantization in LLMs with Outliers (arXiv 2403.20137)",
    steps=(
        Step("k_sort", k_sort, k_sort_oracle, k_sort_inputs, _some(W_SIZES, "ged"), _some(W_RANGES, "ged"), exact=True),
        Step("reorder", reorder, reorder_oracle, reorder_inputs, W_SIZES, W_RANGES, exact=True),
        Step("encode8", encode8, encode8_oracle, encode_inputs, _some(SIZES, "bgpc"), _some(RANGES, "bgpc"), exact=True),
        Step("encode4", encode4, encode4_oracle, encode_inputs, _some(SIZES, "bgpc"), _some(RANGES, "bgpc"), exact=True),
        Step("decode8", decode8, decode8_oracle, decode_inputs(encode8_oracle), SIZES, RANGES, scalars={"scale": 0.125}),
        Step("decode4", decode4, decode4_oracle, decode_inputs(encode4_oracle), SIZES, RANGES, scalars={"scale": 0.125}),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
