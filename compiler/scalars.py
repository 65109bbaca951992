"""Scalar arguments as kernels take them: Python numbers of the declared kind."""

from __future__ import annotations

from typing import Any

from ..ir.types import DType


def to_float(value: Any) -> float:
    """`value` as a float: numbers, NumPy scalars and tensors of one element. Raises `TypeError`, `ValueError` or `RuntimeError`."""
    if value.__class__ is float:
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError("text is no number")
    return float(value)


def to_whole(value: Any) -> int:
    """`value` as an int, if it is whole. Raises as `to_float` does."""
    number = to_float(value)
    if number != int(number):
        raise ValueError("not a whole number")
    return int(number)


def converter(dtype: DType) -> Any:
    """`to_float` or `to_whole`, by the declared type of a scalar."""
    return to_float if dtype.is_float else to_whole
