// Launching on GPUs: enqueue one kernel on XLA's stream, after copies of constants, and wait for
// nothing.
#include <string>

#include "handlers/platform.h"

namespace jax_deepep {
namespace {

template <typename Params>
ffi::Error Enqueue(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                   const std::string& error, const Params& params) {
  const OpLaunch launch = context.op_launch(site, rank);
  const OpSignature op = SignatureOf(params, site->call);
  if (!error.empty()) site->comm->TellNotLaunched(op, launch);
  const std::string failure = error.empty() ? site->comm->Launch(params, launch) : error;
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    std::string("jax_deepep ") + NameOf(op.verb) + ": " + failure);
}

}  // namespace

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const DispatchParams& params) {
  return Enqueue(site, context, rank, error, params);
}

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const RedispatchParams& params) {
  return Enqueue(site, context, rank, error, params);
}

ffi::Error Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                  const std::string& error, const CombineParams& params) {
  return Enqueue(site, context, rank, error, params);
}

}  // namespace jax_deepep
