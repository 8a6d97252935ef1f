"""A trainer of a table killed at random instants, run as a program without torch so that a fork costs milliseconds.

``python table_kill_rows.py save|publish|grow DIRECTORY KILLS`` prints what it saw as JSON and fails if anything was
lost. Every element of a row is its key plus the number of the write, so that a row of two writes would show.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from hotloop.table import CountFilter, Table
from hotloop.table.files.deltas import pending, publish

ROWS, DIM = 300, 24
KEYS = np.arange(ROWS)


def rows_of(write, keys=KEYS):
    return np.repeat((keys + 1000 * write).astype(np.float32)[:, None], DIM, 1)


def write_of(table):
    """Every row is whole; returns (lowest, highest) number of the writes that they are of."""
    rows = table.export()
    assert (rows.values == rows.values[:, :1]).all(), "a row is torn"
    writes, rest = np.divmod(rows.values[:, 0] - rows.keys % 1000, 1000)
    assert not rest.any(), "a row of another key"
    return int(writes.min()), int(writes.max()), rows.keys


def save(directory, number, say):
    """Rows change while they are saved: the snapshot holds each as before or after."""
    table = Table(DIM, track="changes", admission=CountFilter(1000, 1))
    table.insert_or_assign(KEYS, rows_of(10 * number))
    table.admission.add(KEYS, np.full(ROWS, number % 15 + 1))
    stop = threading.Event()

    def keep_writing():
        while not stop.is_set():
            for write in range(10 * number, 10 * number + 10):
                table.insert_or_assign(KEYS, rows_of(write))

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    say()
    table.save(directory / "t")
    say()
    stop.set()
    thread.join()


def saved(directory):
    table = Table.load(directory / "t")
    lowest, highest, keys = write_of(table)
    if table.admission is not None:  # the first has none
        sightings = table.admission.counts(KEYS)
        assert (sightings == lowest // 10 % 15 + 1).all(), "rows and filter of two snapshots"
    assert keys.tolist() == KEYS.tolist()
    assert lowest // 10 == highest // 10, "rows of two snapshots"
    return lowest // 10


def publish_next(directory, number, say):
    """What a trainer does after a restart: the snapshot, what was published since, one more step."""
    table = restored(directory)
    mark = table._position
    assert mark == number, (mark, number)
    table.insert_or_assign(KEYS, rows_of(number + 1))
    table.erase(KEYS[number % ROWS : number % ROWS + 1])
    delta = table.delta(mark)
    say()
    publish(directory / "d", delta.to_bytes())
    say()


def restored(directory):
    table = Table.load(directory / "t")
    while found := pending(directory / "d", table.table_id, table._position):
        for delta in found:
            assert table.apply(delta) is True
    return table


def published(directory):
    table = restored(directory)
    number = table._position
    lowest, highest, keys = write_of(table)
    if number > 1:
        assert lowest == highest == number, (lowest, highest, number)
        gone = (number - 1) % ROWS
        assert keys.tolist() == [key for key in range(ROWS) if key != gone]
    return number


def grow(directory, number, say):
    """Growth and eviction in memory beside a table that was saved: files are none of their business."""
    table = Table.load(directory / "t", capacity=1)
    say()
    for step in range(40):
        keys = np.arange(1000) + 1000 * step
        table.insert_or_assign(keys, rows_of(number, keys % 1000))
        table.reserve(min(table.capacity + 1, 10**5))
    say()


def grown(directory):
    assert sorted(os.listdir(directory / "t")) == grown.names
    published(directory)
    return grown.number


def start(write, directory, number):
    """A process that says "." when its critical part begins and ends, and the pipe to hear it."""
    hear, tell = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(hear)
            write(directory, number, lambda: os.write(tell, b"."))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    return process, hear


def main(what, where, kills):
    directory = Path(where)
    directory.mkdir()
    generator = random.Random(6)
    table = Table(DIM, track="changes")
    table.insert_or_assign(KEYS, rows_of(10 if what == "save" else 0))
    table.save(directory / "t")
    grown.names, grown.number = sorted(os.listdir(directory / "t")), 1
    write, read = {
        "save": (save, saved),
        "publish": (publish_next, published),
        "grow": (grow, grown),
    }[what]
    if what != "save":
        (directory / "d").mkdir()
        publish_next(directory, 1, lambda: None)
    number = read(directory)
    durations = []
    for _ in range(5):
        process, hear = start(write, directory, number + (what == "save"))
        assert os.read(hear, 1) == b"."
        begin = time.perf_counter()
        assert os.read(hear, 1) == b"."
        durations.append(time.perf_counter() - begin)
        assert os.waitpid(process, 0)[1] == 0
        os.close(hear)
        number = read(directory)
    typical = sorted(durations)[2]
    seen: Counter[str] = Counter()
    for kill in range(kills):
        if (
            what == "publish" and kill % 20 == 19
        ):  # or every restart would apply all deltas there ever were
            restored(directory).save(directory / "t")
        process, hear = start(write, directory, number + (what == "save"))
        assert os.read(hear, 1) == b"."
        time.sleep(generator.random() * 1.3 * typical)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "a write failed by itself"
        done = os.read(hear, 1) == b"."
        os.close(hear)
        found = read(directory)
        wanted = (number,) if what == "grow" else (number, number + 1)
        assert found in wanted, (found, number)
        assert what == "grow" or found == number + 1 or not done, "a finished write was lost"
        seen["done" if done else "new" if found > number else "old"] += 1
        number = found
    print(json.dumps({**seen, "ms": 1e3 * typical}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
