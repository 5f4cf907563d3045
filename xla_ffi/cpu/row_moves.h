// Pulling rows along known routes: the data movement of dispatch and cached_dispatch.
#ifndef JAX_DEEPEP_CPU_ROW_MOVES_H_
#define JAX_DEEPEP_CPU_ROW_MOVES_H_

#include <cstdint>
#include <vector>

#include "cpu/op.h"
#include "interface/geometry.h"

namespace jax_deepep {

// What one rank pulls: rows = weights * x[source], products = <x[source], y>. Null: not
// needed.
struct RowMove {
  int rank = 0;
  const int32_t* source = nullptr;
  const int32_t* group_sizes = nullptr;
  const float* weights = nullptr;
  const void* y = nullptr;
  void* rows = nullptr;
  float* products = nullptr;
  bool zero_rest = false;
};

// Let ranks of this process pull their rows from `sources`, [T, W] of every rank of the EP group.
void MoveRows(const GroupRun& run, const RouteShape& route, const std::vector<const void*>& sources,
              const std::vector<RowMove>& moves);

// Copy a rank's rows x [num_tokens, W] to where other processes can read them.
void PublishRows(const RowFormat& format, int64_t num_tokens, const void* x,
                 const RankWindow& window);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_ROW_MOVES_H_
