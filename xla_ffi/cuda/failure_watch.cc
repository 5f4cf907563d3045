#include "cuda/failure_watch.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/communicator.h"
#include "interface/error_text.h"

namespace jax_deepep {
namespace {

// A check reads two words per rank of this process.
constexpr std::chrono::milliseconds kCheckInterval(100);

class Watch {
 public:
  static Watch& Get() {
    static Watch* const watch = new Watch;  // outlives every thread
    return *watch;
  }

  void Add(const CudaCommunicator* comm) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_.push_back(comm);
    changed_.notify_one();
    if (running_) return;
    try {
      std::thread([this] { Loop(); }).detach();
      running_ = true;
      std::atexit([] { Get().EndWithProcess(); });
    } catch (const std::system_error&) {
    }
  }

  void Remove(const CudaCommunicator* comm) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = std::find(watched_.begin(), watched_.end(), comm);
    if (found == watched_.end()) return;
    watched_.erase(found);
    const std::string text = comm->broken();
    lock.unlock();
    if (!text.empty()) PrintToStderr(text);
  }

  // The driver may free the memory in which devices report failures.
  void EndWithProcess() {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_.clear();
  }

 private:
  void Loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !watched_.empty(); });
      std::vector<std::string> texts;
      const auto is_broken = [&texts](const CudaCommunicator* comm) {
        std::string text = comm->broken();
        const bool broken = !text.empty();
        if (broken) texts.push_back(std::move(text));
        return broken;
      };
      watched_.erase(std::remove_if(watched_.begin(), watched_.end(), is_broken), watched_.end());
      lock.unlock();  // writing to stderr may be slow
      for (const std::string& text : texts) PrintToStderr(text);
      lock.lock();
      changed_.wait_for(lock, kCheckInterval);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const CudaCommunicator*> watched_;
  bool running_ = false;
};

}  // namespace

void WatchForFailure(const CudaCommunicator* comm) { Watch::Get().Add(comm); }

void StopWatching(const CudaCommunicator* comm) { Watch::Get().Remove(comm); }

}  // namespace jax_deepep
