// Prints to stderr what breaks a communicator on a GPU, soon after the device has told: the program
// may sit in another collective, and never come to where it would ask.
#ifndef JAX_DEEPEP_CUDA_FAILURE_WATCH_H_
#define JAX_DEEPEP_CUDA_FAILURE_WATCH_H_

namespace jax_deepep {

class CudaCommunicator;

// Watch a communicator, on a thread of this process that all of them share. Where no thread can be
// made, nothing is printed.
void WatchForFailure(const CudaCommunicator* comm);

// Print a failure that has not been printed, and watch no longer: before the communicator goes.
void StopWatching(const CudaCommunicator* comm);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_FAILURE_WATCH_H_
