"""The CUDA comparisons as far as they go without a GPU: the rows, their peers on the CPU, what is kept, and what ends a row."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from click.testing import CliRunner

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on purpose: that takes half a minute
PREFILL = ("SDPA cuDNN", "SDPA flash", "FlexAttention", "eager")
PEERS = {
    "bf16 H32 S8192 D128 causal": PREFILL,
    "bf16 H32 S8192 D128 full": PREFILL,
    "bf16 decode B16 H32/8 S8192 D128": ("SDPA flash", "SDPA cuDNN", "FlexAttention", "eager"),
    "int4 decode B16 H32/8 S8192 D128": ("own in bf16", "eager"),
    "bf16 decode, shared prefix B1024 H32/8 S1024+64 D128": ("SDPA without sharing", "eager"),
    "bf16 decode, shared prefix B1024 H32/8 S16384+64 D128": ("SDPA without sharing", "eager"),
    "dispatch": ("eager",),
}


@pytest.fixture
def rows(root_on_path):
    from benchmarks.cuda_cases import cuda_rows

    return {case.name: case for case in cuda_rows("full")}


@pytest.fixture
def runner(root_on_path, tmp_path_factory, monkeypatch):
    """A runner of the tiny rows on the CPU; nothing of PyTorch is compiled."""
    import einfall as ef

    from benchmarks.cuda_run import CudaOptions, CudaRunner

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with ef.configure(cache=tmp_path_factory.getbasetemp() / "bench_cuda_cache", database=None), torch.no_grad():
        yield CudaRunner(CudaOptions("tiny", rounds=3, budget_s=0.01, device="cpu"), lambda text: None)


def test_the_rows_their_peers_and_their_work(rows):
    assert {name: tuple(p.name for p in case.peers) for name, case in rows.items()} == PEERS
    full, causal = rows["bf16 H32 S8192 D128 full"], rows["bf16 H32 S8192 D128 causal"]
    assert full.flops == 2 * 2 * 32 * 8192 * 8192 * 128 == 2 * causal.flops
    assert full.bytes == causal.bytes == 4 * 32 * 8192 * 128 * 2
    decode, int4 = rows["bf16 decode B16 H32/8 S8192 D128"], rows["int4 decode B16 H32/8 S8192 D128"]
    queries = 2 * 2 * 16 * 32 * 128
    assert decode.bytes == 2 * 2 * 16 * 8 * 8192 * 128 + queries
    assert int4.bytes == 2 * 16 * 8 * 8192 * (64 + 2 * 2 * 4) + queries
    assert decode.flops == int4.flops == 4 * 16 * 32 * 8192 * 128
    for prefix in (1024, 16384):
        shared = rows[f"bf16 decode, shared prefix B1024 H32/8 S{prefix}+64 D128"]
        assert shared.bytes == 2 * 2 * 8 * 128 * (prefix + 1024 * 64) + 2 * 2 * 1024 * 32 * 128
        assert shared.flops == 4 * 1024 * 32 * (prefix + 64) * 128


def test_bytes_are_those_of_the_inputs_and_results(root_on_path):
    from benchmarks.cuda_cases import cuda_rows

    for case in cuda_rows("tiny"):
        tensors = case.tensors()
        (result,) = [case.kernel.reference(*tensors, **case.scalars)]
        known = [t for t in (*tensors, result) if t.dtype != torch.int32]  # the lengths of suffixes are not counted
        assert case.bytes == sum(t.numel() * t.element_size() for t in known), case.name


@pytest.mark.parametrize("number", [0, 3, 4, 6])  # the other kinds of rows are run by the tests below
def test_a_row_is_checked_and_timed_with_the_peers_that_run(runner, number):
    case = runner.options.chosen()[number]
    row = runner.run(case)
    assert not row.failed and "einfall" in row.samples
    for peer in case.peers:
        if case.group != "dispatch":
            assert (peer.name in row.samples) != (peer.name in row.skipped), peer.name
            assert peer.name != "eager" or peer.name in row.samples
    if case.group != "dispatch":
        assert {name for name, _, _ in row.floors} == {"bf16 torch.matmul 64", *([case.roof] if case.roof else [])}
        assert row.kernels["einfall"]["errors"][0] <= row.kernels["einfall"]["allowed_errors"][0]


def test_peers_compute_the_same(runner):
    """What runs on the CPU of the GPU's peers, against float64: FlexAttention with its mask, SDPA by backend, copies that take turns."""
    from benchmarks import cuda_cases
    from benchmarks.run import largest_errors

    checked = set()
    for case in runner.options.chosen():
        tensors = case.tensors()
        for peer in case.peers:
            if peer.own or peer.name in ("SDPA cuDNN", "SDPA without sharing"):
                continue
            assert max(largest_errors(case, tensors, (peer.run(*peer.arrange(tensors)),))) < 4e-2
            checked.add(peer.name)
    assert checked == {"SDPA flash", "FlexAttention", "eager"}
    shape = cuda_cases.Shared(3, 2, 40, 8)
    q, kp, vp, kt, vt, length = shape.tensors(torch.Generator().manual_seed(1))
    peer = cuda_cases.Unshared(shape)
    found = peer(*peer.arrange((q, kp, vp, kt, vt, length))).double()
    k, v = (torch.cat([x.expand(3, *x.shape), y], 1).double().transpose(1, 2) for x, y in ((kp, kt), (vp, vt)))
    wanted = torch.softmax(shape.rows(q).double() @ k.mT * shape.scale, -1) @ v
    assert (found - wanted).abs().max() < 4e-2


def test_copies_of_a_long_prefix_take_turns(root_on_path, monkeypatch):
    from benchmarks import cuda_cases

    assert cuda_cases.Unshared(cuda_cases.Shared(1024, 8, 16384, 64)).at_once == 63
    assert cuda_cases.Unshared(cuda_cases.Shared(1024, 8, 1024, 64)).at_once == 963
    shape = cuda_cases.Shared(5, 2, 40, 8)
    monkeypatch.setattr(cuda_cases, "COPIES", 2 * 4 * 2 * 128 * 48)
    peer = cuda_cases.Unshared(shape)
    q, k, v = peer.arrange(shape.tensors(torch.Generator().manual_seed(1)))
    assert peer.at_once == 2 and len(k) == len(v) == 2 and peer(q, k, v).shape == q.shape


def test_whatever_goes_wrong_in_a_row_is_said_in_it(runner, monkeypatch):
    from benchmarks import cuda_run

    case = runner.options.chosen()[2]

    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda_run.Runner, "run", fail)
    row = runner.run(case)
    assert row.failed == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert row.name == case.name and row.aims == case.aims and row.samples == {}


def test_tuning_ends_when_a_row_has_used_its_share(runner):
    from einfall.tuner.tune import Started

    runner._began = time.monotonic()
    runner._until(object())
    runner._began -= runner.options.seconds
    runner._until(Started(None, "cuda:sm_90", "", 8, 0))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        runner._until(object())


def test_a_row_comes_back_from_its_file(runner):
    from benchmarks.run import Row

    row = runner.run(runner.options.chosen()[2])
    again = Row.from_dict(json.loads(json.dumps(row.to_dict(), default=str)))
    assert again.to_dict() == row.to_dict() and again.samples == row.samples and again.aims == row.aims


def test_a_row_of_its_own_process_ends_with_its_time(root_on_path):
    from benchmarks.cuda import ended

    began = time.monotonic()
    assert ended([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "it took longer than its 0 s"
    assert time.monotonic() - began < 30
    assert ended([sys.executable, "-c", "raise SystemExit('lost the device')"], 60) == "it ended with status 1: lost the device"
    assert ended([sys.executable, "-c", "print('fine')"], 60) == ""


def test_rows_that_fail_do_not_stop_the_others(root_on_path, runner, tmp_path, monkeypatch):
    from benchmarks import cuda

    done = runner.run(runner.options.chosen()[2])

    def run(command, seconds):
        name = command[command.index("--only") + 1]
        if "decode B1 " in name and name.startswith("bf16"):
            place = command[command.index("--row") + 1]
            with open(place, "w", encoding="utf-8") as file:
                json.dump(done.to_dict(), file, default=str)
            return ""
        return "it took longer than its 20 s"

    monkeypatch.setattr(cuda, "ended", run)
    monkeypatch.setattr(cuda, "machine_with_gpu", lambda: {"processor": "none", "cores": 1, "commit": ""})
    with pytest.raises(SystemExit) as status:
        cuda.everything(runner.options, runner.options.chosen(), tmp_path)
    assert status.value.code == 1
    found = json.loads((tmp_path / "cuda.json").read_text())
    assert [bool(row["failed"]) for row in found["rows"]] == [True, True, False, True, True, True, True]
    assert found["rows"][2]["subjects"] == json.loads(json.dumps(done.to_dict(), default=str))["subjects"]
    assert found["rows"][0]["failed"] == "it took longer than its 20 s"
    assert (tmp_path / "cuda.png").stat().st_size > 1000


def test_the_growth_of_the_shared_prefix(root_on_path):
    from benchmarks.cuda import growth
    from benchmarks.protocol import Samples
    from benchmarks.run import Row

    made = []
    for name, ms, flops in (("shared prefix short", 2.0, 1e9), ("shared prefix long", 3.0, 2e9)):
        row = Row(name, "decode", "bf16", flops, 1.0, ())
        row.floors, row.samples = (("peak", "bf16", 1e9),), {"einfall": Samples("einfall", (ms,)), "peak": Samples("peak", (1.0,))}
        made.append(row)
    assert growth(made) == {"shared prefix short -> shared prefix long": {"measured": 1.5, "floor": 2.0}}
    made[0].failed = "wrong"
    assert growth(made) == {}


def test_the_aim_of_a_call_is_in_microseconds(root_on_path):
    from benchmarks.case import Aim

    aim = Aim("more_us", 10.0, "bare launch")
    assert aim.text == "≤ 10 µs over bare launch"
    for ms, more_us, met in ((0.012, 6.0, True), (0.05, 25.0, False)):
        found = {"ms": ms, "speed": {"bare launch": 0.5}}
        assert aim.reached(found) == pytest.approx(more_us) and aim.met(found) is met
    assert aim.met({"ms": 0.05, "speed": {}}) is None


@pytest.fixture
def prepared(root_on_path, monkeypatch):
    """What `prepare` would set, were torch not imported yet."""
    from benchmarks.protocol import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_the_rows_are_listed_without_a_gpu(prepared):
    from benchmarks.cuda import main

    answer = CliRunner().invoke(main, ["--list", "--only", "*S16384*"])
    assert answer.exit_code == 0
    assert answer.output.splitlines() == [
        "bf16 decode, shared prefix B1024 H32/8 S16384+64 D128",
        "    inputs Q [1024, 1, 32, 128] bfloat16, Kp [16384, 8, 128] bfloat16, Vp [16384, 8, 128] bfloat16, "
        "Kt [1024, 64, 8, 128] bfloat16, Vt [1024, 64, 8, 128] bfloat16, L [1024] int32",
        "    peers  SDPA without sharing, eager",
        "    work   275.952 GFLOP, 352.322 MB",
        "    aim    ≥ 16× SDPA without sharing",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so(prepared, tmp_path):
    from benchmarks.cuda import main

    answer = CliRunner().invoke(main, ["--out", str(tmp_path / "out")])
    assert answer.exit_code == 0 and answer.output.endswith(": nothing is measured; --list names the rows\n")
    assert len(answer.output.splitlines()) == 1 and not (tmp_path / "out").exists()
