// cached_dispatch inside a node: see cached_dispatch.cuh.
#include "cuda/group_op.cuh"
#include "cuda/intranode/cached_dispatch.cuh"
#include "cuda/intranode/throughput.h"

namespace jax_deepep {

template <>
const char* VerbKernels<Throughput, CachedDispatchParams>::Launch(
    const OpFrame& frame, const CachedDispatchParams& params, int num_blocks,
    const DeviceFacts& device, const KernelStream& stream) {
  return CachedDispatchKernels<GroupOp>::Launch(frame, params, num_blocks, device, stream);
}

template <>
const char* VerbKernels<Throughput, CachedDispatchParams>::Load(int /*max_shared_bytes*/) {
  return CachedDispatchKernels<GroupOp>::Load();
}

}  // namespace jax_deepep
