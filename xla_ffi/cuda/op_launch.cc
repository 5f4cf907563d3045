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

std::string CudaError(cudaError_t error, const char* what) {
  return error == cudaSuccess ? "" : std::string(what) + " failed: " + cudaGetErrorString(error);
}

}  // namespace

int CudaCommunicator::most_blocks() const {
  int most = kMaxBlocks;
  for (const auto& rank : ranks_) most = std::min(most, rank->most_blocks);
  return most;
}

CudaCommunicator::LocalRank* CudaCommunicator::RankOn(int64_t device) const {
  for (const auto& rank : ranks_) {
    if (rank->ordinal == device) return rank.get();
  }
  return nullptr;
}

OpFrame CudaCommunicator::FrameOf(const LocalRank& rank, const OpSignature& op,
                                  const OpLaunch& launch) {
  OpFrame frame = rank.frame;
  frame.channel = launch.channel;
  if ((op.flags & OpSignature::kLowLatency) != 0) frame.part = launch.part;
  frame.op = op;
  frame.op_hash = op.Hash();
  frame.mark = MarkOf(++num_launches_);
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
  LaunchAbortOn(rank, failure, op, launch, in_order ? launch.stream : rank.stream);
}

void CudaCommunicator::LaunchAbortOn(const LocalRank& rank, Failure failure, const OpSignature& op,
                                     const OpLaunch& launch, cudaStream_t stream) {
  const auto abort = has_several_nodes() ? remote_.abort : &LaunchAbort;
  abort(FrameOf(rank, op, launch), failure, stream);
}

void CudaCommunicator::NotifyNotLaunched(const OpSignature& op, const OpLaunch& launch) {
  std::shared_lock<std::shared_mutex> lock(launch_mutex_);
  if (const LocalRank* rank = RankOn(launch.device)) {
    Abort(*rank, Failure::kNotLaunched, op, launch);
  }
}

bool CudaCommunicator::AreInPool(const LocalRank& rank,
                                 const std::vector<PeerArray>& read_by_peers) {
  return std::all_of(read_by_peers.begin(), read_by_peers.end(), [&](const PeerArray& array) {
    return array.data == nullptr || rank.facts.Holds(array.data);
  });
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

int CudaCommunicator::NumBlocks(const LocalRank& rank, const KernelSet& kernels,
                                const OpBytes& bytes, const OpLaunch& launch) const {
  if (requested_sms_ > 0) return rank.most_blocks;
  const bool on_own_stream = launch.part != Part::kWhole && kernels.reads_peers;
  const int most = on_own_stream
                       ? MostInFlight(rank.most_blocks)
                       : MostWhole(rank.most_blocks, rank.NumOthersInFlight(launch.channel));
  return kernels.num_blocks(bytes, most);
}

std::string CudaCommunicator::LaunchOp(const OpSignature& op, const OpBytes& bytes,
                                       const std::vector<PeerArray>& read_by_peers,
                                       const OpLaunch& launch, const Enqueue& enqueue) {
  const auto name = [this] { return "communicator #" + std::to_string(config_.id); };
  // Close waits for this lock: an op is enqueued before the communicator is closed, or not at all.
  std::shared_lock<std::shared_mutex> lock(launch_mutex_);
  LocalRank* rank = RankOn(launch.device);
  if (rank == nullptr) {
    return "device " + std::to_string(launch.device) + " is not in the mesh of " + name();
  }
  const bool low_latency = (op.flags & OpSignature::kLowLatency) != 0;
  const cudaEvent_t begun = rank->begun[launch.channel], ended = rank->ended[launch.channel];
  rank->SetInFlight(launch.channel, false);
  if (launch.part == Part::kDone && !low_latency) {
    return CudaError(cudaStreamWaitEvent(launch.stream, ended), "waiting for an op in flight");
  }
  if (closed_) {
    Abort(*rank, Failure::kClosed, op, launch);
    return name() + " is closed; make a new Communicator and compile again";
  }
  const bool starts = launch.part == Part::kStart && !low_latency;
  // XLA reuses the memory of copies in the order of its own stream: with copies, the op runs there.
  const bool on_own_stream = starts && AreInPool(*rank, read_by_peers);
  std::string error;
  if (low_latency && op.num_tokens > window_.num_tokens) {
    error = "an op of " + std::to_string(op.num_tokens) +
            " tokens in low_latency mode, and the windows of " + name() + " have room for " +
            std::to_string(window_.num_tokens) + ": lower it for this one";
  } else {
    error = CopyOperandsToPool(*rank, read_by_peers, launch);
  }
  if (error.empty()) {
    const KernelSet& kernels = Kernels(low_latency ? Mode::kLowLatency : Mode::kThroughput);
    const int blocks = NumBlocks(*rank, kernels, bytes, launch);
    KernelStream stream(launch.stream);
    if (on_own_stream) {
      stream = KernelStream(rank->op_streams[launch.channel], begun);
      error = CudaError(cudaEventRecord(ended, launch.stream), "starting an op");
      if (error.empty()) {
        error = CudaError(cudaStreamWaitEvent(stream.stream, ended), "starting an op");
      }
    }
    if (error.empty()) {
      const char* failed = enqueue(FrameOf(*rank, op, launch), blocks, rank->facts, stream);
      if (failed != nullptr) error = failed;
    }
    if (error.empty() && starts) {
      error = CudaError(cudaEventRecord(ended, stream.stream), "starting an op");
    }
    // What follows on XLA's stream may take all SMs, and wait for peers that wait for this op.
    if (error.empty() && on_own_stream) {
      error = CudaError(cudaStreamWaitEvent(launch.stream, begun), "starting an op");
    }
  }
  if (!error.empty()) {
    Abort(*rank, Failure::kNotLaunched, op, launch);
  } else if (launch.part == Part::kStart) {
    rank->SetInFlight(launch.channel, true);
  }
  return error;
}

}  // namespace jax_deepep
