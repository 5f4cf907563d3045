// Replaces xla_ffi/cuda/memory_order.cuh, which is inline PTX.
#ifndef JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_
#define JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_

#include <chrono>
#include <cstdint>

#include "cuda_runtime.h"

namespace jax_deepep {

// A load that may be part of a wait yields to other threads first.
template <typename T>
T LoadAcquire(const T* address) {
  cuda_on_cpu::GiveWay();
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline uint64_t LoadAcquireSystem(const uint64_t* address) { return LoadAcquire(address); }
inline uint32_t LoadAcquireDevice(const uint32_t* address) { return LoadAcquire(address); }

inline void StoreReleaseSystem(uint64_t* address, uint64_t value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
inline void StoreReleaseDevice(uint32_t* address, uint32_t value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
inline uint32_t AddAcquireRelease(uint32_t* address, uint32_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline void AddRelease(uint32_t* address, uint32_t value) {
  __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
}
inline uint32_t LoadAcquireBlock(const uint32_t* address) { return LoadAcquire(address); }
inline void StoreReleaseBlock(uint32_t* address, uint32_t value) {
  StoreReleaseDevice(address, value);
}
inline uint32_t AddAcquireReleaseBlock(uint32_t* address, uint32_t value) {
  return AddAcquireRelease(address, value);
}
inline void Pause() {}

struct alignas(16) Packet {
  uint64_t value, tag;
};
inline void StorePacket(Packet* address, Packet packet) {
  __atomic_store_n(&address->value, packet.value, __ATOMIC_RELAXED);
  __atomic_store_n(&address->tag, packet.tag, __ATOMIC_RELEASE);
}
inline Packet LoadPacket(const Packet* address) {
  Packet packet;
  cuda_on_cpu::GiveWay();
  packet.tag = __atomic_load_n(&address->tag, __ATOMIC_ACQUIRE);
  packet.value = __atomic_load_n(&address->value, __ATOMIC_RELAXED);
  return packet;
}
using cuda_on_cpu::ArriveAtBarrier, cuda_on_cpu::WaitAtBarrier;
inline uint64_t Add(uint64_t* address, uint64_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void RaiseTo(uint64_t* address, uint64_t value) {
  uint64_t found = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (found < value && !__atomic_compare_exchange_n(address, &found, value, true, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
  }
}
inline uint64_t SetBits(uint64_t* address, uint64_t bits) {
  return __atomic_fetch_or(address, bits, __ATOMIC_RELAXED);
}
inline void FenceAliases() {}

inline void FenceSystem() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T LoadFresh(const T* address) {
  return *const_cast<const volatile T*>(address);
}

template <typename Words>
Words LoadOnce(const Words* from) {
  return *from;
}
inline void PrefetchToL2(const void*) {}

inline uint64_t NanosecondClock() {
  cuda_on_cpu::GiveWay();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_MEMORY_ORDER_CUH_
