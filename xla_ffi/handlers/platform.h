// The platform that the handlers are compiled for; each has a separate module.
//
// It defines PlatformCommunicator; LaunchContext, what XLA passes to a custom call besides its
// buffers; LaunchResult, what an execute stage returns; and Launch for the parameters of every
// verb.
#ifndef JAX_DEEPEP_HANDLERS_PLATFORM_H_
#define JAX_DEEPEP_HANDLERS_PLATFORM_H_

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

#ifdef JAX_DEEPEP_CUDA
#include "cuda/communicator.h"
#else
#include "cpu/communicator.h"
#endif

namespace jax_deepep {

namespace ffi = xla::ffi;

struct CallSite;

#ifdef JAX_DEEPEP_CUDA
using PlatformCommunicator = CudaCommunicator;
using LaunchResult = ffi::Error;

// An op may be captured in a CUDA graph: its handler only enqueues a kernel, unless an operand is a
// constant of the program.
inline constexpr std::initializer_list<ffi::Traits> kTraits = {ffi::Traits::kCmdBufferCompatible};

struct LaunchContext {
  int64_t device = 0;  // CUDA's ordinal
  cudaStream_t stream = nullptr;
  ffi::ScratchAllocator scratch;

  // `rank` is the operand of that name.
  OpLaunch op_launch(const CallSite* site, const ffi::AnyBuffer& rank);
};
#else
using PlatformCommunicator = Communicator;
using LaunchResult = ffi::Future;

inline constexpr std::initializer_list<ffi::Traits> kTraits = {};

struct LaunchContext {
  int64_t device = 0;  // JAX's id
  int64_t run = 0;     // of the program
};
#endif

// What our calls of one program have in common. Complete when the program has been compiled.
struct ProgramCalls {
  const bool on_main_thread;  // compiled there, and so presumably launched from there
  std::atomic<int64_t> count{0};

  explicit ProgramCalls(bool on_main_thread) : on_main_thread(on_main_thread) {}
};

// Attribute "site" of every custom call: the communicator's id and fingerprint, then `call`,
// `mode`, `channel` and `part` of CallSite.
using SiteAttribute = ffi::Span<const int64_t>;

// One custom call in one loaded program; pins the communicator for as long as the program lives.
// Its address identifies the call: XLA makes one per instruction, shared by the devices of a
// process.
struct CallSite {
  static ffi::TypeId id;
  static const XLA_FFI_TypeInfo info;

  std::shared_ptr<PlatformCommunicator> comm;
  int64_t call = 0;     // as in OpSignature
  int32_t channel = 0;  // as in OpFrame
  Part part = Part::kWhole;
  Mode mode = Mode::kThroughput;  // on GPUs; on CPUs there is one way to communicate
  // Index of this instruction among those of our calls in its program, in the order in which XLA
  // instantiates them: calls that share `call`, because their function was lowered once, have each
  // their own.
  int64_t number = 0;
  std::shared_ptr<const ProgramCalls> program;
};

// Launch, for the parameters of any verb: do a rank's part of an op, or return `error`. `rank` is
// what the program believes this device's rank to be.
#ifdef JAX_DEEPEP_CUDA
inline OpLaunch LaunchContext::op_launch(const CallSite* site, const ffi::AnyBuffer& rank) {
  return {device,
          stream,
          site->call,
          site->channel,
          site->part,
          static_cast<const int32_t*>(rank.untyped_data()),
          [this](size_t bytes) -> void* { return scratch.Allocate(bytes).value_or(nullptr); }};
}

// Enqueue one kernel on XLA's stream, after copies of constants, and wait for nothing.
template <typename Params>
LaunchResult Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                    const std::string& error, const Params& params) {
  const OpLaunch launch = context.op_launch(site, rank);
  if (!error.empty()) site->comm->NotifyNotLaunched(SignatureOf(params, site->call), launch);
  const std::string failure =
      error.empty() ? site->comm->Launch(params, site->mode, launch) : error;
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    std::string("jax_deepep ") + VerbTraits<Params>::kName + ": " + failure);
}
#else
// Join the ranks, and return a future that is ready when the op has ended.
ffi::Future JoinRanks(CallSite* site, const LaunchContext& context, const ffi::AnyBuffer& rank,
                      const std::string& error, std::unique_ptr<Op> op);

template <typename Params>
LaunchResult Launch(CallSite* site, LaunchContext& context, const ffi::AnyBuffer& rank,
                    const std::string& error, const Params& params) {
  return JoinRanks(site, context, rank, error,
                   std::make_unique<VerbOp<Params>>(params, site->call));
}
#endif

// Called when JAX begins to compile or load a program: its calls are numbered from zero, so that
// numbers do not depend on the programs that a process has compiled before.
void BeginProgram(bool on_main_thread);

}  // namespace jax_deepep

// Lets a handler bind .Ctx<LaunchContext>().
template <>
struct xla::ffi::CtxDecoding<jax_deepep::LaunchContext> {
  using Type = jax_deepep::LaunchContext;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
#ifdef JAX_DEEPEP_CUDA
    const auto stream = CtxDecoding<PlatformStream<cudaStream_t>>::Decode(api, context, diagnostic);
    auto scratch = CtxDecoding<ScratchAllocator>::Decode(api, context, diagnostic);
    if (!device.has_value() || !stream.has_value() || !scratch.has_value()) return std::nullopt;
    return Type{*device, *stream, *std::move(scratch)};
#else
    const auto run = CtxDecoding<RunId>::Decode(api, context, diagnostic);
    if (!device.has_value() || !run.has_value()) return std::nullopt;
    return Type{*device, run->run_id};
#endif
  }
};

#endif  // JAX_DEEPEP_HANDLERS_PLATFORM_H_
