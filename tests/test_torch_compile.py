"""Kernels inside functions that PyTorch compiles: one operator a cascade, no graph break, the results of eager calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import einfall as ef
import pytest
import torch
import torch._dynamo.testing
from einfall.compiler.custom_op import operator_of
from einfall.ir.reference import evaluate
from torch._subclasses.fake_tensor import FakeTensorMode
from variety import VARIETY


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
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
    """One cache for the module; graphs of one test do not count for another."""
    torch._dynamo.reset()
    with ef.configure(cache=tmp_path_factory.getbasetemp() / "compile_cache", database=None), torch.no_grad():
        yield


def compiled(function, backend="aot_eager", **options):
    """The function compiled without a graph break, and what counts how often it was."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def qkv(m=17, p=33):
    return [torch.randn(2, 3, n, 16) for n in (m, p, p)]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_function_gives_what_the_eager_one_gives(backend):
    def function(q, k, v):
        return attention(q.sin(), k, V=v, scale=0.25).cos() + 1

    run, counter = compiled(function, backend)
    for _ in range(3):
        q, k, v = qkv()
        close(run(q, k, v), function(q, k, v))
    assert counter.frame_count == 1, "the same shapes are compiled once"
    assert [n for n in counter.graphs[0].graph.nodes if "einfall.attention_" in str(n.target)]


def test_other_extents_are_one_graph_with_symbols():
    run, counter = compiled(lambda q, k, v: attention(q, k, v, scale=0.25) * 2)
    for m in (17, 19, 23, 64):
        q, k, v = qkv(m)
        close(run(q, k, v), attention(q, k, v, scale=0.25) * 2)
    assert counter.frame_count == 2, "once for the numbers, once for symbols"


def test_marked_dynamic_extents_stay_symbols():
    run, counter = compiled(lambda x: total(x).exp(), dynamic=True)
    found = []
    for shape in ((5, 7), (6, 9), (11, 40)):
        x = torch.rand(shape) * 0.1
        close(run(x), total(x).exp())
        found.append(counter.frame_count)
    assert len(set(found)) == 1


def test_several_results_static_arguments_and_given_outputs():
    def function(x, memory):
        largest, squares = both(X=x)
        return total(x, factor=0.5, square=True, power=2, out=memory) + largest + squares

    run, counter = compiled(function)
    for _ in range(2):
        x, memory = torch.randn(5, 7), torch.full((5,), torch.nan)
        close(run(x, memory), function(x, torch.empty(5)))
        close(memory, total(x, factor=0.5, square=True, power=2))
    assert counter.frame_count == 1


def test_static_arguments_are_part_of_the_graph():
    run, counter = compiled(lambda x, square: total(x, square=square))
    x = torch.randn(5, 7)
    for square in (False, True, False):
        close(run(x, square), total(x, square=square))
    assert counter.frame_count == 2


def test_types_are_part_of_the_operator():
    run, counter = compiled(lambda x: total(x))
    for t in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 8).to(t)
        found = run(x)
        assert found.dtype == t
        torch.testing.assert_close(found, total(x))
    assert counter.frame_count == 2
    assert len({str(n.target) for g in counter.graphs for n in g.graph.nodes if "einfall" in str(n.target)}) == 2


def test_a_kernel_from_text_and_views_of_tensors():
    again = ef.Kernel.from_cascade(ef.parse(str(attention.cascade)))
    run, _ = compiled(lambda q, k, v: again(q.transpose(1, 2), k, v[..., :8], scale=0.25))
    q, k, v = torch.randn(2, 17, 3, 16), torch.randn(2, 3, 33, 16), torch.randn(2, 3, 33, 16)
    close(run(q, k, v), attention(q.transpose(1, 2), k, v[..., :8].contiguous(), scale=0.25))


def operator(kernel, types, names=()):
    return getattr(torch.ops.einfall, kernel._operator(types, len(types), names, ())).default


def test_the_operators_pass_the_checks_of_pytorch():
    f32 = torch.float32
    q, k, v = qkv()
    torch.library.opcheck(operator(attention, (f32, f32, f32), ("scale",)), (q, k, v, 0.25))
    torch.library.opcheck(operator(both, (f32,)), (q[0, 0],))
    torch.library.opcheck(operator(total, (torch.bfloat16,)), (q[0, 0].bfloat16(), 2.0))


def test_an_exported_program_holds_the_operator():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, scale=0.5) * 2

    q, k, v = qkv()
    program = torch.export.export(Model(), (q, k, v))
    assert any("einfall.attention_" in str(n.target) for n in program.graph.nodes)
    close(program.module()(q, k, v), attention(q, k, v, scale=0.5) * 2)


@pytest.mark.parametrize("name", list(VARIETY))
def test_the_fake_kernel_gives_the_shapes_and_types_of_the_reference(name):
    entry = VARIETY[name]
    cascade, tensors = entry.cascade(), entry.tensors(0)
    wanted = evaluate(cascade, tensors, {})
    found_name = operator_of(cascade, lambda tensors, scalars: None)
    with FakeTensorMode() as mode:
        found = getattr(torch.ops.einfall, found_name)(*(mode.from_tensor(tensors[t.name]) for t in cascade.inputs))
    found = (found,) if isinstance(found, torch.Tensor) else found
    for output, x in zip(cascade.outputs, found, strict=True):
        assert x.shape == wanted[output.name].shape and x.dtype == wanted[output.name].dtype and x.is_contiguous()


def test_names_of_operators_are_the_same_in_every_process():
    code = (
        "import torch, einfall as ef\n"
        "@ef.kernel\n"
        "def both(X: 'i j') -> ('i', 'i'):\n"
        "    M = X.max('j')\n"
        "    S = (X * X).sum('j')\n"
        "    return M, S\n"
        "print(both._operator((torch.float32,), 1, (), ()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert answer.stdout.strip() == both._operator((torch.float32,), 1, (), ())


def test_names_that_a_schema_cannot_hold_are_replaced():
    kernel = ef.Kernel.from_cascade(ef.parse("cascade λ(Tensor[i]: f32, δ[i]: f32, bool: f32) -> Y[i]\n  Y[i] = Tensor[i] * δ[i] * bool\n"))
    x, y = torch.randn(5), torch.randn(5)
    found = operator(kernel, (torch.float32, torch.float32), ("bool",))
    assert str(found._schema).endswith("(Tensor input0, Tensor input1, float scalar0) -> Tensor")
    close(found(x, y, 2.0), 2 * x * y)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: total(x, fctor=1.0), "there is no argument 'fctor'"),
        (lambda x: total(factor=1.0), r"X\[i j\] is not given"),
        (lambda x: attention(x, x, x), "the scalar scale is not given"),
        (lambda x: attention(x, x, x, scale=1.0), "Q.* has 4 axes, found 2"),
    ],
)
def test_mistakes_have_the_texts_of_eager_calls(function, text):
    run, _ = compiled(function)
    with pytest.raises(Exception, match=text):
        run(torch.randn(3, 4))
    with pytest.raises(ef.BindingError, match=text):
        function(torch.randn(3, 4))


def test_a_gradient_is_refused():
    run, _ = compiled(lambda x: total(x))
    x = torch.randn(3, 4, requires_grad=True)
    with torch.enable_grad(), pytest.raises(Exception, match="kernels have no backward yet"):
        run(x)
    close(run(x), total(x))


def test_nothing_is_registered_before_a_call_is_traced():
    code = (
        "import einfall as ef, sys\n"
        "@ef.kernel\n"
        "def rows(X: 'i j') -> 'i': return X.sum('j')\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "with ef.configure(database=None):\n"
        "    rows.reference(torch.randn(2, 3))\n"
        "assert 'einfall.compiler.custom_op' not in sys.modules\n"
        "assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('einfall')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
