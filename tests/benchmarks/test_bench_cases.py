"""The rows of the comparison: their oracles, their work, what is made of the samples, and a whole run at tiny sizes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    "f32 H2 S64 D64 full",
    "f32 H2 S64 D64 causal",
    "bf16 H2 S64 D128 causal",
    "bf16 decode B1 H8/2 S96 D128",
    "int8 decode B1 H8/2 S96 D128",
    "int4 decode B1 H8/2 S96 D128",
    "bf16 decode, H2O score B1 H8/2 S96 D128",
    "bf16 decode, SnapKV score B1 M8 H8/2 S96 D128",
    "bf16 decode, shared prefix B3 H8/2 S64+16 D128",
    "bf16 decode, shared prefix, one softmax B3 H8/2 S64+16 D128",
    "quantize int8 48 x 128",
    "quantize int4 1 x 2 x 24 x 128",
    "quantize MXFP8 48 x 128",
    "quantize BFP8 1 x 2 x 24 x 128",
    "quantize BFP4 1 x 2 x 24 x 128",
    "verify logits B3 I3 V1000",
    "verify probabilities B3 I3 V1000",
    "f32 log-sum-exp 8 x 300",
    "f32 cross-entropy T16 E32 V200",
    "f32 RMSNorm-matmul 16 x 96 x 64",
    "f32 LayerNorm-matmul 16 x 96 x 64",
)
EXACT = ("quantize", "verify")
TOLERANCES = {torch.bfloat16: 4e-2, torch.float32: 2e-5, torch.float16: 2e-2}


@pytest.fixture
def tiny(root_on_path):
    from benchmarks.cases import cases

    return {case.name: case for case in cases("tiny")}


@pytest.mark.parametrize("name", NAMES)
def test_oracle_peers_and_cascade_mean_the_same(tiny, name):
    from benchmarks.case import as_tuple
    from benchmarks.run import largest_errors

    case = tiny[name]
    tensors = case.tensors()
    for peer in case.peers:
        given = peer.arrange(tensors)
        results = as_tuple(peer.run.reference(*given, **peer.scalars) if peer.own else peer.run(*given))
        errors = largest_errors(case, tensors, results)
        assert len(errors) == len(results) and all(e <= TOLERANCES.get(r.dtype, 0.0) for e, r in zip(errors, results, strict=True))
    exact = as_tuple(case.kernel.reference(*tensors, **case.scalars, dtype=None if name.startswith(EXACT) else torch.float64))
    for error, result in zip(largest_errors(case, tensors, exact), exact, strict=True):
        if result.dtype == torch.float64:
            assert error <= (2e-3 if name.startswith(("int8", "int4")) else 1e-9)  # these round their results to bf16 by themselves
        else:
            assert error <= TOLERANCES.get(result.dtype, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_element_of_a_result_is_seen(tiny, name):
    from benchmarks.run import largest_errors

    case = tiny[name]
    tensors = case.tensors()
    right = case.eager(*tensors)
    right = (right,) if isinstance(right, torch.Tensor) else right
    for i, result in enumerate(right):
        wrong = result.clone()
        last = (-1,) * result.ndim
        if name.startswith("bf16 decode, SnapKV") and i == 1:
            last = (*last[:-1], 0)
        by_bits = wrong.view(torch.uint8) if wrong.element_size() == 1 else wrong
        by_bits[last] += 1
        errors = largest_errors(case, tensors, [*right[:i], wrong, *right[i + 1 :]])
        assert errors[i] > TOLERANCES.get(result.dtype, 0.0)
        if result.is_floating_point() and result.element_size() > 1:
            wrong[last] = math.nan
            assert math.isnan(largest_errors(case, tensors, [*right[:i], wrong, *right[i + 1 :]])[i])


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("f32", "bf16 H2"))])
def test_a_row_is_compiled_checked_and_timed_with_its_peers(tiny, name):
    from benchmarks import run
    from benchmarks.floors import Floor

    runner = run.Runner.__new__(run.Runner)
    runner.options, runner._inductor_problem = run.Options(size="tiny", rounds=3, budget_s=0.01), "not asked for"
    runner.kernels = [Floor(f"{kind} micro-kernel", kind, 1e6, lambda: None) for kind in ("f32", "bf16")]
    runner.bandwidths = [Floor(way, "bytes", 1e6, lambda: None) for way in ("read", "copy")]
    case = tiny[name]
    row = runner.run(case)
    assert not row.failed and row.skipped == {"inductor": "not asked for"}
    roof = "copy" if name.startswith("quantize") else "read"
    assert set(row.samples) == {"einfall", *(p.name for p in case.peers), f"{case.dtype} micro-kernel", roof}
    found = run.figures(row)
    assert all(aim["met"] is not None for aim in found["einfall"]["aims"]) and len(found["einfall"]["aims"]) == len(case.aims) > 0


def test_every_row_is_tried(tiny):
    prompts = {name for name in tiny if name.startswith(("f32 H2", "bf16 H2"))}
    assert set(tiny) - prompts == set(NAMES) - prompts


def test_the_work_of_the_rows(root_on_path):
    from benchmarks.cases import cases
    from benchmarks.cases_decode import Shape, decode_case, int4_case, int8_case
    from benchmarks.cases_fused import cross_entropy_case
    from benchmarks.cases_prefill import attention_case
    from benchmarks.cases_shared import Shape as Shared

    full = attention_case("f32", 1024, 64, causal=False, heads=16)
    assert full.flops == 2 * 2 * 16 * 1024 * 1024 * 64
    assert attention_case("f32", 1024, 64, causal=True, heads=16).flops == full.flops / 2
    assert full.bytes == 4 * 4 * 16 * 1024 * 64
    assert cross_entropy_case(512, 256, 32768).flops == 2 * 512 * 256 * 32768
    names = [case.name for case in cases("full")]
    assert len(set(names)) == len(names) == 2 * 3 * 2 * 2 + 5 + 2 + 5 + 2 + 4
    assert {case.name for case in cases("short")} < set(names)
    decode = decode_case(Shape(8, 8, 8192))
    assert decode.flops == 4 * 8 * 32 * 8192 * 128
    assert decode.bytes / (2 * 2 * 8 * 8 * 8192 * 128) == pytest.approx(1, rel=2e-3)
    assert decode.bytes / int8_case(Shape(8, 8, 8192)).bytes == pytest.approx(64 / 34, rel=2e-3)
    assert decode.bytes / int4_case(Shape(8, 8, 8192)).bytes == pytest.approx(64 / 20, rel=2e-3)
    assert Shared(32, 8, 8192, 64).bytes == 2 * 2 * 8 * 128 * (8192 + 32 * 64) + 2 * 2 * 32 * 32 * 128


def test_bytes_of_quantizers_and_of_decode_steps_are_those_of_their_tensors(tiny):
    for name, case in tiny.items():
        if not name.startswith(("quantize", "int8 decode", "int4 decode")) and "decode B" not in name and "score" not in name:
            continue
        tensors = case.tensors()
        results = case.kernel.reference(*tensors, **case.scalars)
        results = (results,) if isinstance(results, torch.Tensor) else results
        assert case.bytes == sum(t.numel() * t.element_size() for t in (*tensors, *results)), name


def test_groups_come_in_the_order_of_their_tables(root_on_path):
    from benchmarks.cases import cases

    groups = [case.group for case in cases("short")]
    assert groups == sorted(groups, key=["prefill", "decode", "quantize", "verify", "fused"].index)


@pytest.mark.parametrize(
    ("kind", "value", "text", "reached", "met"),
    [
        ("speed", 1.9, "≥ 1.9× SDPA", 2.0, True),
        ("speed", 2.1, "≥ 2.1× SDPA", 2.0, False),
        ("more_time", 0.05, "≤ 5% over SDPA", -0.5, True),
        ("of_peak", 0.85, "≥ 85% of peak", 0.8, False),
        ("of_roof", 0.4, "≥ 40% of roof", 0.4, True),
    ],
)
def test_aims(root_on_path, kind, value, text, reached, met):
    from benchmarks.case import Aim
    from benchmarks.run import figures

    row = made_up_row()
    row.aims = (Aim(kind, value, "SDPA"),)
    (found,) = figures(row)["einfall"]["aims"]
    assert found == {"aim": text, "reached": pytest.approx(reached), "met": met}
    row.samples = {name: s for name, s in row.samples.items() if name not in ("SDPA", "read", "peak")}
    row.floors = ()
    (unknown,) = figures(row)["einfall"]["aims"]
    assert unknown == {"aim": text, "reached": None, "met": None}


def test_the_same_seed_gives_the_same_tensors(tiny):
    case = tiny["f32 cross-entropy T16 E32 V200"]
    for a, b in zip(case.tensors(3), case.tensors(3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(case.tensors(3)[0], case.tensors(4)[0])


def made_up_row(**changes):
    from benchmarks.protocol import Samples
    from benchmarks.run import Row

    ms = {"einfall": (10.0, 11.0, 9.0), "SDPA": (20.0, 20.0), "eager": (40.0, 40.0), "peak": (1.0, 1.0), "read": (2.0, 2.0)}
    row = Row("a row", "prefill", "f32", flops=8e9, bytes=4e6, peers=("SDPA", "eager"))
    row.floors = (("peak", "f32", 1e9), ("read", "bytes", 2e6))
    row.samples = {name: Samples(name, samples) for name, samples in {**ms, **changes}.items()}
    return row


def test_figures_of_made_up_samples(root_on_path):
    from benchmarks.run import figures

    found = figures(made_up_row())
    ours = found["einfall"]
    assert ours["ms"] == 10.0 and ours["gflops"] == 800.0 and ours["gbytes"] == pytest.approx(0.4)
    assert found["peaks"] == {"f32": 1000.0, "bytes": 1.0}
    assert ours["of_peak"] == 0.8 and ours["of_roof"] == pytest.approx(0.4)
    assert found["floor_ms"] == pytest.approx(8.0) and ours["over_floor"] == pytest.approx(1.25)  # 8 ms of arithmetic, 4 of reading
    assert ours["speed"] == {"SDPA": 2.0, "eager": 4.0} and ours["best_peer"] == "SDPA"
    assert "einfall tuned" not in found
    both = figures(made_up_row(**{"einfall tuned": (5.0, 5.0, 5.0)}))
    assert both["einfall tuned"]["of_peak"] == 1.6 and both["einfall"]["of_peak"] == 0.8
    failed = made_up_row()
    failed.failed = "wrong"
    assert figures(failed) == {}


def test_a_row_in_short(root_on_path):
    from benchmarks.report import line

    assert line(made_up_row()) == "a row: 10.00 ms, 80% of the peak, 2.00× SDPA, 4.00× eager"
    failed = made_up_row()
    failed.failed = "einfall is wrong: error 1\nmore"
    assert line(failed) == "a row: failed, einfall is wrong: error 1"
    decode = made_up_row()
    decode.group = "decode"
    assert line(decode) == "a row: 10.00 ms, 1.25× the floor, 2.00× SDPA, 4.00× eager"


def test_the_table_leaves_out_what_says_nothing(root_on_path):
    from benchmarks.case import Aim
    from benchmarks.report import rows_table

    def cells(row):
        table = rows_table([row], row.group)
        return {str(c.header): next(iter(c.cells)) for c in table.columns}

    row = made_up_row()
    row.aims = (Aim("speed", 2.0, "SDPA"), Aim("of_peak", 0.9), Aim("speed", 2.0, "absent"))
    found = cells(row)
    assert found["aim"] == "≥ 2× SDPA ✓, ≥ 90% of peak ✗, ≥ 2× absent"
    assert found["× SDPA/torch"] == "2.00×" and not {"tuned ms", "× own", "× inductor", "GB/s"} & set(found)
    row.same = True
    assert cells(row)["tuned ms"] == "= default"
    both = made_up_row(**{"einfall tuned": (5.0, 5.0)})
    both.group, both.own = "decode", ("SDPA",)
    found = cells(both)
    assert (found["einfall ms"], found["tuned ms"], found["× own"]) == ("10.00", "5.00", "4.00×") and "× SDPA/torch" not in found
    assert found["GB/s"] == "0.8" and found["of roof"] == "80%"


def test_a_kernel_that_is_wrong_is_a_failed_row(tiny, monkeypatch, root_on_path, tmp_path):
    import einfall as ef

    from benchmarks import run

    case = tiny["f32 log-sum-exp 8 x 300"]
    runner = run.Runner.__new__(run.Runner)
    runner.options, runner.say, runner.kernels, runner.bandwidths = run.Options(size="tiny"), print, [], ()
    runner._inductor_problem = "not asked for"

    class Wrong:
        schedule, facts = ef.Schedule(), {}

        def __call__(self, x):
            return torch.logsumexp(x, -1) + 0.01

    def build(self, case, tensors, row):
        row.kernels["einfall"] = {}
        return {"einfall": Wrong()}

    monkeypatch.setattr(run.Runner, "_executables", build)
    row = runner.run(case)
    assert row.failed.startswith("einfall is wrong: result 0 is off by 0.01") and not row.samples

    def refuse(self, case, tensors, row):
        raise ef.UnsupportedError("no such thing")

    monkeypatch.setattr(run.Runner, "_executables", refuse)
    assert runner.run(case).failed.startswith("no such thing")


def test_a_kernel_of_ours_that_is_wrong_or_refused_is_a_peer_that_is_missing(tiny, root_on_path, monkeypatch):
    from benchmarks import run

    case = tiny["int8 decode B1 H8/2 S96 D128"]
    tensors = case.tensors()
    runner = run.Runner.__new__(run.Runner)
    runner.options = run.Options(size="tiny")
    row, (own, _) = made_up_row(), case.peers
    assert torch.is_tensor(runner._peer(case, own, tensors, row, [1.0])()) and not row.skipped
    assert runner._peer(case, own, tensors, row, [0.0]) is None
    assert row.skipped.pop(own.name).startswith("own in bf16 is wrong: result 0 is off by")
    unknown = replace(own, arrange=lambda given: given[:2])
    assert runner._peer(case, unknown, tensors, row, [1.0]) is None and row.skipped[own.name]


def test_tuning_that_fails_leaves_the_default(tiny, root_on_path, tmp_path):
    import einfall as ef

    from benchmarks import run

    class Untunable:
        def tune(self, *tensors, **named):
            raise ef.BuildError("no candidate was right")

        def compile(self, *tensors, **named):
            return tiny["f32 log-sum-exp 8 x 300"].kernel.compile(*tensors, **named)

    case = replace(tiny["f32 log-sum-exp 8 x 300"], kernel=Untunable())
    runner = run.Runner.__new__(run.Runner)
    said = []
    runner.options, runner.say = run.Options(size="tiny", database=tmp_path / "a.db", tune=3), said.append
    row = made_up_row()
    assert list(runner._executables(case, case.tensors(), row)) == ["einfall"] and row.same
    assert row.skipped == {"einfall tuned": "no candidate was right"} and said[-1] == "not tuned: no candidate was right"


@pytest.mark.parametrize("causal", [False, True])
def test_the_program_that_metaschedule_is_given_is_attention(root_on_path, causal):
    import tvm

    from benchmarks.metaschedule import unfused_attention

    shape, scale = (1, 2, 24, 16), 0.3
    function = tvm.compile(unfused_attention(shape, scale, causal=causal), target={"kind": "llvm"})["main"]
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    result = torch.empty(shape)
    function(q, k, v, result)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    assert torch.allclose(result, wanted, atol=1e-5)


def test_a_search_that_fails_is_a_peer_that_is_missing(tiny, root_on_path, monkeypatch):
    from benchmarks import metaschedule, run

    def fail(*args, **kwargs):
        raise RuntimeError("the workers died\nwith a long account")

    monkeypatch.setattr(metaschedule, "tuned_attention", fail)
    runner = run.Runner.__new__(run.Runner)
    runner.options, runner.say, runner._inductor_problem = run.Options(size="tiny", metaschedule=4), print, "not asked for"
    wanted = {"f32 H2 S64 D64 full": "the workers died", "f32 log-sum-exp 8 x 300": "searched for f32 prefill attention only"}
    for name, reason in wanted.items():
        case, row = tiny[name], made_up_row()
        peers = runner._peers(case, case.tensors(), row, [1.0])
        assert [p.name for p in peers] == [p.name for p in case.peers] and row.skipped["MetaSchedule"] == reason


def bench(*arguments, cwd):
    """`python benchmarks/cpu.py ...` in a process of its own: thread settings must stand before torch is imported."""
    environment = {**os.environ, "EINFALL_CACHE": str(cwd / "cache"), "EINFALL_DB": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / "cpu.py"), "--size", "tiny", "--rounds", "3", "--no-inductor", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_tiny_run_from_the_command_line(tmp_path):
    ran = bench("--only", "f32 H2 S64 D64 full", "--database", "none.db", "--one-thread", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "cpu.json").read_text())
    (row,) = found["rows"]
    assert row["name"] == "f32 H2 S64 D64 full" and not row["failed"]
    assert {"einfall", "SDPA", "eager", "f32 micro-kernel"} == {s["name"] for s in row["subjects"]}
    assert all(len(s["samples_ms"]) == 3 and min(s["samples_ms"]) > 0 for s in row["subjects"])
    assert row["kernels"]["einfall"]["errors"] <= row["kernels"]["einfall"]["allowed_errors"]
    assert row["skipped"] == {"inductor": "not asked for"}
    assert row["figures"]["einfall"]["speed"].keys() == {"SDPA", "eager"}
    assert found["machine"]["environment"]["OMP_NUM_THREADS"] == "1" and {limit["kind"] for limit in found["limits"]} >= {"f32", "bytes"}
    assert (tmp_path / "out" / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "einfall ms" in ran.stdout and row["name"] in ran.stdout


def test_a_run_that_tunes_shows_the_default_and_the_winner(tmp_path):
    ran = bench("--only", "f32 log-sum-exp*", "--tune", "2", "--one-thread", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = json.loads((tmp_path / "out" / "cpu.json").read_text())["rows"]
    assert row["tuning"]["trials"] == 2 and (tmp_path / "out" / "cpu.db").exists()
    names = {s["name"] for s in row["subjects"]}
    assert ("einfall tuned" in names) != row["same"] and "tuned ms" in ran.stdout
    assert ("= default" in ran.stdout) == row["same"]


def test_a_pattern_that_names_no_row_is_a_wrong_argument(tmp_path):
    ran = bench("--only", "nothing", cwd=tmp_path)
    assert ran.returncode == 2 and "no row is called 'nothing'" in ran.stderr
    assert not (tmp_path / "out" / "cpu.json").exists()
