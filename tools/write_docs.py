# SPDX-License-Identifier: Apache-2.0
"""Write what is generated: docs/coverage.md and docs/papers.md from the catalogue, results from bench/results.

``python tools/write_docs.py`` writes, ``--check`` only compares and exits 1 on a difference.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hotloop._catalog import IMPLS, STATUS, Op, of_room, rooms
from hotloop.front.environment import VARIABLES

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent


def yes(flag: bool) -> str:
    return "yes" if flag else "-"


def about(room: str) -> str:
    """What a room is, in a sentence: how its catalogue opens."""
    text = importlib.import_module(f"hotloop._catalog.{room}").__doc__
    return (text or "").splitlines()[0]


def proved() -> None:
    """Refuse "run on ..." in the catalogue without a row of that run in bench/results/gpu.jsonl."""
    ran = {(row["op"], row["impl"]) for row in rows_of("gpu.jsonl")}
    for key, status in STATUS.items():
        for impl, text in status.items():
            seen = any(f"{op}.".startswith(f"{key}.") and of == f"hotloop {impl}" for op, of in ran)
            if text.startswith("run on") and not (key and seen):
                raise SystemExit(
                    f"[docs] STATUS of hotloop/_catalog: expected a row of {impl} in {key or 'every op'} in "
                    f"bench/results/gpu.jsonl, got none for {text!r}. Measure it: bench/run_gpu.sh."
                )


def rooms_table() -> str:
    """A row per room; per implementation how many entries have it, and what they have been through."""
    lines = []
    for room in rooms():
        ops = of_room(room)
        cells = [f"`hotloop.{room}`", about(room).rstrip(".")]
        cells.append(str(sum(not op.is_class for op in ops)))
        cells.append(str(sum(op.is_class for op in ops)))
        for impl in IMPLS[1:]:
            count = Counter(op.status(impl) for op in ops if impl in op.impls)
            cells.append(", ".join(f"{n} {status}" for status, n in count.items()) or "-")
        lines.append(cells)
    return "\n".join(table(["room", "what", "functions", "classes", *IMPLS[1:]], lines))


def coverage() -> str:
    short = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int8": "i8"}
    head = ["", *IMPLS, "dtypes", "backward", "torch.compile", "deterministic", "maturity"]

    def cells(op: Op) -> list[str]:
        return [
            f"`{op.name}`",
            *(op.status(impl) or "-" for impl in IMPLS),
            " ".join(short[d] for d in op.dtypes),
            *(yes(flag) for flag in (op.gradient, op.compiles, op.deterministic)),
            op.maturity,
        ]

    found = [
        "# Coverage",
        "",
        "Every public function, and every class that computes or holds state; written by `make docs`.",
        '"tested": by this repository\'s tests on the CPU. "compiled": for CUDA, never run on a GPU; its code',
        'has run on an emulated one. "interpreted": by Triton\'s interpreter, and compiled ahead of time, never',
        "run on a GPU. The kernels one by one: [gpu-status.md](gpu-status.md).",
    ]
    for room in rooms():
        found += ["", f"## {room}", "", about(room), ""]
        found += table(head, [cells(op) for op in of_room(room)])
    return "\n".join(found) + "\n"


def variables() -> str:
    return "\n".join(f"- `{name}`: {text}" for name, text in VARIABLES.items())


def papers() -> str:
    found = [
        "# Papers",
        "",
        "Which function or class computes what, and the settings its paper uses; written by `make docs`.",
    ]
    for room in rooms():
        lines = []
        for op in of_room(room):
            for paper in op.papers:
                title = f"[{paper.title}]({paper.link})" if paper.link else paper.title
                source = f" ({paper.source})" if paper.source and not paper.link else ""
                lines.append([f"{title}{source}", f"`{op.name}`", paper.settings or "-"])
        found += ["", f"## {room}", "", *table(["paper", "here", "the paper's settings"], lines)]
    return "\n".join(found) + "\n"


RESULTS = ROOT / "bench" / "results"
# Rivals with a column of their own; the nearest one of each row has a column in any case.
SHOWN = (
    "trl",
    "liger dpo",
    "liger jsd",
    "cce torch_compile",
    "torch.compile",
    "torch",
)
# Rooms with a page of their own for results: the rivals that its table shows, and under how many threads.
PAGES = {
    "decode": (
        (
            "transformers",
            "torch",
            "torch by cdf",
            "torch topk first",
            "torch.compile",
            "chain, as many rows",
        ),
        "two threads",
    ),
    "table": (
        (
            "libcuckoo",
            "absl",
            "tfra",
            "torchrec mch",
            "fbgemm",
            "hotloop on row numbers",
            "rows without keys",
            "torch",
            "numpy",
        ),
        "two threads where a case does not say one",
    ),
}
# What is no rival: bare products, the machine's limit, and our own code without its keys.
_NO_RIVALS = ("ours", "floor", "roof")
_OUR_OWN = ("hotloop on row numbers",)
_CASE = ("op", "mode", "label", "shape", "dtype", "device", "threads")
_REMEASURE = "bench/remeasure.sh"


def rows_of(name: str) -> list[Row]:
    """Rows of a file of results; a tree with uncommitted changes cannot be had again, so its rows are refused.

    Rows of rounds that were not shuffled are left out: whoever follows one that frees large buffers pays for its pages.
    """
    path = RESULTS / name
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    dirty = sorted({r["commit"] for r in rows if not re.fullmatch(r"[0-9a-f]{12}", r["commit"])})
    if dirty:
        raise SystemExit(
            f"[docs] {path.relative_to(ROOT)}: expected rows of clean commits, got {', '.join(dirty)}. "
            f"Commit, then measure again: {_REMEASURE}."
        )
    return [row for row in rows if row.get("order_seed", 0) is not None]


def case_of(row: Row) -> str:
    return str([row[name] for name in _CASE])


def time_text(us: float) -> str:
    unit, size = ("us", 1.0) if us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)
    return f"{us / size:.3g} {unit}"


def memory_text(row: Row | None) -> str:
    if row is None or row["peak_mb"] is None:
        return ""
    return "< 1 MB" if row["peak_mb"] < 1 else f"{row['peak_mb']:.0f} MB"


def nearest(own: Row, others: dict[str, Row]) -> tuple[str, float] | None:
    """The fastest that is not ours: its name, and our time over its."""
    ratios = {
        name: ratio[0]
        for name, ratio in own["ratios"].items()
        if name in others and others[name]["role"] not in _NO_RIVALS and name not in _OUR_OWN
    }
    return max(ratios.items(), key=lambda item: item[1]) if ratios else None


def case_text(row: Row) -> str:
    return row["op"] + (f", {row['label']}" if row["label"] else "")


def shape_text(row: Row) -> str:
    return " x ".join(str(n) for n in row["shape"])


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cells) + " |" for cells in lines),
    ]


def results_table(rows: list[Row], shown: tuple[str, ...], what: str) -> list[str]:
    """Each rival's time over ours, so above 1 we are faster; ends with the row that looks worst for us."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(case_of(row), {})[row["impl"]] = row
    ours = [row for row in rows if row["role"] == "ours"]
    rivals = [name for name in shown if any(name in row["ratios"] for row in ours)]
    lines, worst = [], (0.0, "")
    for row in ours:
        others = by_case[case_of(row)]
        first = nearest(row, others)
        cell = ""
        if first is not None:
            name, ratio = first
            cell = both(f"{name} {1 / ratio:.2f}", others[name])
            worst = max(
                worst,
                (ratio, f"{name}, `{case_text(row)}`, {shape_text(row)}, {row['dtype']}"),
            )
        lines.append(
            [
                f"`{case_text(row)}`",
                shape_text(row),
                row["dtype"],
                time_text(row["median_us"]),
                memory_text(row),
                cell,
                *(
                    f"{1 / row['ratios'][name][0]:.2f}" if name in row["ratios"] else ""
                    for name in rivals
                ),
            ]
        )
    head = [what, "shape", "dtype", "hotloop", "memory", "nearest rival: its time / ours, memory"]
    head += [f"{name} / ours" for name in rivals]
    found = table(head, lines)
    if worst[1]:
        found += ["", f"The worst row: {1 / worst[0]:.2f} for {worst[1]}."]
    return found


def room_of(row: Row) -> str:
    return str(row["op"]).partition(".")[0]


def page_results(room: str) -> str:
    shown, threads = PAGES[room]
    rows = [row for row in rows_of("cpu.jsonl") if room_of(row) == room]
    return "\n".join([*results_table(rows, shown, "op"), "", *conditions(rows, threads)])


def results() -> str:
    """docs/results.md: lm_head ops and pair losses; rooms with a page of their own have their results there."""
    rows = [row for row in rows_of("cpu.jsonl") if room_of(row) not in PAGES]
    slow_halves = (
        []
        if any(row["dtype"] == "bfloat16" for row in rows)
        else [
            "This machine multiplies bfloat16 in software: of bfloat16 lm_heads only the memory is measured."
        ]
    )
    return "\n".join(
        [
            "# Results",
            "",
            "lm_head ops and pair losses; decoding is in [decode.md](decode.md), tables are in [table.md](table.md).",
            "Written by `make docs` from `bench/results`.",
            "",
            "## Time",
            "",
            *results_table(rows, SHOWN, "forward + backward"),
            "",
            *conditions(rows, "two threads, pair losses one"),
            "Products are nearly all of an lm_head step: ratios against rivals with the same products stay near 1.",
            *slow_halves,
            "",
            "## Memory",
            "",
            "Peak of one step of `linear_cross_entropy`, forward and backward, above the inputs: the gradients and the",
            "workspace that stays between steps count, for every contender. `python -m bench memory",
            "logprob.linear_cross_entropy --dtype bfloat16 --no-products` prints it (products are replaced by zeros of",
            "their size).",
            "",
            memory(),
            "",
        ]
    )


# What the README shows: an op, a part of its label, its shape.
HIGHLIGHTS = (
    ("logprob.linear_cross_entropy", "0% masked", [4096, 512, 151936]),
    ("logprob.linear_cross_entropy", "25% masked", [512, 768, 32000]),
    ("logprob.linear_jsd", "beta 0.5", [512, 768, 32000]),
    ("preference.linear_preference_loss", "50% padding", [4, 64, 768, 32000]),
    ("preference.dpo_loss", "", [1048576]),
    ("decode.chain_speculative_sampling", "logits", [16, 4, 151936]),
    ("table.find", "2 threads", [14260634, 1048576]),
    ("table.embedding_bag_step", "adagrad, zipf", [1000000, 8192, 8, 64]),
)


def highlights() -> str:
    """The README's table: ours, the nearest rival and plain torch, with memory; rows of memory alone have no time."""
    rows = rows_of("cpu.jsonl") + rows_of("memory.jsonl")
    lines = []
    for op, label, shape in HIGHLIGHTS:
        ours = (row for row in rows if row["role"] == "ours" and row["op"] == op)
        own = next((row for row in ours if label in row["label"] and row["shape"] == shape), None)
        if own is None:
            continue
        of = {row["impl"]: row for row in rows if case_of(row) == case_of(own)}
        rivals = [name for name, row in of.items() if row["role"] not in _NO_RIVALS]
        first = nearest(own, of) if "ratios" in own else None
        name = first[0] if first else min((of[name]["peak_mb"], name) for name in rivals)[1]
        lines.append(
            [
                f"`{case_text(own)}`",
                f"{shape_text(own)} {own['dtype']}",
                both(time_text(own["median_us"]) if "median_us" in own else "", own),
                f"{name} {against(own, of[name])}",
                against(own, of["torch"]) if "torch" in of else "-",
            ]
        )
    return "\n".join(table(["one step", "shape", "hotloop", "nearest rival", "torch"], lines))


def both(first: str, row: Row) -> str:
    return ", ".join(filter(None, [first, memory_text(row)]))


def against(own: Row, other: Row) -> str:
    ratio = own.get("ratios", {}).get(other["impl"])
    return both(f"{1 / ratio[0]:.2f}" if ratio else "", other)


def memory() -> str:
    """Peak of one step: ours, then the others by how much they take."""
    by_case: dict[str, list[Row]] = {}
    measured = rows_of("memory.jsonl")
    if not measured:
        return f"No rows of a clean commit yet: `{_REMEASURE}` measures them."
    for row in measured:
        by_case.setdefault(case_of(row), []).append(row)
    wanted = ("cce torch_compile", "torch half logits", "torch")
    lines = []
    for rows in by_case.values():
        of = {row["impl"]: row for row in rows}
        own = next(row for row in rows if row["role"] == "ours")
        lines.append(
            [
                f"`{case_text(own)}`",
                shape_text(own),
                own["dtype"],
                memory_text(own),
                *(memory_text(of.get(name)) for name in wanted),
            ]
        )
    head = ["one step", "rows x width x vocabulary", "dtype", "hotloop", *wanted]
    first = measured[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in measured))
    return "\n".join(
        [
            *table(head, lines),
            "",
            f"{first['device']}; commits {commits}, {first['time'][:10]}.",
        ]
    )


def conditions(rows: list[Row], threads: str) -> list[str]:
    if not rows:
        return [f"No rows of a clean commit yet: `{_REMEASURE}` measures them."]
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    named = ", ".join(
        f"{k} {v}" for k, v in versions.items() if k not in ("python", "numpy", "triton")
    )
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    days = sorted({row["time"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return [
        f"Medians of rounds in an order drawn anew for each, on {devices}, {threads}; {named}; commits {commits};",
        f"{when}. Above 1 we are faster. Memory is the peak of a step above its inputs: gradients, temporaries and",
        "workspace. `python -m bench run all` measures it on your machine; the rows, with spread and commands,",
        "are in `bench/results/cpu.jsonl`, and what limits each is in `docs/perf-notes.md`.",
    ]


def between(text: str, name: str, body: str) -> str:
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{body}\n{end}{after}"


def documents() -> dict[Path, str]:
    proved()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = between(readme, "rooms", rooms_table())
    readme = between(readme, "variables", variables())
    readme = between(readme, "results", highlights())
    pages = {ROOT / "docs" / f"{room}.md": page_results(room) for room in PAGES}
    return {
        ROOT / "README.md": readme,
        **{
            path: between(path.read_text(encoding="utf-8"), "results", body)
            for path, body in pages.items()
        },
        ROOT / "docs" / "coverage.md": coverage(),
        ROOT / "docs" / "papers.md": papers(),
        ROOT / "docs" / "results.md": results(),
    }


def main() -> int:
    stale = []
    for path, text in documents().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print("stale:", ", ".join(str(p.relative_to(ROOT)) for p in stale), "- run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
