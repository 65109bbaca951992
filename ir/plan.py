"""The derived plan: which kernels, and within each which streams carry which states. Semantic; no tile size and no target.

    Plan(cascade, steps)            step = KernelPlan(stream, stages, outputs) | LibraryPlan(cascade) | LoopPlan(cascade, body)
    Stage(reductions, origins, states, values, domain)

A *state* is a running sum (or maximum, or product) of a summand evaluated at the current *origins*: values such as a running
maximum or mean that move while the rank is streamed. A *correction* carries a state from the old origins to the new ones, and
a *value* rebuilds a reduction of the cascade from the states. Moving values appear in expressions as `Tile`s:
`Tile("m")` is the new origin m, `Tile("m.old")` the previous one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from .cascade import Cascade, Einsum, Scan
from .expr import Const, Expr

STEP = "step"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rewrite that was tried and did not apply, with the reason shown to the user."""

    rewrite: str
    statement: str
    reason: str


@dataclass(frozen=True, slots=True)
class Origin:
    """A moving p-free value that summands refer to.

    `kind` is "max" if it is built of running maxima (only -inf can be non-finite), else "free". `reads` are the reductions it depends on.
    """

    name: str
    expr: Expr
    ranks: tuple[str, ...]
    kind: Literal["max", "free"]
    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """One row of T: the state at the new origins is the sum of coefficient * old state. A coefficient None stands for 1."""

    terms: tuple[tuple[str, Expr | None], ...]


@dataclass(frozen=True, slots=True)
class State:
    """`name[ranks] = op(over where ...) summand`, kept while streaming. `owner` is the first reduction that needs it.

    The summand is over opaque elements and origins. A correction without terms leaves the state as it is. For an arg reduction the
    state is the index of the first extreme summand.
    """

    name: str
    op: str
    identity: Const
    ranks: tuple[str, ...]
    over: tuple[str, ...]
    summand: Expr
    where: Expr | None
    correction: Correction
    owner: str

    @property
    def is_count(self) -> bool:
        """Whether the state counts the points of its domain."""
        return self.op == "sum" and self.summand == Const(1.0)


@dataclass(frozen=True, slots=True)
class Value:
    """A reduction of the cascade, rebuilt: the sum of outside * state (and + added). Coefficients are expressions over reductions.

    `guarded` says that a state of 0 counts as 0 whatever its coefficient: over an empty domain the reduction is 0, not 0 * inf.
    """

    reduction: str
    op: str
    terms: tuple[tuple[Expr | None, str], ...]
    added: Expr | None = None
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Domain:
    """Comparisons of the stream rank's index with values free of it; outside of them every summand of the stage is the identity."""

    predicates: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """One stream over the rank: the reductions it completes, in dependency order."""

    index: int
    reductions: tuple[Einsum, ...]
    origins: tuple[Origin, ...]
    states: tuple[State, ...]
    values: tuple[Value, ...]
    domain: Domain
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """One kernel: the stages that stream `stream` one after the other, then what is stored.

    `inputs` are the tensors it reads: inputs of the cascade and what earlier kernels stored. `statements` are the maps, inner
    reductions and scans along the stream that it computes on demand. `outputs` are what it stores; one that has the stream rank is
    stored in the first stream that can. `kept` are those among them that no one else reads: the kernel's later streams read them rather
    than their operands.
    """

    name: str
    stream: str | None
    stages: tuple[Stage, ...]
    statements: tuple[Einsum | Scan, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[str, ...] = ()


class _Standalone:
    """A step that is a cascade by itself, whose inputs and outputs it has."""

    __slots__ = ()
    cascade: Cascade

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.cascade.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.cascade.outputs)


@dataclass(frozen=True, slots=True)
class LibraryPlan(_Standalone):
    """A statement over whole tensors that is left to library calls: a sort, a selection, a scatter, a concatenation in memory.

    `cascade` is that one statement by itself: its inputs are the operands as they lie in memory, its outputs what it defines.
    """

    name: str
    cascade: Cascade
    stream: None = None
    stages: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class LoopPlan(_Standalone):
    """An iterative block whose steps are a plan of their own, run one after the other.

    `cascade` is the block by itself. `step`, whose plan is `body`, computes the next value of every state, and the stop condition as
    the last output, from the states before the step, whatever tensors the block reads, and the number of the step, the input `STEP`.
    """

    name: str
    cascade: Cascade
    step: Cascade
    body: Plan
    stream: None = None
    stages: tuple[()] = ()


Step: TypeAlias = "KernelPlan | LibraryPlan | LoopPlan"


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in launch order and what the derivation did, line by line. `cuts` says why a result is stored between steps."""

    cascade: Cascade
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    cuts: tuple[Rejected, ...] = ()

    @property
    def kernels(self) -> tuple[KernelPlan, ...]:
        """The steps that become kernels of our own."""
        return tuple(step for step in self.steps if isinstance(step, KernelPlan))
