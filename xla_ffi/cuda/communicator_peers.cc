// How the ranks of a communicator reach each other's memory.
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "cuda/communicator.h"
#include "cuda/rank_kernels.h"
#include "transport/cuda_driver.h"

namespace jax_deepep {
namespace {

constexpr uint64_t kLongestTestNs = 60'000'000'000;  // of the puts to other nodes

void Check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

void Check(const char* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + " failed: " + error);
}

void Check(cudaError_t error, const char* what) {
  Check(error == cudaSuccess ? nullptr : cudaGetErrorString(error), what);
}

// 1 + a rank that the last test has not reached, or 0.
uint32_t UnreachableFrom(const HostStatus& status) {
  return *static_cast<const volatile uint32_t*>(&status.unreachable);
}

}  // namespace

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
  for (const Location& location : config_.locations) {
    if (location.process != process) continue;
    const ExportedMemory& control = memories.at(next++);
    const ExportedMemory& pool = memories.at(next++);
    std::vector<int> readers;  // devices here of its node in its group
    std::vector<int> writers;  // these, and those of other nodes that put to it
    for (const auto& rank : ranks_) {
      if (rank->location.group != location.group) continue;
      const bool reads = IsOnNodeOf(location.rank, rank->location.rank);
      if (reads) readers.push_back(rank->ordinal);
      const bool puts = maps_other_nodes() && HasIndexOf(location.rank, rank->location.rank);
      if (reads || puts) writers.push_back(rank->ordinal);
    }
    if (writers.empty()) continue;
    OnDevice current(writers.front());
    auto peer = std::make_unique<Peer>();
    std::string error = peer->control.Import(control, writers, /*writable=*/true);
    if (error.empty() && !readers.empty()) peer->pool = ImportShared(pool, readers, &error);
    if (!error.empty()) {
      throw std::runtime_error("the memory of rank " + std::to_string(location.rank) +
                               " (process " + std::to_string(process) +
                               ") cannot be mapped here: " + error + "; " +
                               WhyNoPeerAccess(pool.gpu, writers));
    }
    peers_[{location.group, location.rank}] = std::move(peer);
  }
}

void CudaCommunicator::ConnectToOtherNodes(LocalRank& rank,
                                           const std::vector<int>& processes) const {
  OpFrame& frame = rank.frame;
  const int own_node = frame.NodeOf(frame.rank);
  rank.remote = remote_.make_memory();
  Check(rank.remote->Register(rank.control.data(), rank.control.bytes()));
  RemoteRoute route = {};
  route.memory = rank.remote->Address();
  route.signals = rank.remote->HasSignals();
  for (const Location& location : config_.locations) {
    const int node = frame.NodeOf(location.rank);
    if (location.group != rank.location.group || frame.RankOnNode(node) != location.rank) continue;
    const auto found = std::lower_bound(processes.begin(), processes.end(), location.process);
    route.processes[node] = static_cast<int32_t>(found - processes.begin());
    if (node == own_node) continue;
    if (maps_other_nodes()) {
      static_cast<MappedRemoteMemory&>(*rank.remote)
          .Attach(node, peers_.at({location.group, location.rank})->control.data());
    }
    frame.control[location.rank] = reinterpret_cast<DeviceControl*>(rank.remote->FlagAddress(node));
  }
  auto* control = reinterpret_cast<DeviceControl*>(rank.control.data());
  Check(cudaMemcpy(&control->route, &route, sizeof(route), cudaMemcpyHostToDevice), "cudaMemcpy");
}

// The driver may say that there is peer access where the machine does not support it (GPUs passed
// through to a virtual machine): then words read back differently.
void CudaCommunicator::TestPeers() const {
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    const auto word = static_cast<uint64_t>(config_.id + 1) << 32;
    Check(LaunchTestPeers(rank->frame, word, rank->stream), "the test of peer access");
    Check(cudaStreamSynchronize(rank->stream), "the test of peer access");
    if (const uint32_t found = UnreachableFrom(*rank->status); found != 0) {
      throw std::runtime_error(
          "peer access does not work: what rank " + std::to_string(rank->location.rank) +
          " wrote to the memory of rank " + std::to_string(found - 1) +
          " reads back differently, although the driver maps it; check the IOMMU and ACS settings "
          "of the host, or of the virtual machine");
    }
  }
}

// All ranks of this process at once: each waits for those of other nodes.
void CudaCommunicator::TestNodes() const {
  const auto word = static_cast<uint64_t>(config_.id + 1) << 32;
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    OpFrame frame = rank->frame;
    frame.timeout_ns = std::min(frame.timeout_ns, kLongestTestNs);
    Check(remote_.test_nodes(frame, word, rank->stream), "the test of other nodes");
  }
  for (const auto& rank : ranks_) {
    OnDevice current(rank->ordinal);
    Check(cudaStreamSynchronize(rank->stream), "the test of other nodes");
    if (const uint32_t found = UnreachableFrom(*rank->status); found != 0) {
      throw std::runtime_error("a word that rank " + std::to_string(found - 1) + " puts to rank " +
                               std::to_string(rank->location.rank) +
                               ", on another node, does not arrive (" + rank->remote->Describe() +
                               "); python -m jax_deepep.bench check tests all links");
    }
  }
}

}  // namespace jax_deepep
