"""The decoder's cache: reading and following is the plain model; what is evicted or stored otherwise makes the right difference."""

import math
from dataclasses import replace

import einfall as ef
import pytest
import torch

from cookbook.decoder import evict, quantize, table
from cookbook.decoder.model import Decoder, Size, load_text, perplexity, quote, train, windows

SMALL = Size(layers=2, width=32, heads=4, groups=2, channels=64, inner=48)


@pytest.fixture(autouse=True, scope="module")
def alone():
    """No database, and one thread for PyTorch: what is small here only waits for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ef.configure(database=None):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    """Not trained, but with weights that let every layer have its say."""
    model = Decoder(SMALL, seed=1)
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
    return model


@pytest.fixture(scope="module")
def task(model):
    return table.Task.following(model, stride=4000)


def plain(model, task, text):
    """The perplexity from one pass of the plain model over prompt and rest."""
    with torch.no_grad():
        logits = model(text[:, :-1])[:, -table.REST :]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), text[:, -table.REST :].flatten()))


def test_reading_and_following_is_the_plain_model(model, task):
    text = windows(load_text()[1], table.PROMPT + 1 + table.REST, 4000)
    assert task.plain() == pytest.approx(plain(model, task, text), rel=1e-6)
    assert task.plain() > 100  # not trained


def test_a_full_budget_is_exactly_the_plain_cache(task):
    for name, method in evict.methods(task.calibration).items():
        assert task.evicted(method, [table.PROMPT]) == [task.plain()], name


def test_every_method_keeps_the_window_and_its_budget(model, task):
    budget = 40
    for name, method in evict.methods(task.calibration).items():
        kept = torch.stack(method(model, task.seen)(budget))
        assert bool(kept[..., -evict.WINDOW :].all()), name
        if name == "CAKE":
            assert kept.sum(-1).sum(0).unique().tolist() == [budget * SMALL.layers]
        else:
            assert kept.sum(-1).unique().tolist() == [budget], name
        assert name == "recent" or bool(kept[..., : -budget].any()), name


def test_evicted_tokens_are_not_attended_to(model, task):
    kept = evict.keep_recent(model, task.seen)(24)
    poisoned = []
    for s, k in zip(task.seen, kept, strict=True):
        K, V = (x.masked_fill(~k[..., None], 1e3) for x in (s.cache.K, s.cache.V))
        poisoned.append(replace(s.cache, K=K, V=V, kept=k))
    assert perplexity(model, poisoned, task.text) == pytest.approx(task.evicted(evict.keep_recent, [24])[0], rel=1e-6)
    assert task.evicted(evict.keep_recent, [24])[0] != task.plain()


def test_a_budget_is_shared_out_whole():
    parts = torch.softmax(3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0)), 0)
    for total in (0, 7, 100, 499, 500):
        shares = evict.shared_out(parts, total, 100)
        assert shares.sum(0).unique().tolist() == [total]
        assert int(shares.min()) >= 0 and int(shares.max()) <= 100
    loose = evict.shared_out(parts, 100, 100)
    assert (loose - 100 * parts).abs().max() < 1


def limit(form, bits):
    """The relative error a format may make of values that are nearly normal."""
    if "of 64" in form.name:
        return 0.9
    if "MXFP8" in form.name:
        return 0.04
    return 0.15 if "GEAR" in form.name else 2.0 ** (2.5 - bits)


@pytest.mark.parametrize("form", quantize.FORMATS, ids=lambda form: form.name)
def test_formats_read_back_what_they_stored(task, form):
    cache = task.seen[0].cache
    for codec, X in ((form.keys, cache.K), (form.values, cache.V.contiguous())):
        Y, bits = codec(X)
        assert Y.shape == X.shape and Y.dtype == X.dtype
        assert 2 < bits < 16
        assert 0 < float((Y - X).norm() / X.norm()) < limit(form, bits)


def test_the_bits_of_known_formats(task):
    X = task.seen[0].cache.K
    known = ((quantize.groups(8), 9), (quantize.groups(4), 5), (quantize.groups(2), 3), (quantize.bfp8, 8.25), (quantize.bfp4, 4.25))
    for codec, bits in (*known, (quantize.pruned(16), 5)):
        assert codec(X)[1] == bits


def test_groups_along_the_tokens_suit_channels_of_their_own_size():
    X = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-2, 2, 64)
    codec = quantize.groups(4)
    across, along = codec(X)[0], quantize.along_tokens(codec)(X)[0]
    small = X[..., :16]
    assert (along[..., :16] - small).norm() < 0.1 * small.norm() < (across[..., :16] - small).norm()


def test_a_quotation_repeats_what_was_read():
    text = torch.arange(60).view(2, 30)
    quoted = quote(text, torch.tensor([0, 5]), 10)
    assert quoted[0].tolist() == [*range(20), *range(10)]
    assert quoted[1].tolist() == [*range(30, 50), *range(35, 45)]


def test_training_learns():
    model, losses = Decoder(SMALL), []
    train(model, load_text()[0], steps=30, batch=4, length=64, report=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(256), abs=0.01) and losses[-1] < 5


def test_the_held_out_text_is_not_trained_on():
    trained, held_out = load_text()
    assert len(trained) + len(held_out) == table.Path(table.__file__).with_name("opticks.txt").stat().st_size
    assert held_out.numpy().tobytes() not in trained.numpy().tobytes()


def test_table_and_picture_of_a_run(model, task, tmp_path):
    pytest.importorskip("matplotlib")
    budgets = (table.PROMPT, 40)
    found = table.measure({"following": task, "quoting": table.Task.quoting(model, stride=4000)}, budgets)
    table.picture.draw(found, tmp_path / "decoder.png")
    assert (tmp_path / "decoder.png").stat().st_size > 10_000
    lines = table.table(found)
    assert len([line for line in lines if line.startswith("| 40 |")]) == 2
    assert sum(line.count("|") for line in lines if line.startswith("| int8 |")) == 5
