"""What compiled kernels must be, told from the artifacts: matrix units, no spills, wide loads, from the default schedule; no device."""

import einfall as ef
import pytest
from cascades import CASES, traced
from einfall.backends.triton.emit import emit
from einfall.compiler.driver import Order, compile_cascade, lower_cascade
from einfall.schedules.schedule import KernelOptions, Schedule
from einfall.schedules.target import load_target

BY_NAME = {case.name: case for case in CASES}
UNITS = {"cuda:sm_80": "mma", "cuda:sm_90": "wgmma", "cuda:sm_100": "tcgen05.mma"}
LONG = {"m": 4096, "p": 4096, "e": 128, "f": 128, "h": 16}
STEP = {"b": 4, "g": 8, "r": 4, "m": 1, "p": 8192}


@ef.kernel
def grouped(Q: "b (g r) m e", K: "b g p e", V: "b g p f", *, scale: float) -> "b (g r) m f":
    """Query heads that share a key head, one token."""
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def nibbles(
    Q: "b (g r) m (s=2 c j=32)", K: "b g p (c j)", Ks: "b g p (s c)", V: "b g p (d k=32)", Vs: "b g p (t=2 d)"
) -> "b (g r) m (t d k)":  # fmt: skip
    """The same over packed four-bit values with a scale for every 32."""
    X = ((K.to(ef.i32) >> (4 * ef.index("s"))) & 15).to(ef.f32) * Ks.to(ef.f32)
    Y = ((V.to(ef.i32) >> (4 * ef.index("t"))) & 15).to(ef.f32) * Vs.to(ef.f32)
    return (ef.softmax((Q * X).sum("s c j"), over="p") * Y).sum("p").to(ef.bf16)


def compiled(name: str, target: str, schedule: Schedule | None = None, **sizes: int):
    """A case of `cascades.py` in bf16."""
    case = BY_NAME[name]
    extents = {**{rank: LONG.get(rank, n) for rank, n in case.sizes.items()}, **sizes}
    return compile_cascade(traced(case, ef.bf16), sizes=extents, target=target, schedule=schedule)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("target", UNITS)
def test_the_default_schedule_uses_the_matrix_units_without_spills(target, width):
    facts = compiled("causal", target, e=width, f=width).facts
    assert facts["instructions"].get(UNITS[target], 0) > 0
    assert facts["spill_bytes"] == 0 and facts["stack_bytes"] == 0
    assert facts["widest_load_bytes"] == 16
    assert any(name.startswith("cp.async") for name in facts["instructions"])  # keys are on their way while others are multiplied


@pytest.mark.parametrize("target", UNITS)
def test_one_token_against_a_long_context_reads_16_bytes_at_once_and_is_cut_into_stretches(target):
    cascade = grouped.trace(dtypes={"Q": ef.bf16, "K": ef.bf16, "V": ef.bf16})
    exe = compile_cascade(cascade, sizes={**STEP, "e": 128, "f": 128}, target=target)
    main = dict(exe.kernels[0].facts)
    assert main["widest_load_bytes"] == 16
    assert "p" in dict(exe.schedule.split)
    tasks = 4 * 8 * dict(exe.schedule.split)["p"]
    assert tasks >= load_target(target).cores


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_packed_values_are_read_16_bytes_at_once_and_unpacked_in_registers(target):
    cascade = nibbles.trace(dtypes={"Q": ef.bf16, "K": ef.u8, "Ks": ef.f16, "V": ef.u8, "Vs": ef.f16})
    exe = compile_cascade(cascade, sizes={**STEP, "s": 2, "c": 2, "j": 32, "t": 2, "d": 2, "k": 32}, target=target)
    facts = dict(exe.kernels[0].facts)
    assert facts["widest_load_bytes"] == 16 and facts["spill_bytes"] == 0
    assert any("16" in name for name in facts["instructions"] if name.startswith(("cp.async", "ld.global")))
    assert facts["instructions"].get("mma", 0) + facts["instructions"].get("wgmma", 0) > 0


@pytest.mark.parametrize(("target", "unit"), [("cuda:sm_90", "wgmma"), ("cuda:sm_100", "tcgen05.mma")])
def test_tensor_descriptors_fetch_by_the_copy_engine(target, unit):
    options = KernelOptions(warps=8, stages=3, descriptors=True)
    facts = compiled("causal", target, Schedule.make(tile={"m": 128, "p": 64}, kernel={"causal": options})).facts
    assert facts["instructions"].get("cp.async.bulk.tensor", 0) > 0 and facts["instructions"].get(unit, 0) > 0
    assert facts["spill_bytes"] == 0


def test_specialized_warps_are_more_than_were_asked_for():
    options = KernelOptions(warps=4, stages=2, descriptors=True, warp_specialize=True, edge="mask")
    facts = compiled("causal", "cuda:sm_90", Schedule.make(tile={"m": 128, "p": 64}, kernel={"causal": options})).facts
    assert facts["warps"] > 4 and facts["spill_bytes"] == 0


def test_what_does_not_fit_is_refused_by_name_and_number():
    schedule = Schedule.make(tile={"m": 256, "p": 256}, kernel={"causal": KernelOptions(warps=8, stages=4)})
    with pytest.raises(ef.ScheduleError, match=r"causal takes \d+ bytes of shared memory, and a block of cuda:sm_80 has 16\d+"):
        compiled("causal", "cuda:sm_80", schedule)


def test_a_tile_that_triton_has_not_is_refused_before_anything_is_built():
    with pytest.raises(ef.ScheduleError, match=r"is a tile of \d+ elements over .*, and Triton has 1048576 at most"):
        compiled("causal", "cuda:sm_90", Schedule.make(tile={"m": 2048, "p": 2048}))


def test_tiles_of_the_stream_are_read_at_the_head_of_the_loop_where_the_schedule_says_so():
    case = BY_NAME["causal"]
    order = Order(traced(case, ef.bf16), dict(case.sizes), load_target("cuda:sm_90"), frozenset())
    late, first = (
        lower_cascade(order, Schedule.make(kernel={"causal": KernelOptions(loads=loads)})).sources[0].text for loads in ("late", "first")
    )
    assert late.index("tl.dot(") < late.index("v = tl.load(") and first.index("v = tl.load(") < first.index("tl.dot(")
    assert late.count("tl.load(") == first.count("tl.load(")


TEXTS = {"causal": "cuda:sm_90", "layer_matmul": "cuda:sm_80", "best": "cuda:sm_90"}


@pytest.mark.parametrize("name", TEXTS)
def test_emitted_files(golden, name):
    case = BY_NAME[name]
    sizes = {rank: LONG.get(rank, n) for rank, n in case.sizes.items()}
    lowered = lower_cascade(Order(traced(case, ef.bf16), sizes, load_target(TEXTS[name]), frozenset()))
    golden(name, "\n\n".join(source.text for source in lowered.sources))


def test_emitted_file_of_packed_values(golden):
    cascade = nibbles.trace(dtypes={"Q": ef.bf16, "K": ef.u8, "Ks": ef.f16, "V": ef.u8, "Vs": ef.f16})
    sizes = {**STEP, "b": 64, "s": 2, "c": 2, "j": 32, "t": 2, "d": 2, "k": 32}
    lowered = lower_cascade(Order(cascade, sizes, load_target("cuda:sm_90"), frozenset()))
    golden("nibbles", "\n\n".join(source.text for source in lowered.sources))


def test_equal_programs_emit_equal_files():
    case = BY_NAME["causal"]
    order = Order(traced(case, ef.bf16), dict(case.sizes), load_target("cuda:sm_90"), frozenset())
    lowered = lower_cascade(order)
    assert [emit(p, lowered.schedule, order.target).hash for p in lowered.programs] == [s.hash for s in lowered.sources]
