// The mode for few tokens: ranks push rows into each other's windows, with one message per op and
// peer. Results are bitwise those of throughput mode, except for the handle: `destination` is the
// rank of the expert, dropped or not, and line 1 + i of `pairs` belongs to slot i = source * max(T,
// 1) + token.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_LOW_LATENCY_H_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_LOW_LATENCY_H_

#include <algorithm>
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/low_latency/window.h"
#include "interface/op_signature.h"

namespace jax_deepep {

// See KernelSet. The kernels of a verb are in <verb>.cu.
struct LowLatency {
  static constexpr Mode kMode = Mode::kLowLatency;
  static constexpr int64_t kFlags = OpSignature::kLowLatency;
  static constexpr bool kReadsPeers = false;
  static int64_t WindowBytes(const GroupShape& shape, const WindowSize& size) {
    const WindowLayout window(shape, size);
    return window.offset - static_cast<int64_t>(ControlBytes(shape)) + window.bytes();
  }
  static int64_t LeastSharedBytes(const GroupShape& shape, const WindowSize& size);
  // More blocks gain nothing, and each takes time to begin and to end: on two H200, a pair of one
  // token per rank takes 0.94 of the time with 32 blocks instead of 96.
  static int NumBlocks(const OpBytes& bytes, int most) {
    constexpr int64_t kBytesPerBlock = 2 << 10, kLeast = 32, kMost = 96;
    const int64_t worth = bytes.local / kBytesPerBlock;
    return static_cast<int>(std::min<int64_t>(most, std::clamp(worth, kLeast, kMost)));
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_LOW_LATENCY_H_
