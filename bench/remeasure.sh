#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measure again what the README and docs/decode.md show, from a clean commit on a quiet machine, and put the rows
# into bench/results. Then: make docs, and commit both.
#
#   bench/remeasure.sh [OPS ...]        default: heads, pair losses and decoding; 'table' needs `make rivals`
#
# Rows go to out/remeasure first, since a changed tree is what rows must not come from. An interrupt keeps
# what was measured. SECONDS_PER_CASE (default 12) is the measuring time of a case.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
if [[ -n "$(git status --porcelain --untracked-files=no)" ]]; then
  echo "the tree has changes: commit first" >&2
  exit 2
fi
out=out/remeasure
mkdir -p "$out"
keep() {
  "$python" - "$1" "$2" <<'PY'
import json, pathlib, sys
from bench import _peaks, _row
new, kept = map(pathlib.Path, sys.argv[1:])
if new.exists():
    read = _row.read if kept.name == "cpu.jsonl" else _peaks.read
    both = new.with_suffix(".all")
    both.write_text((kept.read_text() if kept.exists() else "") + new.read_text())
    rows = read(both)
    # A case that was measured anew replaces all rows of the case: its ratios are to contenders of the same rounds.
    case = lambda r: json.dumps([r[n] for n in ("op", "mode", "label", "shape", "dtype")])
    anew = {case(r): r["commit"] for r in rows if r["role"] == "ours"}
    rows = [r for r in rows if anew.get(case(r)) == r["commit"]]
    kept.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(f"{len(rows)} rows in {kept}")
PY
}
finish() {
  keep "$out/cpu.jsonl" bench/results/cpu.jsonl
  keep "$out/memory.jsonl" bench/results/memory.jsonl
}
trap finish EXIT

rm -f "$out"/*.jsonl
if (($# == 0)); then
  "$python" -m bench memory logprob.linear_cross_entropy --dtype bfloat16 --only 'cce torch_compile,torch,torch half logits' --no-products --out "$out/memory.jsonl"
  set -- logprob.linear_logprob logprob.linear_cross_entropy logprob.linear_jsd preference.linear_preference_loss \
    preference.dpo_loss preference.ipo_loss preference.simpo_loss preference.orpo_loss preference.kto_loss \
    decode.sample decode.tree_speculative_verify decode.block_speculative_sampling decode.chain_speculative_sampling
fi
for op in "$@"; do
  "$python" -m bench run "$op" --keep-going --seconds "${SECONDS_PER_CASE:-12}" --out "$out/cpu.jsonl" \
    || echo "$op: see above" >&2
done
