"""Emitted CPU kernels against torch in float64: extents of one, primes and tails, strides, rows of -inf, poison and guard bands."""

from __future__ import annotations

import math

import programs as p
import pytest
import torch
from einfall.ir.types import bf16
from kernels import run, strided_copy

INF = math.inf
ATTENTION = {
    "full": {}, "causal": {"causal": True}, "window": {"window": 40}, "odd_heads": {"e": 33, "f": 80, "causal": True},
    "heads_of_one": {"e": 1, "f": 1},
    "few_rows": {"rows": 4, "tile": 64}, "odd_tiles": {"rows": 7, "tile": 48, "causal": True},
}  # fmt: skip
EXTENTS = [(1, 1), (64, 128), (70, 131), (5, 257), (131, 67)]


def attention_oracle(q, k, v, scale, *, causal=False, window=None, **_):
    s = (q.double() @ k.double().transpose(-1, -2)) * scale
    m, n = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None]
    allowed = torch.ones(s.shape[-2:], dtype=torch.bool)
    if causal or window:
        allowed &= n <= m
    if window:
        allowed &= n > m - window
    weights = s.masked_fill(~allowed, -INF).softmax(-1)
    return weights @ v.double()


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("narrowed", [False, True], ids=["host", "avx2"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, narrowed):
    options = ATTENTION[case]
    program = p.attention(**options)
    e, f = options.get("e", 64), options.get("f", 64)
    for m, n in EXTENTS:
        if options.get("window") and n < m:
            continue  # rows without any key
        q, k, v = random(m, 2, 3, m, e), random(n, 2, 3, n, e), random(m + n, 2, 3, n, f)
        actual = run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.3}, narrowed=narrowed)["O"]
        close(actual, attention_oracle(q, k, v, 0.3, **options), 3e-6)


@pytest.mark.parametrize("case", ["full", "causal", "window", "odd_heads", "few_rows"])
def test_attention_bf16(case):
    options = ATTENTION[case]
    program = p.attention(dtype=bf16, **options)
    e, f = options.get("e", 64), options.get("f", 64)
    for m, n in EXTENTS:
        if options.get("window") and n < m:
            continue
        q, k, v = (random(i, 1, 2, r, d, dtype=torch.bfloat16) for i, (r, d) in enumerate([(m, e), (n, e), (n, f)]))
        expected = attention_oracle(q, k, v, 0.125, **options)
        actual = run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.125})["O"]
        assert (actual.double() - expected).abs().max() < 2e-2


def test_attention_over_strided_and_unaligned_inputs():
    q, k, v = random(1, 2, 2, 70, 64), random(2, 2, 2, 131, 64), random(3, 2, 2, 131, 64)
    expected = attention_oracle(q, k, v, 0.2, causal=True)
    program = p.attention(causal=True)
    tensors = {"Q": strided_copy(q), "K": k.transpose(1, 2).contiguous().transpose(1, 2), "V": strided_copy(v)}
    close(run(program, tensors, {"scale": 0.2})["O"], expected, 3e-6)
    tensors = {"Q": strided_copy(q, last=True), "K": strided_copy(k, last=True), "V": strided_copy(v, last=True)}
    close(run(program, tensors, {"scale": 0.2}, strided=frozenset("QKV"))["O"], expected, 3e-6)


def test_attention_with_rows_of_minus_infinity():
    q, k, v = random(1, 1, 1, 5, 64), random(2, 1, 1, 200, 64), random(3, 1, 1, 200, 64)
    k[:, :, :150, 0], q[:, :, :, 0] = -INF, 1.0  # the first tile is all -inf: the maximum stays at the lowest number
    close(run(p.attention(), {"Q": q, "K": k, "V": v}, {"scale": 0.2})["O"], attention_oracle(q, k, v, 0.2), 3e-6)
    k[..., 0] = -INF
    assert run(p.attention(), {"Q": q, "K": k, "V": v}, {"scale": 0.2})["O"].isnan().all()


def test_padding_beyond_the_keys_is_never_read():
    q, room = random(1, 1, 1, 64, 64), torch.full((1, 1, 400, 64), math.nan)
    room[:, :, :131] = random(2, 1, 1, 131, 64)
    k = room[:, :, :131]
    close(run(p.attention(), {"Q": q, "K": k, "V": k}, {"scale": 0.2})["O"], attention_oracle(q, k, k, 0.2), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rows": 1, "e": 64, "f": 64}, {"rows": 3, "e": 80, "f": 48, "tile": 64}], ids=str)
def test_decode(options, dtype):
    program = p.decode(dtype=bf16 if dtype == torch.bfloat16 else p.f32, **options)
    r, e, f = options.get("rows", 4), options.get("e", 128), options.get("f", 128)
    for n in (1, 7, 128, 300):
        q, k, v = random(1, 2, 3 * r, e, dtype=dtype), random(2, 2, 3, n, e, dtype=dtype), random(3, 2, 3, n, f, dtype=dtype)
        expected = attention_oracle(q.view(2, 3, r, e), k, v, 0.1).reshape(2, 3 * r, f)
        close(run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.1})["O"], expected, 3e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_log_sum_exp(rows):
    for m, n in [(1, 1), (2, 5000), (7, 129), (33, 1000)]:
        x = random(m * n, m, n) * 10
        x[0, : n // 2] = -INF
        close(run(p.log_sum_exp(rows=rows, tile=512), {"X": x})["L"], x.double().logsumexp(-1), 1e-6)
        close(run(p.log_sum_exp(rows=rows, tile=64, lanes_in_rows=True), {"X": x.t().contiguous()})["L"], x.double().logsumexp(-1), 1e-6)


def test_cross_entropy_gathers_the_label():
    for t, v in [(1, 1), (64, 128), (70, 333)]:
        x, w, y = random(t, t, 64), random(v, v, 64), torch.arange(t, dtype=torch.int32) * 7 % v
        expected = torch.nn.functional.cross_entropy(x.double() @ w.double().t(), y.long(), reduction="none")
        close(run(p.cross_entropy(), {"X": x, "W": w, "Y": y})["L"], expected, 1e-5)


@pytest.mark.parametrize("n", [64, 1, 37])
def test_norm_matmul(n):
    for m, e in [(1, 1), (64, 256), (67, 149)]:
        x, w = random(m, m, e) + 3, random(e, e, n)
        y = torch.nn.functional.layer_norm(x.double(), (e,), eps=1e-5)
        close(run(p.norm_matmul(n=n), {"X": x, "W": w}, {"eps": 1e-5})["O"], y @ w.double(), 3e-5)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 3])
def test_argmax_with_value(rows, smallest):
    for m, n in [(1, 1), (5, 300), (33, 1000)]:
        x = torch.randint(-4, 4, (m, n), generator=torch.Generator().manual_seed(n)).float()  # many ties: the first one counts
        result = run(p.best(rows=rows, smallest=smallest), {"X": x})
        value, index = (x.min(-1).values, x.argmin(-1)) if smallest else (x.max(-1).values, x.argmax(-1))
        assert torch.equal(result["V"], value)
        assert torch.equal(x.gather(1, result["I"].long()[:, None])[:, 0], value)
        first = (x == value[:, None]).int().argmax(-1)
        assert torch.equal(result["I"].long(), first), (index, first)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul(dtype, transposed):
    program = p.matmul(dtype=bf16 if dtype == torch.bfloat16 else p.f32, transposed=transposed)
    for m, n, k in [(1, 1, 1), (64, 64, 128), (67, 131, 300)]:
        a, b = random(m, m, k, dtype=dtype), random(n, k, n, dtype=dtype)
        given = b.t().contiguous() if transposed else b
        expected = (a.double() @ b.double()).to(dtype)
        close(run(program, {"A": a, "B": given})["C"], expected, 1e-5 * math.sqrt(k) if dtype == torch.float32 else 1.2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operand_of_the_contracted_rank_alone(dtype):
    program = p.weighted_sums(dtype=bf16 if dtype == torch.bfloat16 else p.f32)
    for m, n in [(1, 1), (33, 77)]:
        w, v = random(m, n, dtype=dtype), random(n, m, n, 48, dtype=dtype)
        expected = torch.einsum("p,mpf->mf", w.double().exp(), v.double())
        actual = run(program, {"W": w, "V": v})["S"].double()
        assert (actual - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()


def test_elementwise_maps_of_every_width():
    x, y = p.aligned("A", "i", "j"), p.aligned("B", "i", "j")
    expr = p.op("where", p.op("gt", x, y), p.op("tanh", x), p.op("mul", y, p.Scalar("w")))
    program = p.elementwise(expr, (p.tensor("A", "i j"), p.tensor("B", "i j")), scalars=(p.ScalarDecl("w", p.f32),))
    for i, j in [(1, 1), (3, 64), (5, 131), (2, 15)]:
        a, b = random(i, i, j), random(j, i, j)
        close(run(program, {"A": a, "B": b}, {"w": 0.5})["Y"], torch.where(a > b, a.double().tanh(), b.double() * 0.5), 1e-6)


def test_two_loops_over_one_rank():
    for m, n in [(1, 1), (3, 128), (5, 300)]:
        x = random(n, m, n).abs()
        result = run(p.normalise(), {"X": x})
        close(result["D"], x.double().sum(-1), 1e-5)
        close(result["Y"], x.double() / x.double().sum(-1, keepdim=True), 1e-5)


def test_one_task_without_grid_and_nested_loops():
    for i, j in [(1, 1), (9, 200), (16, 64)]:
        x = random(i * j, i, j)
        close(run(p.whole_sum(), {"X": x})["S"], x.double().sum(), 1e-5)


def test_composed_axes_of_integers_and_bools():
    for m, n in [(1, 1), (3, 16), (4, 37)]:
        c = torch.randint(-100, 100, (m, n * 8), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
        z = random(n, m, n)
        result = run(p.grouped_codes(), {"C": c, "Z": z})
        close(result["A"], (c.double().view(m, n, 8) * z.double()[..., None]).sum((1, 2)), 1e-4)
        assert torch.equal(result["H"], c.max(-1).values.int())
        assert torch.equal(result["S"], (c == 7).any(-1))


def test_states_that_exchange_their_values():
    assert run(p.exchange(), {"Z": torch.zeros(10)})["X"].item() == 55
    assert run(p.exchange(), {"Z": torch.zeros(0)})["X"].item() == 0


def test_gathers_shifts_and_reversed_reads():
    for rows, i, j in [(3, 1, 1), (5, 7, 70), (2, 3, 130)]:
        t, index = random(j, rows, j), torch.arange(i, dtype=torch.int32) % rows
        row = t[index.long()]
        shifted = torch.cat([torch.full((i, 1), -1.0), row[:, :-1]], 1)
        close(run(p.table_lookup(), {"T": t, "I": index})["Y"], row.double() + 10 * shifted.double() + 100 * row.flip(1).double(), 1e-5)


def test_empty_extents():
    q, k = torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 0, 64)
    assert run(p.attention(), {"Q": q, "K": k, "V": k}, {"scale": 1.0})["O"].isnan().all()  # 0 / 0, as softmax over nothing
    assert run(p.attention(), {"Q": q[:, :, :0], "K": q, "V": q}, {"scale": 1.0})["O"].numel() == 0
    assert run(p.log_sum_exp(), {"X": torch.zeros(3, 0)})["L"].tolist() == [-INF] * 3
