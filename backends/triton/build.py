"""Emitted kernels built ahead of time, without a driver: the full variant at once, others when a call needs them; kept as one file.

    artifact.module          Builds: the variants of one kernel by `signature.Variant`
    artifact.module.full     Built: code, name of the function, shared memory, warps, and the texts on the way to it
    artifact.module.get(v)   another variant, compiled when first asked for

The file is a zip of plain files: `builds.json`, and for each variant the binary, its assembly and Triton's GPU dialect. Reading it
executes nothing: every entry is compared with what `builds.json` says of it, and that with the source.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...configuration import current
from ...ir.errors import BuildError, UnsupportedError
from ...schedules.target import Target
from ..base import Artifact, Source
from .emitted import check_emitted
from .listings import program_hash
from .process import SECONDS, WORKERS, Compiled
from .resources import Resources, check_resources, resources_of
from .signature import Signature, Variant, signature_of

FORMAT = 1  # of the file; raised when its layout changes
INDEX = "builds.json"
LARGEST = 64 << 20  # bytes of one entry that is read
BINARY = {"cuda": "cubin", "hip": "hsaco"}
ASSEMBLY = {"cuda": "ptx", "hip": "amdgcn"}
DIALECT = "ttgir"


@dataclass(frozen=True, slots=True)
class Built:
    """One variant as Triton compiled it.

    Args:
        variant: what it was compiled for.
        code: the binary that the driver loads, a cubin or a code object.
        assembly: PTX, or AMD assembly.
        dialect: Triton's GPU dialect, the last text that is the same for equal programs.
        metadata: what Triton knows of it: `name` of the function, `shared` bytes, `num_warps`, `global_scratch_size`, ...
        resources: what a block of it takes.
        triton: the version.
    """

    variant: Variant
    code: bytes = field(repr=False)
    assembly: str = field(repr=False)
    dialect: str = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    resources: Resources
    triton: str

    @property
    def name(self) -> str:
        """The function in the binary."""
        return str(self.metadata["name"])

    @property
    def shared(self) -> int:
        """The bytes of shared memory to ask for at a launch."""
        return self.resources.shared_bytes

    @property
    def warps(self) -> int:
        """The warps of a block, which can be more than were asked for."""
        return self.resources.warps

    @property
    def program(self) -> str:
        """The same for two builds of which Triton made the same program, whatever their schedules: only one need be measured."""
        return program_hash(self.dialect)


class Builds:
    """The variants of a kernel, compiled when first asked for. Threads may share it."""

    def __init__(self, source: Source, built: Iterable[Built] = (), *, seconds: float = SECONDS) -> None:
        self.source = source
        self.signature = signature_of(source)
        self._seconds = seconds
        self._built = {b.variant: b for b in built}
        self._lock = threading.Lock()

    @property
    def full(self) -> Built:
        """The variant for tensors that are aligned as the kernel hopes."""
        return self.get(self.signature.full())

    @property
    def built(self) -> tuple[Built, ...]:
        """Those compiled so far."""
        return tuple(self._built.values())

    def get(self, variant: Variant) -> Built:
        """A variant. Raises `BuildError` where Triton refuses it, `ScheduleError` where it takes more than the target has."""
        found = self._built.get(variant)
        if found is None:
            with self._lock:
                found = self._built.get(variant)
                if found is None:
                    found = self._built[variant] = compile_variant(self.source, self.signature, variant, self._seconds)
        return found


def build(source: Source, *, seconds: float = SECONDS) -> Artifact:
    """The kernel with its full variant compiled. Raises `BuildError` or `ScheduleError`, see `Builds.get`."""
    builds = Builds(source, seconds=seconds)
    builds.get(builds.signature.full())
    return Artifact(source, builds)


def compile_variant(source: Source, signature: Signature, variant: Variant, seconds: float = SECONDS) -> Built:
    """Compile one variant in another process and check what it takes."""
    check_emitted(source)
    job = {
        "path": str(kernel_file(source)),
        "entry": signature.entry,
        "types": signature.types(variant),
        "aligned": sorted(variant.aligned),
        "target": architecture(source.target),
        "shared": source.target.limit("shared_memory", 1 << 40),
        "options": {"num_warps": signature.warps, "num_stages": signature.stages, "enable_fp_fusion": signature.fusion},
    }
    compiled = WORKERS.compile(job, seconds)
    if not compiled.files:  # it stopped before the assembler, which alone knows registers
        shared, warps = int(compiled.metadata["shared"]), int(compiled.metadata["num_warps"])
        check_resources(Resources(0, 0, 0, shared, warps, warps * source.target.limit("warp", 32)), signature, source.target)
    built = _built(compiled, variant, source.target)
    check_resources(built.resources, signature, source.target)
    return built


def _built(compiled: Compiled, variant: Variant, target: Target) -> Built:
    code, assembly = compiled.files[BINARY[target.kind]], compiled.files[ASSEMBLY[target.kind]].decode()
    kept = {key: value for key, value in compiled.metadata.items() if key not in ("extern_libs", "hash")}  # a path, and what hangs on it
    resources = resources_of(kept, code, assembly, compiled.log, target)
    return Built(variant, code, assembly, compiled.files[DIALECT].decode(), kept, resources, compiled.triton)


def architecture(target: Target) -> list[str | int]:
    """Kind, architecture and warp as Triton names them: `["cuda", 90, 32]`. Raises `UnsupportedError` for another kind of target."""
    kind, _, arch = target.name.partition(":")
    if kind == "cuda" and re.fullmatch(r"sm_\d+", arch):
        return [kind, int(arch[3:]), target.limit("warp", 32)]
    if kind == "hip" and re.fullmatch(r"gfx\w+", arch):
        return [kind, arch, target.limit("warp", 64)]
    raise UnsupportedError(f"Triton compiles for cuda:sm_NN and hip:gfxNNN, not for {target.name}")


def kernel_file(source: Source) -> Path:
    """A file that holds the source, named by its content; written where it is not there yet. A reader never sees half of it.

    Without a cache that can be written it lies in a folder of this process.
    """
    data, root = source.text.encode(), current().cache
    name = f"kernel_{hashlib.sha256(data).hexdigest()[:32]}.py"
    if root is not None:
        with suppress(OSError):
            return _written(root / "triton" / name, data)
    try:
        return _written(_own_folder(os.getpid()) / name, data)
    except OSError as error:
        raise BuildError(f"no file can be written for {source.entry}: {error}", hint="set EINFALL_CACHE to a folder of yours") from None


def _written(path: Path, data: bytes) -> Path:
    with suppress(OSError):
        if path.read_bytes() == data:
            return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, beside = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(beside, path)
    return path


@cache
def _own_folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="einfall-kernels-"))

    def remove() -> None:
        if os.getpid() == process:  # and not a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


# -- one file -----------------------------------------------------------------------------------------------------------------------


def save(artifact: Artifact, path: Path) -> None:
    """Writes the variants compiled so far as one file; a reader never sees half of it."""
    builds: Builds = artifact.module
    source, kind = artifact.source, artifact.source.target.kind
    files: dict[str, bytes] = {}
    entries: list[dict[str, Any]] = []
    for i, b in enumerate(builds.built):
        texts = {BINARY[kind]: b.code, ASSEMBLY[kind]: b.assembly.encode(), DIALECT: b.dialect.encode()}
        files.update({f"{i}.{ending}": data for ending, data in texts.items()})
        entries.append(
            {
                "aligned": sorted(b.variant.aligned),
                "wide": b.variant.wide,
                "triton": b.triton,
                "metadata": dict(b.metadata),
                "resources": b.resources.to_dict(),
                "files": {f"{i}.{ending}": hashlib.sha256(data).hexdigest() for ending, data in texts.items()},
            }
        )
    index = {"format": FORMAT, "target": source.target.name, "entry": source.entry, "source": source.hash, "builds": entries}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {INDEX: (json.dumps(index, indent=1, sort_keys=True) + "\n").encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(packed.getvalue())
    os.replace(beside, path)


def restore(path: Path, source: Source) -> Artifact:
    """The kernel that `save` wrote. Raises `BuildError` for a file that is damaged or of another source or target."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(_entry(archive, INDEX))
            wanted = {"format": FORMAT, "target": source.target.name, "entry": source.entry, "source": source.hash}
            for key, value in wanted.items():
                if index[key] != value:
                    raise ValueError(f"its {key} is {index[key]!r}, not {value!r}")
            builds = Builds(source, [_restored(archive, entry, source) for entry in index["builds"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError) as error:  # an encrypted entry is a RuntimeError
        raise _damaged(path, error) from None
    for b in builds.built:
        check_resources(b.resources, builds.signature, source.target)
    return Artifact(source, builds)


def listings(artifact: Artifact) -> dict[str, bytes]:
    """The full variant as files to be read: its assembly and its binary, by their endings."""
    builds: Builds = artifact.module
    kind = artifact.source.target.kind
    return {ASSEMBLY[kind]: builds.full.assembly.encode(), BINARY[kind]: builds.full.code}


def _restored(archive: zipfile.ZipFile, entry: Mapping[str, Any], source: Source) -> Built:
    files: dict[str, bytes] = {}
    for name, expected in entry["files"].items():
        data = _entry(archive, str(name))
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"{name} does not match its hash")
        files[str(name).partition(".")[2]] = data
    metadata, kind = entry["metadata"], source.target.kind
    if not isinstance(metadata, dict) or not re.fullmatch(r"[A-Za-z_]\w*", str(metadata["name"])):
        raise ValueError("it names no function")
    variant = Variant(frozenset(str(name) for name in entry["aligned"]), bool(entry["wide"]))
    resources = Resources.from_dict(entry["resources"])
    if resources.shared_bytes != metadata["shared"] or resources.warps != metadata["num_warps"]:
        raise ValueError("its resources are not those of its metadata")
    texts = files[ASSEMBLY[kind]].decode(), files[DIALECT].decode()
    return Built(variant, files[BINARY[kind]], *texts, metadata, resources, str(entry["triton"]))


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{name} has {size} bytes")
    with archive.open(name) as file:
        data = file.read(LARGEST + 1)
    if len(data) != size:
        raise ValueError(f"{name} was cut short")
    return data


def _damaged(path: Path, error: Exception) -> BuildError:
    what = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) and error.args else f"cannot be loaded: {error}"
    return BuildError(f"{path} {what}", hint="compile the kernel again")
