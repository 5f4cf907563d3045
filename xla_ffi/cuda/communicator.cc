#include "cuda/communicator.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <utility>

#include "cuda/failure_text.h"
#include "cuda/failure_watch.h"
#include "cuda/rank_kernels.h"
#include "interface/error_text.h"
#include "router/router_kernels.h"
#include "transport/cuda_driver.h"

namespace jax_deepep {
namespace {

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

template <typename T>
T ReadVolatile(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

}  // namespace

CudaCommunicator::CudaCommunicator(CommunicatorConfig config, const WindowSize& window,
                                   const std::vector<LocalDevice>& devices, int num_sms,
                                   const RemoteTransport& remote)
    : config_(std::move(config)), window_(window), remote_(remote), requested_sms_(num_sms) {
  Check(UnsupportedReasonOfLimits(shape()));
  size_t next_device = 0;
  for (const Location& location : config_.locations) {
    if (location.process != config_.process) continue;
    const LocalDevice& device = devices.at(next_device++);
    auto rank = std::make_unique<LocalRank>();
    rank->location = location;
    rank->ordinal = device.ordinal;
    OnDevice current(device.ordinal);
    Check(UnsupportedReasonOfDevice(device.ordinal, shape(), window));
    rank->facts.shared_bytes = DynamicSharedBytes(device.ordinal);
    rank->facts.bulk_copies = Attribute(cudaDevAttrComputeCapabilityMajor, device.ordinal) >= 9;
    Check(rank->pool.Find(device.in_pool));
    rank->facts.pool = rank->pool.data();
    rank->facts.pool_bytes = rank->pool.bytes();
    int64_t bytes = static_cast<int64_t>(ControlBytes(shape()));
    for (const KernelSet* kernels : KernelsFor(shape(), window)) {
      bytes += Kernels(kernels->mode).window_bytes(shape(), window);
    }
    Check(rank->control.Create(device.ordinal, bytes));
    void* status = nullptr;
    Check(cudaHostAlloc(&status, sizeof(HostStatus), cudaHostAllocMapped | cudaHostAllocPortable),
          "cudaHostAlloc");
    rank->status = {new (status) HostStatus{}, FreePinned{device.ordinal}};
    Check(cudaStreamCreateWithFlags(&rank->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    // Of the highest priority: its blocks take the SMs that others leave.
    int lowest = 0, highest = 0;
    Check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange");
    for (int channel = 0; channel < kNumChannels; ++channel) {
      Check(
          cudaStreamCreateWithPriority(&rank->op_streams[channel], cudaStreamNonBlocking, highest),
          "cudaStreamCreate");
      for (cudaEvent_t* event : {&rank->begun[channel], &rank->ended[channel]}) {
        Check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
      }
    }
    rank->taken_before.assign(3 * shape().num_ranks, 0);
    ranks_.push_back(std::move(rank));
  }
}

CudaCommunicator::~CudaCommunicator() { StopWatching(this); }

// Also of a rank that was made in part.
CudaCommunicator::LocalRank::~LocalRank() {
  OnDevice current(ordinal);
  if (stream != nullptr) cudaStreamDestroy(stream);
  for (int channel = 0; channel < kNumChannels; ++channel) {
    SetInFlight(channel, false);
    if (op_streams[channel] != nullptr) cudaStreamDestroy(op_streams[channel]);
    for (cudaEvent_t event : {begun[channel], ended[channel]}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }
}

namespace {

// Of all communicators of this process, by GPU.
std::atomic<int>& OpsInFlightOn(int ordinal) {
  constexpr int kMostGpus = 64;
  static std::atomic<int> counts[kMostGpus];
  return counts[ordinal % kMostGpus];
}

}  // namespace

void CudaCommunicator::LocalRank::SetInFlight(int channel, bool value) {
  OpsInFlightOn(ordinal) += int{value} - int{in_flight[channel].exchange(value)};
}

int CudaCommunicator::LocalRank::NumOthersInFlight(int channel) const {
  return OpsInFlightOn(ordinal) - int{in_flight[channel]};
}

void CudaCommunicator::FreePinned::operator()(HostStatus* status) const {
  OnDevice current(device);
  cudaFreeHost(status);
}

void CudaCommunicator::Start(const std::vector<int>& ranks_per_gpu,
                             const std::vector<int>& processes) {
  size_t next_device = 0;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    OpFrame& frame = rank->frame;
    frame.shape = shape();
    frame.window = window_;
    frame.staging = StagingLayout(shape(), remote_.puts_are_asynchronous);
    frame.rank = rank->location.rank;
    frame.timeout_ns = static_cast<uint64_t>(config_.timeout_s * 1e9);
    void* status = nullptr;
    Check(cudaHostGetDevicePointer(&status, rank->status.get(), 0), "cudaHostGetDevicePointer");
    frame.status = static_cast<HostStatus*>(status);
    for (int peer = 0; peer < shape().num_ranks; ++peer) {
      if (!IsOnNodeOf(frame.rank, peer)) continue;
      const Peer& memory = *peers_.at({rank->location.group, peer});
      frame.control[peer] = reinterpret_cast<DeviceControl*>(memory.control.data());
      frame.pool[peer] = memory.pool->data();
    }
    if (has_several_nodes()) ConnectToOtherNodes(*rank, processes);
    rank->most_blocks = MostBlocks(Attribute(cudaDevAttrMultiProcessorCount, rank->ordinal),
                                   ranks_per_gpu.at(next_device++));
    if (requested_sms_ > 0) rank->most_blocks = std::min(rank->most_blocks, requested_sms_);
    // This rank's own memory at its original address, not at the second mapping.
    frame.control[frame.rank] = reinterpret_cast<DeviceControl*>(rank->control.data());
    frame.pool[frame.rank] = rank->facts.pool;
  }
  Load(LoadRankKernels);
  Load([](int /*max_shared_bytes*/) { return EnsureRouterKernels(); });
  if (has_several_nodes()) Load(remote_.load);
  for (const KernelSet* kernels : KernelsFor(shape(), window_)) Load(Kernels(kernels->mode).load);
  TestPeers();
  if (has_several_nodes()) TestNodes();
  WatchForFailure(this);
}

void CudaCommunicator::Load(const char* (*load)(int max_shared_bytes)) {
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    if (const char* error = load(rank->facts.shared_bytes)) throw std::runtime_error(error);
    Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
}

std::string CudaCommunicator::WaitForOps() const {
  std::string first_error;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    const cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess || !first_error.empty()) continue;
    first_error = "GPU " + std::to_string(rank->ordinal) +
                  " reports an error: " + cudaGetErrorString(error) +
                  ". A kernel of this process has failed, not necessarily one of ours; CUDA cannot "
                  "continue in this process: restart it. compute-sanitizer finds the kernel.";
  }
  return first_error;
}

bool CudaCommunicator::MarkClosed() {
  bool marked = true;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    auto* control = reinterpret_cast<DeviceControl*>(rank->control.data());
    FailureReport report;
    report.failure = Failure::kClosed;
    const uint64_t broken = rank->location.rank + 1;
    const auto write = [&rank](void* to, const void* from, size_t bytes) {
      return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, rank->stream) ==
                 cudaSuccess &&
             cudaStreamSynchronize(rank->stream) == cudaSuccess;
    };
    marked = write(&control->reports[rank->location.rank], &report, sizeof(report)) &&
             write(&control->broken, &broken, sizeof(broken)) && marked;
  }
  return marked;
}

void CudaCommunicator::Close() {
  {
    std::lock_guard<std::shared_mutex> lock(launch_mutex_);
    if (closed_) return;
    closed_ = true;
    for (const auto& rank : ranks_) {
      for (int channel = 0; channel < kNumChannels; ++channel) rank->SetInFlight(channel, false);
    }
  }
  WaitForOps();
  StopWatching(this);
  // A replayed graph does not call LaunchOp: its ops find on the device that the communicator is
  // closed, fail, and read no peer. Ops that began before may still read; wait for them.
  if (!MarkClosed() || !WaitForOps().empty() || ranks_.empty()) return;
  OnDevice current(ranks_.front()->ordinal);
  for (const auto& [location, peer] : peers_) peer->pool.reset();
}

void CudaCommunicator::Leave() {
  {
    std::lock_guard<std::shared_mutex> lock(launch_mutex_);
    if (closed_) return;
  }
  StopWatching(this);
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    LaunchAbortOn(*rank, Failure::kLeft, {}, {}, rank->stream);
  }
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
                                    rank->location.group, config_);
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
    return DescribeInvalidRouting(config_, rank->location.group, rank->location.rank,
                                  status.num_invalid, static_cast<int64_t>(step));
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
    const auto* control = reinterpret_cast<const DeviceControl*>(rank->control.data());
    std::vector<Channel> channels(kNumChannels);
    Check(cudaMemcpy(channels.data(), control->channels, sizeof(control->channels),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const size_t first = (rank->location.group * num_ranks + rank->location.rank) * num_ranks;
    for (size_t peer = 0; peer < num_ranks; ++peer) {
      uint64_t sent = 0, received = 0, waited_ns = 0;
      for (const Channel& channel : channels) {
        sent += channel.rows_taken[peer] + channel.rows_pushed[peer];
        received += channel.rows_received[peer] + channel.rows_pulled[peer];
        waited_ns += channel.waited_ns[peer];
      }
      uint64_t* before = &rank->taken_before[3 * peer];
      traffic.rows_sent[first + peer] = static_cast<int64_t>(sent - before[0]);
      traffic.rows_received[first + peer] = static_cast<int64_t>(received - before[1]);
      traffic.seconds_waited[first + peer] = 1e-9 * static_cast<double>(waited_ns - before[2]);
      before[0] = sent;
      before[1] = received;
      before[2] = waited_ns;
    }
  }
  return traffic;
}

std::vector<CudaCommunicator::LastOp> CudaCommunicator::LastOps() const {
  std::vector<LastOp> ops;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    const auto* control = reinterpret_cast<const DeviceControl*>(rank->control.data());
    uint64_t found[2] = {};  // nanoseconds and blocks are adjacent
    Check(cudaMemcpy(found, &control->last_op_ns, sizeof(found), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    ops.push_back({1e-9 * static_cast<double>(found[0]), static_cast<int>(found[1])});
  }
  return ops;
}

size_t CudaCommunicator::buffer_bytes() const {
  size_t bytes = 0;
  for (const auto& rank : ranks_) bytes += rank->control.bytes();
  return bytes;
}

}  // namespace jax_deepep
