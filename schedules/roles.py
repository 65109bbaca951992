"""What each rank of a kernel is: a grid rank, the stream, or resident in a tile. It follows from the plan and the extents.

A rank is of the grid if every stored tensor has it and little of the work lacks it. A grid rank that all streamed inputs carry has
tiles of one element unless it is the one along memory; the others are row ranks, which share a streamed tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ..ir.cascade import Cascade, Einsum, Scan
from ..ir.expr import Expr, Op, Read, reads
from ..ir.infer import declared_types, expression_ranks, expression_type
from ..ir.plan import KernelPlan
from ..ir.types import DType
from .footprint import ceil_power

RESIDENT = 256
POINTS = 4096  # elements of a task that streams nothing
WHOLE = 256  # elements of a product's sum that are held at once
LACK_STATIC, LACK_DYNAMIC = 0.10, 0.25


@dataclass(frozen=True, slots=True)
class Roles:
    """The ranks of a kernel by role.

    `rows` are grid ranks that share streamed tiles, `units` grid ranks of tile one, `lanes` grid ranks that lie along memory.
    `contracts` says whether a product is summed, so that register tiles pay; `accumulates` whether one is summed along the stream, so
    that a tile of results stays at hand.
    """

    stream: str | None
    rows: tuple[str, ...]
    units: tuple[str, ...]
    lanes: tuple[str, ...]
    resident: tuple[str, ...]
    contracts: bool
    accumulates: bool

    @property
    def grid(self) -> tuple[str, ...]:
        return (*self.units, *self.rows, *self.lanes)


def kernel_roles(cascade: Cascade, kernel: KernelPlan, sizes: Mapping[str, int]) -> Roles:
    """The role of every rank that the kernel's values have."""
    table = cascade.tensor_ranks()
    stored = [tuple(r for r in table[name] if r != kernel.stream) for name in kernel.outputs]
    common = [r for r in dict.fromkeys(r for ranks in stored for r in ranks) if all(r in ranks for ranks in stored)]
    reduced = {r for s in _sums(kernel) for r in s.over}
    work = list(_work(kernel))
    all_ranks = tuple(dict.fromkeys(r for ranks, _ in work for r in ranks) | dict.fromkeys(r for ranks in stored for r in ranks))
    contracts = any(is_contraction(s.expr, s.ranks, s.over) for s in _sums(kernel))
    streamed = _streamed_inputs(cascade, kernel)
    rows, units, lanes = [], [], []
    for rank in common:
        if rank in reduced or not _belongs_to_grid(rank, work, sizes):
            continue
        if _along_memory(cascade, kernel, rank):
            lanes.append(rank)
        elif all(rank in ranks for ranks in streamed):
            units.append(rank)
        else:
            rows.append(rank)
    grid = {*rows, *units, *lanes, kernel.stream}
    resident = tuple(r for r in all_ranks if r not in grid)
    points = prod(sizes.get(r, RESIDENT) for r in (*lanes, *resident))
    if kernel.stream is None and not rows and units and points < POINTS:
        rows.append(units.pop())  # a task of one short row would be lost in the cost of tasks
    accumulates = any(is_contraction(s.summand, s.ranks, s.over) for stage in kernel.stages for s in stage.states if s.op == "sum")
    return Roles(kernel.stream, tuple(rows), tuple(units), tuple(lanes), resident, contracts, accumulates)


def _sums(kernel: KernelPlan) -> Iterator[Einsum]:
    for stage in kernel.stages:
        yield from stage.reductions
    yield from (s for s in kernel.statements if isinstance(s, Einsum) and s.op is not None)


def _work(kernel: KernelPlan) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The iteration space of each state and inner reduction, and whether it is a contraction."""
    for stage in kernel.stages:
        origins = {o.name: o.ranks for o in stage.origins}
        for state in stage.states:
            yield tuple(dict.fromkeys((*expression_ranks(state.summand, origins), *state.over, *state.ranks))), False
    for s in kernel.statements:
        if isinstance(s, Scan):
            yield s.ranks, False
        elif s.op is not None:
            yield tuple(dict.fromkeys((*expression_ranks(s.expr), *s.over))), True
        elif not kernel.stages and s.out in kernel.outputs:
            yield s.ranks, False


def _belongs_to_grid(rank: str, work: list[tuple[tuple[str, ...], bool]], sizes: Mapping[str, int]) -> bool:
    total = lacking = 0.0
    for ranks, _ in work:
        points = 1.0
        for r in ranks:
            points *= sizes.get(r, RESIDENT)
        total += points
        lacking += 0.0 if rank in ranks else points
    lack = lacking / total if total else 0.0
    size = sizes.get(rank)
    if lack <= LACK_STATIC:
        return True
    if size is None:
        return lack <= LACK_DYNAMIC
    return size > RESIDENT and lack <= LACK_DYNAMIC


def _streamed_inputs(cascade: Cascade, kernel: KernelPlan) -> list[tuple[str, ...]]:
    """The ranks of every input that is read along the stream; of all inputs if there is no stream."""
    found: list[tuple[str, ...]] = []
    for read in _input_reads(cascade, kernel):
        ranks = tuple(dict.fromkeys(r for c in read.coords for r in expression_ranks(c)))
        if kernel.stream is None or kernel.stream in ranks:
            found.append(ranks)
    return found


def _input_reads(cascade: Cascade, kernel: KernelPlan) -> Iterator[Read]:
    for e in _expressions(kernel):
        yield from (r for r in reads(e) if r.tensor in kernel.inputs)


def _expressions(kernel: KernelPlan) -> Iterator[Expr]:
    for stage in kernel.stages:
        for s in stage.states:
            yield s.summand
            if s.where is not None:
                yield s.where
    for statement in kernel.statements:
        yield statement.expr


def _along_memory(cascade: Cascade, kernel: KernelPlan, rank: str) -> bool:
    """Whether the rank is the contiguous one of an input that is streamed along another rank, or of an output without any stream."""
    table = cascade.tensor_ranks()
    if kernel.stream is None:
        return any(table[name][-1:] == (rank,) for name in kernel.outputs)
    for read in _input_reads(cascade, kernel):
        ranks = table[read.tensor]
        aligned = [expression_ranks(c) for c in read.coords]
        if ranks and aligned[-1] == (rank,) and any(kernel.stream in r for r in aligned):
            return True
    return False


def is_contraction(e: Expr, ranks: tuple[str, ...], over: tuple[str, ...]) -> bool:
    """Whether the summand is a product of two values that both vary along the reduced ranks and each lack a result rank."""
    factors = [set(expression_ranks(f)) for f in product_factors(e)]
    varying = [f for f in factors if f & set(over)]
    lacking = [f for f in varying if set(ranks) - f]
    return len(varying) > 1 and len(lacking) > 1


def product_factors(e: Expr) -> tuple[Expr, ...]:
    """The factors of a product, a division counting as its numerator."""
    match e:
        case Op(name="mul", args=(a, b)):
            return (*product_factors(a), *product_factors(b))
        case Op(name="div", args=(a, _)):
            return product_factors(a)
        case Op(name="exact" | "neg", args=(a,)):
            return product_factors(a)
        case _:
            return (e,)


def factor_bytes(cascade: Cascade, kernel: KernelPlan, roles: Roles, sizes: Mapping[str, int]) -> int:
    """Bytes of the largest operand of a contraction at one index of the stream; along the longest sum where nothing is streamed.

    A sum that is so long that it is done in blocks counts as one block (`WHOLE` elements).
    """
    types = declared_types(cascade)
    summands = [(s.expr, s.ranks, s.over) for s in _sums(kernel)]
    summands += [(s.summand, s.ranks, s.over) for stage in kernel.stages for s in stage.states if s.op == "sum"]
    largest = 1
    for e, ranks, over in summands:
        if not is_contraction(e, ranks, over):
            continue
        for factor in product_factors(e):
            found = expression_ranks(factor)
            if roles.stream is None or roles.stream in found:
                elements = ceil_power(prod(sizes.get(r, 1) for r in found if r in roles.resident))
                largest = max(largest, int(min(elements, WHOLE) * _bytes_of(factor, types)))
    return largest


def lone_rows(cascade: Cascade, kernel: KernelPlan, roles: Roles) -> frozenset[str]:
    """The row ranks that every streamed operand of a contraction has: rows along them share nothing, and each is a product of its own."""
    operands: list[set[str]] = []
    inputs = {t.name for t in cascade.inputs}
    summands = [(s.expr, s.ranks, s.over) for s in _sums(kernel)]
    summands += [(s.summand, s.ranks, s.over) for stage in kernel.stages for s in stage.states if s.op == "sum"]
    for e, ranks, over in summands:
        if is_contraction(e, ranks, over):
            factors = [f for f in product_factors(e) if any(r.tensor in inputs for r in reads(f))]
            operands += [set(expression_ranks(f)) for f in factors if roles.stream in expression_ranks(f)]
    return frozenset(rank for rank in roles.rows if operands and all(rank in ranks for ranks in operands))


def _bytes_of(e: Expr, types: Mapping[str, DType]) -> float:
    """Bytes of an element; 4 of what is computed over the states of a stage, whose names are no tensors."""
    if any(r.tensor not in types for r in reads(e)):
        return 4.0
    return expression_type(e, types)[0].bytes
