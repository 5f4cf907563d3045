// Checks of the plain C++ of the platforms: prints each failure, returns how many there were.
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/group_exchange.h"
#include "cpu/row_math.h"
#include "cpu/stop_detector.h"
#include "cpu/threads.h"
#include "cpu/wire_rows.h"
#include "cuda/block_count.h"
#include "cuda/device_control.h"
#include "cuda/divisor.h"
#include "interface/number_formats.h"
#include "interface/op_signature.h"
#include "interface/verbs.h"
#include "routing/group_rows.h"

// Replaces the system's function, so that a test can make it fail: see CheckThreads.
static std::atomic<bool> refuse_threads{false};
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*run)(void*), void* of) noexcept {
  using Function = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "pthread_create"));
  return refuse_threads ? EAGAIN : real(thread, attributes, run, of);
}

namespace jax_deepep {
namespace {

int failures = 0;

void Check(bool holds, const char* what, long detail = 0) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%ld)\n", what, detail);
}

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

// A slot of a window is as long as the longest row on the wire, which padding makes longer than
// float32 where rows are short.
void CheckWindows() {
  std::vector<char> memory;
  for (const int hidden : {1, 2, 8, 37, 128, 7168}) {
    GroupShape shape;
    shape.num_ranks = 3;
    shape.num_topk = 2;
    shape.max_tokens = 64;
    shape.hidden_size = hidden;
    memory.resize(RankWindow::Bytes(shape));
    const RankWindow window = RankWindow::At(memory.data(), shape);
    const char* after_x = reinterpret_cast<const char*>(window.entries);
    const char* after_sums = reinterpret_cast<const char*>(window.entry_gradients);
    Check(after_x - window.x >= 64 * shape.max_row_bytes(), "the window of rows of integers",
          hidden);
    for (int format = 0; format < kNumWireFormats; ++format) {
      const int64_t bytes =
          RowFormat{RowType::kFloat32, hidden, static_cast<WireFormat>(format)}.wire_bytes();
      Check(after_x - window.x >= 64 * bytes, "the window of rows", hidden);
      Check(after_sums - window.sums >= 3 * 64 * bytes, "the window of sums", hidden);
    }
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

// More ops than the rings hold, of which two processes take few at a time: those that are accepted
// arrive at both in one order, and the others are rejected.
void CheckRings() {
  const auto leaders = std::make_unique<ControlBlock>(), others = std::make_unique<ControlBlock>();
  GroupExchange leader({leaders.get(), others.get()}, 0, {0, 1}, 5.0);
  GroupExchange other({leaders.get(), others.get()}, 1, {0, 1}, 5.0);
  int64_t announced[2] = {0, 0}, taken[2] = {0, 0};
  const auto announce = [&](GroupExchange& exchange, int rank) {
    OpNotice notice;
    notice.step = announced[rank] + 1;
    if (!exchange.Announce({1, announced[rank]}, rank, notice)) return false;
    ++announced[rank];
    return true;
  };
  const auto take = [&](GroupExchange& exchange, int rank) {
    const auto op = exchange.NextScheduled();
    if (!op.has_value()) return;
    exchange.Take(*op);
    Check(op->number == taken[rank]++, "ops are taken in the order of their schedule", op->number);
  };
  for (int round = 0; round < 4; ++round) {
    while (announce(leader, 0)) {
    }
    while (announce(other, 1)) {
    }
    Check(announced[0] == taken[0] + ControlBlock::kRingSize, "a ring of ops may wait",
          announced[0]);
    Check(announced[1] == taken[1] + ControlBlock::kRingSize, "in every process", announced[1]);
    const int ahead = round % 2;  // each of them gets ahead of the other in turn
    for (int i = 0; i < (ahead == 0 ? 3000 : 1000); ++i) take(leader, 0);
    for (int i = 0; i < (ahead == 1 ? 3000 : 1000); ++i) take(other, 1);
  }
  Check(taken[0] == 8000 && taken[1] == 8000, "what both announced is scheduled", taken[0]);
}

// Three ranks of two processes, which announce ops; what the leader finds.
struct Group {
  const std::unique_ptr<ControlBlock> leaders = std::make_unique<ControlBlock>();
  const std::unique_ptr<ControlBlock> others = std::make_unique<ControlBlock>();
  GroupExchange leader{{leaders.get(), others.get()}, 0, {0, 0, 1}, 5.0};
  GroupExchange other{{leaders.get(), others.get()}, 1, {0, 0, 1}, 5.0};

  void Come(int rank, int64_t run, int64_t number, int64_t num_tokens = 8) {
    OpNotice notice;
    notice.signature.num_tokens = num_tokens;
    notice.num_calls = 4;
    (rank < 2 ? leader : other).Announce({run, number}, rank, notice);
  }
  std::string Found() {
    leader.NextScheduled();
    return leader.different_ops();
  }
};

void CheckDifferentOps() {
  const auto contains = [](const std::string& text, const char* words) {
    return text.find(words) != std::string::npos;
  };
  {
    Group group;
    group.Come(0, 1, 2);
    group.Come(2, 1, 3, 16);
    Check(group.Found().empty(), "ops of one run may come in any order");
    group.Come(2, 1, 2, 16);
    Check(contains(group.Found(), "num_tokens is 8 on rank 0 and 16 on rank 2"),
          "one op, two signatures");
  }
  {
    Group group;
    group.Come(1, 1, 0);
    group.Come(2, 7, 0, 16);
    Check(contains(group.Found(),
                   "on rank 1 at step 0 met a different op of rank 2: num_tokens is 8"),
          "two processes in two runs");
  }
  {
    Group group;
    group.Come(0, 1, 0);
    group.Come(0, 7, 0);
    group.Come(2, 7, 0);
    Check(group.Found().empty(), "a process that has arrived in both runs");
  }
  {
    Group group;
    group.other.NoteOutOfOrder();
    group.Come(0, 1, 0);
    group.Come(2, 7, 0);
    Check(group.Found().empty(), "runs that a process does not end one after the other");
    Check(group.leader.WaitsIn(2).has_value() && !group.leader.WaitsIn(1).has_value(),
          "where a rank waits");
    Check(!group.leader.EndedRank().has_value(), "no process has closed");
    group.other.NoteClosed();
    Check(group.leader.EndedRank() == 2 && !group.other.EndedRank().has_value(),
          "a peer has closed");
  }
}

void CheckThreads() {
  const std::thread::id here = std::this_thread::get_id();
  std::atomic<int> ran{0};
  std::set<std::thread::id> threads;
  refuse_threads = true;
  Check(!RunOnOwnThreads({[&] { ++ran; }, [&] { ++ran; }}), "no threads: an error");
  const auto cover = [&](int64_t begin, int64_t end) { ran += static_cast<int>(end - begin); };
  ParallelFor(1000, 1, 1 << 20, cover);
  Check(ran == 1000, "a loop is complete without helpers", ran);
  try {
    MakeThread([] {}).join();
    Check(false, "a long-lived thread that cannot be started is an error");
  } catch (const std::runtime_error& error) {
    Check(std::strstr(error.what(), "raise the limit on processes and threads") != nullptr,
          "its remedy");
  }
  refuse_threads = false;

  // Each task has its own thread: all wait for all. And again with one thread more.
  for (const int count : {4, 5}) {
    std::mutex mutex;
    std::condition_variable all_came;
    int num_came = 0, num_left = 0;
    const auto wait_for_all = [&] {
      std::unique_lock<std::mutex> lock(mutex);
      threads.insert(std::this_thread::get_id());
      ++num_came;
      all_came.notify_all();
      all_came.wait(lock, [&] { return num_came == count; });
      ++num_left;
      all_came.notify_all();
    };
    Check(RunOnOwnThreads(std::vector<std::function<void()>>(count, wait_for_all)),
          "threads are started");
    std::unique_lock<std::mutex> lock(mutex);
    all_came.wait(lock, [&] { return num_left == count; });
  }
  Check(threads.count(here) == 0 && threads.size() >= 5, "tasks run on separate threads");
}

// Rows of integers are a multiple of 16 bytes, for every hidden_size.
void CheckRowBytes() {
  GroupShape shape;
  for (const int hidden : {1, 4, 5, 37, 40}) {
    shape.hidden_size = hidden;
    const int64_t bytes = shape.max_row_bytes();
    Check(bytes % 16 == 0 && bytes >= 4 * hidden && bytes < 4 * hidden + 16, "the longest row",
          hidden);
  }
}

void CheckEntries() {
  const int32_t row[] = {3, -1, 8, 3, 0, -2, 7, 1};
  const bool valid[] = {true, false, false, false, true, false, true, true};
  for (int k = 0; k < 8; ++k) Check(IsValidEntry(row, k, 8) == valid[k], "valid entries", k);
  // Two experts per rank: 3 and 0 and 7 make a row on ranks 1, 0 and 3; 1 shares the row of 0.
  const bool makes[] = {true, false, false, false, true, false, true, false};
  for (int k = 0; k < 8; ++k) {
    if (!valid[k]) continue;
    Check(MakesRow(row, k, 8, 2, Layout::kTokenMajor) == makes[k], "token-major rows", k);
    Check(MakesRow(row, k, 8, 2, Layout::kExpertMajor), "expert-major rows", k);
  }
}

void CheckGroup(GroupRows got, int64_t offset, int64_t kept, int64_t padded, long number) {
  Check(got.offset == offset && got.kept == kept && got.padded == padded, "a group's rows", number);
}

void CheckGroups() {
  Check(RoundUp(0, 8) == 0 && RoundUp(1, 8) == 8 && RoundUp(8, 8) == 8 && RoundUp(9, 8) == 16,
        "RoundUp");
  RouteShape route;
  route.capacity = 16;
  route.alignment = 4;
  route.expert_capacity = 6;
  int64_t offset = 0;
  CheckGroup(LayOutGroup(3, route, &offset), 0, 3, 4, 0);   // fits; padded
  CheckGroup(LayOutGroup(9, route, &offset), 4, 6, 8, 1);   // cut by expert_capacity
  CheckGroup(LayOutGroup(0, route, &offset), 12, 0, 0, 2);  // empty
  CheckGroup(LayOutGroup(5, route, &offset), 12, 4, 4, 3);  // cut by capacity
  CheckGroup(LayOutGroup(1, route, &offset), 20, 0, 0, 4);  // no room
  Check(offset == 24, "the end of the groups", static_cast<long>(offset));

  // Sizes near the end of int32 are arithmetic in 64 bits.
  route.capacity = 1 << 30;
  route.alignment = 1;
  route.expert_capacity = kNoLimit;
  offset = 0;
  LayOutGroup(int64_t{1} << 31, route, &offset);
  CheckGroup(LayOutGroup(1, route, &offset), int64_t{1} << 31, 0, 0, 5);
}

// Against C++ division, around multiples, where a quotient changes, and at the end.
void CheckDivisor(int64_t divisor) {
  const Divisor by(static_cast<int32_t>(divisor));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto check = [&](int64_t value) {
    if (value < 0 || value > kMost) return;
    const auto of = static_cast<int32_t>(value);
    const bool divides = by.Quotient(of) == value / divisor && by.Remainder(of) == value % divisor;
    Check(divides && by.RoundUp(of) == RoundUp(value, divisor), "division by a Divisor", divisor);
  };
  for (int64_t step = 0; step <= 40; ++step) {
    const int64_t multiple = kMost / divisor * step / 40 * divisor;
    for (int64_t value = multiple - 1; value <= multiple + 1; ++value) check(value);
  }
  check(kMost);
}

void CheckDivisors() {
  for (int64_t divisor = 1; divisor <= 5000; ++divisor) CheckDivisor(divisor);
  for (int bits = 13; bits <= 31; ++bits) {
    for (int64_t divisor = (int64_t{1} << bits) - 2; divisor <= (int64_t{1} << bits) + 2;
         ++divisor) {
      if (divisor <= std::numeric_limits<int32_t>::max()) CheckDivisor(divisor);
    }
  }
  Check(Divisor(0).Quotient(0) == 0, "nothing to divide");
}

// Every verb has its own number and name, and peers read at most kMaxOperands of its arrays.
void CheckVerbs() {
  std::set<std::string> names;
  std::set<Verb> numbers = {Verb{}, Verb::kBaseline};
  Verbs::ForEach([&](auto type) {
    using Params = typename decltype(type)::type;
    Check(numbers.insert(kVerbOf<Params>).second, "a verb's number");
    Check(names.insert(NameOf(kVerbOf<Params>)).second, "a verb's name");
    Check(NameOf(SignatureOf(Params(), 1).verb) == std::string(VerbTraits<Params>::kName),
          "the verb of a signature");
    Params params;
    Check(VerbTraits<Params>::ReadByPeers(GroupShape(), &params).size() <= kMaxOperands,
          "what peers read");
  });
  Check(names.count(NameOf(Verb{})) == 0 && names.count(NameOf(Verb::kBaseline)) == 0,
        "not a verb");
}

// An operand that peers cannot reach is replaced by a copy, and results are not.
void CheckPeerArrays() {
  const char x = 0, copy = 0;
  DispatchParams params;
  params.x = &x;
  params.route.SetRows({RowType::kBFloat16, 8});
  params.route.num_tokens = 3;
  int32_t scratch = 0;
  params.scratch = &scratch;
  const auto arrays = VerbTraits<DispatchParams>::ReadByPeers(GroupShape(), &params);
  Check(arrays.size() == 2 && arrays[0].data == &x && arrays[0].bytes == 48,
        "rows that peers read");
  Check(arrays[1].data == &scratch && !arrays[1].replace, "scratch that peers read");
  arrays[0].replace(&copy);
  Check(params.x == &copy, "a copy replaces an operand");
  params.route.num_tokens = 0;
  Check(VerbTraits<DispatchParams>::ReadByPeers(GroupShape(), &params)[0].data == nullptr,
        "peers read nothing of no rows");
}

// Who was stopped for most of its timeout continues at about the deadline: it must not blame others
// before it has received what they sent meanwhile.
void CheckStops() {
  using std::chrono::milliseconds;
  const StopDetector::Clock::time_point begin{};
  StopDetector stops(begin);
  for (int ms : {0, 500, 1000, 1900, 2400}) {
    Check(stops.Look(begin + milliseconds(ms)) <= begin + milliseconds(ms), "not stopped", ms);
  }
  const auto continued = begin + milliseconds(6100);
  const auto earliest = continued + StopDetector::kCatchUp;
  Check(stops.Look(continued) == earliest, "stopped");
  Check(stops.Look(continued + milliseconds(300)) == earliest, "stopped a moment ago");
}

// Blocks of a dispatch of T tokens, K = 8, rows of 14,336 bytes, on a GPU of 132 SMs alone.
int BlocksOfDispatch(int num_ranks, int num_tokens, Layout layout) {
  GroupShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = 256;
  shape.num_topk = 8;
  shape.max_tokens = num_tokens;
  shape.hidden_size = 7168;
  DispatchParams params;
  params.route.layout = layout;
  params.route.row_type = RowType::kBFloat16;
  params.route.row_size = 7168;
  params.route.num_tokens = num_tokens;
  params.route.capacity = num_ranks * num_tokens * 8;
  return BlocksFor(BytesOf(shape, params), MostBlocks(132, 1));
}

void CheckBlockCounts() {
  constexpr auto kExpert = Layout::kExpertMajor, kToken = Layout::kTokenMajor;
  Check(MostBlocks(132, 1) == 130 && MostBlocks(132, 4) == 32 && MostBlocks(132, 200) == 1,
        "most blocks");
  Check(BlocksOfDispatch(2, 1, kToken) == 1, "one block for one token");
  Check(BlocksOfDispatch(2, 4096, kToken) == 24, "what the link takes");
  const int for_rows = BlocksOfDispatch(2, 4096, kExpert);
  Check(for_rows > 60 && for_rows <= 130, "more where rows are written several times", for_rows);
  Check(BlocksOfDispatch(8, 4096, kExpert) < for_rows, "fewer where more comes over the link");
  Check(BlocksOfDispatch(1, 4096, kExpert) == 130, "all where there is no link");
  for (int tokens = 1; tokens < 4096; tokens *= 2) {
    Check(BlocksOfDispatch(2, tokens, kExpert) <= BlocksOfDispatch(2, 2 * tokens, kExpert),
          "blocks by tokens", tokens);
  }
}

}  // namespace
}  // namespace jax_deepep

int main() {
  using namespace jax_deepep;
  CheckConversions(RowType::kFloat16, 5, 10);
  CheckConversions(RowType::kBFloat16, 8, 7);
  CheckTinyFloats();
  CheckSums();
  CheckSumsInFloat32();
  CheckNumberFormats();
  CheckWireRows();
  CheckWindows();
  CheckFailed();
  CheckRings();
  CheckDifferentOps();
  CheckThreads();
  CheckRowBytes();
  CheckEntries();
  CheckGroups();
  CheckDivisors();
  CheckVerbs();
  CheckPeerArrays();
  CheckStops();
  CheckBlockCounts();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
