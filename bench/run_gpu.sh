#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, check, measure and test on a GPU machine without network, in under ten minutes.
#
#   bench/run_gpu.sh OUT_DIR [--dry-run]
#   bench/run_gpu.sh --prebuild DIR     build the package into DIR, on any machine with nvcc
#
# Needs a Python with torch, and either a package from --prebuild or nvcc and pybind11 (scikit-build-core is
# used where it is there). Nothing is installed outside OUT_DIR/../hotloop-gpu-* and the build folder. Environment:
#   HOTLOOP_PYTHON   the Python to use (default python3)
#   HOTLOOP_PREBUILT folder that --prebuild wrote: used if it loads, finds the device and holds its architecture
#   HOTLOOP_WHEELS   folder of wheels to install first, without network: rivals, or pybind11
#   HOTLOOP_ARCH     compute capability to build for (default: this machine's, 90 where there is no GPU)
#   HOTLOOP_BUDGET_S seconds for everything (default 570)
# OUT_DIR gets, written as things happen so that a cut-off leaves them: log.txt (all output),
# steps.jsonl (one line per step), rows.jsonl (benches), report.txt, summary.json, junit.xml.
# A step that runs out of time is interrupted, as by Ctrl-C, so that it can write what it has.
set -uo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2; }

out="" dry=0 prebuild=""
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --prebuild)
      (($# >= 2)) || usage
      prebuild="$2"
      shift
      ;;
    -*) usage ;;
    *)
      [[ -z "$out" ]] || usage
      out="$1"
      ;;
  esac
  shift
done
[[ -n "$out" || -n "$prebuild" ]] || usage

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${HOTLOOP_PYTHON:-python3}"
wheels="${HOTLOOP_WHEELS:-}"
prebuilt="${HOTLOOP_PREBUILT:-}"
budget="${HOTLOOP_BUDGET_S:-570}"

# What the tree was: for rows of a machine to which it came without .git.
commit_here() {
  local head
  head="$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)" || return 0
  [[ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ]] || head+="-dirty"
  echo "$head"
}

# package_build DIR BUILD_DIR ARCH: machine code for one GPU alone, every further architecture costs build time.
package_build() {
  echo "$python -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir --target '$1' \
-C build-dir='$2' -C cmake.define.HOTLOOP_CUDA=ON -C cmake.define.HOTLOOP_CUDA_ARCHS=$3-real ."
}

if [[ -n "$prebuild" ]]; then
  mkdir -p "$prebuild"
  prebuild="$(cd "$prebuild" && pwd)"
  cd "$root" || exit 2
  command="$(package_build "$prebuild" "$root/build/prebuilt" "${HOTLOOP_ARCH:-90}")"
  if ((dry)); then
    echo "$command"
    exit 0
  fi
  bash -c "$command" && commit_here >"$prebuild/COMMIT"
  exit
fi

cd "$root" || exit 2
if ((!dry)); then
  mkdir -p "$out"
  out="$(cd "$out" && pwd)"
  scratch="$(mktemp -d "${TMPDIR:-/tmp}/hotloop-gpu-XXXXXX")"
else
  scratch="\$SCRATCH"
fi
site="$scratch/site" peers="$scratch/peers" build="$scratch/build"
log="$out/log.txt" steps="$out/steps.jsonl" rows="$out/rows.jsonl"
((dry)) || rm -f "$log" "$steps" "$rows" "$out/summary.json" "$out/report.txt" "$out/junit.xml"

export PYTHONPATH="$site:$peers${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export TRITON_CACHE_DIR="$scratch/triton" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
BENCH_COMMIT="$(commit_here)"
CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)"
export BENCH_COMMIT CMAKE_BUILD_PARALLEL_LEVEL

# step NAME LIMIT_S COMMAND: run it within its own limit and what is left of the budget, note how it ended.
step() {
  local name="$1" limit="$2" command="$3" left begin rc status
  left=$((budget - SECONDS))
  if ((dry)); then
    printf '%-22s %4s s  %s\n' "$name" "$limit" "$command"
    return 0
  fi
  if ((left < 10)); then
    printf '{"step":"%s","status":"not started","rc":null,"seconds":0,"limit_s":%d}\n' "$name" "$limit" >>"$steps"
    echo "$name: not started, the time is up"
    return 1
  fi
  ((limit > left)) && limit=$left
  printf '\n==== %s (at most %d s): %s\n' "$name" "$limit" "$command" >>"$log"
  begin=$SECONDS
  # pytest and the benches write their results on an interrupt. A shell without job control starts its
  # background jobs with interrupts ignored, and so would all below it be: env puts the default back.
  timeout --signal=INT --kill-after=15 "$limit" \
    env --default-signal=INT bash -c "set -o pipefail; $command" >>"$log" 2>&1
  rc=$?
  case $rc in
    0) status="ok" ;;
    77) status="skipped" ;;
    124 | 137) status="timed out" ;;
    *) status="failed" ;;
  esac
  printf '{"step":"%s","status":"%s","rc":%d,"seconds":%d,"limit_s":%d}\n' \
    "$name" "$status" "$rc" "$((SECONDS - begin))" "$limit" >>"$steps"
  echo "$name: $status (rc $rc, $((SECONDS - begin)) s)"
  summary
  return $rc
}

# What ran, what failed: rewritten after every step.
summary() {
  "$python" - "$steps" "$rows" "$out/summary.json" <<'PY'
import json, pathlib, sys
steps, rows, summary = map(pathlib.Path, sys.argv[1:])
lines = lambda p: [json.loads(x) for x in p.read_text().splitlines() if x.strip()] if p.exists() else []
ran, measured = lines(steps), lines(rows)
asked = [{**t, "op": r["op"], "label": r["label"], "shape": r["shape"]} for r in measured for t in r["targets"]]
summary.write_text(json.dumps({
    "steps": ran,
    "failed": [s["step"] for s in ran if s["status"] not in ("ok", "skipped")],
    "skipped": [s["step"] for s in ran if s["status"] == "skipped"],
    "rows": len(measured),
    "device": measured[-1]["device"] if measured else None,
    "targets": asked,
}, indent=1) + "\n")
PY
}

arch="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)"
if [[ -z "$arch" ]]; then
  if ((dry)); then
    arch="${HOTLOOP_ARCH:-90}"
  else
    echo "no CUDA device that $python and its torch can use: nothing to do" | tee -a "$log"
    printf '{"step":"device","status":"failed","rc":1,"seconds":0,"limit_s":0}\n' >>"$steps"
    summary
    exit 1
  fi
fi

# 1. What is here, and the package.
step environment 30 "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; nvcc --version;
  $python -c 'import torch, triton, sys; print(sys.version, torch.__version__, triton.__version__)'"
if [[ -n "$wheels" ]]; then
  step wheels 60 "$python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target '$peers' '$wheels'/*.whl"
fi

loads="$python -m bench._loads $arch"
built=0
if [[ -n "$prebuilt" ]]; then
  prebuilt="$(cd "$prebuilt" 2>/dev/null && pwd || echo "$prebuilt")"
  if PYTHONPATH="$prebuilt:$PYTHONPATH" step prebuilt 40 "$loads"; then
    built=1
    export PYTHONPATH="$prebuilt:$PYTHONPATH"
    [[ -n "$BENCH_COMMIT" ]] || BENCH_COMMIT="$(cat "$prebuilt/COMMIT" 2>/dev/null)"
  fi
fi
# Without one: 1. with scikit-build-core, as a user builds it. 2. Plain CMake with pybind11. 3. Python and Triton only.
copy_python="mkdir -p '$site/hotloop' && cp -r python/hotloop/. '$site/hotloop/' && rm -f '$site'/hotloop/*.so && \
cp -r kernels '$site/hotloop/kernels'"
cmake_build="$copy_python && cmake -S . -B '$build' -DCMAKE_BUILD_TYPE=Release -DHOTLOOP_PYTHON=ON -DHOTLOOP_CUDA=ON \
-DHOTLOOP_CUDA_ARCHS=$arch-real -DPython_EXECUTABLE=\"\$(command -v $python)\" \
-Dpybind11_DIR=\"\$($python -m pybind11 --cmakedir)\" && cmake --build '$build' && cmake --install '$build' --prefix '$site'"
if ((!built)) && { ((dry)) || "$python" -c 'import scikit_build_core, pybind11' 2>/dev/null; }; then
  step build 240 "$(package_build "$site" "$build" "$arch")" && built=1
fi
if ((!built)); then
  if "$python" -m pybind11 --cmakedir >/dev/null 2>&1; then
    rm -rf "${site:?}" "${build:?}"
    step build-cmake 200 "$cmake_build" && built=1
  else
    echo "neither scikit-build-core nor pybind11 is there: put their wheels into HOTLOOP_WHEELS" | tee -a "$log"
  fi
fi
if ((!built)); then
  step build-none 10 "rm -rf '$site'; $copy_python; echo 'compiled modules are missing: only Triton can run'"
fi
step info 40 "$loads && $python -m hotloop info"

# 2. Every kernel once against the reference, a process per room: Triton compiles while others run.
rooms="$(find bench -mindepth 2 -name '[!_]*.py' -not -path '*/contenders/*' -printf '%h\n' | sort -u | sed 's,.*/,,' | tr '\n' ' ')"
step smoke 90 "pids=(); for room in $rooms; do
  env --default-signal=INT $python -m bench._smoke \$room & pids+=(\$!); done
  rc=0; for pid in \"\${pids[@]}\"; do wait \"\$pid\" || rc=1; done; exit \$rc"

# 3. First numbers. Random results are not judged: the smoke above has done it at small sizes.
flags="--device cuda --keep-going --quiet --no-judge --out '$rows'"
measure() { # NAME LIMIT_S OPS SECONDS CONTENDERS
  step "$1" "$2" "$python -m bench run '$3' $flags --seconds $4 --only '$5'"
}
measure bench-logprob 70 logprob.linear_logprob 3 'torch,trl,four products'
measure bench-dpo 60 preference.linear_preference_loss 3 'torch,liger dpo,five products'
measure bench-decode-table 70 'decode.chain_*,table.device_*' 1 'torch,torch by cdf'
measure bench-jsd-pairs 70 'logprob.linear_jsd,preference.dpo_loss' 2 'torch,trl,liger jsd triton,six products'

# 4. Tests, by file: collecting the others takes longer than these run.
gpu_tests="$(cd "$root" && grep -rlE '^ *pytest\.mark\.gpu,|^@pytest\.mark\.gpu$|= on_gpu$' tests --include='test_*.py' | sort | tr '\n' ' ')"
step pytest-gpu 150 "$python -m pytest $gpu_tests -m gpu -q --timeout 60 --junitxml='$out/junit.xml'"

# 5. What is left of the time.
measure bench-ce 50 logprob.linear_cross_entropy 3 'torch,trl,cce cce,liger flce,three products'
measure bench-rivals 60 'logprob.linear_logprob,decode.[bst]*,preference.[!dl]*_loss' 1 'torch,cce cce,liger scaled_ce,torch topk first'
step report 30 "$python -m bench report '$rows' --device cuda | tee '$out/report.txt'"
# Only kernels of ours: torch's and cuBLAS's cost most of the time and are not what is looked at.
sanitizer="compute-sanitizer --error-exitcode 9 --print-limit 20 --kernel-name kernel_substring=hotloop"
missing="command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not there'; exit 77; }"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # exact bounds: no block is shared
step memcheck 60 "$missing; $sanitizer --tool memcheck $python -m bench._sanitizer_cases"
step racecheck 40 "$missing; $sanitizer --tool racecheck $python -m bench._sanitizer_cases"
unset PYTORCH_NO_CUDA_MEMORY_CACHING

((dry)) && exit 0
rm -rf "${scratch:?}"
summary
cat "$out/summary.json"
! grep -qE '"status":"(failed|timed out|not started)"' "$steps"
