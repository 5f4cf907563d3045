#include "cuda/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <utility>

#include "cuda/failure_text.h"
#include "interface/error_text.h"
#include "interface/op_hash.h"
#include "transport/cuda_driver.h"

namespace jax_deepep {
namespace {

// Blocks, one per SM, that fill the NVLink ports of a Hopper GPU: an SM copies 45 to 58 GB/s, and
// the ports carry 450 GB/s each way, of which 375 were ever measured.
constexpr int kBlocksForFullSpeed = 16;

// Less than this per block is not worth another one.
constexpr int64_t kBytesPerBlock = 64 << 10;

void Check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

int Attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  Check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The blocks of an op, of all ranks that share the GPU, wait for each other: they must all run at
// once, one to an SM. Two SMs stay free for what a late rank has yet to do.
int ChooseNumBlocks(const GroupShape& shape, int requested, int num_sms, int num_sharing) {
  const int most = std::clamp((num_sms - 2) / num_sharing, 1, kMaxBlocks);
  if (requested > 0) return std::min(requested, most);
  const int64_t rows = int64_t{shape.max_tokens} * std::min(shape.num_topk, shape.num_ranks);
  const int64_t worth = rows * shape.hidden_size * 2 / kBytesPerBlock + 1;
  return static_cast<int>(std::clamp<int64_t>(worth, 1, std::min(kBlocksForFullSpeed, most)));
}

// Peers have mapped nothing but the pool, and outside of it lie constants of the program, and
// arrays that XLA did not allocate (of dlpack, in host memory): copy what does to the pool for the
// time of the op, which no rank leaves before all have read. Returns an error, or nothing.
std::string CopyToPool(const PeerArray& array, const DeviceFacts& facts, const OpStream& stream) {
  const std::string outside =
      "an operand that peers read is not in the memory pool that they have mapped: ";
  const std::string no_pool =
      outside + "XLA did not preallocate it (XLA_PYTHON_CLIENT_PREALLOCATE=true, the default)";
  if (!array.replace) return no_pool;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream.stream, &capture);
  if (capture != cudaStreamCaptureStatusNone) {  // XLA would have the copy back before a replay
    return outside +
           "it is a constant of the program, or an array that XLA did not allocate, which a "
           "captured op cannot copy; pass it as an argument that XLA has computed or copied";
  }
  if (error == cudaSuccess) {
    void* copy = stream.allocate(array.bytes);
    if (copy == nullptr) {
      return outside +
             "it is a constant of the program, or an array that XLA did not allocate, "
             "and there are no " +
             std::to_string(array.bytes) + " bytes left in the pool to copy it";
    }
    if (!facts.Holds(copy)) return no_pool;
    array.replace(copy);
    error = cudaMemcpyAsync(copy, array.data, array.bytes, cudaMemcpyDeviceToDevice, stream.stream);
  }
  return error == cudaSuccess ? "" : outside + "copying it failed: " + cudaGetErrorString(error);
}

template <typename T>
T ReadVolatile(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

}  // namespace

CudaCommunicator::CudaCommunicator(CommunicatorConfig config,
                                   const std::vector<LocalDevice>& devices, int num_sms)
    : config_(std::move(config)), requested_sms_(num_sms) {
  Check(ObstacleOfLimits(shape()));
  size_t next_device = 0;
  for (const Place& place : config_.places) {
    if (place.process != config_.process) continue;
    const LocalDevice& device = devices.at(next_device++);
    auto rank = std::make_unique<LocalRank>();
    rank->place = place;
    rank->ordinal = device.ordinal;
    OnDevice current(device.ordinal);
    Check(ObstacleOfDevice(device.ordinal, shape()));
    rank->facts.shared_bytes = DynamicSharedBytes(device.ordinal);
    rank->facts.bulk_copies = Attribute(cudaDevAttrComputeCapabilityMajor, device.ordinal) >= 9;
    Check(rank->pool.Find(device.in_pool));
    rank->facts.pool = rank->pool.data();
    rank->facts.pool_bytes = rank->pool.bytes();
    Check(rank->control.Create(device.ordinal, ControlBytes(shape())));
    void* status = nullptr;
    Check(cudaHostAlloc(&status, sizeof(HostStatus), cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    rank->status = {new (status) HostStatus{}, FreePinned{device.ordinal}};
    rank->taken_before.assign(3 * shape().num_ranks, 0);
    ranks_.push_back(std::move(rank));
  }
}

void CudaCommunicator::FreePinned::operator()(HostStatus* status) const {
  OnDevice current(device);
  cudaFreeHost(status);
}

std::vector<ExportedMemory> CudaCommunicator::Exports() const {
  std::vector<ExportedMemory> exports;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    for (const DeviceMemory* memory : {&rank->control, &rank->pool}) {
      exports.emplace_back();
      const std::string error = memory->Export(&exports.back());
      if (error.empty()) continue;
      for (const ExportedMemory& exported : exports) {
        if (exported.descriptor >= 0) close(exported.descriptor);
      }
      throw std::runtime_error(error);
    }
  }
  return exports;
}

void CudaCommunicator::AttachPeer(int process, const std::vector<ExportedMemory>& memories) {
  size_t next = 0;
  for (const Place& place : config_.places) {
    if (place.process != process) continue;
    const ExportedMemory& control = memories.at(next++);
    const ExportedMemory& pool = memories.at(next++);
    std::vector<int> readers;  // devices here that share a group with it
    for (const auto& rank : ranks_) {
      if (rank->place.group == place.group) readers.push_back(rank->ordinal);
    }
    if (readers.empty()) continue;
    OnDevice current(readers.front());
    auto peer = std::make_unique<Peer>();
    std::string error = peer->control.Import(control, readers, /*writable=*/true);
    if (error.empty()) error = peer->pool.Import(pool, readers, /*writable=*/false);
    if (!error.empty()) {
      throw std::runtime_error("the memory of rank " + std::to_string(place.rank) + " (process " +
                               std::to_string(process) + ") cannot be mapped here: " + error +
                               "; " + WhyNoPeerAccess(pool.gpu, readers));
    }
    peers_[{place.group, place.rank}] = std::move(peer);
  }
}

void CudaCommunicator::Start(const std::vector<int>& ranks_per_gpu) {
  size_t next_device = 0;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    OpFrame& frame = rank->frame;
    frame.shape = shape();
    frame.rank = rank->place.rank;
    frame.timeout_ns = static_cast<uint64_t>(config_.timeout_s * 1e9);
    void* status = nullptr;
    Check(cudaHostGetDevicePointer(&status, rank->status.get(), 0), "cudaHostGetDevicePointer");
    frame.status = static_cast<HostStatus*>(status);
    for (int peer = 0; peer < shape().num_ranks; ++peer) {
      const Peer& memory = *peers_.at({rank->place.group, peer});
      frame.control[peer] = reinterpret_cast<DeviceControl*>(memory.control.data());
      frame.pool[peer] = memory.pool.data();
    }
    const int blocks = ChooseNumBlocks(shape(), requested_sms_,
                                       Attribute(cudaDevAttrMultiProcessorCount, rank->ordinal),
                                       ranks_per_gpu.at(next_device++));
    num_blocks_ = num_blocks_ == 0 ? blocks : std::min(num_blocks_, blocks);
    // This rank's own memory where it stands, not where it was mapped again.
    frame.control[frame.rank] = reinterpret_cast<DeviceControl*>(rank->control.data());
    frame.pool[frame.rank] = rank->facts.pool;
  }
  for (auto* load : {LoadDispatchKernels, LoadRedispatchKernels, LoadCombineKernels}) Load(load);
}

void CudaCommunicator::Load(const char* (*load)(int max_shared_bytes)) {
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    if (const char* error = load(rank->facts.shared_bytes)) throw std::runtime_error(error);
    Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
}

template <typename Params>
std::string CudaCommunicator::LaunchVerb(Verb verb, const Params& params,
                                         std::initializer_list<PeerArray> read_by_peers,
                                         const int32_t* believed_rank, const OpStream& stream,
                                         const char* (*launch)(const OpFrame&, const Params&, int,
                                                               const DeviceFacts&, cudaStream_t)) {
  return LaunchOp(verb, HashOf(params), read_by_peers, believed_rank, stream,
                  [&](const OpFrame& frame, int num_blocks, const DeviceFacts& facts) {
                    return launch(frame, params, num_blocks, facts, stream.stream);
                  });
}

std::string CudaCommunicator::LaunchOp(Verb verb, uint64_t what,
                                       std::initializer_list<PeerArray> read_by_peers,
                                       const int32_t* believed_rank, const OpStream& stream,
                                       const Enqueue& enqueue) {
  const std::string name = "communicator #" + std::to_string(config_.id);
  // Close waits for this lock: an op is enqueued before the communicator is closed, or not at all.
  std::shared_lock<std::shared_mutex> lock(launch_mutex_);
  if (closed_) return name + " is closed; make a new Communicator and compile again";
  for (const auto& rank : ranks_) {
    if (rank->ordinal != stream.device) continue;
    for (const PeerArray& array : read_by_peers) {
      if (array.data == nullptr || rank->facts.Holds(array.data)) continue;
      const std::string error = CopyToPool(array, rank->facts, stream);
      if (!error.empty()) return error;
    }
    OpFrame frame = rank->frame;
    frame.verb = verb;
    frame.what = what;
    frame.believed_rank = believed_rank;
    const char* error = enqueue(frame, num_blocks_, rank->facts);
    return error == nullptr ? "" : error;
  }
  return "device " + std::to_string(stream.device) + " is not in the mesh of " + name;
}

std::string CudaCommunicator::Launch(DispatchParams params, const int32_t* believed_rank,
                                     const OpStream& stream) {
  const int64_t bytes = params.route.num_tokens * params.route.row_bytes();
  return LaunchVerb(Verb::kDispatch, params, {{&params.x, bytes}, params.scratch}, believed_rank,
                    stream, &LaunchDispatch);
}

std::string CudaCommunicator::Launch(RedispatchParams params, const int32_t* believed_rank,
                                     const OpStream& stream) {
  const int64_t bytes = params.route.num_tokens * params.route.row_bytes();
  return LaunchVerb(Verb::kRedispatch, params, {{&params.x, bytes}}, believed_rank, stream,
                    &LaunchRedispatch);
}

std::string CudaCommunicator::Launch(CombineParams params, const int32_t* believed_rank,
                                     const OpStream& stream) {
  const int64_t capacity = params.route.capacity;
  const bool expert_major = params.route.layout == Layout::kExpertMajor;
  const int64_t floats = sizeof(float) * capacity;
  const int64_t gradients = expert_major ? floats : floats * shape().num_topk;
  return LaunchVerb(Verb::kCombine, params,
                    {{&params.y, capacity * params.route.row_bytes()},
                     {&params.weights, floats},
                     {&params.row_gradients, gradients},
                     params.sums},
                    believed_rank, stream, &LaunchCombine);
}

std::string CudaCommunicator::WaitForOps() const {
  std::string first_error;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    const cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess || !first_error.empty()) continue;
    first_error = "GPU " + std::to_string(rank->ordinal) +
                  " has met an error: " + cudaGetErrorString(error) +
                  ". Some kernel of this process has failed, maybe another than ours; CUDA cannot "
                  "go on in this process: start it again. compute-sanitizer finds the kernel.";
  }
  return first_error;
}

void CudaCommunicator::Close() {
  {
    std::lock_guard<std::shared_mutex> lock(launch_mutex_);
    if (closed_) return;
    closed_ = true;
  }
  WaitForOps();
  // A replayed graph does not come to LaunchOp: its ops find on the device that they are to fail,
  // and tell.
  bool told = true;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    auto* control = reinterpret_cast<DeviceControl*>(rank->control.data());
    FailureReport report;
    report.failure = Failure::kClosed;
    const uint64_t broken = rank->place.rank + 1;
    told = cudaMemcpy(&control->reports[rank->place.rank], &report, sizeof(report),
                      cudaMemcpyHostToDevice) == cudaSuccess &&
           cudaMemcpy(&control->broken, &broken, sizeof(broken), cudaMemcpyHostToDevice) ==
               cudaSuccess &&
           cudaStreamSynchronize(nullptr) == cudaSuccess && told;
  }
  // Every op that begins from now on finds that, and reads no peer. One that had begun before may
  // still read, and is waited for.
  if (!WaitForOps().empty() || !told || ranks_.empty()) return;
  OnDevice current(ranks_.front()->ordinal);
  for (const auto& [place, peer] : peers_) peer->pool.Unmap();
}

const CudaCommunicator::LocalRank* CudaCommunicator::FailedRank() const {
  for (const auto& rank : ranks_) {
    if (ReadVolatile(rank->status->failed) == 0) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    return rank.get();
  }
  return nullptr;
}

std::string CudaCommunicator::broken() const {
  const LocalRank* rank = FailedRank();
  return rank == nullptr ? ""
                         : Describe(rank->status->report, static_cast<int>(rank->status->reporter),
                                    rank->place.group, config_);
}

bool CudaCommunicator::timed_out() const {
  const LocalRank* rank = FailedRank();
  return rank != nullptr && IsTimeout(rank->status->report.failure);
}

std::string CudaCommunicator::invalid_routing() const {
  for (const auto& rank : ranks_) {
    const HostStatus& status = *rank->status;
    const uint64_t step = ReadVolatile(status.invalid_step);
    if (step == 0) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    return DescribeInvalidRouting(config_, rank->place.group, rank->place.rank, status.num_invalid,
                                  static_cast<int64_t>(step));
  }
  return "";
}

Traffic CudaCommunicator::TakeTraffic() {
  std::lock_guard<std::mutex> lock(traffic_mutex_);
  const size_t num_ranks = shape().num_ranks;
  const size_t size = static_cast<size_t>(config_.num_groups) * num_ranks * num_ranks;
  Traffic traffic{std::vector<int64_t>(size), std::vector<int64_t>(size),
                  std::vector<double>(size)};
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    DeviceControl control;
    Check(cudaMemcpy(&control, rank->control.data(), sizeof(control), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const size_t first = (rank->place.group * num_ranks + rank->place.rank) * num_ranks;
    for (size_t peer = 0; peer < num_ranks; ++peer) {
      uint64_t* before = &rank->taken_before[3 * peer];
      traffic.rows_sent[first + peer] = static_cast<int64_t>(control.rows_taken[peer] - before[0]);
      traffic.rows_received[first + peer] =
          static_cast<int64_t>(control.rows_received[peer] - before[1]);
      traffic.seconds_waited[first + peer] =
          1e-9 * static_cast<double>(control.waited_ns[peer] - before[2]);
      before[0] = control.rows_taken[peer];
      before[1] = control.rows_received[peer];
      before[2] = control.waited_ns[peer];
    }
  }
  return traffic;
}

std::vector<double> CudaCommunicator::LastOpSeconds() const {
  std::vector<double> seconds;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    const auto* control = reinterpret_cast<const DeviceControl*>(rank->control.data());
    uint64_t nanoseconds = 0;
    Check(
        cudaMemcpy(&nanoseconds, &control->last_op_ns, sizeof(nanoseconds), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
    seconds.push_back(1e-9 * static_cast<double>(nanoseconds));
  }
  return seconds;
}

size_t CudaCommunicator::buffer_bytes() const {
  size_t bytes = 0;
  for (const auto& rank : ranks_) bytes += rank->control.bytes();
  return bytes;
}

}  // namespace jax_deepep
