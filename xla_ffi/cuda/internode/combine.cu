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
  return CombineKernels<NodeOp>::Launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, CombineParams>::Load(int /*max_shared_bytes*/) {
  return CombineKernels<NodeOp>::Load();
}

}  // namespace jax_deepep
