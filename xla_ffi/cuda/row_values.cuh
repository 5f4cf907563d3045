// Elements of rows in groups of eight: to float32 and back, and the arithmetic of the contract.
//
// Products and sums are rounded separately: __fmul_rn and __fadd_rn are never fused. Eight elements
// are 16 bytes (32 for float32), so that a warp moves 256 elements of a row at a time.
#ifndef JAX_DEEPEP_CUDA_ROW_VALUES_CUH_
#define JAX_DEEPEP_CUDA_ROW_VALUES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/row_stream.h"
#include "interface/geometry.h"

namespace jax_deepep {

struct Float32 {
  using Storage = float;
  __device__ static float Load(float value) { return value; }
  __device__ static float Store(float value) { return value; }
  __device__ static void Load8(const float* from, float* values) {
    const float4 low = reinterpret_cast<const float4*>(from)[0];
    const float4 high = reinterpret_cast<const float4*>(from)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
  __device__ static void Store8(float* to, const float* values) {
    reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
  }
};

// The 16-bit types, whose pairs convert together.
template <typename Pair, typename Single>
struct Float16Bits {
  using Storage = Single;
  __device__ static void Load8(const Storage* from, float* values) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const auto* pairs = reinterpret_cast<const Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ToFloats(pairs[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  }
  __device__ static void Store8(Storage* to, const float* values) {
    uint4 bits;
    auto* pairs = reinterpret_cast<Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = FromFloats(values[2 * i], values[2 * i + 1], Pair());
    *reinterpret_cast<uint4*>(to) = bits;
  }

 private:
  __device__ static float2 ToFloats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
  __device__ static float2 ToFloats(__half2 pair) { return __half22float2(pair); }
  __device__ static __nv_bfloat162 FromFloats(float a, float b, __nv_bfloat162) {
    return __floats2bfloat162_rn(a, b);
  }
  __device__ static __half2 FromFloats(float a, float b, __half2) {
    return __floats2half2_rn(a, b);
  }
};

struct BFloat16 : Float16Bits<__nv_bfloat162, __nv_bfloat16> {
  __device__ static float Load(__nv_bfloat16 value) { return __bfloat162float(value); }
  __device__ static __nv_bfloat16 Store(float value) { return __float2bfloat16_rn(value); }
};

struct Float16 : Float16Bits<__half2, __half> {
  __device__ static float Load(__half value) { return __half2float(value); }
  __device__ static __half Store(float value) { return __float2half_rn(value); }
};

// Round to what a row can hold.
template <typename Type>
__device__ __forceinline__ float Rounded(float value) {
  return Type::Load(Type::Store(value));
}

// Read or write group `group` of a run of `size` elements; `whole` says that all runs start and end
// at 16 bytes. Elements after the run are read as 0 and not written.
template <typename Type>
__device__ __forceinline__ void ReadGroup(const char* run, int group, int size, bool whole,
                                          float* values) {
  const auto* from = reinterpret_cast<const typename Type::Storage*>(run) + group * kGroup;
  if (whole && (group + 1) * kGroup <= size) {
    Type::Load8(from, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    values[i] = group * kGroup + i < size ? Type::Load(from[i]) : 0.0f;
  }
}

template <typename Type>
__device__ __forceinline__ void WriteGroup(char* run, int group, int size, bool whole,
                                           const float* values) {
  auto* to = reinterpret_cast<typename Type::Storage*>(run) + group * kGroup;
  if (whole && (group + 1) * kGroup <= size) {
    Type::Store8(to, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (group * kGroup + i < size) to[i] = Type::Store(values[i]);
  }
}

// By all threads of a block.
template <typename T>
__device__ void FillByBlock(T* to, int64_t count, T value) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = value;
}

__device__ inline void FillRowsWithNaN(RowType type, void* rows, int64_t count) {
  if (type == RowType::kFloat32) {
    FillByBlock(static_cast<uint32_t*>(rows), count, 0x7fc00000u);
  } else {
    const uint16_t nan = type == RowType::kBFloat16 ? 0x7fc0 : 0x7e00;
    FillByBlock(static_cast<uint16_t*>(rows), count, nan);
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_VALUES_CUH_
