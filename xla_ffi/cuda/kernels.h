// The kernels of a mode as a table, through which the communicator launches them. Every mode has
// its own folder.
#ifndef JAX_DEEPEP_CUDA_KERNELS_H_
#define JAX_DEEPEP_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/block_count.h"
#include "cuda/device_facts.h"
#include "cuda/kernel_stream.h"
#include "cuda/op_frame.h"
#include "interface/verbs.h"

namespace jax_deepep {

// Enqueues one kernel and returns an error or null.
template <typename Params>
using LaunchFunction = const char* (*)(const OpFrame& frame, const Params& params, int num_blocks,
                                       const DeviceFacts& device, const KernelStream& stream);

// The kernels of a verb in a mode, defined in a file of the mode's folder.
template <typename Kernels, typename Params>
struct VerbKernels {
  // As LaunchFunction.
  static const char* Launch(const OpFrame& frame, const Params& params, int num_blocks,
                            const DeviceFacts& device, const KernelStream& stream);
  // Load them into the current device: lazy loading can wait for a running kernel that itself waits
  // for a peer. Returns an error or null.
  static const char* Load(int max_shared_bytes);
};

struct KernelSet {
  Mode mode = Mode::kThroughput;
  int64_t flags = 0;         // of OpSignature
  bool reads_peers = false;  // whether peers read operands in place, in XLA's pool
  // Bytes of each rank's memory, behind its control block, that peers may write.
  int64_t (*window_bytes)(const GroupShape& shape, const WindowSize& size) = nullptr;
  // Load the kernels of all verbs, likewise.
  const char* (*load)(int max_shared_bytes) = nullptr;
  // The minimum of shared memory per block.
  int64_t (*least_shared_bytes)(const GroupShape& shape, const WindowSize& size) = nullptr;
  // The blocks of an op, at most `most`.
  int (*num_blocks)(const OpBytes& bytes, int most) = nullptr;
  Verbs::Table<LaunchFunction> launch;

  template <typename Params>
  LaunchFunction<Params> LaunchOf() const {
    return std::get<LaunchFunction<Params>>(launch);
  }

  // `Kernels` has kMode, kFlags, kReadsPeers, WindowBytes, LeastSharedBytes and NumBlocks, as
  // above.
  template <typename Kernels>
  static KernelSet Of() {
    KernelSet set;
    set.mode = Kernels::kMode;
    set.flags = Kernels::kFlags;
    set.reads_peers = Kernels::kReadsPeers;
    set.window_bytes = &Kernels::WindowBytes;
    set.load = [](int max_shared_bytes) {
      const char* error = nullptr;
      Verbs::ForEach([&](auto type) {
        using Params = typename decltype(type)::type;
        if (error == nullptr) error = VerbKernels<Kernels, Params>::Load(max_shared_bytes);
      });
      return error;
    };
    set.least_shared_bytes = &Kernels::LeastSharedBytes;
    set.num_blocks = &Kernels::NumBlocks;
    Verbs::ForEach([&](auto type) {
      using Params = typename decltype(type)::type;
      std::get<LaunchFunction<Params>>(set.launch) = &VerbKernels<Kernels, Params>::Launch;
    });
    return set;
  }
};

// The kernels of a mode for groups of this shape: there are others between nodes.
const KernelSet& KernelsOf(Mode mode, const GroupShape& shape);

// Those that ops of a communicator may take.
std::vector<const KernelSet*> KernelsFor(const GroupShape& shape, const WindowSize& window);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNELS_H_
