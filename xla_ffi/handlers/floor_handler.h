// The floors of the bench as custom calls: on GPUs only.
#ifndef JAX_DEEPEP_HANDLERS_FLOOR_HANDLER_H_
#define JAX_DEEPEP_HANDLERS_FLOOR_HANDLER_H_

#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(GatherFloorHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AddFloorHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SumFloorHandler);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_FLOOR_HANDLER_H_
