// Replaces xla_ffi/cuda/kernel_launch.h.
#ifndef JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
#define JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_

#include "cuda/device_facts.h"
#include "cuda/kernel_stream.h"
#include "cuda_runtime.h"

namespace jax_deepep {

template <typename Op>
const char* LoadKernel(void (*)(Op), int /*max_shared_bytes*/) {
  return nullptr;
}

template <typename Op>
const char* LaunchKernel(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                         int /*shared_bytes*/, const KernelStream& on) {
  cuda_on_cpu::Enqueue(on.stream, [=] {
    cuda_on_cpu::RunGrid(num_blocks, num_threads, [&] { kernel(op); });
  });
  return nullptr;
}

template <typename Op>
const char* LaunchIndependentBlocks(void (*kernel)(Op), Op& op, int num_blocks, int num_threads,
                                    int shared_bytes, cudaStream_t stream) {
  return LaunchKernel(kernel, op, num_blocks, num_threads, shared_bytes, {stream});
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNEL_LAUNCH_H_
