"""The space of GPU schedules: every point lowers and is emitted, few are the same kernel, and the default is one of them.

Nothing is compiled here. Some points run in the interpreter, against float64.
"""

from __future__ import annotations

import functools
import importlib
import math
import random
import re

import einfall as ef
import pytest
from cascades import CASES, make_inputs, traced
from einfall.backends.triton.blocks import block_contractions
from einfall.backends.triton.signature import signature_of
from einfall.compiler.driver import Order, lower_cascade
from einfall.compiler.interpreted import interpreted
from einfall.compiler.search_space import derive_variant, search_space
from einfall.ir.binding import bind_sizes
from einfall.ir.errors import ScheduleError
from einfall.schedules.footprint import footprint
from einfall.schedules.gpu import default_options, options_of
from einfall.schedules.schedule import KernelOptions, Schedule
from einfall.schedules.space_gpu import gpu_space, least_shared_bytes, shared_bytes
from einfall.schedules.target import load_target
from einfall.tuner.search import Evolution, Failure, minimize
from hypothesis import given, settings
from hypothesis import strategies as st

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")
BY_NAME = {case.name: case for case in CASES}
LONG = {
    "plain": {"b": 1, "h": 32, "m": 2048, "p": 2048, "e": 128, "f": 128},
    "causal": {"b": 1, "h": 32, "m": 1024, "p": 1024, "e": 64, "f": 64},
    "grouped": {"b": 2, "g": 2, "r": 4, "m": 1, "p": 8192, "e": 128, "f": 128},
    "log_sum_exp": {"m": 40, "p": 60000},
    "cross_entropy": {"t": 512, "e": 1024, "v": 8192},
    "rms_matmul": {"m": 256, "e": 1024, "n": 512},
}  # fmt: skip
RECIPES = ("eviction.h2o", "quantization.int4_groups", "quantization.mx", "verification.speculative", "attention.paged_decode")


def recipes():
    for name in RECIPES:
        for step in importlib.import_module(f"cookbook.{name}").RECIPE.steps:
            yield f"{name}:{step.name}", step


STEPS = dict(recipes())
NAMES = (*LONG, *STEPS)


@functools.cache
def problem(name):
    """A cascade and extents."""
    if name in STEPS:
        tensors = STEPS[name].tensors(0)
        asked = STEPS[name].kernel._definition.sort(tensors, STEPS[name].arguments()).asked()
        return asked.cascade, asked.sizes
    return traced(BY_NAME[name]), LONG[name]


@functools.cache
def space_of(name, target="cuda:sm_90"):
    return search_space(*problem(name), load_target(target))[0]


def lowered(name, point, target="cuda:sm_90"):
    cascade, sizes = problem(name)
    return lower_cascade(Order(cascade, sizes, load_target(target), frozenset()), point)


def chosen(branch, **choices):
    """The point of a branch with these choices for the axes whose keys end so, and the default's for the others."""
    current = list(branch.choices_of(branch.base))
    for i, axis in enumerate(branch.axes):
        wanted = choices.get(re.split(r"[./]", axis.key)[-1])
        if wanted in axis.choices:
            current[i] = wanted
    return branch.point(current)


# every point --------------------------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(NAMES), target=st.sampled_from(TARGETS), seed=st.integers(0, 1 << 30))
@settings(max_examples=24, deadline=None)
def test_a_point_lowers_and_is_emitted_as_it_says(name, target, seed):
    space = space_of(name, target)
    point = space.sample(random.Random(seed))
    assert Schedule.from_json(point.to_json()) == point
    branch = space.branch_of(point)
    assert branch.point(branch.choices_of(point)) == point
    result = lowered(name, point, target)
    for kernel, program, source in zip(branch.kernels, result.programs, result.sources, strict=True):
        signature, options = signature_of(source), branch.options(point, kernel)
        blocked = block_contractions(program, {n: d.k_block for n, d in point.dot if d.k_block is not None})
        assert options == options_of(blocked, point, load_target(target))
        assert (signature.warps, signature.stages, signature.persistent) == (options.warps, options.stages, options.persistent)
        for rank, tile in signature.grid:
            assert branch.tiles(point, kernel).get(rank, tile) == tile


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_a_point_and_so_are_its_neighbours(name):
    space = space_of(name)
    assert space.default == lowered(name, None).schedule
    around = space.neighbours(space.default)
    assert len(around) == len(set(around)) and space.default not in around
    for point in random.Random(name).sample(around, min(3, len(around))):
        branch = space.branch_of(point)
        assert branch is not None and (branch is not space.branches[0] or space.default in space.neighbours(point))
        assert lowered(name, point).sources


@pytest.mark.parametrize("name", NAMES)
def test_features_are_of_one_length_and_tell_points_apart(name):
    space = space_of(name)
    rng = random.Random(1)
    points = list(dict.fromkeys([space.default, *(space.sample(rng) for _ in range(60))]))
    rows = [space.features(p) for p in points]
    assert len({len(row) for row in rows}) == 1
    assert not any(math.isinf(x) for row in rows for x in row)
    assert len({tuple(None if math.isnan(x) else x for x in row) for row in rows}) == len(points)


def test_small_spaces_hold_every_point_once():
    case = BY_NAME["log_sum_exp"]
    space, default = search_space(traced(case), case.sizes, load_target("cuda:sm_90"))
    points = list(space)
    assert len(points) == len(set(points)) == len(space) < 1000 and default in points
    rng = random.Random(3)
    assert {space.sample(rng) for _ in range(300)} <= set(points)
    some = rng.sample(points, 50)
    orders = (lower_cascade(Order(traced(case), case.sizes, load_target("cuda:sm_90"), frozenset()), p) for p in some)
    assert len({tuple(source.text for source in result.sources) for result in orders}) == len(some), "two points are one kernel"


def test_the_length_of_a_large_space_is_that_of_its_product():
    space = space_of("causal")
    assert len(space) == sum(math.prod(len(a.choices) for a in b.axes) for b in space.branches) > 4096


# what is of a space -------------------------------------------------------------------------------------------------------------------


def axes(space):
    return {axis.key: axis for branch in space.branches for axis in branch.axes}


def test_axes_follow_from_plan_and_target():
    nvidia, amd, older = (axes(space_of("causal", t)) for t in ("cuda:sm_90", "hip:gfx942", "cuda:sm_80"))
    assert {"m", "p", "causal/warps", "causal/stages", "causal/edge", "causal/persistent", "causal/precision", ""} <= set(nvidia)
    assert nvidia["m"].choices == (32, 64, 128, 256) and nvidia["causal/precision"].choices == ("ieee", "tf32x3")
    assert "causal/precision" not in amd, "no tf32 there"
    assert "causal/descriptors" in nvidia and "causal/descriptors" not in older, "no copy engine there"
    assert not {axis.kind for axis in nvidia.values()} - {"tile", "option", "block", "grid_order"}, "registers and layouts are a CPU's"
    assert "plain/descriptors" in axes(space_of("plain")) and not axes(space_of("plain")).keys() & {"", "plain/grid_order"}
    flat = axes(space_of("log_sum_exp"))
    assert not [key for key in flat if key.endswith(("precision", "descriptors"))], "nothing is multiplied"
    assert flat["log_sum_exp.m"].choices == (1, 2, 4), "rows share nothing, but short ones fill a tile"


def test_ten_mantissa_bits_have_to_be_asked_for():
    cascade, sizes = problem("plain")
    asked, _ = search_space(cascade, sizes, load_target("cuda:sm_90"), tf32=True)
    assert "tf32" in axes(asked)["plain/precision"].choices
    assert "tf32" not in axes(space_of("plain"))["plain/precision"].choices


def test_narrow_products_have_no_precision():
    narrow, _ = search_space(traced(BY_NAME["plain"], ef.bf16), LONG["plain"], load_target("cuda:sm_90"))
    assert "plain/precision" not in axes(narrow) and "plain/descriptors" in axes(narrow)


def test_a_stream_with_few_tasks_is_cut_in_several_ways():
    space = space_of("grouped")
    cuts = [dict(b.base.split).get("p", 1) for b in space.branches if not b.base.stream]
    assert cuts[0] == dict(space.default.split)["p"] > 1 and 1 in cuts and len(cuts) == len(set(cuts)) > 3
    assert all(n & (n - 1) == 0 and 8192 // n >= 2 * dict(space.branches[0].base.tile)["p_in"] for n in cuts)
    assert {dict(b.base.stream).get("p") for b in space.branches} == {None, "repeat"}
    assert [b.base.split for b in space_of("causal").branches] == [(), ()], "as many tasks as it takes"


def test_deep_products_have_blocks_and_short_ones_are_held():
    deep = next(a for b in space_of("cross_entropy").branches for a in b.axes if a.kind == "block")
    assert deep.choices == (None, 32, 128)
    branch = space_of("cross_entropy").branches[0]
    for k in (None, 32, 128):
        source = lowered("cross_entropy", chosen(branch, **{deep.key: k})).sources[0].text
        assert f"B_e = tl.constexpr({k or 64})" in source
    held = next(a for b in space_of("plain").branches for a in b.axes if a.kind == "block")
    assert held.choices == (None, 32, 64), "128 are held at once"
    assert "block" not in {a.kind for b in space_of("rms_matmul").branches for a in b.axes}, "its sum is the stream"


# what fits ----------------------------------------------------------------------------------------------------------------------------


def test_what_takes_too_much_is_no_point():
    """Two operands of 128 x 128 f32, three in flight, take 393216 bytes, and a block has 232448."""
    branch = space_of("plain").branches[0]
    large = chosen(branch, m=128, p=128, stages=4, warps=8)
    assert dict(large.kernel)["plain"].stages == 4 and not branch.fits(large)
    assert branch.fits(chosen(branch, m=64, p=16, stages=4, warps=4))
    assert not branch.fits(chosen(branch, m=256, p=32, stages=1, warps=2)), "256 * 128 numbers that 64 threads carry"
    points = [space_of("plain").sample(random.Random(n)) for n in range(100)]
    target = load_target("cuda:sm_90")
    for point in points:
        own = space_of("plain").branch_of(point)
        for kernel in own.kernels:
            options, tiles = own.options(point, kernel), own.tiles(point, kernel)
            least = least_shared_bytes(kernel.takes, options, tiles)
            assert least <= min(target.limit("shared_memory"), shared_bytes(kernel.takes, options, target, tiles))
            assert kernel.takes.registers(32 * options.warps, tiles) <= target.limit("registers")


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_estimate_of_shared_memory_is_what_the_tiles_take(stages):
    """What a compiler made of it for sm_90, bf16, 128 x 64 x 128: 48, 96, 128 and 160 KiB; one tile in flight is estimated higher."""
    sizes = {"b": 1, "h": 32, "m": 8192, "p": 8192, "e": 128, "f": 128}
    target = load_target("cuda:sm_90")
    schedule = Schedule.make(tile={"m": 128, "p": 64})
    (program,) = lower_cascade(Order(traced(BY_NAME["plain"], ef.bf16), sizes, target, frozenset()), schedule).programs
    found = shared_bytes(footprint(program), KernelOptions(stages=stages), target)
    assert found == {1: 64, 2: 96, 3: 128, 4: 160}[stages] << 10
    assert default_options(program, target).stages in (1, 2, 3)


def test_special_warps_need_descriptors_and_one_loop():
    branch = space_of("plain").branches[0]
    special = {"m": 64, "p": 32, "warp_specialize": True}
    assert branch.fits(chosen(branch, **special, descriptors=True, edge="mask", warps=4, stages=2))
    for missing in ({"descriptors": False}, {"edge": "split"}, {"warps": 8}):
        assert not branch.fits(chosen(branch, **special, **{"descriptors": True, "edge": "mask", "warps": 4, "stages": 2, **missing}))


def test_choices_of_the_plan_that_are_refused_are_left_out():
    cascade, sizes = problem("plain")
    target = load_target("cuda:sm_90")

    def derive(choices):
        if choices.stream:
            raise ScheduleError("not today")
        return derive_variant(cascade, choices, sizes, target)

    assert [b.base.stream for b in gpu_space(derive, Schedule(), sizes, target).branches] == [()]


def test_a_schedule_of_elsewhere_has_no_neighbours():
    space = space_of("plain")
    assert space.neighbours(Schedule.make(split={"p": 3})) == [] and space.branch_of(Schedule.make(split={"p": 3})) is None
    assert len(space.features(Schedule.make(split={"p": 3}))) == len(space.features(space.default))
    by_hand = Schedule.make(tile={"m": 48}, kernel={"plain": KernelOptions(warps=4)})  # of the space's plan, and no point of it
    assert all(space.branch_of(p) is not None for p in space.neighbours(by_hand)) and len(space.neighbours(by_hand)) > 5


def test_a_default_that_was_made_smaller_is_found_in_the_space():
    """A kernel's own tile, and fewer tiles in flight, are what a build writes down when there was no room."""
    space = space_of("plain")
    branch, half = space.branches[0], dict(space.default.tile)["m"] // 2
    options = branch.default_options(space.default, branch.kernels[0])
    fewer = KernelOptions(warps=options.warps, precision=options.precision)
    smaller = Schedule.make(tile={**dict(space.default.tile), "plain.m": half}, kernel={"plain": fewer})
    found = space.nearest(smaller)
    assert dict(found.tile)["m"] == half and "plain.m" not in dict(found.tile)
    assert [s.text for s in lowered("plain", found).sources] == [s.text for s in lowered("plain", smaller).sources]
    assert space.nearest(space.default) == space.default
    for elsewhere in (Schedule.make(split={"p": 3}), Schedule.make(tile={"m": 48})):
        assert space.nearest(elsewhere) == elsewhere


# the second emitter -------------------------------------------------------------------------------------------------------------------


def test_the_second_emitter_is_asked_for_its_own_choices_alone():
    space = space_of("log_sum_exp", "cuda:sm_90+tvm")
    assert {axis.key.partition("/")[2] for b in space.branches for axis in b.axes if axis.kind == "option"} == {"warps"}
    for seed in range(6):
        assert lowered("log_sum_exp", space.sample(random.Random(seed)), "cuda:sm_90+tvm").sources


# searched, and run --------------------------------------------------------------------------------------------------------------------


def test_a_search_goes_through_it():
    """The time of a point is made up: less for more tiles in flight and the descriptors, and failures where rows are many."""
    space = space_of("causal")

    def measure(points):
        found = []
        for point in points:
            options = dict(point.kernel).get("causal", KernelOptions())
            found.append(Failure("no room") if dict(point.tile)["m"] > 128 else 4.0 - options.stages + (not options.descriptors))
        return found

    history = minimize(space, measure, budget=32, seed=0, strategy=Evolution(space, budget=32, seed=0, seeds=[space.default]))
    assert history.trials[0].point == space.default and len({t.point for t in history}) == 32
    assert history.best.time_ms < 4.0


RUN = {
    "plain": {"b": 1, "h": 2, "m": 19, "p": 37, "e": 16, "f": 16},
    "causal": {"b": 1, "h": 2, "m": 33, "p": 33, "e": 16, "f": 24},
    "grouped": {"b": 1, "g": 1, "r": 3, "m": 2, "p": 300, "e": 16, "f": 16},
    "log_sum_exp": {"m": 3, "p": 9000},
    "cross_entropy": {"t": 9, "e": 300, "v": 70},
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_points_compute_what_the_cascade_says(name):
    cascade, target = traced(BY_NAME[name]), load_target("cuda:sm_90")
    tensors, scalars = make_inputs(BY_NAME[name], RUN[name], seed=4), BY_NAME[name].scalars
    space, _ = search_space(cascade, bind_sizes(cascade, tensors), target)
    exact = BY_NAME[name].oracle(*(t.double() if t.is_floating_point() else t for t in tensors.values()), *scalars.values())
    for seed in range(3):
        point = space.sample(random.Random(seed))
        found = interpreted(cascade, sizes=bind_sizes(cascade, tensors), target=target, schedule=point)(*tensors.values(), **scalars)
        assert (found.double() - exact).abs().max() <= 3e-5 * max(1.0, float(exact.abs().max())), point.to_json()
