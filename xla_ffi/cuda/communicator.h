// The native side of a communicator on GPUs: the memory that ranks share, and what devices
// report about failed ops. Launching an op does not block.
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
#include "cuda/remote_transport.h"
#include "cuda/unsupported_reason.h"
#include "interface/communicator_config.h"
#include "interface/op_signature.h"
#include "interface/verb_traits.h"
#include "transport/cuda_peer.h"

namespace jax_deepep {

// The arguments with which XLA launches an op.
struct OpLaunch {
  int64_t device = 0;  // CUDA's ordinal
  cudaStream_t stream = nullptr;
  int64_t call = 0;     // as in OpSignature
  int32_t channel = 0;  // as in OpFrame
  Part part = Part::kWhole;
  const int32_t* expected_rank = nullptr;  // as in OpFrame
  // Returns memory of XLA's pool, which XLA reuses after the op, or null.
  std::function<void*(size_t bytes)> allocate;
};

class CudaCommunicator {
 public:
  // Ops may take low-latency mode if the window has tokens. `devices` are those of this process, in
  // the order of config.locations. `remote` carries puts in groups of several nodes. Then call
  // AttachPeer for every process that shares memory with this one, itself included, and Start.
  // Throws std::runtime_error.
  CudaCommunicator(CommunicatorConfig config, const WindowSize& window,
                   const std::vector<LocalDevice>& devices, int num_sms,
                   const RemoteTransport& remote = MappedTransport());
  ~CudaCommunicator();

  // For each device of this process in order: its control block, then XLA's pool. The caller
  // owns the descriptors. Throws std::runtime_error.
  std::vector<ExportedMemory> Exports() const;

  // Map the memory that a process has exported. Throws std::runtime_error.
  void AttachPeer(int process, const std::vector<ExportedMemory>& memories);

  // Set up the frames of kernels and load them. `ranks_per_gpu` has, for each device of this
  // process in order, how many ranks of the whole mesh are on it; `processes` are those of the mesh
  // in ascending order. Collective between nodes. Throws std::runtime_error.
  void Start(const std::vector<int>& ranks_per_gpu, const std::vector<int>& processes);

  const CommunicatorConfig& config() const { return config_; }
  const GroupShape& shape() const { return config_.shape; }
  // The most SMs that an op may take, on any device of this process.
  int most_blocks() const;

  // Enqueue a rank's part of an op. Returns an error, of which peers are notified, or empty.
  template <typename Params>
  std::string Launch(Params params, Mode mode, const OpLaunch& launch) {
    const KernelSet& kernels = Kernels(mode);
    std::vector<PeerArray> read_by_peers;
    if (kernels.reads_peers) read_by_peers = VerbTraits<Params>::ReadByPeers(shape(), &params);
    OpSignature op = SignatureOf(params, launch.call);
    op.flags |= kernels.flags;
    return LaunchOp(op, BytesOf(shape(), params), read_by_peers, launch,
                    [&](const OpFrame& frame, int num_blocks, const DeviceFacts& facts,
                        const KernelStream& stream) {
                      const auto enqueue = kernels.LaunchOf<Params>();
                      return enqueue(frame, params, num_blocks, facts, stream);
                    });
  }

  // The same for any op: `enqueue` gets the op's frame once all arrays that peers read are in the
  // pool. The signature identifies the op on all ranks.
  using Enqueue = std::function<const char*(const OpFrame&, int num_blocks, const DeviceFacts&,
                                            const KernelStream&)>;
  std::string LaunchOp(const OpSignature& op, const OpBytes& bytes,
                       const std::vector<PeerArray>& read_by_peers, const OpLaunch& launch,
                       const Enqueue& enqueue);

  // Notify peers of an op that the host cannot launch.
  void NotifyNotLaunched(const OpSignature& op, const OpLaunch& launch);

  // Load kernels into the devices of this process. Throws std::runtime_error.
  void Load(const char* (*load)(int max_shared_bytes));

  // Wait until the devices of this process have completed everything launched on them. Returns the
  // first error of any of their contexts, or empty.
  std::string WaitForOps() const;

  // Wait, then reject new ops; replayed graphs end at once from now on. Unmaps peers' pools;
  // control blocks stay while programs may be replayed. Idempotent.
  void Close();

  // Abort running ops, and all later ones, and notify peers, which may wait for ops in vain: the
  // program has ended with an error.
  void Leave();

  // The error that broke the communicator, or empty. Does not access a device.
  std::string broken() const;

  // Whether that was a peer that did not arrive in time.
  bool timed_out() const;

  // A description of the first op with invalid routing entries, or empty.
  std::string invalid_routing() const;

  // Return what was counted since the last call.
  Traffic TakeTraffic();

  // Device time and SMs of the last op of each rank of this process.
  struct LastOp {
    double seconds;
    int num_sms;
  };
  std::vector<LastOp> LastOps() const;

  // How rows get to other nodes, in a few words; empty on one node.
  std::string between_nodes() const {
    return ranks_.empty() || !ranks_[0]->remote ? "" : ranks_[0]->remote->Describe();
  }

  // Bytes of device memory that this process holds for the communicator.
  size_t buffer_bytes() const;

 private:
  // Where a device reports to its host: pinned, so that it can at any time.
  struct FreePinned {
    int device;
    void operator()(HostStatus* status) const;
  };

  // A rank of this process.
  struct LocalRank {
    LocalRank() = default;
    ~LocalRank();
    LocalRank(const LocalRank&) = delete;
    LocalRank& operator=(const LocalRank&) = delete;

    Location location;
    int ordinal = 0;
    DeviceFacts facts;
    DeviceMemory control;
    DeviceMemory pool;
    std::unique_ptr<RemoteMemory> remote;  // null on one node
    std::unique_ptr<HostStatus, FreePinned> status;
    OpFrame frame;                  // without what an op adds
    int most_blocks = 1;            // of an op; num_sms if given
    cudaStream_t stream = nullptr;  // for kernels that must not wait for XLA's streams
    // Of the op in flight on each channel.
    cudaStream_t op_streams[kNumChannels] = {};
    cudaEvent_t begun[kNumChannels] = {};
    cudaEvent_t ended[kNumChannels] = {};
    // By launches, in the order of the program. Counted with those of other communicators.
    void SetInFlight(int channel, bool value);
    int NumOthersInFlight(int channel) const;
    std::atomic<bool> in_flight[kNumChannels] = {};
    std::vector<uint64_t> taken_before;  // counters at the last TakeTraffic
  };

  // The memory of a rank of a local group, of this process or another one.
  struct Peer {
    DeviceMemory control;
    std::shared_ptr<DeviceMemory> pool;  // shared by communicators; none of other nodes
  };

  LocalRank* RankOn(int64_t device) const;
  bool has_several_nodes() const { return shape().num_nodes() > 1; }
  bool maps_other_nodes() const { return &remote_ == &MappedTransport(); }
  const KernelSet& Kernels(Mode mode) const {
    return has_several_nodes() ? remote_.kernels(mode) : KernelsOf(mode, shape());
  }
  void ConnectToOtherNodes(LocalRank& rank, const std::vector<int>& processes) const;
  // Ranks read each other's arrays on one node, and put to those of other nodes with their index.
  bool IsOnNodeOf(int rank, int other) const {
    return shape().NodeOf(rank) == shape().NodeOf(other);
  }
  bool HasIndexOf(int rank, int other) const {
    return shape().RankOnNode(rank, shape().NodeOf(other)) == other;
  }
  int NumBlocks(const LocalRank& rank, const KernelSet& kernels, const OpBytes& bytes,
                const OpLaunch& launch) const;
  static bool AreInPool(const LocalRank& rank, const std::vector<PeerArray>& read_by_peers);
  std::string CopyOperandsToPool(const LocalRank& rank, const std::vector<PeerArray>& read_by_peers,
                                 const OpLaunch& launch) const;
  OpFrame FrameOf(const LocalRank& rank, const OpSignature& op, const OpLaunch& launch);
  void Abort(const LocalRank& rank, Failure failure, const OpSignature& op, const OpLaunch& launch);
  void LaunchAbortOn(const LocalRank& rank, Failure failure, const OpSignature& op,
                     const OpLaunch& launch, cudaStream_t stream);
  void TestPeers() const;
  void TestNodes() const;
  // Mark the communicator as closed on the devices of this process. False if that failed.
  bool MarkClosed();
  // The first rank of this process whose device has reported a failure, or null.
  const LocalRank* FailedRank() const;

  const CommunicatorConfig config_;
  const WindowSize window_;
  const RemoteTransport& remote_;
  const int requested_sms_;
  std::vector<std::unique_ptr<LocalRank>> ranks_;
  std::map<std::pair<int, int>, std::unique_ptr<Peer>> peers_;  // by group and rank
  std::shared_mutex launch_mutex_;                              // shared while enqueueing an op
  bool closed_ = false;                                         // under launch_mutex_
  std::atomic<uint64_t> num_launches_{0};
  std::mutex traffic_mutex_;
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_COMMUNICATOR_H_
