"""Reductions done in pieces and merged: the meaning in float64, the plan, and the kernels."""

from __future__ import annotations

import einfall as ef
import pytest
import torch
from cascades import CASES, make_inputs, traced
from einfall.compiler.passes import make_plan, prepare
from einfall.compiler.passes.split_reductions import split_stream
from einfall.compiler.trace import trace
from einfall.ir.cascade import Concat
from einfall.ir.check import check_cascade
from einfall.ir.reference import evaluate
from einfall.schedules.schedule import Schedule

KEEPS_AN_INDEX = {"best"}


def differences(found, expected):
    """The largest difference; what is finite in one must be so in the other."""
    largest = 0.0
    for name, x in expected.items():
        assert torch.equal(x.isfinite(), found[name].isfinite()), name
        largest = max(largest, float((x - found[name]).nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return largest


def attend(Q: "h m e", K: "h p e", V: "h p f", L: "h", *, scale: float) -> ("h m f", "h m"):
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S.where(ef.index("p") < L), "p") * V).sum("p"), ef.var(S, "p")


@pytest.mark.parametrize("parts", [2, 3, 50])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_stretches_of_a_stream_keep_the_meaning(case, parts):
    prepared, _ = prepare(traced(case), case.sizes)
    split = split_stream(prepared, case.reduced, parts)
    if case.name in KEEPS_AN_INDEX:
        assert split == prepared
        return
    check_cascade(split)
    assert f"{case.reduced}_part" in split.all_ranks()
    tensors = make_inputs(case, case.sizes, seed=11)
    expected = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)
    assert differences(evaluate(split, tensors, case.scalars, dtype=torch.float64), expected) < 1e-10


@pytest.mark.parametrize("parts", [2, 5])
def test_kernels_of_stretches(parts, tmp_path):
    kernel = ef.kernel(attend)
    generator = torch.Generator().manual_seed(parts)
    q, k, v = (torch.randn(2, n, 16, generator=generator) for n in (3, 37, 37))
    lengths = torch.tensor([37, 5], dtype=torch.int32)
    with ef.configure(database=None, cache=tmp_path):
        exe = kernel.compile(q, k, v, lengths, scale=0.3, schedule=Schedule.make(split={"p": parts}))
        assert [step.stream for step in exe.plan.steps] == ["p_in", None]
        found = exe(q, k, v, lengths, scale=0.3)
        exe.save(tmp_path / "saved")
        again = ef.load(tmp_path / "saved")(q, k, v, lengths, scale=0.3)
    wanted = kernel.reference(q.double(), k.double(), v.double(), lengths, scale=0.3, dtype=torch.float64)
    for x, y, z in zip(found, wanted, again, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)
        assert torch.equal(x, z)


def pieces(A: "m s", B: "m t", W: "m") -> ("m", "m"):
    X = ef.concat(A, B, rank="p", parts=("s", "t"))
    X = X.where(ef.index("p") < W)
    return ef.logsumexp(X, "p"), (ef.softmax(X, "p") * ef.index("p")).sum("p")


@pytest.mark.parametrize(("s", "t"), [(5, 3), (1, 1), (7, 0), (0, 4)])
def test_pieces_that_are_masked_or_empty(s, t):
    cascade = trace(pieces, dtypes={"W": ef.i32})
    prepared, notes = prepare(cascade, {})
    assert "split_reductions" in notes
    assert not any(isinstance(statement, Concat) for statement in prepared.body)
    generator = torch.Generator().manual_seed(s)
    tensors = {"A": torch.randn(4, s, generator=generator), "B": torch.randn(4, t, generator=generator)}
    tensors["W"] = torch.tensor([1, 2, s + t, 100], dtype=torch.int32)
    expected = evaluate(cascade, tensors, dtype=torch.float64)
    assert differences(evaluate(prepared, tensors, dtype=torch.float64), expected) < 1e-12


def scored(Q: "h r e", K: "h p e", V: "h p f", *, scale: float) -> ("h r f", "h p"):
    G = (Q * K).sum("e")
    A = ef.softmax(G * scale, "p")
    return (A * V).sum("p"), A.sum("r")


@pytest.mark.parametrize(("choice", "stored"), [(None, [3]), ("keep", [3]), ("again", [2]), ("store", [1, 2])])
def test_what_becomes_of_a_product_that_is_needed_twice(choice, stored):
    sizes = {"h": 2, "r": 4, "e": 64, "p": 300, "f": 64}
    plan = make_plan(trace(scored), sizes, results={} if choice is None else {"G": choice})
    assert [len(kernel.outputs) for kernel in plan.kernels] == stored
    assert [kernel.kept for kernel in plan.kernels if kernel.kept] == ([("G",)] if choice in (None, "keep") else [])


def test_an_entry_that_names_nothing_is_refused():
    kernel = ef.kernel(scored)
    tensors = (torch.randn(2, 4, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    with pytest.raises(ef.ScheduleError, match="result\\[S9\\] names no reduction"):
        kernel.compile(*tensors, scale=1.0, schedule=Schedule.make(result={"S9": "again"}))
