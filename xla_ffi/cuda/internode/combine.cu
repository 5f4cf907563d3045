// combine between nodes: see intranode/combine.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/node_op.cuh"
#include "cuda/intranode/combine.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<Internode, CombineParams>::Launch(const OpFrame& frame,
                                                          const CombineParams& params,
                                                          int num_blocks, const DeviceFacts& device,
                                                          const KernelStream& stream) {
  const int64_t row_bytes = CombineSums(frame.shape, params.route).node_bytes;
  const auto launch = frame.staging.ChunksOf(params.route.num_tokens, row_bytes).count == 1
                          ? &CombineKernels<NodeOp>::Launch
                          : &CombineKernels<ChunkedNodeOp>::Launch;
  return launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, CombineParams>::Load(int /*max_shared_bytes*/) {
  const char* error = CombineKernels<NodeOp>::Load();
  return error != nullptr ? error : CombineKernels<ChunkedNodeOp>::Load();
}

}  // namespace jax_deepep
