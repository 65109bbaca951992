"""The disk cache: folders of files under the hash of what made them, shared between processes.

    <root>/<kind>/<first two digits>/<key>/{manifest.json, files...}

An entry is written beside its place and renamed into it, so a reader sees a whole entry or none. The manifest carries the
hash of every file and of itself: an entry that was cut short or changed is named in a warning, removed, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..ir.errors import BuildError

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of files with what is known of them."""

    path: Path
    facts: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """The path of a file of this entry."""
        return self.path / name


def key_of(*parts: str) -> str:
    """A name for content: the first 40 hex digits of the SHA-256 of the parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:40]


@cache
def package_fingerprint() -> str:
    """The hash of this package's own source: a kernel derived by another version of the compiler is never taken for this one's."""
    root = Path(__file__).resolve().parent.parent
    parts: list[str] = []
    for folder in ("ir", "schedules", "backends", "compiler"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".lark", ".toml", ".ll"):
                parts += [str(file.relative_to(root)), hashlib.sha256(file.read_bytes()).hexdigest()]
    return key_of(*parts)


def write_entry(folder: Path, facts: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> Entry:
    """Write `files` and their manifest into `folder`, which must not exist or be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes: dict[str, str] = {}
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(data)
        if isinstance(content, Path):
            shutil.copymode(content, folder / name)
        hashes[name] = hashlib.sha256(data).hexdigest()
    body = {"facts": dict(facts), "files": hashes}
    text = json.dumps({**body, "hash": _hash(body)}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Entry(folder, facts)


def read_entry(folder: Path) -> Entry:
    """The entry in `folder`, every file checked against its hash. Raises `BuildError` saying what is missing or changed."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{folder} holds no {MANIFEST}", hint="a folder written by .save or `einfall compile -o`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("facts"), dict) or not isinstance(data.get("files"), dict):
        raise BuildError(f"{folder / MANIFEST} is no manifest of einfall")
    body = {"facts": data["facts"], "files": data["files"]}
    if data.get("hash") != _hash(body):
        raise BuildError(f"{folder / MANIFEST} does not match its own hash; it was changed after it was written")
    for name, expected in body["files"].items():
        if Path(name).name != name:
            raise BuildError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise BuildError(f"{folder / name} cannot be read: {error.strerror}") from None
        if found != expected:
            raise BuildError(f"{folder / name} does not match its hash; it was cut short or changed")
    return Entry(folder, body["facts"])


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class DiskCache:
    """Entries by key under `root`. Without a root, or where it cannot be written, nothing is kept."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def folder(self, kind: str, key: str) -> Path | None:
        """Where the entry of `key` stands or would stand."""
        return None if self.root is None else self.root / kind / key[:2] / key

    def get(self, kind: str, key: str) -> Entry | None:
        """The entry of `key`, or None. A damaged one is named in a warning, removed, and None."""
        folder = self.folder(kind, key)
        if folder is None or not folder.is_dir():
            return None
        try:
            return read_entry(folder)
        except BuildError as error:
            if not folder.is_dir():  # another process replaced it between our two looks
                return None
            self.drop(kind, key, error.what)
            return None

    def drop(self, kind: str, key: str, reason: str) -> None:
        """Remove the entry of `key` and say why in a warning."""
        folder = self.folder(kind, key)
        if folder is None:
            return
        text = f"einfall: the cache entry {folder} is damaged ({reason}); it is removed and built again"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        self.discard(kind, key)

    def discard(self, kind: str, key: str) -> None:
        """Remove the entry of `key`, if there is one."""
        folder = self.folder(kind, key)
        if folder is None or not folder.is_dir():
            return
        with contextlib.suppress(OSError):  # moved aside first: a rename cannot be half done
            aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
            os.replace(folder, aside / "entry")
            shutil.rmtree(aside, ignore_errors=True)

    def put(self, kind: str, key: str, facts: Mapping[str, Any], files: Mapping[str, bytes | Path]) -> Entry | None:
        """Store an entry and return it as stored; None if there is no cache or it cannot be written."""
        folder = self.folder(kind, key)
        if folder is None:
            return None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        except OSError as error:
            self._cannot_write(error)
            return None
        try:
            write_entry(beside, facts, files)
            try:
                os.rename(beside, folder)
            except OSError:  # another process was first; its entry is as good as ours
                if not folder.is_dir():
                    raise
        except OSError as error:
            self._cannot_write(error)
            return None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return self.get(kind, key)

    def _cannot_write(self, error: OSError) -> None:
        warnings.warn(f"einfall: nothing is cached, {self.root} cannot be written: {error}", RuntimeWarning, stacklevel=4)

    def usage(self) -> tuple[int, int]:
        """How many entries there are and the bytes they take."""
        if self.root is None or not self.root.is_dir():
            return 0, 0
        entries = sum(1 for _ in self.root.glob(f"*/*/*/{MANIFEST}"))
        sizes = 0
        for file in self.root.rglob("*"):
            with contextlib.suppress(OSError):
                sizes += file.stat().st_size if file.is_file() else 0
        return entries, sizes
