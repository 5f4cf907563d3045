// PutFlag over mapped memory: see cuda/remote_put.cuh, which includes this file.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_

namespace jax_deepep {

template <typename By>
__device__ __forceinline__ void PutFlag(const OpFrame& frame, int node, void* to, const void* from,
                                        int64_t bytes, uint64_t* flag = nullptr,
                                        uint64_t value = 0) {
  char* const own = reinterpret_cast<char*>(frame.control[frame.rank]);
  char* const theirs = reinterpret_cast<char*>(frame.control[frame.RankOnNode(node)]);
  if (bytes > 0) {
    CopyBytes<By>(theirs + (static_cast<char*>(to) - own), static_cast<const char*>(from), bytes);
  }
  if (flag == nullptr) return;
  By::Sync();
  if (By::Index() == 0) {
    auto* at = reinterpret_cast<uint64_t*>(theirs + (reinterpret_cast<char*>(flag) - own));
    StoreReleaseSystem(at, value);  // pairs with the acquire load of a wait, on the peer
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_MAPPED_PUT_CUH_
