#include "transport/cuda_peer.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <tuple>

#include "transport/cuda_driver.h"

namespace jax_deepep {
namespace {

CUmemAllocationProp ExportableOn(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  // Without this, network cards may be unable to access it.
  int capable = 0;  // a CUdevice is an ordinal
  if (TheDriver().get_attribute(&capable,
                                CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                                device) == CUDA_SUCCESS) {
    properties.allocFlags.gpuDirectRDMACapable = capable != 0;
  }
  return properties;
}

// The driver numbers the allocations of a process; a random number distinguishes processes, even
// restarted ones.
uint64_t IdOfAllocation(const void* data) {
  static const uint64_t process = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  unsigned long long number = 0;
  const CUresult result = TheDriver().get_pointer_attribute(&number, CU_POINTER_ATTRIBUTE_BUFFER_ID,
                                                            reinterpret_cast<CUdeviceptr>(data));
  return result == CUDA_SUCCESS && number != 0 ? process + number : 0;
}

}  // namespace

std::shared_ptr<DeviceMemory> ImportShared(const ExportedMemory& memory,
                                           const std::vector<int>& devices, std::string* error) {
  using Key = std::tuple<uint64_t, std::string, std::vector<int>>;
  static std::mutex mutex;
  static auto* const mapped = new std::map<Key, std::weak_ptr<DeviceMemory>>;  // outlives threads
  std::lock_guard<std::mutex> lock(mutex);
  const Key key{memory.id, memory.gpu, devices};
  if (const auto found = mapped->find(key); memory.id != 0 && found != mapped->end()) {
    if (auto shared = found->second.lock()) return shared;
  }
  auto shared = std::make_shared<DeviceMemory>();
  *error = shared->Import(memory, devices, /*writable=*/false);
  if (!error->empty()) return nullptr;
  (*mapped)[key] = shared;
  return shared;
}

std::string PciAddressOf(const void* pointer) {
  cudaPointerAttributes attributes;
  char address[32] = "";
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess ||
      cudaDeviceGetPCIBusId(address, sizeof(address), attributes.device) != cudaSuccess) {
    cudaGetLastError();  // clear it
    return "";
  }
  return address;
}

void DeviceMemory::Unmap() {
  if (!mapped_) return;
  // Errors are ignored: at exit the driver may be gone already.
  const auto address = reinterpret_cast<CUdeviceptr>(data_);
  TheDriver().unmap(address, bytes_);
  TheDriver().free_address(address, bytes_);
  mapped_ = false;
  data_ = nullptr;
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
  cudaError_t cleared = cudaMemset(data_, 0, bytes_);
  // Wait for it, because it must not clear what a peer writes.
  if (cleared == cudaSuccess) cleared = cudaStreamSynchronize(nullptr);
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
  memory->gpu = PciAddressOf(data_);
  memory->id = IdOfAllocation(data_);
  return result == CUDA_SUCCESS ? "" : driver.Failed("cuMemExportToShareableHandle", result);
}

std::string WhyNoPeerAccess(const std::string& gpu, const std::vector<int>& devices) {
  if (gpu.empty()) return "its GPU is not known";
  int owner = 0;
  if (cudaDeviceGetByPCIBusId(&owner, gpu.c_str()) != cudaSuccess) {
    cudaGetLastError();  // clear it
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return "it is on GPU " + gpu + ", which this process does not see (CUDA_VISIBLE_DEVICES" +
           (visible == nullptr ? " is not set" : "=" + std::string(visible)) +
           "): let every process see all GPUs of the host, and give each its own by "
           "jax.distributed.initialize(local_device_ids=...), as python -m jax_deepep.launch does";
  }
  for (const int device : devices) {
    int possible = 0;
    if (device == owner ||
        (cudaDeviceCanAccessPeer(&possible, device, owner) == cudaSuccess && possible != 0)) {
      continue;
    }
    return "GPU " + std::to_string(device) + " has no peer access to GPU " + std::to_string(owner) +
           ": use GPUs connected by NVLink or PCIe (nvidia-smi topo -p2p r lists them)";
  }
  return "it is on GPU " + gpu + ", to which there is peer access";
}

}  // namespace jax_deepep
