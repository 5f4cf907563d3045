// Our own threads. XLA's are never blocked or used: see xla_ffi/README.md.
#ifndef JAX_DEEPEP_CPU_THREADS_H_
#define JAX_DEEPEP_CPU_THREADS_H_

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace jax_deepep {

// Run each task on a separate thread, so that it may block: every task gets a thread. Idle threads
// are reused, then end. Returns false, and runs no task, if the system has too few threads.
bool RunOnOwnThreads(std::vector<std::function<void()>> tasks);

// Start a thread that lives as long as its owner; throws std::runtime_error, with a remedy, if that
// fails.
std::thread MakeThread(std::function<void()> task);

// Keep subnormal numbers on this thread. XLA's threads flush them to zero, and a new thread
// inherits that from the thread that starts it.
void KeepSubnormals();

// Flush subnormal numbers to zero on this thread, as XLA's own threads do, while this exists.
class FlushSubnormals {
 public:
  FlushSubnormals();
  ~FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned int before_ = 0;
};

// Cores that this process may use.
int NumCores();

// Call body(begin, end) over disjoint ranges that cover [0, count), on up to NumCores() threads,
// or fewer if the system has no more, and return when all are done. Runs on one thread if
// `count * bytes_per_item` is small; ranges are at least `grain` items.
void ParallelFor(int64_t count, int64_t grain, int64_t bytes_per_item,
                 const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_THREADS_H_
