# Finds a CUDA compiler that can build the kernels, and prints which, or why there is none: $CUDACXX,
# or else the first working nvcc in $CUDA_HOME, on PATH, in /usr/local/cuda and in the wheel
# nvidia-cuda-nvcc. If none works, the install continues without kernels.
#
# Sets NVCC_FOUND, NVCC_EXECUTABLE and NVCC_ARCHITECTURES. Nothing is cached: the compiler of
# the last build, perhaps in a temporary environment, may be gone.
set(NVCC_FOUND FALSE)
if("$ENV{JAX_DEEPEP_BUILD_CUDA}" STREQUAL "0")
  message(STATUS "CUDA module: not built, because JAX_DEEPEP_BUILD_CUDA=0")
  return()
endif()

# Appends the result of find_program to NVCC_CANDIDATES.
function(add_nvcc_candidate)
  unset(NVCC_CANDIDATE CACHE)
  find_program(NVCC_CANDIDATE ${ARGN} NO_CMAKE_PATH NO_CMAKE_SYSTEM_PATH NO_CMAKE_FIND_ROOT_PATH)
  if(NVCC_CANDIDATE)
    list(APPEND NVCC_CANDIDATES ${NVCC_CANDIDATE})
    set(NVCC_CANDIDATES ${NVCC_CANDIDATES} PARENT_SCOPE)
  endif()
  unset(NVCC_CANDIDATE CACHE)
endfunction()

set(NVCC_CANDIDATES)
if(DEFINED ENV{CUDACXX})
  add_nvcc_candidate(NAMES $ENV{CUDACXX})
else()
  find_wheel_folders(NVCC_WHEEL_FOLDERS */bin)
  if(DEFINED ENV{CUDA_HOME})
    add_nvcc_candidate(NAMES nvcc PATHS $ENV{CUDA_HOME}/bin NO_DEFAULT_PATH)
  endif()
  add_nvcc_candidate(NAMES nvcc)
  foreach(FOLDER /usr/local/cuda/bin ${NVCC_WHEEL_FOLDERS})
    add_nvcc_candidate(NAMES nvcc PATHS ${FOLDER} NO_DEFAULT_PATH)
  endforeach()
  list(REMOVE_DUPLICATES NVCC_CANDIDATES)
endif()
if(NOT NVCC_CANDIDATES)
  message(STATUS "CUDA module: not built, because there is no nvcc (CUDACXX: '$ENV{CUDACXX}'); install a "
                 "CUDA toolkit of 12.3 or newer, or set CUDACXX, and install again")
  return()
endif()

# Whether CMake can build a CUDA program with a compiler: with its headers, host compiler and static
# runtime.
function(try_nvcc EXECUTABLE ARCHITECTURES)
  set(FOLDER ${CMAKE_BINARY_DIR}/nvcc_try)
  file(REMOVE_RECURSE ${FOLDER})
  file(WRITE ${FOLDER}/CMakeLists.txt
       "cmake_minimum_required(VERSION 3.20)\nproject(nvcc_try LANGUAGES CUDA)\n"
       "add_executable(nvcc_try nvcc_try.cu)\n")
  file(WRITE ${FOLDER}/nvcc_try.cu
       "#include <cuda.h>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n"
       "__global__ void Kernel() {}\n"
       "int main() { Kernel<<<1, 1>>>(); return cudaGetLastError() == cudaSuccess ? 0 : 1; }\n")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${FOLDER} -B ${FOLDER}/build -G ${CMAKE_GENERATOR}
            -DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM} -DCMAKE_CUDA_COMPILER=${EXECUTABLE}
            "-DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES}" -DCMAKE_CUDA_STANDARD=17
    OUTPUT_VARIABLE OUTPUT ERROR_VARIABLE OUTPUT RESULT_VARIABLE STATUS)
  if(STATUS EQUAL 0)
    execute_process(COMMAND ${CMAKE_COMMAND} --build ${FOLDER}/build
                    OUTPUT_VARIABLE OUTPUT ERROR_VARIABLE OUTPUT RESULT_VARIABLE STATUS)
  endif()
  set(NVCC_STATUS ${STATUS} PARENT_SCOPE)
  set(NVCC_OUTPUT "${OUTPUT}" PARENT_SCOPE)
endfunction()

foreach(CANDIDATE ${NVCC_CANDIDATES})
  set(NVCC_EXECUTABLE ${CANDIDATE})
  execute_process(COMMAND ${NVCC_EXECUTABLE} --version
                  OUTPUT_VARIABLE NVCC_BANNER ERROR_VARIABLE NVCC_BANNER RESULT_VARIABLE NVCC_STATUS)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" NVCC_MATCH "${NVCC_BANNER}")
  set(NVCC_VERSION "${CMAKE_MATCH_1}")
  if(NOT NVCC_STATUS EQUAL 0 OR NVCC_VERSION VERSION_LESS 12.3)
    message(STATUS "CUDA module: not by ${NVCC_EXECUTABLE}, which is version '${NVCC_VERSION}'; 12.3 or newer "
                   "is needed")
    continue()
  endif()
  set(NVCC_ARCHITECTURES 80-real 90)
  if(NVCC_VERSION VERSION_GREATER_EQUAL 12.8)
    set(NVCC_ARCHITECTURES 80-real 90-real 100)
  endif()
  if(NOT "$ENV{CUDAARCHS}" STREQUAL "")  # as CMake itself takes it
    set(NVCC_ARCHITECTURES $ENV{CUDAARCHS})
  endif()
  try_nvcc(${NVCC_EXECUTABLE} "${NVCC_ARCHITECTURES}")
  if(NOT NVCC_STATUS EQUAL 0)
    message(STATUS "CUDA module: not by ${NVCC_EXECUTABLE} ${NVCC_VERSION}, which does not build a small "
                   "program here:\n${NVCC_OUTPUT}")
    continue()
  endif()
  set(NVCC_FOUND TRUE)
  break()
endforeach()
if(NOT NVCC_FOUND)
  message(STATUS "CUDA module: not built, because no nvcc here can build it; see above")
  return()
endif()
message(STATUS "CUDA module: built by ${NVCC_EXECUTABLE} ${NVCC_VERSION} for ${NVCC_ARCHITECTURES}")

# CMake caches properties of a compiler, including its path.
set(NVCC_KNOWN ${CMAKE_BINARY_DIR}/CMakeFiles/${CMAKE_VERSION}/CMakeCUDACompiler.cmake)
if(EXISTS ${NVCC_KNOWN})
  file(STRINGS ${NVCC_KNOWN} NVCC_KNOWN_LINE REGEX "^set\\(CMAKE_CUDA_COMPILER ")
  if(NOT NVCC_KNOWN_LINE STREQUAL "set(CMAKE_CUDA_COMPILER \"${NVCC_EXECUTABLE}\")")
    file(REMOVE ${NVCC_KNOWN})
  endif()
endif()
