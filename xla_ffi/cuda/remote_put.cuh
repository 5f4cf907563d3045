// How a rank writes to another node, on the device: to the rank there with this rank's index, its
// peer. Every transport has these three functions, and its kernels are compiled with them;
// transport/remote_memory.h is its side on the host.
//
//     char* StagingOf(const OpFrame& frame, int node, char* to, char* from)
//
//     template <typename By>
//     void PutStaged(const OpFrame& frame, int node, char* to, char* from, int64_t bytes,
//                    uint64_t* flag = nullptr, uint64_t value = 0)
//
// Rows, and what belongs to them, are first written at StagingOf(..., to, from), by any threads of
// this rank: that is `from`, or already `to` on the peer. A block then puts them in one message.
//
//     template <typename By>
//     void PutFlag(const OpFrame& frame, int node, void* to, const void* from, int64_t bytes,
//                  uint64_t* flag = nullptr, uint64_t value = 0)
//
// Copies `bytes`, of this rank's control block.
//
// `to` and `flag`, in this rank's own memory, control block and what is behind it, stand for the
// same place of the peer's, and `from` is in it; `bytes` are a multiple of 2, and may be 0. `value`
// is stored in the flag, unless that is null: by PutStaged after its own bytes, by PutFlag after
// all that this rank has put before, puts of other threads if the caller has synchronised with
// them.
//
// If kPutsAreAsynchronous, what is put may be read until the peer has it, and must not change
// before.
#ifndef JAX_DEEPEP_CUDA_REMOTE_PUT_CUH_
#define JAX_DEEPEP_CUDA_REMOTE_PUT_CUH_

#include <cstdint>

#include "cuda/memory_order.cuh"
#include "cuda/op_frame.h"

namespace jax_deepep {

// Who copies or puts: all threads of a block or of a warp together, or one.
struct ByBlock {
  static constexpr int kInFlight = 4;  // words of a thread
  __device__ static int Index() { return threadIdx.x; }
  __device__ static int Size() { return blockDim.x; }
  __device__ static void Sync() { __syncthreads(); }
};
struct ByWarp {
  static constexpr int kInFlight = 8;
  __device__ static int Index() { return threadIdx.x % 32; }
  __device__ static int Size() { return 32; }
  __device__ static void Sync() { __syncwarp(); }
};
struct ByThread {
  static constexpr int kInFlight = 1;
  __device__ static int Index() { return 0; }
  __device__ static int Size() { return 1; }
  __device__ static void Sync() {}
};

template <typename By>
__device__ __forceinline__ void CopyWords(uint4* to, const uint4* from, int count) {
  for (int base = By::Index(); base < count; base += By::kInFlight * By::Size()) {
    uint4 words[By::kInFlight];
#pragma unroll
    for (int i = 0; i < By::kInFlight; ++i) {
      const int at = base + i * By::Size();
      if (at < count) words[i] = LoadOnce(from + at);
    }
#pragma unroll
    for (int i = 0; i < By::kInFlight; ++i) {
      const int at = base + i * By::Size();
      if (at < count) to[at] = words[i];
    }
  }
}

// The same for what is short, or not aligned.
template <typename By, typename Word>
__device__ __forceinline__ void CopyOneByOne(char* to, const char* from, int64_t bytes) {
  const auto* in = reinterpret_cast<const Word*>(from);
  auto* out = reinterpret_cast<Word*>(to);
#pragma unroll 1
  for (int64_t i = By::Index(); i < bytes / static_cast<int64_t>(sizeof(Word)); i += By::Size()) {
    out[i] = in[i];
  }
}

template <typename By>
__device__ __forceinline__ void CopyBytes(char* to, const char* from, int64_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
                    static_cast<uintptr_t>(bytes);
  if (bits % sizeof(uint4) == 0) {
    CopyWords<By>(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from),
                  static_cast<int>(bytes / static_cast<int64_t>(sizeof(uint4))));
  } else if (bits % sizeof(uint64_t) == 0) {
    CopyOneByOne<By, uint64_t>(to, from, bytes);
  } else {
    CopyOneByOne<By, uint16_t>(to, from, bytes);
  }
}

}  // namespace jax_deepep

#ifdef JAX_DEEPEP_NVSHMEM
#include "nvshmem/put.cuh"
#else
#include "cuda/internode/mapped_put.cuh"
#endif

#endif  // JAX_DEEPEP_CUDA_REMOTE_PUT_CUH_
