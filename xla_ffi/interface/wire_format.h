// How rows of floats cross links: as they are, or in a block-scaled format, encoded by the sender
// and decoded by the receiver. The formats are defined in jax_deepep/quantization/block_scaled.py.
#ifndef JAX_DEEPEP_INTERFACE_WIRE_FORMAT_H_
#define JAX_DEEPEP_INTERFACE_WIRE_FORMAT_H_

#include <cstdint>

#include "interface/host_device.h"

namespace jax_deepep {

enum class WireFormat : int32_t { kNone, kFp8, kFp8E8m0, kMxfp8, kNvfp4 };
inline constexpr const char* kWireNames[] = {"None", "fp8", "fp8_ue8m0", "mxfp8", "nvfp4"};
inline constexpr int kNumWireFormats = 5;

// Elements that share a scale.
JAX_DEEPEP_HOST_DEVICE constexpr int BlockOf(WireFormat format) {
  return format == WireFormat::kNvfp4 ? 16 : format == WireFormat::kMxfp8 ? 32 : 128;
}

JAX_DEEPEP_HOST_DEVICE constexpr int ScaleBytesOf(WireFormat format) {
  return format == WireFormat::kFp8 ? 4 : 1;
}

// A row on the wire: its elements, the scales of their blocks, and for nvfp4 the scale of the row
// as float32. Each part starts at a multiple of 16 bytes, and so does the next row.
struct WireRow {
  WireFormat format = WireFormat::kNone;
  int32_t size = 0;  // elements

  JAX_DEEPEP_HOST_DEVICE int32_t num_blocks() const {
    return (size + BlockOf(format) - 1) / BlockOf(format);
  }
  JAX_DEEPEP_HOST_DEVICE int32_t data_bytes() const {
    return format == WireFormat::kNvfp4 ? (size + 1) / 2 : size;
  }
  JAX_DEEPEP_HOST_DEVICE int32_t scales_bytes() const {
    return num_blocks() * ScaleBytesOf(format);
  }
  JAX_DEEPEP_HOST_DEVICE int32_t row_scale_bytes() const {
    return format == WireFormat::kNvfp4 ? 4 : 0;
  }
  JAX_DEEPEP_HOST_DEVICE int32_t scales_offset() const { return RoundUpTo16(data_bytes()); }
  JAX_DEEPEP_HOST_DEVICE int32_t row_scale_offset() const {
    return scales_offset() + RoundUpTo16(scales_bytes());
  }
  JAX_DEEPEP_HOST_DEVICE int32_t bytes() const {
    return row_scale_offset() + RoundUpTo16(row_scale_bytes());
  }

 private:
  JAX_DEEPEP_HOST_DEVICE static int32_t RoundUpTo16(int32_t value) {
    return (value + 15) / 16 * 16;
  }
};

// Arrays of rows that stay encoded, the parts of a row each in its own, without padding.
struct KeptArrays {
  void* data = nullptr;       // [C, data_bytes]
  void* scales = nullptr;     // [C, scales_bytes]
  void* row_scale = nullptr;  // [C, row_scale_bytes]

  // Call use(array, bytes of a row there, their offset in the row on the wire) for every part.
  template <typename Use>
  void ForParts(const WireRow& wire, Use use) const {
    use(static_cast<char*>(data), wire.data_bytes(), 0);
    use(static_cast<char*>(scales), wire.scales_bytes(), wire.scales_offset());
    if (wire.row_scale_bytes() == 0) return;
    use(static_cast<char*>(row_scale), wire.row_scale_bytes(), wire.row_scale_offset());
  }
};

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_INTERFACE_WIRE_FORMAT_H_
