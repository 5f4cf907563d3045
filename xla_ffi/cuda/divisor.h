// Division by a number that the host knows before the kernel starts: a multiplication, whereas the
// compiler's integer division is a chain of some twenty dependent instructions.
#ifndef JAX_DEEPEP_CUDA_DIVISOR_H_
#define JAX_DEEPEP_CUDA_DIVISOR_H_

#include <cstdint>

#include "interface/host_device.h"

namespace jax_deepep {

// Exact for all values from 0 to 2^31 - 1 and all divisors from 1 to 2^31 - 1: Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994, section 4.
class Divisor {
 public:
  Divisor() = default;
  // 0 is treated as 1: without rows there is nothing to divide.
  explicit Divisor(int32_t divisor) : divisor_(divisor > 0 ? divisor : 1) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    multiplier_ =
        static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }

  JAX_DEEPEP_HOST_DEVICE int32_t divisor() const { return static_cast<int32_t>(divisor_); }
  JAX_DEEPEP_HOST_DEVICE int32_t Quotient(int32_t value) const {
    const auto n = static_cast<uint32_t>(value);
    const auto high = static_cast<uint32_t>(uint64_t{n} * multiplier_ >> 32);
    return static_cast<int32_t>((high + n) >> shift_);
  }
  JAX_DEEPEP_HOST_DEVICE int32_t Remainder(int32_t value) const {
    return value - Quotient(value) * divisor();
  }
  // The least multiple of the divisor that is not less than the value.
  JAX_DEEPEP_HOST_DEVICE int64_t RoundUp(int32_t value) const {
    const int32_t over = Remainder(value);
    return over == 0 ? value : int64_t{value} - over + divisor();
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DIVISOR_H_
