// combine between nodes: see intranode/combine.cuh.
#include "cuda/internode/internode.h"
#include "cuda/internode/launch_in_chunks.cuh"
#include "cuda/internode/node_op.cuh"
#include "cuda/intranode/combine.cuh"

namespace jax_deepep {

template <>
const char* VerbKernels<Internode, CombineParams>::Launch(const OpFrame& frame,
                                                          const CombineParams& params,
                                                          int num_blocks, const DeviceFacts& device,
                                                          const KernelStream& stream) {
  const int64_t row_bytes = CombineSums(frame.shape, params.route).crossing_bytes();
  return LaunchInChunks<CombineKernels>(frame, params, row_bytes, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Internode, CombineParams>::Load(int /*max_shared_bytes*/) {
  return LoadBoth<CombineKernels>();
}

}  // namespace jax_deepep
