"""All rows, the most important first."""

from __future__ import annotations

from benchmarks.case import Case, Size
from benchmarks.cases_decode import decode_rows
from benchmarks.cases_fused import fused_rows
from benchmarks.cases_prefill import prefill_rows
from benchmarks.cases_quantize import quantize_rows
from benchmarks.cases_shared import shared_rows
from benchmarks.cases_verify import verify_rows


def cases(size: Size) -> tuple[Case, ...]:
    """The rows at that size, in the order they are run: prompts, decode steps, quantization, verification, other fused cascades."""
    rows = (prefill_rows, decode_rows, shared_rows, quantize_rows, verify_rows, fused_rows)
    return tuple(case for rows_of in rows for case in rows_of(size))
