"""Triton's interpreter with its corrections, against torch: every bf16 pattern, every f16 value as fp8, reductions, scans, bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einfall.backends.base import Source
from einfall.backends.triton.interpret import interpret, interpreting
from einfall.ir.errors import BindingError, BuildError, UnsupportedError
from einfall.schedules.target import load_target
from triton_sources import elementwise, run, source_of

N = 1 << 16
INF, NAN = float("inf"), float("nan")


def patterns(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Every value of a type of 16 bits."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def pairs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bf16 patterns, and the special ones against each other."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 9.2e-41, -9.2e-41, 1.17e-38, 3.39e38, -3.39e38]).bfloat16()
    a, b = (torch.randint(0, N, (N,), generator=generator).to(torch.int32).to(torch.int16).view(torch.bfloat16) for _ in range(2))
    a[: special.numel() ** 2], b[: special.numel() ** 2] = special.repeat_interleave(special.numel()), special.repeat(special.numel())
    near = torch.randn(N // 2, generator=generator).bfloat16()  # sums of numbers of one size round most
    a[N // 2 :], b[N // 2 :] = near, near.flip(0)
    return a, b


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, every NaN being one."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    both = torch.isnan(actual.float()) & torch.isnan(expected.float())
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    wrong = ~both & (actual.view(kind) != expected.view(kind))
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {actual[wrong][0]} for {expected[wrong][0]}"


def test_the_corrections_are_installed():
    with interpreting():
        from einfall.backends.triton import interpreter_fixes as fixes
        from triton.runtime import interpreter as it

        assert fixes.installed() and fixes.it is it
        assert isinstance(it.interpreter_builder, fixes.Builder) and it.interpreter_builder.memory is None
        assert it.ReduceOps is fixes.ReduceOps and it.ScanOps is fixes.ScanOps


def test_an_interpreter_that_is_not_as_expected_is_refused(monkeypatch):
    with interpreting():
        from einfall.backends.triton import interpreter_fixes as fixes

    class Other(fixes.Builder):
        create_fadd = lambda self, lhs, rhs: fixes.Handle(lhs.data + rhs.data, lhs.dtype)  # noqa: E731

    with pytest.raises(UnsupportedError, match="by other ways"):
        fixes._try(Other())
    monkeypatch.setattr(fixes.it, "ReduceOps", Other)  # as if nothing had been installed
    monkeypatch.delattr(fixes.it.InterpreterBuilder, "create_fma")
    with pytest.raises(UnsupportedError, match=r"lacks .*create_fma"):
        fixes.install()


BOTH = """
import os, sys, torch
{first}
from einfall.backends.triton.interpret import FLAG, interpret, interpreting
with interpreting():
    import triton.language as tl
    kind = type(tl.sum).__name__
import triton.language as compiled
print(kind, type(compiled.sum).__name__, FLAG in os.environ)
sys.path[:0] = {path!r}
from triton_sources import elementwise
print(elementwise("x + x", {{"X": torch.full((16,), 1.0078125).bfloat16()}}, {{"X": "bf16"}}, "f32")[0].item())
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
print(sys.modules["triton.language"] is compiled)
"""


@pytest.mark.parametrize("first", ["", "import triton"], ids=["first", "after"])
def test_a_process_interprets_and_compiles(first):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = BOTH.format(first=first, path=[str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:3] == ["InterpretedFunction JITFunction False", "2.015625", "True"], done.stderr


def test_everything_is_as_it_was_after_a_failure():
    before, modules = dict(os.environ), {name: m for name, m in sys.modules.items() if name.startswith("triton")}
    with pytest.raises(ZeroDivisionError), interpreting():
        assert os.environ["TRITON_INTERPRET"] == "1"
        raise ZeroDivisionError
    assert dict(os.environ) == before
    assert {name: m for name, m in sys.modules.items() if name.startswith("triton")} == modules


# bf16 -------------------------------------------------------------------------------------------------------------------------------

CASTS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16}


@pytest.mark.parametrize("to", CASTS)
def test_every_bf16_is_widened_and_narrowed(to):
    x = patterns()
    spelled = {"f32": "tl.float32", "f64": "tl.float64", "f16": "tl.float16"}[to]
    same(elementwise(f"x.to({spelled})", {"X": x}, {"X": "bf16"}, to), x.float().to(CASTS[to]))


@pytest.mark.parametrize("of", CASTS)
def test_floats_round_to_the_nearest_even_bf16(of):
    x = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ties = patterns()[: N // 2].float() * (1 + 2.0**-8)
    x[: N // 2] = ties.double()
    x[:8] = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 3.4e38, 1e-45, 65536.0])
    x = x.to(CASTS[of])
    same(elementwise("x.to(tl.bfloat16)", {"X": x}, {"X": of}, "bf16"), x.float().bfloat16())


@pytest.mark.parametrize("of", ["i8", "i16", "i32", "i64", "u8", "bool"])
def test_integers_become_bf16(of):
    kind = {"i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "bool": torch.bool}[of]
    x = torch.randint(-(1 << 30), 1 << 30, (N,), generator=torch.Generator().manual_seed(2))
    x = x > 0 if of == "bool" else x.to(kind)
    same(elementwise("x.to(tl.bfloat16)", {"X": x}, {"X": of}, "bf16"), x.float().bfloat16())


@pytest.mark.parametrize("to", ["i8", "i32", "i64"])
def test_bf16_becomes_integers(to):
    kind = {"i8": torch.int8, "i32": torch.int32, "i64": torch.int64}[to]
    x = patterns()
    x = torch.where(x.float().abs() < 100, x, torch.zeros((), dtype=torch.bfloat16))
    same(elementwise(f"x.to(tl.int{to[1:]})", {"X": x}, {"X": "bf16"}, to), x.float().to(kind))


UNARY = {
    "-x + 0.0": lambda x: -x + 0, "tl.abs(x)": torch.abs,
    "x + 1.0": lambda x: x + 1, "x * 0.3": lambda x: x * torch.tensor(0.3).bfloat16(),
    "tl.where(x == 0, 1.0, x)": lambda x: torch.where(x == 0, torch.ones((), dtype=torch.bfloat16), x),
    "tl.full([65536], 1.005859375, tl.bfloat16)": lambda x: torch.full_like(x, 1.005859375),
    "x.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True)": lambda x: x,
    "tl.fma(x, x, x)": lambda x: (x.float() * x.float() + x.float()).bfloat16(),
    "tl.exp2(x.to(tl.float32)).to(tl.bfloat16)": lambda x: x.float().exp2().bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("expression", UNARY)
def test_unary_functions_of_every_bf16(expression):
    x = patterns()
    same(elementwise(expression, {"X": x}, {"X": "bf16"}, "bf16"), UNARY[expression](x))


def number(choose, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger or smaller, the number where one is NaN."""
    return torch.from_numpy(choose(a.float().numpy(), b.float().numpy())).bfloat16()


BINARY = {
    "a + b": torch.add, "a - b": torch.sub, "a * b": torch.mul,
    "(a / b).to(tl.bfloat16)": lambda a, b: (a.float() / b.float()).bfloat16(),
    "tl.maximum(a, b)": lambda a, b: number(np.fmax, a, b), "tl.minimum(a, b)": lambda a, b: number(np.fmin, a, b),
    "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)": torch.maximum,
    "tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)": torch.minimum,
    "tl.where(a < b, a, b)": lambda a, b: torch.where(a < b, a, b),
    "tl.clamp(a, -b, b)": lambda a, b: number(np.fmin, number(np.fmax, a, -b), b),
}  # fmt: skip


@pytest.mark.parametrize("expression", BINARY)
@pytest.mark.parametrize("seed", [1, 2])
def test_pairs_of_bf16(expression, seed):
    a, b = pairs(seed)
    expected = BINARY[expression](a, b)
    actual = elementwise(expression, {"A": a, "B": b}, {"A": "bf16", "B": "bf16"}, "bf16")
    if "imum" in expression or "clamp" in expression:  # which zero is the larger is left open
        actual, expected = actual + 0, expected + 0
    same(actual, expected)


@pytest.mark.parametrize("word", ["<", "<=", ">", ">=", "==", "!="])
def test_comparisons_of_bf16(word):
    a, b = pairs(3)
    b[::7] = a[::7]
    name = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}[word]
    actual = elementwise(f"(a {word} b).to(tl.float32)", {"A": a, "B": b}, {"A": "bf16", "B": "bf16"}, "f32")
    same(actual, getattr(torch, name)(a, b).float())


# dots -------------------------------------------------------------------------------------------------------------------------------


def dot(dtype: str, accumulator: str, options: str = "") -> Source:
    kind = {"f32": "tl.float32", "i32": "tl.int32"}[accumulator]
    return source_of(
        f"m = tl.arange(0, 32)\nk = tl.arange(0, 64)\nn = tl.arange(0, 16)\n"
        f"a = tl.load(A + m[:, None] * A_0 + k[None, :] * A_1)\nb = tl.load(B + k[:, None] * B_0 + n[None, :] * B_1)\n"
        f"c = tl.dot(a, b, tl.full([32, 16], 3, {kind}){options}, out_dtype={kind})\ntl.store(C + m[:, None] * C_0 + n[None, :], c)",
        {"A": ("m k", dtype), "B": ("k n", dtype), "C": ("m n", accumulator)},
    )


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f8e4m3", "f8e5m2"])
def test_dots_of_narrow_floats_accumulate_in_f32(dtype):
    kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}[dtype]
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(32, 64, generator=generator).to(kind), torch.randn(64, 16, generator=generator).to(kind)
    actual = run(dot(dtype, "f32"), a, b, shape=(32, 16))
    torch.testing.assert_close(actual.double(), a.double() @ b.double() + 3, rtol=2e-6, atol=2e-6)


def test_dots_of_integers_are_exact():
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((32, 64), (64, 16)))
    actual = run(dot("i8", "i32"), a, b, shape=(32, 16), result="i32")
    assert torch.equal(actual, (a.double() @ b.double() + 3).int())


def test_dots_of_f32_round_as_the_precision_says():
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(32, 64, generator=generator), torch.randn(64, 16, generator=generator)
    exact = a.double() @ b.double() + 3
    errors = {
        word: (run(dot("f32", "f32", f', input_precision="{word}"'), a, b, shape=(32, 16)) - exact).abs().max()
        for word in ("ieee", "tf32x3", "tf32")
    }
    assert errors["ieee"] < 1e-5 and errors["tf32x3"] < 1e-5
    assert 2e-4 < errors["tf32"] < 2e-2
    whole = a.round(), b.round()  # exact in ten bits
    assert torch.equal(run(dot("f32", "f32", ', input_precision="tf32"'), *whole, shape=(32, 16)), (whole[0] @ whole[1]) + 3)


# fp8 --------------------------------------------------------------------------------------------------------------------------------

FP8 = {"f8e4m3": ("tl.float8e4nv", torch.float8_e4m3fn, 448.0), "f8e5m2": ("tl.float8e5", torch.float8_e5m2, 57344.0)}


@pytest.mark.parametrize("of", ["f16", "f32", "bf16"])
@pytest.mark.parametrize("to", FP8)
def test_every_16_bit_float_becomes_fp8_as_in_torch_and_saturates(to, of):
    spelled, kind, limit = FP8[to]
    x = patterns(torch.bfloat16 if of == "bf16" else torch.float16)
    x = x.float() * (1 + 2.0**-15) if of == "f32" else x
    expected = torch.where(x.float().isnan(), x.float(), x.float().clamp(-limit, limit)).to(kind)
    same(elementwise(f"x.to({spelled})", {"X": x}, {"X": of}, to), expected)


@pytest.mark.parametrize("to", ["f16", "f32", "bf16"])
@pytest.mark.parametrize("of", FP8)
def test_every_fp8_is_widened(of, to):
    kind = {"f16": torch.float16, "f32": torch.float32, "bf16": torch.bfloat16}[to]
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8[of][1])
    same(elementwise(f"x.to(tl.{str(kind)[6:]})", {"X": x}, {"X": of}, to), x.float().to(kind))


def test_arithmetic_in_fp8_is_refused():
    x = torch.ones(16).to(torch.float8_e4m3fn)
    with pytest.raises(BuildError, match=r"add of fp8e4nv(.|\n)*line \d+: tl.store\(Y"):
        elementwise("x + x", {"X": x}, {"X": "f8e4m3"}, "f8e4m3")


# reductions, scans, sorts -----------------------------------------------------------------------------------------------------------

COMBINE = """
@triton.jit
def first(a, i, b, j):
    take = (b > a) | ((b == a) & (j < i))
    return tl.where(take, b, a), tl.where(take, j, i)


@triton.jit
def affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def product(a, b):
    return a * b
"""


def along(body: str, dtype: str, *, axis: int, result: str = "f32", whole: bool = False) -> Source:
    """`body` of a tile x of 8 rows of 64; its result y has one element a row, a column, or the shape of x."""
    place = "m[:, None] * Y_0 + p[None, :]" if whole else "m" if axis == 1 else "p"
    load = "m = tl.arange(0, 8)\np = tl.arange(0, 64)\nx = tl.load(X + m[:, None] * X_0 + p[None, :] * X_1)"
    return source_of(
        f"{load}\n{body}\ntl.store(Y + {place}, y)",
        {"X": ("m p", dtype), "Y": ("m p" if whole else "m" if axis == 1 else "p", result)},
        helpers=COMBINE,
    )


def tile(dtype: torch.dtype, seed: int = 7) -> torch.Tensor:
    return torch.randint(-9, 9, (8, 64), generator=torch.Generator().manual_seed(seed)).to(dtype)  # many ties


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i32", "i8"])
def test_reductions(dtype, axis):
    kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32, "i8": torch.int8}[dtype]
    x, shape = tile(kind), (8,) if axis == 1 else (64,)
    wide = x.double()
    for body, expected in (
        (f"y = tl.max(x, {axis}).to(tl.float32)", wide.amax(axis)),
        (f"y = tl.min(x, {axis}).to(tl.float32)", wide.amin(axis)),
        (f"y = tl.sum(x, {axis}).to(tl.float32)", wide.sum(axis)),
        (f"y = tl.argmax(x, {axis}).to(tl.float32)", (x == x.amax(axis, keepdim=True)).int().argmax(axis)),
        (f"y = tl.argmin(x, {axis}).to(tl.float32)", (x == x.amin(axis, keepdim=True)).int().argmax(axis)),
    ):
        assert torch.equal(run(along(body, dtype, axis=axis), x, shape=shape).double(), expected.double()), body


def test_a_maximum_takes_the_number_beside_a_nan():
    x = tile(torch.float32)
    x[:, ::3] = NAN
    x[3] = NAN
    expected = torch.where(x.isnan(), -INF, x).amax(1)
    expected[3] = NAN
    same(run(along("y = tl.max(x, 1)", "f32", axis=1), x, shape=(8,)), expected)


def test_a_reduction_of_pairs_uses_the_given_indices_and_its_own_function():
    x = tile(torch.bfloat16)
    body = "at = tl.broadcast_to((1000 - p)[None, :], [8, 64])\nv, y = tl.reduce((x, at), 1, first)"
    last = 63 - (x == x.amax(1, keepdim=True)).int().flip(1).argmax(1)
    assert torch.equal(run(along(body, "bf16", axis=1, result="i32"), x, shape=(8,), result="i32"), (1000 - last).int())


def test_a_product_of_everything_and_kept_dimensions():
    x = 1 + 2.0**-9 * tile(torch.float32)
    body = "y = tl.broadcast_to(tl.reduce(x, 1, product, keep_dims=True), [8, 64])"
    torch.testing.assert_close(run(along(body, "f32", axis=1, whole=True), x, shape=(8, 64)), x.prod(1, keepdim=True).expand(8, 64))
    body = "y = tl.zeros([8], tl.float32) + tl.reduce(x, None, product)"
    torch.testing.assert_close(run(along(body, "f32", axis=1), x, shape=(8,)), x.prod().expand(8))


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_of_pairs_keep_their_order(reverse):
    x = 0.5 + 2.0**-6 * tile(torch.float32)
    body = f"s, y = tl.associative_scan((x, x * 0 + 1), 1, affine, reverse={reverse})"
    expected, running = torch.empty_like(x), torch.zeros(8)
    for p in reversed(range(64)) if reverse else range(64):
        running = running * x[:, p] + 1
        expected[:, p] = running
    torch.testing.assert_close(run(along(body, "f32", axis=1, whole=True), x, shape=(8, 64)), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_running_sums_and_sorts(axis):
    x = tile(torch.bfloat16)
    body = f"y = tl.cumsum(x.to(tl.float32), {axis})"
    assert torch.equal(run(along(body, "bf16", axis=axis, whole=True), x, shape=(8, 64)), x.float().cumsum(axis))
    if axis == 1:
        actual = run(along("y = tl.sort(x, 1)", "bf16", axis=1, result="bf16", whole=True), x, shape=(8, 64), result="bf16")
        assert torch.equal(actual, x.sort(1).values)


# launches ---------------------------------------------------------------------------------------------------------------------------

COPY = "i = tl.program_id(0) * 16 + tl.arange(0, 16)\ntl.store(Y + i * Y_0, tl.load(X + i * X_0, mask=i < n_i, other=0) * s, mask=i < n_i)"


def copy(body: str = COPY, dtype: str = "f32", **options) -> Source:
    return source_of(body, {"X": ("i", dtype), "Y": ("i", "f32")}, scalars={"s": "fp32"}, grid=(("i", 16),), **options)


@pytest.mark.parametrize("n", [1, 16, 37])
def test_extents_strides_and_scalars_come_from_the_tensors(n):
    x = torch.randn(3 * n + 2)[2::3][:n]
    out = torch.full((2 * n + 8,), NAN)
    interpret(copy())(x, out[4 : 4 + 2 * n : 2], 0.1)
    assert torch.equal(out[4 : 4 + 2 * n : 2], x * torch.tensor(0.1))
    assert out[:4].isnan().all() and out[4 + 2 * n :].isnan().all() and out[5 : 4 + 2 * n : 2].isnan().all()


def test_a_scalar_is_rounded_to_its_type_and_nothing_is_launched_for_nothing():
    body = "tl.store(Y + tl.program_id(0), (s - 0.1).to(tl.float32))"
    assert run(copy(body), torch.zeros(1), shape=(1,), scalars=(0.1,)) == 0
    interpret(copy())(torch.empty(0), torch.empty(0), 1.0)


def test_persistent_programs_share_the_tasks():
    body = (
        "for task in tl.range(tl.program_id(0), tl.cdiv(n_i, 16), tl.num_programs(0)):\n"
        "    i = task * 16 + tl.arange(0, 16)\n    tl.store(Y + i, tl.load(X + i, mask=i < n_i) * s + tl.num_programs(0), mask=i < n_i)"
    )
    x = torch.arange(100.0)
    for programs, expected in ((1, 1), (3, 3), (100, 7)):
        out = torch.full((100,), NAN)
        interpret(copy(body, persistent=True), programs=programs)(x, out, 2.0)
        assert torch.equal(out, 2 * x + expected)


TILE = "i = tl.program_id(0) * 16 + tl.arange(0, 16)"
OUTSIDE = {
    "a load reads byte 148 of X, which has 148": f"{TILE}\ntl.store(Y + i, tl.load(X + i), mask=i < n_i)",
    "a load reads byte -4 of X": "i = tl.arange(0, 16)\ntl.store(Y + i, tl.load(X + i - 1))",
    "a store writes byte 148 of Y": f"{TILE}\ntl.store(Y + i, 0.0)",
    "a load reads byte 4000000000 of X": "tl.store(Y, tl.load(X + 1000000000))",
    r"lane \[2, 1\]": "i = tl.arange(0, 4)\nx = tl.load(X + i[:, None] * 18 + i[None, :])\ntl.store(Y, tl.sum(tl.sum(x, 1), 0))",
}  # fmt: skip


@pytest.mark.parametrize("message", OUTSIDE)
def test_what_leaves_a_tensor_is_caught(message):
    with pytest.raises(BuildError, match=f"(?s){message}.*line"):
        interpret(copy(OUTSIDE[message]))(torch.zeros(37), torch.zeros(37), 1.0)


def test_a_pointer_that_is_moved_to_another_tensor_is_caught():
    memory = torch.zeros(200)
    x, y = memory[:100], memory[100:]
    with pytest.raises(BuildError, match="a store writes byte 400 of X, which has 400"):
        interpret(copy("tl.store(X + 100, 1.0)"))(x, y, 1.0)


BITS = {"bool": (torch.bool, torch.int8), "e8m0": (torch.float8_e8m0fnu, torch.uint8), "i4": (torch.int8, torch.int8)}


@pytest.mark.parametrize("dtype", BITS)
def test_types_that_triton_lacks_are_read_as_their_bits(dtype):
    kind, bits = BITS[dtype]
    x = torch.arange(37).to(torch.uint8)
    x = (x % 2).bool() if dtype == "bool" else x.view(kind)
    body = COPY.replace("other=0)", "other=0).to(tl.float32)")
    assert torch.equal(run(copy(body, dtype), x, shape=(37,), scalars=(1.0,)), x.view(bits).float())


def test_tensors_that_do_not_fit_are_refused():
    launch = interpret(copy())
    for given, message in (
        ((torch.zeros(4), torch.zeros(5), 1.0), "5 elements along"), ((torch.zeros(4).half(), torch.zeros(4), 1.0), "X is torch.float16"),
        ((torch.zeros(2, 2), torch.zeros(4), 1.0), "with 2 axes"), ((torch.zeros(4), torch.zeros(4)), "takes 2 tensors and 1 scalars"),
    ):  # fmt: skip
        with pytest.raises((BindingError, BuildError), match=message):
            launch(*given)


def test_sources_that_are_no_kernels_are_refused():
    for text, message in (("x = 1\n", "no SIGNATURE"), ("SIGNATURE = {'entry': 1}\n", "no emitted kernel")):
        with pytest.raises(BuildError, match=message):
            interpret(Source.make(text, "kernel", load_target("cuda:sm_90")))
    foreign, nameless = copy().text + "print(1)\n", copy().text.replace("def kernel", "def other")
    for text, message in ((foreign, r"no emitted kernel: line \d+: print"), (nameless, "cannot be imported: AttributeError")):
        with pytest.raises(BuildError, match=message):
            interpret(Source.make(text, "kernel", load_target("cuda:sm_90")))
