// dispatch in low-latency mode: every rank pushes its tokens, with their experts, into slots of the
// windows of its peers; each peer then assigns rows to what it has received, and copies it there.
//
// 1. Push: a warp for each part of a token's row, to all ranks that have its experts; the first
//    part's warp also pushes the entries. Every slot of every peer gets its signals.
// 2. Collect, in every block: a lane for each slot of this rank's window waits for its first part
//    and marks the row groups of its entries, in a word of 32 slots for each group.
// 3. Plan, in every block: rows are numbered in the order of the slots, which is (source, token):
//    an entry's position in its group is the number of marks of earlier slots.
// 4. Copy: a warp for each part of a slot, to all the rows of its token on this rank; the first
//    part's warp also writes their routes.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/dispatch_op.cuh"
#include "cuda/dispatch_plan.cuh"
#include "cuda/dispatch_results.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/low_latency/low_latency.h"
#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {
namespace {

struct LowLatencyDispatch {
  Dispatch op;
  SignalledFrame signalled;
  Divisor num_slots, num_parts;

  __device__ bool expert_major() const { return op.params.route.layout == Layout::kExpertMajor; }
  // Row groups of this rank.
  __device__ int NumGroups() const { return expert_major() ? op.local_experts.divisor() : 1; }
  __device__ int NumSlots() const { return op.frame.shape.num_ranks * signalled.num_slots; }
};

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
int64_t SharedBytes(const GroupShape& shape, int groups, int num_slots) {
  const int64_t words = (int64_t{shape.num_ranks} * num_slots + 31) / 32;
  return (2 + 2 * int64_t{groups}) * static_cast<int64_t>(sizeof(int32_t)) +
         words * groups * static_cast<int64_t>(sizeof(Marks));
}

// A part of a token, as the warp that pushes it has it in registers: each lane has an entry.
template <bool kWhole>
struct PartOfToken {
  int token, part;
  bool inside;  // whether the lane has an entry
  int32_t expert = kNone, rank = kNone;
  float weight = 0.0f;
  bool leads;  // the first entry of its rank
  int num_invalid;
  RowToPush<kWhole> row;

  __device__ PartOfToken(const LowLatencyDispatch& dispatch, int item)
      : token(dispatch.num_parts.Quotient(item)),
        part(dispatch.num_parts.Remainder(item)),
        row(static_cast<const char*>(dispatch.op.params.x) + token * dispatch.op.row_bytes,
            dispatch.op.row_bytes, part, dispatch.signalled.num_parts) {
    const Dispatch& op = dispatch.op;
    const GroupShape& shape = op.frame.shape;
    const int lane = threadIdx.x % 32;
    const bool exists = token < op.params.route.num_tokens;
    inside = exists && lane < shape.num_topk;
    const int64_t entry = int64_t{token} * shape.num_topk + lane;
    if (inside) {
      expert = op.params.topk_idx[entry];
      weight = op.params.topk_weights[entry];
    }
    if (exists) row.Load();
    const bool named = expert >= 0 && expert < shape.num_experts;
    const uint32_t same = __match_any_sync(~0u, named ? expert : -1 - lane);
    const bool valid = named && __ffs(same) - 1 == lane;
    num_invalid = __popc(__ballot_sync(~0u, inside && expert != kNone && !valid));
    if (valid) rank = op.RankOf(expert);
    const uint32_t of_rank = __match_any_sync(~0u, valid ? rank : -1 - lane);
    leads = valid && __ffs(of_rank) - 1 == lane;
  }
};

// Step 1. `pushed` is this warp's first part.
template <bool kWhole>
__device__ void PushTokens(const LowLatencyDispatch& dispatch, SignalledOp& group,
                           PartOfToken<kWhole>& pushed) {
  const Dispatch& op = dispatch.op;
  const int lane = threadIdx.x % 32, self = op.frame.rank;
  const int num_items = dispatch.signalled.num_slots * dispatch.signalled.num_parts;
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    if (item != FirstItem()) pushed = PartOfToken<kWhole>(dispatch, item);
    if (pushed.part == 0) {
      // The entries that accompany the row, to each rank in turn.
      for (uint32_t lanes = __ballot_sync(~0u, pushed.leads); lanes != 0; lanes &= lanes - 1) {
        const int to = __shfl_sync(~0u, pushed.rank, __ffs(lanes) - 1);
        if (!pushed.inside) continue;
        const int32_t first = to * op.local_experts.divisor();
        group.SlotOf(to, self, pushed.token).entries()[lane] = {
            pushed.rank == to ? pushed.expert - first : kNone, pushed.weight};
      }
    }
    group.PushRow<kWhole>(pushed.row, pushed.token, pushed.part, pushed.rank, pushed.leads);
    if (pushed.part == 0) {
      if (pushed.inside) {
        op.params.destination[int64_t{pushed.token} * op.frame.shape.num_topk + lane] = pushed.rank;
      }
      if (lane == 0 && pushed.num_invalid > 0) group.CountInvalid(pushed.num_invalid);
    }
  }
}

// Step 2. Marks have been cleared. False, on all threads, if the op is lost.
__device__ bool Collect(const LowLatencyDispatch& dispatch, SignalledOp& group, Marks* marks) {
  const int lane = threadIdx.x % 32, self = dispatch.op.frame.rank;
  const int num_topk = dispatch.op.frame.shape.num_topk;
  bool all = true;
  for (int base = threadIdx.x - lane; base < dispatch.NumSlots() && all; base += kThreads) {
    const int at = base + lane;
    const bool waits = at < dispatch.NumSlots();
    const int source = waits ? dispatch.num_slots.Quotient(at) : self;
    const Slot slot =
        group.SlotOf(self, source, waits ? dispatch.num_slots.Remainder(at) : 0);
    bool has_row;
    all = group.Wait(waits, slot, 0, source, &has_row);
    Marks* groups = marks + base / 32 * dispatch.NumGroups();
    if (!dispatch.expert_major()) {
      const uint32_t slots = __ballot_sync(~0u, has_row);
      if (lane == 0) groups->slots = slots;
    } else if (has_row && all) {
      const auto* pairs = reinterpret_cast<const uint4*>(slot.entries());  // of entries
#pragma unroll 4
      for (int k = 0; k < num_topk; k += 2) {
        const uint4 pair = pairs[k / 2];
        if (static_cast<int32_t>(pair.x) != kNone) atomicOr(&groups[pair.x].slots, 1u << lane);
        if (k + 1 < num_topk && static_cast<int32_t>(pair.z) != kNone) {
          atomicOr(&groups[pair.z].slots, 1u << lane);
        }
      }
    }
  }
  return __syncthreads_and(all);
}

// Step 3.
__device__ void PlanRows(const LowLatencyDispatch& dispatch, const SlotPlan& slots) {
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
  if (threadIdx.x < 32) LayOutGroups(dispatch.op, slots.plan, dispatch.op.frame.rank);
  __syncthreads();
}

// The rows of a slot: each lane has an entry of its token, or kNone.
struct RowsOfSlot {
  SlotEntry entry = {kNone, 0.0f};
  bool here = false;    // whether the entry has a row unless it is dropped; token-major, lane 0
  int32_t row = kNone;  // or dropped

  __device__ RowsOfSlot(const LowLatencyDispatch& dispatch, const SlotPlan& slots, const Slot& at,
                        int slot) {
    const int lane = threadIdx.x % 32, groups = dispatch.NumGroups();
    const uint32_t bit = 1u << slot % 32;
    const Marks* marks = slots.marks + slot / 32 * groups;
    const bool has_row = (*at.signals() & 1) != 0;
    if (lane < dispatch.op.frame.shape.num_topk) entry = at.entries()[lane];
    if (!has_row) entry.expert = kNone;  // of an earlier op
    const int32_t index = dispatch.expert_major() ? entry.expert : 0;
    here = dispatch.expert_major() ? index != kNone : has_row && lane == 0;
    if (here) {
      const int32_t position = marks[index].before + __popc(marks[index].slots & (bit - 1));
      row = RowOf(slots.plan, dispatch.op.frame.rank * groups + index, 0, position);
    }
  }
};

// By the warp of the first part of a slot.
__device__ void WriteRoutes(const LowLatencyDispatch& dispatch, const RowsOfSlot& rows, int slot,
                            int source) {
  const DispatchParams& params = dispatch.op.params;
  const GroupShape& shape = dispatch.op.frame.shape;
  const int lane = threadIdx.x % 32, num_topk = shape.num_topk;
  const PairTable table(shape, params.route);
  const int32_t code =
      source * shape.max_tokens + static_cast<int32_t>(dispatch.num_slots.Remainder(slot));
  const uint32_t here = __ballot_sync(~0u, rows.here);
  const uint32_t live = __ballot_sync(~0u, rows.row != kNone);
  // An entry keeps its position among those of its token on this rank, dropped or not.
  int32_t* line = params.pairs + int64_t{1 + slot} * table.line_ints();
  if (lane == 0) line[0] = live != 0 ? code : kNone;
  if (rows.here) line[1 + __popc(here & ((1u << lane) - 1))] = rows.row;
  if (lane >= __popc(here) && lane < table.max_rows) line[1 + lane] = kNone;
  if (dispatch.expert_major()) {
    if (rows.row != kNone) {
      params.source[rows.row] = code;
      params.weights[rows.row] = rows.entry.value;
    }
  } else if (const int32_t of_token = __shfl_sync(~0u, rows.row, 0); of_token != kNone) {
    if (lane == 0) params.source[of_token] = code;
    if (lane < num_topk) {
      const int64_t column = int64_t{of_token} * num_topk + lane;
      params.weights[column] = rows.entry.expert != kNone ? rows.entry.value : 0.0f;
      params.local_experts[column] = rows.entry.expert;
    }
  }
}

// Step 4. False if the op is lost.
template <bool kWhole>
__device__ bool CopyRows(const LowLatencyDispatch& dispatch, SignalledOp& group,
                         const SlotPlan& slots) {
  const Dispatch& op = dispatch.op;
  const int lane = threadIdx.x % 32, self = op.frame.rank;
  if (op.params.route.num_tokens == 0) return true;  // a dummy slot of each source
  const int num_items = dispatch.NumSlots() * dispatch.signalled.num_parts;
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    const int slot = dispatch.num_parts.Quotient(item), part = dispatch.num_parts.Remainder(item);
    const int source = dispatch.num_slots.Quotient(slot);
    const Slot at = group.SlotOf(self, source, dispatch.num_slots.Remainder(slot));
    const RowsOfSlot rows(dispatch, slots, at, slot);
    bool has_row;
    if (!group.Wait(true, at, part, source, &has_row)) return false;
    if (part == 0) {
      WriteRoutes(dispatch, rows, slot, source);
      if (has_row && lane == 0) group.CountReceived(source);
    }
    const RowPart<kWhole> words(static_cast<int>(op.row_bytes / 2), 2, part,
                                dispatch.signalled.num_parts);
    char* to = rows.row == kNone
                   ? nullptr
                   : static_cast<char*>(op.params.tokens) + rows.row * op.row_bytes + words.begin;
    CopyRow<kWhole>(at.row() + words.begin, words.shape, to);
  }
  return true;
}

template <bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    LowLatencyDispatchKernel(const __grid_constant__ LowLatencyDispatch dispatch) {
  extern __shared__ __align__(16) char memory[];
  __shared__ RankOp::Shared shared;
  __shared__ int32_t num_pairs;
  const Dispatch& op = dispatch.op;
  const GroupShape& shape = op.frame.shape;
  SignalledOp group(op.frame, dispatch.signalled, &shared);
  const int groups = dispatch.NumGroups(), words = (dispatch.NumSlots() + 31) / 32;
  auto* ints = reinterpret_cast<int32_t*>(memory);
  SlotPlan slots;
  slots.plan.received = reinterpret_cast<int64_t*>(ints);
  slots.plan.offset = ints + 2 - op.frame.rank * groups;
  slots.plan.kept = slots.plan.offset + groups;
  slots.plan.pairs_before = &num_pairs - shape.num_ranks;  // their number is not needed
  slots.marks = reinterpret_cast<Marks*>(ints + 2 + 2 * groups);

  group.Enter();
  PartOfToken<kWhole> pushed(dispatch, FirstItem());
  num_pairs = 0;
  for (int i = threadIdx.x; i < words * groups; i += kThreads) slots.marks[i].slots = 0;
  bool lost = !group.Entered();
  if (!lost) {
    PushTokens<kWhole>(dispatch, group, pushed);
    group.Announce();
    lost = !Collect(dispatch, group, slots.marks);
  }
  if (!lost) {
    PlanRows(dispatch, slots);
    lost = !CopyRows<kWhole>(dispatch, group, slots);
    WriteRest<kWhole>(op, slots.plan);
  }
  group.Finish(
      lost,
      [&](uint32_t num_invalid) {
        if (threadIdx.x == 0) ReportInvalid(op, group, num_invalid);
      },
      [&] { WriteFailure(op); });
}

}  // namespace

int64_t LowLatency::LeastSharedBytes(const GroupShape& shape) {
  return SharedBytes(shape, shape.num_local_experts(), std::max(shape.max_tokens, 1));
}

template <>
const char* VerbKernels<LowLatency, DispatchParams>::Launch(const OpFrame& frame,
                                                            const DispatchParams& params,
                                                            int num_blocks, const DeviceFacts&,
                                                            cudaStream_t stream) {
  const GroupShape& shape = frame.shape;
  const int num_slots = std::max(params.route.num_tokens, 1);
  const int64_t row_bytes = params.route.rows().bytes();
  const int num_parts = NumParts(shape, params.route.num_tokens, row_bytes);
  LowLatencyDispatch dispatch{{frame, params, row_bytes, Divisor(shape.num_local_experts()),
                               Divisor(shape.num_topk), Divisor(params.route.alignment),
                               Divisor(num_blocks * kWarps), kWarps},
                              {LowLatency::WindowOf(shape), num_parts, num_slots},
                              Divisor(num_slots),
                              Divisor(num_parts)};
  const int groups = params.route.layout == Layout::kExpertMajor ? shape.num_local_experts() : 1;
  const int64_t bytes = SharedBytes(shape, groups, num_slots);
  const bool whole = IsWhole(static_cast<int>(dispatch.op.row_bytes / sizeof(uint16_t)));
  return LaunchKernel(whole ? LowLatencyDispatchKernel<true> : LowLatencyDispatchKernel<false>,
                      dispatch, num_blocks, kThreads, static_cast<int>(bytes), stream);
}

template <>
const char* VerbKernels<LowLatency, DispatchParams>::Load(int max_shared_bytes) {
  const char* error = LoadKernel(LowLatencyDispatchKernel<true>, max_shared_bytes);
  return error != nullptr ? error : LoadKernel(LowLatencyDispatchKernel<false>, max_shared_bytes);
}

}  // namespace jax_deepep
