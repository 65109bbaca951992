"""Emitted kernels on CPU tensors, in Triton's interpreter with its corrections: numerics without a device.

    launch = interpret(source)
    launch(*inputs, *outputs, *scalars)

Triton decides when it is imported whether it interprets or compiles. So that a process can do both (PyTorch compiles with Triton too), the
interpreted one is a second import of the package, which others do not see. What is executed holds nothing but the language (`emitted.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ...ir.binding import to_torch
from ...ir.errors import BindingError, BuildError, UnsupportedError
from ...ir.types import dtype as dtype_named
from ..base import Source
from .emitted import check_emitted
from .signature import Parameter, Signature, signature_of

FLAG = "TRITON_INTERPRET"
_LOCK = threading.RLock()  # the interpreter keeps the place in the grid and the memory of a launch in one object
_MODULES: dict[str, ModuleType] = {}  # of the interpreted Triton, by name


def interpret(source: Source, *, programs: int | None = None) -> Callable[..., None]:
    """`launch(*inputs, *outputs, *scalars)` of an emitted kernel on CPU tensors.

    Args:
        programs: how many programs share the tasks of a persistent kernel; one a core of the target if None.

    Raises `UnsupportedError` where this process cannot interpret. A launch raises `BuildError` where the kernel fails or leaves a tensor.
    """
    check_emitted(source)
    signature = signature_of(source)
    most = max(1, source.target.cores if programs is None else programs)
    with interpreting():
        room = tempfile.TemporaryDirectory(prefix="einfall-")
        path = Path(room.name) / f"kernel_{source.hash}.py"
        path.write_text(source.text, encoding="utf-8")
        kernel = _imported(path, signature.entry)

    def launch(*given: Any) -> None:
        count = len(signature.tensors)
        tensors, scalars = given[:count], given[count:]
        with interpreting(), np.errstate(all="ignore"):
            _launch(kernel, path, signature, tensors, scalars, most)

    launch.__dict__["room"] = room  # the file lives as long as the function, for its lines in errors
    return launch


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Inside the block Triton is the interpreted one, corrected, and the flag is set under which functions are decorated for it.

    Afterwards everything is as it was: a process that is started later must not inherit the flag. Raises `UnsupportedError` where Triton is
    not there, or is not what the corrections expect.
    """
    with _LOCK:
        flag, others = os.environ.get(FLAG), _taken()
        os.environ[FLAG] = "1"
        sys.modules.update(_MODULES)
        try:
            try:
                from .interpreter_fixes import install
            except ImportError as error:
                raise UnsupportedError(f"Triton cannot be imported: {error}", hint="pip install triton==3.7.1") from None
            install()
            yield
        finally:
            _MODULES.update(_taken())
            sys.modules.update(others)
            if flag is None:
                del os.environ[FLAG]
            else:
                os.environ[FLAG] = flag


def _taken() -> dict[str, ModuleType]:
    """Triton's modules, no longer to be found by an import; the compiled ones stay, which cannot be loaded twice."""
    names = [name for name in sys.modules if name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C"))]
    return {name: sys.modules.pop(name) for name in names}


def _imported(path: Path, entry: str) -> Any:
    """The kernel function of an emitted file. Raises `BuildError` for a file that is no module or has no such function."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        return getattr(module, entry)
    except Exception as error:  # whatever a file raises when it is executed, the emitter is at fault
        raise BuildError(
            f"the source of {entry} cannot be imported: {type(error).__name__}: {error}",
            hint="this is a bug of the emitter; please report it with the source",
        ) from error
    finally:
        sys.dont_write_bytecode = bytecode


def _launch(kernel: Any, path: Path, signature: Signature, tensors: Sequence[torch.Tensor], scalars: Sequence[float], most: int) -> None:
    """Runs every program of a launch, one after the other."""
    from . import interpreter_fixes as fixes

    builder = fixes.it.interpreter_builder
    _check(signature, tensors, scalars)
    shapes, strides = [t.shape for t in tensors], [t.stride() for t in tensors]
    extents = signature.extents(shapes)
    count = signature.programs(extents)
    count = min(count, most) if signature.persistent else count
    if count == 0:
        return
    addresses = [t.data_ptr() for t in tensors]
    memory = fixes.Memory.of([t.name for t in signature.tensors], addresses, [_span(t) for t in tensors])
    types = signature.types(signature.variant(addresses, shapes, strides))
    place = {t.name: i for i, t in enumerate(signature.tensors)}
    numbers = dict(zip(signature.scalars, scalars, strict=True))
    values: dict[str, Callable[[Parameter], int | float]] = {
        "pointer": lambda p: memory.pointer(place[p.of]),
        "stride": lambda p: strides[place[p.of]][p.axis],
        "extent": lambda p: extents[p.of],
        "scalar": lambda p: numbers[p.of],
    }
    arguments = [_argument(types[p.name], values[p.kind](p)) for p in signature.parameters]
    builder.begin(memory)
    try:
        kernel[(count,)](*arguments)
    except Exception as error:  # whatever the interpreter raises, the kernel is at fault
        raise _failure(error, path, signature.entry) from error
    finally:
        builder.begin(None)


def _check(signature: Signature, tensors: Sequence[torch.Tensor], scalars: Sequence[float]) -> None:
    """Raise `BindingError` for tensors that are not those of the signature."""
    if len(tensors) != len(signature.tensors) or len(scalars) != len(signature.scalars):
        raise BindingError(f"{signature.entry} takes {len(signature.tensors)} tensors and {len(signature.scalars)} scalars")
    for declared, tensor in zip(signature.tensors, tensors, strict=True):
        expected = to_torch(dtype_named(declared.dtype))
        if tensor.dtype != expected or not tensor.is_cpu or tensor.ndim != len(declared.axes):
            raise BindingError(
                f"{declared.name} is {tensor.dtype} with {tensor.ndim} axes on {tensor.device}",
                hint=f"{signature.entry} takes {expected} with {len(declared.axes)} axes on the CPU",
            )


def _span(t: torch.Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if not t.numel():
        return 0
    return int(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _argument(kind: str, value: int | float) -> Any:
    """A value of one of Triton's types, as the kernel is given it on a device."""
    from . import interpreter_fixes as fixes

    dtype = fixes.tl.str_to_ty(kind, None)
    if dtype == fixes.tl.bfloat16:
        data = fixes.round_to_bf16(np.array([value], np.float32))
    elif dtype.is_ptr():
        data = np.array([value], np.uint64)
    else:
        data = np.array([value]).astype(fixes.it._get_np_dtype(dtype))
        if dtype.is_int() and int(data[0]) != value:
            raise BindingError(f"{value} is no {kind}")
    return fixes.tl.tensor(fixes.Handle(data, dtype), dtype)


def _failure(error: Exception, path: Path, entry: str) -> BuildError:
    """What went wrong first, and the line of the emitted file where it did."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = [f for f in traceback.extract_tb(first.__traceback__) if f.filename == str(path)]
    where = f", line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return BuildError(
        f"{entry} fails in Triton's interpreter: {type(first).__name__}: {first}{where}",
        hint="this is a bug of the emitter; please report it with the source",
    )
