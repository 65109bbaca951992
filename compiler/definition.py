"""What a kernel is defined by, a function or a cascade, and what a call of it asks for.

Nothing heavy is imported before something is traced: a function may be decorated for nothing.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..ir.cascade import Cascade
from ..ir.errors import BindingError
from ..ir.types import DType
from ..ir.types import dtype as dtype_named
from .scalars import converter, to_float

if TYPE_CHECKING:
    import torch

_REQUIRED: Any = inspect.Parameter.empty
DtypeLike = str | DType


@dataclass(frozen=True, slots=True)
class Parameters:
    """The arguments of a kernel: tensors in order, scalars and static arguments with their defaults (or `_REQUIRED`).

    `numbers` has the scalars again, each with what makes it a number.
    """

    tensors: tuple[str, ...]
    scalars: tuple[tuple[str, Any], ...]
    numbers: tuple[tuple[str, Any, Callable[[Any], float]], ...]
    static: tuple[tuple[str, Any], ...]

    @staticmethod
    def of_function(function: Callable[..., Any]) -> Parameters:
        """What the annotations of a function say, as far as it takes to sort a call; tracing reads them in full."""
        tensors, scalars, static = [], [], []
        for parameter in inspect.signature(function).parameters.values():
            said = type(parameter.default) if parameter.annotation is _REQUIRED else parameter.annotation
            kind = getattr(said, "__name__", said)
            if kind == "float":
                scalars.append((parameter.name, parameter.default))
            elif kind in ("int", "bool", "str"):
                static.append((parameter.name, parameter.default))
            else:
                tensors.append(parameter.name)
        return Parameters(tuple(tensors), tuple(scalars), tuple((n, d, to_float) for n, d in scalars), tuple(static))

    @staticmethod
    def of_cascade(cascade: Cascade) -> Parameters:
        """The inputs and scalars of a cascade."""
        numbers = tuple((s.name, _REQUIRED, converter(s.dtype)) for s in cascade.scalars)
        return Parameters(tuple(t.name for t in cascade.inputs), tuple((n, d) for n, d, _ in numbers), numbers, ())


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks of the compiler: a cascade, the extent of every rank, and the inputs whose last axis is not contiguous."""

    cascade: Cascade
    sizes: Mapping[str, int]
    strided: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Call:
    """A call with its arguments in order, for the cascade that they ask for."""

    cascade: Cascade
    tensors: tuple[torch.Tensor, ...]
    scalars: tuple[float | int, ...]
    static: Mapping[str, Any]

    @property
    def by_name(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the inputs."""
        return {t.name: tensor for t, tensor in zip(self.cascade.inputs, self.tensors, strict=True)}

    def asked(self) -> Asked:
        """What the call asks of the compiler. Raises `BindingError` for tensors that do not fit."""
        from ..ir.binding import bind_sizes
        from .binding import strided_inputs

        tensors = self.by_name
        sizes = bind_sizes(self.cascade, tensors)
        return Asked(self.cascade, sizes, strided_inputs(tensors))


class Definition:
    """A function on named ranks, or a cascade; traced once for its static arguments and the types of its inputs."""

    def __init__(self, function: Callable[..., Any] | None, cascade: Cascade | None) -> None:
        if function is not None and cascade is None:
            self.name, self.parameters = getattr(function, "__name__", "kernel"), Parameters.of_function(function)
        elif cascade is not None and function is None:
            self.name, self.parameters = cascade.name, Parameters.of_cascade(cascade)
        else:
            raise TypeError("a kernel is made of a function or of a cascade")
        self._function = function
        self._given = cascade
        self._lock = threading.RLock()  # a traced function may ask for the cascade of another kernel, or of this one
        self._traced: dict[object, Cascade] = {}

    def trace(self, dtypes: Mapping[str, DtypeLike] | DtypeLike | None, static: Mapping[str, Any]) -> Cascade:
        """The cascade for these input types (f32 where not given) and static arguments (their defaults where not given).

        Raises `BindingError` for an unknown argument or type, `CascadeError` for a wrong program.
        """
        types = self._types(dtypes)
        chosen = self.static(static)
        key = (tuple(sorted((name, t.name) for name, t in types.items())), tuple(chosen.items()))
        with self._lock:
            cascade = self._traced.get(key)
            if cascade is None:
                cascade = self._traced[key] = self._trace(types, chosen)
            return cascade

    def sort(self, tensors: Sequence[Any], named: Mapping[str, Any]) -> Call:
        """Sort the arguments, trace for their types, and check that none is missing or unknown."""
        from .binding import arguments, types_of

        parameters = self.parameters
        given = {**dict(zip(parameters.tensors, tensors, strict=False)), **{n: v for n, v in named.items() if n in parameters.tensors}}
        types = types_of(given, self.name) if self._given is None else {}
        static_names = {name for name, _ in parameters.static}
        static = self.static({name: value for name, value in named.items() if name in static_names})
        cascade = self.trace(types, static)
        rest = {name: default for name, default in parameters.scalars if default is not _REQUIRED}
        rest.update({name: value for name, value in named.items() if name not in static_names})
        ordered, scalars = arguments(cascade, tensors, rest)
        return Call(cascade, ordered, tuple(scalars), static)

    def describe(
        self,
        tensors: Sequence[Any],
        named: Mapping[str, Any],
        dims: Mapping[str, int] | None,
        dtypes: Mapping[str, DtypeLike] | DtypeLike | None,
    ) -> Asked:
        """The cascade and the extent of every rank of a call, given by tensors or by `dims` and `dtypes`. Scalars may be left out."""
        if self.gives_tensors(tensors, named):
            if dims is not None or dtypes is not None:
                raise BindingError("both tensors and dims or dtypes are given", cascade=self.name, hint="one or the other")
            return self.sort(tensors, {**{name: 0.0 for name, _ in self.parameters.scalars}, **named}).asked()
        from .binding import complete_sizes

        cascade = self.trace(dtypes, self.split(named)[1])
        return Asked(cascade, complete_sizes(cascade, dims or {}))

    def gives_tensors(self, tensors: Sequence[object], named: Mapping[str, object]) -> bool:
        """Whether any tensor is among the arguments."""
        return bool(tensors) or any(name in self.parameters.tensors for name in named)

    def split(self, named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scalars (defaults included) and everything else of `named`."""
        scalars = {name: default for name, default in self.parameters.scalars if default is not _REQUIRED}
        names = {name for name, _ in self.parameters.scalars}
        scalars.update({name: value for name, value in named.items() if name in names})
        return scalars, {name: value for name, value in named.items() if name not in names}

    def _trace(self, types: Mapping[str, DType], static: Mapping[str, object]) -> Cascade:
        if self._given is not None:
            from ..ir.check import check_cascade

            retyped = replace(self._given, inputs=tuple(replace(t, dtype=types.get(t.name, t.dtype)) for t in self._given.inputs))
            if retyped != self._given:
                check_cascade(retyped)
            return retyped
        from .trace import trace

        if self._function is None:
            raise AssertionError("a definition has a function or a cascade")
        return trace(self._function, static=static, dtypes=types)

    def _types(self, dtypes: Mapping[str, DtypeLike] | DtypeLike | None) -> dict[str, DType]:
        if dtypes is None:
            return {}
        table = dict(dtypes) if isinstance(dtypes, Mapping) else dict.fromkeys(self.parameters.tensors, dtypes)
        found = {}
        for name, t in table.items():
            if name not in self.parameters.tensors:
                known = ", ".join(self.parameters.tensors)
                raise BindingError(f"a type is given for {name!r}, which is no input", cascade=self.name, hint=f"the inputs are {known}")
            try:
                found[name] = dtype_named(t)
            except (KeyError, TypeError):
                raise BindingError(f"{name}: there is no element type {t!r}", cascade=self.name, hint="such as f32, bf16, i8") from None
        return found

    def static(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The static arguments, defaults included. Raises `BindingError` for one that is missing, unknown or of another kind."""
        chosen = {}
        for name, default in self.parameters.static:
            value = given.get(name, default)
            if value is _REQUIRED:
                raise BindingError(f"the static argument {name} is not given", cascade=self.name, hint=f"{name}=... by name")
            if not isinstance(value, (int, str)):
                raise BindingError(f"the static argument {name} is {value!r}", cascade=self.name, hint="a whole number, a bool or a text")
            chosen[name] = value
        if unknown := sorted(set(given) - set(chosen)):
            known = ", ".join(chosen) or "(none)"
            raise BindingError(f"there is no static argument {unknown[0]!r}", cascade=self.name, hint=f"they are {known}")
        return chosen
