// The multi-tensor weight update: what the CPU and the CUDA implementation share. No torch headers here.
//
// One row of the table is a matrix of elements that are updated alike: `num_rows` rows of `num_columns` elements, rows
// `dst_stride` and `src_stride` elements apart. The element in row r and column c has the flat index
// `flat + r * flat_stride + c` in the unsharded source tensor, from which its random bits come.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define EEPO_EXPORT extern "C" __declspec(dllexport)
#else
#define EEPO_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum { EEPO_FP32 = 0, EEPO_BF16 = 1, EEPO_FP16 = 2 };
enum { EEPO_SYNC = 0, EEPO_FORGET_NEAREST = 1, EEPO_FORGET_STOCHASTIC = 2 };

struct EepoMatrix {
  int64_t dst;  // addresses
  int64_t src;  // the master (sync) or the gradient (forget)
  int64_t num_rows, num_columns;
  int64_t dst_stride, src_stride;
  int64_t flat, flat_stride;
  int64_t key;  // of the source tensor
  int64_t dst_dtype, src_dtype;
};

struct EepoUpdate {
  int64_t operation;
  float eta;
  uint32_t step, seed;
};

// Sums over all elements: <applied, intended>, |intended|^2, |applied|^2, |applied - intended|^2.
enum { EEPO_NUM_SUMS = 4 };

// One matrix to check: `num_rows` rows of `num_columns` elements of `dtype`, `stride` elements apart. Its checksum is the
// sum over its rows of (number of the row, from 1) times (sum of the row's bits as signed integers), modulo 2^64, after
// every element is rounded to nearest in `as_dtype`.
struct EepoChecked {
  int64_t address;
  int64_t num_rows, num_columns, stride;
  int64_t dtype, as_dtype;
};
