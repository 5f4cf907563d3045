// PutFlag by NVSHMEM: see cuda/remote_put.cuh, which includes this file.
//
// NVSHMEM knows the memory of a rank, registered by transport.cu, under another
// address. A fence orders all puts of the process before the flag, whichever threads have issued
// them: one per flag, never one per row.
#ifndef JAX_DEEPEP_NVSHMEM_PUT_CUH_
#define JAX_DEEPEP_NVSHMEM_PUT_CUH_

#include <nvshmem.h>
#include <nvshmemx.h>

namespace jax_deepep {

__device__ __forceinline__ void PutBytes(ByBlock, void* to, const void* from, size_t bytes,
                                         int process) {
  nvshmemx_putmem_nbi_block(to, from, bytes, process);
}
__device__ __forceinline__ void PutBytes(ByWarp, void* to, const void* from, size_t bytes,
                                         int process) {
  nvshmemx_putmem_nbi_warp(to, from, bytes, process);
}
__device__ __forceinline__ void PutBytes(ByThread, void* to, const void* from, size_t bytes,
                                         int process) {
  nvshmem_putmem_nbi(to, from, bytes, process);
}

template <typename By>
__device__ __forceinline__ void PutFlag(const OpFrame& frame, int node, void* to, const void* from,
                                        int64_t bytes, uint64_t* flag = nullptr,
                                        uint64_t value = 0) {
  char* const own = reinterpret_cast<char*>(frame.control[frame.rank]);
  const RemoteRoute& route = frame.control[frame.rank]->route;
  const int process = route.processes[node];
  if (bytes > 0) {
    const int64_t offset = static_cast<char*>(to) - own;
    int64_t from_offset = static_cast<const char*>(from) - own;
    const int own_node = frame.NodeOf(frame.rank);
    if (from_offset < 0 || from_offset >= route.bytes) {
      from_offset = frame.staging.SendOffset(frame.channel, own_node, node) + offset -
                    frame.staging.SlotOffset(frame.channel, node, own_node);
      CopyBytes<By>(own + from_offset, static_cast<const char*>(from), bytes);
      By::Sync();  // a fence of the thread that puts orders the copies of all
    }
    FenceAliases();  // written at this rank's address, read at NVSHMEM's
    PutBytes(By(), route.memory + offset, route.memory + from_offset, bytes, process);
  }
  if (flag == nullptr) return;
  By::Sync();
  if (By::Index() == 0) {
    nvshmem_fence();
    auto* at = route.memory + (reinterpret_cast<char*>(flag) - own);
    nvshmem_uint64_p(reinterpret_cast<uint64_t*>(at), value, process);
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_NVSHMEM_PUT_CUH_
