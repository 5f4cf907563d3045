// What every custom call of ours does before its verb: find the communicator when a program is
// loaded, and check the operands. Then platform.h launches it.
#ifndef JAX_DEEPEP_HANDLERS_CALL_SITE_H_
#define JAX_DEEPEP_HANDLERS_CALL_SITE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "handlers/platform.h"
#include "interface/geometry.h"
#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

// The instantiate stage of every verb.
ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateCallSite(ffi::RemainingArgs, ffi::RemainingRets,
                                                            ffi::Dictionary attributes);

// Decode the row type, or nothing for one that rows cannot have.
std::optional<RowType> RowTypeOf(ffi::DataType type);

// An optional operand or result travels as a placeholder when absent.
template <typename T>
T* DataIf(bool present, const ffi::AnyBuffer& buffer) {
  return present ? static_cast<T*>(buffer.untyped_data()) : nullptr;
}

// Check that `buffer` has `count` elements of `type`, or add to `error` what it has instead.
void CheckBuffer(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t count, const char* name,
                 std::string* error);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_CALL_SITE_H_
