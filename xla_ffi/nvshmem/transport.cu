// Puts between nodes by NVSHMEM: this and the kernels of cuda/internode are a library of their own,
// with relocatable device code, that only communicators between hosts load.
//
// NVSHMEM exists once per process, with one GPU, which is a processing element (PE). It is never
// finalised: that waits for all PEs, and hangs if one is dead.
#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/internode/node_transport.h"
#include "cuda/remote_transport.h"
#include "source_digest.h"

namespace jax_deepep {
namespace {

constexpr int kInitialized = 2;  // of nvshmemx_init_status: this, or more

std::string Version() {
  int major = 0, minor = 0, patch = 0;
  nvshmemx_vendor_get_version_info(&major, &minor, &patch);
  return "NVSHMEM " + std::to_string(major) + "." + std::to_string(minor) + "." +
         std::to_string(patch);
}

// Whether kernels post to the network themselves.
bool UsesIbgda() {
  const char* value = std::getenv("NVSHMEM_IB_ENABLE_IBGDA");
  return value != nullptr && *value != '\0' && std::strchr("0nNfF", *value) == nullptr;
}

class NvshmemProcess : public RemoteProcess {
 public:
  std::string MakeId(std::string* id) override {
    nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (const int status = nvshmemx_get_uniqueid(&unique); status != 0) {
      return "nvshmemx_get_uniqueid failed: status " + std::to_string(status);
    }
    id->assign(reinterpret_cast<const char*>(&unique), sizeof(unique));
    return "";
  }

  std::string Init(const std::string& id, int process, int num_processes) override {
    if (std::string error = CheckIbgda(); !error.empty()) return error;
    if (nvshmemx_init_status() >= kInitialized) {
      if (ours_) return CompareWith(process, num_processes);
      // Its settings decide in which units memory is registered, and our kernels would not know it.
      return "other code of this process has initialised NVSHMEM, as PE " +
             std::to_string(nvshmem_my_pe()) + " of " + std::to_string(nvshmem_n_pes()) +
             "; make a communicator between hosts before that";
    }
    nvshmemx_uniqueid_t unique;
    if (id.size() != sizeof(unique)) return "the id of NVSHMEM has the wrong size";
    std::memcpy(&unique, id.data(), sizeof(unique));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    if (nvshmemx_set_attr_uniqueid_args(process, num_processes, &unique, &attributes) != 0) {
      return "nvshmemx_set_attr_uniqueid_args failed";
    }
    size_t free_before = 0, free_after = 0, total = 0;
    cudaMemGetInfo(&free_before, &total);
    // nvshmemx_init_attr would end the process if this fails.
    int provided = 0;
    const nvshmemi_version_t version = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                        NVSHMEM_VENDOR_PATCH_VERSION};
    nvshmemx_init_init_attr_ver_only(attributes);
    const int status = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided,
                                            NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, version);
    // It returns 0, too, if only the processes have found each other.
    if (status != 0 || nvshmemx_init_status() < kInitialized) {
      return "NVSHMEM could not be initialised (status " + std::to_string(status) +
             "); set NVSHMEM_DEBUG=INFO to see why";
    }
    ours_ = true;
    cudaMemGetInfo(&free_after, &total);
    taken_bytes_ = free_before > free_after ? free_before - free_after : 0;
    return CompareWith(process, num_processes);
  }

  std::string Describe() const {
    const char* transport = std::getenv("NVSHMEM_REMOTE_TRANSPORT");
    return "puts by " + Version() + " (transport " +
           (transport == nullptr ? "ibrc, the default" : transport) +
           "), initialised by jax_deepep, which took " + std::to_string(taken_bytes_ >> 20) +
           " MiB of GPU memory outside of XLA's pool";
  }

 private:
  // Kernels that post to the network themselves read tables whose layout releases have changed.
  static std::string CheckIbgda() {
    if (!UsesIbgda()) return "";
    int major = 0, minor = 0, patch = 0;
    nvshmemx_vendor_get_version_info(&major, &minor, &patch);
    if (major == NVSHMEM_VENDOR_MAJOR_VERSION && minor == NVSHMEM_VENDOR_MINOR_VERSION) return "";
    return "NVSHMEM_IB_ENABLE_IBGDA is set, for which jax_deepep must be built against the NVSHMEM "
           "that runs: built against " +
           std::to_string(NVSHMEM_VENDOR_MAJOR_VERSION) + "." +
           std::to_string(NVSHMEM_VENDOR_MINOR_VERSION) + ", got " + Version() +
           "; install jax_deepep again, or unset it";
  }

  // Only one initialisation of a process counts.
  static std::string CompareWith(int process, int num_processes) {
    const int pe = nvshmem_my_pe(), num_pes = nvshmem_n_pes();
    if (pe == process && num_pes == num_processes) return "";
    return "NVSHMEM is initialised in this process already, as PE " + std::to_string(pe) + " of " +
           std::to_string(num_pes) + ", where the mesh needs PE " + std::to_string(process) +
           " of " + std::to_string(num_processes) +
           "; make all communicators between hosts over meshes of the same processes";
  }

  bool ours_ = false;
  size_t taken_bytes_ = 0;
};

NvshmemProcess& TheProcess() {
  static auto* const process = new NvshmemProcess;  // outlives threads
  return *process;
}

class NvshmemMemory : public RemoteMemory {
 public:
  std::string Register(char* memory, size_t bytes) override {
    static bool failed = false;  // NVSHMEM gives up all of its memory then
    if (failed) {
      return "NVSHMEM of this process failed to register memory before, and is unusable since; "
             "restart the processes";
    }
    address_ = static_cast<char*>(nvshmemx_buffer_register_symmetric(memory, bytes, 0));
    if (address_ != nullptr) return "";
    failed = true;
    return "NVSHMEM cannot register " + std::to_string(bytes >> 20) +
           " MiB of the communicator for puts; set NVSHMEM_CUMEM_GRANULARITY=2M, and "
           "NVSHMEM_DEBUG=INFO to see why; restart the processes: NVSHMEM gives up all of its "
           "memory";
  }
  char* Address() const override { return address_; }
  char* FlagAddress(int /*node*/) const override { return nullptr; }
  // By a proxy, a signal is a put, a fence and an atomic operation, which ibrc with GDRCopy leaves
  // to the proxy of the receiver, and UCX emulates.
  bool HasSignals() const override { return UsesIbgda(); }
  std::string Describe() const override { return TheProcess().Describe(); }

 private:
  char* address_ = nullptr;
};

}  // namespace
}  // namespace jax_deepep

#define JAX_DEEPEP_EXPORT extern "C" __attribute__((visibility("default")))

// Initialise NVSHMEM in this process alone, on a GPU: for a process that only tries that. Returns
// an error or null.
JAX_DEEPEP_EXPORT const char* jax_deepep_nvshmem_probe(int device) {
  static std::string error;
  if (const cudaError_t status = cudaSetDevice(device); status != cudaSuccess) {
    return cudaGetErrorString(status);
  }
  std::string id;
  error = jax_deepep::TheProcess().MakeId(&id);
  if (error.empty()) error = jax_deepep::TheProcess().Init(id, 0, 1);
  return error.empty() ? nullptr : error.c_str();
}

JAX_DEEPEP_EXPORT const jax_deepep::RemoteTransport* jax_deepep_remote_transport() {
  using namespace jax_deepep;
  static const RemoteTransport transport = NodeTransport<NvshmemMemory>(
      JAX_DEEPEP_SOURCE_DIGEST, []() -> RemoteProcess* { return &TheProcess(); });
  return &transport;
}
