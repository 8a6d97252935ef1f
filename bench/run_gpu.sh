#!/usr/bin/env bash
# Build, test, check and measure on a GPU machine without network, in under ten minutes.
#
#   bench/run_gpu.sh OUT_DIR [--dry-run]
#
# Needs nvcc, a Python with torch, and pybind11 (scikit-build-core is used where it is there).
# Nothing is installed outside OUT_DIR/../hotloop-gpu-* and the build folder. Environment:
#   HOTLOOP_PYTHON   the Python to use (default python3)
#   HOTLOOP_WHEELS   folder of wheels to install first, without network: rivals, or pybind11
#   HOTLOOP_BUDGET_S seconds for everything (default 570)
# OUT_DIR gets, written as things happen so that a cut-off leaves them: log.txt (all output),
# steps.jsonl (one line per step), rows.jsonl (benches), report.txt, summary.json, junit.xml.
set -uo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }

out="" dry=0
for word in "$@"; do
  case "$word" in
    --dry-run) dry=1 ;;
    -*) usage ;;
    *)
      [[ -z "$out" ]] || usage
      out="$word"
      ;;
  esac
done
[[ -n "$out" ]] || usage

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${HOTLOOP_PYTHON:-python3}"
wheels="${HOTLOOP_WHEELS:-}"
budget="${HOTLOOP_BUDGET_S:-570}"
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
CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)"
export CMAKE_BUILD_PARALLEL_LEVEL

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
  timeout --kill-after=10 "$limit" bash -c "set -o pipefail; $command" >>"$log" 2>&1
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
    arch=90
  else
    echo "no CUDA device that $python and its torch can use: nothing to do" | tee -a "$log"
    printf '{"step":"device","status":"failed","rc":1,"seconds":0,"limit_s":0}\n' >>"$steps"
    summary
    exit 1
  fi
fi
# Machine code for this GPU alone: every further architecture would cost build time.

step environment 30 "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; nvcc --version;
  $python -c 'import torch, triton, sys; print(sys.version, torch.__version__, triton.__version__)'"

if [[ -n "$wheels" ]]; then
  step wheels 60 "$python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target '$peers' '$wheels'/*.whl"
fi

# 1. With scikit-build-core, as a user builds it. 2. Plain CMake with pybind11. 3. Python and Triton only.
pip_build="$python -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir --target '$site' \
-C build-dir='$build' -C cmake.define.HOTLOOP_CUDA=ON -C cmake.define.HOTLOOP_CUDA_ARCHS=$arch-real ."
copy_python="mkdir -p '$site/hotloop' && cp -r python/hotloop/. '$site/hotloop/' && rm -f '$site'/hotloop/*.so && \
cp -r kernels '$site/hotloop/kernels'"
cmake_build="$copy_python && cmake -S . -B '$build' -DCMAKE_BUILD_TYPE=Release -DHOTLOOP_PYTHON=ON -DHOTLOOP_CUDA=ON \
-DHOTLOOP_CUDA_ARCHS=$arch-real -DPython_EXECUTABLE=\"\$(command -v $python)\" \
-Dpybind11_DIR=\"\$($python -m pybind11 --cmakedir)\" && cmake --build '$build' && cmake --install '$build' --prefix '$site'"
built=0
if ((dry)) || "$python" -c 'import scikit_build_core, pybind11' 2>/dev/null; then
  step build 240 "$pip_build" && built=1
fi
if ((dry || !built)); then
  if ((dry)) || "$python" -m pybind11 --cmakedir >/dev/null 2>&1; then
    rm -rf "${site:?}" "${build:?}"
    step build-cmake 200 "$cmake_build" && built=1
  else
    echo "neither scikit-build-core nor pybind11 is there: put their wheels into HOTLOOP_WHEELS" | tee -a "$log"
  fi
fi
if ((dry || !built)); then
  step build-none 10 "rm -rf '$site'; $copy_python; echo 'compiled modules are missing: only Triton can run'"
fi

step info 30 "$python -c 'import hotloop, torch; from hotloop import _native; print(hotloop.__version__, hotloop.__file__, _native.cuda())'"
step pytest-gpu 120 "$python -m pytest tests -m gpu -q --junitxml='$out/junit.xml'"

sanitizer="compute-sanitizer --error-exitcode 9 --print-limit 20"
missing="command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not there'; exit 77; }"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # exact bounds: no block is shared
step memcheck 60 "$missing; $sanitizer --tool memcheck $python -m bench._sanitizer_cases"
step racecheck 40 "$missing; $sanitizer --tool racecheck $python -m bench._sanitizer_cases"
unset PYTORCH_NO_CUDA_MEMORY_CACHING

run="$python -m bench run"
flags="--device cuda --keep-going --quiet --out '$rows'"
step bench-pairs 60 "$run 'preference.dpo_loss' $flags --seconds 2"
step bench-decode 70 "$run 'decode.[cbts]*' $flags --seconds 1 --only 'torch,torch by cdf,torch topk first'"
step bench-logprob 90 "$run logprob.linear_logprob $flags --seconds 4 --only 'torch,trl,cce cce,liger scaled_ce,four products'"
step bench-dpo 90 "$run preference.linear_preference_loss $flags --seconds 5 --only 'torch,liger dpo,five products'"
step bench-jsd 80 "$run logprob.linear_jsd $flags --seconds 4 --only 'torch,trl,liger jsd,liger jsd triton,six products'"
step bench-table 40 "$run 'table.device_*' $flags --seconds 1 --only torch"
step bench-pairs-more 60 "$run 'preference.[!dl]*_loss' $flags --seconds 1 --only torch"
step bench-ce 60 "$run logprob.linear_cross_entropy $flags --seconds 3 --only 'torch,trl,cce cce,liger flce,three products'"
step report 30 "$python -m bench report '$rows' --device cuda | tee '$out/report.txt'"

((dry)) && exit 0
rm -rf "${scratch:?}"
summary
cat "$out/summary.json"
! grep -qE '"status":"(failed|timed out|not started)"' "$steps"
