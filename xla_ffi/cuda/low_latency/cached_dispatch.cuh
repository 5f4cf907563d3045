// cached_dispatch in low-latency mode: every rank pushes rows along known routes, and its
// peers copy what they receive to the rows of the tokens; scaled and multiplied with other rows, it
// is the gradient of combine. `Group` is SignalledOp, or SignalledNodeOp between nodes.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_CACHED_DISPATCH_CUH_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_CACHED_DISPATCH_CUH_

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/divisor.h"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/low_latency/row_kinds.cuh"
#include "cuda/low_latency/signalled_op.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/row_products.cuh"
#include "cuda/warp_items.cuh"

namespace jax_deepep {
namespace {

template <typename Group>
struct LowLatencyCachedDispatch {
  OpFrame frame;
  CachedDispatchParams params;
  typename Group::Frame signalled;
  int64_t row_bytes;
  WireRow wire;
  Divisor num_slots, num_parts;
  Divisor num_shares;  // of a slot where it is received: its parts, or shares of its scaled rows

  __device__ RowsOfOp rows() const { return {row_bytes, wire, signalled.num_parts}; }
};

template <typename Rows, typename Group>
__device__ void PushRows(const LowLatencyCachedDispatch<Group>& op, Group& group) {
  const int lane = threadIdx.x % 32, num_topk = op.frame.shape.num_topk;
  group.PushItems(op.signalled.num_slots * op.signalled.num_parts, [&](int item, Sent* sent) {
    const int token = op.num_parts.Quotient(item), part = op.num_parts.Remainder(item);
    typename Rows::Sent row =
        Rows::ToSend(op.rows(), static_cast<const char*>(op.params.x) + token * op.row_bytes, part);
    const bool exists = token < op.params.route.num_tokens;
    if (exists) row.Load();
    const bool inside = exists && lane < num_topk;
    const int32_t rank = inside ? op.params.destination[int64_t{token} * num_topk + lane] : kNone;
    group.PushRow(row, token, part, rank, /*to_all=*/true, sent);
  });
}

// Call use(received row, row of the lane or kNone, part) for some slots, by a warp for each part,
// or for each share of the rows. False if the op is lost.
template <bool kSharesRows, typename Group, typename Slots, typename Use>
__device__ bool ForSlots(const LowLatencyCachedDispatch<Group>& op, Group& group, Slots of,
                         Use use) {
  const int lane = threadIdx.x % 32;
  const int num_items = of.count * op.num_shares.divisor();
  const PairTable table(op.frame.shape, op.params.route);
  for (int item = FirstItem(); item < num_items; item += NumWarps()) {
    const int slot = of.At(op.num_shares.Quotient(item));
    const int share = op.num_shares.Remainder(item), part = kSharesRows ? 0 : share;
    const int source = op.num_slots.Quotient(slot);
    const int32_t* line = op.params.pairs + int64_t{1 + slot} * table.line_ints();
    const bool exists = op.params.route.num_tokens > 0 && lane < table.max_rows;
    int32_t row = exists ? line[1 + lane] : kNone;
    if constexpr (kSharesRows) {  // dropped rows leave gaps
      const int nth = __popc(__ballot_sync(~0u, row != kNone) & ((1u << lane) - 1));
      if (op.num_shares.Remainder(nth) != share) row = kNone;
      // The first waits for the slot, whether it has rows or not.
      if (share > 0 && !__any_sync(~0u, row != kNone)) continue;
    }
    const int token = op.num_slots.Remainder(slot);
    const Slot at = group.SlotOf(op.frame.rank, source, token);
    bool has_row;
    if (group.IsPushed(source)) {
      if (!group.Wait(true, at, part, source, &has_row)) return false;
    } else {  // it is here, and read if it is needed
      has_row = __any_sync(~0u, row != kNone);
    }
    if (has_row && share == 0 && lane == 0) group.CountReceived(source);
    if (!__any_sync(~0u, has_row && row != kNone)) continue;
    use(group.RowFrom(at, source, token), row, part);
  }
  return true;
}

// `work` is called as in ForSlots, with how rows are received: as `Rows` or `Kept`.
template <bool kSharesRows, typename Group, typename Rows, typename Kept, typename Work>
__device__ void Run(const LowLatencyCachedDispatch<Group>& op, Work work) {
  __shared__ typename Group::Shared shared;
  const CachedDispatchParams& params = op.params;
  Group group(op.frame, op.signalled, &shared);
  bool lost = !group.Begin();
  if (!lost && group.sends()) {
    PushRows<Rows>(op, group);
    group.Announce();
    if constexpr (Group::kSeveralNodes) group.SendToNodes();
  }
  if (!lost && group.receives()) {
    ForReceived<Rows, Kept>(params.route, [&](auto rows) {
      const auto use = [&](const char* received, int32_t row, int part) {
        work(rows, received, row, part);
      };
      lost = !group.ReceiveFromAll(
          [](int, auto) {}, [&](auto some) { return ForSlots<kSharesRows>(op, group, some, use); });
      WriteZeros(params, op.frame.shape, rows.Received(op.rows(), params.rows, params.kept));
    });
  }
  group.Finish(lost, [](uint32_t) {}, [&] { WriteFailure(params); });
}

template <typename Group, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    CopyKernel(const __grid_constant__ LowLatencyCachedDispatch<Group> op) {
  using Kept = typename Rows::Kept;
  Run<false, Group, Rows, Kept>(op, [&](auto rows, const char* received, int32_t row, int part) {
    const auto to = rows.Received(op.rows(), op.params.rows, op.params.kept);
    auto words = rows.InSlot(op.rows(), received, part);
    words.Load();
    words.CopyTo([&](auto store) {
      ForBits(__ballot_sync(~0u, row != kNone),
              [&](int lane) { store(to.At(__shfl_sync(~0u, row, lane))); });
    });
  });
}

template <typename Group, typename Type, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    ScaleKernel(const __grid_constant__ LowLatencyCachedDispatch<Group> op) {
  __shared__ int32_t of_warps[kWarps][32];
  int32_t* rows = of_warps[threadIdx.x / 32];
  Run<true, Group, Rows, Rows>(op, [&](auto, const char* received, int32_t row, int) {
    const int lane = threadIdx.x % 32;
    const uint32_t live = __ballot_sync(~0u, row != kNone);
    __syncwarp();
    if (row != kNone) rows[__popc(live & ((1u << lane) - 1))] = row;
    __syncwarp();
    const int32_t nth = lane < __popc(live) ? rows[lane] : kNone;
    ScaleRow<Type, Rows::kWhole>(op.params, op.row_bytes, Rows::At(op.rows(), received), nth,
                                 __popc(live));
  });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class LowLatencyCachedDispatchKernels {
 public:
  static const char* Launch(const OpFrame& frame, const CachedDispatchParams& params,
                            int num_blocks, const KernelStream& stream) {
    const RowFormat rows = params.route.rows();
    const int num_tokens = params.route.num_tokens;
    const bool scales = params.weights != nullptr || params.y != nullptr;
    // A dot product needs the whole row.
    const auto signalled =
        Group::Frame::Of(frame, rows, num_tokens, /*value_bytes=*/0, /*whole=*/scales);
    LowLatencyCachedDispatch<Group> op{
        frame,
        params,
        signalled,
        rows.bytes(),
        WireRow{rows.wire, rows.size},
        Divisor(signalled.num_slots),
        Divisor(signalled.num_parts),
        Divisor(scales ? NumShares(frame.shape, params.route, signalled.num_slots)
                       : signalled.num_parts)};
    if (!scales) {
      return LaunchKernel(CopyKernelFor(rows), op, num_blocks, kThreads, 0, stream);
    }
    if (params.weights == nullptr || params.y == nullptr ||
        params.route.layout != Layout::kExpertMajor) {
      return "weights, y: expected both or neither, and with expert-major rows";
    }
    const Kernel kernel = ScaleKernelFor(rows);
    if (kernel == nullptr)
      return "x: expected floats with weights or y, got integers, which are only copied";
    return LaunchKernel(kernel, op, num_blocks, kThreads, 0, stream);
  }

  static const char* Load() {
    const char* error = LoadKernels(CopyKernelFor, 0);
    return error != nullptr ? error : LoadKernels(ScaleKernelFor, 0);
  }

 private:
  // How many warps share the rows of a slot, so that few slots keep many warps busy. Its row is
  // read for each of them.
  static int NumShares(const GroupShape& shape, const RouteShape& route, int num_slots) {
    constexpr int64_t kWarpsWanted = 2048;
    return WarpsOfSlot(int64_t{shape.num_ranks} * num_slots, PairTable(shape, route).max_rows,
                       kWarpsWanted);
  }

  using Kernel = void (*)(LowLatencyCachedDispatch<Group>);

  template <WireFormat kFormat>
  struct EncodedCopies {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return CopyKernel<Group, EncodedRows<Type, kWhole, kFormat>>;
    }
  };
  struct PlainProducts {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return ScaleKernel<Group, Type, PlainRows<typename Type::Element, kWhole>>;
    }
  };
  template <WireFormat kFormat>
  struct EncodedProducts {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return ScaleKernel<Group, Type, EncodedRows<Type, kWhole, kFormat>>;
    }
  };

  static Kernel CopyKernelFor(const RowFormat& rows) {
    if (rows.type == RowType::kEncoded) return CopyKernel<Group, KeptRows</*kAreEncoded=*/true>>;
    if (rows.is_quantized()) return InstanceForFp8<EncodedCopies>(rows);
    return IsWholeCopy(rows) ? CopyKernel<Group, PlainRows<uint16_t, true>>
                             : CopyKernel<Group, PlainRows<uint16_t, false>>;
  }

  static Kernel ScaleKernelFor(const RowFormat& rows) {
    if (rows.is_quantized()) return InstanceForFp8<EncodedProducts>(rows);
    return InstanceFor<PlainProducts>(rows);
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_CACHED_DISPATCH_CUH_
