#include "bench/clock.h"
#include "cuda/kernel_launch.h"
#include "cuda/memory_order.cuh"
#include "handlers/platform.h"

namespace jax_deepep {
namespace {

struct Clock {
  uint64_t* now;
};

__global__ void ClockKernel(const __grid_constant__ Clock op) { *op.now = NanosecondClock(); }

ffi::Error Read(cudaStream_t stream, ffi::AnyBuffer /*after*/, ffi::Result<ffi::AnyBuffer> now) {
  if (now->size_bytes() != sizeof(uint64_t)) {
    return ffi::Error::InvalidArgument("jax_deepep clock: expected a result of 8 bytes");
  }
  const char* error = LaunchClock(static_cast<uint64_t*>(now->untyped_data()), stream);
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_deepep clock: ") + error);
}

}  // namespace

const char* LaunchClock(uint64_t* now, cudaStream_t stream) {
  Clock op{now};
  return LaunchKernel(ClockKernel, op, 1, 1, 0, stream);
}

const char* LoadClock(int /*max_shared_bytes*/) { return LoadKernel(ClockKernel, 0); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(ClockHandler, Read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()  // after
                                  .Ret<ffi::AnyBuffer>(),
                              kTraits);

}  // namespace jax_deepep
