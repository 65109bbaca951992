"""TriAttention: a key is scored by where it lies to the queries that will come, not to those that were (arXiv 2604.04921)."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import einfall as ef
import torch

from cookbook.eviction import common
from cookbook.recipe import Recipe, Step, serve

# What is known of a query head before anything is generated, from a calibration: C, the mean of its queries before rotation, pair by
# pair of channels a complex number (s = 0 the real part, 1 the imaginary one); R, the mean of their magnitudes. omega: the rotation of
# each pair, radians a token; c2: the square of what the rotary table scales it by; D: the future distances to average over.


def centre(C, omega, c2, D):
    """The real and the imaginary part, [g, r, f], of c2 * C * mean over d of exp(i * omega * D): the distances are gone from here on."""
    turn = D * omega
    x, y = ef.cos(turn).mean("d"), ef.sin(turn).mean("d")
    a, b = C.at(s=0), C.at(s=1)
    return c2 * (a * x - b * y), c2 * (a * y + b * x)


def magnitude(X):
    """The absolute values of complex numbers along s."""
    return ef.sqrt((X * X).sum("s"))


def best_head(X):
    """Scores [b, g, r, p] in standard deviations from the mean over the tokens, the best of the query heads of a group."""
    deviation = ef.maximum(ef.sqrt(ef.var(X, "p")), 1e-6)
    return ((X - X.mean("p")) / deviation).max("r")


@ef.kernel
def score(K: "b g p (s=2 f)", P: "b g p", T: "b", C: "g r (s f)", R: "g r f", omega: "f", c2: "f", D: "d") -> ("b g r p", "b g p"):
    """Scores of keys before rotation, by query head and by key head. P: their positions, T: the position of the next query."""
    u, v = centre(C, omega, c2, D)
    angle = (T - P).to(ef.f32) * omega
    x, y = K.at(s=0), K.at(s=1)
    near = u * (x * ef.cos(angle) + y * ef.sin(angle)) + v * (y * ef.cos(angle) - x * ef.sin(angle))
    spread = c2 * (R - magnitude(C)) * magnitude(K)
    X = (near + spread).sum("f")
    S = best_head(X)
    return X, S


@ef.kernel
def score_rotated(K: "b g p (s=2 f)", T: "b", C: "g r (s f)", R: "g r f", omega: "f", c2: "f", D: "d") -> ("b g r p", "b g p"):
    """The same of keys as a cache holds them, rotated to their positions: one vector for all of them, no angle a key, no position."""
    u, v = centre(C, omega, c2, D)
    angle = T.to(ef.f32) * omega
    x, y = u * ef.cos(angle) - v * ef.sin(angle), u * ef.sin(angle) + v * ef.cos(angle)
    spread = c2 * (R - magnitude(C)) * magnitude(K)
    X = (x * K.at(s=0) + y * K.at(s=1) + spread).sum("f")
    S = best_head(X)
    return X, S


# --- the oracle: the series as the paper writes it, an offset at a time ----------------------------------------------------------------
def score_oracle(k, position, now, mean, size, omega, scale, offsets):
    pairs = omega.shape[0]
    k, mean = (torch.complex(x[..., :pairs], x[..., pairs:]) for x in (k, mean))
    product = mean[None, :, :, None] * k[:, :, None].conj()
    amplitude, phase = product.abs(), product.angle()
    distance = (now[:, None, None] - position)[:, :, None, :, None]
    total = 0
    for offset in offsets:
        series = amplitude * torch.cos((distance + offset) * omega + phase)
        extra = (size - mean.abs())[None, :, :, None] * k.abs()[:, :, None]
        total = total + (scale * (series + extra)).sum(-1)
    result = total / len(offsets)
    normal = (result - result.mean(-1, keepdim=True)) / result.std(-1, correction=0, keepdim=True).clamp(min=1e-6)
    return result, normal.amax(2)


def score_rotated_oracle(k, now, *statistics):
    """Keys of position 0: the distance to the next query is then all that is left."""
    return score_oracle(k, torch.zeros(k.shape[:3], dtype=torch.int32), now, *statistics)


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def calibrated(g, n):
    """Keys, positions with gaps as after an eviction, the next position, and the statistics of concentrated queries."""
    b, heads, groups, p, f = n["b"], n["g"], n["r"], n["p"], n["f"]
    keys = torch.randn(b, heads, p, 2 * f, generator=g)
    now = 2 * p + torch.randint(1, 20, (b,), generator=g)
    positions = torch.rand(b, heads, 2 * p, generator=g).argsort(-1)[..., :p].sort(-1).values
    queries = 0.5 * torch.randn(256, heads, groups, 2 * f, generator=g) + torch.randn(heads, groups, 2 * f, generator=g)
    sizes = torch.complex(queries[..., :f], queries[..., f:]).abs().mean(0)
    omega = 10000.0 ** (-torch.arange(f) / f)
    scale = torch.full((f,), 1.1)
    offsets = 2.0 ** torch.arange(n["d"])
    return keys, positions.int(), now.int(), queries.mean(0), sizes, omega, scale, offsets


def rotated(g, n):
    keys, _, now, *statistics = calibrated(g, n)
    return keys, now, *statistics


def turned(x, position, omega):
    """x [..., (s f)] rotated to its position."""
    angle = position[..., None] * omega
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def alike(x, y):
    """The correlation of the ranks of two lists."""
    ranks = torch.stack([x, y]).argsort(-1).argsort(-1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def show(folder):
    n = {"b": 1, "g": 1, "r": 1, "p": 512, "f": 32, "d": 8}
    g = torch.Generator().manual_seed(0)
    lines = ["| spread of the queries | score | the last 16 queries | norm of the key |", "|---|---|---|---|"]
    K, *_, omega, scale, D = calibrated(g, n)
    K *= 0.5 + torch.rand(1, 1, n["p"], 1, generator=g)
    scale = torch.ones_like(scale)
    P, T = torch.arange(n["p"], dtype=torch.int32)[None, None], torch.tensor([n["p"]], dtype=torch.int32)
    middle = 2 * torch.randn(64, generator=g)
    rows = []
    for spread in (0.25, 1.0, 4.0):
        queries = middle + spread * torch.randn(4096, 64, generator=g)
        sizes = queries.unflatten(-1, (2, -1)).norm(dim=-2).mean(0)
        _, S = score(K, P, T, queries.mean(0)[None, None], sizes[None, None], omega, scale, D)
        cache = turned(K[0, 0], P[0, 0], omega)
        times = torch.arange(496, 512), torch.arange(513, 641)
        past, future = (torch.softmax(turned(queries[at], at, omega) @ cache.T / 8, -1).mean(0) for at in times)
        figures = (alike(x, future) for x in (S[0, 0], past, K[0, 0].norm(dim=-1)))
        lines.append(f"| {spread} | " + " | ".join(f"{x:.2f}" for x in figures) + " |")
        rows.append((f"spread {spread}", S[0, 0], S[0, 0].topk(64).indices))
    common.draw(folder / "triattention.png", "TriAttention: scores of 512 keys, and the 64 highest", rows, log=False)
    return lines


RANGES = {"b": (1, 2), "g": (1, 3), "r": (1, 3), "p": (2, 97), "f": (1, 33), "d": (1, 9)}
SIZES = {"b": 1, "g": 4, "r": 2, "p": 512, "f": 32, "d": 17}

RECIPE = Recipe(
    name="triattention",
    title="TriAttention: keys scored by the trigonometric series of their distance to the queries to come",
    source="2604.04921, read from the authors' code (WeianMao/triattention); the folding of the offsets is 2607.13051",
    steps=(
        Step(name="score", kernel=score, oracle=score_oracle, inputs=calibrated, sizes=SIZES, ranges=RANGES, tolerance=2e-4),
        Step(
            name="score of a rotated cache",
            kernel=score_rotated,
            oracle=score_rotated_oracle,
            inputs=rotated,
            sizes=SIZES,
            ranges=RANGES,
            tolerance=2e-4,
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
