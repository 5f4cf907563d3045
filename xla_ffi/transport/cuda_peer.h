// GPU memory that other processes of a host, and other GPUs of this one, can reach: through the
// virtual memory functions of the CUDA driver alone.
//
// Every allocation is exported as a file descriptor, also for the GPUs of this process: one way for
// all. XLA's pool is mapped by peers for reading only.
#ifndef JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_
#define JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace jax_deepep {

// An allocation of this process, as a descriptor that others can map.
struct ExportedMemory {
  int descriptor = -1;
  size_t bytes = 0;
  std::string gpu;  // the PCI address of its device; empty if unknown
  uint64_t id = 0;  // of the allocation, among those of all processes that ever were; 0 if unknown
};

// A range of device memory of this process's address space.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  ~DeviceMemory() { Unmap(); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Allocate zeros on a device, which is the current one. Returns an error, or nothing.
  std::string Create(int device, size_t bytes);

  // Map what another process, or this one, exported, for `devices` of this process. The descriptor
  // is not taken over.
  std::string Import(const ExportedMemory& memory, const std::vector<int>& devices, bool writable);

  // Find the allocation that `pointer` is in: XLA's pool. It is not owned.
  std::string Find(const void* pointer);

  std::string Export(ExportedMemory* memory) const;

  // End what Create or Import did, if anything; nothing may use the memory any more.
  void Unmap();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::string Map(unsigned long long handle, const std::vector<int>& devices, bool writable);

  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool mapped_ = false;
};

// Map memory that a process has exported, for reading, once for all in this process who ask for it
// with the same devices. Returns null and an error, or what keeps the mapping.
std::shared_ptr<DeviceMemory> ImportShared(const ExportedMemory& memory,
                                           const std::vector<int>& devices, std::string* error);

// The PCI address of the GPU that an address is on, or nothing.
std::string PciAddressOf(const void* pointer);

// What keeps `devices` of this process from memory of the GPU at a PCI address, as far as can be
// found out after that has failed, and what to do.
std::string WhyNoPeerAccess(const std::string& gpu, const std::vector<int>& devices);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_CUDA_PEER_H_
