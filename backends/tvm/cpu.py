"""What the emitter must know of a processor: the vector width and the instructions that change what is emitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...schedules.target import Target


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor as LLVM names it.

    Args:
        mcpu: LLVM's name; empty for the generic processor of the architecture.
        lanes: 32-bit elements of a vector.
        registers: architectural vector registers.
        avx512: AVX-512 F, DQ, BW and VL.
        bf16_dot: AVX-512 BF16.
        threads: threads of a launch.
    """

    mcpu: str
    lanes: int
    registers: int
    avx512: bool
    bf16_dot: bool
    threads: int

    @staticmethod
    def with_features(mcpu: str, features: frozenset[str], threads: int) -> Cpu:
        """A processor of the given instruction sets, spelled as the kernel of the operating system spells them."""
        avx512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= features
        wide = avx512 or "avx2" in features
        return Cpu(
            mcpu=mcpu,
            lanes=16 if avx512 else 8 if wide else 4,
            registers=32 if avx512 else 16,
            avx512=avx512,
            bf16_dot=avx512 and "avx512_bf16" in features,
            threads=threads,
        )


def cpu_of(target: Target) -> Cpu:
    """The processor `target` describes. Its own name is left to LLVM where it is this machine's."""
    features = frozenset(target.features)
    cpu = Cpu.with_features("", features, target.threads)
    if target.name == "cpu":
        return cpu
    return replace(cpu, mcpu="x86-64-v4" if cpu.avx512 else "x86-64-v3" if "avx2" in features else "")
