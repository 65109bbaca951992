"""Random programs mean the same traced and run eagerly.

The eager twin keeps every value dense over all ranks, so that it needs no alignment, no coordinates and no statements: whatever tracing
does with names, shared expressions, conditions and views of views must not show.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import einfall as ef
import torch
from einfall.compiler.trace import trace
from einfall.ir.check import check_cascade
from einfall.ir.reference import evaluate
from einfall.ir.text import parse_cascade, print_cascade
from einfall.ir.types import i32
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = {"b": 2, "p": 4, "q": 4, "n": 2, "j": 2}
AXES = list(SIZES)
SHAPE = list(SIZES.values())
BINARY = (operator.add, operator.sub, operator.mul)


@dataclass(frozen=True, eq=False)
class Eager:
    """A value over all ranks; it varies along `ranks` at most. Its conditions are such values too."""

    data: torch.Tensor
    ranks: frozenset
    conditions: tuple = ()

    @staticmethod
    def of(tensor, ranks):
        shape = [SIZES[rank] if rank in ranks else 1 for rank in AXES]
        order = sorted(range(len(ranks)), key=lambda i: AXES.index(ranks[i]))
        return Eager(tensor.permute(order).reshape(shape).expand(SHAPE), frozenset(ranks))

    @staticmethod
    def index(rank):
        return Eager.of(torch.arange(SIZES[rank]), (rank,))

    def map(self, function, *others):
        conditions = dict.fromkeys(c for value in (self, *others) for c in value.conditions)
        ranks = self.ranks.union(*(other.ranks for other in others))
        return Eager(function(self.data, *(other.data for other in others)), ranks, tuple(conditions))

    def all_ranks(self):
        return self.ranks.union(*(c.ranks for c in self.conditions))

    def kept(self, over=None):
        """Where every condition that concerns `over` holds."""
        keep = torch.ones(SHAPE, dtype=torch.bool)
        for condition in self.conditions:
            if over is None or over in condition.ranks:
                keep = keep & condition.data
        return keep

    def reduce(self, over, function, identity):
        data = function(torch.where(self.kept(over), self.data, identity), AXES.index(over)).unsqueeze(AXES.index(over)).expand(SHAPE)
        inner = [c for c in self.conditions if over in c.ranks]
        ranks = self.ranks.union(*(c.ranks for c in inner)) - {over}
        return Eager(data, ranks, tuple(c for c in self.conditions if over not in c.ranks))

    def at(self, rank, where, fill=None):
        """Read at the integer `where` along `rank`; `fill` outside."""
        size, axis = SIZES[rank], AXES.index(rank)
        inside = (where.data >= 0) & (where.data < size)

        def view(value, outside):
            if rank not in value.ranks:
                return value
            data = value.data.gather(axis, where.data.clamp(0, size - 1))
            if outside is not None:
                data = torch.where(inside, data, outside)
            return Eager(data, value.ranks - {rank} | where.ranks)

        conditions = tuple(view(c, None if fill is None else True) for c in self.conditions)
        return Eager(view(self, fill).data, view(self, fill).ranks, conditions)

    def where(self, condition):
        return Eager(self.data, self.ranks, (*self.conditions, *condition.conditions, condition))

    def stored(self):
        return torch.where(self.kept(), self.data, 0.0)


class Eagerly:
    """The operations of a random program, run at once."""

    index = staticmethod(Eager.index)

    def binary(self, a, op, b):
        return a.map(op, b)

    def tanh(self, a):
        return a.map(torch.tanh)

    def reduce(self, a, op, over):
        function, identity = {"sum": (torch.sum, 0.0), "max": (torch.amax, -torch.inf), "min": (torch.amin, torch.inf)}[op]
        return a.reduce(over, function, identity)

    def cumsum(self, a, over):
        inner = [c for c in a.conditions if over in c.ranks]
        data = torch.where(a.kept(over), a.data, 0.0).cumsum(AXES.index(over))
        return Eager(data, a.ranks.union(*(c.ranks for c in inner)), a.conditions)

    def shift(self, a, rank, by, fill):
        return a.at(rank, self.index(rank).map(lambda i: i + by), fill)

    def turn(self, a, rank, by):
        return a.at(rank, self.index(rank).map(lambda i: (i + by) % SIZES[rank]))

    def point(self, a, rank, at):
        return a.at(rank, Eager(torch.full(SHAPE, at), frozenset()))

    def gather(self, a, rank, table):
        return a.at(rank, table)

    def rename(self, a, old, new):
        return a.at(old, self.index(new))

    def split(self, a):
        return a.at("p", self.index("n").map(lambda n, j: n * 2 + j, self.index("j")))

    def join(self, a):
        return a.at("n", self.index("p").map(lambda p: p // 2)).at("j", self.index("p").map(lambda p: p % 2))

    def below(self, a, rank, limit):
        return a.where(self.index(rank).map(lambda i: i < limit))

    def positive(self, a, b):
        return a.where(b.map(lambda x: x > 0.0))

    def ranks(self, a):
        return a.all_ranks()


class Traced:
    """The same operations, traced."""

    def binary(self, a, op, b):
        return op(a, b)

    def tanh(self, a):
        return ef.tanh(a)

    def reduce(self, a, op, over):
        return getattr(a, op)(over)

    def cumsum(self, a, over):
        return a.cumsum(over)

    def shift(self, a, rank, by, fill):
        return a.shift(**{rank: by}, fill=fill)

    def turn(self, a, rank, by):
        return a.at(**{rank: (ef.index(rank) + by) % SIZES[rank]})

    def point(self, a, rank, at):
        return a.at(**{rank: at})

    def gather(self, a, rank, table):
        return a.at(**{rank: table})

    def rename(self, a, old, new):
        return a.rename(**{old: new})

    def split(self, a):
        return a.split("p", into="n j", j=2)

    def join(self, a):
        return a.join("n j", into="p")

    def below(self, a, rank, limit):
        return a.where(ef.index(rank) < limit)

    def positive(self, a, b):
        return a.where(b > 0.0)

    def ranks(self, a):
        return frozenset(a.ranks)


def program(run, steps, x, y, table):
    """The last values that `steps` compute from x, y and the index table."""
    pool = [x, y]
    for kind, first, second, choice, number in steps:
        a, b = pool[first % len(pool)], pool[second % len(pool)]
        ranks = sorted(run.ranks(a))
        rank = ranks[choice % len(ranks)] if ranks else None
        made = None
        match kind:
            case "binary":
                made = run.binary(a, BINARY[choice % 3], b)
            case "tanh":
                made = run.tanh(a)
            case "positive":
                made = run.positive(a, b)
            case "split" if "p" in ranks and not {"n", "j"} & set(ranks):
                made = run.split(a)
            case "join" if {"n", "j"} <= set(ranks) and "p" not in ranks:
                made = run.join(a)
            case "rename" if "p" in ranks and "q" not in ranks:
                made = run.rename(a, "p", "q")
            case "rename" if "q" in ranks and "p" not in ranks:
                made = run.rename(a, "q", "p")
            case "gather" if "p" in ranks:
                made = run.gather(a, "p", table)
            case "reduce" if rank is not None:
                made = run.reduce(a, ("sum", "max", "min")[number % 3], rank)
            case "cumsum" if rank is not None:
                made = run.cumsum(a, rank)
            case "shift" if rank is not None:
                made = run.shift(a, rank, number - 2, (0.0, 1.5)[choice % 2])
            case "turn" if rank is not None:
                made = run.turn(a, rank, number)
            case "point" if rank is not None:
                made = run.point(a, rank, number % 2)
            case "below" if rank is not None:
                made = run.below(a, rank, number)
        if made is not None:
            pool.append(run.tanh(made) if kind == "binary" else made)  # so that products stay small
    return tuple(pool[-2:])


KINDS = (
    "binary", "tanh", "positive", "split", "join", "rename", "gather", "reduce", "cumsum", "shift", "turn", "point", "below",
)  # fmt: skip
small = st.integers(0, 7)
steps = st.lists(st.tuples(st.sampled_from(KINDS), small, small, small, st.integers(0, 4)), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(0, 9))
def test_random_programs_mean_the_same_traced(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    table = torch.randint(0, 4, (2,), generator=generator)

    def body(X: "b p=4", Y: "q=4 n=2", I: "b"):
        here = program(Traced(), steps, X, Y, I)
        return here[0] * 1.0, here[1]

    cascade = trace(body, dtypes={"I": i32})
    check_cascade(cascade)
    assert parse_cascade(print_cascade(cascade)) == cascade
    found = evaluate(cascade, {"X": x.double(), "Y": y.double(), "I": table.int()}, dtype=torch.float64)
    eager = program(Eagerly(), steps, Eager.of(x.double(), "bp"), Eager.of(y.double(), "qn"), Eager.of(table, "b"))
    for output, value in zip(cascade.outputs, eager, strict=True):
        wanted = value.stored()
        dense = Eager.of(found[output.name], output.ranks).data
        torch.testing.assert_close(dense, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
