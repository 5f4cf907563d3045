// cached_dispatch in low-latency mode inside a node: see cached_dispatch.cuh.
#include "cuda/low_latency/cached_dispatch.cuh"
#include "cuda/low_latency/low_latency.h"

namespace jax_deepep {

template <>
const char* VerbKernels<LowLatency, CachedDispatchParams>::Launch(
    const OpFrame& frame, const CachedDispatchParams& params, int num_blocks, const DeviceFacts&,
    const KernelStream& stream) {
  return LowLatencyCachedDispatchKernels<SignalledOp>::Launch(frame, params, num_blocks, stream);
}

template <>
const char* VerbKernels<LowLatency, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  return LowLatencyCachedDispatchKernels<SignalledOp>::Load();
}

}  // namespace jax_deepep
