"""What the strategies promise to the property tests that draw from them."""

import torch
from einfall.ir.check import check_cascade
from einfall.ir.reference import evaluate
from einfall.ir.text import parse_cascade, print_cascade
from einfall.ir.types import bf16, f32
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FINITE, SPECIAL, cascades, extents, fill, strided, tensors


@settings(max_examples=150)
@given(drawn=cascades())
def test_drawn_cascades_are_legal_and_finite_in_float64(drawn):
    cascade, given_tensors, scalars = drawn
    check_cascade(cascade)
    for name, result in evaluate(cascade, given_tensors, scalars, dtype=torch.float64).items():
        assert not result.is_floating_point() or torch.isfinite(result).all(), f"{name} of\n{cascade}"


@given(drawn=cascades(barriers=False, dtypes=(bf16, f32), modes=("normal",)))
def test_drawn_cascades_run_in_their_declared_types(drawn):
    cascade, given_tensors, scalars = drawn
    results = evaluate(cascade, given_tensors, scalars)
    assert results.keys() == {output.name for output in cascade.outputs}


@given(drawn=cascades())
def test_drawn_cascades_print_and_parse(drawn):
    assert parse_cascade(print_cascade(drawn[0])) == drawn[0]


@given(data=st.data(), n=extents(7), m=extents(5))
def test_strides_do_not_change_values(data, n, m):
    x = torch.randn(n, m, 2)
    assert torch.equal(data.draw(strided(x)), x)
    assert data.draw(tensors((n, m), bf16)).dtype == torch.bfloat16


def test_modes_are_what_they_say():
    for mode in FINITE:
        assert torch.isfinite(fill((50,), mode, 1)).all() and torch.equal(fill((50,), mode, 1), fill((50,), mode, 1))
    found = {mode: fill((50,), mode, 1) for mode in SPECIAL}
    assert found["nan"].isnan().any() and found["inf"].isposinf().any() and found["minus_inf"].isneginf().any()
    assert found["minus_inf"].isfinite().any() and found["all_minus_inf"].isneginf().all()
