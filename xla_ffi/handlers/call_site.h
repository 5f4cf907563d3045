// What every custom call of ours does before and after its verb: find the communicator when a
// program is loaded, check the operands, and join the other ranks.
#ifndef JAX_DEEPEP_HANDLERS_CALL_SITE_H_
#define JAX_DEEPEP_HANDLERS_CALL_SITE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "cpu/communicator.h"
#include "cpu/op.h"
#include "interface/geometry.h"
#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

namespace ffi = xla::ffi;

// One custom call in one loaded program; pins the communicator for as long as the program lives.
// Its address tells calls apart: XLA makes one per instruction, shared by the devices of a process.
struct CallSite {
  static ffi::TypeId id;
  static const XLA_FFI_TypeInfo info;

  std::shared_ptr<Communicator> comm;
  // The how-manieth call of ours in its program: the same in every process.
  int64_t number = 0;
};

// Tell that JAX has compiled or loaded a program: calls of the next one are numbered from zero
// again, whatever programs another process has compiled meanwhile.
void FinishProgram();

// The instantiate stage of every verb.
ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateCallSite(ffi::Dictionary attributes);

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

// Hand a rank's part to the communicator; the future is ready when the op has ended. `rank` is
// what the program believes this device's rank to be.
ffi::Future JoinRanks(CallSite* site, ffi::RunId run, int64_t device, const ffi::AnyBuffer& rank,
                      const std::string& error, std::unique_ptr<Op> op);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_CALL_SITE_H_
