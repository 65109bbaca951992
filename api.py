"""The kernel: a cascade that is called, explained, compiled, checked and tuned.

    @ef.kernel
    def total(X: "i j", *, scale: float) -> "i": ...

A function is traced once for its static arguments and the types of its inputs. A call looks its signature up, and only a new one is
checked, traced, looked up in the database and compiled, for the device of its tensors. Under `torch.compile` and `torch.export` a call
is an operator of PyTorch (see `compiler.custom_op`).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compiler.definition import Asked, Definition, DtypeLike
from .configuration import Settings, current
from .ir.cascade import Cascade
from .ir.errors import DatabaseError, UnsupportedError
from .schedules.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from .compiler.executable import Bound, Executable
    from .compiler.report import Report
    from .schedules.target import Target
    from .tuner.compare import Comparison
    from .tuner.lookup import Lookup
    from .tuner.property_check import CheckReport, Trial
    from .tuner.tune import Event, TuneResult

MEMO_LIMIT = 4096  # signatures kept by a kernel


def _is_compiling() -> bool:
    """Whether PyTorch traces the caller. The first answer replaces this function by PyTorch's own, which is not imported before."""
    import torch

    if torch.compiler.is_compiling():
        return True
    Kernel._traced = staticmethod(torch.compiler.is_compiling)
    return False


def kernel(function: Callable[..., Any]) -> Kernel:
    """Make a kernel of a function on named ranks. Nothing is traced and nothing heavy imported before it is used."""
    return Kernel(function)


def parse(text: str, file: str = "<text>") -> Cascade:
    """The cascade that `text` spells; the inverse of `str(cascade)`. Raises `CascadeError` with the line and a caret."""
    from .ir.check import check_cascade
    from .ir.text import parse_cascade

    cascade = parse_cascade(text, file)
    check_cascade(cascade)
    return cascade


def load(folder: str | Path) -> Executable:
    """The executable that was saved in `folder`, without compiling. Raises `BuildError` for a folder that is damaged or foreign."""
    from .compiler.store import load_executable

    return load_executable(folder)


class Kernel:
    """See the module. Made by `@ef.kernel`, or from a cascade by `Kernel.from_cascade`."""

    _traced: Callable[[], bool] = staticmethod(_is_compiling)

    def __init__(self, function: Callable[..., Any] | None = None, *, cascade: Cascade | None = None) -> None:
        self._definition = Definition(function, cascade)
        self._parameters = self._definition.parameters
        self._names = frozenset(n for n, _ in (*self._parameters.scalars, *self._parameters.static))
        self._lock = threading.RLock()
        self._targets: dict[tuple[str, int | None], Target] = {}
        self._executables: dict[object, list[Executable]] = {}
        self._memo: dict[object, tuple[Executable, Bound]] = {}
        self._memo_settings: Settings | None = None
        if "torch" in sys.modules:
            _is_compiling()  # settled now, for what Dynamo traces depends on it
        if function is not None:
            functools.update_wrapper(self, function)

    @staticmethod
    def from_cascade(cascade: Cascade) -> Kernel:
        """A kernel of a cascade that came from text or from a pass."""
        from .ir.check import check_cascade

        check_cascade(cascade)
        return Kernel(cascade=cascade)

    @property
    def name(self) -> str:
        """The name of the function or cascade."""
        return self._definition.name

    def __repr__(self) -> str:
        return f"<einfall.Kernel {self.name}({', '.join(self._parameters.tensors)})>"

    # -- the cascade --------------------------------------------------------------------------------------------------------------

    @property
    def cascade(self) -> Cascade:
        """The cascade, with f32 inputs where the types are the caller's; static arguments take their defaults."""
        return self.trace()

    def trace(self, *, dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None, **static: int | bool) -> Cascade:
        """The cascade for these input types (f32 where not given) and static arguments.

        Raises `BindingError` for an unknown argument or type, `CascadeError` for a wrong program.
        """
        return self._definition.trace(dtypes, static)

    # -- calls --------------------------------------------------------------------------------------------------------------------

    def __call__(self, *tensors: torch.Tensor, out: Any = None, **named: Any) -> Any:
        """Run on tensors in the order of the inputs (or by name), scalars and static arguments by name, on the tensors' device.

        Compiles on the first call of a signature, with the best schedule known. Returns the output, or a tuple of them.
        """
        if self._traced():
            return self._call_operator(tensors, out, named)
        parameters = self._parameters
        try:
            key = (
                tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]),
                tuple([named.get(name, default) for name, default in parameters.static]) if parameters.static else (),
            )
            executable, bound = self._memo[key]
            scalars = [convert(named.get(name, default)) for name, default, convert in parameters.numbers]
            known = self._memo_settings is current() and named.keys() <= self._names
        except (KeyError, AttributeError, RuntimeError, TypeError, ValueError):
            known = False
        if known:
            return executable.launch(bound, tensors, scalars, out)
        return self._call_first(tensors, out, named)  # something is new or wrong: look closely, outside of the handler

    def _call_first(self, tensors: Sequence[Any], out: Any, named: Mapping[str, Any]) -> Any:
        call = self._definition.sort(tensors, named)
        asked = call.asked()
        target = self._own_target(call.tensors, call.cascade.name)
        with self._lock:
            if self._memo_settings is not current():
                self._memo.clear()
                self._memo_settings = current()
            executable = self._executable(asked, target, None)
            bound = executable.bind(call.tensors)
            if len(self._memo) >= MEMO_LIMIT:
                self._memo.clear()
            signature = tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in call.tensors])
            self._memo[(signature, tuple(call.static.values()))] = (executable, bound)
        return executable.launch(bound, call.tensors, call.scalars, out)

    def _call_operator(self, tensors: tuple[torch.Tensor, ...], out: Any, named: Mapping[str, Any]) -> Any:
        """A call that PyTorch traces, as one of an operator. Written for Dynamo, which runs it with tensors that have no elements."""
        import torch

        parameters = self._parameters
        given = [*tensors, *[named[name] for name in parameters.tensors[len(tensors) :] if name in named]]
        static = tuple([(name, named[name]) for name, _ in parameters.static if name in named])
        name = self._operator(tuple([t.dtype for t in given]), len(tensors), tuple(named), static)
        scalars = [named.get(name, default) for name, default, _ in parameters.numbers]
        numbers = [x if isinstance(x, (int, float)) else float(x) for x in scalars]
        results = getattr(torch.ops.einfall, name).default(*given, *numbers)
        if out is None:
            return results
        if isinstance(results, torch.Tensor):
            return out.copy_(results)
        return tuple([memory.copy_(result) for memory, result in zip(out, results, strict=True)])

    def _operator(self, dtypes: Sequence[torch.dtype], placed: int, names: Sequence[str], static: Sequence[tuple[str, Any]]) -> str:
        """The name of the operator for inputs of these types; `placed` of them are given by position, `names` are given by name."""
        import torch

        from .compiler.custom_op import operator_of

        shells = [torch.empty((), dtype=t, device="meta") for t in dtypes]
        tensors = [name for name in self._parameters.tensors[placed:] if name in names]
        named = {**dict.fromkeys(names, 1.0), **dict(zip(tensors, shells[placed:], strict=True)), **dict(static)}
        cascade = self._definition.sort(shells[:placed], named).cascade
        ordered = [s.name for s in cascade.scalars]

        def run(tensors: Sequence[torch.Tensor], scalars: Sequence[Any]) -> Any:
            return self(*tensors, **dict(zip(ordered, scalars, strict=True)), **dict(static))

        return operator_of(cascade, run)

    # What torch.compiler.assume_constant_result says of a function: Dynamo calls it while it traces, and keeps the answer.
    _operator._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def reference(self, *tensors: torch.Tensor, dtype: torch.dtype | None = None, **named: Any) -> Any:
        """Eager PyTorch, statement by statement, in the declared types; with `dtype=torch.float64` the oracle.

        With float64 the tensors may be float64 as well as the declared types.
        """
        from .ir.reference import evaluate

        call = self._definition.sort(tensors, named)
        scalars = {s.name: value for s, value in zip(call.cascade.scalars, call.scalars, strict=True)}
        results = evaluate(call.cascade, call.by_name, scalars, dtype=dtype)
        found = tuple(results[o.name] for o in call.cascade.outputs)
        return found[0] if len(found) == 1 else found

    def _own_target(self, tensors: Sequence[torch.Tensor], cascade: str) -> Target:
        """The target for where the tensors lie. Raises `UnsupportedError` naming the first, if kernels do not run there."""
        from .compiler.devices import device_of, target_for

        try:
            return self._target(target_for(device_of(tensors), self._parameters.tensors[0] if tensors else ""))
        except UnsupportedError as error:
            raise UnsupportedError(error.what, cascade=cascade, hint=error.hint) from None

    def _asked_target(self, target: str | None, tensors: Sequence[Any], named: Mapping[str, Any]) -> Target:
        """The target of that name; without one, that of the device of the tensors, or the CPU where there are none."""
        if target is not None:
            return self._target(target)
        given = [*tensors, *(named[name] for name in self._parameters.tensors if name in named)]
        return self._own_target(given, self.name) if given else self._target("cpu")

    def _target(self, target: str | Target) -> Target:
        """A target by name with the threads of the settings, one object for each, so that look-ups can remember it."""
        if not isinstance(target, str):
            return target
        key = (target, current().threads)
        with self._lock:
            if key not in self._targets:
                from .schedules.target import load_target

                self._targets[key] = _with_threads(load_target(target), current().threads)
            return self._targets[key]

    def _executable(self, asked: Asked, target: Target, schedule: Schedule | None, *, look_up: bool = True) -> Executable:
        """The executable for these extents and layouts: one built before if it serves them, else a new one.

        Without a schedule the database is asked, unless `look_up` is False; the default is taken where that knows nothing.
        """
        from .compiler.driver import compile_cascade
        from .tuner.database.records import bucket_text, extents_of

        cascade, sizes = asked.cascade, asked.sizes
        given = schedule is not None
        if schedule is None and look_up:
            schedule = _known_schedule(cascade, sizes, target)
        key = (cascade, target.hash, None if schedule is None else schedule.hash, bucket_text(extents_of(cascade, sizes)), current().cache)
        with self._lock:
            built = self._executables.setdefault(key, [])
            for executable in built:
                if executable.fits(sizes, asked.strided):
                    return executable
            executable = compile_cascade(
                cascade, sizes=sizes, target=target, schedule=schedule, fall_back=not given, strided=asked.strided
            )
            built.append(executable)
            return executable

    # -- everything about it ------------------------------------------------------------------------------------------------------

    def explain(
        self,
        *tensors: torch.Tensor,
        target: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None,
        show: bool = True,
        **named: Any,
    ) -> Report:
        """What the compiler makes of the cascade on a target: passes before and after, rewrites, kernels, traffic, roofline.

        Give tensors, or `dims` and `dtypes`; without all extents the figures in bytes are left out. Without a target it is that of the
        tensors' device, or the CPU. Prints the report unless `show` is False, and returns it: `.to_dict()`, `.to_html()`.
        """
        from .compiler.report import explain

        if self._definition.gives_tensors(tensors, named):
            asked = self._definition.describe(tensors, named, dims, dtypes)
        else:
            asked = Asked(self._definition.trace(dtypes, self._definition.split(named)[1]), dict(dims or {}))
        report = explain(asked.cascade, asked.sizes, self._asked_target(target, tensors, named))
        if show:
            report.print()
        return report

    def compile(
        self,
        *tensors: torch.Tensor,
        target: str | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        dims: Mapping[str, int] | None = None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None,
        **named: Any,
    ) -> Executable:
        """Build for these extents, for the tensors' device or the CPU if no target is given. Without a schedule the best known is taken,
        else the default.

        Raises `UnsupportedError` where the target cannot, `ScheduleError` for a schedule that is not legal, `BuildError` from its tools.
        """
        asked = self._definition.describe(tensors, named, dims, dtypes)
        chosen = Schedule.from_dict(schedule) if isinstance(schedule, Mapping) else schedule
        return self._executable(asked, self._asked_target(target, tensors, named), chosen)

    def tune(
        self,
        *tensors: torch.Tensor,
        target: str | None = None,
        trials: int = 64,
        database: str | Path | None = None,
        seed: int = 0,
        resume: bool = False,
        dims: Mapping[str, int] | None = None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None,
        on_event: Callable[[Event], None] | None = None,
        **named: Any,
    ) -> TuneResult:
        """Search for the fastest schedule at these extents on this machine and record it; the next call picks it up.

        Args:
            trials: candidates to measure at most.
            database: the file to record in; that of the settings if None.
            resume: whether candidates that the database knows already count as measured.
            on_event: told of everything as it happens.

        Raises `DatabaseError` if the file cannot be used, `BuildError` if no candidate ran and was right.
        """
        from .tuner.tune import tune

        place = current().database if database is None else Path(database)
        if place is None:
            raise DatabaseError("no tuning database is set", hint="database=..., or EINFALL_DB")
        asked = self._definition.describe(tensors, named, dims, dtypes)
        cascade, sizes = asked.cascade, asked.sizes
        machine = self._asked_target(target, tensors, named)
        scalars = {s.name: float(self._definition.split(named)[0].get(s.name, 1.0)) for s in cascade.scalars}
        try:
            return tune(
                cascade, sizes=sizes, target=machine, database=place, scalars=scalars, trials=trials, seed=seed,
                on_event=on_event, resume=resume, threads=current().threads,
            )  # fmt: skip
        finally:
            with self._lock:
                self._memo.clear()
            if place == current().database:
                _lookup(place).forget()

    def check(
        self,
        *tensors: torch.Tensor,
        target: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None,
        trials: int = 10,
        seed: int = 0,
        on_trial: Callable[[Trial], None] | None = None,
        **named: Any,
    ) -> CheckReport:
        """Compare the kernel with the reference in float64 over `trials` sets of random extents and values.

        `dims` fixes extents and `named` scalars; what is left open is drawn. With tensors, their extents and types are the fixed ones.
        """
        from .tuner.property_check import check_kernel

        scalars, static = self._definition.split(named)
        if self._definition.gives_tensors(tensors, named):
            asked = self._definition.describe(tensors, named, dims, dtypes)
            cascade, fixed = asked.cascade, asked.sizes
        else:
            cascade, fixed = self._definition.trace(dtypes, static), dict(dims or {})
        machine = self._asked_target(target, tensors, named)

        def build(sizes: Mapping[str, int]) -> Executable:
            return self._executable(Asked(cascade, sizes), machine, None)

        return check_kernel(
            cascade, build, target=machine.name, scalars=scalars, fixed=fixed, trials=trials, seed=seed, on_trial=on_trial
        )

    def bench(
        self,
        *tensors: torch.Tensor,
        target: str | None = None,
        dims: Mapping[str, int] | None = None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None = None,
        compiled: bool = False,
        cold: bool = False,
        seed: int = 0,
        peers: Sequence[tuple[str, Callable[..., object]]] = (),
        **named: Any,
    ) -> Comparison:
        """Time the kernel against its default schedule, eager PyTorch and `peers`, interleaved in one run, beside the roofline.

        Args:
            compiled: whether the reference under torch.compile competes as well.
            cold: whether inputs are kept out of the last-level cache.
            peers: names and functions of the input tensors, in order.
        """
        from .compiler.cost import roofline
        from .tuner.compare import compare

        asked = self._definition.describe(tensors, named, dims, dtypes)
        cascade, sizes, machine = asked.cascade, asked.sizes, self._asked_target(target, tensors, named)
        best = self._executable(Asked(cascade, sizes), machine, None)
        default = self._executable(Asked(cascade, sizes), machine, None, look_up=False)
        tuned = best.schedule != default.schedule
        return compare(
            cascade,
            sizes,
            [("tuned", best), ("default", default)] if tuned else [("default", default)],
            scalars={s.name: float(self._definition.split(named)[0].get(s.name, 1.0)) for s in cascade.scalars},
            roofline_ms=roofline(cascade, sizes, machine).time_us / 1e3,
            compiled=compiled,
            peers=peers,
            cache_bytes=max((c.bytes for c in machine.caches), default=0) if cold else 0,
            seed=seed,
        )

@functools.cache
def _lookup(path: Path) -> Lookup:
    """The look-ups of a database, one object a file, which keeps its connection and its answers."""
    from .tuner.lookup import Lookup

    return Lookup(path)


def _known_schedule(cascade: Cascade, sizes: Mapping[str, int], target: Target) -> Schedule | None:
    database = current().database
    if database is None:
        return None
    found = _lookup(database).find(cascade, sizes, target)
    return None if found is None else found.schedule


def _with_threads(target: Target, threads: int | None) -> Target:
    """A CPU with that many workers."""
    if threads is None or target.kind != "cpu":
        return target
    limits = {**dict(target.limits), "threads": threads}
    return replace(target, limits=tuple(sorted(limits.items())))
