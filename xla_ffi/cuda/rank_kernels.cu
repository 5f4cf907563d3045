#include "cuda/kernel_launch.h"
#include "cuda/memory_order.cuh"
#include "cuda/rank_kernels.h"
#include "cuda/rank_op.cuh"

namespace jax_deepep {
namespace {

struct Abort {
  OpFrame frame;
  Failure failure;
};

template <bool kSeveralNodes>
__global__ void AbortKernel(const __grid_constant__ Abort op) {
  using Op = RankOpOf<kSeveralNodes>;
  __shared__ typename Op::Shared shared;
  Op(op.frame, &shared).Abort(op.failure);
}

struct TestPeers {
  OpFrame frame;
  uint64_t word;
};

__global__ void TestPeersKernel(const __grid_constant__ TestPeers op) {
  const OpFrame& frame = op.frame;
  for (int peer = threadIdx.x; peer < frame.shape.num_ranks; peer += blockDim.x) {
    if (frame.control[peer] == nullptr) continue;
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
  Abort op{frame, failure};
  const auto kernel = frame.shape.num_nodes() > 1 ? AbortKernel<true> : AbortKernel<false>;
  return LaunchKernel(kernel, op, 1, 1, 0, stream);
}

const char* LaunchTestPeers(const OpFrame& frame, uint64_t word, cudaStream_t stream) {
  TestPeers op{frame, word};
  return LaunchKernel(TestPeersKernel, op, 1, 32, 0, stream);
}

const char* LoadRankKernels(int /*max_shared_bytes*/) {
  const char* error = LoadKernel(TestPeersKernel, 0);
  for (auto* kernel : {AbortKernel<false>, AbortKernel<true>}) {
    if (error == nullptr) error = LoadKernel(kernel, 0);
  }
  return error;
}

}  // namespace jax_deepep
