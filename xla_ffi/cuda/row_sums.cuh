// Sums of rows by a warp, in the order that the contract of combine fixes. Inputs and results may
// be in a wire format.
#ifndef JAX_DEEPEP_CUDA_ROW_SUMS_CUH_
#define JAX_DEEPEP_CUDA_ROW_SUMS_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/device_control.h"
#include "cuda/row_values.cuh"
#include "cuda/wire_rows.cuh"
#include "interface/combine.h"

namespace jax_deepep {

// What a warp adds up. A lane may hold one input of the sum.
struct Inputs {
  int count = 0;                // of inputs, with `first`
  const char* first = nullptr;  // the input before all others, or null
  int position = kNone;         // of the lane's input among `count`
  const char* row = nullptr;    // the lane's input
  float weight = 1.0f;          // and its weight
  bool encoded = false;         // whether it is in the wire format
  float gradient = 0.0f;        // the gradient of the lane's entry
  // Of a SumOfRowsAndPair, the rows of the pair: before all other inputs. Their sum, rounded, is
  // added before the input at `pair_position`, or after all.
  int pair_rows = 0, pair_position = kNone;
};

// A warp reads rows in pieces: so many words of 16 bytes per lane, and so many pieces ahead of the
// one that it adds. Encoding and decoding take registers.
struct PlainPieces {
  static constexpr int kWords = 4, kAhead = 3;
};
struct EncodedPieces {
  static constexpr int kWords = 2, kAhead = 4;
};

// An input of a sum.
struct Term {
  const char* row;
  float weight;
  bool encoded;
};
inline constexpr int kMaxTerms = kMaxTopk + 1;

// The inputs of a warp's sum, and of a SumOfRowsAndPair the sum of the pair, in shared memory.
struct WarpTerms {
  Term inputs[kMaxTerms];
};
struct WarpTermsAndPair : WarpTerms {
  uint4 pair[PlainPieces::kWords][32];
};

// Variants of a sum: of products in float32, or of terms that are rounded to the row type first;
// from +0, or from its first term, that is, from -0.
struct SumOfProducts {
  using Terms = WarpTerms;
  static constexpr bool kRounded = false, kWithPair = false;
  __device__ static float Zero(const Inputs&) { return -0.0f; }
};
struct SumOfRows {
  using Terms = WarpTerms;
  static constexpr bool kRounded = true, kWithPair = false;
  __device__ static float Zero(const Inputs& inputs) {
    return inputs.first != nullptr ? -0.0f : 0.0f;
  }
};
// Of the ranks of a node: a term of another sum.
struct SumOfRanks {
  using Terms = WarpTerms;
  static constexpr bool kRounded = true, kWithPair = false;
  __device__ static float Zero(const Inputs&) { return -0.0f; }
};
// One of the rows may be the sum of products of this rank's own ones.
struct SumOfRowsAndPair : SumOfRows {
  using Terms = WarpTermsAndPair;
  static constexpr bool kWithPair = true;
};

// A group of an input, as it is loaded.
template <typename Type>
struct LoadedGroup {
  Packed<typename Type::Element> plain;  // or an EncodedGroup in its first words
};

// Load a group of a term. Without kMayBeEncoded, all terms are plain.
template <typename Type, bool kMayBeEncoded, WireFormat kFormat, bool kWhole>
__device__ __forceinline__ void LoadTerm(const Term& term, const WireRow& wire, int group,
                                         RowShape<kWhole> shape, LoadedGroup<Type>* loaded) {
  if (kMayBeEncoded && term.encoded) {
    const EncodedGroup encoded = RowOnWire<kWhole, kFormat>(term.row, wire).Load(group);
    uint4& words = loaded->plain.words[0];
    words.x = encoded.elements[0], words.y = encoded.elements[1];
    words.z = __float_as_uint(encoded.scale);
  } else {
    loaded->plain = LoadGroup<typename Type::Element>(term.row, group, shape);
  }
}

// Add groups of an input to sums. Inputs without a weight have 1. A product is `rounded` to the row
// type first, or not; testing for a weight costs less than multiplying the sums of step 1, where
// all terms are rounded.
template <typename Type, bool kWeighted, typename Sum, bool kMayBeEncoded, WireFormat kFormat,
          int kGroups>
__device__ __forceinline__ void AddTerm(LoadedGroup<Type> (&groups)[kGroups], const Term& term,
                                        bool rounded, const WireRow& wire,
                                        float (&sums)[kGroups][kGroup]) {
  float values[kGroup];
  if (kMayBeEncoded && term.encoded) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4& words = groups[i].plain.words[0];
      const EncodedGroup encoded = {{words.x, words.y}, __uint_as_float(words.z)};
      RowOnWire<true, kFormat>(nullptr, wire).DecodeSaturated(encoded, values);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) sums[i][e] = __fadd_rn(sums[i][e], values[e]);
    }
    return;
  }
  const float weight = term.weight;
  if (kWeighted && Sum::kRounded && rounded && weight != 1.0f) {
#pragma unroll
    for (LoadedGroup<Type>& group : groups) {
      Type::Unpack(group.plain, values);
#pragma unroll
      for (float& value : values) value = __fmul_rn(value, weight);
      group.plain = Type::Pack(values);
    }
  }
  constexpr bool kAllRounded = Sum::kRounded && !Sum::kWithPair;
  const float factor = rounded ? 1.0f : weight;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    Type::Unpack(groups[i].plain, values);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      if (kWeighted && !kAllRounded) values[e] = __fmul_rn(values[e], factor);
      sums[i][e] = __fadd_rn(sums[i][e], values[e]);
    }
  }
}

// The sums of a lane's groups, while their terms are added one after the other.
template <typename Type, bool kWeighted, typename Sum, bool kMayBeEncoded, WireFormat kFormat,
          int kGroups>
class LaneSums {
 public:
  __device__ __forceinline__ LaneSums(const Inputs& inputs, typename Sum::Terms* terms)
      : inputs_(inputs), terms_(*terms) {
    Begin();
  }

  __device__ __forceinline__ void Begin() {
    const bool of_pair = Sum::kWithPair && inputs_.pair_rows > 0;
    Clear(of_pair ? SumOfProducts::Zero(inputs_) : Sum::Zero(inputs_));
  }
  __device__ __forceinline__ void Add(LoadedGroup<Type> (&groups)[kGroups], int input,
                                      const WireRow& wire) {
    const Term& term = terms_.inputs[input];
    const bool of_pair = Sum::kWithPair && input < inputs_.pair_rows;
    if constexpr (Sum::kWithPair) {
      if (input == inputs_.pair_position) AddPair();
    }
    AddTerm<Type, kWeighted, Sum, kMayBeEncoded, kFormat>(groups, term, Sum::kRounded && !of_pair,
                                                          wire, values_);
    if constexpr (Sum::kWithPair) {
      if (input == inputs_.pair_rows - 1) EndPair();
    }
  }
  // After the last term.
  __device__ __forceinline__ void End() {
    if constexpr (Sum::kWithPair) {
      if (inputs_.pair_position == inputs_.count) AddPair();
    }
  }
  __device__ __forceinline__ const float* of(int i) const { return values_[i]; }

 private:
  __device__ __forceinline__ void Clear(float zero) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (float& value : values_[i]) value = zero;
    }
  }
  // Every lane reads what it has written.
  __device__ __forceinline__ void EndPair() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const PackedGroup rounded = Type::Pack(values_[i]);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        terms_.pair[i * kWords + j][threadIdx.x % 32] = rounded.words[j];
      }
    }
    Clear(Sum::Zero(inputs_));
  }
  __device__ __forceinline__ void AddPair() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      PackedGroup rounded;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        rounded.words[j] = terms_.pair[i * kWords + j][threadIdx.x % 32];
      }
      float of_pair[kGroup];
      Type::Unpack(rounded, of_pair);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) values_[i][e] = __fadd_rn(values_[i][e], of_pair[e]);
    }
  }

  using PackedGroup = Packed<typename Type::Element>;
  static constexpr int kWords = sizeof(PackedGroup) / sizeof(uint4);

  const Inputs& inputs_;
  typename Sum::Terms& terms_;
  float values_[kGroups][kGroup];
};

// Where sums go: store(group, sums) is called by all lanes together, with consecutive groups, some
// of which may be past the end.
template <typename Type, bool kWhole>
struct StoreRounded {
  using Pieces = PlainPieces;
  char* to;
  RowShape<kWhole> shape;
  __device__ __forceinline__ void operator()(int group, bool inside, const float* sums) const {
    if (inside) StoreGroup(to, group, shape, Type::Pack(sums));
  }
};
template <bool kWhole, WireFormat kFormat>
struct StoreEncoded {
  using Pieces = PlainPieces;
  char* to;
  const WireRow& wire;
  __device__ __forceinline__ void operator()(int group, bool inside, const float* sums) const {
    RunOutOfLine(to, wire, group, inside, {sums[0], sums[1], sums[2], sums[3]},
                 {sums[4], sums[5], sums[6], sums[7]});
  }
  __device__ __forceinline__ static void Run(char* to, const WireRow& wire, int group, bool inside,
                                             const float* sums) {
    float values[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const bool exists = kWhole || group * kGroup + e < wire.size;
      values[e] = inside && exists ? sums[e] : 0.0f;
    }
    const auto codes = Encode<kFormat>(wire, {}, values, LargestOf(values));
    if (inside) StoreCodes<kWhole, kFormat>(wire, wire.scales_offset(), to, group, codes);
  }

 private:
  // There are many calls of it: see EncodeOutOfLine.
  __device__ __noinline__ static void RunOutOfLine(char* to, const WireRow& wire, int group,
                                                   bool inside, float4 first, float4 second) {
    const float sums[kGroup] = {first.x,  first.y,  first.z,  first.w,
                                second.x, second.y, second.z, second.w};
    Run(to, wire, group, inside, sums);
  }
};
// One or the other, by one loop for both, which takes less code; encoded in line, for many sums.
template <typename Type, bool kWhole, WireFormat kFormat>
struct StoreEither {
  using Pieces = EncodedPieces;
  bool encoded;
  char* to;
  RowShape<kWhole> shape;
  const WireRow& wire;
  __device__ __forceinline__ void operator()(int group, bool inside, const float* sums) const {
    if (encoded) {
      StoreEncoded<kWhole, kFormat>::Run(to, wire, group, inside, sums);
    } else {
      StoreRounded<Type, kWhole>{to, shape}(group, inside, sums);
    }
  }
};

// Sum at least one input; rows are whole groups. One loop for any number of inputs was measured to
// be faster than specialised loops, which have fewer instructions per row: probably because of the
// instruction caches (bench/RESULTS.md).
template <typename Type, bool kWeighted, typename Sum, bool kMayBeEncoded, WireFormat kFormat,
          typename Store>
__device__ __forceinline__ void AddPieces(const Inputs& inputs, RowShape<true> shape,
                                          GroupRange range, typename Sum::Terms* terms,
                                          const WireRow& wire, const Store& store) {
  using Pieces = std::conditional_t<kMayBeEncoded, EncodedPieces, typename Store::Pieces>;
  constexpr int kGroups = Pieces::kWords * sizeof(uint4) / sizeof(LoadedGroup<Type>);  // of a lane
  const int lane = threadIdx.x % 32;

  int next_input = 0, next_base = range.first + lane;
  auto load = [&](LoadedGroup<Type>(&piece)[kGroups]) {
    const Term& term = terms->inputs[next_input];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int at = next_base + i * 32;
      if (at < range.end) LoadTerm<Type, kMayBeEncoded, kFormat>(term, wire, at, shape, &piece[i]);
    }
    if (++next_input == inputs.count) next_input = 0, next_base += kGroups * 32;
  };
  LoadedGroup<Type> pieces[Pieces::kAhead][kGroups];
#pragma unroll
  for (LoadedGroup<Type>(&piece)[kGroups] : pieces) load(piece);

  LaneSums<Type, kWeighted, Sum, kMayBeEncoded, kFormat, kGroups> sums(inputs, terms);
  int input = 0, base = range.first + lane;
  while (true) {
#pragma unroll
    for (LoadedGroup<Type>(&piece)[kGroups] : pieces) {
      sums.Add(piece, input, wire);
      load(piece);
      if (++input < inputs.count) continue;
      sums.End();
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int at = base + i * 32;
        store(at, at < range.end, sums.of(i));
      }
      input = 0, base += kGroups * 32;
      if (base - lane >= range.end) return;
      sums.Begin();
    }
  }
}

// The same for any row.
template <typename Type, bool kWeighted, typename Sum, bool kMayBeEncoded, WireFormat kFormat,
          typename Store>
__device__ void AddOneByOne(const Inputs& inputs, RowShape<false> shape, GroupRange range,
                            typename Sum::Terms* terms, const WireRow& wire, const Store& store) {
  const int lane = threadIdx.x % 32;
  for (int base = range.first; base < range.end; base += 32) {
    const int group = base + lane;
    const bool inside = group < range.end;
    LaneSums<Type, kWeighted, Sum, kMayBeEncoded, kFormat, 1> sums(inputs, terms);
#pragma unroll 4
    for (int input = 0; inside && input < inputs.count; ++input) {
      LoadedGroup<Type> groups[1];
      LoadTerm<Type, kMayBeEncoded, kFormat>(terms->inputs[input], wire, group, shape, &groups[0]);
      sums.Add(groups, input, wire);
    }
    sums.End();
    store(group, inside, sums.of(0));
  }
}

// Sum a part of the rows. `wire` is the format of encoded inputs, if there may be some.
template <typename Type, bool kWhole, bool kWeighted, typename Sum, bool kMayBeEncoded,
          WireFormat kFormat = WireFormat::kNone, typename Store>
__device__ __forceinline__ void AddUp(const Inputs& inputs, RowShape<kWhole> shape,
                                      GroupRange range, typename Sum::Terms* terms,
                                      const WireRow& wire, const Store& store) {
  __syncwarp();
  if (inputs.position != kNone) {
    terms->inputs[inputs.position] = {inputs.row, inputs.weight, inputs.encoded};
  }
  if (inputs.first != nullptr && threadIdx.x % 32 == 0) {
    terms->inputs[inputs.pair_rows] = {inputs.first, 1.0f, false};
  }
  __syncwarp();
  if (kWhole && inputs.count > 0) {
    AddPieces<Type, kWeighted, Sum, kMayBeEncoded, kFormat>(inputs, RowShape<true>{shape.size},
                                                            range, terms, wire, store);
  } else {
    AddOneByOne<Type, kWeighted, Sum, kMayBeEncoded, kFormat>(inputs, RowShape<false>{shape.size},
                                                              range, terms, wire, store);
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
