// Rows that a rank encodes in parts, while its peers read those of earlier parts.
//
// A warp that waits for a part of any rank has encoded its own rows of all parts up to that one: so
// no warps wait for each other in a circle. tests/unit/protocol_parts.py searches that.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_ROWS_IN_PARTS_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_ROWS_IN_PARTS_CUH_

#include <cstdint>

#include "cuda/kept_rows.cuh"
#include "cuda/op_frame.h"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

// Rows that are pulled as they cross links and stay encoded, of an op with `wire` and params.kept.
struct KeptRows {
  static constexpr bool kEncodes = false;
  using Row = KeptRow;
  using Kept = KeptRows;
  template <typename Op>
  __device__ static KeptRowArrays Received(const Op& op) {
    return {op.params.kept, {op.wire}};
  }
  template <typename Op>
  __device__ static Row At(const Op& op, const char* rows, int64_t token) {
    return {rows + token * op.wire.bytes(), {op.wire}};
  }
};

// Encode this warp's rows from `row` to before `end`; returns the next one. A function of its own,
// because it is called in several places.
template <typename Rows, typename Group, typename Op>
__device__ __noinline__ int EncodeRowsBefore(const Op& op, uint64_t step, int row, int end) {
  const TokenParts& parts = op.frame.parts;
  for (; row < end; row += NumWarps()) {
    Rows::EncodeRow(op, row);
    const int part = parts.PartOf(row);
    Group::SignalShare(op.frame, step, part, parts.SizeOf(part, op.params.route.num_tokens));
  }
  return row;
}

// `Rows` has EncodeRow(op, row), by a warp, if it has kEncodes. All methods are called by all lanes
// of a warp.
template <typename Rows, typename Group, typename Op>
class RowsInParts {
 public:
  // After Begin.
  __device__ RowsInParts(const Op& op, Group& group, SeenParts* seen)
      : op_(op), group_(group), seen_(seen->of_warps[threadIdx.x / 32]), next_(FirstItem()) {
    if constexpr (Rows::kEncodes) {
      const int num_ranks = op.frame.shape.num_ranks;
      for (int rank = threadIdx.x % 32; rank < num_ranks; rank += 32) seen_[rank] = 0;
      __syncwarp();
    }
  }

  // Encode the parts before this one; the first is encoded before Publish, which signals it.
  __device__ void EncodeBefore(int part) {
    if constexpr (Rows::kEncodes) {
      const int end = min(op_.frame.parts.First(part), op_.params.route.num_tokens);
      if (next_ < end) next_ = EncodeRowsBefore<Rows, Group>(op_, group_.step(), next_, end);
    }
  }
  __device__ void EncodeAll() { EncodeBefore(op_.frame.parts.count); }

  // Wait until the row of a token can be read, after WaitForArrivals. False: the op is lost.
  __device__ bool WaitFor(int rank, int token) {
    if constexpr (Rows::kEncodes) {
      if (op_.frame.parts.count == 1) return true;
      const int part = op_.frame.parts.PartOf(token);
      EncodeBefore(part + 2);  // one more than it must, for who waits for that
      if (part == 0 || (seen_[rank] >> part & 1) != 0) return true;
      if (!group_.WaitForPart(part, [rank](int other) { return other == rank; })) return false;
      const uint32_t parts = group_.PartsOf(rank);
      if (threadIdx.x % 32 == 0) seen_[rank] = static_cast<uint16_t>(parts);
      __syncwarp();
    }
    return true;
  }

 private:
  const Op& op_;
  Group& group_;
  uint16_t* const seen_;
  int next_;  // the first row of this warp that is not encoded
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_ROWS_IN_PARTS_CUH_
