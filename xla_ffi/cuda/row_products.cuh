// Scaling of rows and dot products with others during a copy: the gradient of combine.
#ifndef JAX_DEEPEP_CUDA_ROW_PRODUCTS_CUH_
#define JAX_DEEPEP_CUDA_ROW_PRODUCTS_CUH_

#include <cstdint>

#include "cuda/kept_rows.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/cached_dispatch.h"

namespace jax_deepep {

// Scaling keeps a chunk of a row in registers: this many groups per lane.
inline constexpr int kGroupsPerLane = 8;
inline constexpr int kChunkGroups =
    32 * kGroupsPerLane;  // 2048 elements: one block of the dot product

// The sum over a warp's lanes of eight running sums each: halves of the eight first, then halves of
// the warp, in the order of the CPU. The result is that of lane 0.
__device__ inline float FoldSums(float* sums) {
#pragma unroll
  for (int width = kGroup / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] = __fadd_rn(sums[i], sums[i + width]);
  }
  float sum = sums[0];
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, width));
  }
  return sum;
}

// Prefetch a chunk of the lanes' rows of y, except the first, so that each is in the L2 cache when
// needed: registers hold one row's chunk at a time.
__device__ inline void PrefetchChunk(const char* y, int64_t row_bytes, int32_t row, int num_rows,
                                     int64_t begin, int64_t bytes) {
  constexpr int kLine = 128;
  const int64_t end = min(begin + bytes, row_bytes);
  for (int j = 1; j < num_rows; ++j) {
    const char* y_row = y + __shfl_sync(~0u, row, j) * row_bytes;
    for (int64_t at = begin + threadIdx.x % 32 * kLine; at < end; at += 32 * kLine) {
      PrefetchToL2(y_row + at);
    }
  }
}

// A group of the row, decoded; of a slow row, of which loads that are made early would need more
// registers than there are, by a function of its own.
template <typename From>
__device__ __noinline__ typename From::Stored DecodedOutOfLine(const From& from, int group) {
  return from.Decode(from.Load(group));
}
template <typename From>
__device__ __forceinline__ typename From::Stored DecodedGroup(const From& from, int group) {
  if constexpr (From::kIsSlow) return DecodedOutOfLine(from, group);
  return from.Decode(from.Load(group));
}

// Write the row `from` to the rows of the first `num_rows` lanes, scaled by their weights, and its
// products with their rows of y.
template <typename Type, bool kWhole, typename From>
__device__ __forceinline__ void ScaleRow(const CachedDispatchParams& params, int64_t row_bytes,
                                         const From& from, int32_t row, int num_rows) {
  using Element = typename Type::Element;
  const int lane = threadIdx.x % 32;
  const RowShape<kWhole> shape{params.route.row_size};
  const int num_groups = shape.num_groups();
  const float weight = row != kNone ? params.weights[row] : 0.0f;
  float product = 0.0f;  // of the lane's row
  for (int base = lane; base - lane < num_groups; base += kChunkGroups) {
    constexpr int64_t kGroupBytes = sizeof(Packed<Element>);
    PrefetchChunk(static_cast<const char*>(params.y), row_bytes, row, num_rows,
                  (base - lane) * kGroupBytes, kChunkGroups * kGroupBytes);
    // x stays in registers; one part of y is loaded while the previous one is used. Parts of
    // float32 are small, to fit in registers.
    constexpr int kParts = sizeof(Element) > 2 ? 8 : 2, kPart = kGroupsPerLane / kParts;
    Packed<Element> x[kGroupsPerLane], y[2][kPart];
    auto load = [&](const char* of, int first, int count, Packed<Element>* to) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int at = base + (first + i) * 32;
        if (at < num_groups) to[i] = LoadGroup<Element>(of, at, shape);
      }
    };
    auto y_row = [&](int j) {
      return static_cast<const char*>(params.y) + __shfl_sync(~0u, row, j) * row_bytes;
    };
#pragma unroll
    for (int i = 0; i < kGroupsPerLane; ++i) {
      const int at = base + i * 32;
      if (at < num_groups) x[i] = DecodedGroup(from, at);
    }
    load(y_row(0), 0, kPart, y[0]);
    for (int j = 0; j < num_rows; ++j) {
      const float scale = __shfl_sync(~0u, weight, j);
      char* to = static_cast<char*>(params.rows) + __shfl_sync(~0u, row, j) * row_bytes;
      float sums[kGroup] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part + 1 < kParts) {
          load(y_row(j), (part + 1) * kPart, kPart, y[(part + 1) % 2]);
        } else if (j + 1 < num_rows) {
          load(y_row(j + 1), 0, kPart, y[0]);
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const int at = base + (part * kPart + i) * 32;
          if (at >= num_groups) continue;
          float left[kGroup], right[kGroup];
          Type::Unpack(x[part * kPart + i], left);
          Type::Unpack(y[part % 2][i], right);
#pragma unroll
          for (int e = 0; e < kGroup; ++e) {
            if (kWhole || at * kGroup + e < shape.size) {
              sums[e] = __fadd_rn(sums[e], __fmul_rn(left[e], right[e]));
            }
            left[e] = __fmul_rn(left[e], scale);
          }
          StoreGroup(to, at, shape, Type::Pack(left));
        }
      }
      const float sum = __shfl_sync(~0u, FoldSums(sums), 0);
      if (lane == j) product = __fadd_rn(product, sum);
    }
  }
  if (row != kNone) params.products[row] = product;
}

// Clear the padding rows, and with zero_rest the rows after the last group.
template <typename Rows>
__device__ void WriteZeros(const CachedDispatchParams& params, const GroupShape& shape,
                           const Rows& received) {
  const int groups = params.route.layout == Layout::kExpertMajor ? shape.num_local_experts() : 1;
  const int lane = threadIdx.x % 32;
  int64_t end = params.route.capacity;
  if (!params.zero_rest) {
    end = 0;
    for (int group = 0; group < groups; ++group) end += params.group_sizes[group];
  }
  // Empty rows follow each other: those at which a warp looks are far apart, so that all have some.
  const int64_t stride = NumWarps();
  for (int64_t base = FirstItem(); base < params.route.capacity; base += 32 * stride) {
    const int64_t row = base + lane * stride;
    const bool empty = row < params.route.capacity && params.source[row] == kNone;
    if (empty && params.products != nullptr) params.products[row] = 0.0f;
    for (uint32_t lanes = __ballot_sync(~0u, empty && row < end); lanes != 0; lanes &= lanes - 1) {
      received.Zero(base + (__ffs(lanes) - 1) * stride);
    }
  }
}

// The results of a cached dispatch that failed. By one block.
__device__ inline void WriteFailure(const CachedDispatchParams& params) {
  const int64_t capacity = params.route.capacity;
  FillReceivedAsFailed(params.route, params.rows, params.kept);
  if (params.products != nullptr) FillAsFailed(RowType::kFloat32, params.products, capacity);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_PRODUCTS_CUH_
