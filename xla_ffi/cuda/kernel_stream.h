// Where a kernel is launched.
#ifndef JAX_DEEPEP_CUDA_KERNEL_STREAM_H_
#define JAX_DEEPEP_CUDA_KERNEL_STREAM_H_

#include <cuda_runtime_api.h>

namespace jax_deepep {

struct KernelStream {
  cudaStream_t stream;
  cudaEvent_t resident = nullptr;  // recorded once all blocks of the kernel have begun, or null

  KernelStream(cudaStream_t stream, cudaEvent_t resident = nullptr)
      : stream(stream), resident(resident) {}
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNEL_STREAM_H_
