// What the host launches in place of an op that cannot be launched: the rank aborts.
#ifndef JAX_DEEPEP_CUDA_ABORT_KERNEL_CUH_
#define JAX_DEEPEP_CUDA_ABORT_KERNEL_CUH_

#include "cuda/kernel_launch.h"
#include "cuda/rank_op.cuh"

namespace jax_deepep {
namespace {

struct Abort {
  OpFrame frame;
  Failure failure;
};

// kSeveralNodes is as in RankOpOf.
template <bool kSeveralNodes>
__global__ void AbortKernel(const __grid_constant__ Abort op) {
  using Op = RankOpOf<kSeveralNodes>;
  __shared__ typename Op::Shared shared;
  Op(op.frame, &shared).Abort(op.failure);
}

template <bool kSeveralNodes>
const char* LaunchAbortKernel(const OpFrame& frame, Failure failure, cudaStream_t stream) {
  Abort op{frame, failure};
  return LaunchKernel(AbortKernel<kSeveralNodes>, op, 1, 1, 0, stream);
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ABORT_KERNEL_CUH_
