"""Executables as files: what `Executable.save` writes, `ef.load` reads, and the disk cache keeps.

    manifest.json       format, versions, the cascade's text, target, schedule, extents, and each kernel's call, files and facts
    0_name.py           the emitted source, readable
    0_name.so           what the target's compiler made of it; .zip where it comes in several builds
    0_name.ptx, .cubin  what there is to read in it, for GPUs

Nothing that is read here is executed but the binary itself, and that only after its hash was found to be right.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from ..backends.base import Source
from ..backends.registry import backend_for
from ..ir.cascade import Cascade
from ..ir.errors import BuildError, EinfallError, UnsupportedError
from ..schedules.schedule import Schedule
from ..schedules.target import Target, load_target
from .cache import MANIFEST, read_entry, write_entry
from .executable import Executable
from .parts import Call, LibraryPart, LoopPart, Part

FORMAT = 1  # of the manifest; raised when its layout changes
_TOOLS = {"cpu": ("apache-tvm", "apache-tvm-ffi"), "cuda": ("apache-tvm", "apache-tvm-ffi", "triton"), "hip": ("triton",)}


@cache
def toolchain(kind: str) -> tuple[str, ...]:
    """The versions of the tools that make binaries for targets of that kind. None of them is loaded."""
    found = []
    for name in _TOOLS.get(kind, ()):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return tuple(found)


def manifest(executable: Executable, kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """What is to be known of an executable beside its files.

    `kernels` has for each part the files of a kernel, and its facts if they are wanted; nothing for a library call.
    """
    return {
        "format": FORMAT,
        "toolchain": list(toolchain(executable.target.kind)),
        "cascade": str(executable.cascade),
        "target": executable.target.to_dict(),
        "schedule": executable.schedule.to_dict(),
        "sizes": dict(executable.sizes),
        "strided": sorted(executable.strided),
        "kernels": [_entry(part, files) for part, files in zip(executable.parts, kernels, strict=True)],
    }


def _entry(part: Part | LibraryPart | LoopPart, files: Mapping[str, Any]) -> dict[str, Any]:
    match part:
        case LibraryPart():
            return {"call": part.call.to_dict(), "library": str(part.cascade)}
        case LoopPart():
            return {"call": part.call.to_dict(), "loop": str(part.cascade), "body": manifest(part.body, files["body"])}
        case Part():
            return {"call": part.call.to_dict(), "entry": part.source.entry, **files}


def executable_of(
    facts: Mapping[str, Any], file: Callable[[Mapping[str, Any], str], Path], cascade: Cascade | None = None, *, inner: bool = False
) -> Executable:
    """The executable that a manifest describes; `file(kernel, "source" | "binary")` finds the files of a kernel.

    Raises `BuildError` for another format or toolchain, `KeyError`, `TypeError` or `ValueError` for a manifest that is malformed.
    """
    if facts["format"] != FORMAT:
        raise BuildError(f"it has format {facts['format']}, this einfall reads format {FORMAT}", hint="compile it again")
    target = Target.from_dict(facts["target"])
    if target.kind == "cpu" and tuple(facts["toolchain"]) != toolchain("cpu"):  # the code for a GPU runs without its compiler
        found, here = ", ".join(facts["toolchain"]), ", ".join(toolchain("cpu"))
        raise BuildError(f"it was built with {found}; here are {here}", hint="compile it again, or install those versions")
    from ..ir.text import parse_cascade

    parts: list[Part | LibraryPart | LoopPart] = []
    for kernel in facts["kernels"]:
        call = Call.from_dict(kernel["call"])
        if "library" in kernel:
            parts.append(LibraryPart(call, parse_cascade(str(kernel["library"]), MANIFEST)))
        elif "loop" in kernel:
            parts.append(LoopPart(call, parse_cascade(str(kernel["loop"]), MANIFEST), executable_of(kernel["body"], file, inner=True)))
        else:
            source = Source.make(file(kernel, "source").read_text(encoding="utf-8"), str(kernel["entry"]), target)
            parts.append(Part(call, source, kernel.get("facts"), path=file(kernel, "binary")))
    if cascade is None:
        cascade = parse_cascade(str(facts["cascade"]), MANIFEST)
    sizes = {str(rank): int(size) for rank, size in facts["sizes"].items()}
    return Executable(cascade, target, Schedule.from_dict(facts["schedule"]), sizes, parts, frozenset(facts["strided"]), inner=inner)


def save_executable(executable: Executable, folder: str | Path) -> Path:
    """Write an executable into `folder`, in the place of one that was saved there before. Returns the folder.

    Raises `EinfallError` for a folder that holds something else or cannot be written.
    """
    place = Path(folder).expanduser()
    try:
        if place.exists() and not (place / MANIFEST).is_file() and not (place.is_dir() and not any(place.iterdir())):
            raise EinfallError(f"{place} is there already and holds no saved executable", hint="a new or an empty folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".einfall-", dir=place.parent) as beside:
            files: dict[str, bytes | Path] = {}
            kernels = _files(executable, Path(beside), files, count())
            write_entry(Path(beside) / "entry", manifest(executable, kernels), files)
            if place.exists():
                os.rename(place, Path(beside) / "before")
            os.rename(Path(beside) / "entry", place)
    except OSError as error:
        raise EinfallError(f"{place} cannot be written: {error.strerror}") from None
    return place


def _files(executable: Executable, beside: Path, files: dict[str, bytes | Path], numbers: Iterator[int]) -> list[dict[str, Any]]:
    """What the manifest says of the files of each part; the files are added to `files`, those of a kernel under a number."""
    entries: list[dict[str, Any]] = []
    for part in executable.parts:
        match part:
            case LibraryPart():
                entries.append({})
            case LoopPart():
                entries.append({"body": _files(part.body, beside, files, numbers)})
            case Part():
                backend = backend_for(part.source.target)
                name = f"{next(numbers)}_{re.sub(r'[^A-Za-z0-9_]', '_', part.call.kernel)}"
                source, binary = f"{name}.py", f"{name}{backend.suffix}"
                files[source] = part.source.text.encode()
                files[binary] = built = part.binary(beside / binary)
                files.update({f"{name}.{ending}": text for ending, text in backend.listings(built, part.source).items()})
                entries.append({"source": source, "binary": binary, "facts": dict(part.facts)})
    return entries


def load_executable(folder: str | Path) -> Executable:
    """The executable saved in `folder`, every file checked against its hash.

    Raises:
        BuildError: the folder is missing, damaged, or written by another version.
        UnsupportedError: it was built for a processor with instructions that this one lacks.
    """
    place = Path(folder).expanduser()
    entry = read_entry(place)
    try:
        executable = executable_of(entry.facts, lambda kernel, kind: _plain(entry.path, kernel[kind]))
    except BuildError as error:
        raise BuildError(f"{place} cannot be loaded: {error.what}", hint=error.hint) from None
    except (EinfallError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise BuildError(f"{place / MANIFEST} is malformed: {type(error).__name__}: {error}", hint="compile it again") from None
    _check_processor(executable.target, place)
    return executable


def _plain(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a file in it")
    return folder / name


def _check_processor(target: Target, place: Path) -> None:
    if target.kind != "cpu":
        return
    missing = sorted(set(target.features) - set(load_target("cpu").features))
    if missing:
        raise UnsupportedError(
            f"{place} was built for {target.description}, whose {', '.join(missing)} this processor lacks", hint="compile it here"
        )
