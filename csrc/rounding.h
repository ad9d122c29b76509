// Random bits and rounding, the same on CPU and GPU, bit for bit. kernels/eepo_kernels/weight_update_torch.py has
// both in PyTorch. Compile without contraction of floating-point expressions: every fused multiply-add is written out.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define EEPO_INLINE __host__ __device__ __forceinline__
#else
#define EEPO_INLINE static inline __attribute__((always_inline))
#endif

enum { EEPO_LANES = 8 };  // 16-bit draws of one Philox call

EEPO_INLINE uint32_t eepo_bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
#endif
}

EEPO_INLINE float eepo_float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, 4);
  return x;
#endif
}

// One of the ten rounds of Philox-4x32-10 (Salmon et al. 2011).
EEPO_INLINE void eepo_philox_round(uint32_t &c0, uint32_t &c1, uint32_t &c2, uint32_t &c3, uint32_t k0, uint32_t k1) {
  uint64_t p0 = (uint64_t)c0 * 0xD2511F53u;
  uint64_t p1 = (uint64_t)c2 * 0xCD9E8D57u;
  c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
  c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
  c1 = (uint32_t)p1;
  c3 = (uint32_t)p0;
}

enum : uint32_t { EEPO_WEYL0 = 0x9E3779B9u, EEPO_WEYL1 = 0xBB67AE85u };

// fp32 -> bf16, to nearest, ties to even; NaN stays NaN.
EEPO_INLINE uint16_t eepo_bf16_nearest(float x) {
  uint32_t raw = eepo_bits_of(x);
  uint32_t rounded = (raw + 0x7FFFu + ((raw >> 16) & 1u)) >> 16;
  return (raw & 0x7FFFFFFFu) > 0x7F800000u ? (uint16_t)((raw >> 16) | 0x40u) : (uint16_t)rounded;
}

// fp32 -> bf16, up in magnitude with the probability that makes it unbiased; bits in [0, 2^16).
EEPO_INLINE uint16_t eepo_bf16_stochastic(float x, uint32_t bits) { return (uint16_t)((eepo_bits_of(x) + bits) >> 16); }

// fp32 -> a fp32 number that fp16 holds exactly (or overflows to infinity), by the same draw.
EEPO_INLINE float eepo_fp16_stochastic(float x, uint32_t bits) {
  float magnitude = eepo_float_of(eepo_bits_of(x) & 0x7FFFFFFFu);
  float normal = eepo_float_of((eepo_bits_of(x) + (bits >> 3)) & ~0x1FFFu);
  // below 2^-14 the spacing of fp16 is 2^-24 throughout; larger values may overflow here, and are not used
  float scaled = magnitude * 16777216.0f;
  float lower = (float)(int32_t)(magnitude < 6.103515625e-05f ? scaled : 0.0f);
  float stepped = (lower + ((float)bits < (scaled - lower) * 65536.0f ? 1.0f : 0.0f)) * 5.9604644775390625e-08f;
  float subnormal = eepo_float_of(eepo_bits_of(stepped) | (eepo_bits_of(x) & 0x80000000u));
  return magnitude < 6.103515625e-05f ? subnormal : normal;
}
