// The parts of CUDA that kernels and their tests use, on CPUs: see block_threads.h. Needs no CUDA toolkit.
#ifndef JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_RUNTIME_H_
#define JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_RUNTIME_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "block_threads.h"

#define __host__
#define __device__
#define __global__
#define __shared__ thread_local  // a block is a thread of the system
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline
#define __noinline__

#define threadIdx (::cuda_on_cpu::Here().thread)
#define blockIdx (::cuda_on_cpu::Here().block)
#define blockDim (::cuda_on_cpu::Here().block_size)
#define gridDim (::cuda_on_cpu::Here().grid_size)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  explicit dim3(unsigned x) : x(x) {}
  unsigned x;
};

using std::max;
using std::min;

// --- The host's side.

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaHostAllocPortable = 1;

cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemset(void* memory, int value, size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);  // waits for it
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream);  // only used on GPUs: see cuda_ranks.cu
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_on_cpu {

// Enqueue work on a stream.
void Enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace cuda_on_cpu

// --- The device's.

inline void __syncthreads() { cuda_on_cpu::SyncThreads(); }
inline bool __syncthreads_and(bool value) { return cuda_on_cpu::SyncThreadsAnd(value); }
inline void __syncwarp() { cuda_on_cpu::SyncWarp(); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Of whole warps: every lane takes part.
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_cpu::ValueOf<T>(cuda_on_cpu::ExchangeValue(value)[from % cuda_on_cpu::kWarpSize]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % cuda_on_cpu::kWarpSize;
  const uint64_t* words = cuda_on_cpu::ExchangeValue(value);
  return lane >= distance ? cuda_on_cpu::ValueOf<T>(words[lane - distance]) : value;
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % cuda_on_cpu::kWarpSize;
  const uint64_t* words = cuda_on_cpu::ExchangeValue(value);
  return lane + distance < cuda_on_cpu::kWarpSize ? cuda_on_cpu::ValueOf<T>(words[lane + distance]) : value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, (threadIdx.x % cuda_on_cpu::kWarpSize) ^ distance);
}

namespace cuda_on_cpu {

template <typename T, typename Add>
T Reduce(T value, Add add) {
  const uint64_t* words = ExchangeValue(value);
  T result = ValueOf<T>(words[0]);
  for (int lane = 1; lane < LanesOfWarp(); ++lane) result = add(result, ValueOf<T>(words[lane]));
  return result;
}

}  // namespace cuda_on_cpu

template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t* words = cuda_on_cpu::ExchangeValue(value);
  unsigned same = 0;
  for (int lane = 0; lane < cuda_on_cpu::LanesOfWarp(); ++lane) {
    same |= static_cast<unsigned>(cuda_on_cpu::ValueOf<T>(words[lane]) == value) << lane;
  }
  return same;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const unsigned own = static_cast<unsigned>(value) << (threadIdx.x % cuda_on_cpu::kWarpSize);
  return cuda_on_cpu::Reduce(own, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, !value) == 0; }
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return cuda_on_cpu::Reduce(value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return cuda_on_cpu::Reduce(value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T __reduce_or_sync(unsigned, T value) {
  return cuda_on_cpu::Reduce(value, [](T a, T b) { return a | b; });
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::ValueOf<float>(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// Of the two halves of 16 bits each.
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return std::min(a & 0xffffu, b & 0xffffu) | std::min(a >> 16, b >> 16) << 16;
}
// Of the bytes of both words, those whose indices `selector` has, four bits each.
inline unsigned __byte_perm(unsigned first, unsigned second, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(second) << 32 | first;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  }
  return result;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T, typename Value>
T atomicAdd(T* address, Value value) {
  return __atomic_fetch_add(address, static_cast<T>(value), __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <typename T, typename Value>
T atomicCAS(T* address, Value compare, Value value) {
  T expected = static_cast<T>(compare);
  cuda_on_cpu::GiveWay();
  __atomic_compare_exchange_n(address, &expected, static_cast<T>(value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_CUDA_RUNTIME_H_
