"""The correctness gate: no candidate may win that has not passed it.

Fresh random inputs of several distributions and shapes; outputs poisoned and framed by guard bands; results against the reference
in float64; two runs that must agree to the bit. An error is measured relative to the largest magnitude of its output, and allowed is

    2 * (error of the eager reference in the declared types) + (conditioning) + (rounding of the output)

Conditioning is what the float64 result changes when each input moves by its own rounding, and when each sum over a rank of n elements
is off by sqrt(n) / 2 roundings of f32, as it is when it is summed in another order than eager's. So an ill-conditioned cascade is not
held to more than its inputs say. Where the float64 reference is NaN anything may stand;
where it is infinite, the same infinity or NaN.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from ..compiler.binding import complete_sizes, shape_of
from ..ir.binding import bind_sizes, to_torch
from ..ir.cascade import Cascade, Einsum, Scan
from ..ir.errors import BindingError
from ..ir.infer import declared_types
from ..ir.reference import evaluate
from ..ir.types import DType
from .database.records import Evidence
from .inputs import DISTRIBUTIONS, Distribution, has_holes, make_inputs
from .shapes import Sizes, flatten, over_of, shapes_for

GUARD_BYTES = 256
MAX_MOVES = 3  # ranks whose order of summation is looked at


class Rejected(Exception):
    """A candidate that did not pass, and why."""

    def __init__(self, status: Literal["wrong", "nondeterministic"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Candidate(Protocol):
    """A built kernel, or something that stands in for one. `static` gives the extents it was specialised to."""

    @property
    def static(self) -> Mapping[str, int]: ...

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Expected:
    """What one output should be: the float64 reference, the eager one, and the error that is allowed."""

    name: str
    dtype: DType
    exact: torch.Tensor
    eager: torch.Tensor
    scale: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs with what should come out."""

    distribution: Distribution
    sizes: tuple[tuple[str, int], ...]
    inputs: tuple[torch.Tensor, ...]
    expected: tuple[Expected, ...]


class Oracle:
    """The cases of a cascade, worked out once and kept for all candidates."""

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int], scalars: Mapping[str, float], seed: int) -> None:
        self.cascade = cascade
        self.sizes = complete_sizes(cascade, {r: n for r, n in sizes.items() if r in {x for t in cascade.inputs for x in t.ranks}})
        self.scalars = dict(scalars)
        self.seed = seed
        self._cases: dict[tuple[object, ...], Case | None] = {}
        self._first: dict[str, dict[str, Expected]] = {}  # the outputs at the first shape of each distribution

    def cases(self, static: Mapping[str, int]) -> list[Case]:
        """The cases for a candidate specialised to `static`: the asked shape (cut if it is too large for the reference), and odd ones."""
        shapes = shapes_for(self.cascade, self.sizes, static)
        plan = [(shape, d) for i, shape in enumerate(shapes) for d in (("normal", "offset") if i == 0 else DISTRIBUTIONS)]
        if len(shapes) == 1:
            plan = [(shapes[0], d) for d in DISTRIBUTIONS]
        return [case for shape, d in plan if (case := self._case(shape, d)) is not None]

    def asked(self, like: Case) -> Case:
        """Normal inputs at the asked shape, without a reference: only shapes and types are expected."""
        key = ("asked",)
        if key not in self._cases:
            tensors = make_inputs(self.cascade, self.sizes, "normal", self.seed)
            expected = tuple(
                replace(e, exact=torch.empty(shape_of(o.axes, self.sizes), device="meta"))
                for e, o in zip(like.expected, self.cascade.outputs, strict=True)
            )
            self._cases[key] = Case("normal", tuple(self.sizes.items()), tuple(tensors[t.name] for t in self.cascade.inputs), expected)
        return self._cases[key] or like

    def _case(self, sizes: Sizes, distribution: Distribution) -> Case | None:
        key = (distribution, *sizes.items())
        if key not in self._cases:
            self._cases[key] = self._make(sizes, distribution)
        return self._cases[key]

    def _make(self, sizes: Sizes, distribution: Distribution) -> Case | None:
        """A case that tells something, that is, has finite results; None if the distribution gives none."""
        seed = int.from_bytes(hashlib.sha256(repr((self.seed, distribution, sorted(sizes.items()))).encode()).digest()[:4], "big")
        holed = [t.name for t in self.cascade.inputs if has_holes(t.dtype)] if distribution == "holes" else [None]
        for name in holed:
            tensors = make_inputs(self.cascade, sizes, distribution, seed, holed=name)
            try:
                expected = expectations(self.cascade, tensors, self.scalars, seed, self._first.get(distribution, {}))
            except BindingError:  # an index that is computed from inputs left its tensor: such inputs are not this cascade's
                continue
            told = sum(int(torch.isfinite(e.exact.double()).sum()) for e in expected)
            if told * 10 >= sum(e.exact.numel() for e in expected):
                self._first.setdefault(distribution, {e.name: e for e in expected})
                return Case(distribution, tuple(sizes.items()), tuple(tensors[t.name] for t in self.cascade.inputs), expected)
        return None


def verify(candidate: Candidate, oracle: Oracle) -> Evidence:
    """The evidence that `candidate` is right. Raises `Rejected` naming the first case that speaks against it."""
    cases = oracle.cases(candidate.static)
    if not cases:
        raise Rejected("wrong", "no input distribution gives a finite reference, so nothing can be checked")
    checked = [pair for case in cases for pair in _check(candidate, case)]
    nearest, error = max(checked, key=lambda pair: pair[1] / pair[0].tolerance)
    _check_asked(candidate, oracle, cases)
    return Evidence(
        seeds=(oracle.seed,),
        distributions=tuple(dict.fromkeys(case.distribution for case in cases)),
        shapes=tuple(dict.fromkeys(case.sizes for case in cases)),
        tolerance=nearest.tolerance,
        largest_error=error,
    )


def expectations(
    cascade: Cascade,
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float],
    seed: int,
    first: Mapping[str, Expected],
) -> tuple[Expected, ...]:
    """What the outputs should be for these inputs.

    `first` has the same outputs at a shape that is not degenerate. No less is allowed than there: where every extent is 1 the eager
    reference may be exact by luck, the difference of two large numbers being zero.
    """
    exact = evaluate(cascade, tensors, scalars, dtype=torch.float64)
    eager = evaluate(cascade, tensors, scalars)
    moves = (None, *_summed_ranks(cascade)[:MAX_MOVES])
    moved = [evaluate(cascade, _moved(cascade, tensors, seed, rank), scalars, dtype=torch.float64) for rank in moves]
    types = declared_types(cascade)
    found = []
    for output in cascade.outputs:
        x, dtype = exact[output.name], types[output.name]
        if not dtype.is_float:
            wrong = _mismatches(eager[output.name], x)
            found.append(Expected(output.name, dtype, x, eager[output.name], float(max(x.numel(), 1)), 2 * wrong + 1e-3))
            continue
        told = torch.isfinite(x) & torch.isfinite(eager[output.name].double())
        usual = first.get(output.name)
        scale = max(float(x[told].abs().max()) if told.any() else 0.0, usual.scale if usual is not None else 0.0)
        rounding = 2.0 ** -(min(dtype.mantissa, 23) + 1)
        slack = max(8 * 2.0**-24, rounding if dtype.bits < 32 else 0.0)
        conditioning = sum(_error(m[output.name], x, told & torch.isfinite(m[output.name]), scale) for m in moved)
        allowed = 2 * _error(eager[output.name], x, told, scale) + conditioning + slack
        if usual is not None and scale > 0:
            allowed = max(allowed, usual.tolerance * usual.scale / scale)
        found.append(Expected(output.name, dtype, x, eager[output.name], scale, allowed))
    return tuple(found)


def _summed_ranks(cascade: Cascade) -> list[str]:
    """The ranks of inputs that are summed over, in order of appearance."""
    inputs = {rank for t in cascade.inputs for rank in t.ranks}
    summed = [rank for s in flatten(cascade.body) if isinstance(s, (Einsum, Scan)) and s.op == "sum" for rank in over_of(s)]
    return [rank for rank in dict.fromkeys(summed) if rank in inputs]


def _moved(cascade: Cascade, tensors: Mapping[str, torch.Tensor], seed: int, along: str | None) -> dict[str, torch.Tensor]:
    """The float inputs in float64, each element moved at random by up to one rounding of its type.

    With `along` all elements that differ only in that rank move together, by up to sqrt(extent) / 2 roundings of f32: what a sum
    over the rank may be off by.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = bind_sizes(cascade, tensors)
    moved = dict(tensors)
    for t in cascade.inputs:
        if not t.dtype.is_float or t.dtype.bits < 16 or (along is not None and along not in t.ranks):
            continue
        x = tensors[t.name].double()
        step = 2.0 ** -(min(t.dtype.mantissa, 23) + 1) if along is None else 2.0**-24 * math.sqrt(sizes[along]) / 2
        extents = [1 if rank == along else sizes[rank] for rank in t.ranks]
        noise = 2 * torch.rand(extents, generator=generator, dtype=torch.float64) - 1
        moved[t.name] = x * (1 + step * noise.expand([sizes[rank] for rank in t.ranks]).reshape(x.shape))
    return moved


def _error(found: torch.Tensor, exact: torch.Tensor, told: torch.Tensor, scale: float) -> float:
    """The largest error at the points `told`, relative to `scale`; infinity where one is not finite."""
    if not told.any():
        return 0.0
    difference = (found.double() - exact)[told].abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def _mismatches(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The share of elements that differ."""
    return float((found.long() != exact.long()).double().mean()) if exact.numel() else 0.0


def _check(candidate: Candidate, case: Case) -> list[tuple[Expected, float]]:
    """The errors of a candidate on a case. Raises `Rejected`."""
    before = [t.clone() for t in case.inputs]
    overwritten = False
    try:
        first, second = (_run_framed(candidate, case) for _ in range(2))
    finally:
        for tensor, copy in zip(case.inputs, before, strict=True):
            if not _same_bits(tensor, copy):
                overwritten = True
                tensor.copy_(copy)  # the next candidate is given the same
    where = f"on {case.distribution} inputs at {', '.join(f'{r}={n}' for r, n in case.sizes)}"
    if overwritten:
        raise Rejected("wrong", f"an input was overwritten {where}")
    found = []
    for expected, a, b in zip(case.expected, first, second, strict=True):
        error = _measure_error(expected, a, where)
        if not error <= expected.tolerance:
            raise Rejected("wrong", f"{expected.name} is off by {error:.3g} where {expected.tolerance:.3g} is allowed, {where}")
        if not _same_bits(a, b):
            raise Rejected("nondeterministic", f"two runs differ in {expected.name} {where}")
        found.append((expected, error))
    return found


def _check_asked(candidate: Candidate, oracle: Oracle, cases: Sequence[Case]) -> None:
    """Runs a shape that was too large for the reference: bounds, determinism, and no NaN if smaller normal inputs give none."""
    if any(dict(case.sizes) == oracle.sizes for case in cases):
        return
    like = next((case for case in cases if case.distribution == "normal"), None)
    if like is None:
        return
    case = oracle.asked(like)
    first, second = (_run_framed(candidate, case) for _ in range(2))
    where = "at the asked shape"
    for expected, a, b in zip(like.expected, first, second, strict=True):
        if not _same_bits(a, b):
            raise Rejected("nondeterministic", f"two runs differ in {expected.name} {where}")
        if expected.dtype.is_float and torch.isfinite(expected.exact).all() and not torch.isfinite(a.double()).all():
            raise Rejected("wrong", f"{expected.name} holds NaN, or was not written, {where}")


def _measure_error(expected: Expected, found: torch.Tensor, where: str) -> float:
    if not expected.dtype.is_float:
        return _mismatches(found, expected.exact)
    values = found.double()
    told = torch.isfinite(expected.exact) & torch.isfinite(expected.eager.double())
    if torch.isnan(values[told]).any():
        raise Rejected("wrong", f"{expected.name} holds NaN, or was not written, where the reference is finite {where}")
    infinite = torch.isinf(expected.exact)
    if not (torch.isnan(values[infinite]) | (values[infinite] == expected.exact[infinite])).all():
        raise Rejected("wrong", f"{expected.name} is finite where the reference is infinite {where}")
    return _error(values, expected.exact, told, expected.scale)


def _run_framed(candidate: Candidate, case: Case) -> list[torch.Tensor]:
    """The outputs of one run, written into poisoned tensors between guard bands that must stay as they were."""
    framed = [_framed(e.exact.shape, e.dtype) for e in case.expected]
    candidate.run(case.inputs, [view for view, _ in framed])
    for (view, buffer), expected in zip(framed, case.expected, strict=True):
        size = view.numel() * view.element_size()
        if not (buffer[:GUARD_BYTES] == 0xA5).all() or not (buffer[GUARD_BYTES + size :] == 0xA5).all():
            sizes = ", ".join(f"{r}={n}" for r, n in case.sizes)
            raise Rejected("wrong", f"{expected.name} was written outside its bounds at {sizes}")
    return [view for view, _ in framed]


def _framed(shape: torch.Size, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor full of poison, and the buffer of bytes it lies in the middle of."""
    kind = to_torch(dtype)
    size = math.prod(shape) * kind.itemsize
    buffer = torch.full((size + 2 * GUARD_BYTES,), 0xA5, dtype=torch.uint8)
    view = buffer[GUARD_BYTES : GUARD_BYTES + size].view(kind).reshape(shape)
    if dtype.is_float:
        view.fill_(math.nan)
    return view, buffer


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return (t if t.ndim else t.reshape(1)).contiguous().view(torch.uint8)
