"""Operations by unit: what a cascade computes at the least, counted from its expressions.

    matrix    a multiply-add of a contraction counts 2
    vector    a map's operation, a step of another reduction or of a scan, a comparison of a sort: 1 each
    special   exp, log, roots, division and the like: 1 each

An operation counts once for every point of the ranks it varies over, so what does not depend on a rank is not repeated along it, and
equal subexpressions of a statement count once. Points outside a mask that every reader of a value applies do not count: half of
the scores of a causal cascade are never needed.

`plan_operations` counts what a derived plan computes instead: reductions as the states they became, factors that left a sum outside
of it, each value of a kernel once. Corrections and what is repeated from tile to tile are a schedule's, and are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, log2, prod
from typing import Any, TypeAlias

import numpy as np

from ..ir.cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement, expressions
from ..ir.expr import OPS, Cast, Const, Expr, Extent, Index, Op, Read, children, index_ranks, reads, walk
from ..ir.infer import declared_types, expression_ranks, expression_type
from ..ir.plan import Plan
from ..ir.types import DType, accumulator, f32
from ..schedules.target import Does
from .planned import planned_cascade

_Array: TypeAlias = "np.ndarray[Any, Any]"
_EXACT_POINTS = 1 << 22  # a mask's share is counted exactly up to so many points, on a regular sample above


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one kind, on one type, in one statement."""

    unit: Does
    dtype: DType
    operations: int
    statement: str


def operations(c: Cascade, sizes: Mapping[str, int]) -> tuple[Work, ...]:
    """The work of every statement, one entry for a unit and a type. `sizes` must give the extent of every rank."""
    return _Counter(c, sizes).count()


def plan_operations(plan: Plan, sizes: Mapping[str, int]) -> tuple[Work, ...]:
    """The work of a plan's kernels, counted as `operations` does. `sizes` must give the extent of every rank of the plan's cascade."""
    return _Counter(planned_cascade(plan), sizes, across=True).count()


def by_unit(work: tuple[Work, ...]) -> dict[str, int]:
    """The operations of each unit, in the order matrix, vector, special."""
    units: tuple[Does, ...] = ("matrix", "vector", "special")
    return {unit: sum(w.operations for w in work if w.unit == unit) for unit in units}


def mask_share(mask: Expr | None, sizes: Mapping[str, int]) -> float:
    """The share of points where `mask` holds, 1.0 where it depends on data.

    Exact up to four million points over the mask's ranks, from a regular sample above.
    """
    if mask is None or not _only_indices(mask):
        return 1.0
    ranks = tuple(index_ranks(mask))
    total = prod(sizes[r] for r in ranks)
    if total == 0:
        return 1.0
    step = max(1, ceil((total / _EXACT_POINTS) ** (1 / max(1, len(ranks)))))
    axes = np.meshgrid(*(np.arange(step // 2 if sizes[r] > step // 2 else 0, sizes[r], step) for r in ranks), indexing="ij", sparse=True)
    holds = _evaluate(mask, dict(zip(ranks, axes, strict=True)), sizes)
    shape = tuple(a.size for a in axes)
    return float(np.broadcast_to(holds, shape).mean())


def needed_masks(c: Cascade) -> dict[str, Expr]:
    """For every intermediate of which only points under a mask matter: that mask, the one all its readers apply."""
    outputs = {o.name for o in c.outputs}
    masks: dict[str, list[Expr | None]] = {}
    needed: dict[str, Expr] = {}
    ranks = c.tensor_ranks()
    for s in reversed(c.body):
        own = s.where if isinstance(s, (Einsum, Scan, Scatter, Populate)) else None
        if isinstance(s, Einsum) and s.out not in outputs:
            wanted = masks.get(s.out, [None])
            if wanted[0] is not None and all(m == wanted[0] for m in wanted):
                needed[s.out] = wanted[0]
        inherited = needed.get(s.out) if isinstance(s, Einsum) else None
        mask = _both(own, inherited)
        for e in expressions(s):
            for read in reads(e):
                aligned = all(isinstance(x, Index) and x.rank == r for x, r in zip(read.coords, ranks[read.tensor], strict=True))
                fits = mask is not None and aligned and set(index_ranks(mask)) <= set(ranks[read.tensor])
                masks.setdefault(read.tensor, []).append(mask if fits else None)
    return needed


def _both(a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None or a == b:
        return b if a is None else a
    return Op("and", (a, b))


def _only_indices(e: Expr) -> bool:
    return all(isinstance(node, (Const, Index, Extent, Op)) for node in walk(e))


_NUMPY: Mapping[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "mod": np.mod, "neg": np.negative, "abs": np.abs,
    "minimum": np.minimum, "maximum": np.maximum, "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "where": np.where,
}  # fmt: skip


def _evaluate(e: Expr, indices: Mapping[str, _Array], sizes: Mapping[str, int]) -> _Array:
    match e:
        case Const(value=value):
            return np.asarray(value)
        case Index(rank=rank):
            return indices[rank]
        case Extent(rank=rank):
            return np.asarray(sizes[rank])
        case Op(name="not", args=(x,)):
            return np.logical_not(_evaluate(x, indices, sizes))
        case Op(name=name, args=args) if name in _NUMPY:
            return np.asarray(_NUMPY[name](*(_evaluate(a, indices, sizes) for a in args)))
        case _:
            return np.asarray(True)  # what cannot be worked out here is taken as needed


class _Counter:
    """One count: the work is collected statement by statement; `outer` are the ranks of the iterations around it.

    With `across`, for the kernels of a plan, equal subexpressions count once in the whole cascade, not once a statement, and maps of
    narrow floats run in f32.
    """

    def __init__(self, c: Cascade, sizes: Mapping[str, int], *, across: bool = False) -> None:
        self.cascade = c
        self.sizes = sizes
        self.types = declared_types(c)
        self.masks = needed_masks(c)
        self.found: dict[tuple[str, Does, DType], float] = {}
        self.shares: dict[Expr, float] = {}
        self.outer: tuple[str, ...] = ()
        self.across = across
        self.counted: set[Expr] = set()

    def count(self) -> tuple[Work, ...]:
        for s in self.cascade.body:
            self._statement(s)
        return tuple(Work(unit, dtype, round(n), name) for (name, unit, dtype), n in self.found.items() if n > 0)

    def _add(self, name: str, unit: Does, dtype: DType, ranks: set[str], each: float = 1.0, mask: Expr | None = None) -> None:
        if self.across and unit != "matrix" and dtype.is_float:
            dtype = accumulator(dtype)  # kernels keep what is between in f32, whatever its declared type
        share = self._share(mask) if mask is not None and set(index_ranks(mask)) <= ranks else 1.0
        points = prod(self.sizes[r] for r in {*ranks, *self.outer})
        key = (name, unit, dtype)
        self.found[key] = self.found.get(key, 0.0) + each * points * share

    def _share(self, mask: Expr) -> float:
        if mask not in self.shares:
            self.shares[mask] = mask_share(mask, self.sizes)
        return self.shares[mask]

    def _statement(self, s: Statement) -> None:
        match s:
            case Einsum():
                self._einsum(s)
            case Scan():
                self._maps(s.out, s.expr, s.where)
                self._add(s.out, "vector", self._type(s.expr), {*expression_ranks(s.expr), s.over}, mask=s.where)
            case Populate():
                self._maps(s.values, s.expr, s.where)
                self._add(s.values, "vector", self._type(s.expr), {*expression_ranks(s.expr), s.over}, self._comparisons(s), s.where)
            case Scatter():
                self._maps(s.out, s.expr, s.where)
                self._add(s.out, "vector", self._type(s.expr), {*expression_ranks(s.expr), *s.over}, mask=s.where)
            case Concat():
                for _, part in s.parts:
                    self._maps(s.out, part, None)
            case Iterate():
                self._iterate(s)

    def _comparisons(self, s: Populate) -> float:
        """Comparisons an element: log2 of the extent for a sort, of the kept number for a top-k, one for a threshold."""
        if s.rule == "threshold":
            return 1.0
        kept = s.parameter.value if s.rule == "topk" and isinstance(s.parameter, Const) else self.sizes[s.over]
        return max(1.0, ceil(log2(float(kept) + 1))) + (1.0 if s.rule == "mass" else 0.0)

    def _iterate(self, s: Iterate) -> None:
        for state in s.states:
            self._maps(state.name, state.init, None)
        outer, self.outer = self.outer, (*self.outer, s.rank)
        for inner in s.body:
            self._statement(inner)
        for state in s.states:
            self._maps(state.name, state.next, None)
        if s.until is not None and s.states:
            self._maps(s.states[0].name, s.until, None)
        self.outer = outer

    def _einsum(self, s: Einsum) -> None:
        mask = _both(s.where, self.masks.get(s.out))
        if s.op == "sum" and self._contraction(s, mask):
            return
        self._maps(s.out, s.expr, mask)
        if s.op is not None:
            each = 2.0 if s.op in ("argmax", "argmin") else 1.0  # a comparison, and one more select for the index
            ranks = {*expression_ranks(s.expr), *s.over, *(index_ranks(s.where) if s.where is not None else ())}
            self._add(s.out, "vector", self._type(s.expr), ranks, each, mask)

    def _maps(self, name: str, e: Expr, mask: Expr | None) -> None:
        """The maps in `e`, each distinct one once; coordinates and masks of indices alone are addressing, not work."""
        wanted = [e] if mask is None or _only_indices(mask) else [e, mask]
        seen = self.counted if self.across else set()
        while wanted:
            node = wanted.pop()
            if node in seen or isinstance(node, Read):
                continue
            seen.add(node)
            wanted.extend(children(node))
            unit = "vector" if isinstance(node, Cast) else OPS[node.name].unit if isinstance(node, Op) else "none"
            if unit in ("vector", "special"):
                result: Does = "special" if unit == "special" else "vector"
                self._add(name, result, self._type(node), set(expression_ranks(node)), mask=mask)

    def _contraction(self, s: Einsum, mask: Expr | None) -> bool:
        """Counts a sum over a product of two sides, each with a summed rank and ranks the other lacks; False if it is none."""
        factors = [f for f in product_factors(s.expr) if set(expression_ranks(f)) & set(s.over)]
        sides = _sides(factors, set(s.ranks), set(s.over), self.sizes)
        if sides is None:
            return False
        a, b = sides
        ranks = {r for f in factors for r in expression_ranks(f)} | set(s.over)
        self._add(s.out, "matrix", self._matrix_type(a, b), ranks, 2.0, mask)
        for f in product_factors(s.expr):
            self._maps(s.out, f, mask)
        for side in (a, b):  # factors that join a side are multiplied into it beforehand
            for extra in range(1, len(side)):
                joined = {r for f in side[: extra + 1] for r in expression_ranks(f)}
                self._add(s.out, "vector", self._type(side[extra]), joined, mask=mask)
        for f in product_factors(s.expr):
            if f not in factors and not isinstance(f, Const):
                self._add(s.out, "vector", self._type(f), set(s.ranks), mask=mask)
        return True

    def _matrix_type(self, a: list[Expr], b: list[Expr]) -> DType:
        """The type a matrix unit multiplies in: that of both sides, else the narrower float of at least 16 bits."""
        types = [self._type(f) for side in (a, b) for f in side if expression_ranks(f)]
        if len(set(types)) == 1:
            return types[0]
        floats = sorted((t for t in types if t.is_float and t.bits >= 16), key=lambda t: t.bits)
        return floats[0] if floats else f32

    def _type(self, e: Expr) -> DType:
        return expression_type(e, self.types)[0]


def product_factors(e: Expr) -> list[Expr]:
    """The factors of a product, nested products flattened."""
    if isinstance(e, Op) and e.name == "mul":
        return [f for arg in e.args for f in product_factors(arg)]
    return [e]


def _sides(factors: list[Expr], result: set[str], over: set[str], sizes: Mapping[str, int]) -> tuple[list[Expr], list[Expr]] | None:
    """The factors as the two sides of a contraction, or None if no two of them differ in the ranks of the result."""
    if len(factors) < 2:
        return None
    kept = [set(expression_ranks(f)) & result for f in factors]
    pairs = ((i, j) for i in range(len(factors)) for j in range(i + 1, len(factors)))
    for i, j in pairs:
        shared = set(expression_ranks(factors[i])) & set(expression_ranks(factors[j])) & over
        if kept[i] != kept[j] and shared:
            a, b = [factors[i]], [factors[j]]
            ra, rb = set(expression_ranks(factors[i])), set(expression_ranks(factors[j]))
            for k, f in enumerate(factors):
                if k in (i, j):
                    continue
                ranks = set(expression_ranks(f))
                cost_a, cost_b = (prod(sizes[r] for r in side | ranks) for side in (ra, rb))
                if cost_a <= cost_b:
                    a.append(f)
                    ra |= ranks
                else:
                    b.append(f)
                    rb |= ranks
            return a, b
    return None
