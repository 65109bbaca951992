"""Emitted Triton kernels, interpreted, against eager PyTorch: cascades of every kind, random extents, strides, infinities, empty ranges.

Nothing here needs a GPU, and nothing here says what a GPU makes of the kernels. What is allocated and never written holds NaN.
"""

from __future__ import annotations

import functools
import math

import einfall as ef
import pytest
import torch
from cascades import CASES, Case, make_inputs, traced
from einfall.compiler.interpreted import interpreted
from einfall.compiler.trace import trace
from einfall.ir.binding import bind_sizes
from einfall.schedules.target import load_target
from einfall.tuner.verify import expectations
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from strategies import cascades
from variety import VARIETY

BY_NAME = {case.name: case for case in CASES}
RESIDENT = ("e", "f")  # held whole in a tile by these plans: an executable has them fixed
TILES = {"m": 16, "p": 16, "t": 16, "v": 32, "n": 16}
SM90 = load_target("cuda:sm_90")


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors hold NaN, or the largest integer, until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def results(value):
    return value if isinstance(value, tuple) else (value,)


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


# cascades of every kind, with the default schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIETY)
def test_cascades_of_every_kind(name):
    entry = VARIETY[name]
    tensors, cascade = entry.tensors(seed=1), entry.cascade()
    found = results(interpreted(cascade, sizes=bind_sizes(cascade, tensors), target=SM90)(*tensors.values()))
    check_results(cascade, tensors, {}, found)


def check_results(cascade, tensors, scalars, found):
    """As near to the reference in float64 as eager PyTorch and the conditioning of the results allow; differences may cancel to nothing."""
    size = max([1.0, *(float(t.abs().max()) for t in tensors.values() if t.is_floating_point() and t.numel())])
    for x, expected in zip(found, expectations(cascade, tensors, scalars, 1, {}), strict=True):
        assert x.shape == expected.exact.shape, expected.name
        if not expected.dtype.is_float:  # a place or a decision may fall otherwise where values lie within a rounding
            assert float((x.long() != expected.exact.long()).double().mean()) <= expected.tolerance + 0.1, expected.name
            continue
        told = torch.isfinite(expected.exact) & torch.isfinite(expected.eager.double())
        error = (x.double() - expected.exact)[told].abs().max() if told.any() else 0.0
        allowed = expected.tolerance * expected.scale if math.isfinite(expected.tolerance) else math.inf
        assert error <= allowed + 4e-6 * size**2, f"{expected.name} is off by {error:.3g} in\n{cascade}"


# one executable, any extents ----------------------------------------------------------------------------------------------------------


def held(case: Case) -> tuple[str, ...]:
    return tuple(r for r in RESIDENT if r in case.sizes and r != case.reduced)


@functools.cache
def executable(name: str, dtype: ef.DType, resident: int, gaps: bool = False):
    case = BY_NAME[name]
    sizes = {**dict.fromkeys(case.sizes, 64), **dict.fromkeys(held(case), resident)}
    tiles = {r: n for r, n in TILES.items() if r in case.sizes and r not in held(case)}
    cascade, schedule = traced(case, dtype), ef.Schedule.from_dict({"tile": tiles})
    strided = frozenset(t.name for t in cascade.inputs) if gaps else frozenset()
    return interpreted(cascade, sizes=sizes, target=SM90, schedule=schedule, strided=strided)


def laid_out(t: torch.Tensor, kind: int) -> torch.Tensor:
    """The same values in other memory: 1 transposes the outermost axes in memory, 2 leaves gaps along the last, 3 shifts the start."""
    if kind == 1 and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 2:
        wide = torch.full((*t.shape[:-1], t.shape[-1] * 2 + 1), math.nan if t.is_floating_point() else 99).to(t.dtype)
        return wide[..., : 2 * t.shape[-1] : 2].copy_(t)
    if kind == 3:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    return t


@st.composite
def shapes(draw, case: Case):
    sizes = {r: draw(st.sampled_from((1, 2, 7, 16, 17, 33))) for r in case.sizes}
    sizes.update({r: draw(st.sampled_from((1, 2))) for r in ("b", "h", "g", "r") if r in sizes})
    if case.name in ("causal", "window"):
        sizes["p"] = max(sizes["p"], sizes["m"])
    return {**sizes, **dict.fromkeys(held(case), draw(st.sampled_from((1, 16, 24))))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", BY_NAME)
def test_random_extents_strides_and_values(name, dtype):
    case = BY_NAME[name]
    kind = ef.f32 if dtype == torch.float32 else ef.bf16

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        sizes = data.draw(shapes(case))
        layout = data.draw(st.sampled_from((0, 1, 2, 3)))
        tensors = {n: laid_out(t, layout) for n, t in make_inputs(case, sizes, data.draw(st.integers(0, 2**16)), dtype).items()}
        gaps = any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors.values())
        exe = executable(name, kind, next((sizes[r] for r in held(case)), 1), gaps)
        found = results(exe(*tensors.values(), **case.scalars))
        exact = results(case.oracle(*(t.double() if t.is_floating_point() else t for t in tensors.values()), *case.scalars.values()))
        eager = results(case.oracle(*tensors.values(), *case.scalars.values()))
        for f, g, x in zip(found, eager, exact, strict=True):
            close(f, g, x, dtype)

    check()


@pytest.mark.parametrize("name", ["log_sum_exp", "mean_variance", "temperature_average", "best"])
def test_infinities(name):
    case = BY_NAME[name]

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        sizes = data.draw(shapes(case))
        tensors = make_inputs(case, sizes, data.draw(st.integers(0, 2**16)))
        X = tensors["X"]
        for value in data.draw(st.lists(st.sampled_from((-math.inf, math.inf, -1e30, 1e4)), max_size=4)):
            X[data.draw(st.integers(0, X.shape[0] - 1)), data.draw(st.integers(0, X.shape[1] - 1))] = value
        if data.draw(st.booleans()):
            X[data.draw(st.integers(0, X.shape[0] - 1))] = -math.inf
        exe = executable(name, ef.f32, next((sizes[r] for r in held(case)), 1))
        found = results(exe(*tensors.values(), **case.scalars))
        exact = results(case.oracle(*(t.double() for t in tensors.values())))
        eager = results(case.oracle(*tensors.values()))
        for f, g, x in zip(found, eager, exact, strict=True):
            close(f, g, x, torch.float32)

    check()


def test_rows_that_see_nothing_and_padding_that_is_no_number():
    case = BY_NAME["ragged"]
    sizes = {"b": 3, "h": 1, "m": 5, "p": 37, "e": 16, "f": 16}
    tensors = make_inputs(case, sizes, 11)
    tensors["L"] = torch.tensor([0, 37, 21], dtype=torch.int32)
    for b, length in enumerate(tensors["L"].tolist()):
        tensors["K"][b, :, length:] = math.nan
        tensors["V"][b, :, length:] = math.inf
    (found,) = results(executable("ragged", ef.f32, 16)(*tensors.values(), **case.scalars))
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    clean = {n: torch.nan_to_num(t, nan=0.0, posinf=0.0) if t.is_floating_point() else t for n, t in tensors.items()}
    exact = case.oracle(*(t.double() if t.is_floating_point() else t for t in clean.values()), *case.scalars.values())
    close(found[1:], case.oracle(*clean.values(), *case.scalars.values())[1:], exact[1:], torch.float32)


NOTHING = {"plain": math.nan, "log_sum_exp": -math.inf, "rms_matmul": math.nan, "mean_variance": math.nan}  # over an empty rank


@pytest.mark.parametrize("name", NOTHING)
def test_empty_extents(name):
    case = BY_NAME[name]
    for rank in set(case.sizes) - set(held(case)):
        sizes = {**dict.fromkeys(case.sizes, 3), **dict.fromkeys(held(case), 16), rank: 0}
        for x in results(executable(name, ef.f32, 16)(*make_inputs(case, sizes, 1).values(), **case.scalars)):
            assert (x.numel() > 0) == (rank == case.reduced)
            torch.testing.assert_close(x, torch.full_like(x, NOTHING[name]), equal_nan=True)


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("dtype", [ef.f32, ef.i32, ef.i8], ids=str)
def test_places_of_extremes_of_every_type_and_in_tiles_of_one(dtype, tile):
    x = torch.randint(-50, 50, (5, 33), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    x = x.to({"f32": torch.float32, "i32": torch.int32, "i8": torch.int8}[dtype.name])
    cascade = trace(BY_NAME["best"].function, dtypes={"X": dtype})
    schedule = ef.Schedule.from_dict({"tile": {"m": 2, "p": tile}})
    value, place = interpreted(cascade, sizes={"m": 5, "p": 33}, target=SM90, schedule=schedule)(x)
    assert torch.equal(value, x.amax(1))
    assert torch.equal(place.long(), (x == value[:, None]).int().argmax(1))


# random cascades ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(drawn=cascades())
def test_random_cascades(drawn):
    cascade, tensors, scalars = drawn
    sizes = bind_sizes(cascade, tensors)
    strided = frozenset(n for n, t in tensors.items() if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1)
    found = results(interpreted(cascade, sizes=sizes, target=SM90, strided=strided)(*tensors.values(), **scalars))
    check_results(cascade, tensors, scalars, found)
