// GPU memory that other processes of a host, and other GPUs of this process, can access: through
// the virtual memory functions of the CUDA driver.
//
// Every allocation is exported as a file descriptor, even for the GPUs of this process. XLA's pool
// is mapped by peers for reading only.
#ifndef JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_
#define JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace jax_deepep {

// An allocation as a descriptor that other processes can map.
struct ExportedMemory {
  int descriptor = -1;
  size_t bytes = 0;
  std::string gpu;  // the PCI address of its device; empty if unknown
  uint64_t id = 0;  // unique over all processes; 0 if unknown
};

// A range of device memory of this process's address space.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { Unmap(); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Allocate zeros on a device, which is the current one. Returns an error, or empty.
  std::string Create(int device, size_t bytes);

  // Map what another process, or this one, exported, for `devices` of this process. Does not
  // take ownership of the descriptor.
  std::string Import(const ExportedMemory& memory, const std::vector<int>& devices, bool writable);

  // Find the allocation that `pointer` is in: XLA's pool. It is not owned.
  std::string Find(const void* pointer);

  std::string Export(ExportedMemory* memory) const;

  // Undo Create or Import; the memory must no longer be in use.
  void Unmap();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::string Map(unsigned long long handle, const std::vector<int>& devices, bool writable);

  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool mapped_ = false;
};

// Map memory that a process has exported, for reading; callers in this process with the same
// devices share the mapping. Returns null and an error, or the mapping.
std::shared_ptr<DeviceMemory> ImportShared(const ExportedMemory& memory,
                                           const std::vector<int>& devices, std::string* error);

// The PCI address of the GPU that an address is on, or empty.
std::string PciAddressOf(const void* pointer);

// Why `devices` of this process cannot access memory of the GPU at a PCI address, as far as can be
// determined after a failure, and a remedy.
std::string WhyNoPeerAccess(const std::string& gpu, const std::vector<int>& devices);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_
