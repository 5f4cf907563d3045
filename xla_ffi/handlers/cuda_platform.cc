// Launching on GPUs: enqueue one kernel on XLA's stream, after copies of constants, and wait for
// nothing.
#include <string>

#include "cuda/failure_text.h"
#include "handlers/platform.h"

namespace jax_deepep {
namespace {

template <typename Params>
ffi::Error Enqueue(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                   const std::string& error, Verb verb, const Params& params) {
  const std::string failure =
      error.empty() ? site->comm->Launch(params, static_cast<const int32_t*>(rank.untyped_data()),
                                         context.op_stream())
                    : error;
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    std::string("jax_deepep ") + NameOf(verb) + ": " + failure);
}

}  // namespace

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const DispatchParams& params) {
  return Enqueue(site, context, rank, error, Verb::kDispatch, params);
}

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const RedispatchParams& params) {
  return Enqueue(site, context, rank, error, Verb::kRedispatch, params);
}

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const CombineParams& params) {
  return Enqueue(site, context, rank, error, Verb::kCombine, params);
}

}  // namespace jax_deepep
