"""Kernels as operators of PyTorch, for `torch.compile` and `torch.export`, which call them without looking inside.

    einfall::scores_1f0c9a2b(Tensor Q, Tensor K, float scale) -> Tensor

One operator a cascade: a kernel at some input types and static arguments. Its name ends in a hash of the cascade's text, so it is the
same in every process. It is registered when a call is first traced. Its fake kernel gives shapes and types from the cascade alone.
"""

from __future__ import annotations

import functools
import hashlib
import keyword
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ir.binding import bind_sizes, to_torch
from ..ir.cascade import Cascade
from ..ir.errors import UnsupportedError
from ..ir.infer import declared_types
from .binding import shape_of

NAMESPACE = "einfall"
_LOCK = threading.Lock()
_TYPES = ("Any", "Device", "Dict", "Dimname", "Generator", "Scalar", "SymInt", "Tensor", "bool", "complex", "float", "int", "str")


def operator_of(cascade: Cascade, run: Callable[[Sequence[torch.Tensor], Sequence[Any]], Any]) -> str:
    """The name of the operator of `cascade` in the namespace `einfall`; registered, if it is not yet, to call `run(tensors, scalars)`."""
    name = _word(cascade.name, "kernel") + "_" + hashlib.sha256(str(cascade).encode()).hexdigest()[:8]
    with _LOCK:
        if not hasattr(torch.ops.einfall, name):
            _register(name, cascade, run)
    return name


def _register(name: str, cascade: Cascade, run: Callable[[Sequence[torch.Tensor], Sequence[Any]], Any]) -> None:
    count, library = len(cascade.inputs), _library()

    def compute(*given: Any) -> Any:
        return run(given[:count], given[count:])

    def fake(*given: Any) -> Any:
        return _results(cascade, given[:count])

    library.define(name + _schema(cascade), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    library.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


@functools.cache
def _library() -> torch.library.Library:
    """What has been registered, for the life of the process."""
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def _schema(cascade: Cascade) -> str:
    tensors = [f"Tensor {_word(t.name, f'input{i}')}" for i, t in enumerate(cascade.inputs)]
    scalars = [f"{'float' if s.dtype.is_float else 'int'} {_word(s.name, f'scalar{i}')}" for i, s in enumerate(cascade.scalars)]
    results = ", ".join("Tensor" for _ in cascade.outputs)
    return f"({', '.join([*tensors, *scalars])}) -> {results if len(cascade.outputs) == 1 else f'({results})'}"


def _word(name: str, other: str) -> str:
    """`name` if a schema can hold it, else `other`."""
    fits = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) and not keyword.iskeyword(name) and name not in _TYPES
    return name if fits else other


def _results(cascade: Cascade, tensors: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Results without elements, for tensors without elements: what the kernels would make of them. Extents may be symbols."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        what = "an argument requires a gradient, and kernels have no backward yet"
        raise UnsupportedError(what, cascade=cascade.name, hint="call it under torch.no_grad(), or pass .detach()ed tensors")
    sizes = bind_sizes(cascade, {t.name: x for t, x in zip(cascade.inputs, tensors, strict=True)})
    types = declared_types(cascade)
    device = tensors[0].device if tensors else None
    found = tuple(torch.empty(shape_of(o.axes, sizes), dtype=to_torch(types[o.name]), device=device) for o in cascade.outputs)
    return found[0] if len(found) == 1 else found
