"""Keys and values in four bits with a scale and a zero point for every 32 channels, and a decode that reads nothing else."""

import math
import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.quantization import common
from cookbook.quantization.common import GROUP, dequantize, pack, unpack
from cookbook.recipe import Recipe, Step, serve

# Channels are (half, group, place): byte x of a token holds channel x in its low and channel x + E/2 in its high nibble.


@ef.kernel
def quantize(X: "b g p (s=2 c j=32)") -> ("b g p (c j)", "b g p (s c)", "b g p (s c)"):
    """Four bits a value, written as packed bytes, and f16 scales and zero points."""
    C, S, Z = common.quantize(X, over="j")
    P = pack(C, half="s")
    return P, S, Z


@ef.kernel
def decode(
    Q: "b (g r) (s=2 c j=32)", Kp: "b g p (c j)", Ks: "b g p (s c)", Kz: "b g p (s c)",
    Vp: "b g p (d k=32)", Vs: "b g p (t=2 d)", Vz: "b g p (t d)", L: "b", *, scale: float,
) -> "b (g r) (t d k)":  # fmt: skip
    """One new token a sequence attends over the packed cache; L tokens of it are filled."""
    K = dequantize(unpack(Kp, half="s"), Ks, Kz)
    V = dequantize(unpack(Vp, half="t"), Vs, Vz)
    A = ((Q * K).sum("s c j") * scale).where(ef.index("p") < L)
    return (ef.softmax(A, over="p") * V).sum("p")


@ef.kernel
def fused(Q: "b (g r) (s=2 c j=32)", K: "b g p (s c j)", V: "b g p (t=2 d k=32)", *, scale: float) -> (
    "b (g r) (t d k)", "b g p (c j)", "b g p (s c)", "b g p (s c)", "b g p (d k)", "b g p (t d)", "b g p (t d)"
):  # fmt: skip
    """Quantizes keys and values and attends over what it stores."""
    Kc, Ks, Kz = common.quantize(K, over="j")
    Vc, Vs, Vz = common.quantize(V, over="k")
    A = (Q * dequantize(Kc, Ks, Kz)).sum("s c j") * scale
    O = (ef.softmax(A, over="p") * dequantize(Vc, Vs, Vz)).sum("p")
    Kp, Vp = pack(Kc, half="s"), pack(Vc, half="t")
    return O, Kp, Ks, Kz, Vp, Vs, Vz


# The oracles, on positions.


def quantize_oracle(X):
    """As the cascade does it: codes against the scale and the zero point that are stored."""
    groups = X.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    zero, scale = low.half(), ((high - low) / 15).half()
    bad = ~groups.isfinite().all(-1) | ~scale.isfinite() | ~zero.isfinite()
    divisor = torch.where(scale > 0, scale.to(X.dtype), 1)
    codes = ((groups - zero.to(X.dtype)[..., None]) / divisor[..., None]).round().clamp(0, 15)
    codes = codes.masked_fill(bad[..., None], 0).flatten(-2).to(torch.uint8)
    first, second = codes.chunk(2, -1)
    return first | second << 4, scale.masked_fill(bad, float("nan")), zero.masked_fill(bad, 0)


def unpacked(packed, scale, zero, dtype):
    """The numbers that packed bytes, scales and zero points stand for."""
    codes = torch.cat([packed & 15, packed >> 4], -1).unflatten(-1, (-1, GROUP)).to(dtype)
    return (codes * scale.to(dtype)[..., None] + zero.to(dtype)[..., None]).flatten(-2)


def attention(Q, K, V, L, scale):
    """Decode attention, head by head and only over the tokens that are there."""
    out = Q.new_zeros(*Q.shape[:2], V.shape[-1])
    shared = Q.shape[1] // K.shape[1]
    for i, n in enumerate(L.tolist()):
        for h in range(Q.shape[1]):
            if n:
                weights = torch.softmax(K[i, h // shared, :n] @ Q[i, h] * scale, -1)
                out[i, h] = weights @ V[i, h // shared, :n]
    return out


def decode_oracle(Q, Kp, Ks, Kz, Vp, Vs, Vz, L, *, scale):
    return attention(Q, unpacked(Kp, Ks, Kz, Q.dtype), unpacked(Vp, Vs, Vz, Q.dtype), L, scale)


def fused_oracle(Q, K, V, *, scale):
    keys, values = quantize_oracle(K), quantize_oracle(V)
    full = torch.full(Q.shape[:1], K.shape[2])
    return attention(Q, unpacked(*keys, Q.dtype), unpacked(*values, Q.dtype), full, scale), *keys, *values


# Inputs. `c` and `d` are groups in half of the channels.


def quantize_inputs(generator, n):
    return (common.outlying(generator, n["b"], n["g"], n["p"], 2 * n["c"] * GROUP),)


def decode_inputs(generator, n):
    e, f = 2 * n["c"] * GROUP, 2 * n["d"] * GROUP
    Q = torch.randn(n["b"], n["g"] * n["r"], e, generator=generator)
    keys = quantize_oracle(torch.randn(n["b"], n["g"], n["p"], e, generator=generator))
    values = quantize_oracle(torch.randn(n["b"], n["g"], n["p"], f, generator=generator))
    L = torch.randint(0, n["p"] + 1, (n["b"],), generator=generator, dtype=torch.int32)
    L[0] = n["p"]
    return Q, *keys, *values, L


def fused_inputs(generator, n):
    """Values whose codes do not hang on a rounding error, for the oracle decides in float64."""
    e, f = 2 * n["c"] * GROUP, 2 * n["d"] * GROUP
    Q = torch.randn(n["b"], n["g"] * n["r"], e, generator=generator) / 4
    return Q, common.lattice(generator, n["b"], n["g"], n["p"], e), common.lattice(generator, n["b"], n["g"], n["p"], f)


def show(folder):
    """What four bits cost: errors of keys, values and the result, groups laid along the channels and along the tokens."""
    generator = torch.Generator().manual_seed(0)
    b, g, r, p, e = 1, 2, 4, 512, 128
    Q = torch.randn(b, g * r, e, generator=generator)
    V = torch.randn(b, g, p, e, generator=generator)
    L = torch.full((b,), p)
    lines = ["| keys | groups of 32 | bytes a token and head | keys' error | values' error | result's error |", "|---|---|---|---|---|---|"]
    for name, K in (("normal", torch.randn(b, g, p, e, generator=generator)), ("4 loud channels", common.outlying(generator, b, g, p, e))):
        true = attention(Q, K, V, L, 1 / math.sqrt(e))
        for along in ("channels", "tokens"):
            turned = K if along == "channels" else K.mT.contiguous()
            packed, values = quantize.reference(turned), quantize.reference(V)
            K4, V4 = unpacked(*packed, torch.float32), unpacked(*values, torch.float32)
            K4 = K4 if along == "channels" else K4.mT
            size = sum(t.numel() * t.element_size() for t in (*packed, *values)) / (b * g * p)
            errors = common.relative(K4, K), common.relative(V4, V), common.relative(attention(Q, K4, V4, L, 1 / math.sqrt(e)), true)
            lines.append(f"| {name} | along the {along} | {size:.0f} | " + " | ".join(f"{x:.3f}" for x in errors) + " |")
    lines.append("")
    lines.append(f"Keys and values in bf16 are {4 * e} bytes a token and head. The values' groups always lie along the channels.")
    return lines


SIZES = {"b": 2, "g": 2, "r": 4, "p": 96, "c": 2, "d": 2}
RANGES = {"b": (1, 3), "g": (1, 3), "r": (1, 4), "p": (1, 37), "c": (1, 3), "d": (1, 2)}

RECIPE = Recipe(
    name="int4_groups",
    title="int4 keys and values with a scale and a zero point per 32 channels, and the decode over them",
    source="KIVI (arXiv 2402.02750), section 3, with groups along the channels for keys and values alike",
    steps=(
        Step("quantize", quantize, quantize_oracle, quantize_inputs, {k: SIZES[k] for k in "bgpc"}, {k: RANGES[k] for k in "bgpc"},
             exact=True),
        Step("decode", decode, decode_oracle, decode_inputs, SIZES, RANGES, scalars={"scale": 0.125}),
        Step("quantize_and_decode", fused, fused_oracle, fused_inputs, SIZES, RANGES, scalars={"scale": 0.125}),
    ),
    show=show,
)  # fmt: skip

if __name__ == "__main__":
    serve(RECIPE)
