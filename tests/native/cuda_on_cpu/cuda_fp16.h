// float16 as kernels use it: rounded to nearest, ties to even.
#ifndef JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_FP16_H_
#define JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_FP16_H_

#include "cuda_runtime.h"

using __half = _Float16;
struct alignas(4) __half2 {
  _Float16 x, y;
};
inline __half __float2half(float value) { return static_cast<_Float16>(value); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<_Float16>(x), static_cast<_Float16>(y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return {static_cast<_Float16>(a.x * b.x), static_cast<_Float16>(a.y * b.y)};
}
inline float2 __half22float2(__half2 pair) {
  return {static_cast<float>(pair.x), static_cast<float>(pair.y)};
}

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_FP16_H_
