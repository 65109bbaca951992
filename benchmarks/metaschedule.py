"""The peer that searches: attention without fusion, as two matrix products and a softmax, scheduled by TVM MetaSchedule."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT_S = 120.0  # its workers import the toolkit first, which on a busy machine takes longer than they are given by default


def unfused_attention(shape: tuple[int, ...], scale: float, *, causal: bool) -> Any:
    """The tensor program [b, h, m, e] x 3 -> [b, h, m, e] in f32: scores, softmax, weighted sum."""
    from tvm import te, tirx

    b, h, m, e = shape
    q, k, v = (te.placeholder(shape, "float32", name) for name in ("Q", "K", "V"))
    i, j, x = te.reduce_axis((0, e), "i"), te.reduce_axis((0, m), "j"), te.reduce_axis((0, m), "x")
    top_axis = te.reduce_axis((0, m), "t")
    product = te.compute((b, h, m, m), lambda a, c, r, p: te.sum(q[a, c, r, i] * k[a, c, p, i], axis=i), "S")

    def masked(a: Any, c: Any, r: Any, p: Any) -> Any:
        score = product[a, c, r, p] * tirx.const(scale, "float32")
        return tirx.Select(p <= r, score, tirx.const(-math.inf, "float32")) if causal else score

    scores = te.compute((b, h, m, m), masked, "N")
    top = te.compute((b, h, m), lambda a, c, r: te.max(scores[a, c, r, top_axis], axis=top_axis), "M")
    power = te.compute((b, h, m, m), lambda a, c, r, p: te.exp(scores[a, c, r, p] - top[a, c, r]), "E")
    total = te.compute((b, h, m), lambda a, c, r: te.sum(power[a, c, r, x], axis=x), "D")
    share = te.compute((b, h, m, m), lambda a, c, r, p: power[a, c, r, p] / total[a, c, r], "A")
    result = te.compute(shape, lambda a, c, r, f: te.sum(share[a, c, r, j] * v[a, c, j, f], axis=j), "O")
    return te.create_prim_func([q, k, v, result])


def tuned_attention(shape: tuple[int, ...], scale: float, *, causal: bool, trials: int) -> Callable[..., torch.Tensor]:
    """The best of `trials` programs that MetaSchedule found, as a function of torch tensors."""
    import tvm
    from tvm.s_tir import meta_schedule

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": cores})
    module = tvm.IRModule({"main": unfused_attention(shape, scale, causal=causal)})
    with tempfile.TemporaryDirectory(prefix="metaschedule-") as folder:
        database = meta_schedule.tune_tir(
            mod=module,
            target=target,
            work_dir=folder,
            max_trials_global=trials,
            num_trials_per_iter=min(trials, 16),
            builder=meta_schedule.builder.LocalBuilder(timeout_sec=TIMEOUT_S),
            runner=meta_schedule.runner.LocalRunner(timeout_sec=TIMEOUT_S),
        )
        schedule = meta_schedule.tir_integration.compile_tir(database, module, target)
        if schedule is None:
            raise RuntimeError(f"MetaSchedule found no program in {trials} trials")
        function = tvm.compile(schedule.mod, target=target)["main"]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(q)
        function(q, k, v, result)
        return result

    return run
