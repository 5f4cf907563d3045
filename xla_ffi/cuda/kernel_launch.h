// Loading and launching any kernel of ours.
#ifndef JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
#define JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "cuda/device_facts.h"

namespace jax_deepep {

template <typename Op>
const char* LoadKernel(void (*kernel)(Op), int max_shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Op>
const char* LaunchKernel(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                         int shared_bytes, cudaStream_t stream) {
  void* arguments[] = {&op};
  // Blocks wait for each other: either all of them run or none, and more than the GPU has room for
  // is an error here. Graphs take such kernels as well.
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
