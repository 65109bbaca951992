"""The attention recipes against torch's own attention, and at their edges: empty parts, empty requests, wrong pages, roots and leaves."""

import einfall as ef
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from cookbook.attention import hogwild, hydragen, paged_decode, tree_shared_prefix, xquant
from cookbook.attention.common import moved

FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SEEDS = st.integers(0, 2**31 - 1)


def step_of(module, name):
    return next(step for step in module.RECIPE.steps if step.name == name)


def exactly(step, tensors):
    """The meaning of a step's cascade in float64."""
    return step.kernel.reference(*tensors, dtype=torch.float64, **step.arguments())


# hydragen ---------------------------------------------------------------------------------------------------------------------------

SHARED = [step_of(hydragen, "hydragen"), step_of(hydragen, "decomposed")]


@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.name)
@given(seed=SEEDS, cut=st.integers(1, 11))
@FEW
def test_where_the_prefix_ends_does_not_matter(step, seed, cut):
    q, k, v, kt, vt, length = step.tensors(seed, {"b": 1, "m": 2, "g": 2, "r": 2, "s": 12, "t": 5, "e": 8, "f": 8})
    moved = (q, k[:cut], v[:cut], torch.cat([k[None, cut:], kt], 1), torch.cat([v[None, cut:], vt], 1), length + 12 - cut)
    torch.testing.assert_close(exactly(step, moved), exactly(step, (q, k, v, kt, vt, length)), **CLOSE)


@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.name)
def test_one_request_alone_is_torchs_causal_attention(step):
    q, k, v, kt, vt, _ = step.tensors(3, {"b": 1, "m": 4, "g": 2, "r": 3, "s": 7, "t": 4, "e": 8, "f": 8})
    keys, values = (torch.cat(pair).transpose(0, 1)[None].double() for pair in ((k, kt[0]), (v, vt[0])))
    mask = torch.ones(4, 11, dtype=torch.bool).tril(7)
    wanted = scaled_dot_product_attention(q.transpose(1, 2).double(), keys, values, attn_mask=mask, scale=0.2, enable_gqa=True)
    found = exactly(step, (q, k, v, kt, vt, torch.zeros(1, dtype=torch.int32)))
    torch.testing.assert_close(found.transpose(1, 2), wanted, **CLOSE)


@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.name)
def test_a_request_does_not_see_the_suffix_of_another(step):
    q, k, v, kt, vt, length = step.tensors(4, {"b": 3, "m": 1, "g": 1, "r": 2, "s": 5, "t": 6, "e": 8, "f": 8})
    before = exactly(step, (q, k, v, kt, vt, length))
    kt[1], vt[1] = torch.nan, torch.nan
    after = exactly(step, (q, k, v, kt, vt, length))
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], **CLOSE)
    assert after[1].isnan().all()


def test_the_shared_prefix_is_counted_once_whatever_the_batch():
    dims = {"b": 50, "m": 1, **hydragen.HEADS}
    alone, _, _ = moved(hydragen.hydragen, {**dims, "b": 1, "s": 100, "t": 3})
    many, _, _ = moved(hydragen.hydragen, {**dims, "s": 100, "t": 3})
    a_token = 2 * 2 * 8 * 128 / 1e6  # K and V in bf16
    assert alone == pytest.approx(103 * a_token)
    assert many == pytest.approx((100 + 50 * 3) * a_token)
    _, planned, _ = moved(hydragen.decomposed, {**dims, "s": 100, "t": 3})
    assert many <= planned <= 2 * many
    copied, _, _ = moved(hydragen.unshared, {**dims, "p": 103})
    assert copied == pytest.approx(50 * 103 * a_token)


@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.name)
def test_an_empty_prefix_leaves_the_suffix(step):
    tensors = step.tensors(5, {"b": 2, "m": 2, "g": 2, "r": 2, "s": 0, "t": 5, "e": 8, "f": 8})
    torch.testing.assert_close(exactly(step, tensors), step.wanted(tensors)[0], **CLOSE)


# hogwild ----------------------------------------------------------------------------------------------------------------------------

BLOCKED = [step_of(hogwild, "hogwild"), step_of(hogwild, "merged")]


def rotated(x, places):
    """RoPE of [token, head, e] by the places of the tokens, in the half-split layout."""
    half = x.shape[-1] // 2
    angle = places.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@pytest.mark.parametrize("step", BLOCKED, ids=lambda step: step.name)
@given(seed=SEEDS, lengths=st.tuples(st.integers(1, 9), st.integers(2, 7), st.integers(2, 7)))
@FEW
def test_each_worker_has_plain_attention_over_its_own_view(step, seed, lengths):
    new, heads, e = 2, 2, 8
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    orders = ((0, 2, 1), (0, 1, 2))
    q, keys, values = normal(2, new, 4, e), [normal(n, heads, e) for n in lengths], [normal(n, heads, e) for n in lengths]
    stored = [rotated(k, torch.arange(len(k))) for k in keys]
    blocks = [t for pair in zip(stored, values, strict=True) for t in pair]
    at, n = hogwild.places(orders, lengths, new), torch.tensor(lengths, dtype=torch.int32)
    found = exactly(step, (q, *blocks, at, n))
    total = sum(lengths)
    for worker, order in enumerate(orders):
        k = rotated(torch.cat([keys[block] for block in order]), torch.arange(total)).transpose(0, 1)
        v = torch.cat([values[block] for block in order]).transpose(0, 1)
        mine = rotated(q[worker], torch.arange(total - new, total)).transpose(0, 1)
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        wanted = scaled_dot_product_attention(mine[None], k[None], v[None], attn_mask=causal, scale=0.2, enable_gqa=True)[0]
        torch.testing.assert_close(found[worker].transpose(0, 1), wanted, **CLOSE)


@pytest.mark.parametrize("step", BLOCKED, ids=lambda step: step.name)
def test_a_block_that_is_not_seen_and_what_is_not_filled_weigh_nothing(step):
    q, kc, vc, kx, vx, ky, vy, _, _ = step.tensors(1, {"w": 2, "m": 1, "g": 1, "r": 2, "c": 5, "x": 4, "y": 6, "e": 8, "f": 8})
    lengths = (5, 3, 4)
    at, n = hogwild.places(((0, 1), (0, 1, 2)), lengths, 1), torch.tensor(lengths, dtype=torch.int32)
    assert at[:, 0].tolist() == [7, 2, -1]  # Bob's block lies after Alice's query
    before = exactly(step, (q, kc, vc, kx, vx, ky, vy, at, n))
    kx[3:], ky[4:] = 1e3, -1e3
    torch.testing.assert_close(exactly(step, (q, kc, vc, kx, vx, ky, vy, at, n)), before, **CLOSE)
    ky += 1.0
    after = exactly(step, (q, kc, vc, kx, vx, ky, vy, at, n))
    torch.testing.assert_close(after[0], before[0], **CLOSE)
    assert not torch.allclose(after[1], before[1])


# paged decode -----------------------------------------------------------------------------------------------------------------------

PAGED = step_of(paged_decode, "paged_decode")
SOME = {"b": 3, "g": 2, "r": 2, "e": 8, "f": 8, "n": 4, "spare": 2}


def both_ways(step, tensors):
    """The reference in float64, and the kernel."""
    return exactly(step, tensors), step.kernel(*tensors, **step.arguments()).double()


@given(seed=SEEDS)
@FEW
def test_pages_in_order_are_torchs_attention_on_a_dense_cache(seed):
    q, k, v, table, _ = PAGED.tensors(seed, SOME)
    table[:], length = torch.arange(12).reshape(3, 4), torch.tensor([64, 37, 1], dtype=torch.int32)
    keys, values = (x[:12].reshape(3, 64, *x.shape[2:]).transpose(1, 2).double() for x in (k, v))
    seen = (torch.arange(64) < length[:, None])[:, None, None]
    wanted = scaled_dot_product_attention(q.double()[:, :, None], keys, values, attn_mask=seen, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(exactly(PAGED, (q, k, v, table, length)), wanted[:, :, 0], **CLOSE)


def test_a_length_of_zero_gives_a_row_of_zeros():
    q, k, v, table, _ = PAGED.tensors(0, SOME)
    table[0] = -1
    for found in both_ways(PAGED, (q, k, v, table, torch.tensor([0, 20, 0], dtype=torch.int32))):
        assert not found[[0, 2]].any()
        assert found[1].abs().min() > 0


@pytest.mark.parametrize("entry", [-1, 14, 10**6])
def test_what_no_token_uses_may_be_anything(entry):
    q, k, v, table, _ = PAGED.tensors(1, SOME)
    table[:], length = torch.arange(12).reshape(3, 4), torch.tensor([3, 16, 33], dtype=torch.int32)
    wanted = exactly(PAGED, (q, k, v, table, length))
    table[0, 1:], table[1, 1:], table[2, 3:] = entry, entry, entry
    for pool in (k, v):  # neither pages that are not named nor the rest of a last page
        pool[[1, 2, 3, 5, 6, 7, 11, 12, 13]] = torch.nan
        pool[0, 3:], pool[10, 1:] = torch.nan, torch.inf
    for found in both_ways(PAGED, (q, k, v, table, length)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", [-1, 14])
def test_a_wrong_page_is_named_where_indices_are_checked(entry):
    tensors = PAGED.tensors(2, SOME)
    tensors[3][:], tensors[4][:] = torch.arange(12).reshape(3, 4), 64
    tensors[3][1, 2] = entry
    message = rf"gathered index {entry} from table is outside rank page of K, which has extent 14"
    with pytest.raises(ef.BindingError, match=message):
        PAGED.kernel.reference(*tensors, scale=0.2)
    with ef.configure(debug=True), pytest.raises(ef.BindingError, match=message):
        PAGED.kernel(*tensors, scale=0.2)


def test_a_wrong_page_goes_unnoticed_otherwise_and_stays_inside_the_pool():
    q, k, v, table, _ = PAGED.tensors(2, SOME)
    table[:], length = torch.arange(12).reshape(3, 4), torch.full((3,), 64, dtype=torch.int32)
    around_k, around_v = torch.full((40, 16, 2, 8), torch.nan), torch.full((40, 16, 2, 8), torch.nan)
    around_k[13:27], around_v[13:27] = k, v
    tensors = (q, around_k[13:27], around_v[13:27], table, length)
    right = PAGED.kernel(*tensors, scale=0.2)
    table[1, 2] = 20
    wrong = PAGED.kernel(*tensors, scale=0.2)
    torch.testing.assert_close(wrong[[0, 2]], right[[0, 2]], rtol=1e-5, atol=1e-6)
    assert wrong[1].isfinite().all()
    assert not torch.allclose(wrong[1], right[1])


# xquant -----------------------------------------------------------------------------------------------------------------------------

QUANTIZED = {name: step_of(xquant, name) for name in ("rematerialized", "rotated", "absorbed")}
LAYER = {"b": 2, "m": 3, "g": 2, "r": 2, "x": 2, "p": 14, "e": 8, "f": 8}


@given(seed=SEEDS)
@FEW
def test_the_order_of_the_sums_does_not_matter(seed):
    tensors = QUANTIZED["absorbed"].tensors(seed, LAYER)
    torch.testing.assert_close(exactly(QUANTIZED["absorbed"], tensors), exactly(QUANTIZED["rematerialized"], tensors), **CLOSE)


@pytest.mark.parametrize("turned", [False, True])
def test_an_input_that_is_exact_in_8_bits_gives_torchs_attention(turned):
    q, x8, a, z, wk, wv, _ = QUANTIZED["rotated"].tensors(7, {**LAYER, "b": 1})
    x = x8.double()
    a[:], z[:], places = 1.0, 0, torch.arange(17)
    k, v = (torch.einsum("pd,dge->pge", x[0], w.double()) for w in (wk, wv))
    queries = q[0].double()
    if turned:
        queries, k = rotated(queries, places[-3:]), rotated(k, places)
    causal = torch.ones(3, 17, dtype=torch.bool).tril(14)
    wanted = scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (queries, k, v)), attn_mask=causal, scale=0.2, enable_gqa=True)
    step = QUANTIZED["rotated" if turned else "rematerialized"]
    found = exactly(step, (q, x8, a, z, wk, wv, torch.tensor([14], dtype=torch.int32)))
    torch.testing.assert_close(found.transpose(1, 2), wanted, **CLOSE)


@given(seed=SEEDS, bits=st.integers(2, 8), spread=st.floats(-3, 3))
@FEW
def test_the_quantizer_is_off_by_less_than_a_step_and_keeps_zero(seed, bits, spread):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**spread
    x[0], x[1, :32], x[2, 5] = 0.0, 7.0, 0.0
    numbers, step, zero = xquant.quantize(x, bits)
    back = xquant.restored(numbers, step, zero)
    assert int(numbers.min()) >= -(2 ** (bits - 1))
    assert int(numbers.max()) < 2 ** (bits - 1)
    assert ((back - x).abs() <= step.repeat_interleave(32, dim=-1) * (1 + 1e-9)).all()
    assert not back[0].any()
    assert back[2, 5] == 0.0


def test_fewer_bits_lose_more_and_outliers_only_matter_to_cached_keys():
    by_bits = [xquant.errors(bits) for bits in (8, 4, 2)]
    for column in zip(*by_bits, strict=True):
        assert list(column) == sorted(column)
    assert all(outliers > 1.2 * even for _, even, outliers in by_bits)


# trees over a shared prefix ---------------------------------------------------------------------------------------------------------

ANCESTORS = step_of(tree_shared_prefix, "ancestors")
VERIFIED = [step_of(tree_shared_prefix, "verify"), step_of(tree_shared_prefix, "merged")]
DRAFTS = {"b": 2, "m": 9, "g": 2, "r": 2, "s": 7, "t": 5, "e": 8, "f": 8}


def test_a_chain_is_causal_and_roots_see_themselves():
    chain, roots = torch.arange(-1, 16)[None].int(), torch.full((1, 17), -1, dtype=torch.int32)
    reach, depth = ANCESTORS.kernel.reference(torch.cat([chain, roots]), rounds=4)
    assert torch.equal(reach[0], torch.ones(17, 17, dtype=torch.bool).tril())
    assert torch.equal(reach[1], torch.eye(17, dtype=torch.bool))
    assert depth.tolist() == [list(range(17)), [0] * 17]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_double_how_far_up_a_node_sees(rounds):
    reach, _ = ANCESTORS.kernel.reference(torch.arange(-1, 16)[None].int(), rounds=rounds)
    near = torch.arange(17)[:, None] - torch.arange(17)
    assert torch.equal(reach[0], (near >= 0) & (near <= 2**rounds))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("step", VERIFIED, ids=lambda step: step.name)
@given(seed=SEEDS)
@FEW
def test_trees_are_flex_attention_with_a_mask_of_ancestors(step, seed):
    q, kp, vp, kt, vt, kn, vn, length, tree = step.tensors(seed, DRAFTS)
    keys, values = (torch.cat([p.expand(2, *p.shape), t, n], dim=1).transpose(1, 2).double() for p, t, n in ((kp, kt, kn), (vp, vt, vn)))

    def seen(b, h, m, p):
        node = (p - 12).clamp(min=0)
        return (p < 7) | (p >= 7) & (p < 12) & (p - 7 < length[b]) | (p >= 12) & tree[b, m, node]

    mask = create_block_mask(seen, 2, None, 9, 21, device="cpu")
    wanted = flex_attention(q.transpose(1, 2).double(), keys, values, block_mask=mask, scale=0.2, enable_gqa=True)
    found = exactly(step, (q, kp, vp, kt, vt, kn, vn, length, tree))
    torch.testing.assert_close(found.transpose(1, 2), wanted, **CLOSE)


@pytest.mark.parametrize("step", VERIFIED, ids=lambda step: step.name)
def test_a_node_gets_what_decoding_its_path_gets(step):
    parents = (-1, 0, 0, 1, 1, 2, 3, 3, 5)
    q, kp, vp, kt, vt, kn, vn, length, _ = step.tensors(9, DRAFTS)
    tree, depth = ANCESTORS.kernel.reference(torch.tensor([parents, parents], dtype=torch.int32), rounds=4)
    found = exactly(step, (q, kp, vp, kt, vt, kn, vn, length, tree))
    chained = step_of(hydragen, "hydragen")
    for node in range(9):
        path = tree[0, node].nonzero()[:, 0]
        assert len(path) == depth[0, node] + 1
        for b in range(2):
            own = slice(b, b + 1)
            k, v = (torch.cat([t[own, : length[b]], n[own, path]], dim=1) for t, n in ((kt, kn), (vt, vn)))
            before = torch.tensor([k.shape[1] - 1], dtype=torch.int32)
            alone = exactly(chained, (q[own, node : node + 1], kp, vp, k, v, before))
            torch.testing.assert_close(found[b, node], alone[0, 0], **CLOSE)


def test_a_tree_of_what_is_shared_moves_each_key_once():
    dims = {"b": 16, "m": tree_shared_prefix.NODES, **hydragen.HEADS, "s": 100, "t": 3, "k": 64}
    _, planned, _ = moved(tree_shared_prefix.merged, dims)
    assert planned == pytest.approx((100 + 16 * (3 + 64)) * 2 * 2 * 8 * 128 / 1e6)
