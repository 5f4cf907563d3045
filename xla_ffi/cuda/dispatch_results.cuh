// The results of a dispatch other than received rows: padding, counts, and all results if it
// failed.
#ifndef JAX_DEEPEP_CUDA_DISPATCH_RESULTS_CUH_
#define JAX_DEEPEP_CUDA_DISPATCH_RESULTS_CUH_

#include <cstdint>

#include "cuda/dispatch_op.cuh"
#include "cuda/dispatch_plan.cuh"
#include "cuda/kept_rows.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {

__device__ inline void MarkEmpty(const Dispatch& op, int64_t row) {
  const int num_topk = op.frame.shape.num_topk;
  op.params.source[row] = kNone;
  if (op.params.route.layout == Layout::kExpertMajor) {
    op.params.weights[row] = 0.0f;
    return;
  }
  for (int k = 0; k < num_topk; ++k) {
    op.params.weights[row * num_topk + k] = 0.0f;
    op.params.local_experts[row * num_topk + k] = kNone;
  }
}

// Fill in the padding rows, and the counts.
template <typename Rows>
__device__ void WriteRest(const Dispatch& op, const Plan& plan, const Rows& received) {
  const DispatchParams& params = op.params;
  const int groups = params.route.layout == Layout::kExpertMajor ? op.local_experts.divisor() : 1;
  const int lane = threadIdx.x % 32, own = op.frame.rank * groups;
  const int warp = FirstItem();
  const bool counts = warp == NumWarps() - 1;  // the one with the fewest other items
  for (int base = 0; base < groups && (counts || params.route.alignment > 1); base += 32) {
    const int group = base + lane;
    const bool inside = group < groups;
    const int32_t rows = inside ? plan.kept[own + group] : 0;
    const auto padded = static_cast<int32_t>(op.alignment.RoundUp(rows));
    const int32_t rest = inside ? plan.offset[own + group] + rows : 0;  // its first padding row
    if (counts && inside) {
      params.num_rows[group] = rows;
      params.group_sizes[group] = padded;
    }
    for (uint32_t lanes = __ballot_sync(~0u, padded > rows); lanes != 0; lanes &= lanes - 1) {
      const int of_lane = __ffs(lanes) - 1;
      const int64_t first = __shfl_sync(~0u, rest, of_lane);
      const int count = __shfl_sync(~0u, padded - rows, of_lane);
      for (int i = warp; i < count; i += NumWarps()) {
        received.Zero(first + i);
        if (lane == 0) MarkEmpty(op, first + i);
      }
    }
  }
  // Dropped groups are empty: the rest begins behind what is kept.
  const int64_t end = min(plan.totals->end, int64_t{params.route.capacity});
  for (int64_t row = end + blockIdx.x * kThreads + threadIdx.x; row < params.route.capacity;
       row += gridDim.x * kThreads) {
    MarkEmpty(op, row);
  }
  if (counts && lane == 0) {
    *params.num_received = plan.totals->received;
    *params.num_dropped = plan.totals->received - plan.totals->kept;
    if (params.pairs != nullptr) params.pairs[0] = plan.pairs_before[op.frame.shape.num_ranks];
  }
}

__device__ inline void WriteFailure(const Dispatch& op) {
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int64_t capacity = params.route.capacity, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int groups = expert_major ? op.local_experts.divisor() : 1;
  FillReceivedAsFailed(params.route, params.tokens, params.kept);
  FillAsFailed(RowType::kFloat32, params.weights, expert_major ? capacity : capacity * num_topk);
  FillByBlock(params.source, capacity, kNone);
  FillByBlock(params.destination, params.route.num_tokens * num_topk, kNone);
  if (!expert_major) FillByBlock(params.local_experts, capacity * num_topk, kNone);
  FillByBlock(params.group_sizes, groups, 0);
  FillByBlock(params.num_rows, groups, 0);
  if (threadIdx.x == 0) {
    *params.num_received = *params.num_dropped = *params.num_invalid = 0;
    if (params.pairs != nullptr) params.pairs[0] = 0;
  }
}

__device__ inline void ReportInvalid(const Dispatch& op, uint64_t step, uint32_t count) {
  *op.params.num_invalid = static_cast<int32_t>(count);
  HostStatus& status = *op.frame.status;
  if (count == 0 || *static_cast<volatile uint64_t*>(&status.invalid_step) != 0) return;
  status.num_invalid = count;
  __threadfence_system();
  *static_cast<volatile uint64_t*>(&status.invalid_step) = step;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DISPATCH_RESULTS_CUH_
