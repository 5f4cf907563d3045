#include "cuda/remote_library.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

namespace jax_deepep {
namespace {

std::atomic<const RemoteTransport*> transport{nullptr};

}  // namespace

std::string LoadRemoteLibrary(const std::string& path, const std::string& source_digest) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (transport != nullptr) return "";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  using Function = const RemoteTransport* (*)();
  const auto find = reinterpret_cast<Function>(dlsym(library, "jax_deepep_remote_transport"));
  if (find == nullptr) return dlerror();
  const RemoteTransport* found = find();
  // The first field of all versions.
  if (source_digest != found->source_digest) {
    return path + " is of another build of jax_deepep; install the package again";
  }
  transport = found;
  return "";
}

const RemoteTransport* RemoteLibrary() { return transport; }

}  // namespace jax_deepep
