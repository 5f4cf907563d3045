// Launching on CPU: join the ranks of an op, and return a future that completes with it.
#include <memory>
#include <string>
#include <utility>

#include "cpu/op.h"
#include "handlers/platform.h"

namespace jax_deepep {
namespace {

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

}  // namespace

ffi::Future JoinRanks(CallSite* site, const LaunchContext& context, const ffi::AnyBuffer& rank,
                      const std::string& error, std::unique_ptr<Op> op) {
  const std::string prefix = std::string("jax_deepep ") + op->name() + ": ";
  if (!error.empty()) return Failed(ffi::Error::InvalidArgument(prefix + error));
  Communicator& comm = *site->comm;
  const std::string name = "communicator #" + std::to_string(comm.config().id);
  const Location* location = comm.FindLocation(context.device);
  if (location == nullptr) {
    return Failed(ffi::Error::InvalidArgument(prefix + "device " + std::to_string(context.device) +
                                              " is not in the mesh of " + name));
  }
  if (const int32_t expected = *static_cast<const int32_t*>(rank.untyped_data());
      expected != location->rank) {
    return Failed(ffi::Error::InvalidArgument(
        prefix + "the program runs device " + std::to_string(context.device) + " as rank " +
        std::to_string(expected) + ", but it is rank " + std::to_string(location->rank) + " of " +
        name +
        "; use shard_map with comm.mesh, or make the communicator with the mesh of the program"));
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  op->done = [promise]() mutable { promise.SetAvailable(); };
  op->fail = [promise, prefix](const std::string& why) mutable {
    promise.SetError(ffi::Error(ffi::ErrorCode::kResourceExhausted, prefix + why));
  };
  const OpCall call{
      site, {context.run, site->number}, site->program->count, site->program->on_main_thread};
  if (comm.Join(call, *location, std::move(op))) return future;
  promise.SetError(ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                              prefix + name +
                                  " is closed, but the program was compiled with it; make a new "
                                  "Communicator and trace the program again"));
  return future;
}

}  // namespace jax_deepep
