// The memory through which ranks of different processes exchange rows, and its layout.
#ifndef JAX_DEEPEP_CPU_WINDOWS_H_
#define JAX_DEEPEP_CPU_WINDOWS_H_

#include <cstddef>
#include <cstdint>

#include "interface/geometry.h"

namespace jax_deepep {

// Rounded up to whole cache lines, the unit of the layout of shared memory.
inline size_t Aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The memory of one rank that other processes of its node read. All of it is written by the rank's
// own process.
struct RankWindow {
  char* x = nullptr;                 // [max_tokens] rows on the wire
  int32_t* entries = nullptr;        // [max_tokens, K] topk_idx, or destination
  float* entry_weights = nullptr;    // [max_tokens, K]
  char* sums = nullptr;              // [R, max_tokens] likewise, p_d of every rank's tokens
  float* entry_gradients = nullptr;  // [R, max_tokens, K]

  static size_t Bytes(const GroupShape& shape);
  static RankWindow At(char* memory, const GroupShape& shape);
};

// The memory of one rank, which its node reads, for its peer: the rank with its index on one other
// node.
struct NodeWindow {
  // A copy of the peer's tokens, which the peer writes: the rows that this node needs at their
  // positions in x.
  RankWindow tokens;            // without sums
  int64_t* num_rows = nullptr;  // [] rows of x that came
  // The sums over the peer's node of this rank's tokens, which the peer writes.
  char* sums = nullptr;              // [max_tokens] rows on the wire
  float* entry_gradients = nullptr;  // [max_tokens, K]
  // The sums over this node of the peer's tokens, which this rank sends there.
  char* sums_to_send = nullptr;              // [max_tokens]
  float* entry_gradients_to_send = nullptr;  // [max_tokens, K]

  static size_t Bytes(const GroupShape& shape);
  static NodeWindow At(char* memory, const GroupShape& shape);
};

// The regions that a process of another node may write, see TcpMemory: the copy of its
// ControlBlock, and the NodeWindows for its ranks, in their order.
inline constexpr int kControlRegion = 0;
inline constexpr int kWindowRegion = 1;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_WINDOWS_H_
