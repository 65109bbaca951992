"""A built kernel as one file: a zip of CUDA C, PTX and machine code, each compared with its hash when it is read. Nothing is executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from ...ir.errors import BuildError
from ..base import Artifact, Source
from ..triton.resources import Resources, check_resources
from ..triton.signature import signature_of
from .build import Compiled, Machine

FORMAT = 1  # of the file; raised when its layout changes
INDEX = "build.json"
LARGEST = 64 << 20  # bytes of one entry that is read


def save(artifact: Artifact, path: Path) -> None:
    """Writes the kernel; a reader never sees half of it."""
    compiled: Compiled = artifact.module
    files = listings(artifact)
    index: dict[str, Any] = {
        "format": FORMAT,
        "target": artifact.source.target.name,
        "source": artifact.source.hash,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    if compiled.code is not None:
        index |= {"compiler": compiled.code.compiler, "resources": compiled.code.resources.to_dict()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {INDEX: (json.dumps(index, indent=1, sort_keys=True) + "\n").encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(packed.getvalue())
    os.replace(beside, path)


def listings(artifact: Artifact) -> dict[str, bytes]:
    """CUDA C, and PTX and machine code where there are, by their endings."""
    compiled: Compiled = artifact.module
    files = {"cu": compiled.cuda.encode()}
    return files if compiled.code is None else {**files, "ptx": compiled.code.ptx.encode(), "cubin": compiled.code.cubin}


def restore(path: Path, source: Source) -> Artifact:
    """The kernel that `save` wrote. Raises `BuildError` for a file that is damaged or of another source or target."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(_entry(archive, INDEX))
            for key, value in {"format": FORMAT, "target": source.target.name, "source": source.hash}.items():
                if index[key] != value:
                    raise ValueError(f"its {key} is {index[key]!r}, not {value!r}")
            files = {str(name): _entry(archive, str(name)) for name in index["files"]}
            for name, data in files.items():
                if hashlib.sha256(data).hexdigest() != index["files"][name]:
                    raise ValueError(f"{name} does not match its hash")
        code = None
        if "cubin" in files:
            resources = Resources.from_dict(index["resources"])
            code = Machine(str(index["compiler"]), files["ptx"].decode(), files["cubin"], resources)
        artifact = Artifact(source, Compiled(files["cu"].decode(), code))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError) as error:  # an encrypted entry is a RuntimeError
        raise _damaged(path, error) from None
    if code is not None:
        check_resources(code.resources, signature_of(source), source.target)
    return artifact


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{name} has {size} bytes")
    with archive.open(name) as file:
        return file.read(LARGEST)


def _damaged(path: Path, error: Exception) -> BuildError:
    return BuildError(f"{path} cannot be read: {error or type(error).__name__}", hint="compile the kernel again")
