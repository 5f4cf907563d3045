#include "handlers/call_site.h"

#include <atomic>
#include <sstream>

#include "cpu/registry.h"

namespace jax_deepep {

ffi::TypeId CallSite::id = {};
const XLA_FFI_TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

namespace {

// Calls instantiated since the last program was finished. XLA instantiates those of one program one
// after the other, in the order of its thunks, which is the same wherever the same program is
// compiled; on which thread it does so differs between versions.
std::atomic<int64_t> calls_in_program{0};

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

}  // namespace

void FinishProgram() { calls_in_program = 0; }

ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateCallSite(ffi::Dictionary attributes) {
  const ffi::ErrorOr<int64_t> comm_id = attributes.get<int64_t>("comm");
  const ffi::ErrorOr<int64_t> fingerprint = attributes.get<int64_t>("fingerprint");
  if (!comm_id.has_value()) return ffi::Unexpected(comm_id.error());
  if (!fingerprint.has_value()) return ffi::Unexpected(fingerprint.error());
  auto site = std::make_unique<CallSite>();
  site->number = calls_in_program++;
  std::string why_not;
  site->comm = FindCommunicator(*comm_id, *fingerprint, &why_not);
  if (site->comm == nullptr) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kFailedPrecondition, "jax_deepep: " + why_not));
  }
  return site;
}

std::optional<RowType> RowTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return RowType::kFloat32;
    case ffi::F16:
      return RowType::kFloat16;
    case ffi::BF16:
      return RowType::kBFloat16;
    default:
      return std::nullopt;
  }
}

void CheckBuffer(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t count, const char* name,
                 std::string* error) {
  const auto got = static_cast<int64_t>(buffer.element_count());
  if (!error->empty() || (buffer.element_type() == type && got == count)) return;
  std::ostringstream text;
  text << name << " has " << got << " elements of " << buffer.element_type() << ", expected "
       << count << " of " << type;
  *error = text.str();
}

ffi::Future JoinRanks(CallSite* site, ffi::RunId run, int64_t device, const ffi::AnyBuffer& rank,
                      const std::string& error, std::unique_ptr<Op> op) {
  const std::string prefix = std::string("jax_deepep ") + op->name() + ": ";
  if (!error.empty()) return Failed(ffi::Error::InvalidArgument(prefix + error));
  Communicator& comm = *site->comm;
  const std::string name = "communicator #" + std::to_string(comm.config().id);
  const Place* place = comm.FindPlace(device);
  if (place == nullptr) {
    return Failed(ffi::Error::InvalidArgument(prefix + "device " + std::to_string(device) +
                                              " is not in the mesh of " + name));
  }
  if (const int32_t believed = *static_cast<const int32_t*>(rank.untyped_data());
      believed != place->rank) {
    return Failed(ffi::Error::InvalidArgument(
        prefix + "the program runs device " + std::to_string(device) + " as rank " +
        std::to_string(believed) + ", but it is rank " + std::to_string(place->rank) + " of " +
        name +
        "; use shard_map with comm.mesh, or make the communicator with the mesh of the program"));
  }
  if (comm.closed()) {
    return Failed(ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                             prefix + name +
                                 " is closed, but the program was compiled with it; make a new "
                                 "Communicator and trace the program again"));
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  op->done = [promise]() mutable { promise.SetAvailable(); };
  comm.Join(site, site->number, run.run_id, *place, std::move(op));
  return future;
}

}  // namespace jax_deepep
