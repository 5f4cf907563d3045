// The custom calls for XLA: one execute stage per verb, and a common instantiate stage.
#ifndef JAX_DEEPEP_HANDLERS_HANDLERS_H_
#define JAX_DEEPEP_HANDLERS_HANDLERS_H_

#include <initializer_list>
#include <memory>

#include "handlers/platform.h"
#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(InstantiateHandler);

// The handler of the verb with these parameters; see <verb>_handler.cc.
template <typename Params>
std::unique_ptr<xla::ffi::Ffi> MakeHandler(std::initializer_list<xla::ffi::Traits> traits);

// The execute stage of a verb. Calls that may not be captured in a CUDA graph have their own.
template <typename Params, bool kMayBeCaptured>
XLA_FFI_Error* Execute(XLA_FFI_CallFrame* frame) {
  static auto* const handler =
      (kMayBeCaptured ? MakeHandler<Params>(kTraits) : MakeHandler<Params>({})).release();
  return handler->Call(frame);
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_HANDLERS_H_
