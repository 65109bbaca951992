"""Cascades of every kind that must lower, small: norms, products, moments, divergences, windows, blocks, gathers, several kernels.

Each is a traced function with the extents to try it at; `VARIETY` maps its name to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import einfall as ef
import torch
from einfall.compiler.trace import trace

INF = float("inf")
VARIETY: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    function: Callable
    sizes: dict[str, int]
    types: dict[str, ef.DType] = field(default_factory=dict)

    def cascade(self) -> ef.Cascade:
        names = [n for n in self.function.__annotations__ if n != "return"]
        return trace(self.function, dtypes={n: self.types.get(n, ef.f32) for n in names})

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {t.name: self._tensor(t, generator) for t in self.cascade().inputs}

    def _tensor(self, t, generator) -> torch.Tensor:
        shape = [math.prod(self.sizes[r] for r in axis) for axis in t.axes]
        if t.dtype.is_integer:
            return torch.randint(0, 9, shape, generator=generator).to(torch.int32 if t.dtype == ef.i32 else torch.int8)
        if t.dtype == ef.boolean:
            return torch.rand(shape, generator=generator) > 0.4
        return torch.randn(shape, generator=generator)


def cascade(sizes: dict[str, int], types: dict[str, ef.DType] | None = None) -> Callable:
    def register(function: Callable) -> Callable:
        VARIETY[function.__name__] = Entry(function, sizes, types or {})
        return function

    return register


@cascade({"m": 37, "e": 96})
def layernorm(X: "m e", G: "e", B: "e") -> "m e":
    C = X - X.mean("e")
    return C * ef.rsqrt((C * C).mean("e") + 1e-5) * G + B


@cascade({"m": 5, "p": 300})
def softmax_out(X: "m p") -> "m p":
    return ef.softmax(X, "p")


@cascade({"m": 5, "p": 300})
def softmax_bwd(X: "m p", D: "m p") -> "m p":
    P = ef.softmax(X, "p")
    return P * (D - (P * D).sum("p"))


@cascade({"m": 33, "k": 70, "n": 65})
def matmul(A: "m k", B: "k n") -> "m n":
    return (A * B).sum("k")


@cascade({"b": 3, "m": 33, "k": 70, "n": 65})
def bmm_gelu(A: "b m k", B: "b n k", C: "n") -> "b m n":
    Y = (A * B).sum("k") + C
    return 0.5 * Y * (1 + ef.tanh(0.79788456 * (Y + 0.044715 * Y * Y * Y)))


@cascade({"m": 9, "k": 70, "n": 65, "q": 20})
def mlp_gate(X: "m k", U: "k n", V: "k n", W: "n q") -> "m q":
    A = (X * U).sum("k")
    B = (X * V).sum("k")
    H = A * ef.sigmoid(A) * B
    return (H * W).sum("n")


@cascade({"m": 17, "p": 23, "e": 16, "f": 8})
def h2o(Q: "m e", K: "p e", V: "p f") -> ("m f", "p"):
    P = ef.softmax((Q * K).sum("e"), "p")
    O = (P * V).sum("p")
    C = P.sum("m")
    return O, C


@cascade({"m": 7, "n": 9, "j": 32})
def quant(X: "m (n j=32)") -> ("m (n j)", "m n"):
    A = ef.maximum(ef.abs(X).max("j"), 1e-8) / 127.0
    Q = ef.minimum(ef.maximum(ef.round(X / A), -127.0), 127.0).to(ef.i8)
    return Q, A


@cascade(
    {"m": 7, "p": 40, "w": 5},
)
def pool(X: "m p") -> "m p":
    return X.at(p=ef.index("p") + ef.index("w", size=5) - 2, fill=0.0).sum("w") / 5.0


@cascade({"b": 2, "m": 11, "e": 16})
def rope(X: "b m e") -> "b m e":
    return ef.rope(X, over="e", position="m")


@cascade({"m": 7, "p": 40, "q": 6})
def var2(X: "m p q") -> "m":
    C = X - X.mean("p q")
    return (C * C).mean("p q")


@cascade({"m": 7, "p": 40})
def misc(X: "m p") -> ("m", "m", "m", "m", "m"):
    return X.argmin("p"), (X * 0.1 + 1.0).prod("p"), (X > 1.5).any("p"), (X > -3.0).all("p"), X.min("p")


@cascade({"m": 7, "p": 40})
def kl(X: "m p", Y: "m p") -> "m":
    A = X - ef.logsumexp(X, "p")
    B = Y - ef.logsumexp(Y, "p")
    return (ef.exp(A) * (A - B)).sum("p")


@cascade({"m": 7, "p": 40})
def entropy(X: "m p") -> "m":
    P = ef.softmax(X, "p")
    return -(P * ef.log(P)).sum("p")


@cascade({"m": 7, "p": 40})
def kurtosis(X: "m p") -> "m":
    C = X - X.mean("p")
    V = (C * C).mean("p")
    return (C * C * C * C).mean("p") / (V * V)


@cascade({"m": 7, "p": 40})
def pearson(X: "m p", Y: "m p") -> "m":
    A = X - X.mean("p")
    B = Y - Y.mean("p")
    return (A * B).sum("p") * ef.rsqrt((A * A).sum("p")) * ef.rsqrt((B * B).sum("p"))


@cascade({"m": 9, "p": 40, "e": 8, "f": 8})
def attnvar(Q: "m e", K: "p e", V: "p f") -> ("m f", "m f"):
    P = ef.softmax((Q * K).sum("e"), "p")
    A = (P * V).sum("p")
    C = V - A
    B = (P * C * C).sum("p")
    return A, B


@cascade({"h": 3, "g": 3, "m": 9, "p": 40, "e": 8, "f": 8})
def talking(Q: "h m e", K: "h p e", V: "g p f", T: "h g") -> "g m f":
    S = ((Q * K).sum("e") * T).sum("h")
    return (ef.softmax(S, "p") * V).sum("p")


@cascade({"b": 2, "m": 9, "p": 40, "e": 8, "f": 8})
def linear_attn(Q: "b m e", K: "b p e", V: "b p f") -> "b m f":
    S = (K * V).sum("p")
    N = K.sum("p")
    return (Q * S).sum("e") / (Q * N).sum("e")


@cascade({"m": 9, "n": 40})
def rowcol(X: "m n") -> "m n":
    return X / ef.abs(X).sum("m") / ef.abs(X).sum("n")


@cascade({"m": 9, "n": 40})
def transpose(X: "m n") -> "n m":
    return X * 2.0


@cascade({"m": 6, "n": 4, "k": 8})
def total(X: "m n k") -> "":
    return X.sum("m n k")


@cascade({"m": 9, "p": 40}, types={"I": ef.i32})
def gathered(X: "m p", I: "m") -> "m":
    P = ef.softmax(X, "p")
    return P.at(p=I)


@cascade({"b": 2, "m": 9, "p": 40, "e": 8, "f": 8}, types={"M": ef.boolean})
def boolmask(Q: "b m e", K: "b p e", V: "b p f", M: "b p") -> "b m f":
    S = ef.where(M, (Q * K).sum("e"), -INF)
    return (ef.softmax(S, "p") * V).sum("p")


@cascade({"b": 2, "m": 9, "p": 40, "e": 8, "f": 8})
def biased(Q: "b m e", K: "b p e", V: "b p f", B: "m p") -> "b m f":
    S = (Q * K).sum("e") + B
    return (ef.softmax(S, "p") * V).sum("p")


@cascade({"m": 9, "p": 40, "f": 8}, types={"X": ef.i8, "W": ef.i8})
def int8dot(X: "m p", W: "p f", A: "m", B: "f") -> "m f":
    return (X * W).sum("p").to(ef.f32) * A * B


@cascade({"m": 9, "p": 40, "f": 8}, types={"W": ef.i8})
def w8(X: "m p", W: "p f", B: "f") -> "m f":
    return (X * W.to(ef.f32)).sum("p") * B


@cascade({"m": 9})
def elem(X: "m", Y: "m") -> "m":
    return ef.where(X > Y, ef.sin(X), ef.cos(Y)) ** 2


@cascade({"m": 9, "p": 33})
def groupnorm_like(X: "m p") -> ("m p", "m"):
    A = X.mean("p")
    return X - A, A


@cascade({"t": 9, "v": 100}, types={"Y": ef.i32})
def nll_topmargin(L: "t v", Y: "t") -> "t":
    M = L.max("v")
    return M - L.at(v=Y)


@cascade({"m": 12, "p": 12, "e": 4})
def shifted(X: "m e") -> "m e":
    return X - X.shift(m=-1, fill=0.0)


@cascade({"m": 12, "p": 30, "e": 4})
def decay(Q: "m e", K: "p e", V: "p") -> "m":
    D = ef.exp((ef.index("p") - ef.index("m")).to(ef.f32) * 0.1)
    return ((Q * K).sum("e") * D * V).where(ef.index("p") <= ef.index("m")).sum("p")


@cascade({"b": 3, "h": 2, "m": 4, "e": 16, "f": 8, "s": 21, "t": 7})
def prefix_suffix(Q: "b h m e", A: "h s e", B: "h s f", C: "b h t e", D: "b h t f") -> "b h m f":
    K = ef.concat(A, C, rank="p", parts=("s", "t"))
    V = ef.concat(B, D, rank="p", parts=("s", "t"))
    S = (Q * K).sum("e") * 0.25
    S = S.where(ef.index("p") <= ef.index("m") * 9)  # in some rows a whole piece is masked
    return (ef.softmax(S, "p") * V).sum("p")


@cascade({"m": 5, "s": 21, "t": 1, "u": 40})
def moments_of_pieces(A: "m s", B: "t", C: "m u") -> ("m", "m", "m p"):
    X = ef.concat(A, B + 3.0, C * 2.0, rank="p", parts=("s", "t", "u"))
    U = X.mean("p")
    Y = X - U
    return U, (Y * Y).mean("p"), Y * ef.rsqrt((Y * Y).mean("p") + 1e-3)


@cascade({"m": 5, "s": 21, "t": 6, "f": 8})
def neighbours_of_pieces(A: "m s", B: "m t") -> "m p":
    X = ef.concat(A, B, rank="p", parts=("s", "t"))
    return X - X.shift(p=-1, fill=0.0)


@cascade({"b": 2, "p": 33, "e": 8})
def kept(S: "b p", K: "b p e") -> ("b s e", "b s", "b s"):
    W, I = (S * 2.0 + 1.0).topk("p", k=6, into="s")
    return K.at(p=I), I, W


@cascade({"b": 2, "p": 33})
def ordered(S: "b p") -> ("b s", "b t", "b u", "b u"):
    A, _ = S.sort("p", into="s")
    B, _ = ef.softmax(S, "p").mass("p", 0.6, into="t")
    C, I = S.where(ef.index("p") > 4).threshold("p", 0.3, into="u")
    return A, B, C, I


@cascade({"b": 2, "p": 33, "i": 7}, types={"I": ef.i32})
def scans(X: "b p", Y: "b i=7", I: "b p") -> ("b p", "b i", "b", "b c", "b p"):
    A = (ef.abs(X) * 0.1).cumsum("p")
    N = (ef.abs(Y) < 1.0).to(ef.i32).cumprod("i", exclusive=True)
    H = X.scatter_add(p=I, into="c", size=6)
    return A, N, (A <= 1.0).sum("p"), H, X.cummax("p") * 2.0


@cascade({"m": 6, "p": 33, "e": 8, "h": 2})
def pooled(Q: "h m e", K: "h p e") -> "h p":
    C = ef.softmax((Q * K).sum("e"), "p").mean("m")
    return C.at(p=ef.index("p") + ef.index("w", size=5) - 2, fill=0.0).max("w")


@cascade({"m": 6, "p": 33})
def recurrent(X: "m p", A: "m") -> ("m", "m"):
    def step(x, y):
        return {"x": x * A * 0.1 + X, "y": ef.maximum(y, ef.abs(x).max("m"))}

    x, y = ef.iterate("p", init={"x": A, "y": 0.0}, step=step, until=lambda x, y: y > 2.5)
    return x, A * y


@cascade({"n": 6, "m": 9})
def power(X: "m n", V: "n") -> ("m", "n"):
    def step(v, u):
        w = (X * v).sum("n")
        z = (X * w).sum("m")
        return {"v": z * ef.rsqrt((z * z).sum("n")), "u": w}

    v, u = ef.iterate("i", init={"v": V, "u": 0.0}, step=step, size=4)
    return u, v
