#include "cuda/unsupported_reason.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>

#include "cuda/device_control.h"
#include "cuda/device_facts.h"
#include "cuda/op_frame.h"
#include "transport/cuda_driver.h"
#include "transport/cuda_peer.h"

namespace jax_deepep {

std::string UnsupportedReasonOfLimits(const GroupShape& shape) {
  if (shape.num_ranks > kMaxRanks) {
    return "native ops on GPUs: expected EP groups of at most " + std::to_string(kMaxRanks) +
           " devices, got " + std::to_string(shape.num_ranks);
  }
  if (shape.num_topk > kMaxTopk) {
    return "native ops on GPUs: expected num_experts_per_tok of at most " +
           std::to_string(kMaxTopk) + ", got " + std::to_string(shape.num_topk);
  }
  return "";
}

std::string UnsupportedReasonOfDevice(int ordinal, const GroupShape& shape,
                                      const WindowSize& window) {
  const std::string gpu = "GPU " + std::to_string(ordinal);
  int major = 0;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
      error != cudaSuccess) {
    return gpu + " cannot be queried: " + cudaGetErrorString(error);
  }
  if (major < kOldestMajor) {
    return gpu + " is older than compute capability " + std::to_string(kOldestMajor) +
           ".0, which native ops need";
  }
  const int64_t available = DynamicSharedBytes(ordinal);
  for (const KernelSet* kernels : KernelsFor(shape, window)) {
    const int64_t needed = kernels->least_shared_bytes(shape, window);
    if (needed <= available) continue;
    const std::string tokens =
        kernels->reads_peers ? "" : ", max_tokens " + std::to_string(window.num_tokens);
    return "num_experts is " + std::to_string(shape.num_experts) + tokens +
           ", for which native ops in mode " + kModeNames[static_cast<int>(kernels->mode)] +
           " need " + std::to_string(needed) + " bytes of shared memory per block, and " + gpu +
           " has " + std::to_string(available);
  }
  return "";
}

std::string UnsupportedReasonOfPool(const LocalDevice& device, size_t limit_bytes) {
  OnDevice current(device.ordinal);
  const std::string name = "XLA's memory pool on GPU " + std::to_string(device.ordinal);
  DeviceMemory pool;
  if (std::string error = pool.Find(device.in_pool); !error.empty()) return name + ": " + error;
  if (pool.bytes() < limit_bytes) {
    return name + " has " + std::to_string(pool.bytes() >> 20) + " MiB and may grow to " +
           std::to_string(limit_bytes >> 20) +
           ", so that peers cannot map it once and for all: set XLA_PYTHON_CLIENT_PREALLOCATE=true "
           "(the default), and XLA_PYTHON_CLIENT_MEM_FRACTION to leave memory to others";
  }
  ExportedMemory exported;
  if (std::string error = pool.Export(&exported); !error.empty()) {
    return name + " cannot be exported (" + error +
           "): leave XLA_PYTHON_CLIENT_ALLOCATOR at its default";
  }
  close(exported.descriptor);
  return "";
}

int DynamicSharedBytes(int ordinal) {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  return std::max(bytes - kStaticSharedBytes, 0);
}

}  // namespace jax_deepep
