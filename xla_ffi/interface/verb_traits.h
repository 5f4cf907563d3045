// Properties of a verb, next to its parameters in interface/<verb>.h: all that platforms need to
// launch it, so that no other file has a case per verb.
#ifndef JAX_DEEPEP_INTERFACE_VERB_TRAITS_H_
#define JAX_DEEPEP_INTERFACE_VERB_TRAITS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "interface/geometry.h"

namespace jax_deepep {

// Rows of one rank's part of an op, on average over uniform routings.
struct ExpectedRows {
  double pairs = 0;  // (token, rank): those that cross links, and those that stay
  double rows = 0;   // on the side of the experts
};

// An array of this rank that peers read in an op.
struct PeerArray {
  const void* data;
  int64_t bytes = 0;
  std::function<void(const void* copy)> replace;  // none for a result

  // An operand in the parameters of the op, where `replace` substitutes a copy. No peer reads an
  // operand without rows.
  template <typename T>
  PeerArray(const T** operand, int64_t bytes)
      : data(bytes > 0 ? *operand : nullptr),
        bytes(bytes),
        replace([operand](const void* copy) { *operand = static_cast<const T*>(copy); }) {}

  // Scratch, which is a result.
  PeerArray(const void* result) : data(result) {}
};

// The rows of x [T, W] as peers read them: encoded in scratch, if there is any.
inline PeerArray RowsOnWire(const void* encoded, const void** x, const RouteShape& route) {
  if (encoded != nullptr) return encoded;
  return {x, route.num_tokens * route.rows().bytes()};
}

// Specialised for the parameters of every verb, which have a RouteShape `route`:
//
//     static constexpr char kName[];                  // in errors, and in jax_deepep_<name>
//     static int64_t Flags(const Params&);            // which optional operands and results it has
//     // The arrays that peers read in place, kMaxOperands at most.
//     static std::vector<PeerArray> ReadByPeers(const GroupShape&, Params*);
//     // Rows that a rank reads and writes in its own memory.
//     static double LocalRows(const Params&, const ExpectedRows&);
template <typename Params>
struct VerbTraits;

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_VERB_TRAITS_H_
