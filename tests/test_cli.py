"""The command line: what it prints, how it ends, and that it never answers a mistake with a traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import einfall as ef
import pytest
from einfall.cli import _COMMANDS, run

SOURCE = '''
import einfall as ef

@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")

@ef.kernel
def total(X: "i j", *, power: int = 1) -> "i":
    Y = X
    for _ in range(power - 1):
        Y = Y * X
    return Y.sum("j")

number = 3
'''
TEXT = "cascade rows(X[i,j]: f32) -> Y[i]\n  Y[i] = sum(j) X[i,j]\n"
ATTENTION = ["--dims", "b=1,h=2,m=8,p=12,e=16,f=16", "--set", "scale=0.25"]
ROWS = ["--dims", "i=5,j=40"]


@pytest.fixture(autouse=True)
def place(tmp_path, tmp_path_factory, monkeypatch):
    """A folder with a Python file and a text file, and the settings of a user who has nothing yet."""
    (tmp_path / "kernels.py").write_text(SOURCE)
    (tmp_path / "rows.cascade").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    with ef.configure(cache=tmp_path_factory.getbasetemp() / "cli_cache", database=tmp_path / "tuned.db"):
        yield tmp_path


@pytest.fixture
def call(capfd):
    """Run a command line; its status, stdout and stderr."""

    def answer(*words):
        status = run([str(w) for w in words])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return answer


# -- help -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_explains_itself(command, call):
    status, out, _ = call(command, "--help")
    assert status == 0 and "Usage: einfall " + command in out
    documented = re.findall(r"^  (-\S+|--\S+)", out, re.M)
    assert documented


def test_the_help_lists_every_command_and_the_version_is_the_package_s(call):
    status, out, _ = call("--help")
    assert status == 0 and all(re.search(rf"^  {command} ", out, re.M) for command in _COMMANDS)
    assert call("--version")[1].strip().endswith(ef.__version__)


def reference():
    """The help of every command, as a page."""
    import click
    from einfall.cli import cli

    def pages(command, name, parent=None):
        settings = {**command.context_settings, "terminal_width": 110, "max_content_width": 110}
        context = click.Context(command, parent=parent, info_name=name.split()[-1], **settings)
        yield name, command.get_help(context)
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                yield from pages(command.get_command(context, below), f"{name} {below}", context)

    head = "# Command line\n\nEach command with its own help; this page is written from it.\n"
    return head + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in pages(cli, "einfall"))


def test_the_page_of_the_command_line_is_its_help(request):
    page = Path(__file__).parent.parent / "docs" / "cli.md"
    if request.config.getoption("--update-golden"):
        page.write_text(reference())
    assert page.read_text() == reference(), "run pytest tests/test_cli.py --update-golden"


def test_python_m_einfall_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "einfall", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(ef.__version__)


# -- explain, compile, check, bench ---------------------------------------------------------------------------------------------------


def test_explain_shows_the_passes_before_and_after(call):
    status, out, err = call("explain", "kernels.py:attention", *ATTENTION)
    assert (status, err) == (0, "")
    assert "cascade attention" in out and "passes" in out
    status, out, _ = call("explain", "kernels.py:attention", *ATTENTION, "--target", "cuda:sm_90", "--dtype", "bf16", "--json")
    found = json.loads(out)
    assert status == 0 and found["passes"]["before"]["p"] == 3 and found["passes"]["after"]["p"] == 1


def test_explain_reads_text_and_writes_a_page(call, place):
    status, out, _ = call("explain", "rows.cascade", *ROWS, "--html", "page.html", "--json")
    assert status == 0 and json.loads(out)["passes"]["before"] == {"i": 1, "j": 1}
    assert "<html" in (place / "page.html").read_text()


def test_compile_writes_what_load_runs(call, place):
    import torch

    status, out, err = call("compile", "kernels.py:attention", *ATTENTION, "-o", "built", "--json")
    assert (status, err) == (0, "")
    assert set(json.loads(out)["files"]) == {p.name for p in (place / "built").iterdir()}
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    expected = torch.softmax(q.double() @ k.double().transpose(-1, -2) * 0.25, -1) @ v.double()
    torch.testing.assert_close(ef.load(place / "built")(q, k, v, scale=0.25).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("target", "listed"), [("cuda:sm_80", {"ptx", "cubin"}), ("hip:gfx942", {"amdgcn", "hsaco"})])
def test_compile_for_a_gpu_writes_what_there_is_to_read(call, place, target, listed):
    status, out, err = call("compile", "rows.cascade", *ROWS, "--target", target, "-o", "built", "--json")
    assert (status, err) == (0, "")
    files = {p.suffix[1:]: p for p in (place / "built").iterdir()}
    assert set(files) == {"py", "zip", "json", *listed}
    assert "@triton.jit" in files["py"].read_text() and any(text.read_bytes().startswith(b"\x7fELF") for text in files.values())
    found = json.loads(out)["facts"]
    assert found["registers"] > 0 and found["shared_bytes"] >= 0 and found["instructions"] and found["occupancy"]["blocks"] > 0
    loaded = ef.load(place / "built")
    assert loaded.facts == found and loaded.target.name == target
    status, out, _ = call("compile", "rows.cascade", *ROWS, "--target", target, "-o", "again")
    assert status == 0 and f"rows: registers {found['registers']}, " in out and "occupancy: blocks" in out
    files["py"].write_text("import os")
    with pytest.raises(ef.BuildError, match="does not match its hash"):
        ef.load(place / "built")


def test_compile_takes_a_schedule_from_a_file(call, place):
    (place / "schedule.json").write_text('{"version": 1, "tile": {"m": 4, "p": 16}, "grid_order": "rising"}')
    status, out, _ = call("compile", "kernels.py:attention", *ATTENTION, "-o", "built", "--schedule", "schedule.json", "--json")
    assert status == 0 and json.loads(out)["schedule"]["tile"]["m"] == 4


def test_check_passes_for_a_right_kernel(call):
    status, out, _ = call("check", "rows.cascade", "--trials", "2", "--json")
    found = json.loads(out)
    assert status == 0 and found["passed"] and len(found["trials"]) == 2
    status, out, _ = call("check", "rows.cascade", "--trials", "1", *ROWS)
    assert status == 0 and "ok" in out and "i=5" in out


def test_check_fails_for_a_wrong_kernel(call, monkeypatch):
    from einfall.compiler.executable import Executable

    launch = Executable.launch

    def wrong(self, *arguments):
        result = launch(self, *arguments)
        result.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(Executable, "launch", wrong)
    status, out, _ = call("check", "rows.cascade", "--trials", "1", "--json")
    assert status == 1 and "is off by" in json.loads(out)["trials"][0]["failure"]


def test_bench_times_the_kernel_against_eager(call):
    status, out, _ = call("bench", "rows.cascade", *ROWS, "--json")
    found = json.loads(out)
    assert status == 0 and [e["name"] for e in found["entries"]] == ["default", "eager"]
    assert all(len(e["samples_ms"]) >= 5 and min(e["samples_ms"]) > 0 for e in found["entries"])
    assert found["roofline_ms"] > 0


# -- the database ---------------------------------------------------------------------------------------------------------------------


def test_tune_for_a_gpu_that_is_not_here_is_one_sentence_and_what_to_do(call, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = call("tune", "rows.cascade", *ROWS, "--target", "cuda:sm_90", "--trials", "2")
    assert status == 2 and out == "" and "Traceback" not in err
    assert "this machine has no device for cuda:sm_90: " in err and "`compile` and `check` need none" in err


def test_tune_records_a_winner_that_db_shows(call):
    status, out, err = call("tune", "rows.cascade", *ROWS, "--trials", "2", "--json")
    assert status == 0, err
    assert json.loads(out)
    status, out, _ = call("db", "ls", "--json")
    (record,) = json.loads(out)
    assert status == 0 and record["name"] == "rows" and record["extents"] == {"i": 5, "j": 40}
    assert "rows" in call("db", "ls")[1]
    assert json.loads(call("db", "best", "rows", "--json")[1]) == [record]
    assert record["schedule_id"] and str(record["samples"]) in call("db", "best", "rows")[1]
    status, out, _ = call("db", "show", record["workload"][:12], "--json")
    assert status == 0 and json.loads(out)["kind"] == "workload"


def test_a_database_that_is_not_there_or_not_ours_is_named(call, place):
    status, out, err = call("db", "ls")
    assert (status, out) == (2, "") and "tuned.db" in err and err.startswith("einfall: DatabaseError")
    (place / "tuned.db").write_text("this is no database" * 100)
    status, _, err = call("db", "ls")
    assert status == 2 and "tuned.db" in err
    status, _, err = call("db", "ls", "--db", "other.db")
    assert status == 2 and "other.db" in err


# -- the machine ----------------------------------------------------------------------------------------------------------------------


def test_targets_lists_what_can_be_built_and_run(call):
    found = {t["name"]: t for t in json.loads(call("targets", "--json")[1])}
    assert found["cpu"]["builds"] and found["cpu"]["runs"]
    assert found["cuda:sm_90"]["builds"] and found["hip:gfx942"]["builds"] and not found["ascend:910b3"]["builds"]
    assert "cuda:sm_90" in call("targets")[1]


def test_doctor_finds_versions_and_places(call, place):
    status, out, _ = call("doctor", "--json")
    found = {f["what"]: f for f in json.loads(out)}
    assert status == 0 and found["torch"]["state"] == "ok" and found["processor"]["found"]
    assert str(place / "tuned.db") in found["database"]["found"]
    (place / "tuned.db").write_text("this is no database" * 100)
    status, out, _ = call("doctor", "--json")
    assert status == 1 and {f["what"]: f for f in json.loads(out)}["database"]["state"] == "bad"


# -- mistakes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["explian", "x"], "Did you mean 'explain'?"),
        (["db", "lss"], "Did you mean 'ls'?"),
        (["explain"], "Missing argument 'REF'"),
        (["explain", "rows.cascade", "--dims", "i"], "'i' is not of the form name=value"),
        (["explain", "rows.cascade", "--dims", "i=x"], "'x' is no whole number"),
        (["explain", "rows.cascade", "--dims", "i=1,i=2"], "i is given twice"),
        (["explain", "rows.cascade", "--dims", "i=5,q=4"], "unknown rank 'q'"),
        (["explain", "rows.cascade", "--dims", "i=5,j=4", "--dtype", "f33"], "no element type 'f33'"),
        (["explain", "rows.cascade", *ROWS, "--target", "gpu"], "unknown target 'gpu'"),
        (["explain", "missing.cascade"], "missing.cascade cannot be read"),
        (["explain", "row.cascade"], "did you mean rows.cascade?"),
        (["explain", "kernel.py:total"], "did you mean kernels.py?"),
        (["explain", "kernels.py:totl"], "did you mean total?"),
        (["explain", "kernels.py"], "its kernels are attention, total"),
        (["explain", "kernels.py:number"], "kernels.py:number is a int, no kernel"),
        (["explain", "no.such.module:x"], "there is no module no.such.module"),
        (["compile", "rows.cascade", *ROWS], "Missing option '-o'"),
        (["compile", "rows.cascade", *ROWS, "-o", "d", "--schedule", "missing.json"], "missing.json cannot be read"),
        (["compile", "kernels.py:total", *ROWS, "--set", "cube=3", "-o", "d"], "no static argument 'cube'"),
        (["compile", "rows.cascade", *ROWS, "-o", "rows.cascade"], "rows.cascade"),
        (["check", "rows.cascade", "--trials", "0"], "0 is not in the range"),
        (["tune", "rows.cascade", *ROWS, "--trials", "-1"], "-1 is not in the range"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_status_2(words, text, call):
    status, out, err = call(*words)
    assert status == 2 and text in err and out == ""
    assert "Traceback" not in err


def test_a_malformed_text_is_shown_with_a_caret(call, place):
    (place / "bad.cascade").write_text("cascade bad(X[i,j]: f32) -> Y[i]\n  Y[i] = sum(j) X[i,j\n")
    status, _, err = call("explain", "bad.cascade", *ROWS)
    assert status == 2 and "bad.cascade:2" in err and "^" in err


@pytest.mark.parametrize(
    ("source", "text"),
    [("import nowhere_to_be_found\n", "nowhere_to_be_found"), ("def f(:\n", "SyntaxError"), ("x = 1 / 0\n", "ZeroDivisionError")],
)
def test_a_file_that_cannot_be_imported_is_shown_where_it_fails(source, text, call, place):
    (place / "broken.py").write_text(source)
    status, _, err = call("explain", "broken.py:x")
    assert status == 2 and text in err and "broken.py:1" in err


def test_a_traceback_is_shown_on_request_only(call):
    assert "Traceback" not in call("explain", "missing.cascade")[2]
    with ef.configure(debug=True):
        assert "Traceback" in call("explain", "missing.cascade")[2]


def test_a_build_that_fails_is_status_1(call, monkeypatch):
    from einfall.compiler import driver

    def fail(*_, **__):
        raise ef.BuildError("the tool refused")

    monkeypatch.setattr(driver, "lower_cascade", fail)
    status, _, err = call("compile", "rows.cascade", "--dims", "i=7,j=41", "-o", "built")
    assert status == 1 and "BuildError: the tool refused" in err
