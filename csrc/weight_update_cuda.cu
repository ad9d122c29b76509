// sync and forget on a GPU: one launch for the whole model. Bound by memory: every element is read and written once, in
// 16-byte accesses where the layout allows; sums are reduced in the same pass, in an order that the grid fixes.
//
// Compile with -fmad=false: the fused multiply-adds are written out.

#include <cuda_fp16.h>

#include "rounding.h"
#include "weight_update.h"

namespace {

constexpr int THREADS = 256;
constexpr int VECTOR = EEPO_LANES;  // elements a thread takes at a time: one Philox call, 16 bytes of 16-bit weights
constexpr int PIECE = THREADS * VECTOR * 4;

__device__ __forceinline__ void unpack(float *out, uint32_t word, bool bf16) {
  if (bf16) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xFFFF0000u);
  } else {
    out[0] = __half2float(__ushort_as_half((unsigned short)word));
    out[1] = __half2float(__ushort_as_half((unsigned short)(word >> 16)));
  }
}

__device__ __forceinline__ void load_vector(float *out, int64_t address, int64_t first, int64_t dtype) {
  if (dtype == EEPO_FP32) {
    const float4 *in = reinterpret_cast<const float4 *>((const float *)address + first);
    float4 low = in[0], high = in[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else {
    uint4 words = *reinterpret_cast<const uint4 *>((const uint16_t *)address + first);
    bool bf16 = dtype == EEPO_BF16;
    unpack(out, words.x, bf16), unpack(out + 2, words.y, bf16);
    unpack(out + 4, words.z, bf16), unpack(out + 6, words.w, bf16);
  }
}

__device__ __forceinline__ float load_one(int64_t address, int64_t index, int64_t dtype) {
  if (dtype == EEPO_FP32) return ((const float *)address)[index];
  uint16_t raw = ((const uint16_t *)address)[index];
  return dtype == EEPO_BF16 ? __uint_as_float((uint32_t)raw << 16) : __half2float(__ushort_as_half(raw));
}

__device__ __forceinline__ uint16_t to_half_bits(float x, int64_t dtype) {
  return dtype == EEPO_BF16 ? eepo_bf16_nearest(x) : __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ void store_vector(int64_t address, int64_t first, int64_t dtype, const float *x) {
  if (dtype == EEPO_FP32) {
    float4 *out = reinterpret_cast<float4 *>((float *)address + first);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    uint32_t words[4];
    for (int i = 0; i < 4; i++)
      words[i] = to_half_bits(x[2 * i], dtype) | (uint32_t)to_half_bits(x[2 * i + 1], dtype) << 16;
    *reinterpret_cast<uint4 *>((uint16_t *)address + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ void store_one(int64_t address, int64_t index, int64_t dtype, float x) {
  if (dtype == EEPO_FP32)
    ((float *)address)[index] = x;
  else
    ((uint16_t *)address)[index] = to_half_bits(x, dtype);
}

// The eight 16-bit draws of the group that holds flat index `flat`, as four words.
__device__ __forceinline__ void draw(uint32_t *words, uint64_t flat, uint64_t key, const EepoUpdate &update) {
  uint64_t counter = flat / EEPO_LANES;
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = update.step, c3 = update.seed;
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    eepo_philox_round(c0, c1, c2, c3, k0, k1);
    k0 += EEPO_WEYL0, k1 += EEPO_WEYL1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

__device__ __forceinline__ uint32_t lane_of(const uint32_t *words, int lane) {
  // no index that is known at run time only: the words would go to local memory
  uint32_t low = lane & 2 ? words[1] : words[0], high = lane & 2 ? words[3] : words[2];
  return ((lane & 4 ? high : low) >> (lane & 1) * 16) & 0xFFFFu;
}

// One element of forget: what the destination will hold, as fp32. Adds to the sums.
__device__ __forceinline__ float forget_one(float old, float gradient, float eta, uint32_t bits, int64_t dtype,
                                            bool stochastic, float *sums) {
  float updated = __fmaf_rn(eta, gradient, old);
  if (dtype == EEPO_BF16)
    updated = __uint_as_float((uint32_t)(stochastic ? eepo_bf16_stochastic(updated, bits) : eepo_bf16_nearest(updated)) << 16);
  if (dtype == EEPO_FP16) {
    if (stochastic) updated = eepo_fp16_stochastic(updated, bits);
    updated = __half2float(__float2half_rn(updated));
  }
  updated = gradient == 0.0f ? old : updated;
  float intended = eta * gradient, applied = updated - old, noise = applied - intended;
  sums[0] += applied * intended, sums[1] += intended * intended;
  sums[2] += applied * applied, sums[3] += noise * noise;
  return updated;
}

__device__ __forceinline__ bool is_aligned(const EepoMatrix &m) {
  int64_t strides = m.num_rows > 1 ? (m.dst_stride | m.src_stride | m.flat_stride | m.num_columns) : 0;
  return ((m.dst | m.src) & 15) == 0 && ((strides | m.flat) & (VECTOR - 1)) == 0;
}

__device__ void run_piece(const EepoMatrix &m, int64_t first, const EepoUpdate &update, float *sums) {
  const int64_t last = min(first + PIECE, m.num_rows * m.num_columns);
  const bool forget = update.operation != EEPO_SYNC;
  const bool stochastic = update.operation == EEPO_FORGET_STOCHASTIC && m.dst_dtype != EEPO_FP32;
  const bool aligned = is_aligned(m);
  for (int64_t e = first + threadIdx.x * VECTOR; e < last; e += THREADS * VECTOR) {
    const int64_t row = m.num_rows > 1 ? e / m.num_columns : 0, column = e - row * m.num_columns;
    if (aligned && e + VECTOR <= last) {
      const int64_t dst = row * m.dst_stride + column;
      float x[VECTOR], old[VECTOR];
      load_vector(x, m.src, row * m.src_stride + column, m.src_dtype);
      if (forget) {
        uint32_t words[4] = {};
        load_vector(old, m.dst, dst, m.dst_dtype);
        if (stochastic) draw(words, m.flat + row * m.flat_stride + column, m.key, update);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          x[i] = forget_one(old[i], x[i], update.eta, lane_of(words, i), m.dst_dtype, stochastic, sums);
      }
      store_vector(m.dst, dst, m.dst_dtype, x);
      continue;
    }
    for (int64_t k = e; k < min(e + VECTOR, last); k++) {
      const int64_t r = k / m.num_columns, c = k - r * m.num_columns, dst = r * m.dst_stride + c;
      float x = load_one(m.src, r * m.src_stride + c, m.src_dtype);
      if (forget) {
        uint32_t words[4] = {};
        const uint64_t flat = m.flat + r * m.flat_stride + c;
        if (stochastic) draw(words, flat, m.key, update);
        float old = load_one(m.dst, dst, m.dst_dtype);
        x = forget_one(old, x, update.eta, lane_of(words, flat % EEPO_LANES), m.dst_dtype, stochastic, sums);
      }
      store_one(m.dst, dst, m.dst_dtype, x);
    }
  }
}

// Sum over the block, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warps[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS / 32; i++) total += warps[i];
  return total;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) weight_update_kernel(const EepoMatrix *matrices, const int64_t *first_piece,
                                                                int num_matrices, int64_t num_pieces, EepoUpdate update,
                                                                double *partial, unsigned *blocks_done, double *sums) {
  double total[EEPO_NUM_SUMS] = {};
  for (int64_t piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    int low = 0, high = num_matrices - 1;  // the last matrix whose first piece is not beyond this one
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (first_piece[middle] <= piece) low = middle;
      else high = middle - 1;
    }
    float sums_of_piece[EEPO_NUM_SUMS] = {};
    run_piece(matrices[low], (piece - first_piece[low]) * PIECE, update, sums_of_piece);
    for (int k = 0; k < EEPO_NUM_SUMS; k++) total[k] += sums_of_piece[k];
  }
  for (int k = 0; k < EEPO_NUM_SUMS; k++) {
    double block = block_sum(total[k]);
    if (threadIdx.x == 0) partial[blockIdx.x * EEPO_NUM_SUMS + k] = block;
  }
  // The block that ends last adds up what all have written, in the order of the blocks.
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int k = 0; k < EEPO_NUM_SUMS; k++) {
    double mine = 0.0;
    for (int i = threadIdx.x; i < gridDim.x; i += THREADS) mine += partial[i * EEPO_NUM_SUMS + k];
    double all = block_sum(mine);
    if (threadIdx.x == 0) sums[k] = all;
  }
  if (threadIdx.x == 0) *blocks_done = 0;
}

EEPO_EXPORT int64_t eepo_piece_size() { return PIECE; }

// All pointers but `update` are on the device. first_piece[i]: pieces of the matrices before i. partial:
// num_blocks * EEPO_NUM_SUMS doubles; blocks_done: one zero; sums: EEPO_NUM_SUMS doubles. Returns a cudaError_t.
EEPO_EXPORT int32_t eepo_weight_update_cuda(const EepoMatrix *matrices, const int64_t *first_piece, int32_t num_matrices,
                                            int64_t num_pieces, const EepoUpdate *update, double *partial,
                                            uint32_t *blocks_done, double *sums, int32_t num_blocks, void *stream) {
  weight_update_kernel<<<num_blocks, THREADS, 0, (cudaStream_t)stream>>>(matrices, first_piece, num_matrices, num_pieces,
                                                                         *update, partial, blocks_done, sums);
  return cudaGetLastError();
}

EEPO_EXPORT const char *eepo_cuda_error(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
