// Which kernels of a verb an op between nodes takes: with NodeOp, or with ChunkedNodeOp if its rows
// have no room in the staging together.
#ifndef JAX_DEEPEP_CUDA_INTERNODE_LAUNCH_IN_CHUNKS_CUH_
#define JAX_DEEPEP_CUDA_INTERNODE_LAUNCH_IN_CHUNKS_CUH_

#include <cstdint>

#include "cuda/internode/internode.h"
#include "cuda/internode/node_op.cuh"

namespace jax_deepep {

// `row_bytes` are those that cross between nodes.
template <template <typename Group> class Kernels, typename Params>
const char* LaunchInChunks(OpFrame frame, const Params& params, int64_t row_bytes, int num_blocks,
                           const DeviceFacts& device, const KernelStream& stream) {
  frame.chunks = frame.staging.ChunksOf(params.route.num_tokens, row_bytes);
  const auto launch =
      frame.chunks.count == 1 ? &Kernels<NodeOp>::Launch : &Kernels<ChunkedNodeOp>::Launch;
  return launch(frame, params, num_blocks, device, stream);
}

template <template <typename Group> class Kernels, typename... Limits>
const char* LoadBoth(Limits... limits) {
  const char* error = Kernels<NodeOp>::Load(limits...);
  return error != nullptr ? error : Kernels<ChunkedNodeOp>::Load(limits...);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_INTERNODE_LAUNCH_IN_CHUNKS_CUH_
