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

// The pointer that a lane has.
__device__ __forceinline__ char* PointerOfLane(char* pointer, int lane) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<char*>(__shfl_sync(~0u, bits, lane));
}

// A warp's items, ascending: this one, and the one after it.
class EvenItems {
 public:
  __device__ EvenItems() : item_(FirstItem()), next_(item_ + NumWarps()) {}
  __device__ int item() const { return item_; }
  __device__ int next() const { return next_; }
  __device__ void Advance() {
    item_ = next_;
    next_ += NumWarps();
  }

 private:
  int item_, next_;
};

// The same, but the third and later items of a warp are the first that no warp has taken: those
// whose loads take longer do fewer. (Of fp8 rows over NVLink, divided evenly among 64 SMs, some
// had pulled theirs in 54 us and others in 112.) By a warp.
class SharedItems {
 public:
  // How many warps have taken so far, 0 before the op.
  __device__ explicit SharedItems(uint32_t* num_taken)
      : num_taken_(num_taken), item_(FirstItem()), next_(item_ + NumWarps()), taken_(Take()) {}
  __device__ int item() const { return item_; }
  __device__ int next() const { return next_; }
  __device__ void Advance() {
    item_ = next_;
    next_ = 2 * NumWarps() + __shfl_sync(~0u, taken_, 0);
    taken_ = Take();
  }

 private:
  // An item ahead, so that nobody waits for it.
  __device__ int Take() const {
    return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(num_taken_, 1u)) : 0;
  }

  uint32_t* num_taken_;
  int item_, next_, taken_;
};

// Call use(item, prepared) for this warp's items before `end`, in order. `prepared` is what
// prepare(item, found) made of found = read(item): read is called two items ahead and prepare one,
// so that their loads overlap with earlier items. Both are also called for items past the end.
template <typename Items, typename Read, typename Prepare, typename Use>
__device__ __forceinline__ void ForWarpItems(Items& items, int end, Read read, Prepare prepare,
                                             Use use) {
  const auto first = read(items.item());
  auto found = read(items.next());
  auto next = prepare(items.item(), first);
  while (items.item() < end) {
    const int item = items.item();
    const auto prepared = next;
    next = prepare(items.next(), found);
    items.Advance();
    found = read(items.next());
    use(item, prepared);
  }
}

// The same for all of `count` items, evenly.
template <typename Read, typename Prepare, typename Use>
__device__ __forceinline__ void ForWarpItems(int count, Read read, Prepare prepare, Use use) {
  EvenItems items;
  ForWarpItems(items, count, read, prepare, use);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_WARP_ITEMS_CUH_
