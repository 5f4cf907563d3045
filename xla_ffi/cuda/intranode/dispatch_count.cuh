// Steps 1 and 2 of dispatch, on the rank of the tokens: entries per row group, each entry's
// position in its row group, and the tokens for each rank.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_COUNT_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_COUNT_CUH_

#include <cstdint>

#include "cuda/dispatch_op.cuh"
#include "cuda/divisor.h"

namespace jax_deepep {

// The entry of a lane when a warp processes whole tokens, an entry per lane.
struct LaneOfToken {
  int token;   // index among the warp's
  int entry;   // of the token
  int tokens;  // of the warp

  __device__ explicit LaneOfToken(const Divisor& topk)
      : token(topk.Quotient(threadIdx.x % 32)),
        entry(topk.Remainder(threadIdx.x % 32)),
        tokens(topk.Quotient(32)) {}
};

// The result for the lane's entry.
struct EntryLane {
  bool valid;         // it names an expert, for the first time in its token
  bool wrong;         // it counts as invalid
  bool makes_pair;    // the first valid one of its (token, rank)
  int32_t expert;     // or kNone
  int32_t rank;       // of the expert, or kNone
  int32_t pair_lane;  // the lane that makes its pair
};

// `expert` is the value in topk_idx. Lanes of a token are compared one by one: with K = 8, that is
// faster than __match_any_sync.
__device__ inline EntryLane LookAtEntry(const Dispatch& op, const LaneOfToken& at, int32_t expert) {
  const int lane = threadIdx.x % 32;
  const bool named = expert >= 0 && expert < op.frame.shape.num_experts;
  EntryLane entry;
  entry.expert = named ? expert : kNone;
  entry.rank = named ? op.RankOf(expert) : kNone;
  entry.pair_lane = lane;
  int again = 0;
  const int num_topk = op.frame.shape.num_topk;
  for (int back = 1; back < num_topk; ++back) {
    const int32_t of_expert = __shfl_up_sync(~0u, entry.expert, back);
    const int32_t of_rank = __shfl_up_sync(~0u, entry.rank, back);
    const bool same_token = at.entry >= back;
    again = same_token && of_expert == entry.expert ? 1 : again;
    entry.pair_lane = same_token && of_rank == entry.rank ? lane - back : entry.pair_lane;
  }
  entry.valid = named && again == 0;
  entry.wrong = expert != kNone && !entry.valid;
  entry.makes_pair = entry.valid && entry.pair_lane == lane;
  return entry;
}

// An entry's positions among those that the warp has counted before.
struct Positions {
  int in_expert = 0;
  int in_list = 0;  // of its rank, if it makes a pair
};

// Add the lanes' entries to the warp's own `counters`, one token after the other: no two entries of
// a token share a counter.
__device__ inline Positions CountEntries(int num_experts, const LaneOfToken& at,
                                         const EntryLane& entry, int32_t* counters) {
  int32_t* of_expert = counters + entry.expert;
  int32_t* of_list = counters + num_experts + entry.rank;
  Positions positions;
  for (int token = 0; token < at.tokens; ++token) {
    if (token == at.token && entry.valid) {
      positions.in_expert = *of_expert;
      if (entry.makes_pair) positions.in_list = *of_list;
      *of_expert = positions.in_expert + 1;
      if (entry.makes_pair) *of_list = positions.in_list + 1;
    }
    __syncwarp();
  }
  return positions;
}

// Steps 1 and 2; `counters` are shared memory [count_warps][columns]. work() is called where blocks
// wait for each other. False: the op is lost.
template <typename Group, typename Work>
__device__ bool CountAndList(const Dispatch& op, Group& group, int32_t* counters, Work work) {
  const GroupShape& shape = op.frame.shape;
  const int columns = NumCountColumns(shape.num_experts, shape.num_ranks);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool expert_major = op.params.route.layout == Layout::kExpertMajor;
  const TokenRange block = TokenRange::Part({0, op.params.route.num_tokens}, blockIdx.x, gridDim.x);
  const TokenRange tokens =
      warp < op.count_warps ? TokenRange::Part(block, warp, op.count_warps) : TokenRange{0, 0};
  int32_t* own_counters = counters + warp * columns;

  // A lane's entries are a step apart; each is loaded while the previous one is processed.
  const LaneOfToken at(op.topk);
  const int num_topk = shape.num_topk, step = at.tokens * num_topk;
  const int64_t end = int64_t{tokens.end} * num_topk;
  int64_t index = int64_t{tokens.begin} * num_topk + lane;
  bool inside = lane < step && index < end;
  int32_t expert = inside ? op.params.topk_idx[index] : kNone;
  float weight = inside ? op.params.topk_weights[index] : 0.0f;
  for (int i = threadIdx.x; i < op.count_warps * columns; i += kThreads) counters[i] = 0;
  __syncthreads();
  int wrong = 0;
  while (__any_sync(~0u, inside)) {
    const int64_t next_index = index + step;
    const bool next_inside = lane < step && next_index < end;
    const int32_t next_expert = next_inside ? op.params.topk_idx[next_index] : kNone;
    const float next_weight = next_inside ? op.params.topk_weights[next_index] : 0.0f;
    const EntryLane entry = LookAtEntry(op, at, expert);
    const Positions positions = CountEntries(shape.num_experts, at, entry, own_counters);
    const int pair = __shfl_sync(~0u, positions.in_list, entry.pair_lane);
    wrong += __popc(__ballot_sync(~0u, entry.wrong));
    if (inside) {
      Records(op)[index] = {entry.valid ? entry.expert : kNone,
                            expert_major ? positions.in_expert : pair, weight,
                            entry.makes_pair ? positions.in_list : kNone};
    }
    index = next_index, inside = next_inside, expert = next_expert, weight = next_weight;
  }
  if (lane == 0 && wrong > 0) atomicAdd(&group.channel().num_invalid, wrong);
  __syncthreads();
  // Counters become the counts of the warps before, and the block publishes its counts to the
  // others.
  int32_t* block_counts = op.frame.BlockCounts(blockIdx.x);
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    int32_t before = 0;
    for (int w = 0; w < op.count_warps; ++w) {
      const int32_t count = counters[w * columns + column];
      counters[w * columns + column] = before;
      before += count;
    }
    block_counts[column] = before;
  }
  if (!group.SyncGrid(work)) return false;

  for (int column = threadIdx.x; column < columns; column += kThreads) {
    int32_t before = 0, total = 0;
#pragma unroll 8
    for (int block_index = 0; block_index < gridDim.x; ++block_index) {
      const int32_t count = __ldcg(op.frame.BlockCounts(block_index) + column);
      before += block_index < blockIdx.x ? count : 0;
      total += count;
    }
    for (int w = 0; w < op.count_warps; ++w) counters[w * columns + column] += before;
    for (int peer = group.first_peer() + blockIdx.x; peer < group.end_peer(); peer += gridDim.x) {
      op.frame.Counts(peer, op.frame.rank)[column] = total;
    }
  }
  __syncthreads();
  ForRecords(op, int64_t{tokens.begin} * num_topk + lane, end, 32,
             [&](int64_t index, const EntryRecord& record) {
               if (record.expert == kNone) return;
               const int rank = op.RankOf(record.expert);
               const int list = shape.num_experts + rank;
               Records(op)[index].position =
                   record.position + own_counters[expert_major ? record.expert : list];
               if (record.pair != kNone) {
                 TokenList(op, rank)[own_counters[list] + record.pair] =
                     op.topk.Quotient(static_cast<int32_t>(index));
               }
             });
  return true;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_DISPATCH_COUNT_CUH_
