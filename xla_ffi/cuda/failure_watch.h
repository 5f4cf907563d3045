// Prints to stderr what breaks a communicator on a GPU, soon after the device has reported it: the
// program may hang in another collective and never ask.
#ifndef JAX_DEEPEP_CUDA_FAILURE_WATCH_H_
#define JAX_DEEPEP_CUDA_FAILURE_WATCH_H_

namespace jax_deepep {

class CudaCommunicator;

// Watch a communicator, on one thread per process. If that cannot be started, nothing is printed.
void WatchForFailure(const CudaCommunicator* comm);

// Print a failure that has not been printed, and stop watching: before the communicator is
// destroyed.
void StopWatching(const CudaCommunicator* comm);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_FAILURE_WATCH_H_
