// Where the kernels of the router run, and their loading.
#ifndef JAX_DEEPEP_ROUTER_ROUTER_KERNELS_H_
#define JAX_DEEPEP_ROUTER_ROUTER_KERNELS_H_

namespace jax_deepep {

// What they take on all GPUs that this process sees: nothing if one is too old. Without GPUs, what
// they take at most, for programs that are compiled elsewhere.
struct RouterLimits {
  int most_experts;
  int most_groups;
  int most_entries;  // of shares
};
RouterLimits RouterLimitsHere();

// Load them on the current GPU, unless they are. Before an op may wait there: loading can wait for
// a kernel that runs. Returns null, or what went wrong.
const char* EnsureRouterKernels();

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_ROUTER_ROUTER_KERNELS_H_
