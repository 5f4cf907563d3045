// The bulk copy engine of SM90: whole rows between global and shared memory, issued by one thread.
//
// Addresses and sizes are multiples of 16 bytes. Not to be called on older GPUs.
#ifndef JAX_DEEPEP_BENCH_BULK_COPY_CUH_
#define JAX_DEEPEP_BENCH_BULK_COPY_CUH_

#include <cstdint>

namespace jax_deepep {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define JAX_DEEPEP_HAS_BULK_COPY 1
#else
#define JAX_DEEPEP_HAS_BULK_COPY 0
#endif

#if JAX_DEEPEP_HAS_BULK_COPY
#define JAX_DEEPEP_SM90(...) __VA_ARGS__
#else
#define JAX_DEEPEP_SM90(...) __trap()
#endif

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier in shared memory on which loads complete, with one arrival: the issuing thread's.
__device__ __forceinline__ void InitLoadBarrier(uint64_t* barrier) {
  JAX_DEEPEP_SM90(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier))
                   : "memory"));
}

// Make initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  JAX_DEEPEP_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}

// Arrive, and expect `bytes` of loads in this phase.
__device__ __forceinline__ void ExpectLoads(uint64_t* barrier, uint32_t bytes) {
  JAX_DEEPEP_SM90(asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory"));
}

__device__ __forceinline__ void BulkLoad(void* shared, const void* global, uint32_t bytes,
                                         uint64_t* barrier) {
  JAX_DEEPEP_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory"));
}

// Wait until the loads of a phase are complete.
__device__ __forceinline__ void WaitForLoads(uint64_t* barrier, uint32_t parity) {
#if JAX_DEEPEP_HAS_BULK_COPY
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

__device__ __forceinline__ void BulkStore(void* global, const void* shared, uint32_t bytes) {
  JAX_DEEPEP_SM90(
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                   "r"(SharedAddress(shared)), "r"(bytes)
                   : "memory"));
}

// Close the group of this thread's stores since the last one.
__device__ __forceinline__ void CommitStores() {
  JAX_DEEPEP_SM90(asm volatile("cp.async.bulk.commit_group;" ::: "memory"));
}

// Wait until all but the last `kGroups` groups of this thread have read their shared memory.
template <int kGroups>
__device__ __forceinline__ void WaitForStoresToRead() {
  JAX_DEEPEP_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory"));
}

// Wait until all stores of this thread are written.
__device__ __forceinline__ void WaitForStores() {
  JAX_DEEPEP_SM90(asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"));
}

// Order this thread's ordinary accesses, and what it has acquired, before its later bulk copies,
// and bulk copies that have completed before its later ordinary accesses.
__device__ __forceinline__ void FenceAsyncProxy() {
#if JAX_DEEPEP_HAS_BULK_COPY
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_BULK_COPY_CUH_
