#include "cuda/failure_watch.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cuda/communicator.h"
#include "interface/error_text.h"

namespace jax_deepep {
namespace {

// A look reads two words for each rank of this process.
constexpr std::chrono::milliseconds kBetweenLooks(100);

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
    } catch (const std::system_error&) {
    }
  }

  void Remove(const CudaCommunicator* comm) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find(watched_.begin(), watched_.end(), comm);
    if (found == watched_.end()) return;
    PrintIfBroken(**found);
    watched_.erase(found);
  }

 private:
  void Loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !watched_.empty(); });
      watched_.erase(
          std::remove_if(watched_.begin(), watched_.end(),
                         [](const CudaCommunicator* comm) { return PrintIfBroken(*comm); }),
          watched_.end());
      changed_.wait_for(lock, kBetweenLooks);
    }
  }

  static bool PrintIfBroken(const CudaCommunicator& comm) {
    const std::string text = comm.broken();
    if (!text.empty()) TellOnStderr(text);
    return !text.empty();
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
