"""The settings: one frozen object, read from the environment once, replaced by `configure`.

    EINFALL_DB      the tuning database; empty for none       (default: einfall/tuned.db in the user's data folder)
    EINFALL_CACHE   the folder of built kernels; empty for none   (default: einfall in the user's cache folder)
    EINFALL_DEBUG   1: every pass is checked and printed, and the command line shows tracebacks

The module is not called `settings` because `einfall.settings` is the object.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .ir.errors import EinfallError


@dataclass(frozen=True, slots=True)
class Settings:
    """What a process may choose.

    Args:
        database: the SQLite file that holds tuned schedules; None looks nothing up.
        cache: the folder of built kernels; None keeps them in memory only.
        debug: whether each pass is checked and printed.
        threads: the threads kernels are built for, and of the pool that the first kernel of the process starts; None for one a core
            that the process may use.
    """

    database: Path | None
    cache: Path | None
    debug: bool = False
    threads: int | None = None


def from_environment(environment: Mapping[str, str]) -> Settings:
    """The settings that `environment` asks for. Raises `EinfallError` for a value that means nothing."""
    home = Path(environment.get("HOME") or Path.home())
    data = Path(environment.get("XDG_DATA_HOME") or home / ".local" / "share")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    debug = environment.get("EINFALL_DEBUG", "").strip().lower()
    if debug not in ("", "0", "1", "false", "true", "no", "yes", "off", "on"):
        raise EinfallError(f"EINFALL_DEBUG is {debug!r}", hint="1 or 0")
    return Settings(
        database=_path(environment.get("EINFALL_DB"), data / "einfall" / "tuned.db"),
        cache=_path(environment.get("EINFALL_CACHE"), cache / "einfall"),
        debug=debug in ("1", "true", "yes", "on"),
    )


def _path(value: str | None, default: Path) -> Path | None:
    if value is None:
        return default
    return Path(value).expanduser() if value.strip() else None


class _Process:
    """Holds the settings of this process. The one place where they change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settings: Settings | None = None

    def get(self) -> Settings:
        settings = self._settings
        if settings is None:
            with self._lock:
                if self._settings is None:
                    self._settings = from_environment(os.environ)
                settings = self._settings
        return settings

    def set(self, settings: Settings) -> None:
        with self._lock:
            self._settings = settings


_PROCESS = _Process()


def current() -> Settings:
    """The settings now in force in this process."""
    return _PROCESS.get()


class configure:
    """Change settings of this process from now on; as a context manager, until its block ends.

        ef.configure(database="tuned.db")
        with ef.configure(cache=None, debug=True):
            ...

    Raises `EinfallError` for an unknown setting or a value of a wrong type.
    """

    def __init__(self, **changes: Any) -> None:
        self._before = current()
        _PROCESS.set(_changed(self._before, changes))

    def __enter__(self) -> Settings:
        return current()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _PROCESS.set(self._before)

    def __repr__(self) -> str:
        return repr(current())


def _changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    known = ("database", "cache", "debug", "threads")
    checked: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in known:
            raise EinfallError(f"there is no setting {name!r}", hint="settings are " + ", ".join(known))
        if name in ("database", "cache"):
            if value is not None and not isinstance(value, (str, Path)):
                raise EinfallError(f"{name} must be a path or None, found {value!r}")
            checked[name] = None if value is None else Path(value).expanduser()
        elif name == "debug":
            if not isinstance(value, bool):
                raise EinfallError(f"debug must be True or False, found {value!r}")
            checked[name] = value
        else:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise EinfallError(f"threads must be a whole number above 0 or None, found {value!r}")
            checked[name] = value
    return replace(settings, **checked)
