#include "cuda/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "interface/error_text.h"
#include "interface/op_hash.h"

namespace jax_deepep {
namespace {

// Blocks, one per SM, that fill the NVLink ports of a Hopper GPU: an SM copies 45 to 58 GB/s, and
// the ports carry 450 GB/s each way, of which 375 were ever measured.
constexpr int kBlocksForFullSpeed = 16;

// Shared memory that kernels declare statically, at most.
constexpr int kStaticSharedBytes = 4096;

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

// Makes a device current for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

const char* NameOf(Verb verb) {
  switch (verb) {
    case Verb::kDispatch:
      return "dispatch";
    case Verb::kRedispatch:
      return "redispatch";
    case Verb::kCombine:
      return "combine";
    case Verb::kFloor:
      return "floor";
  }
  return "op";
}

int ChooseNumBlocks(const GroupShape& shape, int requested, int num_sms) {
  if (requested > 0) return std::min({requested, num_sms, kMaxBlocks});
  const int64_t rows = int64_t{shape.max_tokens} * std::min(shape.num_topk, shape.num_ranks);
  const int64_t worth = rows * shape.hidden_size * 2 / kBytesPerBlock + 1;
  return static_cast<int>(std::clamp<int64_t>(worth, 1, std::min(kBlocksForFullSpeed, num_sms)));
}

template <typename T>
T ReadVolatile(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

}  // namespace

CudaCommunicator::CudaCommunicator(CommunicatorConfig config,
                                   const std::vector<LocalDevice>& devices, int num_sms)
    : config_(std::move(config)) {
  size_t next_device = 0;
  for (const Place& place : config_.places) {
    if (place.process != config_.process) continue;
    const LocalDevice& device = devices.at(next_device++);
    auto rank = std::make_unique<LocalRank>();
    rank->place = place;
    rank->ordinal = device.ordinal;
    OnDevice current(device.ordinal);
    rank->facts.shared_bytes =
        Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.ordinal) - kStaticSharedBytes;
    rank->facts.bulk_copies = Attribute(cudaDevAttrComputeCapabilityMajor, device.ordinal) >= 9;
    Check(rank->pool.Find(device.in_pool));
    rank->facts.pool = rank->pool.data();
    rank->facts.pool_bytes = rank->pool.bytes();
    Check(rank->control.Create(device.ordinal, ControlBytes(shape())));
    Check(cudaHostAlloc(reinterpret_cast<void**>(&rank->status), sizeof(HostStatus),
                        cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    *rank->status = HostStatus{};
    const int blocks = ChooseNumBlocks(shape(), num_sms,
                                       Attribute(cudaDevAttrMultiProcessorCount, device.ordinal));
    num_blocks_ = num_blocks_ == 0 ? blocks : std::min(num_blocks_, blocks);
    rank->taken_before.assign(3 * shape().num_ranks, 0);
    ranks_.push_back(std::move(rank));
  }
}

CudaCommunicator::~CudaCommunicator() {
  for (const auto& rank : ranks_) cudaFreeHost(rank->status);
}

std::vector<ExportedMemory> CudaCommunicator::Exports() const {
  std::vector<ExportedMemory> exports;
  for (const auto& rank : ranks_) {
    for (const DeviceMemory* memory : {&rank->control, &rank->pool}) {
      exports.emplace_back();
      Check(memory->Export(&exports.back()));
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
    auto peer = std::make_unique<Peer>();
    const std::string name = "memory of rank " + std::to_string(place.rank) + " (process " +
                             std::to_string(process) + "): ";
    std::string error = peer->control.Import(control, readers, /*writable=*/true);
    if (error.empty()) error = peer->pool.Import(pool, readers, /*writable=*/false);
    if (!error.empty()) throw std::runtime_error(name + error);
    peers_[{place.group, place.rank}] = std::move(peer);
  }
}

void CudaCommunicator::Start() {
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    OpFrame& frame = rank->frame;
    frame.shape = shape();
    frame.rank = rank->place.rank;
    frame.timeout_ns = static_cast<uint64_t>(config_.timeout_s * 1e9);
    Check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&frame.status), rank->status, 0),
          "cudaHostGetDevicePointer");
    for (int peer = 0; peer < shape().num_ranks; ++peer) {
      const Peer& memory = *peers_.at({rank->place.group, peer});
      frame.control[peer] = reinterpret_cast<DeviceControl*>(memory.control.data());
      frame.pool[peer] = memory.pool.data();
    }
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
std::string CudaCommunicator::LaunchVerb(
    Verb verb, const Params& params, const std::vector<const void*>& read_by_peers,
    const int32_t* believed_rank, int64_t device, cudaStream_t stream,
    const char* (*launch)(const OpFrame&, const Params&, int, const DeviceFacts&, cudaStream_t)) {
  return LaunchOp(verb, HashOf(params), read_by_peers, believed_rank, device,
                  [&](const OpFrame& frame, int num_blocks, const DeviceFacts& facts) {
                    return launch(frame, params, num_blocks, facts, stream);
                  });
}

std::string CudaCommunicator::LaunchOp(Verb verb, uint64_t what,
                                       const std::vector<const void*>& read_by_peers,
                                       const int32_t* believed_rank, int64_t device,
                                       const Enqueue& enqueue) {
  const std::string name = "communicator #" + std::to_string(config_.id);
  if (closed_) return name + " is closed; make a new Communicator and compile again";
  for (const auto& rank : ranks_) {
    if (rank->ordinal != device) continue;
    for (const void* operand : read_by_peers) {
      if (operand != nullptr && !rank->facts.Holds(operand)) {
        return "an operand that peers read is not in the memory pool that they have mapped: it is "
               "a "
               "constant of the program (pass it as an argument), or XLA did not preallocate its "
               "pool (XLA_PYTHON_CLIENT_PREALLOCATE=true, the default)";
      }
    }
    OpFrame frame = rank->frame;
    frame.verb = verb;
    frame.what = what;
    frame.believed_rank = believed_rank;
    const char* error = enqueue(frame, num_blocks_, rank->facts);
    return error == nullptr ? "" : error;
  }
  return "device " + std::to_string(device) + " is not in the mesh of " + name;
}

std::string CudaCommunicator::Launch(const DispatchParams& params, const int32_t* believed_rank,
                                     int64_t device, cudaStream_t stream) {
  return LaunchVerb(Verb::kDispatch, params, {params.x, params.scratch}, believed_rank, device,
                    stream, &LaunchDispatch);
}

std::string CudaCommunicator::Launch(const RedispatchParams& params, const int32_t* believed_rank,
                                     int64_t device, cudaStream_t stream) {
  return LaunchVerb(Verb::kRedispatch, params, {params.x}, believed_rank, device, stream,
                    &LaunchRedispatch);
}

std::string CudaCommunicator::Launch(const CombineParams& params, const int32_t* believed_rank,
                                     int64_t device, cudaStream_t stream) {
  // Arrays of no rows are nowhere, and nobody reads them.
  std::vector<const void*> read_by_peers = {params.sums};
  if (params.route.capacity > 0) {
    read_by_peers.insert(read_by_peers.end(), {params.y, params.weights, params.row_gradients});
  }
  return LaunchVerb(Verb::kCombine, params, read_by_peers, believed_rank, device, stream,
                    &LaunchCombine);
}

void CudaCommunicator::WaitForOps() const {
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    cudaDeviceSynchronize();
  }
}

void CudaCommunicator::Close() {
  if (closed_.exchange(true)) return;
  WaitForOps();
  // A replayed graph does not come here: its ops find on the device that they are to fail, and
  // tell.
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    auto* control = reinterpret_cast<DeviceControl*>(rank->control.data());
    FailureReport report;
    report.failure = Failure::kClosed;
    const uint64_t broken = rank->place.rank + 1;
    cudaMemcpy(&control->reports[rank->place.rank], &report, sizeof(report),
               cudaMemcpyHostToDevice);
    cudaMemcpy(&control->broken, &broken, sizeof(broken), cudaMemcpyHostToDevice);
  }
}

std::string CudaCommunicator::Describe(const LocalRank& rank, const FailureReport& report,
                                       int reporter) const {
  std::vector<MissingRank> missing;
  for (int peer = 0; peer < shape().num_ranks; ++peer) {
    if ((report.missing >> peer & 1) == 0) continue;
    missing.push_back({peer, static_cast<int64_t>(report.step),
                       static_cast<int64_t>(report.seen[peer]),
                       report.failure == Failure::kNotLeft});
  }
  const std::string op = NameOf(report.verb);
  std::string text;
  switch (report.failure) {
    case Failure::kWrongRank:
      text = op + ": the program runs a device as another rank than the " +
             std::to_string(reporter) +
             " that it is in the communicator's mesh; use one mesh for both";
      break;
    case Failure::kDifferentOps:
      text = op + " on rank " + std::to_string(reporter) + " met another op at step " +
             std::to_string(report.step) + " on rank";
      for (const MissingRank& peer : missing) text += " " + std::to_string(peer.rank);
      text += "; all ranks must run the same program";
      break;
    case Failure::kClosed:
      text =
          "a program ran on after the communicator was closed on rank " + std::to_string(reporter);
      break;
    case Failure::kNone:
    case Failure::kNotArrived:
    case Failure::kNotLeft:
      text = DescribeTimeout(op, reporter, config_.timeout_s,
                             report.failure == Failure::kNotLeft ? " inside the op" : "", missing);
      break;
  }
  return DescribeBroken(text, config_, rank.place.group);
}

std::string CudaCommunicator::broken() const {
  for (const auto& rank : ranks_) {
    const HostStatus& status = *rank->status;
    if (ReadVolatile(status.failed) == 0) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    return Describe(*rank, status.report, static_cast<int>(status.reporter));
  }
  return "";
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

std::string ObstacleOfPool(const LocalDevice& device, size_t limit_bytes) {
  OnDevice current(device.ordinal);
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.ordinal) !=
          cudaSuccess ||
      major < 8) {
    return "the GPU is older than compute capability 8.0";
  }
  DeviceMemory pool;
  if (std::string error = pool.Find(device.in_pool); !error.empty()) return error;
  if (pool.bytes() < limit_bytes) {
    return "XLA's memory pool on GPU " + std::to_string(device.ordinal) + " has " +
           std::to_string(pool.bytes() >> 20) + " MiB and may grow to " +
           std::to_string(limit_bytes >> 20) +
           ", so that peers cannot map it once and for all: set XLA_PYTHON_CLIENT_PREALLOCATE=true "
           "(the default), and XLA_PYTHON_CLIENT_MEM_FRACTION to leave memory to others";
  }
  ExportedMemory exported;
  if (std::string error = pool.Export(&exported); !error.empty()) {
    return "XLA's memory pool on GPU " + std::to_string(device.ordinal) + " cannot be exported (" +
           error + "): leave XLA_PYTHON_CLIENT_ALLOCATOR at its default";
  }
  close(exported.descriptor);
  return "";
}

}  // namespace jax_deepep
