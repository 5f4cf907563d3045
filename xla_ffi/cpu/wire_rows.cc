#include "cpu/wire_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/row_types.h"
#include "interface/number_formats.h"

namespace jax_deepep {
namespace {

// Elements that are encoded or decoded at once: whole blocks of every format. All steps are loops
// of this length with few operations, because those are the loops that compilers vectorise.
constexpr int kChunk = 128;

// Of a row type, in float32; after the end of the row, zeros, which change no scale.
template <typename Type>
JAX_DEEPEP_INLINE void LoadAs(const void* row, int begin, int count, float* values) {
  const auto* x = static_cast<const typename Type::Storage*>(row) + begin;
  typename Type::Storage padded[kChunk];
  if (count < kChunk) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, x, count * sizeof(padded[0]));
    x = padded;
  }
  for (int i = 0; i < kChunk; ++i) values[i] = Type::Load(x[i]);
}

JAX_DEEPEP_INLINE void LoadChunk(RowType type, const void* row, int begin, int count,
                                 float* values) {
  switch (type) {
    case RowType::kFloat32:
      return LoadAs<Float32>(row, begin, count, values);
    case RowType::kFloat16:
      return LoadAs<Float16>(row, begin, count, values);
    case RowType::kBFloat16:
      return LoadAs<BFloat16>(row, begin, count, values);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;  // only copied: handlers reject it
  }
}

template <typename Type>
JAX_DEEPEP_INLINE void StoreAs(float* values, void* row, int begin, int count) {
  for (int i = 0; i < kChunk; ++i) {  // NaN stays
    const float below = values[i] > Type::kLargest ? Type::kLargest : values[i];
    values[i] = below < -Type::kLargest ? -Type::kLargest : below;
  }
  auto* x = static_cast<typename Type::Storage*>(row) + begin;
  typename Type::Storage padded[kChunk];
  auto* to = count < kChunk ? padded : x;
  for (int i = 0; i < kChunk; ++i) to[i] = Type::Store(values[i]);
  if (count < kChunk) std::memcpy(x, padded, count * sizeof(padded[0]));
}

JAX_DEEPEP_INLINE void StoreChunk(RowType type, float* values, void* row, int begin, int count) {
  switch (type) {
    case RowType::kFloat32:
      return StoreAs<Float32>(values, row, begin, count);
    case RowType::kFloat16:
      return StoreAs<Float16>(values, row, begin, count);
    case RowType::kBFloat16:
      return StoreAs<BFloat16>(values, row, begin, count);
    case RowType::kInt32:
    case RowType::kEncoded:
      return;
  }
}

// The greatest Magnitude, of which only the result needs to be compared with the smallest.
JAX_DEEPEP_INLINE uint32_t LargestOf(const float* values, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<int32_t>(BitsOf(values[i]) & ~kSignBit));
  }
  return Magnitude(FloatOf(largest));
}

// The arithmetic of a format.
template <WireFormat kFormat>
struct Codec {
  static constexpr bool kHasRowScale = kFormat == WireFormat::kNvfp4;
  static constexpr int kCodesPerByte = kFormat == WireFormat::kNvfp4 ? 2 : 1;
  static constexpr int kBlock = BlockOf(kFormat);
  static constexpr int kBlocks = kChunk / kBlock;
  static constexpr int kDataBytes = kChunk / kCodesPerByte;
  using Scale = std::conditional_t<ScaleBytesOf(kFormat) == 4, uint32_t, uint8_t>;

  static JAX_DEEPEP_INLINE BlockScale ScaleOfBlock(const RowScale& row, uint32_t largest) {
    if constexpr (kHasRowScale) return ScaleOf(row, largest);
    return ScaleOf(kFormat, largest);
  }

  static JAX_DEEPEP_INLINE float FromScale(Scale stored) {
    if constexpr (kFormat == WireFormat::kFp8) return FloatOf(stored);
    return kFormat == WireFormat::kNvfp4 ? FromE4m3(stored) : FromE8m0(stored);
  }

  // The data of a chunk, and the scales of its blocks. Changes `values`.
  static JAX_DEEPEP_INLINE void EncodeChunk(const RowScale& row, float* values, uint8_t* data,
                                            Scale* scales) {
    uint32_t largest[kBlocks];
    float factors[kBlocks];
    for (int block = 0; block < kBlocks; ++block) {
      largest[block] = LargestOf(values + block * kBlock, kBlock);
    }
    for (int block = 0; block < kBlocks; ++block) {
      const BlockScale scale = ScaleOfBlock(row, largest[block]);
      factors[block] = scale.factor;
      scales[block] = static_cast<Scale>(scale.stored);
    }
    for (int block = 0; block < kBlocks; ++block) {
      const bool finite = kHasRowScale ? row.finite : largest[block] < kInfinityBits;
      float* of_block = values + block * kBlock;
      for (int i = 0; i < kBlock; ++i) of_block[i] = Scaled(of_block[i], factors[block], finite);
    }
    if constexpr (kCodesPerByte == 2) {
      uint8_t codes[kChunk];
      for (int i = 0; i < kChunk; ++i) codes[i] = static_cast<uint8_t>(E2m1Of(values[i]));
      for (int i = 0; i < kDataBytes; ++i) {
        data[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
      }
    } else {
      for (int i = 0; i < kChunk; ++i) data[i] = static_cast<uint8_t>(E4m3Of(values[i]));
    }
  }

  static JAX_DEEPEP_INLINE void DecodeChunk(float row_scale, const uint8_t* data,
                                            const Scale* scales, float* values) {
    if constexpr (kCodesPerByte == 2) {
      uint8_t codes[kChunk];
      for (int i = 0; i < kDataBytes; ++i) {
        codes[2 * i] = data[i] & 15;
        codes[2 * i + 1] = data[i] >> 4;
      }
      for (int i = 0; i < kChunk; ++i) values[i] = FromE2m1(codes[i]);
    } else {
      for (int i = 0; i < kChunk; ++i) values[i] = FromE4m3(data[i]);
    }
    float factors[kBlocks];
    for (int block = 0; block < kBlocks; ++block) factors[block] = FromScale(scales[block]);
    for (int block = 0; block < kBlocks; ++block) {
      float* of_block = values + block * kBlock;
      for (int i = 0; i < kBlock; ++i) of_block[i] *= factors[block];
    }
    if constexpr (kHasRowScale) {
      for (int i = 0; i < kChunk; ++i) values[i] *= row_scale;
    }
  }
};

JAX_DEEPEP_INLINE RowScale RowScaleOfRow(RowType type, const void* row, int size) {
  uint32_t largest = 0;
  for (int begin = 0; begin < size; begin += kChunk) {
    float values[kChunk];
    LoadChunk(type, row, begin, std::min(kChunk, size - begin), values);
    largest = std::max(largest, LargestOf(values, kChunk));
  }
  return RowScaleOf(largest);
}

template <WireFormat kFormat>
JAX_DEEPEP_INLINE void Encode(RowType type, const WireRow& wire, const void* from, void* to) {
  using Of = Codec<kFormat>;
  auto* data = static_cast<uint8_t*>(to);
  uint8_t* scales = data + wire.scales_offset();
  RowScale row{};
  if constexpr (Of::kHasRowScale) {
    row = RowScaleOfRow(type, from, wire.size);
    std::memcpy(data + wire.row_scale_offset(), &row.scale, sizeof(row.scale));
  }
  for (int begin = 0; begin < wire.size; begin += kChunk) {
    const int count = std::min(kChunk, wire.size - begin);
    const int num_blocks = (count + Of::kBlock - 1) / Of::kBlock;
    float values[kChunk];
    uint8_t of_chunk[Of::kDataBytes];
    typename Of::Scale of_blocks[Of::kBlocks];
    LoadChunk(type, from, begin, count, values);
    Of::EncodeChunk(row, values, of_chunk, of_blocks);
    std::memcpy(data + begin / Of::kCodesPerByte, of_chunk, count / Of::kCodesPerByte);
    std::memcpy(scales + begin / Of::kBlock * sizeof(of_blocks[0]), of_blocks,
                num_blocks * sizeof(of_blocks[0]));
  }
}

template <WireFormat kFormat>
JAX_DEEPEP_INLINE void Decode(RowType type, const WireRow& wire, const void* from, void* to) {
  using Of = Codec<kFormat>;
  const auto* data = static_cast<const uint8_t*>(from);
  const uint8_t* scales = data + wire.scales_offset();
  float row_scale = 1.0f;
  if constexpr (Of::kHasRowScale) {
    std::memcpy(&row_scale, data + wire.row_scale_offset(), sizeof(row_scale));
  }
  for (int begin = 0; begin < wire.size; begin += kChunk) {
    const int count = std::min(kChunk, wire.size - begin);
    const int num_blocks = (count + Of::kBlock - 1) / Of::kBlock;
    float values[kChunk];
    uint8_t of_chunk[Of::kDataBytes] = {};
    typename Of::Scale of_blocks[Of::kBlocks] = {};
    std::memcpy(of_chunk, data + begin / Of::kCodesPerByte, count / Of::kCodesPerByte);
    std::memcpy(of_blocks, scales + begin / Of::kBlock * sizeof(of_blocks[0]),
                num_blocks * sizeof(of_blocks[0]));
    Of::DecodeChunk(row_scale, of_chunk, of_blocks, values);
    StoreChunk(type, values, to, begin, count);
  }
}

JAX_DEEPEP_ALL_ISAS void EncodeFp8(RowType type, const WireRow& wire, const void* from, void* to) {
  Encode<WireFormat::kFp8>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void EncodeFp8E8m0(RowType type, const WireRow& wire, const void* from,
                                       void* to) {
  Encode<WireFormat::kFp8E8m0>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void EncodeMxfp8(RowType type, const WireRow& wire, const void* from,
                                     void* to) {
  Encode<WireFormat::kMxfp8>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void EncodeNvfp4(RowType type, const WireRow& wire, const void* from,
                                     void* to) {
  Encode<WireFormat::kNvfp4>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void DecodeFp8(RowType type, const WireRow& wire, const void* from, void* to) {
  Decode<WireFormat::kFp8>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void DecodeFp8E8m0(RowType type, const WireRow& wire, const void* from,
                                       void* to) {
  Decode<WireFormat::kFp8E8m0>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void DecodeMxfp8(RowType type, const WireRow& wire, const void* from,
                                     void* to) {
  Decode<WireFormat::kMxfp8>(type, wire, from, to);
}
JAX_DEEPEP_ALL_ISAS void DecodeNvfp4(RowType type, const WireRow& wire, const void* from,
                                     void* to) {
  Decode<WireFormat::kNvfp4>(type, wire, from, to);
}

}  // namespace

void EncodeRow(RowType type, const WireRow& wire, const void* from, void* to) {
  switch (wire.format) {
    case WireFormat::kFp8:
      return EncodeFp8(type, wire, from, to);
    case WireFormat::kFp8E8m0:
      return EncodeFp8E8m0(type, wire, from, to);
    case WireFormat::kMxfp8:
      return EncodeMxfp8(type, wire, from, to);
    case WireFormat::kNvfp4:
      return EncodeNvfp4(type, wire, from, to);
    case WireFormat::kNone:
      return;  // crosses links as it is
  }
}

void DecodeRow(RowType type, const WireRow& wire, const void* from, void* to) {
  switch (wire.format) {
    case WireFormat::kFp8:
      return DecodeFp8(type, wire, from, to);
    case WireFormat::kFp8E8m0:
      return DecodeFp8E8m0(type, wire, from, to);
    case WireFormat::kMxfp8:
      return DecodeMxfp8(type, wire, from, to);
    case WireFormat::kNvfp4:
      return DecodeNvfp4(type, wire, from, to);
    case WireFormat::kNone:
      return;
  }
}

}  // namespace jax_deepep
