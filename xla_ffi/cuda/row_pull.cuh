// How a warp carries whole rows from peers' memory to their places: through a ring of slots in
// shared memory, one row and one record of where it goes in each, filled and emptied by the copy engine; or, on
// GPUs and for rows that it does not serve, with plain loads and stores.
#ifndef JAX_DEEPEP_CUDA_ROW_PULL_CUH_
#define JAX_DEEPEP_CUDA_ROW_PULL_CUH_

#include <cstdint>

#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/row_pull.h"

namespace jax_deepep {

// Where an item comes from.
struct RowOrigin {
  const char* row;
  const char* record;
};

// Copy `bytes` by a warp, as wide as addresses allow.
template <typename Word>
__device__ __forceinline__ void CopyWords(char* to, const char* from, int64_t bytes) {
  const int count = static_cast<int>(bytes / sizeof(Word));
  const auto* in = reinterpret_cast<const Word*>(from);
  auto* out = reinterpret_cast<Word*>(to);
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < count; i += 32) out[i] = in[i];
}

__device__ inline void CopyRowByWarp(char* to, const char* from, int64_t bytes) {
  if (bytes % 16 == 0) {
    CopyWords<uint4>(to, from, bytes);
  } else if (bytes % 4 == 0) {
    CopyWords<uint32_t>(to, from, bytes);
  } else {
    CopyWords<uint16_t>(to, from, bytes);
  }
}

__device__ inline void ZeroRowByWarp(char* to, int64_t bytes) {
  auto* out = reinterpret_cast<uint16_t*>(to);
  const int lane = threadIdx.x % 32;
  if (bytes % 16 == 0) {
    for (int64_t i = lane; i < bytes / 16; i += 32) reinterpret_cast<uint4*>(to)[i] = uint4{};
  } else {
    for (int64_t i = lane; i < bytes / 2; i += 32) out[i] = 0;
  }
}

// Carry the items first, first + stride, ... below `end`; called by a whole warp.
// locate(item) says where an item comes from, for each lane's own; deliver(item, record), with one
// item for all lanes, returns the row of `rows` that this lane is to write, or -1.
template <bool kBulk, typename Locate, typename Deliver>
__device__ void PullRows(char* memory, const PullShape& shape, char* rows, int first, int end,
                         int stride, Locate locate, Deliver deliver) {
  const int lane = threadIdx.x % 32;
  const int total = first < end ? (end - first - 1) / stride + 1 : 0;
  RowOrigin mine{};
  // Every lane looks up one item of the next 32, so that the way to a peer is waited for once.
  auto origin_of = [&](int number) {
    if (number % 32 == 0 && number + lane < total) mine = locate(first + (number + lane) * stride);
    RowOrigin origin;
    origin.row = reinterpret_cast<const char*>(
        __shfl_sync(~0u, reinterpret_cast<uint64_t>(mine.row), number % 32));
    origin.record = reinterpret_cast<const char*>(
        __shfl_sync(~0u, reinterpret_cast<uint64_t>(mine.record), number % 32));
    return origin;
  };

  if constexpr (!kBulk) {
    for (int number = 0; number < total; ++number) {
      const RowOrigin origin = origin_of(number);
      const int64_t row = deliver(first + number * stride, origin.record);
      for (uint32_t lanes = __ballot_sync(~0u, row >= 0); lanes != 0; lanes &= lanes - 1) {
        const int64_t to = __shfl_sync(~0u, row, __ffs(lanes) - 1);
        CopyRowByWarp(rows + to * shape.row_bytes, origin.row, shape.row_bytes);
      }
    }
  } else {
    auto* barriers = reinterpret_cast<uint64_t*>(memory + shape.slots * shape.SlotBytes());
    if (lane == 0) {
      for (int slot = 0; slot < shape.slots; ++slot) InitLoadBarrier(&barriers[slot]);
      FenceBarrierInit();
    }
    __syncwarp();
    const auto row_bytes = static_cast<uint32_t>(shape.row_bytes);
    auto issue = [&](int number) {
      const RowOrigin origin = origin_of(number);
      if (lane != 0) return;
      const int slot = number % shape.slots;
      char* to = memory + slot * shape.SlotBytes();
      ExpectLoads(&barriers[slot], row_bytes + shape.record_bytes);
      if (shape.record_bytes > 0) {
        BulkLoad(to + shape.RecordOffset(), origin.record, shape.record_bytes, &barriers[slot]);
      }
      BulkLoad(to, origin.row, row_bytes, &barriers[slot]);
    };
    int issued = 0;
    for (; issued < min(shape.slots, total); ++issued) issue(issued);
    for (int number = 0; number < total; ++number) {
      const int slot = number % shape.slots;
      const char* from = memory + slot * shape.SlotBytes();
      WaitForLoads(&barriers[slot], number / shape.slots % 2);
      const int64_t row = deliver(first + number * stride, from + shape.RecordOffset());
      if (row >= 0) BulkStore(rows + row * shape.row_bytes, from, row_bytes);
      CommitStores();
      // The slot of the item before is free once its stores have read it.
      if (number > 0 && issued < total) {
        WaitForStoresToRead<1>();
        __syncwarp();
        issue(issued++);
      }
    }
    WaitForStores();
    FenceAsyncProxy();
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_PULL_CUH_
