// The error text of a device's failure report.
#ifndef JAX_DEEPEP_CUDA_FAILURE_TEXT_H_
#define JAX_DEEPEP_CUDA_FAILURE_TEXT_H_

#include <string>

#include "cuda/device_control.h"
#include "interface/communicator_config.h"

namespace jax_deepep {

// `reporter` is the rank of `group` that wrote the report.
std::string Describe(const FailureReport& report, int reporter, int group,
                     const CommunicatorConfig& config);

// Whether a peer did not arrive, or did not finish, in time.
bool IsTimeout(Failure failure);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_FAILURE_TEXT_H_
