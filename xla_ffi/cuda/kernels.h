// The kernels of a mode as a table, through which the communicator launches them. Every mode has
// its own folder.
#ifndef JAX_DEEPEP_CUDA_KERNELS_H_
#define JAX_DEEPEP_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/block_count.h"
#include "cuda/device_facts.h"
#include "cuda/op_frame.h"
#include "interface/verbs.h"

namespace jax_deepep {

// Enqueues one kernel and returns an error or null.
template <typename Params>
using LaunchFunction = const char* (*)(const OpFrame& frame, const Params& params, int num_blocks,
                                       const DeviceFacts& device, cudaStream_t stream);

// The kernels of a verb in a mode, defined in a file of the mode's folder.
template <typename Mode, typename Params>
struct VerbKernels {
  // As LaunchFunction.
  static const char* Launch(const OpFrame& frame, const Params& params, int num_blocks,
                            const DeviceFacts& device, cudaStream_t stream);
  // Load them into the current device: lazy loading can wait for a running kernel that itself waits
  // for a peer. Returns an error or null.
  static const char* Load(int max_shared_bytes);
};

struct KernelSet {
  const char* mode = nullptr;
  int64_t flags = 0;         // of OpSignature
  bool reads_peers = false;  // whether peers read operands in place, in XLA's pool
  // Bytes of each rank's memory, behind its control block, that peers may write.
  int64_t (*window_bytes)(const GroupShape& shape) = nullptr;
  // Load the kernels of all verbs, likewise.
  const char* (*load)(int max_shared_bytes) = nullptr;
  // The minimum of shared memory per block.
  int64_t (*least_shared_bytes)(const GroupShape& shape) = nullptr;
  // The blocks of an op, at most `most`.
  int (*num_blocks)(const OpBytes& bytes, int most) = nullptr;
  Verbs::Table<LaunchFunction> launch;

  template <typename Params>
  LaunchFunction<Params> LaunchOf() const {
    return std::get<LaunchFunction<Params>>(launch);
  }

  // `Mode` has kName, kFlags, kReadsPeers, WindowBytes, LeastSharedBytes and NumBlocks, as above.
  template <typename Mode>
  static KernelSet Of() {
    KernelSet set;
    set.mode = Mode::kName;
    set.flags = Mode::kFlags;
    set.reads_peers = Mode::kReadsPeers;
    set.window_bytes = &Mode::WindowBytes;
    set.load = [](int max_shared_bytes) {
      const char* error = nullptr;
      Verbs::ForEach([&](auto type) {
        using Params = typename decltype(type)::type;
        if (error == nullptr) error = VerbKernels<Mode, Params>::Load(max_shared_bytes);
      });
      return error;
    };
    set.least_shared_bytes = &Mode::LeastSharedBytes;
    set.num_blocks = &Mode::NumBlocks;
    Verbs::ForEach([&](auto type) {
      using Params = typename decltype(type)::type;
      std::get<LaunchFunction<Params>>(set.launch) = &VerbKernels<Mode, Params>::Launch;
    });
    return set;
  }
};

// All modes, the default first.
const std::vector<KernelSet>& KernelSets();

// The kernels of a mode. Throws std::invalid_argument if there is no such mode.
const KernelSet& KernelsOf(const std::string& mode);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNELS_H_
