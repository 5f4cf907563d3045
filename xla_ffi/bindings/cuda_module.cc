// The Python module jax_deepep._cuda: tables of capsules, and the native communicator.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module_tables.h"
#include "cuda/bench/floor.h"
#include "cuda/communicator.h"
#include "handlers/call_site.h"
#include "handlers/floor_handler.h"
#include "handlers/registry.h"

namespace jax_deepep {
namespace {

// A descriptor, and the bytes of memory that it stands for.
using ExportTuple = std::pair<int, size_t>;

// An ordinal, and an address in XLA's pool.
using DeviceTuple = std::pair<int, uintptr_t>;

LocalDevice DeviceOf(const DeviceTuple& tuple) {
  return {tuple.first, reinterpret_cast<const void*>(tuple.second)};
}

// The verbs, and what the bench compares them with.
nb::dict TargetsAndFloors() {
  nb::dict targets = Targets();
  targets["jax_deepep_gather_floor"] = Stages(GatherFloorHandler);
  targets["jax_deepep_add_floor"] = Stages(AddFloorHandler);
  targets["jax_deepep_sum_floor"] = Stages(SumFloorHandler);
  return targets;
}

NB_MODULE(_cuda, module) {
  // Programs in JAX's caches hold communicators until the interpreter is gone.
  nb::set_leak_warnings(false);
  module.def("state_types", &StateTypes);
  module.def("targets", &TargetsAndFloors);
  module.attr("max_ranks") = kMaxRanks;
  module.attr("max_experts_per_tok") = kMaxTopk;
  module.def(
      "obstacle_of_pool",
      [](const DeviceTuple& device, size_t limit_bytes) {
        return ObstacleOfPool(DeviceOf(device), limit_bytes);
      },
      nb::arg("device"), nb::arg("limit_bytes"));
  nb::class_<CudaCommunicator>(module, "Communicator")
      .def(nb::new_([](int64_t id, int64_t fingerprint, const PlaceTuples& places, int32_t process,
                       int32_t num_ranks, int32_t num_groups, int32_t num_experts, int32_t num_topk,
                       int32_t max_tokens, int32_t hidden_size, double timeout_s,
                       const std::vector<DeviceTuple>& devices, int num_sms) {
             std::vector<LocalDevice> local_devices;
             for (const DeviceTuple& device : devices) local_devices.push_back(DeviceOf(device));
             auto comm = std::make_shared<CudaCommunicator>(
                 MakeConfig(id, fingerprint, places, process, num_ranks, num_groups, num_experts,
                            num_topk, max_tokens, hidden_size, timeout_s),
                 local_devices, num_sms);
             Register(comm);
             return comm;
           }),
           nb::arg("id"), nb::arg("fingerprint"), nb::arg("places"), nb::arg("process"),
           nb::arg("num_ranks"), nb::arg("num_groups"), nb::arg("num_experts"), nb::arg("num_topk"),
           nb::arg("max_tokens"), nb::arg("hidden_size"), nb::arg("timeout_s"), nb::arg("devices"),
           nb::arg("num_sms"))
      .def("exports",
           [](const CudaCommunicator& comm) {
             std::vector<ExportTuple> exports;
             for (const ExportedMemory& memory : comm.Exports()) {
               exports.emplace_back(memory.descriptor, memory.bytes);
             }
             return exports;
           })
      .def(
          "attach_peer",
          [](CudaCommunicator& comm, int process, const std::vector<ExportTuple>& exports) {
            std::vector<ExportedMemory> memories;
            for (const ExportTuple& memory : exports)
              memories.push_back({memory.first, memory.second});
            comm.AttachPeer(process, memories);
          },
          nb::arg("process"), nb::arg("exports"))
      .def("start", &CudaCommunicator::Start)
      .def("load_floors",
           [](CudaCommunicator& comm) {
             comm.Load(LoadGatherFloors);
             comm.Load(LoadSumFloors);
           })
      .def_prop_ro("num_blocks", &CudaCommunicator::num_blocks)
      .def_prop_ro("last_op_seconds", &CudaCommunicator::LastOpSeconds)
      .def_prop_ro("buffer_bytes", &CudaCommunicator::buffer_bytes)
      .def_prop_ro("broken", &CudaCommunicator::broken)
      .def_prop_ro("invalid_routing", &CudaCommunicator::invalid_routing)
      .def("wait_for_ops", &CudaCommunicator::WaitForOps, nb::call_guard<nb::gil_scoped_release>())
      .def("close", &CudaCommunicator::Close, nb::call_guard<nb::gil_scoped_release>())
      .def("take_stats", &TakeStats<CudaCommunicator>);
}

}  // namespace
}  // namespace jax_deepep
