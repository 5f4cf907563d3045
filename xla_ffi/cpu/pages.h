// The pages of results. A new array is not resident: the system clears each page when it is first
// touched.
#ifndef JAX_DEEPEP_CPU_PAGES_H_
#define JAX_DEEPEP_CPU_PAGES_H_

#include <cstddef>
#include <vector>

namespace jax_deepep {

// Ask for large pages if `bytes` is large: a new result is otherwise faulted in 4 KiB at a time,
// which costs more than the copy.
void PreferLargePages(void* memory, size_t bytes);

struct ByteRange {
  char* begin;
  size_t bytes;
};

// What must be cleared for all of a range to be zero. Pages that are not resident are not part of
// it: they are zero once they are touched. Nothing else may use the range meanwhile.
std::vector<ByteRange> RangesToClear(void* memory, size_t bytes);

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_CPU_PAGES_H_
