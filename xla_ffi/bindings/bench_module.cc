// The Python module jax_deepep._cuda_bench: baselines of the bench on GPUs, loaded by the bench
// alone. Row baselines are ops of communicators of the module _cuda; link measurements need neither
// it nor XLA.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bench/clock.h"
#include "bench/links.h"
#include "bench/row_baselines.h"
#include "bench/row_handlers.h"
#include "bindings/op_launcher.h"
#include "cuda/op_frame.h"
#include "handlers/platform.h"
#include "source_digest.h"

namespace jax_deepep {
namespace {

namespace nb = nanobind;

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

// Use the call-site type and the op launcher of _cuda.
void Connect(const nb::capsule& type_id, const nb::capsule& launcher) {
  CallSite::id = *static_cast<const ffi::TypeId*>(type_id.data());
  launch_op = reinterpret_cast<OpLauncher>(launcher.data());
}

// Load the kernels of the row baselines into devices, now: see kernel_launch.h.
void Load(const std::vector<int>& ordinals) {
  int before = 0;
  cudaGetDevice(&before);
  const char* error = nullptr;
  for (int ordinal : ordinals) {
    int bytes = 0;
    cudaSetDevice(ordinal);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
    for (auto* load : {LoadGatherRows, LoadSumRows, LoadClock}) {
      if (error == nullptr) error = load(bytes - kStaticSharedBytes);
    }
    cudaDeviceSynchronize();
  }
  cudaSetDevice(before);
  if (error != nullptr) throw std::runtime_error(std::string("loading kernels failed: ") + error);
}

// The PCI address of a device, which no two GPUs of a host share.
std::string GpuOf(int ordinal) {
  char address[32] = {};
  const cudaError_t error = cudaDeviceGetPCIBusId(address, sizeof(address), ordinal);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return address;
}

template <typename Function>
nb::capsule Capsule(Function* function) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

// The execute stages of the row baselines.
nb::dict Handlers() {
  nb::dict handlers;
  handlers["jax_deepep_gather_rows"] = Capsule(GatherRowsHandler);
  handlers["jax_deepep_add_rows"] = Capsule(AddRowsHandler);
  handlers["jax_deepep_sum_rows"] = Capsule(SumRowsHandler);
  return handlers;
}

// A custom call of no communicator: its only stage.
nb::capsule ClockTarget() { return Capsule(ClockHandler); }

nb::bytes Handle(const LinkRank& rank) {
  const std::string handle = rank.handle();
  return nb::bytes(handle.data(), handle.size());
}

void Attach(LinkRank& link, int rank, const nb::bytes& handle) {
  link.Attach(rank, {handle.c_str(), handle.size()});
}

NB_MODULE(_cuda_bench, module) {
  module.attr("source_digest") = JAX_DEEPEP_SOURCE_DIGEST;
  module.attr("piece_bytes") = kPieceBytes;
  module.attr("max_link_rows") = kMaxLinkRows;
  // Of shared memory on SM90, less what kernels declare: for the rows that they have in flight.
  module.attr("in_flight_bytes") = 227 * 1024 - kStaticSharedBytes;
  module.def("connect", &Connect, nb::arg("type_id"), nb::arg("launch_op"));
  module.def("load", &Load, nb::arg("ordinals"), WithoutGil());
  module.def("handlers", &Handlers);
  module.def("clock", &ClockTarget);
  module.def("gpu", &GpuOf, nb::arg("ordinal"), WithoutGil());
  nb::enum_<ChainStep>(module, "ChainStep")
      .value("NOTHING", ChainStep::kNothing)
      .value("FLAG", ChainStep::kFlag)
      .value("PUSH", ChainStep::kPush)
      .value("PULL", ChainStep::kPull)
      .value("PUSH_PULL_BACK", ChainStep::kPushPullBack)
      .value("PUSH_PUSH_BACK", ChainStep::kPushPushBack);
  nb::class_<LinkRank>(module, "LinkRank")
      .def(nb::init<int, int, int, int, int64_t, int64_t>(), nb::arg("ordinal"), nb::arg("rank"),
           nb::arg("num_ranks"), nb::arg("rows"), nb::arg("row_bytes"), nb::arg("copy_bytes"))
      .def_prop_ro("handle", &Handle)
      .def("attach", &Attach, nb::arg("rank"), nb::arg("handle"))
      .def("chain", &LinkRank::Chain, nb::arg("step"), nb::arg("rows"), nb::arg("length"),
           nb::arg("trials"), WithoutGil())
      .def("copy", &LinkRank::Copy, nb::arg("push"), nb::arg("bulk"), nb::arg("num_sms"),
           nb::arg("bytes"), nb::arg("trials"), WithoutGil())
      .def("round_trips", &LinkRank::RoundTrips, nb::arg("with_row"), nb::arg("count"),
           nb::arg("trials"), WithoutGil());
}

}  // namespace
}  // namespace jax_deepep
