"""Speculative sampling: how many drafted tokens stand, and the token that follows them, in one kernel.

The draft model proposes k tokens x_i drawn from q_i; the target scores all of them at once, p_0 ... p_k. Token i is accepted if
u_i <= p_i(x_i) / q_i(x_i); n counts the tokens before the first rejection. The next token is drawn from the normalized positive part of
p_n - q_n, and from p_k where all drafts were accepted. What is emitted is distributed as if the target had sampled alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.recipe import Recipe, Step, serve


def first_above(W, over, u):
    """The first coordinate along `over` whose running sum of the weights W exceeds the share u of their total.

    A coordinate of weight 0 is never taken, not even where rounding has the total above the last running sum.
    """
    running = W.cumsum(over)
    last = ef.index(over).where(W > 0).max(over)
    return ef.minimum((running <= u * W.sum(over)).to(ef.i32).sum(over), last)


def verify(drafted, at, Q, X, U, R):
    """N and Y from the target's probabilities: `drafted` [b, i] those of the drafted tokens, `at(n)` [b, v] those of row n."""
    accept = drafted / Q.at(v=X) >= U
    N = accept.to(ef.i32).cumprod("i").sum("i")
    row = ef.minimum(N, ef.extent("i") - 1)
    D = ef.maximum(at(N) - ef.where(row == N, Q.at(i=row), 0.0), 0.0)
    Y = ef.where(D.sum("v") > 0, first_above(D, "v", R), X.at(i=row))  # p <= q everywhere: by rounding alone, and the draft stands
    return N, Y


@ef.kernel
def sample(P: "b t v", Q: "b i v", X: "b i", U: "b i", R: "b") -> ("b", "b"):
    """The accepted length N and the token Y after it; P has a row t = i for each draft and one row more, U and R are uniforms."""
    N, Y = verify(P.at(t=ef.index("i"), v=X, fill=None), lambda n: P.at(t=n), Q, X, U, R)
    return N, Y


@ef.kernel
def sample_logits(L: "b t v", Q: "b i v", X: "b i", U: "b i", R: "b", *, heat: float) -> ("b", "b"):
    """The same from the target's logits, heat = 1 / temperature: the statistics of every row, but probabilities of row N alone."""
    S = L * heat
    M = S.max("v")
    Z = ef.exp(S - M).sum("v")

    def probability(**where):
        """What the target gives to the tokens at these coordinates."""
        rows = {"t": where["t"]}
        return ef.exp(S.at(**where, fill=None) - M.at(**rows, fill=None)) / Z.at(**rows, fill=None)

    N, Y = verify(probability(t=ef.index("i"), v=X), lambda n: probability(t=n), Q, X, U, R)
    return N, Y


def algorithm_1(P, Q, X, U, R):
    """Leviathan et al., algorithm 1, one sequence at a time, its last draw by inverse transform."""
    lengths, tokens = [], []
    for p, q, x, u, r in zip(P, Q, X.tolist(), U, R, strict=True):
        n = 0
        while n < len(x) and u[n] <= p[n, x[n]] / q[n, x[n]]:
            n += 1
        left = (p[n] - q[n]).clamp(min=0) if n < len(x) else p[n]
        possible = left.nonzero().flatten()
        if len(possible):
            running = left[possible].cumsum(0)
            place = int(torch.searchsorted(running, r * left.sum(), right=True))
            tokens.append(int(possible[min(place, len(possible) - 1)]))
        else:
            tokens.append(x[n])
        lengths.append(n)
    return torch.tensor(lengths, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32)


def algorithm_1_logits(L, Q, X, U, R, heat):
    return algorithm_1(torch.softmax(L * heat, -1), Q, X, U, R)


def draw(weights, generator):
    """A coordinate along the last axis by weight, i32."""
    drawn = torch.multinomial(weights.flatten(0, -2).double(), 1, generator=generator)
    return drawn.view(weights.shape[:-1]).to(torch.int32)


def composition(shape, total, generator):
    """Whole numbers along the last axis that add up to `total`."""
    cuts = torch.randint(0, total + 1, (*shape[:-1], shape[-1] - 1), generator=generator).sort(-1).values
    ends = torch.nn.functional.pad(cuts, (0, 1), value=total)
    return ends - torch.nn.functional.pad(ends[..., :-1], (1, 0))


def probabilities(generator: torch.Generator, sizes: Mapping[str, int]):
    """Drafts that agree with the target on half of the mass. Multiples of 2^-16, so that every order of summation gives the same sum."""
    b, i, v = sizes["b"], sizes["i"], sizes["v"]
    target, draft, both = (composition((b, i + 1, v), 2**15, generator) for _ in range(3))
    P, Q = ((part + both) / 2**16 for part in (target, draft))
    Q = Q[:, :i].contiguous()
    U, R = torch.rand(b, i, generator=generator), torch.rand(b, generator=generator)
    return P, Q, draw(Q, generator), U, R


def logits(generator: torch.Generator, sizes: Mapping[str, int]):
    """Logits, a draft near to them, and uniforms that lie away from where a last bit would decide."""
    b, i, v = sizes["b"], sizes["i"], sizes["v"]
    L = 3 * torch.randn(b, i + 1, v, generator=generator)
    Q = torch.softmax(HEAT * L[:, :i] + 0.7 * torch.randn(b, i, v, generator=generator), -1)
    X = draw(Q, generator)
    P = torch.softmax(L.double() * HEAT, -1)
    ratios = (P[:, :i] / Q).gather(-1, X.long()[..., None])
    U = farthest(torch.rand(b, i, 8, generator=generator), ratios)
    rows = algorithm_1(P, Q.double(), X, U, torch.zeros(b))[0].long()
    chosen = torch.arange(b)
    left = P[chosen, rows] - torch.nn.functional.pad(Q, (0, 0, 0, 1))[chosen, rows]
    running = left.clamp(min=0).cumsum(-1)
    return L, Q, X, U, farthest(torch.rand(b, 32, generator=generator), running / running[:, -1:])


def farthest(candidates, edges):
    """Along the last axis, the candidate with the largest distance to the nearest edge."""
    distance = (candidates[..., None] - edges[..., None, :]).abs().amin(-1)
    return candidates.gather(-1, distance.argmax(-1, keepdim=True))[..., 0]


HEAT = 1 / 0.8


def speculate(run, count, seed):
    """`count` independent runs of a draft and a target that are Markov chains over six tokens, two drafts each.

    Returns X [count, 2], N and Y as `run` gave them, with the target's first row [v] and its transitions [w, v].
    """
    generator = torch.Generator().manual_seed(seed)
    first, then, q_first, q_then = (torch.softmax(torch.randn(*shape, generator=generator), -1) for shape in ((6,), (6, 6)) * 2)
    x0 = draw(q_first.expand(count, 6), generator)
    x1 = draw(q_then[x0.long()], generator)
    P = torch.stack((first.expand(count, 6), then[x0.long()], then[x1.long()]), 1)
    Q = torch.stack((q_first.expand(count, 6), q_then[x0.long()]), 1)
    X = torch.stack((x0, x1), 1)
    N, Y = run(P, Q, X, torch.rand(count, 2, generator=generator), torch.rand(count, generator=generator))
    return X.long(), N.long(), Y.long(), first, then


def significance(run, count=20_000, seed=0):
    """Chi-square tests that the first, second and third emitted tokens have the target's distribution, each given those before it.

    Three p-values: small where the tokens are not the target's.
    """
    X, N, Y, first, then = speculate(run, count, seed)
    emitted = torch.where(torch.arange(3) < N[:, None], torch.nn.functional.pad(X, (0, 1)), Y[:, None])
    found = [chi_square(torch.bincount(emitted[:, 0], minlength=6)[None], first[None])]
    for i in (1, 2):
        accepted = emitted[N.ge(i)]
        pairs = accepted[:, i - 1] * 6 + accepted[:, i]
        found.append(chi_square(torch.bincount(pairs, minlength=36).view(6, 6), then))
    return tuple(found)


def chi_square(counts, shares):
    """The p-value of Pearson's test that each row of `counts` was drawn with the probabilities of its row of `shares`."""
    expected = counts.sum(-1, keepdim=True) * shares.double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(counts.shape[0] * (counts.shape[1] - 1.0), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def always_accept(P, Q, X, U, R):
    """A wrong rule: what was drafted is emitted."""
    return sample(P, Q, X, U * 0, R)


def redraw_from_target(P, Q, X, U, R):
    """A wrong rule: after a rejection the token comes from p and not from the positive part of p - q."""
    N, _ = sample(P, Q, X, U, R)
    row = P[torch.arange(len(N)), N.long()]
    return N, torch.searchsorted(row.cumsum(-1), R[:, None], right=True)[:, 0].clamp(max=row.shape[-1] - 1)


def show(folder: Path) -> Sequence[str]:
    """The table: the distribution of what is emitted by the kernel and by two rules that are nearly right."""
    count = 20_000
    lines = ["| rule | accepted a call | p, first token | p, second token | p, third token |", "|---|---|---|---|---|"]
    for name, rule in (("the kernel", sample), ("replacement from p", redraw_from_target), ("always accept", always_accept)):
        mean = float(speculate(rule, count, 0)[1].double().mean())
        found = (f"{p:.2g}" if p > 1e-99 else "< 1e-99" for p in significance(rule, count))
        lines.append(f"| {name} | {mean:.2f} of 2 | {' | '.join(found)} |")
    return lines


RECIPE = Recipe(
    name="speculative",
    title="Speculative sampling: accepted length, replacement and bonus token",
    source="Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192), algorithm 1.",
    steps=(
        Step("probabilities", sample, algorithm_1, probabilities, {"b": 8, "i": 4, "v": 32_000}, {"b": (1, 5), "i": (1, 6), "v": (1, 67)},
             exact=True),
        Step("logits", sample_logits, algorithm_1_logits, logits, {"b": 8, "i": 4, "v": 32_000}, {"b": (1, 5), "i": (1, 6), "v": (1, 67)},
             scalars={"heat": HEAT}, exact=True),
    ),
    show=show,
)  # fmt: skip

if __name__ == "__main__":
    serve(RECIPE)
