// Sums of rows by a warp, in the order that the contract of combine fixes.
#ifndef JAX_DEEPEP_CUDA_ROW_SUMS_CUH_
#define JAX_DEEPEP_CUDA_ROW_SUMS_CUH_

#include <cstdint>

#include "cuda/device_control.h"
#include "cuda/row_values.cuh"
#include "interface/combine.h"

namespace jax_deepep {

// What a warp adds up. A lane may hold one input of the sum.
struct Inputs {
  int count = 0;                // of inputs, with `first`
  const char* first = nullptr;  // the input before all others, or null
  int position = kNone;         // of the lane's input in the sum
  const char* row = nullptr;    // the lane's input
  float weight = 1.0f;          // and its weight
  float gradient = 0.0f;        // the gradient of the lane's entry
};

// Variants of a sum: of products in float32, or of terms that are rounded to the row type first;
// from +0, or from its first term, that is, from -0.
struct SumOfProducts {
  static constexpr bool kRounded = false;
  __device__ static float Zero(const Inputs&) { return -0.0f; }
};
struct SumOfRows {
  static constexpr bool kRounded = true;
  __device__ static float Zero(const Inputs& inputs) {
    return inputs.first != nullptr ? -0.0f : 0.0f;
  }
};

// A warp reads rows in pieces: this many words of 16 bytes per lane, and this many pieces ahead of
// the one that it adds.
inline constexpr int kWordsOfPiece = 4;
inline constexpr int kPieces = 3;

// An input of a sum, in shared memory.
struct Term {
  const char* row;
  float weight;
};
inline constexpr int kMaxTerms = kMaxTopk + 1;

// Add groups of an input to sums. Inputs without a weight have 1; testing for that costs less than
// multiplying the sums of step 1, which many of a token's inputs are.
template <typename Type, bool kWeighted, bool kRounded, int kGroups>
__device__ __forceinline__ void AddTerm(Packed<typename Type::Element> (&groups)[kGroups],
                                        float weight, float (&sums)[kGroups][kGroup]) {
  float values[kGroup];
  if (kWeighted && kRounded && weight != 1.0f) {
#pragma unroll
    for (Packed<typename Type::Element>& group : groups) {
      Type::Unpack(group, values);
#pragma unroll
      for (float& value : values) value = __fmul_rn(value, weight);
      group = Type::Pack(values);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    Type::Unpack(groups[i], values);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      if (kWeighted && !kRounded) values[e] = __fmul_rn(values[e], weight);
      sums[i][e] = __fadd_rn(sums[i][e], values[e]);
    }
  }
}

// Write the sum of at least one input; rows are whole groups. One loop for any number of inputs
// was measured to be faster than specialised loops, which have fewer instructions per row: probably
// because of the instruction caches (bench/RESULTS.md).
template <typename Type, bool kWeighted, typename Sum>
__device__ __forceinline__ void AddPieces(const Inputs& inputs, char* to, RowShape<true> shape,
                                          const Term* terms) {
  using Group = Packed<typename Type::Element>;
  constexpr int kGroups = kWordsOfPiece / Group::kWords;  // of a lane
  const int lane = threadIdx.x % 32, num_groups = shape.num_groups();

  int next_input = 0, next_base = lane;
  auto load = [&](Group(&piece)[kGroups]) {
    const char* row = terms[next_input].row;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int at = next_base + i * 32;
      if (at < num_groups) piece[i] = LoadGroup<typename Type::Element>(row, at, shape);
    }
    if (++next_input == inputs.count) next_input = 0, next_base += kGroups * 32;
  };
  Group pieces[kPieces][kGroups];
#pragma unroll
  for (Group(&piece)[kGroups] : pieces) load(piece);

  float sums[kGroups][kGroup];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (float& sum : sums[i]) sum = Sum::Zero(inputs);
    }
  };
  clear();
  int input = 0, base = lane;
  while (true) {
#pragma unroll
    for (Group(&piece)[kGroups] : pieces) {
      AddTerm<Type, kWeighted, Sum::kRounded>(piece, terms[input].weight, sums);
      load(piece);
      if (++input < inputs.count) continue;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int at = base + i * 32;
        if (at < num_groups) StoreGroup(to, at, shape, Type::Pack(sums[i]));
      }
      input = 0, base += kGroups * 32;
      if (base - lane >= num_groups) return;
      clear();
    }
  }
}

// The same for any row.
template <typename Type, bool kWeighted, typename Sum>
__device__ void AddOneByOne(const Inputs& inputs, char* to, RowShape<false> shape,
                            const Term* terms) {
  using Group = Packed<typename Type::Element>;
  for (int group = threadIdx.x % 32; group < shape.num_groups(); group += 32) {
    float sums[1][kGroup];
#pragma unroll
    for (float& sum : sums[0]) sum = Sum::Zero(inputs);
#pragma unroll 4
    for (int input = 0; input < inputs.count; ++input) {
      const Term& term = terms[input];
      Group groups[1] = {LoadGroup<typename Type::Element>(term.row, group, shape)};
      AddTerm<Type, kWeighted, Sum::kRounded>(groups, term.weight, sums);
    }
    StoreGroup(to, group, shape, Type::Pack(sums[0]));
  }
}

template <typename Type, bool kWhole, bool kWeighted, typename Sum>
__device__ __forceinline__ void AddUp(const Inputs& inputs, char* to, RowShape<kWhole> shape,
                                      Term* terms) {
  __syncwarp();
  if (inputs.position != kNone) terms[inputs.position] = {inputs.row, inputs.weight};
  if (inputs.first != nullptr && threadIdx.x % 32 == 0) terms[0] = {inputs.first, 1.0f};
  __syncwarp();
  if (inputs.count == 0) {
    ZeroRow(to,
            RowShape<kWhole>{static_cast<int>(shape.size * sizeof(typename Type::Element) / 2)});
  } else if constexpr (kWhole) {
    AddPieces<Type, kWeighted, Sum>(inputs, to, shape, terms);
  } else {
    AddOneByOne<Type, kWeighted, Sum>(inputs, to, shape, terms);
  }
}

// The results of a combine that failed. By one block.
__device__ inline void WriteFailure(const CombineParams& params, const GroupShape& shape) {
  const int64_t num_tokens = params.route.num_tokens;
  FillAsFailed(params.route.row_type, params.out, num_tokens * params.route.row_size);
  if (params.gradients != nullptr) {
    FillAsFailed(RowType::kFloat32, params.gradients, num_tokens * shape.num_topk);
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_SUMS_CUH_
