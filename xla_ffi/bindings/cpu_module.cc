// The Python module jax_deepep._cpu: tables of capsules, and the native communicator.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "bindings/module_tables.h"
#include "cpu/communicator.h"
#include "handlers/call_site.h"
#include "handlers/registry.h"
#include "source_digest.h"

namespace jax_deepep {
namespace {

NB_MODULE(_cpu, module) {
  // Programs in JAX's caches hold communicators until the interpreter is gone.
  nb::set_leak_warnings(false);
  module.attr("source_digest") = JAX_DEEPEP_SOURCE_DIGEST;
  DefineNumbers(module);
  module.def("state_types", &StateTypes);
  module.def("targets", &Targets);
  module.def("begin_program", &BeginProgram, nb::arg("on_main_thread"));
  nb::class_<Communicator>(module, "Communicator")
      .def(nb::new_([](int64_t id, int64_t fingerprint, const LocationTuples& locations,
                       int32_t process, int32_t num_ranks, int32_t num_groups, int32_t num_experts,
                       int32_t num_topk, int32_t max_tokens, int32_t hidden_size,
                       int32_t ranks_per_node, double timeout_s) {
             auto comm = OwnedHere(
                 new Communicator(MakeConfig(id, fingerprint, locations, process, num_ranks,
                                             num_groups, num_experts, num_topk, max_tokens,
                                             hidden_size, ranks_per_node, timeout_s)),
                 +[](Communicator* comm) { delete comm; });
             Register(comm);
             return comm;
           }),
           nb::arg("id"), nb::arg("fingerprint"), nb::arg("locations"), nb::arg("process"),
           nb::arg("num_ranks"), nb::arg("num_groups"), nb::arg("num_experts"), nb::arg("num_topk"),
           nb::arg("max_tokens"), nb::arg("hidden_size"), nb::arg("ranks_per_node"),
           nb::arg("timeout_s"))
      .def_prop_ro("segment_descriptor", &Communicator::segment_descriptor)
      .def_prop_ro("shares_memory", &Communicator::shares_memory)
      .def("attach_peer", &Communicator::AttachPeer, nb::arg("process"), nb::arg("descriptor"))
      .def("attach_remote", &Communicator::AttachRemote, nb::arg("group"), nb::arg("process"),
           nb::arg("descriptor"))
      .def("start", &Communicator::Start)
      .def_prop_ro("buffer_bytes", &Communicator::buffer_bytes)
      .def_prop_ro("num_running_ops", &Communicator::num_running_ops)
      .def_prop_ro("broken", &Communicator::broken)
      .def_prop_ro("timed_out", &Communicator::timed_out)
      .def_prop_ro("invalid_routing", &Communicator::invalid_routing)
      .def(
          "wait_for_ops",
          [](Communicator& comm) {
            comm.WaitForOps();
            return std::string();  // no device errors on a CPU
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("close", &Communicator::Close, nb::call_guard<nb::gil_scoped_release>())
      .def("leave", &Communicator::Leave, nb::arg("why"), nb::call_guard<nb::gil_scoped_release>())
      .def("take_stats", &TakeStats<Communicator>);
}

}  // namespace
}  // namespace jax_deepep
