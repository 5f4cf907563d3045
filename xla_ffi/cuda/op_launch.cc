// How the communicator launches ops: operands where peers can read them, then one kernel; or a
// notification of peers if that is impossible.
#include <algorithm>
#include <mutex>
#include <string>

#include "cuda/communicator.h"
#include "cuda/rank_kernels.h"
#include "interface/op_signature.h"

namespace jax_deepep {
namespace {

// Peers have mapped only the pool. Outside of it are constants of the program, arrays that XLA did
// not allocate (from DLPack, in host memory), and XLA's collective memory: copy such an array to
// the pool for the duration of the op, which ends once all have read it. Returns an error, or
// empty.
std::string CopyToPool(const PeerArray& array, const DeviceFacts& facts, const OpLaunch& launch) {
  const std::string outside =
      "an operand that peers read is not in the memory pool that they have mapped: ";
  const std::string what =
      "it is a constant of the program, an array that XLA did not allocate, or in memory of XLA's "
      "collectives (--xla_gpu_enable_nccl_user_buffers), ";
  const std::string no_pool =
      outside + "XLA did not preallocate it (XLA_PYTHON_CLIENT_PREALLOCATE=true, the default)";
  if (!array.replace) return no_pool;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(launch.stream, &capture);
  if (capture != cudaStreamCaptureStatusNone) {  // XLA would reuse the copy before a replay
    return outside + what +
           "which a captured op cannot copy; pass it as an argument that XLA has computed or "
           "copied, without that flag";
  }
  if (error == cudaSuccess) {
    void* copy = launch.allocate(array.bytes);
    if (copy == nullptr) {
      return outside + what + "and there are no " + std::to_string(array.bytes) +
             " bytes left in the pool to copy it";
    }
    if (!facts.Holds(copy)) return no_pool;
    array.replace(copy);
    error = cudaMemcpyAsync(copy, array.data, array.bytes, cudaMemcpyDefault, launch.stream);
  }
  return error == cudaSuccess ? "" : outside + "copying it failed: " + cudaGetErrorString(error);
}

}  // namespace

int CudaCommunicator::most_blocks() const {
  int most = kMaxBlocks;
  for (const auto& rank : ranks_) most = std::min(most, rank->most_blocks);
  return most;
}

const CudaCommunicator::LocalRank* CudaCommunicator::RankOn(int64_t device) const {
  for (const auto& rank : ranks_) {
    if (rank->ordinal == device) return rank.get();
  }
  return nullptr;
}

OpFrame CudaCommunicator::FrameOf(const LocalRank& rank, const OpSignature& op,
                                  const OpLaunch& launch) {
  OpFrame frame = rank.frame;
  frame.channel = launch.channel;
  frame.op = op;
  frame.op_hash = op.Hash();
  frame.launch = ++num_launches_;
  frame.expected_rank = launch.expected_rank;
  return frame;
}

// Peers must not wait for an op that cannot be launched, and this rank's next op must not take its
// step. In order with the ops before it, unless the stream is captured: a graph whose capture has
// failed is never run.
void CudaCommunicator::Abort(const LocalRank& rank, Failure failure, const OpSignature& op,
                             const OpLaunch& launch) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const bool in_order = cudaStreamIsCapturing(launch.stream, &capture) == cudaSuccess &&
                        capture == cudaStreamCaptureStatusNone;
  LaunchAbort(FrameOf(rank, op, launch), failure, in_order ? launch.stream : rank.stream);
}

void CudaCommunicator::NotifyNotLaunched(const OpSignature& op, const OpLaunch& launch) {
  std::shared_lock<std::shared_mutex> lock(launch_mutex_);
  if (const LocalRank* rank = RankOn(launch.device)) {
    Abort(*rank, Failure::kNotLaunched, op, launch);
  }
}

std::string CudaCommunicator::CopyOperandsToPool(const LocalRank& rank,
                                                 const std::vector<PeerArray>& read_by_peers,
                                                 const OpLaunch& launch) const {
  for (const PeerArray& array : read_by_peers) {
    if (array.data == nullptr || rank.facts.Holds(array.data)) continue;
    if (std::string error = CopyToPool(array, rank.facts, launch); !error.empty()) return error;
  }
  return "";
}

std::string CudaCommunicator::LaunchOp(const OpSignature& op, const OpBytes& bytes,
                                       const std::vector<PeerArray>& read_by_peers,
                                       const OpLaunch& launch, const Enqueue& enqueue) {
  const auto name = [this] { return "communicator #" + std::to_string(config_.id); };
  // Close waits for this lock: an op is enqueued before the communicator is closed, or not at all.
  std::shared_lock<std::shared_mutex> lock(launch_mutex_);
  const LocalRank* rank = RankOn(launch.device);
  if (rank == nullptr) {
    return "device " + std::to_string(launch.device) + " is not in the mesh of " + name();
  }
  if (closed_) {
    Abort(*rank, Failure::kClosed, op, launch);
    return name() + " is closed; make a new Communicator and compile again";
  }
  std::string error = CopyOperandsToPool(*rank, read_by_peers, launch);
  if (error.empty()) {
    const bool low_latency = (op.flags & OpSignature::kLowLatency) != 0;
    const KernelSet& kernels = KernelsOf(low_latency ? Mode::kLowLatency : Mode::kThroughput);
    const int blocks =
        requested_sms_ > 0 ? rank->most_blocks : kernels.num_blocks(bytes, rank->most_blocks);
    const char* failed = enqueue(FrameOf(*rank, op, launch), blocks, rank->facts);
    if (failed != nullptr) error = failed;
  }
  if (!error.empty()) Abort(*rank, Failure::kNotLaunched, op, launch);
  return error;
}

}  // namespace jax_deepep
