"""The rows for a CUDA device: prompts and decode steps against PyTorch's own kernels and FlexAttention, a shared prefix, a bare call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import EAGER, Aim, Case, Function, Peer, Size, Tensors
from benchmarks.cases_decode import OWN_BF16, decode_case, int4_case, sdpa
from benchmarks.cases_decode import Shape as Decode
from benchmarks.cases_prefill import attention_case
from benchmarks.cases_shared import Shape as Shared
from benchmarks.cases_shared import copied, shared_case
from cookbook.attention import hydragen

CUDNN, FLASH, FLEX = "SDPA cuDNN", "SDPA flash", "FlexAttention"
UNSHARED = "SDPA without sharing"
BARE, TRITON = "bare launch", "Triton's launcher"
COPIES = 4 << 30  # bytes of copied prefixes that are held at once; more requests take turns
BATCH = 1024


def cuda_rows(size: Size) -> tuple[Case, ...]:
    """All rows, the most important first. `tiny` proves only that everything runs."""
    return (*prefill(size), *decode(size), *shared(size), dispatch())


def prefill(size: Size) -> Iterator[Case]:
    """Attention over a whole prompt in bf16."""
    sequence, heads = (128, 2) if size == "tiny" else (8192, 32)
    for causal in (True, False):
        case = attention_case("bf16", sequence, 128, causal=causal, heads=heads)
        peers = (
            Peer(CUDNN, of_backend(SDPBackend.CUDNN_ATTENTION, is_causal=causal)),
            Peer(FLASH, of_backend(SDPBackend.FLASH_ATTENTION, is_causal=causal)),
            Peer(FLEX, Flex(causal=causal)),
            *(peer for peer in case.peers if peer.name == EAGER),
        )
        aims = (Aim("speed", 1.0, FLEX), Aim("speed", 0.9, CUDNN), Aim("speed", 0.9, FLASH))
        yield replace(case, peers=peers, aims=aims)


def decode(size: Size) -> Iterator[Case]:
    """One new token for each sequence, over bf16, and over four bits with scales of groups of 32."""
    shape = Decode(1, 2, 96) if size == "tiny" else Decode(16, 8, 8192)
    case = decode_case(shape)
    peers = (
        Peer(FLASH, of_backend(SDPBackend.FLASH_ATTENTION, function=sdpa(shape))),
        Peer(CUDNN, of_backend(SDPBackend.CUDNN_ATTENTION, enable_gqa=True)),
        Peer(FLEX, Flex(enable_gqa=True)),
        *(peer for peer in case.peers if peer.name == EAGER),
    )
    yield replace(case, peers=peers, roof="copy", aims=(Aim("of_roof", 0.9),))
    yield replace(int4_case(shape), roof="copy", aims=(Aim("speed", 3.0, OWN_BF16), Aim("of_roof", 0.9)))


def shared(size: Size) -> Iterator[Case]:
    """Decode steps of a large batch after a short and a long prefix that all of it shares."""
    shapes = [Shared(3, 2, n, 16) for n in (32, 64)] if size == "tiny" else [Shared(BATCH, 8, n, 64) for n in (1024, 16384)]
    for shape in shapes:
        case = shared_case(f"bf16 decode, shared prefix {shape.text}", hydragen.decomposed, shape)
        peers = (Peer(UNSHARED, Unshared(shape), Unshared(shape).arrange), *(peer for peer in case.peers if peer.name == EAGER))
        yield replace(case, peers=peers, roof="copy", aims=(Aim("speed", 16.0, UNSHARED),) if shape is shapes[-1] else ())


def dispatch() -> Case:
    """A call whose kernel has next to nothing to do; its peers are made from what was built, by the runner."""
    case = attention_case("bf16", 16, 64, causal=False, heads=1)
    aims = (Aim("more_us", 10.0, BARE),)
    return replace(case, name="dispatch", group="dispatch", peers=tuple(p for p in case.peers if p.name == EAGER), aims=aims)


def of_backend(backend: SDPBackend, function: Function | None = None, **options: bool) -> Function:
    """torch's attention, or a function that calls it, by one of its backends."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return function(q, k, v) if function is not None else functional.scaled_dot_product_attention(q, k, v, **options)

    return run


class Flex:
    """FlexAttention, compiled at its first call."""

    def __init__(self, *, causal: bool = False, enable_gqa: bool = False) -> None:
        self.causal, self.enable_gqa = causal, enable_gqa
        self._run: Function | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._run is None:
            self._run = self._made(q, k)
        return self._run(q, k, v)

    def _made(self, q: torch.Tensor, k: torch.Tensor) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return query >= key

        mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device=str(q.device)) if self.causal else None
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=self.enable_gqa)


@dataclass(frozen=True, slots=True)
class Unshared:
    """torch's attention where every request reads a prefix of its own.

    So many copies as fit into 4 GiB are made, and requests in such numbers take turns over them: what is read is what all copies
    would be, where all of them might not fit. Every suffix is read whole, so that no mask slows it down.
    """

    shape: Shared

    @property
    def at_once(self) -> int:
        """Requests that are computed together."""
        each = 4 * self.shape.groups * self.shape.width * (self.shape.prefix + self.shape.suffix)
        return max(1, min(self.shape.batch, COPIES // each))

    def arrange(self, tensors: Tensors) -> Tensors:
        """The queries [b, g, r, e], and keys and values [n, g, p, e] with the prefix in front."""
        q, kp, vp, kt, vt, length = tensors
        n = self.at_once
        _, k, v, _ = copied((q[:n], kp, vp, kt[:n], vt[:n], length[:n]))
        return self.shape.rows(q), k.transpose(1, 2), v.transpose(1, 2)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = [functional.scaled_dot_product_attention(rows, k[: len(rows)], v[: len(rows)]) for rows in q.split(self.at_once)]
        return torch.cat(parts)
