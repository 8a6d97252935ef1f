# SPDX-License-Identifier: Apache-2.0
"""Writers killed at random instants, run as a program without torch so that a fork costs milliseconds.

``python table_kill.py files-save|files-publish|save|publish|grow DIRECTORY KILLS`` prints what it saw as JSON and
fails if anything was lost: of files that say which generation they are, or of the rows of a table that is trained.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hotloop.table import CountFilter, Table
from hotloop.table.files import snapshots
from hotloop.table.files.deltas import Delta, encode_delta, pending, publish

TABLE_ID = "0" * 32
Say = Callable[[], object]


def nothing(directory: Path) -> None:
    pass


@dataclass
class Writer:
    write: Callable[[Path, int, Say], None]
    """Writes this generation, and calls ``say`` where its critical part begins and ends."""
    read: Callable[[Path], int]
    """The generation that is there, checked."""
    begin: Callable[[Path], None]
    tidy: Callable[[Path], None] = nothing
    """After every twentieth kill."""
    moves: bool = True
    """Whether a write makes the next generation."""


# --- files


def save_generation(directory: Path, generation: int, say: Say) -> None:
    block = {"keys": np.full(40, generation), "values": np.full((40, 4), generation, np.float32)}
    say()
    snapshots.save(directory, {"generation": generation}, [block], part_bytes=24 * 10)
    say()


def generation_of_snapshot(directory: Path) -> int:
    config, blocks = snapshots.load(directory)
    generation, count = config["generation"], 0
    for block in blocks:
        assert (block["keys"] == generation).all() and (block["values"] == generation).all()
        count += len(block["keys"])
    assert count == 40, count
    return int(generation)


def publish_generation(directory: Path, generation: int, say: Say) -> None:
    rows = {"keys": np.full(500, generation), "values": np.full((500, 4), generation, np.float32)}
    delta = Delta(TABLE_ID, generation - 1, generation, rows, np.arange(3))
    say()
    publish(directory, encode_delta(delta))
    say()


def generation_of_deltas(directory: Path) -> int:
    generation = 1
    while found := pending(directory, TABLE_ID, generation):
        for delta in found:
            assert (delta.keys == delta.until).all() and len(delta.keys) == 500
            generation = delta.until
    return generation


def begin_deltas(directory: Path) -> None:
    for generation in (1, 2):  # so that a reader at position 1 has the newest delta to look for
        publish_generation(directory, generation, lambda: None)


def left_over(directory: Path) -> bool:
    names = os.listdir(directory)
    tokens = {name.split("-")[1] for name in names if name.startswith("part-")}
    return len(tokens) > 1 or any(name.endswith(".hotloop-tmp") for name in names)


# --- a table; every element of a row is its key plus 1000 times the number of the write, so that a torn row shows

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


def begin(directory: Path, write: int = 0) -> None:
    table = Table(DIM, track="changes")
    table.insert_or_assign(KEYS, rows_of(write))
    table.save(directory / "t")


def begin_published(directory: Path) -> None:
    begin(directory)
    (directory / "d").mkdir()
    publish_next(directory, 2, lambda: None)


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
    assert mark == number - 1, (mark, number)
    table.insert_or_assign(KEYS, rows_of(number))
    table.erase(KEYS[mark % ROWS : mark % ROWS + 1])
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
    assert len(os.listdir(directory / "t")) == 2, "another file than the manifest and its part"
    return published(directory)


WRITERS = {
    "files-save": Writer(
        save_generation,
        generation_of_snapshot,
        lambda directory: save_generation(directory, 1, lambda: None),
    ),
    "files-publish": Writer(publish_generation, generation_of_deltas, begin_deltas),
    "save": Writer(save, saved, lambda directory: begin(directory, 10)),
    "publish": Writer(
        publish_next,
        published,
        begin_published,
        # Or every restart would apply all deltas there ever were.
        tidy=lambda directory: restored(directory).save(directory / "t"),
    ),
    "grow": Writer(grow, grown, begin_published, moves=False),
}


def start(writer: Writer, directory: Path, number: int) -> tuple[int, int]:
    """A process that writes, and the pipe to hear that it began and ended its critical part."""
    hear, tell = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(hear)
            writer.write(directory, number, lambda: os.write(tell, b"."))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    assert os.read(hear, 1) == b"."
    return process, hear


def main(what: str, where: str, kills: int) -> None:
    writer, directory = WRITERS[what], Path(where)
    directory.mkdir()
    writer.begin(directory)
    number = writer.read(directory)
    durations = []
    for _ in range(7):
        process, hear = start(writer, directory, number + writer.moves)
        begun = time.perf_counter()
        assert os.read(hear, 1) == b"."
        durations.append(time.perf_counter() - begun)
        assert os.waitpid(process, 0)[1] == 0
        os.close(hear)
        number = writer.read(directory)
    longest = sorted(durations)[-2]  # the slowest is an outlier
    generator, seen = random.Random(5), Counter()
    for kill in range(kills):
        process, hear = start(writer, directory, number + writer.moves)
        time.sleep(generator.random() * 1.2 * longest)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "a write failed by itself"
        done = os.read(hear, 1) == b"."
        os.close(hear)
        found = writer.read(directory)
        assert found in (number, number + writer.moves), (found, number)
        assert found == number + writer.moves or not done, "a finished write was lost"
        seen["done" if done else "new" if found > number else "old"] += 1
        seen["left-overs"] += left_over(directory)
        number = found
        if kill % 20 == 19:
            writer.tidy(directory)
    process, hear = start(writer, directory, number + writer.moves)
    assert os.waitpid(process, 0)[1] == 0 and not left_over(directory)
    print(json.dumps({**seen, "ms": 1e3 * longest}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
