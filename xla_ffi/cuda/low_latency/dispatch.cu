// dispatch in low-latency mode: every rank pushes its tokens, with their experts, into slots of the
// windows of its peers; each peer then assigns rows to what it has received, and copies it there.
//
// 1. Push: a warp for each part of a token's row, to all ranks that have its experts; the first
//    part's warp also pushes the entries. Every slot of every peer gets its signals.
// 2. Wait, in every block, for the first part of all slots of this rank's window.
// 3. Plan, in every block: count the entries of each row group, a warp for each run of slots, and
//    number them in the order of the slots, which is (source, token).
// 4. Copy: a warp for each part of a slot, to all the rows of its token on this rank.
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
  int32_t count_warps;  // warps of a block that count, limited by shared memory for counters

  __device__ int NumSlots() const { return op.frame.shape.num_ranks * signalled.num_slots; }
};

// In shared memory, by every block.
struct SlotPlan {
  Plan plan;          // `offset` and `kept` of this rank's groups alone
  int32_t* counters;  // [count_warps][groups] entries of earlier runs of slots
  int32_t* rows;      // [slots of this block's warps][K]: rows, or kNone
};

// The size of everything that SlotPlan points to.
int64_t SharedInts(const GroupShape& shape, int groups, int num_slots, int num_blocks,
                   int count_warps) {
  const int64_t slots_of_block =
      (int64_t{shape.num_ranks} * num_slots + num_blocks - 1) / num_blocks;
  return 2 + 2 * groups + shape.num_ranks + int64_t{count_warps} * groups +
         slots_of_block * shape.num_topk;
}

// Step 1.
template <bool kWhole>
__device__ void PushTokens(const LowLatencyDispatch& dispatch, const SignalledOp& group) {
  const Dispatch& op = dispatch.op;
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, self = op.frame.rank;
  const int num_items = dispatch.signalled.num_slots * dispatch.signalled.num_parts;
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    const int token = dispatch.num_parts.Quotient(item);
    const int part = dispatch.num_parts.Remainder(item);
    const bool inside = token < params.route.num_tokens && lane < shape.num_topk;
    const int64_t entry = int64_t{token} * shape.num_topk + lane;
    const int32_t named = inside ? params.topk_idx[entry] : kNone;
    const float weight = inside ? params.topk_weights[entry] : 0.0f;
    const bool exists = named >= 0 && named < shape.num_experts;
    const uint32_t same = __match_any_sync(~0u, exists ? named : -1 - lane);
    const bool valid = exists && __ffs(same) - 1 == lane;
    const int32_t rank = valid ? op.RankOf(named) : kNone;
    const uint32_t of_rank = __match_any_sync(~0u, valid ? rank : -1 - lane);
    const bool leads = valid && __ffs(of_rank) - 1 == lane;
    if (part == 0) {
      if (inside) params.destination[entry] = rank;
      const int wrong = __popc(__ballot_sync(~0u, inside && named != kNone && !valid));
      if (lane == 0 && wrong > 0) atomicAdd(&group.own().num_invalid, wrong);
      // The entries that accompany the row, to each rank in turn.
      for (uint32_t lanes = __ballot_sync(~0u, leads); lanes != 0; lanes &= lanes - 1) {
        const int to = __shfl_sync(~0u, rank, __ffs(lanes) - 1);
        SlotEntry* entries = group.SlotOf(to, self, token).entries();
        if (lane < shape.num_topk) {
          const bool there = rank == to;
          entries[lane] = {there ? named - to * op.local_experts.divisor() : kNone, weight};
        }
      }
    }
    group.PushRow<kWhole>(static_cast<const char*>(params.x) + token * op.row_bytes, op.row_bytes,
                          token, part, rank, leads);
  }
}

// Step 2. The first part of each slot, a lane for each.
__device__ bool WaitForSlots(const LowLatencyDispatch& dispatch, SignalledOp& group) {
  const int lane = threadIdx.x % 32, self = dispatch.op.frame.rank;
  bool all = true;
  for (int base = threadIdx.x - lane; base < dispatch.NumSlots() && all; base += kThreads) {
    const int slot = base + lane;
    const bool waits = slot < dispatch.NumSlots();
    const int source = waits ? dispatch.num_slots.Quotient(slot) : self;
    const int token = waits ? dispatch.num_slots.Remainder(slot) : 0;
    bool has_row;
    all = group.Wait(waits, group.SlotOf(self, source, token), 0, source, &has_row);
  }
  return __syncthreads_and(all);
}

// The row group of the lane's entry in a slot, or kNone.
__device__ int32_t GroupOfEntry(const LowLatencyDispatch& dispatch, const SignalledOp& group,
                                int slot, SlotEntry* entry) {
  const Dispatch& op = dispatch.op;
  const int lane = threadIdx.x % 32;
  const int source = dispatch.num_slots.Quotient(slot);
  const Slot at = group.SlotOf(op.frame.rank, source, dispatch.num_slots.Remainder(slot));
  *entry = {kNone, 0.0f};
  const bool has_row = (at.signals()[0].op_hash & 1) != 0;
  if (has_row && lane < op.frame.shape.num_topk) *entry = at.entries()[lane];
  if (op.params.route.layout == Layout::kExpertMajor) return entry->expert;
  return has_row && lane == 0 ? 0 : kNone;
}

// Step 3. Also writes the routes of this block's slots.
__device__ void PlanRows(const LowLatencyDispatch& dispatch, const SignalledOp& group,
                         const SlotPlan& slots) {
  const Dispatch& op = dispatch.op;
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int groups = expert_major ? op.local_experts.divisor() : 1;
  const Plan& plan = slots.plan;
  const int own = op.frame.rank * groups;  // where this rank's groups begin in the plan
  const TokenRange run = warp < dispatch.count_warps ? TokenRange::Part({0, dispatch.NumSlots()},
                                                                        warp, dispatch.count_warps)
                                                     : TokenRange{0, 0};
  int32_t* counters = slots.counters + int64_t{warp} * groups;

  for (int i = threadIdx.x; i < dispatch.count_warps * groups; i += kThreads) slots.counters[i] = 0;
  for (int i = threadIdx.x; i < shape.num_ranks; i += kThreads) plan.taken[i] = 0;
  __syncthreads();
  for (int slot = run.begin; slot < run.end; ++slot) {
    SlotEntry entry;
    const int32_t at = GroupOfEntry(dispatch, group, slot, &entry);
    if (at != kNone) ++counters[at];  // the entries of a token name different groups
    __syncwarp();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    int32_t before = 0;
    for (int of = 0; of < dispatch.count_warps; ++of) {
      int32_t& counter = slots.counters[of * groups + i];
      const int32_t count = counter;
      counter = before;
      before += count;
    }
    plan.kept[own + i] = before;
  }
  __syncthreads();
  if (warp == 0) LayOutGroups(op, plan, op.frame.rank);
  __syncthreads();

  const PairTable table(shape, params.route);
  for (int slot = run.begin; slot < run.end; ++slot) {
    SlotEntry entry;
    const int32_t at = GroupOfEntry(dispatch, group, slot, &entry);
    const int32_t row = at != kNone ? RowOf(plan, own + at, 0, counters[at]++) : kNone;
    __syncwarp();
    // Another block's slot, or the dummy slot of an op without tokens.
    if (slot % gridDim.x != blockIdx.x || params.route.num_tokens == 0) continue;
    const int source = dispatch.num_slots.Quotient(slot);
    const int32_t code =
        source * shape.max_tokens + static_cast<int32_t>(dispatch.num_slots.Remainder(slot));
    const uint32_t here = __ballot_sync(~0u, at != kNone);
    const uint32_t live = __ballot_sync(~0u, row != kNone);
    if (lane < num_topk) slots.rows[slot / gridDim.x * num_topk + lane] = row;
    // An entry keeps its position among those of its token on this rank, dropped or not.
    int32_t* line = params.pairs + int64_t{1 + slot} * table.line_ints();
    if (lane == 0) line[0] = live != 0 ? code : kNone;
    if (at != kNone) line[1 + __popc(here & ((1u << lane) - 1))] = row;
    if (lane >= __popc(here) && lane < table.max_rows) line[1 + lane] = kNone;
    if (live != 0 && lane == 0) atomicAdd(&plan.taken[source], 1);
    if (expert_major) {
      if (row != kNone) {
        params.source[row] = code;
        params.weights[row] = entry.value;
      }
    } else if (const int32_t of_token = __shfl_sync(~0u, row, 0); of_token != kNone) {
      if (lane == 0) params.source[of_token] = code;
      if (lane < num_topk) {
        const int64_t column = int64_t{of_token} * num_topk + lane;
        params.weights[column] = entry.expert != kNone ? entry.value : 0.0f;
        params.local_experts[column] = entry.expert;
      }
    }
  }
  __syncthreads();
}

// Step 4. False where the op is lost.
template <bool kWhole>
__device__ void CopyRows(const LowLatencyDispatch& dispatch, SignalledOp& group,
                         const SlotPlan& slots) {
  const Dispatch& op = dispatch.op;
  const int lane = threadIdx.x % 32, num_topk = op.frame.shape.num_topk, self = op.frame.rank;
  const int slots_here =
      (dispatch.NumSlots() - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
      static_cast<int>(gridDim.x);
  for (int item = threadIdx.x / 32; item < slots_here * dispatch.signalled.num_parts;
       item += kWarps) {
    const int nth = dispatch.num_parts.Quotient(item), part = dispatch.num_parts.Remainder(item);
    const int slot = nth * gridDim.x + blockIdx.x;
    const int source = dispatch.num_slots.Quotient(slot);
    const Slot at = group.SlotOf(self, source, dispatch.num_slots.Remainder(slot));
    bool has_row;
    if (!group.Wait(true, at, part, source, &has_row)) return;
    if (!has_row) continue;
    const int32_t row = lane < num_topk ? slots.rows[nth * num_topk + lane] : kNone;
    const RowPart<kWhole> words(static_cast<int>(op.row_bytes / 2), 2, part,
                                dispatch.signalled.num_parts);
    char* to = row == kNone
                   ? nullptr
                   : static_cast<char*>(op.params.tokens) + row * op.row_bytes + words.begin;
    if (words.shape.size > 0) CopyRow<kWhole>(at.row() + words.begin, words.shape, to);
  }
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
  const int groups =
      op.params.route.layout == Layout::kExpertMajor ? op.local_experts.divisor() : 1;
  auto* ints = reinterpret_cast<int32_t*>(memory);
  SlotPlan slots;
  slots.plan.received = reinterpret_cast<int64_t*>(ints);
  slots.plan.offset = ints + 2 - op.frame.rank * groups;
  slots.plan.kept = slots.plan.offset + groups;
  slots.plan.taken = ints + 2 + 2 * groups;
  slots.plan.pairs_before = &num_pairs - shape.num_ranks;  // their number is not needed
  slots.counters = slots.plan.taken + shape.num_ranks;
  slots.rows = slots.counters + dispatch.count_warps * groups;
  num_pairs = 0;

  if (group.Begin()) {
    PushTokens<kWhole>(dispatch, group);
    group.Announce();
    if (WaitForSlots(dispatch, group)) {
      PlanRows(dispatch, group, slots);
      CopyRows<kWhole>(dispatch, group, slots);
      WriteRest<kWhole>(op, slots.plan);
      group.CountTaken(slots.plan.taken);
    }
  }
  group.Finish(
      [&] {
        if (threadIdx.x == 0) ReportInvalid(op, group);
      },
      [&] { WriteFailure(op); });
}

}  // namespace

int64_t LowLatency::LeastSharedBytes(const GroupShape& shape) {
  constexpr int kFewBlocks = 8;  // that share the slots
  return SharedInts(shape, shape.num_local_experts(), std::max(shape.max_tokens, 1), kFewBlocks,
                    1) *
         static_cast<int64_t>(sizeof(int32_t));
}

template <>
const char* VerbKernels<LowLatency, DispatchParams>::Launch(const OpFrame& frame,
                                                            const DispatchParams& params,
                                                            int num_blocks,
                                                            const DeviceFacts& device,
                                                            cudaStream_t stream) {
  const WindowLayout window = LowLatency::WindowOf(frame.shape);
  const GroupShape& shape = frame.shape;
  LowLatencyDispatch dispatch;
  dispatch.op = {frame,
                 params,
                 params.route.rows().bytes(),
                 Divisor(shape.num_local_experts()),
                 Divisor(shape.num_topk),
                 Divisor(params.route.alignment),
                 Divisor(num_blocks * kWarps),
                 kWarps};
  dispatch.signalled = {window, NumParts(shape, params.route.num_tokens, dispatch.op.row_bytes),
                        std::max(params.route.num_tokens, 1)};
  dispatch.num_slots = Divisor(dispatch.signalled.num_slots);
  dispatch.num_parts = Divisor(dispatch.signalled.num_parts);
  const int groups = params.route.layout == Layout::kExpertMajor ? shape.num_local_experts() : 1;
  const auto bytes_with = [&](int count_warps) {
    return SharedInts(shape, groups, dispatch.signalled.num_slots, num_blocks, count_warps) *
           static_cast<int64_t>(sizeof(int32_t));
  };
  dispatch.count_warps = kWarps;
  while (dispatch.count_warps > 1 && bytes_with(dispatch.count_warps) > device.shared_bytes) {
    dispatch.count_warps /= 2;
  }
  const int64_t bytes = bytes_with(dispatch.count_warps);
  if (bytes > device.shared_bytes) {
    return "max_tokens is too large for low-latency mode on so few SMs; use mode=\"throughput\"";
  }
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
