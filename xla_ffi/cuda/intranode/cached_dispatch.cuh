// cached_dispatch by pulling: every rank pulls rows along known routes, each token once; scaled and
// multiplied with other rows on the way, it is the gradient of combine. `Group` is GroupOp, or
// NodeOp between nodes: then rows are first put where the ranks of another node pull them.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_CACHED_DISPATCH_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_CACHED_DISPATCH_CUH_

#include <cuda_runtime.h>

#include "cuda/chunk_pairs.cuh"
#include "cuda/divisor.h"
#include "cuda/intranode/pulled_rows.cuh"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/op_frame.h"
#include "cuda/pair_order.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/row_products.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/cached_dispatch.h"

namespace jax_deepep {
namespace {

// The operand that peers read.
enum { kRows };

struct CachedDispatch {
  OpFrame frame;
  CachedDispatchParams params;
  int64_t row_bytes;
  WireRow wire;
  Divisor max_tokens, num_warps;
};

// The pairs of this rank, in either layout.
class Pairs {
 public:
  __device__ explicit Pairs(const CachedDispatch& op)
      : op_(op), table_(op.frame.shape, op.params.route) {
    count_ = expert_major() ? op.params.pairs[0] : CountRows();
    own_begin_ = FirstOf(op.frame.rank, 0);
    own_end_ = FirstOf(op.frame.rank + 1, 0);
  }

  __device__ AllPairs All() const { return {count_, own_begin_, own_end_}; }
  __device__ bool expert_major() const { return op_.params.route.layout == Layout::kExpertMajor; }
  __device__ int32_t SourceOf(int pair) const {
    return expert_major() ? Line(pair)[0] : op_.params.source[pair];
  }
  // The pair's row for this lane, or kNone.
  __device__ int32_t RowOfLane(int pair) const {
    const int lane = threadIdx.x % 32;
    if (!expert_major()) return lane == 0 ? pair : kNone;
    return lane < table_.max_rows ? Line(pair)[1 + lane] : kNone;
  }

  // The first pair of this token of a rank, or of a later one.
  __device__ int FirstOf(int rank, int token) const {
    return FirstPairFrom(int64_t{rank} * op_.frame.shape.max_tokens + token, 0, count_,
                         [&](int pair) { return SourceOf(pair); });
  }

 private:
  __device__ const int32_t* Line(int pair) const {
    return op_.params.pairs + int64_t{1 + pair} * table_.line_ints();
  }
  // Token-major: rows of tokens come first, then padding rows.
  __device__ int CountRows() const {
    int low = 0, high = op_.params.group_sizes[0];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (op_.params.source[middle] >= 0) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  const CachedDispatch& op_;
  const PairTable table_;
  int count_, own_begin_, own_end_;
};

template <typename Rows, typename Group>
__device__ typename Rows::Row RowAt(const CachedDispatch& op, const Group& group, int32_t source) {
  const int rank = op.max_tokens.Quotient(source), token = op.max_tokens.Remainder(source);
  return Rows::At(op, group.template Operand<char>(rank, kRows), group.IndexOfRow(rank, token));
}

__device__ void CountTaken(int32_t* taken, const CachedDispatch& op, int32_t source) {
  if (threadIdx.x % 32 == 0) atomicAdd(&taken[op.max_tokens.Quotient(source)], 1);
}

// Copy rows: those of `some` of the pairs, all or those of a chunk.
template <typename Rows, typename Group, typename Some>
__device__ void Copy(const CachedDispatch& op, const Group& group, const Pairs& pairs,
                     const Some& some, int32_t* taken) {
  const PairOrder order(some.count, some.own_begin, some.own_end, op.num_warps);
  for (auto items = group.NewItems(); items.item() < order.count(); items.Advance()) {
    const int pair = some.At(order.At(items.item()));
    const int32_t source = pairs.SourceOf(pair);
    const int64_t row = pairs.RowOfLane(pair);
    if (!__any_sync(~0u, row >= 0)) continue;  // all were dropped
    CountTaken(taken, op, source);
    CopyRowToLanes(RowAt<Rows>(op, group, source), Rows::Received(op), [row] { return row; });
  }
}

// The same, scaled by their weights, and compute their products with y. Expert-major.
template <typename Type, typename Rows, typename Group, typename Some>
__device__ void Scale(const CachedDispatch& op, const Group& group, const Pairs& pairs,
                      const Some& some, int32_t* taken) {
  const PairOrder order(some.count, some.own_begin, some.own_end, op.num_warps);
  for (auto items = group.NewItems(); items.item() < order.count(); items.Advance()) {
    const int pair = some.At(order.At(items.item()));
    const int32_t source = pairs.SourceOf(pair);
    const int32_t row = pairs.RowOfLane(pair);
    const int num_rows = __popc(__ballot_sync(~0u, row != kNone));
    if (num_rows == 0) continue;
    CountTaken(taken, op, source);
    ScaleRow<Type, Rows::kWhole>(op.params, op.row_bytes, RowAt<Rows>(op, group, source), row,
                                 num_rows);
  }
}

// Stage for every other node, once each, the rows of a chunk of tokens that it has rows for.
template <typename Group>
__device__ void StageRows(const CachedDispatch& op, Group& group, int chunk) {
  const CachedDispatchParams& params = op.params;
  const int num_topk = op.frame.shape.num_topk;
  const int per_node = params.route.capacity * op.frame.shape.node_size();
  group.StageRows(chunk,
                  static_cast<const char*>(params.encoded != nullptr ? params.encoded : params.x),
                  params.route.num_tokens, [&](int64_t token, int k) {
                    const int32_t destination = params.destination[token * num_topk + k];
                    return destination != kNone ? destination / per_node : kNone;
                  });
}

// Call work(some) with the pairs of this rank, those of other nodes in the chunks in which their
// rows cross.
template <typename Group, typename Work>
__device__ void ForPairs(const CachedDispatch& op, Group& group, const Pairs& pairs, Work work) {
  if constexpr (Group::kInChunks) {
    const auto range_of = [&](int source, int begin, int end) -> PairRange {
      return {pairs.FirstOf(source, begin), pairs.FirstOf(source, end)};
    };
    group.ForChunks(
        [&](int chunk) { StageRows(op, group, chunk); },
        [&](int chunk) { work(group.PairsOf(chunk, op.params.route.num_tokens, range_of)); });
  } else {
    work(pairs.All());
  }
}

// `work` is Copy or Scale, of rows that are received as `Rows` or `Kept`, and cross as `Rows`.
template <typename Group, typename Rows, typename Kept, typename Work>
__device__ void Run(const CachedDispatch& op, Work work) {
  __shared__ typename Group::Shared shared;
  __shared__ int32_t taken[kMaxRanks];
  const CachedDispatchParams& params = op.params;
  Group group(op.frame, &shared);
  for (int rank = threadIdx.x; rank < kMaxRanks; rank += blockDim.x) taken[rank] = 0;

  if (group.Begin()) {
    Rows::Encode(op);
    group.Publish();
    if constexpr (Group::kSeveralNodes) {
      if (group.WaitUntilFree()) StageRows(op, group, 0);
      group.Exchange([&](int node) { group.PutChunk(node, 0); }, [] {});
    }
    const Pairs pairs(op);
    if (group.WaitForArrivals()) {
      ForReceived<Rows, Kept>(op.params.route, [&](auto rows) {
        ForPairs(op, group, pairs,
                 [&](const auto& some) { work(rows, group, pairs, some, taken); });
        WriteZeros(op.params, op.frame.shape, rows.Received(op));
      });
      group.CountTaken(taken);
    }
  }
  group.Finish([] {}, [&] { WriteFailure(params); });
}

template <typename Group, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    CopyKernel(const __grid_constant__ CachedDispatch op) {
  using Kept = typename Rows::Kept;
  Run<Group, Rows, Kept>(
      op, [&](auto rows, const Group& group, const Pairs& pairs, const auto& some, int32_t* taken) {
        Copy<decltype(rows)>(op, group, pairs, some, taken);
      });
}

template <typename Group, typename Type, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    ScaleKernel(const __grid_constant__ CachedDispatch op) {
  Run<Group, Rows, Rows>(
      op, [&](auto, const Group& group, const Pairs& pairs, const auto& some, int32_t* taken) {
        Scale<Type, Rows>(op, group, pairs, some, taken);
      });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class CachedDispatchKernels {
 public:
  static const char* Launch(const OpFrame& frame, const CachedDispatchParams& params,
                            int num_blocks, const DeviceFacts& device, const KernelStream& stream) {
    const RowFormat rows = params.route.rows();
    CachedDispatch op{frame,
                      params,
                      rows.bytes(),
                      WireRow{rows.wire, rows.size},
                      Divisor(frame.shape.max_tokens),
                      Divisor(num_blocks * kWarps)};
    op.frame.offsets[kRows] =
        device.OffsetOf(params.encoded != nullptr ? params.encoded : params.x);
    if (params.weights == nullptr && params.y == nullptr) {
      return LaunchKernel(CopyKernelFor(rows), op, num_blocks, kThreads, 0, stream);
    }
    if (params.weights == nullptr || params.y == nullptr || params.pairs == nullptr) {
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
  using Kernel = void (*)(CachedDispatch);

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
    if (rows.type == RowType::kEncoded) return CopyKernel<Group, KeptRows>;
    if (rows.is_quantized()) return InstanceForEachFormat<EncodedCopies>(rows);
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

#endif  // JAX_DEEPEP_CUDA_INTRANODE_CACHED_DISPATCH_CUH_
