// Numbers of low precision as bits, and the scales of blocks: the arithmetic that all platforms
// share, in float32, each operation rounded by itself. As jax_deepep/quantization/rounding.py.
#ifndef JAX_DEEPEP_INTERFACE_NUMBER_FORMATS_H_
#define JAX_DEEPEP_INTERFACE_NUMBER_FORMATS_H_

#include <cstdint>
#include <cstring>

#include "interface/host_device.h"
#include "interface/wire_format.h"

namespace jax_deepep {

JAX_DEEPEP_HOST_DEVICE inline uint32_t BitsOf(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

JAX_DEEPEP_HOST_DEVICE inline float FloatOf(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

inline constexpr uint32_t kSignBit = 0x80000000u;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr uint32_t kNanBits = 0x7fc00000u;
inline constexpr float kE4m3Max = 448.0f;
// The bits of 2^-70: below this largest |x|, some |x| under 2^-100 would not be rounded to 0
// anyway.
inline constexpr uint32_t kTinyBits = 57u << 23;

// numerator / denominator, correctly rounded, of a positive normal denominator and a normal
// quotient.
JAX_DEEPEP_HOST_DEVICE inline float Quotient(float numerator, float denominator) {
#ifdef __CUDA_ARCH__
  // The usual steps, without the test for denominators near the ends of the range: here it is moved
  // to [1, 2), which changes no digit.
  const uint32_t bits = BitsOf(denominator);
  const float digits = FloatOf((bits & 0x7fffffu) | 0x3f800000u);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(digits));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-digits, inverse, 1.0f), inverse);
  const float near = __fmul_rn(numerator, inverse);
  const float quotient = __fmaf_rn(__fmaf_rn(-digits, near, numerator), inverse, near);
  return __fmul_rn(quotient, FloatOf((254u << 23) - (bits & kInfinityBits)));
#else
  return numerator / denominator;
#endif
}

// The bits of |x|, whose order is that of the values, infinity and NaN last; 0 below 2^-100.
JAX_DEEPEP_HOST_DEVICE inline uint32_t Magnitude(float x) {
  const uint32_t bits = BitsOf(x) & ~kSignBit;
  return bits < (27u << 23) ? 0 : bits;
}

// Rounded to nearest, ties to even; values in the range of the format.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890  // has instructions for it
// Two at once; the first is in the lower byte.
__device__ __forceinline__ uint32_t E4m3PairOf(float first, float second) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
}

__device__ __forceinline__ uint32_t E4m3Of(float value) { return E4m3PairOf(value, 0.0f); }

// As float16, which is exact.
__device__ __forceinline__ uint32_t HalvesOfE4m3Pair(uint32_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return halves;
}

__device__ __forceinline__ float FromE4m3(uint32_t code) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(HalvesOfE4m3Pair(code))));
  return value;
}
#else
JAX_DEEPEP_HOST_DEVICE inline uint32_t E4m3Of(float value) {
  const uint32_t bits = BitsOf(value);
  uint32_t size = bits & ~kSignBit;
  const uint32_t largest = 0x43e00000u;  // 448
  size = size > largest ? largest : size;
  const uint32_t normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  // Adding 2^14 leaves multiples of 2^-9 at the end of the mantissa, rounded by the addition.
  const uint32_t subnormal = BitsOf(FloatOf(size) + 16384.0f) - 0x46800000u;
  return (size >= 0x3c800000u ? normal : subnormal) | (bits >> 24 & 0x80u);
}

JAX_DEEPEP_HOST_DEVICE inline float FromE4m3(uint32_t code) {
  const uint32_t size = code & 0x7fu;
  // Exponent and mantissa as those of a float32, times 2^(127 - 7), which is exact.
  const float value = FloatOf(size << 20) * 0x1p120f;
  const uint32_t bits = size == 0x7fu ? kNanBits : BitsOf(value);
  return FloatOf(bits | (code & 0x80u) << 24);
}
#endif

JAX_DEEPEP_HOST_DEVICE inline uint32_t E2m1Of(float value) {
  const uint32_t bits = BitsOf(value);
  uint32_t size = bits & ~kSignBit;
  const uint32_t largest = 0x40c00000u;  // 6
  size = size > largest ? largest : size;
  // As in E4m3Of; below 1, multiples of a half.
  const uint32_t normal = ((size + 0x1fffffu + (size >> 22 & 1u)) >> 22) - (126u << 1);
  const uint32_t subnormal = BitsOf(FloatOf(size) + 4194304.0f) - 0x4a800000u;
  return (size >= 0x3f800000u ? normal : subnormal) | (bits >> 28 & 8u);
}

JAX_DEEPEP_HOST_DEVICE inline float FromE2m1(uint32_t code) {
  const uint32_t size = code & 7u;
  const uint32_t bits =
      size >= 2 ? ((size >> 1) + 126) << 23 | (size & 1u) << 22 : size * 0x3f000000u;  // 0 or 0.5
  return FloatOf(bits | (code & 8u) << 28);
}

// 2^(exponent - 127); 0 for 0, NaN for 255.
JAX_DEEPEP_HOST_DEVICE inline float FromE8m0(uint32_t exponent) {
  return FloatOf(exponent == 255 ? kNanBits : exponent << 23);
}

// The scale of a block, from the greatest Magnitude of its elements.
struct BlockScale {
  float factor;     // an element is encoded as x * factor; 0 if all of the block are 0
  uint32_t stored;  // the scale on the wire
};

// Of all formats but nvfp4.
JAX_DEEPEP_HOST_DEVICE inline BlockScale ScaleOf(WireFormat format, uint32_t largest_bits) {
  const bool finite = largest_bits < kInfinityBits;
  float largest = FloatOf(finite ? largest_bits : 0);
  if (format != WireFormat::kMxfp8) largest = largest > 1e-4f ? largest : 1e-4f;
  const float scale = largest * (1 / kE4m3Max);
  if (format == WireFormat::kFp8) {
    return {finite ? Quotient(kE4m3Max, largest) : 0.0f, finite ? BitsOf(scale) : kNanBits};
  }
  const uint32_t exponent = (BitsOf(scale) + 0x7fffffu) >> 23;  // rounded up; 0 for 0
  return {finite ? FloatOf((254 - exponent) << 23) : 0.0f, finite ? exponent : 255};
}

// Of nvfp4: the scale of a row, from the greatest Magnitude of all its elements.
struct RowScale {
  float scale;
  float inverse;  // 0 if there is none
  bool finite;
  bool is_tiny;  // below kTinyBits
};

JAX_DEEPEP_HOST_DEVICE inline RowScale RowScaleOf(uint32_t largest_bits) {
  if (largest_bits >= kInfinityBits) return {FloatOf(kNanBits), 0.0f, false, false};
  const float scale = FloatOf(largest_bits) * (1.0f / 2688.0f);
  return {scale, largest_bits > 0 ? Quotient(1.0f, scale) : 0.0f, true, largest_bits < kTinyBits};
}

JAX_DEEPEP_HOST_DEVICE inline BlockScale ScaleOf(const RowScale& row, uint32_t largest_bits) {
  if (!row.finite) return {0.0f, 0};
  const float relative = FloatOf(largest_bits) * (1.0f / 6.0f) * row.inverse;
  const uint32_t stored = E4m3Of(relative);
  const float both = FromE4m3(stored) * row.scale;
  return {stored > 0 ? Quotient(1.0f, both) : 0.0f, stored};
}

// An element as it is encoded: with its sign, but none in a block that is not finite.
JAX_DEEPEP_HOST_DEVICE inline float Scaled(float x, float factor, bool finite) {
  const float size = FloatOf(Magnitude(x)) * factor;
  return finite ? FloatOf(BitsOf(size) | (BitsOf(x) & kSignBit)) : 0.0f;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_NUMBER_FORMATS_H_
