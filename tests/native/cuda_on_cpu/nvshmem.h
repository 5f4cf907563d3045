// The functions of NVSHMEM that kernels use, on CPUs: puts that a thread carries out later, in any
// order up to the next fence. They read their source only then.
#ifndef JAX_DEEPEP_TESTS_CUDA_ON_CPU_NVSHMEM_H_
#define JAX_DEEPEP_TESTS_CUDA_ON_CPU_NVSHMEM_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace nvshmem_on_cpu {

// The symmetric memories of processes that put to each other.
class Memories {
 public:
  Memories();
  ~Memories();  // after what was put has arrived
  Memories(const Memories&) = delete;
  Memories& operator=(const Memories&) = delete;
  void Register(int process, char* memory, size_t bytes);

  // The place in another process's memory of an address in one of these; null if it is in none.
  // Sets `source` to the process whose address it is.
  char* Find(const void* address, int process, int* source) const;

 private:
  std::vector<std::pair<char*, size_t>> memories_;  // by process
};

}  // namespace nvshmem_on_cpu

void nvshmem_putmem_nbi(void* to, const void* from, size_t bytes, int process);
void nvshmem_fence();
void nvshmem_uint64_p(uint64_t* to, uint64_t value, int process);

enum { NVSHMEM_SIGNAL_SET };
// The signal comes after the bytes of its own put, and is ordered with no other.
void nvshmem_putmem_signal_nbi(void* to, const void* from, size_t bytes, uint64_t* signal,
                               uint64_t value, int operation, int process);

inline void nvshmemx_putmem_nbi_block(void* to, const void* from, size_t bytes, int process) {
  __syncthreads();
  if (threadIdx.x == 0) nvshmem_putmem_nbi(to, from, bytes, process);
  __syncthreads();
}
inline void nvshmemx_putmem_signal_nbi_block(void* to, const void* from, size_t bytes,
                                             uint64_t* signal, uint64_t value, int operation,
                                             int process) {
  __syncthreads();
  if (threadIdx.x == 0) {
    nvshmem_putmem_signal_nbi(to, from, bytes, signal, value, operation, process);
  }
  __syncthreads();
}

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_NVSHMEM_H_
