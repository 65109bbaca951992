"""Hypothesis strategies: extents, tensors of every stride and kind of value, and random legal cascades.

`cascades()` draws (cascade, tensors, scalars) whose reductions over p depend on one another in the ways that occur in practice: around
a maximum, a mean, a normalizer, weighted, masked, contracted; some that stream, some that must not. Values are well conditioned: in
float64 two orders of evaluation agree to about nine digits, and no row is empty, so that every result is finite.
"""

from dataclasses import dataclass, field

import torch
from builders import op
from einfall.ir.cascade import Cascade, Einsum, Output, ScalarDecl, Tensor
from einfall.ir.expr import Const, Expr, Extent, Index, Read, Scalar, aligned, reads, walk
from einfall.ir.infer import expression_ranks
from einfall.ir.reference import to_torch
from einfall.ir.types import DType, f32, i32
from hypothesis import strategies as st

INF = float("inf")
ORDER = ("b", "m", "n", "p", "e", "f")
FINITE = ("normal", "offset", "wide", "constant", "ties")
SPECIAL = ("minus_inf", "inf", "nan", "all_minus_inf")


def extents(limit: int = 17) -> st.SearchStrategy[int]:
    """Extents that catch what a fixed size hides: 1, primes, powers of two and their neighbours."""
    return st.sampled_from([n for n in (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 64, 127) if n <= limit])


@st.composite
def strided(draw, x: torch.Tensor) -> torch.Tensor:
    """The same values in memory as calls bring them: contiguous, permuted, every second element, or a slice of something larger."""
    layout = draw(st.sampled_from(["contiguous", "permuted", "stepped", "slice"]))
    if layout == "contiguous" or x.ndim == 0:
        return x.contiguous()
    if layout == "permuted":
        order = draw(st.permutations(range(x.ndim)))
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    step = 2 if layout == "stepped" else 1
    place = tuple(slice(1, 1 + step * n, step) for n in x.shape)
    wide = torch.zeros([2 + step * n for n in x.shape], dtype=x.dtype)
    wide[place] = x
    return wide[place]


def fill(shape: tuple[int, ...], mode: str, seed: int) -> torch.Tensor:
    """Values of a kind, in float64: the kinds of FINITE, or of SPECIAL with infinities and NaN among ordinary values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    chosen = torch.rand(shape, generator=generator) < 0.3
    match mode:
        case "offset":
            return x + 20
        case "wide":
            return x * 10
        case "constant":
            return torch.full_like(x, 0.75)
        case "ties":
            return x.round()
        case "minus_inf":
            return x.masked_fill(chosen, -INF)
        case "inf":
            return x.masked_fill(chosen, INF)
        case "nan":
            return x.masked_fill(chosen, float("nan"))
        case "all_minus_inf":
            return torch.full_like(x, -INF)
        case _:
            return x


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: DType = f32, modes: tuple[str, ...] = FINITE) -> torch.Tensor:
    """A float tensor of this shape: one of `modes`, with any strides."""
    x = fill(shape, draw(st.sampled_from(modes)), draw(st.integers(0, 2**16)))
    return draw(strided(x.to(to_torch(dtype))))


# Cascades ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A cascade while it is drawn. `rows` are p-indexed values; `origins` and `scales` p-free ones, the latter positive."""

    draw: object
    sizes: dict[str, int]
    batch: tuple[str, ...]
    body: list[Einsum] = field(default_factory=list)
    reductions: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    masked: Expr | None = None
    predicate: Expr | None = None
    origins: list[Expr] = field(default_factory=list)
    scales: list[Expr] = field(default_factory=list)
    maxima: list[Expr] = field(default_factory=list)

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def read(self, name: str, *ranks: str) -> Read:
        return aligned(name, *self.batch, *ranks)

    def _add(self, name: str, e: Expr, **reduction) -> Read:
        over = reduction.get("over", ())
        free = {*expression_ranks(e), *(expression_ranks(reduction["where"]) if reduction.get("where") is not None else ())}
        ranks = tuple(rank for rank in ORDER if rank in free and rank not in over)
        self.body.append(Einsum(name, ranks, e, **reduction))
        return aligned(name, *ranks)

    def name(self, e: Expr) -> Expr:
        """The expression itself, or a named intermediate of it."""
        return self._add(f"T{len(self.body)}", e) if self.coin() else e

    def reduce(self, op_name: str, e: Expr, where: Expr | None = None, over: tuple[str, ...] = ("p",)) -> Read:
        name = f"R{len(self.body)}"
        if over == ("p",) or not self.extra:
            self.reductions.append(name)
        return self._add(name, e, op=op_name, over=over, where=where)

    def total(self, e: Expr) -> Read:
        """A sum over p, restricted to the predicate of this cascade if it has one."""
        return self.reduce("sum", e, self.predicate)

    def count(self) -> Expr:
        """How many points the sums of this cascade take."""
        return Extent("p") if self.predicate is None else self.reduce("sum", Const(1.0), self.predicate)


def _predicate(d: Draft) -> Expr | None:
    """A condition on p that leaves no row empty."""
    reach = max(d.sizes["m"] - d.sizes["p"] + 1, d.pick(1, 2, 4))
    near = op("gt", Index("p"), op("sub", Index("m"), reach))
    causal = op("le", Index("p"), Index("m"))
    short = op("lt", Index("p"), d.read("L"))
    return d.pick(None, None, causal, near, op("and", causal, near), short, op("ge", op("add", Index("m"), 1), Index("p")))


def _scores(d: Draft) -> Expr:
    """The p-indexed value that everything is about, finite everywhere."""
    product = op("mul", d.read("Q", "m", "e"), d.read("K", "p", "e"))
    match d.pick("input", "input", "contraction", "biased", "capped", "shifted", "gathered", "shared"):
        case "input":
            return d.read("X", "m", "p")
        case "contraction":
            name = f"S{len(d.body)}"
            contracted = d._add(name, product, op="sum", over=("e",))
            return d.name(op("mul", contracted, Scalar("scale")))
        case "biased":
            return d.name(op("add", d.read("X", "m", "p"), op("mul", op("sub", Index("p"), Index("m")), 0.125)))
        case "shifted":
            back = (*(Index(rank) for rank in (*d.batch, "m")), op("sub", Index("p"), d.pick(1, 2)))
            whole = d.read("X", "m", "p")
            first = d._add(f"T{len(d.body)}", op("tanh", whole)) if d.coin() else whole
            return d.name(op("add", Read(first.tensor, back, Const(0.5)), whole))
        case "gathered":
            first = d._add(f"T{len(d.body)}", op("mul", d.read("X", "m", "p"), 0.5)) if d.coin() else d.read("X", "m", "p")
            return d.name(Read(first.tensor, (*(Index(rank) for rank in (*d.batch, "m")), aligned("G", "p"))))
        case "capped":
            return d.name(op("mul", op("tanh", op("mul", d.read("X", "m", "p"), 0.25)), 4.0))
        case _:
            return aligned("W", "p")


def _weights(d: Draft) -> Expr:
    return d.pick(d.read("V", "p", "f"), aligned("W", "p"), d.read("Y", "m", "p"))


def _exponent(d: Draft, s: Expr) -> Expr:
    """exp(s - d) around an origin, hidden where the predicate is false if the scores are masked by selection."""
    hidden = s if d.masked is None else d.masked
    return d.name(op("exp", op("sub", hidden, d.pick(*d.origins))))


def _maximum(d: Draft, s: Expr) -> None:
    found = d.reduce("max", s if d.masked is None else d.masked, None if d.masked is not None else d.predicate)
    d.origins.append(found)
    d.maxima.append(found)


def _mean(d: Draft, s: Expr) -> None:
    mean = d.name(op("div", d.total(s), d.count()))
    d.origins.append(mean)


def _normalizer(d: Draft, s: Expr) -> None:
    d.scales.append(d.reduce("sum", _exponent(d, s), d.predicate))


def _logsumexp(d: Draft, s: Expr) -> None:
    m = d.pick(*d.maxima) if d.maxima else d.pick(*d.origins)
    e = op("exp", op("sub", s if d.masked is None else d.masked, m))
    d.origins.append(d.name(op("add", op("log", d.reduce("sum", e, d.predicate)), m)))


def _moment(d: Draft, s: Expr) -> None:
    centred = op("sub", s, d.pick(*d.origins))
    power = d.pick(op("mul", centred, centred), op("pow", centred, 2), op("pow", centred, 3), op("mul", centred, s))
    d.total(power)


def _deviation(d: Draft, s: Expr) -> None:
    centred = op("sub", s, d.pick(*d.origins))
    variance = op("div", d.total(op("mul", centred, centred)), d.count())
    d.scales.append(d.name(op("sqrt", op("add", variance, 0.5))))


def _correlation(d: Draft, s: Expr) -> None:
    y = d.read("Y", "m", "p")
    my = d.name(op("div", d.total(y), d.count()))
    product = op("mul", op("sub", s, d.pick(*d.origins)), op("sub", y, my))
    d.total(op("mul", aligned("W", "p"), product) if d.coin() else product)


def _weighted(d: Draft, s: Expr) -> None:
    p = _exponent(d, s)
    if d.scales and d.coin():
        p = d.name(op("div", p, d.pick(*d.scales)))
    d.total(op("mul", p, _weights(d)))


def _entropy(d: Draft, s: Expr) -> None:
    centred = op("sub", s, d.pick(*d.origins))
    d.total(op("mul", op("exp", centred), centred))


def _spread(d: Draft, s: Expr) -> None:
    """The variance of values under weights, around their weighted mean: its origin carries the rank of the values."""
    p = op("exp", op("sub", s, d.pick(*d.origins)))
    mean = d.name(op("div", d.total(op("mul", p, d.read("V", "p", "f"))), d.total(p)))
    off = op("sub", d.read("V", "p", "f"), mean)
    d.total(op("mul", p, op("mul", off, off)))


def _extreme(d: Draft, s: Expr) -> None:
    d.origins.append(d.reduce(d.pick("min", "max"), op("sub", s, d.pick(*d.origins)), d.predicate))


def _scaled(d: Draft, s: Expr) -> None:
    if d.scales:
        d.origins.append(d.reduce("max", op("div", s, d.pick(*d.scales)), d.predicate))


def _place(d: Draft, s: Expr) -> None:
    d.reduce(d.pick("argmax", "argmin"), s, d.predicate)


def _logic(d: Draft, s: Expr) -> None:
    d.reduce(d.pick("any", "all"), op("gt", s, op("sub", d.pick(*d.origins), 0.37)), d.predicate)


def _select(d: Draft, s: Expr) -> None:
    d.total(op("where", op("gt", aligned("W", "p"), 0.0), s, d.pick(0.0, 1.0)))


def _columns(d: Draft, s: Expr) -> None:
    """A sum over the rows of normalized weights, which needs every row's statistics."""
    p = op("exp", op("sub", s if d.masked is None else d.masked, d.pick(*d.origins)))
    if "m" in expression_ranks(p) and d.scales:
        d.extra.append(f"R{len(d.body)}")
        d.reduce("sum", op("div", p, d.pick(*d.scales)), d.predicate, over=("m",))


def _barrier(d: Draft, s: Expr) -> None:
    """What no running state carries: an origin that scales inside an exponential, clips or rounds."""
    origin = d.pick(*d.origins)
    small = op("mul", op("tanh", s), op("tanh", origin))
    inner = op("sub", s, origin)
    choices = [op("exp", small), op("maximum", inner, 0.0), op("round", op("mul", inner, 3.71)), op("exp", op("neg", op("abs", inner)))]
    e = d.pick(*choices)
    if d.scales and d.coin():
        p = op("div", op("exp", op("sub", s, origin)), d.pick(*d.scales))
        e = op("exp", op("sub", p, d.reduce("max", p, d.predicate)))
    d.total(e)


FIRST = (_maximum, _maximum, _mean)
NEXT = (
    _maximum, _mean, _normalizer, _normalizer, _logsumexp, _moment, _deviation, _correlation, _weighted, _weighted,
    _entropy, _spread, _extreme, _scaled, _place, _logic, _select, _columns,
)  # fmt: skip


def _epilogue(d: Draft) -> list[str]:
    """Maps of the statistics, and at times of the scores with them."""
    made = []
    if d.scales and d.coin():
        made.append(d._add(f"T{len(d.body)}", op("log", d.pick(*d.scales))).tensor)
    if d.coin():
        made.append(d._add(f"T{len(d.body)}", op("add", op("mul", d.pick(*d.origins), Scalar("scale")), 1)).tensor)
    return made


def _inputs(d: Draft, dtypes: tuple[DType, ...]) -> tuple[Tensor, ...]:
    """Declarations of the inputs that are read, in order of first use."""
    ranks = {"X": "m p", "Y": "m p", "Q": "m e", "K": "p e", "V": "p f", "L": ""}
    used = {read.tensor: None for s in d.body for e in (s.expr, s.where) if e is not None for read in reads(e)}
    kind = d.pick(*dtypes)
    found = []
    for name in used:
        if name in ranks:
            axes = tuple((rank,) for rank in (*d.batch, *ranks[name].split()))
            found.append(Tensor(name, axes, i32 if name == "L" else kind))
        elif name in ("W", "G"):
            found.append(Tensor(name, (("p",),), kind if name == "W" else i32))
    if not any("p" in t.ranks for t in found):
        found.append(Tensor("W", (("p",),), kind))
    if not any("m" in t.ranks for t in found):  # m then occurs in predicates only
        found.append(Tensor("A", (("m",),), kind))
        d.extra.append(d._add("RA", op("mul", aligned("A", "m"), 2.0)).tensor)
    return tuple(found)


@st.composite
def cascades(draw, *, barriers: bool = True, limit: int = 17, dtypes: tuple[DType, ...] = (f32,), modes: tuple[str, ...] = FINITE):
    """A legal cascade of dependent reductions over p with tensors and scalars to call it with.

    Args:
        barriers: whether reductions that cannot stream may occur.
        limit: the largest extent of p.
        dtypes: the types of which the float inputs take one.
        modes: the kinds of values of the tensors.
    """
    sizes = {"b": draw(st.sampled_from([1, 2])), "m": draw(extents(5)), "p": draw(extents(limit)), "e": draw(st.sampled_from([1, 3, 4]))}
    sizes["f"] = draw(extents(3))
    d = Draft(draw, sizes, ("b",) if draw(st.booleans()) else ())
    d.predicate = _predicate(d)
    s = _scores(d)
    if d.predicate is not None and d.coin():
        d.masked = d.name(op("where", d.predicate, s, -INF))
    d.pick(*FIRST)(d, s)
    for _ in range(draw(st.integers(1, 4))):
        choices = (*NEXT, _barrier, _barrier) if barriers else NEXT
        d.pick(*choices)(d, s)
    made = _epilogue(d)
    inputs = _inputs(d, dtypes)
    candidates = [*d.reductions, *made, *d.extra]
    kept = draw(st.lists(st.sampled_from(candidates), min_size=1, unique=True)) if draw(st.booleans()) else candidates
    kept = [name for name in candidates if name in {*kept, *(["RA"] if "RA" in candidates else [])}]
    ranks = {statement.out: statement.ranks for statement in d.body}
    outputs = tuple(Output(name, tuple((rank,) for rank in ranks[name])) for name in dict.fromkeys(kept))
    used = [e for statement in d.body for e in walk(statement.expr) if isinstance(e, Scalar)]
    scalars = {"scale": 0.3} if used else {}
    cascade = Cascade("drawn", inputs, tuple(ScalarDecl(name, f32) for name in scalars), (), tuple(d.body), outputs)
    given = {}
    for declared in inputs:
        shape = tuple(sizes[rank] for rank in declared.ranks)
        if declared.dtype == i32:  # lengths from 1 to P, positions from 0 to P - 1
            values = torch.randint(sizes["p"], shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
            given[declared.name] = (values + (declared.name == "L")).to(torch.int32)
        else:
            given[declared.name] = draw(tensors(shape, declared.dtype, modes))
    return cascade, given, scalars
