// Inline PTX, except bulk copies through shared memory: loads, stores and fences that order memory
// between GPUs, barriers of some warps, loads with cache hints, and the clock that bounds waits.
#ifndef JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_
#define JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_

#include <cstdint>

namespace jax_deepep {

__device__ __forceinline__ uint64_t LoadAcquireSystem(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseSystem(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint32_t LoadAcquireSystem(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseSystem(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t LoadAcquireDevice(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void StoreReleaseDevice(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t AddAcquireRelease(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

__device__ __forceinline__ void AddRelease(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Between the warps of a block, in shared memory.
__device__ __forceinline__ uint32_t LoadAcquireBlock(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void StoreReleaseBlock(uint32_t* address, uint32_t value) {
  asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t AddAcquireReleaseBlock(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.cta.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}

// In a wait for another warp of the block: let others run.
__device__ __forceinline__ void Pause() { asm volatile("nanosleep.u32 64;"); }

// Barriers of some warps of a block, numbered from 1; `num_threads` are all that wait or arrive.
__device__ __forceinline__ void WaitAtBarrier(int number, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}
// Without waiting for the others.
__device__ __forceinline__ void ArriveAtBarrier(int number, int num_threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}

// These return the old value. Without an order of memory.
__device__ __forceinline__ uint64_t Add(uint64_t* address, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(address),
                   static_cast<unsigned long long>(value));
}
__device__ __forceinline__ void RaiseTo(uint64_t* address, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}
__device__ __forceinline__ uint64_t SetBits(uint64_t* address, uint64_t bits) {
  return atomicOr(reinterpret_cast<unsigned long long*>(address),
                  static_cast<unsigned long long>(bits));
}

__device__ __forceinline__ void FenceSystem() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Memory that is mapped at two addresses: what was written at one is read at the other after this,
// by the thread that calls it.
__device__ __forceinline__ void FenceAliases() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// 16 bytes that are stored, and arrive on a peer, at once.
struct alignas(16) Packet {
  uint64_t value, tag;
};

__device__ __forceinline__ void StorePacket(Packet* address, Packet packet) {
  asm volatile(
      "{\n.reg .b128 whole;\nmov.b128 whole, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], whole;\n}" ::"l"(address),
      "l"(packet.value), "l"(packet.tag)
      : "memory");
}

__device__ __forceinline__ Packet LoadPacket(const Packet* address) {
  Packet packet;
  asm volatile(
      "{\n.reg .b128 whole;\nld.relaxed.sys.global.b128 whole, [%2];\n"
      "mov.b128 {%0, %1}, whole;\n}"
      : "=l"(packet.value), "=l"(packet.tag)
      : "l"(address)
      : "memory");
  return packet;
}

// Loads of data that a peer wrote during this op, by threads other than the one that acquired it.
__device__ __forceinline__ int32_t LoadFresh(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ float LoadFresh(const float* address) {
  float value;
  asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 LoadFresh(const uint4* address) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

// Bypasses the L1 cache: rows are read once.
__device__ __forceinline__ uint4 LoadOnce(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

__device__ __forceinline__ uint2 LoadOnce(const uint2* from) {
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(from));
  return value;
}

__device__ __forceinline__ uint32_t LoadOnce(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

__device__ __forceinline__ void PrefetchToL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Nanoseconds, the same on all SMs of a GPU.
__device__ __forceinline__ uint64_t NanosecondClock() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_
