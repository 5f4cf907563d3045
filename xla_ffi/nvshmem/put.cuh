// Puts by NVSHMEM: see cuda/remote_put.cuh, which includes this file.
//
// NVSHMEM knows the memory of a rank, registered by transport.cu, under another
// address. A fence orders all puts of the process before those that follow, whichever threads have
// issued them; a signal comes after its own message.
#ifndef JAX_DEEPEP_NVSHMEM_PUT_CUH_
#define JAX_DEEPEP_NVSHMEM_PUT_CUH_

#include <nvshmem.h>
#include <nvshmemx.h>

#include <type_traits>

namespace jax_deepep {

__device__ __forceinline__ void PutBytes(ByBlock, void* to, const void* from, size_t bytes,
                                         int process) {
  nvshmemx_putmem_nbi_block(to, from, bytes, process);
}
__device__ __forceinline__ void PutBytes(ByThread, void* to, const void* from, size_t bytes,
                                         int process) {
  nvshmem_putmem_nbi(to, from, bytes, process);
}

__device__ __forceinline__ char* StagingOf(const OpFrame& /*frame*/, int /*node*/, char* /*to*/,
                                           char* from) {
  return from;
}

template <typename By>
__device__ __forceinline__ void PutFlag(const OpFrame& frame, int node, void* to, const void* from,
                                        int64_t bytes, uint64_t* flag = nullptr,
                                        uint64_t value = 0) {
  const RemoteRoute& route = frame.control[frame.rank]->route;
  const int process = route.processes[node];
  const auto known = [&](const void* own) {
    return route.memory +
           (static_cast<const char*>(own) - reinterpret_cast<char*>(frame.control[frame.rank]));
  };
  if (bytes > 0) {
    FenceAliases();  // written at this rank's address, read at NVSHMEM's
    PutBytes(By(), known(to), known(from), bytes, process);
  }
  if (flag == nullptr) return;
  By::Sync();
  if (By::Index() == 0) {
    nvshmem_fence();
    nvshmem_uint64_p(reinterpret_cast<uint64_t*>(known(flag)), value, process);
  }
}

template <typename By>
__device__ __forceinline__ void PutStaged(const OpFrame& frame, int node, char* to, char* from,
                                          int64_t bytes, uint64_t* flag = nullptr,
                                          uint64_t value = 0) {
  const RemoteRoute& route = frame.control[frame.rank]->route;
  if (flag == nullptr || bytes == 0 || !route.signals) {
    PutFlag<By>(frame, node, to, from, bytes, flag, value);
    return;
  }
  static_assert(std::is_same_v<By, ByBlock>);
  const int64_t offset = route.memory - reinterpret_cast<char*>(frame.control[frame.rank]);
  // Messages of two ops may be under way, and flags must not overtake each other.
  if (By::Index() == 0) nvshmem_fence();
  By::Sync();
  FenceAliases();
  nvshmemx_putmem_signal_nbi_block(
      to + offset, from + offset, bytes,
      reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(flag) + offset), value,
      NVSHMEM_SIGNAL_SET, route.processes[node]);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_NVSHMEM_PUT_CUH_
