"""The kernels that are compared and that no recipe of the cookbook is.

Where a recipe is what a row is about (quantizers, verification, shared prefixes), the row imports it: what is timed is what users copy.
The decode steps are written here, because they are compared with each other: one differs from the next in its storage or in its second
result, and in nothing else.
"""

from __future__ import annotations

import einfall as ef

from cookbook.quantization.common import dequantize, unpack


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def causal_attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = ((Q * K).sum("e") * scale).where(ef.index("p") <= ef.index("m"))
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def grouped_attention(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float) -> "b (g r) m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def int8_attention(
    Q: "b (g r) m (c j=32)", K: "b g p (c j)", Ks: "b g p c", V: "b g p (d k=32)", Vs: "b g p d", *, scale: float
) -> "b (g r) m (d k)":  # fmt: skip
    """Keys and values as whole numbers with a scale for every 32 channels."""
    S = (Q * (K.to(ef.f32) * Ks.to(ef.f32))).sum("c j") * scale
    return (ef.softmax(S, over="p") * (V.to(ef.f32) * Vs.to(ef.f32))).sum("p").to(ef.bf16)


@ef.kernel
def int4_attention(
    Q: "b (g r) m (s=2 c j=32)", K: "b g p (c j)", Ks: "b g p (s c)", Kz: "b g p (s c)",
    V: "b g p (d k=32)", Vs: "b g p (t=2 d)", Vz: "b g p (t d)", *, scale: float,
) -> "b (g r) m (t d k)":  # fmt: skip
    """Scale and zero point for every 32 channels. Byte x holds channel x in its low and channel x + E/2 in its high nibble."""
    S = (Q * dequantize(unpack(K, half="s"), Ks, Kz)).sum("s c j") * scale
    return (ef.softmax(S, over="p") * dequantize(unpack(V, half="t"), Vs, Vz)).sum("p").to(ef.bf16)


@ef.kernel
def scored_attention(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float) -> ("b (g r) m f", "b g p"):
    """H2O's score as well: what attention each token received."""
    S = (Q * K).sum("e") * scale
    A = ef.softmax(S, over="p")
    O = (A * V).sum("p")
    C = A.sum("r m")
    return O, C


def last_queries(Q, K, scale):
    """Scores of the last m tokens, causal."""
    return ((Q * K).sum("e") * scale).where(ef.index("p") <= ef.index("m") + ef.extent("p") - ef.extent("m"))


@ef.kernel
def window_attention(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float) -> "b (g r) m f":
    """The last m tokens, causal."""
    return (ef.softmax(last_queries(Q, K, scale), over="p") * V).sum("p")


@ef.kernel
def voting_attention(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float, pool: int = 5) -> ("b (g r) m f", "b g p"):
    """SnapKV's score as well: the mean attention of the last m tokens to those before them, pooled over neighbours."""
    A = ef.softmax(last_queries(Q, K, scale), over="p")
    O = (A * V).sum("p")
    older = ef.index("p") < ef.extent("p") - ef.extent("m")
    C = ef.where(older, A.sum("r m") / (ef.extent("r") * ef.extent("m")), 0.0)
    W = ef.where(older, C.at(p=ef.index("p") + ef.index("c", size=pool) - pool // 2).sum("c") / pool, 0.0)
    return O, W


@ef.kernel
def quantize_int8(X: "t (c j=32)") -> ("t (c j)", "t c"):
    """Whole numbers -127 .. 127 and an f16 scale for every 32 of them; codes are taken against the scale that is stored."""
    S = (ef.abs(X).max("j") / 127.0).to(ef.f16)
    C = ef.minimum(ef.maximum(ef.round(X / ef.where(S > 0.0, S, 1.0)), -127.0), 127.0).to(ef.i8)
    return C, S


@ef.kernel
def log_sum_exp(X: "m p") -> "m":
    return ef.logsumexp(X, over="p")


@ef.kernel
def cross_entropy(X: "t e", W: "v e", Y: "t") -> "t":
    Z = (X * W).sum("e")
    return ef.logsumexp(Z, over="v") - Z.at(v=Y)


@ef.kernel
def rms_norm_matmul(X: "m e", G: "e", W: "e n", *, eps: float) -> "m n":
    R = ef.rsqrt((X * X).mean("e") + eps)
    return (X * R * G * W).sum("e")


@ef.kernel
def layer_norm_matmul(X: "m e", G: "e", W: "e n", *, eps: float) -> "m n":
    C = X - X.mean("e")
    R = ef.rsqrt((C * C).mean("e") + eps)
    return (C * R * G * W).sum("e")
