"""Recipes that need no tensor cores, by the second emitter for CUDA: the emulated kernels against the oracles; the others are refused."""

import importlib

import pytest
from einfall.compiler.interpreted import interpreted
from einfall.ir.errors import UnsupportedError
from einfall.schedules.target import load_target

TARGET = load_target("cuda:sm_90+tvm")
SERVED = {
    "quantization.int4_groups": ("quantize", "decode"),
    "quantization.mx": ("quantize8_floor", "quantize4_even"),
    "quantization.bfp": ("k_sort", "encode4", "decode4"),
    "quantization.gear": ("compress",),
    "quantization.mustafar": ("compress_half",),
    "verification.speculative": ("probabilities", "logits"),
    "verification.tree": ("greedy",),
    "eviction.h2o": ("keep",),
    "eviction.cake": ("share",),
    "eviction.triattention": ("score",),
}
REFUSED = {"attention.hydragen": "hydragen", "eviction.snapkv": "score", "verification.tree": "attention"}


def step_of(module, name):
    return next(s for s in importlib.import_module(f"cookbook.{module}").RECIPE.steps if s.name == name)


def executable_of(step, tensors):
    """The recipe's kernels as the second emitter writes them."""
    asked = step.kernel._definition.sort(tensors, step.arguments()).asked()
    return interpreted(asked.cascade, sizes=asked.sizes, target=TARGET, strided=asked.strided)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in SERVED.items() for n in names])
def test_the_emulated_kernels_compute_what_the_oracle_computes(module, name):
    step = step_of(module, name)
    tensors = step.tensors(3, {**step.sizes, **{rank: (low + high) // 2 for rank, (low, high) in step.ranges.items()}})
    assert not step.compare(executable_of(step, tensors)(*tensors, **step.scalars), tensors)


@pytest.mark.parametrize(("module", "name"), REFUSED.items())
def test_products_of_matrices_are_left_to_the_first_emitter(module, name):
    step = step_of(module, name)
    with pytest.raises(UnsupportedError, match="needs tensor cores"):
        executable_of(step, step.tensors(3))
