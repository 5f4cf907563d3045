// Rows of floats in the block-scaled formats in which they cross links: jax_deepep.quantize, and
// dequantize, bit for bit.
#ifndef JAX_DEEPEP_CPU_WIRE_ROWS_H_
#define JAX_DEEPEP_CPU_WIRE_ROWS_H_

#include "interface/geometry.h"

namespace jax_deepep {

// Quantise the `wire.size` elements of a row into `wire.bytes()`; those between the parts of the
// row on the wire are not written.
void EncodeRow(RowType type, const WireRow& wire, const void* from, void* to);

// The other way: saturated at the largest finite value of `type`, rounded to nearest even.
void DecodeRow(RowType type, const WireRow& wire, const void* from, void* to);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_WIRE_ROWS_H_
