// The clock of a GPU as a custom call: it says when the program had computed its operand.
#ifndef JAX_DEEPEP_BENCH_CLOCK_H_
#define JAX_DEEPEP_BENCH_CLOCK_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

// Write the nanoseconds of NanosecondClock when earlier work of the stream is done. Returns an
// error or null.
const char* LaunchClock(uint64_t* now, cudaStream_t stream);
const char* LoadClock(int max_shared_bytes);

// One operand, which it only waits for; the result is uint32 [2], the lower word first.
XLA_FFI_DECLARE_HANDLER_SYMBOL(ClockHandler);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_CLOCK_H_
