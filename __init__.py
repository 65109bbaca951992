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
    from .compiler.functions import abs as abs
    from .compiler.functions import ceil as ceil
    from .compiler.functions import clz as clz
    from .compiler.functions import concat as concat
    from .compiler.functions import cos as cos
    from .compiler.functions import erf as erf
    from .compiler.functions import exact as exact
    from .compiler.functions import exp as exp
    from .compiler.functions import exp2 as exp2
    from .compiler.functions import extent as extent
    from .compiler.functions import floor as floor
    from .compiler.functions import index as index
    from .compiler.functions import isfinite as isfinite
    from .compiler.functions import isinf as isinf
    from .compiler.functions import isnan as isnan
    from .compiler.functions import iterate as iterate
    from .compiler.functions import log as log
    from .compiler.functions import log1p as log1p
    from .compiler.functions import log2 as log2
    from .compiler.functions import maximum as maximum
    from .compiler.functions import minimum as minimum
    from .compiler.functions import popcount as popcount
    from .compiler.functions import round as round
    from .compiler.functions import rsqrt as rsqrt
    from .compiler.functions import sigmoid as sigmoid
    from .compiler.functions import sign as sign
    from .compiler.functions import sin as sin
    from .compiler.functions import sqrt as sqrt
    from .compiler.functions import tanh as tanh
    from .compiler.functions import trunc as trunc
    from .compiler.functions import where as where
    from .configuration import Settings as Settings
    from .configuration import configure as configure
    from .helpers import logsumexp as logsumexp
    from .helpers import mean as mean
    from .helpers import rope as rope
    from .helpers import softmax as softmax
    from .helpers import var as var
    from .ir.cascade import Cascade as Cascade
    from .ir.errors import BindingError as BindingError
    from .ir.errors import BuildError as BuildError
    from .ir.errors import CascadeError as CascadeError
    from .ir.errors import DatabaseError as DatabaseError
    from .ir.errors import EinfallError as EinfallError
    from .ir.errors import ScheduleError as ScheduleError
    from .ir.errors import UnsupportedError as UnsupportedError
    from .ir.types import DType as DType
    from .ir.types import bf16 as bf16
    from .ir.types import boolean as boolean
    from .ir.types import e8m0 as e8m0
    from .ir.types import f4e2m1 as f4e2m1
    from .ir.types import f8e4m3 as f8e4m3
    from .ir.types import f8e5m2 as f8e5m2
    from .ir.types import f16 as f16
    from .ir.types import f32 as f32
    from .ir.types import f64 as f64
    from .ir.types import i4 as i4
    from .ir.types import i8 as i8
    from .ir.types import i16 as i16
    from .ir.types import i32 as i32
    from .ir.types import i64 as i64
    from .ir.types import u8 as u8
    from .schedules.schedule import Schedule as Schedule

    settings: Settings

__version__ = "0.1.0"

_PLACES = {
    "api": ("Kernel", "kernel", "load", "parse"),
    "compiler.analysis": ("passes", "phases"),
    "compiler.executable": ("Executable",),
    "compiler.functions": (
        "abs", "ceil", "clz", "concat", "cos", "erf", "exact", "exp", "exp2", "extent", "floor", "index", "isfinite", "isinf", "isnan",
        "iterate", "log", "log1p", "log2", "maximum", "minimum", "popcount", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "tanh",
        "trunc", "where",
    ),
    "configuration": ("Settings", "configure"),
    "helpers": ("logsumexp", "mean", "rope", "softmax", "var"),
    "ir.cascade": ("Cascade",),
    "ir.errors": ("BindingError", "BuildError", "CascadeError", "DatabaseError", "EinfallError", "ScheduleError", "UnsupportedError"),
    "ir.types": (
        "DType", "bf16", "boolean", "e8m0", "f16", "f32", "f4e2m1", "f64", "f8e4m3", "f8e5m2", "i16", "i32", "i4", "i64", "i8", "u8",
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
