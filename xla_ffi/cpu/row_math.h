// Arithmetic on single rows of floats: scale, dot, and the weighted sum of combine.
#ifndef JAX_DEEPEP_CPU_ROW_MATH_H_
#define JAX_DEEPEP_CPU_ROW_MATH_H_

#include <cstddef>
#include <cstdint>

#include "interface/geometry.h"

namespace jax_deepep {

// Prefetch a row.
void FetchRow(const void* row, size_t bytes);

// to[i] = from[i] * scale in float32, rounded once.
void ScaleRow(RowType type, void* to, const void* from, float scale, int64_t size);

// The sum over i of a[i] * b[i] in float32, in a fixed order that does not depend on the machine.
float DotRows(RowType type, const void* a, const void* b, int64_t size);

// Both: to[i] = from[i] * scale, and the sum over i of from[i] * b[i]. Rows do not overlap.
float ScaleAndDotRows(RowType type, void* to, const void* from, float scale, const void* b,
                      int64_t size);

// One summand of a token: a row on some rank, and its weight.
struct Term {
  const void* row;
  float weight;
  int32_t rank;         // terms of one rank are contiguous
  bool is_sum = false;  // the row is all of p_d in float32, added as it is
};

// out = bias + p_0 + p_1 + ..., where p_d is the sum over the terms of one rank, rounded to `type`;
// all sums from left to right in float32, products rounded separately. A null bias is zero.
void SumTerms(RowType type, void* out, const void* bias, const Term* terms, int num_terms,
              int64_t size);

// out = p_0 + p_1 + ... likewise, of at least one term: the sum of a rank or a node. Keeps the sign
// of a zero, which SumTerms loses without a bias.
void SumOnlyTerms(RowType type, void* out, const Term* terms, int num_terms, int64_t size);

// out = p_d in float32, not rounded to `type`, for terms of one rank, at least one.
void SumRankInFloat32(RowType type, float* out, const Term* terms, int num_terms, int64_t size);

// out = p_0 + p_1 + ... of a node in float32, not rounded to `type`, as each p_d is.
void SumNodeInFloat32(RowType type, float* out, const Term* terms, int num_terms, int64_t size);

// Fill the results of a failed op: floats with NaN, integers with all bits set, which is -1, and
// NaN in the 8-bit floats e4m3 and E8M0.
void FillAsFailed(RowType type, void* values, int64_t count);
void FillNaN(float* values, int64_t count);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_ROW_MATH_H_
