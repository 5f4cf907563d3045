// What the row baselines share: where rows are, and groups of eight elements.
// Their loops prefetch one item ahead: with ForWarpItems, which prefetches two, some were up to 10
// % slower.
#ifndef JAX_DEEPEP_BENCH_ROW_BASELINES_CUH_
#define JAX_DEEPEP_BENCH_ROW_BASELINES_CUH_

#include <cstdint>
#include <type_traits>

#include "bench/row_baselines.h"
#include "cuda/group_op.cuh"
#include "cuda/op_frame.h"
#include "cuda/row_copies.cuh"

namespace jax_deepep {

struct BaselineOp {
  OpFrame frame;
  BaselineParams params;
  int64_t row_bytes;
};

// A line of the table of pairs, with one row in each lane, the rows in the first lanes.
struct PairLine {
  int32_t source = kNone;
  int32_t row = kNone;

  // Read the line of `pair`, if there is one: ahead of its use, to hide the latency.
  __device__ static PairLine Read(const BaselineParams& params, int pair, int count) {
    PairLine line;
    if (pair < count) {
      const int lane = threadIdx.x % 32;
      const int32_t* at = params.pairs + int64_t{1 + pair} * params.line_ints;
      line.source = at[0];
      if (lane < params.max_rows) line.row = at[1 + lane];
    }
    return line;
  }

  // How many rows the pair has; called by a whole warp.
  __device__ int CountRows() const { return __popc(__ballot_sync(~0u, row != kNone)); }
};

// How many words of each row a lane has in flight when a warp works on several rows at once.
__host__ __device__ constexpr int WordsInFlight(int num_rows) {
  return num_rows == 1   ? kGroupsInFlight
         : num_rows == 2 ? 7
         : num_rows <= 4 ? 4
         : num_rows <= 7 ? 2
                         : 1;
}

// Call use(base, count) for the words of a row: a lane's are base, base + 32, ..., as many as the
// constant `count` says, which is kAhead until less than that is left.
template <int kAhead, typename Use>
__device__ __forceinline__ void ForWords(int total, Use use) {
  int base = threadIdx.x % 32;
  for (; base + 32 * (kAhead - 1) < total; base += 32 * kAhead) {
    use(base, std::integral_constant<int, kAhead>());
  }
  for (; base < total; base += 32) use(base, std::integral_constant<int, 1>());
}

// Call use(count) with a number of rows as a constant.
template <typename Use>
__device__ __forceinline__ void WithConstant(int count, Use use) {
  switch (count) {
    case 1:
      return use(std::integral_constant<int, 1>());
    case 2:
      return use(std::integral_constant<int, 2>());
    case 3:
      return use(std::integral_constant<int, 3>());
    case 4:
      return use(std::integral_constant<int, 4>());
    case 5:
      return use(std::integral_constant<int, 5>());
    case 6:
      return use(std::integral_constant<int, 6>());
    case 7:
      return use(std::integral_constant<int, 7>());
    case 8:
      return use(std::integral_constant<int, 8>());
  }
}
static_assert(kMaxBaselineRows == 8, "one case for each");

// The row that a code of `source` names.
__device__ inline const char* RowAt(const BaselineOp& op, const GroupOp& group, int operand,
                                    int32_t source) {
  const int max_tokens = op.frame.shape.max_tokens;
  return group.Operand<char>(source / max_tokens, operand) + source % max_tokens * op.row_bytes;
}

// Add eight elements to running sums.
__device__ __forceinline__ void AddGroup(uint4 bits, float* sums) {
  float values[kGroup];
  BFloat16::Unpack({{bits}}, values);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sums[i] += values[i];
}

// Write eight elements where a row has its word `word`.
__device__ __forceinline__ void WriteWord(char* row, int word, const float* values) {
  reinterpret_cast<uint4*>(row)[word] = BFloat16::Pack(values).words[0];
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_ROW_BASELINES_CUH_
