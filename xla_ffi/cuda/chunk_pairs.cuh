// The pairs of a chunk of tokens between nodes: of every source a range, and their order.
#ifndef JAX_DEEPEP_CUDA_CHUNK_PAIRS_CUH_
#define JAX_DEEPEP_CUDA_CHUNK_PAIRS_CUH_

#include <cstdint>

#include "cuda/pair_order.cuh"

namespace jax_deepep {

// The numbers of consecutive pairs.
struct PairRange {
  int begin, end;
};

// As AllPairs.
struct ChunkPairs : AllPairs {
  const int32_t* before;  // [num_ranks + 1] pairs of earlier sources in the chunk; shared memory
  const int32_t* first;   // [num_ranks] the number of the first one of each source
  int num_ranks;

  __device__ int At(int index) const {
    int low = 0, high = num_ranks;  // before[low] <= index < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= index ? low : high) = middle;
    }
    return first[low] + index - before[low];
  }
};

// The first of [begin, end) whose token is not before `token`; token_of is ascending.
template <typename TokenOf>
__device__ int FirstPairFrom(int64_t token, int begin, int end, TokenOf token_of) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (token_of(middle) < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// By a block, in shared memory that it does not use any more.
template <typename RangeOf>
__device__ ChunkPairs MakeChunkPairs(int32_t* before, int32_t* first, int num_ranks, int own,
                                     RangeOf range_of) {
  for (int source = threadIdx.x; source < num_ranks; source += blockDim.x) {
    const PairRange range = range_of(source);
    first[source] = range.begin;
    before[source + 1] = max(range.end - range.begin, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    before[0] = 0;
    for (int source = 0; source < num_ranks; ++source) before[source + 1] += before[source];
  }
  __syncthreads();
  return {{before[num_ranks], before[own], before[own + 1]}, before, first, num_ranks};
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_CHUNK_PAIRS_CUH_
