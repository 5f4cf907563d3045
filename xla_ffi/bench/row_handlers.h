// The row baselines as custom calls. They share the instantiate stage and the call sites of the
// verbs in the module _cuda.
#ifndef JAX_DEEPEP_BENCH_ROW_HANDLERS_H_
#define JAX_DEEPEP_BENCH_ROW_HANDLERS_H_

#include "bindings/op_launcher.h"
#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

// To be set before a handler runs.
extern OpLauncher launch_op;

XLA_FFI_DECLARE_HANDLER_SYMBOL(GatherRowsHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AddRowsHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SumRowsHandler);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BENCH_ROW_HANDLERS_H_
