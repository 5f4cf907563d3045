# Writes HEADER with a digest of the native sources under ROOT, whatever folder that is.
file(GLOB_RECURSE SOURCES RELATIVE ${ROOT}
     ${ROOT}/xla_ffi/*.h ${ROOT}/xla_ffi/*.cc ${ROOT}/xla_ffi/*.cuh ${ROOT}/xla_ffi/*.cu)
list(SORT SOURCES)
set(DIGESTS)
foreach(SOURCE CMakeLists.txt ${SOURCES})
  file(SHA256 ${ROOT}/${SOURCE} DIGEST)
  string(APPEND DIGESTS "${SOURCE} ${DIGEST}\n")
endforeach()
string(SHA256 DIGEST "${DIGESTS}")
file(WRITE ${HEADER} "#define JAX_DEEPEP_SOURCE_DIGEST \"${DIGEST}\"\n")
