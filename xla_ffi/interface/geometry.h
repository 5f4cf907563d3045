// The sizes of an op, shared by handlers and every platform's verbs.
#ifndef JAX_DEEPEP_INTERFACE_GEOMETRY_H_
#define JAX_DEEPEP_INTERFACE_GEOMETRY_H_

#include <cstddef>
#include <cstdint>

#include "interface/host_device.h"
#include "interface/wire_format.h"

namespace jax_deepep {

enum class Layout : int32_t { kExpertMajor = 0, kTokenMajor = 1 };
inline constexpr const char* kLayoutNames[] = {"expert", "token"};  // in their order

// How an op communicates on GPUs.
enum class Mode : int32_t { kThroughput, kLowLatency };
inline constexpr const char* kModeNames[] = {"throughput", "low_latency"};  // in their order
inline constexpr int kNumModes = 2;

// What a call does of an op: all of it; or begin it, so that other work can run until another call
// ends it. In low-latency mode these are two kernels, which send and receive; in throughput mode
// the kernel of the whole op runs on a stream of the communicator.
enum class Part : int32_t { kWhole, kStart, kDone };
inline constexpr const char* kPartNames[] = {"whole", "start", "done"};  // in their order
inline constexpr int kNumParts = 3;

// kInt32 is an opaque payload: integers of any width as words of 32 bits, which are only copied.
// Rows of kEncoded are in their wire format already, as WireRow.
enum class RowType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kEncoded };

// Of an element; rows of kEncoded have RowFormat::bytes() alone.
JAX_DEEPEP_HOST_DEVICE constexpr size_t BytesOf(RowType type) {
  return type == RowType::kFloat32 || type == RowType::kInt32 ? 4 : 2;
}

// Rows of kInt32 are a multiple of this many bytes, so that kernels copy them 16 bytes at a time.
inline constexpr int64_t kPayloadAlignment = 16;

// Stands for "no limit" where a limit is a number of rows.
inline constexpr int64_t kNoLimit = -1;

// Marks an entry without a row, a row without a token, and "no expert" in topk_idx.
inline constexpr int32_t kNone = -1;

// The sizes that a communicator fixes for all its ops.
struct GroupShape {
  int32_t num_ranks = 0;    // R
  int32_t num_experts = 0;  // E, over all ranks
  int32_t num_topk = 0;     // K, entries per token
  int32_t max_tokens = 0;   // most tokens per rank; the base of the codes in `source`
  int32_t hidden_size = 0;  // H, elements of a row of floats
  // Consecutive ranks of a node, within which sums are added up and rounded first; 0: all.
  int32_t ranks_per_node = 0;

  JAX_DEEPEP_HOST_DEVICE int32_t node_size() const {
    return ranks_per_node == 0 ? num_ranks : ranks_per_node;
  }
  JAX_DEEPEP_HOST_DEVICE int32_t num_nodes() const { return num_ranks / node_size(); }
  JAX_DEEPEP_HOST_DEVICE int32_t NodeOf(int32_t rank) const { return rank / node_size(); }
  // The rank of a node with the index that `rank` has in its own.
  JAX_DEEPEP_HOST_DEVICE int32_t RankOnNode(int32_t rank, int32_t node) const {
    return node * node_size() + rank % node_size();
  }
  JAX_DEEPEP_HOST_DEVICE int32_t num_local_experts() const { return num_experts / num_ranks; }
  // Of the longest row: H float32, or as many bytes of integers, rounded up to 16 bytes.
  int64_t max_row_bytes() const {
    return (int64_t{4} * hidden_size + kPayloadAlignment - 1) / kPayloadAlignment *
           kPayloadAlignment;
  }
};

// The element type and size of a row, and how it crosses links.
struct RowFormat {
  RowType type = RowType::kFloat32;
  int32_t size = 0;  // W, elements of a row: see GroupShape::max_row_bytes
  WireFormat wire = WireFormat::kNone;
  bool keeps_quantized = false;  // rows stay encoded where they are received; kEncoded: always

  JAX_DEEPEP_HOST_DEVICE WireRow wire_row() const { return {wire, size}; }
  JAX_DEEPEP_HOST_DEVICE bool is_quantized() const { return wire != WireFormat::kNone; }
  // Whether the sender encodes them.
  JAX_DEEPEP_HOST_DEVICE bool is_encoded_here() const {
    return is_quantized() && type != RowType::kEncoded;
  }
  // As an operand, on the wire, and in the memory of who receives it.
  JAX_DEEPEP_HOST_DEVICE int64_t bytes() const {
    return type == RowType::kEncoded ? wire_bytes() : size * static_cast<int64_t>(BytesOf(type));
  }
  JAX_DEEPEP_HOST_DEVICE int64_t wire_bytes() const {
    return is_quantized() ? wire_row().bytes() : bytes();
  }
  JAX_DEEPEP_HOST_DEVICE int64_t received_bytes() const {
    return keeps_quantized ? wire_bytes() : bytes();
  }
};

// The sizes of one op; the same on every rank. The row format is stored as plain members, because
// kernels take this struct by value in that layout: the host uses rows() and SetRows().
struct RouteShape {
  Layout layout = Layout::kExpertMajor;
  RowType row_type = RowType::kFloat32;
  int32_t row_size = 0;
  WireFormat wire = WireFormat::kNone;
  int32_t num_tokens = 0;              // T
  int32_t capacity = 0;                // C, rows of the received arrays
  int32_t alignment = 1;               // row groups are padded to a multiple of this
  int64_t expert_capacity = kNoLimit;  // most rows of one expert
  bool keeps_quantized = false;

  JAX_DEEPEP_HOST_DEVICE RowFormat rows() const {
    return {row_type, row_size, wire, keeps_quantized};
  }
  void SetRows(const RowFormat& format) {
    row_type = format.type;
    row_size = format.size;
    wire = format.wire;
    keeps_quantized = format.keeps_quantized;
  }
};

// The row groups of one rank: one per local expert, or a single one (token-major).
inline int32_t NumRowGroups(const GroupShape& group, const RouteShape& route) {
  return route.layout == Layout::kExpertMajor ? group.num_local_experts() : 1;
}

// The (token, device) pairs of one rank, expert-major: which tokens it received, by (source rank,
// source token), and the rows of each in ascending k. A table of int32:
//
//     line 0: the number of pairs; the rest is unspecified
//     line 1 + i: source as in DispatchParams, then the rows, then kNone
struct PairTable {
  int32_t max_pairs = 0;  // R * T
  int32_t max_rows = 0;   // of a pair: min(K, L)

  JAX_DEEPEP_HOST_DEVICE PairTable(const GroupShape& group, const RouteShape& route)
      : max_pairs(group.num_ranks * route.num_tokens),
        max_rows(group.num_topk < group.num_local_experts() ? group.num_topk
                                                            : group.num_local_experts()) {}

  // Lines start at 16 bytes.
  JAX_DEEPEP_HOST_DEVICE int32_t line_ints() const { return (1 + max_rows + 3) / 4 * 4; }
  JAX_DEEPEP_HOST_DEVICE int64_t ints() const { return int64_t{1 + max_pairs} * line_ints(); }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_GEOMETRY_H_
