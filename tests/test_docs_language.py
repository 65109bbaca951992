"""The language reference is true: its Python runs, its texts parse, and each is what the function above it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import einfall as ef
import pytest
from einfall.ir.check import check_cascade
from einfall.ir.expr import OPS, REDUCTIONS
from einfall.ir.text import parse_cascade, print_cascade
from einfall.ir.types import DTYPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_page_from_top_to_bottom(tmp_path):
    names: dict[str, object] = {"__name__": "page"}
    printed, shown = "", set()
    for number, (kind, body) in enumerate(BLOCKS):
        if kind == "python":
            path = tmp_path / f"page_{number}.py"  # errors show the line of a file
            path.write_text(body, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(body, str(path), "exec"), names)
            printed = out.getvalue()
        elif kind == "output":
            assert printed == body
        elif kind == "cascade":
            shown.add(check_text(body, names))
    assert {"attention", "grouped", "alibi", "ragged", "neighbours", "evict", "streamed", "shared_exponent"} <= shown


def check_text(body, names):
    cascade = parse_cascade(body)
    check_cascade(cascade)
    assert parse_cascade(print_cascade(cascade)) == cascade
    kernel = names.get(cascade.name)
    if kernel is not None:
        traced = kernel.trace(dtypes={t.name: t.dtype.name for t in cascade.inputs})
        assert print_cascade(traced) == body
    return cascade.name


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"python", "cascade", "output"}


@pytest.mark.parametrize("name", sorted(name for name, info in OPS.items() if not info.symbol))
def test_every_function_is_in_the_reference(name):
    assert re.search(rf"\b{name}\b", PAGE)
    assert callable(getattr(ef, name))


@pytest.mark.parametrize("name", sorted({*REDUCTIONS, *DTYPES, *(info.symbol for info in OPS.values() if info.symbol)}))
def test_every_reduction_type_and_operator_is_in_the_reference(name):
    assert name.replace("|", "\\|") in PAGE


def test_the_grammar_names_every_word():
    readme = (ROOT / "ir" / "README.md").read_text(encoding="utf-8")
    grammar = (ROOT / "ir" / "cascade.lark").read_text(encoding="utf-8")
    words = set(re.findall(r'"([a-z]+)"', grammar)) | set(re.findall(r"^[A-Z]+\.3:\s*/(?:\(|)([a-z]+)", grammar, re.M))
    assert len(words) > 20
    missing = [word for word in words if not re.search(rf"\b{word}", readme)]
    assert not missing
