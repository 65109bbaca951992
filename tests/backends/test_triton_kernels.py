"""Tile programs written by hand, as Triton kernels in the interpreter, against torch in float64.

Extents of one, primes and tails, strides, rows of -inf and of the lowest number, empty ranges, composed axes, gathers, scans, schedules.
"""

from __future__ import annotations

import math

import numpy as np
import programs as p
import pytest
import torch
from einfall.ir.tile_reference import run_program
from einfall.ir.types import bf16
from einfall.schedules.schedule import Schedule
from kernels import strided_copy
from random_programs import random_program, random_tensors
from test_tvm_kernels import attention_oracle, close, random
from test_tvm_scans import oracle, scanned, values
from triton_kernels import run

INF = math.inf
LOWEST = -3.4028234663852886e38
SMALL = {"e": 16, "f": 16, "rows": 16, "tile": 16}
ROWS = {
    "full": SMALL, "causal": {**SMALL, "causal": True}, "window": {**SMALL, "window": 11},
    "odd_heads": {"e": 20, "f": 9, "rows": 16, "tile": 32, "causal": True}, "heads_of_one": {**SMALL, "e": 1, "f": 1},
    "one_row": {**SMALL, "rows": 1}, "odd_tiles": {"e": 16, "f": 16, "rows": 7, "tile": 24, "causal": True},
}  # fmt: skip
EXTENTS = [(1, 1), (16, 32), (21, 37), (5, 67), (37, 19)]


@pytest.mark.parametrize("case", ROWS)
def test_weighted_sums_by_exponentials(case):
    options = ROWS[case]
    program = p.attention(**options)
    for m, n in EXTENTS:
        if options.get("window") and n < m:
            continue  # rows without any key
        q, k, v = random(m, 1, 2, m, options["e"]), random(n, 1, 2, n, options["e"]), random(m + n, 1, 2, n, options["f"])
        actual = run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.3})["O"]
        close(actual, attention_oracle(q, k, v, 0.3, **options), 3e-6)


@pytest.mark.parametrize("case", ["full", "causal", "odd_heads"])
def test_weighted_sums_in_bf16(case):
    options = ROWS[case]
    program = p.attention(dtype=bf16, **options)
    for m, n in [(1, 1), (21, 37)]:
        q, k, v = (
            random(i, 1, 2, r, d, dtype=torch.bfloat16)
            for i, (r, d) in enumerate([(m, options["e"]), (n, options["e"]), (n, options["f"])])
        )
        actual = run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.125})["O"]
        assert (actual.double() - attention_oracle(q, k, v, 0.125, **options)).abs().max() < 2e-2


def test_strided_and_unaligned_inputs():
    q, k, v = random(1, 1, 2, 21, 16), random(2, 1, 2, 37, 16), random(3, 1, 2, 37, 16)
    expected = attention_oracle(q, k, v, 0.2, causal=True)
    program = p.attention(causal=True, **SMALL)
    tensors = {"Q": strided_copy(q), "K": k.transpose(1, 2).contiguous().transpose(1, 2), "V": strided_copy(v)}
    close(run(program, tensors, {"scale": 0.2})["O"], expected, 3e-6)
    tensors = {"Q": strided_copy(q, last=True), "K": strided_copy(k, last=True), "V": strided_copy(v, last=True)}
    close(run(program, tensors, {"scale": 0.2}, strided=frozenset("QKV"))["O"], expected, 3e-6)


def test_rows_of_minus_infinity_and_padding_that_is_no_number():
    program = p.attention(**SMALL)
    q, room = random(1, 1, 1, 5, 16), torch.full((1, 1, 70, 16), math.nan)
    room[:, :, :50] = random(2, 1, 1, 50, 16)
    k = room[:, :, :50]
    v = k.clone()
    k[:, :, :33, 0], q[:, :, :, 0] = -INF, 1.0  # the first tiles are all -inf: the maximum stays at the lowest number
    close(run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.2})["O"], attention_oracle(q, k, v, 0.2), 3e-6)
    k[..., 0] = -INF
    assert run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.2})["O"].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_logarithms_of_sums(rows):
    for m, n in [(1, 1), (2, 200), (7, 65)]:
        x = random(m * n, m, n) * 10
        x[0, : n // 2] = -INF
        close(run(p.log_sum_exp(rows=rows, tile=64), {"X": x})["L"], x.double().logsumexp(-1), 1e-6)
        close(run(p.log_sum_exp(rows=rows, tile=16, lanes_in_rows=True), {"X": x.t().contiguous()})["L"], x.double().logsumexp(-1), 1e-6)


def test_exponents_that_overflow_in_base_two():
    """Rows of the lowest number, such as masks that are added, and differences of very large numbers."""
    x = torch.full((4, 150), LOWEST)
    x[1, 3] = 2.0
    x[2] = random(1, 150) * 1e30
    x[3], x[3, 100] = -INF, LOWEST
    expected = x.double().logsumexp(-1)
    close(run(p.log_sum_exp(rows=2, tile=64), {"X": x})["L"] / 1e30, expected / 1e30, 1e-6)
    result = run(p.log_sum_exp(rows=1, tile=32), {"X": x[:2]})["L"]
    assert result[0] == LOWEST and abs(result[1] - 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"rows": 4}, {"rows": 1}, {"rows": 3, "tile": 48}], ids=str)
def test_few_rows(options, dtype):
    program = p.decode(**{"e": 24, "f": 16, "tile": 16, "dtype": bf16 if dtype == torch.bfloat16 else p.f32, **options})
    r = options["rows"]
    for n in (1, 7, 53):
        q, k, v = random(1, 2, 3 * r, 24, dtype=dtype), random(2, 2, 3, n, 24, dtype=dtype), random(3, 2, 3, n, 16, dtype=dtype)
        expected = attention_oracle(q.view(2, 3, r, 24), k, v, 0.1).reshape(2, 3 * r, 16)
        close(run(program, {"Q": q, "K": k, "V": v}, {"scale": 0.1})["O"], expected, 3e-6 if dtype == torch.float32 else 1e-2)


def test_a_gathered_row_of_the_streamed_operand():
    for t, v in [(1, 1), (17, 53)]:
        x, w, y = random(t, t, 20), random(v, v, 20), torch.arange(t, dtype=torch.int32) * 7 % v
        expected = torch.nn.functional.cross_entropy(x.double() @ w.double().t(), y.long(), reduction="none")
        close(run(p.cross_entropy(e=20, rows=16, tile=16), {"X": x, "W": w, "Y": y})["L"], expected, 1e-5)


@pytest.mark.parametrize("n", [16, 1, 21])
def test_moments_beside_a_product(n):
    for m, e in [(1, 1), (19, 70)]:
        x, w = random(m, m, e) + 3, random(e, e, n)
        y = torch.nn.functional.layer_norm(x.double(), (e,), eps=1e-5)
        close(run(p.norm_matmul(n=n, rows=16, tile=32), {"X": x, "W": w}, {"eps": 1e-5})["O"], y @ w.double(), 3e-5)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_first_place_of_an_extreme(rows, smallest):
    for m, n in [(1, 1), (4, 300)]:
        x = torch.randint(-4, 4, (m, n), generator=torch.Generator().manual_seed(n)).float()  # many ties: the first one counts
        result = run(p.best(rows=rows, tile=64, smallest=smallest), {"X": x})
        value = x.amin(-1) if smallest else x.amax(-1)
        assert torch.equal(result["V"], value)
        assert torch.equal(result["I"].long(), (x == value[:, None]).int().argmax(-1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype, transposed):
    program = p.matmul(dtype=bf16 if dtype == torch.bfloat16 else p.f32, transposed=transposed)
    for m, n, k in [(1, 1, 1), (67, 35, 150)]:
        a, b = random(m, m, k, dtype=dtype), random(n, k, n, dtype=dtype)
        given = b.t().contiguous() if transposed else b
        expected = (a.double() @ b.double()).to(dtype)
        close(run(program, {"A": a, "B": given})["C"], expected, 1e-5 * math.sqrt(k) if dtype == torch.float32 else 1.2e-2)


def test_an_operand_of_the_contracted_rank_alone():
    for m, n in [(1, 1), (19, 37)]:
        w, v = random(m, n), random(n, m, n, 24)
        expected = torch.einsum("p,mpf->mf", w.double().exp(), v.double())
        actual = run(p.weighted_sums(rows=16, f=24, tile=16), {"W": w, "V": v})["S"].double()
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_loops_over_one_rank_and_one_inside_another():
    for m, n in [(1, 1), (3, 70)]:
        x = random(n, m, n).abs()
        result = run(p.normalise(tile=32), {"X": x})
        close(result["D"], x.double().sum(-1), 1e-5)
        close(result["Y"], x.double() / x.double().sum(-1, keepdim=True), 1e-5)
    for i, j in [(1, 1), (9, 150), (16, 64)]:
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
    for rows, i, j in [(3, 1, 1), (5, 3, 70)]:
        t, index = random(j, rows, j), torch.arange(i, dtype=torch.int32) % rows
        row = t[index.long()]
        shifted = torch.cat([torch.full((i, 1), -1.0), row[:, :-1]], 1)
        close(run(p.table_lookup(), {"T": t, "I": index})["Y"], row.double() + 10 * shifted.double() + 100 * row.flip(1).double(), 1e-5)


def test_empty_extents():
    program = p.attention(**SMALL)
    q, k = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 0, 16)
    assert run(program, {"Q": q, "K": k, "V": k}, {"scale": 1.0})["O"].isnan().all()  # 0 / 0
    assert run(program, {"Q": q[:, :, :0], "K": q, "V": q}, {"scale": 1.0})["O"].numel() == 0
    assert run(p.log_sum_exp(), {"X": torch.zeros(3, 0)})["L"].tolist() == [-INF] * 3


# running reductions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_last", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("op", ["sum", "prod", "max", "min"])
def test_running_reductions(op, exclusive, rows_last):
    streamed = scanned(op, rows=2, tile=16, exclusive=exclusive, rows_last=rows_last)
    whole = scanned(op, rows=4, size=21, exclusive=exclusive, rows_last=rows_last)
    for program, m, n in ((streamed, 3, 37), (streamed, 1, 1), (whole, 5, 21)):
        x = values(p.f32, m, n)
        actual = run(program, {"X": x.t().contiguous() if rows_last else x})["Y"]
        torch.testing.assert_close((actual.t() if rows_last else actual).double(), oracle(op, x, exclusive), rtol=1e-5, atol=1e-5)


# schedules ----------------------------------------------------------------------------------------------------------------------------

OPTIONS = (
    {"edge": "mask"}, {"persistent": True}, {"stages": 1}, {"precision": "tf32x3"},
    {"edge": "mask", "persistent": True, "warps": 8, "stages": 3},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_a_kernel_change_no_result(options):
    for program, tensors, scalars, expected in _samples():
        schedule = Schedule.from_dict({"kernel": {program.name: options}})
        found = run(program, tensors, scalars, schedule=schedule)
        for name, wanted in expected.items():
            close(found[name], wanted, 2e-5)


@pytest.mark.parametrize("order", ["rising", "zigzag"])
def test_the_order_of_the_tasks_changes_no_result(order):
    for program, tensors, scalars, expected in _samples():
        found = run(program, tensors, scalars, schedule=Schedule.make(grid_order=order))
        for name, wanted in expected.items():
            close(found[name], wanted, 2e-5)


def _samples():
    q, k, v = random(1, 1, 2, 21, 16), random(2, 1, 2, 37, 16), random(3, 1, 2, 37, 16)
    rows = p.attention(causal=True, **SMALL)
    yield rows, {"Q": q, "K": k, "V": v}, {"scale": 0.3}, {"O": attention_oracle(q, k, v, 0.3, causal=True)}
    x = random(4, 5, 150)
    yield p.log_sum_exp(rows=2, tile=64), {"X": x}, {}, {"L": x.double().logsumexp(-1)}
    a, b = random(5, 67, 70), random(6, 70, 35)
    yield p.matmul(), {"A": a, "B": b}, {}, {"C": a.double() @ b.double()}


# random programs ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100, 109))
def test_random_program(seed):
    program = random_program(seed)
    for extents in ({"b": 1, "m": 1, "p": 1}, {"b": 1, "m": 9, "p": 33}):
        tensors = random_tensors(program, extents, seed)
        expected = run_program(program, {name: t.numpy() for name, t in tensors.items()}, {}, dtype=np.float64, garbage=None)
        actual = run(program, tensors)
        for name, reference in expected.items():
            wanted = torch.as_tensor(np.asarray(reference)).double()
            torch.testing.assert_close(
                actual[name].double(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
