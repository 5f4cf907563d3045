#include "transport/cuda_driver.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

namespace jax_deepep {
namespace {

template <typename Function>
std::string DriverFunction(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || found == nullptr) {
    return std::string("the CUDA driver has no ") + name + " (" + cudaGetErrorString(error) + ")";
  }
  *function = reinterpret_cast<Function>(found);
  return "";
}

// The primary context of a device, or null. Held until the process ends: CUDA
// destroys an unused one with everything in it.
CUcontext PrimaryContext(int device) {
  static std::mutex mutex;
  static auto* const contexts = new std::map<int, CUcontext>;  // outlives every thread
  std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = contexts->find(device); found != contexts->end()) return found->second;
  CUcontext context = nullptr;
  // A CUdevice is an ordinal.
  if (TheDriver().retain_primary_context(&context, device) != CUDA_SUCCESS) return nullptr;
  return (*contexts)[device] = context;
}

}  // namespace

Driver::Driver() {
  for (const std::string& missing :
       {DriverFunction("cuGetErrorString", &get_error_string),
        DriverFunction("cuCtxPushCurrent", &push_context),
        DriverFunction("cuCtxPopCurrent", &pop_context),
        DriverFunction("cuDevicePrimaryCtxRetain", &retain_primary_context),
        DriverFunction("cuDeviceGetAttribute", &get_attribute),
        DriverFunction("cuMemGetAddressRange", &get_address_range),
        DriverFunction("cuPointerGetAttribute", &get_pointer_attribute),
        DriverFunction("cuMemRetainAllocationHandle", &retain_handle),
        DriverFunction("cuMemExportToShareableHandle", &export_handle),
        DriverFunction("cuMemImportFromShareableHandle", &import_handle),
        DriverFunction("cuMemAddressReserve", &reserve),
        DriverFunction("cuMemAddressFree", &free_address), DriverFunction("cuMemCreate", &create),
        DriverFunction("cuMemRelease", &release), DriverFunction("cuMemMap", &map),
        DriverFunction("cuMemUnmap", &unmap), DriverFunction("cuMemSetAccess", &set_access),
        DriverFunction("cuMemGetAllocationGranularity", &granularity)}) {
    if (error.empty()) error = missing;
  }
}

std::string Driver::Failed(const char* what, CUresult result) const {
  const char* text = nullptr;
  get_error_string(result, &text);
  return std::string(what) + " failed: " + (text == nullptr ? "unknown error" : text);
}

const Driver& TheDriver() {
  static const Driver* const driver = new Driver;
  return *driver;
}

OnDevice::OnDevice(int device) {
  const Driver& driver = TheDriver();
  if (!driver.error.empty()) return;
  CUcontext context = PrimaryContext(device);
  pushed_ = context != nullptr && driver.push_context(context) == CUDA_SUCCESS;
}

OnDevice::~OnDevice() {
  CUcontext popped = nullptr;
  if (pushed_) TheDriver().pop_context(&popped);
}

}  // namespace jax_deepep
