"""Targets: every description loads, says where its numbers are from, and survives JSON; the host is read from the system."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from einfall.ir.errors import ScheduleError, UnsupportedError
from einfall.ir.types import bf16, boolean, f8e4m3, f32, f64, i8, i64
from einfall.schedules.host import Measured, host_target, measure_host, with_measured
from einfall.schedules.target import Target, load_target, read_target, target_names

DESCRIBED = [name for name in target_names() if name != "cpu"]


def test_the_promised_targets_are_there():
    assert {"cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "ascend:910b3"} <= set(target_names())


@pytest.mark.parametrize("name", target_names())
def test_json_round_trip_and_hash(name):
    target = load_target(name)
    again = Target.from_json(target.to_json())
    assert again == target
    assert hash(again) == hash(target)
    assert again.hash == target.hash
    assert len(target.hash) == 16
    assert replace(target, cores=target.cores + 1).hash != target.hash


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_number_has_a_source(name):
    target = read_target(name)
    assert target.name == name
    assert target.kind == name.split(":")[0]
    assert all(entry.source for entry in (*target.units, *target.memories))
    assert target.limits_source
    assert {unit.does for unit in target.units} == {"matrix", "vector", "special"}
    assert all(rate > 0 and math.isfinite(rate) for unit in target.units for _, rate in unit.peaks)


def test_what_is_built_in_this_version():
    gpus = {"cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942"}
    assert {name for name in target_names() if load_target(name).buildable} == {"cpu", "cpu:generic", *gpus}


@pytest.mark.parametrize("name", [name for name in DESCRIBED if name.startswith(("cuda", "hip"))])
def test_what_blocks_share_fits_together(name):
    limit = load_target(name).limit
    assert limit("warps_per_core") * limit("warp") == limit("threads_per_core")
    assert limit("registers_per_core") % (limit("partitions") * limit("register_unit")) == 0
    assert limit("shared_memory") + limit("shared_reserved") == limit("shared_memory_per_core")
    assert limit("register_unit") % limit("warp") == 0 and limit("shared_memory_per_core") % limit("shared_unit") == 0


def test_datasheet_figures():
    h100 = load_target("cuda:sm_90")
    assert h100.memory.bandwidth == 3.35e12
    assert h100.peak("matrix", bf16)[1:] == ("bf16", 989.4e12)
    assert h100.limit("warp") == 32
    assert h100.limit("shared_memory") == 227 * 1024
    mi300 = load_target("hip:gfx942")
    assert mi300.vector_width == 64
    assert mi300.cache(2).bytes == 4 << 20
    assert load_target("cuda:sm_80").peak("matrix", i8)[2] == 2 * load_target("cuda:sm_80").peak("matrix", bf16)[2]


def test_a_type_without_hardware_runs_in_the_next_wider_one():
    generic, a100 = load_target("cpu:generic"), load_target("cuda:sm_80")
    assert generic.peak("matrix", bf16)[1] == "f32"
    assert generic.peak("vector", boolean)[1] == "i32"
    assert generic.peak("vector", i64)[2] == generic.peak("vector", boolean)[2] / 2  # 64-bit lanes
    assert a100.peak("matrix", f8e4m3)[1] in ("f16", "bf16")
    unit, dtype, rate = a100.peak("matrix", f32)  # no f32 in the tensor cores: not f64 there, but f32 on the CUDA cores
    assert (unit.pipe, dtype, rate) == ("cuda", "f32", 19.5e12)


def test_a_type_wider_than_any_unit_is_refused():
    ascend = load_target("ascend:910b3")
    with pytest.raises(UnsupportedError, match="no unit for vector operations on f64"):
        ascend.peak("vector", f64)


def test_a_target_without_matrix_units_multiplies_on_its_vector_units():
    generic = load_target("cpu:generic")
    vector_only = replace(generic, units=tuple(u for u in generic.units if u.does == "vector"))
    assert vector_only.peak("matrix", f32)[0].does == "vector"


def test_unknown_target_names_the_nearest_and_all():
    with pytest.raises(UnsupportedError) as error:
        load_target("cuda:sm90")
    assert "unknown target 'cuda:sm90'" in str(error.value)
    assert "'cuda:sm_90'" in str(error.value)
    assert "ascend:910b3" in str(error.value)
    with pytest.raises(UnsupportedError, match="unknown target"):
        load_target("../cpu_generic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "abacus"}, "abacus"),
        ({"memories": []}, "at least one unit and one memory"),
        ({"cores": 0}, "cores"),
        ({"units": [{"name": "u", "does": "matrix", "pipe": "p", "peaks": {"f31": 1.0}, "basis": "derived", "source": "s"}]}, "f31"),
        ({"units": [{"name": "u", "does": "wonders", "pipe": "p", "peaks": {}, "basis": "derived", "source": "s"}]}, "wonders"),
        ({"units": 3}, "malformed"),
        ({"limits": None}, "malformed"),
    ],
)
def test_malformed_descriptions(change, message):
    data = {**load_target("cpu:generic").to_dict(), **change}
    with pytest.raises(ScheduleError, match=message):
        Target.from_dict(data)


def test_missing_entry_and_broken_json():
    data = load_target("cpu:generic").to_dict()
    del data["limits"]
    with pytest.raises(ScheduleError, match="lacks 'limits'"):
        Target.from_dict(data)
    with pytest.raises(ScheduleError, match="not JSON"):
        Target.from_json("{")
    with pytest.raises(ScheduleError):
        Target.from_dict([1, 2])


def machine(root: Path, *, flags: str, vendor="GenuineIntel", family=6, mhz="2000.004", cpus=4, threads=2) -> Path:
    """A `/proc` and `/sys` of a machine with `cpus` hardware threads, `threads` to a core."""
    (root / "proc").mkdir()
    block = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: Testchip 1\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\n"
    (root / "proc/cpuinfo").write_text(block * cpus)
    (root / "proc/meminfo").write_text("MemTotal:       33000000 kB\nMemFree: 1 kB\n")
    for cpu in range(cpus):
        base = root / f"sys/devices/system/cpu/cpu{cpu}"
        first = cpu // threads * threads
        (base / "topology").mkdir(parents=True)
        (base / "topology/thread_siblings_list").write_text(f"{first}-{first + threads - 1}\n" if threads > 1 else f"{cpu}\n")
        for index, (level, kind, size, shared) in enumerate(
            [(1, "Data", "48K", "0-1"), (1, "Instruction", "32K", "0-1"), (2, "Unified", "2M", "0-1"), (3, "Unified", "30720K", "0-3")]
        ):
            cache = base / f"cache/index{index}"
            cache.mkdir(parents=True)
            for name, value in [("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared), ("coherency_line_size", 64)]:
                (cache / name).write_text(f"{value}\n")
    return root


def test_host_from_the_system(tmp_path):
    root = machine(tmp_path, flags="fpu sse4_2 avx avx2 fma f16c avx512f avx512_bf16 hypervisor")
    target = host_target(str(root), cores=(0, 1, 2, 3))
    assert target.name == "cpu"
    assert (target.cores, target.threads, target.limit("hardware_threads")) == (2, 2, 4)  # two hardware threads a core
    assert (target.vector_width, target.limit("registers")) == (16, 32)
    assert target.has("avx512_bf16")
    assert target.has("fma")
    assert not target.has("hypervisor")  # says nothing about arithmetic
    assert [(c.name, c.bytes, c.shared_by) for c in target.caches] == [("L1d", 48 << 10, 2), ("L2", 2 << 20, 2), ("L3", 30 << 20, 4)]
    assert target.peak("matrix", f32)[2] == 2 * 2e9 * 16 * 2 * 2  # cores, clock, lanes, instructions, multiply and add
    assert target.peak("matrix", bf16)[2] == 2 * target.peak("matrix", f32)[2]
    assert all(entry.basis == "estimated" for entry in (*target.units, *target.memories))
    assert target.memory.bytes == 31 << 30


def test_host_counts_only_the_cores_it_may_use(tmp_path):
    root = machine(tmp_path, flags="avx avx2 fma")
    target = host_target(str(root), cores=(0, 1))
    assert (target.cores, target.limit("hardware_threads"), target.vector_width) == (1, 2, 8)


def test_host_with_half_rate_wide_vectors(tmp_path):
    root = machine(tmp_path, flags="avx512f fma", vendor="AuthenticAMD", family=25, threads=1)
    assert host_target(str(root), cores=(0, 1, 2, 3)).peak("matrix", f32)[2] == 4 * 2e9 * 16 * 2
    assert host_target(str(root), cores=(0, 1, 2, 3)).peak("matrix", bf16)[1] == "f32"  # no bf16 dot among its flags


def test_host_of_an_old_or_unknown_processor(tmp_path):
    root = machine(tmp_path, flags="sse2", threads=1)
    target = host_target(str(root), cores=(0,))
    assert target.vector_width == 4
    assert target.peak("matrix", bf16)[1] == "f32"
    bare = host_target(str(tmp_path / "nowhere"), cores=(0, 1, 2))
    assert (bare.name, bare.cores, bare.threads, bare.vector_width) == ("cpu", 3, 3, 8)


def test_the_clock_is_the_rated_one_where_the_system_knows_it(tmp_path):
    root = machine(tmp_path, flags="avx2 fma", mhz="1197.321", threads=1)
    (root / "sys/devices/system/cpu/cpu0/cpufreq").mkdir()
    (root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").write_text("3000000\n")
    assert host_target(str(root), cores=(0,)).peak("matrix", f32)[2] == 3e9 * 8 * 2 * 2


def test_this_machine_is_described_the_same_way_twice():
    assert host_target() == host_target()
    assert load_target("cpu") == host_target()


def test_measured_figures_replace_the_estimates():
    target = load_target("cpu:generic")
    measured = with_measured(target, Measured(copy_bandwidth=50e9, f32_flops=640e9, bf16_flops=900e9))
    assert measured.memory.bandwidth == 50e9
    assert measured.peak("matrix", f32)[2] == 640e9
    assert measured.peak("matrix", bf16)[1:] == ("bf16", 900e9)
    assert measured.peak("vector", f32)[2] == 2 * target.peak("vector", f32)[2]  # scaled as f32 was
    assert {u.basis for u in measured.units} == {"measured"}
    json.dumps(measured.to_dict())


def test_measuring_gives_plausible_figures():
    found = measure_host(seconds=0.05)
    assert 1e8 < found.copy_bandwidth < 1e13
    assert 1e8 < found.f32_flops < 1e15
    assert 1e7 < found.bf16_flops < 1e15
