// The kernels of low-latency mode. Results are those of throughput mode, bit for bit, but for the
// handle: `destination` is the rank of the expert, and a line of `pairs` belongs to a slot.
#ifndef JAX_DEEPEP_CUDA_LOW_LATENCY_LAUNCH_H_
#define JAX_DEEPEP_CUDA_LOW_LATENCY_LAUNCH_H_

#include "cuda/kernel_launch.h"
#include "cuda/low_latency/window.h"
#include "cuda/op_frame.h"
#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/redispatch.h"

namespace jax_deepep {

const char* LoadLowLatencyKernels(int max_shared_bytes);
const char* LoadLowLatencyDispatch(int max_shared_bytes);
const char* LoadLowLatencyRedispatch(int max_shared_bytes);
const char* LoadLowLatencyCombine(int max_shared_bytes);

const char* LaunchLowLatency(const OpFrame& frame, const WindowLayout& window,
                             const DispatchParams& params, int num_blocks,
                             const DeviceFacts& device, cudaStream_t stream);
const char* LaunchLowLatency(const OpFrame& frame, const WindowLayout& window,
                             const RedispatchParams& params, int num_blocks,
                             const DeviceFacts& device, cudaStream_t stream);
const char* LaunchLowLatency(const OpFrame& frame, const WindowLayout& window,
                             const CombineParams& params, int num_blocks,
                             const DeviceFacts& device, cudaStream_t stream);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_LOW_LATENCY_LAUNCH_H_
