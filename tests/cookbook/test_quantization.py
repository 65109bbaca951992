"""The recipes of block quantization: what is kept by them, and what becomes of zeros, infinities, NaN and wrong arguments."""

import math

import einfall as ef
import pytest
import torch

from cookbook.quantization import bfp, common, gear, int4_groups, mustafar, mx

INF, NAN = math.inf, math.nan
RUNS = [pytest.param(lambda kernel: kernel.reference, id="reference"), pytest.param(lambda kernel: kernel, id="kernel")]


def same(found, wanted):
    """Equal in type and value, NaN equal to NaN."""
    assert found.dtype == wanted.dtype
    assert bool(((found == wanted) | (found != found) & (wanted != wanted)).all())


# int4 groups ------------------------------------------------------------------------------------------------------------------------


def groups_of(value):
    """Keys [1, 1, 1, 64] of two groups, the first ordinary, the second with `value` at one place."""
    X = torch.linspace(-1.0, 2.0, 64).reshape(1, 1, 1, 64).clone()
    X[..., 40] = value
    return X


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [INF, -INF, NAN, 3.3e38, -1e5])
def test_a_group_that_four_bits_cannot_hold_reads_as_nan_and_its_neighbour_does_not(run, value):
    X = groups_of(value)
    packed = run(int4_groups.quantize)(X)
    numbers = int4_groups.unpacked(*packed, torch.float32)
    assert bool(numbers[..., 32:].isnan().all())
    assert float((numbers - X)[..., :32].abs().max()) < 0.06
    assert bool((packed[0] < 16).all())  # the unusable group's codes, in the high nibbles, are 0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 1e-30])
def test_a_constant_group_is_its_zero_point(run, value):
    X = torch.full((1, 1, 2, 64), value)
    P, S, Z = run(int4_groups.quantize)(X)
    assert not P.any() and not S.any()
    same(int4_groups.unpacked(P, S, Z, torch.float32), X.half().float())


def test_no_value_is_further_off_than_half_a_step_and_the_rounding_of_the_zero_point():
    X = common.outlying(torch.Generator().manual_seed(1), 2, 2, 31, 128)
    P, S, Z = int4_groups.quantize(X)
    error = (int4_groups.unpacked(P, S, Z, torch.float64) - X).abs().unflatten(-1, (-1, 32)).amax(-1)
    span = S.double() * 15 + Z.double().abs()
    assert bool((error <= S.double() / 2 + span * 2.0**-10).all())


def test_a_sequence_of_length_0_attends_to_nothing():
    step = int4_groups.RECIPE.steps[1]
    *tensors, _ = step.tensors(0, {**step.sizes, "b": 3})
    out = step.kernel(*tensors, torch.tensor([0, 96, 1], dtype=torch.int32), scale=0.125)
    assert not out[0].any()
    values = int4_groups.unpacked(*tensors[4:7], torch.float32)
    torch.testing.assert_close(out[2], values[2, :, 0].repeat_interleave(4, 0))


def test_a_group_that_reads_as_nan_beyond_the_length_does_no_harm():
    step = int4_groups.RECIPE.steps[1]
    *tensors, _ = step.tensors(0)
    L = torch.tensor([5, 60], dtype=torch.int32)
    clean = step.kernel(*tensors, L, scale=0.125)
    tensors[2][:, :, 60:] = NAN
    tensors[5][:, :, 60:] = NAN
    same(step.kernel(*tensors, L, scale=0.125), clean)


def test_channels_must_be_two_halves_of_whole_groups():
    with pytest.raises(ef.BindingError, match="no whole extent of c, 96"):
        int4_groups.quantize(torch.zeros(1, 1, 1, 96))


# Block floating point ---------------------------------------------------------------------------------------------------------------


def projections():
    """W_q of 4 heads over W_k of 2, of which every sixteenth row is loud, and tokens."""
    generator = torch.Generator().manual_seed(2)
    Wk = torch.randn(2, 128, 64, generator=generator) / 8
    Wk[:, 3::16] *= 8
    Wq = torch.randn(4, 128, 64, generator=generator) / 8
    return Wq, Wk, torch.randn(200, 64, generator=generator), torch.randn(50, 64, generator=generator)


def scores(Wq, Wk, X, x, keys=lambda K: K):
    K = keys(torch.einsum("pd,ged->gpe", X, Wk)[None])[0].repeat_interleave(2, 0)
    return torch.einsum("md,hed,hpe->hmp", x, Wq, K)


def through(bits):
    """Keys as the cascade's codes give them back."""

    def back(K):
        M, E = (bfp.encode8 if bits == 8 else bfp.encode4)(K)
        return bfp.decoded(M if bits == 8 else bfp.unpacked(M), E, bits, torch.float32)

    return back


def test_sorting_the_channels_leaves_the_scores_as_they_are():
    Wq, Wk, X, x = (t.double() for t in projections())
    order = bfp.k_sort.reference(Wk, dtype=torch.float64)
    q, k = bfp.reorder.reference(Wq, Wk, order, dtype=torch.float64)
    assert not torch.equal(k, Wk)
    torch.testing.assert_close(scores(q, k, X, x), scores(Wq, Wk, X, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_sorted_channels_make_smaller_errors(bits):
    Wq, Wk, X, x = projections()
    q, k = bfp.reorder.reference(Wq, Wk, bfp.k_sort.reference(Wk))
    true = scores(Wq, Wk, X, x)
    plain = common.relative(scores(Wq, Wk, X, x, through(bits)), true)
    assert common.relative(scores(q, k, X, x, through(bits)), true) < 0.9 * plain


def test_an_order_that_names_no_channel_is_refused():
    Wq, Wk, *_ = projections()
    order = torch.arange(128, dtype=torch.int32).expand(2, 128).clone()
    order[1, 5] = 128
    with pytest.raises(ef.BindingError, match="index 128 from order is outside rank e"):
        bfp.reorder.reference(Wq, Wk, order)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("value", "exponent"), [(INF, -128), (-INF, -128), (NAN, -128), (3.4e38, 127), (2.0**-119, -119), (1e-40, -120), (0.0, -120)]
)
def test_blocks_at_the_ends_of_the_range(run, bits, value, exponent):
    """Infinities and NaN make a block unusable, what is tiny rounds to a multiple of the least step, and a neighbour does not notice."""
    K = torch.zeros(1, 1, 1, 64)
    K[..., 5] = value
    K[..., 32:] = 1.0
    encode = bfp.encode8 if bits == 8 else bfp.encode4
    M, E = run(encode)(K)
    assert E.flatten().tolist() == [exponent, 0]
    found = bfp.decoded(M if bits == 8 else bfp.unpacked(M), E, bits, torch.float64)
    assert bool((found[..., 32:] == 1.0).all())
    if exponent == -128:
        assert bool(found[..., :32].isnan().all())
    else:
        step = 2.0 ** (exponent + 2 - bits)
        assert float((found - K)[..., 5].abs()) <= step / 2 or abs(value) > found[..., 5].abs() == (2 ** (bits - 1) - 1) * step


# Microscaling -----------------------------------------------------------------------------------------------------------------------


def bits(t):
    return t.view(torch.uint8) if t.element_size() == 1 else t


def blocks_with(tops):
    """One block for each of `tops`, its largest magnitude, in blocks of smaller values; an even number of blocks."""
    rows = torch.rand(len(tops), 2, 32, generator=torch.Generator().manual_seed(3)) - 0.5
    rows = rows * torch.tensor(tops)[:, None, None]
    rows[:, 0, 7] = torch.tensor(tops)
    rows[:, 1, 11] = -torch.tensor(tops)
    return rows.reshape(len(tops), 64)


def around(x):
    """x and its two neighbours in float32."""
    t = torch.tensor(x)
    return [float(torch.nextafter(t, torch.tensor(-INF))), x, float(torch.nextafter(t, torch.tensor(INF)))]


EDGES = [y for x in (4.0, 6.0, 7.0, 8.0, 256.0, 448.0, 480.0, 496.0, 512.0, 2.0**-119, 448 * 2.0**-127, 2.0**-126, 2.0**-128, 6 * 2.0**-127)
         for y in around(x)]  # fmt: skip
EDGES += [0.0, 1e-45, 1e-40, 3.4028235e38, 1.7e38, INF, -INF, NAN]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mode", mx.MODES)
@pytest.mark.parametrize(("kernel", "oracle"), [(mx.quantize8, mx.quantize8_oracle), (mx.quantize4, mx.quantize4_oracle)])
def test_every_bit_is_that_of_ml_dtypes_where_the_scale_turns_and_at_the_ends_of_the_range(kernel, oracle, mode, run):
    X = blocks_with(EDGES)
    for found, wanted in zip(run(kernel)(X, mode=mode), oracle(X, mode=mode), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize(
    ("top", "codes", "largest"),
    [  # worked out by hand from the definitions: scale codes by mode, and the element that `top` becomes
        (448.0, (127, 127, 127, 128), (448, 448, 448, 224)),
        (480.0, (127, 128, 127, 128), (448, 240, 448, 240)),
        (500.0, (127, 128, 128, 128), (448, 256, 256, 256)),
        (256.0, (127, 127, 127, 127), (256, 256, 256, 256)),
        (257.0, (127, 127, 127, 128), (256, 256, 256, 128)),
    ],
)
def test_modes_of_the_scale_by_hand_fp8(top, codes, largest):
    for mode, code, element in zip(mx.MODES, codes, largest, strict=True):
        E, S = mx.quantize8.reference(blocks_with([top]), mode=mode)
        assert int(S.view(torch.uint8)[0, 0]) == code
        assert float(E[0, 7].float()) == element
        assert float(E[0, 32 + 11].float()) == -element


@pytest.mark.parametrize(
    ("top", "codes", "largest"),
    [
        (4.0, (127, 127, 127, 127), (4, 4, 4, 4)),
        (6.0, (127, 127, 127, 128), (6, 6, 6, 3)),
        (6.5, (127, 128, 127, 128), (6, 3, 6, 3)),
        (7.5, (127, 128, 128, 128), (6, 4, 4, 4)),
    ],
)
def test_modes_of_the_scale_by_hand_fp4(top, codes, largest):
    for mode, code, element in zip(mx.MODES, codes, largest, strict=True):
        P, S = mx.quantize4.reference(blocks_with([top]), mode=mode)
        assert int(S.view(torch.uint8)[0, 0]) == code
        assert float(mx.unpacked(P)[0, 7]) == element
        assert float(mx.unpacked(P)[0, 32 + 11]) == -element


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_block_that_is_not_finite_reads_as_nan_and_spoils_its_row_of_a_product_only(value, run):
    X = torch.ones(3, 64)
    X[1, 40] = value
    E, S = run(mx.quantize8)(X)
    assert S.view(torch.uint8).tolist() == [[119, 119], [119, 255], [119, 119]]
    assert not E[1, 32:].view(torch.uint8).any()
    product = run(mx.matmul8)(E, S, E[:1], S[:1])
    assert bool(product[1].isnan().all()) and torch.equal(product[[0, 2]], torch.full((2, 1), 64.0))


def just_above_a_power_of_two(*ratios):
    """Where torchao's ceil(log2(x)) in float32 is one too small: the logarithm rounds to the whole number below."""
    return any(0.5 < math.frexp(x)[0] < 0.5 + 1e-6 for x in ratios)


@pytest.mark.parametrize("mode", mx.MODES)
def test_the_same_scales_and_elements_as_torchao(mode):
    """Where both define the result: finite blocks whose scale is above 2**-127 (torchao then scales by another number than it stores)."""
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    tops = [x for x in EDGES if 2.0**-100 < x < INF and not (mode == "rceil" and just_above_a_power_of_two(x / 448.0, x / 6.0))]
    X = torch.cat([blocks_with(tops), mx.normal(torch.Generator().manual_seed(4), 64, 64)])
    chosen = mx_tensor.ScaleCalculationMode[mode.upper()]
    S, E = mx_tensor.to_mx(X, torch.float8_e4m3fn, 32, chosen)
    found, scales = mx.quantize8.reference(X, mode=mode)
    assert torch.equal(bits(found), bits(E)) and torch.equal(bits(scales), bits(S))
    S, P = mx_tensor.to_mx(X, torch.float4_e2m1fn_x2, 32, chosen)  # packs neighbours: element 2 x low, 2 x + 1 high
    found, scales = mx.quantize4.reference(X, mode=mode)
    nibbles = torch.stack([bits(P) & 15, bits(P) >> 4], -1).flatten(-2)
    assert torch.equal(found, nibbles[:, :32] | nibbles[:, 32:] << 4) and torch.equal(bits(scales), bits(S))


def test_a_mode_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no rounding mode 'nearest': one of floor, rceil, even, ceil"):
        mx.quantize8.reference(torch.ones(1, 32), mode="nearest")


# Pruning by bitmaps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_the_largest_channels_are_kept_in_order_and_nothing_else(run):
    X = torch.randn(2, 1, 9, 96, generator=torch.Generator().manual_seed(5))
    V, B = run(mustafar.compress)(X, k=20)
    dense = mustafar.expanded(V, B)
    kept = dense != 0
    assert bool((kept.sum(-1) == 20).all()) and torch.equal(dense[kept], X[kept])
    assert bool((X.abs().masked_fill(~kept, INF).amin(-1) > X.abs().masked_fill(kept, 0).amax(-1)).all())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("fill", "value", "wanted"),
    [(0.0, x, [0, 1, 40]) for x in (NAN, INF, -INF, 1e-45)] + [(x, 0.0, [0, 1, 2]) for x in (1.0, 0.0, -0.0)],
)
def test_what_is_not_finite_is_never_pruned_and_among_equals_the_lower_channels_stay(run, fill, value, wanted):
    X = torch.full((1, 1, 1, 64), fill)
    X[..., 40] = value
    V, B = run(mustafar.compress)(X, k=3)
    found = [32 * w + i for w in range(2) for i in range(32) if int(B[0, 0, 0, w]) >> i & 1]
    assert found == wanted
    same(V[0, 0, 0], X[0, 0, 0, wanted])


def test_all_channels_kept_is_attention_itself():
    generator = torch.Generator().manual_seed(6)
    Q, K, V = torch.randn(2, 4, 64, generator=generator), *torch.randn(2, 2, 2, 17, 64, generator=generator)
    L = torch.tensor([17, 0], dtype=torch.int32)
    out = mustafar.decode(Q, *mustafar.compress(K, k=64), *mustafar.compress(V, k=64), L, scale=0.2)
    assert not out[1].any()
    keys, values = (t[:1].repeat_interleave(2, 1) for t in (K, V))
    wanted = torch.nn.functional.scaled_dot_product_attention(Q[:1, :, None], keys, values, scale=0.2)[:, :, 0]
    torch.testing.assert_close(out[:1], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_more_channels_than_there_are_cannot_be_kept(run):
    with pytest.raises(ef.BindingError, match="35"):
        run(mustafar.compress)(torch.ones(1, 2, 3, 32), k=35)



# GEAR -------------------------------------------------------------------------------------------------------------------------------


def compressed(run, X, rank=3, k=2, loops=2):
    """The seven tensors that stand for X."""
    B = torch.rand(X.shape[1], X.shape[3], rank, generator=torch.Generator().manual_seed(8))
    P, H, Z, S, I = run(gear.compress)(X, k=k)
    return P, H, Z, S, I, *run(gear.correct)(X, P, H, Z, I, B, loops=loops)


def tokens(*shape):
    return torch.randn(*(shape or (1, 2, 40, 64)), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("run", RUNS)
def test_every_part_takes_from_the_error(run):
    X = tokens()
    X[..., 5] *= 20.0
    found = compressed(run, X)
    *groups, U, W = found
    errors = [
        common.relative(int4_groups.unpacked(*int4_groups.quantize_oracle(X), torch.float32), X),
        common.relative(gear.decompressed(*groups, 0 * U, W, torch.float32), X),
        common.relative(gear.decompressed(*found, torch.float32), X),
    ]
    assert errors[2] < 0.97 * errors[1] < 0.6 * errors[0]


def test_the_correction_is_the_best_of_its_rank_after_many_iterations():
    X = tokens(1, 1, 30, 64)
    *groups, U, W = compressed(lambda kernel: kernel.reference, X, rank=1, loops=100)
    R = (X - gear.decompressed(*groups, 0 * U, W, torch.float32))[0, 0].double()
    left, values, right = torch.linalg.svd(R)
    torch.testing.assert_close((U @ W.mT)[0, 0].double(), left[:, :1] * values[:1] @ right[:1], rtol=1e-3, atol=1e-4)


def test_the_factors_are_a_projection_onto_orthonormal_columns():
    U = compressed(lambda kernel: kernel, tokens())[-2]
    torch.testing.assert_close(U.mT @ U, torch.eye(3).expand(1, 2, 3, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_infinities_and_nan_stay_where_they_are_and_the_rest_is_as_if_they_were_not(run):
    X = tokens()
    X[0, 0, 2, 7], X[0, 0, 3, 40], X[0, 1, 4, 50] = INF, -INF, NAN
    found = gear.decompressed(*compressed(run, X), torch.float32)
    assert not torch.isfinite(found[~torch.isfinite(X)]).any()
    same(found[X.isinf()], X[X.isinf()])
    finite = X.isfinite()
    assert float((found - X)[finite].abs().max()) < 0.4


@pytest.mark.parametrize("run", RUNS)
def test_a_token_with_more_nan_than_outliers_loses_its_groups_and_no_other_token_notices(run):
    X = tokens()
    X[0, 0, 4, 2:12] = NAN
    found = gear.decompressed(*compressed(run, X), torch.float32)
    others = [t for t in range(40) if t != 4]
    assert bool(found[0, 0, 4, :32].isnan().all()) and float((found - X)[0, 0, others].abs().max()) < 0.4


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_a_constant_matrix_keeps_no_channel_twice(run, value):
    X = torch.full((1, 2, 40, 64), value)
    found = compressed(run, X)
    *_, I, U, W = found
    assert bool((I.sort(-1).values.diff(dim=-1) > 0).all())
    assert float((gear.decompressed(*found, torch.float32) - X).abs().max()) <= 1e-3 * abs(value)
    assert value or not (U.any() or W.any())


def test_a_rank_above_the_number_of_tokens_leaves_columns_that_are_0():
    *_, U, W = compressed(lambda kernel: kernel.reference, tokens(1, 1, 2, 64), rank=4)
    assert U[..., :2].any() and not U[..., 2:].any() and not W[..., 2:].any()


@pytest.mark.parametrize("run", RUNS)
def test_all_channels_apart_leave_slots_that_the_scores_skip(run):
    X, B = tokens(), torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(10))
    P, H, Z, S, I = run(gear.compress)(X, k=40)
    assert bool((I[..., 64:] == -1).all()) and not (X - X.half().float()).abs().max() > 2e-3
    U, W = run(gear.correct)(X, P, H, Z, I, B, loops=2)
    Q = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(11))
    wanted = (X.repeat_interleave(2, 1) @ Q[..., None])[..., 0]
    assert common.relative(run(gear.scores)(Q, P, H, Z, S, I, U, W, scale=1.0), wanted) < 1e-3
