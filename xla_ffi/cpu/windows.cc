#include "cpu/windows.h"

#include <algorithm>

namespace jax_deepep {
namespace {

// Of the longest row on the wire: short ones may be longer in a wire format, with padding.
int64_t MaxWireBytes(const GroupShape& shape) {
  int64_t bytes = shape.max_row_bytes();
  for (int format = 1; format < kNumWireFormats; ++format) {
    const WireRow row{static_cast<WireFormat>(format), shape.hidden_size};
    bytes = std::max<int64_t>(bytes, row.bytes());
  }
  return bytes;
}

struct ArraySizes {
  explicit ArraySizes(const GroupShape& shape) {
    const auto tokens = static_cast<size_t>(shape.max_tokens);
    rows = Aligned(tokens * MaxWireBytes(shape));
    entries = Aligned(tokens * shape.num_topk * sizeof(int32_t));
  }
  size_t rows, entries;  // of one rank
};

// Hands out memory piece by piece.
class Cursor {
 public:
  explicit Cursor(char* memory) : memory_(memory) {}

  template <typename T>
  T* Take(size_t bytes) {
    T* taken = reinterpret_cast<T*>(memory_);
    memory_ += Aligned(bytes);
    return taken;
  }

 private:
  char* memory_;
};

RankWindow TakeTokens(Cursor* cursor, const ArraySizes& sizes) {
  RankWindow window;
  window.x = cursor->Take<char>(sizes.rows);
  window.entries = cursor->Take<int32_t>(sizes.entries);
  window.entry_weights = cursor->Take<float>(sizes.entries);
  return window;
}

}  // namespace

size_t RankWindow::Bytes(const GroupShape& shape) {
  const ArraySizes sizes(shape);
  return (1 + shape.num_ranks) * sizes.rows + (2 + shape.num_ranks) * sizes.entries;
}

RankWindow RankWindow::At(char* memory, const GroupShape& shape) {
  const ArraySizes sizes(shape);
  Cursor cursor(memory);
  RankWindow window = TakeTokens(&cursor, sizes);
  window.sums = cursor.Take<char>(shape.num_ranks * sizes.rows);
  window.entry_gradients = cursor.Take<float>(shape.num_ranks * sizes.entries);
  return window;
}

size_t NodeWindow::Bytes(const GroupShape& shape) {
  const ArraySizes sizes(shape);
  return 3 * sizes.rows + 4 * sizes.entries + Aligned(sizeof(int64_t));
}

NodeWindow NodeWindow::At(char* memory, const GroupShape& shape) {
  const ArraySizes sizes(shape);
  Cursor cursor(memory);
  NodeWindow window;
  window.tokens = TakeTokens(&cursor, sizes);
  window.num_rows = cursor.Take<int64_t>(sizeof(int64_t));
  window.sums = cursor.Take<char>(sizes.rows);
  window.entry_gradients = cursor.Take<float>(sizes.entries);
  window.sums_to_send = cursor.Take<char>(sizes.rows);
  window.entry_gradients_to_send = cursor.Take<float>(sizes.entries);
  return window;
}

}  // namespace jax_deepep
