// What the steps of dispatch share: the op, and the sources' records of their entries.
#ifndef JAX_DEEPEP_CUDA_DISPATCH_OP_CUH_
#define JAX_DEEPEP_CUDA_DISPATCH_OP_CUH_

#include <cstdint>

#include "cuda/divisor.h"
#include "cuda/op_frame.h"
#include "interface/dispatch.h"

namespace jax_deepep {

// What a source writes about each of its entries, for the ranks that pull the token.
struct alignas(16) EntryRecord {
  int32_t expert;    // or kNone for an ignored entry
  int32_t position;  // among this source's entries of the row group
  float weight;
  int32_t pair;  // before step 2: the position of its token in the list of the rank, or kNone
};

// Operands that peers read.
enum { kRows, kRecords, kLists };

struct Dispatch {
  OpFrame frame;
  DispatchParams params;
  int64_t row_bytes;
  WireRow wire;
  Divisor local_experts, topk, alignment, num_warps;
  int count_warps;  // warps of a block that count, limited by shared memory for counters

  __device__ int RankOf(int32_t expert) const { return local_experts.Quotient(expert); }
};

// The scratch of an op.
__device__ inline EntryRecord* Records(const Dispatch& op) {
  return reinterpret_cast<EntryRecord*>(op.params.scratch);
}
__device__ inline int32_t* TokenList(const Dispatch& op, int rank) {
  const int64_t entries = int64_t{op.params.route.num_tokens} * op.frame.shape.num_topk;
  return op.params.scratch + entries * (sizeof(EntryRecord) / sizeof(int32_t)) +
         int64_t{rank} * op.params.route.num_tokens;
}

// Call use(index, record) for each record that this thread reads, several of them in flight.
template <typename Use>
__device__ void ForRecords(const Dispatch& op, int64_t first, int64_t end, int stride, Use use) {
  constexpr int kAhead = 4;
  for (int64_t base = first; base < end; base += stride * kAhead) {
    EntryRecord records[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * stride < end) records[i] = Records(op)[base + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i * stride < end) use(base + i * stride, records[i]);
    }
  }
}

// The tokens of one block, or of one warp of it.
struct TokenRange {
  int32_t begin, end;

  __device__ static TokenRange Part(TokenRange whole, int part, int parts) {
    const int size = (whole.end - whole.begin + parts - 1) / parts;
    const int32_t begin = min(whole.begin + part * size, whole.end);
    return {begin, min(begin + size, whole.end)};
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_DISPATCH_OP_CUH_
