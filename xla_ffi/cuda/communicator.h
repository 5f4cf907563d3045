// The native side of a communicator on GPUs: the memory through which ranks meet, and what a device
// tells about ops that failed. Launching one waits for nothing.
#ifndef JAX_DEEPEP_CUDA_COMMUNICATOR_H_
#define JAX_DEEPEP_CUDA_COMMUNICATOR_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "cuda/block_count.h"
#include "cuda/device_control.h"
#include "cuda/kernels.h"
#include "cuda/op_frame.h"
#include "cuda/unsupported_reason.h"
#include "interface/communicator_config.h"
#include "interface/op_signature.h"
#include "interface/verb_traits.h"
#include "transport/cuda_peer.h"

namespace jax_deepep {

// How XLA launches an op.
struct OpLaunch {
  int64_t device = 0;  // CUDA's ordinal
  cudaStream_t stream = nullptr;
  int64_t call = 0;                        // as in OpSignature
  const int32_t* expected_rank = nullptr;  // as in OpFrame
  // Gives memory of XLA's pool, which XLA reuses after the op, or null.
  std::function<void*(size_t bytes)> allocate;
};

class CudaCommunicator {
 public:
  // `kernels` are those of its mode, and `devices` those of this process, in the order of
  // config.places. AttachPeer for every process that shares a group with this one, itself included,
  // and Start must follow. Throws std::runtime_error.
  CudaCommunicator(CommunicatorConfig config, const KernelSet& kernels,
                   const std::vector<LocalDevice>& devices, int num_sms);
  ~CudaCommunicator();

  // For each device of this process in order: its control block, then XLA's pool. Descriptors are
  // the caller's. Throws std::runtime_error.
  std::vector<ExportedMemory> Exports() const;

  // Map a process's memory, given as it exported it. Throws std::runtime_error.
  void AttachPeer(int process, const std::vector<ExportedMemory>& memories);

  // Complete what kernels need and load them. `ranks_per_gpu` has, for each device of this process
  // in order, how many ranks of the whole mesh are on it. Throws std::runtime_error.
  void Start(const std::vector<int>& ranks_per_gpu);

  const CommunicatorConfig& config() const { return config_; }
  const GroupShape& shape() const { return config_.shape; }
  // The most SMs that an op may take, on any device of this process.
  int most_blocks() const;

  // Enqueue a rank's part of an op. Returns an error, of which peers are told, or nothing.
  template <typename Params>
  std::string Launch(Params params, const OpLaunch& launch) {
    std::vector<PeerArray> read_by_peers;
    if (kernels_.reads_peers) read_by_peers = VerbTraits<Params>::ReadByPeers(shape(), &params);
    OpSignature op = SignatureOf(params, launch.call);
    op.flags |= kernels_.flags;
    return LaunchOp(op, BytesOf(shape(), params), read_by_peers, launch,
                    [&](const OpFrame& frame, int num_blocks, const DeviceFacts& facts) {
                      const auto enqueue = kernels_.LaunchOf<Params>();
                      return enqueue(frame, params, num_blocks, facts, launch.stream);
                    });
  }

  // Enqueue a rank's part of any op: `enqueue` gets the frame of the op, known to all ranks by
  // its signature, once peers can reach all that they read. Likewise.
  using Enqueue = std::function<const char*(const OpFrame&, int num_blocks, const DeviceFacts&)>;
  std::string LaunchOp(const OpSignature& op, const OpBytes& bytes,
                       const std::vector<PeerArray>& read_by_peers, const OpLaunch& launch,
                       const Enqueue& enqueue);

  // Tell peers, in place of an op that the host cannot launch.
  void TellNotLaunched(const OpSignature& op, const OpLaunch& launch);

  // Load kernels into the devices of this process. Throws std::runtime_error.
  void Load(const char* (*load)(int max_shared_bytes));

  // Wait until the devices of this process are through with everything launched on them. Returns
  // an error that one of them has met since its context was made, or nothing.
  std::string WaitForOps() const;

  // Wait, then refuse new ops; replayed graphs end at once from now on. Peers' pools are unmapped;
  // control blocks stay for as long as programs may be replayed. May be repeated.
  void Close();

  // Let running ops end at once, and all later ones: the program has ended with an error, and does
  // no more what peers may wait for.
  void Leave();

  // The error that broke the communicator, or nothing. Asks no device.
  std::string broken() const;

  // Whether that was a peer that did not come in time.
  bool timed_out() const;

  // The first op that met invalid routing entries, described, or nothing.
  std::string invalid_routing() const;

  // Return what was counted since the last call.
  Traffic TakeTraffic();

  // How long the last op of each rank of this process took on its device, and how many SMs.
  struct LastOp {
    double seconds;
    int num_sms;
  };
  std::vector<LastOp> LastOps() const;

  // Bytes of device memory that this process holds for the communicator.
  size_t buffer_bytes() const;

 private:
  // A device tells its host here: pinned, so that it may at any time.
  struct FreePinned {
    int device;
    void operator()(HostStatus* status) const;
  };

  // A rank of this process.
  struct LocalRank {
    Place place;
    int ordinal = 0;
    DeviceFacts facts;
    DeviceMemory control;
    DeviceMemory pool;
    std::unique_ptr<HostStatus, FreePinned> status;
    OpFrame frame;                       // but for what an op adds
    int most_blocks = 1;                 // of an op; those asked for, if any were
    cudaStream_t stream = nullptr;       // for what must not wait for XLA's streams
    std::vector<uint64_t> taken_before;  // counters at the last TakeTraffic
  };

  // What another rank of a local group exported, or a rank of this process.
  struct Peer {
    DeviceMemory control;
    std::shared_ptr<DeviceMemory> pool;  // of all communicators that map it
  };

  const LocalRank* RankOn(int64_t device) const;
  std::string CopyOperandsToPool(const LocalRank& rank, const std::vector<PeerArray>& read_by_peers,
                                 const OpLaunch& launch) const;
  OpFrame FrameOf(const LocalRank& rank, const OpSignature& op, const OpLaunch& launch);
  void GiveUp(const LocalRank& rank, Failure failure, const OpSignature& op,
              const OpLaunch& launch);
  void TestPeers() const;
  // Write on the devices of this process why no op can succeed any more. False if one cannot.
  bool MarkBroken(Failure failure);
  // The first rank of this process whose device has told of a failure, or null.
  const LocalRank* FailedRank() const;

  const CommunicatorConfig config_;
  const KernelSet& kernels_;
  const int requested_sms_;
  std::vector<std::unique_ptr<LocalRank>> ranks_;
  std::map<std::pair<int, int>, std::unique_ptr<Peer>> peers_;  // by group and rank
  std::shared_mutex launch_mutex_;                              // shared by who enqueues an op
  bool closed_ = false;                                         // under launch_mutex_
  std::atomic<uint64_t> num_launches_{0};
  std::mutex traffic_mutex_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_COMMUNICATOR_H_
