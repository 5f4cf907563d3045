// Which entries a sender omits, so that no group of experts gets more than the sender's share of
// what it has room for.
#ifndef JAX_DEEPEP_ROUTER_FAIR_SHARE_H_
#define JAX_DEEPEP_ROUTER_FAIR_SHARE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_deepep {

// A block has a code of 16 bits of each entry in shared memory, eight of which are one load.
inline constexpr int kMostSharedEntries = 80 << 10;
inline constexpr int kFairShareStaticBytes = 128;  // of the block besides
constexpr int SharedBytesOfEntries(int entries) { return (entries + 7) / 8 * 16; }
constexpr int EntriesOfSharedBytes(int bytes) { return bytes / 16 * 8; }

// Each group of experts_per_group consecutive experts keeps its share of entries, those of the
// highest weights, of which 16 bits are compared, the lower index first; the others become -1.
// Entries of no group stay as they are. The share of group g is `share`, and one more if
// (g + *rank) % num_ranks < rest.
struct FairShare {
  int32_t* topk_idx;     // [num_entries]
  const float* weights;  // [num_entries]
  const int32_t* rank;
  int32_t num_entries;  // at most what LoadFairShare was called for
  int32_t num_groups;
  int32_t experts_per_group;
  int32_t share;  // at least 1
  int32_t rest;
  int32_t num_ranks;
};

// These return null, or what went wrong. Load: for entries in up to so many bytes.
const char* LoadFairShare(int shared_bytes);
const char* LaunchFairShare(const FairShare& op, cudaStream_t stream);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_ROUTER_FAIR_SHARE_H_
