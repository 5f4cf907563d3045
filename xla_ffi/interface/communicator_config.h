// The configuration of a communicator, on every platform.
#ifndef JAX_DEEPEP_INTERFACE_COMMUNICATOR_CONFIG_H_
#define JAX_DEEPEP_INTERFACE_COMMUNICATOR_CONFIG_H_

#include <cstdint>
#include <vector>

#include "interface/geometry.h"

namespace jax_deepep {

// Where a device of the mesh is.
struct Location {
  // The id that XLA passes to custom calls of this process; unused for other processes.
  int64_t device = 0;
  int32_t group = 0;
  int32_t rank = 0;
  int32_t process = 0;
};

struct CommunicatorConfig {
  int64_t id = 0;
  int64_t fingerprint = 0;
  GroupShape shape;
  int32_t num_groups = 0;
  int32_t process = 0;  // this one
  double timeout_s = 0;
  std::vector<Location> locations;  // of the groups of this process and of its peers' groups
};

// Traffic of a communicator per (group, rank, peer), flattened in this order; zero for ranks of
// other processes.
struct Traffic {
  std::vector<int64_t> rows_sent;
  std::vector<int64_t> rows_received;
  std::vector<double> seconds_waited;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_COMMUNICATOR_CONFIG_H_
