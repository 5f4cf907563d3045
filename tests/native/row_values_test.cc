// Checks of numbers: formats, sums, rows on the wire.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/row_math.h"
#include "cpu/wire_rows.h"
#include "interface/number_formats.h"
#include "native_test.h"

namespace jax_deepep {
namespace {

// The value of a 16-bit pattern, by the definition of the format: exponent bits, mantissa bits.
double ValueOf(uint16_t pattern, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = pattern & ((1 << mantissa_bits) - 1);
  const double sign = pattern & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// One 16-bit row element as float32, through a float32 dot product with one.
float Load(RowType type, uint16_t pattern) {
  const uint16_t one = type == RowType::kFloat16 ? 0x3c00 : 0x3f80;
  return DotRows(type, &pattern, &one, 1);
}

// A float32 rounded to a 16-bit type: 1 * scale.
uint16_t Store(RowType type, float value) {
  const uint16_t one = type == RowType::kFloat16 ? 0x3c00 : 0x3f80;
  uint16_t result;
  ScaleRow(type, &result, &one, value, 1);
  return result;
}

void CheckConversions(RowType type, int exponent_bits, int mantissa_bits) {
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  for (long pattern = 0; pattern < 65536; ++pattern) {
    const auto bits = static_cast<uint16_t>(pattern);
    const double value = ValueOf(bits, exponent_bits, mantissa_bits);
    const float loaded = Load(type, bits);
    if (std::isnan(value)) {
      Check(std::isnan(loaded), "NaN loads as NaN", pattern);
      Check(std::isnan(Load(type, Store(type, loaded))), "NaN stores as NaN", pattern);
      continue;
    }
    Check(loaded == value, "a pattern loads as its value", pattern);
    // The sum in DotRows starts at +0, which takes the sign of -0; Store must keep it.
    if (value != 0)
      Check(Store(type, loaded) == bits, "a value stores as its own pattern", pattern);
    if (std::isinf(value) || (bits & 0x7fff) + 1 == infinity) continue;

    // Between this pattern and the next one away from zero: the middle is exact in float32.
    const auto next = static_cast<uint16_t>(bits + 1);
    const auto middle =
        static_cast<float>((value + ValueOf(next, exponent_bits, mantissa_bits)) / 2);
    if (middle == 0 || std::abs(middle) < std::numeric_limits<float>::min()) continue;
    const float outwards = std::copysign(std::numeric_limits<float>::infinity(), middle);
    Check(Store(type, middle) == (bits & 1 ? next : bits), "a tie goes to the even pattern",
          pattern);
    Check(Store(type, std::nextafter(middle, 0.0f)) == bits, "below the tie goes down", pattern);
    Check(Store(type, std::nextafter(middle, outwards)) == next, "above the tie goes up", pattern);
  }
  Check(Store(type, -0.0f) == 0x8000, "minus zero keeps its sign");
  Check(Store(type, std::numeric_limits<float>::infinity()) == infinity, "infinity stays");
  // The first value that is not finite any more: half a unit above the largest.
  const double largest = ValueOf(infinity - 1, exponent_bits, mantissa_bits);
  const double unit = largest - ValueOf(infinity - 2, exponent_bits, mantissa_bits);
  const auto overflow = static_cast<float>(largest + unit / 2);
  Check(Store(type, overflow) == infinity, "half a unit above the largest is infinity");
  Check(Store(type, std::nextafter(overflow, 0.0f)) == infinity - 1,
        "less than that is the largest");
}

void CheckTinyFloats() {
  // float16: half of the smallest subnormal ties to zero, a little more becomes the smallest.
  const float smallest = std::ldexp(1.0f, -24);
  Check(Store(RowType::kFloat16, smallest / 2) == 0, "half of the smallest ties to zero");
  Check(Store(RowType::kFloat16, std::nextafter(smallest / 2, 1.0f)) == 1,
        "more than half is the smallest");
  Check(Store(RowType::kFloat16, FloatOf(1)) == 0, "a float32 subnormal is zero in float16");
}

// Sums against the words of the contract, with values that depend on the order of rounding.
void CheckSums() {
  constexpr int kSize = 300;  // more than one block
  std::vector<float> a(kSize), b(kSize), c(kSize), bias(kSize), out(kSize);
  for (int i = 0; i < kSize; ++i) {
    a[i] = 1.0f + static_cast<float>(i) * 1e-3f;
    b[i] = -1.0f / static_cast<float>(i + 3);
    c[i] = 3e7f + static_cast<float>(i);
    bias[i] = 0.1f * static_cast<float>(i);
  }
  const float wa = 0.3f, wb = 0.7f, wc = 1.1f;
  const Term terms[] = {{a.data(), wa, 0}, {b.data(), wb, 0}, {c.data(), wc, 2}};
  SumTerms(RowType::kFloat32, out.data(), bias.data(), terms, 3, kSize);
  for (int i = 0; i < kSize; ++i) {
    const volatile float first = a[i] * wa, second = b[i] * wb, third = c[i] * wc;
    const volatile float part = first + second;
    const volatile float upto = bias[i] + part;
    const volatile float total = upto + third;
    Check(out[i] == total, "float32 sums round in the order of the contract", i);
  }
  SumTerms(RowType::kFloat32, out.data(), bias.data(), nullptr, 0, kSize);
  Check(std::memcmp(out.data(), bias.data(), kSize * sizeof(float)) == 0,
        "no term leaves the bias");
  SumTerms(RowType::kFloat32, out.data(), nullptr, nullptr, 0, kSize);
  for (int i = 0; i < kSize; ++i) Check(out[i] == 0.0f, "no term and no bias leave zero", i);

  const float minus_zero = -0.0f;
  const Term zeros[] = {{&minus_zero, 1.0f, 0}, {&minus_zero, 0.5f, 0}};
  float sum;
  SumOnlyTerms(RowType::kFloat32, &sum, zeros, 2, 1);
  Check(std::signbit(sum), "the sum of one rank keeps the sign of zero");
  SumTerms(RowType::kFloat32, &sum, nullptr, zeros, 2, 1);
  Check(!std::signbit(sum), "which added to no bias is zero");

  // bfloat16 has eight significant bits: 256 + 1 on one rank is rounded away, before 256 is
  // subtracted.
  const uint16_t big = Store(RowType::kBFloat16, 256.0f), one = Store(RowType::kBFloat16, 1.0f);
  const uint16_t minus = Store(RowType::kBFloat16, -256.0f);
  const Term rounded[] = {{&big, 1.0f, 0}, {&one, 1.0f, 0}, {&minus, 1.0f, 1}};
  uint16_t result;
  SumTerms(RowType::kBFloat16, &result, nullptr, rounded, 3, 1);
  Check(Load(RowType::kBFloat16, result) == 0.0f, "the sum of one rank is rounded to the row type");
  const Term apart[] = {{&big, 1.0f, 0}, {&one, 1.0f, 1}, {&minus, 1.0f, 2}};
  SumTerms(RowType::kBFloat16, &result, nullptr, apart, 3, 1);
  Check(Load(RowType::kBFloat16, result) == 1.0f, "sums of several ranks stay in float32");
}

// Sums that are not rounded to the row type, and sums that a rank adds as they are.
void CheckSumsInFloat32() {
  const uint16_t big = Store(RowType::kBFloat16, 256.0f), one = Store(RowType::kBFloat16, 1.0f);
  const Term both[] = {{&big, 1.0f, 0}, {&one, 0.5f, 0}};
  float sum;
  SumRankInFloat32(RowType::kBFloat16, &sum, both, 2, 1);
  Check(sum == 256.5f, "the sum of one rank in float32");
  const uint16_t minus_zero = 0x8000;
  const Term zero[] = {{&minus_zero, 1.0f, 0}};
  SumRankInFloat32(RowType::kBFloat16, &sum, zero, 1, 1);
  Check(sum == 0.0f && std::signbit(sum), "with the sign of zero");

  constexpr int kSize = 100;  // more than one block
  std::vector<uint16_t> row(kSize, Store(RowType::kBFloat16, 2.0f)), out(kSize);
  std::vector<float> crossed(kSize);
  for (int i = 0; i < kSize; ++i) crossed[i] = 256.5f + static_cast<float>(i);
  const uint16_t minus = Store(RowType::kBFloat16, -256.0f);
  const std::vector<uint16_t> bias(kSize, minus);
  const Term terms[] = {
      {row.data(), 0.5f, 0}, {crossed.data(), 1.0f, 1, true}, {row.data(), 0.25f, 2}};
  SumTerms(RowType::kBFloat16, out.data(), bias.data(), terms, 3, kSize);
  for (int i = 0; i < kSize; ++i) {
    const uint16_t want = Store(RowType::kBFloat16, 2.0f + static_cast<float>(i));
    Check(out[i] == want, "a sum is added as it is, between rows", i);
  }
}

// Codes of a format with `bits` bits behind the sign, against their values by definition.
template <typename Encode, typename Decode>
void CheckCodes(int bits, int mantissa_bits, int num_finite, Encode encode, Decode decode) {
  const int exponent_bits = bits - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const auto value_of = [&](int code) {
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    const int significand = exponent > 0 ? mantissa + (1 << mantissa_bits) : mantissa;
    return static_cast<float>(
        std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits));
  };
  const auto check = [&](float value, uint32_t code, const char* what) {
    Check(encode(value) == code, what, code);
    Check(encode(-value) == (code | 1u << bits), "and with a sign", code);
  };
  for (int code = 0; code < num_finite; ++code) {
    const float value = value_of(code);
    check(value, code, "a value has its own code");
    Check(decode(code) == value && decode(code | 1u << bits) == -value,
          "a code decodes as its value", code);
    Check(std::signbit(decode(code | 1u << bits)), "with its sign", code);
    if (code + 1 == num_finite) continue;
    const float middle = (value + value_of(code + 1)) / 2;  // exact
    check(middle, code & 1 ? code + 1 : code, "a tie goes to the even code");
    check(std::nextafter(middle, 0.0f), code, "below the tie goes down");
    check(std::nextafter(middle, 1e9f), code + 1, "above the tie goes up");
  }
  check(1e30f, num_finite - 1, "too large a value saturates");
  check(std::numeric_limits<float>::min(), 0, "too small a value is zero");
}

void CheckNumberFormats() {
  CheckCodes(7, 3, 127, E4m3Of, FromE4m3);
  CheckCodes(3, 1, 8, E2m1Of, FromE2m1);
  Check(std::isnan(FromE4m3(0x7f)) && std::isnan(FromE4m3(0xff)), "the code of all ones is NaN");
  Check(FromE8m0(0) == 0.0f && FromE8m0(127) == 1.0f && FromE8m0(1) == std::ldexp(1.0f, -126),
        "powers of two");
  Check(FromE8m0(254) == std::ldexp(1.0f, 127) && std::isnan(FromE8m0(255)), "the last ones");
}

// A row of float32 against the scalar arithmetic, in blocks; and nothing is written beyond it.
void CheckWireRow(WireFormat format, int size, float special) {
  constexpr char kBeyond = 0x5a;
  const WireRow wire{format, size};
  const bool has_row_scale = format == WireFormat::kNvfp4;
  std::vector<float> x(size), decoded(size + 1, 7.0f);
  for (int i = 0; i < size; ++i)
    x[i] = std::ldexp(std::sin(static_cast<float>(i * i)), i % 23 - 11);
  x[size / 2] = special;
  std::vector<char> encoded(wire.bytes() + 1, kBeyond);
  EncodeRow(RowType::kFloat32, wire, x.data(), encoded.data());
  DecodeRow(RowType::kFloat32, wire, encoded.data(), decoded.data());
  Check(encoded.back() == kBeyond && decoded.back() == 7.0f, "nothing beyond a row is written",
        size);

  const auto largest = [&](int begin, int end) {
    uint32_t bits = 0;
    for (int i = begin; i < end; ++i) bits = std::max(bits, Magnitude(x[i]));
    return bits;
  };
  const RowScale row = RowScaleOf(largest(0, size));
  for (int begin = 0; begin < size; begin += BlockOf(format)) {
    const int end = std::min(begin + BlockOf(format), size);
    const uint32_t bits = largest(begin, end);
    const BlockScale scale = has_row_scale ? ScaleOf(row, bits) : ScaleOf(format, bits);
    const bool finite = has_row_scale ? row.finite : bits < kInfinityBits;
    const float factor = format == WireFormat::kFp8 ? FloatOf(scale.stored)
                         : has_row_scale            ? FromE4m3(scale.stored)
                                                    : FromE8m0(scale.stored);
    for (int i = begin; i < end; ++i) {
      const float scaled = Scaled(x[i], scale.factor, finite);
      const float value = has_row_scale ? FromE2m1(E2m1Of(scaled)) : FromE4m3(E4m3Of(scaled));
      const float want = has_row_scale ? value * factor * row.scale : value * factor;
      const float largest_float = std::numeric_limits<float>::max();
      const float saturated = std::min(std::max(want, -largest_float), largest_float);
      const bool is_nan = std::isnan(want) && std::isnan(decoded[i]);
      Check(is_nan || BitsOf(decoded[i]) == BitsOf(saturated), "a row from the wire", size);
    }
  }
}

void CheckWireRows() {
  for (int format = 1; format < kNumWireFormats; ++format) {
    for (const int size : {2, 8, 16, 18, 32, 100, 128, 130, 200, 256, 1000}) {
      for (const float special : {0.0f, 3.4e38f, std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN()}) {
        CheckWireRow(static_cast<WireFormat>(format), size, special);
      }
    }
    const auto of = static_cast<WireFormat>(format);
    if (of != WireFormat::kNvfp4) CheckWireRow(of, 37, -0.0f);
  }
}

void CheckFailed() {
  const std::vector<uint16_t> plain(6, 0x1234);
  for (const RowType type : {RowType::kFloat16, RowType::kBFloat16}) {
    std::vector<uint16_t> rows = plain;
    FillAsFailed(type, rows.data(), 5);
    for (int i = 0; i < 5; ++i)
      Check(std::isnan(Load(type, rows[i])), "what a failed op leaves is NaN", i);
    Check(rows[5] == 0x1234, "and nothing beyond");
  }
  std::vector<float> floats(6, 1.5f);
  FillAsFailed(RowType::kFloat32, floats.data(), 5);
  for (int i = 0; i < 5; ++i) Check(std::isnan(floats[i]), "what a failed op leaves is NaN", i);
  Check(floats[5] == 1.5f, "and nothing beyond");
  std::vector<uint8_t> bytes(24, 7);
  FillAsFailed(RowType::kInt32, bytes.data(), 5);
  for (int i = 0; i < 20; ++i)
    Check(bytes[i] == 0xff, "integers of a failed op have all bits set", i);
  for (int i = 20; i < 24; ++i) Check(bytes[i] == 7, "and nothing beyond", i);
}

}  // namespace

void CheckRowValues() {
  CheckConversions(RowType::kFloat16, 5, 10);
  CheckConversions(RowType::kBFloat16, 8, 7);
  CheckTinyFloats();
  CheckSums();
  CheckSumsInFloat32();
  CheckNumberFormats();
  CheckWireRows();
  CheckFailed();
}

}  // namespace jax_deepep
