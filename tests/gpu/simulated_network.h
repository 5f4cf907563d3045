// The memory that ranks of cuda_ranks.cu put to other nodes, where NVSHMEM is simulated: see
// tests/native/cuda_on_cpu/nvshmem.h. Elsewhere it does nothing.
#ifndef JAX_DEEPEP_TESTS_GPU_SIMULATED_NETWORK_H_
#define JAX_DEEPEP_TESTS_GPU_SIMULATED_NETWORK_H_

#include <cstddef>

#ifdef JAX_DEEPEP_NVSHMEM
#include "nvshmem.h"
using SimulatedNetwork = nvshmem_on_cpu::Memories;
#else
struct SimulatedNetwork {
  void Register(int /*process*/, char* /*memory*/, size_t /*bytes*/) {}
};
#endif

#endif  // JAX_DEEPEP_TESTS_GPU_SIMULATED_NETWORK_H_
