// sync and forget on a CPU: the table of matrices, cut into pieces that threads take in turn, in blocks that stay in the
// first-level cache. Loops are written for the vectoriser; x86 gets a version each for AVX-512, AVX2 and neither.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

#include "rounding.h"
#include "weight_update.h"

#if defined(EEPO_NO_CLONES)
#define EEPO_CLONES
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EEPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EEPO_CLONES
#endif

namespace {

constexpr int BLOCK = 256;                   // elements at a time
constexpr int GROUPS = BLOCK / EEPO_LANES + 1;  // Philox calls a block, one more where it begins inside a group
constexpr int64_t PIECE = 1 << 16;           // elements a thread takes at a time

struct Piece {
  const EepoMatrix *matrix;
  int64_t row, column, count;
};

EEPO_INLINE float fp16_to_float(uint16_t half) {
  _Float16 x;
  memcpy(&x, &half, 2);
  return (float)x;
}

EEPO_INLINE uint16_t float_to_fp16(float x) {
  _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

EEPO_INLINE void load(float *out, int64_t address, int64_t first, int64_t dtype, int n) {
  if (dtype == EEPO_FP32) {
    memcpy(out, (const float *)address + first, n * sizeof(float));
  } else if (dtype == EEPO_BF16) {
    const uint16_t *in = (const uint16_t *)address + first;
    for (int i = 0; i < n; i++) out[i] = eepo_float_of((uint32_t)in[i] << 16);
  } else {
    const uint16_t *in = (const uint16_t *)address + first;
    for (int i = 0; i < n; i++) out[i] = fp16_to_float(in[i]);
  }
}

// 16 bits for each of n elements from flat index `flat` on, through whole groups of EEPO_LANES.
EEPO_INLINE void draw(uint32_t *out, int64_t flat, int64_t key, uint32_t step, uint32_t seed, int n) {
  uint32_t c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
  uint64_t first = (uint64_t)flat / EEPO_LANES;
  int skip = (int)((uint64_t)flat % EEPO_LANES);
  for (int i = 0; i < GROUPS; i++) {
    uint64_t counter = first + i;
    c0[i] = (uint32_t)counter, c1[i] = (uint32_t)(counter >> 32), c2[i] = step, c3[i] = seed;
  }
  uint32_t k0 = (uint32_t)key, k1 = (uint32_t)((uint64_t)key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < GROUPS; i++) eepo_philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
    k0 += EEPO_WEYL0, k1 += EEPO_WEYL1;
  }
  uint16_t lanes[GROUPS * EEPO_LANES];
  for (int i = 0; i < GROUPS; i++) {
    uint64_t low = (uint64_t)c1[i] << 32 | c0[i], high = (uint64_t)c3[i] << 32 | c2[i];
    memcpy(lanes + i * EEPO_LANES, &low, 8);  // little-endian: the low half of a word comes first
    memcpy(lanes + i * EEPO_LANES + 4, &high, 8);
  }
  for (int i = 0; i < n; i++) out[i] = lanes[skip + i];
}

EEPO_INLINE void store_nearest(int64_t address, int64_t first, int64_t dtype, const float *values, int n) {
  if (dtype == EEPO_FP32) {
    memcpy((float *)address + first, values, n * sizeof(float));
  } else if (dtype == EEPO_BF16) {
    uint16_t *out = (uint16_t *)address + first;
    for (int i = 0; i < n; i++) out[i] = eepo_bf16_nearest(values[i]);
  } else {
    uint16_t *out = (uint16_t *)address + first;
    for (int i = 0; i < n; i++) out[i] = float_to_fp16(values[i]);
  }
}

// Round `values` to the destination's dtype, leave `old` where the gradient is zero, write the result and keep it, as
// fp32, in `values`.
EEPO_INLINE void round_and_store(int64_t address, int64_t first, int64_t dtype, float *values, const float *old,
                                 const float *gradient, const uint32_t *bits, bool stochastic, int n) {
  if (dtype == EEPO_BF16) {
    uint16_t *out = (uint16_t *)address + first;
    for (int i = 0; i < n; i++) {
      uint32_t raw = eepo_bits_of(values[i]);
      uint32_t rounded = (raw + (stochastic ? bits[i] : 0x7FFFu + ((raw >> 16) & 1u))) & 0xFFFF0000u;
      rounded = gradient[i] == 0.0f ? eepo_bits_of(old[i]) : rounded;
      values[i] = eepo_float_of(rounded);
      out[i] = (uint16_t)(rounded >> 16);
    }
    return;
  }
  if (dtype == EEPO_FP16) {
    if (stochastic)
      for (int i = 0; i < n; i++) values[i] = eepo_fp16_stochastic(values[i], bits[i]);
    for (int i = 0; i < n; i++) values[i] = fp16_to_float(float_to_fp16(values[i]));
  }
  for (int i = 0; i < n; i++) values[i] = gradient[i] == 0.0f ? old[i] : values[i];
  store_nearest(address, first, dtype, values, n);
}

// Sums of a block in fp32, a lane each: few enough terms that their rounding is far below what the sums are read for.
EEPO_INLINE void add_to_sums(double *sums, const float *old, const float *updated, const float *gradient, float eta,
                             int n) {
  constexpr int WIDTH = 32;
  float dot[WIDTH] = {}, intended_sq[WIDTH] = {}, applied_sq[WIDTH] = {}, noise_sq[WIDTH] = {};
  for (int i = 0; i < n; i += WIDTH)
    for (int k = 0; k < WIDTH; k++) {
      float intended = eta * gradient[i + k], applied = updated[i + k] - old[i + k], noise = applied - intended;
      dot[k] = __builtin_fmaf(applied, intended, dot[k]);
      intended_sq[k] = __builtin_fmaf(intended, intended, intended_sq[k]);
      applied_sq[k] = __builtin_fmaf(applied, applied, applied_sq[k]);
      noise_sq[k] = __builtin_fmaf(noise, noise, noise_sq[k]);
    }
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) {
      dot[k] += dot[k + half], intended_sq[k] += intended_sq[k + half];
      applied_sq[k] += applied_sq[k + half], noise_sq[k] += noise_sq[k + half];
    }
  sums[0] += dot[0], sums[1] += intended_sq[0], sums[2] += applied_sq[0], sums[3] += noise_sq[0];
}

// n: BLOCK, known to the compiler, for all blocks but a piece's last.
EEPO_INLINE void run_block(const EepoMatrix &m, const EepoUpdate &update, int64_t dst, int64_t src, int64_t flat, int n,
                           double *sums) {
  alignas(64) float gradient[BLOCK], old[BLOCK], updated[BLOCK];
  alignas(64) uint32_t bits[BLOCK];
  load(gradient, m.src, src, m.src_dtype, n);
  if (update.operation == EEPO_SYNC) {
    store_nearest(m.dst, dst, m.dst_dtype, gradient, n);
    return;
  }
  const bool stochastic = update.operation == EEPO_FORGET_STOCHASTIC && m.dst_dtype != EEPO_FP32;
  load(old, m.dst, dst, m.dst_dtype, n);
  for (int i = n; i < BLOCK; i++) gradient[i] = old[i] = updated[i] = 0.0f;  // the sums take whole vectors
  for (int i = 0; i < n; i++) updated[i] = __builtin_fmaf(update.eta, gradient[i], old[i]);
  if (stochastic) draw(bits, flat, m.key, update.step, update.seed, n);
  round_and_store(m.dst, dst, m.dst_dtype, updated, old, gradient, bits, stochastic, n);
  add_to_sums(sums, old, updated, gradient, update.eta, BLOCK);
}

EEPO_CLONES void run_piece(const Piece &piece, const EepoUpdate &update, double *sums) {
  const EepoMatrix &m = *piece.matrix;
  const int64_t dst = piece.row * m.dst_stride + piece.column, src = piece.row * m.src_stride + piece.column;
  const int64_t flat = m.flat + piece.row * m.flat_stride + piece.column;
  int64_t done = 0;
  for (; done + BLOCK <= piece.count; done += BLOCK) run_block(m, update, dst + done, src + done, flat + done, BLOCK, sums);
  if (done < piece.count) run_block(m, update, dst + done, src + done, flat + done, (int)(piece.count - done), sums);
}

// Bits of n elements from index `first` on, each rounded to `as_dtype`, as signed integers.
EEPO_INLINE void to_integers(int32_t *out, const EepoChecked &m, int64_t first, int n) {
  if (m.dtype == m.as_dtype && m.dtype == EEPO_FP32) {
    memcpy(out, (const int32_t *)m.address + first, n * sizeof(int32_t));
  } else if (m.dtype == m.as_dtype) {
    const int16_t *in = (const int16_t *)m.address + first;
    for (int i = 0; i < n; i++) out[i] = in[i];
  } else {
    alignas(64) float values[BLOCK];
    load(values, m.address, first, m.dtype, n);
    if (m.as_dtype == EEPO_FP32) memcpy(out, values, n * sizeof(float));
    else if (m.as_dtype == EEPO_BF16)
      for (int i = 0; i < n; i++) out[i] = (int16_t)eepo_bf16_nearest(values[i]);
    else
      for (int i = 0; i < n; i++) out[i] = (int16_t)float_to_fp16(values[i]);
  }
}

// The checksum's share of `count` rows from `row` on. A matrix of one column lies in memory as a row does.
EEPO_CLONES uint64_t check_rows(const EepoChecked &m, int64_t row, int64_t count) {
  alignas(64) int32_t bits[BLOCK];
  uint64_t total = 0;
  if (m.num_columns == 1 && m.stride == 1) {
    for (int64_t done = 0; done < count; done += BLOCK) {
      const int n = (int)std::min<int64_t>(BLOCK, count - done);
      to_integers(bits, m, row + done, n);
      for (int i = 0; i < n; i++) total += (uint64_t)(row + done + i + 1) * (uint64_t)(int64_t)bits[i];
    }
    return total;
  }
  for (int64_t r = row; r < row + count; r++) {
    int64_t sum = 0;
    for (int64_t column = 0; column < m.num_columns; column += BLOCK) {
      const int n = (int)std::min<int64_t>(BLOCK, m.num_columns - column);
      to_integers(bits, m, r * m.stride + column, n);
      for (int i = 0; i < n; i++) sum += bits[i];
    }
    total += (uint64_t)(r + 1) * (uint64_t)sum;
  }
  return total;
}

// Run `work`, which takes what is left to do, in so many threads.
template <typename Work>
void in_threads(int32_t num_threads, const Work &work) {
  std::vector<std::thread> threads;
  try {
    for (int32_t i = 1; i < num_threads; i++) threads.emplace_back(work);
  } catch (const std::system_error &) {
    // no more threads to be had: those that run, and this one, do the work
  }
  work();
  for (std::thread &thread : threads) thread.join();
}

std::vector<Piece> cut(const EepoMatrix *matrices, int64_t num_matrices) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < num_matrices; i++) {
    const EepoMatrix &m = matrices[i];
    for (int64_t row = 0; row < m.num_rows; row++)
      for (int64_t column = 0; column < m.num_columns; column += PIECE)
        pieces.push_back({&m, row, column, std::min(PIECE, m.num_columns - column)});
  }
  return pieces;
}

}  // namespace

// sums: EEPO_NUM_SUMS doubles, overwritten; zeros after a sync.
EEPO_EXPORT void eepo_weight_update_cpu(const EepoMatrix *matrices, int64_t num_matrices, const EepoUpdate *update,
                                        double *sums, int32_t num_threads) {
  const std::vector<Piece> pieces = cut(matrices, num_matrices);
  // A sum a piece, added up in order: the result does not depend on which thread took what.
  std::vector<double> partial(pieces.size() * EEPO_NUM_SUMS, 0.0);
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t first; (first = next.fetch_add(16)) < pieces.size();)
      for (size_t i = first; i < std::min(first + 16, pieces.size()); i++)
        run_piece(pieces[i], *update, &partial[i * EEPO_NUM_SUMS]);
  };
  in_threads(num_threads, work);
  for (int k = 0; k < EEPO_NUM_SUMS; k++) sums[k] = 0.0;
  for (size_t i = 0; i < partial.size(); i++) sums[i % EEPO_NUM_SUMS] += partial[i];
}

// sums: an integer a matrix, overwritten.
EEPO_EXPORT void eepo_checksums_cpu(const EepoChecked *matrices, int64_t num_matrices, int64_t *sums,
                                    int32_t num_threads) {
  struct Rows {
    int64_t matrix, row, count;
  };
  std::vector<Rows> pieces;
  for (int64_t i = 0; i < num_matrices; i++) {
    sums[i] = 0;
    const int64_t at_a_time = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, matrices[i].num_columns));
    for (int64_t row = 0; row < matrices[i].num_rows; row += at_a_time)
      pieces.push_back({i, row, std::min(at_a_time, matrices[i].num_rows - row)});
  }
  std::vector<uint64_t> partial(pieces.size());
  std::atomic<size_t> next{0};
  in_threads(num_threads, [&] {
    for (size_t i; (i = next.fetch_add(1)) < pieces.size();)
      partial[i] = check_rows(matrices[pieces[i].matrix], pieces[i].row, pieces[i].count);
  });
  for (size_t i = 0; i < pieces.size(); i++)
    sums[pieces[i].matrix] = (int64_t)((uint64_t)sums[pieces[i].matrix] + partial[i]);
}
