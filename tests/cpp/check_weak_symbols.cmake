# SPDX-License-Identifier: Apache-2.0
# Fails when an object file of a SIMD level above the baseline exports a weak (shared) function: the linker
# could keep that copy for everybody, and a CPU without the level would crash in it.
# cmake -DNM=nm -DOBJECTS="a.o;b.o" -P check_weak_symbols.cmake
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
  foreach(line IN LISTS weak)
    if(NOT line MATCHES "DW\\.ref\\.|hotloop::simd_avx|__clang_call_terminate")
      message(SEND_ERROR "${object} shares ${line}")
    endif()
  endforeach()
  message(STATUS "checked ${object}")
endforeach()
