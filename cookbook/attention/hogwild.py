"""Hogwild! Inference: workers write into one cache at the same time and see each other's tokens at once (arXiv 2504.06261).

The cache is blocks: the prompt and what each worker has written so far. Keys are rotated (RoPE) to their places within their own block and
stay as they are stored. Each worker sees the blocks in an order of its own; it is the query that is turned, once for each block, by its
distance from the block's beginning.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch
from matplotlib.figure import Figure

from cookbook.attention.common import attend, merge
from cookbook.recipe import Recipe, Step, serve

BLOCKS = ("prompt", "Alice", "Bob")


def against(Q, K, at, n, *, block, keys, scale):
    """Scores of queries against one block, turned to their places as seen from its beginning, and which of its keys they see."""
    place = at.at(k=block) + ef.index("m")
    S = (ef.rope(Q, "e", position=place) * K).sum("e") * scale
    return S, (ef.index(keys) <= place) & (ef.index(keys) < n.at(k=block))


@ef.kernel
def hogwild(
    Q: "w m (g r) e", Kc: "c g e", Vc: "c g f", Kx: "x g e", Vx: "x g f", Ky: "y g e", Vy: "y g f", at: "k=3 w", n: "k", *, scale: float
) -> "w m (g r) f":
    """One softmax over three blocks of n[k] keys. at[k, w] is the first new token's place of worker w, from the beginning of block k."""
    blocks = [against(Q, K, at, n, block=i, keys=keys, scale=scale) for i, (keys, K) in enumerate((("c", Kc), ("x", Kx), ("y", Ky)))]
    S = ef.concat(*[scores for scores, _ in blocks], rank="p", parts=("c", "x", "y"))
    V = ef.concat(Vc, Vx, Vy, rank="p", parts=("c", "x", "y"))
    seen = ef.concat(*[visible for _, visible in blocks], rank="p", parts=("c", "x", "y"))
    return (ef.softmax(S.where(seen), "p") * V).sum("p")


@ef.kernel
def merged(
    Q: "w m (g r) e", Kc: "c g e", Vc: "c g f", Kx: "x g e", Vx: "x g f", Ky: "y g e", Vy: "y g f", at: "k=3 w", n: "k", *, scale: float
) -> "w m (g r) f":
    """The same, block by block, merged by the maxima and sums of the blocks."""
    states = []
    for block, (keys, K, V) in enumerate((("c", Kc, Vc), ("x", Kx, Vx), ("y", Ky, Vy))):
        S, seen = against(Q, K, at, n, block=block, keys=keys, scale=scale)
        states.append(attend(S.where(seen), V, keys))
    return merge(*states)


def places(orders, lengths, new):
    """at[k, w] for workers that see the blocks in these orders, each its own block last, which `new` tokens were just added to.

    A block that a worker does not see lies after all of its queries.
    """
    at = torch.full((len(lengths), len(orders)), -new, dtype=torch.int32)
    for worker, order in enumerate(orders):
        end = 0
        for block in reversed(order):
            end += lengths[block]
            at[block, worker] = end - new
    return at


def oracle(q, kc, vc, kx, vx, ky, vy, at, n, *, scale):
    """Worker by worker: moves the keys, as complex numbers, to where the worker sees them, and takes a softmax over those it sees."""
    workers, new, heads, e = q.shape
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    frequency = 10000.0 ** (-torch.arange(0, e, 2, dtype=kind) / e)

    def turned(x, position):  # [token, head, e] by [token]; the pairs are the two halves of e
        z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(()).to(kind), position.to(kind)[:, None] * frequency)[:, None]
        return torch.cat([z.real, z.imag], dim=-1)

    out = torch.empty(workers, new, heads, vc.shape[-1], dtype=q.dtype)
    for w in range(workers):
        own = int(at[:, w].max())  # the place of the first new token in the worker's whole view
        keys, values, seen = [], [], []
        for block, (k, v) in enumerate(((kc, vc), (kx, vx), (ky, vy))):
            k, v = k[: int(n[block])], v[: int(n[block])]
            begins = own - int(at[block, w])
            keys.append(turned(k, torch.full((len(k),), begins)))
            values.append(v)
            seen.append(torch.arange(len(k)) + begins <= own + torch.arange(new)[:, None])
        k, v, mask = torch.cat(keys), torch.cat(values), torch.cat(seen, dim=-1)
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        s = torch.einsum("mhe,phe->hmp", turned(q[w], own + torch.arange(new)), k) * scale
        out[w] = torch.einsum("hmp,phf->mhf", torch.softmax(s.masked_fill(~mask, -torch.inf), dim=-1), v)
    return out


def inputs(generator, n):
    """Workers in turn write Alice's block and Bob's; every third does not see the block of the other one. Blocks are partly filled."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    w, m, g, h, e, f = n["w"], n["m"], n["g"], n["g"] * n["r"], n["e"] + n["e"] % 2, n["f"]
    rooms = (n["c"], m + n["x"], m + n["y"])
    lengths = [int(torch.randint(least, room + 1, (), generator=generator)) for least, room in zip((1, m, m), rooms, strict=True)]
    orders = [(0, 1 + i % 2) if i % 3 == 2 else (0, 2 - i % 2, 1 + i % 2) for i in range(w)]
    blocks = [normal(room, g, width) for room in rooms for width in (e, f)]
    return normal(w, m, h, e), *blocks, places(orders, lengths, m), torch.tensor(lengths, dtype=torch.int32)


LENGTHS = (24, 9, 14)
ORDERS = ((0, 2, 1), (0, 1, 2))
COLOURS = ("#8c959f", "#0969da", "#d1741a")


def draw(path: Path) -> None:
    """The blocks as they are stored, and as each of two workers sees them."""
    at = places(ORDERS, LENGTHS, 1)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for block, (length, colour) in enumerate(zip(LENGTHS, COLOURS, strict=True)):
        axes.broken_barh([(i + 0.06, 0.88) for i in range(length)], (5.1 - block, 0.7), color=colour)
        axes.text(length + 0.5, 5.45 - block, f"{BLOCKS[block]}: places 0 to {length - 1}", va="center")
    for worker, order in enumerate(ORDERS):
        row, begins = 1.3 - 1.3 * worker, 0
        for block in order:
            axes.broken_barh([(begins + i + 0.06, 0.88) for i in range(LENGTHS[block])], (row, 0.7), color=COLOURS[block])
            axes.text(
                begins + 0.3,
                row + 0.35,
                f"q at {int(at[block, worker])}",
                va="center",
                color="white",
                fontsize=9,
                bbox={"fc": COLOURS[block], "ec": "none", "pad": 1},
            )
            begins += LENGTHS[block]
        axes.text(begins + 0.5, row + 0.35, f"{BLOCKS[order[-1]]}'s view", va="center")
    axes.text(0, 6.1, "stored, each key rotated to its place in its own block", fontsize=10)
    axes.text(0, 2.3, "seen: the query is turned to its distance from the beginning of each block", fontsize=10)
    axes.set(xlim=(0, sum(LENGTHS) + 9), ylim=(-0.3, 6.6), xlabel="place")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def show(out: Path) -> list[str]:
    """The places of the picture, and the rotations that a step takes if the query is turned or if the keys are."""
    draw(out / "hogwild.png")
    at = places(ORDERS, LENGTHS, 1)
    lines = ["| block | tokens | stored at | Alice's query | Bob's query |", "|---|---:|---|---:|---:|"]
    for block, (name, length) in enumerate(zip(BLOCKS, LENGTHS, strict=True)):
        lines.append(f"| {name} | {length} | 0 to {length - 1} | {int(at[block, 0])} | {int(at[block, 1])} |")
    queries, keys = len(LENGTHS) * len(ORDERS), sum(sum(LENGTHS[block] for block in order) for order in ORDERS)
    return [*lines, "", f"Tokens rotated in a step, per layer: {queries} queries, or up to {keys} keys."]


COMMON = {
    "oracle": oracle,
    "inputs": inputs,
    "sizes": {"w": 2, "m": 1, "g": 2, "r": 3, "c": 96, "x": 24, "y": 33, "e": 32, "f": 32},
    "ranges": {
        "w": (1, 4), "m": (1, 3), "g": (1, 3), "r": (1, 3), "c": (1, 23), "x": (1, 13), "y": (1, 13), "e": (1, 17), "f": (1, 17),
    },
    "scalars": {"scale": 0.2},
}  # fmt: skip

RECIPE = Recipe(
    name="hogwild",
    title="Hogwild! Inference: one softmax over cache blocks, the query rotated for each of them",
    source="Hogwild! Inference: Parallel LLM Generation via Concurrent Attention, arXiv 2504.06261; checked against its implementation",
    steps=(Step(name="hogwild", kernel=hogwild, **COMMON), Step(name="merged", kernel=merged, **COMMON)),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
