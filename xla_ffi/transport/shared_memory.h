// Anonymous memory that processes of one host share, and waiting for a word in it to change.
//
// A segment is a memfd: it has no name, so nothing is left behind when its processes die. Its first
// part, control, is also written by peers (flags and doorbells); the rest is written by its owner
// alone, and peers map it for reading only.
#ifndef JAX_DEEPEP_TRANSPORT_SHARED_MEMORY_H_
#define JAX_DEEPEP_TRANSPORT_SHARED_MEMORY_H_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_deepep {

class SharedSegment {
 public:
  SharedSegment() = default;
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  // Make a segment of zeros; memory is taken page by page when it is first written.
  // Returns an error, or empty.
  std::string Create(size_t control_bytes, size_t window_bytes);

  // Map a peer's segment, given as a descriptor, and take ownership of it. Checks its size.
  std::string Attach(int descriptor, size_t control_bytes, size_t window_bytes);

  int descriptor() const { return descriptor_; }
  char* control() const { return control_; }
  char* windows() const { return windows_; }

  // Bytes of memory in use.
  size_t resident_bytes() const;

 private:
  std::string Map(bool own);

  int descriptor_ = -1;
  size_t control_bytes_ = 0;
  size_t window_bytes_ = 0;
  char* control_ = nullptr;
  char* windows_ = nullptr;
};

// A word that changes whenever something that its owner may wait for has changed.
using Doorbell = std::atomic<uint32_t>;

void Ring(Doorbell* bell);

// Wait until `bell` differs from `seen`, or until `deadline`; may return early.
void WaitForRing(const Doorbell* bell, uint32_t seen,
                 std::chrono::steady_clock::time_point deadline);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TRANSPORT_SHARED_MEMORY_H_
