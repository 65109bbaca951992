"""An emulator of the CUDA C that the emitter writes: each block runs on this processor, its threads as fibers in lock step.

It knows exactly what emitted kernels use: thread and block indices, shared memory, __syncthreads, full-warp shuffles, a few intrinsics.
Threads run one after the other from barrier to barrier, in rising or falling order, so what lacks a barrier gives different results;
a barrier or shuffle that not all threads reach together is an error. Nothing here says how fast anything is.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

from einfall.backends.base import Source
from einfall.backends.triton.signature import signature_of
from einfall.backends.tvm.build import split

RUNTIME = r"""
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
struct Index { int x; } threadIdx, blockIdx;
struct Fiber { ucontext_t context; int site, done; };
static ucontext_t scheduler;
static struct Fiber* fibers;
static int current;
static void (*kernel)(void);
long slots[2][1024];
int parity[1024];
void barrier(int site) { fibers[current].site = site; swapcontext(&fibers[current].context, &scheduler); }
static void start(void) { kernel(); fibers[current].done = 1; barrier(-1); }
int run_block(void (*body)(void), int threads, int block, int falling) {
  static char* stacks; enum { STACK = 1 << 16 };
  if (!stacks) { stacks = (char*)malloc((size_t)STACK * 1024); fibers = (struct Fiber*)calloc(1024, sizeof(struct Fiber)); }
  kernel = body; blockIdx.x = block;
  for (int i = 0; i < threads; ++i) {
    struct Fiber* f = &fibers[i];
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stacks + (size_t)STACK * i; f->context.uc_stack.ss_size = STACK; f->context.uc_link = 0;
    f->done = 0; f->site = 0; parity[i] = 0;
    makecontext(&f->context, start, 0);
  }
  for (;;) {
    for (int k = 0; k < threads; ++k) {
      current = falling ? threads - 1 - k : k;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (int i = 1; i < threads; ++i)
      if (fibers[i].site != fibers[0].site) return fibers[i].site > 0 ? fibers[i].site : fibers[0].site;
    if (fibers[0].done) return 0;
  }
}
"""

SHIM = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(n)
#define __restrict__
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF ((double)INFINITY)
#define CUDART_NAN ((double)NAN)
typedef _Float16 half;
struct nv_bfloat16 { uint16_t bits; };
struct __nv_fp8_e4m3 { uint8_t bits; };
struct __nv_fp8_e5m2 { uint8_t bits; };
struct __nv_fp8_e8m0 { uint8_t bits; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { int x; };
extern "C" { extern Index threadIdx, blockIdx; extern long slots[2][1024]; extern int parity[1024];
             void barrier(int); int run_block(void (*)(void), int, int, int); }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a > b ? a : b; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline float half_to_float(short code) { half h; memcpy(&h, &code, 2); return (float)h; }
inline short float_to_half(float x) { half h = (half)x; short code; memcpy(&code, &h, 2); return code; }
template <class T> T exchanged(unsigned mask, T x, int from, int site) {
  if (mask != 0xffffffffu) { barrier(-2); }
  int me = threadIdx.x, side = parity[me] ^= 1;
  memcpy(&slots[side][me], &x, sizeof(T));
  barrier(site);
  memcpy(&x, &slots[side][(me & ~31) | (from & 31)], sizeof(T));
  return x;
}
#define __syncthreads() barrier(__LINE__)
#define __shfl_xor_sync(m, x, bit) exchanged(m, x, (threadIdx.x & 31) ^ (bit), __LINE__)
#define __shfl_up_sync(m, x, by) exchanged(m, x, (threadIdx.x & 31) >= (by) ? (threadIdx.x & 31) - (by) : (threadIdx.x & 31), __LINE__)
#define __shfl_sync(m, x, from) exchanged(m, x, from, __LINE__)
"""
FLAGS = ("-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="einfall-emulator-")


@functools.cache
def _runtime() -> Path:
    """The fibers, compiled once."""
    folder = Path(_folder().name)
    (folder / "runtime.c").write_text(RUNTIME)
    subprocess.run(["gcc", *FLAGS, "-c", "runtime.c", "-o", "runtime.o"], cwd=folder, check=True, capture_output=True, text=True)
    return folder / "runtime.o"


def threads_of(cuda: str) -> int:
    """The threads of a block, as the kernel declares them."""
    return int(re.search(r"__launch_bounds__\((\d+)\)", cuda).group(1))


def parameters_of(cuda: str) -> list[tuple[str, str]]:
    """Type and name of every parameter of the kernel."""
    inner = re.search(r"main_kernel\((.*?)\);", cuda, re.S).group(1)
    return [tuple(p.replace("__restrict__", "").strip().rsplit(" ", 1)) for p in inner.split(",")]


def translated(cuda: str, imported: str) -> str:
    """The kernel as C++ for this processor: the imported helpers and the kernel, without TVM's own prelude."""
    kernel = cuda[cuda.index('extern "C" __global__') :]
    parameters = parameters_of(cuda)
    args = ", ".join(f"*({t.strip()}*)given[{i}]" for i, (t, _) in enumerate(parameters))
    launch = f"""
static void** given;
static void thread() {{ main_kernel({args}); }}
extern "C" int launch(void** a, long blocks, int falling) {{
  given = a;
  for (long b = 0; b < blocks; ++b) {{ int site = run_block(thread, {threads_of(cuda)}, (int)b, falling); if (site) return site; }}
  return 0;
}}
"""
    return SHIM + imported + kernel + launch


class Emulated:
    """A kernel to be called as `launch(*inputs, *outputs, *scalars)` with torch CPU tensors.

    Args:
        source: what the emitter wrote, with the signature and the helpers in it.
        cuda: what TVM made of it.
    """

    def __init__(self, source: Source, cuda: str) -> None:
        self.signature, self.parameters = signature_of(source), parameters_of(cuda)
        folder = Path(tempfile.mkdtemp(dir=_folder().name))
        imported = str(split(source)[0]["CU"])
        (folder / "kernel.cpp").write_text(translated(cuda, imported))
        command = ["g++", *FLAGS, "-shared", "kernel.cpp", str(_runtime()), "-o", "kernel.so"]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr[:3000]}\n{folder}"
        self.launch = ctypes.CDLL(str(folder / "kernel.so")).launch

    def __call__(self, *given: object, falling: bool = False) -> None:
        signature = self.signature
        tensors = dict(zip([t.name for t in signature.tensors], given, strict=False))
        scalars = dict(zip(signature.scalars, given[len(tensors) :], strict=True))
        extents = signature.extents([t.shape for t in tensors.values()])
        values = {
            "pointer": lambda p: ctypes.c_void_p(tensors[p.of].data_ptr()),
            "stride": lambda p: ctypes.c_int64(tensors[p.of].stride(p.axis)),
            "extent": lambda p: ctypes.c_int64(extents[p.of]),
            "scalar": lambda p: (ctypes.c_double if p.type == "fp64" else ctypes.c_float)(scalars[p.of]),
        }
        known = {p.name: p for p in signature.parameters}
        held = [values[known[name].kind](known[name]) for _, name in self.parameters]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(ctypes.addressof(v) for v in held))
        site = self.launch(pointers, ctypes.c_long(signature.programs(extents)), int(falling))
        assert site == 0, f"threads diverge at a barrier, line {site}"
