// The arrays of a rank of cuda_ranks.cu, on host and device, and the parameters of every verb on
// either.
#ifndef JAX_DEEPEP_TESTS_GPU_RANK_ARRAYS_CUH_
#define JAX_DEEPEP_TESTS_GPU_RANK_ARRAYS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "interface/verbs.h"

namespace jax_deepep {
namespace {

int failures = 0;

void Check(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 40) std::printf("FAILED: %s\n", what.c_str());
}

void CheckCuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

// An array on host and device.
class Array {
 public:
  explicit Array(size_t bytes = 0) : host_(std::max<size_t>(bytes, 1)) {
    CheckCuda(cudaMalloc(&device_, (host_.size() + 255) / 256 * 256), "cudaMalloc");
    CheckCuda(cudaMemset(device_, 0xff, host_.size()), "cudaMemset");  // NaN, or -1
    std::memset(host_.data(), 0xff, host_.size());
  }
  ~Array() { cudaFree(device_); }
  Array(const Array&) = delete;

  void ToDevice() {
    CheckCuda(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice),
              "cudaMemcpy");
  }
  std::vector<char> FromDevice() const {
    std::vector<char> copy(host_.size());
    CheckCuda(cudaMemcpy(copy.data(), device_, copy.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }
  template <typename T>
  T* host() {
    return reinterpret_cast<T*>(host_.data());
  }
  template <typename T>
  T* device() const {
    return static_cast<T*>(device_);
  }
  size_t bytes() const { return host_.size(); }

 private:
  std::vector<char> host_;
  void* device_ = nullptr;
};

struct Problem {
  const char* name;
  GroupShape shape;
  RouteShape route;
  double none = 0.1;     // share of entries that name no expert
  bool invalid = false;  // some entries are out of range or repeated
  bool skewed = false;   // most entries go to the first rank
  bool low_latency = false;

  // Whether rows are encoded in scratch before peers read them.
  bool encodes() const { return route.rows().is_encoded_here() && !low_latency; }
};

Problem MakeProblem(const char* name, int ranks, int experts, int topk, int tokens, int hidden,
                    RowType type, Layout layout, int alignment = 1, int capacity = -1,
                    int64_t expert_capacity = kNoLimit) {
  Problem problem{name, {}, {}};
  problem.shape = {ranks, experts, topk, tokens + 3, hidden};
  const int local = experts / ranks;
  int64_t rows = layout == Layout::kTokenMajor ? int64_t{ranks} * tokens
                                               : int64_t{ranks} * tokens * std::min(topk, local) +
                                                     int64_t{local} * (alignment - 1);
  rows = (rows + alignment - 1) / alignment * alignment;
  problem.route = {layout,    type,
                   hidden,    WireFormat::kNone,
                   tokens,    capacity < 0 ? static_cast<int>(rows) : capacity,
                   alignment, expert_capacity};
  return problem;
}

uint16_t ToHalf(RowType type, float value) {
  uint16_t bits;
  if (type == RowType::kBFloat16) {
    const __nv_bfloat16 half = __float2bfloat16(value);
    std::memcpy(&bits, &half, 2);
  } else {
    const __half half = __float2half(value);
    std::memcpy(&bits, &half, 2);
  }
  return bits;
}

void FillRandom(RowType type, void* rows, size_t count, std::mt19937& random) {
  if (type == RowType::kInt32) {
    for (size_t i = 0; i < count; ++i) static_cast<uint32_t*>(rows)[i] = random();
    return;
  }
  if (type == RowType::kEncoded) {
    for (size_t i = 0; i < count; ++i) static_cast<char*>(rows)[i] = static_cast<char>(random());
    return;
  }
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    const float value = normal(random);
    if (type == RowType::kFloat32) {
      static_cast<float*>(rows)[i] = value;
    } else {
      static_cast<uint16_t*>(rows)[i] = ToHalf(type, value);
    }
  }
}

// Sums are not sent as nvfp4.
RouteShape RouteOfCombine(const Problem& problem) {
  RouteShape route = problem.route;
  route.alignment = 1;
  route.expert_capacity = kNoLimit;
  if (route.wire == WireFormat::kNvfp4) route.wire = WireFormat::kMxfp8;
  return route;
}

// Call use(array, bytes of a row there) for the parts of received rows that stay encoded, which
// all lie in one array, or for that of other rows.
template <typename Use>
void ForReceived(const Problem& problem, Use use) {
  const RowFormat rows = problem.route.rows();
  if (!rows.keeps_quantized) return use(int64_t{0}, rows.bytes());
  int64_t at = 0;
  KeptArrays().ForParts(rows.wire_row(), [&](char*, int64_t bytes, int64_t) {
    use(at, bytes);
    at += (problem.route.capacity * bytes + 255) / 256 * 256;
  });
}

// The operands and results of all verbs on one rank.
struct Rank {
  Rank(const Problem& problem, std::mt19937& random)
      : x(Rows(problem, problem.route.num_tokens)),
        topk_idx(Entries(problem)),
        topk_weights(Entries(problem)),
        tokens(Received(problem)),
        source(problem.route.capacity * 4),
        destination(Entries(problem)),
        weights(PerRow(problem)),
        local_experts(PerRow(problem)),
        group_sizes(Groups(problem)),
        num_rows(Groups(problem)),
        counts(12),
        pairs(PairTable(problem.shape, problem.route).ints() * 4),
        scratch(DispatchScratchInts(problem.shape, problem.route) * 4),
        y(Rows(problem, problem.route.capacity)),
        bias(Rows(problem, problem.route.num_tokens)),
        out(Rows(problem, problem.route.num_tokens)),
        row_gradients(PerRow(problem)),
        gradients(Entries(problem)),
        sums(CombineSums(problem.shape, RouteOfCombine(problem)).bytes()),
        encoded(problem.route.num_tokens * problem.route.rows().wire_bytes()),
        rows(Received(problem)),
        products(problem.route.capacity * 4),
        rank_operand(4) {
    const RowType type = problem.route.row_type;
    // An encoded row is filled with bytes.
    const size_t size = type == RowType::kEncoded ? Rows(problem, 1) : problem.route.row_size;
    FillRandom(type, x.host<void>(), problem.route.num_tokens * size, random);
    FillRandom(type, y.host<void>(), problem.route.capacity * size, random);
    FillRandom(type, bias.host<void>(), problem.route.num_tokens * size, random);
    FillRandom(RowType::kFloat32, row_gradients.host<void>(), row_gradients.bytes() / 4, random);
    Route(problem, random);
    for (Array* array : {&x, &topk_idx, &topk_weights, &y, &bias, &row_gradients})
      array->ToDevice();
  }

  void Route(const Problem& problem, std::mt19937& random) {
    const int experts = problem.shape.num_experts, topk = problem.shape.num_topk;
    std::vector<int> order(experts);
    for (int i = 0; i < experts; ++i) order[i] = i;
    std::uniform_real_distribution<float> uniform;
    const int reach = problem.skewed ? std::max(topk, experts / problem.shape.num_ranks) : experts;
    for (int token = 0; token < problem.route.num_tokens; ++token) {
      const int range = uniform(random) < 0.8f ? reach : experts;
      std::shuffle(order.begin(), order.end(), random);
      int used = 0;
      for (int k = 0; k < topk; ++k) {
        while (order[used % experts] >= range && used < experts) ++used;
        int32_t expert = used < experts ? order[used++] : kNone;
        if (uniform(random) < problem.none) expert = kNone;
        if (problem.invalid && uniform(random) < 0.2f) expert = experts + k;
        if (problem.invalid && k > 0 && uniform(random) < 0.2f)
          expert = topk_idx.host<int32_t>()[token * topk];
        topk_idx.host<int32_t>()[token * topk + k] = expert;
        topk_weights.host<float>()[token * topk + k] = uniform(random);
      }
    }
  }

  static size_t Rows(const Problem& p, int64_t count) { return count * p.route.rows().bytes(); }
  static size_t Received(const Problem& p) {
    size_t end = 0;
    ForReceived(p, [&](int64_t at, int64_t bytes) { end = at + p.route.capacity * bytes; });
    return end;
  }
  static size_t Entries(const Problem& p) {
    return size_t{4} * p.route.num_tokens * p.shape.num_topk;
  }
  static size_t PerRow(const Problem& p) {
    return size_t{4} * p.route.capacity *
           (p.route.layout == Layout::kExpertMajor ? 1 : p.shape.num_topk);
  }
  static size_t Groups(const Problem& p) { return size_t{4} * NumRowGroups(p.shape, p.route); }

  Array x, topk_idx, topk_weights;
  Array tokens, source, destination, weights, local_experts, group_sizes, num_rows, counts, pairs,
      scratch;
  Array y, bias, out, row_gradients, gradients, sums, encoded, rows, products, rank_operand;
};

// Parameters of the verbs on host or device arrays.
template <bool kDevice, typename T>
T* Data(Array& array) {
  if constexpr (kDevice) return array.device<T>();
  return array.host<T>();
}

// Let the results of dispatch or cached_dispatch be in an array.
template <bool kDevice>
void ReceiveIn(const Problem& problem, Array& array, void** rows, KeptArrays* kept) {
  if (!problem.route.keeps_quantized) {
    *rows = Data<kDevice, void>(array);
    return;
  }
  void** parts[] = {&kept->data, &kept->scales, &kept->row_scale};
  int next = 0;
  ForReceived(problem,
              [&](int64_t at, int64_t) { *parts[next++] = Data<kDevice, char>(array) + at; });
}

template <bool kDevice>
DispatchParams DispatchOf(const Problem& problem, Rank& rank) {
  DispatchParams params;
  const bool expert_major = problem.route.layout == Layout::kExpertMajor;
  params.route = problem.route;
  params.x = Data<kDevice, void>(rank.x);
  params.topk_idx = Data<kDevice, int32_t>(rank.topk_idx);
  params.topk_weights = Data<kDevice, float>(rank.topk_weights);
  ReceiveIn<kDevice>(problem, rank.tokens, &params.tokens, &params.kept);
  params.source = Data<kDevice, int32_t>(rank.source);
  params.destination = Data<kDevice, int32_t>(rank.destination);
  params.weights = Data<kDevice, float>(rank.weights);
  params.local_experts = expert_major ? nullptr : Data<kDevice, int32_t>(rank.local_experts);
  params.group_sizes = Data<kDevice, int32_t>(rank.group_sizes);
  params.num_rows = Data<kDevice, int32_t>(rank.num_rows);
  params.num_received = Data<kDevice, int32_t>(rank.counts);
  params.num_dropped = params.num_received + 1;
  params.num_invalid = params.num_received + 2;
  if (kDevice) {
    params.pairs = expert_major || problem.low_latency ? rank.pairs.device<int32_t>() : nullptr;
    params.scratch = rank.scratch.device<int32_t>();
    if (problem.encodes()) params.encoded = rank.encoded.device<void>();
  }
  return params;
}

template <bool kDevice>
CombineParams CombineOf(const Problem& problem, Rank& rank, bool weighted, bool with_bias,
                        bool with_gradients) {
  CombineParams params;
  const bool expert_major = problem.route.layout == Layout::kExpertMajor;
  params.route = RouteOfCombine(problem);
  params.group_sizes = Data<kDevice, int32_t>(rank.group_sizes);
  params.y = Data<kDevice, void>(rank.y);
  params.weights = weighted ? Data<kDevice, float>(rank.weights) : nullptr;
  params.row_gradients = with_gradients ? Data<kDevice, float>(rank.row_gradients) : nullptr;
  params.destination = Data<kDevice, int32_t>(rank.destination);
  params.bias = with_bias ? Data<kDevice, void>(rank.bias) : nullptr;
  params.out = Data<kDevice, void>(rank.out);
  params.gradients = with_gradients ? Data<kDevice, float>(rank.gradients) : nullptr;
  if (kDevice && problem.low_latency) {
    params.pairs = rank.pairs.device<int32_t>();
  } else if (kDevice) {
    if (expert_major) params.pairs = rank.pairs.device<int32_t>();
    if (!expert_major && params.route.rows().is_quantized()) {
      params.source = rank.source.device<int32_t>();
    }
    const bool has_sums = CombineSums(problem.shape, params.route).bytes() > 0;
    params.sums = has_sums ? rank.sums.device<void>() : nullptr;
  }
  return params;
}

template <bool kDevice>
CachedDispatchParams CachedDispatchOf(const Problem& problem, Rank& rank, bool scaled,
                                      bool zero_rest) {
  CachedDispatchParams params;
  const bool expert_major = problem.route.layout == Layout::kExpertMajor;
  params.route = problem.route;
  params.route.alignment = 1;
  params.route.expert_capacity = kNoLimit;
  params.zero_rest = zero_rest;
  params.x = Data<kDevice, void>(rank.bias);
  params.source = Data<kDevice, int32_t>(rank.source);
  params.group_sizes = Data<kDevice, int32_t>(rank.group_sizes);
  params.weights = scaled ? Data<kDevice, float>(rank.weights) : nullptr;
  params.y = scaled ? Data<kDevice, void>(rank.y) : nullptr;
  ReceiveIn<kDevice>(problem, rank.rows, &params.rows, &params.kept);
  params.products = scaled ? Data<kDevice, float>(rank.products) : nullptr;
  if (kDevice && (expert_major || problem.low_latency)) params.pairs = rank.pairs.device<int32_t>();
  if (kDevice) params.destination = rank.destination.device<int32_t>();
  if (kDevice && problem.encodes()) params.encoded = rank.encoded.device<void>();
  return params;
}

}  // namespace
}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_GPU_RANK_ARRAYS_CUH_
