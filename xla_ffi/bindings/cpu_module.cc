// The Python module jax_deepep._cpu: tables of capsules, and the native communicator.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/registry.h"
#include "handlers/call_site.h"
#include "handlers/handlers.h"

namespace nb = nanobind;

namespace jax_deepep {
namespace {

template <typename Function>
nb::capsule Capsule(Function* function) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

nb::dict StateTypes() {
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

nb::dict Targets() {
  nb::dict targets;
  targets["jax_deepep_dispatch"] = Stages(DispatchHandler);
  targets["jax_deepep_redispatch"] = Stages(RedispatchHandler);
  targets["jax_deepep_combine"] = Stages(CombineHandler);
  return targets;
}

std::shared_ptr<Communicator> MakeCommunicator(
    int64_t id, int64_t fingerprint, const std::vector<std::tuple<int64_t, int, int, int>>& places,
    int32_t process, int32_t num_ranks, int32_t num_groups, int32_t num_experts, int32_t num_topk,
    int32_t max_tokens, int32_t hidden_size, double timeout_s) {
  CommunicatorConfig config;
  config.id = id;
  config.fingerprint = fingerprint;
  config.shape.num_ranks = num_ranks;
  config.shape.num_experts = num_experts;
  config.shape.num_topk = num_topk;
  config.shape.max_tokens = max_tokens;
  config.shape.hidden_size = hidden_size;
  config.num_groups = num_groups;
  config.process = process;
  config.timeout_s = timeout_s;
  for (const auto& [device, group, rank, process_of_device] : places) {
    config.places.push_back({device, group, rank, process_of_device});
  }
  auto comm = std::make_shared<Communicator>(std::move(config));
  Register(comm);
  return comm;
}

// Give values [num_groups, R, R] to NumPy, which frees them.
template <typename T>
nb::ndarray<nb::numpy, T> Matrix(const CommunicatorConfig& config, const std::vector<T>& values) {
  T* data = new T[values.size()];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<T*>(memory); });
  const auto num_ranks = static_cast<size_t>(config.shape.num_ranks);
  return nb::ndarray<nb::numpy, T>(
      data, {static_cast<size_t>(config.num_groups), num_ranks, num_ranks}, owner);
}

NB_MODULE(_cpu, module) {
  // Programs in JAX's caches hold communicators until the interpreter is gone.
  nb::set_leak_warnings(false);
  module.def("state_types", &StateTypes);
  module.def("targets", &Targets);
  module.def("finish_program", &FinishProgram);
  nb::class_<Communicator>(module, "Communicator")
      .def(nb::new_(&MakeCommunicator), nb::arg("id"), nb::arg("fingerprint"), nb::arg("places"),
           nb::arg("process"), nb::arg("num_ranks"), nb::arg("num_groups"), nb::arg("num_experts"),
           nb::arg("num_topk"), nb::arg("max_tokens"), nb::arg("hidden_size"), nb::arg("timeout_s"))
      .def_prop_ro("segment_descriptor", &Communicator::segment_descriptor)
      .def("attach_peer", &Communicator::AttachPeer, nb::arg("process"), nb::arg("descriptor"))
      .def("start", &Communicator::Start)
      .def_prop_ro("buffer_bytes", &Communicator::buffer_bytes)
      .def_prop_ro("broken", &Communicator::broken)
      .def_prop_ro("invalid_routing", &Communicator::invalid_routing)
      .def("wait_for_ops", &Communicator::WaitForOps, nb::call_guard<nb::gil_scoped_release>())
      .def("close", &Communicator::Close, nb::call_guard<nb::gil_scoped_release>())
      .def("take_stats", [](Communicator& comm) {
        const Traffic traffic = comm.TakeTraffic();
        const CommunicatorConfig& config = comm.config();
        return nb::make_tuple(Matrix(config, traffic.rows_sent),
                              Matrix(config, traffic.rows_received),
                              Matrix(config, traffic.seconds_waited));
      });
}

}  // namespace
}  // namespace jax_deepep
