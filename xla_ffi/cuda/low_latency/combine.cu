// combine in low-latency mode inside a node: see combine.cuh.
#include "cuda/low_latency/combine.cuh"
#include "cuda/low_latency/low_latency.h"

namespace jax_deepep {

template <>
const char* VerbKernels<LowLatency, CombineParams>::Launch(const OpFrame& frame,
                                                           const CombineParams& params,
                                                           int num_blocks, const DeviceFacts&,
                                                           const KernelStream& stream) {
  return LowLatencyCombineKernels<SignalledOp>::Launch(frame, params, num_blocks, stream);
}

template <>
const char* VerbKernels<LowLatency, CombineParams>::Load(int /*max_shared_bytes*/) {
  return LowLatencyCombineKernels<SignalledOp>::Load();
}

}  // namespace jax_deepep
