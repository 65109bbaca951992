"""Decoding from a paged cache: keys and values lie in pages anywhere in a pool, a table says where (PagedAttention, arXiv 2309.06180).

A page table is a change of coordinates: token p of request b is K[table[b, p // 16], p % 16]. Read that way, the attention is the one that
would be written without pages.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.recipe import Recipe, Step, serve

PAGE = 16


@ef.kernel
def paged_decode(Q: "b (g r) e", K: "page j=16 g e", V: "page j g f", table: "b n", L: "b", *, scale: float) -> "b (g r) f":
    """One query a request attends to its L[b] tokens. Without any it gets zeros; entries of the table beyond them may be anything."""
    Keys = K.at(page=table).join(("n", "j"), into="p").where(ef.index("p") < L)
    Values = V.at(page=table).join(("n", "j"), into="p")
    S = (Q * Keys).sum("e") * scale
    return (ef.softmax(S, "p") * Values).sum("p")


def oracle(q, k, v, table, length, *, scale):
    """Request by request: gathers the pages in use into a row of tokens, cuts it to the length, and takes a softmax."""
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for b, tokens in enumerate(length.tolist()):
        if tokens == 0:
            continue
        used = table[b, : -(-tokens // PAGE)].long()
        keys, values = (pool[used].flatten(0, 1)[:tokens].repeat_interleave(q.shape[1] // k.shape[2], dim=1) for pool in (k, v))
        weights = torch.softmax(torch.einsum("he,phe->hp", q[b], keys) * scale, dim=-1)
        out[b] = torch.einsum("hp,phf->hf", weights, values)
    return out


def inputs(generator, n):
    """Requests of any length from 0 on in pages in random order. Where nothing is used the table names no page: -1."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    b, g, h, e, f, per_request = n["b"], n["g"], n["g"] * n["r"], n["e"], n["f"], n["n"]
    length = torch.randint(0, per_request * PAGE + 1, (b,), generator=generator, dtype=torch.int32)
    pages = b * per_request + n["spare"]
    table = torch.randperm(pages, generator=generator)[: b * per_request].reshape(b, per_request).int()
    table[torch.arange(per_request) * PAGE >= length[:, None]] = -1
    return normal(b, h, e), normal(pages, PAGE, g, e), normal(pages, PAGE, g, f), table, length


REQUESTS, CAPACITY, TOKEN = 64, 4096, 2 * 2 * 8 * 128  # bytes of a token: K and V in bf16, 8 heads of 128
MEANS = (64, 256, 1024, 2048)


def show(out: Path) -> list[str]:
    """Memory that 64 requests of geometric lengths take in a dense cache and in pages, and the part of it that holds tokens."""
    lines = [
        "| mean length | longest | tokens, MB | dense at 4096, MB | used | dense at the longest, MB | used | pages of 16, MB | used |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mean in MEANS:
        uniform = torch.rand(REQUESTS, generator=torch.Generator().manual_seed(mean), dtype=torch.float64)
        lengths = (-mean * torch.log1p(-uniform)).ceil().clamp(1, CAPACITY).long()
        tokens, longest = int(lengths.sum()), int(lengths.max())
        rooms = (REQUESTS * CAPACITY, REQUESTS * longest, int(-(-lengths // PAGE * PAGE).sum()))
        taken = " | ".join(f"{room * TOKEN / 1e6:.0f} | {tokens / room:.0%}" for room in rooms)
        lines.append(f"| {tokens / REQUESTS:.0f} | {longest} | {tokens * TOKEN / 1e6:.0f} | {taken} |")
    return lines


RECIPE = Recipe(
    name="paged_decode",
    title="Grouped-query decode from a paged cache",
    source="Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180, section 4",
    steps=(
        Step(
            name="paged_decode",
            kernel=paged_decode,
            oracle=oracle,
            inputs=inputs,
            sizes={"b": 4, "g": 2, "r": 4, "e": 64, "f": 64, "n": 12, "spare": 3},
            ranges={"b": (1, 5), "g": (1, 3), "r": (1, 4), "e": (1, 17), "f": (1, 17), "n": (1, 5), "spare": (0, 3)},
            scalars={"scale": 0.2},
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
