// The elements of rows as float32, and loops that are fast on every machine.
#ifndef JAX_DEEPEP_CPU_ROW_TYPES_H_
#define JAX_DEEPEP_CPU_ROW_TYPES_H_

#include <cstdint>
#include <limits>

#include "interface/number_formats.h"

// The compiler makes one version of a function per instruction set and picks one when loading, so
// that a wheel built anywhere is fast everywhere. Contraction is off (see CMakeLists.txt): every
// version gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define JAX_DEEPEP_ALL_ISAS \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAX_DEEPEP_ALL_ISAS \
  __attribute__((target_clones("avx2", "default")))  // no architecture levels
#else
#define JAX_DEEPEP_ALL_ISAS
#endif
#define JAX_DEEPEP_INLINE inline __attribute__((always_inline))

namespace jax_deepep {

// A row type converts to float32, rounds a float32 to its precision (to nearest, ties to even),
// and converts back. Without branches, so that loops over them are vectorised. kLargest is finite.
struct Float32 {
  using Storage = float;
  static constexpr float kLargest = std::numeric_limits<float>::max();
  static JAX_DEEPEP_INLINE float Load(float value) { return value; }
  static JAX_DEEPEP_INLINE float Round(float value) { return value; }
  static JAX_DEEPEP_INLINE float Store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr float kLargest = 0x1.fep127f;
  static JAX_DEEPEP_INLINE float Load(uint16_t bits) {
    return FloatOf(static_cast<uint32_t>(bits) << 16);
  }
  // The rounded value, in the upper half of the word.
  static JAX_DEEPEP_INLINE uint32_t RoundedBits(float value) {
    const uint32_t bits = BitsOf(value);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value != value ? bits | 0x400000u : rounded;
  }
  static JAX_DEEPEP_INLINE float Round(float value) {
    return FloatOf(RoundedBits(value) & 0xffff0000u);
  }
  static JAX_DEEPEP_INLINE uint16_t Store(float value) {
    return static_cast<uint16_t>(RoundedBits(value) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr float kLargest = 65504.0f;
  // Multiplying by powers of two rebiases the exponent and normalises subnormals exactly.
  static JAX_DEEPEP_INLINE float FromBits(uint32_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const uint32_t finite = BitsOf(FloatOf(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
    return FloatOf((magnitude >= 0x0f800000u ? special : finite) | sign);
  }
  static JAX_DEEPEP_INLINE uint32_t ToBits(float value) {
    const uint32_t bits = BitsOf(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: round to nearest even on the 13 bits that are dropped.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 leaves the wanted bits at the end of the mantissa, rounded by
    // the addition itself.
    const uint32_t subnormal = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and more round up to infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return result | ((bits >> 16) & 0x8000u);
  }
  static JAX_DEEPEP_INLINE float Load(uint16_t bits) { return FromBits(bits); }
  static JAX_DEEPEP_INLINE float Round(float value) { return FromBits(ToBits(value)); }
  static JAX_DEEPEP_INLINE uint16_t Store(float value) {
    return static_cast<uint16_t>(ToBits(value));
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_ROW_TYPES_H_
