"""The processor this program runs on, as a `Target`: what the system says, peaks estimated from it, or measured briefly."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..ir.types import f32
from .machine import Basis, Cache, Memory, Target, Unit, read_target

_COMPUTE = ("avx", "amx", "fma", "f16c", "sse4", "ssse3", "popcnt", "bmi", "gfni", "asimd", "sve", "sme", "bf16", "i8mm", "fphp")
_SPECIAL_COST = 18  # vector instructions of a polynomial exp with its range reduction
_BANDWIDTH_A_CORE, _BANDWIDTH_A_SOCKET = 15e9, 200e9  # typical of servers with DDR4 and DDR5


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure_host` found: bytes a second of a copy (read and write), operations a second of the best f32 and bf16 product."""

    copy_bandwidth: float
    f32_flops: float
    bf16_flops: float


@dataclass(frozen=True, slots=True)
class _Processor:
    vendor: str
    family: int
    model: str
    mhz: float
    features: frozenset[str]


def host_target(root: str = "/", *, cores: tuple[int, ...] | None = None) -> Target:
    """This machine's processor: features, usable cores, caches, memory, and peaks *estimated* from features and clock.

    Only cores this process may run on count. `root` holds `proc` and `sys`; where they are absent the generic description stands in.
    """
    generic = replace(read_target("cpu:generic"), name="cpu")
    allowed = cores if cores is not None else _allowed_cores()
    try:
        cpuinfo = (Path(root) / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        workers = dict(generic.limits) | {"threads": len(allowed)}
        return replace(generic, cores=len(allowed), description=platform.processor() or "a CPU", limits=tuple(sorted(workers.items())))
    sysfs = Path(root) / "sys/devices/system/cpu"
    processor = _parse_cpuinfo(cpuinfo, _max_mhz(sysfs))
    count = _physical_cores(sysfs, allowed)
    width = _vector_width(processor.features)
    limits = {
        "vector_width": width,
        "registers": 32 if width == 16 or processor.features & {"asimd", "sve"} else 16,
        "threads": count,
        "hardware_threads": len(allowed),
        "alignment": 64,
    }
    return replace(
        generic,
        description=f"{processor.model}, {count} cores, {width} f32 lanes",
        cores=count,
        units=_estimated_units(processor, width, count),
        memories=(_memory(Path(root), count),),
        caches=_caches(sysfs, allowed[0] if allowed else 0) or generic.caches,
        limits=tuple(sorted(limits.items())),
        limits_source="/proc/cpuinfo, sysfs and the affinity mask of the process",
        features=tuple(sorted(processor.features)),
    )


def _allowed_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _max_mhz(sysfs: Path) -> float | None:
    try:
        return int((sysfs / "cpu0/cpufreq/cpuinfo_max_freq").read_text()) / 1e3
    except (OSError, ValueError):
        return None  # virtual machines have no frequency table; cpuinfo says what it runs at


def _parse_cpuinfo(text: str, max_mhz: float | None) -> _Processor:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = fields.get("flags") or fields.get("Features") or ""
    family = fields.get("cpu family", "0")
    return _Processor(
        vendor=fields.get("vendor_id", ""),
        family=int(family) if family.isdigit() else 0,
        model=fields.get("model name") or fields.get("CPU part") or "a CPU",
        mhz=max_mhz or round(float(fields.get("cpu MHz") or 2500.0), -2),  # rounded: the description of a machine must not flicker
        features=frozenset(f for f in features.split() if f.startswith(_COMPUTE)),
    )


def _vector_width(features: frozenset[str]) -> int:
    if "avx512f" in features:
        return 16
    return 8 if "avx2" in features or "avx" in features else 4


def _physical_cores(sysfs: Path, allowed: tuple[int, ...]) -> int:
    """Allowed cores, hardware threads of one core counted once."""
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add((sysfs / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def _fma_pipes(processor: _Processor, width: int) -> int:
    """Fused multiply-adds of full width a cycle: 2, but 1 where 512-bit ones take two cycles (AMD family 25) or mul and add are apart."""
    if width == 16 and processor.vendor == "AuthenticAMD" and processor.family <= 25:
        return 1
    return 2 if processor.features & {"fma", "asimd", "sve"} else 1


def _estimated_units(processor: _Processor, width: int, cores: int) -> tuple[Unit, ...]:
    clock = processor.mhz * 1e6
    instructions = cores * clock * _fma_pipes(processor, width)
    fma = instructions * width * 2
    matrix = {"f32": fma, "f64": fma / 2}
    if "avx512_bf16" in processor.features:
        matrix["bf16"] = fma * 2
    if processor.features & {"avx512_vnni", "avx_vnni"}:
        matrix["i8"] = fma * 4
    vector = {"f32": instructions * width, "f64": instructions * width / 2, "i32": instructions * width}
    special = {name: rate / _SPECIAL_COST for name, rate in vector.items()}
    source = f"cores x {clock / 1e9:.2f} GHz x {width} lanes x {_fma_pipes(processor, width)} instructions a cycle"
    basis: Basis = "estimated"
    return (
        Unit("vector FMA", "matrix", "simd", tuple(sorted(matrix.items())), basis, source + " x 2"),
        Unit("vector", "vector", "simd", tuple(sorted(vector.items())), basis, source),
        Unit("polynomials", "special", "simd", tuple(sorted(special.items())), basis, f"{source} / {_SPECIAL_COST}"),
    )


def _memory(root: Path, cores: int) -> Memory:
    total = 16 << 30
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                total = max(1, round(int(line.split()[1]) / (1 << 20))) << 30
    except OSError:
        pass  # the size is only shown, 16 GiB stands in
    bandwidth = min(cores * _BANDWIDTH_A_CORE, _BANDWIDTH_A_SOCKET)
    return Memory("DRAM", total, bandwidth, "estimated", "15 GB/s a core, at most 200 GB/s")


def _caches(sysfs: Path, cpu: int) -> tuple[Cache, ...]:
    found = []
    for index in sorted((sysfs / f"cpu{cpu}/cache").glob("index*")):
        try:
            entry = {key: (index / key).read_text().strip() for key in ("level", "type", "size", "shared_cpu_list")}
            line = int((index / "coherency_line_size").read_text())
        except (OSError, ValueError):
            continue
        if entry["type"] == "Instruction" or not entry["size"]:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(entry["size"][-1], 0)
        size = int(entry["size"][:-1]) * unit if unit else int(entry["size"])
        name = f"L{entry['level']}" + ("d" if entry["type"] == "Data" else "")
        found.append(Cache(name, int(entry["level"]), size, _list_length(entry["shared_cpu_list"]), line))
    return tuple(found)


def _list_length(text: str) -> int:
    """How many numbers a list such as `0-3,8` names."""
    total = 0
    for part in text.split(","):
        low, _, high = part.partition("-")
        total += int(high or low) - int(low) + 1
    return total


def measure_host(seconds: float = 0.4) -> Measured:
    """The copy bandwidth and the best matrix product of this process, in about `seconds`, with torch and its threads as they are set.

    A lower bound of both: the products are torch's own (`matmul`, and a convolution, which goes another way), the copy is of 128 MiB.
    """
    import torch

    share = seconds / 4
    source = torch.ones(32 << 20)
    copy = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bandwidth = moved / _best_time(lambda: copy.copy_(source), share)
    n = 768
    a, b = torch.rand(n, n), torch.rand(n, n)
    image, kernel = torch.rand(1, n, 24, 32), torch.rand(n, n, 1, 1)  # 24 * 32 == n: the same product
    f32_time = min(
        _best_time(lambda: a @ b, share),
        _best_time(lambda: torch.nn.functional.conv2d(image, kernel), share),
    )
    low_a, low_b = a.bfloat16(), b.bfloat16()
    bf16_time = _best_time(lambda: low_a @ low_b, share)
    work = 2 * n**3
    return Measured(bandwidth, work / f32_time, work / bf16_time)


def _best_time(run: Callable[[], object], seconds: float) -> float:
    run()
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > until:
            return max(best, 1e-9)


def with_measured(target: Target, measured: Measured) -> Target:
    """`target` with its bandwidth and peaks replaced by what was measured; types not measured are scaled as f32 was."""
    scale = measured.f32_flops / target.peak("matrix", f32)[2]
    units = []
    for unit in target.units:
        peaks = {name: rate * scale for name, rate in unit.peaks}
        if unit.does == "matrix" and measured.bf16_flops > measured.f32_flops:
            peaks["bf16"] = measured.bf16_flops
        units.append(replace(unit, peaks=tuple(sorted(peaks.items())), basis="measured", source="the best of a few matrix products here"))
    memory = replace(target.memory, bandwidth=measured.copy_bandwidth, basis="measured", source="a copy of 128 MiB here")
    return replace(target, units=tuple(units), memories=(memory, *target.memories[1:]))
