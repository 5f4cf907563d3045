// How a thread reads many words of 16 bytes ahead of their use: each on its way into a slot of
// shared memory that is this thread's alone, so that loads in flight take no registers and nobody
// waits for another thread.
#ifndef JAX_DEEPEP_CUDA_WORD_QUEUE_CUH_
#define JAX_DEEPEP_CUDA_WORD_QUEUE_CUH_

#include <cstdint>

namespace jax_deepep {

template <int kSlots>
class WordQueue {
 public:
  static constexpr int kBytesPerThread = kSlots * sizeof(uint4);

  // `memory` is the block's, [blockDim.x * kBytesPerThread].
  __device__ explicit WordQueue(char* memory)
      : slots_(reinterpret_cast<uint4*>(memory) + threadIdx.x) {}

  // Call use(number, word) for the words address(0), address(1), ... of `count`, in order. All
  // threads of a warp have the same count; a thread may have no address (null) for some and gets
  // garbage then.
  template <typename Address, typename Use>
  __device__ __forceinline__ void Run(int count, Address address, Use use) {
#pragma unroll
    for (int number = 0; number < kSlots - 1; ++number) {
      if (number < count) Begin(number, address(number));
      Commit();
    }
    int slot = 0;
    for (int number = 0; number < count; ++number) {
      const int ahead = number + kSlots - 1;
      // The slot before this one was used last.
      if (ahead < count) Begin(slot == 0 ? kSlots - 1 : slot - 1, address(ahead));
      Commit();
      asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
      use(number, slots_[slot * blockDim.x]);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
  }

 private:
  __device__ void Begin(int slot, const uint4* from) {
    if (from == nullptr) return;
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(slots_ + slot * blockDim.x));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
  __device__ void Commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  uint4* slots_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_WORD_QUEUE_CUH_
