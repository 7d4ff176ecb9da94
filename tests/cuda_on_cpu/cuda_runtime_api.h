// What the kernels use of CUDA, for a C++ compiler.
#pragma once

#include <math.h>

#include <limits>

#include "machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = const void*;

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Threads run one after another, so reading and writing is atomic. The search for races must not take it for a plain
// write, but the search for wrong addresses goes on.
template <typename Number>
__attribute__((no_sanitize("thread"))) Number atomicAdd(Number* address, Number number) {
  machine::note_atomic(address, sizeof(Number));
  const Number before = *address;
  *address = before + number;
  return before;
}

#if __CUDA_ARCH__ >= 900
__attribute__((no_sanitize("thread"))) inline float4 atomicAdd(float4* address, float4 number) {
  machine::note_atomic(address, sizeof(float4));
  const float4 before = *address;
  *address = {before.x + number.x, before.y + number.y, before.z + number.z, before.w + number.w};
  return before;
}
#endif

template <typename Number>
Number __shfl_xor_sync(unsigned mask, Number number, int distance) {
  static_assert(sizeof(Number) <= 8);
  Number other;
  machine::exchange(mask, distance, &number, &other, sizeof(Number));
  return other;
}

// To the nearest integer, ties to even; beyond the range the end of the range, as on the GPU.
inline long long __double2ll_rn(double number) {
  constexpr long long kLeast = std::numeric_limits<long long>::min(), kMost = std::numeric_limits<long long>::max();
  if (isnan(number) || number < -0x1p63) return kLeast;
  return number >= 0x1p63 ? kMost : llrint(number);
}
