// combine inside a node: see combine.cuh.
#include "cuda/group_op.cuh"
#include "cuda/intranode/combine.cuh"
#include "cuda/intranode/throughput.h"

namespace jax_deepep {

template <>
const char* VerbKernels<Throughput, CombineParams>::Launch(const OpFrame& frame,
                                                           const CombineParams& params,
                                                           int num_blocks,
                                                           const DeviceFacts& device,
                                                           const KernelStream& stream) {
  return CombineKernels<GroupOp>::Launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Throughput, CombineParams>::Load(int /*max_shared_bytes*/) {
  return CombineKernels<GroupOp>::Load();
}

}  // namespace jax_deepep
