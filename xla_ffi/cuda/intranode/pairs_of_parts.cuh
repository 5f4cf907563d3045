// The pairs of a rank by parts of tokens: combine sums those of one part while its peers read the
// sums of earlier ones, so that memory is busy with one part and the link with another. On one
// node.
#ifndef JAX_DEEPEP_CUDA_INTRANODE_PAIRS_OF_PARTS_CUH_
#define JAX_DEEPEP_CUDA_INTRANODE_PAIRS_OF_PARTS_CUH_

#include <cstdint>

#include "cuda/intranode/combine_sums.cuh"
#include "cuda/op_frame.h"

namespace jax_deepep {
namespace {

// Where the pairs of each part are, in shared memory. Pairs are in the order (source, token), and
// those of other ranks are summed in the order (part, source, token).
struct PairsOfParts {
  int32_t first[kMostParts + 1][kMaxRanks];  // pair of a source that is in this part or later
  int32_t before[kMostParts + 1];            // how many are in earlier parts

  // By all threads. Half a warp searches each first pair.
  __device__ void Find(const Combine& op) {
    const int num_ranks = op.frame.shape.num_ranks, num_pairs = op.params.pairs[0];
    const TokenParts& parts = op.frame.parts;
    if (parts.count == 1) {
      if (threadIdx.x == 0) before[0] = 0, before[1] = num_pairs;
      __syncthreads();
      return;
    }
    const int line_ints = PairTable(op.frame.shape, op.params.route).line_ints();
    constexpr int kLanes = 16;
    const int lane = threadIdx.x % kLanes, half = threadIdx.x % 32 / kLanes;
    const int num_searches = (parts.count + 1) * num_ranks;
    for (int base = threadIdx.x / 32 * 2; base < num_searches; base += kWarps * 2) {
      const int search = base + half, part = search / num_ranks, source = search % num_ranks;
      const int max_tokens = op.frame.shape.max_tokens;
      const int token = part < parts.count ? parts.First(part) : max_tokens;
      const int64_t wanted = int64_t{source} * max_tokens + token;
      int low = 0, high = search < num_searches ? num_pairs : 0;  // it is in [low, high]
      while (__any_sync(~0u, low < high)) {
        const int step = (high - low + kLanes - 1) / kLanes, probe = low + (lane + 1) * step - 1;
        const bool is_before =
            probe < high && op.params.pairs[int64_t{1 + probe} * line_ints] < wanted;
        const uint32_t lanes = __ballot_sync(~0u, is_before) >> half * kLanes & 0xffff;
        low += __popc(lanes) * step;
        high = min(high, low + max(step - 1, 0));
      }
      if (lane == 0 && search < num_searches) first[part][source] = low;
    }
    __syncthreads();
    for (int part = threadIdx.x; part <= parts.count; part += kThreads) {
      int count = 0;
      for (int source = 0; source < num_ranks; ++source) {
        if (source != op.frame.rank) count += first[part][source] - first[0][source];
      }
      before[part] = count;
    }
    __syncthreads();
  }

  // The pair of an item of a part; by a warp.
  __device__ int PairOf(const Combine& op, int part, int item) const {
    if (op.frame.parts.count == 1) return item;
    int left = item - before[part];
    for (int source = 0;; ++source) {
      if (source == op.frame.rank) continue;
      const int begin = first[part][source], count = first[part + 1][source] - begin;
      if (left < count) return begin + left;
      left -= count;
    }
  }
};

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTRANODE_PAIRS_OF_PARTS_CUH_
