// The custom calls, as XLA sees them. One execute stage per verb; they share an instantiate stage.
#ifndef JAX_DEEPEP_HANDLERS_HANDLERS_H_
#define JAX_DEEPEP_HANDLERS_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(InstantiateHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(DispatchHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RedispatchHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CombineHandler);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_HANDLERS_H_
