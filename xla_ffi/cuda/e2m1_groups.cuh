// Groups of eight elements as float4_e2m1fn, two at a time in the arithmetic of 16-bit floats: the
// numbers of E2m1Of and FromE2m1 in fewer instructions.
#ifndef JAX_DEEPEP_CUDA_E2M1_GROUPS_CUH_
#define JAX_DEEPEP_CUDA_E2M1_GROUPS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/row_values.cuh"
#include "interface/number_formats.h"

namespace jax_deepep {

// The codes of values of less than 16, four bits each, the first in the lowest.
__device__ __forceinline__ uint32_t E2m1GroupOf(const float* values) {
  const auto twice = [](uint32_t bits) { return PairOf<__nv_bfloat162>(bits << 16 | bits); };
  // bfloat16: as an addition to 128 rounds to integers, the code is the last digits of the sum.
  constexpr uint32_t kHalf = 0x3f00, kTwo = 0x4000;
  constexpr uint32_t k128 = 0x4300, kLargestCode = k128 + 7;
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t first = BitsOf(values[i]), second = BitsOf(values[i + kGroup / 2]);
    // Rounded to odd, so that rounding again makes no difference: the last digit is 1 if any of
    // those that are cut off is.
    const uint32_t cut_off = __vminu2(__byte_perm(first, second, 0x5410), 0x00010001u);
    const uint32_t pair = __byte_perm(first, second, 0x7632) | cut_off;
    const auto size = PairOf<__nv_bfloat162>(pair & 0x7fff7fffu);
    // Codes are 1/2 apart up to 2, then 1 up to 4, then 2: the least of three lines.
    auto code = __hmin2(__hfma2(size, twice(kTwo), twice(k128)), __hadd2_rn(size, twice(k128 + 2)));
    code =
        __hmin2(code, __hmin2(__hfma2(size, twice(kHalf), twice(k128 + 4)), twice(kLargestCode)));
    // Element i + 4 is 16 bits after element i.
    codes += ((WordOf(code) - (k128 << 16 | k128)) | (pair >> 12 & 0x00080008u)) << 4 * i;
  }
  return codes;
}

// The signs of four codes, which are in the lower half, as the highest bits of bytes.
__device__ __forceinline__ uint32_t SignsOfE2m1(uint32_t codes) {
#ifdef __CUDA_ARCH__
  // A selector with its highest bit set copies the sign of the byte to all of its bits.
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(bytes) : "r"(0x80808080u), "r"(codes));
  return bytes << 1 & 0x80808080u;
#else
  return (codes & 0x8u) << 4 | (codes & 0x80u) << 8 | (codes & 0x800u) << 12 |
         (codes & 0x8000u) << 16;
#endif
}

// Multiply eight elements by a scale, a float8_e4m3fn that is twice in a word as float16: exact.
__device__ __forceinline__ void ScaleE2m1Group(uint32_t codes, uint32_t scale, float* values) {
  // As float16, 0, 0.5, 1, 1.5 and 2, 3, 4, 6 have these upper bytes, and lower ones of 0.
  constexpr uint32_t kFrom0 = 0x3e3c3800, kFrom2 = 0x46444240;
#pragma unroll
  for (int i = 0; i < kGroup; i += 4) {
    const uint32_t four = codes >> 4 * i;
    const uint32_t uppers = __byte_perm(kFrom0, kFrom2, four & 0x7777u) | SignsOfE2m1(four);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t elements = __byte_perm(uppers, 0, j == 0 ? 0x1404 : 0x3424);
      const float2 pair =
          __half22float2(__hmul2(PairOf<__half2>(elements), PairOf<__half2>(scale)));
      values[i + j] = pair.x, values[i + j + 1] = pair.y;
    }
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_E2M1_GROUPS_CUH_
