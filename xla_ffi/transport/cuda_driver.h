// The functions of the CUDA driver that we call, looked up through the runtime: nothing links to
// libcuda, so that the module loads on machines without a driver.
#ifndef JAX_DEEPEP_TRANSPORT_CUDA_DRIVER_H_
#define JAX_DEEPEP_TRANSPORT_CUDA_DRIVER_H_

#include <cuda.h>

#include <string>

namespace jax_deepep {

struct Driver {
  decltype(&cuGetErrorString) get_error_string = nullptr;
  decltype(&cuCtxPushCurrent) push_context = nullptr;
  decltype(&cuCtxPopCurrent) pop_context = nullptr;
  decltype(&cuDevicePrimaryCtxRetain) retain_primary_context = nullptr;
  decltype(&cuDeviceGetAttribute) get_attribute = nullptr;
  decltype(&cuMemGetAddressRange) get_address_range = nullptr;
  decltype(&cuPointerGetAttribute) get_pointer_attribute = nullptr;
  decltype(&cuMemRetainAllocationHandle) retain_handle = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free_address = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  std::string error;  // which function is missing, or empty

  Driver();
  std::string Failed(const char* what, CUresult result) const;
};

const Driver& TheDriver();

// Makes a device of this process current within a scope. It uses the device's primary context, like
// the runtime and XLA, and then restores the thread's context, if any: restoring the device through
// the runtime would create a context on GPU 0 in a process that uses another one. Without a driver
// it does nothing, and later calls fail.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_CUDA_DRIVER_H_
