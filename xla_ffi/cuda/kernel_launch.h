// Loading and launching of all our kernels.
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
  // Blocks wait for each other: they all run or none does, and more than fit on the GPU are an
  // error here. CUDA graphs support such kernels.
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
