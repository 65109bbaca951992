"""Compiled kernels against eager PyTorch: random extents and strides, f32 and bf16, infinities, rows that see nothing.

An executable is built once for each case and type with a fixed schedule; its run-time extents then vary freely, one and primes
included, so the same machine code is held against many shapes. The bound is twice eager's own error against float64.
"""

from __future__ import annotations

import functools
import math

import einfall as ef
import pytest
import torch
from cascades import CASES, Case, make_inputs, traced
from einfall.compiler.driver import compile_cascade
from hypothesis import given, settings
from hypothesis import strategies as st

BY_NAME = {case.name: case for case in CASES}
RESIDENT = ("e", "f")  # held whole in a tile by these plans: an executable has them fixed
TILES = {"m": 16, "p": 32, "t": 16, "v": 32, "n": 32}


@functools.cache
def executable(name: str, dtype: ef.DType, resident: int, gaps: bool = False):
    case = BY_NAME[name]
    sizes = extents_with(case, resident, dict.fromkeys(case.sizes, 64))
    tiles = {r: n for r, n in TILES.items() if r in case.sizes and r not in held(case)}
    cascade, schedule = traced(case, dtype), ef.Schedule.from_dict({"tile": tiles})
    strided = frozenset(t.name for t in cascade.inputs) if gaps else frozenset()
    return compile_cascade(cascade, sizes=sizes, target="cpu", schedule=schedule, strided=strided)


def held(case: Case) -> tuple[str, ...]:
    return tuple(r for r in RESIDENT if r in case.sizes and r != case.reduced)


def extents_with(case: Case, resident: int, sizes: dict[str, int]) -> dict[str, int]:
    return {r: (resident if r in held(case) else n) for r, n in sizes.items()}


def strided(t: torch.Tensor, kind: int) -> torch.Tensor:
    """The same values in other memory: 1 transposes the two outermost axes in memory, 2 leaves gaps along the last, 3 shifts the start."""
    if kind == 1 and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 2:
        wide = torch.empty((*t.shape[:-1], t.shape[-1] * 2 + 1), dtype=t.dtype)
        view = wide[..., : 2 * t.shape[-1] : 2]
        return view.copy_(t)
    if kind == 3:
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.view(t.shape).copy_(t)
    return t


def close(found, eager, exact, dtype):
    """found is as near to `exact` as twice eager is; NaN only where eager is; the same infinities."""
    found, eager, exact = found.double(), eager.double(), exact.double()
    assert not torch.isnan(found[~torch.isnan(eager)]).any(), "NaN where eager is finite"
    infinite = torch.isinf(exact) & ~torch.isnan(eager)
    assert torch.equal(found[infinite], exact[infinite])
    finite = torch.isfinite(exact) & torch.isfinite(eager)
    if not finite.any():
        return
    scale = exact[finite].abs().max()
    bound = 2 * (eager - exact)[finite].abs().max() + 4 * torch.finfo(dtype).eps * scale + 1e-30
    error = (found - exact)[finite].abs().max()
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


def results(value):
    return value if isinstance(value, tuple) else (value,)


@st.composite
def shapes(draw, case: Case):
    extents = st.sampled_from((1, 2, 3, 7, 16, 17, 31, 33, 64, 67, 129))
    sizes = {r: draw(extents) for r in case.sizes}
    for r in ("b", "h", "g", "r"):
        if r in sizes:
            sizes[r] = draw(st.sampled_from((1, 2, 3)))
    if case.name in ("causal", "window"):
        sizes["p"] = max(sizes["p"], sizes["m"])
    return extents_with(case, draw(st.sampled_from((1, 16, 33))), sizes)


def resident_of(case: Case, sizes: dict[str, int]) -> int:
    return next((sizes[r] for r in held(case)), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", BY_NAME)
def test_random_extents_strides_and_values(name, dtype):
    case = BY_NAME[name]
    kind = ef.f32 if dtype == torch.float32 else ef.bf16

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        sizes = data.draw(shapes(case))
        tensors = make_inputs(case, sizes, data.draw(st.integers(0, 2**16)), dtype)
        layout = data.draw(st.sampled_from((0, 1, 2, 3)))
        tensors = {n: strided(t, layout) for n, t in tensors.items()}
        gaps = any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors.values())
        exe = executable(name, kind, resident_of(case, sizes), gaps)
        found = results(exe(*tensors.values(), **case.scalars))
        exact = results(case.oracle(*(t.double() if t.is_floating_point() else t for t in tensors.values()), *case.scalars.values()))
        eager = results(case.oracle(*tensors.values(), *case.scalars.values()))
        for f, g, x in zip(found, eager, exact, strict=True):
            close(f, g, x, dtype)

    check()


@pytest.mark.parametrize("name", ["log_sum_exp", "mean_variance", "temperature_average", "best"])
def test_infinities(name):
    case = BY_NAME[name]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        sizes = data.draw(shapes(case))
        tensors = make_inputs(case, sizes, data.draw(st.integers(0, 2**16)))
        X = tensors["X"]
        for value in data.draw(st.lists(st.sampled_from((-math.inf, math.inf, -1e30, 1e4)), max_size=4)):
            X[data.draw(st.integers(0, X.shape[0] - 1)), data.draw(st.integers(0, X.shape[1] - 1))] = value
        if data.draw(st.booleans()):
            X[data.draw(st.integers(0, X.shape[0] - 1))] = -math.inf
        found = results(executable(name, ef.f32, resident_of(case, sizes))(*tensors.values(), **case.scalars))
        exact = results(case.oracle(*(t.double() for t in tensors.values())))
        eager = results(case.oracle(*tensors.values()))
        for f, g, x in zip(found, eager, exact, strict=True):
            close(f, g, x, torch.float32)

    check()


def test_rows_that_see_nothing():
    case = BY_NAME["ragged"]
    sizes = extents_with(case, 16, {"b": 3, "h": 2, "m": 5, "p": 67, "e": 16, "f": 16})
    tensors = make_inputs(case, sizes, 11)
    tensors["L"] = torch.tensor([0, 67, 31], dtype=torch.int32)
    for b, length in enumerate(tensors["L"].tolist()):
        tensors["K"][b, :, length:] = float("nan")
        tensors["V"][b, :, length:] = float("inf")
    (found,) = results(executable("ragged", ef.f32, 16)(*tensors.values(), **case.scalars))
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    clean = {n: torch.nan_to_num(t, nan=0.0, posinf=0.0) if t.is_floating_point() else t for n, t in tensors.items()}
    exact = case.oracle(*(t.double() if t.is_floating_point() else t for t in clean.values()), *case.scalars.values())
    eager = case.oracle(*clean.values(), *case.scalars.values())
    close(found[1:], eager[1:], exact[1:], torch.float32)
