#include "router/router_kernels.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "cuda/device_facts.h"
#include "router/expert_choice.h"
#include "router/fair_share.h"

namespace jax_deepep {
namespace {

int Attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// Of shared memory for FairShare, at most what it needs for kMostSharedEntries.
int SharedBytesOf(int device) {
  const int most = Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return std::clamp(most - kFairShareStaticBytes, 0, SharedBytesOfEntries(kMostSharedEntries));
}

}  // namespace

RouterLimits RouterLimitsHere() {
  int num_gpus = 0;
  if (cudaGetDeviceCount(&num_gpus) != cudaSuccess) num_gpus = 0;
  RouterLimits limits = {kMostRankedExperts, kMostExpertGroups, kMostSharedEntries};
  for (int device = 0; device < num_gpus; ++device) {
    if (Attribute(cudaDevAttrComputeCapabilityMajor, device) < kOldestMajor) return {0, 0, 0};
    limits.most_entries =
        std::min(limits.most_entries, EntriesOfSharedBytes(SharedBytesOf(device)));
  }
  return limits;
}

const char* EnsureRouterKernels() {
  static std::mutex mutex;
  static auto* loaded = new std::set<int>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded->count(device) != 0) return nullptr;
  const char* error = LoadExpertChoice();
  if (error == nullptr) error = LoadFairShare(SharedBytesOf(device));
  if (error == nullptr) loaded->insert(device);
  return error;
}

}  // namespace jax_deepep
