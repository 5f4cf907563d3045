// Step 4 of dispatch, in every block: the positions of rows, from the counts of all ranks.
#ifndef JAX_DEEPEP_CUDA_DISPATCH_PLAN_CUH_
#define JAX_DEEPEP_CUDA_DISPATCH_PLAN_CUH_

#include <cstdint>

#include "cuda/dispatch_op.cuh"
#include "cuda/memory_order.cuh"

namespace jax_deepep {

// Of the rows of this rank.
struct PlanTotals {
  int64_t end;       // of the row groups, with padding
  int32_t received;  // rows sent to it, before dropping
  int32_t kept;      // and after
};

// The positions of all rows of the EP group, in shared memory. Row groups are numbered over all
// ranks: rank * groups_per_rank + group on that rank.
struct Plan {
  int32_t* offset;        // [groups] first row of a group on its rank
  int32_t* kept;          // [groups] rows of it, after dropping
  int32_t* first_of_own;  // [groups] rows of earlier sources than this rank
  int32_t* first_here;    // [R][groups_per_rank] the same for each source, in this rank's groups
  int32_t* pairs_before;  // [R + 1] pairs of earlier sources for this rank
  int32_t* taken;         // [R] pairs that this block has read from each source
  PlanTotals* totals;

  __host__ __device__ static int64_t Ints(const GroupShape& shape) {
    return int64_t{4} *
               (shape.num_experts > shape.num_ranks ? shape.num_experts : shape.num_ranks) +
           2 * shape.num_ranks + 4 + sizeof(PlanTotals) / sizeof(int32_t);
  }
  __device__ static Plan At(int32_t* memory, const GroupShape& shape) {
    const int groups = max(shape.num_experts, shape.num_ranks);
    Plan plan;
    plan.totals = reinterpret_cast<PlanTotals*>(memory);
    plan.offset = memory + sizeof(PlanTotals) / sizeof(int32_t);
    plan.kept = plan.offset + groups;
    plan.first_of_own = plan.kept + groups;
    plan.first_here = plan.first_of_own + groups;
    plan.pairs_before = plan.first_here + groups;
    plan.taken = plan.pairs_before + shape.num_ranks + 1;
    return plan;
  }
};

__device__ inline int64_t InclusiveScan(int64_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// Lay out the row groups of one rank, as LayOutGroup does: plan.kept has the rows that are sent to
// each, and afterwards those that are kept. By a warp.
__device__ inline void LayOutGroups(const Dispatch& op, const Plan& plan, int owner) {
  const RouteShape& route = op.params.route;
  const int lane = threadIdx.x % 32;
  const int per_rank = route.layout == Layout::kExpertMajor ? op.local_experts.divisor() : 1;
  // Rows beyond the capacity are dropped in any case.
  const int64_t limit = route.expert_capacity == kNoLimit ? route.capacity : route.expert_capacity;
  const auto wanted_of = [&](int32_t sent) {
    return static_cast<int32_t>(min(int64_t{sent}, limit));
  };
  // A lane has consecutive groups.
  const int per_lane = (per_rank + 31) / 32;
  int32_t* const kept = plan.kept + owner * per_rank;
  const int first = min(lane * per_lane, per_rank), last = min(first + per_lane, per_rank);
  int64_t padded = 0;
  int32_t received = 0, all_kept = 0;
  for (int group = first; group < last; ++group) {
    received += kept[group];
    padded += op.alignment.RoundUp(wanted_of(kept[group]));
  }
  const int64_t until = InclusiveScan(padded);
  int64_t offset = until - padded;
  for (int group = first; group < last; ++group) {
    const int32_t wanted = wanted_of(kept[group]);
    const int64_t begin = min(offset, int64_t{route.capacity});
    plan.offset[owner * per_rank + group] = static_cast<int32_t>(begin);
    kept[group] = static_cast<int32_t>(min(int64_t{wanted}, route.capacity - begin));
    all_kept += kept[group];
    offset += op.alignment.RoundUp(wanted);
  }
  if (owner == op.frame.rank) {
    received = __reduce_add_sync(~0u, received);
    all_kept = __reduce_add_sync(~0u, all_kept);
    const int64_t end = __shfl_sync(~0u, until, 31);
    if (lane == 0) *plan.totals = {end, received, all_kept};
  }
}

__device__ inline void MakePlan(const Dispatch& op, const Plan& plan) {
  const GroupShape& shape = op.frame.shape;
  const RouteShape& route = op.params.route;
  const int rank = op.frame.rank, lane = threadIdx.x % 32;
  const bool expert_major = route.layout == Layout::kExpertMajor;
  const int per_rank = expert_major ? op.local_experts.divisor() : 1;
  const int first_column = expert_major ? 0 : shape.num_experts;

  for (int group = threadIdx.x; group < per_rank * shape.num_ranks; group += kThreads) {
    const int local = group - rank * per_rank;
    const bool here = local >= 0 && local < per_rank;
    int32_t before = 0;
#pragma unroll 4
    for (int source = 0; source < shape.num_ranks; ++source) {
      if (source == rank) plan.first_of_own[group] = before;
      if (here) plan.first_here[source * per_rank + local] = before;
      before += LoadFresh(op.frame.Counts(rank, source) + first_column + group);
    }
    plan.kept[group] = before;
  }
  if (threadIdx.x / 32 == kWarps - 1) {  // the one with the fewest groups
    int32_t before = 0;
    for (int base = 0; base < shape.num_ranks; base += 32) {
      const int source = base + lane;
      const bool inside = source < shape.num_ranks;
      const int64_t pairs =
          inside ? LoadFresh(op.frame.Counts(rank, source) + shape.num_experts + rank) : 0;
      const auto until = before + static_cast<int32_t>(InclusiveScan(pairs));
      if (inside) plan.pairs_before[source + 1] = until;
      if (inside) plan.taken[source] = 0;
      before = __shfl_sync(~0u, until, 31);
    }
    if (lane == 0) plan.pairs_before[0] = 0;
  }
  __syncthreads();
  for (int owner = threadIdx.x / 32; owner < shape.num_ranks; owner += kWarps) {
    LayOutGroups(op, plan, owner);
  }
  __syncthreads();
}

// The row of an entry on its rank, or kNone; `first` is the number of rows of earlier sources in
// its row group. Never outside the row group, whatever `position` is.
__device__ inline int32_t RowOf(const Plan& plan, int group, int32_t first, int32_t position) {
  const uint32_t at = static_cast<uint32_t>(first) + static_cast<uint32_t>(position);
  if (at >= static_cast<uint32_t>(plan.kept[group])) return kNone;
  return plan.offset[group] + static_cast<int32_t>(at);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DISPATCH_PLAN_CUH_
