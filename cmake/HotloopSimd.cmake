# SPDX-License-Identifier: Apache-2.0
# One source, several instruction sets: every csrc/<room>/<loop>.simd.cpp is compiled once per level with
# HOTLOOP_SIMD_LEVEL set; core/simd_begin.hpp turns that into a namespace and a target pragma.
set(HOTLOOP_WARNINGS -Wall -Wextra -Wconversion -Wsign-compare -Wno-unknown-pragmas)
if(HOTLOOP_WERROR)
  list(APPEND HOTLOOP_WARNINGS -Werror)
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(HOTLOOP_SIMD_LEVELS 0 1 2) # baseline, avx2, avx512
  if(HOTLOOP_SANITIZE)
    set(HOTLOOP_SIMD_LEVELS 0 1)
    add_compile_definitions(HOTLOOP_SIMD_NO_AVX512)
  endif()
else()
  set(HOTLOOP_SIMD_LEVELS 0)
endif()

set(HOTLOOP_OPTIMIZE -O3)
if(HOTLOOP_SANITIZE)
  set(HOTLOOP_OPTIMIZE -O1)
endif()

function(hotloop_simd_library name sources)
  add_library(${name} STATIC)
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
  target_link_libraries(${name} PUBLIC OpenMP::OpenMP_CXX)
  target_compile_options(${name} PRIVATE ${HOTLOOP_WARNINGS})
  list(JOIN HOTLOOP_SIMD_LEVELS "," level_list)
  target_compile_definitions(${name} PUBLIC HOTLOOP_SIMD_LEVELS=${level_list})
  foreach(level IN LISTS HOTLOOP_SIMD_LEVELS)
    add_library(${name}_simd${level} OBJECT ${sources})
    target_include_directories(${name}_simd${level} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_link_libraries(${name}_simd${level} PRIVATE OpenMP::OpenMP_CXX)
    target_compile_definitions(${name}_simd${level} PRIVATE HOTLOOP_SIMD_LEVEL=${level})
    # No errno and no trapping comparisons: without these GCC keeps libm calls and refuses to vectorise selects.
    target_compile_options(${name}_simd${level} PRIVATE ${HOTLOOP_OPTIMIZE} -fno-math-errno -fno-trapping-math
                           ${HOTLOOP_WARNINGS})
    target_sources(${name} PRIVATE $<TARGET_OBJECTS:${name}_simd${level}>)
  endforeach()
endfunction()
