# SPDX-License-Identifier: Apache-2.0
# Fails when an object file of a SIMD level above the baseline holds arithmetic of the baseline (addps for vaddps): a
# loop that was defined before simd_begin.hpp (see there), correct and several times slower.
set(arithmetic "\t(add|sub|mul|div|max|min|sqrt|ucomi|comi)(ps|pd|ss|sd) ")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${OBJDUMP} -d -C --no-show-raw-insn ${object} COMMAND grep -m 1 -E ${arithmetic}
                  OUTPUT_VARIABLE found RESULTS_VARIABLE results)
  list(GET results 1 grep_result)
  if(NOT grep_result EQUAL 1)  # which is "no such line"; then objdump was read to its end
    message(SEND_ERROR "${object}: baseline arithmetic:${found}")
  elseif(NOT results EQUAL "0;1")
    message(SEND_ERROR "${object}: objdump failed: ${results}")
  endif()
endforeach()
