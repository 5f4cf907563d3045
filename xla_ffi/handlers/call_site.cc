#include "handlers/call_site.h"

#include <atomic>
#include <sstream>

#include "handlers/registry.h"

namespace jax_deepep {

ffi::TypeId CallSite::id = {};
const XLA_FFI_TypeInfo CallSite::info = ffi::MakeTypeInfo<CallSite>();

namespace {

// Calls instantiated since the last program was finished. XLA instantiates those of one program one
// after the other, in the order of its thunks, which is the same wherever the same program is
// compiled; on which thread it does so differs between versions.
std::atomic<int64_t> calls_in_program{0};

}  // namespace

void FinishProgram() { calls_in_program = 0; }

ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateCallSite(ffi::RemainingArgs, ffi::RemainingRets,
                                                            ffi::Dictionary attributes) {
  const ffi::ErrorOr<int64_t> comm_id = attributes.get<int64_t>("comm");
  const ffi::ErrorOr<int64_t> fingerprint = attributes.get<int64_t>("fingerprint");
  if (!comm_id.has_value()) return ffi::Unexpected(comm_id.error());
  if (!fingerprint.has_value()) return ffi::Unexpected(fingerprint.error());
  auto site = std::make_unique<CallSite>();
  site->number = calls_in_program++;
  std::string why_not;
  site->comm = FindCommunicator<PlatformCommunicator>(*comm_id, *fingerprint, &why_not);
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

}  // namespace jax_deepep
