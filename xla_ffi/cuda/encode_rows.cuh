// The encoding of rows of many elements to eight bits each, in few instructions: see wire_rows.cuh.
#ifndef JAX_DEEPEP_CUDA_ENCODE_ROWS_CUH_
#define JAX_DEEPEP_CUDA_ENCODE_ROWS_CUH_

#include <cstdint>

#include "cuda/row_values.cuh"
#include "cuda/wire_rows.cuh"
#include "interface/number_formats.h"

namespace jax_deepep {

// Elements that a lane encodes at once, and stores as 16 bytes.
inline constexpr int kPieceElements = 2 * kGroup;

// The pieces of a row that a warp has in registers: of each lane one in every round.
template <typename Type>
struct RowPieces {
  static constexpr int kRounds = 7;
  static constexpr int kPieces = 32 * kRounds;
  using Group = Packed<typename Type::Element>;
  Group groups[kRounds][2];

  // Those from `base` on; past the row, zeros.
  __device__ __forceinline__ void Load(const char* row, int base, int num_pieces) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int piece = base + round * 32 + lane;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        groups[round][i] = piece < num_pieces ? LoadGroup<typename Type::Element>(
                                                    row, 2 * piece + i, RowShape<true>{})
                                              : Group{};
      }
    }
  }
  __device__ __forceinline__ uint32_t LargestOf(int round) const {
    return max(Type::LargestOf(groups[round][0]), Type::LargestOf(groups[round][1]));
  }
};

// Encode a row of whole pieces, by a warp. A block is in the lanes of 16 elements each, which share
// its scale; each of them computes it for another round of the row.
template <typename Type, WireFormat kFormat>
__device__ __forceinline__ void EncodeWholeRow(const WireRow& wire, const char* from, char* to) {
  static_assert(kFormat != WireFormat::kNone && kFormat != WireFormat::kNvfp4);
  using Pieces = RowPieces<Type>;
  constexpr int kRounds = Pieces::kRounds;
  constexpr int kLanes = BlockOf(kFormat) / kPieceElements;
  constexpr int kScales = (kRounds + kLanes - 1) / kLanes;  // that a lane computes
  const int lane = threadIdx.x % 32, of_block = lane % kLanes, first_lane = lane - of_block;
  const int num_pieces = wire.size / kPieceElements, num_blocks = wire.num_blocks();
  char* const scales = to + wire.scales_offset();
  for (int base = 0; base < num_pieces; base += Pieces::kPieces) {
    Pieces pieces;
    pieces.Load(from, base, num_pieces);
    uint32_t largest[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      largest[round] = pieces.LargestOf(round);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        largest[round] = max(largest[round], __shfl_xor_sync(~0u, largest[round], distance));
      }
    }
    float factors[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      uint32_t mine = 0;
#pragma unroll
      for (int j = 0; j < kLanes && i * kLanes + j < kRounds; ++j) {
        if (of_block == j) mine = largest[i * kLanes + j];
      }
      const BlockScale scale = ScaleOf(kFormat, Magnitude(FloatOf(mine)));
      factors[i] = scale.factor;
      const int round = i * kLanes + of_block;
      const int block = (base + round * 32 + first_lane) / kLanes;
      if (round >= kRounds || block >= num_blocks) continue;
      if (kFormat == WireFormat::kFp8) {
        reinterpret_cast<uint32_t*>(scales)[block] = scale.stored;
      } else {
        scales[block] = static_cast<char>(scale.stored);
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const float factor = __shfl_sync(~0u, factors[round / kLanes], first_lane + round % kLanes);
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float values[kGroup];
        Type::Unpack(pieces.groups[round][i], values);
        // With the least scale of the other formats, what counts as 0 is rounded to 0 anyway.
        if (kFormat == WireFormat::kMxfp8 && largest[round] < kTinyBits) FlushTiny(values);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) values[j] = __fmul_rn(values[j], factor);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t word = E4m3PairOf(values[4 * j], values[4 * j + 1]) |
                                E4m3PairOf(values[4 * j + 2], values[4 * j + 3]) << 16;
          codes[2 * i + j] = largest[round] < kInfinityBits ? word : 0;
        }
      }
      const int piece = base + round * 32 + lane;
      if (piece >= num_pieces) continue;
      reinterpret_cast<uint4*>(to)[piece] = {codes[0], codes[1], codes[2], codes[3]};
    }
  }
}

// A group of a row whose largest element is tiny; such rows are rare.
template <typename Type>
__device__ __noinline__ Packed<typename Type::Element> WithoutTiny(
    Packed<typename Type::Element> group) {
  float values[kGroup];
  Type::Unpack(group, values);
  FlushTiny(values);
  return Type::Pack(values);
}

// The same for nvfp4, whose blocks are pieces: the row is read for its scale, then encoded from its
// end, which is in registers.
template <typename Type>
__device__ __forceinline__ void EncodeWholeNvfp4Row(const WireRow& wire, const char* from,
                                                    char* to) {
  using Pieces = RowPieces<Type>;
  constexpr int kRounds = Pieces::kRounds, kPieces = Pieces::kPieces;
  const int lane = threadIdx.x % 32, num_pieces = wire.size / kPieceElements;
  const int last = (num_pieces - 1) / kPieces * kPieces;
  Pieces pieces;
  uint32_t largest = 0;
  for (int base = 0; base <= last; base += kPieces) {
    pieces.Load(from, base, num_pieces);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) largest = max(largest, pieces.LargestOf(round));
  }
  const RowScale of_row = RowScaleOf(Magnitude(FloatOf(__reduce_max_sync(~0u, largest))));
  if (lane == 0) *reinterpret_cast<float*>(to + wire.row_scale_offset()) = of_row.scale;
  const uint32_t kept = of_row.finite ? ~0u : 0u;
  char* const scales = to + wire.scales_offset();
  for (int base = last; base >= 0; base -= kPieces) {
    if (base < last) pieces.Load(from, base, num_pieces);
    if (of_row.is_tiny) {
#pragma unroll
      for (auto& piece : pieces.groups) {
        for (auto& group : piece) group = WithoutTiny<Type>(group);
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const BlockScale block = ScaleOf(of_row, Magnitude(FloatOf(pieces.LargestOf(round))));
      uint32_t codes[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float values[kGroup];
        Type::Unpack(pieces.groups[round][i], values);
#pragma unroll
        for (float& value : values) value = __fmul_rn(value, block.factor);
        codes[i] = E2m1GroupOf(values) & kept;
      }
      const int piece = base + round * 32 + lane;
      if (piece >= num_pieces) continue;
      reinterpret_cast<uint2*>(to)[piece] = {codes[0], codes[1]};
      scales[piece] = static_cast<char>(block.stored);
    }
  }
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_ENCODE_ROWS_CUH_
