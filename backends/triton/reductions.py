"""Reductions and scans within a tile."""

from __future__ import annotations

from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.expr import Expr
from ...ir.tile import Reduce, Scan
from ...ir.types import DType, boolean, f32, i32
from . import script as ts
from .evaluate import IDENTITIES, Evaluator
from .kernel import Digits, Mask
from .script import Value, held_type

FOLDS = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum", "any": "or", "all": "and"}
BUILT_IN = {"sum": "tl.sum", "max": "tl.max", "min": "tl.min"}


class Reductions(Evaluator):
    """Emits the values of `Reduce` and `Scan`."""

    def reduction(self, node: Reduce, digits: Digits) -> Value:
        """The value of a reduction at given digits of its result; digits that are reduced are folded."""
        if node.op in ("argmax", "argmin"):
            return self._place(node, digits)
        total: Value | None = None
        for more in self.combinations(node.over):
            part = self._reduced(node, self.value(node.expr, {**digits, **more}, precise=node.dst in self.precise_tiles))
            total = part if total is None else self.operation(FOLDS[node.op], [total, part], known=True)
        assert total is not None
        return total

    def _reduced(self, node: Reduce, v: Value) -> Value:
        """One tensor reduced over the axes of `node.over`."""
        t = node.dtype
        x = self.held(self.computed(v), "int32" if t == boolean else held_type(t) if not v.dtype.is_float else "float32")
        if t == boolean:
            x = replace(self.held(self.infix("!=", self.computed(v), ts.constant(0)), "int32"), dtype=boolean)
        axes = self.axes_over(node.over)
        wide = self.expanded(x, ts.union([*x.axes, *axes], self.order), self.shape(ts.union([*x.axes, *axes], self.order)))
        whole = self._cleaned(wide, axes, node.op)
        result = replace(self.fold(node.op, whole, axes), dtype=t if t != boolean else boolean, clean=frozenset())
        return self.infix("!=", result, ts.constant(0)) if t == boolean else result

    def _cleaned(self, v: Value, axes: tuple[str, ...], op: str) -> Value:
        """`v` with the identity in lanes that hold no element; what a stream leaves outside its domain is masked by the program."""
        mask = Mask()
        for name in axes:
            own = self.holds((name,))
            if own.always and not (op == "sum" and name in v.clean):
                mask = mask.joined(Mask(own.always))
        identity = IDENTITIES[op]
        return self.chosen(mask, v, ts.constant(int(identity) if isinstance(identity, bool) else identity)) if mask.always else v

    def fold(self, op: str, v: Value, axes: tuple[str, ...]) -> Value:
        """`v` reduced over tensor axes."""
        for name in reversed([a for a in v.axes if a in axes]):
            place = v.axes.index(name)
            rest = tuple(a for a in v.axes if a != name)
            match op:
                case "any":
                    text = f"tl.max({v.text}, {place})"
                case "all":
                    text = f"tl.min({v.text}, {place})"
                case "prod":
                    self.helpers.add("product_of")
                    text = f"tl.reduce({v.text}, {place}, product_of)"
                case _:
                    text = f"{BUILT_IN[op]}({v.text}, {place})"
            v = replace(v, text=text, axes=rest, binding=ts.ATOM, number=None)
        return v

    def _place(self, node: Reduce, digits: Digits) -> Value:
        """The first index of the extreme value, -1 where there is none."""
        axes = self.axes_over(node.over)
        if len(node.over) != 1 or len(axes) > 1 or (axes and len(self.axes.named(axes[0]).ranks) > 1):
            raise UnsupportedError(f"{node.op} over {', '.join(node.over)}", statement=node.dst, hint="over one rank")
        rank = node.over[0]
        if not axes:
            found = self._place_of_digits(node, rank, digits)
            return found if rank in self.digit_sizes else ts.add(self.start(rank), found, self.order)
        x = self._compared(node, digits)
        worst = ts.constant(self._identity(node.op[3:], x.dtype))
        wide_axes = ts.union([*x.axes, *axes], self.order)
        wide = self.expanded(x, wide_axes, self.shape(wide_axes))
        always = self.holds(axes).always
        whole = self.chosen(Mask(always), wide, worst) if always else wide
        place = whole.axes.index(axes[0])
        rest = tuple(a for a in whole.axes if a != axes[0])
        found = Value(f"tl.{node.op}({whole.text}, {place})", "int32", i32, rest)
        return ts.add(self.start(rank), found, self.order)

    def _compared(self, node: Reduce, digits: Digits) -> Value:
        """What an extreme is looked for among: floats in f32, integers as they are."""
        x = self.computed(self.value(node.expr, digits))
        t = x.dtype if x.dtype.is_integer else f32
        return replace(self.held(x, held_type(t)), dtype=t)

    def _place_of_digits(self, node: Reduce, rank: str, digits: Digits) -> Value:
        best: Value | None = None
        place: Value = ts.constant(0)
        for k in range(self.digit_sizes.get(rank, 1)):
            x = self._compared(node, {**digits, rank: k})
            if best is None:
                best, place = x, ts.constant(0)
                continue
            better = self.infix(">" if node.op == "argmax" else "<", x, best)
            place = self.define(f"{node.dst}_at", self.select(better, ts.constant(k), place), self.here)
            best = self.define(f"{node.dst}_best", self.select(better, x, best), self.here)
        return replace(place, dtype=i32, type="int32")

    # -- scans ---------------------------------------------------------------------------------------------------------------------

    def scanned(self, node: Scan, digits: Digits) -> Value:
        """The value of a scan along an axis."""
        axis = self.axes.of(node.over)
        if axis is None or len(axis.ranks) > 1:
            raise UnsupportedError(f"a scan along {node.over}, which has {self.digit_sizes.get(node.over, 1)} elements", statement=node.dst)
        t: DType = node.dtype
        v = self.value(node.expr, digits)
        x = replace(self.held(self.computed(v), held_type(t)), dtype=t)
        axes = ts.union([*x.axes, axis.name], self.order)
        wide = self.expanded(x, axes, self.shape(axes))
        place = axes.index(axis.name)
        own = self.holds((axis.name,))
        if own.always:
            wide = self.chosen(Mask(own.always), wide, ts.constant(self._identity(node.op, t)))
        running = self._running(node.op, wide, place)
        start = ts.constant(self._identity(node.op, t)) if node.start is None else self._start_of(node.start, digits, t)
        if node.exclusive:
            named = self.define(f"{node.dst}_run", running, self.here)
            lane = self.lane(axis)
            previous = ts.add(lane, ts.constant(-1), self.order)
            before = ts.call("tl.maximum", previous, ts.constant(0), order=self.order, type="int32", dtype=i32)
            index = self.expanded(before, axes, self.shape(axes))
            shifted = Value(f"tl.gather({named.text}, {index.text}, {place})", named.type, t, axes)
            running = self.select(self.infix(">", lane, ts.constant(0)), shifted, ts.constant(self._identity(node.op, t), t))
            running = replace(running, type=named.type, dtype=t)
        return self.operation(FOLDS[node.op], [start, running], known=True) if node.start is not None else running

    def _start_of(self, e: Expr, digits: Digits, t: DType) -> Value:
        return replace(self.held(self.computed(self.value(e, digits)), held_type(t)), dtype=t)

    def _identity(self, op: str, t: DType) -> float | int:
        value = IDENTITIES[op]
        if t.is_float:
            return float(value)
        if op in ("sum", "prod"):
            return int(value)
        least = 1 << (t.bits - 1)
        return -least if op == "max" else least - 1

    def _running(self, op: str, v: Value, place: int) -> Value:
        match op:
            case "sum":
                text = f"tl.cumsum({v.text}, {place})"
            case "prod":
                text = f"tl.cumprod({v.text}, {place})"
            case _:
                combine = "greater_of" if op == "max" else "lesser_of"
                self.helpers.add(combine)
                text = f"tl.associative_scan({v.text}, {place}, {combine})"
        return replace(v, text=text, binding=ts.ATOM, clean=frozenset(), number=None)


