#include "cuda/abort_kernel.cuh"
#include "cuda/internode/node_kernels.h"
#include "cuda/kernel_launch.h"
#include "cuda/memory_order.cuh"
#include "cuda/remote_put.cuh"

namespace jax_deepep {
namespace {

struct TestNodes {
  OpFrame frame;
  uint64_t word;
};

// By one warp: a lane for each node, up to 32 at a time.
__global__ void TestNodesKernel(const __grid_constant__ TestNodes op) {
  const OpFrame& frame = op.frame;
  uint64_t* tests = frame.control[frame.rank]->tests;
  const int own_node = frame.NodeOf(frame.rank);
  for (int node = threadIdx.x; node < frame.shape.num_nodes(); node += blockDim.x) {
    if (node == own_node) continue;
    PutFlag<ByThread>(frame, node, nullptr, nullptr, 0, &tests[frame.rank], op.word);
  }
  const uint64_t began_ns = NanosecondClock();
  for (int node = threadIdx.x; node < frame.shape.num_nodes(); node += blockDim.x) {
    if (node == own_node) continue;
    const int peer = frame.RankOnNode(node);
    while (LoadAcquireSystem(&tests[peer]) != op.word) {
      if (NanosecondClock() - began_ns < frame.timeout_ns) continue;
      *static_cast<volatile uint32_t*>(&frame.status->unreachable) = 1 + peer;
      break;
    }
  }
}

}  // namespace

const char* LaunchAbortBetweenNodes(const OpFrame& frame, Failure failure, cudaStream_t stream) {
  return LaunchAbortKernel</*kSeveralNodes=*/true>(frame, failure, stream);
}

const char* LaunchTestNodes(const OpFrame& frame, uint64_t word, cudaStream_t stream) {
  TestNodes op{frame, word};
  return LaunchKernel(TestNodesKernel, op, 1, 32, 0, stream);
}

const char* LoadNodeKernels(int /*max_shared_bytes*/) {
  const char* error = LoadKernel(TestNodesKernel, 0);
  return error != nullptr ? error : LoadKernel(AbortKernel</*kSeveralNodes=*/true>, 0);
}

}  // namespace jax_deepep
