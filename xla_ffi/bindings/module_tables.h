// Tables and numbers that all modules export.
#ifndef JAX_DEEPEP_BINDINGS_MODULE_TABLES_H_
#define JAX_DEEPEP_BINDINGS_MODULE_TABLES_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "handlers/handlers.h"
#include "handlers/platform.h"
#include "interface/communicator_config.h"
#include "interface/verbs.h"

namespace jax_deepep {

namespace nb = nanobind;

// Owns a communicator. It is destroyed in the process that made it only: a fork has its memory, but
// none of the threads whose end its destructor waits for.
template <typename Communicator>
std::shared_ptr<Communicator> OwnedHere(Communicator* comm, void (*destroy)(Communicator*)) {
  return {comm, [destroy, creator = getpid()](Communicator* comm) {
            if (getpid() == creator) destroy(comm);
          }};
}

template <typename Function>
nb::capsule Capsule(Function* function) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

inline nb::dict StateTypes() {
  nb::dict call_site;
  call_site["type_id"] = nb::capsule(static_cast<void*>(&CallSite::id));
  call_site["type_info"] =
      nb::capsule(const_cast<void*>(static_cast<const void*>(&CallSite::info)));
  nb::dict types;
  types["jax_deepep_call_site"] = call_site;
  return types;
}

template <typename Function>
nb::dict Stages(Function* execute) {
  nb::dict stages;
  stages["instantiate"] = Capsule(InstantiateHandler);
  stages["execute"] = Capsule(execute);
  return stages;
}

// The custom calls of all verbs by name.
inline nb::dict Targets() {
  nb::dict targets;
  Verbs::ForEach([&](auto type) {
    using Params = typename decltype(type)::type;
    const std::string name = std::string("jax_deepep_") + VerbTraits<Params>::kName;
    targets[name.c_str()] = Stages(Execute<Params, true>);
    targets[(name + "_uncaptured").c_str()] = Stages(Execute<Params, false>);
  });
  return targets;
}

// Numbers and sizes that Python needs to trace an op.
inline void DefineNumbers(nb::module_& module) {
  nb::dict layouts;  // from names to codes
  for (int32_t code = 0; code < 2; ++code) layouts[kLayoutNames[code]] = code;
  module.attr("layouts") = layouts;
  nb::dict modes;  // likewise
  for (int32_t code = 0; code < kNumModes; ++code) modes[kModeNames[code]] = code;
  module.attr("modes") = modes;
  nb::dict parts;  // likewise
  for (int32_t code = 0; code < kNumParts; ++code) parts[kPartNames[code]] = code;
  module.attr("parts") = parts;
  nb::dict wires;  // likewise
  for (int32_t code = 0; code < kNumWireFormats; ++code) wires[kWireNames[code]] = code;
  module.attr("wires") = wires;
  module.attr("no_limit") = kNoLimit;
  module.attr("payload_alignment") = kPayloadAlignment;
  module.def(
      "max_row_bytes",
      [](int32_t hidden_size) {
        GroupShape shape;
        shape.hidden_size = hidden_size;
        return shape.max_row_bytes();
      },
      nb::arg("hidden_size"));
  module.def(
      "num_groups",
      [](int32_t layout, int32_t num_local_experts) {
        GroupShape shape;
        shape.num_ranks = 1;
        shape.num_experts = num_local_experts;
        RouteShape route;
        route.layout = static_cast<Layout>(layout);
        return NumRowGroups(shape, route);
      },
      nb::arg("layout"), nb::arg("num_local_experts"));
  // Of expert-major rows.
  const auto define = [&module](const char* name, auto size) {
    module.def(
        name,
        [size](int32_t num_ranks, int32_t num_experts, int32_t num_topk, int32_t num_tokens) {
          GroupShape shape;
          shape.num_ranks = num_ranks;
          shape.num_experts = num_experts;
          shape.num_topk = num_topk;
          RouteShape route;
          route.num_tokens = num_tokens;
          return size(shape, route);
        },
        nb::arg("num_ranks"), nb::arg("num_experts"), nb::arg("num_topk"), nb::arg("num_tokens"));
  };
  define("pair_table_shape", [](const GroupShape& shape, const RouteShape& route) {
    const PairTable table(shape, route);
    return nb::make_tuple(1 + table.max_pairs, table.line_ints());
  });
  define("dispatch_scratch_ints", DispatchScratchInts);
  module.def(
      "wire_row_bytes",
      [](int32_t wire, int32_t size) {
        return WireRow{static_cast<WireFormat>(wire), size}.bytes();
      },
      nb::arg("wire"), nb::arg("size"));
  // Rows of scratch, and its bytes.
  module.def(
      "combine_sums",
      [](int32_t num_ranks, int32_t num_experts, int32_t num_topk, int32_t num_tokens,
         int32_t ranks_per_node, int32_t layout, int32_t capacity, int32_t row_size,
         int32_t element_bytes, int32_t wire) {
        GroupShape shape;
        shape.num_ranks = num_ranks;
        shape.num_experts = num_experts;
        shape.num_topk = num_topk;
        shape.ranks_per_node = ranks_per_node;
        RouteShape route;
        route.layout = static_cast<Layout>(layout);
        route.num_tokens = num_tokens;
        route.capacity = capacity;
        route.SetRows({element_bytes == 4 ? RowType::kFloat32 : RowType::kBFloat16, row_size,
                       static_cast<WireFormat>(wire)});
        const CombineSums sums(shape, route);
        return nb::make_tuple(sums.num_rows, sums.bytes());
      },
      nb::arg("num_ranks"), nb::arg("num_experts"), nb::arg("num_topk"), nb::arg("num_tokens"),
      nb::arg("ranks_per_node"), nb::arg("layout"), nb::arg("capacity"), nb::arg("row_size"),
      nb::arg("element_bytes"), nb::arg("wire"));
}

// Effectively unbounded, without overflow of clocks that count nanoseconds in 64 bits.
inline constexpr double kLongestWaitSeconds = 1e9;

// Device, group, rank and process of devices of the mesh.
using LocationTuples = std::vector<std::tuple<int64_t, int, int, int>>;

inline CommunicatorConfig MakeConfig(int64_t id, int64_t fingerprint,
                                     const LocationTuples& locations, int32_t process,
                                     int32_t num_ranks, int32_t num_groups, int32_t num_experts,
                                     int32_t num_topk, int32_t max_tokens, int32_t hidden_size,
                                     int32_t ranks_per_node, double timeout_s) {
  CommunicatorConfig config;
  config.id = id;
  config.fingerprint = fingerprint;
  config.shape.num_ranks = num_ranks;
  config.shape.num_experts = num_experts;
  config.shape.num_topk = num_topk;
  config.shape.max_tokens = max_tokens;
  config.shape.hidden_size = hidden_size;
  config.shape.ranks_per_node = ranks_per_node;
  config.num_groups = num_groups;
  config.process = process;
  config.timeout_s = std::min(timeout_s, kLongestWaitSeconds);
  for (const auto& [device, group, rank, process_of_device] : locations) {
    config.locations.push_back({device, group, rank, process_of_device});
  }
  return config;
}

// Hand values [num_groups, R, R] over to NumPy, which frees them.
template <typename T>
nb::ndarray<nb::numpy, T> Matrix(const CommunicatorConfig& config, const std::vector<T>& values) {
  T* data = new T[values.size()];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<T*>(memory); });
  const auto num_ranks = static_cast<size_t>(config.shape.num_ranks);
  return nb::ndarray<nb::numpy, T>(
      data, {static_cast<size_t>(config.num_groups), num_ranks, num_ranks}, owner);
}

template <typename Communicator>
nb::tuple TakeStats(Communicator& comm) {
  const Traffic traffic = [&] {
    nb::gil_scoped_release release;  // it may wait for a device
    return comm.TakeTraffic();
  }();
  const CommunicatorConfig& config = comm.config();
  return nb::make_tuple(Matrix(config, traffic.rows_sent), Matrix(config, traffic.rows_received),
                        Matrix(config, traffic.seconds_waited));
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_BINDINGS_MODULE_TABLES_H_
