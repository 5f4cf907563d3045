// Puts over mapped memory: see cuda/remote_put.cuh, which includes this file.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_

namespace jax_deepep {

// The same place in the memory of this rank's peer.
template <typename T>
__device__ __forceinline__ T* OnPeer(const OpFrame& frame, int node, T* own) {
  char* const theirs = reinterpret_cast<char*>(frame.control[frame.RankOnNode(node)]);
  return reinterpret_cast<T*>(
      theirs + (reinterpret_cast<char*>(own) - reinterpret_cast<char*>(frame.control[frame.rank])));
}

__device__ __forceinline__ char* StagingOf(const OpFrame& frame, int node, char* to,
                                           char* /*from*/) {
  return OnPeer(frame, node, to);
}

template <typename By>
__device__ __forceinline__ void PutFlag(const OpFrame& frame, int node, void* to, const void* from,
                                        int64_t bytes, uint64_t* flag = nullptr,
                                        uint64_t value = 0) {
  if (bytes > 0) {
    CopyBytes<By>(OnPeer(frame, node, static_cast<char*>(to)), static_cast<const char*>(from),
                  bytes);
  }
  if (flag == nullptr) return;
  By::Sync();
  if (By::Index() == 0) {
    StoreReleaseSystem(OnPeer(frame, node, flag), value);  // pairs with the peer's acquire load
  }
}

template <typename By>
__device__ __forceinline__ void PutStaged(const OpFrame& frame, int node, char* to, char* from,
                                          int64_t /*bytes*/, uint64_t* flag = nullptr,
                                          uint64_t value = 0) {
  PutFlag<By>(frame, node, to, from, 0, flag, value);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_
