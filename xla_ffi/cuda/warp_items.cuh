// Work items, a warp for each, with the inputs of an item prefetched during earlier ones.
#ifndef JAX_DEEPEP_CUDA_WARP_ITEMS_CUH_
#define JAX_DEEPEP_CUDA_WARP_ITEMS_CUH_

#include <cstdint>

namespace jax_deepep {

// Of all blocks.
__device__ inline int NumWarps() { return gridDim.x * (blockDim.x / 32); }

// A warp's items are this one and every NumWarps()-th after it.
__device__ inline int FirstItem() { return threadIdx.x / 32 * gridDim.x + blockIdx.x; }

// The ranks of all lanes that are in [base, base + 32), as bits. A lane may have none.
__device__ __forceinline__ uint32_t RanksOfLanes(int32_t rank, int base) {
  return __reduce_or_sync(~0u, rank >= base && rank < base + 32 ? 1u << (rank - base) : 0u);
}

// Those of them that are less than this lane's.
__device__ __forceinline__ uint32_t BitsBelow(int32_t rank, int base) {
  return rank >= base + 32 ? ~0u : rank > base ? (1u << (rank - base)) - 1 : 0u;
}

// Call use(item, prepared) for this warp's items from `item` to before `end`, in order; returns the
// next one. `prepared` is what prepare(item, found) made of found = read(item): read is called two
// items ahead and prepare one, so that their loads overlap with earlier items. Both are also called
// for items past the end.
template <typename Read, typename Prepare, typename Use>
__device__ __forceinline__ int ForWarpItems(int item, int end, Read read, Prepare prepare,
                                            Use use) {
  const int stride = NumWarps();
  const auto first = read(item);
  auto found = read(item + stride);
  auto next = prepare(item, first);
  for (; item < end; item += stride) {
    const auto prepared = next;
    next = prepare(item + stride, found);
    found = read(item + 2 * stride);
    use(item, prepared);
  }
  return item;
}

// The same for all of `count` items.
template <typename Read, typename Prepare, typename Use>
__device__ __forceinline__ void ForWarpItems(int count, Read read, Prepare prepare, Use use) {
  ForWarpItems(FirstItem(), count, read, prepare, use);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_WARP_ITEMS_CUH_
