"""A kernel as a user meets it: decorated, called, described, compiled, and refused with a text that helps."""

import threading
from typing import Annotated

import einfall as ef
import pytest
import torch


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    """Scaled dot-product attention."""
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def total(X: "i j", *, factor: float = 2.0, square: bool = False, power: int = 1) -> "i":
    Y = X * factor
    if square:
        Y = Y * Y
    for _ in range(power - 1):
        Y = Y * X
    return Y.sum("j")


@ef.kernel
def both(X: "i j") -> ("i", "i"):
    M = X.max("j")
    S = (X * X).sum("j")
    return M, S


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory):
    """One cache for the module, so that a kernel is built once; no database but a test's own."""
    with ef.configure(cache=tmp_path_factory.getbasetemp() / "api_cache", database=None):
        yield


def qkv(m=17, p=33, e=16, f=16, b=2, h=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m * 100 + p)
    return [torch.randn(b, h, n, d, generator=generator).to(dtype) for n, d in ((m, e), (p, e), (p, f))]


def exact(q, k, v, scale):
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


# -- the cascade ----------------------------------------------------------------------------------------------------------------------


def test_a_kernel_keeps_the_name_and_the_text_of_its_function():
    assert attention.__name__ == "attention" and attention.__doc__ == "Scaled dot-product attention."
    assert repr(attention) == "<einfall.Kernel attention(Q, K, V)>"


def test_the_cascade_is_traced_once_for_types_and_static_arguments():
    assert total.cascade is total.cascade
    assert total.trace(square=True) is total.trace(square=True)
    assert total.trace(square=True) != total.cascade
    assert total.trace(dtypes="bf16").inputs[0].dtype == ef.bf16
    assert total.trace(dtypes={"X": ef.f16}).inputs[0].dtype == ef.f16


def test_a_function_can_be_traced_under_a_profiler():
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        traced = ef.kernel(total.__wrapped__).cascade
        sorted([3, 1, 2])
    finally:
        profiler.disable()
    assert traced == total.cascade
    assert any("sorted" in str(entry.code) for entry in profiler.getstats()), "the profiler goes on after the trace"


def test_a_kernel_from_the_text_of_another_is_the_same():
    text = str(attention.cascade)
    again = ef.Kernel.from_cascade(ef.parse(text))
    assert again.cascade == attention.cascade and str(again.cascade) == text
    q, k, v = qkv()
    torch.testing.assert_close(again(q, k, v, scale=0.25), attention(q, k, v, scale=0.25), rtol=0, atol=0)


def test_passes_and_phases_are_those_of_the_cascade():
    assert ef.passes(attention.cascade, "p") == 3
    assert ef.phases(total.cascade, "j") == 1


def test_annotations_may_be_annotated_types():
    @ef.kernel
    def rows(X: Annotated[torch.Tensor, "i j"]) -> Annotated[torch.Tensor, "i"]:
        return X.sum("j")

    x = torch.randn(5, 7)
    torch.testing.assert_close(rows.reference(x), x.sum(1))


def test_parse_names_the_line_of_a_malformed_text():
    with pytest.raises(ef.CascadeError, match=r"f\.cascade:2"):
        ef.parse("cascade f(X[i,j]: f32) -> Y[i]\n  Y[i] = sum(q) X[i,j]\n", "f.cascade")


# -- the reference --------------------------------------------------------------------------------------------------------------------


def test_the_reference_is_eager_torch():
    q, k, v = qkv()
    torch.testing.assert_close(attention.reference(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.reference(q, k, v, scale=0.25, dtype=torch.float64), exact(q, k, v, 0.25), rtol=1e-12, atol=1e-13)


def test_static_and_scalar_defaults_hold_for_the_reference():
    x = torch.randn(4, 5)
    torch.testing.assert_close(total.reference(x), (2 * x).sum(1))
    torch.testing.assert_close(total.reference(x, factor=3, square=True), (9 * x * x).sum(1))
    torch.testing.assert_close(total.reference(X=x, power=3), (2 * x**3).sum(1))


# -- calls ----------------------------------------------------------------------------------------------------------------------------


def test_a_call_compiles_and_agrees_with_float64():
    q, k, v = qkv()
    for _ in range(2):
        torch.testing.assert_close(attention(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)


def test_other_extents_strides_and_types_are_served():
    for m, p in ((1, 1), (5, 64), (64, 5), (130, 129)):
        q, k, v = qkv(m, p)
        torch.testing.assert_close(attention(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv())
    torch.testing.assert_close(attention(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)
    q, k, v = qkv(dtype=torch.bfloat16)
    found = attention(q, k, v, scale=0.25)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(q, k, v, 0.25), rtol=2e-2, atol=2e-2)


def test_another_head_size_compiles_another_executable():
    for e in (16, 24):
        q, k, v = qkv(e=e, f=e)
        torch.testing.assert_close(attention(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)


def test_tensors_may_be_given_by_name_and_results_may_be_several():
    x = torch.randn(6, 40)
    largest, squares = both(X=x)
    torch.testing.assert_close(largest, x.max(1).values)
    torch.testing.assert_close(squares, (x * x).sum(1))
    first, second = torch.empty(6), torch.empty(6)
    given = both(x, out=(first, second))
    assert given[0] is first and given[1] is second
    torch.testing.assert_close(first, largest, rtol=0, atol=0)


def test_static_arguments_and_defaults_hold_for_calls():
    x = torch.randn(6, 40)
    torch.testing.assert_close(total(x), (2 * x).sum(1))
    torch.testing.assert_close(total(x, factor=3.0, square=True), (9 * x * x).sum(1))
    torch.testing.assert_close(total(x, power=2), (2 * x * x).sum(1))
    torch.testing.assert_close(total(x, factor=torch.tensor(0.5)), (0.5 * x).sum(1))


def test_threads_that_call_at_once_agree():
    x = [torch.randn(8, 50 + i) for i in range(6)]
    results = [None] * len(x)

    def run(i):
        results[i] = total(x[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for given, found in zip(x, results, strict=True):
        torch.testing.assert_close(found, (2 * given).sum(1))


def test_a_gradient_is_refused_and_no_grad_is_not():
    x = torch.randn(6, 40, requires_grad=True)
    with pytest.raises(ef.UnsupportedError, match=r"X requires a gradient.*no backward") as caught:
        total(x)
    assert "torch.no_grad()" in str(caught.value)
    with torch.no_grad():
        torch.testing.assert_close(total(x), (2 * x).sum(1))
    with pytest.raises(ef.UnsupportedError, match="no backward"):
        total(x)


REFUSED = [
    (lambda q, k, v: attention(q, k[:, :, :, :8].contiguous(), v, scale=1.0), ef.BindingError, ("rank e", "16", "8", "K")),
    (lambda q, k, v: attention(q, k, v[:, :, :-1], scale=1.0), ef.BindingError, ("rank p", "33", "32")),
    (lambda q, k, v: attention(q[0], k, v, scale=1.0), ef.BindingError, ("Q", "4 axes", "found 3")),
    (lambda q, k, v: attention(q, k, scale=1.0), ef.BindingError, ("V[b h p f] is not given",)),
    (lambda q, k, v: attention(q, k, v, v, scale=1.0), ef.BindingError, ("4 tensors given, expected 3",)),
    (lambda q, k, v: attention(q, k, v), ef.BindingError, ("the scalar scale is not given",)),
    (lambda q, k, v: attention(q, k, v, scale="big"), ef.BindingError, ("scale is 'big'",)),
    (lambda q, k, v: attention(q, k, v, scal=1.0), ef.BindingError, ("no argument 'scal'", "did you mean scale?")),
    (lambda q, k, v: attention(q, k, v, Q=q, scale=1.0), ef.BindingError, ("Q is given twice",)),
    (lambda q, k, v: attention(q.numpy(), k, v, scale=1.0), ef.BindingError, ("Q is a ndarray", "torch.as_tensor(Q)")),
    (lambda q, k, v: attention(q.to("meta"), k, v, scale=1.0), ef.BindingError, ("different devices", "Q on meta")),
    (
        lambda q, k, v: attention(q.to("meta"), k.to("meta"), v.to("meta"), scale=1.0),
        ef.UnsupportedError,
        ("Q lies on meta", "kernels run on the CPU and on CUDA devices"),
    ),
    (lambda q, k, v: attention(q.to(torch.complex64), k, v, scale=1.0), ef.BindingError, ("Q is of torch.complex64",)),
    (lambda q, k, v: attention(q.to_sparse(), k, v, scale=1.0), ef.BindingError, ("layout", "to_dense")),
    (lambda q, k, v: attention(q, k, v, scale=1.0, out=torch.empty(2, 3, 17, 8)), ef.BindingError, ("out O", "expected")),
    (lambda q, k, v: attention(q, k, v, scale=1.0, out=q), ef.BindingError, ("shares memory with Q", "in place")),
    (lambda q, k, v: attention(q, k, v, scale=1.0, out=(q, k)), ef.BindingError, ("out gives 2 tensors, expected 1",)),
]


@pytest.mark.parametrize(("call", "kind", "parts"), REFUSED)
def test_tensors_that_do_not_fit_are_refused_by_name(call, kind, parts):
    q, k, v = qkv()
    attention(q, k, v, scale=1.0)  # a signature that fits is known already
    with pytest.raises(kind) as caught:
        call(q, k, v)
    for part in (*parts, "attention"):
        assert part in str(caught.value)


def test_refusals_read_well(golden):
    q, k, v = qkv()
    texts = []
    for call, kind, _ in REFUSED:
        with pytest.raises(kind) as caught:
            call(q, k, v)
        texts.append(f"{kind.__name__}: {caught.value}")
    golden("refusals", "\n\n".join(texts))


def test_static_arguments_that_do_not_fit_are_refused():
    x = torch.randn(3, 4)
    for wrong in (1.5, [1], None):
        with pytest.raises(ef.BindingError, match="the static argument power is"):
            total(x, power=wrong)
    with pytest.raises(ef.CascadeError, match="static argument power is 'two', expected int"):
        total(x, power="two")
    with pytest.raises(ef.BindingError, match="no static argument 'cube'"):
        total.trace(cube=True)
    with pytest.raises(ef.BindingError, match="no element type 'f33'"):
        total.trace(dtypes="f33")
    with pytest.raises(ef.BindingError, match="'Y', which is no input"):
        total.trace(dtypes={"Y": "f32"})


# -- compile and explain --------------------------------------------------------------------------------------------------------------


DIMS = {"b": 2, "h": 3, "m": 17, "p": 33, "e": 16, "f": 16}


def test_compile_takes_tensors_or_extents():
    q, k, v = qkv()
    by_tensors, by_dims = attention.compile(q, k, v, scale=0.25), attention.compile(dims=DIMS)
    assert by_tensors is by_dims
    torch.testing.assert_close(by_dims(q, k, v, scale=0.25), attention(q, k, v, scale=0.25), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dims": {**DIMS, "x": 3}}, "no rank 'x'"),
        ({"dims": {"b": 2}}, "no extent given for ranks h, m, e, p, f"),
        ({"dims": {**DIMS, "e": -1}}, "rank e is given the extent -1"),
        ({"dims": {**DIMS, "e": 1.5}}, "rank e is given the extent 1.5"),
        ({"dims": DIMS, "dtypes": {"W": "f32"}}, "'W', which is no input"),
    ],
)
def test_extents_that_do_not_fit_are_refused(arguments, text):
    with pytest.raises(ef.BindingError, match=text):
        attention.compile(**arguments)


def test_tensors_and_extents_exclude_each_other():
    with pytest.raises(ef.BindingError, match="both tensors and dims"):
        attention.compile(*qkv(), dims=DIMS)


def test_a_schedule_may_be_given_as_data():
    default = attention.compile(dims=DIMS)
    tiles = dict(default.schedule.tile)
    chosen = attention.compile(dims=DIMS, schedule={"tile": {**tiles, "m": 8, "p": 16}})
    assert dict(chosen.schedule.tile)["m"] == 8 and chosen.source != default.source
    q, k, v = qkv()
    torch.testing.assert_close(chosen(q, k, v, scale=0.25).double(), exact(q, k, v, 0.25), rtol=1e-5, atol=1e-6)
    with pytest.raises(ef.ScheduleError, match="no entry 'tiles'"):
        attention.compile(dims=DIMS, schedule={"tiles": {}})


def test_an_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(ef.UnsupportedError, match="unknown target 'cuda:sm_91'") as caught:
        attention.compile(dims=DIMS, target="cuda:sm_91")
    assert "cuda:sm_90" in str(caught.value)


def test_a_target_without_a_backend_is_refused():
    with pytest.raises(ef.UnsupportedError, match="no backend builds for ascend:910b3"):
        attention.compile(dims=DIMS, target="ascend:910b3")


def test_explain_says_what_the_compiler_does(capsys):
    report = attention.explain(dims=DIMS, target="cpu")
    printed = capsys.readouterr().out
    found = report.to_dict()
    assert found["passes"]["before"]["p"] == 3 and found["passes"]["after"]["p"] == 1
    assert found["traffic_bytes"] > 0 and found["flops"] > 0 and found["roofline_us"] > 0
    assert len(found["kernels"]) == 1
    assert "attention" in printed and "passes" in printed
    assert attention.explain(*qkv(), scale=0.25, show=False).to_dict()["passes"] == found["passes"]
    assert capsys.readouterr().out == ""
    assert "<html" in report.to_html()


def test_check_compares_random_extents_with_float64():
    report = total.check(trials=3, seed=1, dims={"j": 40})
    assert report.passed and len(report.trials) == 3
    assert all(dict(t.sizes)["j"] == 40 and 0 <= t.largest_error <= t.tolerance for t in report.trials)
