// dispatch in low-latency mode: every rank pushes its tokens, with their experts, into slots of the
// windows of its peers; each peer then assigns rows to what it has received, and copies it there.
//
// 1. Push: a warp for each part of a token's row, to all peers that have its experts. Before that,
//    the first part's warp pushes a packet for each entry to every rank. Between nodes, the row
//    also goes to every other node with its experts, once, and the entries to all: see
//    low_latency_nodes/signalled_node_op.cuh.
// 2. Collect, in every block: a thread for each entry of this rank's window waits for its packet,
//    and marks the slot in a word of 32 slots of the entry's row group. Packets arrive before rows:
//    on one node, some warps wait until rows have arrived and send their signals, and the others
//    collect and plan.
// 3. Plan, in every block: rows are numbered in the order of the slots, which is (source, token):
//    an entry's position in its group is the number of marks of earlier slots.
// 4. Copy: a warp for each part of a slot waits for it and copies it to all the rows of its token
//    on this rank; the first part's warp also writes their routes. This rank's own tokens come from
//    x.
//
// With a wire format, rows are encoded while they are pushed, also into this rank's own window, and
// decoded while they are copied. `Group` is SignalledOp, or SignalledNodeOp between nodes.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_DISPATCH_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_DISPATCH_CUH_

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/dispatch_op.cuh"
#include "cuda/dispatch_plan.cuh"
#include "cuda/dispatch_results.cuh"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/low_latency/row_kinds.cuh"
#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/low_latency/slot_plan.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {
namespace {

template <typename Group>
struct LowLatencyDispatch {
  Dispatch op;
  typename Group::Frame signalled;
  Divisor num_slots, num_parts;

  __device__ bool expert_major() const { return op.params.route.layout == Layout::kExpertMajor; }
  // Row groups of this rank.
  __device__ int NumGroups() const { return expert_major() ? op.local_experts.divisor() : 1; }
  __device__ int NumSlots() const { return op.frame.shape.num_ranks * signalled.num_slots; }
  __device__ RowsOfOp rows() const { return {op.row_bytes, op.wire, signalled.num_parts}; }
};

__device__ const char* RowOfX(const Dispatch& op, int token) {
  return static_cast<const char*>(op.params.x) + token * op.row_bytes;
}

// A part of a token, as the warp that pushes it has it in registers: each lane has an entry.
template <typename Rows>
struct PartOfToken {
  int token, part;
  bool inside;                           // whether the lane has an entry
  int32_t expert = kNone, rank = kNone;  // of a valid entry
  float weight = 0.0f;
  int num_invalid;
  typename Rows::Sent row;

  template <typename Op>
  __device__ __forceinline__ PartOfToken(const Op& dispatch, int item)
      : token(dispatch.num_parts.Quotient(item)),
        part(dispatch.num_parts.Remainder(item)),
        row(Rows::ToSend(dispatch.rows(), RowOfX(dispatch.op, token), part)) {
    const Dispatch& op = dispatch.op;
    const GroupShape& shape = op.frame.shape;
    const int lane = threadIdx.x % 32;
    const bool exists = token < op.params.route.num_tokens;
    inside = exists && lane < shape.num_topk;
    const int64_t entry = int64_t{token} * shape.num_topk + lane;
    int32_t named = kNone;
    if (inside) {
      named = op.params.topk_idx[entry];
      weight = op.params.topk_weights[entry];
    }
    if (exists) row.Load();
    const bool known = named >= 0 && named < shape.num_experts;
    const uint32_t same = __match_any_sync(~0u, known ? named : kNone);
    if (known && __ffs(same) - 1 == lane) {
      expert = named;
      rank = op.RankOf(named);
    }
    num_invalid = __popc(__ballot_sync(~0u, named != kNone && expert == kNone));
  }
};

// Step 1. `pushed` is this warp's first part.
template <typename Rows, typename Group>
__device__ __forceinline__ bool PushTokens(const LowLatencyDispatch<Group>& dispatch, Group& group,
                                           PartOfToken<Rows>& pushed) {
  const Dispatch& op = dispatch.op;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, self = op.frame.rank;
  const int num_items = dispatch.signalled.num_slots * dispatch.signalled.num_parts;
  return group.PushRounds(num_items, [&](int item, Sent* sent) {
    if (item != FirstItem()) pushed = PartOfToken<Rows>(dispatch, item);
    if (pushed.part == 0) {
      const int64_t offset = group.SlotOffset(self, pushed.token);
      const int32_t local = pushed.expert - pushed.rank * op.local_experts.divisor();
      for (int peer = group.first_peer(); peer < group.end_peer() && lane < shape.num_topk;
           ++peer) {
        const SlotEntry entry = {peer == pushed.rank ? local : kNone, pushed.weight};
        group.PushEntry(peer, offset, lane, entry);
      }
      if constexpr (Group::kSeveralNodes) {
        if (lane < shape.num_topk) {
          group.StageEntry(pushed.token * shape.num_topk + lane, {pushed.expert, pushed.weight});
        }
      }
      if (pushed.inside) {
        op.params.destination[int64_t{pushed.token} * shape.num_topk + lane] = pushed.rank;
      }
      if (lane == 0 && pushed.num_invalid > 0) group.CountInvalid(pushed.num_invalid);
    }
    const bool has_own = __any_sync(~0u, pushed.rank == self);
    if (!Rows::kPushesOwn && lane == 0 && pushed.part == 0 && has_own) group.CountPushed(self);
    const int32_t peer = !Rows::kPushesOwn && pushed.rank == self ? kNone : pushed.rank;
    group.PushRow(pushed.row, pushed.token, pushed.part, peer, /*to_all=*/false, sent);
  });
}

// Between nodes: push the packets of a token of another node to the ranks of this one. By a block;
// entry_of(i) are its entries, [T, K].
template <typename Group, typename EntryOf>
__device__ void PushPackets(const LowLatencyDispatch<Group>& dispatch, const Group& group,
                            int source, EntryOf entry_of) {
  const Dispatch& op = dispatch.op;
  const int num_topk = op.frame.shape.num_topk;
  for (int i = threadIdx.x; i < dispatch.signalled.num_slots * num_topk; i += kThreads) {
    const SlotEntry entry = entry_of(i);
    const int32_t rank = entry.expert != kNone ? op.RankOf(entry.expert) : kNone;
    const int32_t local = entry.expert - rank * op.local_experts.divisor();
    const int64_t offset = group.SlotOffset(source, op.topk.Quotient(i));
    for (int peer = group.first_peer(); peer < group.end_peer(); ++peer) {
      group.PushEntry(peer, offset, op.topk.Remainder(i),
                      {peer == rank ? local : kNone, entry.value});
    }
  }
}

// Step 2, of some slots. Marks have been cleared. False if the op is lost.
template <typename Group, typename Slots>
__device__ bool Collect(const LowLatencyDispatch<Group>& dispatch, Group& group, Slots of,
                        Marks* marks, const Planners& planners) {
  constexpr int kInFlight = 4;  // loads of a thread
  const Dispatch& op = dispatch.op;
  const int groups = dispatch.NumGroups();
  const int num_entries = of.count * op.frame.shape.num_topk;
  bool all = true;
  // The last warps first: they have pushed less.
  for (int first = planners.count() - 1 - planners.index();
       __any_sync(~0u, first < num_entries) && all; first += kInFlight * planners.count()) {
    all = group.WaitUntil([&] {
      SlotEntry entries[kInFlight];
      int slots[kInFlight];
      int missing = kNone;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int at = first + i * planners.count();
        entries[i].expert = kNone;
        if (at >= num_entries) continue;
        slots[i] = of.At(op.topk.Quotient(at));
        const int source = dispatch.num_slots.Quotient(slots[i]);
        const Slot slot =
            group.SlotOf(op.frame.rank, source, dispatch.num_slots.Remainder(slots[i]));
        if (!group.HasEntry(slot, op.topk.Remainder(at), &entries[i])) missing = source;
      }
      if (missing != kNone) return missing;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (entries[i].expert == kNone) continue;
        const int index = dispatch.expert_major() ? entries[i].expert : 0;
        atomicOr(&marks[slots[i] / 32 * groups + index].slots, 1u << slots[i] % 32);
      }
      return kNone;
    });
  }
  return all;
}

// Step 4. False if the op is lost.
template <typename Rows, typename Group>
__device__ __forceinline__ bool CopyRows(const LowLatencyDispatch<Group>& dispatch, Group& group,
                                         const SlotPlan& slots) {
  const Dispatch& op = dispatch.op;
  const DispatchParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, num_topk = shape.num_topk, self = op.frame.rank;
  const int num_items = shape.num_ranks * params.route.num_tokens * dispatch.signalled.num_parts;
  const PairTable table(shape, params.route);
  const auto received = Rows::Received(dispatch.rows(), params.tokens, params.kept);
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    const int slot = dispatch.num_parts.Quotient(item), part = dispatch.num_parts.Remainder(item);
    const int source = dispatch.num_slots.Quotient(slot);
    const int token = dispatch.num_slots.Remainder(slot);
    const Slot at = group.SlotOf(self, source, token);
    SlotEntry entry = {kNone, 0.0f};
    if (lane < num_topk) group.HasEntry(at, lane, &entry);  // Collect has waited for it
    const bool has_row = __any_sync(~0u, entry.expert != kNone);
    const bool in_window = Rows::kPushesOwn || source != self;
    bool arrived;
    // Dropped or not, as in every op.
    if (has_row && in_window && group.IsPushed(source) &&
        !group.Wait(true, at, part, source, &arrived)) {
      return false;
    }
    typename Rows::InWindow words = Rows::InSlot(
        dispatch.rows(), in_window ? group.RowFrom(at, source, token) : RowOfX(op, token), part);
    if (has_row) words.Load();
    // Expert-major, each entry has a row; token-major, the token.
    const bool is_here = dispatch.expert_major() ? entry.expert != kNone : has_row && lane == 0;
    const int32_t row = RowOfEntry(dispatch, slots, slot, entry.expert, is_here);
    const uint32_t here = __ballot_sync(~0u, is_here), live = __ballot_sync(~0u, row != kNone);
    if (live != 0) {
      words.CopyTo([&](auto store) {
        ForBits(live, [&](int of_lane) { store(received.At(__shfl_sync(~0u, row, of_lane))); });
      });
    }
    if (part != 0) continue;
    // Routes: an entry keeps its position among those of its token on this rank, dropped or not.
    const int32_t code = source * shape.max_tokens + token;
    int32_t* line = params.pairs + int64_t{1 + slot} * table.line_ints();
    if (lane == 0) line[0] = live != 0 ? code : kNone;
    if (is_here) line[1 + __popc(here & ((1u << lane) - 1))] = row;
    if (lane >= __popc(here) && lane < table.max_rows) line[1 + lane] = kNone;
    if (lane == 0 && has_row) group.CountReceived(source);
    if (row != kNone) params.source[row] = code;
    if (dispatch.expert_major()) {
      if (row != kNone) params.weights[row] = entry.value;
    } else if (const int32_t of_token = __shfl_sync(~0u, row, 0); of_token != kNone) {
      if (lane < num_topk) {
        const int64_t column = int64_t{of_token} * num_topk + lane;
        params.weights[column] = entry.expert != kNone ? entry.value : 0.0f;
        params.local_experts[column] = entry.expert;
      }
    }
  }
  return true;
}

// Threads of a block, whole warps, that send its signals: of each at most one, or half of them.
template <typename Group>
__device__ int NumSignallers(const Group& group) {
  return min((group.NumSignals() + 31) / 32 * 32, kThreads / 2);
}

template <typename Group, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    LowLatencyDispatchKernel(const __grid_constant__ LowLatencyDispatch<Group> dispatch) {
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Group::Shared shared;
  __shared__ int32_t num_pairs, any_lost;
  const Dispatch& op = dispatch.op;
  const GroupShape& shape = op.frame.shape;
  Group group(op.frame, dispatch.signalled, &shared);
  const int groups = dispatch.NumGroups(), words = (dispatch.NumSlots() + 31) / 32;
  auto* ints = reinterpret_cast<int32_t*>(memory + sizeof(PlanTotals));
  SlotPlan slots;
  slots.plan.totals = reinterpret_cast<PlanTotals*>(memory);
  slots.plan.offset = ints - op.frame.rank * groups;
  slots.plan.kept = slots.plan.offset + groups;
  slots.plan.pairs_before = &num_pairs - shape.num_ranks;  // their number is not needed
  slots.marks = reinterpret_cast<Marks*>(ints + 2 * groups);

  group.Enter();
  PartOfToken<Rows> pushed(dispatch, FirstItem());
  num_pairs = any_lost = 0;
  for (int i = threadIdx.x; i < words * groups; i += kThreads) slots.marks[i].slots = 0;
  bool lost = !group.Entered();
  // A release store waits for all stores of the SM: on one node, the other warps plan meanwhile.
  const int signallers = Group::kSeveralNodes ? kThreads : NumSignallers(group);
  const Planners planners(Group::kSeveralNodes ? 0 : signallers);
  if (!lost && group.sends()) {
    const bool has_signals = PushTokens<Rows>(dispatch, group, pushed);
    if (has_signals && static_cast<int>(threadIdx.x) < signallers) group.SendSignals(signallers);
    group.Announce(Group::kSeveralNodes ? kWarps - 1 : 0);
    if constexpr (Group::kSeveralNodes) group.SendToNodes();
  }
  if (!lost && group.receives()) {
    if (planners.include_this()) {
      const bool all = group.ReceiveFromAll(
          [&](int source, auto entry_of) { PushPackets(dispatch, group, source, entry_of); },
          // `slots` stays in registers.
          [&, marks = slots.marks](auto some) {
            return Collect(dispatch, group, some, marks, planners);
          });
      if (!all) any_lost = 1;
      planners.Sync();
      if (any_lost == 0) PlanRows(dispatch, slots, planners);
    }
    planners.End();
    lost = any_lost != 0;
    if (!lost) {
      ForReceived<Rows, typename Rows::Kept>(op.params.route, [&](auto rows) {
        lost = !CopyRows<decltype(rows)>(dispatch, group, slots);
        WriteRest(op, slots.plan, rows.Received(dispatch.rows(), op.params.tokens, op.params.kept));
      });
    }
  }
  group.Finish(
      lost,
      [&](uint32_t num_invalid) {
        if (threadIdx.x == 0 && group.sends()) ReportInvalid(op, group.step(), num_invalid);
      },
      [&] { WriteFailure(op); });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class LowLatencyDispatchKernels {
 public:
  static int64_t LeastSharedBytes(const GroupShape& shape, const WindowSize& size) {
    return SharedBytes(shape, shape.num_local_experts(), size.num_tokens);
  }

  static const char* Launch(const OpFrame& frame, const DispatchParams& params, int num_blocks,
                            const KernelStream& stream) {
    const GroupShape& shape = frame.shape;
    const int num_slots = std::max(params.route.num_tokens, 1);
    const RowFormat rows = params.route.rows();
    const auto signalled =
        Group::Frame::Of(frame, rows, params.route.num_tokens,
                         /*value_bytes=*/shape.num_topk * static_cast<int64_t>(sizeof(SlotEntry)));
    LowLatencyDispatch<Group> dispatch{
        {frame, params, rows.bytes(), WireRow{rows.wire, rows.size},
         Divisor(shape.num_local_experts()), Divisor(shape.num_topk),
         Divisor(params.route.alignment), Divisor(num_blocks * kWarps), kWarps},
        signalled,
        Divisor(num_slots),
        Divisor(signalled.num_parts)};
    const int groups = params.route.layout == Layout::kExpertMajor ? shape.num_local_experts() : 1;
    const int64_t bytes = SharedBytes(shape, groups, num_slots);
    return LaunchKernel(KernelFor(rows), dispatch, num_blocks, kThreads, static_cast<int>(bytes),
                        stream);
  }

  static const char* Load(int max_shared_bytes) { return LoadKernels(KernelFor, max_shared_bytes); }

 private:
  using Kernel = void (*)(LowLatencyDispatch<Group>);

  template <WireFormat kFormat>
  struct Encoded {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return LowLatencyDispatchKernel<Group, EncodedRows<Type, kWhole, kFormat>>;
    }
  };

  static Kernel KernelFor(const RowFormat& rows) {
    if (rows.type == RowType::kEncoded) {
      return LowLatencyDispatchKernel<Group, KeptRows</*kAreEncoded=*/true>>;
    }
    if (rows.is_quantized()) return InstanceForFp8<Encoded>(rows);
    return IsWholeCopy(rows) ? LowLatencyDispatchKernel<Group, PlainRows<uint16_t, true>>
                             : LowLatencyDispatchKernel<Group, PlainRows<uint16_t, false>>;
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_DISPATCH_CUH_
