// Whether this process was stopped for a while: by a signal, with its container, or with its host.
#ifndef JAX_DEEPEP_CPU_STOP_DETECTOR_H_
#define JAX_DEEPEP_CPU_STOP_DETECTOR_H_

#include <chrono>

namespace jax_deepep {

// Who waits for others with a deadline looks at least every kLongestSleep. If so much more time has
// passed since its last look, the process was stopped, and what others sent in that time may not
// have been received yet: they are not to be blamed before it is.
class StopDetector {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr std::chrono::milliseconds kLongestSleep{500};
  static constexpr std::chrono::seconds kStopped{1};
  static constexpr std::chrono::seconds kCatchUp{2};

  explicit StopDetector(Clock::time_point begin) : looked_(begin), deadline_(begin) {}

  // Returns the earliest time at which a wait may end because of its deadline.
  Clock::time_point Look(Clock::time_point now) {
    if (now - looked_ > kLongestSleep + kStopped) deadline_ = now + kCatchUp;
    looked_ = now;
    return deadline_;
  }

 private:
  Clock::time_point looked_;
  Clock::time_point deadline_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_STOP_DETECTOR_H_
