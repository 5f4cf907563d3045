// The library that carries puts between hosts, which is loaded when a communicator needs it.
#ifndef JAX_DEEPEP_CUDA_REMOTE_LIBRARY_H_
#define JAX_DEEPEP_CUDA_REMOTE_LIBRARY_H_

#include <string>

#include "cuda/remote_transport.h"

namespace jax_deepep {

// Load the library at `path`, of the same sources as this one; again it does nothing. Returns an
// error, or empty.
std::string LoadRemoteLibrary(const std::string& path, const std::string& source_digest);

// Its transport; null if it is not loaded.
const RemoteTransport* RemoteLibrary();

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_REMOTE_LIBRARY_H_
