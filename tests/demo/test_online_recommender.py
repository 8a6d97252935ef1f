# SPDX-License-Identifier: Apache-2.0
"""The online example on a tiny log: no label is seen early, bytes are equal, the report says what was found."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  (puts the root of the repository on the path)
import numpy as np
import pytest
import torch
from hotloop.table import Adagrad, Table

from examples import online_recommender as online

TINY = online.Settings(
    batch=8, rates=(0.02, 0.1), shares=(0.25, 1.0), control_shares=(0.5,), hash_seeds=2, block=40
)
FIELDS = ["", *online.COLUMNS[:4], "propensity_score", *online.USER]


def write_log(folder: Path, rows: int = 160) -> Path:
    """Two policies, two campaigns, a week; one item is clicked by one kind of user."""
    chance = random.Random(0)
    for policy in ("random", "bts"):
        for campaign in ("men", "all"):
            path = folder / policy / campaign / f"{campaign}.csv"
            path.parent.mkdir(parents=True)
            (path.parent / "item_context.csv").write_text(",item_id\n0,0\n")
            with open(path, "w", newline="") as file:
                out = csv.writer(file)
                out.writerow(FIELDS)
                for i in range(rows):
                    hour = i * 168 // rows
                    stamp = f"2019-11-{24 + hour // 24} {hour % 24:02}:{i % 60:02}:00.5+00:00"
                    item, user = chance.randrange(4), [chance.choice("abc") for _ in range(4)]
                    click = int(chance.random() < (0.8 if item == 1 and user[0] == "a" else 0.05))
                    out.writerow([i, stamp, item, chance.randrange(1, 4), click, 0.25, *user])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def log(folder: Path) -> online.Log:
    return online.read(folder)


def budget(log: online.Log) -> float:
    return float(log.facts["ids"] * online.row_bytes(bounded=True, tracked=False))


def learner(arm: str, log: online.Log, share: float = 0.5) -> online.Learner:
    return online.made(arm, budget(log) * share, TINY, 0.1)


def test_the_log_is_in_order_and_its_ids_tell_features_apart(log):
    assert len(log) == 640 == log.facts["impressions"]
    assert (np.diff(log.seconds) >= 0).all()
    assert log.ids.shape == (640, len(log.facts["features"]))
    assert log.facts["clicks"] == int(log.clicks.sum()) > 20
    columns = [set(c.tolist()) for c in log.ids.t()]
    assert sum(map(len, columns)) == log.facts["ids"]  # no id stands in two columns
    assert len(columns[0]) == 1  # the bias
    by_name = dict(zip(log.facts["features"], columns))
    assert len(by_name["item"]) == 8  # four of each campaign
    assert len(by_name["item x position"]) == 24


class Spy:
    """Notes which impressions are asked for and told, in which order."""

    def __init__(self, inner: online.Learner) -> None:
        self.inner, self.calls = inner, []

    def predict(self, ids, second):
        self.calls.append(("predict", len(ids)))
        return self.inner.predict(ids, second)

    def learn(self, logits, clicks):
        self.calls.append(("learn", len(clicks)))
        self.inner.learn(logits, clicks)

    def facts(self):
        return self.inner.facts()


class Peeking(Spy):
    """Negative control: learns what it is asked before it answers."""

    def __init__(self, inner: online.Learner, log: online.Log) -> None:
        super().__init__(inner)
        self.log, self.at = log, 0

    def predict(self, ids, second):
        part = slice(self.at, self.at + len(ids))
        self.at += len(ids)
        for _ in range(5):
            self.inner.learn(self.inner.predict(ids, second), self.log.clicks[part])
        return self.inner.predict(ids, second)

    def learn(self, logits, clicks):
        pass


def test_every_batch_is_predicted_before_it_is_learned(log):
    spy = Spy(learner("hashed", log))
    online.prequential(log, spy, 100)
    sizes = [100] * 6 + [40]
    assert spy.calls == [(what, n) for n in sizes for what in ("predict", "learn")]


def losses_of_ones(log, arm, changed_from=None):
    """-log p(click) of every impression, so that labels do not enter but through what was learned."""
    clicks = log.clicks.clone()
    if changed_from is not None:
        clicks[changed_from:] = 1 - clicks[changed_from:]
    found = online.prequential(replace(log, clicks=clicks), learner(arm, log), 8).losses
    p = np.where(clicks.numpy() == 1, np.exp(-found), 1 - np.exp(-found))
    return -np.log(np.maximum(p, 1e-9))


@pytest.mark.parametrize("arm", online.ARMS)
def test_labels_change_later_predictions_only(log, arm):
    """Labels from impression 320 on are turned round: the batch they are in does not feel it, the next one does."""
    plain, changed = losses_of_ones(log, arm), losses_of_ones(log, arm, 320)
    np.testing.assert_allclose(plain[:328], changed[:328], rtol=1e-3)
    assert np.abs(plain[328:] - changed[328:]).mean() > 0.05


def test_the_check_for_leaks_would_find_one(log):
    """Labels drawn by a coin carry nothing: honest learners do not beat the coin, a peeking one does."""
    coin = (torch.rand(len(log), generator=torch.Generator().manual_seed(1)) < 0.5).float()
    drawn = replace(log, clicks=coin)
    settings = replace(TINY, prior=0.5)
    for arm in online.ARMS:
        made = online.made(arm, budget(log), settings, 0.1)
        assert online.prequential(drawn, made, 8).losses.mean() > math.log(2) - 0.01, arm
    peeking = Peeking(online.made("collisionless", budget(log), settings, 0.1), drawn)
    assert online.prequential(drawn, peeking, 8).losses.mean() < math.log(2) - 0.1


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_all_learners_have_the_same_bytes(log, share):
    have = budget(log) * share
    for arm in online.ARMS:
        made = learner(arm, log, share)
        online.prequential(log, made, 8)
        facts = made.facts()
        assert 0.98 * have - 64 <= facts["bytes"] <= have, (arm, facts)
        assert facts["rows_in_use"] <= facts["rows"]
    dense = online.made("hashed", have, TINY, 0.1)
    online.prequential(log, dense, 8)
    (state,) = dense.optimizer.state.values()
    held = [dense.bag.weight, state["sum"]]
    assert dense.facts()["bytes"] == sum(x.numel() * x.element_size() for x in held)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_rows_are_counted_at_what_the_table_takes(bounded, tracked):
    n = 400_000  # where whole chunks and the last doubling of the index weigh little
    table = Table(
        1,
        optimizer=Adagrad(),
        capacity=n,
        max_capacity=n if bounded else None,
        evict_strategy="lfu" if bounded else "none",
        track="use" if tracked else (),
    )
    table.find_or_insert(np.arange(n))
    row = online.row_bytes(bounded=bounded, tracked=tracked)
    assert row - online.INDEX_BYTES == table._native.row_bytes
    assert n * row * 0.95 <= table.nbytes <= n * row * 1.05 + (5 << 20)


def test_what_admission_and_expiry_do_to_rows(log):
    rows = {}
    for arm in online.ARMS[1:]:
        made = online.made(arm, 4 * budget(log), TINY, 0.1)
        online.prequential(log, made, 8)
        rows[arm] = made.facts()["rows_in_use"]
    assert rows["collisionless"] == log.facts["ids"]
    batches = np.concatenate([np.unique(part) for part in np.split(log.ids.numpy(), 80)])
    seen_again = int((np.unique(batches, return_counts=True)[1] > 1).sum())
    assert seen_again <= rows["+ admission"] <= seen_again * 1.02 + 5
    assert rows["+ both"] < rows["+ expiry"] < rows["collisionless"]
    last = log.seconds >= log.seconds[-1] - TINY.keep_seconds - online.HOUR
    assert rows["+ expiry"] <= len(np.unique(log.ids[torch.from_numpy(last)]))


def test_without_collisions_hashed_and_collisionless_agree(log):
    """With room for all, the two differ by collisions alone, and 200 times the rows leave few."""
    free = online.prequential(log, online.made("collisionless", None, TINY, 0.1), 8).losses
    roomy = online.prequential(log, online.Hashed(200 * budget(log), TINY, 0.1), 8).losses
    assert np.abs(free - roomy).mean() < 2e-3


def test_intervals_hold_their_level_on_noise():
    """400 intervals of 20 blocks of noise: 95 % is 380, and fewer than 364 has a chance below 1 in 1000."""
    noise = np.random.default_rng(0).normal(size=(400, 20 * 10))
    found = [online.interval(x, 10) for x in noise]
    assert 364 <= sum(f["low"] <= 0 <= f["high"] for f in found) <= 396
    assert online.interval(noise[0], 150)["low"] is None
    wide, plain = online.interval(noise[0], 10, 0.999), found[0]
    assert wide["low"] < plain["low"]


def test_the_report(folder, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert online.main(["--data", str(folder), "--out", str(tmp_path)], TINY) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    report = json.loads((tmp_path / online.REPORT).read_text())
    assert (tmp_path / online.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert set(report) == {"settings", "log", "control", "machine"}
    assert report["log"]["counted_from"] == 640 // 7 // 8 * 8
    for part, shares in ((report["log"], 2), (report["control"], 1)):
        results = part["results"]
        assert [r["arm"] for r in results] == [*online.ARMS * shares, online.UNBOUNDED]
        assert part["verdict"] in said
        for r in results:
            assert r["log_loss"]["low"] < r["log_loss"]["mean"] < r["log_loss"]["high"]
            assert r["rate"] in TINY.rates
            assert r["impressions_per_second"] > 0
            assert r["bytes"] > 0 and len(r["rows_over_time"]) >= 50
            assert (r["minus_hashed"] is None) == (r["arm"] in ("hashed", online.UNBOUNDED))
            assert len(r["by_seed"]) == (2 if r["arm"] == "hashed" else 1)
    assert report["log"]["data"]["clicks"] != report["control"]["data"]["clicks"]


def test_two_runs_agree(log):
    def kept(found):
        return [{k: v for k, v in r.items() if "second" not in k} for r in found["results"]]

    a, b = (online.run(log, TINY, (0.5,)) for _ in range(2))
    assert kept(a) == kept(b)


def test_errors(tmp_path, folder, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "out"), "--quiet"]
    assert online.main(["--data", str(tmp_path), *out]) == 2
    assert "expected <policy>/<campaign>/<campaign>.csv, found none." in capsys.readouterr().err
    bad = tmp_path / "log" / "random" / "men"
    bad.mkdir(parents=True)
    (bad / "men.csv").write_text("timestamp,item_id,position\n")
    assert online.main(["--data", str(tmp_path / "log"), *out]) == 2
    assert "men.csv: expected columns click, user_feature_0, found none." in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert online.main(out) == 2
    assert online.INSTALL in capsys.readouterr().err
