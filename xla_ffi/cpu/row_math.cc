#include "cpu/row_math.h"

#include <algorithm>
#include <limits>

#include "cpu/row_types.h"

namespace jax_deepep {
namespace {

constexpr size_t kCacheLine = 64;  // of most processors; only speed depends on it

template <typename Type>
JAX_DEEPEP_INLINE void Scale(void* to, const void* from, float scale, int64_t size) {
  auto* out = static_cast<typename Type::Storage*>(to);
  const auto* in = static_cast<const typename Type::Storage*>(from);
  for (int64_t i = 0; i < size; ++i) out[i] = Type::Store(Type::Load(in[i]) * scale);
}

// Of each group of 2 * kWidth numbers, the sums of its first and its second half.
template <int kGroups, int kWidth>
JAX_DEEPEP_INLINE void FoldGroups(const float* from, float* to) {
  for (int group = 0; group < kGroups; ++group) {
    for (int i = 0; i < kWidth; ++i) {
      to[group * kWidth + i] = from[2 * group * kWidth + i] + from[(2 * group + 1) * kWidth + i];
    }
  }
}

// In blocks of 2048 elements: 256 running sums of eight products each, then a fixed tree, and the
// blocks one after the other. A warp of a GPU does it in the same order (FoldSums). `visit` gets
// every element of a.
template <typename Type, typename Visit>
JAX_DEEPEP_INLINE float Dot(const void* a, const void* b, int64_t size, Visit visit) {
  constexpr int kLanes = 32, kPerLane = 8, kSums = kLanes * kPerLane;
  const auto* left = static_cast<const typename Type::Storage*>(a);
  const auto* right = static_cast<const typename Type::Storage*>(b);
  float total = 0.0f;
  for (int64_t begin = 0; begin < size; begin += kSums * kPerLane) {
    const int64_t end = std::min<int64_t>(begin + kSums * kPerLane, size);
    alignas(64) float sums[kSums] = {};
    int64_t i = begin;
    for (; i + kSums <= end; i += kSums) {
      for (int sum = 0; sum < kSums; ++sum) {
        const float value = Type::Load(left[i + sum]);
        sums[sum] += value * Type::Load(right[i + sum]);
        visit(i + sum, value);
      }
    }
    for (int sum = 0; i + sum < end; ++sum) {
      const float value = Type::Load(left[i + sum]);
      sums[sum] += value * Type::Load(right[i + sum]);
      visit(i + sum, value);
    }
    alignas(64) float fours[kLanes * 4], twos[kLanes * 2], ones[kLanes];
    FoldGroups<kLanes, 4>(sums, fours);
    FoldGroups<kLanes, 2>(fours, twos);
    FoldGroups<kLanes, 1>(twos, ones);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) ones[lane] += ones[lane + width];
    }
    total += ones[0];
  }
  return total;
}

template <typename Type>
JAX_DEEPEP_INLINE float Dot(const void* a, const void* b, int64_t size) {
  return Dot<Type>(a, b, size, [](int64_t, float) {});
}

template <typename Type>
JAX_DEEPEP_INLINE float ScaleAndDot(void* to, const void* from, float scale, const void* b,
                                    int64_t size) {
  auto* const __restrict out = static_cast<typename Type::Storage*>(to);
  return Dot<Type>(from, b, size,
                   [=](int64_t i, float value) { out[i] = Type::Store(value * scale); });
}

// Columns that are summed over all terms at once: few enough for sums to stay in registers.
constexpr int64_t kBlock = 64;

// Prefetch what the next blocks will read: rows are scattered, and too short for the hardware
// prefetcher. May reach past the row, which is harmless.
JAX_DEEPEP_INLINE void FetchAhead(const void* columns, size_t bytes) {
  constexpr size_t kAhead = 1024;
  for (size_t line = 0; line < bytes; line += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(columns) + kAhead + line);
  }
}

constexpr float kBeforeFirst = -0.0f;  // -0 + p is p, for zeros too

// `count` columns of the sum over terms; inlined with a constant count for the bulk of a row. Sums
// of a rank are rounded to `Part`, the result to `Sum`. Without a bias, it begins at `zero`.
template <typename Type, typename Part, typename Sum>
JAX_DEEPEP_INLINE void SumColumns(typename Sum::Storage* out, const typename Sum::Storage* bias,
                                  float zero, const Term* terms, int num_terms, int64_t begin,
                                  int64_t count) {
  using Storage = typename Type::Storage;
  float total[kBlock];
  float part[kBlock];
  for (int64_t i = 0; i < count; ++i) total[i] = bias == nullptr ? zero : Sum::Load(bias[i]);
  for (int term = 0; term < num_terms;) {
    if (terms[term].is_sum) {
      const float* sum = static_cast<const float*>(terms[term++].row) + begin;
      for (int64_t i = 0; i < count; ++i) total[i] += sum[i];
      continue;
    }
    const int32_t rank = terms[term].rank;
    const auto* row = static_cast<const Storage*>(terms[term].row) + begin;
    const float weight = terms[term].weight;
    FetchAhead(row, count * sizeof(Storage));
    if (++term == num_terms || terms[term].rank != rank) {
      for (int64_t i = 0; i < count; ++i) total[i] += Part::Round(Type::Load(row[i]) * weight);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) part[i] = Type::Load(row[i]) * weight;
    for (; term < num_terms && terms[term].rank == rank; ++term) {
      const auto* next = static_cast<const Storage*>(terms[term].row) + begin;
      const float next_weight = terms[term].weight;
      FetchAhead(next, count * sizeof(Storage));
      for (int64_t i = 0; i < count; ++i) part[i] += Type::Load(next[i]) * next_weight;
    }
    for (int64_t i = 0; i < count; ++i) total[i] += Part::Round(part[i]);
  }
  for (int64_t i = 0; i < count; ++i) out[i] = Sum::Store(total[i]);
}

template <typename Type, typename Part = Type, typename Sum = Type>
JAX_DEEPEP_INLINE void SumRows(void* out, const void* bias, float zero, const Term* terms,
                               int num_terms, int64_t size) {
  using Storage = typename Sum::Storage;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    auto* to = static_cast<Storage*>(out) + begin;
    const auto* from = bias == nullptr ? nullptr : static_cast<const Storage*>(bias) + begin;
    if (size - begin >= kBlock) {
      SumColumns<Type, Part, Sum>(to, from, zero, terms, num_terms, begin, kBlock);
    } else {
      SumColumns<Type, Part, Sum>(to, from, zero, terms, num_terms, begin, size - begin);
    }
  }
}

JAX_DEEPEP_ALL_ISAS void ScaleFloat32(void* to, const void* from, float scale, int64_t size) {
  Scale<Float32>(to, from, scale, size);
}
JAX_DEEPEP_ALL_ISAS void ScaleFloat16(void* to, const void* from, float scale, int64_t size) {
  Scale<Float16>(to, from, scale, size);
}
JAX_DEEPEP_ALL_ISAS void ScaleBFloat16(void* to, const void* from, float scale, int64_t size) {
  Scale<BFloat16>(to, from, scale, size);
}
JAX_DEEPEP_ALL_ISAS float DotFloat32(const void* a, const void* b, int64_t size) {
  return Dot<Float32>(a, b, size);
}
JAX_DEEPEP_ALL_ISAS float DotFloat16(const void* a, const void* b, int64_t size) {
  return Dot<Float16>(a, b, size);
}
JAX_DEEPEP_ALL_ISAS float DotBFloat16(const void* a, const void* b, int64_t size) {
  return Dot<BFloat16>(a, b, size);
}
JAX_DEEPEP_ALL_ISAS float ScaleAndDotFloat32(void* to, const void* from, float scale, const void* b,
                                             int64_t size) {
  return ScaleAndDot<Float32>(to, from, scale, b, size);
}
JAX_DEEPEP_ALL_ISAS float ScaleAndDotFloat16(void* to, const void* from, float scale, const void* b,
                                             int64_t size) {
  return ScaleAndDot<Float16>(to, from, scale, b, size);
}
JAX_DEEPEP_ALL_ISAS float ScaleAndDotBFloat16(void* to, const void* from, float scale,
                                              const void* b, int64_t size) {
  return ScaleAndDot<BFloat16>(to, from, scale, b, size);
}
JAX_DEEPEP_ALL_ISAS void SumFloat32(void* out, const void* bias, float zero, const Term* terms,
                                    int num_terms, int64_t size) {
  SumRows<Float32>(out, bias, zero, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumFloat16(void* out, const void* bias, float zero, const Term* terms,
                                    int num_terms, int64_t size) {
  SumRows<Float16>(out, bias, zero, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumBFloat16(void* out, const void* bias, float zero, const Term* terms,
                                     int num_terms, int64_t size) {
  SumRows<BFloat16>(out, bias, zero, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumRankFloat16(float* out, const Term* terms, int num_terms,
                                        int64_t size) {
  SumRows<Float16, Float32, Float32>(out, nullptr, kBeforeFirst, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumRankBFloat16(float* out, const Term* terms, int num_terms,
                                         int64_t size) {
  SumRows<BFloat16, Float32, Float32>(out, nullptr, kBeforeFirst, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumNodeFloat16(float* out, const Term* terms, int num_terms,
                                        int64_t size) {
  SumRows<Float16, Float16, Float32>(out, nullptr, kBeforeFirst, terms, num_terms, size);
}
JAX_DEEPEP_ALL_ISAS void SumNodeBFloat16(float* out, const Term* terms, int num_terms,
                                         int64_t size) {
  SumRows<BFloat16, BFloat16, Float32>(out, nullptr, kBeforeFirst, terms, num_terms, size);
}

void SumFrom(RowType type, void* out, const void* bias, float zero, const Term* terms,
             int num_terms, int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return SumFloat32(out, bias, zero, terms, num_terms, size);
    case RowType::kFloat16:
      return SumFloat16(out, bias, zero, terms, num_terms, size);
    case RowType::kBFloat16:
      return SumBFloat16(out, bias, zero, terms, num_terms, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;
  }
}

}  // namespace

void FetchRow(const void* row, size_t bytes) {
  for (size_t line = 0; line < bytes; line += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(row) + line);
  }
}

void ScaleRow(RowType type, void* to, const void* from, float scale, int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return ScaleFloat32(to, from, scale, size);
    case RowType::kFloat16:
      return ScaleFloat16(to, from, scale, size);
    case RowType::kBFloat16:
      return ScaleBFloat16(to, from, scale, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;  // only copied: handlers reject it
  }
}

float DotRows(RowType type, const void* a, const void* b, int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return DotFloat32(a, b, size);
    case RowType::kFloat16:
      return DotFloat16(a, b, size);
    case RowType::kBFloat16:
      return DotBFloat16(a, b, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      break;
  }
  return 0.0f;
}

float ScaleAndDotRows(RowType type, void* to, const void* from, float scale, const void* b,
                      int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return ScaleAndDotFloat32(to, from, scale, b, size);
    case RowType::kFloat16:
      return ScaleAndDotFloat16(to, from, scale, b, size);
    case RowType::kBFloat16:
      return ScaleAndDotBFloat16(to, from, scale, b, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      break;
  }
  return 0.0f;
}

void SumTerms(RowType type, void* out, const void* bias, const Term* terms, int num_terms,
              int64_t size) {
  SumFrom(type, out, bias, 0.0f, terms, num_terms, size);
}

void SumOnlyTerms(RowType type, void* out, const Term* terms, int num_terms, int64_t size) {
  SumFrom(type, out, nullptr, kBeforeFirst, terms, num_terms, size);
}

void SumRankInFloat32(RowType type, float* out, const Term* terms, int num_terms, int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return SumFloat32(out, nullptr, kBeforeFirst, terms, num_terms, size);
    case RowType::kFloat16:
      return SumRankFloat16(out, terms, num_terms, size);
    case RowType::kBFloat16:
      return SumRankBFloat16(out, terms, num_terms, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;
  }
}

void SumNodeInFloat32(RowType type, float* out, const Term* terms, int num_terms, int64_t size) {
  switch (type) {
    case RowType::kFloat32:
      return SumFloat32(out, nullptr, kBeforeFirst, terms, num_terms, size);
    case RowType::kFloat16:
      return SumNodeFloat16(out, terms, num_terms, size);
    case RowType::kBFloat16:
      return SumNodeBFloat16(out, terms, num_terms, size);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;
  }
}

void FillAsFailed(RowType type, void* values, int64_t count) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  switch (type) {
    case RowType::kFloat32:
      return FillNaN(static_cast<float*>(values), count);
    case RowType::kFloat16:
      std::fill_n(static_cast<uint16_t*>(values), count, Float16::Store(nan));
      return;
    case RowType::kBFloat16:
      std::fill_n(static_cast<uint16_t*>(values), count, BFloat16::Store(nan));
      return;
    case RowType::kInt32:
    case RowType::kEncoded:
      std::fill_n(static_cast<int32_t*>(values), count, -1);
      return;
  }
}

void FillNaN(float* values, int64_t count) {
  std::fill_n(values, count, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace jax_deepep
