// What a .cu needs to be C++: a grid of blocks of one thread, walked by a loop (see gpuload_resize_literal).
// Shared memory is thread_local, so host threads may run blocks at the same time.
#pragma once
#include <cstring>

#define GPULOAD_CPU 1
#define __global__
#define __device__
#define SHARED static thread_local

struct Dim3 {
  unsigned x, y, z;
};
static thread_local Dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};
static inline void __syncthreads() {}

static inline unsigned int float_bits(float x) {
  unsigned int b;
  std::memcpy(&b, &x, 4);
  return b;
}

// float -> IEEE half, to nearest even, as cvt.rn.f16.f32; no compiler support for halves needed.
static inline unsigned short half_bits(float x) {
  const unsigned int b = float_bits(x), sign = (b >> 16) & 0x8000;
  unsigned int a = b & 0x7fffffff;
  if (a >= 0x7f800000) return (unsigned short)(sign | (a > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (a >= 0x477ff000) return (unsigned short)(sign | 0x7c00);  // 65520 and above
  if (a < 0x38800000) {                                         // subnormal: let the float adder do the rounding
    float f;
    std::memcpy(&f, &a, 4);
    return (unsigned short)(sign | (float_bits(f + 0.5f) - 0x3f000000));
  }
  a += 0xc8000fff + ((a >> 13) & 1);  // rebias the exponent, round to even
  return (unsigned short)(sign | (a >> 13));
}
