"""Executables: what they check, how they launch, and that they come back from files and from the cache as they were."""

import json
import shutil

import einfall as ef
import pytest
import torch
from einfall.compiler import store as store_module
from einfall.compiler.cache import MANIFEST, DiskCache
from einfall.compiler.driver import compile_cascade
from einfall.configuration import current


@ef.kernel
def rows(X: "i j", *, factor: float = 1.0) -> "i":
    return (X * factor).sum("j")


@ef.kernel
def normalized(X: "i j") -> "i j":
    """Two kernels: the sums of all rows must be known before any element can be scaled, and are kept in between."""
    r = X.sum("j")
    return X * (r * r).sum("i")


@ef.kernel
def attention(Q: "m e", K: "p e", V: "p f") -> "m f":
    return (ef.softmax((Q * K).sum("e"), over="p") * V).sum("p")


@ef.kernel
def scaled(X: "i e=16", W: "e=16") -> "i e=16":
    return X * W


@pytest.fixture
def fresh(tmp_path):
    """An empty cache and no database."""
    with ef.configure(cache=tmp_path / "cache", database=None):
        yield tmp_path


@pytest.fixture(autouse=True)
def shared(tmp_path_factory):
    """One cache for the tests that do not ask for a fresh one."""
    with ef.configure(cache=tmp_path_factory.getbasetemp() / "executable_cache", database=None):
        yield


def again(kernel):
    """The same function in a kernel that has compiled nothing yet."""
    return ef.kernel(kernel.__wrapped__)


def no_toolchain(monkeypatch):
    """From here on nothing may be derived, emitted or built."""
    from einfall.backends.tvm import TvmCpu
    from einfall.compiler import driver

    def refuse(*_, **__):
        raise AssertionError("the toolchain was run")

    monkeypatch.setattr(TvmCpu, "build", refuse)
    monkeypatch.setattr(driver, "lower_cascade", refuse)


# -- what an executable is ------------------------------------------------------------------------------------------------------------


def test_an_executable_tells_what_it_was_made_from():
    x = torch.randn(5, 40)
    executable = rows.compile(x)
    assert executable.cascade == rows.cascade and executable.sizes == {"i": 5, "j": 40}
    assert executable.target.name == "cpu" and isinstance(executable.schedule, ef.Schedule)
    assert "def main" in executable.source and executable.artifact.source.text == executable.source
    assert len(executable.programs) == 1 and executable.program.name in repr(executable)
    assert [k.name for k in executable.plan.kernels] == [p.name for p in executable.programs]
    assert executable.facts


def test_one_executable_serves_other_extents():
    executable = rows.compile(torch.randn(5, 40))
    for i, j in ((1, 1), (64, 3), (3, 1000), (129, 129)):
        x = torch.randn(i, j)
        torch.testing.assert_close(executable(x, factor=2.0).double(), 2 * x.double().sum(1), rtol=1e-5, atol=1e-5)


def test_empty_tensors_are_served():
    executable = rows.compile(torch.randn(5, 40))
    assert executable(torch.empty(0, 40), factor=1.0).shape == (0,)
    torch.testing.assert_close(executable(torch.empty(4, 0), factor=1.0), torch.zeros(4))


def test_several_kernels_run_in_order_with_their_temporaries():
    for shape in ((500, 40), (1000, 1), (333, 130)):
        x = torch.randn(shape)
        executable = normalized.compile(x)
        assert [part.call.outputs[0].name for part in executable.parts][-1:] == [executable.cascade.outputs[0].name]
        expected = x.double() * (x.double().sum(1) ** 2).sum()
        torch.testing.assert_close(executable(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_strided_inputs_are_taken_as_they_are():
    base = torch.randn(40, 12)
    for x in (base[:, 2:9], base[::3], base.t(), base.t()[:, ::2], base[:, :1].expand(40, 7), base.flip(0)[3:]):
        torch.testing.assert_close(rows(x, factor=1.0), x.sum(1), rtol=1e-5, atol=1e-5)


def test_an_executable_for_contiguous_rows_refuses_others_by_name():
    executable = rows.compile(torch.randn(5, 40))
    with pytest.raises(ef.BindingError, match="X has stride 5 along its last axis") as caught:
        executable(torch.randn(40, 5).t(), factor=1.0)
    assert "contiguous()" in str(caught.value)


def test_a_rank_the_kernel_was_specialised_to_is_refused_by_name():
    executable = attention.compile(dims={"m": 8, "p": 12, "e": 16, "f": 16})
    assert executable.static == {"e": 16, "f": 16}
    q, k, v = torch.randn(8, 17), torch.randn(12, 17), torch.randn(12, 16)
    with pytest.raises(ef.BindingError, match="rank e has extent 17, but this executable was specialised to e = 16"):
        executable(q, k, v)
    expected = torch.softmax(q.double() @ k.double().t(), -1) @ v.double()
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_declared_extent_is_refused_by_name():
    with pytest.raises(ef.BindingError, match=r"rank e .*16"):
        scaled(torch.randn(3, 17), torch.randn(17))


def test_outputs_may_be_given():
    x = torch.randn(6, 40)
    executable = rows.compile(x)
    out = torch.full((6,), torch.nan)
    assert executable(x, factor=1.0, out=out) is out
    torch.testing.assert_close(out, x.sum(1))
    expanded = torch.empty(1).expand(6)
    with pytest.raises(ef.BindingError, match="expanded"):
        executable(x, factor=1.0, out=expanded)
    with pytest.raises(ef.BindingError, match=r"expected a torch\.Tensor"):
        executable(x, factor=1.0, out=[[1.0] * 6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("f", [1, 15, 16, 17, 33])
def test_nothing_is_written_beyond_an_output(f, dtype):
    """A row of f = 17 ends in a vector of one element: LLVM 22 stores 32 bits for one of 16 if it knows."""
    q, k, v = (torch.randn(*shape).to(dtype) for shape in ((5, 16), (9, 16), (9, f)))
    memory = torch.full((5 * f + 64,), 7.0, dtype=dtype)
    out = memory[32 : 32 + 5 * f].view(5, f)
    attention(q, k, v, out=out)
    assert (memory[:32] == 7).all() and (memory[32 + 5 * f :] == 7).all()
    expected = torch.softmax(q.double() @ k.double().t(), -1) @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)


def test_scalars_are_numbers():
    x = torch.randn(6, 40)
    executable = rows.compile(x)
    for factor in (2, 2.0, torch.tensor(2.0), True + 1):
        torch.testing.assert_close(executable(x, factor=factor), 2 * x.sum(1))
    for wrong in ("2", None, torch.randn(2), [2.0]):
        with pytest.raises(ef.BindingError, match="the scalar factor is"):
            executable(x, factor=wrong)
        with pytest.raises(ef.BindingError, match="the scalar factor is"):
            rows(x, factor=wrong)


def test_a_signature_is_checked_once(monkeypatch):
    from einfall.compiler import executable as module

    x = torch.randn(6, 40)
    executable = rows.compile(x)
    executable(x, factor=1.0)
    monkeypatch.setattr(module, "bind_sizes", lambda *_: pytest.fail("a known signature was checked again"))
    executable(torch.randn(6, 40), factor=3.0)


def test_the_memory_of_signatures_is_bounded(monkeypatch):
    from einfall.compiler import executable as module

    monkeypatch.setattr(module, "MEMO_LIMIT", 4)
    executable = rows.compile(torch.randn(5, 40))
    for j in range(1, 20):
        x = torch.ones(2, j)
        torch.testing.assert_close(executable(x, factor=1.0), x.sum(1))
    assert len(executable._memo) <= 4


# -- files ----------------------------------------------------------------------------------------------------------------------------


def test_a_saved_executable_runs_again_without_compiling(fresh, monkeypatch):
    x = torch.randn(500, 40)
    for kernel, arguments in ((rows, {"factor": 2.0}), (normalized, {})):
        executable = again(kernel).compile(x)
        expected = executable(x, **arguments)
        folder = executable.save(fresh / kernel.name)
        assert {p.suffix for p in folder.iterdir()} == {".py", ".so", ".json"}
        with monkeypatch.context() as patch:
            no_toolchain(patch)
            loaded = ef.load(folder)
            torch.testing.assert_close(loaded(x, **arguments), expected, rtol=0, atol=0)
        assert loaded.source == executable.source and loaded.schedule == executable.schedule and loaded.facts == executable.facts
        assert loaded.cascade == executable.cascade and loaded.static == executable.static
        assert loaded.programs == executable.programs


def test_a_loaded_executable_can_be_saved_again_and_in_place(fresh):
    x = torch.randn(5, 40)
    first = rows.compile(x).save(fresh / "a")
    second = ef.load(first).save(fresh / "b")
    shutil.rmtree(first)
    ef.load(second).save(second)
    torch.testing.assert_close(ef.load(second)(x, factor=1.0), x.sum(1))
    assert sorted(p.name for p in fresh.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: shutil.rmtree(f), "holds no manifest.json"),
        (lambda f: (f / MANIFEST).unlink(), "holds no manifest.json"),
        (lambda f: (f / MANIFEST).write_text("not json"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("{}"), "is no manifest of einfall"),
        (lambda f: next(f.glob("*.so")).write_bytes(b"\x7fELF"), "does not match its hash"),
        (lambda f: next(f.glob("*.so")).unlink(), "cannot be read"),
        (lambda f: next(f.glob("*.py")).write_text("x"), "does not match its hash"),
        (lambda f: rewrite(f, "format", 99), "format 99"),
        (lambda f: rewrite(f, "toolchain", ["apache-tvm 0.1"]), "built with apache-tvm 0.1"),
        (lambda f: rewrite(f, "kernels", [{}]), "malformed"),
        (lambda f: rewrite(f, "schedule", {"tiles": {}}), "malformed"),
        (lambda f: rewrite(f, "cascade", "cascade ("), "malformed"),
        (lambda f: rewrite(f, "target", {}), "malformed"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(damage, text, fresh):
    folder = rows.compile(torch.randn(5, 40)).save(fresh / "saved")
    damage(folder)
    with pytest.raises(ef.BuildError, match=text):
        ef.load(folder)


def rewrite(folder, key, value):
    """Change the manifest of a folder and make its hash right again, as another program could."""
    from einfall.compiler.cache import _hash

    data = json.loads((folder / MANIFEST).read_text())
    data["facts"][key] = value
    data["hash"] = _hash({"facts": data["facts"], "files": data["files"]})
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_binary_for_another_processor_is_refused(fresh):
    folder = rows.compile(torch.randn(5, 40)).save(fresh / "saved")
    target = json.loads((folder / MANIFEST).read_text())["facts"]["target"]
    rewrite(folder, "target", {**target, "features": [*target["features"], "avx1024"]})
    with pytest.raises(ef.UnsupportedError, match="avx1024 this processor lacks"):
        ef.load(folder)


def test_nothing_is_written_over_what_is_not_ours(fresh):
    executable = rows.compile(torch.randn(5, 40))
    (fresh / "mine").mkdir()
    (fresh / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ef.EinfallError, match="holds no saved executable"):
        executable.save(fresh / "mine")
    (fresh / "file").write_text("x")
    for place in (fresh / "file", fresh / "file" / "below"):
        with pytest.raises(ef.EinfallError):
            executable.save(place)
    assert (fresh / "mine" / "thesis.txt").read_text() == "precious"


# -- the cache ------------------------------------------------------------------------------------------------------------------------


def test_a_cached_compile_runs_no_toolchain(fresh, monkeypatch):
    x = torch.randn(500, 40)
    expected = again(normalized)(x)
    facts = again(normalized).compile(x).facts
    kernel = again(normalized)
    with monkeypatch.context() as patch:
        no_toolchain(patch)
        torch.testing.assert_close(kernel(x), expected, rtol=0, atol=0)
    assert kernel.compile(x).facts == facts, "facts are worked out when they are asked for"


def test_other_extents_share_the_binary_if_the_source_is_the_same(fresh, monkeypatch):
    from einfall.backends.tvm import TvmCpu

    again(rows).compile(torch.randn(5, 1000))
    monkeypatch.setattr(TvmCpu, "build", lambda *_: pytest.fail("the same source was built twice"))
    again(rows).compile(torch.randn(5, 1001))


@pytest.mark.parametrize("kind", ["compiled", "artifact"])
@pytest.mark.parametrize("damage", ["cut", "change", "remove"])
def test_a_corrupt_entry_is_named_once_and_built_again(kind, damage, fresh):
    x = torch.randn(5, 40)
    expected = again(rows)(x)
    (path,) = (fresh / "cache" / kind).glob(f"*/*/{MANIFEST if kind == 'compiled' else '*.so'}")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "change":
        path.write_bytes(data[:-10] + b"0123456789")
    else:
        path.unlink()
    with pytest.warns(RuntimeWarning, match=path.parent.name) as warned:
        torch.testing.assert_close(again(rows)(x), expected, rtol=0, atol=0)
    assert len([w for w in warned if "damaged" in str(w.message)]) == 1
    torch.testing.assert_close(again(rows)(x), expected, rtol=0, atol=0)


def test_an_entry_of_an_unknown_layout_is_built_again(fresh):
    x = torch.randn(5, 40)
    expected = again(rows)(x)
    (path,) = (fresh / "cache" / "compiled").glob(f"*/*/{MANIFEST}")
    rewrite(path.parent, "kernels", [{"call": {}}])
    with pytest.warns(RuntimeWarning, match="is damaged"):
        torch.testing.assert_close(again(rows)(x), expected, rtol=0, atol=0)


def test_without_a_cache_or_with_one_that_cannot_be_written_kernels_run(fresh):
    x = torch.randn(5, 40)
    with ef.configure(cache=None):
        torch.testing.assert_close(again(rows)(x), x.sum(1))
    (fresh / "file").write_text("in the way")
    with ef.configure(cache=fresh / "file"), pytest.warns(RuntimeWarning, match="nothing is cached"):
        torch.testing.assert_close(again(rows)(x), x.sum(1))


def test_what_decides_about_code_decides_about_the_key(fresh, monkeypatch):
    def entries():
        return len(list((fresh / "cache" / "compiled").glob("*/*/*")))

    x = torch.randn(5, 40)
    again(rows).compile(x)
    again(rows).compile(x)
    assert entries() == 1
    again(rows).compile(x, schedule={"tile": {"i": 2}})
    assert entries() == 2
    again(rows).compile(torch.randn(40, 5).t())
    assert entries() == 3
    monkeypatch.setattr("einfall.compiler.driver.toolchain", lambda kind: ("apache-tvm 99",))
    again(rows).compile(x)
    assert entries() == 4


# -- schedules from a database --------------------------------------------------------------------------------------------------------


def test_a_known_schedule_is_taken_and_one_that_is_not_legal_is_not(fresh):
    x = torch.randn(5, 40)
    sizes = {"i": 5, "j": 40}
    default = rows.compile(x).schedule
    good = ef.Schedule.make(tile={**dict(default.tile), "j": 32})
    found = compile_cascade(rows.cascade, sizes=sizes, database=lambda *_: good)
    assert found.schedule == good
    torch.testing.assert_close(found(x, factor=1.0), x.sum(1))
    assert compile_cascade(rows.cascade, sizes=sizes, database=lambda *_: None).schedule == default
    for table in ({"dot": {"nowhere": {}}}, {"tile": {"nowhere": 4}}, {"layout": {"nowhere": ["i"]}}, {"stream": {"nowhere": "repeat"}}):
        bad = ef.Schedule.from_dict(table)
        with pytest.raises(ef.ScheduleError, match=rf"{next(iter(table))}\[nowhere\] names no (rank|tile) of rows"):
            compile_cascade(rows.cascade, sizes=sizes, schedule=bad)
    assert compile_cascade(rows.cascade, sizes=sizes, database=lambda *_: bad).schedule == default


def test_the_next_call_after_tuning_uses_the_winner(fresh):
    x = torch.randn(6, 300)
    kernel = again(rows)
    with ef.configure(database=fresh / "tuned.db"):
        kernel(x, factor=1.0)
        result = kernel.tune(x, factor=1.0, trials=3)
        assert len(result.history) == 3
        torch.testing.assert_close(kernel(x, factor=1.0), x.sum(1), rtol=1e-5, atol=1e-5)
        assert kernel.compile(x).schedule == result.schedule
        assert again(rows).compile(x).schedule == result.schedule
    with ef.configure(database=None), pytest.raises(ef.DatabaseError, match="no tuning database is set"):
        kernel.tune(x, trials=1)


def test_a_foreign_database_costs_a_call_nothing(fresh):
    x = torch.randn(5, 40)
    (fresh / "foreign.db").write_text("no database" * 1000)
    with ef.configure(database=fresh / "foreign.db"):
        torch.testing.assert_close(again(rows)(x), x.sum(1))
        with pytest.raises(ef.DatabaseError, match=r"foreign\.db"):
            again(rows).tune(x, trials=1)
    assert (fresh / "foreign.db").read_text().startswith("no database")


# -- debug ----------------------------------------------------------------------------------------------------------------------------


def test_debug_prints_every_pass_and_the_programs(fresh, capsys):
    with ef.configure(debug=True):
        again(normalized).compile(torch.randn(500, 40))
    printed = capsys.readouterr().err
    assert "-- cascade\ncascade normalized" in printed and printed.count("-- tile program") == 2


@ef.kernel
def picked(X: "i v", T: "s") -> "i s":
    return X.at(v=T)


def test_a_gathered_index_out_of_range_is_found_in_checked_mode(fresh):
    x, table = torch.randn(3, 10), torch.tensor([0, 9, 4], dtype=torch.int32)
    torch.testing.assert_close(picked(x, table), x[:, [0, 9, 4]], rtol=0, atol=0)
    table[1] = 10
    with ef.configure(debug=True), pytest.raises(ef.BindingError, match="gathered index 10 from T is outside rank v of X"):
        picked(x, table)


def test_the_store_and_the_cache_agree_on_the_settings(fresh):
    assert DiskCache(current().cache).usage() == (0, 0)
    again(rows).compile(torch.randn(5, 40))
    entries, size = DiskCache(current().cache).usage()
    assert entries == 2 and size > 1000
    assert store_module.toolchain("cpu")


@ef.kernel
def picked_where(X: "p e", I: "s", L: "") -> "s e":
    return ef.where(ef.index("s") < L, X.at(p=I), 7.0)


def test_a_tensor_without_elements_is_not_read():
    x, i = torch.empty(0, 4), torch.zeros(3, dtype=torch.int32)
    assert torch.equal(picked_where(x, i, torch.tensor(0.0)), torch.full((3, 4), 7.0))
    with pytest.raises(ef.BindingError, match="gathered index 0 from I is outside rank p of X, which has extent 0"):
        picked_where(x, i, torch.tensor(2.0))
    assert torch.equal(picked_where(torch.ones(1, 4), i, torch.tensor(3.0)), torch.ones(3, 4))
    assert picked_where(torch.empty(0, 4), i[:0], torch.tensor(2.0)).shape == (0, 4)
