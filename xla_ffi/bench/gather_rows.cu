// The baseline of dispatch, and of the gradient of combine: every rank pulls the rows of its pairs,
// each once, and writes them to their positions, between two flag barriers.
#include <cuda_runtime.h>

#include "bench/bulk_copy.cuh"
#include "bench/row_baselines.cuh"
#include "bench/row_baselines.h"
#include "cuda/group_op.cuh"

namespace jax_deepep {
namespace {

// The operand that peers read.
enum { kRows };

// A warp reads a row, and writes it to each of its positions.
__device__ void GatherByLoads(const BaselineOp& op, const GroupOp& group) {
  const int lane = threadIdx.x % 32;
  const int words = static_cast<int>(op.row_bytes / 16);
  const int count = op.params.pairs[0], stride = gridDim.x * kWarps;
  int pair = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  PairLine next = PairLine::Read(op.params, pair, count);
  for (; pair < count; pair += stride) {
    const PairLine line = next;
    next = PairLine::Read(op.params, pair + stride, count);
    const int num_rows = line.CountRows();
    const auto* from = reinterpret_cast<const uint4*>(RowAt(op, group, kRows, line.source));
    for (int base = 0; base < words; base += 32 * kGroupsInFlight) {
      uint4 run[kGroupsInFlight];
#pragma unroll
      for (int i = 0; i < kGroupsInFlight; ++i) {
        const int at = base + i * 32 + lane;
        if (at < words) run[i] = from[at];
      }
      for (int number = 0; number < num_rows; ++number) {
        const int64_t row = __shfl_sync(~0u, line.row, number);
        auto* to = reinterpret_cast<uint4*>(static_cast<char*>(op.params.out) + row * op.row_bytes);
#pragma unroll
        for (int i = 0; i < kGroupsInFlight; ++i) {
          const int at = base + i * 32 + lane;
          if (at < words) to[at] = run[i];
        }
      }
    }
  }
}

// A warp keeps kDepth rows in flight through shared memory; every lane writes one copy of a row.
template <int kDepth>
__device__ void GatherByBulkCopies(const BaselineOp& op, const GroupOp& group, char* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= op.params.warps) return;
  const auto row_bytes = static_cast<uint32_t>(op.row_bytes);
  char* slots = memory + static_cast<int64_t>(warp) * kDepth * row_bytes;
  auto* barriers = reinterpret_cast<uint64_t*>(memory + static_cast<int64_t>(op.params.warps) *
                                                            kDepth * row_bytes) +
                   warp * kDepth;
  if (lane == 0) {
    for (int slot = 0; slot < kDepth; ++slot) InitLoadBarrier(&barriers[slot]);
    FenceBarrierInit();
  }
  __syncwarp();

  const int count = op.params.pairs[0], stride = gridDim.x * op.params.warps;
  const int first = warp * gridDim.x + blockIdx.x;
  int32_t rows[kDepth];  // where this lane writes the row of each slot, or kNone
  auto issue = [&](int slot, const PairLine& line) {
    rows[slot] = line.row;
    if (lane == 0) {
      ExpectLoads(&barriers[slot], row_bytes);
      BulkLoad(slots + slot * row_bytes, RowAt(op, group, kRows, line.source), row_bytes,
               &barriers[slot]);
    }
  };
  PairLine lines[kDepth];
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) {
    lines[slot] = PairLine::Read(op.params, first + slot * stride, count);
  }
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) {
    rows[slot] = kNone;
    if (first + slot * stride < count) issue(slot, lines[slot]);
  }
  int issued = first + kDepth * stride;  // the pair to be issued next
  PairLine next = PairLine::Read(op.params, issued, count);
  int pair = first;
  for (uint32_t parity = 0; pair < count; parity ^= 1) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      if (pair >= count) break;
      WaitForLoads(&barriers[slot], parity);
      if (rows[slot] != kNone) {
        BulkStore(static_cast<char*>(op.params.out) + rows[slot] * op.row_bytes,
                  slots + slot * row_bytes, row_bytes);
      }
      CommitStores();
      // The slot of the previous pair is free once its stores have read it; with one slot, this
      // pair's.
      if (issued < count && (kDepth == 1 || pair != first)) {
        WaitForStoresToRead<kDepth == 1 ? 0 : 1>();
        __syncwarp();
        issue((slot + kDepth - 1) % kDepth, next);
        issued += stride;
        next = PairLine::Read(op.params, issued, count);
      }
      pair += stride;
    }
  }
  WaitForStores();
  FenceAsyncProxy();
}

// Write x + y to the rows of a pair.
template <int kRows>
__device__ __forceinline__ void AddToRows(const BaselineOp& op, const char* x,
                                          const PairLine& line) {
  int64_t offsets[kRows];
#pragma unroll
  for (int number = 0; number < kRows; ++number) {
    offsets[number] = __shfl_sync(~0u, line.row, number) * op.row_bytes;
  }
  // x is in flight too.
  ForWords<WordsInFlight(kRows + 1)>(
      static_cast<int>(op.row_bytes / 16), [&](int base, auto words) {
        constexpr int kWords = decltype(words)::value;
        uint4 of_x[kWords], of_y[kRows][kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) of_x[i] = reinterpret_cast<const uint4*>(x)[base + i * 32];
#pragma unroll
        for (int number = 0; number < kRows; ++number) {
          const char* y = static_cast<const char*>(op.params.y) + offsets[number];
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            of_y[number][i] = reinterpret_cast<const uint4*>(y)[base + i * 32];
          }
        }
#pragma unroll
        for (int number = 0; number < kRows; ++number) {
          char* to = static_cast<char*>(op.params.out) + offsets[number];
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            float sums[kGroup] = {};
            AddGroup(of_x[i], sums);
            AddGroup(of_y[number][i], sums);
            WriteWord(to, base + i * 32, sums);
          }
        }
      });
}

__device__ void GatherAndAdd(const BaselineOp& op, const GroupOp& group) {
  const int count = op.params.pairs[0], stride = gridDim.x * kWarps;
  int pair = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  PairLine next = PairLine::Read(op.params, pair, count);
  for (; pair < count; pair += stride) {
    const PairLine line = next;
    next = PairLine::Read(op.params, pair + stride, count);
    const char* x = RowAt(op, group, kRows, line.source);
    WithConstant(line.CountRows(),
                 [&](auto rows) { AddToRows<decltype(rows)::value>(op, x, line); });
  }
}

// kDepth 0: by loads and stores.
template <int kDepth, bool kAdd>
__global__ void __launch_bounds__(kThreads, 1)
    GatherRowsKernel(const __grid_constant__ BaselineOp op) {
  extern __shared__ __align__(128) char memory[];
  __shared__ GroupOp::Shared shared;
  GroupOp group(op.frame, &shared);
  if (group.Begin()) {
    group.Publish();
    if (group.WaitForArrivals()) {
      if constexpr (kAdd) {
        GatherAndAdd(op, group);
      } else if constexpr (kDepth > 0) {
        GatherByBulkCopies<kDepth>(op, group, memory);
      } else {
        GatherByLoads(op, group);
      }
    }
  }
  group.Finish([] {}, [] {});
}

using Kernel = void (*)(BaselineOp);

Kernel KernelOfDepth(int depth) {
  switch (depth) {
    case 0:
      return GatherRowsKernel<0, false>;
    case 1:
      return GatherRowsKernel<1, false>;
    case 2:
      return GatherRowsKernel<2, false>;
    case 3:
      return GatherRowsKernel<3, false>;
    case 4:
      return GatherRowsKernel<4, false>;
    default:
      return nullptr;
  }
}

constexpr int kMaxDepth = 4;

}  // namespace

const char* LaunchGatherRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                             const DeviceFacts& device, const KernelStream& stream) {
  BaselineOp op{frame, params, static_cast<int64_t>(frame.shape.hidden_size) * 2};
  op.frame.offsets[kRows] = device.OffsetOf(params.x);
  const Kernel kernel = KernelOfDepth(params.depth);
  if (kernel == nullptr || params.warps < 1 || params.warps > kWarps) {
    return "gather_rows: expected 1 to 16 warps and a depth of 0 to 4";
  }
  int shared_bytes = 0;
  if (params.depth > 0) {
    if (!device.bulk_copies) return "gather_rows: this GPU has no bulk copies; use a depth of 0";
    shared_bytes = params.warps * params.depth * (static_cast<int>(op.row_bytes) + 8);
    if (shared_bytes > device.shared_bytes)
      return "gather_rows: the rows in flight exceed shared memory; use fewer warps or less depth";
  }
  return LaunchKernel(kernel, op, num_blocks, kThreads, shared_bytes, stream);
}

const char* LaunchAddRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                          const DeviceFacts& device, const KernelStream& stream) {
  BaselineOp op{frame, params, static_cast<int64_t>(frame.shape.hidden_size) * 2};
  op.frame.offsets[kRows] = device.OffsetOf(params.x);
  return LaunchKernel(GatherRowsKernel<0, true>, op, num_blocks, kThreads, 0, stream);
}

const char* LoadGatherRows(int max_shared_bytes) {
  for (int depth = 0; depth <= kMaxDepth; ++depth) {
    if (const char* error = LoadKernel(KernelOfDepth(depth), max_shared_bytes)) return error;
  }
  return LoadKernel(GatherRowsKernel<0, true>, max_shared_bytes);
}

}  // namespace jax_deepep
