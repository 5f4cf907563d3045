// The Python module jax_deepep._cuda: tables of capsules, and the native communicator.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/module_tables.h"
#include "bindings/op_launcher.h"
#include "cuda/communicator.h"
#include "cuda/remote_library.h"
#include "handlers/call_site.h"
#include "handlers/registry.h"
#include "router/router_handlers.h"
#include "router/router_kernels.h"
#include "source_digest.h"
#include "transport/cuda_driver.h"

namespace jax_deepep {
namespace {

// The fields of ExportedMemory.
using ExportTuple = std::tuple<int, size_t, std::string, uint64_t>;

// An ordinal, and an address in XLA's pool.
using DeviceTuple = std::pair<int, uintptr_t>;

LocalDevice DeviceOf(const DeviceTuple& tuple) {
  return {tuple.first, reinterpret_cast<const void*>(tuple.second)};
}

// Functions that may wait for a device release the GIL: the device may wait for an op that another
// Python thread is about to launch.
using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

// The last owner of a communicator is Python or a program of XLA: with the GIL or without.
void Destroy(CudaCommunicator* comm) {
  std::optional<nb::gil_scoped_release> release;
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) release.emplace();
  comm->Close();
  delete comm;
}

// Tokens and row bytes of WindowSize.
using WindowTuple = std::pair<int32_t, int32_t>;

std::shared_ptr<CudaCommunicator> Make(int64_t id, int64_t fingerprint,
                                       const LocationTuples& locations, int32_t process,
                                       int32_t num_ranks, int32_t num_groups, int32_t num_experts,
                                       int32_t num_topk, int32_t max_tokens, int32_t hidden_size,
                                       int32_t ranks_per_node, double timeout_s,
                                       const std::vector<DeviceTuple>& devices, int num_sms,
                                       const WindowTuple& window, bool between_hosts) {
  const RemoteTransport* remote = between_hosts ? RemoteLibrary() : &MappedTransport();
  if (remote == nullptr) throw std::runtime_error("load_remote_library has not been called");
  std::vector<LocalDevice> local_devices;
  for (const DeviceTuple& device : devices) local_devices.push_back(DeviceOf(device));
  auto comm = OwnedHere(
      new CudaCommunicator(
          MakeConfig(id, fingerprint, locations, process, num_ranks, num_groups, num_experts,
                     num_topk, max_tokens, hidden_size, ranks_per_node, timeout_s),
          WindowSize{window.first, window.second}, local_devices, num_sms, *remote),
      &Destroy);
  Register(comm);
  return comm;
}

std::string UnsupportedReason(int32_t num_ranks, int32_t num_experts, int32_t num_topk,
                              int32_t max_tokens, const DeviceTuple& device, size_t limit_bytes,
                              const WindowTuple& window) {
  GroupShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = num_experts;
  shape.num_topk = num_topk;
  shape.max_tokens = max_tokens;
  std::string error = UnsupportedReasonOfLimits(shape);
  if (error.empty())
    error = UnsupportedReasonOfDevice(device.first, shape, {window.first, window.second});
  if (error.empty()) error = UnsupportedReasonOfPool(DeviceOf(device), limit_bytes);
  return error;
}

std::vector<ExportTuple> Exports(const CudaCommunicator& comm) {
  std::vector<ExportTuple> exports;
  for (const ExportedMemory& memory : comm.Exports()) {
    exports.emplace_back(memory.descriptor, memory.bytes, memory.gpu, memory.id);
  }
  return exports;
}

void AttachPeer(CudaCommunicator& comm, int process, const std::vector<ExportTuple>& exports) {
  std::vector<ExportedMemory> memories;
  for (const auto& [descriptor, bytes, gpu, id] : exports) {
    memories.push_back({descriptor, bytes, gpu, id});
  }
  comm.AttachPeer(process, memories);
}

void Check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

RemoteProcess& ProcessOfRemoteLibrary() {
  if (RemoteLibrary() == nullptr) throw std::runtime_error("load_remote_library was not called");
  return *RemoteLibrary()->process();
}

nb::bytes MakeRemoteId() {
  std::string id;
  {
    nb::gil_scoped_release release;
    Check(ProcessOfRemoteLibrary().MakeId(&id));
  }
  return nb::bytes(id.data(), id.size());
}

void ConnectProcesses(const nb::bytes& id, int process, int num_processes, int device) {
  const std::string text(id.c_str(), id.size());
  nb::gil_scoped_release release;
  OnDevice current(device);
  Check(ProcessOfRemoteLibrary().Init(text, process, num_processes));
}

// Seconds and SMs of the last op of each rank.
std::vector<std::pair<double, int>> LastOps(const CudaCommunicator& comm) {
  std::vector<std::pair<double, int>> ops;
  for (const auto& [seconds, num_sms] : comm.LastOps()) ops.emplace_back(seconds, num_sms);
  return ops;
}

std::string LaunchOp(CudaCommunicator& comm, const OpSignature& op, const OpBytes& bytes,
                     std::initializer_list<PeerArray> read_by_peers, const OpLaunch& launch,
                     const CudaCommunicator::Enqueue& enqueue) {
  return comm.LaunchOp(op, bytes, read_by_peers, launch, enqueue);
}

// Those of the verbs, and of the router, which have one stage.
nb::dict AllTargets() {
  nb::dict targets = Targets();
  const auto add = [&](const char* name, auto* execute) {
    nb::dict stages;
    stages["execute"] = Capsule(execute);
    targets[name] = stages;
  };
  add("jax_deepep_expert_choice", ExpertChoiceHandler);
  add("jax_deepep_fair_share", FairShareHandler);
  return targets;
}

NB_MODULE(_cuda, module) {
  // Programs in JAX's caches hold communicators until the interpreter is gone.
  nb::set_leak_warnings(false);
  module.attr("source_digest") = JAX_DEEPEP_SOURCE_DIGEST;
  DefineNumbers(module);
  module.def("state_types", &StateTypes);
  module.def("targets", &AllTargets);
  module.def("router_limits", [] {
    const RouterLimits limits = RouterLimitsHere();
    return std::tuple(limits.most_experts, limits.most_groups, limits.most_entries);
  });
  module.attr("launch_op") = Capsule(OpLauncher{&LaunchOp});
  module.def("unsupported_reason", &UnsupportedReason, nb::arg("num_ranks"), nb::arg("num_experts"),
             nb::arg("num_topk"), nb::arg("max_tokens"), nb::arg("device"), nb::arg("limit_bytes"),
             nb::arg("window"), WithoutGil());
  module.def(
      "load_remote_library",
      [](const std::string& path) { Check(LoadRemoteLibrary(path, JAX_DEEPEP_SOURCE_DIGEST)); },
      nb::arg("path"), WithoutGil());
  module.def("make_remote_id", &MakeRemoteId);
  module.def("connect_processes", &ConnectProcesses, nb::arg("id"), nb::arg("process"),
             nb::arg("num_processes"), nb::arg("device"));
  nb::class_<CudaCommunicator>(module, "Communicator")
      .def(nb::new_(&Make), nb::arg("id"), nb::arg("fingerprint"), nb::arg("locations"),
           nb::arg("process"), nb::arg("num_ranks"), nb::arg("num_groups"), nb::arg("num_experts"),
           nb::arg("num_topk"), nb::arg("max_tokens"), nb::arg("hidden_size"),
           nb::arg("ranks_per_node"), nb::arg("timeout_s"), nb::arg("devices"), nb::arg("num_sms"),
           nb::arg("window"), nb::arg("between_hosts"), WithoutGil())
      .def("exports", &Exports, WithoutGil())
      .def("attach_peer", &AttachPeer, nb::arg("process"), nb::arg("exports"), WithoutGil())
      .def("start", &CudaCommunicator::Start, nb::arg("ranks_per_gpu"), nb::arg("processes"),
           WithoutGil())
      .def_prop_ro("most_blocks", &CudaCommunicator::most_blocks)
      .def_prop_ro("between_nodes", &CudaCommunicator::between_nodes)
      .def_prop_ro("last_ops", &LastOps, WithoutGil())
      .def_prop_ro("buffer_bytes", &CudaCommunicator::buffer_bytes)
      .def_prop_ro("broken", &CudaCommunicator::broken)
      .def_prop_ro("timed_out", &CudaCommunicator::timed_out)
      .def_prop_ro("invalid_routing", &CudaCommunicator::invalid_routing)
      .def("wait_for_ops", &CudaCommunicator::WaitForOps, WithoutGil())
      .def("close", &CudaCommunicator::Close, WithoutGil())
      .def(
          "leave", [](CudaCommunicator& comm, const std::string&) { comm.Leave(); }, nb::arg("why"),
          WithoutGil())
      .def("take_stats", &TakeStats<CudaCommunicator>);
}

}  // namespace
}  // namespace jax_deepep
