// Which instance of a kernel takes rows of a type.
#ifndef JAX_DEEPEP_CUDA_KERNEL_CHOICE_CUH_
#define JAX_DEEPEP_CUDA_KERNEL_CHOICE_CUH_

#include "cuda/encode_rows.cuh"
#include "cuda/kernel_launch.h"
#include "cuda/row_values.cuh"
#include "interface/geometry.h"

namespace jax_deepep {

// Whether rows are whole groups of elements; of those that are only copied, of words of 16 bits.
inline bool IsWhole(const RowFormat& rows) { return rows.size % kGroup == 0; }
inline bool IsWholeCopy(const RowFormat& rows) {
  return rows.bytes() / static_cast<int64_t>(sizeof(uint16_t)) % kGroup == 0;
}

// Instances::Of<Type, kWhole>() for the type of rows of floats, and whether they are whole groups
// of elements; null for integers.
template <typename Instances>
auto InstanceFor(const RowFormat& rows) {
  const bool whole = IsWhole(rows);
  switch (rows.type) {
    case RowType::kFloat32:
      return whole ? Instances::template Of<Float32, true>()
                   : Instances::template Of<Float32, false>();
    case RowType::kFloat16:
      return whole ? Instances::template Of<Float16, true>()
                   : Instances::template Of<Float16, false>();
    case RowType::kBFloat16:
      return whole ? Instances::template Of<BFloat16, true>()
                   : Instances::template Of<BFloat16, false>();
    case RowType::kInt32:
    case RowType::kEncoded:
      break;
  }
  return decltype(Instances::template Of<Float32, true>()){nullptr};
}

// The same for rows in a wire format, Instances<kFormat>::Of<Type, kWhole>(). Whole pieces of
// bfloat16, which such rows usually are, have instances of their own: for the formats kFast, and
// with kAnyIsWhole for any other. All other rows share slow ones.
template <template <WireFormat> class Instances, bool kAnyIsWhole, WireFormat... kFast>
auto WireInstanceFor(const RowFormat& rows) {
  using Kernel = decltype(Instances<WireFormat::kNone>::template Of<BFloat16, false>());
  if (rows.type == RowType::kBFloat16 && rows.size % kPieceElements == 0) {
    Kernel kernel = nullptr;
    ((kernel = rows.wire == kFast ? Instances<kFast>::template Of<BFloat16, true>() : kernel), ...);
    if (kernel != nullptr) return kernel;
    if constexpr (kAnyIsWhole) return Instances<WireFormat::kNone>::template Of<BFloat16, true>();
  }
  switch (rows.type) {
    case RowType::kFloat32:
      return Instances<WireFormat::kNone>::template Of<Float32, false>();
    case RowType::kFloat16:
      return Instances<WireFormat::kNone>::template Of<Float16, false>();
    case RowType::kBFloat16:
      return Instances<WireFormat::kNone>::template Of<BFloat16, false>();
    case RowType::kInt32:
    case RowType::kEncoded:
      break;
  }
  return Kernel{nullptr};
}

// For kernels that move many rows: an instance for each format.
template <template <WireFormat> class Instances>
auto InstanceForEachFormat(const RowFormat& rows) {
  return WireInstanceFor<Instances, false, WireFormat::kFp8, WireFormat::kFp8E8m0,
                         WireFormat::kMxfp8, WireFormat::kNvfp4>(rows);
}

// For the others: one for fp8, one for the rest.
template <template <WireFormat> class Instances>
auto InstanceForFp8(const RowFormat& rows) {
  return WireInstanceFor<Instances, true, WireFormat::kFp8>(rows);
}

// Load kernel_for(rows) for rows of floats, and encoded ones, of every kind that has a kernel of
// its own. Returns an error or null.
template <typename KernelFor>
const char* LoadKernels(KernelFor kernel_for, int max_shared_bytes) {
  for (const RowType type :
       {RowType::kFloat32, RowType::kFloat16, RowType::kBFloat16, RowType::kEncoded}) {
    for (const int size : {kPieceElements, 2}) {
      for (int wire = 0; wire < kNumWireFormats; ++wire) {
        const auto kernel = kernel_for({type, size, static_cast<WireFormat>(wire)});
        if (kernel == nullptr) continue;
        if (const char* error = LoadKernel(kernel, max_shared_bytes)) return error;
      }
    }
  }
  return nullptr;
}

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CUDA_KERNEL_CHOICE_CUH_
