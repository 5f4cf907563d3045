// What the checks of native_test.cc share.
#ifndef JAX_DEEPEP_TESTS_NATIVE_NATIVE_TEST_H_
#define JAX_DEEPEP_TESTS_NATIVE_NATIVE_TEST_H_

namespace jax_deepep {

// Print and count a failure unless `holds`.
void Check(bool holds, const char* what, long detail = 0);

void CheckRowValues();
void CheckGroupOps();
void CheckGeometry();

}  // namespace jax_deepep

#endif  // JAX_DEEPEP_TESTS_NATIVE_NATIVE_TEST_H_
