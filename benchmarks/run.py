"""Runs cases: compile, check against float64, time in turns with peers and floors, and keep everything that was found."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import einfall as ef
import torch
from einfall.compiler.executable import Executable

from benchmarks.case import Aim, Case, Function, Group, Peer, Size, Tensors, as_tuple
from benchmarks.cases import cases
from benchmarks.floors import Floor, bandwidths, floor_ms, micro_kernel, torch_products
from benchmarks.protocol import ROUNDS, Clock, Samples, Subject, interleave

DEFAULT, TUNED = "einfall", "einfall tuned"
INDUCTOR, METASCHEDULE = "inductor", "MetaSchedule"
TOLD = ("trials", "failures", "seconds", "best_ms", "default_ms", "speedup", "interrupted", "finals")  # of a tuning run
# How far a result may be off: so many times torch's own error, or so many roundings of its type; whole numbers and minifloats not at all.
TORCH_ERRORS = 4.0
ROUNDINGS = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 1.0}


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. `only` is a pattern such as `*decode*`; `budget_s` bounds the timing of a row by the clock in use."""

    size: Size = "short"
    only: str = "*"
    rounds: int = ROUNDS
    budget_s: float = 5.0
    inductor: bool = True
    database: Path | None = None
    tune: int = 0
    metaschedule: int = 0
    one_thread: bool = False

    @property
    def clock(self) -> Clock:
        """Wall-clock time, or with one thread the time its processor spent on it."""
        return time.thread_time if self.one_thread else time.perf_counter

    def chosen(self) -> list[Case]:
        """The cases that match the pattern."""
        return [c for c in cases(self.size) if self.matches(c.name)]

    def matches(self, name: str) -> bool:
        """Whether a row of that name is asked for."""
        return fnmatch.fnmatchcase(name, self.only)


@dataclass(slots=True)
class Row:
    """What was found about one case. `failed` says why it could not be timed; `skipped` names peers that are missing, and why.

    `own` are the peers that are kernels of ours, `same` tells that the database knows no better schedule than the default, `tuning` how
    the search for one went.
    """

    name: str
    group: Group
    dtype: str
    flops: float
    bytes: float
    peers: tuple[str, ...]
    own: tuple[str, ...] = ()
    aims: tuple[Aim, ...] = ()
    floors: tuple[tuple[str, str, float], ...] = ()
    samples: dict[str, Samples] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: str = ""
    same: bool = False
    tuning: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The peer that the picture is scaled by: the first that was timed, or our own default."""
        return next((name for name in self.peers if name in self.samples), DEFAULT)

    @property
    def subjects(self) -> list[str]:
        """What was timed, floors apart; ours first."""
        floors = {name for name, _, _ in self.floors}
        return [name for name in self.samples if name not in floors]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, raw samples and figures included."""
        known = {k: v for k, v in asdict(self).items() if k not in ("samples", "floors", "aims")}
        floors = [{"name": name, "kind": kind, "amount": amount} for name, kind, amount in self.floors]
        aims = [asdict(aim) for aim in self.aims]
        samples = [s.to_dict() for s in self.samples.values()]
        return {**known, "floors": floors, "aims": aims, "subjects": samples, "figures": figures(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        known = {k: v for k, v in data.items() if k not in ("floors", "aims", "subjects", "figures", "peers", "own")}
        samples = {s["name"]: Samples(s["name"], tuple(s["samples_ms"]), s["calls"]) for s in data["subjects"]}
        return Row(
            **known,
            peers=tuple(data["peers"]),
            own=tuple(data["own"]),
            aims=tuple(Aim(**aim) for aim in data["aims"]),
            floors=tuple((f["name"], f["kind"], f["amount"]) for f in data["floors"]),
            samples=samples,
        )


def figures(row: Row) -> dict[str, Any]:
    """What a row says: rates, the share of the peak, the distance to the floor and to the peers, by medians. Empty if it failed.

    What the machine can do is the fastest of the floor's samples: a short sample that was interrupted says nothing about it.
    """
    if row.failed or DEFAULT not in row.samples:
        return {}
    rates = {(kind, name): amount / row.samples[name].fastest / 1e6 for name, kind, amount in row.floors}
    peaks: dict[Any, float] = {kind: max(v for (k, _), v in rates.items() if k == kind) for kind, _ in rates}
    least = floor_ms(row.flops, row.bytes, peaks)
    found: dict[str, Any] = {"floor_ms": least, "peaks": peaks}
    timed = [name for name in (*row.peers, INDUCTOR, METASCHEDULE) if name in row.samples]
    best = min(timed, key=lambda name: row.samples[name].median, default=None)
    for name in (DEFAULT, TUNED):
        if name not in row.samples:
            continue
        ours = row.samples[name]
        found[name] = {
            "ms": ours.median,
            "spread": ours.spread,
            "gflops": row.flops / ours.median / 1e6,
            "gbytes": row.bytes / ours.median / 1e6,
            "of_peak": row.flops / ours.median / 1e6 / peaks[row.dtype] if row.dtype in peaks else None,
            "of_roof": row.bytes / ours.median / 1e6 / peaks["bytes"] if "bytes" in peaks else None,
            "over_floor": ours.median / least if least else None,
            "speed": {peer: row.samples[peer].median / ours.median for peer in timed},
            "best_peer": best,
        }
        found[name]["aims"] = [{"aim": a.text, "reached": a.reached(found[name]), "met": a.met(found[name])} for a in row.aims]
    return found


class Runner:
    """Runs rows one after the other and remembers what does not work on this machine. `say` is told of progress."""

    device = "cpu"
    on_event: Callable[[Any], None] | None = None  # told of what happens while a row is tuned

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        self.kernels = [micro_kernel("f32")]
        try:
            self.kernels.append(micro_kernel("bf16"))
        except ef.UnsupportedError as error:
            say(f"no bf16 peak: {error}")
        self.bandwidths = bandwidths()
        self._inductor_problem = "" if options.inductor else "not asked for"
        self._inductor_works = False

    def limits(self) -> list[tuple[Floor, Samples]]:
        """Every floor, measured in turns."""
        everything = [*self.kernels, *torch_products("f32"), *torch_products("bf16"), *self.bandwidths]
        samples = interleave([f.subject for f in everything], rounds=self.options.rounds, clock=self.options.clock)
        return [(f, samples[f.name]) for f in everything]

    def run(self, case: Case) -> Row:
        """One row. What the compiler refuses or gets wrong is a failed row, not the end of the run."""
        names, own = tuple(p.name for p in case.peers), tuple(p.name for p in case.peers if p.own)
        row = Row(case.name, case.group, case.dtype, case.flops, case.bytes, names, own, case.aims)
        tensors = case.tensors(device=self.device)
        try:
            executables = self._executables(case, tensors, row)
        except ef.EinfallError as error:
            row.failed = str(error)
            return row
        allowed = allowed_errors(case, tensors)
        subjects = []
        for name, executable in executables.items():
            errors = largest_errors(case, tensors, executable(*tensors, **case.scalars))
            row.kernels[name] |= {"errors": errors, "allowed_errors": allowed}
            row.failed = wrong(name, errors, allowed)
            if row.failed:
                return row
            subjects.append(Subject(name, lambda e=executable: e(*tensors, **case.scalars)))
        subjects += self._peers(case, tensors, row, allowed)
        floors = [f for f in self.kernels if f.kind == case.dtype]
        floors += [f for f in self.bandwidths if f.name == case.roof]
        row.floors = tuple((f.name, f.kind, f.amount) for f in floors)
        subjects += [f.subject for f in floors]
        row.samples = interleave(subjects, rounds=self.options.rounds, budget_s=self.options.budget_s, clock=self.options.clock)
        return row

    def _executables(self, case: Case, tensors: Sequence[torch.Tensor], row: Row) -> dict[str, Executable]:
        """The default schedule's kernel, and that of the database where it knows a better one."""
        database = self.options.database
        if database is not None and self.options.tune:
            self._tune(case, tensors, row, database)
        found = {}
        for name, place in ((DEFAULT, None), (TUNED, database)):
            if name == TUNED and place is None:
                continue
            with ef.configure(database=place):
                start = time.perf_counter()
                executable = case.kernel.compile(*tensors, **case.scalars)
                seconds = time.perf_counter() - start
            if name == TUNED and executable.schedule == found[DEFAULT].schedule:
                row.same = True
                continue
            found[name] = executable
            row.kernels[name] = {"schedule": executable.schedule.to_dict(), "facts": executable.facts, "compile_s": seconds}
        return found

    def _tune(self, case: Case, tensors: Tensors, row: Row, database: Path) -> None:
        """Search, and keep in the row how it went; what cannot be tuned is timed with the default schedule."""
        self.say(f"tuning {case.name}: {self.options.tune} trials")
        try:
            result = case.kernel.tune(*tensors, **case.scalars, trials=self.options.tune, database=database, on_event=self.on_event)
        except ef.EinfallError as error:
            row.skipped[TUNED] = str(error)
            self.say(f"not tuned: {str(error).splitlines()[0]}")
            return
        row.tuning = {k: v for k, v in result.to_dict().items() if k in TOLD}
        gain = "" if result.speedup is None else f", {result.speedup:.2f}× the default in its finals"
        self.say(f"tuned in {result.seconds:.0f} s: {row.tuning['trials']} trials, {result.failures} failed{gain}")

    def _peers(self, case: Case, tensors: Tensors, row: Row, allowed: Sequence[float]) -> list[Subject]:
        subjects = []
        for peer in case.peers:
            run = self._peer(case, peer, tensors, row, allowed)
            if run is not None:
                subjects.append(Subject(peer.name, run))
        others = ((INDUCTOR, self._inductor(case, tensors, row)), (METASCHEDULE, self._metaschedule(case, row)))
        return subjects + [Subject(name, lambda f=function: f(*tensors)) for name, function in others if function is not None]

    def _peer(self, case: Case, peer: Peer, tensors: Tensors, row: Row, allowed: Sequence[float]) -> Callable[[], object] | None:
        """The peer on its tensors, or None with the reason in the row.

        A kernel of ours is checked as well, and has the best schedule that the database knows.
        """
        given = peer.arrange(tensors)
        if not peer.own:
            return lambda: peer.run(*given)
        try:
            with ef.configure(database=self.options.database):
                executable = peer.run.compile(*given, **peer.scalars)
        except ef.EinfallError as error:
            row.skipped[peer.name] = str(error)
            return None
        problem = wrong(peer.name, largest_errors(case, tensors, executable(*given, **peer.scalars)), allowed)
        if problem:
            row.skipped[peer.name] = problem
            return None
        return lambda: executable(*given, **peer.scalars)

    def _metaschedule(self, case: Case, row: Row) -> Function | None:
        """What MetaSchedule finds for f32 prefill attention, or None with the reason in the row where it was asked for."""
        if not self.options.metaschedule:
            return None
        if case.group != "prefill" or case.dtype != "f32":
            row.skipped[METASCHEDULE] = "searched for f32 prefill attention only"
            return None
        from benchmarks.metaschedule import tuned_attention

        trials = self.options.metaschedule
        self.say(f"MetaSchedule on {case.name}: {trials} trials")
        try:
            return tuned_attention(case.shape, case.scalars["scale"], causal=case.causal, trials=trials)
        except Exception as error:  # its workers may time out or die on a busy machine; the other peers are still of interest
            row.skipped[METASCHEDULE] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            self.say(f"MetaSchedule found nothing: {row.skipped[METASCHEDULE]}")
            return None

    def _inductor(self, case: Case, tensors: Sequence[torch.Tensor], row: Row) -> Function | None:
        """The eager function under torch.compile, or None with the reason in the row."""
        if not self._inductor_problem:
            torch._dynamo.reset()  # else shapes met before count against the limit of recompilations
            compiled = torch.compile(case.eager, dynamic=False)
            try:
                compiled(*tensors)
                self._inductor_works = True
                return compiled
            except Exception as error:  # whatever torch.compile or its C++ compiler raise, the other peers are still of interest
                row.skipped[INDUCTOR] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                self.say(f"torch.compile does not work here and is left out: {row.skipped[INDUCTOR]}")
                if not self._inductor_works:  # then it will not for other rows
                    self._inductor_problem = row.skipped[INDUCTOR]
                return None
        row.skipped[INDUCTOR] = self._inductor_problem
        return None


def largest_errors(case: Case, tensors: Tensors, results: Any) -> list[float]:
    """For each result, the largest distance of the checked part from float64; NaN where one side is NaN alone."""
    found = []
    for part, right in case.check(tensors, as_tuple(results)):
        got, wanted = part.double(), right.double()
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        found.append(float(torch.where(same, 0.0, (got - wanted).abs()).max()))
    return found


def allowed_errors(case: Case, tensors: Tensors) -> list[float]:
    """For each result, a few times what torch's own peer is off, or some roundings of the largest value; nothing where it is exact."""
    theirs = as_tuple(case.eager(*tensors))
    found = []
    for error, (part, right) in zip(largest_errors(case, tensors, theirs), case.check(tensors, theirs), strict=True):
        if part.dtype in ROUNDINGS:
            rounding = torch.finfo(part.dtype).eps * float(right.double().abs().max())
            found.append(max(TORCH_ERRORS * error, ROUNDINGS[part.dtype] * rounding))
        else:
            found.append(0.0)
    return found


def wrong(name: str, errors: Sequence[float], allowed: Sequence[float]) -> str:
    """What is wrong with results that are off by so much; empty if nothing is. A peer may give only the first results."""
    for i, (error, most) in enumerate(zip(errors, allowed, strict=False)):
        if not error <= most:
            return f"{name} is wrong: result {i} is off by {error:.3g}, allowed {most:.3g}"
    return ""
