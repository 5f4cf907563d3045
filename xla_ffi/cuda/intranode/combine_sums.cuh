// The parts of combine that a rank does in its node: the sums of its pairs, and where those are
// that it sums over ranks. See combine.cuh.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_COMBINE_SUMS_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_COMBINE_SUMS_CUH_

#include <cstdint>

#include "cuda/divisor.h"
#include "cuda/op_frame.h"
#include "cuda/row_sums.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "interface/combine.h"

namespace jax_deepep {
namespace {

// Operands that peers read.
enum { kRows, kWeights, kSums, kGradients };

struct Combine {
  OpFrame frame;
  CombineParams params;
  int64_t row_bytes;
  WireRow wire;
  CombineSums of_sums;
  Divisor max_tokens, capacity;
};

// Whether this rank sums over ranks for the tokens of `rank`.
template <bool kSeveralNodes>
__device__ bool SumsFor(const Combine& op, int rank) {
  if (!kSeveralNodes) return rank == op.frame.rank;
  return op.frame.RankOnNode(op.frame.NodeOf(rank)) == rank;
}

// The offset of a token's sum in the scratch of the rank of its experts.
__device__ int64_t SumOffset(const Combine& op, int rank, int token) {
  return (int64_t{rank} * op.params.route.num_tokens + token) * op.of_sums.row_bytes;
}
// The sum of a token, of this rank or one with its index, that stays on this rank.
template <bool kSeveralNodes>
__device__ char* OwnSum(const Combine& op, int rank, int token) {
  const CombineSums& of_sums = op.of_sums;
  char* sums = static_cast<char*>(op.params.sums);
  if (of_sums.num_own == 0) return sums + SumOffset(op, rank, token);
  const int64_t first =
      kSeveralNodes ? int64_t{op.frame.NodeOf(rank)} * op.params.route.num_tokens : 0;
  return sums + of_sums.num_rows * of_sums.row_bytes + (first + token) * of_sums.own_bytes;
}

// Whether step 3 adds up the rows of pairs that stay on this rank, instead of step 1. With a wire
// format that took 7 % (64 SMs) to 17 % longer, since the loop of step 3 also decodes and has fewer
// words in flight; between nodes it would have to be compiled four times.
template <bool kQuantized, bool kSeveralNodes>
constexpr bool kSumsOwnRows = !kQuantized && !kSeveralNodes;

// Step 1, for this warp's items before `end`. pair_of(item) is the number of its pair.
template <typename Type, bool kWhole, bool kWeighted, bool kQuantized, WireFormat kFormat,
          bool kSeveralNodes, typename PairOf>
__device__ __forceinline__ void SumPairs(const Combine& op, WarpTerms* terms, EvenItems& items,
                                         int end, PairOf pair_of) {
  struct Line {
    int32_t source, row;
  };
  struct Pair {
    int32_t source;
    Inputs inputs;
  };
  const CombineParams& params = op.params;
  const RowShape<kWhole> shape{params.route.row_size};
  const PairTable table(op.frame.shape, params.route);
  const int lane = threadIdx.x % 32;
  ForWarpItems(
      items, end,
      [&](int at) {
        if (at >= end) return Line{kNone, kNone};
        const int32_t* line = params.pairs + int64_t{1 + pair_of(at)} * table.line_ints();
        return Line{line[0], lane < table.max_rows ? line[1 + lane] : kNone};
      },
      [&](int, const Line& line) {
        Pair pair{line.source, {}};
        pair.inputs.count = __popc(__ballot_sync(~0u, line.row != kNone));
        if (line.row == kNone) return pair;
        pair.inputs.position = lane;
        pair.inputs.row = static_cast<const char*>(params.y) + line.row * op.row_bytes;
        if (kWeighted && params.weights != nullptr) pair.inputs.weight = params.weights[line.row];
        return pair;
      },
      [&](int, const Pair& pair) {
        const int rank = op.max_tokens.Quotient(pair.source);
        const int token = op.max_tokens.Remainder(pair.source);
        const bool stays = SumsFor<kSeveralNodes>(op, rank);
        const bool encoded = kQuantized && !stays;
        // Those of ops in parts are not among the items.
        if (stays && kSumsOwnRows<kQuantized, kSeveralNodes>) return;
        if (pair.inputs.count < (encoded ? 1 : 2)) return;
        const GroupRange all = {0, shape.num_groups()};
        char* to = static_cast<char*>(params.sums) + SumOffset(op, rank, token);
        if constexpr (kQuantized) {
          if (!encoded) to = OwnSum<kSeveralNodes>(op, rank, token);
          AddUp<Type, kWhole, kWeighted, SumOfProducts, false>(
              pair.inputs, shape, all, terms, op.wire,
              StoreEither<Type, kWhole, kFormat>{encoded, to, shape, op.wire});
        } else {
          AddUp<Type, kWhole, kWeighted, SumOfProducts, false>(
              pair.inputs, shape, all, terms, op.wire, StoreRounded<Type, kWhole>{to, shape});
        }
      });
}

// The inputs of a token's sum: the bias, and a row of every rank that has one, ranks
// ascending; with kSumsOwnRows all rows of this rank. `destination` is that of the lane's entry;
// `owner` is the rank of the token. Between nodes: without the bias, and the ranks of this node.
template <bool kQuantized, typename Group>
__device__ Inputs InputsOf(const Combine& op, const Group& group, int owner, int token,
                           int32_t destination, int32_t* taken) {
  constexpr bool kSeveralNodes = Group::kSeveralNodes;
  constexpr bool kOwnRows = kSumsOwnRows<kQuantized, kSeveralNodes>;
  const CombineParams& params = op.params;
  const GroupShape& shape = op.frame.shape;
  const int lane = threadIdx.x % 32;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  bool somewhere = destination != kNone;
  if (kSeveralNodes && somewhere) {
    somewhere =
        op.frame.NodeOf(op.capacity.Quotient(destination)) == op.frame.NodeOf(op.frame.rank);
  }
  const int rank = somewhere ? op.capacity.Quotient(destination) : shape.num_ranks + lane;
  const int64_t row = somewhere ? op.capacity.Remainder(destination) : 0;
  const uint32_t same = __match_any_sync(~0u, rank);
  const bool leads = somewhere && __ffs(same) - 1 == lane;
  Inputs inputs;
  if (params.gradients != nullptr && somewhere) {
    const int64_t at = expert_major ? row : row * shape.num_topk + lane;
    inputs.gradient = group.template Operand<float>(rank, kGradients)[at];
  }
  if (!kSeveralNodes && params.bias != nullptr && token < params.route.num_tokens) {
    inputs.first = static_cast<const char*>(params.bias) + token * op.row_bytes;
    inputs.count = 1;
  }
  int position = inputs.count, own_position = inputs.count;
  for (int base = 0; base < shape.num_ranks; base += 32) {
    const uint32_t ranks = RanksOfLanes(somewhere ? rank : kNone, base);  // that have rows
    position += __popc(ranks & BitsBelow(rank, base));
    own_position += __popc(ranks & BitsBelow(op.frame.rank, base));
    inputs.count += __popc(ranks);
  }
  const bool own = somewhere && rank == op.frame.rank;
  const uint32_t own_lanes =
      __ballot_sync(~0u, kOwnRows && own && expert_major && __popc(same) > 1);
  if (own_lanes != 0) {
    inputs.pair_rows = __popc(own_lanes);
    inputs.pair_position = inputs.pair_rows + own_position;
    inputs.count += inputs.pair_rows - 1;
    position += inputs.pair_rows - (position > own_position ? 1 : 0);
    if (own) position = __popc(own_lanes & ((1u << lane) - 1));
  }
  if (leads) atomicAdd(&taken[rank], 1);
  const bool summed = expert_major && __popc(same) > 1;  // in step 1, or here
  if (own && (leads || own_lanes != 0)) {  // its arrays need not be where peers can read them
    inputs.position = position;
    const bool of_step_1 = summed && !kOwnRows;
    inputs.row = of_step_1 ? OwnSum<kSeveralNodes>(op, owner, token)
                           : static_cast<const char*>(params.y) + row * op.row_bytes;
    if (!of_step_1 && params.weights != nullptr) inputs.weight = params.weights[row];
  } else if (leads) {
    inputs.position = position;
    if (kQuantized) {
      inputs.encoded = true;
      inputs.row = group.template Operand<char>(rank, kSums) +
                   (expert_major ? SumOffset(op, owner, token) : row * op.of_sums.row_bytes);
    } else if (summed) {
      inputs.row = group.template Operand<char>(rank, kSums) + SumOffset(op, owner, token);
    } else {
      inputs.row = group.template Operand<char>(rank, kRows) + row * op.row_bytes;
      if (params.weights != nullptr)
        inputs.weight = group.template Operand<float>(rank, kWeights)[row];
    }
  }
  return inputs;
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_COMBINE_SUMS_CUH_
