#include "cpu/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace jax_deepep {
namespace {

// The whole pages of a range.
struct Pages {
  static size_t Size() {
    static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }

  Pages(void* memory, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const size_t before = (Size() - address % Size()) % Size();
    begin = static_cast<char*>(memory) + before;
    count = bytes < before ? 0 : (bytes - before) / Size();
  }

  char* begin;
  size_t count;
};

}  // namespace

void PreferLargePages(void* memory, size_t bytes) {
  constexpr size_t kWorthIt = 4 << 20;
  if (bytes < kWorthIt) return;
  const Pages pages(memory, bytes);
  // Only a hint: if it fails, small pages are used.
  madvise(pages.begin, pages.count * Pages::Size(), MADV_HUGEPAGE);
}

std::vector<ByteRange> RangesToClear(void* memory, size_t bytes) {
  constexpr size_t kWorthAsking = 16;  // pages; clearing fewer is faster than the system calls
  const Pages pages(memory, bytes);
  char* begin = static_cast<char*>(memory);
  char* const end = begin + bytes;
  std::vector<ByteRange> ranges;
  const auto add_until = [&](char* until) {
    if (begin < until) ranges.push_back({begin, static_cast<size_t>(until - begin)});
  };
  std::vector<unsigned char> resident(pages.count);  // in the lowest bit
  if (pages.count < kWorthAsking ||
      mincore(pages.begin, pages.count * Pages::Size(), resident.data()) != 0) {
    add_until(end);
    return ranges;
  }
  for (size_t page = 0; page < pages.count;) {
    size_t last = page;
    while (last < pages.count && (resident[last] & 1) == (resident[page] & 1)) ++last;
    char* const run = pages.begin + page * Pages::Size();
    const size_t run_bytes = (last - page) * Pages::Size();
    // If they were used before and are in swap space, this drops them.
    if ((resident[page] & 1) == 0 && madvise(run, run_bytes, MADV_DONTNEED) == 0) {
      add_until(run);
      begin = run + run_bytes;
    }
    page = last;
  }
  add_until(end);
  return ranges;
}

}  // namespace jax_deepep
