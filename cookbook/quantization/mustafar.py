"""Keys and values pruned token by token to their largest channels: bitmaps, packed values, and attention on that form."""

import math
import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.quantization.common import outlying, relative
from cookbook.recipe import Recipe, Step, serve

WORD = 32  # channels in a word of the bitmap; two words are a tile of 64


@ef.kernel
def compress(X: "b g p (w i=32)", *, k: int) -> ("b g p s", "b g p w"):
    """The k channels of largest magnitude of each token, in order of channel, and the bitmap that says which they are."""
    channels = X.join("w i", into="e")
    _, I = ef.abs(channels).topk("e", k=k, into="t")
    order, _ = (-I).sort("t", into="s")  # rising channels
    V = channels.at(e=-order)
    B = (1 << (I & 31)).scatter_add(t=I >> 5, into="w", size=ef.extent("w"))
    return V, B


def expand(V, B, slot, word, bit):
    """What bitmaps `B` and packed values `V` stand for: a channel's place is the number of bits before its own."""
    i = ef.index(bit, size=WORD)
    earlier = ef.popcount(B).rename(**{word: "u_" + word}).where(ef.index("u_" + word) < ef.index(word))
    place = earlier.sum("u_" + word) + ef.popcount(B & ((1 << i) - 1))
    return ef.where((B >> i & 1) == 1, V.at(**{slot: place}), 0.0)


@ef.kernel
def decode(
    Q: "b (g r) (w i=32)", Kv: "b g p s", Kb: "b g p w", Vv: "b g p t", Vb: "b g p v", L: "b", *, scale: float
) -> "b (g r) (v j)":  # fmt: skip
    """One new token a sequence attends over L compressed tokens."""
    K = expand(Kv, Kb, slot="s", word="w", bit="i")
    V = expand(Vv, Vb, slot="t", word="v", bit="j")
    A = ((Q * K).sum("w i") * scale).where(ef.index("p") < L)
    return (ef.softmax(A, over="p") * V).sum("p")


# The oracles, on positions.


def compress_oracle(X, *, k):
    kept = X.abs().argsort(dim=-1, descending=True, stable=True)[..., :k].sort(-1).values
    mask = torch.zeros_like(X, dtype=torch.int64).scatter(-1, kept, 1).unflatten(-1, (-1, WORD))
    words = (mask << torch.arange(WORD)).sum(-1)
    return X.gather(-1, kept), torch.where(words >= 2**31, words - 2**32, words).int()


def expanded(values, bitmap):
    """The dense tensor: the values of a token fall into the places of its bits."""
    mask = (bitmap[..., None].long() >> torch.arange(WORD) & 1).bool().flatten(-2)
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask] = values.flatten()
    return dense


def attention(Q, K, V, L, scale):
    """Decode attention over the first L tokens of each sequence, one at a time."""
    out = Q.new_zeros(*Q.shape[:2], V.shape[-1])
    shared = Q.shape[1] // K.shape[1]
    for i, n in enumerate(L.tolist()):
        if n:
            keys, values = (t[i, :, :n].repeat_interleave(shared, 0) for t in (K, V))
            out[i] = (torch.softmax(Q[i, :, None] @ keys.mT * scale, -1) @ values)[:, 0]
    return out


def decode_oracle(Q, Kv, Kb, Vv, Vb, L, *, scale):
    return attention(Q, expanded(Kv, Kb), expanded(Vv, Vb), L, scale)


# Inputs.


def compress_inputs(generator, n):
    return (torch.randn(n["b"], n["g"], n["p"], n["w"] * WORD, generator=generator),)


def decode_inputs(generator, n):
    e, f = n["w"] * WORD, n["v"] * WORD
    Q = torch.randn(n["b"], n["g"] * n["r"], e, generator=generator)
    K, V = (torch.randn(n["b"], n["g"], n["p"], size, generator=generator) for size in (e, f))
    L = torch.randint(0, n["p"] + 1, (n["b"],), generator=generator, dtype=torch.int32)
    return Q, *compress_oracle(K, k=n["s"]), *compress_oracle(V, k=n["t"]), L


def show(folder):
    """Bytes a token and errors, by how much is pruned."""
    generator = torch.Generator().manual_seed(0)
    b, g, r, p, e = 1, 2, 4, 512, 128
    Q = torch.randn(b, g * r, e, generator=generator)
    K, V = outlying(generator, b, g, p, e), torch.randn(b, g, p, e, generator=generator)
    L = torch.full((b,), p, dtype=torch.int32)
    true = attention(Q, K, V, L, 1 / math.sqrt(e))
    lines = ["| pruned | channels kept | bytes a token and head | keys' error | values' error | result's error | only keys pruned |"]
    lines.append("|---|---|---|---|---|---|---|")
    for pruned in (0.0, 0.3, 0.5, 0.7, 0.8):
        k = round(e * (1 - pruned))
        keys, values = compress.reference(K, k=k), compress.reference(V, k=k)
        size = 2 * (2 * k + 4 * keys[1].shape[-1])  # values in bf16, words of four bytes
        K1, V1 = expanded(*keys), expanded(*values)
        both, only = (attention(Q, K1, v, L, 1 / math.sqrt(e)) for v in (V1, V))
        errors = relative(K1, K), relative(V1, V), relative(both, true), relative(only, true)
        lines.append(f"| {pruned:.0%} | {k} | {size} | " + " | ".join(f"{x:.3f}" for x in errors) + " |")
    return lines


SIZES = {"b": 2, "g": 2, "r": 4, "p": 96, "w": 4, "v": 4, "s": 48, "t": 64}
RANGES = {"b": (1, 3), "g": (1, 2), "r": (1, 3), "p": (1, 31), "w": (1, 5), "v": (1, 3), "s": (1, 31), "t": (1, 31)}

RECIPE = Recipe(
    name="mustafar",
    title="Per-token pruning of keys and values: bitmaps, packed values, attention on the compressed form",
    source="Mustafar (arXiv 2505.22913); the layout was compared with kernel/compression.py of github.com/dhjoo98/mustafar",
    steps=(
        Step("compress_half", compress, compress_oracle, compress_inputs, {r: SIZES[r] for r in "bgpw"}, {r: RANGES[r] for r in "bgpw"},
             static={"k": 16}, exact=True),
        Step("compress_all", compress, compress_oracle, compress_inputs, {r: SIZES[r] for r in "bgpw"}, {r: RANGES[r] for r in "bgpw"},
             static={"k": 32}, exact=True),
        Step("decode", decode, decode_oracle, decode_inputs, SIZES, RANGES, scalars={"scale": 0.125}),
    ),
    show=show,
)  # fmt: skip

if __name__ == "__main__":
    serve(RECIPE)
