"""einfall: cascades of Einsums, turned into fused, tuned kernels."""

from __future__ import annotations
