"""A built kernel as a function of tensors, by the launcher that Triton's kernels have: the driver is told what the signature says.

**It has not run on a device yet.**
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from ...ir.errors import UnsupportedError
from ..base import Artifact
from ..triton.launch import Launcher
from ..triton.signature import Signature, Variant, signature_of
from .build import Compiled, Machine, entry_of


@dataclass(frozen=True, slots=True)
class OneBuild:
    """The one build of a kernel, which serves tensors of any alignment and stride."""

    signature: Signature
    entry: str
    machine: Machine

    @property
    def name(self) -> str:
        """The function in the binary."""
        return self.entry

    @property
    def code(self) -> bytes:
        """What the driver loads."""
        return self.machine.cubin

    @property
    def assembly(self) -> str:
        """PTX."""
        return self.machine.ptx

    @property
    def shared(self) -> int:
        """The bytes of shared memory to ask for at a launch; what the kernel declares itself comes without asking."""
        return 0

    @property
    def warps(self) -> int:
        """The warps of a block."""
        return self.signature.warps

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What Triton would know of it beside: nothing."""
        return {}

    def get(self, variant: Variant) -> OneBuild:
        """The build for any variant."""
        return self


def load(artifact: Artifact) -> Launcher:
    """The kernel as a function of tensors. Raises `UnsupportedError` where no machine code was made."""
    compiled: Compiled = artifact.module
    if compiled.code is None:
        raise UnsupportedError(
            f"the kernel for {artifact.source.target.name} is CUDA C alone: there was no nvcc to make machine code of it",
            hint="install the CUDA toolkit or set CUDA_HOME, and compile again; or the target without +tvm",
        )
    entry, order = entry_of(compiled.cuda)
    signature = signature_of(artifact.source)
    named = {p.name: p for p in signature.parameters}
    ordered = replace(signature, parameters=tuple(named[name] for name in order))
    return Launcher(cast(Any, OneBuild(ordered, entry, compiled.code)))
