#include "cpu/threads.h"

#include <sched.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace jax_deepep {
namespace {

constexpr std::chrono::seconds kIdleLifetime(20);

// Below this much memory traffic, waking a second thread costs more than it saves.
constexpr int64_t kBytesWorthSharing = 128 << 10;

#if defined(__x86_64__)
// Bits of MXCSR: flush to zero, denormals are zero.
constexpr unsigned int kFlushing = 0x8000 | 0x40;
#endif

class OwnThreads {
 public:
  bool Run(std::vector<std::function<void()>> tasks) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (num_free_ < static_cast<int>(tasks.size())) {
      try {
        std::thread([this] { Loop(); }).detach();
      } catch (const std::system_error&) {
        return false;
      }
      ++num_free_;
    }
    num_free_ -= static_cast<int>(tasks.size());
    for (std::function<void()>& task : tasks) {
      tasks_.push_back(std::move(task));
      wake_.notify_one();
    }
    return true;
  }

 private:
  void Loop() {
    KeepSubnormals();
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (!wake_.wait_for(lock, kIdleLifetime, [this] { return !tasks_.empty(); })) {
        --num_free_;
        return;
      }
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;  // what it captured is released outside the lock
      lock.lock();
      ++num_free_;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;  // each has a free thread reserved
  int num_free_ = 0;                         // idle threads not reserved
};

}  // namespace

bool RunOnOwnThreads(std::vector<std::function<void()>> tasks) {
  // Never destroyed: detached threads may outlive static destructors.
  static OwnThreads* const threads = new OwnThreads;
  return threads->Run(std::move(tasks));
}

std::thread MakeThread(std::function<void()> task) {
  try {
    return std::thread(std::move(task));
  } catch (const std::system_error& error) {
    throw std::runtime_error(std::string("no thread could be started (") + error.what() +
                             "); raise the limit on processes and threads (ulimit -u, or pids.max "
                             "of the container)");
  }
}

void KeepSubnormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() & ~kFlushing);
#endif
}

FlushSubnormals::FlushSubnormals() {
#if defined(__x86_64__)
  before_ = _mm_getcsr();
  _mm_setcsr(before_ | kFlushing);
#endif
}

FlushSubnormals::~FlushSubnormals() {
#if defined(__x86_64__)
  _mm_setcsr(before_);
#endif
}

int NumCores() {
  static const int num_cores = [] {
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return std::max(1, CPU_COUNT(&mask));
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  }();
  return num_cores;
}

void ParallelFor(int64_t count, int64_t grain, int64_t bytes_per_item,
                 const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t num_ranges = (count + grain - 1) / grain;
  const int num_threads = count * bytes_per_item < kBytesWorthSharing
                              ? 1
                              : static_cast<int>(std::min<int64_t>(NumCores(), num_ranges));

  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_left;
    int num_inside = 0;
  } shared;
  auto work = [&shared, &body, grain, count] {
    while (true) {
      const int64_t begin = shared.next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(begin + grain, count));
    }
  };
  const auto help = [&shared, &work] {
    work();
    // Under the lock, because `shared` is destroyed once the waiter sees the last helper leave.
    std::lock_guard<std::mutex> lock(shared.mutex);
    if (--shared.num_inside == 0) shared.all_left.notify_one();
  };
  for (int helper = 1; helper < num_threads; ++helper) {
    {
      std::lock_guard<std::mutex> lock(shared.mutex);
      ++shared.num_inside;
    }
    if (RunOnOwnThreads({help})) continue;
    std::lock_guard<std::mutex> lock(shared.mutex);
    --shared.num_inside;  // fewer helpers will do
    break;
  }
  work();
  std::unique_lock<std::mutex> lock(shared.mutex);
  shared.all_left.wait(lock, [&shared] { return shared.num_inside == 0; });
}

}  // namespace jax_deepep
