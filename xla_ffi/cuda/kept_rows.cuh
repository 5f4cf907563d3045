// Rows that stay encoded where they are received: the parts of each go to arrays of their own.
#ifndef JAX_DEEPEP_CUDA_KEPT_ROWS_CUH_
#define JAX_DEEPEP_CUDA_KEPT_ROWS_CUH_

#include <cstdint>

#include "cuda/row_values.cuh"
#include "interface/wire_format.h"

namespace jax_deepep {

// Where the parts of a row go.
struct KeptPlace {
  char *data, *scales, *row_scale;
};

// A row in groups of 16 bytes, each within one part.
struct KeptShape {
  WireRow wire;

  __device__ int num_groups() const { return wire.bytes() / kBytes; }

  __device__ __forceinline__ void Store(const KeptPlace& to, int group, const uint4& words) const {
    const int first_scales = wire.scales_offset() / kBytes;
    const int first_row_scale = wire.row_scale_offset() / kBytes;
    if (group < first_scales) {
      StorePiece(to.data, group, words, wire.data_bytes());
    } else if (group < first_row_scale) {
      StorePiece(to.scales, group - first_scales, words, wire.scales_bytes());
    } else {
      *reinterpret_cast<uint32_t*>(to.row_scale) = words.x;
    }
  }

 private:
  static constexpr int kBytes = sizeof(uint4);

  // In a part of `part_bytes`; what is left of it may be less than 16 bytes, and anywhere.
  __device__ __forceinline__ static void StorePiece(char* part, int piece, const uint4& words,
                                                    int part_bytes) {
    char* to = part + piece * kBytes;
    const int bytes = min(part_bytes - piece * kBytes, kBytes);
    const auto address = reinterpret_cast<uintptr_t>(to);
    if (bytes == kBytes && address % kBytes == 0) {
      *reinterpret_cast<uint4*>(to) = words;
      return;
    }
    const int unit = (address | bytes) % sizeof(uint32_t) == 0 ? sizeof(uint32_t) : 1;
#pragma unroll 1
    for (int i = 0; i < bytes; i += unit) {
      const uint32_t word = i < 8 ? (i < 4 ? words.x : words.y) : (i < 12 ? words.z : words.w);
      if (unit == 1) {
        to[i] = static_cast<char>(word >> i % 4 * 8);
      } else {
        *reinterpret_cast<uint32_t*>(to + i) = word;
      }
    }
  }
};

// A row as it crosses links, in groups that a lane copies: see PlainRow.
struct KeptRow {
  using Loaded = uint4;
  using Stored = uint4;
  static constexpr int kInFlight = 8;  // as many bytes as of rows that are decoded
  static constexpr int kAtOnce = kInFlight;
  const char* row;
  KeptShape shape;

  __device__ __forceinline__ Loaded Load(int group) const {
    return LoadOnce(reinterpret_cast<const uint4*>(row) + group);
  }
  __device__ __forceinline__ Stored Decode(const Loaded& group) const { return group; }
  __device__ __forceinline__ void Store(const KeptPlace& to, int group,
                                        const Stored& stored) const {
    shape.Store(to, group, stored);
  }
};

// Received rows, in place of RowArray.
struct KeptRowArrays {
  KeptArrays arrays;
  KeptShape shape;

  __device__ __forceinline__ KeptPlace At(int64_t row) const {
    return {static_cast<char*>(arrays.data) + row * shape.wire.data_bytes(),
            static_cast<char*>(arrays.scales) + row * shape.wire.scales_bytes(),
            static_cast<char*>(arrays.row_scale) + row * shape.wire.row_scale_bytes()};
  }
  // By a warp.
  __device__ void Zero(int64_t row) const {
    for (int group = threadIdx.x % 32; group < shape.num_groups(); group += 32) {
      shape.Store(At(row), group, uint4{});
    }
  }
};

// The rows of an op that failed, [capacity]. By all threads of a block.
__device__ inline void FillReceivedAsFailed(const RouteShape& route, void* rows,
                                            const KeptArrays& kept) {
  const int64_t capacity = route.capacity;
  if (!route.keeps_quantized) {
    return FillAsFailed(route.row_type, rows, capacity * route.row_size);
  }
  const WireRow wire = route.rows().wire_row();
  FillWithOnes(kept.data, capacity * wire.data_bytes());
  FillWithOnes(kept.scales, capacity * wire.scales_bytes());
  FillWithOnes(kept.row_scale, capacity * wire.row_scale_bytes());
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KEPT_ROWS_CUH_
