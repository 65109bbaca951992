"""What is legal, as a table."""

from __future__ import annotations

from .cascade import Cascade
from .infer import declared_types


def check_cascade(c: Cascade) -> None:
    """Raise `CascadeError` for what is not legal."""
    declared_types(c)
