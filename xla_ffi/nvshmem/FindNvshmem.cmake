# Finds NVSHMEM, and prints where, or why groups that span hosts will have no native ops: $NVSHMEM_HOME, or
# else the wheel nvidia-nvshmem-cu12 or -cu13 of the environment, which JAX for GPUs installs.
#
# Sets NVSHMEM_FOUND and NVSHMEM_FOLDER. A library that was built with one release runs with later ones.
set(NVSHMEM_FOUND FALSE)
if("$ENV{JAX_DEEPEP_BUILD_NVSHMEM}" STREQUAL "0")
  message(STATUS "NVSHMEM: not used, because JAX_DEEPEP_BUILD_NVSHMEM=0")
  return()
endif()
set(NVSHMEM_CANDIDATES)
if(DEFINED ENV{NVSHMEM_HOME})
  set(NVSHMEM_CANDIDATES $ENV{NVSHMEM_HOME})
else()
  find_wheel_folders(NVSHMEM_CANDIDATES nvshmem)
endif()
foreach(CANDIDATE ${NVSHMEM_CANDIDATES})
  if(EXISTS ${CANDIDATE}/include/nvshmem.h AND EXISTS ${CANDIDATE}/lib/libnvshmem_device.a
     AND EXISTS ${CANDIDATE}/lib/libnvshmem_host.so.3)
    set(NVSHMEM_FOUND TRUE)
    set(NVSHMEM_FOLDER ${CANDIDATE})
    message(STATUS "NVSHMEM: built against ${CANDIDATE}")
    return()
  endif()
endforeach()
message(STATUS "NVSHMEM: not found in NVSHMEM_HOME ('$ENV{NVSHMEM_HOME}') or the environment; install "
               "nvidia-nvshmem-cu13, or -cu12, and install again for groups that span hosts")
