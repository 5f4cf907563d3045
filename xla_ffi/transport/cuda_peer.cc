#include "transport/cuda_peer.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace jax_deepep {
namespace {

// The driver's functions, asked of the runtime: nothing links to libcuda, so that the module loads
// on machines without a driver.
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

struct Driver {
  decltype(&cuGetErrorString) get_error_string = nullptr;
  decltype(&cuMemGetAddressRange) get_address_range = nullptr;
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
  std::string error;

  Driver() {
    for (const std::string& missing :
         {DriverFunction("cuGetErrorString", &get_error_string),
          DriverFunction("cuMemGetAddressRange", &get_address_range),
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

  std::string Failed(const char* what, CUresult result) const {
    const char* text = nullptr;
    get_error_string(result, &text);
    return std::string(what) + " failed: " + (text == nullptr ? "unknown error" : text);
  }
};

const Driver& TheDriver() {
  static const Driver* const driver = new Driver;
  return *driver;
}

CUmemAllocationProp ExportableOn(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}

}  // namespace

DeviceMemory::~DeviceMemory() {
  if (!mapped_) return;
  // Errors are of no use here: at exit the driver may be gone already.
  const auto address = reinterpret_cast<CUdeviceptr>(data_);
  TheDriver().unmap(address, bytes_);
  TheDriver().free_address(address, bytes_);
}

std::string DeviceMemory::Create(int device, size_t bytes) {
  const Driver& driver = TheDriver();
  if (!driver.error.empty()) return driver.error;
  const CUmemAllocationProp properties = ExportableOn(device);
  size_t granularity = 0;
  CUresult result = driver.granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemGetAllocationGranularity", result);
  bytes_ = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle;
  result = driver.create(&handle, bytes_, &properties, 0);
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemCreate", result);
  std::string error = Map(handle, {device}, /*writable=*/true);
  driver.release(handle);  // the mapping keeps the memory
  if (!error.empty()) return error;
  const cudaError_t cleared = cudaMemset(data_, 0, bytes_);
  return cleared == cudaSuccess ? ""
                                : std::string("cudaMemset failed: ") + cudaGetErrorString(cleared);
}

std::string DeviceMemory::Import(const ExportedMemory& memory, const std::vector<int>& devices,
                                 bool writable) {
  const Driver& driver = TheDriver();
  if (!driver.error.empty()) return driver.error;
  CUmemGenericAllocationHandle handle;
  const CUresult result = driver.import_handle(
      &handle, reinterpret_cast<void*>(static_cast<intptr_t>(memory.descriptor)),
      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemImportFromShareableHandle", result);
  bytes_ = memory.bytes;
  std::string error = Map(handle, devices, writable);
  driver.release(handle);
  return error;
}

std::string DeviceMemory::Map(unsigned long long handle, const std::vector<int>& devices,
                              bool writable) {
  const Driver& driver = TheDriver();
  CUdeviceptr address = 0;
  CUresult result = driver.reserve(&address, bytes_, 0, 0, 0);
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemAddressReserve", result);
  result = driver.map(address, bytes_, 0, handle, 0);
  if (result != CUDA_SUCCESS) {
    driver.free_address(address, bytes_);
    return driver.Failed("cuMemMap", result);
  }
  data_ = reinterpret_cast<char*>(address);
  mapped_ = true;
  std::vector<CUmemAccessDesc> access;
  for (const int device : devices) {
    CUmemAccessDesc description = {};
    description.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    description.location.id = device;
    description.flags =
        writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
    access.push_back(description);
  }
  result = driver.set_access(address, bytes_, access.data(), access.size());
  return result == CUDA_SUCCESS ? "" : driver.Failed("cuMemSetAccess", result);
}

std::string DeviceMemory::Find(const void* pointer) {
  const Driver& driver = TheDriver();
  if (!driver.error.empty()) return driver.error;
  CUdeviceptr base = 0;
  const CUresult result =
      driver.get_address_range(&base, &bytes_, reinterpret_cast<CUdeviceptr>(pointer));
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemGetAddressRange", result);
  data_ = reinterpret_cast<char*>(base);
  return "";
}

std::string DeviceMemory::Export(ExportedMemory* memory) const {
  const Driver& driver = TheDriver();
  CUmemGenericAllocationHandle handle;
  CUresult result = driver.retain_handle(&handle, data_);
  if (result != CUDA_SUCCESS) return driver.Failed("cuMemRetainAllocationHandle", result);
  result = driver.export_handle(&memory->descriptor, handle,
                                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  driver.release(handle);
  memory->bytes = bytes_;
  return result == CUDA_SUCCESS ? "" : driver.Failed("cuMemExportToShareableHandle", result);
}

}  // namespace jax_deepep
