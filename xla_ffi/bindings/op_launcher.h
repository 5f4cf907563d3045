// How the module _cuda_bench launches ops of communicators of the module _cuda: the modules are
// linked separately and must be from one build.
#ifndef JAX_DEEPEP_BINDINGS_OP_LAUNCHER_H_
#define JAX_DEEPEP_BINDINGS_OP_LAUNCHER_H_

#include <initializer_list>
#include <string>

#include "cuda/communicator.h"

namespace jax_deepep {

// CudaCommunicator::LaunchOp.
using OpLauncher = std::string (*)(CudaCommunicator& comm, const OpSignature& op,
                                   const OpBytes& bytes,
                                   std::initializer_list<PeerArray> read_by_peers,
                                   const OpLaunch& launch,
                                   const CudaCommunicator::Enqueue& enqueue);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BINDINGS_OP_LAUNCHER_H_
