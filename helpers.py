"""Plain Python functions on traced values, built from the language: users write their own in the same way."""

from __future__ import annotations

import math

from .compiler.functions import cos, exp, extent, index, isinf, log, sin, where
from .compiler.trace_value import Operand, Value, points


def softmax(S: Value, over: str) -> Value:
    """`exp(S - max) / sum` over the ranks `over`; every point that a `.where` leaves out weighs nothing."""
    M = S.max(over)
    N = exp(S - M)
    D = N.sum(over)
    return N / D


def logsumexp(S: Value, over: str) -> Value:
    """`log(sum(exp(S)))` over the ranks `over`, with an infinite maximum kept out of the exponent: -inf over nothing but -inf."""
    M = S.max(over)
    G = where(isinf(M), 0.0, M)
    D = exp(S - G).sum(over)
    return log(D) + G


def mean(X: Value, over: str) -> Value:
    """The mean over the ranks `over`, of the points that no `.where` leaves out."""
    return X.mean(over)


def var(X: Value, over: str, *, correction: Operand = 0) -> Value:
    """The variance over the ranks `over`: squared distances from the mean, by the count less `correction` (1 for a sample)."""
    C = X - X.mean(over)
    if isinstance(correction, int) and correction == 0:
        return (C * C).mean(over)
    return (C * C).sum(over) / (points(X, over.split()) - correction)


def rope(X: Value, over: str, *, position: Value | str, base: float = 10000.0) -> Value:
    """Rotary position embedding of the two halves of rank `over` (arXiv 2104.09864, in the half-split layout).

    Args:
        X: the vectors to turn.
        over: the rank of a vector's elements, of even extent.
        position: the position of each element, as a value or as the rank whose index it is.
        base: the base of the wavelengths.
    """
    i, d = index(over), extent(over)
    half = d // 2
    at = index(position) if isinstance(position, str) else position
    angle = at * exp((i % half) * (-2.0 * math.log(base)) / d)
    turned = X.at(**{over: (i + half) % d})
    return X * cos(angle) + where(i < half, -turned, turned) * sin(angle)
