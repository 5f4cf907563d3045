// Rows as groups of eight elements: how a warp loads, converts and stores them.
//
// A group is 16 bytes (32 for float32), so that a warp moves 512 bytes of a row at a time. Speed
// depends on the number of loads in flight; with enough of them, plain loads copy as fast as the
// bulk copy engine, and both as fast as an SM can write: see bench/RESULTS.md.
//
// Products and sums are rounded separately: __fmul_rn and __fadd_rn are never fused.
#ifndef JAX_DEEPEP_CUDA_ROW_VALUES_CUH_
#define JAX_DEEPEP_CUDA_ROW_VALUES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/memory_order.cuh"
#include "interface/geometry.h"

namespace jax_deepep {

inline constexpr int kGroup = 8;  // elements

// Two floats of 16 bits and their word; the first is in the lower half.
template <typename Pair>
__device__ __forceinline__ Pair PairOf(uint32_t word) {
  Pair pair;
  std::memcpy(&pair, &word, sizeof(pair));
  return pair;
}
template <typename Pair>
__device__ __forceinline__ uint32_t WordOf(Pair pair) {
  uint32_t word;
  std::memcpy(&word, &pair, sizeof(word));
  return word;
}

// Eight elements as in memory.
template <typename Element>
struct Packed {
  static constexpr int kWords = kGroup * sizeof(Element) / sizeof(uint4);
  uint4 words[kWords];
};

// Elements of a row. A row of whole groups is loaded and stored 16 bytes at a time; any other one
// an element at a time.
template <bool kWhole>
struct RowShape {
  int size = 0;

  __host__ __device__ int num_groups() const { return (size + kGroup - 1) / kGroup; }
};

// A row as 16-bit words, for copies.
template <bool kWhole>
__device__ __forceinline__ RowShape<kWhole> WordsOf(int64_t row_bytes) {
  return {static_cast<int>(row_bytes / sizeof(uint16_t))};
}

// Groups of a row.
struct GroupRange {
  int first, end;

  // A part of a row: whole multiples of `granule` groups; the last one is the rest, which may be
  // empty.
  __device__ static GroupRange Part(int num_groups, int granule, int part, int num_parts) {
    const int granules = (num_groups + granule - 1) / granule;
    const int of_part = (granules + num_parts - 1) / num_parts * granule;
    const int first = min(part * of_part, num_groups);
    return {first, min(first + of_part, num_groups)};
  }
  __device__ bool empty() const { return first == end; }
};

// Load or store a group of a row; elements past the row are loaded as zeros and not stored.
template <typename Element, bool kWhole>
__device__ __forceinline__ Packed<Element> LoadGroup(const char* row, int group,
                                                     RowShape<kWhole> shape) {
  Packed<Element> packed;
  const auto* from = reinterpret_cast<const Element*>(row) + int64_t{group} * kGroup;
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < Packed<Element>::kWords; ++i) {
      packed.words[i] = LoadOnce(reinterpret_cast<const uint4*>(from) + i);
    }
  } else {
    auto* to = reinterpret_cast<Element*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = group * kGroup + i < shape.size ? from[i] : Element{};
  }
  return packed;
}

template <typename Element, bool kWhole>
__device__ __forceinline__ void StoreGroup(char* row, int group, RowShape<kWhole> shape,
                                           const Packed<Element>& packed) {
  auto* to = reinterpret_cast<Element*>(row) + int64_t{group} * kGroup;
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < Packed<Element>::kWords; ++i) {
      reinterpret_cast<uint4*>(to)[i] = packed.words[i];
    }
  } else {
    const auto* from = reinterpret_cast<const Element*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (group * kGroup + i < shape.size) to[i] = from[i];
    }
  }
}

// The greatest of the elements without their signs, as integers of 16 bits.
__device__ __forceinline__ uint32_t LargestHalfOf(const Packed<uint16_t>& packed) {
  const uint4& word = packed.words[0];
  uint32_t both = __vmaxu2(word.x & 0x7fff7fffu, word.y & 0x7fff7fffu);
  both = __vmaxu2(both, __vmaxu2(word.z & 0x7fff7fffu, word.w & 0x7fff7fffu));
  return max(both & 0xffffu, both >> 16);
}

// What is larger than the largest finite value becomes that, also infinity; NaN stays.
__device__ __forceinline__ float Saturated(float value, float largest) {
  const float below = value > largest ? largest : value;
  return below < -largest ? -largest : below;
}

// The row types: bits in memory to float32 and back, rounded to nearest, ties to even. A saturated
// word has one or two values, the first in its lower half.
struct Float32 {
  using Element = uint32_t;
  static constexpr float kLargest = 0x1.fffffep127f;  // finite
  // The bits of the largest |element| as float32; infinity and NaN come last.
  __device__ static uint32_t LargestOf(const Packed<Element>& packed) {
    uint32_t largest = 0;
#pragma unroll
    for (const uint4& word : packed.words) {
      largest = max(max(largest, word.x & 0x7fffffffu), word.y & 0x7fffffffu);
      largest = max(max(largest, word.z & 0x7fffffffu), word.w & 0x7fffffffu);
    }
    return largest;
  }
  __device__ static void Unpack(const Packed<Element>& packed, float* values) {
    const auto* from = reinterpret_cast<const float*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = from[i];
  }
  __device__ static Packed<Element> Pack(const float* values) {
    Packed<Element> packed;
    auto* to = reinterpret_cast<float*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = values[i];
    return packed;
  }
  __device__ static uint32_t SaturatedWord(const float* value) {
    return __float_as_uint(Saturated(*value, kLargest));
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr float kLargest = 0x1.fep127f;
  __device__ static uint32_t LargestOf(const Packed<Element>& packed) {
    return LargestHalfOf(packed) << 16;
  }
  __device__ static void Unpack(const Packed<Element>& packed, float* values) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      values[2 * i] = __uint_as_float(pairs[i] << 16);
      values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
  __device__ static Packed<Element> Pack(const float* values) {
    Packed<Element> packed;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i)
      pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    return packed;
  }
  __device__ static uint32_t SaturatedWord(const float* values) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return WordOf(
        __floats2bfloat162_rn(Saturated(values[0], kLargest), Saturated(values[1], kLargest)));
#endif
  }
};

struct Float16 {
  using Element = uint16_t;
  static constexpr float kLargest = 65504.0f;
  __device__ static uint32_t LargestOf(const Packed<Element>& packed) {
    const uint32_t bits = LargestHalfOf(packed);
    return __float_as_uint(__half22float2(*reinterpret_cast<const __half2*>(&bits)).x);
  }
  __device__ static void Unpack(const Packed<Element>& packed, float* values) {
    const auto* pairs = reinterpret_cast<const __half2*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const float2 pair = __half22float2(pairs[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  }
  __device__ static Packed<Element> Pack(const float* values) {
    Packed<Element> packed;
    auto* pairs = reinterpret_cast<__half2*>(packed.words);
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i)
      pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    return packed;
  }
  __device__ static uint32_t SaturatedWord(const float* values) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(values[1]), "f"(values[0]));
    return word;
#else
    return WordOf(
        __floats2half2_rn(Saturated(values[0], kLargest), Saturated(values[1], kLargest)));
#endif
  }
};

template <typename Type>
__device__ __forceinline__ Packed<typename Type::Element> PackSaturated(const float* values) {
  constexpr int kInWord = sizeof(uint32_t) / sizeof(typename Type::Element);
  Packed<typename Type::Element> packed;
  auto* words = reinterpret_cast<uint32_t*>(packed.words);
#pragma unroll
  for (int i = 0; i < kGroup / kInWord; ++i) words[i] = Type::SaturatedWord(values + i * kInWord);
  return packed;
}

// By a warp.
template <bool kWhole>
__device__ void ZeroRow(char* row, RowShape<kWhole> shape) {
  for (int group = threadIdx.x % 32; group < shape.num_groups(); group += 32) {
    StoreGroup(row, group, shape, Packed<uint16_t>{});
  }
}

// By all threads of a block.
template <typename T>
__device__ void FillByBlock(T* to, int64_t count, T value) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = value;
}

// Set all bits of an array: NaN in every format. By all threads of a block, 16 bytes at a time.
__device__ inline void FillWithOnes(void* array, int64_t bytes) {
  const int64_t whole = bytes / static_cast<int64_t>(sizeof(uint4));
  FillByBlock(static_cast<uint4*>(array), whole, uint4{~0u, ~0u, ~0u, ~0u});
  FillByBlock(reinterpret_cast<char*>(static_cast<uint4*>(array) + whole), bytes % 16, '\xff');
}

// By all threads of a block, 16 bytes at a time, because one block fills what otherwise all write.
// XLA's arrays are aligned to that; rows in the middle of one may not be. With NaN, or -1, as on
// the CPU.
__device__ inline void FillAsFailed(RowType type, void* rows, int64_t count) {
  const uint32_t word = type == RowType::kFloat32    ? 0x7fc00000u
                        : type == RowType::kBFloat16 ? 0x7fc07fc0u
                        : type == RowType::kFloat16  ? 0x7e007e00u
                                                     : 0xffffffffu;
  const int64_t bytes = count * static_cast<int64_t>(BytesOf(type));
  const bool is_aligned = reinterpret_cast<uintptr_t>(rows) % sizeof(uint4) == 0;
  const int64_t whole = is_aligned ? bytes / static_cast<int64_t>(sizeof(uint4)) : 0;
  FillByBlock(static_cast<uint4*>(rows), whole, uint4{word, word, word, word});
  auto* rest = reinterpret_cast<uint16_t*>(static_cast<uint4*>(rows) + whole);
  for (int64_t i = threadIdx.x; i < (bytes - whole * 16) / 2; i += blockDim.x) {
    // The upper half of a float32 is second.
    rest[i] = static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16);
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_VALUES_CUH_
