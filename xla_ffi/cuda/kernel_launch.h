// Loading and launching of all our kernels.
#ifndef JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
#define JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "cuda/device_facts.h"
#include "cuda/kernel_stream.h"

namespace jax_deepep {

template <typename Op>
const char* LoadKernel(void (*kernel)(Op), int max_shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A kernel whose blocks do not wait for each other.
template <typename Op>
const char* LaunchIndependentBlocks(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                                    int shared_bytes, cudaStream_t stream) {
  void* arguments[] = {&op};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(num_threads),
                       arguments, shared_bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Op>
const char* LaunchKernel(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                         int shared_bytes, const KernelStream& on) {
  void* arguments[] = {&op};
  // Blocks wait for each other: they all run or none does, and more than fit on the GPU are an
  // error here. CUDA graphs support such kernels.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  if (on.resident != nullptr) {
    attributes[1].id = cudaLaunchAttributeLaunchCompletionEvent;
    attributes[1].val.launchCompletionEvent.event = on.resident;
    config.numAttrs = 2;
  }
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
