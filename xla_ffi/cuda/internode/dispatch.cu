// dispatch between nodes: see intranode/dispatch.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/node_op.cuh"
#include "cuda/intranode/dispatch.cuh"

namespace jax_deepep {

int64_t Internode::LeastSharedBytes(const GroupShape& shape, const WindowSize&) {
  return DispatchKernels<NodeOp>::LeastSharedBytes(shape);
}

template <>
const char* VerbKernels<Internode, DispatchParams>::Launch(const OpFrame& frame,
                                                           const DispatchParams& params,
                                                           int num_blocks,
                                                           const DeviceFacts& device,
                                                           const KernelStream& stream) {
  const RouteShape& route = params.route;
  const auto launch = frame.staging.ChunksOf(route.num_tokens, route.rows().wire_bytes()).count == 1
                          ? &DispatchKernels<NodeOp>::Launch
                          : &DispatchKernels<ChunkedNodeOp>::Launch;
  return launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, DispatchParams>::Load(int max_shared_bytes) {
  const char* error = DispatchKernels<NodeOp>::Load(max_shared_bytes);
  return error != nullptr ? error : DispatchKernels<ChunkedNodeOp>::Load(max_shared_bytes);
}

}  // namespace jax_deepep
