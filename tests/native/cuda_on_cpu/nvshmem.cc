#include "nvshmem.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace nvshmem_on_cpu {
namespace {

struct Put {
  char* to;
  const char* from;  // null: nothing is copied
  size_t bytes;
  char* flag;  // null: none
  uint64_t value;
};

using Clock = std::chrono::steady_clock;

struct Queue {
  std::vector<std::vector<Put>> batches;  // between fences
  Clock::time_point stalls_until;
};

// A thread's fence orders what it puts next after all earlier puts of the process that puts it.
thread_local bool fenced = false;

class Network {
 public:
  Network() : thread_([this] { CarryOut(); }) { thread_.detach(); }

  void Add(Memories* memories) {
    std::lock_guard<std::mutex> lock(mutex_);
    all_.insert(memories);
  }
  void Remove(Memories* memories) {
    while (true) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (num_waiting_ == 0) {
          all_.erase(memories);
          for (auto queue = queues_.begin(); queue != queues_.end();) {
            queue = queue->first.first == memories ? queues_.erase(queue) : std::next(queue);
          }
          return;
        }
      }
      std::this_thread::yield();
    }
  }
  // `flag`, or null, is in the same memory as `to`.
  void Append(const void* to, const char* from, size_t bytes, const void* flag, uint64_t value,
              int process) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Memories* memories : all_) {
      int source = 0;
      char* at = memories->Find(to, process, &source);
      if (at == nullptr) continue;
      int from_process = source;
      if (from != nullptr && memories->Find(from, process, &from_process) == nullptr) break;
      auto& batches = queues_[{memories, source}].batches;
      if (batches.empty() || (std::exchange(fenced, false) && !batches.back().empty())) {
        batches.emplace_back();
      }
      char* flag_at = flag == nullptr ? nullptr : memories->Find(flag, process, &source);
      batches.back().push_back({at, from, bytes, flag_at, value});
      ++num_waiting_;
      return;
    }
    std::fprintf(stderr, "a put between addresses that are not registered\n");
    std::abort();
  }

 private:
  // Take any put that need not wait for others.
  bool Take(std::mt19937* random, Put* put) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto now = Clock::now();
    std::vector<Queue*> ready;
    for (auto& [of, queue] : queues_) {
      auto& batches = queue.batches;
      while (batches.size() > 1 && batches.front().empty()) batches.erase(batches.begin());
      if (batches.empty() || batches.front().empty() || queue.stalls_until > now) continue;
      ready.push_back(&queue);
    }
    if (ready.empty()) return false;
    Queue& queue = *ready[(*random)() % ready.size()];
    // Now and then a process's puts wait for longer than an op takes.
    if ((*random)() % 50 == 0) {
      queue.stalls_until = now + std::chrono::milliseconds((*random)() % 100);
      return false;
    }
    std::vector<Put>& first = queue.batches.front();
    const size_t index = (*random)() % first.size();
    *put = first[index];
    first[index] = first.back();
    first.pop_back();
    return true;
  }

  void CarryOut() {
    std::mt19937 random(1);
    while (true) {
      Put put;
      if (!Take(&random, &put)) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        continue;
      }
      if (put.from != nullptr) {
        std::memcpy(put.to, put.from, put.bytes);
        std::atomic_thread_fence(std::memory_order_release);
      }
      if (put.flag != nullptr) {
        __atomic_store_n(reinterpret_cast<uint64_t*>(put.flag), put.value, __ATOMIC_RELEASE);
      }
      --num_waiting_;
      if (random() % 16 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(random() % 8));
    }
  }

  std::mutex mutex_;
  std::set<Memories*> all_;
  std::map<std::pair<Memories*, int>, Queue> queues_;  // by process
  std::atomic<int> num_waiting_{0};
  std::thread thread_;
};

Network& TheNetwork() {
  static auto* const network = new Network;
  return *network;
}

}  // namespace

Memories::Memories() { TheNetwork().Add(this); }
Memories::~Memories() { TheNetwork().Remove(this); }

void Memories::Register(int process, char* memory, size_t bytes) {
  if (memories_.size() <= static_cast<size_t>(process)) memories_.resize(process + 1);
  memories_[process] = {memory, bytes};
}

char* Memories::Find(const void* address, int process, int* source) const {
  const auto* at = static_cast<const char*>(address);
  for (size_t i = 0; i < memories_.size(); ++i) {
    const auto& [memory, bytes] = memories_[i];
    if (at < memory || at >= memory + bytes) continue;
    *source = static_cast<int>(i);
    return memories_[process].first + (at - memory);
  }
  return nullptr;
}

}  // namespace nvshmem_on_cpu

using nvshmem_on_cpu::TheNetwork;

void nvshmem_putmem_nbi(void* to, const void* from, size_t bytes, int process) {
  TheNetwork().Append(to, static_cast<const char*>(from), bytes, nullptr, 0, process);
}
void nvshmem_putmem_signal_nbi(void* to, const void* from, size_t bytes, uint64_t* signal,
                               uint64_t value, int /*operation*/, int process) {
  TheNetwork().Append(to, static_cast<const char*>(from), bytes, signal, value, process);
}
void nvshmem_fence() { nvshmem_on_cpu::fenced = true; }
void nvshmem_uint64_p(uint64_t* to, uint64_t value, int process) {
  TheNetwork().Append(to, nullptr, 0, to, value, process);
}
