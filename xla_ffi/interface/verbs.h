// The list of verbs. Tables of all platforms are made from it: custom calls, kernels, names.
#ifndef JAX_DEEPEP_INTERFACE_VERBS_H_
#define JAX_DEEPEP_INTERFACE_VERBS_H_

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "interface/cached_dispatch.h"
#include "interface/combine.h"
#include "interface/dispatch.h"
#include "interface/verb_traits.h"

namespace jax_deepep {

template <typename... Params>
struct VerbList {
  template <typename P>
  struct Type {
    using type = P;
  };

  // One entry per verb.
  template <template <typename> class Entry>
  using Table = std::tuple<Entry<Params>...>;

  // Call visit(Type<Params>()) for each verb.
  template <typename Visit>
  static void ForEach(Visit visit) {
    (visit(Type<Params>()), ...);
  }

  // From 0, in the order of the list.
  template <typename P>
  static constexpr int64_t IndexOf() {
    static_assert((std::is_same_v<P, Params> || ...), "not a verb of the list");
    int64_t index = 0;
    bool found = false;
    ((found = found || std::is_same_v<P, Params>, index += found ? 0 : 1), ...);
    return index;
  }
};

using Verbs = VerbList<DispatchParams, CachedDispatchParams, CombineParams>;

// A verb as a number that ranks compare: its index in the list, from 1.
enum class Verb : int64_t {
  kBaseline = 1 << 16,  // of the bench
};

template <typename Params>
inline constexpr Verb kVerbOf = Verb{1 + Verbs::IndexOf<Params>()};

inline const char* NameOf(Verb verb) {
  const char* name = verb == Verb::kBaseline ? "baseline" : "op";
  Verbs::ForEach([&](auto type) {
    using Params = typename decltype(type)::type;
    if (verb == kVerbOf<Params>) name = VerbTraits<Params>::kName;
  });
  return name;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_VERBS_H_
