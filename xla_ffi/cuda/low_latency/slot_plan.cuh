// Step 3 of dispatch in low-latency mode, in every block: the rows of the entries in this rank's
// window.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_PLAN_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_SLOT_PLAN_CUH_

#include <cstdint>

#include "cuda/dispatch_plan.cuh"
#include "cuda/memory_order.cuh"
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

// The threads of a block that plan, in whole warps: those from `first` on.
class Planners {
 public:
  __device__ explicit Planners(int first) : first_(first) {}

  __device__ int count() const { return kThreads - first_; }
  __device__ int index() const { return static_cast<int>(threadIdx.x) - first_; }
  __device__ bool include_this() const { return index() >= 0; }

  // Wait for each other.
  __device__ void Sync() const { WaitAtBarrier(kOfPlanners, count()); }
  // By all threads of the block. Those that do not plan wait for those that do.
  __device__ void End() const {
    if (include_this()) {
      ArriveAtBarrier(kOfBlock, kThreads);
    } else {
      WaitAtBarrier(kOfBlock, kThreads);
    }
  }

 private:
  static constexpr int kOfPlanners = 1, kOfBlock = 2;  // 0 is __syncthreads

  int first_;
};

// Once all marks are set. By the planners.
template <typename Op>
__device__ void PlanRows(const Op& dispatch, const SlotPlan& slots, const Planners& planners) {
  const int groups = dispatch.NumGroups(), own = dispatch.op.frame.rank * groups;
  const int words = (dispatch.NumSlots() + 31) / 32;
  for (int i = planners.index(); i < groups; i += planners.count()) {
    int32_t before = 0;
#pragma unroll 8
    for (int word = 0; word < words; ++word) {
      Marks& marks = slots.marks[word * groups + i];
      marks.before = before;
      before += __popc(marks.slots);
    }
    slots.plan.kept[own + i] = before;
  }
  planners.Sync();
  if (threadIdx.x / 32 == kWarps - 1) LayOutGroups(dispatch.op, slots.plan, dispatch.op.frame.rank);
  planners.Sync();
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
