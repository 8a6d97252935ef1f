# SPDX-License-Identifier: Apache-2.0
"""Learn clicks from a real log, one pass, predicting every batch before learning from it: hashed against collisionless.

Run it with ``python -m examples.online_recommender`` from the root of the repository, after
``pip install --no-deps obp==0.4.1`` (or ``make demo-online``).

The log is the small Open Bandit Dataset (Saito et al. 2020, arXiv:2008.07146) that the package obp carries: 60,000
impressions of one week on ZOZOTOWN, 287 clicks. A logistic model adds up one weight per feature. There are few users
and items, so what fills memory are crosses of them, down to (segment, item, hour): most are seen once, as in any log.
Rows of all learners are made from the same ids and trained by the same rule with the same rate; what differs is where
an id's weight lies, at the same number of bytes. Each learner chooses its rate on the first day, which is not counted.

What this can show: what collisions, eviction, admission and expiry do to rows, bytes, speed and, within its interval,
log-loss. What it cannot: 287 clicks decide little, and hardly more than the click rate so far can be learned from them;
a week is short for expiry; and a model of one weight per id is the worst case for a collisionless table, where key,
score and index take three times what weight and state do. So that "no difference" can be told from "nothing to see", a
control runs the same learners over the same impressions with clicks drawn from planted weights.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from hotloop.table import Adagrad, Constant, CountFilter, hash_strings, salted_hash_bucket
from hotloop.table.modules import HashEmbeddingBag
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

INSTALL = "pip install --no-deps obp==0.4.1"
REPORT, PICTURE = "report.json", "report.png"
COLUMNS = ("timestamp", "item_id", "position", "click", "user_feature_0")
USER = tuple(f"user_feature_{i}" for i in range(4))
HOUR = 3600


class ExampleError(Exception):
    """Something the user can put right."""


@dataclass(frozen=True)
class Settings:
    batch: int = 50
    rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    tuning: float = 1 / 7  # of the log: the first of seven days
    # Adagrad's first step is lr g / sqrt(this + g^2): without it every new id would jump by lr, whatever its gradient.
    initial_accumulator_value: float = 0.1
    prior: float = 0.01  # click rate guessed before the first impression, the same for all
    shares: tuple[float, ...] = (1 / 32, 1 / 8, 1 / 2, 1.0)  # of what a row for every id takes
    hash_seeds: int = 3  # of the hashed learner, whose losses are averaged
    threshold: int = (
        1  # an id gets in if an earlier batch had it: a table asks once per id and batch
    )
    filter_share: float = 0.15  # of a budget goes to the filter
    keep_seconds: int = 24 * HOUR
    block: int = 1000  # impressions in a block of the interval
    control_shares: tuple[float, ...] = (1 / 8, 1.0)


@dataclass(frozen=True)
class Log:
    ids: Tensor  # (n, features) int64
    clicks: Tensor  # (n,) float32
    seconds: np.ndarray  # (n,) int64, never decreasing
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.clicks)


def find_data() -> Path:
    """Where obp keeps its data; obp itself is not imported, and its dependencies are not needed."""
    found = importlib.util.find_spec("obp")
    if found is None or not found.submodule_search_locations:
        raise ExampleError(f"obp: expected to be installed for its data, found none. {INSTALL}")
    return Path(next(iter(found.submodule_search_locations))) / "dataset" / "obd"


def read(folder: Path) -> Log:
    """Impressions of all policies and campaigns under ``folder``, in the order of their time."""
    paths = sorted(p for p in folder.glob("*/*/*.csv") if p.name != "item_context.csv")
    if not paths:
        raise ExampleError(
            f"--data {folder}: expected <policy>/<campaign>/<campaign>.csv, found none."
        )
    rows: list[tuple[str, ...]] = []
    for path in paths:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise ExampleError(f"{path}: expected columns {', '.join(missing)}, found none.")
            policy, campaign = path.parts[-3:-1]
            for r in reader:
                what = (r["timestamp"], policy, campaign, r["item_id"], r["position"], r["click"])
                rows.append((*what, *(r[name] for name in USER)))
    rows.sort()
    return encode(rows)


def encode(rows: list[tuple[str, ...]]) -> Log:
    """Impressions (time, policy, campaign, item, position, click, user features) to 64-bit ids of features."""
    column = list(zip(*rows))
    moments = [datetime.fromisoformat(x).astimezone(timezone.utc) for x in column[0]]
    clicks = torch.tensor([float(x) for x in column[5]])
    base: dict[str, np.ndarray] = {
        "policy": hash_strings(column[1]),
        "campaign": hash_strings(column[2]),
        "item": hash_strings([f"{c}/{i}" for c, i in zip(column[2], column[3])]),
        "position": hash_strings(column[4]),
        "hour": hash_strings([f"{m.hour}" for m in moments]),
        "day": hash_strings([f"{m:%Y-%m-%d}" for m in moments]),
        "clock": hash_strings([f"{m:%Y-%m-%d %H}" for m in moments]),
        "segment": hash_strings([" ".join(r[6:]) for r in rows]),
    }
    for i in range(4):
        base[f"user{i}"] = hash_strings(column[6 + i])
    crosses: list[tuple[str, ...]] = [
        (),
        *((name,) for name in base if name not in ("day", "clock")),
    ]
    crosses += [(f"user{i}", "item") for i in range(4)]
    crosses += [("item", "position"), ("item", "hour"), ("item", "clock"), ("segment", "hour")]
    crosses += [("segment", "item"), ("segment", "item", "position"), ("segment", "clock")]
    crosses += [("segment", "item", "day"), ("segment", "item", "clock")]
    ids = np.stack([cross(names, base, len(rows)) for names in crosses], 1)
    distinct, counts = np.unique(ids, return_counts=True)
    facts = {
        "impressions": len(rows),
        "clicks": int(clicks.sum()),
        "from": f"{moments[0]:%Y-%m-%d %H:%M}",
        "until": f"{moments[-1]:%Y-%m-%d %H:%M}",
        "features": [" x ".join(names) or "bias" for names in crosses],
        "ids": len(distinct),
        "ids_seen_once": int((counts == 1).sum()),
    }
    seconds = np.array([int(m.timestamp()) for m in moments], np.int64)
    return Log(torch.from_numpy(ids), clicks, seconds, facts)


def cross(names: tuple[str, ...], base: dict[str, np.ndarray], n: int) -> np.ndarray:
    """One 64-bit id for each combination of the columns: a hash of a hash, begun by the names."""
    ids = np.broadcast_to(hash_strings([" x ".join(names)]), n).copy()
    for place, name in enumerate(names):
        ids = salted_hash_bucket(ids ^ base[name], 2**63 - 1, feature=place)
    return ids


INDEX_BYTES = 64 / 12 / 0.85
"""Of a collisionless row: a cache line of index holds twelve, and is filled to 0.85."""
HASHED_BYTES = 8
"""Of a hashed row: a weight and Adagrad's sum, float32."""


def row_bytes(*, bounded: bool, tracked: bool) -> float:
    """What a collisionless row takes: key, weight, sum, score for eviction, second of last use; then the index."""
    return math.ceil((8 + 4 + 4 + 8 * bounded + 4 * tracked) / 8) * 8 + INDEX_BYTES


class Learner(Protocol):
    def predict(self, ids: Tensor, second: int) -> Tensor:
        """Logits, from what was learned so far; no label is in sight."""

    def learn(self, logits: Tensor, clicks: Tensor) -> None: ...

    def facts(self) -> dict[str, Any]: ...


class Hashed:
    """``nn.EmbeddingBag`` over buckets: ids that meet in one share its weight."""

    def __init__(self, budget: float, settings: Settings, rate: float, seed: int = 0) -> None:
        torch.sparse.check_sparse_tensor_invariants.disable()  # or torch warns that it does not
        self.rows, self.seed = int(budget // HASHED_BYTES), seed
        self.bag = nn.EmbeddingBag(self.rows, 1, mode="sum", sparse=True)
        nn.init.zeros_(self.bag.weight)
        self.optimizer = torch.optim.Adagrad(
            self.bag.parameters(),
            lr=rate,
            initial_accumulator_value=settings.initial_accumulator_value,
        )
        self.used = torch.zeros(self.rows, dtype=torch.bool)  # for the report; not counted
        self.prior = math.log(settings.prior / (1 - settings.prior))

    def predict(self, ids: Tensor, second: int) -> Tensor:
        buckets: Tensor = salted_hash_bucket(ids, self.rows, seed=self.seed)
        self.used[buckets] = True
        logits: Tensor = self.bag(buckets)
        return logits[:, 0] + self.prior

    def learn(self, logits: Tensor, clicks: Tensor) -> None:
        self.optimizer.zero_grad()
        binary_cross_entropy_with_logits(logits, clicks, reduction="sum").backward()
        self.optimizer.step()

    def facts(self) -> dict[str, Any]:
        rows = {"rows": self.rows, "rows_in_use": int(self.used.sum())}
        return {**rows, "bytes": self.rows * HASHED_BYTES}


class Collisionless:
    """``HashEmbeddingBag``: a row of its own for every id, as long as there is room."""

    def __init__(
        self,
        budget: float | None,
        settings: Settings,
        rate: float,
        *,
        admit: bool = False,
        expire: bool = False,
    ) -> None:
        self.filter: CountFilter | None = None
        self.keep = settings.keep_seconds if expire else None
        self.row_bytes = row_bytes(bounded=budget is not None, tracked=expire)
        rest = budget
        if admit and budget is not None:
            self.filter = counter(int(budget * settings.filter_share), settings.threshold)
            rest = budget - self.filter.nbytes
        self.bag = HashEmbeddingBag(
            1,
            mode="sum",
            optimizer=Adagrad(
                lr=rate, initial_accumulator_value=settings.initial_accumulator_value
            ),
            initializer=Constant(0.0),
            admission=self.filter,
            track=("use",) if expire else (),
            max_capacity=None if rest is None else max(1, int(rest // self.row_bytes)),
            evict_strategy="none" if rest is None else "lfu",
        )
        self.expired, self.most, self.last_look = 0, 0, 0
        self.prior = math.log(settings.prior / (1 - settings.prior))

    def predict(self, ids: Tensor, second: int) -> Tensor:
        if self.keep is not None:
            self.bag.time = second
            if second >= self.last_look + HOUR:  # once an hour of the data
                self.expired += self.bag.table.expire(second - self.keep)
                self.last_look = second
        logits: Tensor = self.bag(ids)
        self.most = max(self.most, len(self.bag.table))
        return logits[:, 0] + self.prior

    def learn(self, logits: Tensor, clicks: Tensor) -> None:
        binary_cross_entropy_with_logits(logits, clicks, reduction="sum").backward()

    def facts(self) -> dict[str, Any]:
        table = self.bag.table
        extra = 0 if self.filter is None else self.filter.nbytes
        rows = self.most if table.max_capacity is None else table.max_capacity
        return {
            "rows": rows,
            "rows_in_use": len(table),
            "most_rows_in_use": self.most,
            "rows_expired": self.expired,
            "bytes": int(rows * self.row_bytes) + extra,
            "filter_bytes": extra,
            # Rows come in chunks of about 4 MiB of addresses, which a small table does not fill.
            "address_space_bytes": table.nbytes + extra,
        }


def counter(most_bytes: int, threshold: int) -> CountFilter:
    """The largest filter of one split that fits: about 3 bytes per id it can remember."""
    capacity = max(2, most_bytes // 3)
    while capacity > 2 and CountFilter(capacity, threshold, splits=1).nbytes > most_bytes:
        capacity = max(2, int(capacity * 0.95))
    return CountFilter(capacity, threshold, splits=1)


UNBOUNDED = "collisionless, no bound"
ARMS = ("hashed", "collisionless", "+ admission", "+ expiry", "+ both")


def made(arm: str, budget: float | None, settings: Settings, rate: float, seed: int = 0) -> Learner:
    if arm == "hashed" and budget is not None:
        return Hashed(budget, settings, rate, seed)
    admit, expire = arm in ("+ admission", "+ both"), arm in ("+ expiry", "+ both")
    return Collisionless(budget, settings, rate, admit=admit, expire=expire)


@dataclass
class Course:
    """losses (n,) of each impression as it came, before it was learned from."""

    losses: np.ndarray
    seconds: float
    rows: list[int] = field(default_factory=list)  # in use, every hundredth of the log


def prequential(log: Log, learner: Learner, batch: int) -> Course:
    losses, rows = np.empty(len(log)), []
    every = max(1, len(log) // batch // 100)
    begun = time.perf_counter()
    watching = 0.0
    for number, start in enumerate(range(0, len(log), batch)):
        part = slice(start, start + batch)
        logits = learner.predict(log.ids[part], int(log.seconds[part][-1]))
        clicks = log.clicks[part]
        found = binary_cross_entropy_with_logits(logits.detach(), clicks, reduction="none")
        losses[part] = found.numpy()
        learner.learn(logits, clicks)
        if number % every == 0:
            looked = time.perf_counter()
            rows.append(int(learner.facts()["rows_in_use"]))
            watching += time.perf_counter() - looked
    return Course(losses, time.perf_counter() - begun - watching, rows)


def base_rate(log: Log, settings: Settings) -> np.ndarray:
    """Losses of predicting the click rate so far, begun as if ``prior`` had been seen in 100 impressions."""
    clicks = log.clicks.double().numpy()
    before = np.concatenate(([0.0], np.cumsum(clicks)[:-1]))
    first = np.arange(len(clicks)) // settings.batch * settings.batch  # known before the batch
    rate = (before[first] + 100 * settings.prior) / (first + 100)
    return -(clicks * np.log(rate) + (1 - clicks) * np.log1p(-rate))


def planted(log: Log, seed: int = 0) -> Log:
    """The same impressions; clicks drawn with a log-odds of -2 plus weights of two crosses, normal by the id's hash."""
    features = log.facts["features"]
    odds = np.full(len(log), -2.0)
    for name in ("segment x item", "item x clock"):
        bits = salted_hash_bucket(log.ids[:, features.index(name)].contiguous(), 10**6, seed=seed)
        uniform = (bits.numpy() + 0.5) / 10**6
        odds += np.array([statistics.NormalDist().inv_cdf(u) for u in uniform])
    draws = np.random.default_rng(seed).random(len(log))
    clicks = torch.from_numpy((draws < 1 / (1 + np.exp(-odds))).astype(np.float32))
    facts = {**log.facts, "clicks": int(clicks.sum())}
    return Log(log.ids, clicks, log.seconds, facts)


def interval(values: np.ndarray, block: int, level: float = 0.95) -> dict[str, Any]:
    """Mean, and its interval by means of consecutive blocks, within which neighbours may depend on each other."""
    count, mean = len(values) // block, float(values.mean())
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "blocks": count}
    means = values[: count * block].reshape(count, block).mean(1)
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    t = z + (z**3 + z) / (4 * (count - 1))  # Student's, to the first order
    half = t * float(means.std(ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "blocks": count}


def first_day(log: Log, settings: Settings) -> int:
    """How many impressions rates are chosen on, in whole batches."""
    return int(len(log) * settings.tuning) // settings.batch * settings.batch


def chosen_rate(arm: str, budget: float | None, log: Log, settings: Settings) -> float:
    end = first_day(log, settings)
    begin = Log(log.ids[:end], log.clicks[:end], log.seconds[:end], log.facts)
    losses = {}
    for rate in settings.rates:
        learner = made(arm, budget, settings, rate)
        losses[rate] = float(prequential(begin, learner, settings.batch).losses.mean())
    return min(losses, key=lambda rate: losses[rate])


def run(
    log: Log, settings: Settings, shares: Sequence[float], say: Any = lambda text: None
) -> dict[str, Any]:
    whole = log.facts["ids"] * row_bytes(bounded=True, tracked=False)
    counted = slice(first_day(log, settings), None)
    base = base_rate(log, settings)[counted]
    comparisons = len(shares) * (len(ARMS) - 1)
    block, results = settings.block, []

    def contend(arm: str, budget: float | None, against: Any) -> Any:
        rate = chosen_rate(arm, budget, log, settings)
        runs = []
        for seed in range(settings.hash_seeds if arm == "hashed" else 1):
            learner = made(arm, budget, settings, rate, seed)
            runs.append((learner, prequential(log, learner, settings.batch)))
        losses = np.mean([course.losses[counted] for _, course in runs], 0)
        seconds = statistics.median(course.seconds for _, course in runs)
        minus = None if against is None else losses - against
        found = {
            "arm": arm,
            "budget_bytes": None if budget is None else int(budget),
            "rate": rate,
            "log_loss": interval(losses, block),
            "minus_base_rate": interval(losses - base, block),
            "minus_hashed": None if minus is None else interval(minus, block),
            # Wide enough for all comparisons at once (Bonferroni).
            "minus_hashed_all": None
            if minus is None
            else interval(minus, block, 1 - 0.05 / comparisons),
            "by_seed": [float(course.losses[counted].mean()) for _, course in runs],
            "impressions_per_second": len(log) / seconds,
            "ids_per_second": log.ids.numel() / seconds,
            **runs[0][0].facts(),
            "rows_over_time": runs[0][1].rows,
        }
        results.append(found)
        say(line(found))
        return losses

    say(f"{'':23s}{'budget':>9s}{'rows':>8s}{'in use':>8s}{'log-loss':>10s}  minus hashed, 95 %")
    for share in shares:
        against = None
        for arm in ARMS:
            losses = contend(arm, whole * share, against)
            against = losses if arm == "hashed" else against
    contend(UNBOUNDED, None, None)
    say(f"{'click rate so far':48s}{base.mean():10.5f}")
    return {
        "data": log.facts,
        "counted_from": counted.start,
        "a_row_for_every_id_bytes": int(whole),
        "base_rate": interval(base, block),
        "results": results,
        "verdict": verdict(results),
    }


def line(found: dict[str, Any]) -> str:
    budget = found["budget_bytes"] or found["bytes"]
    text = f"{found['arm']:23s}{budget / 1024:7.0f} K{found['rows']:8d}{found['rows_in_use']:8d}"
    text += f"{found['log_loss']['mean']:10.5f}"
    difference = found["minus_hashed"]
    if difference is not None and difference["low"] is not None:
        text += "  {mean:+.5f} [{low:+.5f}, {high:+.5f}]".format(**difference)
    return f"{text}  rate {found['rate']:g}, {found['impressions_per_second']:.0f}/s"


def verdict(results: list[dict[str, Any]]) -> str:
    """What the intervals allow to say, all comparisons taken together."""
    said = []
    for found in results:
        d = found["minus_hashed_all"]
        if d is not None and d["low"] is not None and (d["low"] > 0 or d["high"] < 0):
            which = "worse" if d["low"] > 0 else "better"
            share = abs(d["mean"]) / (found["log_loss"]["mean"] - d["mean"])
            at = f"{found['arm']} at {found['budget_bytes'] / 1024:.0f} K"
            said.append(f"{at} is {which} by {share:.2%}")
    if not said:
        return "All comparisons taken together, no learner differs from the hashed one."
    return (
        "All comparisons taken together, against hashed "
        f"{'; '.join(said)}. Other differences are within their intervals."
    )


def picture(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for row, name in enumerate(("log", "control")):
        draw(report[name], axes[row], "" if name == "log" else "Planted clicks: ")
    data, machine = report["log"]["data"], report["machine"]
    figure.suptitle(
        f"Open Bandit Dataset, small: {data['impressions']} impressions, {data['clicks']} clicks, "
        f"{data['ids']} ids; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def draw(found: dict[str, Any], axes: Any, what: str) -> None:
    loss, difference, use = axes
    of = {arm: [r for r in found["results"] if r["arm"] == arm] for arm in ARMS}
    budgets = [r["budget_bytes"] / 1024 for r in of["hashed"]]
    for place, (arm, rows) in enumerate(of.items()):
        style = {"label": arm, "color": f"C{place}"}
        loss.plot(budgets, [r["log_loss"]["mean"] for r in rows], "o-", **style)
        if arm != "hashed" and rows[0]["minus_hashed"]["low"] is not None:
            d = [r["minus_hashed"] for r in rows]
            means = [v["mean"] for v in d]
            near = [b * 1.08 ** (place - 2.5) for b in budgets]
            half = [v["high"] - v["mean"] for v in d]
            difference.errorbar(near, means, half, fmt="o", capsize=3, **style)
        over_time = rows[len(rows) // 2]["rows_over_time"]
        use.plot(np.linspace(0, 100, len(over_time)), over_time, **style)
    free = next(r for r in found["results"] if r["arm"] == UNBOUNDED)
    loss.axhline(free["log_loss"]["mean"], color="black", lw=1, label=UNBOUNDED)
    loss.axhline(found["base_rate"]["mean"], color="grey", ls=":", label="click rate so far")
    difference.axhline(0, color="black", lw=1)
    for one, title, label in (
        (loss, "log-loss, predicted before learned", "log-loss"),
        (difference, "minus hashed, 95 % by blocks", "difference in log-loss"),
    ):
        one.set(title=what + title, xlabel="memory, KiB", ylabel=label, xscale="log")
        one.set_xticks(budgets, [f"{b:.0f}" for b in budgets])
        one.set_xticks([], minor=True)
        one.legend(fontsize=8)
    budget = budgets[len(budgets) // 2]
    use.set(title=f"{what}rows in use at {budget:.0f} KiB", xlabel="% of the log", ylabel="rows")
    use.legend(fontsize=8)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.online_recommender",
        description="Learn clicks from a real log in one pass: hashed against collisionless at the same memory.",
    )
    made.add_argument("--data", type=Path, help="folder of the log (default: inside package obp)")
    made.add_argument("--out", type=Path, default=Path("out/online"), help="default: %(default)s")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return made


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    given = parser().parse_args(arguments)
    settings = settings or Settings()
    # A batch is a thousand ids: a second thread gains nothing, and on a busy machine it is waited for.
    torch.set_num_threads(1)
    say = (lambda text: None) if given.quiet else (lambda text: print(text, flush=True))
    try:
        log = read(given.data or find_data())
        data = log.facts
        say(
            f"{data['impressions']} impressions, {data['clicks']} clicks, {data['ids']} ids, "
            f"{data['ids_seen_once']} of them seen once; about a minute."
        )
        given.out.mkdir(parents=True, exist_ok=True)
        found = run(log, settings, settings.shares, say)
        say(
            f"{found['verdict']}\n\nControl: the same impressions, clicks drawn from planted weights"
        )
        control = run(planted(log), settings, settings.control_shares, say)
        say(control["verdict"])
    except ExampleError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    report = {
        "settings": asdict(settings),
        "log": found,
        "control": control,
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    (given.out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    picture(report, given.out / PICTURE)
    say(f"Report: {given.out / REPORT} and {given.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
