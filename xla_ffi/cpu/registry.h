// From the ids in programs to communicators.
#ifndef JAX_DEEPEP_CPU_REGISTRY_H_
#define JAX_DEEPEP_CPU_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cpu/communicator.h"

namespace jax_deepep {

// Make a communicator known by its id, for as long as someone holds it. An id is used once in the
// life of a process, so that an old program cannot meet a new communicator.
void Register(const std::shared_ptr<Communicator>& comm);

// The communicator that a program names, or null with the reason in `why_not`.
std::shared_ptr<Communicator> FindCommunicator(int64_t id, int64_t fingerprint,
                                               std::string* why_not);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_REGISTRY_H_
