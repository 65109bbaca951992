"""Verification of drafted tokens: how many stand, and the token after them, from the target's logits or from its probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks.case import EAGER, Aim, Case, Pairs, Peer, Size, Tensors, paired
from cookbook.verification import speculative

HEAT = 1.25
AIMS = (Aim("of_roof", 0.85), Aim("speed", 5.0, EAGER))
ROUGHLY = 1e-4  # of the mass: a token is right if the uniform falls so near to its share


def verify_rows(size: Size) -> Iterator[Case]:
    """From logits, then from probabilities."""
    vocabulary, drafts = (1000, 3) if size == "tiny" else (131072, 8)
    yield verify_case(3 if size == "tiny" else 16, drafts, vocabulary, logits=True)
    # two rows a sequence are read of probabilities: so that it is more than a cache holds
    yield verify_case(3 if size == "tiny" else 48, drafts, vocabulary, logits=False)


def verify_case(batch: int, drafts: int, vocabulary: int, *, logits: bool) -> Case:
    """The draft's probabilities are given; the target's are, or its logits.

    Logits are read whole, for the sum of every row. Of probabilities, those of the drafted tokens and one row a sequence are needed.
    """

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        target = 2 * torch.randn(batch, drafts + 1, vocabulary, generator=g)
        near = target[:, :drafts] + 0.5 * torch.randn(batch, drafts, vocabulary, generator=g)
        draft = torch.softmax(near.mul_(HEAT), -1)
        drawn = torch.multinomial(draft.flatten(0, 1), 1, generator=g).view(batch, drafts).int()
        statistics = torch.softmax(target * HEAT, -1)
        uniform = torch.rand(batch, drafts, generator=g)
        ratio = (statistics[:, :drafts] / draft).gather(-1, drawn.long()[..., None])[..., 0]
        uniform = torch.where((ratio - uniform).abs() < 0.01, (uniform + 0.5) % 1, uniform)  # no decision hangs on a last bit
        return target if logits else statistics, draft, drawn, uniform, torch.rand(batch, generator=g)

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        target, draft, drawn, uniform, share = (x[-2:] for x in tensors)
        target = torch.softmax(target.double() * HEAT, -1) if logits else target.double()
        stand, left = decided(target, draft.double(), drawn, uniform.double())
        part = (left / left.sum(-1, keepdim=True)).cumsum(-1)
        token = (part <= share.double()[:, None]).sum(-1)
        if len(results) > 1:
            found = results[1][-2:].long()
            below, up_to = (functional.pad(part, (1, 0)).gather(-1, (found + more)[:, None])[:, 0] for more in (0, 1))
            token = torch.where((below - ROUGHLY <= share) & (share <= up_to + ROUGHLY) & (up_to > below), found, token)
        return paired(results, lambda found: found[-2:], stand, token)

    def eager(target: torch.Tensor, draft: torch.Tensor, drawn: torch.Tensor, uniform: torch.Tensor, share: torch.Tensor) -> Tensors:
        probabilities = torch.softmax(target * HEAT, -1) if logits else target
        stand, left = decided(probabilities, draft, drawn, uniform)
        running = left.cumsum(-1)
        token = torch.searchsorted(running, share[:, None] * running[:, -1:], right=True)[:, 0].clamp(max=vocabulary - 1)
        return stand.int(), token.int()

    read = (drafts + 2 if logits else 2) * vocabulary  # the last is a row of the draft's
    return Case(
        name=f"verify {'logits' if logits else 'probabilities'} B{batch} I{drafts} V{vocabulary}",
        group="verify",
        dtype="f32",
        kernel=speculative.sample_logits if logits else speculative.sample,
        make=make,
        peers=(Peer(EAGER, eager),),
        check=check,
        flops=2.0 * batch * read,
        bytes=4.0 * batch * read,
        roof="read",
        aims=AIMS,
        scalars={"heat": HEAT} if logits else {},
    )


def decided(target: torch.Tensor, draft: torch.Tensor, drawn: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafted tokens stand [b], and the weights that the next token is drawn with [b, v]."""
    drafts = draft.shape[1]
    places = drawn.long()[..., None]
    accepted = target[:, :drafts].gather(-1, places) / draft.gather(-1, places) >= uniform[..., None]
    stand = accepted[..., 0].long().cumprod(-1).sum(-1)
    one = stand[:, None, None].expand(-1, 1, draft.shape[-1])
    theirs = draft.gather(1, one.clamp(max=drafts - 1))[:, 0] * (stand < drafts)[:, None]
    return stand, (target.gather(1, one)[:, 0] - theirs).clamp(min=0)
