// What our custom calls have in common: find the communicator when a program is loaded, and check
// the operands. Then platform.h launches the verb.
#ifndef JAX_DEEPEP_HANDLERS_CALL_SITE_H_
#define JAX_DEEPEP_HANDLERS_CALL_SITE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "handlers/platform.h"
#include "interface/geometry.h"
#include "xla/ffi/api/ffi.h"

namespace jax_deepep {

// Decode the type and size of `rows` [count, W], which cross links in the format `wire`, into
// `format`, and return their count; or set `error`. With a format, rows of bytes are encoded
// already.
int32_t DecodeRows(const ffi::AnyBuffer& rows, const char* name, int64_t wire,
                   const GroupShape& shape, RowFormat* format, std::string* error);

// Check that an op has at most max_tokens tokens, for which memory of peers is laid out.
void CheckTokens(int64_t num_tokens, const GroupShape& shape, std::string* error);

// An absent optional operand or result is passed as a placeholder.
template <typename T>
T* DataIf(bool present, const ffi::AnyBuffer& buffer) {
  return present ? static_cast<T*>(buffer.untyped_data()) : nullptr;
}

// Check that `buffer` has `count` elements of `type`, or set `error`.
void CheckBuffer(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t count, const char* name,
                 std::string* error);

// Check that `buffer` has `count` rows like those of `rows`, [.., W], likewise.
void CheckRows(const ffi::AnyBuffer& buffer, const ffi::AnyBuffer& rows, int64_t count,
               const char* name, std::string* error);

// Return the first of the `count` rows of `rows` [.., W] that begin with row `first_token`; or set
// `error`, likewise.
void* RowsFrom(const ffi::AnyBuffer& rows, int64_t first_token, int64_t count, const char* name,
               std::string* error);

// Check that the buffers can take `count` rows of a format that stay encoded, likewise.
KeptArrays DecodeKept(const ffi::AnyBuffer& data, const ffi::AnyBuffer& scales,
                      const ffi::AnyBuffer& row_scale, const RowFormat& rows, int64_t count,
                      std::string* error);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_HANDLERS_CALL_SITE_H_
