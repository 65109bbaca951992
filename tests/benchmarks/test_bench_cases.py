"""The rows of the comparison: their oracles, their work, what is made of the samples, and a whole run at tiny sizes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    "f32 H2 S64 D64 full",
    "f32 H2 S64 D64 causal",
    "bf16 H2 S64 D128 causal",
    "bf16 decode B1 H8/2 S96 D128",
    "f32 log-sum-exp 8 x 300",
    "f32 cross-entropy T16 E32 V200",
    "f32 RMSNorm-matmul 16 x 96 x 64",
    "f32 LayerNorm-matmul 16 x 96 x 64",
)


@pytest.fixture
def tiny(root_on_path):
    from benchmarks.cases import cases

    return {case.name: case for case in cases("tiny")}


@pytest.mark.parametrize("name", NAMES)
def test_oracle_peers_and_cascade_mean_the_same(tiny, name):
    from benchmarks.run import largest_error

    case = tiny[name]
    tensors = case.tensors()
    tolerance = 4e-2 if case.dtype == "bf16" else 2e-5
    for _, peer in case.peers:
        assert largest_error(case, tensors, peer(*tensors)) < tolerance
    exact = case.kernel.reference(*tensors, **case.scalars, dtype=torch.float64)
    assert largest_error(case, tensors, exact) < 1e-9
    wrong = exact + 1.0
    assert largest_error(case, tensors, wrong) == pytest.approx(1.0)
    wrong[-1] = math.nan
    assert math.isnan(largest_error(case, tensors, wrong))


def test_the_work_of_the_rows(root_on_path):
    from benchmarks.cases import attention_case, cases, cross_entropy_case

    full = attention_case("f32", 1024, 64, causal=False, heads=16)
    assert full.flops == 2 * 2 * 16 * 1024 * 1024 * 64
    assert attention_case("f32", 1024, 64, causal=True, heads=16).flops == full.flops / 2
    assert full.bytes == 4 * 4 * 16 * 1024 * 64
    assert cross_entropy_case(512, 256, 32768).flops == 2 * 512 * 256 * 32768
    names = [case.name for case in cases("full")]
    assert len(set(names)) == len(names) == 2 * 3 * 2 * 2 + 5
    assert {case.name for case in cases("short")} < set(names)


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
    assert ours["of_peak"] == 0.8
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
    assert row.failed.startswith("einfall is wrong: error 0.01") and not row.samples

    def refuse(self, case, tensors, row):
        raise ef.UnsupportedError("no such thing")

    monkeypatch.setattr(run.Runner, "_executables", refuse)
    assert runner.run(case).failed.startswith("no such thing")


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
        peers = runner._peers(case, case.tensors(), row)
        assert [n for n, _ in peers] == [n for n, _ in case.peers] and row.skipped["MetaSchedule"] == reason


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
    assert row["kernels"]["einfall"]["error"] <= row["kernels"]["einfall"]["allowed_error"]
    assert row["skipped"] == {"inductor": "not asked for"}
    assert row["figures"]["einfall"]["speed"].keys() == {"SDPA", "eager"}
    assert found["machine"]["environment"]["OMP_NUM_THREADS"] == "1" and {limit["kind"] for limit in found["limits"]} >= {"f32", "bytes"}
    assert (tmp_path / "out" / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "einfall ms" in ran.stdout and row["name"] in ran.stdout


def test_a_pattern_that_names_no_row_is_a_wrong_argument(tmp_path):
    ran = bench("--only", "nothing", cwd=tmp_path)
    assert ran.returncode == 2 and "no row is called 'nothing'" in ran.stderr
    assert not (tmp_path / "out" / "cpu.json").exists()
