"""Cascades that appear nowhere in the package, as a user would write them, each with an eager PyTorch oracle written apart from it.

`CASES` is what the derivation, the lowering and every backend are held against: every one must take a single pass over its reduced
rank. `sizes` gives a small shape; `reduced` names the rank that is streamed; `lengths` names inputs that must hold whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import einfall as ef
import torch
from einfall.compiler.trace import trace

INF = float("inf")


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable
    oracle: Callable
    reduced: str
    sizes: dict[str, int]
    scalars: dict[str, float] = field(default_factory=dict)
    integers: dict[str, str] = field(default_factory=dict)  # input -> rank whose extent bounds its values
    positive: tuple[str, ...] = ()
    kernels: int = 1


def _softmax_sum(S, V):
    return torch.softmax(S, -1) @ V


def plain(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


def plain_oracle(Q, K, V, scale):
    return _softmax_sum(Q @ K.mT * scale, V)


def causal(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = ef.where(ef.index("p") <= ef.index("m"), (Q * K).sum("e") * scale, -INF)
    return (ef.softmax(S, over="p") * V).sum("p")


def _positions(Q, K):
    return torch.arange(Q.shape[-2])[:, None], torch.arange(K.shape[-2])[None, :]


def causal_oracle(Q, K, V, scale):
    m, p = _positions(Q, K)
    return _softmax_sum((Q @ K.mT * scale).masked_fill(p > m, -INF), V)


def window(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    near = (ef.index("p") <= ef.index("m")) & (ef.index("p") > ef.index("m") - 5)
    S = ((Q * K).sum("e") * scale).where(near)
    return (ef.softmax(S, over="p") * V).sum("p")


def window_oracle(Q, K, V, scale):
    m, p = _positions(Q, K)
    return _softmax_sum((Q @ K.mT * scale).masked_fill((p > m) | (p <= m - 5), -INF), V)


def alibi(Q: "b h m e", K: "b h p e", V: "b h p f", A: h, *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale + A * (ef.index("p") - ef.index("m"))
    return (ef.softmax(S, over="p") * V).sum("p")


def alibi_oracle(Q, K, V, A, scale):
    m, p = _positions(Q, K)
    return _softmax_sum(Q @ K.mT * scale + A[:, None, None] * (p - m).to(Q.dtype), V)


def softcap(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float, cap: float) -> "b h m f":
    S = ef.tanh((Q * K).sum("e") * scale / cap) * cap
    return (ef.softmax(S, over="p") * V).sum("p")


def softcap_oracle(Q, K, V, scale, cap):
    return _softmax_sum(torch.tanh(Q @ K.mT * scale / cap) * cap, V)


def sink(Q: "b h m e", K: "b h p e", V: "b h p f", Z: h, *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale
    M = ef.maximum(S.max("p"), Z)
    N = ef.exp(S - M)
    D = N.sum("p") + ef.exp(Z - M)
    return (N / D * V).sum("p")


def sink_oracle(Q, K, V, Z, scale):
    S = Q @ K.mT * scale
    with_sink = torch.cat([S, Z[None, :, None, None].expand(*S.shape[:3], 1)], -1)
    return torch.softmax(with_sink, -1)[..., :-1] @ V


def grouped(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float) -> "b (g r) m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


def grouped_oracle(Q, K, V, scale):
    r = Q.shape[1] // K.shape[1]
    return plain_oracle(Q, K.repeat_interleave(r, 1), V.repeat_interleave(r, 1), scale)


def ragged(Q: "b h m e", K: "b h p e", V: "b h p f", L: b, *, scale: float) -> "b h m f":
    S = ((Q * K).sum("e") * scale).where(ef.index("p") < L)
    return (ef.softmax(S, over="p") * V).sum("p")


def ragged_oracle(Q, K, V, L, scale):
    p = torch.arange(K.shape[-2])
    return _softmax_sum((Q @ K.mT * scale).masked_fill(p[None, None, None, :] >= L[:, None, None, None], -INF), V)


def sigmoid_weights(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float, bias: float) -> "b h m f":
    W = ef.sigmoid((Q * K).sum("e") * scale + bias)
    return (W * V).sum("p")


def sigmoid_oracle(Q, K, V, scale, bias):
    return torch.sigmoid(Q @ K.mT * scale + bias) @ V


def log_sum_exp(X: "m p") -> m:
    return ef.logsumexp(X, over="p")


def log_sum_exp_oracle(X):
    return torch.logsumexp(X, -1)


def cross_entropy(X: "t e", W: "v e", Y: t) -> t:
    Z = (X * W).sum("e")
    return ef.logsumexp(Z, over="v") - Z.at(v=Y)


def cross_entropy_oracle(X, W, Y):
    return torch.nn.functional.cross_entropy(X @ W.mT, Y.long(), reduction="none")


def rms_matmul(X: "m e", G: e, W: "e n", *, eps: float) -> "m n":
    R = ef.rsqrt((X * X).mean("e") + eps)
    return (X * R * G * W).sum("e")


def rms_matmul_oracle(X, G, W, eps):
    return (X * torch.rsqrt((X * X).mean(-1, keepdim=True) + eps) * G) @ W


def layer_matmul(X: "m e", G: e, W: "e n", *, eps: float) -> "m n":
    C = X - X.mean("e")
    R = ef.rsqrt((C * C).mean("e") + eps)
    return (C * R * G * W).sum("e")


def layer_matmul_oracle(X, G, W, eps):
    return torch.nn.functional.layer_norm(X, X.shape[-1:], G, None, eps) @ W


def mean_variance(X: "m p") -> ("m", "m"):
    A = X.mean("p")
    C = X - A
    B = (C * C).mean("p")
    return A, B


def mean_variance_oracle(X):
    return X.mean(-1), X.var(-1, unbiased=False)


def temperature_average(X: "m p", V: "m p f", T: m) -> "m f":
    return (ef.softmax(X * T, over="p") * V).sum("p")


def temperature_average_oracle(X, V, T):
    return (torch.softmax(X * T[:, None], -1)[..., None] * V).sum(1)


def best(X: "m p") -> ("m", "m"):
    A = X.max("p")
    I = X.argmax("p")
    return A, I


def best_oracle(X):
    return X.max(-1).values, X.argmax(-1).to(torch.int32)


_ATTENTION = {"b": 2, "h": 3, "m": 37, "p": 53, "e": 16, "f": 24}
_SCALE = {"scale": 0.25}

CASES = (
    Case("plain", plain, plain_oracle, "p", _ATTENTION, _SCALE),
    Case("causal", causal, causal_oracle, "p", {**_ATTENTION, "p": 37}, _SCALE),
    Case("window", window, window_oracle, "p", {**_ATTENTION, "p": 37}, _SCALE),
    Case("alibi", alibi, alibi_oracle, "p", _ATTENTION, _SCALE),
    Case("softcap", softcap, softcap_oracle, "p", _ATTENTION, {**_SCALE, "cap": 2.0}),
    Case("sink", sink, sink_oracle, "p", _ATTENTION, _SCALE),
    Case("grouped", grouped, grouped_oracle, "p", {"b": 2, "g": 2, "r": 3, "m": 5, "p": 53, "e": 16, "f": 24}, _SCALE),
    Case("ragged", ragged, ragged_oracle, "p", _ATTENTION, _SCALE, integers={"L": "p"}),
    Case("sigmoid_weights", sigmoid_weights, sigmoid_oracle, "p", _ATTENTION, {**_SCALE, "bias": -math.log(53)}),
    Case("log_sum_exp", log_sum_exp, log_sum_exp_oracle, "p", {"m": 13, "p": 211}),
    Case("cross_entropy", cross_entropy, cross_entropy_oracle, "v", {"t": 19, "e": 24, "v": 211}, integers={"Y": "v"}),
    Case("rms_matmul", rms_matmul, rms_matmul_oracle, "e", {"m": 19, "e": 149, "n": 65}, {"eps": 1e-5}),
    Case("layer_matmul", layer_matmul, layer_matmul_oracle, "e", {"m": 19, "e": 149, "n": 65}, {"eps": 1e-5}),
    Case("mean_variance", mean_variance, mean_variance_oracle, "p", {"m": 13, "p": 211}),
    Case("temperature_average", temperature_average, temperature_average_oracle, "p", {"m": 7, "p": 101, "f": 9}, positive=("T",)),
    Case("best", best, best_oracle, "p", {"m": 13, "p": 211}),
)


def traced(case: Case, dtype: ef.DType = ef.f32) -> ef.Cascade:
    """The case's cascade, its float inputs of type `dtype`."""
    names = [n for n in case.function.__annotations__ if n not in ("return", *case.scalars)]
    return trace(case.function, dtypes={n: ef.i32 if n in case.integers else dtype for n in names})


def make_inputs(case: Case, sizes: dict[str, int], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Fresh tensors for a case at extents `sizes`: normal values, whole numbers below an extent, or positive ones."""
    generator = torch.Generator().manual_seed(seed)
    cascade = traced(case)
    tensors = {}
    for tensor in cascade.inputs:
        shape = [math.prod(sizes[r] for r in axis) for axis in tensor.axes]
        if tensor.name in case.integers:
            high = max(1, sizes[case.integers[tensor.name]])
            tensors[tensor.name] = torch.randint(0, high, shape, generator=generator, dtype=torch.int32)
            continue
        values = torch.randn(shape, generator=generator, dtype=torch.float32)
        tensors[tensor.name] = (values.abs() + 0.5 if tensor.name in case.positive else values).to(dtype)
    return tensors
