#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the sdist, build the wheel from it, repair it, install it into an empty environment and test it there, with the
# tests of the sdist and without a compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
export PATH="$PWD/$bin:$PATH" PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
rm -rf dist wheelhouse .venv-wheel
pip install -q --group wheel
rm -rf build/sdist && mkdir -p build/sdist
python -m build -q --sdist --no-isolation -o dist
tar xzf dist/*.tar.gz -C build/sdist --strip-components=1
pip wheel -q --no-deps --no-build-isolation -w dist -C cmake.define.HOTLOOP_CUDA="${HOTLOOP_CUDA:-AUTO}" \
  -C cmake.define.HOTLOOP_WERROR="${HOTLOOP_WERROR:-OFF}" \
  ${HOTLOOP_CUDA_ARCHS:+-C cmake.define.HOTLOOP_CUDA_ARCHS="$HOTLOOP_CUDA_ARCHS"} build/sdist
# libgomp stays outside: torch's wheel carries it, and a second copy would be a second OpenMP runtime.
auditwheel -v repair --exclude libgomp.so.1 -w wheelhouse dist/*.whl > build/auditwheel.log 2>&1 \
  || { cat build/auditwheel.log; exit 1; }
wheel=$(ls wheelhouse/*.whl)
ls -l "$wheel"
if [ "${HOTLOOP_CUDA:-AUTO}" = ON ] || { [ "${HOTLOOP_CUDA:-AUTO}" = AUTO ] && command -v nvcc > /dev/null; }; then
  # The module itself: kernels/ has headers named *_cuda.hpp. The whole list first: `grep -q` leaves its pipe at the
  # first match, and pipefail takes the writer's complaint for absence.
  listing=$(python -m zipfile -l "$wheel")
  grep -q '^hotloop/_cuda\.[^ ]*\.so ' <<< "$listing" || { echo "nvcc is here, and the wheel has no _cuda"; exit 1; }
fi

python3 -m venv .venv-wheel
.venv-wheel/bin/pip install -q "$wheel"
commit=$(< build/sdist/cmake/commit.txt)
if [[ ( -e .git && $commit == unknown ) || $(.venv-wheel/bin/hotloop info) != *"(commit $commit)"* ]]; then
  echo "the sdist is of commit $commit, and the wheel does not say so, or it should be known"
  exit 1
fi
# An empty PATH but for the coreutils the scripts need: no compiler, no nvcc, no ninja.
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
for name in env uname cat ls rm; do ln -s "$(command -v $name)" "$tools/$name"; done
export PATH="$tools"
unset CC CXX CUDA_HOME CUDA_PATH
cd build/sdist
python=$OLDPWD/.venv-wheel/bin/python
echo "without torch:"
"$python" tests/wheel_smoke.py --no-torch
echo "with torch:"
"$python" -m pip install -q torch==2.13.0
"$python" tests/wheel_smoke.py
# WHEEL_TESTS=short: what a wheel can break, since `make test` has run the rest from the same sources. 0: none.
tests="tests/test_catalog.py tests/test_command.py tests/test_layout.py tests/tools tests/docs tests/core tests/unlearn"
case "${WHEEL_TESTS:-1}" in
  0) tests="" ;;
  short) tests+=" tests/logprob/test_logprob_autocast.py tests/decode/test_decode_operator.py
    tests/table/test_table_without_torch.py" ;;
  *) tests+=" tests/decode tests/logprob tests/preference" ;;
esac
if [ -n "$tests" ]; then
  "$python" -m pip install -q pytest==9.2.0 pytest-timeout==2.4.0 hypothesis==6.170.17 mpmath==1.3.0 \
    psutil sybil==10.1.0 rich matplotlib
  "$python" -m pytest -q -m 'not gpu and not big and not peer and not slow' \
    $tests
fi
