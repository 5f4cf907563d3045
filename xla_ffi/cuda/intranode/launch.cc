#include "cuda/intranode/launch.h"

#include <algorithm>

namespace jax_deepep {
namespace {

// Loads in flight that keep the copy engine of an SM busy.
constexpr int kSlotsPerWarp = 3;
constexpr int kMaxPullSlots = 8;

bool CanBulkCopy(const GroupShape& shape, const RouteShape& route, const DeviceFacts& device) {
  return device.bulk_copies && shape.hidden_size * BytesOf(route.row_type) % 16 == 0;
}

}  // namespace

PullShape PullShapeOf(const GroupShape& shape, const RouteShape& route, int record_bytes,
                      int reserved_bytes, const DeviceFacts& device) {
  PullShape pull;
  pull.warps = kWarps;
  pull.row_bytes = static_cast<int64_t>(shape.hidden_size) * BytesOf(route.row_type);
  pull.record_bytes = record_bytes;
  if (!CanBulkCopy(shape, route, device) || pull.row_bytes > device.shared_bytes) return pull;
  const int in_block = (device.shared_bytes - reserved_bytes) / (pull.SlotBytes() + 16);
  if (in_block < 2) return pull;
  pull.warps = std::clamp(in_block / kSlotsPerWarp, 1, kWarps);
  pull.slots = std::min(in_block / pull.warps, kMaxPullSlots);
  return pull;
}

StreamShape StreamShapeOf(const GroupShape& shape, const RouteShape& route, int max_inputs,
                          const DeviceFacts& device) {
  StreamShape stream;
  stream.max_inputs = max_inputs;
  stream.slots = 4;
  stream.task_slots = 3;
  stream.bulk = CanBulkCopy(shape, route, device);
  const int row_bytes = static_cast<int>(shape.hidden_size * BytesOf(route.row_type));
  const int chunk_bytes = static_cast<int>(kChunk * BytesOf(route.row_type));
  stream.slot_bytes = stream.bulk ? std::min(chunk_bytes, row_bytes) : 0;
  while (stream.slots > 2 && kWarps * stream.BytesPerWarp() > device.shared_bytes) --stream.slots;
  stream.warps = std::min(kWarps, device.shared_bytes / stream.BytesPerWarp());
  return stream;
}

const char* LoadKernelWithShared(const void* kernel, int max_shared_bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* LaunchKernelWithShared(const void* kernel, void* argument, int num_blocks,
                                   int shared_bytes, cudaStream_t stream) {
  void* arguments[] = {argument};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(num_blocks), dim3(kThreads), arguments,
                                             shared_bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_deepep
