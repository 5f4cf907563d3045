// combine in low-latency mode: the rank of the experts sums a token's rows and pushes the sum to
// the rank of the token, which adds the received sums in ascending order of ranks.
//
// 1. Push: a warp for each part of a slot of the dispatch, p = sum of w * y, rounded once, into the
//    window of the token's rank. Only this rank knows which rows it has dropped, so every
//    slot gets its signals, which say whether there is a row.
// 2. Sum: a warp for each part of a token, once all ranks' signals for it have arrived.
//
// Between nodes, sums are pushed to the rank of this node with the index of the token's rank:
// see low_latency_nodes/sums_of_nodes.cuh. `Group` is SignalledOp, or SignalledNodeOp between
// nodes.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_COMBINE_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_COMBINE_CUH_

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/divisor.h"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/low_latency_nodes/sums_of_nodes.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {
namespace {

template <typename Group>
struct LowLatencyCombine {
  OpFrame frame;
  CombineParams params;
  typename Group::Frame signalled;
  int64_t row_bytes;
  WireRow wire;
  int32_t granule;  // groups that parts of a row are multiples of
  Divisor num_slots, num_parts;

  // Those that may have rows.
  __device__ int NumSlots() const { return frame.shape.num_ranks * params.route.num_tokens; }
};

// The rows of a slot of the dispatch, a lane each, and their weights.
struct RowsOfSlot {
  int32_t row = kNone;
  float weight = 1.0f;

  template <typename Op>
  __device__ RowsOfSlot(const Op& op, int item) {
    const PairTable table(op.frame.shape, op.params.route);
    const int lane = threadIdx.x % 32, slot = op.num_parts.Quotient(item);
    if (slot >= op.NumSlots() || lane >= table.max_rows) return;
    row = op.params.pairs[int64_t{1 + slot} * table.line_ints() + 1 + lane];
    // Without weights they are 1, which changes no bit: kernels of their own would gain nothing.
    // After a failed dispatch, a row may be any number.
    const bool exists =
        static_cast<uint32_t>(row) < static_cast<uint32_t>(op.params.route.capacity);
    if (exists && op.params.weights != nullptr) weight = op.params.weights[row];
  }
};

// Step 1. `rows` are those of this warp's first slot.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Group>
__device__ void PushSums(const LowLatencyCombine<Group>& op, Group& group, RowsOfSlot rows,
                         WarpTerms* terms) {
  const CombineParams& params = op.params;
  const int lane = threadIdx.x % 32, self = op.frame.rank, num_topk = op.frame.shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int num_items = op.frame.shape.num_ranks * op.signalled.num_slots * op.signalled.num_parts;
  const PairTable table(op.frame.shape, params.route);
  const RowShape<kWhole> shape{params.route.row_size};
  group.PushItems(num_items, [&](int item, Sent* sent) {
    const int slot = op.num_parts.Quotient(item), part = op.num_parts.Remainder(item);
    const int owner = op.num_slots.Quotient(slot), adder = group.AdderOf(owner);
    const int64_t offset =
        group.SlotOffset(group.SourceForAdder(owner), op.num_slots.Remainder(slot));
    const Slot to = group.SlotAt(adder, offset);
    if (item != FirstItem()) rows = RowsOfSlot(op, item);
    const int32_t row = rows.row;
    const uint32_t live = __ballot_sync(~0u, row != kNone);
    const GroupRange range =
        GroupRange::Part(shape.num_groups(), op.granule, part, op.signalled.num_parts);
    if (live != 0) {
      if (params.row_gradients != nullptr && part == 0) {
        const int64_t of_token = __shfl_sync(~0u, row, 0);
        if (expert_major && lane < table.max_rows) {
          to.value(lane) = row != kNone ? params.row_gradients[row] : 0.0f;
        } else if (!expert_major && lane < num_topk) {
          to.value(lane) = params.row_gradients[of_token * num_topk + lane];
        }
      }
      if (!range.empty()) {
        Inputs inputs;
        inputs.count = __popc(live);
        if (row != kNone) {
          inputs.position = __popc(live & ((1u << lane) - 1));
          inputs.row = static_cast<const char*>(params.y) + row * op.row_bytes;
          inputs.weight = rows.weight;
        }
        if (kQuantized && adder != self) {
          AddUp<Type, kWhole, true, SumOfProducts, false>(
              inputs, shape, range, terms, op.wire,
              StoreEncoded<kWhole, kFormat>{to.row(), op.wire});
        } else {
          AddUp<Type, kWhole, true, SumOfProducts, false>(
              inputs, shape, range, terms, op.wire, StoreRounded<Type, kWhole>{to.row(), shape});
        }
      }
    }
    if (lane == 0) {
      sent->offset = offset;
      sent->part = part;
    }
    group.SetRank(&sent->to, adder);
    group.SetRank(&sent->has_row, live != 0 ? adder : kNone);
  });
}

// Step 2. False if the op is lost.
template <typename Type, bool kWhole, bool kQuantized, WireFormat kFormat, typename Group>
__device__ bool SumTokens(const LowLatencyCombine<Group>& op, Group& group, WarpTerms* terms) {
  const CombineParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32, self = op.frame.rank, num_topk = shape.num_topk;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const RowShape<kWhole> row_shape{params.route.row_size};
  for (int item = FirstItem(); item < op.signalled.num_slots * op.signalled.num_parts;
       item += NumWarps()) {
    const int token = op.num_parts.Quotient(item), part = op.num_parts.Remainder(item);
    const bool exists = token < params.route.num_tokens;
    const GroupRange range =
        GroupRange::Part(row_shape.num_groups(), op.granule, part, op.signalled.num_parts);
    Inputs inputs;
    if (params.bias != nullptr && exists) {
      inputs.first = static_cast<const char*>(params.bias) + token * op.row_bytes;
      inputs.count = 1;
    }
    const int64_t entry = int64_t{token} * num_topk + lane;
    const bool has_gradient = params.gradients != nullptr && part == 0 && exists && lane < num_topk;
    const int32_t owner = has_gradient ? params.destination[entry] : kNone;
    const uint32_t same = __match_any_sync(~0u, owner);
    const int nth = __popc(same & ((1u << lane) - 1));  // of the entries of its rank
    float gradient = 0.0f;
    __syncwarp();  // the terms of the token before have been used
    for (int base = 0; base < shape.num_ranks; base += 32) {
      const int rank = base + lane;
      const bool waits = rank < shape.num_ranks;
      const Slot at = group.SlotOf(self, waits ? rank : self, token);
      bool has_row;
      if (!group.Wait(waits, at, part, waits ? rank : self, &has_row)) return false;
      const uint32_t present = __ballot_sync(~0u, has_row);
      if (has_row) {
        terms->inputs[inputs.count + __popc(present & ((1u << lane) - 1))] = {at.row(), 1.0f,
                                                                              rank != self};
        if (part == 0) group.CountReceived(rank);
      }
      inputs.count += __popc(present);
      if (owner >= base && owner < base + 32 && (present >> (owner - base) & 1) != 0) {
        gradient = group.SlotOf(self, owner, token).value(expert_major ? nth : lane);
      }
    }
    if (!exists) continue;
    if (has_gradient) params.gradients[entry] = gradient;
    if (!range.empty()) {
      char* to = static_cast<char*>(params.out) + token * op.row_bytes;
      AddUp<Type, kWhole, false, SumOfRows, kQuantized, kFormat>(
          inputs, row_shape, range, terms, op.wire, StoreRounded<Type, kWhole>{to, row_shape});
    }
  }
  return true;
}

template <typename Group, typename Type, bool kWhole, bool kQuantized, WireFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1)
    LowLatencyCombineKernel(const __grid_constant__ LowLatencyCombine<Group> op) {
  __shared__ typename Group::Shared shared;
  __shared__ WarpTerms of_warps[kWarps];
  WarpTerms* terms = &of_warps[threadIdx.x / 32];
  const CombineParams& params = op.params;
  Group group(op.frame, op.signalled, &shared);
  group.Enter();
  const RowsOfSlot rows(op, FirstItem());
  bool lost = !group.Entered();
  if (!lost && group.sends()) {
    PushSums<Type, kWhole, kQuantized, kFormat>(op, group, rows, terms);
    group.Announce();
  }
  if (!lost && group.receives()) {
    if constexpr (Group::kSeveralNodes) {
      lost = !SumNodes<Type, kWhole, kQuantized, kFormat>(op, group, terms);
    } else {
      lost = !SumTokens<Type, kWhole, kQuantized, kFormat>(op, group, terms);
    }
  }
  group.Finish(lost, [](uint32_t) {}, [&] { WriteFailure(params, op.frame.shape); });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class LowLatencyCombineKernels {
 public:
  static const char* Launch(const OpFrame& frame, const CombineParams& params, int num_blocks,
                            const KernelStream& stream) {
    const RowFormat rows = params.route.rows();
    const int64_t gradients =
        params.gradients != nullptr ? GradientsOfSums::WidthOf(frame.shape, params.route) : 0;
    const auto signalled =
        Group::Frame::Of(frame, rows, params.route.num_tokens,
                         /*value_bytes=*/int64_t{4} * frame.shape.node_size() * gradients);
    LowLatencyCombine<Group> op{frame,
                                params,
                                signalled,
                                rows.bytes(),
                                WireRow{rows.wire, rows.size},
                                rows.is_quantized() ? BlockOf(rows.wire) / kGroup : 1,
                                Divisor(signalled.num_slots),
                                Divisor(signalled.num_parts)};
    const Kernel kernel = KernelFor(rows);
    if (kernel == nullptr) return "y: expected floats, got integers, which are not summed";
    return LaunchKernel(kernel, op, num_blocks, kThreads, 0, stream);
  }

  static const char* Load() { return LoadKernels(KernelFor, 0); }

 private:
  using Kernel = void (*)(LowLatencyCombine<Group>);

  struct Plain {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return LowLatencyCombineKernel<Group, Type, kWhole, false, WireFormat::kNone>;
    }
  };
  template <WireFormat kFormat>
  struct OnWire {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return LowLatencyCombineKernel<Group, Type, kWhole, true, kFormat>;
    }
  };

  static Kernel KernelFor(const RowFormat& rows) {
    if (!rows.is_quantized()) return InstanceFor<Plain>(rows);
    return InstanceForFp8<OnWire>(rows);
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_COMBINE_CUH_
