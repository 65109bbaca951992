"""The kernels that are compared, as a user would write them."""

from __future__ import annotations

import einfall as ef


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
