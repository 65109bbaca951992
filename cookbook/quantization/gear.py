"""GEAR: four-bit groups, a few outliers of each token kept apart, and a low-rank correction of what the groups lose."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.quantization import common
from cookbook.quantization.common import GROUP, dequantize, pack, relative, unpack
from cookbook.quantization.int4_groups import quantize_oracle, unpacked
from cookbook.recipe import Recipe, Step, serve


def outliers(X, k):
    """The k largest and the k smallest channels of each token: values in f16, channels, and a mark on each of them."""
    channels = X.join("s c j", into="e")
    high, I = channels.topk("e", k=k, into="t")
    taken = ef.where(I >= 0, 1, 0).scatter_add(t=I, into="e")
    low, J = (-channels).where(taken == 0).topk("e", k=k, into="u")
    return ef.concat(high, -low, rank="o", parts="t u").to(ef.f16), ef.concat(I, J, rank="o", parts="t u")


def without(X, I):
    """X less its outliers. One that is not finite leaves a 0."""
    ones = ef.where(I >= 0, 1, 0).scatter_add(o=I, into="e", size=ef.extent("s") * ef.extent("c") * ef.extent("j"))
    rest = X - X.to(ef.f16)
    return ef.where(ones.split("e", into="s c j") > 0, ef.where(ef.isfinite(rest), rest, 0.0), X)


def orthonormal(Y):
    """The columns r of Y[n, r] by Gram and Schmidt, one a step; one of which nearly nothing is new becomes 0."""

    def step(U):
        y = Y - (U * (U * Y).sum("n")).sum("k")
        size = (y * y).sum("n")
        new = size > 1e-10 * (Y * Y).sum("n")
        return U + ef.where((column == ef.index("r")) & new, y * ef.rsqrt(size), 0.0)

    column = ef.index("k", size=ef.extent("r"))
    return ef.iterate("r", init=0.0 * column, step=step)


def low_rank(R, B, loops):
    """U with orthonormal columns and W so that U W^T is R in the space that `loops` power iterations from B lead to."""

    def step(B):
        A = (R * B).sum("s c j")
        B = (R * A).sum("n")
        size = (B * B).sum("s c j")
        return B * ef.where(size > 0.0, ef.rsqrt(size), 0.0)

    B = ef.iterate("l", init=B, step=step, size=loops)
    U = orthonormal((R * B).sum("s c j"))
    return U, (R * U).sum("n")


@ef.kernel
def compress(X: "b g n (s=2 c j=32)", *, k: int) -> ("b g n (c j)", "b g n (s c)", "b g n (s c)", "b g n o", "b g n o"):
    """X as packed codes, scales and zero points of its groups, and its outliers with their channels."""
    S, I = outliers(X, k)
    C, H, Z = common.quantize(without(X, I), over="j")
    P = pack(C, half="s")
    return P, H, Z, S, I


@ef.kernel
def correct(
    X: "b g n (s=2 c j=32)", P: "b g n (c j)", H: "b g n (s c)", Z: "b g n (s c)", I: "b g n o", B: "g (s c j) r", *, loops: int
) -> ("b g n k", "b g (s c j) k"):  # fmt: skip
    """The factors of what the groups lose, from the random start B. A group that reads as NaN has nothing to correct."""
    usable = ef.isfinite(H)
    R = ef.where(usable, without(X, I), 0.0) - dequantize(unpack(P, half="s"), ef.where(usable, H, 0.0), Z)
    U, W = low_rank(R, B, loops)
    return U, W


@ef.kernel
def scores(
    Q: "b (g h) (s=2 c j=32)", P: "b g n (c j)", H: "b g n (s c)", Z: "b g n (s c)", S: "b g n o", I: "b g n o",
    U: "b g n k", W: "b g (s c j) k", *, scale: float,
) -> "b (g h) n":  # fmt: skip
    """The scores of compressed keys: no key is put together again."""
    groups = (Q * dequantize(unpack(P, half="s"), H, Z)).sum("s c j")
    correction = ((Q * W).sum("s c j") * U).sum("k")
    apart = (Q.join("s c j", into="e").at(e=I) * S.to(ef.f32)).where(I >= 0).sum("o")
    return (groups + correction + apart) * scale


# The oracles, on positions.


def outliers_oracle(X, k):
    """Values and channels, the largest first, then the smallest from below."""
    high = X.argsort(dim=-1, descending=True, stable=True)[..., :k]
    low = X.scatter(-1, high, torch.inf).argsort(dim=-1, stable=True)[..., :k]
    I = torch.cat([high, low], -1)
    return X.gather(-1, I).half(), I


def low_rank_oracle(R, B, loops):
    """The authors' power iteration: plain products, orthogonal factors from QR at the end. Signs are chosen as Gram and Schmidt do."""
    for _ in range(loops):
        B = R.mT @ (R @ B)
        B = B / B.norm()
    found = torch.linalg.qr(R @ torch.linalg.qr(B).Q)
    first = torch.linalg.qr(B).R.diagonal(dim1=-2, dim2=-1).sign()  # the first QR may have turned columns over
    columns = found.Q.shape[-1]
    U = found.Q * (found.R.diagonal(dim1=-2, dim2=-1).sign() * first[..., :columns])[..., None, :]
    U = torch.nn.functional.pad(U, (0, B.shape[-1] - columns))
    return U, R.mT @ U


def without_oracle(X, I):
    """X, and at its outliers only what f16 loses of them."""
    rest = X - X.half().to(X.dtype)
    return X.scatter(-1, I, torch.where(rest.isfinite(), rest, 0).gather(-1, I))


def compress_oracle(X, *, k):
    S, I = outliers_oracle(X, k)
    return *quantize_oracle(without_oracle(X, I)), S, I.int()


def correct_oracle(X, P, H, Z, I, B, *, loops):
    R = without_oracle(X, I.long()) - unpacked(P, H, Z, X.dtype)
    return low_rank_oracle(R.nan_to_num(0.0), B, loops)


def decompressed(P, H, Z, S, I, U, W, dtype):
    """What the seven tensors stand for."""
    sparse = torch.zeros(*U.shape[:-1], W.shape[-2], dtype=dtype).scatter_add(-1, I.long(), S.to(dtype))
    return unpacked(P, H, Z, dtype) + (U.to(dtype) @ W.to(dtype).mT) + sparse


def scores_oracle(Q, P, H, Z, S, I, U, W, *, scale):
    K = decompressed(P, H, Z, S, I, U, W, Q.dtype)
    shared = Q.shape[1] // K.shape[1]
    return (K.repeat_interleave(shared, 1) @ Q[..., None])[..., 0] * scale


# Inputs.


def matrix(generator, n):
    """Normal values, a few of them far out."""
    shape = (n["b"], n["g"], n["n"], 2 * n["c"] * GROUP)
    far = torch.where(torch.rand(shape, generator=generator) < 0.02, 10.0, 1.0)
    return torch.randn(shape, generator=generator) * far


def start(generator, n):
    return torch.rand(n["g"], 2 * n["c"] * GROUP, n["r"], generator=generator)


def compress_inputs(generator, n):
    return (matrix(generator, n),)


def correct_inputs(generator, n):
    X = matrix(generator, n)
    P, H, Z, _, I = compress_oracle(X, k=2)
    return X, P, H, Z, I, start(generator, n)


def scores_inputs(generator, n):
    Q = torch.randn(n["b"], n["g"] * n["h"], 2 * n["c"] * GROUP, generator=generator)
    X, P, H, Z, I, B = correct_inputs(generator, n)
    return Q, P, H, Z, compress_oracle(X, k=2)[3], I, *correct_oracle(X, P, H, Z, I, B, loops=1)


def show(folder):
    """The error that each part leaves, of a matrix and of its scores."""
    generator = torch.Generator().manual_seed(0)
    n, e, k, r = 512, 128, 2, 4
    base = torch.randn(n, 6, generator=generator) @ torch.randn(6, e, generator=generator)
    spikes = torch.where(torch.rand(n, e, generator=generator) < 0.01, 15.0, 0.0) * torch.randn(n, e, generator=generator)
    X = (base + 0.5 * torch.randn(n, e, generator=generator) + spikes)[None, None]
    B, Q = torch.rand(1, e, r, generator=generator), torch.randn(64, e, generator=generator)
    P, H, Z, S, I = compress.reference(X, k=k)
    U, W = correct.reference(X, P, H, Z, I, B, loops=2)
    plain = unpacked(*quantize_oracle(X), X.dtype)
    U0, W0 = low_rank_oracle(X - plain, B, 2)
    apart = decompressed(P, H, Z, S, I, 0 * U, W, X.dtype)
    bits = 4 + 32 / GROUP
    sparse, factors = 2 * k * (16 + 8) / e, 16 * r * (n + e) / (n * e)  # f16 values and bytes for channels; factors in 16 bits
    rows = (
        ("groups alone", plain, bits),
        ("groups and outliers", apart, bits + sparse),
        ("groups and low rank", plain + U0 @ W0.mT, bits + factors),
        ("all three", decompressed(P, H, Z, S, I, U, W, X.dtype), bits + sparse + factors),
    )
    lines = ["| parts | bits a value | error | scores' error |", "|---|---|---|---|"]
    for name, found, size in rows:
        lines.append(f"| {name} | {size:.2f} | {relative(found, X):.4f} | {relative(Q @ found.mT, Q @ X.mT):.4f} |")
    return lines


SIZES = {"b": 2, "g": 2, "h": 4, "n": 96, "c": 2, "r": 4}
RANGES = {"b": (1, 3), "g": (1, 3), "h": (1, 4), "n": (1, 37), "c": (1, 2), "r": (1, 4)}

RECIPE = Recipe(
    name="gear",
    title="GEAR: four-bit groups, outliers kept apart, and a low-rank correction",
    source="GEAR (arXiv 2403.05527); the power iteration was compared with the authors' code",
    steps=(
        Step("compress", compress, compress_oracle, compress_inputs, {r: SIZES[r] for r in "bgnc"}, {r: RANGES[r] for r in "bgnc"},
             static={"k": 2}, exact=True),
        Step("correct", correct, correct_oracle, correct_inputs, {r: SIZES[r] for r in "bgncr"}, {r: RANGES[r] for r in "bgncr"},
             static={"loops": 1}, tolerance=1e-3),
        Step("scores", scores, scores_oracle, scores_inputs, SIZES, RANGES, scalars={"scale": 0.125}),
    ),
    show=show,
)  # fmt: skip

if __name__ == "__main__":
    serve(RECIPE)
