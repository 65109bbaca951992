"""Tracing: the cascades that Python functions become, as golden texts and by value against eager PyTorch."""
# ruff: noqa: RET504 - the names of local variables are what is tested

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import einfall as ef
import numpy as np
import pytest
import torch
from einfall.compiler.trace import trace
from einfall.ir.check import check_cascade
from einfall.ir.reference import evaluate
from einfall.ir.text import parse_cascade, print_cascade
from einfall.ir.types import bf16, boolean, f16, i8, i32

# --- cascades as users write them ------------------------------------------------------------------------------------------------


def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    """Scaled dot-product attention."""
    S = (Q * K).sum("e") * scale           # tensors broadcast by rank *name*
    P = ef.softmax(S, over="p")            # a plain Python function built from max, exp, sum, /
    return (P * V).sum("p")


def grouped(Q: "b (g r) m e=64", K: "b g p e", V: "b g p f") -> "b (g r) m f":
    S = (Q * K).sum("e") / 8.0
    P = ef.softmax(S, "p")
    O = (P * V).sum("p")
    return O


def alibi(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    slope = ef.exp2(-8.0 * (ef.index("h") + 1) / ef.extent("h"))
    distance = ef.index("p") - ef.index("m")
    S = (Q * K).sum("e") * scale + slope * distance
    return (ef.softmax(S.where(distance <= 0), "p") * V).sum("p")


def window(Q: "b h m e", K: "b h p e", V: "b h p f", L: "b", *, width: int = 128) -> "b h m f":
    p, m = ef.index("p"), ef.index("m")
    near = (p <= m) & (p > m - width)
    S = (Q * K).sum("e").where(near & (p < L))
    P = ef.softmax(S, "p")
    return (P * V).sum("p")


def quantize(X: "b (n j=32)") -> ("b (n j)", "b n"):
    A = ef.abs(X).max("j")
    scale = ef.where(A > 0, A / 127.0, 1.0)
    C = ef.round(X / scale).to(ef.i8)
    return C, scale


def heaviest(S: "b p", K: "b p e", *, k: int = 4):
    W, I = S.topk("p", k=k, into="s")
    Kept = K.at(p=I)
    return (W * Kept).sum("s"), I


def decay(G: "b i", X: "b i e") -> "b i e":
    A = G.cumprod("i")
    before = X.cumsum("i", exclusive=True)
    return A * before


def streamed(Q: "m e", K: "(p1 p0) e", V: "(p1 p0) f") -> "m f":
    """FuseMax's cascade 5 (arXiv 2406.10491), its iterative rank written out."""

    def step(RM, RD, RNV):
        BQK = (Q * K).sum("e")
        LM = BQK.max("p0")
        NM = ef.maximum(RM, LM)
        SLN = ef.exp(BQK - NM)
        SLD = SLN.sum("p0")
        SLNV = (SLN * V).sum("p0")
        PRM = ef.exp(RM - NM)
        return {"RM": NM, "RD": RD * PRM + SLD, "RNV": RNV * PRM + SLNV}

    _, RD, RNV = ef.iterate("p1", init={"RM": -math.inf, "RD": 0.0, "RNV": 0.0}, step=step)
    AV = RNV / RD
    return AV


def shared_prefix(Q: "b e", Kp: "s e", Kt: "b t e") -> ("b", "b p e"):
    K = ef.concat(Kp, Kt, rank="p", parts=("s", "t"))
    return (Q * K).sum("e").argmax("p"), K


def merge(X: "p f", I: "p", W: "p") -> "c f":
    return (X * W).scatter_add(p=I, into="c", size=8)


def difference(X: "b p") -> "b p":
    return X - X.shift(p=-1)


def exponents(X: "b (n j=16)") -> ("b n", "b n j"):
    bits = X.bitcast("i32")
    exponent = (bits >> 23) & 255
    shared = exponent.max("j")
    M = (bits & 0x7FFFFF | 0x800000) >> ef.minimum(shared - exponent, 31)
    return shared, M


def rotary(Q: "b m e", K: "b p e") -> "b m p":
    return (ef.rope(Q, "e", position="m") * ef.rope(K, "e", position="p")).sum("e")


def masked_mean(X: "b p e", L: "b") -> "b e":
    return X.where(ef.index("p") < L).mean("p")


def paged(Q: "b e", K: "page j=4 e", table: "b n", L: "b") -> "b n j":
    kept = (ef.index("n") * 4 + ef.index("j")) < L
    Kp = K.at(page=table).where(kept)
    S = (Q * Kp).sum("e")
    return S


def newton(A: "b", *, steps: int = 5) -> "b":
    x = ef.iterate("i", init=A, step=lambda y: 0.5 * (y + A / y), size=steps)
    return x


CASES = (
    attention, grouped, alibi, window, quantize, heaviest, decay, streamed, shared_prefix, merge, difference, exponents, rotary,
    masked_mean, paged, newton,
)  # fmt: skip


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_cascade_of_a_function(function, golden):
    dtypes = dict.fromkeys("QKV", bf16) if function is attention else {}
    cascade = trace(function, dtypes=dtypes)
    text = print_cascade(cascade)
    golden(function.__name__, text)
    assert parse_cascade(text) == cascade
    check_cascade(parse_cascade(text))


def test_text_of_the_language_reference():
    wanted = """\
cascade attention(Q[b,h,m,e]: bf16, K[b,h,p,e]: bf16, V[b,h,p,f]: bf16, scale: f32) -> O[b,h,m,f]
  S0[b,h,m,p] = sum(e) Q[b,h,m,e] * K[b,h,p,e]
  S[b,h,m,p]  = S0[b,h,m,p] * scale
  M[b,h,m]    = max(p) S[b,h,m,p]
  N[b,h,m,p]  = exp(S[b,h,m,p] - M[b,h,m])
  D[b,h,m]    = sum(p) N[b,h,m,p]
  P[b,h,m,p]  = N[b,h,m,p] / D[b,h,m]
  O[b,h,m,f]  = sum(p) P[b,h,m,p] * V[b,h,p,f]
"""
    assert print_cascade(trace(attention, dtypes={"Q": bf16, "K": bf16, "V": bf16})) == wanted


# --- by value ----------------------------------------------------------------------------------------------------------------------


def run(function, *tensors, scalars=None, **static):
    named = dict(zip(inspect.signature(function).parameters, tensors, strict=False))
    cascade = trace(function, static=static, dtypes={name: i32 for name, t in named.items() if not t.is_floating_point()})
    inputs = {name: t.double() if t.is_floating_point() else t.to(torch.int32) for name, t in named.items()}
    results = tuple(evaluate(cascade, inputs, scalars or {}, dtype=torch.float64).values())
    return results if len(results) > 1 else results[0]


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def close(found, wanted):
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-9, atol=1e-9)


def test_attention_is_attention():
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 6)
    close(run(attention, q, k, v, scalars={"scale": 0.5}), torch.softmax(q @ k.mT * 0.5, -1) @ v)


def test_groups_of_query_heads_share_keys():
    q, k, v = draw(2, 6, 5, 64), draw(2, 3, 7, 64), draw(2, 3, 7, 6)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    close(run(grouped, q, k, v), torch.softmax(q @ wide[0].mT / 8, -1) @ wide[1])


def test_conditions_leave_points_out():
    q, k, v, lengths = draw(2, 3, 9, 4), draw(2, 3, 9, 4), draw(2, 3, 9, 6), torch.tensor([9, 5])
    p, m = torch.arange(9), torch.arange(9)[:, None]
    keep = ((p <= m) & (p > m - 3))[None] & (p < lengths[:, None, None])
    weights = torch.softmax((q @ k.mT).masked_fill(~keep[:, None], -math.inf), -1)
    wanted = torch.nan_to_num(weights) @ v  # a row without any point is 0: its reductions are over nothing
    close(run(window, q, k, v, lengths, width=3), wanted)


def test_alibi_biases_by_distance():
    q, k, v = draw(1, 4, 6, 4), draw(1, 4, 6, 4), draw(1, 4, 6, 3)
    slope = 2.0 ** (-8.0 * (torch.arange(4) + 1) / 4)
    distance = torch.arange(6) - torch.arange(6)[:, None]
    scores = q @ k.mT * 0.3 + slope[:, None, None] * distance
    wanted = torch.softmax(scores.masked_fill(distance > 0, -math.inf), -1) @ v
    close(run(alibi, q, k, v, scalars={"scale": 0.3}), wanted)


def test_streamed_attention_is_attention():
    q, k, v = draw(5, 4), draw(12, 4), draw(12, 3)
    cascade = trace(streamed)
    sized = parse_cascade(print_cascade(cascade).replace("\n", "\n  rank p0 = 4\n", 1))
    found = evaluate(sized, {"Q": q, "K": k, "V": v}, dtype=torch.float64)["AV"]
    close(found, torch.softmax(q @ k.T, -1) @ v)


def test_topk_then_gather():
    s, k = draw(2, 9), draw(2, 9, 3)
    summed, index = run(heaviest, s, k)
    values, wanted = s.topk(4, -1)
    assert torch.equal(index.long(), wanted)
    close(summed, torch.einsum("bs,bse->be", values, k[torch.arange(2)[:, None], wanted]))


def test_scan_shift_scatter_concat():
    g, x = draw(2, 5), draw(2, 5, 3)
    close(run(decay, g, x), g.cumprod(1)[..., None] * (x.cumsum(1) - x))
    close(run(difference, g), g - torch.nn.functional.pad(g, (1, 0))[:, :-1])
    index, w = torch.tensor([3, 0, 3, 7]), draw(4)
    rows = draw(4, 2)
    close(run(merge, rows, index, w), torch.zeros(8, 2, dtype=torch.float64).index_add_(0, index, rows * w[:, None]))
    q, kp, kt = draw(2, 3), draw(4, 3), draw(2, 5, 3)
    both = torch.cat([kp.expand(2, 4, 3), kt], 1)
    best, joined = run(shared_prefix, q, kp, kt)
    close(joined, both)
    assert torch.equal(best.long(), (q[:, None] * both).sum(-1).argmax(-1))


def test_rope_turns_by_position():
    def one(X: "m e"):
        return ef.rope(X, "e", position="m")

    x = draw(7, 6)
    angle = torch.arange(7)[:, None] * 10000.0 ** (-2 * torch.arange(3, dtype=torch.float64) / 6)
    turned = torch.view_as_real(torch.complex(x[:, :3], x[:, 3:]) * torch.polar(torch.ones_like(angle), angle))
    close(run(one, x), torch.cat([turned[..., 0], turned[..., 1]], -1))


def test_helpers_over_some_points():
    x, lengths = draw(3, 6), torch.tensor([6, 3, 2])

    def parts(X: "b p", L: "b"):
        kept = X.where(ef.index("p") < L)
        return ef.mean(kept, "p"), ef.var(kept, "p"), ef.var(kept, "p", correction=1), ef.logsumexp(kept, "p")

    found = run(parts, x, lengths)
    for i, n in enumerate(lengths.tolist()):
        row = x[i, :n]
        wanted = (row.mean(), row.var(correction=0), row.var(correction=1), row.logsumexp(0))
        for value, expected in zip(found, wanted, strict=True):
            close(value[i], expected)


def test_logsumexp_of_nothing_but_minus_infinity():
    def total(X: "b p"):
        return ef.logsumexp(X, "p")

    rows = torch.tensor([[-math.inf, -math.inf], [math.inf, 0.0], [1000.0, 1000.0]])
    close(run(total, rows), torch.tensor([-math.inf, math.inf, 1000.0 + math.log(2)], dtype=torch.float64))


def test_split_and_join_undo_each_other():
    def there_and_back(X: "b p"):
        Y = X.split("p", into="n j", j=4)
        return Y.sum("j"), (Y * 2.0).join("n j", into="q")

    x = draw(2, 12)
    sums, back = run(there_and_back, x)
    close(sums, x.reshape(2, 3, 4).sum(-1))
    close(back, 2 * x)


def test_gather_under_a_condition_reads_nothing_where_it_is_false():
    k, table = draw(3, 4, 2), torch.tensor([[2, 0], [1, -1]])
    lengths = torch.tensor([6, 3])
    q = draw(2, 2)
    wanted = torch.zeros(2, 2, 4, dtype=torch.float64)
    for b in range(2):
        for at in range(int(lengths[b])):
            wanted[b, at // 4, at % 4] = q[b] @ k[table[b, at // 4], at % 4]
    close(run(paged, q, k, table, lengths), wanted)


def test_iterate_steps_and_stops():
    a = torch.tensor([4.0, 9.0, 2.0], dtype=torch.float64)
    close(run(newton, a, steps=30), a.sqrt())

    def until_large(A: "b", *, limit: float = 100.0):
        def step(x, most):
            doubled = x * 2.0
            return doubled, doubled.max("b")

        x, _ = ef.iterate("i", init={"x": A, "most": 0.0}, step=step, until=lambda most: most > limit, size=50)
        return x

    close(run(until_large, a, scalars={"limit": 100.0}), a * 16)

    def until_still(A: "") -> "":
        def still(y, before):
            moved = ef.abs(y - before)  # named, yet no statement: it is read after the step
            return moved + moved < 1e-3

        y, _ = ef.iterate("i", init={"y": A, "before": 0.0}, step=lambda y, before: (0.5 * (y + 2.0 / y), y), until=still, size=50)
        return y

    wanted, before = 4.0, 0.0
    while abs(wanted - before) * 2 >= 1e-3:
        wanted, before = 0.5 * (wanted + 2.0 / wanted), wanted
    close(run(until_still, torch.tensor(4.0)), torch.tensor(wanted, dtype=torch.float64))


def test_states_gain_the_ranks_of_what_they_add():
    def sums(X: "i b e"):
        return ef.iterate("i", init=0.0, step=lambda total: total + X)

    x = draw(4, 2, 3)
    close(run(sums, x), x.sum(0))


def test_nested_blocks():
    def table(X: "i b", Y: "j b"):
        return ef.iterate("i", init=0.0, step=lambda outer: ef.iterate("j", init=outer, step=lambda inner: inner + X * Y))

    x, y = draw(3, 2), draw(4, 2)
    close(run(table, x, y), x.sum(0) * y.sum(0))


# --- names and structure -------------------------------------------------------------------------------------------------------------


def statements(function, **options):
    return print_cascade(trace(function, **options)).splitlines()[1:]


def test_equal_expressions_are_one_statement():
    def twice(X: "b p"):
        first = ef.exp(X).sum("p")
        second = ef.exp(X).sum("p")
        return first * second

    assert statements(twice) == ["  first[b] = sum(p) exp(X[b,p])", "  O[b]     = first[b] * first[b]"]


def test_a_second_use_of_a_name_gets_a_number():
    def two(X: "b p", Y: "b p"):
        return ef.softmax(X, "p") + ef.softmax(Y, "p")

    lines = [line.split("[")[0].strip() for line in statements(two)]
    assert lines == ["M", "N", "D", "M2", "N2", "D2", "O"]


def test_the_outermost_function_names():
    def inner(a):
        total = a.sum("p")
        return total

    def outer(X: "b p"):
        S = inner(X)
        return ef.exp(S)

    assert statements(outer) == ["  S[b] = sum(p) X[b,p]", "  O[b] = exp(S[b])"]


def test_a_helpers_argument_names_only_what_needs_a_name():
    def square(a):
        return a * a

    def halve(a):
        return a / 2.0

    def body(X: "b p", Y: "b p"):
        return halve(X + Y).sum("p") + square(ef.exp(X) - ef.exp(Y)).sum("p")

    assert statements(body) == [
        "  O0[b]  = sum(p) (X[b,p] + Y[b,p]) / 2.0",
        "  a[b,p] = exp(X[b,p]) - exp(Y[b,p])",
        "  O1[b]  = sum(p) a[b,p] * a[b,p]",
        "  O[b]   = O0[b] + O1[b]",
    ]


def test_names_that_are_taken():
    def body(O: "b p", S0: "b p"):
        S = ef.exp(O.sum("p"))
        O = (S * S0).sum("p")  # a local variable may be called like an argument: it is another tensor
        return O, S.max("b")

    assert statements(body) == [
        "  S1[b] = sum(p) O[b,p]",
        "  S[b]  = exp(S1[b])",
        "  O2[b] = sum(p) S[b] * S0[b,p]",
        "  Z[]   = max(b) S[b]",
    ]


def test_unnamed_maps_do_not_blow_up():
    def chain(X: "b p"):
        for _ in range(200):
            X = X * X + 1.0
        return X.sum("p")

    cascade = trace(chain)
    assert len(cascade.body) < 420
    assert all(len(line) < 200 for line in print_cascade(cascade).splitlines())


def test_conditions_and_coordinates_do_not_blow_up():
    def body(X: "b p"):
        i = ef.index("p")
        for _ in range(60):
            X = (X * X).where(X > 0)
            i = (i + i) % 7
        return X.at(p=i).sum("p")

    assert len(print_cascade(trace(body))) < 100_000


def test_views_of_views_do_not_blow_up():
    def body(X: "p"):
        Y = X + X.at(p=0)
        for _ in range(12):
            i = ef.index("p")
            Y = (Y * Y + Y).at(p=(i * i + i + 1) % 5)
        return Y

    assert len(print_cascade(trace(body))) < 20_000


def test_sizes_that_nothing_uses_are_left_out():
    def body(X: "b p"):
        X.rename(p="q")
        X.split("p", into="u v", v=3)
        return X.sum("p")

    assert statements(body) == ["  O[b] = sum(p) X[b,p]"]


def test_a_rank_of_known_size_is_split():
    def body(X: "b p=12"):
        Y = X.split("p", into="n j", j=4)
        return Y.sum("j"), X.split("p", into="u v", v=3).sum("v"), Y.join("n j", into="p")

    lines = statements(body)
    assert lines[:5] == ["  rank p = 12", "  rank j = 4", "  rank n = 3", "  rank v = 3", "  rank u = 4"]
    x = draw(2, 12)
    by_four, by_three, same = run(body, x)
    close(by_four, x.reshape(2, 3, 4).sum(-1))
    close(by_three, x.reshape(2, 4, 3).sum(-1))
    close(same, x)


def test_a_rank_is_split_in_two_ways():
    def body(X: "b p"):
        return X.split("p", into="n j", j=4).sum("j"), X.split("p", into="u v", v=3).sum("v")

    lines = statements(body)
    assert [line for line in lines if "rank" in line] == ["  rank j = 4", "  rank p = n * j", "  rank v = 3", "  rank u = p // v"]
    x = draw(2, 12)
    by_four, by_three = run(body, x)
    close(by_four, x.reshape(2, 3, 4).sum(-1))
    close(by_three, x.reshape(2, 4, 3).sum(-1))


def test_ranks_of_one_size_are_renamed():
    def body(X: "b p=4", Y: "b q=4", Z: "b r"):
        return X.rename(p="q") * Y + Z.rename(r="q") + Z.rename(r="s").sum("s")

    x, y, z = draw(2, 4), draw(4, 2).T, draw(2, 4) + 1
    close(run(body, x, y, z), x * y + z + z.sum(1, keepdim=True))


def test_pythons_sum_of_values():
    def body(X: "b p", Y: "b p"):
        return sum([X, Y])

    assert statements(body) == ["  O[b,p] = X[b,p] + Y[b,p]"]


def test_numbers_of_numpy():
    def body(X: "b"):
        return np.float32(0.5) * X + np.int64(2) - X * np.bool_(True)

    assert statements(body) == ["  O[b] = 0.5 * X[b] + 2 - X[b] * true"]


def test_long_chains_stay_shallow():
    def chain(X: "b p", Y: "b p"):
        for _ in range(3000):
            X = X + Y
        return X

    x, y = draw(1, 2), draw(2, 1).T
    close(run(chain, x, y), x + 3000 * y)


def test_loops_lambdas_and_closures_are_plain_python():
    def conv(X: "b p", W: "k=3") -> "b p":
        taps = [X.shift(p=i - 1) * W.at(k=i) for i in range(3)]
        total = taps[0]
        for tap in taps[1:]:
            total = total + tap
        return (lambda t: ef.maximum(t, 0.0))(total)

    x, w = draw(2, 7), draw(3)
    wanted = torch.nn.functional.conv1d(x[:, None], w[None, None], padding=1)[:, 0].clamp_min(0)
    close(run(conv, x, w), wanted)


def test_a_result_that_is_an_input_or_returned_twice_is_copied():
    def same(X: "b p") -> ("b p", "p b", "b", "b"):
        S = X.sum("p")
        return X, X, S, S

    x = draw(2, 3)
    a, b, c, d = run(same, x)
    close(a, x)
    close(b, x.T)
    close(c, x.sum(1))
    close(d, x.sum(1))


def test_values_and_coordinates_may_be_returned_in_other_orders():
    def body(X: "b p") -> ("s b", "b s"):
        V, I = X.sort("p", into="s")
        return V, I

    x = draw(2, 5)
    values, index = run(body, x)
    wanted = x.sort(-1, descending=True)
    close(values, wanted.values.T)
    assert torch.equal(index.long(), wanted.indices)


def test_results_under_a_condition_hold_zero_elsewhere():
    def kept(X: "b p", L: "b"):
        Y = X.where(ef.index("p") < L) + 1.0
        return Y, Y.max("p")

    x, lengths = draw(2, 4), torch.tensor([2, 0])
    y, most = run(kept, x, lengths)
    inside = torch.arange(4) < lengths[:, None]
    close(y, torch.where(inside, x + 1, 0))
    close(most, torch.where(inside, x + 1, -math.inf).amax(1))


def test_a_condition_outlives_a_reduction_over_another_rank():
    def scores(Q: "m e", K: "p e", L: ""):
        S = (Q * K.where(ef.index("p") < L.to("i32"))).sum("e")
        return S.max("p")

    q, k = draw(2, 3), draw(5, 3)
    close(run(scores, q, k, torch.tensor(3.0)), (q @ k[:3].T).amax(1))


def test_coordinates_may_leave_the_tensor_only_as_they_say():
    def body(X: "p", I: "q"):
        p = ef.index("p")
        return X.at(p=p + 2), X.at(p=(p + 2) % ef.extent("p")), X.at(p=I), X.at(p=p * 2, fill=-1.0), X.at(p=0)

    x, index = draw(5), torch.tensor([4, 0])
    moved, turned, gathered, filled, first = run(body, x, index)
    close(moved, torch.cat([x[2:], torch.zeros(2)]))
    close(turned, x.roll(-2))
    close(gathered, x[index])
    close(filled, torch.tensor([x[0], x[2], x[4], -1, -1]))
    close(first, x[0])


def test_a_shift_of_a_shift_forgets_what_left():
    def body(X: "p"):
        return X.shift(p=-1).shift(p=1)

    x = draw(4)
    close(run(body, x), torch.cat([x[:3], torch.zeros(1)]))


# --- annotations -----------------------------------------------------------------------------------------------------------------------


def annotated(X: Annotated[torch.Tensor, "b (g r) m=4"], *, t: float) -> Annotated[torch.Tensor, "b m"]:
    return (X * t).sum("g r")


def test_annotations_of_every_kind():
    """This module has `from __future__ import annotations`, so every annotation in it is the text of one."""
    wanted = statements(annotated)

    def with_strings(X, *, t):
        return (X * t).sum("g r")

    for x, result, t in (
        ("b (g r) m=4", "b m", float),
        (Annotated[torch.Tensor, "b (g r) m=4"], Annotated[torch.Tensor, "b m"], "float"),
        ("'b (g r) m=4'", "'b m'", "float"),
        ('Annotated[torch.Tensor, "b (g r) m=4"]', '"b m"', float),
    ):
        with_strings.__annotations__ = {"X": x, "t": t, "return": result}
        assert statements(with_strings) == wanted


def test_several_results_in_annotations():
    def body(X):
        S = X.sum("p")
        return S, X

    for result in (("b", "p b"), '("b", "p b")', "('b', 'p b')", 'tuple[Annotated[T, "b"], Annotated[T, "p b"]]'):
        body.__annotations__ = {"X": "b p", "return": result}
        assert print_cascade(trace(body)).splitlines()[0] == "cascade body(X[b,p]: f32) -> S[b], O[p,b]"


def test_without_a_result_annotation_ranks_come_in_order_of_appearance():
    def body(X: "b p", Y: "q b"):
        return X * Y

    assert print_cascade(trace(body)).splitlines()[0].endswith("-> O[b,p,q]")


def test_arguments_by_kind():
    def body(X: "b p", *, width: int = 3, causal: bool = False, t: float = 1.0, mode: str = "sum"):
        assert (width, causal, mode) == (5, True, "max")
        return X.max("p") * t

    cascade = trace(body, static={"width": 5, "causal": True, "mode": "max"}, dtypes={"X": f16})
    assert [s.name for s in cascade.scalars] == ["t"]
    assert cascade.inputs[0].dtype == f16


def test_types_that_use_settles():
    def body(X: "b p", I: "b", keep: "b p", code: "b"):
        return X.at(p=I), X.where(keep).sum("p"), code & 7

    assert [t.dtype.name for t in trace(body).inputs] == ["f32", "i32", "bool", "i32"]
    given = trace(body, dtypes={"I": ef.i64, "keep": boolean, "code": ef.u8})
    assert [t.dtype.name for t in given.inputs] == ["f32", "i64", "bool", "u8"]


def test_types_by_any_spelling():
    def body(X: "b"):
        return X.to(torch.bfloat16) + X.to("bf16") + X.to(bf16)

    assert statements(body) == ["  O[b] = bf16(X[b]) + bf16(X[b]) + bf16(X[b])"]


def test_tracing_loads_nothing_heavy():
    code = (
        "import sys\nfrom einfall.compiler.trace import trace\n"
        "def f(X: 'b p'): return X.sum('p')\nstr(trace(f))\n"
        "print([m for m in ('torch', 'lark', 'sympy', 'tvm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_a_profiler_is_put_back():
    calls = []

    def profiler(frame, event, argument):
        calls.append(event)

    sys.setprofile(profiler)
    try:
        trace(difference)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_what_a_value_shows():
    seen = []

    def body(X: "b p"):
        seen.append((X.ranks, X.dtype, repr(X), repr(X.where(X > 0).sum("p") * 2)))
        return X

    trace(body, dtypes={"X": i8})
    ranks, dtype, source, product = seen[0]
    assert (ranks, dtype) == (("b", "p"), i8)
    assert source == "<traced i8[b,p] from source>"
    assert product == "<traced i32[b] from mul>"


# --- errors ------------------------------------------------------------------------------------------------------------------------------

LEAKED = []


def _of_another_trace(X):
    LEAKED.append(X)
    return X


def _leak(X):
    leaked = []

    def step(y):
        leaked.append(y + X)
        return leaked[-1]

    ef.iterate("i", init=X, step=step, size=3)
    return leaked[-1]


ERRORS = {
    "unknown_rank": lambda X: X.sum("q"),
    "unknown_rank_nearly": lambda X: X.sum("head"),
    "no_rank": lambda X: X.max(),
    "position": lambda X: X.sum(-1),
    "dim": lambda X: X.sum(dim=1),
    "rank_twice": lambda X: X.sum("p p"),
    "truth": lambda X: X if X > 0 else -X,
    "chained_comparison": lambda X: X.where(0 < X < 1),
    "float_of_value": lambda X: math.exp(X),
    "int_of_value": lambda X: range(X),
    "iteration": lambda X: sum(X),
    "subscript": lambda X: X[0],
    "length": lambda X: len(X),
    "integer_division": lambda X: X / X.to("i32").sum("p") * (ef.index("p") / ef.extent("p")),
    "bits_of_a_float": lambda X: ef.exp(X) & 1,
    "condition_of_floats": lambda X: X.where(ef.exp(X)),
    "select_by_floats": lambda X: ef.where(ef.exp(X), X, 0.0),
    "any_of_floats": lambda X: ef.exp(X).any("p"),
    "float_coordinate": lambda X: X.at(p=ef.exp(X)),
    "unknown_coordinate": lambda X: X.at(q=0),
    "shift_by_a_half": lambda X: X.shift(p=0.5),
    "unknown_type": lambda X: X.to("f33"),
    "bitcast_sizes": lambda X: X.bitcast("i16"),
    "tensor_inside": lambda X: X * torch.ones(3),
    "tensor_on_the_left": lambda X: torch.ones(3) * X,
    "string_operand": lambda X: X * "2",
    "unsized_rank": lambda X: X * ef.index("w"),
    "sizes_clash": lambda X: ef.index("w", size=3) * ef.index("w", size=4) * X,
    "size_zero": lambda X: ef.index("w", size=0) * X,
    "split_open": lambda X: X.split("p", into="n j"),
    "split_remainder": lambda X: X * ef.index("w", size=10).split("w", into="n j", j=4).sum("n j"),
    "rename_to_another_size": lambda X: X * ef.index("w", size=10) * ef.index("v", size=9).rename(v="w"),
    "split_name_taken": lambda X: X.split("p", into="h j", j=2),
    "rename_to_taken": lambda X: X.rename(p="h"),
    "topk_of_a_fraction": lambda X: X.topk("p", k=2.5, into="s")[0],
    "concat_without_piece": lambda X: ef.concat(X, X, rank="q", parts=("s", "t")),
    "concat_rank_taken": lambda X: ef.concat(X, X.rename(p="t"), rank="h", parts=("p", "t")),
    "scatter_without_size": lambda X: X.scatter_add(p=ef.index("p"), into="c"),
    "iterate_without_size": lambda X: ef.iterate("i", init=X, step=lambda y: y),
    "iterate_lost_state": lambda X: ef.iterate("i", init={"A": X, "B": X}, step=lambda A, B: A, size=2)[0],
    "iterate_stop_varies": lambda X: ef.iterate("i", init=X, step=lambda y: y, until=lambda y: y > 0, size=2),
    "iterate_stop_reduces": lambda X: ef.iterate("i", init=X, step=lambda y: y, until=lambda y: (y > 0).all("b h p"), size=2),
    "reduce_over_the_step": lambda X: ef.iterate("p", init=0.0, step=lambda y: y + X.sum("p")),
    "leaked_from_a_block": _leak,
    "value_of_another_trace": lambda X: X + LEAKED[0],
    "returns_none": lambda X: None,
    "returns_a_number": lambda X: 3.0,
    "returns_a_mapping": lambda X: {"X": X},
    "returns_nothing": lambda X: (),
}


def message(error, function=None):
    """The text of an error, free of paths and line numbers."""
    text = str(error).replace(str(Path(__file__)), "test_trace.py")
    text = re.sub(r"test_trace\.py:\d+", "test_trace.py:LINE", text)
    return re.sub(r"(?m)^(\s+)\d+ \|", r"\1LINE |", text)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_body(name, golden):
    def body(X: "b h p"):
        return ERRORS[name](X)

    LEAKED.clear()
    if name == "value_of_another_trace":
        other = _with_annotation(_of_another_trace, "b h p")
        trace(other)
    with pytest.raises(ef.CascadeError) as caught:
        trace(body)
    golden(f"error_{name}", message(caught.value))


def _with_annotation(function, text):
    function.__annotations__ = {"X": text}
    return function


SIGNATURES = {
    "stray_character": ({"X": "b, p"}, {}),
    "open_group": ({"X": "b (g r"}, {}),
    "nested_group": ({"X": "b ((g r))"}, {}),
    "empty_group": ({"X": "b ()"}, {}),
    "closing_bracket": ({"X": "b g) r"}, {}),
    "repeated_rank": ({"X": "b m m"}, {}),
    "size_of_nothing": ({"X": "b m=0"}, {}),
    "size_clash": ({"X": "b m=3", "Y": "m=4"}, {}),
    "no_annotation": ({}, {}),
    "foreign_annotation": ({"X": dict}, {}),
    "result_lacks_a_rank": ({"X": "b p", "return": "b"}, {}),
    "result_has_an_unknown_rank": ({"X": "b p", "return": "b p q"}, {}),
    "too_many_results": ({"X": "b p", "return": ("b p", "p")}, {}),
    "foreign_result": ({"X": "b p", "return": list}, {}),
    "unknown_dtype_name": ({"X": "b p"}, {"dtypes": {"Z": bf16}}),
    "unknown_static": ({"X": "b p"}, {"static": {"width": 3}}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_errors_of_the_signature(name, golden):
    annotations, options = SIGNATURES[name]

    def one(X):
        return X

    def two(X, Y):
        return X * Y

    function = two if "Y" in annotations else one
    function.__annotations__ = annotations
    with pytest.raises(ef.CascadeError) as caught:
        trace(function, **options)
    golden(f"signature_{name}", message(caught.value))


def test_errors_of_static_arguments(golden):
    def body(X: "b", *, width: int):
        return X * width

    with pytest.raises(ef.CascadeError) as missing:
        trace(body)
    with pytest.raises(ef.CascadeError) as wrong:
        trace(body, static={"width": 2.5})
    golden("signature_static", f"{message(missing.value)}\n{message(wrong.value)}")


def test_functions_outside_of_a_trace():
    with pytest.raises(ef.CascadeError, match=r"@ef\.kernel"):
        ef.index("p")
    with pytest.raises(ef.CascadeError, match="traced"):
        ef.exp(1.0)
