# Finds a CUDA compiler that can build the kernels, and says which, or why there is none:
# $CUDACXX, then nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda, then the wheel nvidia-cuda-nvcc.
#
# Sets NVCC_FOUND, NVCC_EXECUTABLE and NVCC_ARCHITECTURES.
set(NVCC_FOUND FALSE)
if("$ENV{JAX_DEEPEP_BUILD_CUDA}" STREQUAL "0")
  message(STATUS "CUDA module: not built, because JAX_DEEPEP_BUILD_CUDA=0")
  return()
endif()

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import glob, os, sys; print(';'.join(p for folder in sys.path for p in glob.glob(os.path.join(folder, 'nvidia', '*', 'bin'))))"
  OUTPUT_VARIABLE NVCC_WHEEL_FOLDERS
  OUTPUT_STRIP_TRAILING_WHITESPACE)
find_program(NVCC_EXECUTABLE NAMES $ENV{CUDACXX} nvcc HINTS $ENV{CUDA_HOME}/bin
             PATHS /usr/local/cuda/bin ${NVCC_WHEEL_FOLDERS})
if(NOT NVCC_EXECUTABLE)
  message(STATUS "CUDA module: not built, because there is no nvcc; install a CUDA toolkit of 12.3 or "
                 "newer, or set CUDACXX, and install again")
  return()
endif()

execute_process(COMMAND ${NVCC_EXECUTABLE} --version OUTPUT_VARIABLE NVCC_BANNER RESULT_VARIABLE NVCC_STATUS)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" NVCC_MATCH "${NVCC_BANNER}")
set(NVCC_VERSION "${CMAKE_MATCH_1}")
if(NOT NVCC_STATUS EQUAL 0 OR NVCC_VERSION VERSION_LESS 12.3)
  message(STATUS "CUDA module: not built, because ${NVCC_EXECUTABLE} is version '${NVCC_VERSION}'; "
                 "12.3 or newer is needed")
  return()
endif()
set(NVCC_ARCHITECTURES 80-real 90)
if(NVCC_VERSION VERSION_GREATER_EQUAL 12.8)
  set(NVCC_ARCHITECTURES 80-real 90-real 100)
endif()
set(NVCC_FOUND TRUE)
message(STATUS "CUDA module: built by ${NVCC_EXECUTABLE} ${NVCC_VERSION} for ${NVCC_ARCHITECTURES}")
