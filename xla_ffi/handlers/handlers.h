// The custom calls for XLA: one execute stage per verb, and a common instantiate stage.
#ifndef JAX_DEEPEP_HANDLERS_HANDLERS_H_
#define JAX_DEEPEP_HANDLERS_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(InstantiateHandler);

// The execute stage of the verb with these parameters; see <verb>_handler.cc.
template <typename Params>
XLA_FFI_Error* Execute(XLA_FFI_CallFrame* frame);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_HANDLERS_H_
