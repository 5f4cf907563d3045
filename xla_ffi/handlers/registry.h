// Communicators by the ids that programs have for them.
#ifndef JAX_DEEPEP_HANDLERS_REGISTRY_H_
#define JAX_DEEPEP_HANDLERS_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace jax_deepep {

template <typename Communicator>
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::weak_ptr<Communicator>> by_id;

  static Registry& Get() {
    static Registry* const registry = new Registry;  // outlives every thread
    return *registry;
  }
};

// Register a communicator by its id, for as long as it lives. An id is used once per process, so
// that an old program cannot use a new communicator. Throws std::runtime_error if it was used
// before.
template <typename Communicator>
void Register(const std::shared_ptr<Communicator>& comm) {
  auto& registry = Registry<Communicator>::Get();
  std::lock_guard<std::mutex> lock(registry.mutex);
  const int64_t id = comm->config().id;
  if (!registry.by_id.emplace(id, comm).second) {
    throw std::runtime_error("communicator #" + std::to_string(id) +
                             ": expected an id that is new in this process; make communicators by "
                             "their constructor, which assigns ids");
  }
}

// The communicator that a program names, or null with the reason in `unsupported_reason`.
template <typename Communicator>
std::shared_ptr<Communicator> FindCommunicator(int64_t id, int64_t fingerprint,
                                               std::string* unsupported_reason) {
  std::shared_ptr<Communicator> comm;
  {
    auto& registry = Registry<Communicator>::Get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    if (const auto found = registry.by_id.find(id); found != registry.by_id.end()) {
      comm = found->second.lock();
    }
  }
  const std::string name = "communicator #" + std::to_string(id);
  if (comm == nullptr) {
    *unsupported_reason =
        "this program uses " + name +
        ", which does not exist (or no longer exists) in this process; make the "
        "same communicators in the same order as the process that traced the program";
  } else if (comm->config().fingerprint != fingerprint) {
    *unsupported_reason =
        "this program uses " + name +
        ", which was made with other arguments here than where the program was traced; make "
        "the same communicators in the same order";
    comm = nullptr;
  }
  return comm;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_REGISTRY_H_
