"""A decode step over keys and values in four bits that also returns what attention each cached token received."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import einfall as ef
import torch

from cookbook.eviction import common
from cookbook.quantization.common import GROUP, dequantize, unpack
from cookbook.recipe import Recipe, Step, serve

# Byte x of a token holds channel x in its low and channel x + E/2 in its high nibble: channels are (s c j), s = 0 for the first half.


@ef.kernel
def decode(
    Q: "b (g r) (s=2 c j=32)", Kp: "b g p (c j)", Ks: "b g p (s c)", Kz: "b g p (s c)",
    Vp: "b g p (d k=32)", Vs: "b g p (u=2 d)", Vz: "b g p (u d)", L: "b",
) -> ("b (g r) (u d k)", "b g p"):  # fmt: skip
    """Groups of 32 along the channels. L: how many tokens of each sequence are there."""
    K = dequantize(unpack(Kp, "s"), Ks, Kz)
    V = dequantize(unpack(Vp, "u"), Vs, Vz)
    width = ef.extent("s") * ef.extent("c") * ef.extent("j")
    A = ef.softmax(((Q * K).sum("s c j") / ef.sqrt(width)).where(ef.index("p") < L), over="p")
    O = (A * V).sum("p")
    S = A.sum("r")
    return O, S


@ef.kernel
def decode_by_channel(
    Q: "b (g r) (s=2 x)", Kp: "b g (n t=32) x", Ks: "b g n (s x)", Kz: "b g n (s x)",
    Vp: "b g (n t) (d k=32)", Vs: "b g (n t) (u=2 d)", Vz: "b g (n t) (u d)", L: "b",
) -> ("b (g r) (u d k)", "b g (n t)"):  # fmt: skip
    """Groups of 32 along the tokens for the keys, each channel with scales of its own, and along the channels for the values."""
    K = dequantize(unpack(Kp, "s"), Ks, Kz)
    V = dequantize(unpack(Vp, "u"), Vs, Vz)
    there = ef.index("n") * GROUP + ef.index("t") < L
    A = ef.softmax(((Q * K).sum("s x") / ef.sqrt(ef.extent("s") * ef.extent("x"))).where(there), over="n t")
    O = (A * V).sum("n t")
    S = A.sum("r")
    return O, S


# --- the oracle: eager dequantization and attention, a sequence and a head at a time ------------------------------------------------------
def quantized(x, axis):
    """Packed bytes of x [..., token, channel], with f16 scales and zero points of groups of 32 along `axis`, -1 or -2."""
    groups = x.unflatten(axis, (-1, GROUP))
    low, high = (bound(groups, axis, keepdim=True) for bound in (torch.amin, torch.amax))
    zero, scale = low.half(), ((high - low) / 15).half()
    codes = ((groups - zero) / scale.float().clamp(min=1e-7)).round().clamp(0, 15).to(torch.uint8).view_as(x)
    half = x.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4, scale.squeeze(axis), zero.squeeze(axis)


def expanded(packed, scale, zero, axis, dtype):
    """What `quantized` stands for."""
    codes = torch.cat([packed % 16, packed // 16], -1).to(dtype)
    return codes * scale.to(dtype).repeat_interleave(GROUP, axis) + zero.to(dtype).repeat_interleave(GROUP, axis)


def attended(q, keys, values, lengths):
    out, score = q.new_zeros(*q.shape[:2], values.shape[-1]), q.new_zeros(keys.shape[:3])
    shared = q.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        for head in range(q.shape[1] if length else 0):
            key, value = (x[row, head // shared, :length] for x in (keys, values))
            weights = torch.softmax(key @ q[row, head] / q.shape[-1] ** 0.5, 0)
            out[row, head] = weights @ value
            score[row, head // shared, :length] += weights
    return out, score


def decode_oracle(q, kp, ks, kz, vp, vs, vz, lengths):
    return attended(q, expanded(kp, ks, kz, -1, q.dtype), expanded(vp, vs, vz, -1, q.dtype), lengths)


def decode_by_channel_oracle(q, kp, ks, kz, vp, vs, vz, lengths):
    return attended(q, expanded(kp, ks, kz, -2, q.dtype), expanded(vp, vs, vz, -1, q.dtype), lengths)


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def lengths(g, n, tokens):
    """The first sequence is as long as the cache, the others end anywhere, at 0 as well."""
    found = torch.randint(0, tokens + 1, (n["b"],), generator=g, dtype=torch.int32)
    found[0] = tokens
    return found


def cached(g, n, tokens, channels, axis):
    width, out = channels, 2 * GROUP * n["d"]
    Q = torch.randn(n["b"], n["g"] * n["r"], width, generator=g)
    K = torch.randn(n["b"], n["g"], tokens, width, generator=g)
    V = torch.randn(n["b"], n["g"], tokens, out, generator=g)
    return Q, *quantized(K, axis), *quantized(V, -1), lengths(g, n, tokens)


def show(folder):
    n = {"b": 1, "g": 2, "r": 4, "p": 512, "m": 16, "e": 128, "f": 128}
    g = torch.Generator().manual_seed(0)
    Q, K, V = common.prompt(g, n, "m")
    loud = torch.randperm(n["e"], generator=g)[:4]
    L = torch.tensor([n["p"]], dtype=torch.int32)
    lines = ["| keys | groups | bytes a token and head | error of the output | of 64 heaviest tokens the same |", "|---|---|---|---|---|"]
    rows = []
    for name, factor in (("normal", 1.0), ("4 loud channels", 8.0)):
        keys, queries = K.clone(), Q / 1.0
        keys[..., loud] *= factor
        queries[..., loud] /= factor
        exact = [attended(queries[:, :, i], keys, V, L) for i in range(n["m"])]
        heavy = sum(score for _, score in exact)
        if factor == 1.0:
            rows.append(("f32", heavy[0, 0], heavy[0, 0].topk(64).indices))
        for along, kernel, axis in (("channels", decode, -1), ("tokens", decode_by_channel, -2)):
            cache = (*quantized(keys, axis), *quantized(V, -1))
            found = [kernel(queries[:, :, i].contiguous(), *cache, L) for i in range(n["m"])]
            error = sum(float((x - y).norm() / y.norm()) for (x, _), (y, _) in zip(found, exact, strict=True)) / n["m"]
            score = sum(score for _, score in found)
            chosen, wanted = ({(h, i) for h in range(n["g"]) for i in x[0, h].topk(64).indices.tolist()} for x in (score, heavy))
            size = sum(t.numel() * t.element_size() for t in cache) // (n["g"] * n["p"])
            lines.append(f"| {name} | along the {along} | {size} | {error:.3f} | {len(chosen & wanted) / len(wanted):.0%} |")
            if factor != 1.0:
                rows.append((f"loud, {along}", score[0, 0], score[0, 0].topk(64).indices))
    common.draw(folder / "int4_h2o.png", "Attention received over 16 steps, keys in f32 and in four bits; the 64 heaviest", rows)
    return lines


RECIPE = Recipe(
    name="int4_h2o",
    title="Decode over int4 keys and values that also returns the H2O score of every cached token",
    source="2306.14048 for the score; KIVI, 2402.02750, for keys by channel and values by token",
    steps=(
        Step(
            name="groups along the channels",
            kernel=decode,
            oracle=decode_oracle,
            inputs=lambda g, n: cached(g, n, n["p"], 2 * GROUP * n["c"], -1),
            sizes={"b": 1, "g": 8, "r": 4, "p": 1024, "c": 2, "d": 2},
            ranges={"b": (1, 3), "g": (1, 3), "r": (1, 4), "p": (1, 71), "c": (1, 2), "d": (1, 2)},
        ),
        Step(
            name="keys by channel",
            kernel=decode_by_channel,
            oracle=decode_by_channel_oracle,
            inputs=lambda g, n: cached(g, n, GROUP * n["n"], 2 * n["x"], -2),
            sizes={"b": 1, "g": 8, "r": 4, "n": 32, "x": 64, "d": 2},
            ranges={"b": (1, 3), "g": (1, 3), "r": (1, 4), "n": (1, 4), "x": (1, 37), "d": (1, 2)},
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
