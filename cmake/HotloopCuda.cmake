# SPDX-License-Identifier: Apache-2.0
# hotloop._cuda: built where a CUDA compiler is found (or demanded), with the static CUDA runtime,
# so that the module imports on a machine without a driver.
set(HOTLOOP_BUILD_CUDA OFF)
if(HOTLOOP_CUDA)
  # Before the language is enabled, which compiles a test program for them.
  set(CMAKE_CUDA_ARCHITECTURES ${HOTLOOP_CUDA_ARCHS})
  set(hotloop_cuda_minimum 12.3) # C++20, 128-bit accesses (kernels/core/threads.cuh)
  if(HOTLOOP_CUDA_ARCHS MATCHES "(^|;)1[0-9][0-9]")
    set(hotloop_cuda_minimum 12.8)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(hotloop_cuda_missing "no CUDA compiler was found")
  else()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS hotloop_cuda_minimum)
      string(CONCAT hotloop_cuda_missing "nvcc is ${CMAKE_CUDA_COMPILER_VERSION} and "
             "HOTLOOP_CUDA_ARCHS=${HOTLOOP_CUDA_ARCHS} needs ${hotloop_cuda_minimum}")
    endif()
  endif()
  if(NOT hotloop_cuda_missing)
    set(HOTLOOP_BUILD_CUDA ON)
  elseif(HOTLOOP_CUDA STREQUAL "AUTO")
    message(STATUS "hotloop._cuda is not built: ${hotloop_cuda_missing}")
  else()
    message(FATAL_ERROR "HOTLOOP_CUDA=${HOTLOOP_CUDA}: ${hotloop_cuda_missing}. "
                        "Set CUDACXX to an nvcc, or HOTLOOP_CUDA=OFF.")
  endif()
endif()

if(HOTLOOP_BUILD_CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  if(CMAKE_VERSION VERSION_LESS 3.25.2) # which does not know nvcc's flag for C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()

  # Named as in torch.cuda.get_arch_list(): 90-real is sm_90, 100 is sm_100 and compute_100.
  set(hotloop_cuda_names "")
  foreach(arch IN LISTS HOTLOOP_CUDA_ARCHS)
    if(arch MATCHES "^([0-9]+[a-z]?)-real$")
      list(APPEND hotloop_cuda_names "sm_${CMAKE_MATCH_1}")
    elseif(arch MATCHES "^([0-9]+[a-z]?)-virtual$")
      list(APPEND hotloop_cuda_names "compute_${CMAKE_MATCH_1}")
    elseif(arch MATCHES "^[0-9]+[a-z]?$")
      list(APPEND hotloop_cuda_names "sm_${arch}" "compute_${arch}")
    else()
      list(APPEND hotloop_cuda_names "${arch}") # all, all-major, native
    endif()
  endforeach()
  list(JOIN hotloop_cuda_names "," hotloop_cuda_names)

  file(GLOB_RECURSE hotloop_cuda_sources CONFIGURE_DEPENDS kernels/*.cu)
  file(GLOB hotloop_cuda_bind_sources CONFIGURE_DEPENDS csrc/bind/cuda_*.cpp)
  # NO_EXTRAS: link-time optimisation does not reach through nvcc's objects.
  pybind11_add_module(_cuda MODULE NO_EXTRAS ${hotloop_cuda_bind_sources} csrc/bind/register.cpp csrc/bind/table_rules.cpp
                      csrc/bind/array.cpp csrc/bind/torch_tensor.cpp csrc/core/view.cpp csrc/core/rules.cpp
                      ${hotloop_cuda_sources} ${hotloop_heads_cuda})
  # A draw, an updated row and a chosen expert must come out as on the CPU: no a * b + c in one rounding (csrc/decode/heads.hpp).
  file(GLOB_RECURSE hotloop_exact_cuda_sources CONFIGURE_DEPENDS kernels/decode/*.cu kernels/table/*.cu
     kernels/moe/route.cu)
  set_source_files_properties(${hotloop_exact_cuda_sources} PROPERTIES COMPILE_OPTIONS -fmad=false)
  target_include_directories(_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}
                             ${hotloop_generated})
  target_compile_definitions(_cuda PRIVATE HOTLOOP_CUDA_ARCH_LIST="${hotloop_cuda_names}")
  target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)

  # 1873 is the comparison of signed with unsigned, which nvcc passes in silence inside a kernel.
  # -Wdefault-stream-launch: a kernel runs on the caller's stream.
  list(JOIN HOTLOOP_WARNINGS "," hotloop_host_warnings)
  set(hotloop_cuda_options --expt-relaxed-constexpr -Xcompiler=${hotloop_host_warnings}
                           -Xcudafe=--diag_warn=1873 -Wdefault-stream-launch -Wreorder)
  if(HOTLOOP_WERROR)
    list(APPEND hotloop_cuda_options -Werror=all-warnings)
  endif()
  # The kernels are heads x 2 that differ little: compressed, they take a quarter of the space.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
    list(APPEND hotloop_cuda_options --compress-mode=size)
  endif()
  target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${HOTLOOP_WARNINGS}>
                                       $<$<COMPILE_LANGUAGE:CUDA>:${hotloop_cuda_options}>)
  install(TARGETS _cuda LIBRARY DESTINATION hotloop)
endif()
