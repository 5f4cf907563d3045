// The order in which a rank reads its pairs: those of the next rank first, so that no two ranks
// read from the same one at the same time, and this rank's own interleaved, so that the links are
// busy throughout.
#ifndef JAX_DEEPEP_CUDA_PAIR_ORDER_CUH_
#define JAX_DEEPEP_CUDA_PAIR_ORDER_CUH_

#include <cstdint>

#include "cuda/divisor.h"

namespace jax_deepep {

// The pairs that a rank reads, in their order, and those of them that are its own.
struct AllPairs {
  int count, own_begin, own_end;
  __device__ int At(int index) const { return index; }
};

class PairOrder {
 public:
  // `count` pairs, of which [own_begin, own_end) are of this rank; `num_warps` share them.
  __device__ PairOrder(int count, int own_begin, int own_end, const Divisor& num_warps)
      : count_(count),
        own_begin_(own_begin),
        own_end_(own_end),
        num_warps_(num_warps),
        own_share_(count == 0 ? 0
                              : ((static_cast<uint64_t>(own_end - own_begin) << 32) + count - 1) /
                                    static_cast<uint64_t>(count)) {}

  __device__ int count() const { return count_; }

  // The pair of an item of work, for item < count.
  __device__ int At(int item) const {
    // Rotate the warps in every round, so that no warp has only its own rank's pairs.
    const int round = num_warps_.Quotient(item), begin = round * num_warps_.divisor();
    const bool whole_round = begin + num_warps_.divisor() <= count_;
    const int turned = whole_round ? begin + num_warps_.Remainder(item - begin + round) : item;
    const int own_before = OwnBefore(turned);
    if (OwnBefore(turned + 1) > own_before) return own_begin_ + own_before;
    const int other = turned - own_before;  // among the pairs of other ranks, the next rank's first
    const int after_own = count_ - own_end_;
    return other < after_own ? own_end_ + other : other - after_own;
  }

 private:
  // Items before this one that are of this rank's own pairs. The share is rounded up, so that all
  // of them come before item `count`.
  __device__ int OwnBefore(int item) const {
    return static_cast<int>(static_cast<uint64_t>(item) * own_share_ >> 32);
  }

  int count_, own_begin_, own_end_;
  const Divisor& num_warps_;
  uint64_t own_share_;  // of all pairs, times 2^32
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_PAIR_ORDER_CUH_
