#include "transport/shared_memory.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

namespace jax_deepep {
namespace {

static_assert(sizeof(Doorbell) == sizeof(uint32_t), "a futex is a 32-bit word");

std::string Failure(const char* call) {
  return std::string(call) + " failed: " + std::strerror(errno);
}

size_t RoundUpToPage(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

SharedSegment::~SharedSegment() {
  if (control_ != nullptr) munmap(control_, control_bytes_);
  if (windows_ != nullptr) munmap(windows_, window_bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

std::string SharedSegment::Create(size_t control_bytes, size_t window_bytes) {
  control_bytes_ = RoundUpToPage(control_bytes);
  window_bytes_ = RoundUpToPage(window_bytes);
  descriptor_ = memfd_create("jax_deepep", MFD_CLOEXEC);
  if (descriptor_ < 0) return Failure("memfd_create");
  if (ftruncate(descriptor_, static_cast<off_t>(control_bytes_ + window_bytes_)) != 0) {
    return Failure("ftruncate");
  }
  return Map(/*own=*/true);
}

std::string SharedSegment::Attach(int descriptor, size_t control_bytes, size_t window_bytes) {
  descriptor_ = descriptor;
  control_bytes_ = RoundUpToPage(control_bytes);
  window_bytes_ = RoundUpToPage(window_bytes);
  struct stat facts;
  if (fstat(descriptor_, &facts) != 0) return Failure("fstat");
  // Reading past the end of a file kills the process, so a wrong size must be an error here.
  if (static_cast<size_t>(facts.st_size) != control_bytes_ + window_bytes_) {
    return "segment: expected " + std::to_string(control_bytes_ + window_bytes_) + " bytes, got " +
           std::to_string(facts.st_size);
  }
  return Map(/*own=*/false);
}

std::string SharedSegment::Map(bool own) {
  void* control = mmap(nullptr, control_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
  if (control == MAP_FAILED) return Failure("mmap");
  control_ = static_cast<char*>(control);
  if (window_bytes_ == 0) return "";
  void* windows = mmap(nullptr, window_bytes_, own ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED,
                       descriptor_, static_cast<off_t>(control_bytes_));
  if (windows == MAP_FAILED) return Failure("mmap");
  windows_ = static_cast<char*>(windows);
  return "";
}

size_t SharedSegment::resident_bytes() const {
  struct stat facts;
  return descriptor_ >= 0 && fstat(descriptor_, &facts) == 0
             ? static_cast<size_t>(facts.st_blocks) * 512
             : 0;
}

void Ring(Doorbell* bell) {
  // Pairs with the acquire load at the start of WaitForRing's callers: changes before the ring are
  // visible after it.
  bell->fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void WaitForRing(const Doorbell* bell, uint32_t seen,
                 std::chrono::steady_clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(
      deadline - std::chrono::steady_clock::now());
  const int64_t nanoseconds = std::max<int64_t>(left.count(), 0);
  const struct timespec timeout = {static_cast<time_t>(nanoseconds / 1000000000),
                                   static_cast<long>(nanoseconds % 1000000000)};
  syscall(SYS_futex, bell, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

}  // namespace jax_deepep
