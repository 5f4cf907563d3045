// Row baselines: plain kernels that move, or sum, exactly the rows of an op between the same ranks,
// given precomputed lists of where they go. They show what a simple kernel takes, not the
// limit of the hardware (see links.h): ops may be faster. Rows are bfloat16 of a multiple of 16
// bytes, K is at most 8.
#ifndef JAX_DEEPEP_BENCH_ROW_BASELINES_H_
#define JAX_DEEPEP_BENCH_ROW_BASELINES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/kernel_launch.h"
#include "cuda/kernel_stream.h"
#include "cuda/op_frame.h"
#include "interface/geometry.h"

namespace jax_deepep {

// Most rows of one token that the kernels take.
inline constexpr int kMaxBaselineRows = 8;

// One rank's part of a baseline.
struct BaselineParams {
  RouteShape route;
  // As PairTable, in either layout, in the order in which pairs are to be read.
  const int32_t* pairs = nullptr;
  int32_t line_ints = 0;
  int32_t max_rows = 0;             // of a pair
  const void* x = nullptr;          // [T, H] what is gathered
  const void* y = nullptr;          // [C, H] what is added to it, or summed
  const int32_t* inputs = nullptr;  // [T, K] of a sum, first those that are not kNone: see SumInput
  void* out = nullptr;              // [C, H], or [T, H] of a sum
  void* sums = nullptr;  // scratch [R * max_tokens, H], or null where no pair has several rows
  // How rows are gathered: by bulk copies, `depth` rows per warp in `warps` of a block; or, with
  // depth 0, by 16-byte loads and stores of all warps.
  int32_t warps = 0;
  int32_t depth = 0;
};

// The meaning of BaselineParams::inputs: a row of a rank, or the sum of a pair there.
struct SumInput {
  int32_t rank;
  int32_t row;   // of y, or
  int32_t pair;  // of the sums, and kNone otherwise

  JAX_DEEPEP_HOST_DEVICE static SumInput Decode(int32_t code, const GroupShape& shape,
                                                const RouteShape& route) {
    const int32_t span = route.capacity + shape.num_ranks * shape.max_tokens;
    const int32_t at = code % span;
    const bool summed = at >= route.capacity;
    return {code / span, summed ? kNone : at, summed ? at - route.capacity : kNone};
  }
};

// All of these enqueue one kernel and return an error or null.
//
// out[row] = x of the pair, in every row of every pair.
const char* LaunchGatherRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                             const DeviceFacts& device, const KernelStream& stream);
// out[row] = x of the pair + y[row].
const char* LaunchAddRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                          const DeviceFacts& device, const KernelStream& stream);
// out[token] = sum of its inputs, after every pair with several rows was summed where it is.
const char* LaunchSumRows(const OpFrame& frame, const BaselineParams& params, int num_blocks,
                          const DeviceFacts& device, const KernelStream& stream);

// Load the kernels into the current device.
const char* LoadGatherRows(int max_shared_bytes);
const char* LoadSumRows(int max_shared_bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_ROW_BASELINES_H_
