"""Contractions: matrix products where there are rows and columns, a product and a sum elsewhere.

The axes of a product are its rows (of one side), its columns (of the other), those summed over, and those both sides keep. Each
kind becomes one dimension: tensors are permuted and reshaped to [batch, rows, summed] and [batch, summed, columns].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from ...ir.tile import Dot
from ...ir.types import DType, bf16, f16, f32
from . import script as ts
from .axes import CONTRACTED
from .kernel import Digits, Mask
from .reductions import Reductions
from .script import Value

HELD = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True, slots=True)
class Sides:
    """The axes of a product: kept by both, of the left only, of the right only, summed."""

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    summed: tuple[str, ...]


class Contractions(Reductions):
    """Emits the values of `Dot`."""

    def contraction(self, node: Dot, digits: Digits) -> Value:
        """The value of a contraction at given digits of its result."""
        update = None if node.update is None else self.held(self.computed(self.value(node.update, digits)), "float32")
        total = update
        for more in self.combinations(node.over):
            a, b = (self.value(side, {**digits, **more}) for side in (node.a, node.b))
            total = self._product(node, a, b, total)
        assert total is not None
        return total

    def _product(self, node: Dot, a: Value, b: Value, total: Value | None) -> Value:
        summed = ts.union(self.axes_over(node.over), self.order)
        x, y = (self._typed(v, other, node.dtype) for v, other in ((a, b), (b, a)))
        x, y = (self._finite(v, summed) for v in (x, y))
        sides = self._sides(x, y, summed)
        if not self._is_matrix(sides, x, y):
            return self._written_out(x, y, summed, total)
        if self._first(sides.columns) < self._first(sides.rows):
            x, y, sides = y, x, self._sides(y, x, summed)
        return self._matrix(node, x, y, sides, total)

    def _first(self, names: tuple[str, ...]) -> int:
        return min((self.order.index(name) for name in names), default=len(self.order))

    def _typed(self, v: Value, other: Value, t: DType) -> Value:
        """An operand in the type of the product: two of one narrow type as they are, others rounded to the type of the contraction."""
        if v.type == other.type and v.type in HELD.values():
            return v
        if t in (bf16, f16):
            if v.type == HELD[t.name]:
                return v
            return replace(self.held(self.held(v, "float32"), HELD[t.name]), clean=v.clean)
        return replace(self.held(self.computed(v), "float32"), clean=v.clean)

    def _finite(self, v: Value, summed: tuple[str, ...]) -> Value:
        """`v` with 0 in summed lanes that hold no element: nothing they hold may reach the sum."""
        mask = Mask()
        for name in summed:
            if name in v.axes and name not in v.clean:
                mask = mask.joined(self.holds((name,)))
        if not mask.always and not mask.edge:
            return v
        return self.chosen(mask, v, ts.constant(0.0, f32))

    def _sides(self, a: Value, b: Value, summed: tuple[str, ...]) -> Sides:
        kept = [axis for axis in a.axes if axis in b.axes and axis not in summed]
        rows = tuple(axis for axis in a.axes if axis not in b.axes and axis not in summed)
        columns = tuple(axis for axis in b.axes if axis not in a.axes and axis not in summed)
        return Sides(tuple(kept), rows, columns, summed)

    def _is_matrix(self, sides: Sides, a: Value, b: Value) -> bool:
        """Whether matrix units take it: rows, columns, and enough to sum over, on both sides."""
        shared = all(axis in v.axes for axis in sides.summed for v in (a, b))
        deep = prod(self.axes.lanes(sides.summed)) >= CONTRACTED
        return bool(sides.rows and sides.columns and shared and deep)

    def _written_out(self, a: Value, b: Value, summed: tuple[str, ...], total: Value | None) -> Value:
        """The product of all pairs, and its sum."""
        x, y = (replace(self.held(v, "float32"), dtype=f32) for v in (a, b))
        axes = ts.union([*x.axes, *y.axes, *summed], self.order)
        self.check_lanes(axes)
        both = self.infix("*", x, y, "float32", f32)
        wide = self.expanded(both, axes, self.shape(axes))
        result = replace(self.fold("sum", wide, summed), clean=frozenset())
        return result if total is None else self.infix("+", total, result, "float32", f32)

    def _matrix(self, node: Dot, a: Value, b: Value, sides: Sides, total: Value | None) -> Value:
        left = self._flat(a, (sides.batch, sides.rows, sides.summed))
        right = self._flat(b, (sides.batch, sides.summed, sides.columns))
        natural = (*sides.batch, *sides.rows, *sides.columns)
        axes = ts.union(natural, self.order)
        groups = [group for group in (sides.batch, sides.rows, sides.columns) if group]
        flat = all(len(group) == 1 for group in groups)
        accumulates = total is not None and natural == axes
        args = [left, right]
        if accumulates and total is not None:
            wide = self.expanded(total, axes, self.shape(axes)).text
            args.append(wide if flat else f"tl.reshape({wide}, [{', '.join(self._lanes(group) for group in groups)}])")
        if a.type == "float32":
            args.append(f'input_precision="{self.options.precision}"')
        result = Value(f"tl.dot({', '.join(args)})", "float32", f32, natural)
        if not flat:
            result = replace(result, text=f"tl.reshape({result.text}, [{', '.join(self.shape(natural))}])")
        if natural != axes:
            order = ", ".join(str(natural.index(axis)) for axis in axes)
            result = replace(result, text=f"tl.permute({result.text}, [{order}])", axes=axes)
        if total is None or accumulates:
            return result
        named = self.define(f"{node.dst}_sum", result, self.here)
        return self.infix("+", total, named, "float32", f32)

    def _lanes(self, group: tuple[str, ...]) -> str:
        return " * ".join(self.shape(group))

    def _flat(self, v: Value, groups: tuple[tuple[str, ...], ...]) -> str:
        """`v` with its axes in the order of the groups, each group one dimension; an empty first group is none."""
        wanted = [axis for group in groups for axis in group]
        text = v.text
        present = sorted((group for group in groups if group), key=lambda group: v.axes.index(group[0]))
        if [axis for group in present for axis in group] == list(v.axes):  # the groups stand together: join them, then turn
            if any(len(group) > 1 for group in present):
                text = f"tl.reshape({text}, [{', '.join(self._lanes(group) for group in present)}])"
            order = [present.index(group) for group in groups if group]
            if order == sorted(order):
                return text
            return f"tl.trans({text})" if order == [1, 0] else f"tl.permute({text}, [{', '.join(map(str, order))}])"
        if list(v.axes) != wanted:
            order = [v.axes.index(axis) for axis in wanted]
            text = f"tl.trans({text})" if order == [1, 0] else f"tl.permute({text}, [{', '.join(map(str, order))}])"
        dims = [group for group in groups if group]
        if any(len(group) > 1 for group in dims):
            text = f"tl.reshape({text}, [{', '.join(self._lanes(group) for group in dims)}])"
        return text
