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

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_BF16_H_
