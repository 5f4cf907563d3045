// dispatch between nodes: see intranode/dispatch.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/launch_in_chunks.cuh"
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
  const int64_t row_bytes = params.route.rows().wire_bytes();
  return LaunchInChunks<DispatchKernels>(frame, params, row_bytes, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, DispatchParams>::Load(int max_shared_bytes) {
  return LoadBoth<DispatchKernels>(max_shared_bytes);
}

}  // namespace jax_deepep
