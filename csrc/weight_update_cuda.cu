// sync and forget on a GPU: one launch for all weights of a model that share their dtypes, and checksums of all of them
// in another. Bound by memory: every element is read and written once, in 16-byte accesses where the layout allows; sums
// are reduced in the same pass, in an order that the grid fixes.
//
// Compile with -fmad=false: the fused multiply-adds are written out.

#include <cuda_fp16.h>

#include "rounding.h"
#include "weight_update.h"

namespace {

constexpr int THREADS = 256;
constexpr int VECTOR = EEPO_LANES;  // elements a thread takes at a time: one Philox call, 16 bytes of 16-bit weights
constexpr int STEP = THREADS * VECTOR;
constexpr int PIECE = STEP * 4;

template <int DTYPE>
__device__ __forceinline__ float to_float(uint32_t bits) {
  if (DTYPE == EEPO_BF16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half((unsigned short)bits));
}

template <int DTYPE>
__device__ __forceinline__ void unpack(float *out, uint32_t word) {
  out[0] = to_float<DTYPE>(word & 0xFFFFu);
  out[1] = DTYPE == EEPO_BF16 ? __uint_as_float(word & 0xFFFF0000u) : to_float<DTYPE>(word >> 16);
}

template <int DTYPE>
__device__ __forceinline__ void load_vector(float *out, int64_t address, int64_t first) {
  if (DTYPE == EEPO_FP32) {
    const float4 *in = reinterpret_cast<const float4 *>((const float *)address + first);
    float4 low = in[0], high = in[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else {
    uint4 words = *reinterpret_cast<const uint4 *>((const uint16_t *)address + first);
    unpack<DTYPE>(out, words.x), unpack<DTYPE>(out + 2, words.y);
    unpack<DTYPE>(out + 4, words.z), unpack<DTYPE>(out + 6, words.w);
  }
}

template <int DTYPE>
__device__ __forceinline__ float load_one(int64_t address, int64_t index) {
  if (DTYPE == EEPO_FP32) return ((const float *)address)[index];
  return to_float<DTYPE>(((const uint16_t *)address)[index]);
}

template <int DTYPE>
__device__ __forceinline__ uint16_t to_half_bits(float x) {
  return DTYPE == EEPO_BF16 ? eepo_bf16_nearest(x) : __half_as_ushort(__float2half_rn(x));
}

// x: what the destination's dtype holds exactly, with EXACT; else rounded to nearest.
template <int DTYPE, bool EXACT>
__device__ __forceinline__ void store_vector(int64_t address, int64_t first, const float *x) {
  if (DTYPE == EEPO_FP32) {
    float4 *out = reinterpret_cast<float4 *>((float *)address + first);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (DTYPE == EEPO_BF16 && EXACT)
        words[i] = __float_as_uint(x[2 * i]) >> 16 | (__float_as_uint(x[2 * i + 1]) & 0xFFFF0000u);
      else
        words[i] = to_half_bits<DTYPE>(x[2 * i]) | (uint32_t)to_half_bits<DTYPE>(x[2 * i + 1]) << 16;
    }
    *reinterpret_cast<uint4 *>((uint16_t *)address + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <int DTYPE>
__device__ __forceinline__ void store_one(int64_t address, int64_t index, float x) {
  if (DTYPE == EEPO_FP32)
    ((float *)address)[index] = x;
  else
    ((uint16_t *)address)[index] = to_half_bits<DTYPE>(x);
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
template <int DTYPE, bool STOCHASTIC>
__device__ __forceinline__ float forget_one(float old, float gradient, float eta, uint32_t bits, float *sums) {
  float updated = __fmaf_rn(eta, gradient, old);
  if (DTYPE == EEPO_BF16)
    updated = STOCHASTIC ? __uint_as_float((__float_as_uint(updated) + bits) & 0xFFFF0000u)
                         : __uint_as_float((uint32_t)eepo_bf16_nearest(updated) << 16);
  if (DTYPE == EEPO_FP16) {
    if (STOCHASTIC) updated = eepo_fp16_stochastic(updated, bits);
    updated = __half2float(__float2half_rn(updated));
  }
  updated = gradient == 0.0f ? old : updated;
  float intended = eta * gradient, applied = updated - old, noise = applied - intended;
  sums[0] = __fmaf_rn(applied, intended, sums[0]), sums[1] = __fmaf_rn(intended, intended, sums[1]);
  sums[2] = __fmaf_rn(applied, applied, sums[2]), sums[3] = __fmaf_rn(noise, noise, sums[3]);
  return updated;
}

__device__ __forceinline__ bool is_aligned(const EepoMatrix &m) {
  int64_t strides = m.num_rows > 1 ? (m.dst_stride | m.src_stride | m.flat_stride | m.num_columns) : 0;
  return ((m.dst | m.src) & 15) == 0 && ((strides | m.flat) & (VECTOR - 1)) == 0;
}

// Where a thread is in a matrix, STEP elements on at a time: no division but at the start of a piece.
struct Walk {
  int64_t row, column, columns;
  int rows_a_step, columns_a_step;

  __device__ __forceinline__ Walk(int64_t num_rows, int64_t num_columns, int64_t element) : columns(num_columns) {
    row = num_rows > 1 ? element / num_columns : 0;
    column = element - row * num_columns;
    int width = num_columns > STEP ? STEP + 1 : (int)num_columns;
    rows_a_step = STEP / width;
    columns_a_step = STEP - (width > STEP ? 0 : rows_a_step * width);
  }

  __device__ __forceinline__ void step() {
    row += rows_a_step, column += columns_a_step;
    if (column >= columns) column -= columns, row++;
  }
};

template <int OPERATION, int DST, int SRC>
__device__ void run_piece(const EepoMatrix &m, int64_t first, const EepoUpdate &update, float *sums) {
  constexpr bool FORGET = OPERATION != EEPO_SYNC, STOCHASTIC = OPERATION == EEPO_FORGET_STOCHASTIC;
  const int64_t last = min(first + PIECE, m.num_rows * m.num_columns);
  int64_t e = first + threadIdx.x * VECTOR;
  if (is_aligned(m)) {
    const int64_t dst_stride = m.dst_stride, src_stride = m.src_stride, flat_stride = m.flat_stride;
    const int64_t dst_address = m.dst, src_address = m.src, flat = m.flat, key = m.key;
    Walk at(m.num_rows, m.num_columns, e);
#pragma unroll 1
    for (; e + VECTOR <= last; e += STEP, at.step()) {
      const int64_t dst = at.row * dst_stride + at.column;
      float x[VECTOR], old[VECTOR];
      load_vector<SRC>(x, src_address, at.row * src_stride + at.column);
      if (FORGET) {
        uint32_t words[4] = {};
        load_vector<DST>(old, dst_address, dst);
        if (STOCHASTIC) draw(words, flat + at.row * flat_stride + at.column, key, update);
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          x[i] = forget_one<DST, STOCHASTIC>(old[i], x[i], update.eta, lane_of(words, i), sums);
      }
      store_vector<DST, FORGET || SRC == DST>(dst_address, dst, x);
    }
  }
#pragma unroll 1
  for (; e < last; e += STEP) {  // what has no 16-byte accesses, or no whole vector
    const int64_t end = min(e + VECTOR, last);
#pragma unroll 1
    for (int64_t k = e; k < end; k++) {
      const int64_t r = m.num_rows > 1 ? k / m.num_columns : 0, c = k - r * m.num_columns, dst = r * m.dst_stride + c;
      float x = load_one<SRC>(m.src, r * m.src_stride + c);
      if (FORGET) {
        uint32_t words[4] = {};
        const uint64_t flat = m.flat + r * m.flat_stride + c;
        if (STOCHASTIC) draw(words, flat, m.key, update);
        x = forget_one<DST, STOCHASTIC>(load_one<DST>(m.dst, dst), x, update.eta, lane_of(words, flat % EEPO_LANES), sums);
      }
      store_one<DST>(m.dst, dst, x);
    }
  }
}

// The last table entry whose first piece is not beyond this one.
__device__ __forceinline__ int entry_of(int64_t piece, const int64_t *first_piece, int num_entries) {
  int low = 0, high = num_entries - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (first_piece[middle] <= piece) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Sum over the block, in thread 0.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T warps[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < THREADS / 32; i++) total += warps[i];
  return total;
}

// The sums of all threads of the grid, added to `sums`.
__device__ void reduce(const double *total, double *partial, unsigned *blocks_done, double *sums) {
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
    if (threadIdx.x == 0) sums[k] += all;  // launches of one update follow each other
  }
  if (threadIdx.x == 0) *blocks_done = 0;
}

// Three blocks an SM allow 80 registers: at four, which is 64, sm_100 spills.
template <int OPERATION, int DST, int SRC>
__global__ void __launch_bounds__(THREADS, 3)
    weight_update_kernel(const EepoMatrix *matrices, const int64_t *first_piece, int num_matrices, int64_t num_pieces,
                         EepoUpdate update, double *partial, unsigned *blocks_done, double *sums) {
  double total[EEPO_NUM_SUMS] = {};
  for (int64_t piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    const int i = entry_of(piece, first_piece, num_matrices);
    float sums_of_piece[EEPO_NUM_SUMS] = {};
    run_piece<OPERATION, DST, SRC>(matrices[i], (piece - first_piece[i]) * PIECE, update, sums_of_piece);
    for (int k = 0; k < EEPO_NUM_SUMS; k++) total[k] += sums_of_piece[k];
  }
  if constexpr (OPERATION != EEPO_SYNC) reduce(total, partial, blocks_done, sums);
}

template <int OPERATION, int DST, int SRC>
void launch_update(const EepoMatrix *matrices, const int64_t *first_piece, int num_matrices, int64_t num_pieces,
                   const EepoUpdate &update, double *partial, unsigned *blocks_done, double *sums, int num_blocks,
                   void *stream) {
  weight_update_kernel<OPERATION, DST, SRC><<<num_blocks, THREADS, 0, (cudaStream_t)stream>>>(
      matrices, first_piece, num_matrices, num_pieces, update, partial, blocks_done, sums);
}

using Launch = decltype(&launch_update<EEPO_SYNC, EEPO_FP32, EEPO_FP32>);

template <int OPERATION, int DST>
Launch of_source(int64_t src) {
  return src == EEPO_FP32   ? launch_update<OPERATION, DST, EEPO_FP32>
         : src == EEPO_BF16 ? launch_update<OPERATION, DST, EEPO_BF16>
                            : launch_update<OPERATION, DST, EEPO_FP16>;
}

template <int OPERATION>
Launch of_destination(int64_t dst, int64_t src) {
  // an fp32 destination takes the sum as it is: there is nothing to draw
  constexpr int EXACT = OPERATION == EEPO_FORGET_STOCHASTIC ? (int)EEPO_FORGET_NEAREST : OPERATION;
  return dst == EEPO_FP32   ? of_source<EXACT, EEPO_FP32>(src)
         : dst == EEPO_BF16 ? of_source<OPERATION, EEPO_BF16>(src)
                            : of_source<OPERATION, EEPO_FP16>(src);
}

// The bits of one element, rounded to `as_dtype` where that is another than its own, as a signed integer.
__device__ __forceinline__ int64_t bits_of(const EepoChecked &m, int64_t index) {
  if (m.dtype == EEPO_FP32) {
    const float x = ((const float *)m.address)[index];
    if (m.as_dtype == EEPO_FP32) return (int32_t)__float_as_uint(x);
    return (int16_t)(m.as_dtype == EEPO_BF16 ? to_half_bits<EEPO_BF16>(x) : to_half_bits<EEPO_FP16>(x));
  }
  const uint16_t raw = ((const uint16_t *)m.address)[index];
  if (m.dtype == m.as_dtype) return (int16_t)raw;
  const float x = m.dtype == EEPO_BF16 ? to_float<EEPO_BF16>(raw) : to_float<EEPO_FP16>(raw);
  if (m.as_dtype == EEPO_FP32) return (int32_t)__float_as_uint(x);
  return (int16_t)(m.as_dtype == EEPO_BF16 ? to_half_bits<EEPO_BF16>(x) : to_half_bits<EEPO_FP16>(x));
}

// The same for VECTOR elements of one row, added up: 16-bit ones as they are, or fp32 ones rounded to AS.
template <int DTYPE, int AS>
__device__ __forceinline__ int64_t sum_of_vector(int64_t address, int64_t first) {
  if (DTYPE == EEPO_FP32) {
    float x[VECTOR];
    load_vector<EEPO_FP32>(x, address, first);
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
      sum += AS == EEPO_FP32 ? (int64_t)(int32_t)__float_as_uint(x[i]) : (int64_t)(int16_t)to_half_bits<AS>(x[i]);
    return sum;
  }
  const uint4 words = *reinterpret_cast<const uint4 *>((const uint16_t *)address + first);
  const uint32_t all[4] = {words.x, words.y, words.z, words.w};
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) sum += (int32_t)(int16_t)all[i] + ((int32_t)all[i] >> 16);
  return sum;
}

template <int DTYPE, int AS>
__device__ __forceinline__ int64_t check_vectors(const EepoChecked &m, int64_t &e, int64_t last) {
  const int64_t address = m.address, stride = m.stride;
  Walk at(m.num_rows, m.num_columns, e);
  int64_t total = 0;
#pragma unroll 1
  for (; e + VECTOR <= last; e += STEP, at.step())
    total += (at.row + 1) * sum_of_vector<DTYPE, AS>(address, at.row * stride + at.column);
  return total;
}

// What a thread adds to the checksum of a matrix: each row's sum times its number, as integers that wrap around.
__device__ int64_t check_piece(const EepoChecked &m, int64_t first) {
  const int64_t last = min(first + PIECE, m.num_rows * m.num_columns);
  int64_t e = first + threadIdx.x * VECTOR, total = 0;
  const int64_t strides = m.num_rows > 1 ? m.stride | m.num_columns : 0;
  if ((m.address & 15) == 0 && (strides & (VECTOR - 1)) == 0) {
    if (m.dtype == m.as_dtype && m.dtype != EEPO_FP32) total = check_vectors<EEPO_BF16, EEPO_BF16>(m, e, last);
    else if (m.dtype == EEPO_FP32 && m.as_dtype == EEPO_FP32) total = check_vectors<EEPO_FP32, EEPO_FP32>(m, e, last);
    else if (m.dtype == EEPO_FP32 && m.as_dtype == EEPO_BF16) total = check_vectors<EEPO_FP32, EEPO_BF16>(m, e, last);
    else if (m.dtype == EEPO_FP32) total = check_vectors<EEPO_FP32, EEPO_FP16>(m, e, last);
  }
#pragma unroll 1
  for (; e < last; e += STEP) {
    const int64_t end = min(e + VECTOR, last);
#pragma unroll 1
    for (int64_t k = e; k < end; k++) {
      const int64_t r = m.num_rows > 1 ? k / m.num_columns : 0;
      total += (r + 1) * bits_of(m, r * m.stride + k - r * m.num_columns);
    }
  }
  return total;
}

__global__ void __launch_bounds__(THREADS) checksum_kernel(const EepoChecked *matrices, const int64_t *first_piece,
                                                           int num_matrices, int64_t num_pieces,
                                                           unsigned long long *sums) {
  for (int64_t piece = blockIdx.x; piece < num_pieces; piece += gridDim.x) {
    const int i = entry_of(piece, first_piece, num_matrices);
    const int64_t sum = block_sum(check_piece(matrices[i], (piece - first_piece[i]) * PIECE));
    if (threadIdx.x == 0) atomicAdd(&sums[i], (unsigned long long)sum);  // integers: in any order
    __syncthreads();
  }
}

}  // namespace

EEPO_EXPORT int64_t eepo_piece_size() { return PIECE; }

// All pointers but `update` are on the device; matrices: of one pair of dtypes, those of the first. first_piece[i]:
// pieces of the matrices before i. partial: num_blocks * EEPO_NUM_SUMS doubles; blocks_done: one zero; sums:
// EEPO_NUM_SUMS doubles, which a forget step is added to. Returns a cudaError_t.
EEPO_EXPORT int32_t eepo_weight_update_cuda(const EepoMatrix *matrices, const int64_t *first_piece, int32_t num_matrices,
                                            int64_t num_pieces, const EepoUpdate *update, double *partial,
                                            uint32_t *blocks_done, double *sums, int32_t num_blocks, void *stream,
                                            int64_t dst_dtype, int64_t src_dtype) {
  const Launch run = update->operation == EEPO_SYNC             ? of_destination<EEPO_SYNC>(dst_dtype, src_dtype)
                     : update->operation == EEPO_FORGET_NEAREST ? of_destination<EEPO_FORGET_NEAREST>(dst_dtype, src_dtype)
                                                                : of_destination<EEPO_FORGET_STOCHASTIC>(dst_dtype, src_dtype);
  run(matrices, first_piece, num_matrices, num_pieces, *update, partial, blocks_done, sums, num_blocks, stream);
  return cudaGetLastError();
}

// sums: a zero a matrix, all on the device. Returns a cudaError_t.
EEPO_EXPORT int32_t eepo_checksums_cuda(const EepoChecked *matrices, const int64_t *first_piece, int32_t num_matrices,
                                        int64_t num_pieces, int64_t *sums, int32_t num_blocks, void *stream) {
  checksum_kernel<<<num_blocks, THREADS, 0, (cudaStream_t)stream>>>(matrices, first_piece, num_matrices, num_pieces,
                                                                    (unsigned long long *)sums);
  return cudaGetLastError();
}

EEPO_EXPORT const char *eepo_cuda_error(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
