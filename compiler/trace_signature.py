"""What a traced function's annotations say: inputs with their axes, scalars, static arguments, result axes.

An annotation is `"b (g r) m e=64"`, `Annotated[torch.Tensor, "b h m e"]`, or either of them as the source text that
`from __future__ import annotations` leaves. Source text is never evaluated: torch need not be there.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir.cascade import Axis, ScalarDecl, Tensor
from ..ir.errors import CascadeError, Location
from ..ir.types import DType, f32

_TOKEN = re.compile(r"\s*(?:([^\W\d]\w*)\s*(?:=\s*([^\s()]+))?|([()])|(\S+))")
_STATIC = {"int": int, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True)
class Axes:
    """A parsed annotation: axes and the sizes it gives."""

    axes: tuple[Axis, ...]
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a traced function by kind, and its result axes (None if not annotated)."""

    inputs: tuple[Tensor, ...]
    scalars: tuple[ScalarDecl, ...]
    static: tuple[tuple[str, object], ...]
    sizes: tuple[tuple[str, int], ...]
    results: tuple[Axes, ...] | None
    order: tuple[str, ...]
    location: Location | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error is: the function."""

    name: str
    location: Location | None

    def error(self, what: str, hint: str | None = None) -> CascadeError:
        return CascadeError(what, cascade=self.name, location=self.location, hint=hint)


def read_signature(function: Callable[..., object], name: str, static: Mapping[str, object], dtypes: Mapping[str, DType]) -> Signature:
    """The signature of `function`. Raises `CascadeError` for what is missing, unknown or does not parse."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = _Place(name, Location(code.co_filename, code.co_firstlineno) if code is not None else None)
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    signature = inspect.signature(function)
    inputs: list[Tensor] = []
    scalars: list[ScalarDecl] = []
    values: list[tuple[str, object]] = []
    sizes: list[tuple[str, int]] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise place.error(f"argument *{parameter.name} of a traced function", "name every tensor: its annotation gives the ranks")
        said = _annotation(parameter.annotation, scope)
        if said in _STATIC or (said is None and isinstance(parameter.default, (int, bool, str))):
            values.append((parameter.name, _static(parameter, said, static, place)))
        elif said == "float" or (said is None and isinstance(parameter.default, float)):
            scalars.append(ScalarDecl(parameter.name, f32))
        elif isinstance(said, str):
            parsed = parse_axes(said, place, f"argument {parameter.name}")
            inputs.append(Tensor(parameter.name, parsed.axes, dtypes.get(parameter.name, f32)))
            sizes += parsed.sizes
        else:
            raise place.error(
                f"argument {parameter.name} has no annotation that names its ranks, found {parameter.annotation!r}"
                if parameter.annotation is not parameter.empty
                else f"argument {parameter.name} has no annotation",
                f'{parameter.name}: "b m e" for a tensor, float for a scalar, int for a static argument',
            )
    known = {t.name for t in inputs}
    _check_names(static, {n for n, _ in values}, "static", place)
    _check_names(dtypes, known, "dtypes", place)
    if not known:
        raise place.error("a traced function without a tensor argument", 'annotate one: X: "b m e"')
    results = _results(signature.return_annotation, scope, place)
    return Signature(tuple(inputs), tuple(scalars), tuple(values), tuple(sizes), results, tuple(signature.parameters), place.location)


def _check_names(given: Mapping[str, object], known: set[str], what: str, place: _Place) -> None:
    for name in given:
        if name not in known:
            hint = f"one of {', '.join(sorted(known))}" if known else "the function has no such arguments"
            raise place.error(f"{what} names {name!r}, which is no such argument", hint)


def _static(parameter: inspect.Parameter, said: object, static: Mapping[str, object], place: _Place) -> object:
    value = static.get(parameter.name, parameter.default)
    if value is parameter.empty:
        raise place.error(f"static argument {parameter.name} has no value", f"give {parameter.name} a default, or a value at the call")
    wanted = _STATIC[said] if isinstance(said, str) else type(parameter.default)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise place.error(f"static argument {parameter.name} is {value!r}, expected {wanted.__name__}")
    return value


def parse_axes(text: str, place: _Place, what: str) -> Axes:
    """Axes in einops spelling: `b (g r) m e=64`. Raises `CascadeError` that repeats the text with a mark under the fault."""
    axes: list[Axis] = []
    sizes: list[tuple[str, int]] = []
    group: list[str] | None = None
    seen: set[str] = set()
    position = 0

    def wrong(why: str, at: int, hint: str) -> CascadeError:
        return place.error(f'{what}: {why}\n    "{text}"\n     {" " * at}^', hint)

    while match := _TOKEN.match(text, position):
        start, position = match.start() + len(match.group()) - len(match.group().lstrip()), match.end()
        rank, size, bracket, stray = match.groups()
        if stray:
            raise wrong(f"{stray!r} is no rank", start, 'names and groups: "b (g r) m e=64"')
        if bracket == "(":
            if group is not None:
                raise wrong("a group inside a group", start, "one level of brackets")
            group = []
        elif bracket == ")":
            if not group:
                raise wrong("an empty group" if group is not None else "a closing bracket without an opening one", start, '"b (g r) m e"')
            axes.append(tuple(group))
            group = None
        else:
            if rank in seen:
                raise wrong(f"rank {rank!r} twice", start, "each rank of a tensor has a name of its own; compare them with .at")
            seen.add(rank)
            if size is not None:
                if not size.isdecimal() or int(size) < 1:
                    raise wrong(f"size {size!r} of rank {rank!r}", start, f"a whole number: {rank}=64")
                sizes.append((rank, int(size)))
            if group is None:
                axes.append((rank,))
            else:
                group.append(rank)
    if group is not None:
        raise wrong("a group that is not closed", len(text), '"b (g r) m e"')
    return Axes(tuple(axes), tuple(sizes))


def _annotation(annotation: object, scope: Mapping[str, object]) -> str | None:
    """The rank string of an annotation, or the name of a plain type; None if it is neither."""
    said = _annotations(annotation, scope)
    return said if isinstance(said, str) else None


def _results(annotation: object, scope: Mapping[str, object], place: _Place) -> tuple[Axes, ...] | None:
    if annotation is inspect.Signature.empty:
        return None
    said = _annotations(annotation, scope)
    if said is None:
        raise place.error(f"the result has no annotation that names its ranks, found {annotation!r}", '-> "b h m f", or a tuple of strings')
    several = said if isinstance(said, tuple) else (said,)
    return tuple(parse_axes(text, place, f"result {i + 1}" if len(several) > 1 else "the result") for i, text in enumerate(several))


def _annotations(annotation: object, scope: Mapping[str, object]) -> str | tuple[str, ...] | None:
    if isinstance(annotation, str):
        if "'" in annotation or '"' in annotation:
            try:
                return _from_source(ast.parse(annotation.strip(), mode="eval").body)
            except SyntaxError:
                return None
        alias = scope.get(annotation)
        return _annotations(alias, scope) if hasattr(alias, "__metadata__") else annotation
    if isinstance(annotation, tuple):
        return _all(tuple(_annotations(item, scope) for item in annotation))
    metadata = getattr(annotation, "__metadata__", None)
    if metadata is not None:
        return next((item for item in metadata if isinstance(item, str)), None)
    if getattr(annotation, "__origin__", None) is tuple:
        return _all(tuple(_annotations(item, scope) for item in getattr(annotation, "__args__", ())))
    if isinstance(annotation, type) and annotation in (int, bool, float, str):
        return annotation.__name__
    return None


def _from_source(node: ast.expr) -> str | tuple[str, ...] | None:
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Tuple(elts=items):
            return _all(tuple(_from_source(item) for item in items))
        case ast.Subscript(value=(ast.Name(id="Annotated") | ast.Attribute(attr="Annotated")), slice=ast.Tuple(elts=[_, *metadata])):
            return next((item.value for item in metadata if isinstance(item, ast.Constant) and isinstance(item.value, str)), None)
        case ast.Subscript(value=ast.Name(id="tuple" | "Tuple"), slice=ast.Tuple(elts=items)):
            return _all(tuple(_from_source(item) for item in items))
        case _:
            return None


def _all(items: tuple[object, ...]) -> tuple[str, ...] | None:
    texts = tuple(item for item in items if isinstance(item, str))
    return texts if len(texts) == len(items) else None
