// Threads of CUDA blocks as coroutines on CPUs, so that kernels run, with all ranks at once, where there is no
// GPU. A block is a thread of the system; its threads take turns in it, in a random order, and yield at
// barriers, at collectives of their warp and at every load that may be part of a wait. A barrier that not all
// threads reach ends the program.
//
// It shows that kernels compute the right bits and that their waits end, in many orders. It shows nothing of
// speed, and little of the memory model: the CPU's own order holds.
#ifndef JAX_DEEPEP_TESTS_CUDA_ON_CPU_BLOCK_THREADS_H_
#define JAX_DEEPEP_TESTS_CUDA_ON_CPU_BLOCK_THREADS_H_

#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_on_cpu {

inline constexpr int kWarpSize = 32;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// The position of the calling thread.
struct Position {
  Index3 thread, block, block_size, grid_size;
};
const Position& Here();

// Run a kernel's body in all threads of all blocks; return when all have ended.
void RunGrid(int num_blocks, int num_threads, const std::function<void()>& body);

// Yield to other threads.
void GiveWay();

void SyncThreads();
bool SyncThreadsAnd(bool value);  // whether it is true for all threads of the block
void SyncWarp();
// Barriers of a number of threads of the block, by their numbers; arriving does not wait.
void WaitAtBarrier(int number, int num_threads);
void ArriveAtBarrier(int number, int num_threads);

// The words that the lanes of the warp, all of which call this, have passed.
const uint64_t* Exchange(uint64_t word);
int LanesOfWarp();

template <typename T>
const uint64_t* ExchangeValue(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return Exchange(word);
}

template <typename T>
T ValueOf(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

#endif  // JAX_DEEPEP_TESTS_CUDA_ON_CPU_BLOCK_THREADS_H_
