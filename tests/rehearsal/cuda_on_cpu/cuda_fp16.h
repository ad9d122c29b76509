// CUDA on a CPU, as much of it as csrc/ uses: enough to run its kernels as they are written, one block after the other.
//
// A block's threads are contexts of their own (ucontext) that take turns; a barrier is where one hands over to the next.
// What a GPU would fault on is counted in `cuda_on_cpu_faults` and not done in silence: 16-byte accesses that are not
// aligned, and barriers that not all threads of a block reach. Blocks run in an order that a seed picks.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks follow each other, so one place serves all of them

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

static int64_t faults = 0;
static uint64_t block_order_seed = 0;
extern "C" int64_t cuda_on_cpu_faults() { return faults; }
extern "C" void cuda_on_cpu_start(uint64_t seed) { faults = 0, block_order_seed = seed; }

// -- vector types: every access through memory checks its alignment, as the hardware does

static inline void check_aligned(const void *address) { faults += ((uintptr_t)address & 15) != 0; }

template <typename T>
struct Four {
  T x, y, z, w;
  Four() = default;
  Four(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  Four(const Four &other) {
    check_aligned(&other);
    memcpy(this, &other, sizeof(Four));
  }
  Four &operator=(const Four &other) {
    check_aligned(this);
    check_aligned(&other);
    memcpy(this, &other, sizeof(Four));
    return *this;
  }
};
struct alignas(16) float4 : Four<float> { using Four<float>::Four; };
struct alignas(16) uint4 : Four<uint32_t> { using Four<uint32_t>::Four; };
static inline float4 make_float4(float a, float b, float c, float d) { return float4(a, b, c, d); }
static inline uint4 make_uint4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return uint4(a, b, c, d); }

// -- numbers

struct __half {
  _Float16 value;
};
static inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  memcpy(&h, &bits, 2);
  return h;
}
static inline unsigned short __half_as_ushort(__half h) {
  unsigned short bits;
  memcpy(&bits, &h, 2);
  return bits;
}
static inline float __half2float(__half h) { return (float)h.value; }
static inline __half __float2half_rn(float x) { return __half{(_Float16)x}; }
static inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <typename T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}

// -- threads of a block

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned MAX_THREADS = 1024;

struct Thread {
  ucontext_t first;  // where it begins; from then on it is left and entered by jumps, which make no system call
  jmp_buf left;
  bool begun, ended;
  uint64_t barriers, shuffles;
};
static Thread threads[MAX_THREADS];
static jmp_buf scheduler;
static const std::function<void()> *body;
static uint64_t exchanged[2][MAX_THREADS];  // two, so that a shuffle needs one barrier: the next one uses the other

static void run_thread() {
  (*body)();
  threads[threadIdx.x].ended = true;
  _longjmp(scheduler, 1);
}

static inline void __syncthreads() {
  Thread &self = threads[threadIdx.x];
  self.barriers++;
  if (!_setjmp(self.left)) _longjmp(scheduler, 1);
}

template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, int offset) {
  static_assert(sizeof(T) <= 8, "a value of a shuffle");
  faults += mask != 0xFFFFFFFFu;
  unsigned self = threadIdx.x;
  uint64_t *slots = exchanged[threads[self].shuffles++ % 2];
  memcpy(&slots[self], &value, sizeof(T));
  __syncthreads();
  if (self % 32 + offset < 32) memcpy(&value, &slots[self + offset], sizeof(T));
  return value;
}

static inline void __threadfence() {}
template <typename T>
static inline T atomicAdd(T *address, T value) {
  T old = *address;
  *address += value;
  return old;
}

static void run_block(std::vector<char> &stacks) {
  for (unsigned i = 0; i < blockDim.x; i++) {
    Thread &t = threads[i];
    t.begun = t.ended = false, t.barriers = t.shuffles = 0;
    getcontext(&t.first);
    t.first.uc_stack.ss_sp = stacks.data() + i * STACK_BYTES;
    t.first.uc_stack.ss_size = STACK_BYTES;
    t.first.uc_link = nullptr;
    makecontext(&t.first, run_thread, 0);
  }
  for (volatile unsigned running = blockDim.x; running;) {
    for (volatile unsigned i = 0; i < blockDim.x; i = i + 1) {
      Thread &t = threads[i];
      if (t.ended) continue;
      threadIdx.x = i;
      if (!_setjmp(scheduler)) {
        if (t.begun) _longjmp(t.left, 1);
        t.begun = true;
        setcontext(&t.first);
      }
      if (threads[i].ended) running = running - 1;
    }
    // a thread that has ended while others wait at a barrier: a GPU would hang, or worse
    faults += running != 0 && running != blockDim.x;
  }
  for (unsigned i = 1; i < blockDim.x; i++) faults += threads[i].barriers != threads[0].barriers;
}

// kernel<<<num_blocks, num_threads, ...>>>(arguments) is rewritten to this.
static inline void launch(unsigned num_blocks, unsigned num_threads, const std::function<void()> &kernel) {
  static std::vector<char> stacks(MAX_THREADS * STACK_BYTES);
  std::vector<unsigned> order(num_blocks);
  std::iota(order.begin(), order.end(), 0u);
  uint64_t state = block_order_seed;
  for (unsigned i = num_blocks; block_order_seed && i > 1; i--) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(state >> 33) % i]);
  }
  body = &kernel;
  gridDim.x = num_blocks, blockDim.x = num_threads;
  for (unsigned block : order) {
    blockIdx.x = block;
    run_block(stacks);
  }
}

typedef int cudaError_t;
typedef void *cudaStream_t;
static inline int cudaGetLastError() { return 0; }
static inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }
