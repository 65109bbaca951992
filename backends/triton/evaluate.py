"""Expressions of a tile program as values of the kernel."""

from __future__ import annotations

import math
from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.expr import (
    Bitcast,
    Cast,
    Const,
    Count,
    Expr,
    Extent,
    Index,
    Masked,
    Op,
    Read,
    Scalar,
    Seen,
    Start,
    Tile,
)  # fmt: skip
from ...ir.infer import expression_type
from ...ir.types import DType, boolean, f32, i32, i64
from . import script as ts
from .arithmetic import BYTES, DECIDING
from .kernel import Digits, Mask
from .memory import MemoryAccess
from .script import Value, held_type

LOWEST = -3.4028234663852886e38
FAR = 1e38  # of exponents: times log2(e) it is still a number
IDENTITIES = {"max": float("-inf"), "min": float("inf"), "sum": 0.0, "prod": 1.0, "any": False, "all": True}


class Evaluator(MemoryAccess):
    """Turns expressions into values; `precise` values decide something or are rounded to bits."""

    scalars: dict[str, Value]
    precise_tiles: frozenset[str] = frozenset()
    ordered_tiles: frozenset[str] = frozenset()  # results of max and min, which are never NaN

    def value(self, e: Expr, digits: Digits, *, precise: bool = False, wanted: str = "") -> Value:
        """`e` as a value: a tensor over the axes it varies along, or a scalar."""
        match e:
            case Const(value=number):
                return ts.constant(number, weak=True)
            case Scalar(name=name):
                return self.scalars[name]
            case Extent(rank=rank):
                return self.extent(rank)
            case Start(rank=rank):
                return self.start(rank)
            case Count(rank=rank):
                return self._count(rank)
            case Seen(rank=rank):
                return ts.add(self.start(rank), self._count(rank))
            case Index(rank=rank):
                return self.index(rank, digits)
            case Tile(name=name):
                return self._tile(name, digits)
            case Masked(x=x, identity=identity):
                return self._masked(self.value(x, digits, precise=precise), identity, digits)
            case Read():
                return self.from_memory(self.load(e, digits, wanted or e.tensor.lower()), self.arrays[e.tensor].dtype)
            case Cast(x=x, dtype=t):
                return self.cast(self.value(x, digits, precise=precise or not t.is_float or t.bits < 32), t)
            case Bitcast(x=x, dtype=t):
                return self._bits(x, t, digits)
            case Op(name=name, args=args):
                return self._operation(name, args, digits, precise)
        raise AssertionError(f"not an expression: {e!r}")

    def coordinate(self, e: Expr, digits: Digits) -> Value:
        """A coordinate as a whole number."""
        v = self.value(e, digits)
        return v if v.type in ("int32", "int64") else self.held(self.computed(v), "int32")

    def _operation(self, name: str, args: tuple[Expr, ...], digits: Digits, precise: bool) -> Value:
        deciding = precise or name in DECIDING
        if name == "div" and not deciding:
            shared = self._by_reciprocal(args[0], args[1], digits)
            if shared is not None:
                return shared
        if name == "exp" and not precise:
            shared = self._base_two(args[0], digits)
            if shared is not None:
                return shared
        values = [self.value(a, digits, precise=deciding) for a in args]
        known = all(self.is_natural(a) for a in args) or any(self._is_ordered(a) for a in args)
        return self.operation(name, values, precise=deciding, known=known)

    def _is_ordered(self, e: Expr) -> bool:
        """Whether `e` is no NaN for certain, so that a maximum with it needs no care."""
        match e:
            case Tile(name=name):
                return name in self.ordered_tiles
            case Const(value=value):
                return value == LOWEST
            case Op(name="minimum" | "maximum", args=(a, b)):
                return self._is_ordered(a) and self._is_ordered(b)
            case _:
                return False

    def _by_reciprocal(self, a: Expr, b: Expr, digits: Digits) -> Value | None:
        """A tensor divided by one number of the task: a product with its reciprocal, which is worked out once."""
        types = {name: array.dtype for name, array in self.arrays.items()} | self.tile_types
        if not expression_type(a, types)[0].is_float or isinstance(b, Const):
            return None
        divisor = self.value(b, digits)
        if divisor.axes:
            return None
        x = self.value(a, digits)
        if not x.axes:
            return None
        inverse = self.infix("/", ts.constant(1.0), self.held(self.computed(divisor), "float32"), "float32", f32)
        scope = self.scope_of(b)
        one = self.define("by", replace(inverse, weak=False), scope, ("inverse", inverse.text))
        return self.operation("mul", [x, one])

    def _base_two(self, e: Expr, digits: Digits) -> Value | None:
        """exp(a - b) with fewer values of b than of a: a power of two whose exponent is one fused multiply-add a value.

        Where b times log2(e) would overflow, neighbours of b are so far from it that any smaller factor tells the same: 0, 1 or infinity.
        """
        match e:
            case Op(name="sub", args=(x, y)) if not isinstance(y, Const):
                pass
            case _:
                return None
        a, b = (self.value(part, digits) for part in (x, y))
        if not set(b.axes) < set(a.axes) or not (a.dtype.is_float and b.dtype.is_float):
            return None
        origin, scope = self.held(self.computed(b), "float32"), self.scope_of(y)
        small = self.infix("<", ts.call("tl.abs", origin), ts.constant(FAR), "int1", boolean)
        chosen = self.select(small, ts.constant(math.log2(math.e)), ts.constant(2.0**-10))
        name = b.text if b.text.isidentifier() else "shift"
        by = self.define(f"by_{name}", chosen, scope, ("factor of base two", origin.text))
        low = self.infix("*", origin, by, "float32", f32)
        shift = self.define(f"{name}_2", low, scope, ("base two", low.text))
        high = self.infix("*", self.held(self.computed(a), "float32"), by, "float32", f32)
        return ts.call("tl.exp2", self.infix("-", high, shift, "float32", f32))

    def _count(self, rank: str) -> Value:
        tile = ts.constant(self.tile_of(rank))
        scope = self.scope_of_rank(rank)
        if scope is not None and scope.edge == "never":
            return tile
        left = self.infix("-", self.extent(rank), self.start(rank))
        return ts.least(tile, left)

    def _tile(self, name: str, digits: Digits) -> Value:
        key = (name, tuple(digits[rank] for rank in self.tile_ranks.get(name, ()) if rank in self.digit_sizes))
        if key not in self.tiles:
            raise UnsupportedError(f"tile {name} is not at hand", statement=self.statement)
        return self.tiles[key]

    def _masked(self, v: Value, identity: Const, digits: Digits) -> Value:
        """`v` inside the domain of the innermost loop, the identity elsewhere."""
        scope = self.here
        if scope.loop is None:
            return v
        x = self.computed(v)
        chosen = self.chosen(self.domain(digits), x, ts.constant(identity.value))
        zero = not isinstance(identity.value, bool) and identity.value == 0
        stream = self.axes.of(scope.loop.rank)
        clean = {*v.clean, stream.name} if zero and stream is not None else set()
        return replace(chosen, clean=frozenset(clean))

    def domain(self, digits: Digits) -> Mask:
        """Where the domains of all loops around hold; conditions are tested in edge tiles only."""
        mask = Mask()
        for scope in self.scopes[1:]:
            loop = scope.loop
            assert loop is not None
            axis = self.axes.of(loop.rank)
            own = Mask() if axis is None else self.holds((axis.name,))
            if scope.edge == "never":
                mask = mask.joined(Mask(own.always))
                continue
            tests = [self.infix("<", self.index(loop.rank, digits), self.extent(loop.rank))]
            tests += [self.held(self.value(c, digits), "int1") for c in loop.conditions]
            joined = self.all_of(tests)
            assert joined is not None
            if scope.edge == "some":
                inside = self._in_edge_tiles(joined)
            else:
                inside = self.define("inside", joined, scope, ("domain", joined.text))
            mask = mask.joined(Mask(own.always, (inside,), scope.edge == "always"))
        return mask

    def _in_edge_tiles(self, joined: Value) -> Value:
        """The domain under a name that is defined in edge tiles only."""
        key = ("domain", joined.text)
        if key in self.here.made:
            return self.here.made[key]
        name = self.names.fresh("inside")
        self.here.lines.append(ts.If("edge", [ts.Assign(name, joined.text)]))
        inside = replace(joined, text=name, binding=ts.ATOM)
        self.here.made[key] = inside
        return inside

    def _bits(self, x: Expr, t: DType, digits: Digits) -> Value:
        """The bits of `x` as another type: of an element those in memory, of a computed narrow float those of its code."""
        types = {name: array.dtype for name, array in self.arrays.items()} | self.tile_types
        source, weak = expression_type(x, types)
        if source.bits != t.bits:
            if not (weak and source == i64 and t.bits == 32):
                raise UnsupportedError(f"a bitcast from {source} to {t} changes the size", statement=self.statement)
            source = i32
        v = self._codes(x, source, digits)
        if t.name in BYTES:
            if t.bits == 4:
                return self.helper("from_nibble_f4e2m1", v, dtype=t)
            return self.decode(v, t)
        target = {"bf16": "bfloat16", "f16": "float16"}.get(t.name, held_type(t))
        if target == v.type:
            return replace(v, dtype=t)
        width = {"float32": 32, "bfloat16": 16, "float16": 16}.get(target) or int(target.lstrip("uint"))
        have = {"float32": 32, "bfloat16": 16, "float16": 16}.get(v.type) or int(v.type.lstrip("uint"))
        if width != have:
            return replace(self.held(v, target), dtype=t)
        return ts.method(self._as_tensor(v), "to", f"tl.{target}", "bitcast=True", type=target, dtype=t)

    def _codes(self, x: Expr, source: DType, digits: Digits) -> Value:
        """The bits of `x` in a type of their width, or as an i32."""
        if source.name in BYTES:
            if isinstance(x, Read) and x.fill is None and source.bits == 8:
                return self.held(self.load(x, digits, x.tensor.lower()), "int32")
            if isinstance(x, Cast) and source.bits == 8:
                return self.encode(self.value(x.x, digits, precise=True), source)
            v = self.value(x, digits, precise=True)
            if source.bits == 4:
                return self.held(self.helper("nibble_f4e2m1", v, type="int32", dtype=i32), "int32")
            return self.encode(v, source)
        v = self.value(x, digits, precise=True)
        if source.name in ("bf16", "f16"):
            return self.cast(v, source)
        return self.computed(v) if v.number is None else ts.constant(v.number, source)
