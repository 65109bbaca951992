"""C++ for `emulator.py`: what emitted CUDA C uses, on an ordinary processor. The threads of a block are fibers in lock step."""

SHIM = r"""#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
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
typedef unsigned char uchar;
typedef _Float16 half;
struct nv_bfloat16 { uint16_t bits; };
struct __nv_fp8_e4m3 { uint8_t bits; };
struct __nv_fp8_e5m2 { uint8_t bits; };
struct __nv_fp8_e8m0 { uint8_t bits; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { int x; };
static Index threadIdx, blockIdx;

// A fiber runs from barrier to barrier; `site` is the line of the barrier it waits at, -1 when it is done.
enum { MOST = 1024, STACK = 1 << 16 };
struct Fiber { ucontext_t context; int site; };
static ucontext_t scheduler;
static Fiber fibers[MOST];
static char* stacks;
static int current;
static void (*kernel)();
static long slots[2][MOST];
static int parity[MOST];
static void barrier(int site) { fibers[current].site = site; swapcontext(&fibers[current].context, &scheduler); }
static void start() { kernel(); barrier(-1); }
static int run_block(void (*body)(), int threads, int block, int falling) {
  if (!stacks) stacks = (char*)malloc((size_t)STACK * MOST);
  kernel = body; blockIdx.x = block;
  for (int i = 0; i < threads; ++i) {
    ucontext_t* c = &fibers[i].context;
    getcontext(c);
    c->uc_stack.ss_sp = stacks + (size_t)STACK * i; c->uc_stack.ss_size = STACK; c->uc_link = 0;
    fibers[i].site = 0; parity[i] = 0;
    makecontext(c, start, 0);
  }
  for (;;) {
    for (int k = 0; k < threads; ++k) {
      threadIdx.x = current = falling ? threads - 1 - k : k;
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (int i = 1; i < threads; ++i)
      if (fibers[i].site != fibers[0].site) return fibers[i].site > 0 ? fibers[i].site : fibers[0].site;
    if (fibers[0].site == -1) return 0;
  }
}

// Each thread leaves its value and takes another's after the barrier; the two sides take turns, so that nobody is overtaken.
template <class T> static T exchanged(T x, int from, int site) {
  int me = threadIdx.x, side = parity[me] ^= 1;
  memcpy(&slots[side][me], &x, sizeof(T));
  barrier(site);
  memcpy(&x, &slots[side][(me & ~31) | from], sizeof(T));
  return x;
}
#define LANE (threadIdx.x & 31)
#define __syncthreads() barrier(__LINE__)
#define __shfl_xor_sync(mask, x, bit) exchanged(x, LANE ^ (bit), __LINE__)
#define __shfl_up_sync(mask, x, by) exchanged(x, LANE >= (by) ? LANE - (by) : LANE, __LINE__)
#define __shfl_sync(mask, x, from) exchanged(x, (from) & 31, __LINE__)

template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T max(T a, T b) { return a > b ? a : b; }
static int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
static float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static float half_to_float(short code) { half h; memcpy(&h, &code, 2); return (float)h; }
static short float_to_half(float x) { half h = (half)x; short code; memcpy(&code, &h, 2); return code; }
"""

LAUNCH = """
static void** given;
static void thread() {{ {entry}({arguments}); }}
extern "C" int launch(void** values, long blocks, int falling) {{
  given = values;
  for (long b = 0; b < blocks; ++b) {{
    int site = run_block(thread, {threads}, (int)b, falling);
    if (site) return site;
  }}
  return 0;
}}
"""
