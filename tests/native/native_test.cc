// Checks of the plain C++ of the platforms: prints each failure, returns whether there were any.
#include "native_test.h"

#include <cstdio>

namespace jax_deepep {
namespace {

int failures = 0;

}  // namespace

void Check(bool holds, const char* what, long detail) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s (%ld)\n", what, detail);
}

}  // namespace jax_deepep

int main() {
  using namespace jax_deepep;
  CheckRowValues();
  CheckGroupOps();
  CheckGeometry();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
