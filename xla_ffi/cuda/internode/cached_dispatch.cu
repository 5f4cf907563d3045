// cached_dispatch between nodes: see intranode/cached_dispatch.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/node_op.cuh"
#include "cuda/intranode/cached_dispatch.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<Internode, CachedDispatchParams>::Launch(const OpFrame& frame,
                                                                 const CachedDispatchParams& params,
                                                                 int num_blocks,
                                                                 const DeviceFacts& device,
                                                                 const KernelStream& stream) {
  return CachedDispatchKernels<NodeOp>::Launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  return CachedDispatchKernels<NodeOp>::Load();
}

}  // namespace jax_deepep
