// Rows as they cross links, and their copies by a warp: as they are, or decoded from a wire format.
#ifndef JAX_DEEPEP_CUDA_ROW_COPIES_CUH_
#define JAX_DEEPEP_CUDA_ROW_COPIES_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/encode_rows.cuh"
#include "cuda/kept_rows.cuh"
#include "cuda/row_values.cuh"
#include "cuda/warp_items.cuh"
#include "cuda/wire_rows.cuh"

namespace jax_deepep {

// Groups of a row that a lane has in flight.
inline constexpr int kGroupsInFlight = 14;

// A row in groups that a lane loads, and decodes to what it stores. Without sums, elements are
// words of 16 bits, whatever the type.
template <typename Element, bool kWhole>
struct PlainRow {
  using Loaded = Packed<Element>;
  using Stored = Packed<Element>;
  static constexpr int kInFlight = kGroupsInFlight;
  static constexpr int kAtOnce = kInFlight;  // groups that are decoded at once
  static constexpr bool kIsSlow = false;     // in many instructions
  const char* row;
  RowShape<kWhole> shape;

  __device__ __forceinline__ Loaded Load(int group) const {
    return LoadGroup<Element>(row, group, shape);
  }
  __device__ __forceinline__ Stored Decode(const Loaded& group) const { return group; }
  __device__ __forceinline__ void Store(char* to, int group, const Stored& stored) const {
    StoreGroup(to, group, shape, stored);
  }
};

template <typename Type, bool kWhole, WireFormat kFormat>
struct EncodedRow {
  using Loaded = EncodedGroup;
  using Stored = Packed<typename Type::Element>;
  static constexpr bool kIsSlow = !kWhole;
  static constexpr int kInFlight = kIsSlow ? 2 : kGroupsInFlight;  // for less code
  // All at once need more registers.
  static constexpr int kAtOnce = kWhole ? kGroupsInFlight / 2 : kInFlight;
  RowOnWire<kWhole, kFormat> row;
  RowShape<kWhole> shape;  // in elements

  __device__ __forceinline__ EncodedRow(const char* row, const WireRow& wire)
      : row(row, wire), shape{wire.size} {}
  __device__ __forceinline__ Loaded Load(int group) const { return row.Load(group); }
  __device__ __forceinline__ Stored Decode(const Loaded& group) const {
    float values[kGroup];
    row.Decode(group, values);
    return PackSaturated<Type>(values);
  }
  __device__ __forceinline__ void Store(char* to, int group, const Stored& stored) const {
    StoreGroup(to, group, shape, stored);
  }
};

// What a warp has in flight of a row, from group `base` to before `end`.
template <typename Row, int kCount = Row::kInFlight>
struct RowChunk {
  static constexpr int kGroups = 32 * kCount;  // of the warp
  typename Row::Loaded loaded[kCount];

  __device__ __forceinline__ void Load(const Row& row, int base, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int group = base + i * 32 + lane;
      if (group < end) loaded[i] = row.Load(group);
    }
  }

  // Call to(store) once or a few times: store(row) stores a part of the chunk in another row.
  template <typename To>
  __device__ __forceinline__ void CopyTo(const Row& row, int base, int end, To to) const {
    constexpr int kAtOnce = kCount < Row::kAtOnce ? kCount : Row::kAtOnce;
    static_assert(kCount % kAtOnce == 0);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < kCount; first += kAtOnce) {
      typename Row::Stored groups[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) groups[i] = row.Decode(loaded[first + i]);
      to([&](auto other) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int group = base + (first + i) * 32 + lane;
          if (group < end) row.Store(other, group, groups[i]);
        }
      });
    }
  }
};

// Received rows in one array.
template <bool kWhole>
struct RowArray {
  char* rows;
  int64_t row_bytes;

  __device__ __forceinline__ char* At(int64_t row) const { return rows + row * row_bytes; }
  // By a warp.
  __device__ void Zero(int64_t row) const { ZeroRow(At(row), WordsOf<kWhole>(row_bytes)); }
};

// Call use(rows) with how rows are received: as `Rows`, or as `Kept` if they stay encoded. Kernels
// have both, unless they are the same, because instances only differ in what they encode.
template <typename Rows, typename Kept, typename Use>
__device__ __forceinline__ auto ForReceived(const RouteShape& route, Use use) {
  if constexpr (!std::is_same_v<Rows, Kept>) {
    if (route.keeps_quantized) return use(Kept{});
  }
  return use(Rows{});
}

// Copy a row to those of `rows`, as RowArray, whose indices lanes of this warp have, or -1.
// `destination()`, the lane's index, is called once the first loads are in flight.
template <typename Row, typename Rows, typename Destination>
__device__ void CopyRowToLanes(const Row& row, const Rows& rows, Destination destination) {
  int64_t mine = -1;
  uint32_t all = 0;
  const int num_groups = row.shape.num_groups();
  for (int base = 0; base < num_groups; base += RowChunk<Row>::kGroups) {
    RowChunk<Row> chunk;
    chunk.Load(row, base, num_groups);
    if (base == 0) {
      mine = destination();
      all = __ballot_sync(~0u, mine >= 0);
    }
    chunk.CopyTo(row, base, num_groups, [&](auto store) {
      for (uint32_t lanes = all; lanes != 0; lanes &= lanes - 1) {
        store(rows.At(__shfl_sync(~0u, mine, __ffs(lanes) - 1)));
      }
    });
  }
}

// Encode the rows with crosses(row), of `row_bytes` each, a warp for each.
template <typename Type, bool kWhole, WireFormat kFormat, typename Crosses>
__device__ void EncodeRows(const WireRow& wire, const void* rows, int64_t row_bytes, int num_rows,
                           void* encoded, Crosses crosses) {
  for (int row = FirstItem(); row < num_rows; row += NumWarps()) {
    if (!crosses(row)) continue;
    const char* from = static_cast<const char*>(rows) + row * row_bytes;
    char* to = static_cast<char*>(encoded) + int64_t{row} * wire.bytes();
    if constexpr (kWhole && kFormat == WireFormat::kNvfp4) {
      EncodeWholeNvfp4Row<Type>(wire, from, to);
    } else if constexpr (kWhole && kFormat != WireFormat::kNone) {
      EncodeWholeRow<Type, kFormat>(wire, from, to);
    } else {
      constexpr int kAhead = kWhole ? kGroupsInFlight / 2 : 1;
      PartToEncode<Type, kWhole, kFormat, kAhead, false> part(from, wire, 0, 1);
      part.Load();
      part.CopyTo([to](auto store) { store(to); });
    }
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ROW_COPIES_CUH_
