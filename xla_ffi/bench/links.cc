#include "bench/links.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace jax_deepep {
namespace {

constexpr int kWarmUp = 3;                // trials that are discarded
constexpr uint64_t kEnqueueNs = 100'000;  // in which the host enqueues a trial

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

// Sets the current device within a scope.
class OnOrdinal {
 public:
  explicit OnOrdinal(int ordinal) {
    Check(cudaGetDevice(&before_), "cudaGetDevice");
    Check(cudaSetDevice(ordinal), "cudaSetDevice");
  }
  ~OnOrdinal() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

}  // namespace

LinkRank::LinkRank(int ordinal, int rank, int num_ranks, int rows, int64_t row_bytes,
                   int64_t copy_bytes)
    : ordinal_(ordinal), copy_bytes_(copy_bytes) {
  if (num_ranks < 2 || num_ranks > kMaxRanks || rank < 0 || rank >= num_ranks) {
    throw std::runtime_error("num_ranks: expected 2 to " + std::to_string(kMaxRanks) + ", got " +
                             std::to_string(num_ranks));
  }
  if (rows < 1 || rows > kMaxLinkRows || row_bytes < 16 || row_bytes % 16 != 0) {
    throw std::runtime_error("rows, row_bytes: expected 1 to " + std::to_string(kMaxLinkRows) +
                             " rows of whole 16 bytes, got " + std::to_string(rows) + " of " +
                             std::to_string(row_bytes));
  }
  if (copy_bytes < kPieceBytes || copy_bytes % kPieceBytes != 0) {
    throw std::runtime_error("copy_bytes: expected a multiple of " + std::to_string(kPieceBytes) +
                             ", got " + std::to_string(copy_bytes));
  }
  OnOrdinal current(ordinal_);
  frame_.rank = rank;
  frame_.num_ranks = num_ranks;
  frame_.max_rows = rows;
  frame_.row_words = static_cast<int32_t>(row_bytes / 16);
  const size_t bytes = kLinkControlBytes + kNumLinkRows * rows * row_bytes + 2 * copy_bytes;
  void* memory = nullptr;
  Check(cudaMalloc(&memory, bytes), "cudaMalloc");
  frame_.memory[rank] = static_cast<char*>(memory);
  Check(cudaMemset(memory, 0, bytes), "cudaMemset");
  // Every byte that a rank sends is its index + 1.
  Check(cudaMemset(frame_.Row(rank, LinkRows::kX, 0), rank + 1, rows * row_bytes), "cudaMemset");
  Check(cudaMemset(frame_.CopySource(rank), rank + 1, copy_bytes), "cudaMemset");
  Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  Check(cudaEventCreate(&begin_), "cudaEventCreate");
  Check(cudaEventCreate(&end_), "cudaEventCreate");
  Check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

LinkRank::~LinkRank() {
  OnOrdinal current(ordinal_);
  for (int rank = 0; rank < frame_.num_ranks; ++rank) {
    if (rank != frame_.rank && frame_.memory[rank] != nullptr) {
      cudaIpcCloseMemHandle(frame_.memory[rank]);
    }
  }
  cudaFree(frame_.memory[frame_.rank]);
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
  cudaStreamDestroy(stream_);
}

std::string LinkRank::handle() const {
  OnOrdinal current(ordinal_);
  cudaIpcMemHandle_t handle;
  Check(cudaIpcGetMemHandle(&handle, frame_.memory[frame_.rank]), "cudaIpcGetMemHandle");
  return {handle.reserved, sizeof(handle.reserved)};
}

void LinkRank::Attach(int rank, const std::string& handle) {
  cudaIpcMemHandle_t opened;
  if (rank == frame_.rank || rank < 0 || rank >= frame_.num_ranks ||
      handle.size() != sizeof(opened.reserved)) {
    throw std::runtime_error("attach: expected another rank and its handle");
  }
  OnOrdinal current(ordinal_);
  std::memcpy(opened.reserved, handle.data(), handle.size());
  void* memory = nullptr;
  Check(cudaIpcOpenMemHandle(&memory, opened, cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
  frame_.memory[rank] = static_cast<char*>(memory);
}

// Peers write no flags meanwhile: they have finished the previous measurement, and begin no other
// before the rendezvous.
void LinkRank::Reset() {
  LinkFlags* flags = &frame_.Control(frame_.rank)->flags;
  Check(cudaMemsetAsync(flags, 0, sizeof(*flags), stream_), "cudaMemsetAsync");
}

void LinkRank::Rendezvous(uint64_t wait_ns) {
  Check(LaunchRendezvous(frame_, wait_ns, stream_), "the rendezvous kernel");
}

double LinkRank::SecondsOf(const std::function<void()>& enqueue) {
  Rendezvous(kEnqueueNs);
  Check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
  enqueue();
  Check(cudaEventRecord(end_, stream_), "cudaEventRecord");
  Check(cudaStreamSynchronize(stream_), "a measurement of links");
  float milliseconds = 0;
  Check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
  return milliseconds * 1e-3;
}

void LinkRank::Finish() {
  Rendezvous(0);
  Check(cudaStreamSynchronize(stream_), "a measurement of links");
  uint32_t timed_out = 0;
  Check(cudaMemcpy(&timed_out, &frame_.Control(frame_.rank)->timed_out, sizeof(timed_out),
                   cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  if (timed_out != 0) throw std::runtime_error("links: a peer did not arrive within a few seconds");
}

void LinkRank::CheckBytes(const char* at, int64_t bytes, int value) const {
  std::vector<char> found(bytes);
  Check(cudaMemcpy(found.data(), at, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const auto is_right = [value](char byte) { return byte == static_cast<char>(value); };
  if (!std::all_of(found.begin(), found.end(), is_right)) {
    throw std::runtime_error("links: the data received differ from the data sent");
  }
}

std::vector<double> LinkRank::Chain(ChainStep step, int rows, int length, int trials) {
  if (rows < 1 || rows > frame_.max_rows || length < 1) {
    throw std::runtime_error("chain: expected 1 to " + std::to_string(frame_.max_rows) +
                             " rows and at least one step");
  }
  OnOrdinal current(ordinal_);
  const int rank = frame_.rank, last = rows - 1;
  const bool there = step >= ChainStep::kPush;
  const bool back = step >= ChainStep::kPushPullBack;
  char* result = frame_.Row(rank, back ? LinkRows::kOut : LinkRows::kReceived, last);
  Reset();
  Check(cudaMemsetAsync(result, 0, frame_.row_bytes(), stream_), "cudaMemsetAsync");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t chain = nullptr;
  Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
  cudaError_t launched = cudaSuccess;
  for (int i = 0; i < length && launched == cudaSuccess; ++i) {
    launched = LaunchStep(frame_, step, rows, stream_);
  }
  Check(cudaStreamEndCapture(stream_, &graph), "capture");
  Check(launched, "a step of a chain");
  Check(cudaGraphInstantiate(&chain, graph, 0), "cudaGraphInstantiate");
  Check(cudaGraphUpload(chain, stream_), "cudaGraphUpload");
  std::vector<double> seconds;
  for (int trial = 0; trial < trials + kWarmUp; ++trial) {
    const double of_trial =
        SecondsOf([&] { Check(cudaGraphLaunch(chain, stream_), "cudaGraphLaunch"); });
    if (trial >= kWarmUp) seconds.push_back(of_trial);
  }
  Finish();
  Check(cudaGraphExecDestroy(chain), "cudaGraphExecDestroy");
  Check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  if (back) {
    CheckBytes(result, frame_.row_bytes(), 2 * (rank + 1));
  } else if (there) {
    const int others = frame_.num_ranks - 1, hops = last % others + 1;
    const int source = step == ChainStep::kPull ? rank + hops : rank + frame_.num_ranks - hops;
    CheckBytes(result, frame_.row_bytes(), source % frame_.num_ranks + 1);
  }
  return seconds;
}

std::vector<double> LinkRank::Copy(bool push, bool bulk, int num_sms, int64_t bytes, int trials) {
  if (bytes < kPieceBytes || bytes > copy_bytes_ || bytes % kPieceBytes != 0) {
    throw std::runtime_error("copy: expected a multiple of " + std::to_string(kPieceBytes) +
                             " up to " + std::to_string(copy_bytes_) + " bytes, got " +
                             std::to_string(bytes));
  }
  OnOrdinal current(ordinal_);
  const int rank = frame_.rank, num_ranks = frame_.num_ranks, next = (rank + 1) % num_ranks;
  const auto target_of = [this](int owner) { return frame_.CopySource(owner) + copy_bytes_; };
  char* to = target_of(push ? next : rank);
  const char* from = frame_.CopySource(push ? rank : next);
  char* tail = target_of(rank) + bytes - kPieceBytes;
  Check(cudaMemsetAsync(tail, 0, kPieceBytes, stream_), "cudaMemsetAsync");
  std::vector<double> seconds;
  for (int trial = 0; trial < trials + kWarmUp; ++trial) {
    const double of_trial = SecondsOf([&] {
      if (num_sms > 0) {
        Check(LaunchCopy(to, from, bytes, bulk, num_sms, stream_), "a copy over a link");
      } else {
        Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
      }
    });
    if (trial >= kWarmUp) seconds.push_back(of_trial);
  }
  Finish();
  CheckBytes(tail, kPieceBytes, (push ? rank + num_ranks - 1 : next) % num_ranks + 1);
  return seconds;
}

std::vector<double> LinkRank::RoundTrips(bool with_row, int count, int trials) {
  if (count < 1) throw std::runtime_error("round trips: expected at least one");
  OnOrdinal current(ordinal_);
  const int partner = frame_.rank ^ 1;
  std::vector<double> seconds;
  for (int trial = 0; trial < trials; ++trial) {
    Reset();
    Rendezvous(kEnqueueNs);
    if (partner < frame_.num_ranks) {
      Check(LaunchRoundTrips(frame_, partner, with_row, count, stream_), "round trips of a flag");
    }
    Finish();
    if (partner >= frame_.num_ranks) continue;
    uint64_t nanoseconds = 0;
    Check(cudaMemcpy(&nanoseconds, &frame_.Control(frame_.rank)->round_trip_ns, sizeof(nanoseconds),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    seconds.push_back(nanoseconds * 1e-9 / count);
  }
  return seconds;
}

}  // namespace jax_deepep
