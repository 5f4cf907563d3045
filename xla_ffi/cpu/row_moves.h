// Pulling rows along known routes: the data movement of dispatch and redispatch.
#ifndef JAX_DEEPEP_CPU_ROW_MOVES_H_
#define JAX_DEEPEP_CPU_ROW_MOVES_H_

#include <vector>

#include "cpu/communicator.h"
#include "interface/geometry.h"

namespace jax_deepep {

// What one rank pulls; null where a part is not wanted. See RedispatchParams.
struct RowMove {
  const int32_t* source = nullptr;
  const int32_t* group_sizes = nullptr;
  const float* weights = nullptr;
  const void* y = nullptr;
  void* rows = nullptr;
  float* products = nullptr;
  bool zero_rest = false;
};

// Let every rank pull its rows from `sources[rank]`, [T, H] each.
void MoveRows(Communicator& comm, int group, const RouteShape& route,
              const std::vector<const void*>& sources, const std::vector<RowMove>& moves);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_ROW_MOVES_H_
