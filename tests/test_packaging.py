"""What is installed is what is there, imports flow one way, and importing the package loads nothing heavy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import einfall as ef
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_INSTALLED = {"tests", "cookbook", "benchmarks", "docs", "build", "dist", "out"}
LAYERS = ("ir", "configuration", "schedules", "backends", "compiler", "tuner", "helpers", "api", "cli", "__main__")


def pyproject():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_python():
    found = ["einfall"]
    for path in sorted(ROOT.rglob("__init__.py")):
        parts = path.parent.relative_to(ROOT).parts
        if parts and not parts[0].startswith(".") and parts[0] not in NOT_INSTALLED:
            found.append(".".join(("einfall", *parts)))
    return found


def modules():
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if not (parts := path.relative_to(ROOT).parts)[0].startswith(".") and parts[0] not in NOT_INSTALLED
    ]


def test_the_listed_packages_are_those_of_the_tree():
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(folders_with_python())


def test_every_data_file_is_listed():
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["einfall"]
    listed = {path for pattern in patterns for path in ROOT.glob(pattern)}
    package = {path.parent for path in modules()}
    data = {p for folder in package for p in folder.iterdir() if p.suffix in (".lark", ".toml", ".typed", ".ll", ".sql", ".html")}
    assert data - listed - {ROOT / "pyproject.toml"} == set()


def test_the_versions_agree():
    assert pyproject()["project"]["version"] == ef.__version__
    assert f"## {ef.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pins_hold_what_the_package_needs():
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M))
    fixed = {"torch": "2.13.0", "triton": "3.7.1", "apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
    assert {name: pins.get(name) for name in fixed} == fixed
    project = pyproject()["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)[0]
        assert name.lower() in pins, f"{name} has no pin in constraints.txt"


def imports_of(path):
    """The rooms of the package that a module imports when it runs, with the line."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module.split(".")[0]] if node.module and not base else [a.name for a in node.names] if not base else [base[0]]
            for name in names:
                yield name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert not (name or "").startswith("einfall"), f"{path}:{node.lineno} imports its own package by name"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_imports_only_what_stands_below_it(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for room, line in imports_of(path):
        if room in LAYERS:
            assert LAYERS.index(room) <= LAYERS.index(here), f"{path}:{line} imports {room} from {here}"


def test_the_contract_that_lint_runs_has_the_same_layers():
    contract = pyproject()["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [layer.removeprefix("einfall.") for layer in reversed(contract)] == list(LAYERS)


METHODS = re.compile(r"attention|softmax|flash|evict|hydragen|snapkv|h2o|xquant|hogwild|mustafar|speculative|fusemax|\bkv\b", re.IGNORECASE)


@pytest.mark.parametrize("room", ("ir", "schedules", "backends", "compiler", "tuner"))
def test_nothing_below_the_helpers_knows_the_name_of_a_method(room):
    files = [f for f in sorted((ROOT / room).rglob("*")) if f.suffix in (".py", ".lark", ".toml", ".md", ".sql")]
    lines = [(f, n, line) for f in files for n, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1)]
    found = [f"{f.relative_to(ROOT)}:{n}: {line.strip()}" for f, n, line in lines if METHODS.search(line)]
    assert len(files) > 3 and not found, "\n".join(found)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = ("torch", "tvm", "tvm_ffi", "triton", "xgboost", "ray", "sympy", "lark", "numpy", "rich", "click", "sqlite_utils")
    assert run(f"import sys, einfall; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_decorating_a_function_loads_nothing_heavy():
    code = """
import sys
import einfall as ef

@ef.kernel
def total(X: "i j", *, scale: float) -> "i":
    return (X * scale).sum("j")

print([m for m in ("torch", "tvm", "tvm_ffi", "sympy", "sqlite_utils") if m in sys.modules])
"""
    assert run(code) == "[]"


def test_every_public_name_can_be_had():
    for name in ef.__all__:
        assert getattr(ef, name) is not None
    assert set(ef.__all__) <= set(dir(ef))
    with pytest.raises(AttributeError, match="did you mean 'kernel'"):
        ef.kernal  # noqa: B018


def test_type_checkers_see_the_names_that_run_time_has():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert set(ef.__all__) - seen == {"__version__", "settings"}
