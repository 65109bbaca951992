"""Runs rows on a CUDA device. What differs from the CPU: the clock waits for the device, the limits are its own, any error is a row's."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import einfall as ef
import torch
from einfall.compiler.executable import Executable
from einfall.tuner.tune import Done, Finals, Started

from benchmarks.case import Case, Peer, Tensors
from benchmarks.cuda_cases import BARE, TRITON, cuda_rows
from benchmarks.floors import Floor
from benchmarks.protocol import Clock, Subject, interleave
from benchmarks.run import DEFAULT, Options, Row, Runner, allowed_errors, largest_errors, wrong

GIB = 1 << 30
MATMUL = 8192
TUNING = 0.5  # of a row's time


@dataclass(frozen=True, slots=True)
class CudaOptions(Options):
    """What to run on which device. `seconds` is what a row may take in all."""

    device: str = "cuda"
    seconds: float = 60.0

    @property
    def clock(self) -> Clock:
        """Wall-clock time when the device has done what it was told."""
        return time.perf_counter if self.device == "cpu" else waited

    def chosen(self) -> list[Case]:
        """The rows that match the pattern."""
        return [c for c in cuda_rows(self.size) if self.matches(c.name)]


def waited() -> float:
    """The time, once the device has nothing left to do."""
    torch.cuda.synchronize()
    return time.perf_counter()


class CudaRunner(Runner):
    """Runs rows on the device of the options."""

    def __init__(self, options: CudaOptions, say: Callable[[str], None]) -> None:
        self.options: CudaOptions = options
        self.say = say
        self.device = options.device
        self.kernels = [matmul(self.device, 64 if options.size == "tiny" else MATMUL)]
        self.bandwidths = streams(self.device, 1 << 16 if options.size == "tiny" else GIB)
        self._inductor_problem, self._inductor_works = "FlexAttention is compiled by it; the eager function is not", False
        self._began = time.monotonic()
        self.on_event = self._until

    def run(self, case: Case) -> Row:
        """One row; whatever goes wrong is said in it."""
        self._began = time.monotonic()
        try:
            return self._dispatch(case) if case.group == "dispatch" else super().run(case)
        except Exception as error:  # an error of the driver, of PyTorch or of a compiler: the other rows are still of interest
            names = tuple(p.name for p in case.peers)
            own = tuple(p.name for p in case.peers if p.own)
            row = Row(case.name, case.group, case.dtype, case.flops, case.bytes, names, own, case.aims)
            row.failed = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
            return row

    def _until(self, event: object) -> None:
        """Ends a search whose row has used up what may go into tuning; what it has found is kept."""
        if not isinstance(event, (Started, Finals, Done)) and time.monotonic() - self._began > TUNING * self.options.seconds:
            raise KeyboardInterrupt

    def _peer(self, case: Case, peer: Peer, tensors: Tensors, row: Row, allowed: Sequence[float]) -> Callable[[], object] | None:
        """The peer, if it runs here; else the reason in the row."""
        try:
            run = super()._peer(case, peer, tensors, row, allowed)
            if run is not None:
                run()
                self.options.clock()
            return run
        except Exception as error:  # a backend that this GPU or this PyTorch lacks
            row.skipped[peer.name] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            return None

    def _dispatch(self, case: Case) -> Row:
        """What a call costs the processor: of the kernel, of its executable, of the bare launch, and of Triton's own launcher."""
        row = Row(case.name, case.group, case.dtype, case.flops, case.bytes, (BARE, TRITON), (), case.aims)
        tensors = case.tensors(device=self.device)
        with ef.configure(database=None):
            executable = case.kernel.compile(*tensors, **case.scalars)
            errors, allowed = largest_errors(case, tensors, executable(*tensors, **case.scalars)), allowed_errors(case, tensors)
            row.failed = wrong(DEFAULT, errors, allowed)
            row.kernels[DEFAULT] = {"schedule": executable.schedule.to_dict(), "errors": errors, "allowed_errors": allowed}
            subjects = [
                Subject(DEFAULT, lambda: case.kernel(*tensors, **case.scalars)),
                Subject("executable", lambda: executable(*tensors, **case.scalars)),
            ]
            for name, made in ((BARE, bare_launch), (TRITON, triton_launch)):
                try:
                    subjects.append(Subject(name, made(executable, tensors, case.scalars)))
                    subjects[-1].run()
                except Exception as error:
                    row.skipped[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                    subjects = [s for s in subjects if s.name != name]
            if not row.failed:  # the clock does not wait for the device: what is timed is the processor
                row.samples = interleave(subjects, rounds=self.options.rounds, budget_s=self.options.budget_s)
        return row


def matmul(device: str, n: int) -> Floor:
    """The peak of bf16 products, by torch's own of large matrices."""
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return Floor(f"bf16 torch.matmul {n}", "bf16", 2.0 * n**3, lambda: a @ b)


def streams(device: str, size: int) -> tuple[Floor, ...]:
    """A copy (bytes read and written both count) and a read of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    copy = torch.empty_like(source)
    return (
        Floor("copy", "bytes", 2.0 * size, lambda: copy.copy_(source)),
        Floor("read", "bytes", 1.0 * size, lambda: source.sum()),
    )


def bare_launch(executable: Executable, tensors: Tensors, scalars: Any) -> Callable[[], object]:
    """The driver's launch of the only kernel with arguments that lie ready, and an output allocated as a call does it."""
    (part,) = executable.parts
    launcher = part.function(executable.sizes)
    (output,) = executable.bind(tensors).allocated
    shape, dtype, device = *output, tensors[0].device
    result = torch.empty(shape, dtype=dtype, device=device)
    bound = launcher.bound([(tuple(t.shape), t.stride()) for t in (*tensors, result)])
    launch = bound.prepared(*tensors, result, *scalars.values())

    def run() -> object:
        torch.empty(shape, dtype=dtype, device=device)
        return launch()

    return run


def triton_launch(executable: Executable, tensors: Tensors, scalars: Any) -> Callable[[], object]:
    """The same kernel through Triton's just-in-time launcher, with an output allocated alike."""
    from einfall.backends.triton.signature import signature_of

    (part,) = executable.parts
    signature = signature_of(part.source)
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(part.source.text)
    spec = importlib.util.spec_from_file_location("emitted", file.name)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    kernel = getattr(module, signature.entry)
    (output,) = executable.bind(tensors).allocated
    shape, dtype, device = *output, tensors[0].device
    given = {t.name: x for t, x in zip(signature.tensors, (*tensors, torch.empty(shape, dtype=dtype, device=device)), strict=True)}
    extents = signature.extents([tuple(x.shape) for x in given.values()])
    arguments = [
        given[p.of] if p.kind == "pointer" else given[p.of].stride(p.axis) if p.kind == "stride" else extents[p.of]
        if p.kind == "extent" else scalars[p.of]
        for p in signature.parameters
    ]  # fmt: skip
    place = next(i for i, p in enumerate(signature.parameters) if p.of == signature.outputs[0].name and p.kind == "pointer")
    grid = (signature.programs(extents),)

    def run() -> object:
        arguments[place] = torch.empty(shape, dtype=dtype, device=device)
        return kernel[grid](*arguments, num_warps=signature.warps, num_stages=signature.stages)

    return run
