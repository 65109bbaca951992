"""What a command is given: a kernel by reference, and `name=value` options."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import EinfallError, Location

if TYPE_CHECKING:
    from ..api import Kernel


def load_kernel(reference: str) -> Kernel:
    """The kernel that `path.py:name`, `module:name` or `file.cascade` names.

    Raises `EinfallError` that says what is not there and what is, or the line at which the user's file failed.
    """
    if reference.endswith(".cascade"):
        return _from_text(Path(reference))
    place, _, name = reference.rpartition(":")
    if not place:
        place, name = reference, ""
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_named(place)
    return _pick(module, place, name)


def _from_text(path: Path) -> Kernel:
    from ..api import Kernel, parse

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EinfallError(f"{path} cannot be read: {error.strerror}", hint=_similar_files(path)) from None
    except UnicodeDecodeError:
        raise EinfallError(f"{path} is no text in UTF-8") from None
    return Kernel.from_cascade(parse(text, str(path)))


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise EinfallError(f"there is no file {path}", hint=_similar_files(path))
    name = f"einfall_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise EinfallError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the user's file look themselves up here
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except EinfallError:
        raise
    except Exception as error:
        raise _failure(f"{path} cannot be imported: {type(error).__name__}: {error}", error) from error
    return module


def _module_named(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except EinfallError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise EinfallError(f"there is no module {name}", hint="path/to/file.py:name, module:name or file.cascade") from None
        raise _failure(f"module {name} cannot be imported: {error}", error) from error
    except Exception as error:
        raise _failure(f"module {name} cannot be imported: {type(error).__name__}: {error}", error) from error


def _failure(what: str, error: Exception) -> EinfallError:
    """An error at the last line of the user's code."""
    if isinstance(error, SyntaxError) and error.filename:
        return EinfallError(what, location=Location(error.filename, error.lineno or 1, error.offset or 0))
    ours = str(Path(__file__).resolve().parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename and not f.filename.startswith(ours)]
    location = Location(frames[-1].filename, frames[-1].lineno or 1) if frames else None
    return EinfallError(what, location=location)


def _pick(module: ModuleType, place: str, name: str) -> Kernel:
    from ..api import Kernel
    from ..ir.cascade import Cascade

    kernels = [key for key, value in vars(module).items() if isinstance(value, (Kernel, Cascade))]
    if not name:
        if len(kernels) != 1:
            found = ", ".join(kernels) or "none"
            raise EinfallError(f"{place} has {len(kernels)} kernels, say which", hint=f"{place}:name; its kernels are {found}")
        name = kernels[0]
    value = getattr(module, name, None)
    if isinstance(value, Kernel):
        return value
    if isinstance(value, Cascade):
        return Kernel.from_cascade(value)
    if value is not None:
        raise EinfallError(f"{place}:{name} is a {type(value).__name__}, no kernel", hint="decorate the function with @ef.kernel")
    near = get_close_matches(name, kernels, 1)
    hint = (f"did you mean {near[0]}? " if near else "") + f"its kernels are {', '.join(kernels) or 'none'}"
    raise EinfallError(f"{place} has no {name}", hint=hint)


def _similar_files(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
    return f"did you mean {path.parent / near[0]}?" if near else None


class Pairs(click.ParamType[Any]):
    """`a=1,b=2`: names with whole numbers (`int`), types or numbers (`value`)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = {"int": "NAME=N,...", "type": "TYPE | NAME=TYPE,...", "value": "NAME=VALUE,..."}[kind]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The table, or the one type given for all inputs."""
        if not isinstance(value, str):
            return value
        if self.kind == "type" and "=" not in value:
            return value.strip()
        table: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in value.split(","))):
            name, equals, text = (part.strip() for part in item.partition("="))
            if not equals or not name.isidentifier() or not text:
                self.fail(f"{item!r} is not of the form name=value", param, ctx)
            if name in table:
                self.fail(f"{name} is given twice", param, ctx)
            table[name] = self._value(name, text, param, ctx)
        return table

    def _value(self, name: str, text: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.kind == "type":
            return text
        if self.kind == "int":
            if not text.isascii() or not text.isdecimal():
                self.fail(f"{name}={text}: {text!r} is no whole number", param, ctx)
            return int(text)
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        for convert in (int, float):
            try:
                return convert(text)
            except ValueError:
                continue
        return text


def merge(tables: tuple[Any, ...]) -> dict[str, Any]:
    """The tables of an option given several times, as one."""
    merged: dict[str, Any] = {}
    for table in tables:
        if isinstance(table, Mapping):
            merged.update(table)
    return merged
