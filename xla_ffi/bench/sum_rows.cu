// The baseline of combine, and of the gradient of dispatch: what combine reads, sums and writes,
// with plain loads and stores, between two flag barriers.
#include <cuda_runtime.h>

#include "bench/row_baselines.cuh"
#include "bench/row_baselines.h"
#include "cuda/group_op.cuh"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kSums };

// Write the sum of rows; a lane holds where its own begins.
template <int kInputs>
__device__ __forceinline__ void SumInputs(const char* input, char* to, int words_of_row) {
  const uint4* from[kInputs];
#pragma unroll
  for (int number = 0; number < kInputs; ++number) {
    from[number] =
        reinterpret_cast<const uint4*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(input), number));
  }
  ForWords<WordsInFlight(kInputs)>(words_of_row, [&](int base, auto words) {
    constexpr int kWords = decltype(words)::value;
    uint4 runs[kInputs][kWords];
#pragma unroll
    for (int number = 0; number < kInputs; ++number) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) runs[number][i] = from[number][base + i * 32];
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float sums[kGroup] = {};
#pragma unroll
      for (int number = 0; number < kInputs; ++number) AddGroup(runs[number][i], sums);
      WriteWord(to, base + i * 32, sums);
    }
  });
}

// The same for any number of rows up to kMaxBaselineRows.
__device__ __forceinline__ void SumInputs(const BaselineOp& op, const char* input, int count,
                                          void* out, int64_t row) {
  char* to = static_cast<char*>(out) + row * op.row_bytes;
  const int words = static_cast<int>(op.row_bytes / 16);
  WithConstant(count, [&](auto inputs) { SumInputs<decltype(inputs)::value>(input, to, words); });
}

// On the side of the experts: pairs with several rows.
__device__ void SumPairs(const BaselineOp& op) {
  const int count = op.params.pairs[0], stride = gridDim.x * kWarps;
  int pair = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  PairLine next = PairLine::Read(op.params, pair, count);
  for (; pair < count; pair += stride) {
    const PairLine line = next;
    next = PairLine::Read(op.params, pair + stride, count);
    const int num_rows = line.CountRows();
    if (num_rows < 2) continue;
    const char* input = static_cast<const char*>(op.params.y) + max(line.row, 0) * op.row_bytes;
    SumInputs(op, input, num_rows, op.params.sums, line.source);
  }
}

// On the side of the tokens: one row, or one sum, per (token, rank).
__device__ void SumTokens(const BaselineOp& op, const GroupOp& group) {
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32;
  const int num_tokens = op.params.route.num_tokens, stride = gridDim.x * kWarps;
  auto read = [&](int token) {
    return token < num_tokens && lane < shape.num_topk
               ? op.params.inputs[int64_t{token} * shape.num_topk + lane]
               : kNone;
  };
  int token = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  int32_t next = read(token);
  for (; token < num_tokens; token += stride) {
    const int32_t code = next;
    next = read(token + stride);
    const int count = __popc(__ballot_sync(~0u, code != kNone));
    const char* input = nullptr;
    if (code != kNone) {
      const SumInput at = SumInput::Decode(code, shape, op.params.route);
      input = at.pair == kNone ? group.Operand<char>(at.rank, kRows) + at.row * op.row_bytes
                               : group.Operand<char>(at.rank, kSums) + at.pair * op.row_bytes;
    }
    SumInputs(op, input, count, op.params.out, token);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    SumRowsKernel(const __grid_constant__ BaselineOp op) {
  __shared__ GroupOp::Shared shared;
  GroupOp group(op.frame, &shared);
  if (group.Begin()) {
    if (op.params.sums != nullptr) SumPairs(op);
    group.Publish();
    if (group.WaitForArrivals()) SumTokens(op, group);
  }
  group.Finish([] {}, [] {});
}

}  // namespace

const char* LaunchSumRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                          const DeviceFacts& device, const KernelStream& stream) {
  BaselineOp op{frame, params, static_cast<int64_t>(frame.shape.hidden_size) * 2};
  op.frame.offsets[kRows] = device.OffsetOf(params.y);
  if (params.sums != nullptr) op.frame.offsets[kSums] = device.OffsetOf(params.sums);
  return LaunchKernel(SumRowsKernel, op, num_blocks, kThreads, 0, stream);
}

const char* LoadSumRows(int /*max_shared_bytes*/) { return LoadKernel(SumRowsKernel, 0); }

}  // namespace jax_deepep
