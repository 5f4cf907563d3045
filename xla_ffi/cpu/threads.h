// Threads of our own. XLA's are never blocked and never borrowed: see xla_ffi/README.md.
#ifndef JAX_DEEPEP_CPU_THREADS_H_
#define JAX_DEEPEP_CPU_THREADS_H_

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace jax_deepep {

// Run each task on a thread that nothing else waits for. A task may block for as long as it likes:
// there is always another thread for the next one. Idle threads are reused, then end. Returns
// false, and runs none of them, if the system does not give enough threads.
bool RunOnOwnThreads(std::vector<std::function<void()>> tasks);

// Make a thread that lasts as long as its owner; throws std::runtime_error, with what to do, if the
// system gives none.
std::thread MakeThread(std::function<void()> task);

// Let this thread take subnormal numbers for what they are. XLA's threads flush them to zero, and a
// new thread inherits that from the one that makes it.
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

// Call body(begin, end) over disjoint ranges that cover [0, count), on up to NumCores() threads
// as far as the system gives them, and return when all are done. `count * bytes_per_item` decides
// whether sharing pays; ranges are at least `grain` items.
void ParallelFor(int64_t count, int64_t grain, int64_t bytes_per_item,
                 const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_THREADS_H_
