#include "cuda/abort_kernel.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/memory_order.cuh"
#include "cuda/rank_kernels.h"

namespace jax_deepep {
namespace {

struct TestPeers {
  OpFrame frame;
  uint64_t word;
};

__global__ void TestPeersKernel(const __grid_constant__ TestPeers op) {
  const OpFrame& frame = op.frame;
  for (int peer = threadIdx.x; peer < frame.shape.num_ranks; peer += blockDim.x) {
    if (frame.NodeOf(peer) != frame.NodeOf(frame.rank)) continue;
    auto* word = static_cast<volatile uint64_t*>(&frame.control[peer]->tests[frame.rank]);
    *word = op.word + peer;
    FenceSystem();
    if (*word != op.word + peer) {
      *static_cast<volatile uint32_t*>(&frame.status->unreachable) = 1 + peer;
    }
  }
}

}  // namespace

const char* LaunchAbort(const OpFrame& frame, Failure failure, cudaStream_t stream) {
  return LaunchAbortKernel</*kSeveralNodes=*/false>(frame, failure, stream);
}

const char* LaunchTestPeers(const OpFrame& frame, uint64_t word, cudaStream_t stream) {
  TestPeers op{frame, word};
  return LaunchKernel(TestPeersKernel, op, 1, 32, 0, stream);
}

const char* LoadRankKernels(int /*max_shared_bytes*/) {
  const char* error = LoadKernel(TestPeersKernel, 0);
  return error != nullptr ? error : LoadKernel(AbortKernel</*kSeveralNodes=*/false>, 0);
}

}  // namespace jax_deepep
