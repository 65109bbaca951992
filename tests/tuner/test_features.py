"""What a cost model is told of schedules: figures worked out by hand, and rows of one length for whatever may be asked."""

from __future__ import annotations

import math
import random

import einfall as ef
import pytest
from einfall.compiler.lower import lower
from einfall.compiler.passes import make_plan
from einfall.compiler.search_space import search_space
from einfall.schedules.schedule import DotSchedule, KernelOptions, Schedule
from einfall.schedules.target import load_target
from einfall.tuner.features import described, feature_names, figures, kernel_features, profile
from einfall.tuner.search import History, minimize

PRODUCT = """cascade product(A[m,k]: f32, B[k,n]: f32) -> C[m,n]
  C[m,n] = sum(k) A[m,k] * B[k,n]"""
ROWS = """cascade rows(X[m,p]: f32) -> Y[m]
  Y[m] = sum(p) exp(X[m,p])"""
SIZES = {"m": 256, "n": 128, "k": 1024}
CPU = load_target("cpu:generic")
GPU = load_target("cuda:sm_90")


def programs(text, sizes, schedule, target=CPU):
    plan = make_plan(ef.parse(text), sizes)
    return [profile(p) for p in lower(plan, schedule, sizes, target)]


def tiles(**tile):
    return Schedule.make(tile=tile)


def test_the_work_and_the_traffic_of_a_product():
    """Tiles of 64 x 32 along 128 of k: 4 x 4 tasks of 8 passes, each of which reads 64 x 128 of A and 128 x 32 of B."""
    schedule = tiles(m=64, n=32, k=128)
    (p,) = programs(PRODUCT, SIZES, schedule)
    found = figures(p, p.sizes(schedule), SIZES, CPU)
    assert (found.tasks, found.passes) == (16, 8)
    operations = dict(found.operations)
    assert operations["matrix"] == 2 * 256 * 128 * 1024
    assert operations["special"] == 0
    stored, read = 4 * 256 * 128, 16 * 8 * 4 * (64 * 128 + 128 * 32)
    assert found.bytes[0] == read + stored
    assert found.bytes[-1] == 4 * (256 * 1024 + 1024 * 128 + 256 * 128)  # all of it lies in the last cache
    assert dict(found.seconds)["matrix"] == pytest.approx(operations["matrix"] / CPU.peak("matrix", p.counts[0].dtype)[2])


def test_figures_follow_the_tiles_without_another_program():
    """One profile, asked about other tiles, says what a profile of a program with those tiles says."""
    (p,) = programs(PRODUCT, SIZES, tiles(m=64, n=32, k=128))
    for m, n, k in ((16, 128, 64), (128, 64, 256), (256, 128, 512)):
        schedule = tiles(m=m, n=n, k=k)
        (own,) = programs(PRODUCT, SIZES, schedule)
        assert figures(p, p.sizes(schedule), SIZES, CPU) == figures(own, own.sizes(schedule), SIZES, CPU)


def test_a_kernels_own_tile_stands_before_the_common_one():
    (p,) = programs(PRODUCT, SIZES, tiles(m=64, n=32, k=128))
    assert p.sizes(Schedule.make(tile={"m": 64, f"{p.name}.m": 32}))["m"] == 32


def test_what_is_read_again_in_every_pass_stays_in_a_cache_that_holds_a_pass():
    """A vector that does not vary along the stream is fetched in each pass only past a cache that a pass overflows."""
    text = """cascade scaled(X[m,p]: f32, S[m]: f32) -> Y[m]
  Y[m] = sum(p) X[m,p] * S[m]"""
    sizes, caches = {"m": 64, "p": 1 << 16}, CPU.caches
    for p_tile in (64, 1 << 14):
        schedule = tiles(m=8, p=p_tile)
        (p,) = programs(text, sizes, schedule)
        found = figures(p, p.sizes(schedule), sizes, CPU)
        loops = {a.tensor: a.loops for a in p.accesses}
        again = (sizes["p"] // p_tile) if loops["S"] else 1
        for cache, moved in zip(caches, found.bytes[1:], strict=False):
            room = cache.bytes / (cache.shared_by or CPU.cores)
            fetched = 1 if found.pass_bytes <= room else again
            assert moved == 4 * (64 * (1 << 16) + 64 * fetched + 64)


def test_special_functions_are_counted_where_they_are_worked_out():
    sizes = {"m": 32, "p": 512}
    schedule = tiles(m=4, p=128)
    (p,) = programs(ROWS, sizes, schedule)
    assert dict(figures(p, p.sizes(schedule), sizes, CPU).operations)["special"] == 32 * 512


@pytest.mark.parametrize("target", [CPU, GPU, load_target("hip:gfx942"), load_target("ascend:910b3")], ids=lambda t: t.name)
def test_the_names_are_those_of_the_row(target):
    found = kernel_features(programs(PRODUCT, SIZES, tiles(m=64, n=32, k=128), target), tiles(m=64), SIZES, target)
    assert set(found) == set(feature_names(target))
    assert found["roofline"] == max(found["memory time"], found["matrix time"], found["vector time"], found["special time"])
    for level in ("asked", "memory"):
        assert found[f"intensity {level}"] > 0
        assert found[f"intensity {level}"] < found["matrix operations"]


def test_the_register_tile_of_a_cpu():
    """Six rows of four vectors of 8 lanes are 24 accumulators for 16 registers; 20 lanes leave a sixth of three vectors idle."""
    for rows, lanes, expected in ((6, 32, (1.5, 4.0, 0.0)), (2, 20, (6 / 16, 3.0, 1 / 6))):
        schedule = Schedule.make(tile={"m": 64, "n": 32, "k": 128}, dot={"C": DotSchedule(register=(("m", rows), ("n", lanes)), lane="n")})
        found = kernel_features(programs(PRODUCT, SIZES, schedule), schedule, SIZES, CPU)
        assert (found["accumulators"], found["vectors"], found["idle lanes"]) == pytest.approx(expected)


def test_the_room_of_a_gpu_grows_with_stages_and_tiles():
    def found(stages, m=64, warps=4):
        schedule = Schedule.make(tile={"m": m, "n": 64, "k": 64}, kernel={"product": KernelOptions(warps=warps, stages=stages)})
        profiles = programs(PRODUCT, SIZES, schedule, GPU)
        assert profiles[0].name == "product"
        return kernel_features(profiles, schedule, SIZES, GPU)

    one, three = found(1), found(3)
    assert three["shared"] == pytest.approx(3 * one["shared"])
    assert found(1, m=128)["registers"] > one["registers"] == 2 * found(1, warps=8)["registers"]
    assert 0 <= one["unoccupied"] <= three["unoccupied"] < 1


@pytest.mark.parametrize("target", [CPU, GPU], ids=lambda t: t.name)
def test_every_point_of_a_space_has_a_row_of_one_length_foreign_ones_too(target):
    cascade = ef.parse(PRODUCT)
    space, default = search_space(cascade, SIZES, target)
    full = described(space, cascade, SIZES, target)
    rng = random.Random(0)
    points = [default, *(full.sample(rng) for _ in range(20)), Schedule(), Schedule.make(tile={"m": 1 << 20}, split={"k": 7})]
    rows = [full.features(p) for p in points]
    assert {len(row) for row in rows} == {len(full.features(default))}
    assert all(math.isfinite(x) for x in rows[0][-len(feature_names(GPU)) :] if target is GPU)
    assert len({tuple(row) for row in rows[1:21]}) > 5
    assert default in full
    assert len(full) == len(space)


def test_a_described_space_is_searched():
    cascade = ef.parse(PRODUCT)
    full = described(search_space(cascade, SIZES, CPU)[0], cascade, SIZES, CPU)
    history: History[Schedule] = minimize(full, lambda ps: [1.0 + sum(n for _, n in p.tile) / 1000 for p in ps], budget=30)
    assert len(history) == min(30, len(full))
