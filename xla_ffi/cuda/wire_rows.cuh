// Rows in a wire format: how the lanes of a warp encode and decode groups of eight elements.
//
// All elements of a group share a scale. A block has 2, 4 or 16 groups, in as many lanes.
// Everything has instances for single formats, and one (kNone) for any, which is slower.
#ifndef JAX_DEEPEP_CUDA_WIRE_ROWS_CUH_
#define JAX_DEEPEP_CUDA_WIRE_ROWS_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/e2m1_groups.cuh"
#include "cuda/memory_order.cuh"
#include "cuda/row_values.cuh"
#include "interface/number_formats.h"
#include "interface/wire_format.h"

namespace jax_deepep {

static_assert(kGroup == 8);

// The format of an instance, and whether its elements have four bits instead of eight.
template <WireFormat kFormat>
__device__ __forceinline__ WireFormat FormatOf(const WireRow& wire) {
  return kFormat == WireFormat::kNone ? wire.format : kFormat;
}
template <WireFormat kFormat>
__device__ __forceinline__ bool HasFourBits(const WireRow& wire) {
  return FormatOf<kFormat>(wire) == WireFormat::kNvfp4;
}
// Groups of a block, as a power of two.
__device__ __forceinline__ int BlockShift(WireFormat format) {
  return format == WireFormat::kNvfp4 ? 1 : format == WireFormat::kMxfp8 ? 2 : 4;
}
inline __host__ __device__ int GroupsOfBlock(WireFormat format) { return BlockOf(format) / kGroup; }

// --- Elements.

// Two elements as float8_e4m3fn; the first is in the lower byte. As float16 they are exact.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 890
__device__ __forceinline__ uint32_t E4m3PairOf(float first, float second) {
  return E4m3Of(first) | E4m3Of(second) << 8;
}
__device__ __forceinline__ uint32_t HalvesOfE4m3Pair(uint32_t codes) {
  return WordOf(__floats2half2_rn(FromE4m3(codes & 0xffu), FromE4m3(codes >> 8 & 0xffu)));
}
#endif
__device__ __forceinline__ float2 FromE4m3Pair(uint32_t codes) {
  return __half22float2(PairOf<__half2>(HalvesOfE4m3Pair(codes)));
}

// --- Decoding.

// A group as it is loaded, with the scale of its block. nvfp4 has one word of elements, and the
// scale twice as float16 in the other.
struct EncodedGroup {
  uint32_t elements[2];
  float scale;
};

// An encoded row that has arrived, from which the lanes of a warp load groups.
template <bool kWhole, WireFormat kFormat>
struct RowOnWire {
  const char* row;
  const WireRow& wire;
  const char* scales;
  float row_scale = 1.0f;  // of nvfp4

  __device__ __forceinline__ RowOnWire(const char* row, const WireRow& wire)
      : row(row), wire(wire), scales(row + wire.scales_offset()) {
    if (has_four_bits()) row_scale = *reinterpret_cast<const float*>(row + wire.row_scale_offset());
  }

  __device__ __forceinline__ bool has_four_bits() const { return HasFourBits<kFormat>(wire); }

  __device__ __forceinline__ EncodedGroup Load(int group) const {
    const int bytes = has_four_bits() ? kGroup / 2 : kGroup;
    const char* from = row + group * bytes;
    EncodedGroup loaded;
    loaded.elements[1] = 0;
    if constexpr (!kWhole) {
      const int present = min(bytes, wire.data_bytes() - group * bytes);
      loaded.elements[0] = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t byte = i < present ? static_cast<uint8_t>(from[i]) : 0;
        loaded.elements[i / 4] |= byte << i % 4 * 8;
      }
    } else if (has_four_bits()) {
      loaded.elements[0] = LoadOnce(reinterpret_cast<const uint32_t*>(from));
    } else {
      const uint2 words = LoadOnce(reinterpret_cast<const uint2*>(from));
      loaded.elements[0] = words.x, loaded.elements[1] = words.y;
    }
    const WireFormat format = FormatOf<kFormat>(wire);
    const int block = group >> BlockShift(format);
    if (has_four_bits()) {
      const uint32_t code = reinterpret_cast<const uint8_t*>(scales)[block];
      loaded.elements[1] = HalvesOfE4m3Pair(code | code << 8);
    } else if (format == WireFormat::kFp8) {
      loaded.scale = reinterpret_cast<const float*>(scales)[block];
    } else {
      loaded.scale = FromE8m0(reinterpret_cast<const uint8_t*>(scales)[block]);
    }
    return loaded;
  }

  // The values of a group.
  __device__ __forceinline__ void Decode(const EncodedGroup& group, float* values) const {
    if (has_four_bits()) {
      ScaleE2m1Group(group.elements[0], group.elements[1], values);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = __fmul_rn(values[i], row_scale);
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const float2 pair = FromE4m3Pair(group.elements[i / 2] >> i % 2 * 16);
      values[2 * i] = __fmul_rn(pair.x, group.scale);
      values[2 * i + 1] = __fmul_rn(pair.y, group.scale);
    }
  }

  // The same, saturated as float32.
  __device__ __forceinline__ void DecodeSaturated(const EncodedGroup& group, float* values) const {
    Decode(group, values);
    // What the largest code stands for is finite; not so if a scale is NaN.
    const float largest = has_four_bits() ? 2688.0f * row_scale : kE4m3Max * group.scale;
    if (largest <= Float32::kLargest) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = Saturated(values[i], Float32::kLargest);
  }
};

// --- Encoding.

// A group as it is stored, with the scale of its block. nvfp4 has one word of elements.
struct GroupCodes {
  uint32_t elements[2];
  uint32_t scale;
};

__device__ inline uint32_t LargestOf(const float* values) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) largest = max(largest, BitsOf(values[i]) & ~kSignBit);
  return largest;
}

// Let what counts as 0 be 0, with its sign.
__device__ __forceinline__ void FlushTiny(float* values) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    values[i] = FloatOf(Magnitude(values[i]) | (BitsOf(values[i]) & kSignBit));
  }
}

// Encode a group of every lane; consecutive lanes have consecutive groups, and lane 0 the first of
// a block. `values` are zeros past the row; `largest` is LargestOf(values). `of_row` is of nvfp4.
template <WireFormat kFormat>
__device__ __forceinline__ GroupCodes Encode(const WireRow& wire, const RowScale& of_row,
                                             float* values, uint32_t largest) {
  const bool has_four_bits = HasFourBits<kFormat>(wire);
  const WireFormat format = FormatOf<kFormat>(wire);
#pragma unroll
  for (int distance = 1 << BlockShift(format) >> 1; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  largest = Magnitude(FloatOf(largest));
  const BlockScale block = has_four_bits ? ScaleOf(of_row, largest) : ScaleOf(format, largest);
  if (has_four_bits ? of_row.is_tiny : largest < kTinyBits) FlushTiny(values);
  GroupCodes codes;
  codes.scale = block.stored;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] = __fmul_rn(values[i], block.factor);
  if (has_four_bits) {
    codes.elements[0] = of_row.finite ? E2m1GroupOf(values) : 0;
    codes.elements[1] = 0;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      codes.elements[i] = E4m3PairOf(values[4 * i], values[4 * i + 1]) |
                          E4m3PairOf(values[4 * i + 2], values[4 * i + 3]) << 16;
      if (largest >= kInfinityBits) codes.elements[i] = 0;
    }
  }
  return codes;
}

// The same as a function of its own: code that is executed once per op is read from memory, and
// takes longer, the longer it is.
template <WireFormat kFormat>
__device__ __noinline__ GroupCodes EncodeOutOfLine(const WireRow& wire, RowScale of_row,
                                                   float4 first, float4 second, uint32_t largest) {
  float values[kGroup] = {first.x,  first.y,  first.z,  first.w,
                          second.x, second.y, second.z, second.w};
  return Encode<kFormat>(wire, of_row, values, largest);
}

// Store a group of the row, and with the first of a block the scale.
template <bool kWhole, WireFormat kFormat>
__device__ __forceinline__ void StoreCodes(const WireRow& wire, int scales_offset, char* row,
                                           int group, const GroupCodes& codes) {
  const int bytes = HasFourBits<kFormat>(wire) ? kGroup / 2 : kGroup;
  char* to = row + group * bytes;
  if constexpr (!kWhole) {
    const int present = min(bytes, wire.data_bytes() - group * bytes);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < present) to[i] = static_cast<char>(codes.elements[i / 4] >> i % 4 * 8);
    }
  } else if (HasFourBits<kFormat>(wire)) {
    *reinterpret_cast<uint32_t*>(to) = codes.elements[0];
  } else {
    *reinterpret_cast<uint2*>(to) = {codes.elements[0], codes.elements[1]};
  }
  const WireFormat format = FormatOf<kFormat>(wire);
  const int shift = BlockShift(format), block = group >> shift;
  if (block << shift != group) return;
  char* scales = row + scales_offset;
  if (format == WireFormat::kFp8) {
    reinterpret_cast<uint32_t*>(scales)[block] = codes.scale;
  } else {
    scales[block] = static_cast<char>(codes.scale);
  }
}

// A part of a row that a warp encodes: whole blocks; of nvfp4 a whole row.
template <typename Type, bool kWhole, WireFormat kFormat, int kAhead, bool kOutOfLine>
struct PartToEncode {
  using Group = Packed<typename Type::Element>;
  const char* from;
  const WireRow* wire;
  int scales_offset;
  GroupRange range;
  Group groups[kAhead];  // of a lane, in flight

  __device__ PartToEncode(const char* from, const WireRow& wire, int part, int num_parts)
      : from(from),
        wire(&wire),
        scales_offset(wire.scales_offset()),
        range(GroupRange::Part(RowShape<kWhole>{wire.size}.num_groups(), GroupsOfBlock(wire.format),
                               part, num_parts)) {}

  // Load the first groups.
  __device__ __forceinline__ void Load() { LoadFrom(range.first); }

  // Then encode the part. to(store) is called for everything that is stored, and calls store(row)
  // for each destination.
  template <typename To>
  __device__ __forceinline__ void CopyTo(To to) {
    RowScale of_row = {};
    if (HasFourBits<kFormat>(*wire)) {
      uint32_t largest = 0;
      ForGroups([&](int, const Group& group) { largest = max(largest, Type::LargestOf(group)); });
      of_row = RowScaleOf(Magnitude(FloatOf(__reduce_max_sync(~0u, largest))));
      to([&](char* row) {
        if (threadIdx.x % 32 != 0) return;
        *reinterpret_cast<float*>(row + wire->row_scale_offset()) = of_row.scale;
      });
      if (range.end > 32 * kAhead) Load();  // they have been replaced
    }
    ForGroups([&](int at, const Group& group) {
      float values[kGroup];
      Type::Unpack(group, values);
      const uint32_t largest = Type::LargestOf(group);
      const auto codes = kOutOfLine
                             ? EncodeOutOfLine<kFormat>(
                                   *wire, of_row, {values[0], values[1], values[2], values[3]},
                                   {values[4], values[5], values[6], values[7]}, largest)
                             : Encode<kFormat>(*wire, of_row, values, largest);
      to([&](char* row) {
        if (at < range.end) StoreCodes<kWhole, kFormat>(*wire, scales_offset, row, at, codes);
      });
    });
  }

 private:
  __device__ __forceinline__ void LoadFrom(int base) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = base + i * 32 + static_cast<int>(threadIdx.x) % 32;
      groups[i] = at < range.end
                      ? LoadGroup<typename Type::Element>(from, at, RowShape<kWhole>{wire->size})
                      : Group{};
    }
  }

  // Call use(group, elements) for every round of groups, of which the first have been loaded.
  template <typename Use>
  __device__ __forceinline__ void ForGroups(Use use) {
    for (int base = range.first; base < range.end; base += 32 * kAhead) {
      if (base > range.first) LoadFrom(base);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i * 32 >= range.end) continue;
        use(base + i * 32 + static_cast<int>(threadIdx.x) % 32, groups[i]);
      }
    }
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_WIRE_ROWS_CUH_
