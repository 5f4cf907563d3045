// Step 3 of dispatch in low-latency mode, in every block: the rows of the entries in this rank's
// window.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_PLAN_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_PLAN_CUH_

#include <cstdint>

#include "cuda/dispatch_plan.cuh"
#include "cuda/op_frame.h"

namespace jax_deepep {
namespace {

// The marks of 32 slots in a row group.
struct Marks {
  uint32_t slots;  // a bit each
  int32_t before;  // marks of earlier slots
};

// In shared memory, by every block.
struct SlotPlan {
  Plan plan;     // `offset` and `kept` of this rank's groups alone
  Marks* marks;  // [words of 32 slots][groups]
};

// The size of everything that SlotPlan points to.
inline int64_t SharedBytes(const GroupShape& shape, int groups, int num_slots) {
  const int64_t words = (int64_t{shape.num_ranks} * num_slots + 31) / 32;
  return static_cast<int64_t>(sizeof(PlanTotals)) +
         2 * groups * static_cast<int64_t>(sizeof(int32_t)) +
         words * groups * static_cast<int64_t>(sizeof(Marks));
}

// Once all marks are set.
template <typename Op>
__device__ void PlanRows(const Op& dispatch, const SlotPlan& slots) {
  const int groups = dispatch.NumGroups(), own = dispatch.op.frame.rank * groups;
  const int words = (dispatch.NumSlots() + 31) / 32;
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    int32_t before = 0;
#pragma unroll 8
    for (int word = 0; word < words; ++word) {
      Marks& marks = slots.marks[word * groups + i];
      marks.before = before;
      before += __popc(marks.slots);
    }
    slots.plan.kept[own + i] = before;
  }
  __syncthreads();
  if (threadIdx.x / 32 == kWarps - 1) LayOutGroups(dispatch.op, slots.plan, dispatch.op.frame.rank);
  __syncthreads();
}

// The row of the lane's entry, or kNone: dropped, or not `here`.
template <typename Op>
__device__ int32_t RowOfEntry(const Op& dispatch, const SlotPlan& slots, int slot, int32_t expert,
                              bool here) {
  if (!here) return kNone;
  const int groups = dispatch.NumGroups(), index = dispatch.expert_major() ? expert : 0;
  const Marks& marks = slots.marks[slot / 32 * groups + index];
  const int32_t position = marks.before + __popc(marks.slots & ((1u << slot % 32) - 1));
  return RowOf(slots.plan, dispatch.op.frame.rank * groups + index, 0, position);
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_PLAN_CUH_
