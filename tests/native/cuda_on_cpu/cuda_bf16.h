// bfloat16 as kernels use it: rounded to nearest, ties to even; a NaN is 0x7fff, as on GPUs.
#ifndef JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_BF16_H_
#define JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_BF16_H_

#include <cmath>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
namespace cuda_on_cpu {

inline double ValueOf(__nv_bfloat16 number) {
  const uint32_t word = static_cast<uint32_t>(number.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Rounded once: first to odd, as float32.
inline __nv_bfloat16 Rounded(double value) {
  float near = static_cast<float>(value);
  if (near != value) {
    if (std::abs(near) > std::abs(value)) near = std::nextafter(near, 0.0f);
    uint32_t word;
    std::memcpy(&word, &near, sizeof(word));
    word |= 1;
    std::memcpy(&near, &word, sizeof(near));
  }
  return __float2bfloat16(near);
}

}  // namespace cuda_on_cpu

// The sum is exact as double where the terms differ by less than 2^37.
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  using cuda_on_cpu::ValueOf;
  return {cuda_on_cpu::Rounded(ValueOf(a.x) * ValueOf(b.x) + ValueOf(c.x)),
          cuda_on_cpu::Rounded(ValueOf(a.y) * ValueOf(b.y) + ValueOf(c.y))};
}
inline __nv_bfloat162 __hadd2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hfma2(a, {{0x3f80}, {0x3f80}}, b);
}
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using cuda_on_cpu::ValueOf;
  return {ValueOf(b.x) < ValueOf(a.x) ? b.x : a.x, ValueOf(b.y) < ValueOf(a.y) ? b.y : a.y};
}

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_BF16_H_
