// cached_dispatch between nodes: see intranode/cached_dispatch.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/launch_in_chunks.cuh"
#include "cuda/internode/node_op.cuh"
#include "cuda/intranode/cached_dispatch.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<Internode, CachedDispatchParams>::Launch(const OpFrame& frame,
                                                                 const CachedDispatchParams& params,
                                                                 int num_blocks,
                                                                 const DeviceFacts& device,
                                                                 const KernelStream& stream) {
  const int64_t row_bytes = params.route.rows().wire_bytes();
  return LaunchInChunks<CachedDispatchKernels>(frame, params, row_bytes, num_blocks, device,
                                               stream);
}

template <>
const char* VerbKernels<Internode, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  return LoadBoth<CachedDispatchKernels>();
}

}  // namespace jax_deepep
