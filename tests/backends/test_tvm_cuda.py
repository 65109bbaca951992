"""The second emitter for CUDA: its kernels, emulated on this processor, against torch in float64 and the interpreter of tile programs.

Every kernel runs twice, with the threads of a block in rising and in falling order, which must not differ in a bit: a barrier that is
missing shows so. What NVIDIA's compiler makes of the same text is looked at where it is there; nothing here has run on a device.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import cache

import numpy as np
import programs as p
import pytest
import torch
from einfall.backends.registry import backend_for
from einfall.backends.tvm_cuda import TvmCuda
from einfall.backends.tvm_cuda.build import cuda_of
from einfall.backends.tvm_cuda.emulator import emulate
from einfall.ir.errors import BindingError, BuildError, UnsupportedError
from einfall.ir.expr import Bitcast, Cast, Const, Expr, Index, Masked, Op, Tile, aligned
from einfall.ir.tile import Dot, GridRank, LoopState, Map, Reduce, Scan, Store, TileProgram
from einfall.ir.tile_reference import run_program
from einfall.ir.types import DType, bf16, boolean, e8m0, f8e4m3, f8e5m2, f16, f32, f64, i8, i16, i32, i64, u8
from einfall.schedules.fit import TooLarge
from einfall.schedules.schedule import KernelOptions, Schedule
from einfall.schedules.target import load_target
from kernels import run, strided_copy
from random_programs import random_program, random_tensors

INF = math.inf
TARGET = "cuda:sm_90+tvm"
A, B = aligned("A", "i", "j"), aligned("B", "i", "j")
TORCH = {
    f64: torch.float64, f32: torch.float32, f16: torch.float16, bf16: torch.bfloat16, i64: torch.int64, i32: torch.int32,
    i16: torch.int16, i8: torch.int8, u8: torch.uint8, boolean: torch.bool, f8e4m3: torch.float8_e4m3fn, f8e5m2: torch.float8_e5m2,
    e8m0: torch.float8_e8m0fnu,
}  # fmt: skip


def source_of(program: TileProgram, strided: frozenset[str] = frozenset(), schedule: Schedule = Schedule(), target: str = TARGET):
    return TvmCuda().emit(program, schedule, load_target(target), strided=strided)


@cache
def kernel_of(program: TileProgram, strided: frozenset[str] = frozenset(), schedule: Schedule = Schedule()):
    return emulate(source_of(program, strided, schedule))


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit, but for what is NaN in both."""
    x, y = x.reshape(-1), y.reshape(-1)
    if x.is_floating_point():
        number = ~(x.double().isnan() & y.double().isnan())
        x, y = x[number], y[number]
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def emulated(program, tensors, scalars=None, *, strided=frozenset(), schedule=Schedule(), **options):
    """The outputs, with nothing written beside them; the order of threads must not matter."""
    kernel = kernel_of(program, strided, schedule)
    rising = run(program, tensors, scalars or {}, kernel=kernel, **options)
    falling = run(program, tensors, scalars or {}, kernel=lambda *given: kernel(*given, falling=True), **options)
    for name, y in rising.items():
        assert same(y, falling[name]), f"{name} depends on the order of threads"
    return rising


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- programs -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_log_sum_exp(rows):
    columns = p.log_sum_exp(rows=rows, tile=64, lanes_in_rows=True)
    for m, n in [(1, 1), (33, 129), (2, 5000)]:
        x = random(m * n, m, n) * 10
        x[0, : n // 2] = -INF
        close(emulated(p.log_sum_exp(rows=rows, tile=512), {"X": x})["L"], x.double().logsumexp(-1), 1e-6)
        if n < 1000:
            close(emulated(columns, {"X": x.t().contiguous()})["L"], x.double().logsumexp(-1), 1e-6)


def test_tensors_of_any_stride_and_alignment():
    x = random(1, 9, 700)
    assert {row.data_ptr() % 16 for row in strided_copy(x)} == {0, 4, 8, 12}
    close(emulated(p.log_sum_exp(rows=1, tile=512), {"X": strided_copy(x)})["L"], x.double().logsumexp(-1), 1e-6)
    close(
        emulated(p.log_sum_exp(rows=1, tile=512), {"X": strided_copy(x, last=True)}, strided=frozenset("X"))["L"],
        x.double().logsumexp(-1),
        1e-6,
    )


@pytest.mark.parametrize("smallest", [False, True])
def test_the_first_place_of_the_best(smallest):
    for rows in (1, 4):
        for m, n in [(1, 1), (5, 700), (3, 256)]:
            x = torch.randint(0, 9, (m, n), generator=torch.Generator().manual_seed(n)).float()
            y = emulated(p.best(rows=rows, smallest=smallest), {"X": x})
            expected = x.min(-1) if smallest else x.max(-1)
            assert torch.equal(y["V"], expected.values)
            assert torch.equal(y["I"].long(), expected.indices if n == 1 else (x == expected.values[:, None]).int().argmax(-1))


def test_two_loops_and_an_output_that_is_stored_in_one():
    x = random(1, 3, 1000).abs()
    y = emulated(p.normalise(tile=256), {"X": x})
    close(y["Y"], x.double() / x.double().sum(-1, keepdim=True), 1e-6)
    close(y["D"], x.double().sum(-1), 1e-6)


def test_nested_loops_in_one_task():
    x = random(1, 21, 200)
    close(emulated(p.whole_sum(), {"X": x})["S"], x.double().sum(), 1e-5)


def test_groups_along_a_composed_axis():
    codes = torch.randint(-128, 127, (3, 8 * 37), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scales = random(2, 3, 37)
    y = emulated(p.grouped_codes(), {"C": codes, "Z": scales})
    close(y["A"], (codes.double().view(3, 37, 8) * scales[..., None].double()).sum((1, 2)), 1e-4)
    assert torch.equal(y["H"], codes.int().amax(-1))
    assert torch.equal(y["S"], (codes == 7).any(-1))


def test_states_that_exchange_values():
    assert [emulated(p.exchange(), {"Z": torch.zeros(n)})["X"].item() for n in (0, 1, 2, 10)] == [0, 1, 1, 55]


def test_gathers_shifts_and_fills():
    table, index = random(1, 7, 100), torch.tensor([3, 0, 6, 6], dtype=torch.int32)
    rows = table[index.long()].double()
    shifted = torch.cat([torch.full((4, 1), -1.0, dtype=torch.float64), rows[:, :-1]], 1)
    close(emulated(p.table_lookup(), {"T": table, "I": index})["Y"], rows + 10 * shifted + 100 * rows.flip(-1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_few_rows_are_multiplied_and_summed(dtype):
    program = p.decode(dtype=bf16 if dtype == torch.bfloat16 else f32, rows=4, e=64, f=64, tile=64)
    for n in (1, 150):
        q, k, v = random(1, 2, 12, 64, dtype=dtype), random(2, 2, 3, n, 64, dtype=dtype), random(3, 2, 3, n, 64, dtype=dtype)
        s = (q.double().view(2, 3, 4, 64) @ k.double().transpose(-1, -2)) * 0.1
        expected = (s.softmax(-1) @ v.double()).reshape(2, 12, 64)
        close(emulated(program, {"Q": q, "K": k, "V": v}, {"scale": 0.1})["O"], expected, 3e-6 if dtype == torch.float32 else 1e-2)


def test_weighted_sums():
    w, v = random(1, 100), random(2, 40, 100, 48)
    close(emulated(p.weighted_sums(), {"W": w, "V": v})["S"], torch.einsum("p,mpf->mf", w.double().exp(), v.double()), 1e-4)


@pytest.mark.parametrize("program", [p.attention(), p.matmul(), p.norm_matmul(), p.cross_entropy()], ids=lambda program: program.name)
def test_products_of_matrices_are_refused_with_the_remedy(program):
    with pytest.raises(UnsupportedError, match=r"(?s)a product of \d+ by \d+ needs tensor cores.*in statement \S+.*Triton emitter"):
        source_of(program)


def test_more_threads_share_what_one_could_not_hold():
    tile = Map("t", ("j",), p.op("mul", A, 2.0))
    for size, threads in ((1 << 16, 256), (1 << 17, 512), (1 << 18, 1024), (1 << 19, None)):
        program = TileProgram(
            "wide", (p.tensor("A", "i j"),), (p.output("Y", "i j"),), (), (), (GridRank("i", 1), GridRank("j", size)), (),
            (tile, Store("Y", p.idx("i", "j"), Tile("t"))),
        )  # fmt: skip
        if threads is None:
            with pytest.raises(TooLarge, match=r"(?s)each of 1024 threads of wide would hold 512 elements of t.*smaller tiles"):
                source_of(program)
        else:
            assert f"{threads} threads a block" in source_of(program).text


@pytest.mark.parametrize("seed", [1, 3, 24, 26, 100, 103, 104])
def test_random_programs(seed):
    program = random_program(seed)
    few = program.grid[1].tile < 16  # the interpreter takes tasks and tiles one by one
    for extents in ({"b": 1, "m": 1, "p": 1}, {"b": 2, "m": 9, "p": 33} if few else {"b": 1, "m": 70, "p": 150}):
        tensors = random_tensors(program, extents, seed)
        expected = run_program(program, {name: t.numpy() for name, t in tensors.items()}, {}, dtype=np.float64, garbage=None)
        for name, y in emulated(program, tensors).items():
            close(y, torch.as_tensor(np.asarray(expected[name])), 1e-4)


# -- operations ---------------------------------------------------------------------------------------------------------------------


def many(exprs: list[tuple[Expr, DType]], inputs: dict[str, DType], *, vectors: bool) -> TileProgram:
    """Y0, Y1, ... = the expressions of one row of A (and B), a kernel for all of them; an odd tile has no vectors."""
    outputs = tuple(p.output(f"Y{n}", "i j", t) for n, (_, t) in enumerate(exprs))
    stores = tuple(Store(f"Y{n}", p.idx("i", "j"), e) for n, (e, _) in enumerate(exprs))
    tensors = tuple(p.tensor(name, "i j", t) for name, t in inputs.items())
    return TileProgram("many", tensors, outputs, (), (), (GridRank("i", 1), GridRank("j", 256 if vectors else 77)), (), stores)


def results(exprs, tensors, *, vectors=True):
    """What `many` gives, each a row."""
    names = {t: name for name, t in TORCH.items()}
    program = many(exprs, {name: names[x.dtype] for name, x in tensors.items()}, vectors=vectors)
    return [y[0] for y in emulated(program, {name: x[None] for name, x in tensors.items()}).values()]


EDGES = torch.tensor([0.0, -0.0, INF, -INF, math.nan, 126.9, -126.0, -149.0, -151.0, 88.7, 88.8, -87.3, -104.0, 1e-40, -1e-40])
WIDE = torch.cat(
    [torch.linspace(-100, 100, 501), torch.linspace(-1, 1, 501), torch.logspace(-44, 38, 300), -torch.logspace(-44, 38, 300), EDGES]
)
FLOAT = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "log1p": torch.log1p, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf,
    "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "abs": torch.abs, "sign": torch.sign,
    "neg": torch.neg, "exact": lambda x: x, "isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite,
}  # fmt: skip
PAIRS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "minimum": torch.minimum, "maximum": torch.maximum,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le,
    "gt": torch.gt, "ge": torch.ge,
}  # fmt: skip


def test_functions_of_floats():
    x = WIDE[~(WIDE < -87) | WIDE.isnan()]  # the exponential of a sigmoid overflows further down
    truths = ("isnan", "isinf", "isfinite")
    found = results([(Op(name, (A,)), boolean if name in truths else f32) for name in FLOAT], {"A": x})
    for (name, function), y in zip(FLOAT.items(), found, strict=True):
        expected = function(x.double())
        if name in truths:
            assert torch.equal(y, expected), name
        else:
            torch.testing.assert_close(
                y.double(), expected.float().double(), rtol=6e-7, atol=2e-45, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_pairs_of_floats():
    some = torch.tensor([7.5, -7.5, 3.0, 0.5, 0.0, -0.0, 2.0, -2.0, 9.0, 1e20, 0.1, -0.3, INF, -INF, math.nan])
    a, b = some.repeat_interleave(len(some)), some.repeat(len(some))
    compares = ("eq", "ne", "lt", "le", "gt", "ge")
    found = results([(Op(name, (A, B)), boolean if name in compares else f32) for name in PAIRS], {"A": a, "B": b}, vectors=False)
    for (name, function), y in zip(PAIRS.items(), found, strict=True):
        assert same(y, function(a, b)) or torch.equal(y.nan_to_num(-1.5), function(a, b).nan_to_num(-1.5)), name


def extremes(dtype):
    """The ends of a type, what lies around zero and powers of two, and anything."""
    info = torch.iinfo(TORCH[dtype])
    some = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 5, 7, 16, 17, 63, 64, 100]
    some += [-x for x in some if info.min < 0 and x != info.min]
    anything = torch.randint(info.min, info.max, (20,), generator=torch.Generator().manual_seed(5))
    return torch.cat([torch.tensor(some), anything]).to(TORCH[dtype])


@pytest.mark.parametrize("dtype", [i64, i32, i8, u8], ids=str)
def test_integers_wrap_around(dtype):
    """Every pair of extreme values, through Python's own numbers."""
    values = extremes(dtype)
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    info = torch.iinfo(TORCH[dtype])
    size = 1 << info.bits
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    python = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "floordiv": lambda x, y: x // y if y else 0,
        "mod": lambda x, y: x % y if y else 0, "shl": lambda x, y: x << y if 0 <= y < info.bits else 0,
        "shr": lambda x, y: x >> (y if 0 <= y < info.bits else 64), "minimum": min, "maximum": max,
        "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y, "neg": lambda x, _: -x,
        "abs": lambda x, _: abs(x), "not": lambda x, _: ~x, "sign": lambda x, _: (x > 0) - (x < 0),
    }  # fmt: skip
    single = ("neg", "abs", "not", "sign")
    exprs = [(Op(name, (A,) if name in single else (A, B)), dtype) for name in python]
    *found, ones, zeros = results([*exprs, (Op("popcount", (A,)), i32), (Op("clz", (A,)), i32)], {"A": a, "B": b})
    for (name, function), y in zip(python.items(), found, strict=True):
        wrapped = torch.tensor([(function(u, v) - info.min) % size + info.min for u, v in pairs]).to(TORCH[dtype])
        assert torch.equal(y, wrapped), name
    unsigned = [x & (size - 1) for x, _ in pairs]
    assert ones.tolist() == [bin(x).count("1") for x in unsigned]
    assert zeros.tolist() == [info.bits - x.bit_length() for x in unsigned]


def test_bools_and_bits():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    exprs = [(Op(name, (A, B)), boolean) for name in ("and", "or", "xor")] + [(Op("not", (A,)), boolean), (Op("where", (A, B, A)), boolean)]
    expected = [a & b, a | b, a ^ b, ~a, torch.where(a, b, a)]
    assert all(torch.equal(x, y) for x, y in zip(results(exprs, {"A": a, "B": b}), expected, strict=True))
    x = torch.tensor([1.5, -2.25, 0.0, math.nan, 1e-30])
    bits, back, negated = results(
        [(Bitcast(A, i32), i32), (Bitcast(Bitcast(A, i32), f32), f32), (Op("not", (Op("lt", (A, Const(2.0))),)), boolean)], {"A": x}
    )
    assert torch.equal(bits, x.view(torch.int32)) and same(back, x) and torch.equal(negated, ~(x < 2))


@pytest.mark.parametrize("source", [f64, f32, bf16, i64, i32, i8, u8, boolean], ids=str)
def test_casts(source):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 1.0]).to(TORCH[source])
    kinds = (f64, f32, f16, bf16, i64, i32, i8, u8, boolean)
    for t, y in zip(kinds, results([(Cast(A, t), t) for t in kinds], {"A": x}), strict=True):
        assert torch.equal(y, x.to(TORCH[t])), t


def patterns():
    """Every f16 and bf16, what lies beside the middle between codes of eight bits, and any bits, as f32."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    middles = []
    for t in (f8e4m3, f8e5m2, e8m0):
        values = torch.arange(256, dtype=torch.uint8).view(TORCH[t]).float()
        values = values[values.isfinite()].unique()
        middle = ((values[1:].double() + values[:-1].double()) / 2).float()
        middles += [middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))]
    anything = torch.randint(-(1 << 31), (1 << 31) - 1, (20001,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float(), *middles, anything.view(torch.float32)])


def test_narrow_floats_are_written_and_rounded_as_torch_does():
    x, kinds = patterns(), (f16, bf16, f8e4m3, f8e5m2, e8m0)
    found = results([(e, t) for t in kinds for e in (A, Cast(Cast(A, t), f32))], {"A": x})
    for t, stored, through in zip(kinds, found[::2], found[1::2], strict=True):
        expected = x.to(TORCH[t])
        nan = expected.float().isnan()
        assert same(stored[~nan], expected[~nan]), t
        assert stored[nan].float().isnan().all() and torch.equal(through.float().nan_to_num(7), expected.float().nan_to_num(7)), t


@pytest.mark.parametrize("t", [f16, bf16, f8e4m3, f8e5m2, e8m0], ids=str)
def test_every_code_of_narrow_floats_is_read(t):
    codes = torch.arange(1 << t.bits, dtype=torch.int32).to(torch.int16 if t.bits == 16 else torch.uint8)
    x, bits = codes.view(TORCH[t]), i16 if t.bits == 16 else u8
    wide, own = results([(A, f32), (Bitcast(A, bits), bits)], {"A": x})
    torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(own, codes)


# -- scans --------------------------------------------------------------------------------------------------------------------------

IDENTITY = {"sum": 0.0, "prod": 1.0, "max": -INF, "min": INF}


def scanned(op, *, rows, tile, exclusive, dtype=f32):
    """Y = op-scan of X along p, streamed with a carry."""
    row = ("m",) if rows > 1 else ()
    x = Masked(aligned("X", "m", "p"), Const(IDENTITY[op] if dtype.is_float else int(IDENTITY[op])))
    word = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[op]
    state = LoopState(
        "before",
        row,
        Const(IDENTITY[op]) if dtype.is_float else Cast(Const(int(IDENTITY[op])), dtype),
        p.op(word, Tile("before"), Tile("part")),
        dtype,
    )
    nodes = (
        Scan("y", (*row, "p"), op, "p", x, Tile("before"), exclusive, dtype), Store("Y", p.idx("m", "p"), Tile("y")),
        Reduce("part", row, op, ("p",), x, dtype),
    )  # fmt: skip
    inputs, outputs = (p.tensor("X", "m p", dtype),), (p.output("Y", "m p", dtype),)
    return TileProgram("scan", inputs, outputs, (), (), (GridRank("m", rows),), (), (p.loop("p", tile, (state,), *nodes),))


@pytest.mark.parametrize(
    ("op", "rows", "tile", "exclusive", "dtype"),
    [
        ("sum", 1, 2048, False, f32),
        ("sum", 4, 48, True, f64),
        ("max", 3, 64, False, f32),
        ("prod", 1, 16, True, f32),
        ("sum", 2, 512, False, i32),
    ],
)
def test_scans(op, rows, tile, exclusive, dtype):
    for m, n in [(1, 1), (5, 130), (2, 3000)]:
        x = random(n, m, n).double()
        x = (x * 100).to(torch.int32) if dtype == i32 else (1 + x / 100).to(TORCH[dtype]) if op == "prod" else x.to(TORCH[dtype])
        wide = x.long() if dtype == i32 else x.double()
        function = {"sum": torch.cumsum, "prod": torch.cumprod, "max": lambda t, d: t.cummax(d).values}[op]
        expected = function(wide, -1)
        if exclusive:
            expected = torch.cat([torch.full((m, 1), IDENTITY[op], dtype=expected.dtype), expected[:, :-1]], 1)
        y = emulated(scanned(op, rows=rows, tile=tile, exclusive=exclusive, dtype=dtype), {"X": x})["Y"]
        torch.testing.assert_close(y.to(expected.dtype), expected, rtol=1e-5, atol=1e-4 if dtype == f32 else 1e-12)


# -- what is emitted ----------------------------------------------------------------------------------------------------------------


def test_the_source_reads_like_the_program():
    text = source_of(p.log_sum_exp(rows=1)).text
    assert "p: 4096 a tile = 4 steps x 256 threads from bit 0 of tid x vectors of 4" in text
    for line in ("# t[] = max(p) masked(X.0, -inf)", "# a tile at an edge of the domain", "# store L[m] = mx + log(d)"):
        assert line in text
    assert text.count("load_float32_v4") == 3  # defined, and called in both bodies: what two statements read is read once
    compile(text, "kernel.py", "exec")


def test_the_same_program_gives_the_same_source_in_every_process():
    """The source names the binary in the cache."""
    code = (
        "import programs as p; from random_programs import random_program; from test_tvm_cuda import source_of\n"
        "print(*(source_of(q).hash for q in (p.log_sum_exp(), p.normalise(), p.decode(), *map(random_program, (1, 3, 8, 103)))))"
    )
    printed = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1] and len(printed[0].split()) == 7


def test_what_only_gathers_is_reduced_across_threads_once():
    """The sum of `normalise` is needed after the loop, the maximum of `log_sum_exp` within it; names have no part in it."""
    lines = source_of(p.normalise(tile=1024)).text.splitlines()
    call = next(i for i, line in enumerate(lines) if "sum_float32_over_ff_of_256" in line and "=" in line and "extern" in line)
    loop = next(i for i, line in enumerate(lines) if "for j_p in" in line)
    assert call > loop and len(lines[call]) - len(lines[call].lstrip()) == len(lines[loop]) - len(lines[loop].lstrip())
    lines = source_of(p.log_sum_exp(rows=1)).text.splitlines()
    call = next(line for line in lines if "max_float32_over_ff_of_256" in line and "extern" in line)
    assert len(call) - len(call.lstrip()) > 12


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({"next": p.op("add", p.op("mul", Tile("s"), Const(0.5)), Tile("t"))}, "the sum so far is scaled"),
        ({"next": p.op("maximum", Tile("s"), Tile("t"))}, "another operation"),
        ({"more": (Map("u", (), p.op("add", Tile("s"), Const(1.0))),)}, "the sum so far is read"),
        ({"more": (Map("u", (), p.op("add", Tile("t"), Const(1.0))),)}, "the tile's own part is read"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_needed_within_the_loop_is_reduced_there(spoilt, why):
    part = Reduce("t", (), "sum", ("p",), Masked(aligned("X", "m", "p"), Const(0.0)))
    state = LoopState("s", (), Const(3.0), spoilt.get("next", p.op("add", Tile("s"), Tile("t"))))
    body = p.loop("p", 64, (state,), part, *spoilt.get("more", ()))
    program = TileProgram(
        "gather", (p.tensor("X", "m p"),), (p.output("S", "m"),), (), (), (GridRank("m", 1),), (), (body, Store("S", p.idx("m"), Tile("s")))
    )
    assert "the part of this thread" not in source_of(program).text
    x = random(1, 2, 200)
    expected = run_program(program, {"X": x.numpy()}, {}, dtype=np.float64, garbage=None)["S"]
    close(emulated(program, {"X": x})["S"], torch.as_tensor(expected), 1e-5)


def test_a_gathering_state_keeps_its_first_value():
    part = Dot("s'", ("f",), ("p",), Masked(aligned("W", "p"), Const(0.0)), aligned("V", "p", "f"), update=Tile("s"))
    program = TileProgram(
        "sums", (p.tensor("W", "p"), p.tensor("V", "p f")), (p.output("S", "f"),), (), p.sizes(f=20), (), ("f",),
        (p.loop("p", 64, (LoopState("s", ("f",), Cast(Index("f"), f32), Tile("s'")),), part), Store("S", p.idx("f"), Tile("s"))),
    )  # fmt: skip
    assert "the part of this thread" in source_of(program).text
    w, v = random(1, 150), random(2, 150, 20)
    close(emulated(program, {"W": w, "V": v})["S"], torch.arange(20) + w.double() @ v.double(), 1e-5)


def test_what_a_block_stored_is_read_after_a_barrier():
    stores = Store("Y", p.idx("m", "p"), p.op("mul", aligned("X", "m", "p"), 2.0))
    total = Reduce("t", (), "sum", ("q",), Masked(aligned("Y", "m", "q"), Const(0.0)))
    state = LoopState("s", (), Const(0.0), p.op("add", Tile("s"), Tile("t")))
    program = TileProgram(
        "twice", (p.tensor("X", "m p"),), (p.output("Y", "m p"), p.output("S", "m")), (), p.sizes(p=96, q=96), (GridRank("m", 1),), ("p",),
        (stores, p.loop("q", 16, (state,), total), Store("S", p.idx("m"), Tile("s"))),
    )  # fmt: skip
    assert "__syncthreads" in cuda_of(source_of(program)).rpartition("twice_kernel(")[2]
    x = random(1, 3, 96)
    close(emulated(program, {"X": x})["S"], 2 * x.double().sum(-1), 1e-5)


def test_the_schedule_says_how_many_warps_a_block_has():
    program = p.log_sum_exp(rows=1)
    for warps in (1, 4, 16):
        schedule = Schedule.make(kernel={"log_sum_exp": KernelOptions(warps=warps)})
        source = source_of(program, schedule=schedule)
        assert f"{32 * warps} threads a block" in source.text
    x = random(1, 2, 5000)
    close(emulated(program, {"X": x}, schedule=schedule)["L"], x.double().logsumexp(-1), 1e-6)


def test_the_target_chooses_the_emitter():
    assert isinstance(backend_for(load_target(TARGET)), TvmCuda)
    assert not isinstance(backend_for(load_target("cuda:sm_90")), TvmCuda)
    assert load_target(TARGET).limits == load_target("cuda:sm_90").limits
    for name in ("cpu+tvm", "hip:gfx942+tvm", "cuda:sm_12345+tvm"):
        with pytest.raises(UnsupportedError, match="unknown target"):
            load_target(name)


# -- the emulator -------------------------------------------------------------------------------------------------------------------


def spoiled(program, old, new):
    """The kernel with something replaced in its helpers."""
    source = source_of(program)
    assert old in source.text
    return emulate(type(source).make(source.text.replace(old, new), source.entry, source.target))


def test_the_emulator_shows_a_missing_barrier():
    program, x = p.normalise(tile=1024), random(1, 1, 1024).abs()
    results = []
    for falling in (False, True):
        y, d = torch.zeros_like(x), torch.zeros(1)
        spoiled(program, "__syncthreads();", "")(x, y, d, falling=falling)
        results.append(d.item())
    assert any(abs(d - x.double().sum().item()) > 1 for d in results)


def test_the_emulator_refuses_threads_that_part_at_a_barrier():
    x = random(1, 1, 1024)
    for spoilt in ("if (threadIdx.x != 7) __syncthreads();", "if (threadIdx.x < 32) __syncthreads();"):
        with pytest.raises(BuildError, match="threads of normalise part at a barrier"):
            spoiled(p.normalise(tile=1024), "__syncthreads();", spoilt)(x, torch.zeros_like(x), torch.zeros(1))


def test_the_emulator_knows_warps():
    """Shuffles stay within 32 threads: with those of another distance the sum is another."""
    x = random(1, 1, 1024)
    y, d = torch.zeros_like(x), torch.zeros(1)
    spoiled(p.normalise(tile=1024), "__shfl_xor_sync(0xffffffffu, x, 16)", "__shfl_xor_sync(0xffffffffu, x, 8)")(x, y, d)
    assert abs(d.item() - x.double().sum().item()) > 1e-3


def test_an_emulated_kernel_takes_cpu_tensors():
    kernel = kernel_of(p.normalise(tile=1024))
    with pytest.raises(BindingError, match="X lies on meta"):
        kernel(torch.zeros(1, 8, device="meta"), torch.zeros(1, 8), torch.zeros(1))
