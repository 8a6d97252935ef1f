# SPDX-License-Identifier: Apache-2.0
# hotloop/_commit.py, the commit that `hotloop info` names: git's where there is a repository, else the one that an sdist
# was made from and carries in commit.txt, else "unknown".
set(hotloop_commit_file ${PROJECT_SOURCE_DIR}/cmake/commit.txt)
if(EXISTS ${PROJECT_SOURCE_DIR}/.git)
  execute_process(COMMAND git describe --always --dirty --abbrev=12 --exclude=* WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
                  OUTPUT_VARIABLE hotloop_commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
elseif(EXISTS ${hotloop_commit_file})
  file(STRINGS ${hotloop_commit_file} hotloop_commit)
endif()
if(NOT hotloop_commit) # no git, or a repository of somebody else, which git refuses to read
  set(hotloop_commit unknown)
endif()
if(SKBUILD_STATE STREQUAL "sdist")
  file(WRITE ${hotloop_commit_file} "${hotloop_commit}\n")
elseif(SKBUILD)
  file(WRITE ${PROJECT_BINARY_DIR}/_commit.py "COMMIT = \"${hotloop_commit}\"\n")
  install(FILES ${PROJECT_BINARY_DIR}/_commit.py DESTINATION hotloop)
endif()
