// What carries the puts of GPU ranks between nodes, with the kernels that are compiled for it.
#ifndef JAX_DEEPEP_CUDA_REMOTE_TRANSPORT_H_
#define JAX_DEEPEP_CUDA_REMOTE_TRANSPORT_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/kernels.h"
#include "cuda/op_frame.h"
#include "transport/remote_memory.h"

namespace jax_deepep {

struct RemoteTransport {
  // Of the sources that it was built from: those of the module that loads it must be the same.
  const char* source_digest;
  bool puts_are_asynchronous;

  // The kernels of a mode for groups of several nodes. All launches return an error or null.
  const KernelSet& (*kernels)(Mode mode);
  const char* (*load)(int max_shared_bytes);  // of the two that follow
  // As LaunchAbort of cuda/rank_kernels.h.
  const char* (*abort)(const OpFrame& frame, Failure failure, cudaStream_t stream);
  // Put a word to the peers on all other nodes, and wait for theirs, at most frame.timeout_ns;
  // of a peer whose word does not come, set frame.status->unreachable to 1 + its rank.
  const char* (*test_nodes)(const OpFrame& frame, uint64_t word, cudaStream_t stream);

  // Of the process. Returns an error, or empty.
  RemoteProcess* (*process)();  // null: there is nothing to connect
  // Of a rank.
  std::unique_ptr<RemoteMemory> (*make_memory)();
};

// Over memory that is mapped here: nodes that are declared, of one host.
const RemoteTransport& MappedTransport();

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_REMOTE_TRANSPORT_H_
