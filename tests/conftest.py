"""Golden texts: what the compiler writes, kept beside the tests and shown as a difference when it changes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["EINFALL_DB"] = ""  # what somebody tuned on this machine changes no test
GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("case", text)` compares `text` with `tests/golden/<test module>/case.txt`; `--update-golden` writes that file."""
    module = Path(request.node.path).stem.removeprefix("test_")
    seen: set[str] = set()

    def compare(name: str, text: str) -> None:
        assert name not in seen, f"golden text {name!r} is compared twice in one test"
        seen.add(name)
        path = GOLDEN / module / f"{name}.txt"
        text = text if text.endswith("\n") else text + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"no golden text {path.relative_to(GOLDEN)}: look at the text and run with --update-golden\n\n{text}"
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "now", lineterm="")
            pytest.fail(f"{path.relative_to(GOLDEN)} differs; --update-golden accepts it\n" + "\n".join(lines), pytrace=False)

    return compare
