// dispatch by pulling: every rank counts and lists what it sends, notifies its peers, and pulls its
// rows from them directly to their final positions. `Group` is GroupOp, or NodeOp between nodes.
//
// 1. Count: the entries of this rank per row group, and its tokens per destination rank; every
//    entry's position among those of its warp goes into its record. With a wire format, encode the
//    tokens in scratch, while blocks wait for each other.
// 2. List: positions among all entries of this rank, and the tokens for each rank.
// 3. Publish counts; wait for everyone's. Between nodes, also put rows, records and lists where the
//    ranks of another node pull them.
// 4. Plan: prefix sums over the sources turn positions into rows; drop what does not fit.
// 5. Pull: each token with experts on this rank once, however many rows it has.
//
// Lists and records are in XLA's memory, which may be reused after a source has aborted: the op
// fails in the end, but until then their contents must not lead outside the arrays. Counts are
// safe.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_CUH_

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/chunk_pairs.cuh"
#include "cuda/dispatch_op.cuh"
#include "cuda/dispatch_plan.cuh"
#include "cuda/dispatch_results.cuh"
#include "cuda/divisor.h"
#include "cuda/intranode/dispatch_count.cuh"
#include "cuda/intranode/pulled_rows.cuh"
#include "cuda/kernel_choice.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/kernels.h"
#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"
#include "cuda/pair_order.cuh"
#include "cuda/remote_put.cuh"
#include "cuda/row_copies.cuh"
#include "cuda/staging.h"
#include "cuda/warp_items.cuh"
#include "interface/dispatch.h"

namespace jax_deepep {
namespace {

// Write the destinations of this block's share of the rank's tokens, by `num_threads`.
__device__ void WriteDestinations(const Dispatch& op, const Plan& plan, int thread,
                                  int num_threads) {
  const GroupShape& shape = op.frame.shape;
  const bool expert_major = op.params.route.layout == Layout::kExpertMajor;
  const TokenRange block = TokenRange::Part({0, op.params.route.num_tokens}, blockIdx.x, gridDim.x);
  ForRecords(
      op, int64_t{block.begin} * shape.num_topk + thread, int64_t{block.end} * shape.num_topk,
      num_threads, [&](int64_t index, const EntryRecord& record) {
        int32_t destination = kNone;
        if (record.expert != kNone) {
          const int owner = op.RankOf(record.expert);
          const int group = expert_major ? record.expert : owner;
          const int32_t row = RowOf(plan, group, plan.first_of_own[group], record.position);
          if (row != kNone) {
            destination = static_cast<int32_t>(int64_t{owner} * op.params.route.capacity + row);
          }
        }
        op.params.destination[index] = destination;
      });
}

// A token with experts on this rank.
struct Pair {
  int32_t number, source, token, row;
  EntryRecord record;  // of the lane's entry
};

// Write the routes of the pair's rows. Returns the row that this lane is to write, or kNone.
__device__ int64_t WriteRoute(const Dispatch& op, const Plan& plan, const PairTable& table,
                              const Pair& pair) {
  const GroupShape& shape = op.frame.shape;
  const DispatchParams& params = op.params;
  const EntryRecord& record = pair.record;
  const int rank = op.frame.rank, num_topk = shape.num_topk, lane = threadIdx.x % 32;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int per_rank = expert_major ? op.local_experts.divisor() : 1;
  const int32_t code = pair.source * shape.max_tokens + pair.token;
  const int expert = record.expert - rank * op.local_experts.divisor();
  const bool here = expert >= 0 && expert < op.local_experts.divisor();
  int32_t row = kNone;
  if (here) {
    const int local = expert_major ? expert : 0;
    row = RowOf(plan, rank * per_rank + local, plan.first_here[pair.source * per_rank + local],
                record.position);
  }
  const uint32_t live = __ballot_sync(~0u, row != kNone);
  const int nth = __popc(live & ((1u << lane) - 1));
  if (live != 0 && lane == 0) atomicAdd(&plan.taken[pair.source], 1);
  if (expert_major) {
    if (row != kNone) {
      params.source[row] = code;
      params.weights[row] = record.weight;
    }
    int32_t* line = params.pairs + int64_t{1 + pair.number} * table.line_ints();
    if (lane == 0) line[0] = code;
    if (row != kNone && nth < table.max_rows) line[1 + nth] = row;
    if (lane >= __popc(live) && lane < table.max_rows) line[1 + lane] = kNone;
    return row;
  }
  const int32_t shared_row = __reduce_max_sync(~0u, row);
  if (shared_row == kNone) return kNone;
  if (lane == 0) params.source[shared_row] = code;
  if (lane < num_topk) {
    const int64_t at = int64_t{shared_row} * num_topk + lane;
    params.weights[at] = here ? record.weight : 0.0f;
    params.local_experts[at] = here ? expert : kNone;
  }
  return nth == 0 ? row : kNone;
}

// Pull the rows of this rank, or those of `pairs`, a warp for each token.
template <typename Rows, typename Group, typename Pairs>
__device__ void Pull(const Dispatch& op, const Group& group, const Plan& plan, const Pairs& pairs) {
  const GroupShape& shape = op.frame.shape;
  const RouteShape& route = op.params.route;
  const int lane = threadIdx.x % 32, num_pairs = pairs.count;
  const PairTable table(shape, route);
  const PairOrder order(num_pairs, pairs.own_begin, pairs.own_end, op.num_warps);
  auto items = group.NewItems();
  ForWarpItems(
      items, num_pairs,
      [&](int item) {
        Pair pair{0, 0, 0, 0, {kNone}};
        if (item >= num_pairs) return pair;
        pair.number = pairs.At(order.At(item));
        int low = 0, high = shape.num_ranks;  // pairs_before[low] <= number < pairs_before[high]
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          (plan.pairs_before[middle] <= pair.number ? low : high) = middle;
        }
        pair.source = low;
        const int32_t* list = group.template Operand<int32_t>(low, kLists) +
                              int64_t{group.ListOf(low)} * route.num_tokens;
        pair.token = LoadFresh(list + pair.number - plan.pairs_before[low]);
        return pair;
      },
      [&](int item, Pair pair) {
        if (pair.token < 0 || pair.token >= route.num_tokens) pair.token = 0;
        if (item < num_pairs) pair.row = group.IndexOfRow(pair.source, pair.token);
        if (item < num_pairs && lane < shape.num_topk) {
          const auto* records = group.template Operand<EntryRecord>(pair.source, kRecords) +
                                int64_t{pair.token} * shape.num_topk;
          const uint4 words = LoadOnce(reinterpret_cast<const uint4*>(records + lane));
          pair.record = *reinterpret_cast<const EntryRecord*>(&words);
        }
        return pair;
      },
      [&](int, const Pair& pair) {
        const char* rows = group.template Operand<char>(pair.source, kRows);
        CopyRowToLanes(Rows::At(op, rows, pair.row), Rows::Received(op),
                       [&] { return WriteRoute(op, plan, table, pair); });
      });
}

// Stage for every other node, once each, the rows of a chunk of tokens that it has experts for.
template <typename Group>
__device__ void StageRows(const Dispatch& op, Group& group, int chunk) {
  const GroupShape& shape = op.frame.shape;
  const bool encoded = op.params.encoded != nullptr;
  const int per_node = op.local_experts.divisor() * shape.node_size();
  group.StageRows(chunk, static_cast<const char*>(encoded ? op.params.encoded : op.params.x),
                  op.params.route.num_tokens, [&](int64_t token, int k) {
                    const int32_t expert = op.params.topk_idx[token * shape.num_topk + k];
                    return expert >= 0 && expert < shape.num_experts ? expert / per_node : kNone;
                  });
}

// Put the records, the tokens for each rank of the node, and the rows of the first chunk.
template <typename Group>
__device__ void PutToNodes(const Dispatch& op, Group& group) {
  const GroupShape& shape = op.frame.shape;
  const int num_tokens = op.params.route.num_tokens, num_topk = shape.num_topk;
  if (group.WaitUntilFree()) {
    const TokenRange block = TokenRange::Part({0, num_tokens}, blockIdx.x, gridDim.x);
    const int64_t first_entry = int64_t{block.begin} * num_topk;
    group.ForOtherNodes([&](int node) {
      group.Stage(node, StagedArray::kSecond, first_entry, Records(op),
                  int64_t{block.end - block.begin} * num_topk);
    });
    StageRows(op, group, 0);
  }
  group.Exchange(
      [&](int node) {
        const int64_t listed = int64_t{shape.node_size()} * num_tokens;
        group.Stage(node, StagedArray::kFirst, 0, TokenList(op, node * shape.node_size()), listed);
        group.PutArray(node, StagedArray::kFirst, 0, listed * sizeof(int32_t));
        group.PutArray(node, StagedArray::kSecond, 0,
                       int64_t{num_tokens} * num_topk * sizeof(EntryRecord));
        group.PutChunk(node, 0);
        int32_t* counts = op.frame.Counts(op.frame.rank, op.frame.rank);
        PutFlag<ByBlock>(op.frame, node, counts, counts,
                         NumCountColumns(shape.num_experts, shape.num_ranks) * sizeof(int32_t));
      },
      [&] { group.PassOnCounts(); });
}

// Pull the rows of this rank, those of other nodes in the chunks in which they cross.
template <typename Rows, typename Group>
__device__ void PullAll(const Dispatch& op, Group& group, const Plan& plan) {
  const int rank = op.frame.rank, num_tokens = op.params.route.num_tokens;
  const int32_t* before = plan.pairs_before;
  if constexpr (Group::kInChunks) {
    const auto range_of = [&](int source, int begin, int end) -> PairRange {
      const int32_t* list = group.template Operand<int32_t>(source, kLists) +
                            int64_t{group.ListOf(source)} * num_tokens;
      const int first = before[source], last = before[source + 1];
      const auto token_of = [&](int number) { return LoadFresh(list + number - first); };
      return {FirstPairFrom(begin, first, last, token_of),
              FirstPairFrom(end, first, last, token_of)};
    };
    group.ForChunks([&](int chunk) { StageRows(op, group, chunk); },
                    [&](int chunk) {
                      Pull<Rows>(op, group, plan, group.PairsOf(chunk, num_tokens, range_of));
                    });
  } else {
    const int num_pairs = before[op.frame.shape.num_ranks];
    Pull<Rows>(op, group, plan, AllPairs{num_pairs, before[rank], before[rank + 1]});
  }
}

template <typename Group, typename Rows>
__global__ void __launch_bounds__(kThreads, 1) DispatchKernel(const __grid_constant__ Dispatch op) {
  extern __shared__ __align__(16) char memory[];
  __shared__ typename Group::Shared shared;
  Group group(op.frame, &shared);
  const Plan plan = Plan::At(reinterpret_cast<int32_t*>(memory), op.frame.shape);

  // Counters share the memory of the plan.
  if (group.Begin() &&
      CountAndList(op, group, reinterpret_cast<int32_t*>(memory), [&] { Rows::Encode(op); })) {
    group.Publish();
    if constexpr (Group::kSeveralNodes) PutToNodes(op, group);
    if (group.WaitForArrivals()) {
      MakePlan(op, plan);
      // Where warps share rows, those that others pull meanwhile hide it.
      const bool by_one_warp = !Group::kSeveralNodes;
      if (by_one_warp && threadIdx.x / 32 == kWarps - 1) {
        WriteDestinations(op, plan, threadIdx.x % 32, 32);
      }
      ForReceived<Rows, typename Rows::Kept>(op.params.route, [&](auto rows) {
        PullAll<decltype(rows)>(op, group, plan);
        WriteRest(op, plan, rows.Received(op));
      });
      if (!by_one_warp) WriteDestinations(op, plan, threadIdx.x, kThreads);
      group.CountTaken(plan.taken);
    }
  }
  group.Finish(
      [&] {
        if (threadIdx.x == 0) ReportInvalid(op, group.step(), group.channel().num_invalid);
      },
      [&] { WriteFailure(op); });
}

// The host's side, of a mode whose kernels use `Group`.
template <typename Group>
class DispatchKernels {
 public:
  // More than the counters of one warp, which share this memory.
  static int64_t LeastSharedBytes(const GroupShape& shape) {
    return Plan::Ints(shape) * static_cast<int64_t>(sizeof(int32_t));
  }

  static const char* Launch(const OpFrame& frame, const DispatchParams& params, int num_blocks,
                            const DeviceFacts& device, const KernelStream& stream) {
    const GroupShape& shape = frame.shape;
    Dispatch op{frame,
                params,
                params.route.rows().bytes(),
                WireRow{params.route.wire, params.route.row_size},
                Divisor(shape.num_local_experts()),
                Divisor(shape.num_topk),
                Divisor(params.route.alignment),
                Divisor(num_blocks * kWarps),
                kWarps};
    op.frame.offsets[kRows] =
        device.OffsetOf(params.encoded != nullptr ? params.encoded : params.x);
    op.frame.offsets[kRecords] = device.OffsetOf(params.scratch);
    op.frame.offsets[kLists] = op.frame.offsets[kRecords] + int64_t{params.route.num_tokens} *
                                                                shape.num_topk *
                                                                sizeof(EntryRecord);
    const int warp_bytes =
        NumCountColumns(shape.num_experts, shape.num_ranks) * static_cast<int>(sizeof(int32_t));
    op.count_warps = std::min(kWarps, device.shared_bytes / warp_bytes);
    const int plan_bytes = static_cast<int>(LeastSharedBytes(shape));
    const int shared_bytes = std::max(plan_bytes, op.count_warps * warp_bytes);
    return LaunchKernel(KernelFor(params.route.rows()), op, num_blocks, kThreads, shared_bytes,
                        stream);
  }

  static const char* Load(int max_shared_bytes) { return LoadKernels(KernelFor, max_shared_bytes); }

 private:
  using Kernel = void (*)(Dispatch);

  template <WireFormat kFormat>
  struct Encoded {
    template <typename Type, bool kWhole>
    static Kernel Of() {
      return DispatchKernel<Group, EncodedRows<Type, kWhole, kFormat>>;
    }
  };

  static Kernel KernelFor(const RowFormat& rows) {
    if (rows.type == RowType::kEncoded) return DispatchKernel<Group, KeptRows>;
    if (rows.is_quantized()) return InstanceForEachFormat<Encoded>(rows);
    return IsWholeCopy(rows) ? DispatchKernel<Group, PlainRows<uint16_t, true>>
                             : DispatchKernel<Group, PlainRows<uint16_t, false>>;
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_CUH_
