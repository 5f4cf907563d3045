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
  const RouteShape& route = params.route;
  const auto launch = frame.staging.ChunksOf(route.num_tokens, route.rows().wire_bytes()).count == 1
                          ? &CachedDispatchKernels<NodeOp>::Launch
                          : &CachedDispatchKernels<ChunkedNodeOp>::Launch;
  return launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  const char* error = CachedDispatchKernels<NodeOp>::Load();
  return error != nullptr ? error : CachedDispatchKernels<ChunkedNodeOp>::Load();
}

}  // namespace jax_deepep
