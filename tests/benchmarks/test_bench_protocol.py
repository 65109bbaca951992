"""The measuring protocol against a clock that is turned by hand."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def protocol(root_on_path):
    from benchmarks import protocol

    return protocol


class Machine:
    """Subjects that take a known time on a clock of their own, and a log of what ran."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def subject(self, protocol, name, ms):
        times = iter(ms) if isinstance(ms, list) else None

        def run():
            self.log.append(name)
            self.now += (next(times) if times is not None else ms) / 1e3

        return protocol.Subject(name, run)

    def clock(self):
        return self.now


def test_samples_are_taken_in_turns(protocol):
    m = Machine()
    subjects = [m.subject(protocol, name, 10.0) for name in "ABC"]
    protocol.interleave(subjects, rounds=4, warm_up_ms=5, clock=m.clock)
    assert "".join(m.log[-12:]) == "ABCABCABCABC"


def test_a_short_call_is_repeated_until_a_sample_is_long_enough(protocol):
    m = Machine()
    subjects = [m.subject(protocol, "A", 0.25), m.subject(protocol, "B", 7.0)]
    found = protocol.interleave(subjects, rounds=3, sample_ms=2, warm_up_ms=1, clock=m.clock)
    assert (found["A"].calls, found["B"].calls) == (8, 1)
    assert found["A"].ms == pytest.approx([0.25] * 3)
    assert m.log[-9:] == ["A"] * 8 + ["B"]


def test_the_first_calls_are_not_counted(protocol):
    m = Machine()
    cold = [500.0, 90.0, 40.0, *[10.0] * 20]
    found = protocol.interleave([m.subject(protocol, "A", cold)], rounds=5, warm_up_ms=30, clock=m.clock)
    assert found["A"].ms == pytest.approx([10.0] * 5)


def test_the_budget_ends_a_run_but_three_rounds_are_kept(protocol):
    m = Machine()
    found = protocol.interleave([m.subject(protocol, n, 1000.0) for n in "AB"], rounds=50, warm_up_ms=1, budget_s=0.5, clock=m.clock)
    assert len(found["A"].ms) == len(found["B"].ms) == 3
    found = protocol.interleave([m.subject(protocol, "A", 1000.0)], rounds=50, warm_up_ms=1, budget_s=9.5, clock=m.clock)
    assert len(found["A"].ms) == 10


def test_a_slow_subject_does_not_cost_a_quick_one_its_samples(protocol):
    m = Machine()
    subjects = [m.subject(protocol, "slow", 1000.0), m.subject(protocol, "quick", 10.0)]
    found = protocol.interleave(subjects, rounds=20, warm_up_ms=1, budget_s=4.0, clock=m.clock)
    assert len(found["slow"].ms) == 3 and len(found["quick"].ms) == 20
    assert m.log[-23:] == ["slow", "quick"] * 3 + ["quick"] * 17


def test_two_subjects_of_one_name_are_refused(protocol):
    m = Machine()
    with pytest.raises(ValueError, match="one name"):
        protocol.interleave([m.subject(protocol, "A", 1.0), m.subject(protocol, "A", 1.0)], clock=m.clock)


def test_median_and_quartiles(protocol):
    ms = (5.0, 1.0, 4.0, 2.0, 3.0, 100.0, 2.5)
    samples = protocol.Samples("A", ms)
    assert samples.median == statistics.median(ms)
    low, high = samples.quartiles
    assert sum(x <= low for x in ms) >= 2 and sum(x >= high for x in ms) >= 2 and low < samples.median < high
    assert samples.spread == (high - low) / samples.median
    assert protocol.ratio(samples, protocol.Samples("B", (6.0,))) == 2.0
    assert json.loads(json.dumps(samples.to_dict()))["samples_ms"] == list(ms)
    assert protocol.Samples("A", (4.0,)).spread == 0.0


def test_prepare_sets_what_is_open_and_refuses_when_it_is_too_late():
    code = (
        "import os, sys; sys.path.insert(0, {root!r})\n"
        "from benchmarks.protocol import prepare\n"
        "prepare(); assert os.environ['OMP_WAIT_POLICY'] == 'ACTIVE' and os.environ['TVM_THREAD_POOL_SPIN_COUNT'] == '1000'\n"
        "assert 'OMP_NUM_THREADS' not in os.environ\n"
        "prepare(one_thread=True); assert os.environ['OMP_NUM_THREADS'] == os.environ['TVM_NUM_THREADS'] == '1'\n"
        "sys.modules['torch'] = sys\n"
        "prepare(one_thread=True)\n"
        "del os.environ['TVM_THREAD_POOL_SPIN_COUNT']\n"
        "try: prepare()\n"
        "except RuntimeError as error: assert 'TVM_THREAD_POOL_SPIN_COUNT' in str(error)\n"
        "else: raise SystemExit('prepare() came too late and did not say so')\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code.format(root=root)], check=True, env={"PATH": "", "OMP_WAIT_POLICY": "ACTIVE"})


def test_the_machine_is_described(protocol):
    about = protocol.machine()
    assert about["cores"] >= 1 and about["processor"] and set(protocol.ENVIRONMENT) <= set(about["environment"])
    assert about["versions"]["torch"].startswith("2.") and about["versions"]["einfall"]
    assert about["date"][:2] == "20" and about["date"].endswith("+00:00")
    json.dumps(about)


def test_the_commit_is_that_of_the_repository(protocol, tmp_path, monkeypatch):
    def run(*args):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(protocol, "ROOT", tmp_path)
    assert protocol.commit() == ""
    run("init")
    (tmp_path / "a").write_text("1")
    run("add", "a")
    run("commit", "-m", "a")
    head = run("rev-parse", "HEAD").stdout.strip()
    assert protocol.commit() == head
    (tmp_path / "a").write_text("2")
    assert protocol.commit() == head + "+"
