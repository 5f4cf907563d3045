// What the kernels of the floors share: where rows are, and groups of eight elements.
#ifndef JAX_DEEPEP_CUDA_BENCH_FLOOR_ROWS_CUH_
#define JAX_DEEPEP_CUDA_BENCH_FLOOR_ROWS_CUH_

#include <cstdint>

#include "cuda/bench/floor.h"
#include "cuda/group_op.cuh"
#include "cuda/op_frame.h"
#include "cuda/row_values.cuh"

namespace jax_deepep {

static_assert(kMaxFloorRows <= kMaxRowsAtOnce, "WithConstant has a case for each");

struct Floor {
  OpFrame frame;
  FloorParams params;
  int64_t row_bytes;
};

// A line of the table of pairs, with one row in each lane, the rows in the first lanes.
struct PairLine {
  int32_t source = kNone;
  int32_t row = kNone;

  // Read the line of `pair`, if there is one: ahead of its use, so that nobody waits for it.
  __device__ static PairLine Read(const FloorParams& params, int pair, int count) {
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

// The row that a code of `source` names.
__device__ inline const char* RowAt(const Floor& op, const GroupOp& group, int operand,
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

#endif  // JAX_DEEPEP_CUDA_BENCH_FLOOR_ROWS_CUH_
