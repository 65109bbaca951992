"""einfall: cascades of Einsums, turned into fused, tuned kernels.

Every public name is loaded when it is first asked for, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Kernel as Kernel
    from .api import kernel as kernel
    from .api import load as load
    from .api import parse as parse
    from .compiler.analysis import passes as passes
    from .compiler.analysis import phases as phases
    from .compiler.executable import Executable as Executable
    from .configuration import Settings as Settings
    from .configuration import configure as configure
    from .ir.cascade import Cascade as Cascade
    from .ir.errors import BindingError as BindingError
    from .ir.errors import BuildError as BuildError
    from .ir.errors import CascadeError as CascadeError
    from .ir.errors import DatabaseError as DatabaseError
    from .ir.errors import EinfallError as EinfallError
    from .ir.errors import ScheduleError as ScheduleError
    from .ir.errors import UnsupportedError as UnsupportedError
    from .schedules.schedule import Schedule as Schedule

    settings: Settings

__version__ = "0.1.0"

_PLACES = {
    "api": ("Kernel", "kernel", "load", "parse"),
    "compiler.analysis": ("passes", "phases"),
    "compiler.executable": ("Executable",),
    "configuration": ("Settings", "configure"),
    "ir.cascade": ("Cascade",),
    "ir.errors": (
        "BindingError", "BuildError", "CascadeError", "DatabaseError", "EinfallError", "ScheduleError", "UnsupportedError",
    ),
    "schedules.schedule": ("Schedule",),
}  # fmt: skip
_PLACE = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", "settings", *sorted(_PLACE)]


def __getattr__(name: str) -> Any:
    if name == "settings":  # never kept: it changes with configure()
        from .configuration import current

        return current()
    if name in _PLACE:
        from importlib import import_module

        value = getattr(import_module(f".{_PLACE[name]}", __name__), name)
        globals()[name] = value
        return value
    from difflib import get_close_matches

    near = get_close_matches(name, __all__, 1)
    raise AttributeError(f"module 'einfall' has no attribute {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
