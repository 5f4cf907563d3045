// Identifies an op: equal on all ranks that arrive at the same op; otherwise an error describes the
// difference.
#ifndef JAX_DEEPEP_INTERFACE_OP_SIGNATURE_H_
#define JAX_DEEPEP_INTERFACE_OP_SIGNATURE_H_

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>

#include "interface/geometry.h"
#include "interface/verbs.h"

namespace jax_deepep {

// Plain words, which ranks publish unchanged. All zeros: no op.
struct OpSignature {
  Verb verb = Verb{};
  int64_t call = 0;   // index of the call in its program, in the order in which JAX lowers them
  int64_t flags = 0;  // which optional operands and results the call has, and its mode
  int64_t layout = 0;
  int64_t row_type = 0;
  int64_t row_size = 0;
  int64_t wire = 0;
  int64_t num_tokens = 0;
  int64_t capacity = 0;
  int64_t alignment = 0;
  int64_t expert_capacity = 0;

  static constexpr int kWords = 11;
  static constexpr int64_t kLowLatency = 1 << 8;  // of flags
  JAX_DEEPEP_HOST_DEVICE const int64_t* words() const {
    return reinterpret_cast<const int64_t*>(this);
  }

  OpSignature() = default;
  OpSignature(Verb verb, int64_t call, int64_t flags, const RouteShape& route)
      : verb(verb),
        call(call),
        flags(flags),
        layout(static_cast<int64_t>(route.layout)),
        row_type(static_cast<int64_t>(route.rows().type)),
        row_size(route.rows().size),
        wire(static_cast<int64_t>(route.rows().wire)),
        num_tokens(route.num_tokens),
        capacity(route.capacity),
        alignment(route.alignment),
        expert_capacity(route.expert_capacity) {}

  bool operator==(const OpSignature& other) const {
    return std::equal(words(), words() + kWords, other.words());
  }

  uint64_t Hash() const {
    uint64_t hash = 0;
    for (int i = 0; i < kWords; ++i) {
      // The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), over a running sum.
      hash += static_cast<uint64_t>(words()[i]) + 0x9e3779b97f4a7c15u;
      hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
      hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
      hash ^= hash >> 31;
    }
    return hash;
  }
};

static_assert(sizeof(OpSignature) == OpSignature::kWords * sizeof(int64_t));

template <typename Params>
OpSignature SignatureOf(const Params& params, int64_t call) {
  return {kVerbOf<Params>, call, VerbTraits<Params>::Flags(params), params.route};
}

// Describe how two ranks' ops differ: "num_tokens is 64 on rank 0 and 128 on rank 3".
inline std::string DescribeDifference(const OpSignature& mine, int my_rank,
                                      const OpSignature& theirs, int their_rank) {
  struct Field {
    const char* name;
    int64_t OpSignature::*value;
  };
  static constexpr Field kFields[] = {
      {"call (index of the op in its program)", &OpSignature::call},
      {"layout", &OpSignature::layout},
      {"dtype", &OpSignature::row_type},
      {"elements of a row", &OpSignature::row_size},
      {"wire", &OpSignature::wire},
      {"num_tokens", &OpSignature::num_tokens},
      {"capacity", &OpSignature::capacity},
      {"alignment", &OpSignature::alignment},
      {"expert_capacity", &OpSignature::expert_capacity},
  };
  static constexpr const char* kRowTypes[] = {"float32", "float16", "bfloat16", "integers",
                                              "block-scaled"};
  const auto value_of = [](const OpSignature& of, const Field& field) -> std::string {
    const int64_t value = of.*field.value;
    if (field.value == &OpSignature::layout && value >= 0 && value < 2) return kLayoutNames[value];
    if (field.value == &OpSignature::row_type && value >= 0 && value < 5) return kRowTypes[value];
    if (field.value == &OpSignature::wire && value >= 0 && value < kNumWireFormats) {
      return kWireNames[value];
    }
    if (field.value == &OpSignature::expert_capacity && value == kNoLimit) return "None";
    return std::to_string(value);
  };
  std::ostringstream text;
  const char* separator = "";
  const auto add = [&](const char* name, const std::string& here, const std::string& there) {
    if (here == there) return;
    text << separator << name << " is " << here << " on rank " << my_rank << " and " << there
         << " on rank " << their_rank;
    separator = "; ";
  };
  add("the op", NameOf(mine.verb), NameOf(theirs.verb));
  const auto mode_of = [](const OpSignature& op) {
    return (op.flags & OpSignature::kLowLatency) != 0 ? "low_latency" : "throughput";
  };
  add("mode", mode_of(mine), mode_of(theirs));
  const auto operands_of = [](const OpSignature& op) {
    return std::to_string(op.flags & ~OpSignature::kLowLatency);
  };
  add("optional operands (bits)", operands_of(mine), operands_of(theirs));
  for (const Field& field : kFields)
    add(field.name, value_of(mine, field), value_of(theirs, field));
  return text.str();
}

// The failure of ranks that arrived at different ops; to be completed by DescribeBroken with
// kRunSameProgram. `difference` is from DescribeDifference.
inline std::string DescribeDifferentOps(const OpSignature& mine, int my_rank, int64_t step,
                                        int their_rank, const std::string& difference) {
  std::ostringstream text;
  text << NameOf(mine.verb) << " on rank " << my_rank << " at step " << step
       << " met a different op of rank " << their_rank << ": " << difference;
  return text.str();
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_OP_SIGNATURE_H_
