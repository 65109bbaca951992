"""The documents are tests: every Python block runs, every `einfall` command that is cheap does, every link leads somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cookbook").rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(language):
    """The pages with code in `language`, each with its blocks in order."""
    found = []
    for page in PAGES:
        code = [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]
        if code:
            found.append(pytest.param(page, code, id=name_of(page)))
    return found


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """A folder to run in, with a database and a cache of its own."""
    import einfall as ef

    monkeypatch.chdir(tmp_path)
    with ef.configure(database=tmp_path / "tuned.db", cache=tmp_path / "cache"):
        yield tmp_path


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, code, isolated):
    if page.is_relative_to(ROOT / "cookbook"):
        pytest.skip("recipes run as scripts")
    names = {"__name__": "page"}
    # traced functions read their names and errors their lines from a file
    for number, body in enumerate(code):
        path = isolated / f"{page.stem}_{number}.py"
        path.write_text(body)
        exec(compile(body, str(path), "exec"), names)


@pytest.mark.parametrize(("page", "code"), [*blocks("bash"), *blocks("sh"), *blocks("console")])
def test_the_commands_of_a_page_run(page, code, isolated):
    from einfall.cli import run

    for cascade in ROOT.glob("docs/*.cascade"):
        (isolated / cascade.name).write_text(cascade.read_text())
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["einfall"] and words[1:2] not in (["tune"], ["bench"]):
            assert run(words[1:]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_the_readme_names_every_command():
    from einfall.cli import _COMMANDS

    text = (ROOT / "README.md").read_text()
    for command in _COMMANDS:
        assert f"`einfall {command}" in text


def test_the_example_of_the_readme_is_short():
    first = BLOCK.findall((ROOT / "README.md").read_text())
    example = next(body for kind, body in first if kind == "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert [page for page in sorted(pages) if f"]({page})" not in index] == []


def test_the_decision_on_what_is_stored_has_the_constants_of_the_code():
    page = next((ROOT / "docs" / "decisions").glob("009-*.md")).read_text()
    known = {"partition_kernels": set(), "sink_accesses": set(), "expand_scans": set(), "unroll_blocks": set()}
    for rule, names in re.findall(r"^\| (.*) \| (`.*) \| .* \|$", page, re.M):
        module = re.search(r"in `(\w+)`", names)
        name = module[1] if module else "partition_kernels"
        code = importlib.import_module(f"einfall.compiler.passes.{name}")
        for constant in re.findall(r"`([A-Z_]+)`", names):
            known[name].add(constant)
            assert re.search(rf"\b{getattr(code, constant)}\b", rule), f"{constant} is {getattr(code, constant)}: {rule}"
    for name, found in known.items():
        code = importlib.import_module(f"einfall.compiler.passes.{name}")
        assert found == {key for key, value in vars(code).items() if key.isupper() and isinstance(value, int)}, name
